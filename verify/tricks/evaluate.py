"""The value of an expression as a function of one subexpression: on arrays, and as an SMT term.

Integers have their machine width; float32 follows IEEE 754 with round to nearest even and denormals, as
nvcc's default (no flush to zero, no fast-math). Narrow floats are known by their bits alone.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import z3

from verify import externs, ir
from verify.externs.words import BITS, MASK, Arrays, BitVectors
from verify.ir import UnsupportedIR

_FLOAT32 = "float32"
_NP = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "bitand": operator.and_,
    "bitor": operator.or_,
    "bitxor": operator.xor,
}
_COMPARE = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_WRAPPING = frozenset({"add", "sub", "mul", "shl"})
Key = tuple[Any, ...]


def key_of(expr: ir.Expr) -> Key:
    """Return a key that two expressions share iff they are the same text over the same variables."""
    head: tuple[Any, ...] = (type(expr).__name__, str(expr.dtype))
    match expr:
        case ir.Const(value=value) | ir.Str(value=value):
            return (*head, repr(value))  # of two zeros each
        case ir.Var():
            return (*head, id(expr))
        case ir.Load(buffer=buffer):
            head = (*head, id(buffer))
        case ir.BinOp(op=op) | ir.Call(op=op):
            head = (*head, op)
    return (*head, *(key_of(c) for c in ir.children(expr)))


class OnArrays:
    """Evaluates on numpy arrays: integers as int64, float32 as itself, other floats as their bits."""

    def __init__(
        self, cut: frozenset[int], value: np.ndarray, more: Mapping[int, np.ndarray] | None = None
    ) -> None:
        """Let every subexpression with an identity in `cut` have `value`, and those in `more` theirs."""
        self.known: dict[int, Any] = {**dict.fromkeys(cut, value), **(more or {})}

    def __call__(self, expr: ir.Expr) -> Any:
        """Return the value of `expr`.

        Raises:
            UnsupportedIR: an operation without a meaning here.
        """
        if id(expr) in self.known:
            return self.known[id(expr)]
        kind = expr.dtype
        match expr:
            case ir.Const(value=value):
                return np.float32(value) if kind.name == _FLOAT32 else np.int64(value)
            case ir.Broadcast(value=value):
                return self(value)
            case ir.Not(a=a):
                return 1 - self(a)
            case ir.Cast(a=a):
                return self._cast(a, kind)
            case ir.Select(cond=cond, a=a, b=b):
                return np.where(self(cond) != 0, self(a), self(b))
            case ir.BinOp(op=op, a=a, b=b):
                return self._binary(op, kind, a.dtype, self(a), self(b))
            case ir.Call(op="reinterpret", args=(a,)):
                return _bits_to(_to_bits(self(a), a.dtype), kind)
            case ir.Call() if (extern := externs.called(expr)) is not None and extern.is_pure:
                words = [np.asarray(self(a)) & MASK for a in expr.args[1:]]
                given = dict(zip(extern.word_parameters, words, strict=True))
                return wrap(extern.meaning(Arrays(), given, {}), kind)
            case ir.Call(op="clamp", args=(x, low, high)):
                value = self(x)
                clamped = _extreme("min", _extreme("max", value, self(low)), self(high))
                return np.where(np.isnan(value), value, clamped)
        raise UnsupportedIR(f"{type(expr).__name__} in an expression on bits")

    def _cast(self, a: ir.Expr, kind: ir.DType) -> Any:
        value = self(a)
        if kind.is_int and a.dtype.is_int:
            return (value != 0).astype(np.int64) if kind.name == "bool" else wrap(value, kind)
        if a.dtype.name == "bfloat16" and kind.name == _FLOAT32:
            return _bits_to(value << 16, kind)
        raise UnsupportedIR(f"cast from {a.dtype} to {kind} in an expression on bits")

    def _binary(self, op: str, kind: ir.DType, operand: ir.DType, a: Any, b: Any) -> Any:
        if op in _COMPARE:
            return np.asarray(_COMPARE[op](a, b)).astype(np.int64)
        if op in ("and", "or"):
            return (np.logical_and if op == "and" else np.logical_or)(a != 0, b != 0).astype(np.int64)
        if kind.name == _FLOAT32:
            with np.errstate(all="ignore"):
                if op in ("min", "max"):
                    return _extreme(op, a, b)
                if op in ("add", "sub", "mul"):
                    return _NP[op](np.asarray(a, np.float32), np.asarray(b, np.float32))
        elif operand.is_int:
            if op in ("min", "max"):
                return (np.minimum if op == "min" else np.maximum)(a, b)
            if op in ("shl", "shr"):  # the shift amounts of these expressions are constants
                return _kept(op, kind, a << b if op == "shl" else a >> b)
            if op in _NP:
                return _kept(op, kind, _NP[op](a, b))
        raise UnsupportedIR(f"{op} of {kind} in an expression on bits")


def _extreme(op: str, a: Any, b: Any) -> Any:
    """Return fminf or fmaxf: of a nan and a number the number; -0 is below 0."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    with np.errstate(invalid="ignore"):
        zeros = a + b if op == "max" else -(-a - b)
        return np.where((a == 0) & (b == 0), zeros, (np.fmin if op == "min" else np.fmax)(a, b))


