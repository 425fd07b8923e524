"""A key of the indexer in one warp: Hadamard transform of 128 dims, FP4 or FP8, into its page (report 2.3.1).

Each lane has four dims. Butterflies of two strides stay in a lane; then the row passes through shared memory
and each lane takes the four dims of the next two strides. Strides ascend and each sum is rounded to fp32, as
in `hadamard_quant`: the same bits. At last a lane has two pairs of neighbouring dims, 64 apart.
"""

from collections.abc import Callable
from typing import Any

from tilelang import language as T

from dsv4_kernels.attention.hadamard_codes import HALF_BITS
from dsv4_kernels.attention.hadamard_quant import DIM, FACTOR, FP4, FP4_BLOCKS, PAIRS, limits, quant_code
from dsv4_kernels.attention.index_cache import PAGE_ROWS, SCALE_BYTES
from dsv4_kernels.tile.pairs import even_f32, odd_f32
from dsv4_kernels.tile.scale import BF16_MAGNITUDE, ue8m0_f32_bits, ue8m0_scale

WARP = 32  # lanes that hold a row
LANE_PAIRS = PAIRS // WARP
BANKS = 32  # words of shared memory that a warp reads at once
SKEW = 4  # words after each 32: lanes of strides 4 and 8 meet no bank twice
ROW_WORDS = DIM + DIM // BANKS * SKEW


def codes_dtype(kind: str) -> str:
    """Return the type of two codes, and so of a page's elements."""
    return "uint8" if kind == FP4 else "uint16"


def scale_parts(kind: str) -> int:
    """Return the elements that hold a key's scales: four UE8M0 bytes, or the halves of one fp32."""
    return SCALE_BYTES if kind == FP4 else SCALE_BYTES // 2


def page_elements(kind: str) -> int:
    """Return the elements of a page: of each key its pairs of codes, then of each its scales."""
    return PAGE_ROWS * (PAIRS + scale_parts(kind))


