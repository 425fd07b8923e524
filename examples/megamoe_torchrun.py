"""The expert layer over several processes, held against one process with all experts, bit for bit.

torchrun --nproc-per-node 4 examples/megamoe_torchrun.py                # CPUs, gloo
torchrun --nproc-per-node 8 examples/megamoe_torchrun.py --device cuda  # one GPU a process, NCCL
torchrun --nproc-per-node 8 examples/megamoe_torchrun.py --device cuda --backend fused  # NVLink, one kernel
torchrun --nproc-per-node 4 examples/megamoe_torchrun.py --weights fp8 --shared  # shared expert
python examples/megamoe_torchrun.py                                     # one process
python examples/megamoe_torchrun.py --virtual 4                         # 4 virtual ranks on one GPU, fused
"""

import argparse
import os
from dataclasses import replace
from functools import partial

import click
import torch
import torch.distributed as dist

from dsv4_kernels.quant.act_quant import act_quant
from megamoe import Experts, Fp8Experts, MegaMoE, RawExperts
from megamoe.config import Config
from megamoe.layer import config_for
from megamoe.virtual import VirtualRanks

HIDDEN, INTER, EXPERTS, TOPK, TOKENS = 512, 256, 16, 6, 24
SCALE_BLOCK = 32  # weights a scale
SCALES = (116, 122)  # biased exponents of the weights' scales
FP8_BLOCK = 128  # e4m3 weights a scale, both ways
ACTIVATION_BLOCK = 128  # channels a scale
CLAMP = 10.0  # of the SwiGLU's inputs
Weights = RawExperts | Fp8Experts


def random_experts(n: int, k: int, seed: int, device: torch.device) -> RawExperts:
    """Return packed e2m1 weights of all experts; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(0, 256, (EXPERTS, n, k // 2), generator=generator, dtype=torch.uint8)
    scale = torch.randint(*SCALES, (EXPERTS, n, k // SCALE_BLOCK), generator=generator, dtype=torch.uint8)
    return RawExperts(w.to(device), scale.to(device).view(torch.float8_e8m0fnu))


def random_fp8_experts(n: int, k: int, seed: int, device: torch.device, count: int = EXPERTS) -> Fp8Experts:
    """Return e4m3 weights of so many experts; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(count, n, k, generator=generator).to(torch.float8_e4m3fn)
    blocks = count, n // FP8_BLOCK, k // FP8_BLOCK
    scale = torch.randint(*SCALES, blocks, generator=generator, dtype=torch.uint8)
    return Fp8Experts(w.to(device), scale.to(device).view(torch.float8_e8m0fnu))


def share(raw: Weights, rank: int, ranks: int) -> Weights:
    """Return the consecutive experts of one rank."""
    local = EXPERTS // ranks
    mine = slice(rank * local, (rank + 1) * local)
    return type(raw)(raw.w[mine], raw.w_scale.view(torch.uint8)[mine].view(torch.float8_e8m0fnu))


