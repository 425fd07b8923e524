"""A routing of the small fused kernel of `megamoe.proofs`, with what the kernel is launched on."""

from dataclasses import dataclass
from typing import Any

import torch

from dsv4_kernels.quant.reference import act_quant
from megamoe.config import Config
from megamoe.experts import Experts
from megamoe.proofs import CONFIG, plan
from megamoe.reference import Fp8Experts, RawExperts, mega_moe
from megamoe.routing import with_shared
from megamoe.virtual import packed_experts
from tests.megamoe import layers


@dataclass
class Launch:
    """Arguments of the kernel, its output among them, and what the output should be."""

    arguments: list[torch.Tensor]
    y: torch.Tensor
    status: torch.Tensor
    wanted: torch.Tensor


def launch(seed: int, c: Config = CONFIG, routed: torch.Tensor | None = None) -> Launch:
    """Return random weights and tokens on CPU tensors, with a routing of all ranks' tokens [tokens, topk].

    Without one each rank's tokens go to an expert of the other.
    """
    g, topk, local = c.geometry, c.topk - c.shared, c.num_experts - c.shared
    experts = c.num_ranks * local
    generator = torch.Generator().manual_seed(seed)

    def raw(n: int, k: int) -> Any:
        if c.fp8:
            return layers.fp8_experts(n, k, seed, experts)
        w = torch.randint(0, 256, (experts, n, k // 2), generator=generator, dtype=torch.uint8)
        low, high = 114, 121  # biased exponents
        scale = torch.randint(low, high, (experts, n, k // 32), generator=generator, dtype=torch.uint8)
        return RawExperts(w, scale.view(torch.float8_e8m0fnu))

    def share(whole: RawExperts | Fp8Experts, rank: int) -> Any:
        mine = slice(rank * local, (rank + 1) * local)
        scale = whole.w_scale.view(torch.uint8)[mine].view(torch.float8_e8m0fnu)
        return type(whole)(whole.w[mine], scale)

    l1, l2 = raw(2 * c.inter, c.hidden), raw(c.hidden, c.inter)
    shared = None
    if c.shared:
        shared = (
            layers.fp8_experts(2 * c.inter, c.hidden, seed + 1, experts=1),
            layers.fp8_experts(c.hidden, c.inter, seed + 2, experts=1),
        )
    count = c.num_ranks * c.tokens
    x, x_scale = act_quant(torch.randn(count, c.hidden, generator=generator).bfloat16(), 128)
    idx = torch.full((count, topk), -1, dtype=torch.int32)
    idx[: c.tokens, -1] = local  # of rank 1
    idx[c.tokens :, 0] = 1  # of rank 0
    idx[c.tokens + 2 :] = -1
    idx = idx if routed is None else routed
    weights = torch.rand(count, topk, generator=generator)
    ranks = [Experts(share(l1, r), share(l2, r)) for r in range(c.num_ranks)]
    packed = packed_experts(ranks, None if shared is None else Experts(*shared))
    by_rank = (c.num_ranks, c.tokens, -1)
    routing = idx.view(by_rank), weights.view(by_rank)
    if c.shared:
        routing = with_shared(*routing, local)
    found = plan(*routing, c)

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    r = c.num_ranks
    status = zeros(r, 1)
    y = torch.empty(r, c.tokens, c.hidden, dtype=torch.bfloat16)
    arguments = [
        x.view(by_rank),
        x_scale.view(torch.uint8).view(by_rank),
        routing[0],
        *(packed.words, packed.offsets, packed.factors),
        *(found.firsts, found.block_expert, found.row_source, found.row_target, found.row_weight),
        zeros(r, *c.x_ring_shape, dtype=torch.uint8).view(torch.float8_e4m3fn),
        zeros(r, g.x_ring, c.hidden // 128, c.block_m, dtype=torch.float32),
        zeros(r, *c.h_ring_shape, dtype=torch.uint8).view(torch.float8_e4m3fn),
        zeros(r, g.h_ring, c.inter // 128, c.block_m, dtype=torch.float32),
        zeros(r * c.topk * c.tokens, c.hidden, dtype=torch.bfloat16),
        *(zeros(r, c.pool_blocks) for _ in range(3)),
        zeros(r, 1).view(torch.uint32),
        zeros(r, r),
        zeros(r, 1),
        status,
        y,
    ]
    wanted = mega_moe(x, x_scale, idx, weights, l1, l2, c.clamp, shared).view(by_rank)
    return Launch(arguments, y, status, wanted)
