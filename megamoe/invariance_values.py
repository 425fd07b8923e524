"""Values that suites `invariance*` follow: data as terms, indices as Z3's."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import z3

from verify import ir
from verify.ir import UnsupportedIR
from verify.text import show

Index = Any  # z3.ArithRef or z3.BoolRef
_COMMUTES = ("add", "mul", "max", "min", "bitand", "bitor", "bitxor")


@dataclass(frozen=True)
class Term:
    """A value: an operation on values. Equal digests: one function of the same leaves."""

    digest: str
    text: str = field(compare=False)

    @classmethod
    def of(cls, op: str, *args: "Term | str | int | float") -> "Term":
        """Return the term of an operation; operands that commute are sorted."""
        parts = [a.digest if isinstance(a, Term) else repr(a) for a in args]
        if op.split(":")[0] in _COMMUTES:
            parts.sort()
        digest = hashlib.sha256("\n".join((op, *parts)).encode()).hexdigest()
        inner = ", ".join((a.text if isinstance(a, Term) else str(a))[:60] for a in args[:4])
        return cls(digest, f"{op}({inner})")


ONE = Term.of("one")


def same(a: Index, b: Index) -> bool:
    """Whether two indices are one number, whatever their symbols are."""
    gap = z3.simplify(a - b, som=True)
    return (is_number(gap) and number(gap) == 0) or proved_unsat((a != b,))


def equal(a: Index, b: Index) -> bool:
    """Whether two conditions are one."""
    return proved_unsat((a != b,))


def proved_unsat(facts: tuple[Index, ...]) -> bool:
    """Whether facts contradict each other; within a fixed budget."""
    solver = z3.Solver()
    solver.set("rlimit", 2_000_000)
    solver.add(*facts)
    return solver.check() == z3.unsat


def index_of(op: str, a: Index, b: Index) -> Index:
    """Return an operation on indices."""
    table: Mapping[str, Callable[[], Index]] = {
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "mul": lambda: a * b,
        "floordiv": lambda: a / b,
        "floormod": lambda: a % b,
        "min": lambda: z3.If(a < b, a, b),
        "max": lambda: z3.If(a < b, b, a),
        "eq": lambda: a == b,
        "ne": lambda: a != b,
        "lt": lambda: a < b,
        "le": lambda: a <= b,
        "gt": lambda: a > b,
        "ge": lambda: a >= b,
        "and": lambda: z3.And(a, b),
        "or": lambda: z3.Or(a, b),
    }
    if op in ("floordiv", "floormod") and not (is_number(b) and number(b) > 0):
        raise UnsupportedIR(f"{op} by {b}")
    if op in ("bitand", "shl", "shr", "bitor", "bitxor"):
        if is_number(a) and is_number(b):
            x, y = number(a), number(b)
            return z3.IntVal(
                {"bitand": x & y, "shl": x << y, "shr": x >> y, "bitor": x | y, "bitxor": x ^ y}[op]
            )
        return z3.Function(op, z3.IntSort(), z3.IntSort(), z3.IntSort())(a, b)
    if op not in table:
        raise UnsupportedIR(f"{op} of indices")
    return plain(table[op]())


def as_data(value: Any) -> Term:
    """Return a value as data; of indices, only numbers can be."""
    if isinstance(value, Term):
        return value
    if not is_number(value):
        raise UnsupportedIR(f"a place or a counter, {value}, in a value")
    return Term.of("const:int", number(value))


def plain(value: Any) -> Any:
    """Return an index simplified."""
    return z3.simplify(value, som=True) if z3.is_expr(value) else value


def is_number(value: Any) -> bool:
    """Whether an index is a number."""
    return z3.is_int_value(value)


def number(value: Any) -> int:
    """Return an index that is a number."""
    if not is_number(plain(value)):
        raise UnsupportedIR(f"{value} is no number")
    return plain(value).as_long()


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


def stored(statements: list[Any]) -> set[ir.Var]:
    """Return the buffers but registers that statements write."""
    found = set()
    for statement in statements:
        for node in ir.walk(statement):
            match node:
                case ir.Store(buffer=b) if b.scope not in ("local", "local.var", "global"):
                    found.add(b.data)
                case ir.Call(op="fill", args=(ir.Region(buffer=b), *_)):
                    found.add(b.data)
                case ir.Call(op="copy" | "reduce", args=(_, ir.Region(buffer=b), *_)):
                    found.add(b.data)
                case ir.Call(op="wgmma_gemm", args=(_, _, ir.Region(buffer=b), *_)):
                    found.add(b.data)
                case ir.Call(op="address_of", args=(ir.Load(buffer=b),)):
                    found.add(b.data)
    return found
