"""Is a routing one that the layer can serve? Raise before anything is launched, or mask and count.

A shared expert is routed to like any other: it is each rank's first, and every token has it in a slot of its
own, the last. The numbers of the others make room for it.
"""

from typing import Any, NamedTuple

import torch

from megamoe import schedule

BAD_ROUTING = ("raise", "mask")


class RoutingError(ValueError):
    """A routing that names an expert that does not exist, or one twice for a token, or too many tokens."""


class Routing(NamedTuple):
    """A routing that is safe to use.

    Attributes:
        topk_idx: [tokens, topk] int32 expert numbers, contiguous; -1: none.
        num_masked: [] int64, entries that were masked because they were bad; on the tensors' device.
    """

    topk_idx: torch.Tensor
    num_masked: torch.Tensor


def check_routing(topk_idx: torch.Tensor, *, num_experts: int, max_tokens: int, bad_routing: str) -> Routing:
    """Check a routing; `raise` waits for the device, `mask` does not.

    Args:
        topk_idx: [tokens, topk] integer; -1: no expert in this slot.
        num_experts: of all ranks.
        max_tokens: the most tokens that buffers have room for.
        bad_routing: `raise`, or `mask`: a bad entry counts as -1. Bad are numbers outside -1 to
            num_experts - 1, an expert that an earlier slot of the token names, and tokens past max_tokens.

    Returns:
        The routing to use.

    Raises:
        RoutingError: `raise`, and an entry is bad; the message names the first.
    """
    if bad_routing not in BAD_ROUTING:
        raise ValueError(f"mega_moe: requires bad_routing in {BAD_ROUTING}, got bad_routing={bad_routing!r}")
    tokens = topk_idx.shape[0]
    if bad_routing == "raise" and tokens > max_tokens:
        raise RoutingError(f"mega_moe: requires tokens <= {max_tokens}, got tokens={tokens}")
    is_outside = (topk_idx < -1) | (topk_idx >= num_experts)
    is_named = (topk_idx >= 0) & ~is_outside
    earlier = torch.ones(topk_idx.shape[1:] * 2, dtype=torch.bool, device=topk_idx.device).tril(-1)
    equal = (topk_idx[:, :, None] == topk_idx[:, None, :]) & is_named[:, None, :]
    is_repeated = is_named & (equal & earlier).any(-1)
    is_late = torch.arange(tokens, device=topk_idx.device)[:, None] >= max_tokens
    is_bad = is_outside | is_repeated | (is_late & is_named)
    if bad_routing == "raise" and bool(is_bad.any()):
        token, slot = torch.nonzero(is_bad)[0].tolist()
        value = int(topk_idx[token, slot])
        clause = (
            "each expert at most once a token"
            if is_repeated[token, slot]
            else f"-1 <= expert < {num_experts}"
        )
        raise RoutingError(f"mega_moe: requires {clause}, got topk_idx[{token}, {slot}]={value}")
    return Routing(torch.where(is_bad, -1, topk_idx).to(torch.int32).contiguous(), is_bad.sum())


def shifted(expert: Any, local: int) -> Any:
    """Return a routed expert's number where each rank has the shared one before its `local` others.

    Pure integers, for the host, the kernel and the prover; a negative number stays as it is.
    """
    return schedule.choose(expert >= 0, expert + schedule.quotient(expert, local) + 1, expert)


def shared_number(rank: Any, local: int) -> Any:
    """Return the number of a rank's shared expert."""
    return rank * (local + 1)


def with_shared(
    topk_idx: torch.Tensor, topk_weights: torch.Tensor, local: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a routing with the shared expert in a slot of its own behind the others.

    Args:
        topk_idx: [ranks, tokens, topk] integer, `local` experts a rank; negative: none.
        topk_weights: [ranks, tokens, topk] float32.
        local: routed experts of a rank.

    Returns:
        [ranks, tokens, topk + 1] experts and weights, `local` + 1 experts a rank.
    """
    ranks, tokens, _ = topk_idx.shape
    moved = torch.where(topk_idx >= 0, topk_idx + topk_idx // local + 1, topk_idx)
    own = shared_number(torch.arange(ranks, dtype=topk_idx.dtype, device=topk_idx.device), local)
    idx = torch.cat((moved, own[:, None, None].expand(-1, tokens, 1)), dim=2)
    return idx, torch.cat((topk_weights, torch.ones_like(topk_weights[..., :1])), dim=2)
