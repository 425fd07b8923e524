"""The indexer's queries and keys: RoPE, Hadamard transform of 128 dims, FP4 or FP8 (report 2.3.1, 5.2.1).

Four lanes hold a row, 32 dims each. First a lane has 16 neighbouring dims of each half of the row, so all
rotate as many and butterflies of strides 1 to 8 stay in a lane; one pass through shared memory exchanges
blocks of four for strides 16 to 64. Each butterfly is rounded to fp32, in ascending strides, so that results
are compared bit for bit. What binds is the number of instructions: how scales and codes come with few is in
`hadamard_codes`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import reference
from dsv4_kernels.attention.hadamard_codes import (
    E2M1_SLOPE,
    E2M1_SUM,
    HALF_BITS,
    f32_magnitude,
    nibbles,
    pair_carry,
    scale_byte,
    scaling,
)
from dsv4_kernels.contract import Contract, ContractError, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.pairs import e4m3_code, even_f32, odd_f32
from dsv4_kernels.tile.scale import (
    BF16_MAGNITUDE,
    F32_NAN,
    UE8M0_NAN,
    bf16_bits_to_f32,
    e2m1_code,
    ue8m0_reciprocal,
)

DIM = 128
ROPE_DIM = 64
ROPE_PAIRS = ROPE_DIM // 2
PAIRS = DIM // 2
LANES = 4  # that hold a row
HALF_PAIRS = PAIRS // LANES // 2  # of a lane in each half of a row, before the exchange
LANE_DIMS = DIM // LANES
SKEWED = 16 + 4  # words of 16 dims in shared memory: with the words of a row, eight lanes' 16 bytes, of two
ROW_WORDS = DIM // 16 * SKEWED + 16  # rows, meet no bank twice, before the exchange and after it
FACTOR = DIM**-0.5
FP4_BLOCK = 32  # dims a scale
FP4_BLOCKS = DIM // FP4_BLOCK
E2M1_MAX = 6.0
E2M1_AMAX_MIN = 6 * 2.0**-126
E4M3_MAX = 448.0
E4M3_AMAX_MIN = 1e-4
SIGN_TO_NIBBLE = 12  # bf16's sign bit 15 to the nibble's bit 3
SIGN_OF_NIBBLE = 8
FOUR = 4  # codes of FP4 in an element
LOW_HALF = 0xFFFF
FP4, FP8 = "fp4", "fp8"
ROWS = 16  # a block


@dataclass(frozen=True)
class Config:
    """Rows a block, and its width: four lanes a row."""

    rows: int = ROWS
    threads: int = 64


CONTRACT = Contract(
    ("0 <= m", "m <= MAX_TOKENS", "0 < num_positions", "num_positions <= MAX_POSITIONS"),
    consts={"MAX_TOKENS": 2**31 - 256, "MAX_POSITIONS": 1 << 20},
)


def bf16_bits(value: Any) -> Any:
    """Return the bits of a bf16 value as int32."""
    return T.cast(T.reinterpret(value, "uint16"), "int32")


def _flipped(bit: Any, is_flipped: bool) -> Any:
    return 1 - bit if is_flipped else bit


def limits(kind: str) -> tuple[float, float]:
    """Return the least maximum of a block that counts, and the largest value of a code."""
    return (E2M1_AMAX_MIN, E2M1_MAX) if kind == FP4 else (E4M3_AMAX_MIN, E4M3_MAX)


def quant_code(kind: str, bits: Any, scale: Any) -> Any:
    """Return the code (int32) of the bf16 value whose bits are `bits`, over the UE8M0 byte `scale`."""
    if kind == FP8:
        return e4m3_code(bf16_bits_to_f32(bits), scale, E4M3_MAX)
    scaled = bf16_bits_to_f32(bits & BF16_MAGNITUDE) * ue8m0_reciprocal(scale)
    code = e2m1_code(T.min(scaled, E2M1_MAX)) | ((bits >> SIGN_TO_NIBBLE) & SIGN_OF_NIBBLE)
    # E2M1 has no nan: a block that is not finite is nan by its scale, its codes are zero.
    return T.if_then_else(scale == UE8M0_NAN, 0, code)


def make_kernel(num_heads: int, kind: str, config: Config) -> Any:
    """Return the PrimFunc for `num_heads` heads a token: a divisor or a multiple of a block's rows.

    An element of FP4 codes is four of them.
    """
    m, num_positions = T.dynamic("m"), T.dynamic("num_positions")
    heads = min(num_heads, config.rows)
    tokens = config.rows // heads
    is_fp4 = kind == FP4
    blocks = FP4_BLOCKS if is_fp4 else 1
    codes_dims, codes_dtype = (DIM // FOUR, "uint16") if is_fp4 else (DIM, "float8_e4m3fn")

    def lane(t: Any, h: Any, i: Any) -> Any:
        return (t * heads + h) * LANES + i

    # A lane's dims are counted by five bits: of the dim 6, 3, 2, 1, 0, and 5 and 4 are the lane; after the
    # exchange 6, 5, 4, 1, 0, and 3 and 2 are the lane.
    lanes = (tokens, heads, LANES)
    five, four = (*lanes, 2, 2, 2, 2, 2), (*lanes, 2, 2, 2, 2)
    by_five = T.Fragment(
        five, lambda t, h, i, a, b, c, d, e: (lane(t, h, i), a * 16 + b * 8 + c * 4 + d * 2 + e)
    )
    by_four = T.Fragment(four, lambda t, h, i, b, c, d, e: (lane(t, h, i), b * 8 + c * 4 + d * 2 + e))
    by_two = T.Fragment((*lanes, 2, 2), lambda t, h, i, a, b: (lane(t, h, i), a * 2 + b))
    by_word = T.Fragment((*lanes, 2, HALF_PAIRS), lambda t, h, i, a, p: (lane(t, h, i), a * HALF_PAIRS + p))
    by_pair = T.Fragment((*lanes, HALF_PAIRS), lambda t, h, i, p: (lane(t, h, i), p))
    in_lane = LANE_DIMS // blocks
    by_block = T.Fragment(
        (tokens, heads, blocks, DIM // blocks),
        lambda t, h, n, x: (lane(t, h, x // in_lane), n * in_lane + x % in_lane),
    )

    @T.macro
    def swap(values, partner, bit):
        for t, h, i, a, b, c, d, e in T.Parallel(*five):
            partner[t, h, i, a, b, c, d, e] = values[
                t,
                h,
                i,
                _flipped(a, bit == 4),
                _flipped(b, bit == 3),
                _flipped(c, bit == 2),
                _flipped(d, bit == 1),
                _flipped(e, bit == 0),
            ]

    @T.macro
    def butterfly(values, partner, bit):
        swap(values, partner, bit)
        for t, h, i, a, b, c, d, e in T.Parallel(*five):
            own, other = values[t, h, i, a, b, c, d, e], partner[t, h, i, a, b, c, d, e]
            values[t, h, i, a, b, c, d, e] = T.if_then_else(
                (e, d, c, b, a)[bit] == 0, own + other, other - own
            )

    @T.macro
    def exchange(values, rows):
        for t, h, i, a, b, c, d, e in T.Parallel(*five):
            rows[t, h, (a * 4 + i) * SKEWED + b * 8 + c * 4 + d * 2 + e] = values[t, h, i, a, b, c, d, e]
        for t, h, i, a, b, c, d, e in T.Parallel(*five):
            values[t, h, i, a, b, c, d, e] = rows[t, h, (a * 4 + b * 2 + c) * SKEWED + i * 4 + d * 2 + e]

    @T.macro
    def rotate_pairs(words, position, cos_sin, values):
        """Rotate the upper half of a row, with two values at a time rounded to bf16."""
        cos = T.alloc_fragment((*lanes, HALF_PAIRS), T.float32)
        sin = T.alloc_fragment((*lanes, HALF_PAIRS), T.float32)
        exact = T.alloc_fragment(four, T.float32)
        turned = T.alloc_fragment(four, T.bfloat16)
        T.annotate_layout({cos: by_pair, sin: by_pair, exact: by_four, turned: by_four})
        for t, h, i, p in T.Parallel(*lanes, HALF_PAIRS):
            cos[t, h, i, p] = cos_sin[position[t], 0, i * HALF_PAIRS + p]
        for t, h, i, p in T.Parallel(*lanes, HALF_PAIRS):
            sin[t, h, i, p] = cos_sin[position[t], 1, i * HALF_PAIRS + p]
        for t, h, i, b, c, d, e in T.Parallel(*four):
            pair = b * 4 + c * 2 + d
            even, odd = even_f32(words[t, h, i, 1, pair]), odd_f32(words[t, h, i, 1, pair])
            exact[t, h, i, b, c, d, e] = T.if_then_else(
                e == 0,
                T.ieee_sub(T.ieee_mul(even, cos[t, h, i, pair]), T.ieee_mul(odd, sin[t, h, i, pair])),
                T.ieee_add(T.ieee_mul(even, sin[t, h, i, pair]), T.ieee_mul(odd, cos[t, h, i, pair])),
            )
        for t, h, i, b, c, d, e in T.Parallel(*four):
            turned[t, h, i, b, c, d, e] = T.cast(exact[t, h, i, b, c, d, e], "bfloat16")
        for t, h, i, b, c, d, e in T.Parallel(*four):
            exact[t, h, i, b, c, d, e] = T.cast(turned[t, h, i, b, c, d, e], "float32")
        for t, h, i, a, b, c, d, e in T.Parallel(*five):
            word = words[t, h, i, 0, b * 4 + c * 2 + d]
            values[t, h, i, a, b, c, d, e] = T.if_then_else(
                a == 0,
                T.if_then_else(e == 0, even_f32(word), odd_f32(word)),
                exact[t, h, i, b, c, d, e],
            )

    @T.macro
    def cast_fp8(values, exponent, codes, bt, bh):
        """Cast transformed rows by one factor: FACTOR over the scale, nan where the row is not finite.

        The scale, a power of two, commutes with the rounding to bf16: what it makes a denormal has the
        code 0. No code needs a bound: of a finite row no value is beyond 448 times its scale.
        """
        halves = T.alloc_fragment(five, T.bfloat16)
        wide = T.alloc_fragment(five, T.float8_e4m3fn)
        factor = T.alloc_fragment((tokens, heads), T.float32)
        T.annotate_layout({halves: by_five, wide: by_five})
        for t, h in T.Parallel(tokens, heads):
            factor[t, h] = T.if_then_else(
                exponent[t, h, 0] == UE8M0_NAN,
                T.reinterpret(F32_NAN, "float32"),
                ue8m0_reciprocal(exponent[t, h, 0]) * FACTOR,
            )
        for t, h, i, a, b, c, d, e in T.Parallel(*five):
            values[t, h, i, a, b, c, d, e] = values[t, h, i, a, b, c, d, e] * factor[t, h]
        for t, h, i, a, b, c, d, e in T.Parallel(*five):
            halves[t, h, i, a, b, c, d, e] = T.cast(values[t, h, i, a, b, c, d, e], "bfloat16")
        for t, h, i, a, b, c, d, e in T.Parallel(*five):
            wide[t, h, i, a, b, c, d, e] = T.cast(
                T.cast(halves[t, h, i, a, b, c, d, e], "float32"), "float8_e4m3fn"
            )
        for t, h, i, a, b, c, d, e in T.Parallel(*five):
            dim = (a * 4 + b * 2 + c) * 16 + i * 4 + d * 2 + e
            codes[bt * tokens + t, bh * heads + h, dim] = wide[t, h, i, a, b, c, d, e]

    @T.macro
    def joined(halves, words):
        for t, h, i, a, b, d, e in T.Parallel(*four):
            words[t, h, i, a, b, d, e] = bf16_bits(halves[t, h, i, a, b, d, e, 0])
        for t, h, i, a, b, d, e in T.Parallel(*four):
            high = bf16_bits(halves[t, h, i, a, b, d, e, 1]) << HALF_BITS
            words[t, h, i, a, b, d, e] = high | words[t, h, i, a, b, d, e]

    @T.macro
    def cast_fp4(values, exponent, codes, bt, bh):
        """Cast transformed rows: dims that are 16 apart in one word, four words of them to eight codes.

        E2M1 has no nan: a block that is not finite is nan by its scale, its codes are zero.
        """
        halves = T.alloc_fragment(five, T.bfloat16)  # bits 6, 5, 1, 0, 4, as all of these
        scaled = T.alloc_fragment(five, T.float32)
        rounded = T.alloc_fragment(five, T.bfloat16)
        sign = T.alloc_fragment(four, T.int32)
        code = T.alloc_fragment(four, T.int32)
        eight = T.alloc_fragment((*lanes, 2, 2), T.int32)
        factor = T.alloc_fragment((tokens, heads, blocks), T.float32)
        kept = T.alloc_fragment((tokens, heads, blocks), T.int32)
        T.annotate_layout({halves: by_five, scaled: by_five, rounded: by_five})
        T.annotate_layout({sign: by_four, code: by_four, eight: by_two})
        for t, h, n in T.Parallel(tokens, heads, blocks):
            kept[t, h, n] = T.if_then_else(exponent[t, h, n] == UE8M0_NAN, 0, -1)
        for t, h, n in T.Parallel(tokens, heads, blocks):
            factor[t, h, n] = scaling(exponent[t, h, n])
        for t, h, i, a, b, d, e, c in T.Parallel(*five):
            scaled[t, h, i, a, b, d, e, c] = values[t, h, i, a, b, c, d, e] * FACTOR
        for t, h, i, a, b, d, e, c in T.Parallel(*five):
            halves[t, h, i, a, b, d, e, c] = T.cast(scaled[t, h, i, a, b, d, e, c], "bfloat16")
        joined(halves, sign)
        for t, h, i, a, b, d, e, c in T.Parallel(*five):
            word = sign[t, h, i, a, b, d, e]
            value = T.if_then_else(c == 0, even_f32(word), odd_f32(word))
            scaled[t, h, i, a, b, d, e, c] = T.abs(value) * factor[t, h, a * 2 + b]
        for t, h, i, a, b, d, e, c in T.Parallel(*five):
            small = T.ieee_fmaf(scaled[t, h, i, a, b, d, e, c], T.float32(E2M1_SLOPE), T.float32(E2M1_SUM))
            scaled[t, h, i, a, b, d, e, c] = T.max(scaled[t, h, i, a, b, d, e, c], small)
        for t, h, i, a, b, d, e, c in T.Parallel(*five):
            rounded[t, h, i, a, b, d, e, c] = T.cast(scaled[t, h, i, a, b, d, e, c], "bfloat16")
        joined(rounded, code)
        for t, h, i, a, b, d, e in T.Parallel(*four):
            code[t, h, i, a, b, d, e] = code[t, h, i, a, b, d, e] + pair_carry()
        for t, h, i, a, b in T.Parallel(*lanes, 2, 2):
            eight[t, h, i, a, b] = nibbles(code[t, h, i, a, b, 0, 0], sign[t, h, i, a, b, 0, 0], 0)
        for t, h, i, a, b in T.Parallel(*lanes, 2, 2):
            eight[t, h, i, a, b] = eight[t, h, i, a, b] | nibbles(
                code[t, h, i, a, b, 0, 1], sign[t, h, i, a, b, 0, 1], 1
            )
        for t, h, i, a, b in T.Parallel(*lanes, 2, 2):
            eight[t, h, i, a, b] = eight[t, h, i, a, b] | nibbles(
                code[t, h, i, a, b, 1, 0], sign[t, h, i, a, b, 1, 0], 2
            )
        for t, h, i, a, b in T.Parallel(*lanes, 2, 2):
            eight[t, h, i, a, b] = eight[t, h, i, a, b] | nibbles(
                code[t, h, i, a, b, 1, 1], sign[t, h, i, a, b, 1, 1], 3
            )
        for t, h, i, a, b in T.Parallel(*lanes, 2, 2):
            eight[t, h, i, a, b] = eight[t, h, i, a, b] & kept[t, h, a * 2 + b]
        for t, h, i, a, b, c in T.Parallel(*lanes, 2, 2, 2):
            codes[bt * tokens + t, bh * heads + h, (a * 4 + b * 2 + c) * LANES + i] = T.cast(
                (eight[t, h, i, a, b] >> (HALF_BITS * c)) & LOW_HALF, "uint16"
            )

    @T.prim_func
    def hadamard_quant_kernel(
        x: T.Tensor[(m, num_heads, PAIRS), T.int32],
        positions: T.Tensor[(m,), T.int32],
        cos_sin: T.Tensor[(num_positions, 2, ROPE_PAIRS), T.float32],
        codes: T.Tensor[(m, num_heads, codes_dims), codes_dtype],
        scale: T.Tensor[(m, num_heads, blocks), T.uint8],
    ):
        with T.Kernel(T.ceildiv(m, tokens), num_heads // heads, threads=config.threads) as (bt, bh):
            position = T.alloc_fragment((tokens,), T.int32)
            words = T.alloc_fragment((*lanes, 2, HALF_PAIRS), T.int32)
            values = T.alloc_fragment(five, T.float32)
            partner = T.alloc_fragment(five, T.float32)
            rows = T.alloc_shared((tokens, heads, ROW_WORDS), T.float32)
            magnitude = T.alloc_fragment((tokens, heads, blocks, DIM // blocks), T.int32)
            amax = T.alloc_fragment((tokens, heads, blocks), T.int32)
            exponent = T.alloc_fragment((tokens, heads, blocks), T.int32)
            T.annotate_layout({words: by_word, values: by_five, partner: by_five, magnitude: by_block})
            for t, h, i, a, p in T.Parallel(*lanes, 2, HALF_PAIRS):
                words[t, h, i, a, p] = x[bt * tokens + t, bh * heads + h, (a * LANES + i) * HALF_PAIRS + p]
            for t in T.Parallel(tokens):
                position[t] = positions[bt * tokens + t]
            rotate_pairs(words, position, cos_sin, values)
            butterfly(values, partner, 0)
            butterfly(values, partner, 1)
            butterfly(values, partner, 2)
            butterfly(values, partner, 3)
            exchange(values, rows)
            butterfly(values, partner, 2)
            butterfly(values, partner, 3)
            butterfly(values, partner, 4)
            for t, h, i, a, b, c, d, e in T.Parallel(*five):
                block = a * 2 + b if is_fp4 else 0
                place = i * in_lane + (0 if is_fp4 else a * 16 + b * 8) + c * 4 + d * 2 + e
                magnitude[t, h, block, place] = f32_magnitude(values[t, h, i, a, b, c, d, e])
            T.reduce_max(magnitude, amax, dim=3)
            for t, h, n in T.Parallel(tokens, heads, blocks):
                exponent[t, h, n] = scale_byte(kind, amax[t, h, n])
            for t, h, n in T.Parallel(tokens, heads, blocks):
                scale[bt * tokens + t, bh * heads + h, n] = T.cast(exponent[t, h, n], "uint8")
            if is_fp4:
                cast_fp4(values, exponent, codes, bt, bh)
            else:
                cast_fp8(values, exponent, codes, bt, bh)

    return hadamard_quant_kernel


def _empty_fp4(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    packed = x.new_empty((*x.shape[:2], PAIRS), dtype=torch.uint8)
    return packed, x.new_empty((*x.shape[:2], FP4_BLOCKS), dtype=torch.float8_e8m0fnu)


@operator("hadamard_fp4", _empty_fp4)
def hadamard_fp4(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the last 64 dims of indexer rows, transform them, and cast them to FP4 in blocks of 32.

    RoPE is in fp32, rounded to bf16. The Sylvester-Hadamard matrix of 128 is applied as butterflies of
    strides 1, 2, ..., 64, each sum rounded to fp32; the result is multiplied by fp32(128**-0.5) and rounded
    to bf16. Each 32 dims are divided by 2**ceil(log2(max(amax, 6 * 2**-126) / 6)) and rounded to nearest,
    ties to even. A block that is not finite has a nan scale (byte 255) and zero codes.

    Args:
        x: [m, num_heads, 128] bf16; num_heads divides 16 or is a multiple of it; m = 0 is allowed.
        positions: [m] int32. A position outside the table makes the rotated dims zero.
        cos_sin: [num_positions, 64] fp32: 32 cosines, then 32 sines.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        packed: [m, num_heads, 64] uint8, two e2m1 a byte, the even dim in the low nibble.
        scale: [m, num_heads, 4] e8m0.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    if _check("hadamard_fp4", x, positions, cos_sin):
        return reference.hadamard_fp4(x, positions, cos_sin)
    packed, scale = _empty_fp4(x, positions, cos_sin)
    _run(FP4, x, positions, cos_sin, packed, scale)
    return packed, scale


def _empty_fp8(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    values = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return values, x.new_empty((*x.shape[:2], 1), dtype=torch.float8_e8m0fnu)


@operator("hadamard_fp8", _empty_fp8)
def hadamard_fp8(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate and transform indexer rows as `hadamard_fp4` does, and cast them to FP8, one scale a row.

    The scale is 2**ceil(log2(max(amax, 1e-4) / 448)); a row that is not finite has a nan scale and nan
    values.

    Args:
        x: [m, num_heads, 128] bf16; num_heads divides 16 or is a multiple of it; m = 0 is allowed.
        positions: [m] int32. A position outside the table makes the rotated dims zero.
        cos_sin: [num_positions, 64] fp32: 32 cosines, then 32 sines.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        values: [m, num_heads, 128] e4m3.
        scale: [m, num_heads, 1] e8m0.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    if _check("hadamard_fp8", x, positions, cos_sin):
        return reference.hadamard_fp8(x, positions, cos_sin)
    values, scale = _empty_fp8(x, positions, cos_sin)
    _run(FP8, x, positions, cos_sin, values, scale)
    return values, scale


def _check(name: str, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> bool:
    """Raise ContractError where the arguments break the contract; return whether the reference runs."""
    require_tensor(name, "x", x, dtype=torch.bfloat16, ndim=3)
    require_tensor(name, "positions", positions, dtype=torch.int32, ndim=1, device=x.device)
    require_tensor(name, "cos_sin", cos_sin, dtype=torch.float32, ndim=2, device=x.device)
    (m, num_heads, _), num_positions = x.shape, cos_sin.shape[0]
    CONTRACT.check(name, m=m, num_positions=num_positions)
    if num_heads == 0 or (ROWS % num_heads and num_heads % ROWS):
        clause = f"num_heads to divide {ROWS} or to be a multiple of it"
        raise ContractError(f"{name}: requires {clause}, got num_heads={num_heads}")
    require_shape(name, "x", x, (m, num_heads, DIM))
    require_shape(name, "positions", positions, (m,))
    require_shape(name, "cos_sin", cos_sin, (num_positions, ROPE_DIM))
    return runtime.uses_reference(x)


def _run(
    kind: str,
    x: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    if x.shape[0]:
        table = cos_sin.view(-1, 2, ROPE_PAIRS)
        elements = codes.view(torch.uint16) if kind == FP4 else codes
        args = (x.view(torch.int32), positions, table, elements, scale.view(torch.uint8))
        runtime.launch(make_kernel, _variant(x.shape[1], kind).kwargs, args)


@cache
def _variant(num_heads: int, kind: str) -> Variant:
    return Variant(f"h{num_heads}", {"num_heads": num_heads, "kind": kind, "config": Config()})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    m, num_positions = dims["m"], dims["num_positions"]
    x = torch.randn((m, dims["num_heads"], DIM), generator=generator, device=device) * 3
    positions = torch.randint(0, num_positions, (m,), generator=generator, device=device, dtype=torch.int32)
    return x.to(torch.bfloat16), positions, reference.rope_table(num_positions, 160000.0, True, device)


def _case(case_id: str, m: int, num_heads: int, num_positions: int, *tags: str) -> Case:
    return Case(case_id, {"m": m, "num_heads": num_heads, "num_positions": num_positions}, tags or ("test",))


def _spec(kind: str, fn: Callable[..., Any], fn_reference: Callable[..., Any], row_bytes: int) -> KernelSpec:
    return KernelSpec(
        name=f"hadamard_{kind}",
        fn=fn,
        reference=fn_reference,
        make_inputs=_make_inputs,
        make_kernel=make_kernel,
        variants=tuple(_variant(h, kind) for h in (1, 64)),
        select=lambda dims: _variant(dims["num_heads"], kind),
        contract=CONTRACT,
        cases=(
            _case("empty", 0, 64, 5),
            _case("one-row", 1, 1, 1),
            _case("keys-ragged", 19, 1, 300),
            _case("queries", 3, 64, 7),
            _case("keys-64", 64, 1, 8192, "gpu", "bench"),
            _case("keys-4096", 4096, 1, 8192, "gpu", "bench"),
            _case("queries-64", 64, 64, 8192, "gpu", "bench"),
            _case("queries-4096", 4096, 64, 8192, "gpu", "bench"),
        ),
        num_bytes=lambda d: d["m"] * (d["num_heads"] * (DIM * 2 + row_bytes) + 4 + ROPE_DIM * 4),
        source="DeepSeek-V4 report 2.3.1 and 5.2.1; reference model's indexer",
        small={"m": 2, "num_positions": 2, "num_heads": 1},
    )


SPECS = (
    _spec(FP4, hadamard_fp4, reference.hadamard_fp4, PAIRS + FP4_BLOCKS),
    _spec(FP8, hadamard_fp8, reference.hadamard_fp8, DIM + 1),
)
