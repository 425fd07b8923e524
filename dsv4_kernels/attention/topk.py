"""Top-k of index scores: the k largest of each row, the lowest place at a tie, places in ascending order.

Scores are compared as integers that order like the floats, in the registers of one block. The k-th largest is
found by digits of 11, 11 and 10 bits: how many scores have each digit is counted in shared memory, of the
second only scores that share the first, of the third those that share both, and these only where the second
leaves a choice. Words of 32 flags and their prefix sums then say which place each of the k slots has: slots
look for their place, so that no address in a tensor depends on data, and each output has exactly one writer.

Rows longer than a block's share are cut into segments, whose k largest are selected again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import reference
from dsv4_kernels.contract import Contract, ContractError, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

KS = (512, 1024)
SEGMENTS = 16  # of a row that is longer than a block's share
MAX_PLACES = 1 << 18
INTERPRETED_ROWS = 6  # at most, in tests: the interpreter takes a second for each
TIED = 0.3  # test inputs below it have equal ones
WORD = 32  # flags
VECTOR = 4  # neighbouring scores of a thread
ROW = 8  # words, of prefix sums
LANES = WORD // VECTOR
HALF = 16  # flags of a word
HALF_LANES = HALF // VECTOR
LANES_OF_WARP = 32  # each has a bin for scores that are not counted
DIGITS = (1 << 22) - 1  # masks the first and the second
INT32_MIN = -(1 << 31)
MINUS_INF = 0xFF800000 - (1 << 32)  # the bits of -inf as int32
LEAST = INT32_MIN - MINUS_INF  # what -inf is compared as
BINS = 2048  # values of the first and of the second digit
LAST_BINS = 1024
SHIFTS = (21, 10)  # below the first digit, below the second
RADIX = 16  # a digit is found by 8 groups of 16 chunks of 16 bins
CHUNKS = BINS // RADIX
GROUPS = CHUNKS // RADIX
SMALL = 2047  # covers scores that are needed, and numbers of sums
COUNT_MASK = 0xFFFF
EQUAL_SHIFT = 16  # of the count of equal scores, above that of larger ones


@dataclass(frozen=True)
class Config:
    """Scores a block, and its width."""

    segment: int = 16384
    threads: int = 256
    blocks: int = 2  # a multiprocessor


def ordered(bits: Any) -> Any:
    """Return an int32 that orders like the float with these bits; both zeros are 0."""
    return T.if_then_else(bits < 0, INT32_MIN - bits, bits)


def popcount(word: Any) -> Any:
    """Return the number of set bits of an int32, as int32."""
    return T.cast(T.popcount(T.cast(word, "uint32")), "int32")


CONTRACT = Contract(
    (
        "0 <= m",
        "m <= MAX_ROWS",
        "0 < num_vectors",
        "num_vectors <= MAX_VECTORS",
    ),
    consts={"MAX_ROWS": 65535, "MAX_VECTORS": MAX_PLACES // VECTOR},
)
CALL_CONTRACT = Contract(
    ("0 < n", "n % VECTOR == 0", "n <= MAX_PLACES"), consts={"VECTOR": VECTOR, "MAX_PLACES": MAX_PLACES}
)


def make_kernel(k: int, segments: int, config: Config) -> Any:
    """Return the PrimFunc that selects k of each segment of each row.

    Args:
        k: scores that are selected.
        segments: of a row; scores are written with their places where there is more than one.
        config: tile.
    """
    m, num_vectors = T.dynamic("m"), T.dynamic("num_vectors")
    segment, threads = config.segment, config.threads
    vectors = segment // threads // VECTOR  # of a thread
    words = segment // WORD
    lanes = threads // HALF_LANES
    rows = words // ROW
    by_thread = T.Fragment((threads, vectors, VECTOR), lambda t, v, e: (t, v * VECTOR + e))
    by_half = T.Fragment((lanes, HALF_LANES, vectors // 2), lambda g, i, u: (g * HALF_LANES + i, u))
    by_pair = T.Fragment((threads, vectors // 2, 2 * VECTOR), lambda t, u, x: (t, u * 2 * VECTOR + x))
    by_row = T.Fragment((words, ROW), lambda w, j: (w % threads, w // threads * ROW + j))
    share = threads // rows  # threads of a row of rows
    by_rows = T.Fragment((rows, rows), lambda g, i: (g * share + i % share, i // share))
    by_lane = {
        n: T.Fragment((n,), forward_fn=lambda i, rep, n=n: (i + rep * n, 0), replicate=threads // n)
        for n in (GROUPS, RADIX)
    }
    strided = {n: T.Fragment((n,), lambda w: (w % threads, w // threads)) for n in (words, k)}  # no vectors

    @T.macro
    def seek_cut(equal, room, source, target, distance):
        # A mask of c low bits, times 2**d, plus a mask of d low bits, is one of c + d.
        for w in T.Parallel(words):
            further = source[w] * (1 << distance) + ((1 << distance) - 1)
            target[w] = T.if_then_else(popcount(equal[w] & further) <= room[w], further, source[w])

    @T.macro
    def seek_word(first, source, target, distance):
        for p in T.Parallel(k):
            further = (source[p] | distance) & (words - 1)
            target[p] = T.if_then_else(first[further] <= p, further, source[p])

    @T.macro
    def seek_bit(first, kept, slot, source, target, distance):
        for p in T.Parallel(k):
            further = source[p] * (1 << distance) + ((1 << distance) - 1)
            word = slot[p] & (words - 1)
            target[p] = T.if_then_else(popcount(kept[word] & further) <= p - first[word], further, source[p])

    @T.macro
    def narrow(sums, of_sums, reached, above, need, size):
        # sums[g]: of the scores from place g on. The last place whose sum is not below what is needed has the
        # score; what is above it is needed no more.
        # The masks take nothing away: they say how large these are where addresses follow from them.
        for g in T.Parallel(size):
            of_sums[g] = T.cast(sums[g] >= need[0], "int32")
        T.reduce_sum(of_sums, reached, dim=0)
        above[0] = T.if_then_else(reached[0] < size, sums[reached[0] & (size - 1)], 0)
        need[0] = (need[0] & SMALL) - (above[0] & SMALL)
        reached[0] = (reached[0] & SMALL) - 1

    @T.macro
    def find_digit(search, need, digit):
        (
            bins,
            chunks,
            group_sums,
            chunk_sums,
            bin_sums,
            of_chunk,
            chunk,
            of_group,
            group,
            of_groups,
            of_place,
            place_sum,
            of_sums,
            reached,
            above,
        ) = search
        for c, i in T.Parallel(CHUNKS, RADIX):
            of_chunk[c, i] = bins[c * RADIX + i]
        T.reduce_sum(of_chunk, chunk, dim=1)
        for c in T.Parallel(CHUNKS):
            chunks[c] = chunk[c]
        for g, c in T.Parallel(GROUPS, CHUNKS):
            of_group[g, c] = T.if_then_else(c >= g * RADIX, chunks[c], 0)
        T.reduce_sum(of_group, group, dim=1)
        for g in T.Parallel(GROUPS):
            group_sums[g] = group[g]
        narrow(group_sums, of_groups, reached, above, need, GROUPS)
        digit[0] = reached[0] & (GROUPS - 1)
        for g, i in T.Parallel(RADIX, RADIX):
            of_place[g, i] = T.if_then_else(i >= g, chunks[(digit[0] & (GROUPS - 1)) * RADIX + i], 0)
        T.reduce_sum(of_place, place_sum, dim=1)
        for g in T.Parallel(RADIX):
            chunk_sums[g] = place_sum[g]
        narrow(chunk_sums, of_sums, reached, above, need, RADIX)
        digit[0] = (digit[0] & (GROUPS - 1)) * RADIX + (reached[0] & (RADIX - 1))
        for g, i in T.Parallel(RADIX, RADIX):
            of_place[g, i] = T.if_then_else(i >= g, bins[(digit[0] & (CHUNKS - 1)) * RADIX + i], 0)
        T.reduce_sum(of_place, place_sum, dim=1)
        for g in T.Parallel(RADIX):
            bin_sums[g] = place_sum[g]
        narrow(bin_sums, of_sums, reached, above, need, RADIX)
        digit[0] = (digit[0] & (CHUNKS - 1)) * RADIX + (reached[0] & (RADIX - 1))

    @T.macro
    def select(scores, lengths, out, out_scores, seg, row):
        keys = T.alloc_fragment((threads, vectors, VECTOR), T.int32)
        length = T.alloc_fragment((1,), T.int32)
        bound = T.alloc_fragment((1,), T.int32)
        bins = T.alloc_shared((BINS + LANES_OF_WARP,), T.int32)
        rest = T.alloc_fragment((threads,), T.int32)
        chunks = T.alloc_shared((CHUNKS,), T.int32)
        group_sums = T.alloc_shared((GROUPS,), T.int32)
        chunk_sums = T.alloc_shared((RADIX,), T.int32)
        bin_sums = T.alloc_shared((RADIX,), T.int32)
        of_chunk = T.alloc_fragment((CHUNKS, RADIX), T.int32)
        chunk = T.alloc_fragment((CHUNKS,), T.int32)
        of_group = T.alloc_fragment((GROUPS, CHUNKS), T.int32)
        group = T.alloc_fragment((GROUPS,), T.int32)
        of_place = T.alloc_fragment((RADIX, RADIX), T.int32)
        place_sum = T.alloc_fragment((RADIX,), T.int32)
        of_groups = T.alloc_fragment((GROUPS,), T.int32)
        of_sums = T.alloc_fragment((RADIX,), T.int32)
        need = T.alloc_fragment((1,), T.int32)
        digit = T.alloc_fragment((1,), T.int32)
        reached = T.alloc_fragment((1,), T.int32)
        above = T.alloc_fragment((1,), T.int32)
        search = (
            bins,
            chunks,
            group_sums,
            chunk_sums,
            bin_sums,
            of_chunk,
            chunk,
            of_group,
            group,
            of_groups,
            of_place,
            place_sum,
            of_sums,
            reached,
            above,
        )
        base = T.alloc_fragment((1,), T.int32)
        own = T.alloc_fragment((threads, vectors // 2), T.int32)
        flags = T.alloc_fragment((threads, vectors // 2, 2 * VECTOR), T.int32)
        shifted = T.alloc_fragment((lanes, HALF_LANES, vectors // 2), T.int32)
        half = T.alloc_fragment((lanes, vectors // 2), T.int32)
        halves = T.alloc_shared((words,), T.int32)
        is_open = T.alloc_fragment((1,), T.int32)
        ties = T.alloc_fragment((1,), T.int32)
        one = T.alloc_fragment((1,), T.int32)
        bits = T.alloc_fragment((threads, VECTOR), T.int32)
        larger = T.alloc_shared((words,), T.int32)
        equal = T.alloc_shared((words,), T.int32)
        scan = T.alloc_shared((words,), T.int32)
        counts = T.alloc_shared((words,), T.int32)
        before_row = T.alloc_shared((rows,), T.int32)
        earlier = T.alloc_fragment((words, ROW), T.int32)
        in_row = T.alloc_fragment((words,), T.int32)
        earlier_rows = T.alloc_fragment((rows, rows), T.int32)
        of_rows = T.alloc_fragment((rows,), T.int32)
        kept = T.alloc_shared((words,), T.int32)
        first = T.alloc_shared((words,), T.int32)
        before = T.alloc_fragment((words,), T.int32)
        cut = T.alloc_fragment((words,), T.int32)
        room = T.alloc_fragment((words,), T.int32)
        cut_next = T.alloc_fragment((words,), T.int32)
        slot = T.alloc_fragment((k,), T.int32)
        slot_next = T.alloc_fragment((k,), T.int32)
        low = T.alloc_fragment((k,), T.int32)
        low_next = T.alloc_fragment((k,), T.int32)
        T.annotate_layout({keys: by_thread, shifted: by_half, flags: by_pair, before: strided[words]})
        T.annotate_layout(
            {
                earlier: by_row,
                in_row: strided[words],
                earlier_rows: by_rows,
                of_sums: by_lane[RADIX],
                of_groups: by_lane[GROUPS],
            }
        )
        T.annotate_layout({room: strided[words], cut: strided[words], cut_next: strided[words]})
        T.annotate_layout({slot: strided[k], slot_next: strided[k], low: strided[k], low_next: strided[k]})

        length[0] = T.min(lengths[row], num_vectors * VECTOR)
        for t, v, e in T.Parallel(threads, vectors, VECTOR):
            vector = seg * (segment // VECTOR) + v * threads + t
            keys[t, v, e] = T.if_then_else(vector < num_vectors, scores[row, vector, e], 0)
        for t in T.Parallel(threads):
            rest[t] = length[0] - seg * segment - t * VECTOR
        for t, v, e in T.Parallel(threads, vectors, VECTOR):
            keys[t, v, e] = T.if_then_else(v * (threads * VECTOR) + e < rest[t], keys[t, v, e], MINUS_INF)
        for t, v, e in T.Parallel(threads, vectors, VECTOR):
            keys[t, v, e] = ordered(keys[t, v, e])

        # The k-th largest score; at least k places of a segment have one, those beyond the length the least.
        need[0] = k
        for b in T.Parallel(BINS):
            bins[b] = 0
        for b in T.Parallel(LANES_OF_WARP):
            bins[BINS + b] = 0
        for t, v, e in T.Parallel(threads, vectors, VECTOR):
            T.atomic_add(bins[(keys[t, v, e] >> SHIFTS[0]) + BINS // 2], 1)
        find_digit(search, need, digit)
        bound[0] = digit[0] - BINS // 2
        for b in T.Parallel(BINS):
            bins[b] = 0
        base[0] = bound[0] * (1 << SHIFTS[0])
        for t, v, e in T.Parallel(threads, vectors, VECTOR):
            # Without a branch: scores with another first digit are counted in bins that nobody reads.
            digits = (keys[t, v, e] ^ base[0]) >> SHIFTS[1] & DIGITS
            T.atomic_add(bins[T.min(digits, BINS + t % LANES_OF_WARP)], 1)
        find_digit(search, need, digit)
        # The third digit decides only where the bin has more scores than are needed.
        is_open[0] = T.cast(bins[digit[0] & (BINS - 1)] != need[0], "int32")
        base[0] = base[0] + (digit[0] & (BINS - 1)) * LAST_BINS
        for b in T.Parallel(BINS):
            bins[b] = 0
        for w in T.Parallel(words):
            larger[w] = 0
        for w in T.Parallel(words):
            equal[w] = 0
        if is_open[0] != 0:
            for t, v, e in T.Parallel(threads, vectors, VECTOR):
                if (keys[t, v, e] ^ base[0]) >> SHIFTS[1] == 0:
                    T.atomic_add(bins[(keys[t, v, e] ^ base[0]) & (LAST_BINS - 1)], 1)
        find_digit(search, need, digit)
        base[0] = base[0] + T.if_then_else(is_open[0] != 0, digit[0] & (LAST_BINS - 1), 0)
        ties[0] = T.cast(
            T.And(is_open[0] != 0, T.And(bins[digit[0] & (LAST_BINS - 1)] != need[0], base[0] > LEAST)),
            "int32",
        )
        # Where all scores from the k-th on are kept, they count as larger; -inf never is.
        bound[0] = T.if_then_else(ties[0] != 0, base[0], T.max(base[0], LEAST + 1) - 1)

        # Sums of distinct powers of two: words of flags, two vectors' halves at a time. Equal scores
        # have words, too, in rows that keep some and not all of them.
        for t, u, s, e in T.Parallel(threads, vectors // 2, 2, VECTOR):
            flag = T.if_then_else(keys[t, 2 * u + s, e] > bound[0], 1, 0)
            flags[t, u, s * VECTOR + e] = flag << (s * HALF + e)
        T.reduce_sum(flags, own, dim=2)
        for g, i, u in T.Parallel(lanes, HALF_LANES, vectors // 2):
            shifted[g, i, u] = own[g * HALF_LANES + i, u] << (i * VECTOR)
        T.reduce_sum(shifted, half, dim=1)
        for g, u in T.Parallel(lanes, vectors // 2):
            halves[u * lanes + g] = half[g, u]
        for w in T.Parallel(words):
            at = w // lanes * lanes + w % (lanes // 2) * 2
            side = w // (lanes // 2) % 2 * HALF
            larger[w] = (halves[at] >> side & COUNT_MASK) | (halves[at + 1] >> side << HALF)
        one[0] = 1
        for t, e in T.Parallel(threads, VECTOR):
            bits[t, e] = one[0] << (t % LANES * VECTOR + e)
        if ties[0] != 0:
            for t, v, e in T.Parallel(threads, vectors, VECTOR):
                if keys[t, v, e] == bound[0]:
                    T.atomic_add(equal[v * (threads // LANES) + t // LANES], bits[t, e])

        # Prefix sums of both counts, in one integer: within rows of words, then of rows.
        for w in T.Parallel(words):
            counts[w] = popcount(larger[w]) | (popcount(equal[w]) << EQUAL_SHIFT)
        for w, j in T.Parallel(words, ROW):
            earlier[w, j] = T.if_then_else(j < w % ROW, counts[w // ROW * ROW + j], 0)
        T.reduce_sum(earlier, in_row, dim=1)
        for w in T.Parallel(words):
            scan[w] = in_row[w]
        for g, i in T.Parallel(rows, rows):
            earlier_rows[g, i] = T.if_then_else(i < g, scan[i * ROW + ROW - 1] + counts[i * ROW + ROW - 1], 0)
        T.reduce_sum(earlier_rows, of_rows, dim=1)
        for g in T.Parallel(rows):
            before_row[g] = of_rows[g]
        for w in T.Parallel(words):
            before[w] = scan[w] + before_row[w // ROW]

        # Of equal scores those with the lowest places are kept: of a word, those in the mask `cut`.
        for w in T.Parallel(words):
            room[w] = T.if_then_else(ties[0] != 0, need[0], 0) - (before[w] >> EQUAL_SHIFT)
        for w in T.Parallel(words):
            cut[w] = 0
        seek_cut(equal, room, cut, cut_next, 16)
        seek_cut(equal, room, cut_next, cut, 8)
        seek_cut(equal, room, cut, cut_next, 4)
        seek_cut(equal, room, cut_next, cut, 2)
        seek_cut(equal, room, cut, cut_next, 1)
        for w in T.Parallel(words):
            is_whole = popcount(equal[w]) <= room[w]
            cut[w] = larger[w] | T.if_then_else(is_whole, equal[w], equal[w] & cut_next[w])
        for w in T.Parallel(words):
            before[w] = (before[w] & COUNT_MASK) + T.min(before[w] >> EQUAL_SHIFT, need[0] & SMALL)
        for w in T.Parallel(words):
            kept[w] = cut[w]
        for w in T.Parallel(words):
            first[w] = before[w]

        # A slot's word is the last one that begins at or below it; its bit likewise.
        for p in T.Parallel(k):
            slot[p] = 0
        seek_word(first, slot, slot_next, 256)
        seek_word(first, slot_next, slot, 128)
        seek_word(first, slot, slot_next, 64)
        seek_word(first, slot_next, slot, 32)
        seek_word(first, slot, slot_next, 16)
        seek_word(first, slot_next, slot, 8)
        seek_word(first, slot, slot_next, 4)
        seek_word(first, slot_next, slot, 2)
        seek_word(first, slot, slot_next, 1)
        for p in T.Parallel(k):
            low[p] = 0
        seek_bit(first, kept, slot_next, low, low_next, 16)
        seek_bit(first, kept, slot_next, low_next, low, 8)
        seek_bit(first, kept, slot_next, low, low_next, 4)
        seek_bit(first, kept, slot_next, low_next, low, 2)
        seek_bit(first, kept, slot_next, low, low_next, 1)
        for p in T.Parallel(k):
            total = first[words - 1] + popcount(kept[words - 1])
            place = seg * segment + (slot_next[p] & (words - 1)) * WORD + (popcount(low_next[p]) & (WORD - 1))
            # No place is beyond the last.
            last = num_vectors * VECTOR - 1  # pyright: ignore[reportOperatorIssue]
            low[p] = T.if_then_else(p < total, T.min(place, last), -1)
        for p in T.Parallel(k):
            out[row, seg, p] = low[p]
        if segments > 1:
            for p in T.Parallel(k):
                place = T.max(low[p], 0)
                score = scores[row, place // VECTOR, place % VECTOR]
                out_scores[row, seg, p] = T.if_then_else(low[p] >= 0, score, MINUS_INF)

    if segments == 1:

        @T.prim_func
        def topk_kernel(
            scores: T.Tensor[(m, num_vectors, VECTOR), T.int32],
            lengths: T.Tensor[(m,), T.int32],
            out: T.Tensor[(m, 1, k), T.int32],
        ):
            with T.Kernel(1, m, threads=threads) as (seg, row):
                T.annotate_min_blocks_per_sm(config.blocks)
                select(scores, lengths, out, None, seg, row)

        return topk_kernel

    @T.prim_func
    def topk_parts_kernel(
        scores: T.Tensor[(m, num_vectors, VECTOR), T.int32],
        lengths: T.Tensor[(m,), T.int32],
        out: T.Tensor[(m, segments, k), T.int32],
        out_scores: T.Tensor[(m, segments, k), T.int32],
    ):
        with T.Kernel(segments, m, threads=threads) as (seg, row):
            T.annotate_min_blocks_per_sm(config.blocks)
            select(scores, lengths, out, out_scores, seg, row)

    return topk_parts_kernel


def _empty_output(scores: torch.Tensor, lengths: torch.Tensor, k: int) -> torch.Tensor:
    return scores.new_empty((scores.shape[0], k), dtype=torch.int32)


@operator("topk", _empty_output)
def topk(scores: torch.Tensor, lengths: torch.Tensor, k: int) -> torch.Tensor:
    """Return the places of each row's k largest scores, ascending; of equal ones the lowest places.

    Scores that are -inf are never selected; both zeros are equal. A nan counts as beyond the infinity of its
    sign.

    Args:
        scores: [m, n] fp32, contiguous, 16-byte aligned, n a multiple of 4 up to 262144; m = 0 is allowed.
        lengths: [m] int32: places from there on are not visible; may exceed n.
        k: 512 or 1024.

    Returns:
        [m, k] int32; -1 after the last place where fewer than k are selected.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor("topk", "scores", scores, dtype=torch.float32, ndim=2)
    require_tensor("topk", "lengths", lengths, dtype=torch.int32, ndim=1, device=scores.device)
    m, n = scores.shape
    CALL_CONTRACT.check("topk", n=n)
    CONTRACT.check("topk", m=m, num_vectors=n // VECTOR)
    if k not in KS:
        raise ContractError(f"topk: requires k in {KS}, got k={k}")
    require_shape("topk", "lengths", lengths, (m,))
    if runtime.uses_reference(scores):
        return reference.index_topk(scores, lengths, k)
    out = _empty_output(scores, lengths, k)
    if m == 0:
        return out
    words = scores.view(torch.int32).view(m, n // VECTOR, VECTOR)
    variant = _select(n, k)
    if variant is _variant(k, 1):
        runtime.launch(make_kernel, variant.kwargs, (words, lengths, out.view(m, 1, k)))
        return out
    places, kept = scores.new_empty((2, m, SEGMENTS, k), dtype=torch.int32)
    runtime.launch(make_kernel, variant.kwargs, (words, lengths, places, kept))
    # Candidates stand in the order of their places, so a choice among them has the row's own rule for ties.
    kept, places = kept.view(m, -1, VECTOR), places.view(m, -1)
    runtime.launch(
        make_kernel,
        _variant(k, 1).kwargs,
        (kept, torch.full_like(lengths, SEGMENTS * k), out.view(m, 1, k)),
    )
    return torch.where(out < 0, out, places.gather(1, out.clamp(min=0).long()))


@cache
def _variant(k: int, segments: int) -> Variant:
    name = f"k{k}" + (f"-of{segments}" if segments > 1 else "")
    return Variant(name, {"k": k, "segments": segments, "config": Config()})


def _select(n: int, k: int) -> Variant:
    return _variant(k, 1 if n <= Config.segment else SEGMENTS)


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    m, n = dims["m"], dims["n"]
    scores = torch.randn(m, n, generator=generator, device=device)
    scores = torch.where(scores.abs() < TIED, scores.round(decimals=1), scores)  # equal scores
    low = n if dims.get("full") else 0
    lengths = torch.randint(low, n + 2, (m,), generator=generator, device=device, dtype=torch.int32)
    return scores, lengths, dims["k"]


def _case(m: int, n: int, k: int, *tags: str, **more: int) -> Case:
    return Case(f"m{m}-n{n}-k{k}", {"m": m, "n": n, "k": k, **more}, tags)


_SOURCE = "DeepSeek-V4 report 2.3.1; reference model's indexer"
SPEC = KernelSpec(
    name="topk",
    fn=topk,
    reference=reference.index_topk,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(k, segments) for k in KS for segments in (1, SEGMENTS)),
    select=lambda d: _select(d["n"], d["k"]),
    contract=CONTRACT,
    cases=(
        _case(0, 64, 512, "test", max_m=INTERPRETED_ROWS),
        _case(1, 64, 512, "test", max_m=INTERPRETED_ROWS),
        _case(3, 1028, 512, "test", max_m=INTERPRETED_ROWS),
        _case(2, 20000, 1024, "test", max_m=INTERPRETED_ROWS),
        *(_case(4096, 16384, k, "gpu", "bench", full=1) for k in KS),
        _case(4096, 262144, 512, "gpu", "bench", full=1),
        _case(1, 262144, 1024, "gpu", "bench", full=1),
        _case(64, 16384, 512, "gpu", "bench", full=1),
    ),
    num_bytes=lambda d: d["m"] * (d["n"] + d["k"]) * 4,
    peers=("torch_topk",),
    source=_SOURCE,
    small={"m": 1, "num_vectors": 4096},
)