def by_lane_pairs() -> Any:
    """Return the layout in which lanes hold a row's pairs: two neighbouring ones each."""
    return T.Fragment((PAIRS,), lambda p: (p // LANE_PAIRS, p % LANE_PAIRS))


def row_writer(kind: str) -> Callable[..., None]:
    """Return the macro (words, cache, slot) that transforms a row, casts it and writes it to its place.

    It takes the row's pairs of bf16 (int32 [64] in registers, laid out by `by_lane_pairs`), a cache
    [pages, page_elements] of `codes_dtype`, and the place: nothing is written where it is outside the cache.
    """
    is_fp4 = kind == FP4
    blocks = FP4_BLOCKS if is_fp4 else 1
    dims = DIM // blocks  # a scale
    code_bits = 4 if is_fp4 else 8
    parts = scale_parts(kind)
    amax_min, largest = limits(kind)
    four = (WARP, 2, 2)
    by_lane = T.Fragment(four, lambda i, a, b: (i, a * 2 + b))
    by_block = T.Fragment(
        (blocks, dims), lambda n, x: ((n * dims + x) % PAIRS // 2, (n * dims + x) // PAIRS * 2 + x % 2)
    )

    # What the lanes in excess would write again is masked: an address then has a remainder of the lane's
    # number, whose range the proof of coverage knows, and not the number.
    by_vector = T.Fragment(
        (PAIRS,),
        forward_fn=lambda p, rep: (rep * (WARP // 2) + p // 4, p % 4),
        replicate=2,
    )
    by_one_lane = T.Fragment((parts,), lambda s: (0, s))

    def word(dim: Any) -> Any:
        return dim + dim // BANKS * SKEW

    def neighbours(i: Any, a: Any, b: Any) -> Any:
        """Return the word of what is (a, b) of lane i's four dims; so do the next three."""
        return word(i * 4 + a * 2 + b)

    def fourth(i: Any, a: Any, b: Any) -> Any:
        return word(i // 4 * 16 + a * 8 + b * 4 + i % 4)

    def sixteenth(i: Any, a: Any, b: Any) -> Any:
        return word(i // 16 * 64 + a * 32 + b * 16 + i % 16)

    def pairs(i: Any, a: Any, b: Any) -> Any:
        return word(a * PAIRS + i * 2 + b)

    def combined(own: Any, other: Any, is_low: Any) -> Any:
        return T.if_then_else(is_low, own + other, other - own)

    @T.macro
    def upper_butterflies(values: Any, partner: Any):
        for i, a, b in T.Parallel(WARP, 2, 2):
            partner[i, a, b] = values[i, 1 - a, b]
        for i, a, b in T.Parallel(WARP, 2, 2):
            values[i, a, b] = combined(values[i, a, b], partner[i, a, b], a == 0)

    @T.macro
    def butterflies(values: Any, partner: Any):
        """Add and subtract over the lower stride of a lane's four dims, then over the upper one."""
        for i, a, b in T.Parallel(WARP, 2, 2):
            partner[i, a, b] = values[i, a, 1 - b]
        for i, a, b in T.Parallel(WARP, 2, 2):
            values[i, a, b] = combined(values[i, a, b], partner[i, a, b], b == 0)
        upper_butterflies(values, partner)

    @T.macro
    def pass_on(values: Any, rows: Any, before: Any, after: Any):
        for i, a, b in T.Parallel(WARP, 2, 2):
            rows[before(i, a, b)] = values[i, a, b]
        for i, a, b in T.Parallel(WARP, 2, 2):
            values[i, a, b] = rows[after(i, a, b)]

    @T.macro
    def write_row(words: Any, cache: Any, slot: Any):
        values = T.alloc_fragment(four, T.float32)
        partner = T.alloc_fragment(four, T.float32)
        first = T.alloc_shared((ROW_WORDS,), T.float32)
        second = T.alloc_shared((ROW_WORDS,), T.float32)
        third = T.alloc_shared((ROW_WORDS,), T.float32)
        bits = T.alloc_fragment(four, T.int32)
        part = T.alloc_fragment(four, T.int32)
        pair = T.alloc_fragment(four[:-1], T.int32)
        magnitude = T.alloc_fragment((blocks, dims), T.int32)
        amax = T.alloc_fragment((blocks,), T.int32)
        exponent = T.alloc_fragment((blocks,), T.int32)
        T.annotate_layout({values: by_lane, partner: by_lane, bits: by_lane, part: by_lane})
        codes = T.alloc_shared((PAIRS,), codes_dtype(kind))
        scales = T.alloc_shared((blocks,), T.int32)
        T.annotate_layout({magnitude: by_block})
        for i, a, b in T.Parallel(WARP, 2, 2):
            values[i, a, b] = T.if_then_else(
                b == 0, even_f32(words[i * LANE_PAIRS + a]), odd_f32(words[i * LANE_PAIRS + a])
            )
        butterflies(values, partner)
        pass_on(values, first, neighbours, fourth)
        butterflies(values, partner)
        pass_on(values, second, fourth, sixteenth)
        butterflies(values, partner)
        pass_on(values, third, sixteenth, pairs)
        upper_butterflies(values, partner)
        for i, a, b in T.Parallel(WARP, 2, 2):
            bits[i, a, b] = T.cast(
                T.reinterpret(T.cast(values[i, a, b] * FACTOR, "bfloat16"), "uint16"), "int32"
            )
        for i, a, b in T.Parallel(WARP, 2, 2):
            dim = a * PAIRS + i * 2 + b
            magnitude[dim // dims, dim % dims] = bits[i, a, b] & BF16_MAGNITUDE
        T.reduce_max(magnitude, amax, dim=1)
        for n in T.Parallel(blocks):
            exponent[n] = ue8m0_scale(amax[n], amax_min, 1.0 / largest)
        for i, a, b in T.Parallel(WARP, 2, 2):
            code = quant_code(kind, bits[i, a, b], exponent[(a * PAIRS + i * 2 + b) // dims])
            part[i, a, b] = code << (code_bits * b)
        T.reduce_sum(part, pair, dim=2)  # no bit in common
        for i, a in T.Parallel(WARP, 2):
            codes[a * WARP + i] = T.cast(pair[i, a], codes_dtype(kind))
        for n in T.Parallel(blocks):
            scales[n] = exponent[n]
        for p in T.Parallel(PAIRS, loop_layout=by_vector):
            cache[slot // PAGE_ROWS, slot % PAGE_ROWS * PAIRS + p] = codes[p]
        for s in T.Parallel(parts, loop_layout=by_one_lane):
            cache[slot // PAGE_ROWS, PAGE_ROWS * PAIRS + slot % PAGE_ROWS * parts + s] = T.cast(
                scales[s] if is_fp4 else ue8m0_f32_bits(scales[0], 0) >> (HALF_BITS * s), codes_dtype(kind)
            )

    return write_row
