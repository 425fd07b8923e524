"""The fused expert layer beside unfused ones and SGLang's FP8 MegaMoE: `python -m bench.megamoe`.

One rank with its share of an expert-parallel group of eight: the local work of one of eight ranks, without
links. Our time holds the plan of the routing; bits are compared with the unfused layer's before. Peers have
no shared expert: with `--shared`, their time is that of the routed ones alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from bench import machine, peak
from bench.check import WrongResultError
from bench.megamoe_humming import CLAMP
from bench.peers import run_peer
from bench.rows import PeerResult, Row, read_rows, write_rows
from bench.run import Origin
from bench.table import make_console, print_rows
from bench.timer import CudaDevice, Device, Timing, time_call
from verify.extract import cuda_sha256

KERNEL = "mega_moe"
RANKS = 8  # of the group that one is taken from
TOPK = 6
SHAPES = {  # DeepSeek-V4 Flash and Pro
    "flash": {"hidden": 4096, "inter": 2048, "experts": 256 // RANKS},
    "pro": {"hidden": 7168, "inter": 3072, "experts": 384 // RANKS},
}
TOKENS = (8, 64, 512, 4096, 8192)
RING_FROM = 4096  # tokens from which on kernels with a ring are measured beside others
_EXPONENTS = (112, 121)  # biased exponents of random weight scales
_FP8_EXPONENTS = (116, 121)  # of those of e4m3 weights
_FP8_BLOCK = 128  # weights a scale, both ways
WEIGHTS = ("fp4", "fp8")  # formats of the routed experts' weights
UNFUSED = "unfused"  # our own grouped products and PyTorch, beside the peers
FP4_PEER = "humming"
PEERS = ("sglmega", FP4_PEER)  # SGLang's kernel, of FP8 weights; the best unfused chain, of FP4 weights
_FP4_GROUP = 32  # weights a scale
_ROW_GROUP = 128  # channels a scale of a row
_ROUTING_BYTES = 8  # an expert and its weight
_OUT_BYTES = 2  # a channel
_WORD_BYTES = 4
_FLOPS = 6  # a token, expert, channel and intermediate channel: two linears, the first of twice the width


def config(model: str, tokens: int, multiprocessors: int, *, fp8: bool = False, ranks: int = 1) -> Any:
    """Return the fused kernel's Config for up to `tokens` tokens on one of some ranks, as `FusedLayer`'s."""
    from megamoe.layer import config_for

    s = SHAPES[model]
    return config_for(
        tokens,
        topk=TOPK,
        hidden=s["hidden"],
        inter=s["inter"],
        num_experts=s["experts"],
        clamp=CLAMP,
        multiprocessors=multiprocessors,
        fp8=fp8,
        ranks=ranks,
    )


def ring_changes() -> dict[str, Any]:
    """Return what makes a kernel for many tokens one that widens FP4 weights to a ring, on any rank."""
    from megamoe.layer import PART_ROWS, WIDE_M, WIDE_STAGES

    sizes = {"block_m": WIDE_M, "num_stages": WIDE_STAGES, "dispatch_parts": WIDE_M // PART_ROWS}
    return {**sizes, "wide": True, "widened": True, "dispatchers": False}


def memory(c: Any) -> dict[str, int]:
    """Return bytes of one rank's buffers for a kernel's Config, and of the published kernel's (spec 7.3).

    `symmetric_bytes` are those of the parts that peers reach, as a layer asks for them: whole pages, and the
    routing of all ranks (one rank alone has no peers). `buffer_bytes` are these and what a rank keeps alone.
    """
    from megamoe import buffer

    sizes = buffer.Sizes(
        c.num_ranks, c.tokens, c.topk, c.hidden, c.inter, c.num_experts, c.wave_experts, c.block_m, c.widened
    )
    inputs = c.x_rows * c.hidden + c.scale_rows * (c.hidden // _ROW_GROUP) + _ROUTING_BYTES * c.routing_words
    symmetric = inputs + _OUT_BYTES * c.combine_rows * c.hidden + _WORD_BYTES * c.signal_words
    own = sum(
        r.num_bytes for r in buffer.regions(sizes).values() if (r.written_by, r.read_by) == ("own", "own")
    )
    return {
        "symmetric_bytes": symmetric,
        "buffer_bytes": symmetric + own,
        "published_bytes": buffer.published_bytes(sizes),
    }


def random_experts(model: str, seed: int = 0) -> Any:
    """Return `Experts` of random weights on the GPU."""
    from megamoe.experts import Experts
    from megamoe.reference import RawExperts

    s = SHAPES[model]
    generator = torch.Generator("cuda").manual_seed(seed)

    def raw(n: int, k: int) -> RawExperts:
        options: Any = {"generator": generator, "device": "cuda", "dtype": torch.uint8}
        codes = torch.randint(0, 256, (s["experts"], n, k // 2), **options)
        scale = torch.randint(*_EXPONENTS, (s["experts"], n, k // 32), **options)
        return RawExperts(codes, scale.view(torch.float8_e8m0fnu))

    return Experts(raw(2 * s["inter"], s["hidden"]), raw(s["hidden"], s["inter"]))


def random_fp8_experts(model: str, count: int | None = None, seed: int = 2) -> Any:
    """Return `Experts` of random e4m3 weights on the GPU: the routed ones, or `count` of them."""
    from megamoe.experts import Experts
    from megamoe.reference import Fp8Experts

    s = SHAPES[model]
    experts = s["experts"] if count is None else count
    generator = torch.Generator("cuda").manual_seed(seed)

    def raw(n: int, k: int) -> Fp8Experts:
        options: Any = {"generator": generator, "device": "cuda"}
        w = torch.randn(experts, n, k, **options).to(torch.float8_e4m3fn)
        blocks = experts, n // _FP8_BLOCK, k // _FP8_BLOCK
        scale = torch.randint(*_FP8_EXPONENTS, blocks, dtype=torch.uint8, **options)
        return Fp8Experts(w, scale.view(torch.float8_e8m0fnu))

    return Experts(raw(2 * s["inter"], s["hidden"]), raw(s["hidden"], s["inter"]))


def random_tokens(model: str, tokens: int, seed: int = 1) -> tuple[torch.Tensor, ...]:
    """Return x [tokens, hidden] e4m3, its scales, experts [tokens, 6] int32 evenly spread, and weights."""
    from dsv4_kernels.quant.act_quant import act_quant

    s = SHAPES[model]
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, s["hidden"], generator=generator, device="cuda").bfloat16()
    scores = torch.rand(tokens, s["experts"], generator=generator, device="cuda")
    weights = torch.rand(tokens, TOPK, generator=generator, device="cuda")
    return *act_quant(x, 128), scores.topk(TOPK, -1).indices.int(), weights


def unfused(
    experts: Any,
    x: torch.Tensor,
    scale: torch.Tensor,
    idx: torch.Tensor,
    weights: torch.Tensor,
    shared: Any = None,
) -> Any:
    """Return a call of the unfused chain whose row counts are known beforehand, so that a graph holds it."""
    from megamoe.experts import add_shared
    from megamoe.reference import combine

    chosen = idx.reshape(-1).long()
    order = torch.argsort(chosen, stable=True)
    counts = torch.bincount(chosen, minlength=experts.num_experts).tolist()
    token, sorted_weights = order // TOPK, weights.reshape(-1)[order].contiguous()

    def call() -> torch.Tensor:
        rows = x.view(torch.uint8)[token].view(x.dtype), scale.view(torch.uint8)[token].view(scale.dtype)
        places = torch.empty(len(chosen), x.shape[1], dtype=torch.bfloat16, device="cuda")
        places[order] = experts(*rows, sorted_weights, counts)
        return combine(*add_shared(places.view(*idx.shape, -1), idx, x, scale, shared))

    return call


@dataclass(frozen=True)
class Form:
    """What is timed beside the number of tokens.

    Attributes:
        model: of SHAPES.
        weights: format of the routed experts', of WEIGHTS.
        shared: with a shared expert, whose weights are FP8.
    """

    model: str
    weights: str = "fp4"
    shared: bool = False

    @property
    def name(self) -> str:
        """Of a row's variant, and the beginning of its case's."""
        return f"{self.model}-{self.weights}" + ("-shared" if self.shared else "")

    def num_bytes(self, tokens: int, touched: int) -> int:
        """Return the least bytes moved: weights and scales of the experts touched once, rows in and out."""
        s = SHAPES[self.model]
        weights = 3 * s["hidden"] * s["inter"]
        fp8 = weights + weights // _FP8_BLOCK**2
        expert = fp8 if self.weights == "fp8" else weights // 2 + weights // _FP4_GROUP
        row = s["hidden"] + s["hidden"] // _ROW_GROUP + TOPK * _ROUTING_BYTES + _OUT_BYTES * s["hidden"]
        return touched * expert + self.shared * fp8 + tokens * row

    def num_flops(self, tokens: int) -> int:
        """Return the operations of the products."""
        s = SHAPES[self.model]
        return tokens * (TOPK + self.shared) * _FLOPS * s["hidden"] * s["inter"]


def row_of(
    form: Form, tokens: int, touched: int, timing: Timing, chain: Timing, digest: str, origin: Origin
) -> Row:
    """Return the row of a measured case, whose bits were those of the unfused chain.

    Args:
        form: what was timed.
        tokens: of the rank.
        touched: experts that have one or more of them.
        timing: of the one kernel, with what is launched before it.
        chain: of the unfused chain.
        digest: of the fused kernel's CUDA text.
        origin: of the run.
    """
    s = SHAPES[form.model]
    num_bytes, num_flops = form.num_bytes(tokens, touched), form.num_flops(tokens)
    limit_us, limited_by = origin.ceilings.limit_us(num_bytes, num_flops, origin.ceilings.e4m3_tflops)
    return Row(
        kernel=KERNEL,
        variant=form.name,
        case=f"{form.name}-t{tokens}",
        dims={**s, "tokens": tokens, "topk": TOPK, "touched": touched},
        us=timing.us,
        p20_us=timing.p20_us,
        p80_us=timing.p80_us,
        replays=timing.replays,
        method=timing.method,
        checked="bitwise",
        worst_error=0.0,
        num_bytes=num_bytes,
        num_flops=num_flops,
        limit_us=limit_us,
        limited_by=limited_by,
        cuda_sha256=digest,
        ceilings=vars(origin.ceilings),
        machine=origin.machine,
        commit=origin.commit,
        date=origin.date,
        peers={UNFUSED: PeerResult(chain.us, chain.p20_us, chain.p80_us, chain.method)},
    )


def measure(form: Form, tokens: Sequence[int], device: Device, origin: Origin) -> Iterator[Row]:
    """Check and time our layer for each number of tokens.

    Raises:
        WrongResultError: its bits are not those of the unfused chain; that case was not timed.
    """
    from megamoe.layer import FusedLayer
    from megamoe.virtual import compile_kernel

    experts = random_experts(form.model) if form.weights == "fp4" else random_fp8_experts(form.model)
    shared = random_fp8_experts(form.model, 1, seed=3) if form.shared else None
    fused = FusedLayer(experts, topk=TOPK, max_tokens=max(tokens), shared=shared)
    for count in tokens:
        inputs = random_tokens(form.model, count)
        chain = unfused(experts, *inputs, shared=shared)
        found, wanted = fused(*inputs)[0], chain()
        if not torch.equal(found.view(torch.int16), wanted.view(torch.int16)):
            raise WrongResultError(f"{KERNEL} {form.name}, {count} tokens: other bits than the unfused chain")
        timing = time_call(lambda inputs=inputs: fused(*inputs), device)
        fused.check()
        touched = int((torch.bincount(inputs[2].flatten().long()) > 0).sum())
        c = fused.sized(inputs[0]).ranks.config
        sizes = ", ".join(f"{n / 2**20:.0f} MiB {name}" for name, n in memory(c).items())
        click.echo(f"{form.name}-t{count}: {sizes}")
        text = compile_kernel(c).get_kernel_source()
        yield row_of(form, count, touched, timing, time_call(chain, device), cuda_sha256(text), origin)
    fused.close()


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(sorted(SHAPES)), default=("flash",))
@click.option("--tokens", "tokens", multiple=True, type=int, default=TOKENS)
@click.option(
    "--weights", "formats", multiple=True, type=click.Choice(WEIGHTS), default=("fp4",), help="Repeatable."
)
@click.option("--shared", "with_shared", is_flag=True, help="With the shared expert.")
@click.option("--peer/--no-peer", "with_peers", default=True, help="Time the peers, once for all formats.")
@click.option("--only", "names", multiple=True, type=click.Choice(PEERS), default=PEERS, help="These peers.")
@click.option("--peer-timeout", "timeout_s", default=600.0, show_default=True, metavar="S", help="Of each.")
@click.option("--out", type=click.Path(path_type=Path), help="Results file that rows are added to.")
def main(
    models: tuple[str, ...],
    tokens: tuple[int, ...],
    formats: tuple[str, ...],
    with_shared: bool,
    with_peers: bool,
    names: tuple[str, ...],
    timeout_s: float,
    out: Path | None,
) -> None:
    """Time the fused expert layer on the current GPU, then its peers."""
    device = CudaDevice()
    origin = Origin(peak.measure(device), machine.describe(), machine.commit(), machine.now())
    earlier = read_rows(out) if out else []
    rows: list[Row] = []

    def keep() -> None:
        if out:  # every row that is complete so far, at any time
            write_rows(out, [*earlier, *rows])

    for model in models:
        firsts = {weights: len(rows) + index * len(tokens) for index, weights in enumerate(formats)}
        for weights in formats:
            for row in measure(Form(model, weights, with_shared), tokens, device, origin):
                rows.append(row)
                keep()
                click.echo(f"{row.case}: {row.us:.1f} us ({row.tflops:.0f} TFLOP/s)")
            torch.cuda.empty_cache()  # peers run in processes of their own
        cases = [{**SHAPES[model], "tokens": count} for count in tokens]
        for name in names if with_peers else ():
            found = run_peer(name, KERNEL, cases, timeout_s)
            for weights in formats if name != FP4_PEER else [w for w in formats if w == "fp4"]:
                for index, results in found.items():
                    row = rows[firsts[weights] + index]
                    rows[firsts[weights] + index] = replace(row, peers={**row.peers, **results})
            keep()
    print_rows(rows, make_console())


if __name__ == "__main__":
    main()
