"""One mutant, and the operators that make them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from verify import ir
from verify.extract import Extracted
from verify.mutate import rewrite
from verify.text import show

Stage = Literal["device", "host"]
Edit = tuple[ir.Stmt, Any, Any]  # the statement it is in, a node of it, what takes its place


@dataclass(frozen=True)
class Mutant:
    """A kernel with one fault.

    Attributes:
        operator: that made it.
        statement: the unchanged statement that holds `old`.
        old, new: the node that is replaced, and by what; `rewrite.NOTHING` removes a statement.
    """

    operator: "Operator"
    stage: Stage
    statement: ir.Stmt
    old: Any
    new: Any

    def apply(self, extracted: Extracted) -> Extracted:
        """Return the mutated kernel; its CUDA text is still that of the original."""
        changed = rewrite.replace(getattr(extracted, self.stage), self.old, self.new)
        return replace(extracted, **{self.stage: changed})

    def diff(self) -> tuple[str, str]:
        """Return the innermost statement before and after, as text."""
        before = text(self.statement)
        if self.new is rewrite.NOTHING:
            return before, text(self.new)
        after = text(rewrite.rebuild(self.statement, lambda n: self.new if n is self.old else None))
        return before, after if after != before else f"{after} (other integer types)"


def text(node: Any) -> str:
    """Return a node on one line; of a statement that holds others, its head alone."""
    if node is rewrite.NOTHING:
        return "(removed)"
    if isinstance(node, ir.Seq):
        return "; ".join(text(s) for s in node.stmts)
    return show(node)


@dataclass(frozen=True)
class Operator:
    """A kind of fault.

    Attributes:
        name: as `--operator` takes it.
        killers: properties that should notice it, the likeliest first.
        make: statement and the statements around it -> (old, new) pairs.
        critical: removed barriers, waits, parities and guards: every one of them has to be noticed.
        stage: which IR it changes.
    """

    name: str
    killers: tuple[str, ...]
    make: Callable[[ir.Stmt, tuple[ir.Stmt, ...]], Iterator[tuple[Any, Any]]]
    critical: bool = False
    stage: Stage = "device"

    def mutants(self, extracted: Extracted) -> list[Mutant]:
        """Return every mutant of a kernel."""
        body = getattr(extracted, self.stage).body
        return [
            Mutant(self, self.stage, statement, old, new)
            for statement, path in rewrite.statements(body)
            for old, new in self.make(statement, path)
        ]


def calls(statement: ir.Stmt, *names: str) -> Iterator[ir.Call]:
    """Yield the call that `statement` evaluates, if it is one of `names`."""
    match statement:
        case ir.Eval(value=ir.Call(op=op) as call) if op in names:
            yield call


def with_arg(call: ir.Call, position: int, value: ir.Expr) -> ir.Call:
    """Return `call` with one argument replaced."""
    args = list(call.args)
    args[position] = value
    return replace(call, args=tuple(args))
