"""Values that suites `invariance*` follow: data as terms; indices as integers, or as terms of Z3's."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import z3

from verify import ir
from verify.ir import UnsupportedIR
from verify.text import show

Index = Any  # int | bool | z3.ArithRef | z3.BoolRef
_COMMUTES = ("add", "mul", "max", "min", "bitand", "bitor", "bitxor")


@dataclass(frozen=True)
class Term:
    """A value: an operation on values. Equal digests: one function of the same leaves.

    Attributes:
        rows: of which rows the leaves are, where a claim looks that up; else none.
    """

    digest: str
    text: str = field(compare=False)
    rows: frozenset[int] = field(default=frozenset(), compare=False)

    @classmethod
    def of(cls, op: str, *args: "Term | str | int | float") -> "Term":
        """Return the term of an operation; operands that commute are sorted."""
        parts = [a.digest if isinstance(a, Term) else repr(a) for a in args]
        if op.split(":")[0] in _COMMUTES:
            parts.sort()
        digest = hashlib.sha256("\n".join((op, *parts)).encode()).hexdigest()
        inner = ", ".join((a.text if isinstance(a, Term) else str(a))[:60] for a in args[:4])
        rows = [a.rows for a in args if isinstance(a, Term) and a.rows]
        return cls(digest, f"{op}({inner})", frozenset().union(*rows))


ONE = Term.of("one")


# Of two numbers; of a number and a term, or two terms.
_OPERATIONS: Mapping[str, tuple[Callable[[int, int], Index], Callable[[Index, Index], Index]]] = {
    "add": (lambda a, b: a + b, lambda a, b: a + b),
    "sub": (lambda a, b: a - b, lambda a, b: a - b),
    "mul": (lambda a, b: a * b, lambda a, b: a * b),
    "floordiv": (lambda a, b: a // b, lambda a, b: a / b),
    "floormod": (lambda a, b: a % b, lambda a, b: a % b),
    "min": (min, lambda a, b: z3.If(a < b, a, b)),
    "max": (max, lambda a, b: z3.If(a < b, b, a)),
    "eq": (lambda a, b: a == b, lambda a, b: a == b),
    "ne": (lambda a, b: a != b, lambda a, b: a != b),
    "lt": (lambda a, b: a < b, lambda a, b: a < b),
    "le": (lambda a, b: a <= b, lambda a, b: a <= b),
    "gt": (lambda a, b: a > b, lambda a, b: a > b),
    "ge": (lambda a, b: a >= b, lambda a, b: a >= b),
    "and": (lambda a, b: bool(a and b), z3.And),
    "or": (lambda a, b: bool(a or b), z3.Or),
    **{
        op: (of_two, z3.Function(op, z3.IntSort(), z3.IntSort(), z3.IntSort()))
        for op, of_two in (
            ("bitand", lambda a, b: a & b),
            ("bitor", lambda a, b: a | b),
            ("bitxor", lambda a, b: a ^ b),
            ("shl", lambda a, b: a << b),
            ("shr", lambda a, b: a >> b),
        )
    },
}


def index_of(op: str, a: Index, b: Index) -> Index:
    """Return an operation on indices; of numbers it is a number."""
    if op in ("floordiv", "floormod") and not (is_number(b) and b > 0):
        raise UnsupportedIR(f"{op} by {b}")
    if op not in _OPERATIONS:
        raise UnsupportedIR(f"{op} of indices")
    of_numbers, of_terms = _OPERATIONS[op]
    if isinstance(a, int) and isinstance(b, int):
        return of_numbers(a, b)
    if op in ("add", "sub") and is_number(b) and b == 0:
        return a
    if op == "add" and is_number(a) and a == 0:
        return b
    return of_terms(a, b)


def is_index(value: Any) -> bool:
    """Whether a value is an index or a condition on indices."""
    return isinstance(value, int) or z3.is_expr(value)


def is_number(value: Any) -> bool:
    """Whether an index is a number."""
    return isinstance(value, int) and not isinstance(value, bool)


def key_of(index: Index) -> int | str:
    """Return what is the same for equal expressions alone, as long as they are there."""
    return index if isinstance(index, int) else f"#{index.get_id()}"


def is_zero(node: ir.Expr) -> bool:
    """Whether an expression is the literal 0."""
    return isinstance(node, ir.Const) and node.value == 0


def const(node: ir.Expr) -> int:
    """Return a literal."""
    if not isinstance(node, ir.Const):
        raise UnsupportedIR(f"{show(node)} is no number")
    return int(node.value)


def whole(region: ir.Region) -> None:
    """Check that a region is all of its buffer."""
    shape = [const(e) for e in region.buffer.shape]
    if [const(e) for e in region.extents] != shape or not all(map(is_zero, region.mins)):
        raise UnsupportedIR(f"a part of {region.buffer.name}")


def digits(extents: list[int]) -> Iterator[tuple[int, ...]]:
    """Yield all combinations of numbers below some extents."""
    if not extents:
        yield ()
        return
    for first in range(extents[0]):
        for rest in digits(extents[1:]):
            yield (first, *rest)


REGISTERS = ("local", "local.var")  # scopes of what is a thread's own


def registers_of(statement: Any) -> set[ir.Var]:
    """Return a thread's own arrays that a statement may write."""
    found = set()
    for node in ir.walk(statement):
        match node:
            case ir.Store(buffer=b) | ir.Call(op="address_of", args=(ir.Load(buffer=b), *_)):
                if b.scope in REGISTERS:
                    found.add(b.data)
    return found


def stored(statements: list[Any]) -> set[ir.Var]:
    """Return the buffers but registers that statements write."""
    found = set()
    for statement in statements:
        for node in ir.walk(statement):
            match node:
                case ir.Store(buffer=b) if b.scope not in (*REGISTERS, "global"):
                    found.add(b.data)
                case ir.Call(op="fill", args=(ir.Region(buffer=b), *_)):
                    found.add(b.data)
                case ir.Call(op="copy" | "reduce", args=(_, ir.Region(buffer=b), *_)):
                    found.add(b.data)
                case ir.Call(op="wgmma_gemm", args=(_, _, ir.Region(buffer=b), *_)):
                    found.add(b.data)
                case ir.Call(op="address_of", args=(ir.Load(buffer=b),)) if b.scope not in REGISTERS:
                    found.add(b.data)
    return found
