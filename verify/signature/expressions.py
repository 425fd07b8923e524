"""Expressions as terms: integers without data by index arithmetic, all else as it stands."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.evaluate import Evaluator
from verify.signature.program import Place
from verify.signature.state import State
from verify.signature.terms import Term, wrapped

_NO_BITS = frozenset({"likely", "type_annotation", "ignore_loop_partition"})


@dataclass
class Expressions:
    """Evaluates expressions.

    Attributes:
        load: the value of a read.
    """

    state: State
    load: Callable[[ir.Load, Evaluator, Place], Term]
    _plains: dict[int, tuple[ir.Expr, bool]] = field(default_factory=dict)

    def value(self, expr: ir.Expr, evaluator: Evaluator, place: Place) -> Term:
        """Return the value of an expression at `place`.

        Raises:
            UnsupportedIR: an operation that is not understood.
        """
        if self._is_plain(expr):
            plain = self._plain(expr, evaluator)
            if plain is not None:
                return plain
        match expr:
            case ir.Const(value=value):
                return self.state.terms.const(value, expr.dtype)
            case ir.Broadcast(value=value):
                return self.value(value, evaluator, place)
            case ir.Load():
                return self.load(expr, evaluator, place)
            case ir.Cast(a=a):
                return self._cast(expr.dtype, self.value(a, evaluator, place))
            case ir.BinOp(op=op, a=a, b=b):
                left, right = self.value(a, evaluator, place), self.value(b, evaluator, place)
                return self.state.terms.binary(op, expr.dtype, left, right)
            case ir.Not(a=a):
                return self.state.terms.make("not", expr.dtype, self.value(a, evaluator, place))
            case ir.Select(cond=cond, a=a, b=b):
                return self._select(expr, cond, a, b, evaluator, place)
            case ir.Call(op=op, args=(a,)) if op in _NO_BITS:
                return self.value(a, evaluator, place)
            case ir.Call(op=op, args=args):
                if op.startswith("atomic") or any(isinstance(a, (ir.Region, ir.AccessPtr)) for a in args):
                    raise UnsupportedIR(f"{op} in a value")
                parts = tuple(
                    a.value if isinstance(a, ir.Str) else self.value(a, evaluator, place) for a in args
                )
                return self.state.terms.make(op, expr.dtype, *parts)
        raise UnsupportedIR(f"{type(expr).__name__} in a value")

    def _is_plain(self, expr: ir.Expr) -> bool:
        """Return whether no data takes part in an integer."""
        known = self._plains.get(id(expr))
        if known is None:
            plain = expr.dtype.is_int and not any(isinstance(e, (ir.Load, ir.Call)) for e in ir.walk(expr))
            known = self._plains[id(expr)] = (expr, plain)
        return known[1]

    def _plain(self, expr: ir.Expr, evaluator: Evaluator) -> Term | None:
        """Return an integer without data; None where it is no index arithmetic."""
        try:
            if expr.dtype.name == "bool":
                value = self.state.holds(evaluator.cond(expr))
                return None if value is None else self.state.terms.const(value, expr.dtype)
            return self.state.terms.index(evaluator.int(expr), expr.dtype)
        except UnsupportedIR:
            return None

    def _cast(self, dtype: ir.DType, value: Term) -> Term:
        if value.dtype == dtype:
            return value
        if value.op == "const" and dtype.is_int and value.dtype.is_int:
            return self.state.terms.const(wrapped(value.args[0], dtype), dtype)
        if value.op == "const" and dtype.name == "float32":
            number = float.fromhex(value.args[0]) if not value.dtype.is_int else float(value.args[0])
            if _is_float32(number):
                return self.state.terms.const(number, dtype)
        return self.state.terms.make("cast", dtype, value)

    def _select(
        self, expr: ir.Expr, cond: ir.Expr, a: ir.Expr, b: ir.Expr, evaluator: Evaluator, place: Place
    ) -> Term:
        test = self.value(cond, evaluator, place)
        value = truth_of(test)
        if value is not None:
            return self.value(a if value else b, evaluator, place)
        yes, no = self.value(a, evaluator, place), self.value(b, evaluator, place)
        return yes if yes is no else self.state.terms.make("select", expr.dtype, test, yes, no)


def truth_of(term: Term) -> bool | None:
    """Return the value of a literal condition."""
    return bool(term.args[0]) if term.op == "const" else None


def _is_float32(value: float) -> bool:
    return float(np.float32(value)) == value or value != value
