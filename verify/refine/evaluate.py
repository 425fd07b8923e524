"""ir.Expr -> Sym and Cond: integer indices and the conditions that guard accesses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import gcd

import numpy as np
import z3

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.sym import Algebra, Sym, arrays, const, z3_term

Mask = bool | np.ndarray
_NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


@dataclass(frozen=True)
class Literal:
    """`value >= 0`, `value == 0` or `value != 0` (kind ge, eq, ne), or a disjunction (kind or)."""

    kind: str
    value: "Sym | tuple[Cond, ...]"

    @property
    def key(self) -> tuple:
        """A hashable normal form."""
        if isinstance(self.value, Sym):
            return (self.kind, self.value.key)
        return (self.kind, tuple(c.key for c in self.value))


@dataclass(frozen=True)
class Cond:
    """A conjunction: a truth value per point, and literals over symbols."""

    mask: Mask = True
    literals: Mapping[tuple, Literal] = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        """A hashable normal form."""
        mask = self.mask
        if isinstance(mask, np.ndarray):
            mask = bool(mask.flat[0]) if mask.all() or not mask.any() else mask.tobytes()
        return (mask, frozenset(self.literals))

    @property
    def is_true(self) -> bool:
        """Holds at every point for all symbols."""
        return not self.literals and (self.mask is True or bool(np.all(self.mask)))

    def __and__(self, other: "Cond") -> "Cond":
        """Return the conjunction."""
        if other.mask is True and not other.literals:
            return self
        if self.mask is True and not self.literals:
            return other
        if isinstance(self.mask, np.ndarray) or isinstance(other.mask, np.ndarray):
            mask: Mask = np.logical_and(self.mask, other.mask)
        else:
            mask = self.mask and other.mask
        return Cond(mask, {**self.literals, **other.literals})

    @property
    def varies(self) -> bool:
        """It may be another condition at another point."""
        return isinstance(self.mask, np.ndarray) or any(arrays(value) for value in self.syms())

    def without_mask(self) -> "Cond":
        """Return the literals alone."""
        return replace(self, mask=True)

    def active(self, n: int) -> np.ndarray:
        """Return the mask as an array over n points."""
        return np.broadcast_to(np.asarray(self.mask, dtype=bool), (n,))

    def z3_at(self, point: int) -> z3.BoolRef:
        """Return the condition at one point."""
        parts = [literal_z3(literal, point) for literal in self.literals.values()]
        held = bool(self.mask[point]) if isinstance(self.mask, np.ndarray) else bool(self.mask)
        return z3.And(z3.BoolVal(held), *parts)

    def syms(self) -> list[Sym]:
        """Return every Sym in the literals, and masks within them as numbers; its own mask is not in it.

        They tell points apart at which the literals are another condition.
        """
        found: list[Sym] = []
        for literal in self.literals.values():
            if isinstance(literal.value, Sym):
                found.append(literal.value)
                continue
            for cond in literal.value:
                found += cond.syms()
                if isinstance(cond.mask, np.ndarray):
                    found.append(const(cond.mask.astype(np.int64)))
        return found


def literal_z3(literal: Literal, point: int) -> z3.BoolRef:
    """Return a literal at one point."""
    if not isinstance(literal.value, Sym):
        return z3.Or(*(c.z3_at(point) for c in literal.value))
    term = z3_term(literal.value, point)
    return {"ge": term >= 0, "eq": term == 0, "ne": term != 0}[literal.kind]


_ONE = const(1)


def compare(kind: str, a: Sym, b: Sym) -> Cond:
    """Return `a kind b` for lt le gt ge eq ne."""
    if kind in ("lt", "gt"):
        small, large = (a, b) if kind == "lt" else (b, a)
        return _nonnegative(large - small - _ONE)
    if kind in ("le", "ge"):
        small, large = (a, b) if kind == "le" else (b, a)
        return _nonnegative(large - small)
    difference = a - b
    low, high = difference.bounds()
    if difference.is_constant:
        equal = np.equal(difference.constant, 0)
        mask = equal if kind == "eq" else np.logical_not(equal)
        return Cond(mask if isinstance(difference.constant, np.ndarray) else bool(mask))
    if (low is not None and low > 0) or (high is not None and high < 0):
        return Cond(kind == "ne")
    flipped = -difference
    first = min((difference, flipped), key=lambda s: repr([c for _, c in s.key]))
    literal = Literal(kind, first)
    return Cond(True, {literal.key: literal})


def _nonnegative(value: Sym) -> Cond:
    if value.is_constant:
        mask = np.greater_equal(value.constant, 0)
        return Cond(mask if isinstance(value.constant, np.ndarray) else bool(mask))
    low, high = value.bounds()
    if low is not None and low >= 0:
        return Cond(True)
    if high is not None and high < 0:
        return Cond(False)
    common = 0
    for monomial, c in value.terms.items():
        if monomial:
            common = gcd(common, *(np.unique(c).tolist() if isinstance(c, np.ndarray) else [c]))
    if common > 1:  # g * s + r >= 0 iff s + r // g >= 0
        value = value.symbolic().divided(common) + const(value.constant // common)
    literal = Literal("ge", value)
    return Cond(True, {literal.key: literal})


@dataclass
class Evaluator:
    """Evaluates integer expressions at many points.

    Attributes:
        env: launch indices, loop counters, parameters.
        bound: pure names, replaced by what they stand for.
        lane: the lane coordinate of vector expressions.
        load: meaning of a buffer read inside an index.
    """

    algebra: Algebra
    env: Mapping[ir.Var, Sym]
    bound: Mapping[ir.Var, ir.Expr] = field(default_factory=dict)
    lane: Sym | None = None
    load: Callable[["Evaluator", ir.Load], Sym] | None = None
    _known: dict[int, tuple[ir.Expr, Sym]] = field(default_factory=dict, init=False, repr=False)

    def int(self, expr: ir.Expr) -> Sym:
        """Return the value of an integer expression.

        Raises:
            UnsupportedIR: an operation or variable without integer meaning here.
        """
        if isinstance(expr, ir.Const) and isinstance(expr.value, (int, bool)):
            return const(int(expr.value))
        if isinstance(expr, ir.Var) and expr in self.env:
            return self.env[expr]
        known = self._known.get(id(expr))
        if known is None:  # the expression is kept, so that its identity stays its own
            known = self._known[id(expr)] = (expr, self._int(expr))
        return known[1]

    def _int(self, expr: ir.Expr) -> Sym:
        match expr:
            case ir.Var() if expr in self.bound:
                return self.int(self.bound[expr])
            case ir.Var(name=name):
                raise UnsupportedIR(f"variable {name} in an index")
            case ir.Ramp(base=base, stride=stride):
                if self.lane is None:
                    raise UnsupportedIR("vector index outside a vector statement")
                return self.int(base) + self.int(stride) * self.lane
            case ir.Broadcast(value=value):
                return self.int(value)
            case ir.Cast(a=a):
                return self._cast(expr, self.int(a))
            case ir.Let(var=var, value=value, body=body):
                return replace(self, bound={**self.bound, var: value}).int(body)
            case ir.BinOp(op=op, a=a, b=b):
                return self._binary(op, a, b)
            case ir.Select(cond=cond, a=a, b=b):
                return self._select(cond, a, b)
            case ir.Load() if self.load is not None:
                return self.load(self, expr)
            case ir.Call(op="likely", args=(a,)):
                return self.int(a)
        raise UnsupportedIR(f"{_name(expr)} in an index")

    def cond(self, expr: ir.Expr) -> Cond:
        """Return a Boolean expression as a conjunction."""
        match expr:
            case ir.Const(value=value):
                return Cond(bool(value))
            case ir.BinOp(op="and" | "bitand", a=a, b=b) if expr.dtype.name == "bool":
                return self.cond(a) & self.cond(b)
            case ir.BinOp(op="or" | "bitor", a=a, b=b) if expr.dtype.name == "bool":
                return self._either(self.cond(a), self.cond(b))
            case ir.BinOp(op=op, a=a, b=b) if op in _NEGATED and a.dtype.is_int:
                return compare(op, self.int(a), self.int(b))
            case ir.Not(a=a):
                return self._negation(a)
            case ir.Broadcast(value=value):
                return self.cond(value)
            case ir.Call(op="likely", args=(a,)):
                return self.cond(a)
            case ir.Var() if expr in self.bound:
                return self.cond(self.bound[expr])
            case ir.Cast(a=a) if a.dtype.name == "bool":
                return self.cond(a)
        raise UnsupportedIR(f"{_name(expr)} as a condition")

    def _negation(self, expr: ir.Expr) -> Cond:
        match expr:
            case ir.BinOp(op=op, a=a, b=b) if op in _NEGATED and a.dtype.is_int:
                return compare(_NEGATED[op], self.int(a), self.int(b))
            case ir.BinOp(op="and" | "bitand", a=a, b=b) if expr.dtype.name == "bool":
                return self._either(self._negation(a), self._negation(b))
            case ir.BinOp(op="or" | "bitor", a=a, b=b) if expr.dtype.name == "bool":
                return self._negation(a) & self._negation(b)
            case ir.Not(a=a):
                return self.cond(a)
            case ir.Const(value=value):
                return Cond(not value)
        raise UnsupportedIR(f"negation of {_name(expr)}")

    def _either(self, a: Cond, b: Cond) -> Cond:
        if a.is_true or b.is_true:
            return Cond(True)
        if not a.literals and not b.literals:
            return Cond(np.logical_or(a.mask, b.mask))
        for one, other in ((a, b), (b, a)):
            if not np.any(one.mask):
                return other
        first, second = sorted((a, b), key=lambda c: repr(c.key))
        literal = Literal("or", (first, second))
        return Cond(True, {literal.key: literal})

    def _cast(self, expr: ir.Cast, value: Sym) -> Sym:
        if not expr.dtype.is_int or not expr.a.dtype.is_int:
            raise UnsupportedIR(f"cast from {expr.a.dtype} to {expr.dtype} in an index")
        low, high = value.bounds()
        least, greatest = expr.dtype.int_range
        if low is not None and high is not None and least <= low and high <= greatest:
            return value
        if expr.dtype.bits > expr.a.dtype.bits and expr.dtype.is_signed:
            return value  # a widening conversion keeps the value
        return self.algebra.call(f"wrap to {expr.dtype.name}", (value,), least, greatest)

    def _select(self, cond: ir.Expr, a: ir.Expr, b: ir.Expr) -> Sym:
        test = self.cond(cond)
        left, right = self.int(a), self.int(b)
        if left.key == right.key:
            return left
        if test.literals:
            raise UnsupportedIR("a choice on a symbolic condition in an index")
        if isinstance(test.mask, np.ndarray):
            yes = test.mask.astype(np.int64)
            return left * const(yes) + right * const(1 - yes)
        return left if test.mask else right

    def _binary(self, op: str, left: ir.Expr, right: ir.Expr) -> Sym:
        a, b = self.int(left), self.int(right)
        match op:
            case "add":
                return a + b
            case "sub":
                return a - b
            case "mul":
                return a * b
            case "min" | "max":
                return self.algebra.extremum(op, a, b)
            case "floordiv" | "floormod" | "truncdiv" | "truncmod":
                return self._division(op, a, b)
            case "shl" if b.is_constant and isinstance(b.constant, int) and b.constant >= 0:
                return a.scaled(1 << b.constant)
            case "shr" if b.is_constant and isinstance(b.constant, int) and b.constant >= 0:
                return self.algebra.floordiv(a, 1 << b.constant)
            case "bitand" | "bitor" | "bitxor":
                return self._bits(op, a, b)
        raise UnsupportedIR(f"{op} in an index")

    def _division(self, op: str, a: Sym, b: Sym) -> Sym:
        floor = op in ("floordiv", "floormod")
        if not floor and any(low is None or low < 0 for low, _ in (a.bounds(), b.bounds())):
            raise UnsupportedIR(f"{op} of or by a value that may be negative")
        divide = op.endswith("div")
        if b.is_constant and isinstance(b.constant, int) and b.constant > 0:
            return (self.algebra.floordiv if divide else self.algebra.floormod)(a, b.constant)
        return self.algebra.call("quotient" if divide else "floormod", (a, b))

    def _bits(self, op: str, a: Sym, b: Sym) -> Sym:
        if a.is_constant and b.is_constant:
            act = {"bitand": np.bitwise_and, "bitor": np.bitwise_or, "bitxor": np.bitwise_xor}[op]
            return const(act(a.constant, b.constant))
        value, mask = (b, a) if a.is_constant else (a, b)
        bits = mask.constant if mask.is_constant and isinstance(mask.constant, int) else None
        if op == "bitand" and bits is not None and bits >= 0 and bits & (bits + 1) == 0:
            return self.algebra.floormod(value, bits + 1)
        first, second = sorted((a, b), key=lambda s: repr(s.key))
        return self.algebra.call(op, (first, second))


def _name(expr: ir.Expr) -> str:
    match expr:
        case ir.BinOp(op=op) | ir.Call(op=op):
            return op
    return type(expr).__name__
