"""MegaMoE: expert-parallel dispatch, two FP8xFP4 products, SwiGLU and combine.

from megamoe import MegaMoE, RawExperts

layer = MegaMoE(RawExperts(w13, w13_scale), RawExperts(w2, w2_scale), num_experts=256, topk=6, max_tokens=512)
y = layer(x, topk_idx, topk_weights)
"""

from megamoe.module import MegaMoE
from megamoe.reference import Fp8Experts, RawExperts
from megamoe.routing import RoutingError

__all__ = ["Fp8Experts", "MegaMoE", "RawExperts", "RoutingError"]
