"""What the fused kernel of all ranks is launched on: CPU tensors, for the interpreter."""

from dataclasses import dataclass

import torch

from dsv4_kernels.quant.reference import act_quant
from megamoe.config import Config
from megamoe.experts import Experts
from megamoe.plan import Plan, make_plan
from megamoe.reference import Fp8Experts, RawExperts
from megamoe.routing import with_shared
from megamoe.virtual import packed_experts
from megamoe.weights import Packed

_BLOCK = 128  # channels a scale of activations and e4m3 weights
# Biased exponents of weights' scales, from one to before the other: those of e2m1 and of e4m3 weights.
_E2M1_SCALES, _E4M3_SCALES = (114, 121), (118, 125)
Linear = RawExperts | Fp8Experts


@dataclass(frozen=True)
class Random:
    """A launch on random tokens and weights.

    Attributes:
        x, x_scale: [all ranks' tokens, hidden] e4m3, and [.., hidden / 128] e8m0.
        idx, weights: [all ranks' tokens, topk], without the shared expert's slot.
        l1, l2: weights of all ranks' experts.
        shared: both linears of the shared expert, if there is one.
        arguments: of the kernel; status and y are the last two.
    """

    x: torch.Tensor
    x_scale: torch.Tensor
    idx: torch.Tensor
    weights: torch.Tensor
    l1: Linear
    l2: Linear
    shared: tuple[Fp8Experts, Fp8Experts] | None
    arguments: list[torch.Tensor]


def fused_arguments(
    c: Config, x: torch.Tensor, x_scale: torch.Tensor, topk_idx: torch.Tensor, packed: Packed, plan: Plan
) -> list[torch.Tensor]:
    """Return what the fused kernel of all ranks is launched on, CPU tensors; status and y are the last two.

    Args:
        c: of the kernel, which covers all ranks.
        x: [ranks, tokens, hidden] e4m3.
        x_scale: [ranks, tokens, hidden / 128] uint8.
        topk_idx: [ranks, tokens, topk] int32.
        packed: weights of all ranks.
        plan: of the routing.
    """
    g, r = c.geometry, c.num_ranks

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    return [
        x,
        x_scale,
        topk_idx,
        *c.arguments(packed),
        *(plan.firsts, plan.block_expert, plan.row_source, plan.row_target, plan.row_weight),
        zeros(r, *c.x_ring_shape, dtype=torch.uint8).view(torch.float8_e4m3fn),
        zeros(r, g.x_ring, c.hidden // _BLOCK, c.block_m, dtype=torch.float32),
        zeros(r, *c.h_ring_shape, dtype=torch.uint8).view(torch.float8_e4m3fn),
        zeros(r, g.h_ring, c.inter // _BLOCK, c.block_m, dtype=torch.float32),
        zeros(r * c.combine_rows, c.hidden, dtype=torch.bfloat16),
        *(zeros(r, c.pool_blocks) for _ in range(3)),
        zeros(r, *c.wide_ring_shape, dtype=torch.uint8).view(torch.float8_e4m3fn),
        zeros(r, c.widened_words),
        zeros(r, 1).view(torch.uint32),
        zeros(r, c.signal_words),
        zeros(r, 1),
        zeros(r, c.status_words),
        torch.empty(r, c.tokens, c.hidden, dtype=torch.bfloat16),
    ]


def random(seed: int, c: Config, routed: torch.Tensor | None = None) -> Random:
    """Return random weights and tokens with a routing of all ranks' tokens [tokens, topk].

    Without one each rank's tokens go to an expert of the other, and most of one rank's to none.
    """
    topk, local = c.topk - c.shared, c.num_experts - c.shared
    experts, count = c.num_ranks * local, c.num_ranks * c.tokens
    generator = torch.Generator().manual_seed(seed)
    first, second = (2 * c.inter, c.hidden), (c.hidden, c.inter)
    if c.fp8:
        l1, l2 = (fp8_experts(*shape, seed, experts) for shape in (first, second))
    else:
        l1, l2 = (_e2m1(experts, *shape, generator) for shape in (first, second))
    shared = (fp8_experts(*first, seed + 1, 1), fp8_experts(*second, seed + 2, 1)) if c.shared else None
    x, x_scale = act_quant(torch.randn(count, c.hidden, generator=generator).bfloat16(), _BLOCK)
    idx = _to_the_other(c, local) if routed is None else routed
    weights = torch.rand(count, topk, generator=generator)
    by_rank = (c.num_ranks, c.tokens, -1)
    routing = idx.view(by_rank), weights.view(by_rank)
    if c.shared:
        routing = with_shared(*routing, local)
    plan = make_plan(*routing, geometry=c.geometry, block_m=c.block_m, pool_blocks=c.pool_blocks)
    ranks = [Experts(_share(l1, r, local), _share(l2, r, local)) for r in range(c.num_ranks)]
    packed = packed_experts(ranks, None if shared is None else Experts(*shared))
    scales = x_scale.view(torch.uint8).view(by_rank)
    arguments = fused_arguments(c, x.view(by_rank), scales, routing[0], packed, plan)
    return Random(x, x_scale, idx, weights, l1, l2, shared, arguments)


def fp8_experts(n: int, k: int, seed: int, experts: int) -> Fp8Experts:
    """Return random e4m3 weights [experts, n, k] with a scale a 128 x 128; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(experts, n, k, generator=generator).to(torch.float8_e4m3fn)
    shape = (experts, n // _BLOCK, k // _BLOCK)
    scale = torch.randint(*_E4M3_SCALES, shape, generator=generator, dtype=torch.uint8)
    return Fp8Experts(w, scale.view(torch.float8_e8m0fnu))


def _to_the_other(c: Config, local: int) -> torch.Tensor:
    idx = torch.full((c.num_ranks * c.tokens, c.topk - c.shared), -1, dtype=torch.int32)
    idx[: c.tokens, -1] = local  # of rank 1
    idx[c.tokens :, 0] = 1  # of rank 0
    idx[c.tokens + 2 :] = -1
    return idx


def _e2m1(experts: int, n: int, k: int, generator: torch.Generator) -> RawExperts:
    w = torch.randint(0, 256, (experts, n, k // 2), generator=generator, dtype=torch.uint8)
    scale = torch.randint(*_E2M1_SCALES, (experts, n, k // 32), generator=generator, dtype=torch.uint8)
    return RawExperts(w, scale.view(torch.float8_e8m0fnu))


def _share(whole: Linear, rank: int, local: int) -> Linear:
    mine = slice(rank * local, (rank + 1) * local)
    scale = whole.w_scale.view(torch.uint8)[mine].view(torch.float8_e8m0fnu)
    return type(whole)(whole.w[mine], scale)
