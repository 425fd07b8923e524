"""Binary operators on values, with the semantics of the scalar type they are applied at."""

import operator
from collections.abc import Callable
from typing import Any

import torch

from verify import ir
from verify.interp import dtypes
from verify.interp.errors import InterpreterError
from verify.interp.lanes import Affine, Lanes, Mask, Value, holds_anywhere

COMPARISONS: dict[str, Callable[..., torch.Tensor]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_ORDERS = {"lt": (-1,), "le": (-1, 0), "gt": (1,), "ge": (1, 0), "eq": (0,), "ne": (-1, 1)}
PROMOTED = frozenset({"int8", "uint8", "int16", "uint16"})
_DIVISIONS = frozenset({"floordiv", "floormod", "truncdiv", "truncmod"})
_FLOAT_OPS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "truediv": torch.div,
}


def binary(op: str, kind: ir.DType, a: Value, b: Value, lanes: Lanes, mask: Mask) -> Value:
    """Return `a op b`, both of type `kind`; of that type too, or bool for a comparison.

    Raises:
        InterpreterError: an active lane divides an integer by zero or shifts by the type's width or more.
        UnsupportedIR: the operator has no meaning for the type.
    """
    if kind.lanes != 1:
        raise ir.UnsupportedIR(f"vector of {kind}")
    if op in COMPARISONS:
        return _compare(op, kind, a, b, lanes)
    if kind.name in dtypes.CODED:
        raise ir.UnsupportedIR(f"{op} of {kind}")
    if kind.is_int:
        return _integer(op, kind, a, b, lanes, mask)
    return floating(op, lanes.tensor(a), lanes.tensor(b))


