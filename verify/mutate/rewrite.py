"""Rebuilding a function with one node replaced."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from verify import ir

NOTHING = ir.Seq(None, ())  # what a removed statement leaves behind


def replace(function: ir.Function, old: Any, new: Any) -> ir.Function:
    """Return `function` with `old` (found by identity) replaced by `new`; all else is shared.

    Variables stand in many places under one identity, so `old` must not be one.
    """
    if isinstance(old, ir.Var):
        raise TypeError("a variable has no place of its own")
    return dataclasses.replace(function, body=rebuild(function.body, lambda n: new if n is old else None))


def rebuild(node: Any, change: Callable[[Any], Any]) -> Any:
    """Return `node` with every topmost node that `change` answers for replaced by the answer."""
    changed = change(node)
    if changed is not None:
        return changed
    if isinstance(node, ir.Var):
        return node
    updates = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if isinstance(value, (ir.Expr, ir.Stmt)):
            part = rebuild(value, change)
        elif isinstance(value, tuple) and value and isinstance(value[0], (ir.Expr, ir.Stmt)):
            part = tuple(rebuild(v, change) for v in value)
            if all(a is b for a, b in zip(part, value, strict=True)):
                part = value
        else:
            continue
        if part is not value:
            updates[field.name] = part
    return dataclasses.replace(node, **updates) if updates else node


Path = tuple[ir.Stmt, ...]


def statements(node: ir.Stmt, path: Path = ()) -> Iterator[tuple[ir.Stmt, Path]]:
    """Yield every statement below `node` with the statements around it, outermost first."""
    yield node, path
    for child in ir.children(node):
        if isinstance(child, ir.Stmt):
            yield from statements(child, (*path, node))


def own_expressions(statement: ir.Stmt) -> Iterator[ir.Expr]:
    """Yield the expressions of a statement that belong to no statement inside it."""
    for child in ir.children(statement):
        if isinstance(child, ir.Expr):
            yield from ir.walk(child)


def add(a: ir.Expr, amount: int) -> ir.Expr:
    """Return `a + amount`, of a's type; a vector index moves its base."""
    if isinstance(a, ir.Ramp):
        return dataclasses.replace(a, base=add(a.base, amount))
    if isinstance(a, ir.Const):
        return dataclasses.replace(a, value=int(a.value) + amount)
    op, size = ("add", amount) if amount >= 0 else ("sub", -amount)
    return ir.BinOp(a.dtype, op, a, ir.Const(a.dtype, size))
