"""Small expert layers for tests."""

from typing import Any

import torch

from megamoe.launches import fp8_experts
from megamoe.reference import Fp8Experts, RawExperts

HIDDEN, INTER, EXPERTS, TOPK = 256, 256, 8, 3
SHAPES = ((2 * INTER, HIDDEN), (HIDDEN, INTER))  # of both linears


def raw_experts(n: int, k: int, seed: int, spread: int = 6) -> RawExperts:
    """Return random packed weights; scales of a row span at most `spread`."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(0, 256, (EXPERTS, n, k // 2), generator=generator, dtype=torch.uint8)
    low = 116
    scale = torch.randint(
        low, low + spread + 1, (EXPERTS, n, k // 32), generator=generator, dtype=torch.uint8
    )
    return RawExperts(w, scale.view(torch.float8_e8m0fnu))


def both_fp8(seed: int = 0, experts: int = EXPERTS) -> tuple[Fp8Experts, Fp8Experts]:
    """Return gate and up, and down weights of all experts, or of the shared one."""
    first, second = SHAPES
    return fp8_experts(*first, seed, experts), fp8_experts(*second, seed + 1, experts)


def share_of(
    weights: tuple[RawExperts, RawExperts] | tuple[Fp8Experts, Fp8Experts], rank: int, ranks: int
) -> tuple[Any, Any]:
    """Return both linears of the experts of one rank."""
    return share(weights[0], rank, ranks), share(weights[1], rank, ranks)


def both(seed: int = 0) -> tuple[RawExperts, RawExperts]:
    """Return gate and up, and down weights of all experts."""
    return raw_experts(2 * INTER, HIDDEN, seed), raw_experts(HIDDEN, INTER, seed + 1)


def share(raw: RawExperts | Fp8Experts, rank: int, ranks: int) -> RawExperts | Fp8Experts:
    """Return the experts of one rank."""
    local = EXPERTS // ranks
    mine = slice(rank * local, (rank + 1) * local)
    return type(raw)(raw.w[mine], raw.w_scale.view(torch.uint8)[mine].view(torch.float8_e8m0fnu))


def tokens(count: int, seed: int, masked: float = 0.2, skew: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Return x [count, HIDDEN] bf16, distinct experts [count, TOPK] with -1 slots, and weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, HIDDEN, generator=generator).to(torch.bfloat16)
    odds = torch.rand(EXPERTS, generator=generator).pow(skew) + 1e-3
    idx = torch.multinomial(odds.expand(max(count, 1), -1), TOPK, generator=generator)[:count]
    idx = torch.where(torch.rand(idx.shape, generator=generator) < masked, -1, idx)
    return x, idx, torch.rand(count, TOPK, generator=generator)
