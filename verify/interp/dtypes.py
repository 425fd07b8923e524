"""How a value of each scalar type is held on the CPU, and what a cast between two types does.

A value is held in a *carrier*: integers of every width in int64 (uint64 as its bit pattern), bool in
bool, float64/32/16 and bfloat16 in themselves, and the types with no arithmetic (e4m3, e5m2, ue8m0,
e2m1) as their bit codes in uint8, so that a copy never changes a bit. Memory holds the narrower
*stored* form: the same, with integers in their own width.

Casts follow CUDA 13 on sm_90: round to nearest even; to e4m3, e5m2 and e2m1 saturating; to ue8m0
rounding the magnitude up, saturating; a NaN becomes the target's canonical NaN (0x7fff in 16 bits,
0x7f in e4m3 and e5m2, 0xff in ue8m0, the largest value in e2m1, which has none).
"""

from dataclasses import dataclass
from functools import cache

import torch

from verify import ir

CODED = frozenset({"float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn"})
FP4 = "float4_e2m1fn"
UE8M0 = "float8_e8m0fnu"

_FLOATS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tfloat32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_STORED_INTS = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "uint16": torch.int16,
    "int32": torch.int32,
    "uint32": torch.int32,
    "int64": torch.int64,
    "uint64": torch.int64,
}
# What a tensor argument may be for a buffer of each type; the first is the one named in errors.
_ARGUMENTS: dict[str, tuple[torch.dtype, ...]] = {
    "bool": (torch.bool,),
    "int8": (torch.int8,),
    "uint8": (torch.uint8,),
    "int16": (torch.int16,),
    "uint16": (torch.uint16,),
    "int32": (torch.int32,),
    "uint32": (torch.uint32,),
    "int64": (torch.int64,),
    "uint64": (torch.uint64,),
    "float64": (torch.float64,),
    "float32": (torch.float32,),
    "float16": (torch.float16,),
    "bfloat16": (torch.bfloat16,),
    "float8_e4m3fn": (torch.float8_e4m3fn,),
    "float8_e5m2": (torch.float8_e5m2,),
    "float8_e8m0fnu": (torch.float8_e8m0fnu, torch.uint8),
    "float4_e2m1fn": (torch.uint8, torch.int8, torch.float4_e2m1fn_x2),
}
_CANONICAL_NAN16 = 0x7FFF
_E8M0_BIAS = 127
_E8M0_NAN = 0xFF
_E8M0_MAX = 0xFE
_INT_POISON_BYTE = 0xA5
_NIBBLE_BITS = 4
_NIBBLE = 0xF


@dataclass(frozen=True)
class _Format:
    """A small float: sign, then exponent, then `mantissa` bits.

    Attributes:
        bias: of the exponent.
        mantissa: bits of it.
        max_value, max_code: the largest finite value and its code.
        nan_code: what a NaN converts to.
    """

    bits: int
    bias: int
    mantissa: int
    max_value: float
    max_code: int
    nan_code: int


_FORMATS = {
    "float8_e4m3fn": _Format(8, 7, 3, 448.0, 0x7E, 0x7F),
    "float8_e5m2": _Format(8, 15, 2, 57344.0, 0x7B, 0x7F),
    "float4_e2m1fn": _Format(4, 1, 1, 6.0, 0x7, 0x7),
}


def carrier_dtype(name: str) -> torch.dtype:
    """Return the torch type that carries a value of scalar type `name`."""
    if name == "bool":
        return torch.bool
    if name in _STORED_INTS:
        return torch.int64
    if name in _FLOATS:
        return _FLOATS[name]
    if name in CODED:
        return torch.uint8
    raise ir.UnsupportedIR(f"dtype {name}")


def stored_dtype(name: str) -> torch.dtype:
    """Return the torch type that holds an element of `name` in memory."""
    return _STORED_INTS.get(name) or carrier_dtype(name)


def argument_dtypes(name: str) -> tuple[torch.dtype, ...]:
    """Return the torch types that a tensor argument for a buffer of `name` may have."""
    if name not in _ARGUMENTS:
        raise ir.UnsupportedIR(f"tensor argument of dtype {name}")
    return _ARGUMENTS[name]


def to_carrier(stored: torch.Tensor, name: str) -> torch.Tensor:
    """Return elements as memory holds them, as values."""
    if name not in _STORED_INTS:
        return stored
    value = stored.to(torch.int64)
    if name in ("uint16", "uint32"):
        value &= (1 << ir.UINT_BITS[name]) - 1
    return value


def to_stored(value: torch.Tensor, name: str) -> torch.Tensor:
    """Return values as memory holds them."""
    return value.to(stored_dtype(name))


