"""A block of sparse decode by roles: 64 heads of one query over all keys of its lists; bits of `decode_body`.

Warpgroups 0 and 1 load the rows of the chunk after into registers and expand them into the slot that both
others have left; warpgroup 2 has the logits and the softmax of each chunk, and multiplies its weights by one
half of the dims, warpgroup 3 by the other. They meet at mbarriers alone, and the loop becomes one for each
role (`tile.roles`), so that those that multiply have 184 registers a thread.

A chunk's rows lie in a slot in an order of their own: wgmma then gives the four threads of a head the keys
that the four threads of `decode_chunk` hold, and they add the weights in the order of the list. Each product
of 16 keys has the same 16.
"""

from typing import Any

from tilelang import language as T

from dsv4_kernels.attention import cache_rows
from dsv4_kernels.attention.cache_layout import (
    HEAD_DIM,
    NOPE_DIM,
    PAGE_ROWS,
    ROPE_DIM,
    SCALE_BLOCK,
    VALUE_BYTES,
    WINDOW,
)
from dsv4_kernels.attention.cache_rows import SCALE_WORDS
from dsv4_kernels.attention.decode_chunk import CHUNK, FLOOR, LOG2_E, MASKED
from dsv4_kernels.attention.decode_lists import place_at
from dsv4_kernels.tile.scale import ue8m0_to_f32

HEADS = 64
WARPGROUP = 128
EXPANDERS = MULTIPLIERS = 2 * WARPGROUP
THREADS = EXPANDERS + MULTIPLIERS
REGISTERS = (72, 184)  # of a thread that expands, of one that multiplies: 128 on average
SLOTS = 2
SLICE = 128  # dims whose products with a chunk's weights are under way at once, half of them a warpgroup's
COLUMNS = T.GemmWarpPolicy.FullCol
INFINITY_BITS = 0x7F800000
BLOCKS = NOPE_DIM // SCALE_BLOCK
EARLY = 4  # blocks of 64 dims whose successors are asked for before the others are expanded
_SCALES_AT = PAGE_ROWS * VALUE_BYTES // 4
_HALVES = VALUE_BYTES // 2


def key_of(row: Any) -> Any:
    """Return the place in its chunk's list of the key in `row` of a slot."""
    return row // 8 * 8 + row % 2 * 4 + row % 8 // 2


def row_of(key: Any) -> Any:
    """Return the row of a slot that has the key at a place of its chunk's list."""
    return key // 8 * 8 + key % 4 * 2 + key % 8 // 4


