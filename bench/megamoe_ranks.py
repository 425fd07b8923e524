"""The fused expert layer on several GPUs, a process each, beside the same layer without fusion.

    torchrun --nproc-per-node 2 -m bench.megamoe_ranks --out rows.jsonl     # 2, 4 or 8 GPUs of one host
    torchrun --nproc-per-node 2 -m bench.megamoe_ranks --peer               # SGLang's kernel ($PEERS/sglmega)

A rank has an eighth of a model's experts (`--all-experts`: its share of all), so that its work is that of one
of eight ranks. Bits are held against `distributed` and against one GPU with all experts; then the layer and
the unfused chain are timed with a cold L2, forms of the kernel in turns (`--ring`: FP4 weights widened to a
ring, which does not ship for several ranks), and the slowest rank counts. Rows are JSON lines.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from bench import machine, megamoe_unfused
from bench.megamoe import RING_FROM, SHAPES, TOPK, WEIGHTS, memory, random_fp8_experts, ring_changes
from bench.timer import EAGER, GRAPH, MIN_REPLAYS, WARMUP, CudaDevice, time_call
from verify.extract import cuda_sha256

KERNEL = "mega_moe_ranks"
EIGHTH = 8
TOKENS = (1, 8, 512, 4096, 8192)
SHIPS, RING = "ships", "ring"  # forms of the kernel
TURNS = 2  # of timing, each form once in each
ROUTINGS = ("even", "uneven")
_EXPONENTS = (112, 121)  # biased exponents of random weight scales
_FLOPS = 6
_COPY_BYTES = 256 << 20
_WEIGHT_BYTES = {"fp4": 17 / 32, "fp8": 1 + 2**-14}  # half a byte and a scale for 32; a scale for 128 x 128


class RanksDevice(CudaDevice):
    """Captures while other threads (of the collectives' library) go on using the device."""

    def prepare(self, call: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
        """Warm up and capture."""
        for _ in range(WARMUP):
            call()
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                call()
        except RuntimeError:
            torch.cuda.synchronize()
            return call, EAGER
        torch.cuda.synchronize()
        dist.barrier()
        return graph.replay, GRAPH


def random_experts(model: str, experts: int, rank: int, weights: str = "fp4") -> Any:
    """Return `Experts` of random weights of one rank, the same wherever they are made."""
    from megamoe.experts import Experts
    from megamoe.reference import RawExperts

    if weights == "fp8":
        return random_fp8_experts(model, experts, seed=rank)
    s = SHAPES[model]
    generator = torch.Generator("cuda").manual_seed(rank)

    def raw(n: int, k: int) -> RawExperts:
        options: Any = {"generator": generator, "device": "cuda", "dtype": torch.uint8}
        codes = torch.randint(0, 256, (experts, n, k // 2), **options)
        scale = torch.randint(*_EXPONENTS, (experts, n, k // 32), **options)
        return RawExperts(codes, scale.view(torch.float8_e8m0fnu))

    return Experts(raw(2 * s["inter"], s["hidden"]), raw(s["hidden"], s["inter"]))


def random_tokens(model: str, tokens: int, experts: int, routing: str, rank: int) -> tuple[torch.Tensor, ...]:
    """Return a rank's x [tokens, hidden] e4m3, scales, experts [tokens, 6] int32 of all ranks, and weights.

    `uneven`: an expert's odds fall with its number by a factor of about 20, a tenth of the slots are masked,
    and the last rank has no tokens.
    """
    from dsv4_kernels.quant.act_quant import act_quant

    generator = torch.Generator("cuda").manual_seed(100 + rank)
    if routing == "uneven" and rank == dist.get_world_size() - 1:
        tokens = 0
    options: Any = {"generator": generator, "device": "cuda"}
    x = torch.randn(tokens, SHAPES[model]["hidden"], **options).bfloat16()
    scores = torch.rand(tokens, experts, **options)
    if routing == "uneven":
        scores = scores.log() * torch.linspace(1, 20, experts, device="cuda")
    idx = scores.topk(TOPK, -1).indices.int()
    if routing == "uneven":
        idx = torch.where(torch.rand(idx.shape, **options) < 0.1, -1, idx)
    return *act_quant(x, 128), idx, torch.rand(tokens, TOPK, **options)


def on_one_gpu(experts: list[Any], inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return this rank's tokens through the experts of all ranks on this GPU."""
    from megamoe.reference import combine

    x, scale, idx, weights = inputs
    chosen, local = idx.reshape(-1).long(), experts[0].num_experts
    places = torch.zeros(idx.numel(), x.shape[1], dtype=torch.bfloat16, device=x.device)
    for rank, mine in enumerate(experts):
        number = torch.where(chosen // local == rank, chosen % local, local)
        number = torch.where(chosen < 0, local, number)
        counts = torch.bincount(number, minlength=local + 1)[:local]
        order = torch.argsort(number, stable=True)[: int(counts.sum())]
        token = order // TOPK
        rows = x.view(torch.uint8)[token].view(x.dtype), scale.view(torch.uint8)[token].view(scale.dtype)
        places[order] = mine(*rows, weights.reshape(-1)[order].contiguous(), counts.tolist())
    return combine(places.view(*idx.shape, x.shape[1]), idx)


def _agree(value: float, op: Any) -> float:
    found = torch.tensor(float(value), device="cuda", dtype=torch.float64)
    dist.all_reduce(found, op)
    return float(found)


def _all(is_true: bool) -> bool:
    return bool(_agree(is_true, dist.ReduceOp.MIN))


def _unequal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.view(torch.int16) != b.view(torch.int16)).sum()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not _unequal(a, b)


def measure(
    model: str,
    experts_each: int,
    cases: list[tuple[int, str]],
    emit: Callable[[dict[str, Any]], None],
    *,
    weights: str,
    repeats: int,
    times: bool,
    compiles: bool,
    ring: bool,
) -> None:
    """Check and time each case; `emit` gets rows on every rank, one for each form of the kernel."""
    from megamoe import distributed
    from megamoe.layer import FusedLayer

    rank, ranks = dist.get_rank(), dist.get_world_size()
    experts = random_experts(model, experts_each, rank, weights)
    most = max(t for t, _ in cases)

    def layer(**changes: Any) -> FusedLayer:
        return FusedLayer(experts, topk=TOPK, max_tokens=most, timeout_s=20.0, changes=changes)

    layers = {SHIPS: layer()} | ({RING: layer(**ring_changes())} if ring else {})
    everyone = [
        experts if r == rank else random_experts(model, experts_each, r, weights) for r in range(ranks)
    ]
    for tokens, routing in cases:
        inputs = random_tokens(model, tokens, ranks * experts_each, routing, rank)
        case: dict[str, Any] = {"model": model, "weights": weights, "ranks": ranks, "tokens": tokens}
        case |= {"experts_a_rank": experts_each, "routing": routing, "repeats": repeats}
        wanted = {
            "bitwise_distributed": distributed.mega_moe(*inputs, experts),
            "bitwise_one_gpu": on_one_gpu(everyone, inputs),
        }
        dist.barrier()  # who compiles products for its number of rows keeps nobody waiting in the kernel
        forms = {name: made for name, made in layers.items() if name == SHIPS or tokens >= RING_FROM}
        rows = {name: case | {"form": name} | _bits(made, inputs, tokens, wanted, repeats)
                for name, made in forms.items()}  # fmt: skip
        right = {name: made for name, made in forms.items() if rows[name]["bitwise_distributed"]}
        if times and routing == "even":
            unfused, sent = megamoe_unfused.chain(experts, *inputs, compiles=compiles)
            case["unfused_bitwise"] = _all(_same(unfused(), wanted["bitwise_distributed"]))
            _times(case, rows, right, inputs, unfused)
            for name in right:
                rows[name] |= _rates(rows[name], SHAPES[model], inputs[2], sent, experts_each)
        for row in rows.values():
            emit(case | row)
        dist.barrier()
    for made in layers.values():
        made.close()


def _bits(
    layer: Any, inputs: tuple[torch.Tensor, ...], tokens: int, wanted: dict[str, torch.Tensor], repeats: int
) -> dict[str, Any]:
    """Return whether a call's bits are those of each of `wanted`, and of so many more calls.

    Where they are not: of the rank with most, how many of the calls differ, and in how many outputs at most.
    """
    from megamoe.virtual import compile_kernel

    found = layer(*inputs, tokens)[0]
    layer.check()
    c = layer.sized(inputs[0], tokens).ranks.config
    text = compile_kernel(c).get_kernel_source()
    unequal = torch.zeros(repeats, dtype=torch.int64, device="cuda")  # outputs of each call
    for call in range(repeats):
        unequal[call] = _unequal(layer(*inputs, tokens)[0], found)
    layer.check()
    same: dict[str, Any] = {name: _all(_same(found, y)) for name, y in wanted.items()}
    calls = _agree(int((unequal > 0).sum()), dist.ReduceOp.MAX)
    same["repeats_equal"] = calls == 0
    if calls:
        most = _agree(int(unequal.max()), dist.ReduceOp.MAX)
        same |= {"calls_unequal": int(calls), "outputs_unequal": int(most)}
    return {**same, "cuda_sha256": cuda_sha256(text), **memory(c)}


def _times(
    case: dict[str, Any],
    rows: dict[str, dict[str, Any]],
    layers: dict[str, Any],
    inputs: tuple[torch.Tensor, ...],
    unfused: Callable[[], torch.Tensor],
) -> None:
    """Time forms in turns, and the unfused chain behind them; put the times into `case` and `rows`."""
    device, tokens = RanksDevice(), case["tokens"]
    slowest: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(TURNS):
        names = list(layers)
        for name in names if turn % 2 == 0 else reversed(names):
            layer = layers[name]
            ours = time_call(lambda layer=layer: layer(*inputs, tokens), device, MIN_REPLAYS)
            layer.check()
            slowest[name].append(_agree(ours.us, dist.ReduceOp.MAX))
            rows[name]["method"] = ours.method
    for name, us in slowest.items():
        rows[name] |= {"us": sum(us) / len(us), "turns_us": us}
    timing = time_call(unfused, device, MIN_REPLAYS)
    case |= {"unfused_us": _agree(timing.us, dist.ReduceOp.MAX), "unfused_method": timing.method}
    for name in layers:
        rows[name]["speedup"] = case["unfused_us"] / rows[name]["us"]


def _rates(
    row: dict[str, Any], s: dict[str, int], idx: torch.Tensor, sent: torch.Tensor, local: int
) -> dict[str, float]:
    """Return FLOP/s of the busiest rank, bytes over its link in each direction, bytes of weights read."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = int(sent[:, rank].sum())
    remote_in, remote_out = rows - int(sent[rank, rank]), int(sent[rank].sum()) - int(sent[rank, rank])
    dispatch, combine = s["hidden"] + s["hidden"] // 128, 2 * s["hidden"]
    into = remote_in * dispatch + remote_out * combine  # rows pulled, results pushed by peers
    used = torch.zeros(ranks * local + 1, device="cuda")
    used[idx[idx >= 0].long()] = 1
    dist.all_reduce(used, dist.ReduceOp.MAX)
    touched = float(used[rank * local : (rank + 1) * local].sum())
    weights = touched * 3 * s["hidden"] * s["inter"] * _WEIGHT_BYTES[row["weights"]]
    flops = rows * _FLOPS * s["hidden"] * s["inter"]
    us = row["us"]
    return {
        "rows_busiest": _agree(rows, dist.ReduceOp.MAX),
        "tflops": _agree(flops, dist.ReduceOp.MAX) / us / 1e6,
        "link_in_bytes": _agree(into, dist.ReduceOp.MAX),
        "link_in_gbps": _agree(into, dist.ReduceOp.MAX) / us / 1e3,
        "weights_gbps": _agree(weights, dist.ReduceOp.MAX) / us / 1e3,
    }


def copy_rate() -> dict[str, float]:
    """Return GB/s of reads from, and writes to, the next rank, by all ranks at once."""
    from megamoe.symmetric import KEPT_BYTES, SharedRegions

    rank, ranks = dist.get_rank(), dist.get_world_size()
    regions = SharedRegions({"copy": _COPY_BYTES}, None, torch.device("cuda", torch.cuda.current_device()))
    peer = regions.tensors["copy"][(rank + 1) % ranks, :-KEPT_BYTES]
    own = torch.empty(len(peer), dtype=torch.uint8, device="cuda")
    device, found = RanksDevice(), {}
    for name, call in (("read", lambda: own.copy_(peer)), ("write", lambda: peer.copy_(own))):
        us = _agree(time_call(call, device, MIN_REPLAYS).us, dist.ReduceOp.MAX)
        found[f"peer_{name}_gbps"] = len(peer) / us / 1e3
    dist.barrier()
    regions.close()
    return found


def sglang(model: str, experts_each: int, tokens: int) -> float:
    """Return us of SGLang's FP8 kernel over the ranks, evenly routed."""
    import deep_gemm  # pyright: ignore[reportMissingImports]
    from deep_gemm.utils import (  # pyright: ignore[reportMissingImports]
        per_block_cast_to_fp8,
        per_token_cast_to_fp8,
    )

    s, ranks = SHAPES[model], dist.get_world_size()

    def weights(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        made = (torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(experts_each))
        casts = [per_block_cast_to_fp8(w, use_ue8m0=False) for w in made]
        return torch.stack([c[0] for c in casts]), torch.stack([c[1] for c in casts])

    l1, l2 = deep_gemm.transform_weights_for_mega_moe_sm90(
        weights(2 * s["inter"], s["hidden"]), weights(s["hidden"], s["inter"])
    )
    total = ranks * experts_each
    buffer = deep_gemm.get_symm_buffer_for_sm90_mega_moe(
        dist.group.WORLD, total, tokens, TOPK, s["hidden"], s["inter"]
    )
    x = torch.randn(tokens, s["hidden"], device="cuda", dtype=torch.bfloat16)
    codes, scale = per_token_cast_to_fp8(x, use_ue8m0=False)
    buffer.x[:tokens].copy_(codes)
    buffer.x_sf[:tokens].copy_(scale)
    buffer.topk_idx[:tokens].copy_(torch.rand(tokens, total, device="cuda").topk(TOPK).indices)
    buffer.topk_weights[:tokens].copy_(torch.rand(tokens, TOPK, device="cuda"))
    y = torch.empty(tokens, s["hidden"], device="cuda", dtype=torch.bfloat16)

    def call() -> None:
        deep_gemm.fp8_mega_moe(y, l1, l2, buffer, activation_clamp=10.0)

    us = _agree(time_call(call, RanksDevice(), MIN_REPLAYS).us, dist.ReduceOp.MAX)
    buffer.destroy()
    return us


def _emitter(out: Path | None) -> Callable[[dict[str, Any]], None]:
    where = {"machine": machine.describe(), "commit": machine.commit(), "date": machine.now()}

    def emit(row: dict[str, Any]) -> None:
        if dist.get_rank():
            return
        short = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
        click.echo(" ".join(f"{k}={v}" for k, v in short.items()))
        if out:
            with out.open("a") as file:
                file.write(json.dumps({"kernel": KERNEL, **row, **where}, sort_keys=True) + "\n")

    return emit


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(sorted(SHAPES)), default=("flash",))
@click.option("--tokens", "tokens", multiple=True, type=int, default=TOKENS)
@click.option("--routing", "routings", multiple=True, type=click.Choice(ROUTINGS), default=ROUTINGS)
@click.option("--all-experts", is_flag=True, help="Ranks share all of the model's experts.")
@click.option("--weights", type=click.Choice(WEIGHTS), default="fp4", help="Of the routed experts.")
@click.option("--ring", is_flag=True, help=f"From {RING_FROM} tokens on, FP4 weights widened to a ring too.")
@click.option("--repeats", default=100, help="Calls that have to give equal bits.")
@click.option("--times/--no-times", default=True, help="Time evenly routed cases.")
@click.option("--compile/--no-compile", "compiles", default=True, help="torch.compile in the unfused chain.")
@click.option("--peer", is_flag=True, help="Time SGLang's kernel instead of ours.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON lines are appended to this file.")
def main(
    models: tuple[str, ...],
    tokens: tuple[int, ...],
    routings: tuple[str, ...],
    all_experts: bool,
    weights: str,
    ring: bool,
    repeats: int,
    times: bool,
    compiles: bool,
    peer: bool,
    out: Path | None,
) -> None:
    """Check and time the fused expert layer over the ranks that torchrun started."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    if peer:
        sys.path[:0] = [str(Path(os.environ.get("PEERS", "")) / name) for name in ("sglmega", "ffi")]
    dist.init_process_group("nccl", device_id=device)
    emit = _emitter(out)
    if not peer and times:
        emit({"ranks": dist.get_world_size(), **copy_rate()})
    for model in models:
        total = SHAPES[model]["experts"] * EIGHTH
        each = total // dist.get_world_size() if all_experts else total // EIGHTH
        for count in tokens if peer else ():
            us = sglang(model, each, count)
            emit({"model": model, "ranks": dist.get_world_size(), "experts_a_rank": each, "tokens": count,
                  "peer": "sglmega", "us": us})  # fmt: skip
        if peer:
            continue
        cases = [(count, routing) for count in tokens for routing in routings]
        options: dict[str, Any] = {"repeats": repeats, "times": times, "compiles": compiles, "ring": ring}
        measure(model, each, cases, emit, weights=weights, **options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
