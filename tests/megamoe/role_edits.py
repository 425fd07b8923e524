"""Edits of the IR of MegaMoE's kernels, mostly of what roles do with shared memory and mbarriers."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeGuard, TypeVar

from megamoe.instances import CONFIG, WIDE
from megamoe.proofs import extracted
from tests.megamoe.test_protocol import Edit, edited, mbarrier_calls
from verify import ir

Access = TypeVar("Access", ir.Load, ir.Store)
WAIT, ARRIVE, EXPECT = "mbarrier_wait_parity", "ptx_arrive_barrier", "ptx_arrive_barrier_expect_tx"


def in_call(op: str, array: str, change: Callable[[ir.Call], ir.Call]) -> Edit:
    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not mbarrier_calls(node, op, array):
            return None
        assert isinstance(node, ir.Eval)
        assert isinstance(node.value, ir.Call)
        return replace(node, value=change(node.value))

    return edit


def next_place(call: ir.Call) -> ir.Call:
    load = call.args[0]
    assert isinstance(load, ir.Load)
    (index,) = load.indices
    return replace(call, args=(replace(load, indices=(plus(index, 1),)), *call.args[1:]))


def more_bytes(call: ir.Call) -> ir.Call:
    return replace(call, args=(call.args[0], plus(call.args[1], 16)))


def plus(node: ir.Expr, number: int) -> ir.Expr:
    return ir.BinOp(node.dtype, "add", node, ir.Const(node.dtype, number))


def at_another(node: Access, at: int, by: int = 1) -> Access:
    """The read or store at another index."""
    indices = list(node.indices)
    indices[at] = plus(indices[at], by)
    return replace(node, indices=tuple(indices))


def reads_at_another(name: str, at: int, by: int = 1) -> Callable[[ir.Expr], ir.Expr | None]:
    """Change reads of a buffer: at another index."""

    def moved(node: ir.Expr) -> ir.Expr | None:
        if isinstance(node, ir.Load) and node.buffer.name == name:
            return at_another(node, at, by)
        return None

    return moved


def only(number: int, edit: Edit) -> Edit:
    """The edit, at the place of this number alone."""
    seen = [0]

    def once(node: ir.Stmt) -> ir.Stmt | None:
        new = edit(node)
        if new is None:
            return None
        seen[0] += 1
        return new if seen[0] == number + 1 else None

    return once


def assigned(name: str, change: Callable[[ir.Expr], ir.Expr]) -> Edit:
    """Change what is put in a private variable; where it is set to 0 it stays."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Store) and node.buffer.name == name and not is_number(node.value, 0):
            return replace(node, value=change(node.value))
        return None

    return edit


def is_number(node: ir.Expr, number: int) -> bool:
    return isinstance(node, ir.Const) and node.value == number


def calls(node: ir.Stmt, op: str) -> bool:
    return isinstance(node, ir.Eval) and isinstance(node.value, ir.Call) and node.value.op == op


def without(op: str) -> Edit:
    return lambda node: ir.Seq(None, ()) if calls(node, op) else None


def early_arrival(node: ir.Stmt) -> ir.Stmt | None:
    """Arrivals at `empty` come before what stands in front of them: the last wait for the tensor core."""
    if not isinstance(node, ir.Seq):
        return None
    stmts = list(node.stmts)
    for i, stmt in enumerate(stmts):
        if mbarrier_calls(stmt, ARRIVE, "empty"):
            drains = [k for k in range(i) if calls(stmts[k], "wait_wgmma")]
            moved = [*stmts[: drains[-1]], stmt, *stmts[drains[-1] : i], *stmts[i + 1 :]]
            return ir.Seq(node.span, tuple(moved))
    return None


def more_filled(node: ir.Stmt) -> ir.Stmt | None:
    """One place more is filled before the walk."""
    if isinstance(node, ir.For) and node.var.name == "stage" and node.kind == "serial":
        return replace(node, extent=plus(node.extent, 1))
    return None


def less_filled(node: ir.Stmt) -> ir.Stmt | None:
    if isinstance(node, ir.For) and node.var.name == "stage" and node.kind == "serial":
        return replace(node, extent=plus(node.extent, -1))
    return None


