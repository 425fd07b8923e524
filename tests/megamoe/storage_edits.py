"""Edits of the IR of MegaMoE's fused kernel, of what threads do with variables, registers and outputs."""

from collections.abc import Callable
from dataclasses import replace

from megamoe.config import Config
from megamoe.instances import CONFIG
from megamoe.proofs import extracted
from tests.megamoe.role_edits import calls, plus
from tests.megamoe.test_protocol import Edit, in_expr
from verify import ir

NOTHING = ir.Seq(None, ())


def stores(node: ir.Stmt, name: str) -> bool:
    return isinstance(node, ir.Store) and node.buffer.data.name == name


def dropped(name: str) -> Edit:
    return lambda node: NOTHING if stores(node, name) else None


def twice(name: str) -> Edit:
    return lambda node: ir.Seq(None, (node, node)) if stores(node, name) else None


def on(name: str, cond: Callable[[ir.Store], ir.Expr]) -> Edit:
    """A store happens on a condition."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Store) and stores(node, name):
            return ir.If(None, cond(node), node, None)
        return None

    return edit


def moved(name: str, number: int) -> Edit:
    """A store is to an element further on."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Store) and stores(node, name):
            return replace(node, indices=tuple(further(i, number) for i in node.indices))
        return None

    return edit


def further(index: ir.Expr, number: int) -> ir.Expr:
    return (
        replace(index, base=plus(index.base, number)) if isinstance(index, ir.Ramp) else plus(index, number)
    )


def around(name: str, change: Callable[[ir.For], ir.Stmt]) -> Edit:
    """The outermost loop with stores to `name` and no barrier in it is another."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.For) or not any(
            isinstance(n, ir.Store) and stores(n, name) for n in ir.walk(node)
        ):
            return None
        return change(node) if not any(_syncs(n) for n in ir.walk(node)) else None

    return edit


def _syncs(node: object) -> bool:
    return isinstance(node, ir.Call) and node.op in ("tvm_storage_sync", "mbarrier_wait_parity")


def shorter(loop: ir.For) -> ir.Stmt:
    return replace(loop, extent=plus(loop.extent, -1))


def longer(loop: ir.For) -> ir.Stmt:
    return replace(loop, extent=plus(loop.extent, 1))


def begun_late(loop: ir.For) -> ir.Stmt:
    return replace(loop, start=plus(loop.start, 1))


def thread(config: Config = CONFIG) -> ir.Var:
    body = extracted(config).device.body
    return next(n.var for n in ir.walk(body) if isinstance(n, ir.Launch) and n.tag == "threadIdx.x")


def below(number: int) -> Callable[[ir.Store], ir.Expr]:
    """That a thread's number is below another."""
    return lambda node: ir.BinOp(ir.BOOL, "lt", thread(), ir.Const(thread().dtype, number))


def by_one_thread(name: str) -> Edit:
    """All threads store where the first one does."""
    var = thread()

    def first(node: ir.Expr) -> ir.Expr | None:
        return ir.Const(var.dtype, 0) if node is var else None

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Store) and stores(node, name):
            return replace(node, indices=tuple(in_expr(i, first) for i in node.indices))
        return None

    return edit


def chosen(node: ir.Store) -> ir.Expr:
    """That something of the data is so."""
    body = extracted(CONFIG).device.body
    load = next(n for n in ir.walk(body) if isinstance(n, ir.Load) and n.buffer.data.name == "topk_idx")
    zero = ir.Const(load.dtype, 0)
    return ir.BinOp(ir.BOOL, "le", zero, replace(load, indices=(zero,)))


def behind_next(name: str) -> Edit:
    """A store comes behind the statement that follows the one it is in."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.Seq):
            return None
        stmts = list(node.stmts)
        for i, stmt in enumerate(stmts[:-1]):
            if stores(stmt, name):
                return ir.Seq(node.span, (*stmts[:i], stmts[i + 1], stmt, *stmts[i + 2 :]))
        return None

    return edit


def unmasked(node: ir.Stmt) -> ir.Stmt | None:
    """What a slot without an expert has in the combine buffers is added, too."""

    def always(inner: ir.Expr) -> ir.Expr | None:
        return inner.a if isinstance(inner, ir.Select) else None

    if isinstance(node, ir.Store) and stores(node, "total") and not isinstance(node.value, ir.Const):
        return replace(node, value=in_expr(node.value, always))
    return None


def mask_of(number: int) -> Edit:
    """Whether a slot is added is looked up in another element."""

    def changed(inner: ir.Expr) -> ir.Expr | None:
        if not isinstance(inner, ir.Load) or inner.buffer.data.name != "topk_idx":
            return None
        return replace(inner, indices=tuple(further(i, number) for i in inner.indices))

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Store) and stores(node, "total") and not isinstance(node.value, ir.Const):
            return replace(node, value=in_expr(node.value, changed))
        return None

    return edit


def pending(groups: int) -> Edit:
    """Waits for the tensor core leave one group more out."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.Eval) or not calls(node, "wait_wgmma"):
            return None
        assert isinstance(node.value, ir.Call)
        return replace(node, value=replace(node.value, args=(ir.Const(ir.INT32, groups),)))

    return edit


def one_array(node: ir.Stmt) -> ir.Stmt | None:
    """Both halves' codes are widened to the registers of the first."""
    if not isinstance(node, ir.Eval) or not any(
        isinstance(n, ir.Load) and n.buffer.data.name == "wide_b" for n in ir.walk(node)
    ):
        return None
    body = extracted(CONFIG).device.body
    first = next(n.buffer for n in ir.walk(body) if isinstance(n, ir.Decl) and n.buffer.data.name == "wide_a")

    def changed(inner: ir.Expr) -> ir.Expr | None:
        is_second = isinstance(inner, ir.Load) and inner.buffer.data.name == "wide_b"
        return replace(inner, buffer=first) if is_second else None

    return replace(node, value=in_expr(node.value, changed))


def in_pointer(op: str, array: str, number: int) -> Edit:
    """A call's pointer to a shared buffer is further on."""

    def changed(inner: ir.Expr) -> ir.Expr | None:
        if isinstance(inner, ir.AccessPtr) and inner.data.name == array:
            return replace(inner, offset=plus(inner.offset, number))
        return None

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.Eval) or not calls(node, op):
            return None
        new = in_expr(node.value, changed)
        same = all(a is b for a, b in zip(ir.walk(new), ir.walk(node.value), strict=False))
        return None if same else replace(node, value=new)

    return edit


def without_pointer(op: str, array: str) -> Edit:
    """A call with a pointer to a shared buffer is left out."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        named = (isinstance(n, ir.AccessPtr) and n.data.name == array for n in ir.walk(node))
        return NOTHING if isinstance(node, ir.Eval) and calls(node, op) and any(named) else None

    return edit
