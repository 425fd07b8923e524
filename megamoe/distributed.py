"""The expert layer over torch.distributed: all-to-all, both linears, all-to-all back, combine.

For ranks that share no memory, and on CPUs. Rows of an expert stand in the order of (source rank, token,
slot) and outputs are added slot by slot, so the result has the bits of one rank with all experts.
"""

import torch
import torch.distributed as dist

from megamoe.experts import Experts, add_shared
from megamoe.reference import combine

_F32_BYTES = 4


def mega_moe(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: Experts,
    group: dist.ProcessGroup | None = None,
    received: torch.Tensor | None = None,
    shared: Experts | None = None,
) -> torch.Tensor:
    """Run the routed experts' layer; every rank of the group calls it, with any number of tokens, 0 included.

    Args:
        x: [tokens, hidden] e4m3, this rank's tokens.
        x_scale: [tokens, hidden / 128] e8m0.
        topk_idx: [tokens, topk] int32, experts of all ranks; -1: none. Checked by the caller.
        topk_weights: [tokens, topk] float32.
        experts: this rank's; rank r has the experts from r * num_experts on.
        group: of the ranks; None: all.
        received: [num_experts] int32, rows that each expert received are added to it.
        shared: the shared expert, for this rank's own tokens.

    Returns:
        [tokens, hidden] bf16.
    """
    ranks, local = dist.get_world_size(group), experts.num_experts
    chosen = topk_idx.reshape(-1).long()
    order = torch.argsort(torch.where(chosen < 0, ranks * local, chosen), stable=True)
    order = order[: int((chosen >= 0).sum())]
    token = order // topk_idx.shape[1]
    sent = torch.bincount(chosen[order], minlength=ranks * local).view(ranks, local)
    arriving = torch.empty_like(sent)
    dist.all_to_all_single(arriving, sent, group=group)
    to_peers, from_peers = sent.sum(1).tolist(), arriving.sum(1).tolist()

    payload = torch.cat(
        (
            x.view(torch.uint8)[token],
            x_scale.view(torch.uint8)[token],
            topk_weights.reshape(-1, 1)[order].contiguous().view(torch.uint8).view(-1, _F32_BYTES),
        ),
        dim=1,
    )
    rows = _exchange(payload, to_peers, from_peers, group)
    # Rows come rank by rank, each rank's expert by expert; the experts want them expert by expert.
    expert = torch.arange(local, device=x.device).repeat(ranks).repeat_interleave(arriving.reshape(-1))
    by_expert = torch.argsort(expert, stable=True)
    rows = rows[by_expert]
    hidden, scales = x.shape[1], x_scale.shape[1]
    if received is not None:
        received += arriving.sum(0).to(received.dtype)
    # Copies: parts of a single row count as contiguous where they stand, at addresses of any alignment.
    codes, scale, weight = (
        part.clone(memory_format=torch.contiguous_format)
        for part in rows.split((hidden, scales, _F32_BYTES), dim=1)
    )
    outputs = experts(
        codes.view(x.dtype),
        scale.view(x_scale.dtype),
        weight.view(torch.float32).view(-1),
        arriving.sum(0).tolist(),
    )
    back = torch.empty_like(outputs)
    back[by_expert] = outputs
    returned = _exchange(back.view(torch.uint8), from_peers, to_peers, group).view(torch.bfloat16)
    places = x.new_zeros(topk_idx.numel(), hidden, dtype=torch.bfloat16)
    places[order] = returned
    return combine(*add_shared(places.view(*topk_idx.shape, hidden), topk_idx, x, x_scale, shared))


def _exchange(
    rows: torch.Tensor, to_peers: list[int], from_peers: list[int], group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Return the rows [n, bytes] uint8 that the peers sent, rank by rank."""
    arrived = rows.new_empty(sum(from_peers), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), from_peers, to_peers, group=group)
    return arrived
