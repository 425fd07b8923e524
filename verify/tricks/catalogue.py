"""The conversions that expressions on bits may be: each exactly, for every input of its domain.

An input is 32 bits: an integer, extended by its sign, or the bits of a float (of two floats 64). An output is
the bits of what the expression gives. Two nans are equal; every other value has one pattern.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import z3

from verify import formats
from verify.bitvectors import Question
from verify.formats import E2M1, E4M3, UE8M0_BIAS, UE8M0_NAN

F32_NAN = 0x7FC00000
F32_INF = 0x7F800000
F32_MANTISSA_BITS = 23
_F32_LEAST = 0x00400000  # 2**-127, a denormal
_F32_ANCHOR = 0x4B400000  # 1.5 * 2**23: floats around it are integers, and their bits count up with them
_BF16_MAGNITUDE = 0x7FFF
_BF16_INF = 0x7F80
_E2M1_ROUND_UP_FROM = (  # float32 from which on the code is at least 1, 2, ...; `>` where a tie goes down
    (Fraction(1, 4), False),
    (Fraction(3, 4), True),
    (Fraction(5, 4), False),
    (Fraction(7, 4), True),
    (Fraction(5, 2), False),
    (Fraction(7, 2), True),
    (Fraction(5), False),
)


@dataclass(frozen=True)
class Meaning:
    """One conversion.

    Attributes:
        source: dtype names that the input may have: `int` for any integer.
        target: dtype names that the output may have, likewise.
        domain: least and greatest input as an unsigned number, ends included.
        on_arrays: int64 inputs -> int64 output bits.
        on_terms: 32-bit term -> term of output bits; None where the domain is exhausted instead.
        note: what the report adds: rounding, nan, denormals.
    """

    name: str
    source: tuple[str, ...]
    target: tuple[str, ...]
    on_arrays: Callable[[np.ndarray], np.ndarray]
    on_terms: Callable[[z3.BitVecRef], z3.BitVecRef] | None
    domain: tuple[int, int] = (0, 0xFFFFFFFF)
    note: str = ""


def _word(value: int) -> z3.BitVecRef:
    return z3.BitVecVal(value, 32)


def _choose(x: z3.BitVecRef, table: list[int]) -> z3.BitVecRef:
    result = _word(table[-1])
    for index, value in reversed(list(enumerate(table[:-1]))):
        result = z3.If(x == index, _word(value), result)
    return result


# --------------------------------------------------------------------------- UE8M0
def _ue8m0_to_f32(shift: int) -> Meaning:
    def arrays(x: np.ndarray) -> np.ndarray:
        byte = x >> shift & 0xFF
        scaled = np.where(byte == 0, _F32_LEAST, byte << F32_MANTISSA_BITS)
        return np.where(byte == UE8M0_NAN, F32_NAN, scaled)

    def terms(x: z3.BitVecRef) -> z3.BitVecRef:
        byte = z3.LShR(x, shift) & 0xFF
        scaled = z3.If(byte == 0, _word(_F32_LEAST), byte << F32_MANTISSA_BITS)
        return z3.If(byte == UE8M0_NAN, _word(F32_NAN), scaled)

    name = f"UE8M0 byte {shift // 8} to float32"
    note = "byte 0 is the denormal 2**-127, byte 255 nan"
    return Meaning(name, ("int",), ("float32",), arrays, terms, note=note)


def _reciprocal() -> Meaning:
    top = 2 * UE8M0_BIAS
    return Meaning(
        "reciprocal of a UE8M0 byte as float32",
        ("int",),
        ("float32",),
        lambda x: (top - x) << F32_MANTISSA_BITS,
        lambda x: (_word(top) - x) << F32_MANTISSA_BITS,
        (1, top - 1),
        "a power of two, exact and normal",
    )


def _f32_to_ue8m0() -> Meaning:
    mantissa = (1 << F32_MANTISSA_BITS) - 1

    def terms(x: z3.BitVecRef) -> z3.BitVecRef:
        up = z3.If(x & mantissa != 0, _word(1), _word(0))
        return z3.LShR(x, F32_MANTISSA_BITS) + up

    return Meaning(
        "float32 to UE8M0, rounded up to a power of two",
        ("float32",),
        ("int",),
        lambda x: (x >> F32_MANTISSA_BITS) + (x & mantissa != 0),
        terms,
        (1 << F32_MANTISSA_BITS, (UE8M0_NAN - 1) << F32_MANTISSA_BITS),
        "positive normal numbers to 2**127",
    )


def _next_above() -> Meaning:
    def arrays(x: np.ndarray) -> np.ndarray:
        value = x.astype(np.uint32).view(np.float32)
        with np.errstate(all="ignore"):  # the last one's is infinite
            return np.nextafter(value, np.float32(np.inf)).view(np.uint32).astype(np.int64)

    return Meaning(
        "the next float32 above",
        ("float32",),
        ("float32",),
        arrays,
        lambda x: x + 1,
        (0, F32_INF - 1),
        "of a finite number that is not negative",
    )


def _with_sign() -> Meaning:
    return Meaning(
        "the magnitude of one float32 with the sign of another",
        ("float32",),
        ("float32",),
        lambda x: (x & 0x7FFFFFFF) | (x >> 32 & 0x80000000),
        lambda x: z3.Concat(z3.Extract(63, 63, x), z3.Extract(30, 0, x)),
        note="of two: the sign's bits stand above the magnitude's",
    )


WITH_SIGN = _with_sign()


@cache
def estimate(constant: int) -> Meaning | None:
    """Return what `constant` less the bits of a float32 is: bits of its reciprocal, to an eighth.

    None where that is not so for every number in the domain, by bit-vectors in both solvers.
    """
    domain = 1 << F32_MANTISSA_BITS, constant - (1 << F32_MANTISSA_BITS)  # both are normal
    if not domain[0] <= domain[1] < F32_INF:
        return None
    number = z3.BitVec("number", 32)
    significand, exponent = zip(*(_fields(v) for v in (number, _word(constant) - number)), strict=True)
    product, total = significand[0] * significand[1], exponent[0] + exponent[1]
    # Two significands of 1 with exponents that add up to 254 are 1: the product is taken times 4.
    one = 1 << (2 * F32_MANTISSA_BITS + 2)
    scaled = product << (total - (2 * UE8M0_BIAS - 2))
    near = z3.And(z3.UGE(scaled, one - one // 8), z3.ULE(scaled, one + one // 8))
    fits = z3.And(z3.UGE(total, 2 * UE8M0_BIAS - 2), z3.ULE(total, 2 * UE8M0_BIAS))
    given = [z3.UGE(number, domain[0]), z3.ULE(number, domain[1])]
    if not Question("an estimate of a reciprocal", given, z3.And(fits, near)).decide().is_valid:
        return None
    return Meaning(
        "an estimate of the reciprocal, off by an eighth of it at most",
        ("float32",),
        ("float32",),
        lambda x: constant - x,
        lambda x: _word(constant) - x,
        domain,
        "both normal; the bound by z3 and cvc5 for every input",
    )


def _fields(bits: z3.BitVecRef) -> tuple[z3.BitVecRef, z3.BitVecRef]:
    """Return significand, with its leading 1, and biased exponent of a normal float32, as 64-bit terms."""
    fraction = z3.Extract(F32_MANTISSA_BITS - 1, 0, bits)
    leading = z3.BitVecVal(1, 64 - F32_MANTISSA_BITS)
    return z3.Concat(leading, fraction), z3.ZeroExt(56, z3.Extract(30, F32_MANTISSA_BITS, bits))


def _power_of_two() -> Meaning:
    top = 2 * UE8M0_BIAS
    return Meaning(
        "2**n as float32 of the float32 n + 1.5 * 2**23",
        ("float32",),
        ("float32",),
        lambda x: (x - _F32_ANCHOR + UE8M0_BIAS) << F32_MANTISSA_BITS,
        lambda x: (x - _F32_ANCHOR + UE8M0_BIAS) << F32_MANTISSA_BITS,
        (_F32_ANCHOR + 1 - UE8M0_BIAS, _F32_ANCHOR + top - UE8M0_BIAS),
        "exact and normal; the float nearest to 1.5 * 2**23 plus a number is that of its nearest integer",
    )


@cache
def scale_codes(least: float, top: int) -> np.ndarray:
    """Return for each bf16 magnitude m the UE8M0 byte of the least power of two s: s * top >= max(m, least).

    255 for inf and nan.
    """
    bits = np.arange(_BF16_MAGNITUDE + 1, dtype=np.uint32)
    # float64 holds every bf16 value and every top * 2**e of this range exactly, so comparisons are exact.
    value = (bits[:_BF16_INF] << 16).view(np.float32).astype(np.float64)
    wanted = np.maximum(value, np.float64(np.float32(least)))
    exponents = np.arange(-2 * UE8M0_NAN, 2 * UE8M0_NAN)
    found = exponents[np.searchsorted(np.ldexp(np.float64(top), exponents), wanted)]
    return np.concatenate([found + UE8M0_BIAS, np.full(len(bits) - _BF16_INF, UE8M0_NAN)])


def scale_of(least: float, reciprocal: float) -> Meaning | None:
    """Return the block scale with these two constants; None where the second is no rounded 1 / integer."""
    top = round(1 / reciprocal) if reciprocal > 0 else 0
    if top < 1 or np.float32(1 / top) != np.float32(reciprocal) or least <= 0:
        return None
    return Meaning(
        f"UE8M0 of the least power of two s with s * {top} >= max(bf16 magnitude, {least:g})",
        ("int",),
        ("int",),
        lambda x: scale_codes(least, top)[np.minimum(x, _BF16_MAGNITUDE)],
        None,
        (0, _BF16_MAGNITUDE),
        "exact although the division is a rounded product; inf and nan give 255",
    )


# --------------------------------------------------------------------------- E2M1
def _f32_bits(value: Fraction) -> int:
    return int(np.float32(float(value)).view(np.uint32))


def _f32_to_e2m1() -> Meaning:
    ends = [_f32_bits(v) + (0 if tie_up else 1) for v, tie_up in _E2M1_ROUND_UP_FROM]

    def terms(x: z3.BitVecRef) -> z3.BitVecRef:
        return sum((z3.If(z3.UGE(x, end), _word(1), _word(0)) for end in ends), _word(0))

    return Meaning(
        "float32 magnitude to E2M1 code",
        ("float32",),
        ("int",),
        lambda x: np.searchsorted(np.array(ends), x, side="right"),
        terms,
        (0, F32_INF),
        "to nearest, ties to even, saturating at 6",
    )


def _small_codes(
    name: str, target: str, shift: int, table: list[int], form: formats.Format, note: str
) -> Meaning:
    """Return the conversion of the `form.bits`-bit code at `shift` through a table of output bits."""
    mask = (1 << form.bits) - 1
    lookup = np.array(table)
    return Meaning(
        name,
        ("int",),
        (target,),
        lambda x: lookup[x >> shift & mask],
        lambda x: _choose(z3.LShR(x, shift) & mask, table),
        note=note,
    )


def _targets() -> dict[str, Callable[[Fraction, bool], int | None]]:
    def narrow(value: Fraction, negative: bool) -> int | None:
        code = formats.exact_code(E4M3, value)
        return None if code is None else code | int(negative) << 7

    def wide(bits: int) -> Callable[[Fraction, bool], int]:
        def convert(value: Fraction, negative: bool) -> int:
            return (_f32_bits(value) | int(negative) << 31) >> (32 - bits)

        return convert

    def half(value: Fraction, negative: bool) -> int:
        return int(np.float16(float(value)).view(np.uint16)) | int(negative) << 15

    return {"float8_e4m3fn": narrow, "float16": half, "bfloat16": wide(16), "float32": wide(32)}


_NAN_BITS = {"float8_e4m3fn": 0x7F, "float16": 0x7E00, "bfloat16": 0x7FC0, "float32": F32_NAN}


def _from_small(form: formats.Format, label: str, target: str, offset: int, shift: int) -> Meaning | None:
    convert, table = _targets()[target], []
    for code in range(1 << form.bits):
        value = formats.magnitude(form, code)
        if value is None:
            table.append(_NAN_BITS[target])
            continue
        bits = convert(value * Fraction(2) ** offset, bool(code >> (form.bits - 1)))
        if bits is None:
            return None
        table.append(bits)
    scaled = f" times 2**{offset}" if offset else ""
    name = f"{label} at bit {shift}{scaled} to {target}"
    return _small_codes(name, target, shift, table, form, "exact for every code")


# --------------------------------------------------------------------------- all
@cache
def fixed() -> tuple[Meaning, ...]:
    """Return every conversion that needs no constant from the expression."""
    return tuple(_all())


def _all() -> Iterator[Meaning]:
    for shift in (0, 8, 16, 24):
        yield _ue8m0_to_f32(shift)
    yield _reciprocal()
    yield _power_of_two()
    yield _f32_to_ue8m0()
    yield _f32_to_e2m1()
    yield _next_above()
    yield Meaning(
        "bfloat16 in the lower half to float32",
        ("int",),
        ("float32",),
        lambda x: (x & 0xFFFF) << 16,
        lambda x: x << 16,
    )
    yield Meaning(
        "bfloat16 in the upper half to float32",
        ("int",),
        ("float32",),
        lambda x: x & 0xFFFF0000,
        lambda x: x & 0xFFFF0000,
    )
    for source, bits in (("bfloat16", 16), ("float16", 16), ("float32", 32)):
        mask = (1 << (bits - 1)) - 1
        yield Meaning(f"magnitude bits of {source}", (source,), ("int",), _masked(mask), _masked(mask))
    for source, bits in (("float8_e4m3fn", 8), ("bfloat16", 16)):  # to pack results: sign and all
        every = _masked((1 << bits) - 1)
        yield Meaning(f"bits of {source}", (source,), ("int",), every, every)
    for target in _targets():
        offsets = formats.lossless_offsets() if target == "float8_e4m3fn" else (0,)
        for offset in offsets:
            for shift in range(0, 32, E2M1.bits):
                found = _from_small(E2M1, "E2M1 code", target, offset, shift)
                if found is not None:
                    yield found
        if target != "float8_e4m3fn":
            for shift in range(0, 32, E4M3.bits):
                found = _from_small(E4M3, "E4M3 byte", target, 0, shift)
                if found is not None:
                    yield found


def _masked(mask: int) -> Callable[[Any], Any]:
    return lambda x: x & mask
