"""Edits of a kernel's parsed device IR: what a compiler or an author may get wrong about mbarriers."""

from collections.abc import Callable
from typing import Any

from tests.verify import samples
from verify import extract, ir

Edit = Callable[[ir.Stmt], ir.Stmt | None]


def edited(prim_func: Any, edit: Edit) -> extract.Extracted:
    """Return the kernel with each statement of its device IR replaced by `edit` of it; None keeps it."""
    extracted = samples.extracted(prim_func)
    changed = [0]

    def visit(node: ir.Stmt) -> ir.Stmt:
        new = edit(node)
        if new is not None:
            changed[0] += 1
            return new
        match node:
            case ir.Seq(stmts=stmts):
                node.stmts = tuple(visit(s) for s in stmts)
            case ir.If(then=then, orelse=orelse):
                node.then = visit(then)
                node.orelse = None if orelse is None else visit(orelse)
            case ir.For() | ir.While() | ir.Launch() | ir.Assume() | ir.Attr() | ir.Block():
                node.body = visit(node.body)
            case _:
                pass
        return node

    extracted.device.body = visit(extracted.device.body)
    assert changed[0], "the edit changed nothing"
    return extracted


def nothing() -> ir.Stmt:
    """Return a statement without effect."""
    return ir.Seq(None, ())


def call_of(node: ir.Stmt, op: str) -> ir.Call | None:
    """Return the call that `node` evaluates, if its name is `op`."""
    match node:
        case ir.Eval(value=ir.Call(op=name) as call) if name == op:
            return call
    return None


def dropped(op: str, number: int) -> Edit:
    """Drop the call `op` that comes after `number` others."""
    seen = [0]

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if call_of(node, op) is None:
            return None
        seen[0] += 1
        return nothing() if seen[0] == number + 1 else None

    return edit


def with_argument(op: str, number: int, at: int, change: Callable[[ir.Expr], ir.Expr]) -> Edit:
    """Change argument `at` of the call `op` that comes after `number` others."""
    seen = [0]

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        call = call_of(node, op)
        if call is None:
            return None
        seen[0] += 1
        if seen[0] != number + 1:
            return None
        args = list(call.args)
        args[at] = change(args[at])
        return ir.Eval(node.span, ir.Call(call.dtype, call.op, tuple(args), call.annotations))

    return edit


def shifted(by: int) -> Callable[[ir.Expr], ir.Expr]:
    """Add a constant to an expression."""
    return lambda e: ir.BinOp(e.dtype, "add", e, ir.Const(e.dtype, by))


def unflipped(expr: ir.Expr) -> ir.Expr:
    """Return `x` of `x ^ 1`."""
    match expr:
        case ir.BinOp(op="bitxor", a=a):
            return a
    raise AssertionError(f"no exclusive or: {expr}")


def fewer_rounds(number: int, by: int = 1) -> Edit:
    """Let the serial loop that comes after `number` others go round less."""
    seen = [0]

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.For) or node.kind != "serial":
            return None
        seen[0] += 1
        if seen[0] == number + 1:
            extent = ir.BinOp(node.extent.dtype, "sub", node.extent, ir.Const(node.extent.dtype, by))
            return ir.For(node.span, node.var, node.start, extent, node.kind, node.body, node.annotations)
        return None

    return edit


def replaced(expr: Any, change: Callable[[Any], Any]) -> Any:
    """Rebuild an expression with `change` tried at each node, outer ones first; None keeps it."""
    new = change(expr)
    if new is not None:
        return new
    match expr:
        case ir.BinOp(dtype=dtype, op=op, a=a, b=b):
            return ir.BinOp(dtype, op, replaced(a, change), replaced(b, change))
        case ir.Cast(dtype=dtype, a=a):
            return ir.Cast(dtype, replaced(a, change))
        case ir.Load(dtype=dtype, buffer=buffer, indices=indices):
            return ir.Load(dtype, buffer, tuple(replaced(i, change) for i in indices))
        case ir.Call(dtype=dtype, op=op, args=args, annotations=annotations):
            return ir.Call(dtype, op, tuple(replaced(a, change) for a in args), annotations)
        case _:
            return expr


def every_call(ops: tuple[str, ...], change: Callable[[Any], Any]) -> Edit:
    """Rebuild the calls `ops` by `replaced`, except where that changes nothing."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        match node:
            case ir.Eval(value=ir.Call(op=op) as call) if op in ops:
                hit = [False]

                def marked(expr: Any) -> Any:
                    new = change(expr)
                    hit[0] |= new is not None
                    return new

                rebuilt = replaced(call, marked)
                return ir.Eval(node.span, rebuilt) if hit[0] else None
        return None

    return edit
