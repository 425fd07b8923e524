"""Sparse attention of single tokens, straight from paged FP8 rows: window and selected entries (report 2.3).

A block takes one query and `block_h` of its heads, over all keys of both lists in their order. Each chunk
of 64 keys has its own maximum, and what it adds is folded into the sums so far: the same operations in the
same order as a block for each chunk and `hca_fold` perform (`sparse_parts`), which few queries get. So a
row's bits depend on no batch.
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
from dsv4_kernels.attention.cache_rows import Raw, ask_rows, expand_rows, take_rows
from dsv4_kernels.attention.decode_chunk import CHUNK, COLUMNS, FLOOR, LOG2_E, PAD, ROWS, Weights, weigh
from dsv4_kernels.attention.decode_lists import CONTRACT, SHAPES, place_at
from dsv4_kernels.attention.hca_fold import hca_fold
from dsv4_kernels.attention.sparse_parts import sparse_parts
from dsv4_kernels.contract import require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "sparse_decode"
SLICE = 128  # dims whose products with a chunk's weights are under way at once
PARTS = tuple(range(HEAD_DIM // SLICE))
INFINITY_BITS = 0x7F800000
MOST_HEADS = 64  # of a block
MULTIPROCESSORS = 132  # of an H100
PARTED = 5  # multiprocessors for 64 heads of a query, from which on each chunk gets a block


@dataclass(frozen=True)
class Config:
    """Heads a block, and its threads: a warpgroup multiplies at least eight heads."""

    block_h: int
    threads: int


def make_kernel(num_heads: int, topk: int, config: Config) -> Any:
    """Return the PrimFunc; queries and the pages of both caches stay symbolic.

    A cache comes three times, as what its bytes are seen as: e4m3, bf16 and 32-bit words.
    """
    m, window_pages, entry_pages = T.dynamic("m"), T.dynamic("window_pages"), T.dynamic("entry_pages")
    block_h, threads, size = config.block_h, config.threads, page_bytes(PAGE_ROWS)
    num_chunks = (WINDOW + topk) // CHUNK
    values_at, rope_at, scales_at = cache_rows.layouts(threads)

    # 64 heads are the instruction's rows: a thread needs the factors of two heads alone. Fewer are columns.
    by_rows = block_h == MOST_HEADS
    sums = (block_h, SLICE) if by_rows else (SLICE, block_h)

    @T.macro
    def add(
        keys: Any,
        weights: Any,
        factors: Any,
        old_row: Any,
        new_row: Any,
        fresh: Any,
        acc: Any,
        first_dim: Any,
    ):
        """Fold `SLICE` dims of a chunk's keys times its weights into acc."""
        if by_rows:
            T.gemm(weights, keys[:, first_dim : first_dim + SLICE], fresh, clear_accum=True, policy=COLUMNS)
            for h, d in T.Parallel(block_h, SLICE):
                acc[h, d] = T.ieee_fmaf(fresh[h, d], new_row[h], T.ieee_mul(acc[h, d], old_row[h]))
        else:
            T.gemm(
                keys[:, first_dim : first_dim + SLICE],
                weights,
                fresh,
                transpose_A=True,
                transpose_B=True,
                clear_accum=True,
                policy=ROWS,
            )
            for d, h in T.Parallel(SLICE, block_h):
                acc[d, h] = T.ieee_fmaf(fresh[d, h], factors[1, h], T.ieee_mul(acc[d, h], factors[0, h]))

    @T.prim_func
    def sparse_decode_kernel(
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
        sink: T.Tensor[(num_heads,), T.float32],
        out: T.Tensor[(m, num_heads, HEAD_DIM), T.bfloat16],
        lse: T.Tensor[(m, num_heads), T.float32],
    ):
        with T.Kernel(num_heads // block_h, m, threads=threads) as (bh, bm):
            q_tile = T.alloc_shared((block_h, HEAD_DIM), T.bfloat16)
            keys = T.alloc_shared((CHUNK, HEAD_DIM), T.bfloat16)
            logits = T.alloc_shared((block_h, CHUNK + PAD), T.float32)
            weights = T.alloc_shared((block_h, CHUNK), T.bfloat16)
            places = T.alloc_shared((WINDOW + topk,), T.int32)
            factors = T.alloc_shared((2, block_h), T.float32)  # of the sums so far, and of the chunk's
            raw_nope = T.alloc_shared((CHUNK, NOPE_DIM), T.float8_e4m3fn)
            raw_rope = T.alloc_shared((CHUNK, ROPE_DIM), T.bfloat16)
            raw_scales = T.alloc_shared((CHUNK, cache_rows.SCALE_WORDS * (threads // CHUNK)), T.int32)
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
            old_factor = T.alloc_fragment((block_h,), T.float32)
            new_factor = T.alloc_fragment((block_h,), T.float32)
            chunk_top = T.alloc_fragment((block_h,), T.float32)
            chunk_total = T.alloc_fragment((block_h,), T.float32)
            old_row = T.alloc_fragment((block_h,), T.float32)
            new_row = T.alloc_fragment((block_h,), T.float32)
            fresh = T.alloc_fragment(sums, T.float32)
            acc0 = T.alloc_fragment(sums, T.float32)
            acc1 = T.alloc_fragment(sums, T.float32)
            acc2 = T.alloc_fragment(sums, T.float32)
            acc3 = T.alloc_fragment(sums, T.float32)
            accs = (acc0, acc1, acc2, acc3)
            raw = Raw(raw_nope, raw_rope, raw_scales)
            state = Weights(products, logits, weight, rounded, weights, chunk_top, chunk_total)
            window = (window_values, window_halves, window_words)
            entries = (entry_values, entry_halves, entry_words)
            T.annotate_layout(
                {
                    place: cache_rows.place_layout(threads),
                    nope: values_at,
                    wide: values_at,
                    rope: rope_at,
                    scales: scales_at,
                    **state.layout(block_h, threads),
                }
            )

            for j in T.Parallel(WINDOW):
                places[j] = place_at(window_idx, window_length, bm, j, window_pages)
            for j in T.Parallel(topk):
                places[WINDOW + j] = place_at(entry_idx, entry_length, bm, j, entry_pages)
            ask_rows(window, places, 0, place, raw, threads)
            for h, d in T.Parallel(block_h, HEAD_DIM):
                q_tile[h, d] = q[bm, bh * block_h + h, d]
            for part in PARTS:
                T.clear(accs[part])
            T.clear(total)
            T.fill(top, FLOOR)
            for c in T.serial(num_chunks):
                T.ptx_wait_group(0)
                T.sync_threads()  # the chunk has arrived, and nobody multiplies the one before any more
                take_rows(raw, nope, rope, scales, threads)
                expand_rows(nope, rope, scales, wide, keys)
                # The next chunk is on its way while this one is multiplied. The window's second is named by
                # its number: the compiler puts it in for c + 1, and the proofs compare texts.
                if c == 0:
                    ask_rows(window, places, CHUNK, place, raw, threads)
                elif c + 1 < num_chunks:
                    ask_rows(entries, places, (c + 1) * CHUNK, place, raw, threads)
                weigh(keys, q_tile, places, c * CHUNK, block_h, state)
                for h in T.Parallel(block_h):
                    old_factor[h] = top[h]
                for h in T.Parallel(block_h):
                    top[h] = T.max(top[h], chunk_top[h])
                for h in T.Parallel(block_h):
                    old_factor[h] = T.exp2(old_factor[h] - top[h])
                for h in T.Parallel(block_h):
                    new_factor[h] = T.exp2(chunk_top[h] - top[h])
                for h in T.Parallel(block_h):
                    total[h] = T.ieee_fmaf(chunk_total[h], new_factor[h], T.ieee_mul(total[h], old_factor[h]))
                for h in T.Parallel(block_h):
                    factors[0, h] = old_factor[h]
                for h in T.Parallel(block_h):
                    factors[1, h] = new_factor[h]
                if by_rows:
                    for h in T.Parallel(block_h):
                        old_row[h] = factors[0, h]
                    for h in T.Parallel(block_h):
                        new_row[h] = factors[1, h]
                for part in PARTS:
                    add(keys, weights, factors, old_row, new_row, fresh, accs[part], part * SLICE)
            for h in T.Parallel(block_h):
                factors[0, h] = T.if_then_else(
                    total[h] > 0, 1.0 / (total[h] + T.exp2(sink[bh * block_h + h] * LOG2_E - top[h])), 0.0
                )
            if by_rows:
                for h in T.Parallel(block_h):
                    old_row[h] = factors[0, h]
                # Four statements: the proofs tell stores that cast by their lines.
                for h, d in T.Parallel(block_h, SLICE):
                    q_tile[h, d] = T.cast(acc0[h, d] * old_row[h], "bfloat16")
                for h, d in T.Parallel(block_h, SLICE):
                    q_tile[h, SLICE + d] = T.cast(acc1[h, d] * old_row[h], "bfloat16")
                for h, d in T.Parallel(block_h, SLICE):
                    q_tile[h, 2 * SLICE + d] = T.cast(acc2[h, d] * old_row[h], "bfloat16")
                for h, d in T.Parallel(block_h, SLICE):
                    q_tile[h, 3 * SLICE + d] = T.cast(acc3[h, d] * old_row[h], "bfloat16")
            else:
                for d, h in T.Parallel(SLICE, block_h):
                    q_tile[h, d] = T.cast(acc0[d, h] * factors[0, h], "bfloat16")
                for d, h in T.Parallel(SLICE, block_h):
                    q_tile[h, SLICE + d] = T.cast(acc1[d, h] * factors[0, h], "bfloat16")
                for d, h in T.Parallel(SLICE, block_h):
                    q_tile[h, 2 * SLICE + d] = T.cast(acc2[d, h] * factors[0, h], "bfloat16")
                for d, h in T.Parallel(SLICE, block_h):
                    q_tile[h, 3 * SLICE + d] = T.cast(acc3[d, h] * factors[0, h], "bfloat16")
            for h, d in T.Parallel(block_h, HEAD_DIM):
                out[bm, bh * block_h + h, d] = q_tile[h, d]
            for h in T.Parallel(block_h):
                lse[bm, bh * block_h + h] = T.if_then_else(
                    total[h] > 0,
                    (top[h] + T.log2(total[h])) * (1 / LOG2_E),
                    T.reinterpret(INFINITY_BITS, "float32"),
                )

    return sparse_decode_kernel


def _empty_outputs(q: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


@operator(NAME, _empty_outputs)
def whole(
    q: torch.Tensor,
    window_cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    entry_cache: torch.Tensor,
    entry_idx: torch.Tensor,
    entry_length: torch.Tensor,
    sink: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `sparse_decode` does in one launch, however few queries there are: a block walks all chunks."""
    lists = (q, window_cache, window_idx, window_length, entry_cache, entry_idx, entry_length)
    decode_lists.check(NAME, *lists)
    (m, num_heads, _), topk = q.shape, entry_idx.shape[1]
    require_tensor(NAME, "sink", sink, dtype=torch.float32, ndim=1, device=q.device)
    require_shape(NAME, "sink", sink, (num_heads,))
    if runtime.uses_reference(q):
        return decode_reference.sparse_decode(*lists, sink)
    out, lse = _empty_outputs(q)
    if m:
        inputs = (*decode_lists.views(*lists), sink)
        runtime.launch(make_kernel, _variant(num_heads, topk).kwargs, (*inputs, out, lse))
    return out, lse


def sparse_decode(
    q: torch.Tensor,
    window_cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    entry_cache: torch.Tensor,
    entry_idx: torch.Tensor,
    entry_length: torch.Tensor,
    sink: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend each query to the cache rows that its two index lists name; K and V are the same row.

    Logits are q . k / sqrt(512). The sink is one more logit of the softmax's denominator, without a value.
    Keys are taken in the order of the lists, the window's first, in chunks of 64 that are folded one after
    the other: a query's bits depend on nothing but its own data, whatever the number of queries. Few queries
    are two launches, `sparse_parts` and `hca_fold`.

    Args:
        q: [m, num_heads, 512] bf16, normed and rotated; the tokens of a request one after the other. m = 0 is
            allowed; num_heads a multiple of 8.
        window_cache: [pages, 37440] uint8, pages of 64 rows: see `cache_layout`.
        window_idx: [m, 128] int32, places (page * 64 + row); outside the cache: masked.
        window_length: [m] int32: places of `window_idx` from there on are masked.
        entry_cache: as window_cache, compressed entries.
        entry_idx: [m, topk] int32; topk a multiple of 64.
        entry_length: [m] int32.
        sink: [num_heads] fp32; -inf: none.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        out: [m, num_heads, 512] bf16, not yet rotated back; zeros where nothing is attended.
        lse: [m, num_heads] fp32, natural, without the sink; +inf where nothing is attended.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    lists = (q, window_cache, window_idx, window_length, entry_cache, entry_idx, entry_length)
    if _are_few(q) and not runtime.uses_reference(q):
        return hca_fold(*sparse_parts(*lists), sink)
    return whole(*lists, sink)


def _are_few(q: torch.Tensor) -> bool:
    """Return whether each chunk gets a block; False for what is no argument, which `whole` then refuses."""
    if q.ndim != 3:
        return False
    groups, rest = divmod(q.shape[1], MOST_HEADS)
    return rest == 0 and q.shape[0] * groups * PARTED <= MULTIPROCESSORS


@cache
def _variant(num_heads: int, topk: int) -> Variant:
    block_h = math.gcd(num_heads, MOST_HEADS)
    config = Config(block_h, 256 if block_h > 8 else 128)
    return Variant(f"h{num_heads}-k{topk}", {"num_heads": num_heads, "topk": topk, "config": config})


def _case(case_id: str, m: int, num_heads: int, topk: int, pages: int, *tags: str) -> Case:
    dims = {"m": m, "num_heads": num_heads, "topk": topk, "window_pages": pages, "entry_pages": pages}
    return Case(case_id, {**dims, "ragged": int("bench" not in tags)}, tags or ("test",))


def _num_bytes(dims: Mapping[str, int]) -> int:
    return decode_lists.list_bytes(dims) + dims["m"] * dims["num_heads"] * HEAD_DIM * 4


# Of the kernel above alone: what few queries get is `sparse_parts` and `hca_fold`.
SPEC = KernelSpec(
    name=NAME,
    fn=whole,
    reference=decode_reference.sparse_decode,
    make_inputs=decode_lists.make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(*shape) for shape in SHAPES),
    select=lambda d: _variant(d["num_heads"], d["topk"]),
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 8, 64, 1),
        _case("one-row", 1, 8, 64, 1),
        _case("four-rows", 4, 16, 128, 3, "gpu"),
        *(_case(f"m{m}-h{h}-k{k}", m, h, k, 1024, "gpu", "bench") for h, k in SHAPES for m in (64, 128, 256)),
        _case("h8", 3, 8, 512, 64, "gpu"),
        _case("h16", 70, 16, 512, 64, "gpu"),
        _case("h32", 130, 32, 1024, 64, "gpu"),
    ),
    tolerance=decode_reference.sparse_decode_tolerance,
    num_bytes=_num_bytes,
    num_flops=lambda d: 4 * d["m"] * d["num_heads"] * (WINDOW + d["topk"]) * HEAD_DIM,
    peers=("flashmla",),
    row_invariant=False,  # queries come with their lists: tests/kernels/test_decode.py
    source="DeepSeek-V4 report 2.3; reference model's sparse attention; FlashMLA's two paged caches",
    small={"num_heads": 64, "topk": 64},
)
