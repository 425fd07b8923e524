"""UE8M0 scales (powers of two held as their biased exponent) and E2M1 codes, as integer expressions.

Both work on the bits of the values: no rounding mode, denormal flush or fast-math flag can change them.
"""

from typing import Any

from tilelang import language as T

BF16_MAGNITUDE = 0x7FFF  # all bits but the sign
BF16_INF = 0x7F80  # a magnitude of at least this is inf or nan
BF16_TO_F32_SHIFT = 16
F32_MANTISSA_BITS = 23
F32_MANTISSA = (1 << F32_MANTISSA_BITS) - 1
F32_EXPONENT = 0x7F800000
F32_NAN = 0x7FC00000
F32_TWO_TO_MINUS_127 = 0x00400000
UE8M0_NAN = 255
# 2**-(e - 127) has biased exponent 254 - e, a normal float for every e in 1..253.
RECIPROCAL_BIAS = 254


def bf16_bits_to_f32(bits: Any) -> Any:
    """Return the float32 whose bf16 bits are `bits` (int32, upper half zero)."""
    return T.reinterpret(bits << BF16_TO_F32_SHIFT, "float32")


def ue8m0_scale(amax_bits: Any, amax_min: float, reciprocal_max: float) -> Any:
    """Return the UE8M0 byte (int32) of 2**ceil(log2(max(amax, amax_min) * reciprocal_max)).

    `amax_bits` are the bf16 bits of the block's largest magnitude, taken as an integer so that a nan
    is the largest of all; a block with an inf or nan gets UE8M0_NAN.
    """
    scale = T.max(bf16_bits_to_f32(amax_bits), amax_min) * reciprocal_max
    bits = T.reinterpret(scale, "int32")
    exponent = (bits >> F32_MANTISSA_BITS) + T.cast((bits & F32_MANTISSA) != 0, "int32")
    return T.if_then_else(amax_bits >= BF16_INF, UE8M0_NAN, exponent)


def ue8m0_reciprocal(scale: Any) -> Any:
    """Return the float32 one over the UE8M0 byte `scale` (int32 in 1..253): exact."""
    return T.reinterpret((RECIPROCAL_BIAS - scale) << F32_MANTISSA_BITS, "float32")


def e2m1_code(magnitude: Any) -> Any:
    """Return the 3-bit E2M1 code (int32) of a float32 magnitude in [0, 6], to nearest, ties to even.

    E2M1 has one mantissa bit, so its step at t is 2**(floor(log2 t) - 1), and 0.5 below 1. Adding
    `anchor` = 2**22 steps of that size leaves round(t / step) in the low bits of the sum, rounded
    by the float adder itself; codes of each binade start 2 above the binade before.
    """
    anchor_bits = (T.reinterpret(T.max(magnitude, 1.0), "int32") & F32_EXPONENT) + (22 << F32_MANTISSA_BITS)
    steps = T.reinterpret(magnitude + T.reinterpret(anchor_bits, "float32"), "int32") - anchor_bits
    binade = (anchor_bits >> F32_MANTISSA_BITS) - (127 + 22)
    return steps + 2 * binade


def ue8m0_f32_bits(word: Any, index: Any) -> Any:
    """Return, as int32, the bits of `ue8m0_to_f32`.

    Branch-free: byte 0 is the denormal 2**-127, which is also the least value the maximum lets
    through; byte 255 has its quiet bit set and is nan.
    """
    byte = (word >> (8 * index)) & 0xFF
    quiet = ((byte + 1) >> 8) << (F32_MANTISSA_BITS - 1)
    return T.max((byte << F32_MANTISSA_BITS) | quiet, F32_TWO_TO_MINUS_127)


def ue8m0_to_f32(word: Any, index: Any) -> Any:
    """Return the float32 of UE8M0 byte `index` (0..3, lowest first) of the int32 `word`, for any byte."""
    return T.reinterpret(ue8m0_f32_bits(word, index), "float32")
