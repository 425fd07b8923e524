"""A block of decode: `block_h` heads of one query over chunks of 64 cached keys, one after the other.

Each chunk has its own maximum, and what it adds is folded into the sums so far, by the operations of
`hca_fold` in the same order. Which keys those are, and what becomes of the sums, is a kernel's own: both
lists of a query of sparse decode (`make_attend`, whose output is bf16 or rotated back and cast), or a group
of HCA's entries.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels.attention import cache_rows
from dsv4_kernels.attention.cache_layout import HEAD_DIM, NOPE_DIM, ROPE_DIM, WINDOW
from dsv4_kernels.attention.cache_rows import Raw, ask_rows, expand_rows, take_rows
from dsv4_kernels.attention.decode_chunk import CHUNK, COLUMNS, FLOOR, LOG2_E, PAD, ROWS, Weights, weigh
from dsv4_kernels.attention.decode_lists import place_at

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

    @property
    def by_rows(self) -> bool:
        """Whether heads are rows of the second product: a thread needs the factors of two. Else columns."""
        return self.block_h == MOST_HEADS


@dataclass(frozen=True)
class Sums:
    """What a block has when it has taken its chunks.

    Attributes:
        accs: four fragments fp32, [block_h, 128] where heads are rows, else [128, block_h].
        top, total: registers fp32 [block_h].
        q_tile: shared memory bf16 [block_h, 512], free now.
        factors: shared memory fp32 [2, block_h], free now.
        old_row: registers fp32 [block_h], laid out as the rows of accs.
    """

    accs: tuple[Any, ...]
    top: Any
    total: Any
    q_tile: Any
    factors: Any
    old_row: Any


def choose(num_heads: int) -> Config:
    """Return the Config of so many heads, whatever the number of queries."""
    block_h = math.gcd(num_heads, MOST_HEADS)
    return Config(block_h, 256 if block_h > 8 else 128)


def are_few(q: torch.Tensor) -> bool:
    """Return whether each chunk gets a block; False for what is no argument, which is then refused."""
    if q.ndim != 3:
        return False
    groups, rest = divmod(q.shape[1], MOST_HEADS)
    return rest == 0 and q.shape[0] * groups * PARTED <= MULTIPROCESSORS


def make_walk(num_chunks: int, config: Config, list_places: Any, ask_first: Any, ask_next: Any) -> Any:
    """Return the macro that takes a block's chunks, of which there are `num_chunks` at most.

    Its arguments are the queries, the block's group of heads and query, the number of chunks and `lists`,
    which it hands on; it returns `Sums`.

    Args:
        num_chunks: that `places` has room for.
        config: of the block.
        list_places: macro (lists, bm, places): sets the places of all keys, -1 where they are masked.
        ask_first: macro (lists, places, place, raw, threads): asks for the first chunk.
        ask_next: macro (lists, c, rounds, places, place, raw, threads): asks for the chunk after c, if any.
    """
    block_h, threads, by_rows = config.block_h, config.threads, config.by_rows
    values_at, rope_at, scales_at = cache_rows.layouts(threads)
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

    @T.macro
    def walk(q: Any, bh: Any, bm: Any, rounds: Any, lists: Any):
        q_tile = T.alloc_shared((block_h, HEAD_DIM), T.bfloat16)
        keys = T.alloc_shared((CHUNK, HEAD_DIM), T.bfloat16)
        logits = T.alloc_shared((block_h, CHUNK + PAD), T.float32)
        weights = T.alloc_shared((block_h, CHUNK), T.bfloat16)
        places = T.alloc_shared((num_chunks * CHUNK,), T.int32)
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

        list_places(lists, bm, places)
        ask_first(lists, places, place, raw, threads)
        for h, d in T.Parallel(block_h, HEAD_DIM):
            q_tile[h, d] = q[bm, bh * block_h + h, d]
        for part in PARTS:
            T.clear(accs[part])
        T.clear(total)
        T.fill(top, FLOOR)
        for c in T.serial(rounds):
            T.ptx_wait_group(0)
            T.sync_threads()  # the chunk has arrived, and nobody multiplies the one before any more
            take_rows(raw, nope, rope, scales, threads)
            expand_rows(nope, rope, scales, wide, keys)
            # The next chunk is on its way while this one is multiplied.
            ask_next(lists, c, rounds, places, place, raw, threads)
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
        return Sums(accs, top, total, q_tile, factors, old_row)

    return walk


def make_attend(topk: int, config: Config, window_pages: Any, entry_pages: Any) -> Any:
    """Return the macro for lists of `topk` entries; pages of both caches may be symbolic.

    Its arguments are the kernel's tensors - of each cache what its bytes are seen as: e4m3, bf16 and 32-bit
    words -, the block's group of heads and query, and what the result goes to: `put(outputs, bm, bh, tile)`
    is called with the result, bf16 [block_h, 512] in shared memory, before lse is stored.
    """
    block_h, num_chunks = config.block_h, (WINDOW + topk) // CHUNK

    @T.macro
    def list_places(lists: Any, bm: Any, places: Any):
        _, window_idx, window_length, _, entry_idx, entry_length = lists
        for j in T.Parallel(WINDOW):
            places[j] = place_at(window_idx, window_length, bm, j, window_pages)
        for j in T.Parallel(topk):
            places[WINDOW + j] = place_at(entry_idx, entry_length, bm, j, entry_pages)

    @T.macro
    def ask_first(lists: Any, places: Any, place: Any, raw: Any, threads: Any):
        ask_rows(lists[0], places, 0, place, raw, threads)

    @T.macro
    def ask_next(lists: Any, c: Any, rounds: Any, places: Any, place: Any, raw: Any, threads: Any):
        # The window's second is named by its number: the compiler puts it in for c + 1, and the proofs
        # compare texts.
        if c == 0:
            ask_rows(lists[0], places, CHUNK, place, raw, threads)
        elif c + 1 < rounds:
            ask_rows(lists[3], places, (c + 1) * CHUNK, place, raw, threads)

    walk = make_walk(num_chunks, config, list_places, ask_first, ask_next)

    @T.macro
    def attend(
        q: Any,
        window: Any,
        window_idx: Any,
        window_length: Any,
        entries: Any,
        entry_idx: Any,
        entry_length: Any,
        sink: Any,
        lse: Any,
        bh: Any,
        bm: Any,
        put: Any,
        outputs: Any,
    ):
        lists = (window, window_idx, window_length, entries, entry_idx, entry_length)
        sums = walk(q, bh, bm, num_chunks, lists)
        (acc0, acc1, acc2, acc3), top, total = sums.accs, sums.top, sums.total
        q_tile, factors, old_row = sums.q_tile, sums.factors, sums.old_row
        for h in T.Parallel(block_h):
            factors[0, h] = T.if_then_else(
                total[h] > 0, 1.0 / (total[h] + T.exp2(sink[bh * block_h + h] * LOG2_E - top[h])), 0.0
            )
        if config.by_rows:
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
        put(outputs, bm, bh, q_tile)
        for h in T.Parallel(block_h):
            lse[bm, bh * block_h + h] = T.if_then_else(
                total[h] > 0,
                (top[h] + T.log2(total[h])) * (1 / LOG2_E),
                T.reinterpret(INFINITY_BITS, "float32"),
            )

    return attend
