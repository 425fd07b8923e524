"""The expert layer over several GPUs without fusion: all-to-all, grouped products, all-to-all back, combine.

What it is held against knows the routing beforehand: counts and permutations are computed outside the time,
so that one CUDA graph holds the chain and no host waits. Elementwise parts are compiled by torch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from dsv4_kernels.gemm.folded_tile import BLOCK_K, SCALE_K
from dsv4_kernels.gemm.grouped_fold import FoldedExperts
from dsv4_kernels.gemm.grouped_fp8_fp4_gemm import grouped_fp8_fp4_gemm
from dsv4_kernels.gemm.grouped_fp8_gemm import grouped_fp8_gemm
from dsv4_kernels.gemm.grouped_layout import PADDING, alignment_for
from dsv4_kernels.quant.act_quant import act_quant
from megamoe.reference import combine, swiglu

_F32_BYTES = 4
TILES = {False: (96, 128), True: (128,)}  # rows of the tallest tiles of the products, by FP4 and FP8 weights
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def folded(linear: Any) -> FoldedExperts:
    """Return one linear of `megamoe.experts.Experts` as the grouped product takes it."""
    w = linear.stacked()
    blocks = w.words.shape[2] * 8 // BLOCK_K

    def by_block(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(2, (blocks, -1)).transpose(1, 2).contiguous()

    offsets = w.offsets.view(torch.uint8).view(*w.words.shape[:2], blocks * (BLOCK_K // SCALE_K))
    return FoldedExperts(by_block(w.words.view(torch.int32)), by_block(offsets), w.factors)


def product(linear: Any) -> Product:
    """Return the grouped product by one linear of `Experts`, of (codes, scales, row_expert, alignment)."""
    if linear.is_fp8:
        w = linear.stacked()
        return lambda codes, scale, *rows: grouped_fp8_gemm(codes, scale, *w, *rows)
    f = folded(linear)
    weights = f.words, f.offsets, f.factors
    return lambda codes, scale, *rows: grouped_fp8_fp4_gemm(codes, scale, *weights, *rows)


def chain(
    experts: Any,
    x: torch.Tensor,
    scale: torch.Tensor,
    idx: torch.Tensor,
    weights: torch.Tensor,
    *,
    compiles: bool = True,
) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """Return the chain for one routing, and rows [ranks, ranks] that each rank (first) sends to each.

    Args:
        experts: `Experts` of this rank; every rank of the default group calls with its own.
        x: [tokens, hidden] e4m3.
        scale: [tokens, hidden / 128] e8m0.
        idx: [tokens, topk] int32 experts of all ranks; negative: none.
        weights: [tokens, topk] float32.
        compiles: elementwise parts by `torch.compile`.
    """
    ranks, local, device = dist.get_world_size(), experts.num_experts, x.device
    hidden, scales, topk = x.shape[1], scale.shape[1], idx.shape[1]
    l1, l2 = product(experts.l1), product(experts.l2)
    activation: Callable[..., torch.Tensor]
    add: Callable[..., torch.Tensor]
    activation, add = (torch.compile(f, dynamic=True) if compiles else f for f in (swiglu, combine))

    chosen = idx.reshape(-1).long()
    order = torch.argsort(torch.where(chosen < 0, ranks * local, chosen), stable=True)
    order = order[: int((chosen >= 0).sum())]
    token = order // topk
    sent = torch.bincount(chosen[order], minlength=ranks * local).view(ranks, local)
    everything = [torch.empty_like(sent) for _ in range(ranks)]
    dist.all_gather(everything, sent)
    arriving = torch.stack([rows[dist.get_rank()] for rows in everything])  # [source, local expert]
    to_peers, from_peers = sent.sum(1).tolist(), arriving.sum(1).tolist()

    # Rows arrive rank by rank; the products want them expert by expert, each from an aligned row on.
    counts = arriving.sum(0)
    alignment = alignment_for(int(counts.sum()) // local, TILES[experts.l1.is_fp8])
    padded = (counts + alignment - 1) // alignment * alignment
    starts = padded.cumsum(0) - padded
    expert = torch.arange(local, device=device).repeat(ranks).repeat_interleave(arriving.reshape(-1))
    by_expert = torch.argsort(expert, stable=True)
    within = torch.arange(len(expert), device=device) - (counts.cumsum(0) - counts)[expert[by_expert]]
    place = starts[expert[by_expert]] + within
    total = int(padded.sum())
    source = torch.zeros(total, dtype=torch.long, device=device)  # rows that pad an expert repeat row 0
    source[place] = by_expert
    row_expert = torch.full((total,), PADDING, dtype=torch.int32, device=device)
    row_expert[place] = expert[by_expert].int()
    back = torch.empty_like(place)
    back[by_expert] = place
    width = hidden + scales + _F32_BYTES
    arrived = torch.empty(sum(from_peers), width, dtype=torch.uint8, device=device)
    returned = torch.empty(len(order), hidden, dtype=torch.bfloat16, device=device)
    places = torch.zeros(idx.numel(), hidden, dtype=torch.bfloat16, device=device)
    flat_weights = weights.reshape(-1, 1)[order].contiguous().view(torch.uint8).view(-1, _F32_BYTES)

    def call() -> torch.Tensor:
        payload = torch.cat((x.view(torch.uint8)[token], scale.view(torch.uint8)[token], flat_weights), 1)
        dist.all_to_all_single(arrived, payload, from_peers, to_peers)
        outgoing = arrived.new_empty(arrived.shape[0], hidden, dtype=torch.bfloat16)
        if total:
            rows = arrived[source] if len(arrived) else arrived.new_zeros(total, width)
            codes, row_scale, weight = (
                p.clone(memory_format=torch.contiguous_format)
                for p in rows.split((hidden, scales, _F32_BYTES), 1)
            )
            gate_up = l1(codes.view(x.dtype), row_scale.view(scale.dtype), row_expert, alignment)
            inner = act_quant(
                activation(gate_up, weight.view(torch.float32).view(-1), experts.clamp), BLOCK_K
            )
            out = l2(*inner, row_expert, alignment)
            outgoing = out[back]
        dist.all_to_all_single(returned.view(torch.uint8), outgoing.view(torch.uint8), to_peers, from_peers)
        places[order] = returned
        return add(places.view(*idx.shape, hidden), idx)

    return call, torch.stack(everything).sum(2)
