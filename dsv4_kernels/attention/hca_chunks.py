"""HCA decode of few queries: a block for each chunk of 64 keys, so that one long request fills the GPU.

What a block leaves (`decode_chunk`) `hca_join` folds: those of a group in ascending order, then the groups,
as `hca_groups` and `hca_fold` do. Design and measurements: docs/attention.md.
"""

from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import cache_rows, decode_reference, hca_lists
from dsv4_kernels.attention.cache_layout import HEAD_DIM, NOPE_DIM, PAGE_ROWS, ROPE_DIM, WINDOW, page_bytes
from dsv4_kernels.attention.cache_rows import expand_rows, load_rows
from dsv4_kernels.attention.decode_body import Config, choose
from dsv4_kernels.attention.decode_chunk import CHUNK, PAD, ROWS, Weights, weigh
from dsv4_kernels.attention.decode_lists import place_at
from dsv4_kernels.attention.hca_lists import CONTRACT, HEADS, MILLION, WINDOW_CHUNKS, empty_sums, entry_at
from dsv4_kernels.registry import KernelSpec, Variant, operator

NAME = "hca_chunks"


def make_kernel(num_heads: int, num_pages: int, config: Config) -> Any:
    """Return the PrimFunc for so many pages a query; queries and the cache's pages stay symbolic.

    The cache comes three times, as what its bytes are seen as: e4m3, bf16 and 32-bit words.
    """
    m, pages = T.dynamic("m"), T.dynamic("pages")
    block_h, size = config.block_h, page_bytes(PAGE_ROWS)
    num_chunks = WINDOW_CHUNKS + num_pages
    values_at, rope_at, scales_at = cache_rows.layouts(config.threads)

    @T.prim_func
    def hca_chunks_kernel(
        q: T.Tensor[(m, num_heads, HEAD_DIM), T.bfloat16],
        values: T.Tensor[(pages, size), T.float8_e4m3fn],
        halves: T.Tensor[(pages, size // 2), T.bfloat16],
        words: T.Tensor[(pages, size // 4), T.int32],
        window_idx: T.Tensor[(m, WINDOW), T.int32],
        window_length: T.Tensor[(m,), T.int32],
        page_table: T.Tensor[(m, num_pages), T.int32],
        entry_length: T.Tensor[(m,), T.int32],
        acc_out: T.Tensor[(m, num_chunks, num_heads, HEAD_DIM), T.float32],
        top_out: T.Tensor[(m, num_chunks, num_heads), T.float32],
        total_out: T.Tensor[(m, num_chunks, num_heads), T.float32],
    ):
        with T.Kernel(num_chunks, num_heads // block_h, m, threads=config.threads) as (chunk, bh, bm):
            q_tile = T.alloc_shared((block_h, HEAD_DIM), T.bfloat16)
            keys = T.alloc_shared((CHUNK, HEAD_DIM), T.bfloat16)
            logits = T.alloc_shared((block_h, CHUNK + PAD), T.float32)
            weights = T.alloc_shared((block_h, CHUNK), T.bfloat16)
            places = T.alloc_shared((CHUNK,), T.int32)
            place = T.alloc_fragment((CHUNK,), T.int32)
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
                    place: cache_rows.place_layout(config.threads),
                    nope: values_at,
                    wide: values_at,
                    rope: rope_at,
                    scales: scales_at,
                    **state.layout(block_h, config.threads),
                }
            )

            for j in T.Parallel(CHUNK):
                window_j = T.min(chunk, WINDOW_CHUNKS - 1) * CHUNK + j
                number = T.max(chunk - WINDOW_CHUNKS, 0)
                # One of both is -1.
                places[j] = T.max(
                    place_at(window_idx, window_length, bm, window_j, pages, chunk < WINDOW_CHUNKS),
                    entry_at(
                        page_table, entry_length, bm, number, j, pages, is_listed=chunk >= WINDOW_CHUNKS
                    ),
                )
            for j in T.Parallel(CHUNK):
                place[j] = places[j]
            load_rows(values, halves, words, place, 0, nope, rope, scales)
            for h, d in T.Parallel(block_h, HEAD_DIM):
                q_tile[h, d] = q[bm, bh * block_h + h, d]
            expand_rows(nope, rope, scales, wide, keys)
            weigh(keys, q_tile, places, 0, block_h, state)
            T.gemm(keys, weights, acc, transpose_A=True, transpose_B=True, clear_accum=True, policy=ROWS)
            for d, h in T.Parallel(HEAD_DIM, block_h):
                acc_out[bm, chunk, bh * block_h + h, d] = acc[d, h]
            for h in T.Parallel(block_h):
                top_out[bm, chunk, bh * block_h + h] = top[h]
            for h in T.Parallel(block_h):
                total_out[bm, chunk, bh * block_h + h] = total[h]

    return hca_chunks_kernel


def _empty_outputs(q: torch.Tensor, *lists: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_sums(q, WINDOW_CHUNKS + lists[3].shape[1])


@operator(NAME, _empty_outputs)
def hca_chunks(
    q: torch.Tensor,
    cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    page_table: torch.Tensor,
    entry_length: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend each query to each chunk of its keys: `hca_decode` of few queries, whose arguments these are.

    Returns:
        acc: [m, 2 + num_pages, num_heads, 512] fp32: keys times exp2(logit - top); the window's two chunks,
            then a page each.
        top: [m, 2 + num_pages, num_heads] fp32: the largest logit times log2(e); -1e30 where a chunk has no
            key.
        total: [m, 2 + num_pages, num_heads] fp32: sum of exp2(logit - top).

    Raises:
        ContractError: a clause of `hca_decode` does not hold; nothing was launched.
    """
    args = (q, cache, window_idx, window_length, page_table, entry_length)
    hca_lists.check(NAME, *args)
    if runtime.uses_reference(q):
        return decode_reference.hca_chunks(*args)
    outputs = _empty_outputs(q, *args[1:])
    if q.shape[0]:
        kwargs = _variant(q.shape[1], page_table.shape[1]).kwargs
        inputs = (q, *cache_rows.views(cache), window_idx, window_length, page_table, entry_length)
        runtime.launch(make_kernel, kwargs, (*inputs, *outputs))
    return outputs


@cache
def _variant(num_heads: int, num_pages: int) -> Variant:
    kwargs = {"num_heads": num_heads, "num_pages": num_pages, "config": choose(num_heads)}
    return Variant(f"h{num_heads}-n{num_pages}", kwargs)


SPEC = KernelSpec(
    name=NAME,
    fn=hca_chunks,
    reference=decode_reference.hca_chunks,
    make_inputs=hca_lists.make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(h, MILLION) for h in HEADS),
    select=lambda d: _variant(d["num_heads"], d["num_pages"]),
    contract=CONTRACT,
    cases=hca_lists.cases(1, 2),
    tolerance=decode_reference.hca_chunks_tolerance,
    num_bytes=lambda d: hca_lists.num_bytes(d, WINDOW_CHUNKS + d["num_pages"]),
    num_flops=hca_lists.num_flops,
    peers=("flashmla",),
    row_invariant=False,  # queries come with their pages: tests/kernels/test_hca_decode.py
    source="DeepSeek-V4 report 2.3.2 and 3.3; FlashMLA's paged rows",
    small={"num_heads": 64, "num_pages": 2},
)