def _kept(op: str, kind: ir.DType, value: Any) -> Any:
    """Return the result of an operation in its type; of a narrow type only where it does not leave it.

    C computes narrow integers as int, and vectors of them wrap: the compiler chooses.
    """
    kept = wrap(value, kind)
    if _may_leave(op, kind) and np.any(kept != value):
        raise UnsupportedIR(f"{op} that may leave {kind} in an expression on bits")
    return kept


def _may_leave(op: str, kind: ir.DType) -> bool:
    return kind.bits < BITS and op in _WRAPPING


def wrap(value: Any, kind: ir.DType) -> Any:
    """Return integers reduced to the range of `kind`.

    Raises:
        UnsupportedIR: uint64, whose values int64 does not hold.
    """
    if kind.name == "uint64":
        raise UnsupportedIR(f"{kind} in an expression on bits")
    if kind.name == "int64":
        return np.asarray(value, dtype=np.int64)  # what they are computed in
    low = kind.int_range[0]
    return ((np.asarray(value, dtype=np.int64) - low) & ((1 << kind.bits) - 1)) + low


def _to_bits(value: Any, kind: ir.DType) -> Any:
    if kind.name == _FLOAT32:
        return np.asarray(value, np.float32).view(np.uint32).astype(np.int64)
    return np.asarray(value, dtype=np.int64) & ((1 << kind.bits) - 1)


def _bits_to(bits: Any, kind: ir.DType) -> Any:
    if kind.name == _FLOAT32:
        return np.asarray(bits).astype(np.uint32).view(np.float32)
    return wrap(bits, kind) if kind.is_int else bits