def is_walk(node: ir.Stmt) -> TypeGuard[ir.For]:
    """Whether a statement is a role's loop over its products of a segment."""
    if not isinstance(node, ir.For) or not isinstance(node.extent, ir.Load):
        return False
    waits = (n for n in ir.walk(node) if isinstance(n, ir.Call) and n.op == WAIT)
    return node.extent.buffer.name == "ahead" and any(waits)


def longer_turns(node: ir.Stmt) -> ir.Stmt | None:
    """A role has one turn more."""
    return replace(node, extent=plus(node.extent, 1)) if is_walk(node) else None


def skipped(node: ir.Stmt) -> ir.Stmt | None:
    """A role leaves out the first turn of each segment."""
    if not is_walk(node):
        return None
    later = ir.BinOp(ir.BOOL, "lt", ir.Const(node.var.dtype, 0), node.var)
    *product, advance = statements(node.body)
    return replace(node, body=ir.Seq(None, (ir.If(None, later, ir.Seq(None, tuple(product)), None), advance)))


def changed_length(node: ir.Stmt) -> ir.Stmt | None:
    """A role's loop over products changes the variable that its length is looked up in."""
    if not is_walk(node):
        return None
    assert isinstance(node.extent, ir.Load)
    *product, advance = statements(node.body)
    assert isinstance(advance, ir.Store)
    same = replace(advance, indices=node.extent.indices, value=node.extent)
    return replace(node, body=ir.Seq(None, (*product, advance, same)))


def statements(node: ir.Stmt) -> tuple[ir.Stmt, ...]:
    assert isinstance(node, ir.Seq)
    return node.stmts


def in_loop(name: str, number: int, change: Edit) -> Edit:
    """An edit inside the loop of this number over a variable of this name, of those that wait."""

    seen = [0]

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.For) or node.var.name != name or not waits(node, "empty"):
            return None
        seen[0] += 1
        return replace(node, body=inside(node.body, change)) if seen[0] == number + 1 else None

    return edit


def waits(node: ir.Stmt, array: str) -> bool:
    return any(mbarrier_calls(n, WAIT, array) for n in ir.walk(node) if isinstance(n, ir.Eval))


def inside(node: ir.Stmt, change: Edit) -> ir.Stmt:
    """A statement with an edit of what is in it."""
    launch = extracted(WIDE).device
    return edited(change, replace(launch, body=node)).body


def fewer_rounds(name: str, number: int) -> Edit:
    """A loop that waits has one round less."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.For) and node.var.name == name and waits(node, "empty"):
            return replace(node, extent=plus(node.extent, -1))
        return None

    return only(number, edit)


def other_source(coordinate: int) -> Edit:
    """A copy's coordinate, counted from the last, is of what comes next."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not calls(node, "tma_load"):
            return None
        assert isinstance(node, ir.Eval)
        assert isinstance(node.value, ir.Call)
        args = list(node.value.args)
        args[-2 - coordinate] = plus(args[-2 - coordinate], 1)  # behind them is a policy
        return replace(node, value=replace(node.value, args=tuple(args)))

    return edit


def other_tensor(node: ir.Stmt) -> ir.Stmt | None:
    """What is copied from one ring comes from the other."""
    if not calls(node, "tma_load"):
        return None
    assert isinstance(node, ir.Eval)
    assert isinstance(node.value, ir.Call)
    first, *rest = node.value.args
    assert isinstance(first, ir.Var)
    if first.name not in ("x_ring_desc", "x_ring_scale_desc"):
        return None
    found = (n for n in ir.walk(extracted(CONFIG).device.body) if isinstance(n, ir.Var))
    other = next(n for n in found if n.name == first.name.replace("x_ring", "h_ring"))
    return replace(node, value=replace(node.value, args=(other, *rest)))


