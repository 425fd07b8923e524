"""The expert layer over several processes, held against one process with all experts, bit for bit.

torchrun --nproc-per-node 4 examples/megamoe_torchrun.py                # CPUs, gloo
torchrun --nproc-per-node 8 examples/megamoe_torchrun.py --device cuda  # one GPU a process, NCCL
torchrun --nproc-per-node 8 examples/megamoe_torchrun.py --device cuda --backend fused  # NVLink, one kernel
torchrun --nproc-per-node 4 examples/megamoe_torchrun.py --weights fp8 --shared  # shared expert
python examples/megamoe_torchrun.py                                     # one process
"""

import argparse
import os
from functools import partial

import click
import torch
import torch.distributed as dist

from megamoe import Fp8Experts, MegaMoE, RawExperts

HIDDEN, INTER, EXPERTS, TOPK, TOKENS = 512, 256, 16, 6, 24
SCALE_BLOCK = 32  # weights a scale
SCALES = (116, 122)  # biased exponents of the weights' scales
FP8_BLOCK = 128  # e4m3 weights a scale, both ways
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


def main() -> None:
    """Run the layer and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", choices=("auto", "fused", "distributed"), default="auto")
    parser.add_argument("--weights", choices=("fp4", "fp8"), default="fp4")
    parser.add_argument("--shared", action="store_true", help="with a shared expert")
    arguments = parser.parse_args()
    kind = arguments.device
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
