"""Two neighbouring bf16 values in one 32-bit word: the even one below, the odd one above."""

from typing import Any

from tilelang import language as T

from dsv4_kernels.tile.scale import BF16_MAGNITUDE, F32_NAN, UE8M0_NAN, ue8m0_reciprocal

_HIGH = -0x10000  # bits 16..31 of an int32
_LOW = 0xFFFF
_BITS = 16
_CODE_BITS = 8  # of e4m3


def even_f32(word: Any) -> Any:
    """Return, as float32, the even value of the int32 `word`."""
    return T.reinterpret(word << _BITS, "float32")


def odd_f32(word: Any) -> Any:
    """Return, as float32, the odd value of the int32 `word`."""
    return T.reinterpret(word & _HIGH, "float32")


def round_to_bf16(value: Any) -> Any:
    """Return the float32 `value` rounded to bf16 (nearest, ties to even), as float32."""
    return T.cast(T.cast(value, "bfloat16"), "float32")


def bf16_pair(even: Any, odd: Any) -> Any:
    """Return the int32 word of two float32 values, each rounded to bf16."""
    low = T.cast(T.reinterpret(T.cast(even, "bfloat16"), "uint16"), "int32")
    return (T.cast(T.reinterpret(T.cast(odd, "bfloat16"), "uint16"), "int32") << _BITS) | low


def square_sum(word: Any) -> Any:
    """Return even**2 + odd**2 in float64: squares of bf16 are exact in float32."""
    even, odd = even_f32(word), odd_f32(word)
    return T.cast(even * even, "float64") + T.cast(odd * odd, "float64")


def rms_factor(square_total: Any, count: int, eps: float) -> Any:
    """Return 1 / sqrt(mean + eps) in float32, of a float64 sum of `count` (a power of two) squares."""
    return T.ieee_frsqrt(T.cast(square_total, "float32") * (1.0 / count) + eps)


def rotated_pair(even: Any, odd: Any, cos: Any, sin: Any) -> Any:
    """Return the word of (even + i * odd) * (cos + i * sin): float32, each step rounded, then bf16."""
    real = T.ieee_sub(T.ieee_mul(even, cos), T.ieee_mul(odd, sin))
    imaginary = T.ieee_add(T.ieee_mul(even, sin), T.ieee_mul(odd, cos))
    return bf16_pair(real, imaginary)


def larger_magnitude(word: Any) -> Any:
    """Return the larger of both magnitudes as bf16 bits (int32), of which a nan's are the largest."""
    return T.max(word & BF16_MAGNITUDE, (word >> _BITS) & BF16_MAGNITUDE)


def e4m3_pair(word: Any, scale: Any, largest: float) -> Any:
    """Return the uint16 of two e4m3 codes: both values over the UE8M0 byte `scale`; nan if that is nan."""
    low, high = (e4m3_code(value, scale, largest) for value in (even_f32(word), odd_f32(word)))
    return T.cast((high << _CODE_BITS) | low, "uint16")


def e4m3_code(value: Any, scale: Any, largest: float) -> Any:
    """Return the e4m3 code (int32) of a float32 over the UE8M0 byte `scale`; nan if that is nan."""
    scaled = T.clamp(value * ue8m0_reciprocal(scale), -largest, largest)
    finite = T.if_then_else(scale == UE8M0_NAN, T.reinterpret(F32_NAN, "float32"), scaled)
    return T.cast(T.reinterpret(T.cast(finite, "float8_e4m3fn"), "uint8"), "int32")


def pair_half(word: Any, half: Any) -> Any:
    """Return the even (half 0) or odd (1) value's bits as uint16."""
    return T.cast((word >> (half * _BITS)) & _LOW, "uint16")
