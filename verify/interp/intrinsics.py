"""Meaning of the intrinsic calls that appear inside expressions.

Transcendental functions are computed in float64 and rounded once to the result type. CUDA's are
within a few units in the last place of that (CUDA C++ Programming Guide, "Mathematical Functions").
"""

from collections.abc import Callable

import torch

from verify import ir
from verify.interp import dtypes
from verify.interp.arith import float_max, float_min

Function = Callable[..., torch.Tensor]

_EXTERNS: dict[str, Function] = {}


def register_extern(name: str, function: Function) -> None:
    """Give device function `name` (of `T.call_extern`) a meaning.

    Args:
        name: as the kernel spells it.
        function: takes one tensor an argument, broadcastable against each other (integers as int64,
            8-bit and 4-bit floats as uint8 codes), and returns the result in the same form.

    Raises:
        ValueError: the name has another meaning already.
    """
    if _EXTERNS.setdefault(name, function) is not function:
        raise ValueError(f"register_extern: requires a new name, got name={name!r}")


def _half_toward_zero(value: torch.Tensor) -> torch.Tensor:
    """Return float32 `value` as float16, rounded toward zero (CUDA's __float2half_rz)."""
    near = value.to(torch.float16)
    bits = near.contiguous().view(torch.int16)
    # One step toward zero where rounding to nearest went away from it; an infinity steps to the largest.
    away = near.to(torch.float32).abs() > value.abs()
    return torch.where(away & value.isfinite(), bits - 1, bits).view(torch.float16)


def extern(name: str) -> Function:
    """Return the registered meaning of device function `name`."""
    if name not in _EXTERNS:
        raise ir.UnsupportedIR(f"call_extern {name!r} has no registered meaning")
    return _EXTERNS[name]


def _through_float64(function: Function) -> Function:
    def apply(*args: torch.Tensor) -> torch.Tensor:
        kind = args[0].dtype
        if not kind.is_floating_point:
            raise ir.UnsupportedIR(f"float function of {kind}")
        return dtypes.narrow(function(*(a.to(torch.float64) for a in args)), kind)

    return apply


def _clamp(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    # TileLang's clamp, unlike min and max, keeps a NaN.
    if not x.dtype.is_floating_point:
        return torch.minimum(torch.maximum(x, low), high)
    result = float_min(float_max(x, low), high)
    for bound in (high, low, x):
        result = torch.where(bound.isnan(), bound, result)
    return result


def _round_away(x: torch.Tensor) -> torch.Tensor:
    whole = x.trunc()
    return torch.where((x - whole).abs() >= 0.5, whole + torch.sign(x), whole)


def _fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return a * b + c rounded once, for operands of at most 24 bits."""
    if a.dtype == torch.float64:
        raise ir.UnsupportedIR("fma of float64")
    product = a.to(torch.float64) * b.to(torch.float64)  # exact
    addend = c.to(torch.float64)
    total = product + addend
    # Rounded to odd in float64, so that the rounding that follows is as one of the exact sum.
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.contiguous().view(torch.int64)
    inexact = (error != 0) & total.isfinite() & (bits & 1 == 0)
    toward = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where(inexact, bits + toward, bits).view(torch.float64)
    return dtypes.narrow(odd, a.dtype)


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


MATH: dict[str, Function] = {
    "exp": _through_float64(torch.exp),
    "exp2": _through_float64(torch.exp2),
    "exp10": _through_float64(lambda x: torch.pow(torch.tensor(10.0, dtype=torch.float64), x)),
    "log": _through_float64(torch.log),
    "log2": _through_float64(torch.log2),
    "log10": _through_float64(torch.log10),
    "log1p": _through_float64(torch.log1p),
    "sqrt": _through_float64(torch.sqrt),
    "rsqrt": _through_float64(lambda x: 1 / torch.sqrt(x)),
    "ieee_frsqrt": _through_float64(lambda x: 1 / torch.sqrt(x)),
    "pow": _through_float64(torch.pow),
    "tanh": _through_float64(torch.tanh),
    "erf": _through_float64(torch.erf),
    "sigmoid": _through_float64(_sigmoid),
    "sin": _through_float64(torch.sin),
    "cos": _through_float64(torch.cos),
    "tan": _through_float64(torch.tan),
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "round": torch.round,  # TileLang prints nearbyintf: ties to even
    "nearbyint": torch.round,
    "round_ties_away_from_zero": _round_away,
    "fabs": torch.abs,
    "fmod": _through_float64(torch.fmod),
    "fma": _fma,
    "clamp": _clamp,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "isfinite": torch.isfinite,
    "copysign": torch.copysign,
    "max_nan": torch.maximum,
    "min_nan": torch.minimum,
}
# Round-to-nearest forms with the rounding mode as last argument.
IEEE: dict[str, Function] = {
    "ieee_add": torch.add,
    "ieee_sub": torch.sub,
    "ieee_mul": torch.mul,
    "ieee_fdiv": torch.div,
    "ieee_fmaf": _fma,
    "ieee_frcp": torch.reciprocal,
    "ieee_fsqrt": torch.sqrt,
}


register_extern("__float2half_rz", _half_toward_zero)


def abs_int(value: torch.Tensor, name: str) -> torch.Tensor:
    """Return |value| of an integer type; the least value wraps to itself."""
    return dtypes.wrap(value.abs(), name)


def popcount(bits: torch.Tensor) -> torch.Tensor:
    """Return the number of ones of non-negative int64 bit patterns."""
    count = torch.zeros_like(bits)
    for shift in range(64):
        count += (bits >> shift) & 1
    return count