def tokens_of(rank: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return one rank's tokens, their experts and weights; every third rank has none."""
    count = 0 if rank % 3 == 2 else TOKENS + rank
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(count, HIDDEN, generator=generator).to(torch.bfloat16)
    idx = torch.rand(count, EXPERTS, generator=generator).topk(TOPK, dim=-1).indices
    weights = torch.rand(count, TOPK, generator=generator)
    return x.to(device), idx.to(device), (weights / weights.sum(-1, keepdim=True)).to(device)


def virtual_config(ranks: int, multiprocessors: int, *, fp8: bool) -> Config:
    """Return the kernel of all ranks on one GPU, an equal share of its multiprocessors each."""
    one = config_for(
        TOKENS + ranks,
        topk=TOPK,
        hidden=HIDDEN,
        inter=INTER,
        num_experts=EXPERTS // ranks,
        clamp=CLAMP,
        multiprocessors=multiprocessors // ranks,
        fp8=fp8,
        ranks=ranks,
    )
    return replace(one, num_ranks=ranks, launch_ranks=ranks)


def run_virtual(
    ranks: int, l1: Weights, l2: Weights, inputs: list[tuple[torch.Tensor, ...]]
) -> list[torch.Tensor]:
    """Return each virtual rank's outputs; who has fewer tokens than another has masked ones behind them."""
    device = torch.device("cuda")
    count = torch.cuda.get_device_properties(device).multi_processor_count
    c = virtual_config(ranks, count, fp8=isinstance(l1, Fp8Experts))
    layer = VirtualRanks(c, [Experts(share(l1, r, ranks), share(l2, r, ranks), CLAMP) for r in range(ranks)])
    x = torch.zeros(ranks, c.tokens, HIDDEN, dtype=torch.bfloat16, device=device)
    idx = torch.full((ranks, c.tokens, TOPK), -1, dtype=torch.int32, device=device)
    weights = torch.zeros(ranks, c.tokens, TOPK, device=device)
    for rank, mine in enumerate(inputs):
        for whole, part in zip((x, idx, weights), mine, strict=True):
            whole[rank, : len(part)] = part
    codes, scale = act_quant(x.view(-1, HIDDEN), ACTIVATION_BLOCK)
    scales = scale.view(torch.uint8).view(ranks, c.tokens, -1)
    y = layer.launch(codes.view(x.shape), scales, idx, layer.plan(idx, weights))
    layer.check()
    return [mine[: len(tokens)] for mine, (tokens, *_) in zip(y, inputs, strict=True)]


def compare_virtual(ranks: int, l1: Weights, l2: Weights) -> bool:
    """Run virtual ranks and compare; say so, and return whether all bits are equal."""
    inputs = [tokens_of(rank, torch.device("cuda")) for rank in range(ranks)]
    sizes = {"num_experts": EXPERTS, "topk": TOPK, "max_tokens": TOKENS + ranks}
    alone = MegaMoE(l1, l2, **sizes, backend="local")  # pyright: ignore[reportArgumentType]
    are_equal = True
    for rank, (y, mine) in enumerate(zip(run_virtual(ranks, l1, l2, inputs), inputs, strict=True)):
        is_equal = torch.equal(y.view(torch.int16), alone(*mine).view(torch.int16))
        click.echo(f"virtual rank {rank} of {ranks}: {len(y)} tokens, fused, bits equal: {is_equal}")
        are_equal &= is_equal
    return are_equal


def main() -> None:
    """Run the layer and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", choices=("auto", "fused", "distributed"), default="auto")
    parser.add_argument("--weights", choices=("fp4", "fp8"), default="fp4")
    parser.add_argument("--shared", action="store_true", help="with a shared expert")
    parser.add_argument("--virtual", type=int, default=0, metavar="RANKS", help="virtual ranks on one GPU")
    arguments = parser.parse_args()
    kind = "cuda" if arguments.virtual else arguments.device
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = (
        torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    )
    if kind == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")

    experts = random_experts if arguments.weights == "fp4" else random_fp8_experts
    l1 = experts(2 * INTER, HIDDEN, 1, device)
    l2 = experts(HIDDEN, INTER, 2, device)
    if arguments.virtual:
        raise SystemExit(not compare_virtual(arguments.virtual, l1, l2))
    shared = None
    if arguments.shared:
        shared = (
            random_fp8_experts(2 * INTER, HIDDEN, 3, device, count=1),
            random_fp8_experts(HIDDEN, INTER, 4, device, count=1),
        )
    make = partial(MegaMoE, num_experts=EXPERTS, topk=TOPK, max_tokens=TOKENS + ranks, shared=shared)
    layer = make(share(l1, rank, ranks), share(l2, rank, ranks), backend=arguments.backend).to(device)
    y = layer(*tokens_of(rank, device))
    layer.check()
    alone = make(l1, l2, backend="local")
    is_equal = torch.equal(y.view(torch.int16), alone(*tokens_of(rank, device)).view(torch.int16))
    click.echo(f"rank {rank} of {ranks}: {len(y)} tokens, {layer.backend}, bits equal: {is_equal}")
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    if not is_equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
