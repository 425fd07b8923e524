"""`mega_moe`: the expert layer as a function of experts that are laid out; what `MegaMoE` is made of."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from dsv4_kernels.quant.act_quant import act_quant
from megamoe import distributed
from megamoe.experts import Experts, add_shared
from megamoe.reference import ACTIVATION_BLOCK, combine
from megamoe.routing import check_routing


class Inputs(NamedTuple):
    """Tokens of a call, checked and cast.

    Attributes:
        x: [tokens, hidden] e4m3.
        x_scale: [tokens, hidden / 128] e8m0.
        topk_idx: [tokens, topk] int32; -1: none.
        topk_weights: [tokens, topk] float32.
        num_masked: [] int64, bad entries that were masked.
    """

    x: torch.Tensor
    x_scale: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    num_masked: torch.Tensor


def mega_moe(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: Experts,
    *,
    x_scale: torch.Tensor | None = None,
    shared: Experts | None = None,
    group: dist.ProcessGroup | None = None,
    bad_routing: str = "raise",
) -> torch.Tensor:
    """Return the weighted sum of each token's experts, and of the shared one.

    Bits are those of `MegaMoE`, whose fused kernel keeps buffers and is no function.

    Args:
        x: [tokens, hidden] bf16, or e4m3 with `x_scale`; 0 tokens are allowed.
        topk_idx: [tokens, topk] integer expert numbers; -1: no expert in this slot.
        topk_weights: [tokens, topk] float32.
        experts: this rank's, laid out once; rank r has those from r * num_experts on.
        x_scale: [tokens, hidden / 128] e8m0, where x is e4m3.
        shared: the shared expert, see `check_shared`; its output is added behind the others'.
        group: ranks among which the experts are spread, all of which call; None: `experts` are all there are.
        bad_routing: `raise` (waits for the device) or `mask`; see `routing.check_routing`.

    Returns:
        [tokens, hidden] bf16; zeros for a token without experts.

    Raises:
        RoutingError: a bad routing, unless it is to be masked.
        ValueError: shapes or dtypes that do not fit.
    """
    check_shared(shared, experts)
    ranks = 1 if group is None else dist.get_world_size(group)
    inputs = checked(
        x,
        topk_idx,
        topk_weights,
        x_scale,
        hidden=experts.hidden,
        topk=topk_idx.shape[-1],
        num_experts=ranks * experts.num_experts,
        max_tokens=x.shape[0],
        bad_routing=bad_routing,
    )
    if group is None:
        return local(*inputs[:4], experts, shared=shared)
    return distributed.mega_moe(*inputs[:4], experts, group, shared=shared)


def check_shared(shared: Experts | None, experts: Experts) -> None:
    """Check a shared expert.

    Raises:
        ValueError: it is not one expert with e4m3 weights and the others' channels.
    """
    if shared is None:
        return
    found, wanted = (shared.hidden, shared.inter), (experts.hidden, experts.inter)
    if shared.num_experts != 1 or not shared.l1.is_fp8 or found != wanted:
        weights = "e4m3" if shared.l1.is_fp8 else "e2m1"
        raise ValueError(
            f"mega_moe: requires one shared expert with e4m3 weights and (hidden, inter) = {wanted}, "
            f"got {shared.num_experts} with {weights} weights and {found}"
        )


def checked(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    x_scale: torch.Tensor | None,
    *,
    hidden: int,
    topk: int,
    num_experts: int,
    max_tokens: int,
    bad_routing: str,
) -> Inputs:
    """Check shapes, dtypes and routing; cast bf16 tokens. Arguments as of `MegaMoE`.

    Raises:
        RoutingError: a bad routing, unless it is to be masked.
        ValueError: shapes or dtypes that do not fit.
    """
    tokens, shape = x.shape[0], (x.shape[0], topk)
    if tuple(x.shape) != (tokens, hidden):
        raise ValueError(f"mega_moe: requires x [tokens, {hidden}], got {tuple(x.shape)}")
    if tuple(topk_idx.shape) != shape or tuple(topk_weights.shape) != shape:
        got = f"{tuple(topk_idx.shape)} and {tuple(topk_weights.shape)}"
        raise ValueError(f"mega_moe: requires topk_idx and topk_weights {shape}, got {got}")
    if topk_weights.dtype != torch.float32 or topk_idx.is_floating_point():
        got = f"{topk_idx.dtype} and {topk_weights.dtype}"
        raise ValueError(f"mega_moe: requires integer topk_idx and float32 topk_weights, got {got}")
    routing = check_routing(topk_idx, num_experts=num_experts, max_tokens=max_tokens, bad_routing=bad_routing)
    if x_scale is None:
        x, x_scale = act_quant(x, ACTIVATION_BLOCK)
    return Inputs(x, x_scale, routing.topk_idx, topk_weights, routing.num_masked)


def local(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: Experts,
    received: torch.Tensor | None = None,
    shared: Experts | None = None,
) -> torch.Tensor:
    """Run the layer where one rank has all experts.

    Args:
        x: [tokens, hidden] e4m3.
        x_scale: [tokens, hidden / 128] e8m0.
        topk_idx: [tokens, topk] int32; -1: none. Checked by the caller.
        topk_weights: [tokens, topk] float32.
        experts: all of them.
        received: [num_experts] int32, rows that each expert received are added to it.
        shared: the shared expert.

    Returns:
        [tokens, hidden] bf16.
    """
    chosen = topk_idx.reshape(-1).long()
    key = torch.where(chosen < 0, experts.num_experts, chosen)
    counts = torch.bincount(key, minlength=experts.num_experts + 1)[: experts.num_experts]
    order = torch.argsort(key, stable=True)[: int(counts.sum())]
    token = order // topk_idx.shape[1]
    if received is not None:
        received += counts.to(received.dtype)
    outputs = experts(
        x.view(torch.uint8)[token].view(x.dtype),
        x_scale.view(torch.uint8)[token].view(x_scale.dtype),
        topk_weights.reshape(-1)[order],
        counts.tolist(),
    )
    places = x.new_zeros(topk_idx.numel(), x.shape[1], dtype=torch.bfloat16)
    places[order] = outputs
    return combine(*add_shared(places.view(*topk_idx.shape, x.shape[1]), topk_idx, x, x_scale, shared))
