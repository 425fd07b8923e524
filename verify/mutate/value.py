"""Operators on values: stores, initial values, operands, selections, atomics."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from verify import ir
from verify.mutate.mutant import Operator
from verify.mutate.rewrite import NOTHING, own_expressions

Path = tuple[ir.Stmt, ...]
Pairs = Iterator[tuple[Any, Any]]
_OTHER = {
    "add": "sub",
    "sub": "add",
    "mul": "add",
    "max": "min",
    "min": "max",
    "bitand": "bitor",
    "bitor": "bitand",
    "shl": "shr",
    "shr": "shl",
}


def _is_constant(value: ir.Expr) -> bool:
    return isinstance(value, ir.Const) or (
        isinstance(value, ir.Broadcast) and isinstance(value.value, ir.Const)
    )


def _initial(statement: ir.Stmt, path: Path) -> Pairs:
    if isinstance(statement, ir.Store) and _is_constant(statement.value):
        yield statement, NOTHING


def _store(statement: ir.Stmt, path: Path) -> Pairs:
    if isinstance(statement, ir.Store) and not _is_constant(statement.value):
        yield statement, NOTHING


def _values(statement: ir.Stmt) -> Iterator[ir.Expr]:
    """Yield the parts of stored values that are not addresses."""
    if isinstance(statement, (ir.Store, ir.Bind)):
        yield from _below(statement.value)


def _below(node: ir.Expr) -> Iterator[ir.Expr]:
    yield node
    if not isinstance(node, (ir.Load, ir.AccessPtr)):
        for child in ir.children(node):
            yield from _below(child)


def _arms(statement: ir.Stmt, path: Path) -> Pairs:
    for node in own_expressions(statement):
        if isinstance(node, ir.Select):
            yield node, replace(node, a=node.b, b=node.a)


def _operation(statement: ir.Stmt, path: Path) -> Pairs:
    for node in _values(statement):
        if isinstance(node, ir.BinOp) and node.op in _OTHER:
            yield node, replace(node, op=_OTHER[node.op])


def _literal(statement: ir.Stmt, path: Path) -> Pairs:
    for node in _values(statement):
        if isinstance(node, ir.Const) and not isinstance(node.value, bool):
            yield node, replace(node, value=node.value + 1)


def _buffer(statement: ir.Stmt, path: Path) -> Pairs:
    """Read another buffer of the same type and size: an operand mixed up."""
    declared = {n.buffer for s in path for n in _declared(s)}
    for node in _values(statement):
        if isinstance(node, ir.Load):
            alike = [b for b in declared if b.data is not node.buffer.data and _alike(b, node.buffer)]
            for other in sorted(alike, key=lambda b: b.name)[:1]:
                yield node, replace(node, buffer=other)


def _declared(node: ir.Stmt) -> Iterator[ir.Alloc | ir.Decl]:
    if isinstance(node, ir.Seq):
        yield from (s for s in node.stmts if isinstance(s, (ir.Alloc, ir.Decl)))


def _alike(a: ir.Buffer, b: ir.Buffer) -> bool:
    sizes = [tuple(s.value for s in x.shape if isinstance(s, ir.Const)) for x in (a, b)]
    return (a.dtype, a.scope, sizes[0]) == (b.dtype, b.scope, sizes[1])


def _atomics(statement: ir.Stmt, path: Path) -> Pairs:
    """Replace an atomic addition by a load, an addition and a store."""
    match statement:
        case ir.Eval(value=ir.Call(op=op, args=(target, value, *_))) if op.startswith("atomic_add"):
            match target:
                case ir.Call(op="address_of", args=(ir.Load() as load,)):
                    total = ir.BinOp(load.dtype, "add", load, value)
                    yield statement, ir.Store(statement.span, load.buffer, load.indices, total)


OPERATORS = (
    Operator("initial_value_dropped", ("init", "refinement"), _initial),
    Operator("store_dropped", ("init", "refinement", "coverage"), _store),
    Operator("arms_swapped", ("refinement", "bounds"), _arms),
    Operator("operation_changed", ("refinement",), _operation),
    Operator("literal_changed", ("refinement", "alignment"), _literal),
    Operator("operand_mixed_up", ("refinement", "init", "race"), _buffer),
    Operator("atomic_dropped", ("race", "determinism"), _atomics),
)