def kept(element: int, change: Callable[[ir.Expr], ir.Expr]) -> Edit:
    """Change what the rows' warp keeps of a product for its late visits."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not is_kept(node, element) or isinstance(node.value, ir.Const):
            return None
        return replace(node, value=change(node.value))

    return edit


def is_kept(node: ir.Stmt, element: int) -> TypeGuard[ir.Store]:
    return isinstance(node, ir.Store) and node.buffer.name == "held" and is_number(node.indices[0], element)


def forgotten(node: ir.Stmt) -> ir.Stmt | None:
    """The rows' warp forgets in each turn that it has something left."""
    left = [n for n in ir.walk(node) if is_kept(n, 1)] if is_walk(node) else []
    if not left:
        return None
    assert isinstance(node, ir.For)
    nothing = replace(left[0], value=ir.Const(left[0].value.dtype, 0))
    return replace(node, body=ir.Seq(None, (*statements(node.body), nothing)))


def nothing_behind(node: ir.Stmt) -> ir.Stmt | None:
    """What is left behind the rows' walk is not fetched."""
    is_last = isinstance(node, ir.For) and node.var.name == "ko" and isinstance(node.extent, ir.Const)
    return ir.Seq(None, ()) if is_last and waits(node, "empty") else None


def often(node: ir.Stmt) -> ir.Stmt | None:
    """A counter of visits is advanced as often as the thread's number says."""
    if not isinstance(node, ir.Store) or node.buffer.name != "done" or isinstance(node.value, ir.Const):
        return None
    body = extracted(CONFIG).device.body
    thread = next(n.var for n in ir.walk(body) if isinstance(n, ir.Launch) and n.tag == "threadIdx.x")
    zero = ir.Const(thread.dtype, 0)
    return ir.For(None, ir.Var(thread.dtype, "often"), zero, thread, "serial", node, {})


def swapped(node: ir.Stmt) -> ir.Stmt | None:
    """Arrivals at `handed` and `taken` change places."""
    for one, other in (("handed", "taken"), ("taken", "handed")):
        if mbarrier_calls(node, ARRIVE, one):
            found = [n for n in ir.walk(extracted(CONFIG).device.body) if isinstance(n, ir.Eval)]
            return next(n for n in found if mbarrier_calls(n, ARRIVE, other))
    return None


def plan_written(node: ir.Stmt) -> ir.Stmt | None:
    """The kernel writes a tensor of the plan."""
    if isinstance(node, ir.Store) and node.buffer.name == "dispatched":
        firsts = next(
            n.buffer
            for n in ir.walk(extracted(CONFIG).device.body)
            if isinstance(n, ir.Decl) and n.buffer.name == "firsts"
        )
        return ir.Seq(None, (node, replace(node, buffer=firsts)))
    return None


def strange(node: ir.Stmt) -> ir.Stmt | None:
    """An operation without a meaning in a role."""
    if mbarrier_calls(node, ARRIVE, "empty"):
        return ir.Seq(None, (node, ir.Eval(None, ir.Call(ir.INT32, "ptx_unheard_of", ()))))
    return None


def late_read(node: ir.Stmt) -> ir.Stmt | None:
    """A finisher reads what was handed over once more, behind its arrival at `taken`."""
    if not mbarrier_calls(node, ARRIVE, "taken"):
        return None
    body = extracted(CONFIG).device.body
    out = next(n.buffer for n in ir.walk(body) if isinstance(n, ir.Decl) and n.buffer.name == "out_a")
    number = ir.Const(ir.INT32, 0)
    read = ir.Bind(None, ir.Var(out.dtype, "late"), ir.Load(out.dtype, out, (number,)))
    return ir.Seq(None, (node, read))


def far_read(node: ir.Stmt) -> ir.Stmt | None:
    """Offsets are read of the next stage."""
    if isinstance(node, ir.Store) and isinstance(node.value, ir.Load) and node.value.buffer.name == "o_tile":
        load = node.value
        words = CONFIG.offset_words
        return replace(node, value=replace(load, indices=(plus(load.indices[0], words),)))
    return None


def named_barriers(node: ir.Stmt) -> bool:
    if not calls(node, "tvm_storage_sync"):
        return False
    assert isinstance(node, ir.Eval)
    assert isinstance(node.value, ir.Call)
    args = node.value.args
    return len(args) > 1 and isinstance(args[1], ir.Const) and args[1].value == 2
