"""The fused expert layer on several GPUs, a process each, beside the same layer without fusion.

    torchrun --nproc-per-node 2 -m bench.megamoe_ranks --out rows.jsonl     # 2, 4 or 8 GPUs of one host
    torchrun --nproc-per-node 2 -m bench.megamoe_ranks --peer               # SGLang's kernel ($PEERS/sglmega)

A rank has an eighth of a model's experts (`--all-experts`: its share of all), so that its work is that of one
of eight ranks. Bits are held against `distributed` and, for few tokens, against one GPU with all experts;
then both are timed with a cold L2, and the slowest rank counts. Rows are JSON lines.
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
from bench.megamoe import SHAPES, TOPK
from bench.timer import EAGER, GRAPH, MIN_REPLAYS, WARMUP, CudaDevice, time_call

KERNEL = "mega_moe_ranks"
EIGHTH = 8
TOKENS = (1, 8, 512, 4096, 8192)
FEW = 512  # tokens up to which everything is repeated often and held against one GPU
ROUTINGS = ("even", "uneven")
_EXPONENTS = (112, 121)  # biased exponents of random weight scales
_FLOPS = 6
_COPY_BYTES = 256 << 20
_PACKED_BYTES = 17 / 32  # a weight: half a byte, and a scale for 32


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


def random_experts(model: str, experts: int, rank: int) -> Any:
    """Return `Experts` of random weights of one rank, the same wherever they are made."""
    from megamoe.experts import Experts
    from megamoe.reference import RawExperts

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


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def measure(
    model: str,
    experts_each: int,
    cases: list[tuple[int, str]],
    emit: Callable[[dict[str, Any]], None],
    *,
    repeats: int,
    times: bool,
    compiles: bool,
) -> None:
    """Check and time each case; `emit` gets rows on every rank."""
    from megamoe import distributed
    from megamoe.layer import FusedLayer

    rank, ranks, s = dist.get_rank(), dist.get_world_size(), SHAPES[model]
    experts, device = random_experts(model, experts_each, rank), RanksDevice()
    fused = FusedLayer(experts, topk=TOPK, max_tokens=max(t for t, _ in cases), timeout_s=20.0)
    everyone = [experts if r == rank else random_experts(model, experts_each, r) for r in range(ranks)]
    for tokens, routing in cases:
        inputs = random_tokens(model, tokens, ranks * experts_each, routing, rank)
        row: dict[str, Any] = {"model": model, "ranks": ranks, "experts_a_rank": experts_each}
        row |= {"tokens": tokens, "routing": routing}
        x, scale, idx, weights = inputs
        wanted = distributed.mega_moe(x, scale, idx, weights, experts)
        dist.barrier()  # who compiles products for its number of rows keeps nobody waiting in the kernel
        found = fused(*inputs, tokens)[0]
        fused.check()
        row["bitwise_distributed"] = _all(_same(found, wanted))
        if tokens <= FEW:
            row["bitwise_one_gpu"] = _all(_same(found, on_one_gpu(everyone, inputs)))
        row["repeats"] = repeats if tokens <= FEW else max(repeats // 5, 1)
        equal = torch.ones((), dtype=torch.bool, device="cuda")
        for _ in range(row["repeats"]):
            equal &= (fused(*inputs, tokens)[0].view(torch.int16) == found.view(torch.int16)).all()
        fused.check()
        row["repeats_equal"] = _all(bool(equal))
        if times and routing == "even" and row["bitwise_distributed"]:
            call, sent = megamoe_unfused.chain(experts, x, scale, idx, weights, compiles=compiles)
            row["unfused_bitwise"] = _all(_same(call(), wanted))
            dist.barrier()
            ours = time_call(lambda inputs=inputs, t=tokens: fused(*inputs, t), device, MIN_REPLAYS)
            fused.check()
            row |= {
                "us": _agree(ours.us, dist.ReduceOp.MAX),
                "p80_us": _agree(ours.p80_us, dist.ReduceOp.MAX),
            }
            row |= _rates(row, s, idx, sent, experts_each)
            unfused = time_call(call, device, MIN_REPLAYS)
            row |= {
                "method": ours.method,
                "unfused_method": unfused.method,
                "unfused_us": _agree(unfused.us, dist.ReduceOp.MAX),
            }
            row["speedup"] = row["unfused_us"] / row["us"]
        emit(row)
        dist.barrier()
    fused.close()


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
    weights = touched * 3 * s["hidden"] * s["inter"] * _PACKED_BYTES
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
@click.option("--repeats", default=100, help="Calls that have to give equal bits; a fifth past 512 tokens.")
@click.option("--times/--no-times", default=True, help="Time evenly routed cases.")
@click.option("--compile/--no-compile", "compiles", default=True, help="torch.compile in the unfused chain.")
@click.option("--peer", is_flag=True, help="Time SGLang's kernel instead of ours.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON lines are appended to this file.")
def main(
    models: tuple[str, ...],
    tokens: tuple[int, ...],
    routings: tuple[str, ...],
    all_experts: bool,
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
        measure(model, each, cases, emit, repeats=repeats, times=times, compiles=compiles)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
