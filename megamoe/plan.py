"""Where each routed row goes: the pool of rows that a rank receives, expert by expert.

Rows of an expert stand in the order of (source rank, token, slot), whatever order they arrive in, and each
expert begins a block. Everything is computed on the tensors' device without waiting for it.
"""

from dataclasses import dataclass

import torch

from megamoe.buffer import combine_row
from megamoe.schedule import Geometry


@dataclass(frozen=True)
class Plan:
    """Rows received, for each rank that owns experts.

    Attributes:
        firsts: [ranks, num_waves + 3] int32, `schedule.wave_firsts`.
        block_expert: [ranks, pool_blocks] int32, local expert of each block; 0 past the last block.
        row_source: [ranks, pool_blocks * block_m] int32, source rank * tokens + token; -1: no row.
        row_target: as row_source: the row's place in the combine buffers, see `buffer.combine_row`; -1: no
            row.
        row_weight: as row_source, float32 routing weight; 0: no row.
        counts: [ranks, num_experts] int32, rows of each local expert.
    """

    firsts: torch.Tensor
    block_expert: torch.Tensor
    row_source: torch.Tensor
    row_target: torch.Tensor
    row_weight: torch.Tensor
    counts: torch.Tensor


def make_plan(
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    geometry: Geometry,
    block_m: int,
    pool_blocks: int,
    combine_rows: int | None = None,
) -> Plan:
    """Place the routed rows of all ranks.

    Args:
        topk_idx: [ranks, tokens, topk] integer, global expert below ranks * geometry.num_experts; negative:
            no expert. A token chooses an expert at most once.
        topk_weights: [ranks, tokens, topk] float32.
        geometry: sizes.
        block_m: rows a block.
        pool_blocks: blocks that a rank may receive, at least `schedule.pool_blocks`.
        combine_rows: rows of a rank in the combine buffers; None: topk * tokens.

    Returns:
        The plan of every rank.
    """
    ranks, tokens, topk = topk_idx.shape
    device, local = topk_idx.device, geometry.num_experts
    experts = ranks * local
    expert = topk_idx.reshape(-1).long()
    expert = torch.where(expert < 0, experts, expert)
    order = torch.argsort(expert, stable=True)
    sorted_expert = expert[order]
    counts = torch.zeros(experts + 1, dtype=torch.long, device=device)
    counts.scatter_add_(0, expert, torch.ones_like(expert))
    starts = counts.cumsum(0) - counts
    blocks = (counts[:experts].view(ranks, local) + block_m - 1) // block_m
    ends = blocks.cumsum(1)
    first_block = ends - blocks

    # Rows without an expert go to one place past the end, which is cut off.
    rows = pool_blocks * block_m
    owner = sorted_expert // local
    within = torch.arange(expert.numel(), device=device) - starts[sorted_expert]
    first_row = torch.cat((first_block.reshape(-1) * block_m, first_block.new_zeros(1)))
    place = torch.where(
        sorted_expert < experts, owner * rows + first_row[sorted_expert] + within, ranks * rows
    )
    source, slot = order // topk, order % topk
    target = combine_row(source // tokens, slot, source % tokens, tokens, combine_rows or topk * tokens)

    def placed(values: torch.Tensor, fill: float, dtype: torch.dtype) -> torch.Tensor:
        out = torch.full((ranks * rows + 1,), fill, dtype=dtype, device=device)
        out[place] = values.to(dtype)
        return out[:-1].view(ranks, rows)

    waves = torch.arange(-1, geometry.num_waves + 2, device=device) * geometry.wave_experts
    firsts = torch.cat((ends.new_zeros(ranks, 1), ends), 1)[:, waves.clamp(0, local)]
    numbers = torch.arange(pool_blocks, device=device).expand(ranks, -1).contiguous()
    block_expert = torch.searchsorted(ends, numbers, right=True)
    return Plan(
        firsts=firsts.to(torch.int32).contiguous(),
        block_expert=torch.where(block_expert < local, block_expert, 0).to(torch.int32),
        row_source=placed(source, -1, torch.int32),
        row_target=placed(target, -1, torch.int32),
        row_weight=placed(topk_weights.reshape(-1)[order], 0.0, torch.float32),
        counts=counts[:experts].view(ranks, local).to(torch.int32),
    )