def floating(op: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return `a op b` of one float type, rounded to it."""
    if op in ("min", "max"):
        return float_min(a, b) if op == "min" else float_max(a, b)
    if op not in _FLOAT_OPS:
        raise ir.UnsupportedIR(f"{op} of {a.dtype}")
    return _FLOAT_OPS[op](a, b)


def float_max(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return CUDA's fmaxf: a NaN operand loses, +0 is above -0."""
    return torch.where((a == 0) & (b == 0), a + b, torch.fmax(a, b))


def float_min(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return CUDA's fminf: a NaN operand loses, -0 is below +0."""
    return torch.where((a == 0) & (b == 0), -(-a - b), torch.fmin(a, b))


# --------------------------------------------------------------------------- comparison
def _compare(op: str, kind: ir.DType, a: Value, b: Value, lanes: Lanes) -> Value:
    if isinstance(a, int | Affine) and isinstance(b, int | Affine):
        known = _order(a, b, lanes)
        if known is not None:
            hits = [sign in _ORDERS[op] for sign in known]
            if all(hits) or not any(hits):
                return hits[0]
    if kind.name in dtypes.CODED:
        raise ir.UnsupportedIR(f"{op} of {kind}")
    x, y = operands(a, b, kind, lanes) if kind.is_int else (lanes.tensor(a), lanes.tensor(b))
    if op not in ("eq", "ne") and kind.name == "uint64":
        x, y = dtypes.unsigned_order(x, kind.name), dtypes.unsigned_order(y, kind.name)
    return COMPARISONS[op](x, y)


def _order(a: int | Affine, b: int | Affine, lanes: Lanes) -> list[int] | None:
    """Return the signs that a - b takes over the lanes, None where its bounds do not tell."""
    negated = b.scaled(-1) if isinstance(b, Affine) else -int(b)
    low, high = lanes.bounds(_sum(a, negated))
    if low == high:
        return [(low > 0) - (low < 0)]
    if high < 0 or low > 0:
        return [1 if low > 0 else -1]
    if high == 0 or low == 0:
        return [0, -1 if high == 0 else 1]
    return None


def _sum(a: int | Affine, b: int | Affine) -> int | Affine:
    if isinstance(a, Affine):
        return a.plus(b) if isinstance(b, Affine) else a.shifted(int(b))
    return b.shifted(int(a)) if isinstance(b, Affine) else int(a) + int(b)


# --------------------------------------------------------------------------- integers
def operands(a: Value, b: Value, kind: ir.DType, lanes: Lanes) -> tuple[Any, Any]:
    """Return both operands as torch takes them: a number may stay one beside a tensor."""
    is_plain = kind.name not in ("uint64", "bool")
    if is_plain and isinstance(b, int) and isinstance(a, torch.Tensor | Affine):
        return lanes.tensor(a), int(b)
    if is_plain and isinstance(a, int) and isinstance(b, torch.Tensor | Affine):
        return int(a), lanes.tensor(b)
    return lanes.tensor(a), lanes.tensor(b)


def _integer(op: str, kind: ir.DType, a: Value, b: Value, lanes: Lanes, mask: Mask) -> Value:
    if op in _DIVISIONS:
        return _divide(op, kind, a, b, lanes, mask)
    if op in ("shl", "shr"):
        return _shift(op, kind, a, b, lanes, mask)
    if isinstance(a, int | Affine) and isinstance(b, int | Affine) and kind.name != "uint64":
        exact = _affine(op, a, b)
        if exact is not None:
            return lanes.normalize(exact, kind)
    x, y = operands(a, b, kind, lanes)
    match op:
        case "add":
            return dtypes.wrap(x + y, kind.name)
        case "sub":
            return dtypes.wrap(x - y, kind.name)
        case "mul":
            return dtypes.wrap(x * y, kind.name)
        case "bitand":
            return x & y
        case "bitor":
            return x | y
        case "bitxor":
            return x ^ y
        case "min" | "max":
            x, y = lanes.tensor(x), lanes.tensor(y)
            p, q = dtypes.unsigned_order(x, kind.name), dtypes.unsigned_order(y, kind.name)
            chosen = torch.minimum(p, q) if op == "min" else torch.maximum(p, q)
            return dtypes.unsigned_order(chosen, kind.name)
    raise ir.UnsupportedIR(f"{op} of {kind}")


def _affine(op: str, a: int | Affine, b: int | Affine) -> int | Affine | None:
    """Return the exact result where it is an integer or Affine, else None."""
    if op == "add":
        return _sum(a, b)
    if op == "sub":
        return _sum(a, b.scaled(-1) if isinstance(b, Affine) else -int(b))
    if op == "mul" and isinstance(a, Affine) and not isinstance(b, Affine):
        return a.scaled(int(b))
    if op == "mul" and isinstance(b, Affine) and not isinstance(a, Affine):
        return b.scaled(int(a))
    if isinstance(a, Affine) or isinstance(b, Affine):
        return None
    match op:
        case "mul":
            return int(a) * int(b)
        case "bitand":
            return int(a) & int(b)
        case "bitor":
            return int(a) | int(b)
        case "bitxor":
            return int(a) ^ int(b)
        case "min":
            return min(int(a), int(b))
        case "max":
            return max(int(a), int(b))
    return None


def _divide(op: str, kind: ir.DType, a: Value, b: Value, lanes: Lanes, mask: Mask) -> Value:
    floors = op.startswith("floor")
    if isinstance(b, int) and b > 0 and isinstance(a, Affine):
        quick = _divide_affine(op, a, int(b), lanes)
        if quick is not None:
            return quick
    if isinstance(a, int) and isinstance(b, int) and b != 0 and kind.name != "uint64":
        quotient = a // b if floors else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        return lanes.normalize(quotient if op.endswith("div") else a - quotient * b, kind)
    x, y = lanes.tensor(a), lanes.tensor(b)
    if not isinstance(b, int) or b == 0:
        zero = y == 0
        if holds_anywhere(zero, mask):
            raise InterpreterError(f"integer {op} by zero")
        y = torch.where(zero, 1, y)
    if kind.name == "uint64" and bool((x < 0).any() or (y < 0).any()):
        raise ir.UnsupportedIR(f"{op} of uint64 above 2**63")
    if kind.name == "int64":  # int64 minimum / -1 traps on x86; it wraps on the GPU
        y = torch.where((y == -1) & (x == torch.iinfo(torch.int64).min), 1, y)
    if op.endswith("div"):
        return dtypes.wrap(torch.div(x, y, rounding_mode="floor" if floors else "trunc"), kind.name)
    return torch.remainder(x, y) if floors else torch.fmod(x, y)


def _divide_affine(op: str, a: Affine, b: int, lanes: Lanes) -> int | Affine | None:
    """Return a / b or a % b where every step of `a` is a multiple of b or its remainder stays small."""
    whole = Affine(a.base // b, tuple((axis, c // b) for axis, c in a.coeffs if c % b == 0))
    rest = Affine(a.base % b, tuple((axis, c) for axis, c in a.coeffs if c % b))
    low, high = lanes.bounds(rest)
    if low < 0 or high >= b or (op.startswith("trunc") and lanes.bounds(a)[0] < 0):
        return None
    chosen = whole if op.endswith("div") else rest
    return chosen if chosen.coeffs else chosen.base


def _shift(op: str, kind: ir.DType, a: Value, b: Value, lanes: Lanes, mask: Mask) -> Value:
    # C promotes what is narrower than int: bits that leave the type are there until a store or a cast.
    kind = ir.INT32 if kind.name in PROMOTED else kind
    if isinstance(b, int):
        if not 0 <= b < kind.bits and (mask is None or bool(mask.any())):
            raise InterpreterError(f"{op} of {kind} by {b}")
        b %= kind.bits
        if isinstance(a, int | Affine) and op == "shl" and kind.name != "uint64":
            shifted = a.scaled(1 << b) if isinstance(a, Affine) else a << b
            return lanes.normalize(shifted, kind)
        if isinstance(a, int) and kind.name != "uint64":
            return a >> b
        if kind.name != "uint64" and isinstance(a, torch.Tensor):
            return dtypes.wrap(a << b, kind.name) if op == "shl" else a >> b
    x, y = lanes.tensor(a), lanes.tensor(b)
    outside = (y < 0) | (y >= kind.bits)
    if bool(outside.any()):
        if holds_anywhere(outside, mask):
            raise InterpreterError(f"{op} of {kind} by {int(y.broadcast_to(outside.shape)[outside][0])}")
        y = torch.where(outside, 0, y)
    if op == "shl":
        return dtypes.wrap(x << y, kind.name)
    shifted = x >> y
    if kind.name == "uint64":  # carried as signed bits: clear the copies of the sign
        shifted &= torch.where(y == 0, -1, (1 << (63 - (y - 1).clamp(min=0))) - 1)
    return shifted
