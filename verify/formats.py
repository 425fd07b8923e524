"""What the codes of the narrow number formats stand for, as exact fractions, and conversions between them.

Sources: OCP Microscaling Formats 1.0 (e2m1, e8m0), OCP 8-bit Floating Point 1.0 (e4m3, e5m2).
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cache


@dataclass(frozen=True)
class Format:
    """Sign, exponent and mantissa fields of a code, most significant first.

    Attributes:
        max_code: the largest finite magnitude.
        nan_codes: magnitudes that are nan; those above max_code that are not are infinite.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    max_code: int
    nan_codes: frozenset[int] = frozenset()

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits


E2M1 = Format(2, 1, 1, 0x7)
E4M3 = Format(4, 3, 7, 0x7E, frozenset({0x7F}))
E5M2 = Format(5, 2, 15, 0x7B, frozenset({0x7D, 0x7E, 0x7F}))
E2M1_MAGNITUDES = 8
UE8M0_BIAS = 127
UE8M0_NAN = 255


@cache
def magnitude(form: Format, code: int) -> Fraction | None:
    """Return the magnitude of `code` without its sign; None for nan and infinity."""
    code &= (1 << (form.bits - 1)) - 1
    if code > form.max_code:
        return None
    exponent, mantissa = code >> form.mantissa_bits, code & ((1 << form.mantissa_bits) - 1)
    whole = mantissa + (1 << form.mantissa_bits if exponent else 0)
    return Fraction(whole) * Fraction(2) ** (max(exponent, 1) - form.bias - form.mantissa_bits)


@cache
def _by_magnitude(form: Format) -> dict[Fraction, int]:
    codes = range(form.max_code + 1)
    return {value: code for code in codes if (value := magnitude(form, code)) is not None}


def exact_code(form: Format, value: Fraction) -> int | None:
    """Return the code, without sign, whose magnitude is exactly `value`; None where there is none."""
    return _by_magnitude(form).get(value)


def ue8m0(code: int) -> Fraction | None:
    """Return the value of a UE8M0 byte; None for nan."""
    return None if code == UE8M0_NAN else Fraction(2) ** (code - UE8M0_BIAS)


# --------------------------------------------------------------------------- FP4 -> FP8
def is_lossless(offset: int) -> bool:
    """Return whether every e2m1 value times 2**offset is exactly an e4m3 value."""
    scaled = (magnitude(E2M1, code) for code in range(E2M1_MAGNITUDES))
    return all(exact_code(E4M3, m * Fraction(2) ** offset) is not None for m in scaled if m is not None)


@cache
def lossless_offsets() -> range:
    """Return the exponents j for which every e2m1 value times 2**j is an e4m3 value: -8 to 6.

    Enumerated over all codes. Above, 6 * 2**j passes 448; below, 0.5 * 2**j is finer than the
    subnormal step 2**-9. A power-of-two block scale within 2**-8 .. 2**6 of the scale that remains
    can therefore be folded into the e4m3 codes without an error, and no other.
    """
    width = 1 << E4M3.exponent_bits
    offsets = [j for j in range(-2 * width, 2 * width) if is_lossless(j)]
    if offsets != list(range(offsets[0], offsets[-1] + 1)):
        raise AssertionError("the offsets that are exact form an interval")
    return range(offsets[0], offsets[-1] + 1)


@cache
def e4m3_table(offset: int = 0) -> tuple[int, int]:
    """Return the e4m3 bytes of the e2m1 magnitudes times 2**offset: codes 0 to 3, then 4 to 7, as words.

    Raises:
        ValueError: not every one of them is an e4m3 value.
    """
    codes = []
    for code in range(E2M1_MAGNITUDES):
        value = magnitude(E2M1, code)
        found = None if value is None else exact_code(E4M3, value * Fraction(2) ** offset)
        if found is None:
            raise ValueError(f"e4m3_table: requires an offset in {lossless_offsets()}, got {offset}")
        codes.append(found)
    half = len(codes) // 2
    return tuple(int.from_bytes(bytes(part), "little") for part in (codes[:half], codes[half:]))  # type: ignore[return-value]
