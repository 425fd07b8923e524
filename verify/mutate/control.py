"""Operators on control: guards, roles, loops, launches."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from verify import ir
from verify.mutate.mutant import Operator, with_arg
from verify.mutate.rewrite import add, own_expressions
from verify.mutate.sync import WARP_THREADS, is_election

Path = tuple[ir.Stmt, ...]
Pairs = Iterator[tuple[Any, Any]]
_WEAKER = {"lt": "le", "gt": "ge", "le": "lt", "ge": "gt", "eq": "ne", "ne": "eq"}


def guards(statement: ir.Stmt) -> Iterator[ir.Expr]:
    """Yield the conditions of a statement: of branches, and of values that may not be read."""
    yield from (holder.cond for holder in _guarded(statement))


def _guarded(statement: ir.Stmt) -> Iterator[ir.If | ir.While | ir.Select]:
    if isinstance(statement, (ir.If, ir.While)) and not is_election(statement.cond):
        yield statement
    for node in own_expressions(statement):
        if isinstance(node, ir.Select) and node.lazy:
            yield node


def _is_role(cond: ir.Expr, path: Path) -> bool:
    """Return whether a condition asks only which thread runs, as between producer and consumer."""
    threads = {s.var for s in path if isinstance(s, ir.Launch) and s.tag.startswith("threadIdx")}
    names = {n for n in ir.walk(cond) if isinstance(n, ir.Var)}
    return bool(names) and names <= threads


def _dropped(statement: ir.Stmt, path: Path) -> Pairs:
    if isinstance(statement, ir.If) and not is_election(statement.cond):
        yield statement, statement.then
    for node in own_expressions(statement):
        if isinstance(node, ir.Select) and node.lazy:
            yield node, node.a


def _weakened(statement: ir.Stmt, path: Path) -> Pairs:
    for cond in guards(statement):
        for node in ir.walk(cond):
            if isinstance(node, ir.BinOp) and node.op in _WEAKER and not _is_role(node, path):
                yield node, replace(node, op=_WEAKER[node.op])


def _negated(statement: ir.Stmt, path: Path) -> Pairs:
    for holder in _guarded(statement):
        cond = holder.cond
        negated = ir.Not(cond.dtype, cond)
        if isinstance(cond, ir.Var):  # a variable has no place of its own
            yield holder, replace(holder, cond=negated)
        else:
            yield cond, negated


def _role(statement: ir.Stmt, path: Path) -> Pairs:
    for cond in guards(statement):
        for node in ir.walk(cond):
            if isinstance(node, ir.BinOp) and node.op in _WEAKER and _is_role(node, path):
                for step in (WARP_THREADS, -WARP_THREADS):
                    yield node, replace(node, b=add(node.b, step))


def _extent(step: int):
    def make(statement: ir.Stmt, path: Path) -> Pairs:
        if isinstance(statement, ir.For):
            yield statement, replace(statement, extent=add(statement.extent, step))

    return make


def _start(statement: ir.Stmt, path: Path) -> Pairs:
    if isinstance(statement, ir.For):
        yield (
            statement,
            replace(statement, start=add(statement.start, 1), extent=add(statement.extent, -1)),
        )


def _trips(statement: ir.Stmt, path: Path) -> Pairs:
    """Take a loop's length from a size of the call, as a split chosen by the batch would."""
    if not isinstance(statement, ir.For) or statement.kind != "serial":
        return
    sizes = [n for s in path if isinstance(s, ir.Launch) for n in ir.walk(s.extent) if isinstance(n, ir.Var)]
    for size in dict.fromkeys(sizes):
        yield (
            statement,
            replace(statement, extent=ir.BinOp(statement.extent.dtype, "min", statement.extent, size)),
        )


def _grid(statement: ir.Stmt, path: Path) -> Pairs:
    """Launch one block or thread too few or too many: the last arguments of the host's launch."""
    for node in own_expressions(statement):
        match node:
            case ir.Call(op="tvm_call_packed", args=(ir.Str(value=name), *_)) if not name.startswith("__"):
                for position, arg in enumerate(node.args[1:], 1):
                    inner = arg.a if isinstance(arg, ir.Cast) else arg
                    if isinstance(inner, (ir.BinOp, ir.Const)) and arg.dtype.is_int:
                        for step in (1, -1):
                            yield node, with_arg(node, position, add(arg, step))


OPERATORS = (
    Operator("guard_dropped", ("bounds", "coverage", "mbarrier", "refinement"), _dropped, critical=True),
    Operator("guard_weakened", ("refinement", "bounds", "coverage"), _weakened, critical=True),
    Operator("guard_negated", ("bounds", "coverage", "refinement"), _negated, critical=True),
    Operator("role_shifted", ("refinement", "coverage", "bounds", "barrier", "init", "race"), _role),
    Operator("extent_plus_1", ("refinement", "bounds", "mbarrier"), _extent(1)),
    Operator("extent_minus_1", ("refinement", "coverage", "mbarrier"), _extent(-1)),
    Operator("first_round_skipped", ("refinement", "coverage", "mbarrier"), _start),
    Operator("trips_from_batch", ("mbarrier", "refinement", "batch_invariance"), _trips),
    Operator("launch_changed", ("alignment", "bounds", "coverage"), _grid, stage="host"),
)
