"""The fused expert layer beside unfused ones and SGLang's FP8 MegaMoE: `python -m bench.megamoe`.

One rank with its share of an expert-parallel group of eight: the local work of one of eight ranks, without
links. Our time holds the plan of the routing; bits are compared with the unfused layer's before. Peers have
no shared expert: with `--shared`, their time is that of the routed ones alone.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from bench import machine
from bench.peers import run_peer
from bench.timer import CudaDevice, time_call

KERNEL = "mega_moe"
RANKS = 8  # of the group that one is taken from
TOPK = 6
CLAMP = 10.0  # of the SwiGLU
SHAPES = {  # DeepSeek-V4 Flash and Pro
    "flash": {"hidden": 4096, "inter": 2048, "experts": 256 // RANKS},
    "pro": {"hidden": 7168, "inter": 3072, "experts": 384 // RANKS},
}
TOKENS = (8, 64, 512, 4096, 8192)
_EXPONENTS = (112, 121)  # biased exponents of random weight scales
_FP8_EXPONENTS = (116, 121)  # of those of e4m3 weights
_FP8_BLOCK = 128  # weights a scale, both ways
WEIGHTS = ("fp4", "fp8")  # formats of the routed experts' weights
PEERS = ("sglmega", "humming")  # SGLang's kernel; the best unfused chain
_PEER_TIMEOUT_S = 600.0
_FLOPS = 6  # a token, expert, channel and intermediate channel: two linears, the first of twice the width


def config(model: str, tokens: int, multiprocessors: int, *, fp8: bool = False) -> Any:
    """Return the fused kernel's Config for up to `tokens` tokens on one rank, as `FusedLayer` takes it."""
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
    )


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


def measure(
    model: str,
    tokens: tuple[int, ...],
    emit: Callable[[dict[str, Any]], None],
    weights: str = "fp4",
    with_shared: bool = False,
) -> None:
    """Check and time our layer for each number of tokens; `emit` gets a row of each."""
    from megamoe.layer import FusedLayer

    s, device = SHAPES[model], CudaDevice()
    experts = random_experts(model) if weights == "fp4" else random_fp8_experts(model)
    shared = random_fp8_experts(model, 1, seed=3) if with_shared else None
    fused = FusedLayer(experts, topk=TOPK, max_tokens=max(tokens), shared=shared)
    for count in tokens:
        inputs = random_tokens(model, count)
        chain = unfused(experts, *inputs, shared=shared)
        found, wanted = fused(*inputs)[0], chain()
        is_equal = torch.equal(found.view(torch.int16), wanted.view(torch.int16))
        form = {"weights": weights, "shared": with_shared}
        row: dict[str, Any] = {"model": model, "tokens": count, **form, "bitwise": is_equal}
        if is_equal:
            timing = time_call(lambda inputs=inputs: fused(*inputs), device)
            fused.check()
            flops = count * (TOPK + with_shared) * _FLOPS * s["hidden"] * s["inter"]
            row |= {
                "us": timing.us,
                "p20_us": timing.p20_us,
                "p80_us": timing.p80_us,
                "tflops": flops / timing.us / 1e6,
                "touched_experts": int((torch.bincount(inputs[2].flatten().long()) > 0).sum()),
                "unfused_us": time_call(chain, device).us,
            }
        emit(row)


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(sorted(SHAPES)), default=("flash",))
@click.option("--tokens", "tokens", multiple=True, type=int, default=TOKENS)
@click.option("--weights", type=click.Choice(WEIGHTS), default="fp4", help="Of the routed experts.")
@click.option("--shared", "with_shared", is_flag=True, help="With the shared expert.")
@click.option("--peer/--no-peer", "with_peers", default=True, help="Time the peers too.")
@click.option("--only", "names", multiple=True, type=click.Choice(PEERS), default=PEERS, help="These peers.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON lines are appended to this file.")
def main(
    models: tuple[str, ...],
    tokens: tuple[int, ...],
    weights: str,
    with_shared: bool,
    with_peers: bool,
    names: tuple[str, ...],
    out: Path | None,
) -> None:
    """Time the fused expert layer on the current GPU."""
    where = {"machine": machine.describe(), "commit": machine.commit(), "date": machine.now()}
    for model in models:
        rows: list[dict[str, Any]] = []
        measure(model, tokens, rows.append, weights, with_shared)
        cases = [{**SHAPES[model], "tokens": count} for count in tokens]
        results = [run_peer(name, KERNEL, cases, _PEER_TIMEOUT_S) for name in names] if with_peers else []
        for index, row in enumerate(rows):
            found = [pair for of_peer in results for pair in of_peer[index].items()]
            row["peers"] = {label: dataclasses.asdict(result) for label, result in found}
            times = ", ".join(
                f"{k} {v['us'] or v['error']}"
                + (f" ({v['us'] / row['us']:.2f}x)" if v["us"] and "us" in row else "")
                for k, v in row["peers"].items()
            )
            ours = (
                f"{row['us']:.1f} us ({row['tflops']:.0f} TFLOP/s), unfused {row['unfused_us']:.0f}"
                if "us" in row
                else "wrong bits"
            )
            click.echo(f"{model} T={row['tokens']}: {ours}, {times}")
            if out:
                with out.open("a") as file:
                    file.write(json.dumps({"kernel": KERNEL, **row, **where}, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
