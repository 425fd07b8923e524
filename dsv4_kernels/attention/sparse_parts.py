"""Sparse decode of few queries: a block for each chunk of 64 keys, so that two queries fill the GPU.

What a block leaves (`decode_chunk`) `hca_fold` folds in ascending order, as a block of `sparse_decode` does
with the chunks that it takes one after the other: both have the same bits.
Design and measurements: docs/attention.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import cache_rows, decode_lists, decode_reference
from dsv4_kernels.attention.cache_layout import HEAD_DIM, NOPE_DIM, PAGE_ROWS, ROPE_DIM, WINDOW, page_bytes
from dsv4_kernels.attention.cache_rows import expand_rows, load_either
from dsv4_kernels.attention.decode_chunk import CHUNK, PAD, ROWS, Weights, weigh
from dsv4_kernels.attention.decode_lists import CONTRACT, SHAPES, place_at
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "sparse_parts"
MOST_HEADS = 64  # of a block
WINDOW_PARTS = WINDOW // CHUNK


@dataclass(frozen=True)
class Config:
    """Heads a block, its threads, blocks a multiprocessor."""

    block_h: int
    threads: int
    blocks: int = 1


def make_parts(num_heads: int, topk: int, config: Config) -> Any:
    """Return the PrimFunc; queries and the pages of both caches stay symbolic."""
    m, window_pages, entry_pages = T.dynamic("m"), T.dynamic("window_pages"), T.dynamic("entry_pages")
    block_h, size = config.block_h, page_bytes(PAGE_ROWS)
    num_parts = (WINDOW + topk) // CHUNK
    values_at, rope_at, scales_at = cache_rows.layouts(config.threads)

    @T.prim_func
    def sparse_parts_kernel(
        q: T.Tensor[(m, num_heads, HEAD_DIM), T.bfloat16],
        window_values: T.Tensor[(window_pages, size), T.float8_e4m3fn],
        window_halves: T.Tensor[(window_pages, size // 2), T.bfloat16],
        window_words: T.Tensor[(window_pages, size // 4), T.int32],
        window_idx: T.Tensor[(m, WINDOW), T.int32],
        window_length: T.Tensor[(m,), T.int32],
        entry_values: T.Tensor[(entry_pages, size), T.float8_e4m3fn],
        entry_halves: T.Tensor[(entry_pages, size // 2), T.bfloat16],
        entry_words: T.Tensor[(entry_pages, size // 4), T.int32],
        entry_idx: T.Tensor[(m, topk), T.int32],
        entry_length: T.Tensor[(m,), T.int32],
        acc_out: T.Tensor[(m, num_parts, num_heads, HEAD_DIM), T.float32],
        top_out: T.Tensor[(m, num_parts, num_heads), T.float32],
        total_out: T.Tensor[(m, num_parts, num_heads), T.float32],
    ):
        with T.Kernel(num_parts, num_heads // block_h, m, threads=config.threads) as (part, bh, bm):
            T.annotate_min_blocks_per_sm(config.blocks)
            q_tile = T.alloc_shared((block_h, HEAD_DIM), T.bfloat16)
            keys = T.alloc_shared((CHUNK, HEAD_DIM), T.bfloat16)
            logits = T.alloc_shared((block_h, CHUNK + PAD), T.float32)
            weights = T.alloc_shared((block_h, CHUNK), T.bfloat16)
            places = T.alloc_shared((2, CHUNK), T.int32)
            valid = T.alloc_shared((CHUNK,), T.int32)
            own = T.alloc_fragment((CHUNK,), T.int32)
            other = T.alloc_fragment((CHUNK,), T.int32)
            nope = T.alloc_fragment((CHUNK, NOPE_DIM), T.float8_e4m3fn)
            rope = T.alloc_fragment((CHUNK, ROPE_DIM), T.bfloat16)
            scales = T.alloc_fragment((CHUNK, cache_rows.SCALE_WORDS), T.int32)
            wide = T.alloc_fragment((CHUNK, NOPE_DIM), T.bfloat16)
            products = T.alloc_fragment((CHUNK, block_h), T.float32)
            weight = T.alloc_fragment((block_h, CHUNK), T.float32)
            rounded = T.alloc_fragment((block_h, CHUNK), T.bfloat16)
            top = T.alloc_fragment((block_h,), T.float32)
            total = T.alloc_fragment((block_h,), T.float32)
            acc = T.alloc_fragment((HEAD_DIM, block_h), T.float32)
            state = Weights(products, logits, weight, rounded, weights, top, total)
            T.annotate_layout(
                {
                    own: cache_rows.place_layout(config.threads),
                    other: cache_rows.place_layout(config.threads),
                    nope: values_at,
                    wide: values_at,
                    rope: rope_at,
                    scales: scales_at,
                    **state.layout(block_h, config.threads),
                }
            )

            for j in T.Parallel(CHUNK):
                window_j = T.min(part, WINDOW_PARTS - 1) * CHUNK + j
                entry_j = T.max(part - WINDOW_PARTS, 0) * CHUNK + j
                window_place = place_at(
                    window_idx, window_length, bm, window_j, window_pages, part < WINDOW_PARTS
                )
                entry_place = place_at(
                    entry_idx, entry_length, bm, entry_j, entry_pages, part >= WINDOW_PARTS
                )
                places[0, j] = window_place
                places[1, j] = entry_place
            for j in T.Parallel(CHUNK):
                own[j] = places[0, j]
            for j in T.Parallel(CHUNK):
                other[j] = places[1, j]
            load_either(
                (window_values, window_halves, window_words),
                (entry_values, entry_halves, entry_words),
                own,
                other,
                nope,
                rope,
                scales,
            )
            for j in T.Parallel(CHUNK):
                valid[j] = T.max(places[0, j], places[1, j])
            for h, d in T.Parallel(block_h, HEAD_DIM):
                q_tile[h, d] = q[bm, bh * block_h + h, d]
            expand_rows(nope, rope, scales, wide, keys)
            weigh(keys, q_tile, valid, 0, block_h, state)
            T.gemm(keys, weights, acc, transpose_A=True, transpose_B=True, clear_accum=True, policy=ROWS)
            for d, h in T.Parallel(HEAD_DIM, block_h):
                acc_out[bm, part, bh * block_h + h, d] = acc[d, h]
            for h in T.Parallel(block_h):
                top_out[bm, part, bh * block_h + h] = top[h]
            for h in T.Parallel(block_h):
                total_out[bm, part, bh * block_h + h] = total[h]

    return sparse_parts_kernel


def _empty_parts(q: torch.Tensor, *lists: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, num_heads, dim = q.shape
    parts = (WINDOW + lists[4].shape[1]) // CHUNK
    acc = q.new_empty((m, parts, num_heads, dim), dtype=torch.float32)
    return acc, acc.new_empty((m, parts, num_heads)), acc.new_empty((m, parts, num_heads))


@operator(NAME, _empty_parts)
def sparse_parts(
    q: torch.Tensor,
    window_cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    entry_cache: torch.Tensor,
    entry_idx: torch.Tensor,
    entry_length: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend each query to each chunk of its keys: `sparse_decode` of few queries, whose arguments these are.

    Returns:
        acc: [m, parts, num_heads, 512] fp32: keys times exp2(logit - top); a part is 64 keys, the window's
            first.
        top: [m, parts, num_heads] fp32: the largest logit times log2(e); -1e30 where a part has no key.
        total: [m, parts, num_heads] fp32: sum of exp2(logit - top).

    Raises:
        ContractError: a clause of `sparse_decode` does not hold; nothing was launched.
    """
    args = (q, window_cache, window_idx, window_length, entry_cache, entry_idx, entry_length)
    decode_lists.check(NAME, *args)
    if runtime.uses_reference(q):
        return decode_reference.sparse_parts(*args)
    outputs = _empty_parts(*args)
    if q.shape[0]:
        kwargs = _variant(q.shape[1], entry_idx.shape[1]).kwargs
        runtime.launch(make_parts, kwargs, (*decode_lists.views(*args), *outputs))
    return outputs


