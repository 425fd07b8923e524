"""Statements and expressions as both levels' rules take them apart and put them together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from megamoe.refine_index import is_zero, number, op
from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.inline import rewrite, same

SIGHT = "sight_"  # notes that threads share are called so, and by the tensor
_LINES = 100  # lines that one line becomes
_WARP = 32
_ROWS = 8  # of a matrix of `stmatrix`
_PACKED = 16  # bits of a half of its words

Conds = tuple[ir.Expr, ...]


def pointed(pointer: ir.Expr) -> ir.Load:
    """Return the read of the word that an atomic operation is on.

    Raises:
        UnsupportedIR: its pointer is computed.
    """
    match pointer:
        case ir.AccessPtr(data=data, element=element, offset=offset):
            view = ir.Buffer(data.name, element, (), (number(1),), "", data, number(0))
            return ir.Load(element, view, (offset,))
        case ir.Call(op="access_ptr", args=(ir.Load() as load, *_)):
            return load
    raise UnsupportedIR("an atomic operation on a computed pointer")


def orders(how: Sequence[ir.Expr]) -> list[str]:
    """Return the memory order of an atomic operation, and its scope, as text.

    Raises:
        UnsupportedIR: one is computed.
    """
    if not all(isinstance(h, ir.Const) for h in how):
        raise UnsupportedIR("an atomic operation of computed order")
    return [str(int(h.value)) for h in how if isinstance(h, ir.Const)]


def unguarded(expr: ir.Expr) -> tuple[Conds, ir.Expr]:
    """Split `x if c else 0` into the conditions and x."""
    test: Conds = ()
    while isinstance(expr, ir.Select) and is_zero(expr.b):
        test, expr = (*test, expr.cond), expr.a
    return test, expr


def inside(load: ir.Load) -> Conds:
    """Return that an element is inside its tensor."""
    bounds = zip(load.indices, load.buffer.shape, strict=True)
    return tuple(c for i, n in bounds for c in (op("le", number(0), i), op("lt", i, n)))


def is_guarded_so(path: Conds, test: Conds, outer: Conds, guard: Conds) -> bool:
    """Return whether guards are those of another read, in a place that stands under all that it stands under.

    Args:
        path: conditions around a read.
        test: its guards.
        outer: conditions around the other read.
        guard: its guards.
    """
    if len(outer) > len(path) or len(guard) != len(test):
        return False
    narrow = ((mapped(a, _narrow), mapped(b, _narrow)) for a, b in zip(guard, test, strict=True))
    return all(map(same, outer, path)) and all(same(a, b) for a, b in narrow)


def _narrow(expr: ir.Expr) -> ir.Expr | None:
    """Return an int32 that has been widened to be compared, as it was; None for others."""
    match expr:
        case ir.Cast(a=a) if expr.dtype.name == "int64" and a.dtype == ir.INT32:
            return mapped(a, _narrow)
        case ir.Const(value=value) if expr.dtype.name == "int64" and abs(int(value)) < 1 << 31:
            return ir.Const(ir.INT32, value)
    return None


def line(span: ir.Span | None, count: int) -> ir.Span | None:
    """Return a line of its own for the `count`-th of what a line becomes."""
    return replace(span, line=-_LINES * abs(span.line) - count) if span is not None and count else span


def given(conds: Conds, stmt: ir.Stmt) -> ir.Stmt:
    """Return a statement under conditions."""
    for cond in reversed(conds):
        stmt = ir.If(stmt.span, cond, stmt, None)
    return stmt


def inner(stmt: ir.Stmt) -> ir.Stmt:
    """Return what is under conditions."""
    while isinstance(stmt, ir.If):
        stmt = stmt.then
    return stmt


def parted(stmts: list[ir.Stmt]) -> list[list[ir.Stmt]]:
    """Split a loop that the compiler made: what it notes of reads, with the names for that, and the rest.

    A condition around all of the loop's body stays around both: nothing reads notes that threads share.
    """
    match stmts:
        case [ir.If(then=then, orelse=None) as whole] if not isinstance(inner(whole), ir.Store):
            parts = parted(list(then.stmts) if isinstance(then, ir.Seq) else [then])
            return [[replace(whole, then=seq(part))] for part in parts]
    sights = [s for s in stmts if isinstance(i := inner(s), ir.Store) and i.buffer.name.startswith(SIGHT)]
    rest = [s for s in stmts if s not in sights]
    return [[s for s in stmts if s in sights or isinstance(s, ir.Bind)], rest] if sights else [rest]


def seq(stmts: list[ir.Stmt]) -> ir.Stmt:
    """Return statements as one."""
    return stmts[0] if len(stmts) == 1 else ir.Seq(None, tuple(stmts))


def mapped(expr: ir.Expr, visit: Callable[[ir.Expr], ir.Expr | None]) -> ir.Expr:
    """Return `expr` with each node replaced by what `visit` returns, and kept where that is None."""

    def within(e: ir.Expr) -> ir.Expr | None:
        found = visit(e)
        if found is None and isinstance(e, ir.Region):
            return replace(e, mins=tuple(rewrite(m, within) for m in e.mins))
        return found

    return rewrite(expr, within)


def matrices(stmt: ir.Eval, call: ir.Call, thread: ir.Var) -> Iterator[ir.Stmt]:
    """Yield the stores of `stmatrix`: a thread's halves, at places that other threads of its warp name.

    Raises:
    UnsupportedIR: it stores other matrices than 8x8 of 16 bits, packed in pairs.
    """
    turned, count, target, *words = call.args
    if isinstance(words[-1], ir.Str) and words[-1].value == "m8n8":
        words.pop()
    if not (isinstance(turned, ir.Const) and isinstance(count, ir.Const) and count.value == len(words)):
        raise UnsupportedIR("stmatrix of another form")
    if not isinstance(target, ir.AccessPtr) or target.element.bits != _PACKED:
        raise UnsupportedIR("stmatrix of another form")
    first = op("mul", op("floordiv", thread, number(_WARP)), number(_WARP))
    lane = op("floormod", thread, number(_WARP))
    line, pair = op("floordiv", lane, number(4)), op("floormod", lane, number(4))
    view = ir.Buffer(target.data.name, target.element, (), (number(1),), "", target.data, number(0))
    for matrix, word in enumerate(words):
        if not isinstance(word, ir.Call) or word.op != "pack_b16":
            raise UnsupportedIR("stmatrix of another form")
        for half, value in enumerate(word.args):
            at = op("add", op("mul", pair, number(2)), number(half))
            row, column = (at, line) if turned.value else (line, at)
            names = op("add", first, op("add", number(_ROWS * matrix), row))
            start = mapped(target.offset, lambda e, names=names: names if e is thread else None)
            yield ir.Store(stmt.span, view, (op("add", start, column),), value)
