"""Scales and codes of transformed rows in few instructions, for `hadamard_quant`.

All of it is exact, and checked for every input (`tests/kernels/test_hadamard.py`).

**Scale.** `scale_byte` takes the largest magnitude of float32 values before they are multiplied by
fp32(128**-0.5) and rounded to bf16. Both steps are monotonic and, above denormals, the same in each binade,
so there is one mantissa from which on the rounded product needs the next power of two: adding what it lacks
to a whole binade carries into the exponent.

**E2M1.** Codes step by 1/2, 1 and 2 in the binades of 1, 2 and 4: they count up with the upper bits of a
float. A magnitude y is multiplied by E2M1_FACTOR, rounded to bf16 and a carry added to its bits; then three
bits are the code. The factor is 1/4, which puts these bits above zeros, times a little over 64/63: a tie goes
to the even code, so that magnitudes that round up from an odd one start 63 steps of bf16 above those that
round up from the even one before, and this makes it 64. Below 1 codes step by 1/2 all the way down: there
SLOPE * y + SUM is the larger one, in whose binade they count up like the others. y is a bf16 value over a
power of two, up to 6.
"""

from typing import Any

from tilelang import language as T

from dsv4_kernels.tile.scale import F32_EXPONENT, F32_MANTISSA_BITS, UE8M0_NAN, ue8m0_reciprocal

# Carry, what is taken off the exponent, least byte: of blocks whose largest code is 6 and of 448.
_STEPS = {"fp4": (0x77E1C6, 6, 1), "fp8": (0x614128, 12, 105)}
E2M1_FACTOR = 1.018 / 4
E2M1_SLOPE = 0.49405
E2M1_SUM = 0.128111
E2M1_CARRY = 28
HALF_BITS = 16  # of a word of two bf16
_CODE_SHIFT = 6  # of the code in the bits of bf16
_SIGN_SHIFT = 12  # of the sign, less that in a nibble
_CODES, _SIGNS = 0x00070007, 0x00080008  # of both halves of a word
_NIBBLE_BITS = 4
_F32_MAGNITUDE = 0x7FFFFFFF
_SCALE_MAX = 253  # of a finite block: bf16's largest value over 6 is below 2**126


def scale_byte(kind: str, amax: Any) -> Any:
    """Return the UE8M0 byte (int32) of a block, nan if it is not finite.

    Args:
        kind: "fp4" or "fp8".
        amax: bits of the largest float32 magnitude before the factor, an int32: those of a nan are larger
            than all others.
    """
    carry, bias, least = _STEPS[kind]
    exponent = ((T.min(amax, F32_EXPONENT) + carry) >> F32_MANTISSA_BITS) - bias
    return T.if_then_else(amax >= F32_EXPONENT, UE8M0_NAN, T.max(exponent, least))


def f32_magnitude(value: Any) -> Any:
    """Return the bits of the magnitude of a float32 as an int32."""
    return T.reinterpret(value, "int32") & _F32_MAGNITUDE


def scaling(scale: Any) -> Any:
    """Return the float32 that a bf16 magnitude over the UE8M0 byte `scale` is multiplied by for its code."""
    return ue8m0_reciprocal(T.min(scale, _SCALE_MAX)) * E2M1_FACTOR


def pair_carry() -> int:
    """Return the carry of both halves of a word of two bf16."""
    return E2M1_CARRY << HALF_BITS | E2M1_CARRY


def nibbles(code: Any, sign: Any, place: int) -> Any:
    """Return nibble `place` (0 to 3) of both halves of a word of eight E2M1 codes (int32).

    Args:
        code: two bf16 of scaled magnitudes with `pair_carry` added.
        sign: the two bf16 that have the signs.
        place: which nibble; the others are zero.
    """
    at, mask = place * _NIBBLE_BITS, _as_int32(_SIGNS << place * _NIBBLE_BITS)
    down = _CODE_SHIFT - at
    magnitude = (code >> down if down > 0 else code << -down) & (_CODES << at)
    return magnitude | (sign >> (_SIGN_SHIFT - at) & mask)


def _as_int32(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