@cache
def _variant(num_heads: int, topk: int) -> Variant:
    block_h = math.gcd(num_heads, MOST_HEADS)
    config = Config(block_h, 256 if block_h > 8 else 128)
    return Variant(f"h{num_heads}-k{topk}", {"num_heads": num_heads, "topk": topk, "config": config})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    return decode_lists.make_inputs(dims, device, seed)[:-1]


def _case(case_id: str, m: int, num_heads: int, topk: int, pages: int, *tags: str) -> Case:
    dims = {"m": m, "num_heads": num_heads, "topk": topk, "window_pages": pages, "entry_pages": pages}
    return Case(case_id, {**dims, "ragged": int("bench" not in tags)}, tags or ("test",))


SPEC = KernelSpec(
    name=NAME,
    fn=sparse_parts,
    reference=decode_reference.sparse_parts,
    make_inputs=_make_inputs,
    make_kernel=make_parts,
    variants=tuple(_variant(*shape) for shape in SHAPES),
    select=lambda d: _variant(d["num_heads"], d["topk"]),
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 16, 64, 1),
        _case("one-row", 1, 16, 64, 1),
        _case("three-rows", 3, 32, 128, 3, "gpu"),
        *(_case(f"m{m}-h{h}-k{k}", m, h, k, 1024, "gpu", "bench") for h, k in SHAPES for m in (2, 8)),
    ),
    tolerance=decode_reference.sparse_parts_tolerance,
    num_bytes=lambda d: (
        decode_lists.list_bytes(d)
        + d["m"] * d["num_heads"] * (HEAD_DIM * 2 + (WINDOW + d["topk"]) // CHUNK * (HEAD_DIM + 2) * 4)
    ),
    num_flops=lambda d: 4 * d["m"] * d["num_heads"] * (WINDOW + d["topk"]) * HEAD_DIM,
    peers=("flashmla",),
    row_invariant=False,  # as of `sparse_decode`
    source="DeepSeek-V4 report 2.3 and 3.3",
    small={"num_heads": 64, "topk": 64},
)