@T.macro
def values_of(pool: Any, place: Any, nope: Any, first: Any, stop: Any):
    """Ask for dims first to stop of the rows at `place`."""
    for j, d in T.Parallel(CHUNK, stop - first):
        nope[j, first + d] = T.if_then_else(
            place[j] >= 0,
            pool[0][place[j] // PAGE_ROWS, place[j] % PAGE_ROWS * VALUE_BYTES + first + d],
            T.cast(0, "float8_e4m3fn"),
        )


@T.macro
def rest_of(pool: Any, place: Any, rope: Any, scales: Any):
    """Ask for the rotated dims and the scales of the rows at `place`."""
    for j, d in T.Parallel(CHUNK, ROPE_DIM):
        rope[j, d] = T.if_then_else(
            place[j] >= 0,
            pool[1][place[j] // PAGE_ROWS, place[j] % PAGE_ROWS * _HALVES + NOPE_DIM // 2 + d],
            T.cast(0, "bfloat16"),
        )
    for j, w in T.Parallel(CHUNK, SCALE_WORDS):
        scales[j, w] = T.if_then_else(
            place[j] >= 0,
            pool[2][place[j] // PAGE_ROWS, _SCALES_AT + place[j] % PAGE_ROWS * SCALE_WORDS + w],
            0,
        )


@T.macro
def widen(ring: Any, slot: Any, nope: Any, scales: Any, wide: Any, first: Any, blocks: Any):
    """Expand `blocks` of a chunk from `first` on into a slot, one of 64 dims at a time: few registers.

    A value by its scale, a power of two, is exact in bf16, two at a time.
    """
    for block in T.unroll(blocks):
        for j, d in T.Parallel(CHUNK, SCALE_BLOCK):
            wide[j, d] = T.cast(
                T.cast(nope[j, (first + block) * SCALE_BLOCK + d], "float32"), "bfloat16"
            ) * T.cast(ue8m0_to_f32(scales[j, (first + block) // 4], (first + block) % 4), "bfloat16")
        for j, d in T.Parallel(CHUNK, SCALE_BLOCK):
            ring[slot, j, (first + block) * SCALE_BLOCK + d] = wide[j, d]


@T.macro
def fold(weights: Any, ring: Any, slot: Any, first: Any, fresh: Any, old: Any, new: Any, acc: Any):
    """Fold `SLICE` dims of a chunk's weights times its keys into acc."""
    T.gemm(weights[slot, :, :], ring[slot, :, first : first + SLICE], fresh, clear_accum=True, policy=COLUMNS)
    for h, d in T.Parallel(HEADS, SLICE):
        acc[h, d] = T.ieee_fmaf(fresh[h, d], new[h], T.ieee_mul(acc[h, d], old[h]))


def make_attend(topk: int, window_pages: Any, entry_pages: Any) -> Any:
    """Return the macro, as `decode_body.make_attend`, for a block of `THREADS` threads and 64 heads.

    Where a `with` ends and the next begins, the proofs tell statements of one buffer by their lines.
    """
    nope_at, rope_at, scales_at = cache_rows.layouts(EXPANDERS)
    num_chunks, window_chunks = (WINDOW + topk) // CHUNK, WINDOW // CHUNK

    @T.macro
    def load_values(window: Any, entries: Any, c: Any, place: Any, nope: Any, first: Any, stop: Any):
        if c < window_chunks:
            values_of(window, place, nope, first, stop)
        else:
            values_of(entries, place, nope, first, stop)

    @T.macro
    def load_rest(window: Any, entries: Any, c: Any, place: Any, rope: Any, scales: Any):
        if c < window_chunks:
            rest_of(window, place, rope, scales)
        else:
            rest_of(entries, place, rope, scales)

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
        q_tile = T.alloc_shared((HEADS, HEAD_DIM), T.bfloat16)
        places = T.alloc_shared((WINDOW + topk,), T.int32)
        ring = T.alloc_shared((SLOTS, CHUNK, HEAD_DIM), T.bfloat16)
        weights = T.alloc_shared((SLOTS, HEADS, CHUNK), T.bfloat16)
        # of the sums so far and of the chunk's, for each slot; and one over the sums at the end
        factors = T.alloc_shared((2 * SLOTS + 1, HEADS), T.float32)
        full = T.alloc_barrier([EXPANDERS] * SLOTS)
        ready = T.alloc_barrier([WARPGROUP] * SLOTS)
        left = T.alloc_barrier([MULTIPLIERS] * SLOTS)
        divided = T.alloc_barrier([WARPGROUP])
        # of those that expand
        place = T.alloc_fragment((CHUNK,), T.int32)
        nope = T.alloc_fragment((CHUNK, NOPE_DIM), T.float8_e4m3fn)
        rope = T.alloc_fragment((CHUNK, ROPE_DIM), T.bfloat16)
        scales = T.alloc_fragment((CHUNK, SCALE_WORDS), T.int32)
        wide = T.alloc_fragment((CHUNK, SCALE_BLOCK), T.bfloat16)
        # of the warpgroup with the logits
        logits = T.alloc_fragment((HEADS, CHUNK), T.float32)
        ordered = T.alloc_fragment((HEADS, CHUNK), T.float32)
        top = T.alloc_fragment((HEADS,), T.float32)
        total = T.alloc_fragment((HEADS,), T.float32)
        chunk_top = T.alloc_fragment((HEADS,), T.float32)
        chunk_total = T.alloc_fragment((HEADS,), T.float32)
        old_factor = T.alloc_fragment((HEADS,), T.float32)
        new_factor = T.alloc_fragment((HEADS,), T.float32)
        # of both that multiply
        old_row = T.alloc_fragment((HEADS,), T.float32)
        new_row = T.alloc_fragment((HEADS,), T.float32)
        fresh = T.alloc_fragment((HEADS, SLICE), T.float32)
        acc0 = T.alloc_fragment((HEADS, SLICE), T.float32)
        acc1 = T.alloc_fragment((HEADS, SLICE), T.float32)
        acc2 = T.alloc_fragment((HEADS, SLICE), T.float32)
        acc3 = T.alloc_fragment((HEADS, SLICE), T.float32)
        T.annotate_layout(
            {
                place: cache_rows.place_layout(EXPANDERS),
                nope: nope_at,
                rope: rope_at,
                scales: scales_at,
            }
        )
        for j in T.Parallel(WINDOW):
            places[j] = place_at(window_idx, window_length, bm, key_of(j), window_pages)
        for j in T.Parallel(topk):
            places[WINDOW + j] = place_at(entry_idx, entry_length, bm, key_of(j), entry_pages)
        T.sync_threads()
        with T.ws(0, 1):
            for j in T.Parallel(CHUNK):
                place[j] = places[j]
            load_values(window, entries, 0, place, nope, 0, NOPE_DIM)
            load_rest(window, entries, 0, place, rope, scales)
        for h, d in T.Parallel(HEADS, HEAD_DIM):
            q_tile[h, d] = q[bm, bh * HEADS + h, d]
        T.fence_proxy_async()
        T.sync_threads()
        with T.ws(2):
            T.clear(total)
            T.fill(top, FLOOR)
        with T.ws(2, 3):
            T.clear(acc0)
            T.clear(acc1)
            T.clear(acc2)
            T.clear(acc3)
        for c in T.serial(num_chunks):
            with T.ws(0, 1):
                T.mbarrier_wait_parity(left[c % SLOTS], (c // SLOTS + 1) % 2)
                widen(ring, c % SLOTS, nope, scales, wide, 0, EARLY)
                if c + 1 < num_chunks:
                    for j in T.Parallel(CHUNK):
                        place[j] = places[(c + 1) * CHUNK + j]
                    load_values(window, entries, c + 1, place, nope, 0, EARLY * SCALE_BLOCK)
                widen(ring, c % SLOTS, nope, scales, wide, EARLY, BLOCKS - EARLY)
                for j, d in T.Parallel(CHUNK, ROPE_DIM):
                    ring[c % SLOTS, j, NOPE_DIM + d] = rope[j, d]
                T.mbarrier_arrive(full[c % SLOTS])
                if c + 1 < num_chunks:
                    load_values(window, entries, c + 1, place, nope, EARLY * SCALE_BLOCK, NOPE_DIM)
                    load_rest(window, entries, c + 1, place, rope, scales)
            with T.ws(2):
                T.mbarrier_wait_parity(full[c % SLOTS], c // SLOTS % 2)
                # Those that multiply fence: one of those that expand would wait for its loads.
                T.fence_proxy_async()
                T.gemm(q_tile, ring[c % SLOTS, :, :], logits, transpose_B=True, clear_accum=True)
                for h, j in T.Parallel(HEADS, CHUNK):
                    logits[h, j] = T.if_then_else(
                        places[c * CHUNK + j] >= 0, logits[h, j] * (LOG2_E / HEAD_DIM**0.5), MASKED
                    )
                T.fill(chunk_top, FLOOR)
            with T.ws(2):
                T.reduce_max(logits, chunk_top, dim=1, clear=False)
            with T.ws(2):
                for h, j in T.Parallel(HEADS, CHUNK):
                    logits[h, j] = T.exp2(logits[h, j] - chunk_top[h])
                for h, j in T.Parallel(HEADS, CHUNK):
                    weights[c % SLOTS, h, j] = T.cast(logits[h, j], "bfloat16")
                for h in T.Parallel(HEADS):
                    old_factor[h] = top[h]
                for h in T.Parallel(HEADS):
                    top[h] = T.max(top[h], chunk_top[h])
                for h in T.Parallel(HEADS):
                    old_factor[h] = T.exp2(old_factor[h] - top[h])
                for h in T.Parallel(HEADS):
                    new_factor[h] = T.exp2(chunk_top[h] - top[h])
                for h in T.Parallel(HEADS):
                    factors[c % SLOTS * 2, h] = old_factor[h]
                for h in T.Parallel(HEADS):
                    factors[c % SLOTS * 2 + 1, h] = new_factor[h]
                T.fence_proxy_async()
                T.mbarrier_arrive(ready[c % SLOTS])
                for h, j in T.Parallel(HEADS, CHUNK):
                    ordered[h, j] = logits[h, row_of(j)]
                T.reduce_sum(ordered, chunk_total, dim=1)
                for h in T.Parallel(HEADS):
                    total[h] = T.ieee_fmaf(chunk_total[h], new_factor[h], T.ieee_mul(total[h], old_factor[h]))
            with T.ws(2, 3):
                T.mbarrier_wait_parity(ready[c % SLOTS], c // SLOTS % 2)
                T.fence_proxy_async()
                for h in T.Parallel(HEADS):
                    old_row[h] = factors[c % SLOTS * 2, h]
                for h in T.Parallel(HEADS):
                    new_row[h] = factors[c % SLOTS * 2 + 1, h]
                fold(weights, ring, c % SLOTS, 0, fresh, old_row, new_row, acc0)
                fold(weights, ring, c % SLOTS, SLICE, fresh, old_row, new_row, acc1)
                fold(weights, ring, c % SLOTS, 2 * SLICE, fresh, old_row, new_row, acc2)
                fold(weights, ring, c % SLOTS, 3 * SLICE, fresh, old_row, new_row, acc3)
                T.mbarrier_arrive(left[c % SLOTS])
        with T.ws(2):
            for h in T.Parallel(HEADS):
                factors[2 * SLOTS, h] = T.if_then_else(
                    total[h] > 0, 1.0 / (total[h] + T.exp2(sink[bh * HEADS + h] * LOG2_E - top[h])), 0.0
                )
            for h in T.Parallel(HEADS):
                lse[bm, bh * HEADS + h] = T.if_then_else(
                    total[h] > 0,
                    (top[h] + T.log2(total[h])) * (1 / LOG2_E),
                    T.reinterpret(INFINITY_BITS, "float32"),
                )
            T.mbarrier_arrive(divided)
        with T.ws(2, 3):
            T.mbarrier_wait_parity(divided, 0)
            for h in T.Parallel(HEADS):
                old_row[h] = factors[2 * SLOTS, h]
        with T.ws(2, 3):
            for h, d in T.Parallel(HEADS, SLICE):
                q_tile[h, d] = T.cast(acc0[h, d] * old_row[h], "bfloat16")
        with T.ws(2, 3):
            for h, d in T.Parallel(HEADS, SLICE):
                q_tile[h, SLICE + d] = T.cast(acc1[h, d] * old_row[h], "bfloat16")
        with T.ws(2, 3):
            for h, d in T.Parallel(HEADS, SLICE):
                q_tile[h, 2 * SLICE + d] = T.cast(acc2[h, d] * old_row[h], "bfloat16")
        with T.ws(2, 3):
            for h, d in T.Parallel(HEADS, SLICE):
                q_tile[h, 3 * SLICE + d] = T.cast(acc3[h, d] * old_row[h], "bfloat16")
        T.sync_threads()
        put(outputs, bm, bh, q_tile)

    return attend