def poison(name: str) -> int | float:
    """Return what memory of `name` (stored form) holds before it is written: NaN where there is one."""
    if name in _FLOATS:
        return float("nan")
    if name == "bool":
        return True
    if name in CODED:
        return _E8M0_NAN if name == UE8M0 else _FORMATS[name].nan_code
    info = torch.iinfo(stored_dtype(name))
    pattern = int.from_bytes(bytes([_INT_POISON_BYTE]) * (info.bits // 8), "little")
    return pattern if info.min == 0 else pattern - (1 << info.bits)


def wrap_int(value: int, kind: ir.DType) -> int:
    """Return a Python integer reduced to the range of the integer type `kind`."""
    if kind.name == "bool":
        return int(bool(value))
    low, high = kind.int_range
    return value if low <= value <= high else (value - low) % (1 << kind.bits) + low


def wrap(value: torch.Tensor, name: str) -> torch.Tensor:
    """Return int64 values reduced to the range of the integer type `name`."""
    if name in ("int64", "uint64"):
        return value
    if name in ir.UINT_BITS:
        return value & ((1 << ir.UINT_BITS[name]) - 1)
    return value.to(_STORED_INTS[name]).to(torch.int64)


def constant(value: int | float | bool, kind: ir.DType) -> int | bool | torch.Tensor:
    """Return a literal as a value: a Python int or bool, or a 0-d carrier."""
    if kind.name == "bool":
        return bool(value)
    if kind.is_int:
        return wrap_int(int(value), kind)
    return cast(torch.tensor(float(value), dtype=torch.float64), "float64", kind.name)


def unsigned_order(value: torch.Tensor, name: str) -> torch.Tensor:
    """Return values whose signed order is the order of type `name` (uint64 is carried as its bits)."""
    return value ^ torch.iinfo(torch.int64).min if name == "uint64" else value


# --------------------------------------------------------------------------- bits
def to_bits(value: torch.Tensor, name: str) -> torch.Tensor:
    """Return the bit pattern of values of `name`, as non-negative int64 (64-bit types: signed)."""
    if name in CODED:
        return value.to(torch.int64)
    if name in _STORED_INTS or name == "bool":
        bits = ir.DType(name).bits
        return value.to(torch.int64) if bits == 64 else value.to(torch.int64) & ((1 << bits) - 1)
    bits = ir.DType(name).bits
    signed = {16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    pattern = value.contiguous().view(signed).to(torch.int64)
    return pattern if bits == 64 else pattern & ((1 << bits) - 1)


def from_bits(pattern: torch.Tensor, name: str) -> torch.Tensor:
    """Return the values of `name` whose bit patterns are `pattern`."""
    if name in CODED:
        return pattern.to(torch.uint8)
    if name == "bool":
        return pattern != 0
    if name in _STORED_INTS:
        return wrap(pattern, name)
    signed = {16: torch.int16, 32: torch.int32, 64: torch.int64}[ir.DType(name).bits]
    return pattern.to(signed).view(_FLOATS[name])


def retype(stored: torch.Tensor, source: str, target: str) -> torch.Tensor:
    """Return the bytes of `stored` (..., n) as elements of `target`; they share memory unless one is FP4."""
    if source == FP4:  # one element a byte here, two a byte in a kernel's memory
        if stored.shape[-1] % 2:
            raise ir.UnsupportedIR(f"an odd number of {source} seen as {target}")
        octets = stored[..., 0::2] | stored[..., 1::2] << _NIBBLE_BITS
    else:
        octets = stored.view(torch.uint8)
    if target == FP4:
        return torch.stack((octets & _NIBBLE, octets >> _NIBBLE_BITS), -1).flatten(-2)
    kind = stored_dtype(target)
    if octets.shape[-1] % kind.itemsize:
        raise ir.UnsupportedIR(f"{octets.shape[-1]} bytes of {source} seen as {target}")
    return octets.view(kind)


# --------------------------------------------------------------------------- casts
def cast(value: torch.Tensor, source: str, target: str) -> torch.Tensor:
    """Return values of `source` converted to `target`.

    A float out of an integer type's range saturates in 32 bits (64 for the 64-bit types), and is then
    truncated to a narrower type; NaN becomes 0. That is what nvcc's cvt.rzi sequence computes.
    """
    if source == target:
        return value
    if source in CODED:
        return cast(decode(value, source), "float32", target)
    if target == "bool":
        return value != 0
    if target in CODED:
        return encode(_real(value, source), target)
    if target in _FLOATS:
        return _to_float(value, source, target)
    if source in _FLOATS:
        return _float_to_int(value, target)
    return wrap(value.to(torch.int64), target)


def decode(codes: torch.Tensor, name: str) -> torch.Tensor:
    """Return the float32 values of uint8 codes of a coded type (exact)."""
    flat = codes.reshape(-1).to(torch.int32)
    return _decode_table(name).index_select(0, flat).view(codes.shape)


def encode(value: torch.Tensor, name: str) -> torch.Tensor:
    """Return the uint8 codes of a coded type nearest to float32 or float64 `value` (see the module)."""
    if name == UE8M0:
        return _encode_e8m0(value)
    form = _FORMATS[name]
    magnitude = value.abs().fmin(torch.full_like(value, form.max_value))
    exponent = torch.frexp(magnitude).exponent - 1
    least = 1 - form.bias  # exponent of the subnormals, whose code is the quotient itself
    exponent = torch.where(magnitude == 0, least, exponent.clamp(min=least))
    quotient = torch.ldexp(magnitude, form.mantissa - exponent).round()  # round: ties to even
    code = ((exponent - least) << form.mantissa) + quotient.to(torch.int32)
    code |= torch.signbit(value).to(torch.int32) << (form.bits - 1)
    return torch.where(value.isnan(), form.nan_code, code).to(torch.uint8)


def _encode_e8m0(value: torch.Tensor) -> torch.Tensor:
    fraction, exponent = torch.frexp(value.abs())
    # |x| = fraction * 2^exponent with fraction in [1/2, 1): the power of two not below it.
    code = torch.where(fraction == 0.5, exponent - 1, exponent) + _E8M0_BIAS
    code = torch.where(value == 0, 0, code.clamp(0, _E8M0_MAX))
    code = torch.where(value.isinf(), _E8M0_MAX, code)
    return torch.where(value.isnan(), _E8M0_NAN, code).to(torch.uint8)


@cache
def _decode_table(name: str) -> torch.Tensor:
    codes = torch.arange(256)
    if name == UE8M0:
        table = torch.ldexp(torch.ones(256, dtype=torch.float64), codes - _E8M0_BIAS)
        table[_E8M0_NAN] = float("nan")
        return table.to(torch.float32)
    form = _FORMATS[name]
    magnitude = codes & ((1 << (form.bits - 1)) - 1)
    exponent = magnitude >> form.mantissa
    fraction = (magnitude & ((1 << form.mantissa) - 1)).to(torch.float64)
    fraction += (exponent > 0).to(torch.float64) * (1 << form.mantissa)
    table = torch.ldexp(fraction, exponent.clamp(min=1) - form.bias - form.mantissa)
    table[magnitude > form.max_code] = float("nan")
    if name == "float8_e5m2":
        table[magnitude == form.max_code + 1] = float("inf")
    negative = (codes >> (form.bits - 1)) & 1 == 1
    return torch.where(negative, -table, table).to(torch.float32)


def narrow(value: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Return floats rounded once, to nearest even, to float type `kind`."""
    if value.dtype == torch.float64 and kind in (torch.float16, torch.bfloat16):
        # torch goes through float32, which would round twice: go through it rounded to odd instead.
        single = value.to(torch.float32)
        inexact = single.to(torch.float64) != value
        above = single.to(torch.float64).abs() > value.abs()
        bits = single.contiguous().view(torch.int32)
        odd = (bits - above.to(torch.int32)) | 1
        value = torch.where(inexact & value.isfinite(), odd, bits).view(torch.float32)
    return value.to(kind)


def _real(value: torch.Tensor, source: str) -> torch.Tensor:
    if source == "float64":
        return value
    return _to_float(value, source, "float32")


def _to_float(value: torch.Tensor, source: str, target: str) -> torch.Tensor:
    if source == "uint64" and bool((value < 0).any()):
        raise ir.UnsupportedIR("cast of a uint64 above 2**63 to a float")
    if target in ("float16", "bfloat16"):
        if source not in _FLOATS:  # an integer goes through float32, as cutlass's constructors do
            value = value.to(torch.float32)
        result = narrow(value, _FLOATS[target])
        nan = value.isnan()
        if bool(nan.any()):
            result = torch.where(nan, from_bits(torch.tensor(_CANONICAL_NAN16), target), result)
        return result
    return value.to(_FLOATS[target])


def _float_to_int(value: torch.Tensor, target: str) -> torch.Tensor:
    wide = value.to(torch.float64).trunc()
    unsigned = target in ir.UINT_BITS
    bits = 64 if ir.DType(target).bits == 64 else 32
    if bits == 64:
        if unsigned and bool((wide >= 2.0**63).any()):
            raise ir.UnsupportedIR("cast of a float above 2**63 to uint64")
        limit = torch.iinfo(torch.int64)
        low, high = (0 if unsigned else limit.min), limit.max
        exact = torch.where((wide >= 2.0**63) | (wide < -(2.0**63)) | wide.isnan(), 0.0, wide).to(torch.int64)
        exact = torch.where(wide >= 2.0**63, high, exact)
        exact = torch.where(wide < -(2.0**63), low, exact)
        return exact.clamp(min=low) if unsigned else exact
    low, high = (0, (1 << 32) - 1) if unsigned else (-(1 << 31), (1 << 31) - 1)
    return wrap(wide.nan_to_num(0.0, high, low).clamp(low, high).to(torch.int64), target)