class AsTerms:
    """Encodes for the solvers: integers as bit-vectors, float32 as floating point, other floats as bits.

    Attributes:
        definitions: what holds of the fresh symbols, one for the bits of each computed float.
        uses_floats: whether floating-point terms occur.
    """

    def __init__(
        self,
        cut: frozenset[int],
        variable: z3.BitVecRef,
        kind: ir.DType,
        more: Mapping[int, z3.BitVecRef] | None = None,
    ) -> None:
        """Let every subexpression with an identity in `cut` be `variable`, the bits of a value of `kind`.

        `more` gives words that stand for other integer subexpressions.
        """
        self.definitions: list[z3.BoolRef] = []
        self.uses_floats = False
        value: Any = variable
        self._bits: dict[int, tuple[z3.ExprRef, z3.BitVecRef]] = {}
        if kind.name == _FLOAT32:
            value = self._from_bits(variable, kind)
            self._bits[value.get_id()] = (value, variable)
        self.known: dict[int, Any] = {**dict.fromkeys(cut, value), **(more or {})}

    def __call__(self, expr: ir.Expr) -> Any:
        """Return the term of `expr`.

        Raises:
            UnsupportedIR: an operation without a meaning here.
        """
        if id(expr) in self.known:
            return self.known[id(expr)]
        kind = expr.dtype
        match expr:
            case ir.Const(value=value):
                if kind.name == "bool":
                    return z3.BoolVal(bool(value))
                if kind.name == _FLOAT32:
                    bits = int(np.float32(value).view(np.uint32))
                    return self._from_bits(z3.BitVecVal(bits, kind.bits), kind)
                return z3.BitVecVal(int(value), kind.bits)
            case ir.Broadcast(value=value):
                return self(value)
            case ir.Not(a=a):
                return z3.Not(self(a))
            case ir.Cast(a=a):
                return self._cast(a, kind)
            case ir.Select(cond=cond, a=a, b=b):
                return z3.If(self(cond), self(a), self(b))
            case ir.BinOp(op=op, a=a, b=b):
                return self._binary(op, a.dtype, self(a), self(b))
            case ir.Call(op="reinterpret", args=(a,)):
                return self._from_bits(self.bits(self(a)), kind)
            case ir.Call() if (extern := externs.called(expr)) is not None and extern.is_pure:
                words = [resize(self(a), BITS, a.dtype.is_signed) for a in expr.args[1:]]
                given = dict(zip(extern.word_parameters, words, strict=True))
                return extern.meaning(BitVectors(), given, {})
        raise UnsupportedIR(f"{type(expr).__name__} in an expression on bits")

    def bits(self, term: Any) -> z3.BitVecRef:
        """Return the bits of a value; of a nan any nan's."""
        if not z3.is_fp(term):
            return term
        if term.get_id() not in self._bits:
            fresh = z3.BitVec(f"bits {len(self._bits)}", 32)
            self._bits[term.get_id()] = (term, fresh)
            self.definitions.append(z3.fpBVToFP(fresh, z3.Float32()) == term)
        return self._bits[term.get_id()][1]

    def _from_bits(self, bits: z3.BitVecRef, kind: ir.DType) -> Any:
        if kind.name != _FLOAT32:
            return bits
        self.uses_floats = True
        return z3.fpBVToFP(bits, z3.Float32())

    def _cast(self, a: ir.Expr, kind: ir.DType) -> Any:
        value = self(a)
        if kind.is_int and a.dtype.is_int:
            if z3.is_bool(value):
                return z3.If(value, z3.BitVecVal(1, kind.bits), z3.BitVecVal(0, kind.bits))
            if kind.name == "bool":
                return value != 0
            return resize(value, kind.bits, a.dtype.is_signed)
        if a.dtype.name == "bfloat16" and kind.name == _FLOAT32:
            return self._from_bits(z3.Concat(value, z3.BitVecVal(0, 16)), kind)
        raise UnsupportedIR(f"cast from {a.dtype} to {kind} in an expression on bits")

    def _binary(self, op: str, kind: ir.DType, a: Any, b: Any) -> Any:
        if op in ("and", "or"):
            return z3.And(a, b) if op == "and" else z3.Or(a, b)
        if kind.name == _FLOAT32:
            return self._floats(op, a, b)
        if z3.is_bool(a) or not kind.is_int:
            raise UnsupportedIR(f"{op} of {kind} in an expression on bits")
        if _may_leave(op, kind):
            raise UnsupportedIR(f"{op} that may leave {kind} in an expression on bits")
        signed = kind.is_signed
        if op in _COMPARE or op in ("min", "max"):
            less = a < b if signed else z3.ULT(a, b)
            table: dict[str, Callable[[], Any]] = {
                "eq": lambda: a == b,
                "ne": lambda: a != b,
                "lt": lambda: less,
                "ge": lambda: z3.Not(less),
                "gt": lambda: z3.Not(z3.Or(less, a == b)),
                "le": lambda: z3.Or(less, a == b),
                "min": lambda: z3.If(less, a, b),
                "max": lambda: z3.If(less, b, a),
            }
            return table[op]()
        if op == "shl":
            return a << b
        if op == "shr":
            return a >> b if signed else z3.LShR(a, b)
        if op in _NP:
            return _NP[op](a, b)
        raise UnsupportedIR(f"{op} of {kind} in an expression on bits")

    def _floats(self, op: str, a: Any, b: Any) -> Any:
        mode = z3.RNE()
        if op in ("add", "sub", "mul"):
            return {"add": z3.fpAdd, "sub": z3.fpSub, "mul": z3.fpMul}[op](mode, a, b)
        if op in ("min", "max"):  # of a nan and a number the number; -0 is below 0
            first = z3.fpLT(a, b) if op == "min" else z3.fpGT(a, b)
            signed = z3.fpIsNegative(a) if op == "min" else z3.fpIsPositive(a)
            equal = z3.And(z3.fpEQ(a, b), signed)
            return z3.If(z3.fpIsNaN(b), a, z3.If(z3.fpIsNaN(a), b, z3.If(z3.Or(first, equal), a, b)))
        if op in _COMPARE:
            table = {"eq": z3.fpEQ, "lt": z3.fpLT, "le": z3.fpLEQ, "gt": z3.fpGT, "ge": z3.fpGEQ}
            return z3.Not(z3.fpEQ(a, b)) if op == "ne" else table[op](a, b)
        raise UnsupportedIR(f"{op} of float32 in an expression on bits")


def resize(value: z3.BitVecRef, bits: int, signed: bool) -> z3.BitVecRef:
    """Return a bit-vector cut or extended to `bits`."""
    have = value.size()
    if have >= bits:
        return z3.Extract(bits - 1, 0, value) if have > bits else value
    return z3.SignExt(bits - have, value) if signed else z3.ZeroExt(bits - have, value)
