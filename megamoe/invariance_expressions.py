"""Expressions of the fused kernel's tile IR as values, element by element; what is known at a place.

Integers that say where something is are indices; data are `Term`s. A buffer holds a function of its indices,
which is evaluated where an element is read. A read of what others have filled (a stage, the product that is
handed over, the plan's tensors) is a leaf that `Leaves` names, once its indices are those of the element that
is followed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol

import z3

from megamoe.invariance_checks import Checks
from megamoe.invariance_values import ONE, REGISTERS, Index, Term, index_of, is_index, is_number, key_of
from verify import ir
from verify.ir import UnsupportedIR


class Leaves(Protocol):
    """What a claim knows of reads of what is not computed in the piece that is followed."""

    checks: Checks
    awaited: str  # barriers of the places that are read

    def read(self, name: str, at: tuple[Index, ...]) -> "Term | Index | None":
        """Return a leaf; None: the read has no meaning here."""

    def choice(self, cond: Index) -> Term | None:
        """Return the leaf of a condition that the plan decides; None: none is known."""

    def begin(self, name: str, indices: tuple[Index, ...], conditions: tuple[Index, ...]) -> None:
        """Take note of the element of an output whose value is followed next."""


Element = Callable[[tuple[Index, ...]], Any]


@dataclass(frozen=True)
class State:
    """What is known at a place of a piece.

    Attributes:
        names: values of variables.
        registers: by buffer and index.
        unknown: which value those of a buffer have that are not known: one for each place that may have
            written them since the piece began.
        buffers: elements.
        conditions: under which the place is.
    """

    names: Mapping[ir.Var, Any] = field(default_factory=dict)
    registers: Mapping[tuple[ir.Var, int], Any] = field(default_factory=dict)
    unknown: Mapping[ir.Var, int] = field(default_factory=dict)
    buffers: Mapping[ir.Var, Element] = field(default_factory=dict)
    conditions: tuple[Index, ...] = ()

    def named(self, names: Mapping[ir.Var, Any]) -> "State":
        """Return the same with values of some variables."""
        return replace(self, names={**self.names, **names})

    def holding(self, buffers: Mapping[ir.Var, Element]) -> "State":
        """Return the same with elements of some buffers."""
        return replace(self, buffers={**self.buffers, **buffers})


class Values:
    """Evaluates the expressions of one piece."""

    def __init__(self, leaves: Leaves, cta: ir.Var, assumed: tuple[Index, ...]) -> None:
        """Begin; `cta` is the launch's index."""
        self.leaves, self.cta, self.assumed = leaves, cta, assumed
        # Of a fold's round: the element that is evaluated, by its buffer and indices; the innermost is last.
        self.asked: list[tuple[ir.Var, tuple[Index, ...]]] = []
        self._numbers = 0
        self._outside: dict[ir.Var, z3.ArithRef] = {}
        self._names: dict[str, list[ir.Var]] = {}  # of registers: buffers by name

    def value(self, node: ir.Expr, state: State) -> Any:
        """Return an expression's value: a Term of data, or an index.

        Raises:
            UnsupportedIR: it has no meaning here.
        """
        match node:
            case ir.Const(value=value, dtype=dtype):
                if dtype.name == "bool":
                    return bool(value)
                return int(value) if dtype.is_int else Term.of(f"const:{dtype}", repr(float(value)))
            case ir.Var():
                return z3.Int("bx") if node is self.cta else self._variable(node, state)
            case ir.Let(var=var, value=value, body=body):
                return self.value(body, state.named({var: self.value(value, state)}))
            case ir.Load(buffer=buffer, indices=indices):
                return self._load(buffer, tuple(self.value(i, state) for i in indices), state)
            case ir.Cast(a=a, dtype=dtype):
                inner = self.value(a, state)
                if is_index(inner):
                    if not dtype.is_int:
                        raise UnsupportedIR(f"{dtype} of an index")
                    return inner
                return inner if dtype == a.dtype else Term.of(f"cast:{a.dtype}:{dtype}", inner)
            case ir.Not(a=a):
                inner = self.value(a, state)
                if isinstance(inner, Term):
                    return Term.of("not", inner)
                return z3.Not(inner) if z3.is_expr(inner) else not inner
            case ir.Select(cond=cond, a=a, b=b):
                return self._select(self.value(cond, state), a, b, state)
            case ir.BinOp(op=op, a=a, b=b, dtype=dtype):
                left, right = self.value(a, state), self.value(b, state)
                if is_index(left) and is_index(right):
                    return index_of(op, left, right)
                left, right = self.data(left), self.data(right)
                if op == "mul" and ONE in (left, right):
                    return left if right == ONE else right
                kind = op if a.dtype.is_int or op in ("add", "mul") else f"float {op}"
                return Term.of(f"{kind}:{a.dtype}:{dtype}", left, right)
            case ir.Call(op=op, args=args, dtype=dtype):
                parts = [a.value if isinstance(a, ir.Str) else self.data(self.value(a, state)) for a in args]
                return Term.of(f"call {op}:{dtype}", *parts)
        raise UnsupportedIR(f"expression {type(node).__name__}")

    def data(self, value: Any) -> Term:
        """Return a value as data; of indices, only numbers can be.

        Raises:
            UnsupportedIR: a place, a rank or a counter is in it.
        """
        if isinstance(value, Term):
            return value
        return Term.of("const:int", self.leaves.checks.number("what is computed with", value, self.assumed))

    def decide(self, cond: Index) -> bool | None:
        """Return whether a condition holds, if what is assumed decides it."""
        return self.leaves.checks.decided("a condition", cond, self.assumed)

    def leaf(self, name: str, at: tuple[Index, ...]) -> Any:
        """Return what a read of something that is not computed here is.

        Raises:
            UnsupportedIR: it has no meaning here.
        """
        found = self.leaves.read(name, at)
        if found is None:
            raise UnsupportedIR(f"a read of {name}[{', '.join(map(str, at))}]")
        return found

    def fresh(self, name: str) -> z3.ArithRef:
        """Return a number of which nothing is known."""
        return z3.Int(f"{name}#{self.next()}")

    def next(self) -> int:
        """Return a number that none was before."""
        self._numbers += 1
        return self._numbers

    def remembered(self, element: Element) -> Element:
        """Return the same function, evaluated once at each place, for each element that is asked for."""
        found: dict[tuple[Any, ...], tuple[tuple[Index, ...], Any]] = {}

        def read(indices: tuple[Index, ...]) -> Any:
            asked = self.asked[-1] if self.asked else (None, ())
            key = (asked[0], *map(key_of, asked[1]), *map(key_of, indices))
            if key not in found:
                # The indices are kept, so that their keys stay theirs.
                found[key] = (*asked[1], *indices), element(indices)
            return found[key][1]

        return read

    def _variable(self, node: ir.Var, state: State) -> Any:
        if node in state.names:
            return state.names[node]
        if node not in self._outside:
            self._outside[node] = z3.Int(f"{node.name}@{len(self._outside)}")
        return self._outside[node]

    def _select(self, cond: Any, a: ir.Expr, b: ir.Expr, state: State) -> Any:
        if is_index(cond):
            known = self.decide(cond)
            if known is not None:
                return self.value(a if known else b, state)
            named = self.leaves.choice(cond)
            if named is None:
                left, right = self.value(a, state), self.value(b, state)
                if is_index(left) and is_index(right):
                    return z3.If(cond, left, right)
                raise UnsupportedIR(f"a choice by {cond}")
            cond = named
        return Term.of("select", cond, self.data(self.value(a, state)), self.data(self.value(b, state)))

    def _load(self, buffer: ir.Buffer, at: tuple[Index, ...], state: State) -> Any:
        if buffer.data in state.buffers:
            return state.buffers[buffer.data](at)
        if buffer.scope in REGISTERS and len(at) == 1 and is_number(at[0]):
            if (buffer.data, at[0]) in state.registers:
                return state.registers[buffer.data, at[0]]
            if buffer.dtype.is_int:
                return self._unknown(buffer, at[0], state)
        return self.leaf(buffer.name, at)

    def _unknown(self, buffer: ir.Buffer, index: int, state: State) -> z3.ArithRef:
        """Return the value that a register has, as a symbol: `name[index]` as the piece begins."""
        named = self._names.setdefault(buffer.name, [])
        if buffer.data not in named:
            named.append(buffer.data)
        which, since = named.index(buffer.data), state.unknown.get(buffer.data, 0)
        return z3.Int(f"{buffer.name}[{index}]" + f"~{which}" * (which > 0) + f"'{since}" * (since > 0))


def lost(name: str) -> Element:
    """Return the elements of a buffer whose contents are not known: none may be read."""

    def element(indices: tuple[Index, ...]) -> NoReturn:
        raise UnsupportedIR(f"a read of {name}[{', '.join(map(str, indices))}], which may have been written")

    return element


def without(data: Iterable[ir.Var]) -> dict[ir.Var, Element]:
    """Return buffers whose contents are not known."""
    return {each: lost(each.name) for each in data}
