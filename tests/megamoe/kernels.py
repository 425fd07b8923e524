"""A routing of the small fused kernel of `megamoe.proofs`, with what the kernel is launched on."""

from dataclasses import dataclass
from typing import Any

import torch

from dsv4_kernels.quant.reference import act_quant
from megamoe.config import Config
from megamoe.experts import Experts
from megamoe.instances import CONFIG
from megamoe.launches import fused_arguments
from megamoe.proofs import plan
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
    topk, local = c.topk - c.shared, c.num_experts - c.shared
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

    arguments = fused_arguments(
        c, x.view(by_rank), x_scale.view(torch.uint8).view(by_rank), routing[0], packed, found
    )
    wanted = mega_moe(x, x_scale, idx, weights, l1, l2, c.clamp, shared).view(by_rank)
    return Launch(arguments, arguments[-1], arguments[-2], wanted)
