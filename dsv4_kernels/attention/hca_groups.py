"""HCA decode of many queries: a block walks a group of a query's chunks, and `hca_fold` folds the groups.

Each chunk of 64 keys has its own maximum and is folded into the sums so far (`decode_body`): the operations
of `hca_chunks` and `hca_join`, which few queries get, in the same order. So a row's bits depend on no batch.
Design and measurements: docs/attention.md.
"""

from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import cache_rows, decode_reference, hca_lists
from dsv4_kernels.attention.cache_layout import HEAD_DIM, PAGE_ROWS, WINDOW, page_bytes
from dsv4_kernels.attention.cache_rows import ask_rows
from dsv4_kernels.attention.decode_body import SLICE, Config, choose, make_walk
from dsv4_kernels.attention.decode_chunk import CHUNK
from dsv4_kernels.attention.decode_lists import place_at
from dsv4_kernels.attention.hca_lists import (
    CONTRACT,
    GROUP,
    HEADS,
    MILLION,
    WINDOW_CHUNKS,
    empty_sums,
    entry_at,
    groups_of,
)
from dsv4_kernels.registry import KernelSpec, Variant, operator

NAME = "hca_groups"


def make_walk_of_group(num_pages: int, config: Config, pages: Any) -> Any:
    """Return `decode_body.make_walk`'s macro for a group, and its rounds; the cache's pages may be symbolic.

    Its lists are the cache, the window's places and length, the table of pages, the number of entries and of
    the group. All groups have as many rounds: past the last page chunks are masked.
    """
    rounds = min(GROUP, WINDOW_CHUNKS + num_pages)
    limit = num_pages if (WINDOW_CHUNKS + num_pages) % rounds else None

    @T.macro
    def list_places(lists: Any, bm: Any, places: Any):
        _, window_idx, window_length, page_table, entry_length, group = lists
        for j in T.Parallel(WINDOW):
            number = T.max(group * GROUP - WINDOW_CHUNKS + j // CHUNK, 0)
            # One of both is -1.
            places[j] = T.max(
                place_at(window_idx, window_length, bm, j, pages, group == 0),
                entry_at(page_table, entry_length, bm, number, j % CHUNK, pages, limit, group > 0),
            )
        for j in T.Parallel((rounds - WINDOW_CHUNKS) * CHUNK):
            number = group * GROUP + j // CHUNK
            places[WINDOW + j] = entry_at(page_table, entry_length, bm, number, j % CHUNK, pages, limit)

    @T.macro
    def ask_first(lists: Any, places: Any, place: Any, raw: Any, threads: Any):
        ask_rows(lists[0], places, 0, place, raw, threads)

    @T.macro
    def ask_next(lists: Any, c: Any, rounds: Any, places: Any, place: Any, raw: Any, threads: Any):
        if c + 1 < rounds:
            ask_rows(lists[0], places, (c + 1) * CHUNK, place, raw, threads)

    return make_walk(rounds, config, list_places, ask_first, ask_next), rounds


def make_kernel(num_heads: int, num_pages: int, config: Config) -> Any:
    """Return the PrimFunc for so many pages a query; queries and the cache's pages stay symbolic.

    The cache comes three times, as what its bytes are seen as: e4m3, bf16 and 32-bit words.
    """
    m, pages = T.dynamic("m"), T.dynamic("pages")
    block_h, size = config.block_h, page_bytes(PAGE_ROWS)
    num_groups = groups_of(num_pages)
    walk, rounds = make_walk_of_group(num_pages, config, pages)

    @T.macro
    def gather_sums(tile: Any, accs: Any):
        """Put the sums side by side, where one statement reads them: the proofs ask who writes an output."""
        acc0, acc1, acc2, acc3 = accs
        if config.by_rows:
            for h, d in T.Parallel(block_h, SLICE):
                tile[h, d] = acc0[h, d]
            for h, d in T.Parallel(block_h, SLICE):
                tile[h, SLICE + d] = acc1[h, d]
            for h, d in T.Parallel(block_h, SLICE):
                tile[h, 2 * SLICE + d] = acc2[h, d]
            for h, d in T.Parallel(block_h, SLICE):
                tile[h, 3 * SLICE + d] = acc3[h, d]
        else:
            for d, h in T.Parallel(SLICE, block_h):
                tile[h, d] = acc0[d, h]
            for d, h in T.Parallel(SLICE, block_h):
                tile[h, SLICE + d] = acc1[d, h]
            for d, h in T.Parallel(SLICE, block_h):
                tile[h, 2 * SLICE + d] = acc2[d, h]
            for d, h in T.Parallel(SLICE, block_h):
                tile[h, 3 * SLICE + d] = acc3[d, h]

    @T.prim_func
    def hca_groups_kernel(
        q: T.Tensor[(m, num_heads, HEAD_DIM), T.bfloat16],
        values: T.Tensor[(pages, size), T.float8_e4m3fn],
        halves: T.Tensor[(pages, size // 2), T.bfloat16],
        words: T.Tensor[(pages, size // 4), T.int32],
        window_idx: T.Tensor[(m, WINDOW), T.int32],
        window_length: T.Tensor[(m,), T.int32],
        page_table: T.Tensor[(m, num_pages), T.int32],
        entry_length: T.Tensor[(m,), T.int32],
        acc_out: T.Tensor[(m, num_groups, num_heads, HEAD_DIM), T.float32],
        top_out: T.Tensor[(m, num_groups, num_heads), T.float32],
        total_out: T.Tensor[(m, num_groups, num_heads), T.float32],
    ):
        with T.Kernel(num_groups, num_heads // block_h, m, threads=config.threads) as (group, bh, bm):
            lists = ((values, halves, words), window_idx, window_length, page_table, entry_length, group)
            sums = walk(q, bh, bm, rounds, lists)
            tile = T.alloc_shared((block_h, HEAD_DIM), T.float32)
            gather_sums(tile, sums.accs)
            for h, d in T.Parallel(block_h, HEAD_DIM):
                acc_out[bm, group, bh * block_h + h, d] = tile[h, d]
            for h in T.Parallel(block_h):
                top_out[bm, group, bh * block_h + h] = sums.top[h]
            for h in T.Parallel(block_h):
                total_out[bm, group, bh * block_h + h] = sums.total[h]

    return hca_groups_kernel


def _empty_outputs(q: torch.Tensor, *lists: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_sums(q, groups_of(lists[3].shape[1]))


@operator(NAME, _empty_outputs)
def hca_groups(
    q: torch.Tensor,
    cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    page_table: torch.Tensor,
    entry_length: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend each query to each group of its keys: the first half of `hca_decode`, whose arguments these are.

    Returns:
        acc: [m, groups, num_heads, 512] fp32: keys times exp2(logit - top); a group is 13 chunks of 64 keys,
            the window's two and then a page each.
        top: [m, groups, num_heads] fp32: the largest logit times log2(e); -1e30 where a group has no key.
        total: [m, groups, num_heads] fp32: sum of exp2(logit - top).

    Raises:
        ContractError: a clause of `hca_decode` does not hold; nothing was launched.
    """
    args = (q, cache, window_idx, window_length, page_table, entry_length)
    hca_lists.check(NAME, *args)
    if runtime.uses_reference(q):
        return decode_reference.hca_groups(*args)
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
    fn=hca_groups,
    reference=decode_reference.hca_groups,
    make_inputs=hca_lists.make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(h, MILLION) for h in HEADS),
    select=lambda d: _variant(d["num_heads"], d["num_pages"]),
    contract=CONTRACT,
    cases=hca_lists.cases(8, 64),
    tolerance=decode_reference.hca_groups_tolerance,
    num_bytes=lambda d: hca_lists.num_bytes(d, groups_of(d["num_pages"])),
    num_flops=hca_lists.num_flops,
    peers=("flashmla",),
    row_invariant=False,  # queries come with their pages: tests/kernels/test_hca_decode.py
    source="DeepSeek-V4 report 2.3.2 and 3.3; FlashMLA's paged rows",
    small={"num_heads": 64, "num_pages": 12},
)
