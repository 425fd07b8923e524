"""MegaMoE: expert-parallel dispatch, two products of FP8 activations by FP4 or FP8 weights, SwiGLU, combine.

from megamoe import Experts, Fp8Experts, MegaMoE, RawExperts, mega_moe

l1, l2 = RawExperts(w13, w13_scale), RawExperts(w2, w2_scale)  # or Fp8Experts
shared = Fp8Experts(s13, s13_scale), Fp8Experts(s2, s2_scale)  # or None
layer = MegaMoE(l1, l2, num_experts=256, topk=6, max_tokens=512, shared=shared)
y = layer(x, topk_idx, topk_weights)

y = mega_moe(x, topk_idx, topk_weights, Experts(l1, l2), shared=Experts(*shared))  # the same, as a function
"""

from megamoe.experts import Experts
from megamoe.functional import mega_moe
from megamoe.module import MegaMoE
from megamoe.reference import Fp8Experts, RawExperts
from megamoe.routing import RoutingError

__all__ = ["Experts", "Fp8Experts", "MegaMoE", "RawExperts", "RoutingError", "mega_moe"]
