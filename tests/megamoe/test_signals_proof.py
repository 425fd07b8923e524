"""The signals between CTAs, for every routing: proved of the compiled kernels, and no edit of them is."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import z3

from megamoe import signals_proof
from megamoe.config import Config
from megamoe.instances import AHEAD, CONFIG, FP8, OPTIONS, WIDE, WIDENED
from megamoe.proofs import extracted, signals_claimed
from megamoe.signal_places import evaluate
from tests.megamoe.role_edits import (
    ARRIVE,
    WAIT,
    assigned,
    calls,
    kept,
    longer_turns,
    only,
    plan_written,
    plus,
    skipped,
)
from tests.megamoe.test_protocol import (
    ADD,
    Edit,
    _adds,
    _awaits,
    _is_sync,
    always_ahead,
    atomics,
    edited,
    in_expr,
    with_constant,
    with_order,
    with_shorter_wait,
    without_barrier,
    without_call,
    without_conditional_barriers,
    without_grid_barriers,
    without_signal,
    without_wait,
    without_waits,
)
from tests.megamoe.test_roles_proof import copies_of, open_claims
from verify import ir
from verify.externs.signals import DEVICE
from verify.ir import UnsupportedIR

FORMS = {"fp4": CONFIG, "fp8": FP8, "wide": WIDE, "ahead": AHEAD, "options": OPTIONS, "widened": WIDENED}
LOAD, STORE = "atomic_load_elem_op", "atomic_store_elem_op"
NOTHING = ir.Seq(None, ())


def after(edit: Edit, config: Config = CONFIG) -> list[str]:
    """Return what is open of a kernel whose IR has been edited."""
    function = edited(edit, extracted(config).device)
    return open_claims(signals_proof.claims(function, copies_of(config), config))


# --------------------------------------------------------------------------- edits
def atomic(node: ir.Stmt, op: str, tensor: str) -> bool:
    """Whether a statement itself is an atomic operation on a tensor, or a wait for one of its words."""
    if isinstance(node, ir.While):
        return op == LOAD and any(atomics(ir.Eval(None, node.cond), op, tensor))
    return isinstance(node, ir.Eval | ir.Store) and any(atomics(node, op, tensor))


def at_pointer(op: str, tensor: str, change: Callable[[ir.AccessPtr], ir.AccessPtr]) -> Edit:
    """An atomic operation on a tensor has another pointer."""

    def moved(node: ir.Expr) -> ir.Expr | None:
        if isinstance(node, ir.Call) and node.op == op and any(atomics(ir.Eval(None, node), op, tensor)):
            pointer, *rest = node.args
            assert isinstance(pointer, ir.AccessPtr)
            return replace(node, args=(change(pointer), *rest))
        return None

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not atomic(node, op, tensor):
            return None
        if isinstance(node, ir.While):
            return replace(node, cond=in_expr(node.cond, moved))
        assert isinstance(node, ir.Eval | ir.Store)
        return replace(node, value=in_expr(node.value, moved))

    return edit


def in_word(op: str, tensor: str, number: int) -> Edit:
    """An atomic operation is on a word further on."""
    return at_pointer(op, tensor, lambda pointer: replace(pointer, offset=plus(pointer.offset, number)))


def dropped(op: str, tensor: str) -> Edit:
    return lambda node: NOTHING if atomic(node, op, tensor) else None


def twice(op: str, tensor: str) -> Edit:
    return lambda node: ir.Seq(None, (node, node)) if atomic(node, op, tensor) else None


def of_other(op: str, tensor: str, other: str) -> Edit:
    """An atomic operation is on another counter."""
    found = (n for n in ir.walk(extracted(CONFIG).device.body) if isinstance(n, ir.AccessPtr))
    data = next(n.data for n in found if n.data.name == other)
    return at_pointer(op, tensor, lambda pointer: replace(pointer, data=data))


def other_wait(tensor: str, more: int) -> Edit:
    """A wait is for so many more than there will be."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.While) or not atomic(node, LOAD, tensor):
            return None

        def changed(inner: ir.Expr) -> ir.Expr | None:
            if (
                isinstance(inner, ir.BinOp)
                and inner.op == "lt"
                and any(atomics(ir.Eval(None, inner.a), LOAD, tensor))
            ):
                return replace(inner, b=plus(inner.b, more))
            return None

        return replace(node, cond=in_expr(node.cond, changed))

    return edit


def without_call_of(op: str) -> Edit:
    return lambda node: NOTHING if calls(node, op) else None


def writes(tensor: str) -> Callable[[ir.Stmt], bool]:
    return lambda node: (
        isinstance(node, ir.Store) and node.buffer.name == tensor and node.buffer.scope == "global"
    )


def moved_write(tensor: str, number: int) -> Edit:
    """A write is of an element further on."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not writes(tensor)(node):
            return None
        assert isinstance(node, ir.Store)
        (index,) = node.indices
        if isinstance(index, ir.Ramp):
            return replace(node, indices=(replace(index, base=plus(index.base, number)),))
        return replace(node, indices=(plus(index, number),))

    return edit


def lost_write(tensor: str) -> Edit:
    return lambda node: NOTHING if writes(tensor)(node) else None


def signal_first(tensor: str) -> Edit:
    """A signal comes before the fence and the barrier in front of it."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.Seq):
            return None
        stmts = list(node.stmts)
        for i, stmt in enumerate(stmts):
            if i > 1 and _adds(tensor)(stmt) and _is_sync(stmts[i - 1]):
                moved = [*stmts[: i - 2], stmt, *stmts[i - 2 : i], *stmts[i + 1 :]]
                return ir.Seq(node.span, tuple(moved))
        return None

    return edit


def always(change: Callable[[Any], bool]) -> Edit:
    """A condition of which `change` holds is taken whatever it says."""
    return lambda node: node.then if isinstance(node, ir.If) and change(node) else None


def for_ring(tensor: str) -> Callable[[Any], bool]:
    """Whether a condition is `ring <= block`, around a wait for a ring's place."""

    def holds(node: ir.If) -> bool:
        inside = [n for n in ir.walk(node.then) if isinstance(n, ir.Stmt)]
        waits = [n for n in inside if isinstance(n, ir.While) and atomic(n, LOAD, tensor)]
        loops = any(isinstance(n, ir.For) for n in inside)
        return isinstance(node.cond, ir.BinOp) and node.cond.op == "le" and bool(waits) and not loops

    return holds


def further_ring(tensor: str) -> Edit:
    """A wait for a ring's place begins a block later."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.If) and isinstance(node.cond, ir.BinOp) and for_ring(tensor)(node):
            return replace(node, cond=replace(node.cond, a=plus(node.cond.a, 1)))
        return None

    return edit


def by_all(tensor: str) -> Edit:
    """Every thread of a role signals."""
    return always(
        lambda node: isinstance(node.cond, ir.BinOp) and node.cond.op == "eq" and _adds(tensor)(node)
    )


def another_value(tensor: str) -> Edit:
    """A counter does not begin at 0."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not writes(tensor)(node):
            return None
        assert isinstance(node, ir.Store)
        return replace(node, value=plus(node.value, 1))

    return edit


def adds_more(tensor: str) -> Edit:
    """A signal adds one more."""

    def changed(node: ir.Expr) -> ir.Expr | None:
        if isinstance(node, ir.Call) and any(atomics(ir.Eval(None, node), ADD, tensor)):
            return replace(node, args=(node.args[0], plus(node.args[1], 1), *node.args[2:]))
        return None

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not atomic(node, ADD, tensor):
            return None
        assert isinstance(node, ir.Store)
        return replace(node, value=in_expr(node.value, changed))

    return edit


def no_watchdog(node: ir.Stmt) -> ir.Stmt | None:
    """Waits that are given up say nothing."""
    return NOTHING if calls(node, "atomic_max_elem_op") else None


def reset(node: ir.Stmt) -> ir.Stmt | None:
    """A finisher puts a counter back to zero."""
    if not atomic(node, ADD, "l2_done"):
        return None
    body = extracted(CONFIG).device.body
    store = next(n for n in ir.walk(body) if isinstance(n, ir.Stmt) and writes("l1_done")(n))
    assert isinstance(store, ir.Store)
    zero = ir.Const(ir.INT32, 0)
    return ir.Seq(None, (node, replace(store, indices=(zero,))))


def early_sums(node: ir.Stmt) -> ir.Stmt | None:
    """Consumers read the combine buffers before the last barrier."""
    if not isinstance(node, ir.Seq):
        return None
    stmts = list(node.stmts)
    ends = [
        i
        for i, s in enumerate(stmts)
        if isinstance(s, ir.For) and any(writes("y")(n) for n in ir.walk(s) if isinstance(n, ir.Stmt))
    ]
    if not ends or not any(map(_is_sync, stmts)):
        return None
    (end,) = ends
    last = max(i for i in range(end) if _is_sync(stmts[i]))
    return ir.Seq(node.span, (*stmts[:last], stmts[end], *stmts[last:end], *stmts[end + 1 :]))


def late_dispatch(node: ir.Stmt) -> ir.Stmt | None:
    """Consumers dispatch a wave behind the products of the one before."""
    if not isinstance(node, ir.Seq):
        return None
    stmts = list(node.stmts)
    for i, stmt in enumerate(stmts):
        if isinstance(stmt, ir.For) and any(
            atomic(n, ADD, "dispatched") for n in ir.walk(stmt) if isinstance(n, ir.Stmt)
        ):
            return ir.Seq(node.span, (*stmts[:i], *stmts[i + 1 :], stmt)) if stmt.var.name == "turn" else None
    return None


def first_wave(change: Callable[[ir.Expr, int], ir.Expr]) -> Edit:
    """Warps that dispatch begin a wave later."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.For) and node.var.name == "wave":
            return replace(node, start=change(node.start, 1))
        return None

    return edit


def in_wave(holds: Callable[[ir.Stmt], bool]) -> Edit:
    """Drop statements in the loops of those who widen; `only` counts the loops' own edits."""
    seen = [0]

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.For) and node.var.name == "wave":
            seen[0] += 1
        return NOTHING if seen[0] and holds(node) else None

    return edit


def by_one_lane(node: ir.Stmt) -> ir.Stmt | None:
    """One lane writes for others."""
    if not writes("h_ring")(node):
        return None
    elected = ir.Call(ir.BOOL, "tl_shuffle_elect", (ir.Const(ir.INT32, 32),))
    return ir.If(None, elected, node, None)


def of_part(name: str, value: int) -> Edit:
    """What is written to a ring is of another place: the slot is one further on."""
    return only(value, assigned(name, lambda v: plus(v, 1)))


COUNTERS = ("dispatched", "l1_done", "l2_done")
MUTANTS: dict[str, Edit] = {
    **{f"no signal {name}": without_signal(name) for name in COUNTERS},
    **{f"signal {name} relaxed": with_order(ADD, name, 2) for name in COUNTERS},
    **{f"signal {name} twice": twice(ADD, name) for name in COUNTERS},
    **{f"signal {name} of another block": in_word(ADD, name, 1) for name in COUNTERS},
    **{f"signal {name} adds 2": adds_more(name) for name in (*COUNTERS, "grid_word")},
    **{f"signal {name} by all": by_all(name) for name in COUNTERS},
    **{f"signal {name} before its fence and barrier": signal_first(name) for name in COUNTERS},
    **{f"no barrier before {name}": without_barrier(_adds(name), before=True) for name in COUNTERS},
    "l1_done for l2_done": of_other(ADD, "l1_done", "l2_done"),
    "l2_done for l1_done": of_other(ADD, "l2_done", "l1_done"),
    "no wait for rows": dropped(LOAD, "dispatched"),
    "no first wait for l1_done": only(0, dropped(LOAD, "l1_done")),
    "no second wait for l1_done": only(1, dropped(LOAD, "l1_done")),
    "no wait for l2_done": dropped(LOAD, "l2_done"),
    "no wait for a place of x": without_wait("l1_done"),
    "no wait for a place of h": without_wait("l2_done"),
    **{f"wait for {name} relaxed": with_order(LOAD, name, 1) for name in COUNTERS},
    **{f"wait for less of {name}": with_shorter_wait(name) for name in COUNTERS},
    **{f"wait for more of {name}": other_wait(name, 1) for name in COUNTERS},
    **{f"wait for another word of {name}": in_word(LOAD, name, 1) for name in COUNTERS},
    "wait for an earlier place of x": only(1, in_word(LOAD, "l1_done", -1)),
    "wait for l1_done instead of rows": of_other(LOAD, "dispatched", "l1_done"),
    "wait for rows instead of l1_done": of_other(LOAD, "l1_done", "dispatched"),
    "wait for a place of x later": further_ring("l1_done"),
    "wait for a place of h later": further_ring("l2_done"),
    "always wait for a place of x": always(for_ring("l1_done")),
    "always wait for a place of h": always(for_ring("l2_done")),
    "no barrier behind the wait for a place": without_conditional_barriers,
    "no barrier behind the wait for rows": without_barrier(_awaits("dispatched"), before=False),
    "no barrier behind the wait for l1_done": without_barrier(_awaits("l1_done"), before=False),
    "no fences": without_call_of("fence_proxy_async"),
    **{f"fence {n} dropped": only(n, without_call_of("fence_proxy_async")) for n in range(5)},
    "waits say nothing": no_watchdog,
    **{f"wait {n} says nothing": only(n, no_watchdog) for n in range(7)},
    **{
        f"a write of {name} further on": moved_write(name, 1)
        for name in ("x_ring", "x_ring_scale", "h_ring", "h_ring_scale")
    },
    "a write of the combine rows further on": only(0, moved_write("combine", 8)),
    "another write of the combine rows further on": only(1, moved_write("combine", 8)),
    **{
        f"no write of {name}": only(0, lost_write(name))
        for name in ("x_ring", "x_ring_scale", "h_ring", "h_ring_scale", "combine")
    },
    **{f"slot {n}": of_part("slot", n) for n in (0, 3)},
    **{f"block {n}": of_part("block", n) for n in (0, 2, 4, 6, 8)},
    **{f"tile {n}": of_part("tile", n) for n in range(5)},
    **{f"ahead {n}": of_part("ahead", n) for n in range(12)},
    **{f"role {n} has longer turns": only(n, longer_turns) for n in range(4)},
    **{f"role {n} skips products": only(n, skipped) for n in range(4)},
    "no wait for the product": without_call(WAIT, "handed"),
    "no wait for the last product": only(1, without_call(WAIT, "taken")),
    "outputs are given back unwritten": without_call(ARRIVE, "taken"),
    **{f"{name} does not begin at 0": another_value(name) for name in COUNTERS},
    **{f"{name} is not cleared": lost_write(name) for name in COUNTERS},
    "a counter is put back": reset,
    "the grid does not meet first": without_call_of("sync_grid"),
    "the plan is written": plan_written,
    "no grid barriers": without_grid_barriers,
    **{f"grid barrier {n} dropped": only(n, without_grid_barriers) for n in range(2)},
    **{
        f"{op} of the grid's word": with_order(name, "grid_word", at)
        for op, name, at in (("relaxed add", ADD, 2), ("relaxed wait", LOAD, 1))
    },
    "a peer's word relaxed": with_order(STORE, "signals", 2),
    "a peer's word of the device": with_order(STORE, "signals", 3, DEVICE),
    "a wait for peers relaxed": with_order(LOAD, "signals", 1),
    "a wait for peers of the device": with_order(LOAD, "signals", 2, DEVICE),
    "a wait for an earlier epoch": with_shorter_wait("signals"),
    "another peer's word": in_word(STORE, "signals", 1),
    "a wait for another's word": in_word(LOAD, "signals", 1),
    "a stale epoch": with_constant(STORE, "signals", lambda v: 1),
    "no word for peers": dropped(STORE, "signals"),
    "no wait for peers": dropped(LOAD, "signals"),
    "outputs are added early": early_sums,
    "a wave is dispatched late": late_dispatch,
    "one lane writes for others": by_one_lane,
    "epochs stay": lost_write("epochs"),
}


# Waits under the product before.
LATE: dict[str, Edit] = {
    "always ahead": always_ahead,
    **{f"early {n}": only(n, lambda node: always_ahead(node)) for n in range(2)},
    "no waits ahead": without_waits("lt"),
    "no waits behind": without_waits("eq"),
    **{f"held {n}": kept(n, lambda v: plus(v, 1)) for n in (2, 3)},
    "held 3 is less": kept(3, lambda v: plus(v, -1)),
    **{f"no wait {n} for {name}": only(n, dropped(LOAD, name)) for name in COUNTERS for n in range(2)},
    **{
        f"wait {n} for less of {name}": only(n, with_shorter_wait(name))
        for name in COUNTERS
        for n in range(2)
    },
    **{
        f"wait {n} for another word of {name}": only(n, in_word(LOAD, name, 1))
        for name in COUNTERS
        for n in range(2)
    },
    **{f"barrier of the warp {n} dropped": only(n, without_call_of("sync_warp")) for n in (0, 1, 3)},
    "no fence of the rows' warp": only(2, without_call_of("fence_proxy_async")),
}


# Weights that are widened to a ring: by the first wait those who fetch, by the second those who widen.
RING: dict[str, Edit] = {
    **{f"no wait {n}": only(n, dropped(LOAD, "widened")) for n in range(2)},
    **{f"wait {n} relaxed": only(n, with_order(LOAD, "widened", 1)) for n in range(2)},
    **{f"wait {n} for less": only(n, other_wait("widened", -1)) for n in range(2)},
    **{f"wait {n} for more": only(n, other_wait("widened", 1)) for n in range(2)},
    **{f"wait {n} for another word": only(n, in_word(LOAD, "widened", 1)) for n in range(2)},
    **{f"wait {n} for the word before": only(n, in_word(LOAD, "widened", -1)) for n in range(2)},
    **{f"no signal {n}": only(n, without_signal("widened")) for n in range(2)},
    **{f"signal {n} relaxed": only(n, with_order(ADD, "widened", 2)) for n in range(2)},
    **{f"signal {n} twice": only(n, twice(ADD, "widened")) for n in range(2)},
    **{f"signal {n} of another word": only(n, in_word(ADD, "widened", 1)) for n in range(2)},
    **{f"signal {n} adds 2": only(n, adds_more("widened")) for n in range(2)},
    **{f"signal {n} by all": only(n, by_all("widened")) for n in range(2)},
    "signal of what is widened before its fence and barrier": signal_first("widened"),
    "words are not cleared": lost_write("widened"),
    "words do not begin at 0": another_value("widened"),
    "experts are not waited for": assigned("look", lambda v: plus(v, 1)),
    "no experts are known to have come": assigned("look", lambda v: ir.Const(v.dtype, 99)),
    "a wave less": first_wave(plus),
    "a barrier of those who widen dropped": only(0, in_wave(_is_sync)),
    "the signal's barrier dropped": only(2, in_wave(_is_sync)),
    "the fence of those who widen dropped": in_wave(lambda n: calls(n, "fence_proxy_async")),
    **{f"fence {n} dropped": only(n, without_call_of("fence_proxy_async")) for n in (2, 3)},
    **{f"l2_done {n}": only(n, without_signal("l2_done")) for n in range(1)},
}


@pytest.mark.slow
class TestCompiledKernel:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_claim_is_proved(self, form):
        claims = dict(signals_claimed(FORMS[form]))
        assert claims.keys() == set(signals_proof.names(FORMS[form]))
        assert open_claims(claims) == []

    @pytest.mark.parametrize("name", MUTANTS)
    def test_mutants(self, name):
        assert after(MUTANTS[name])

    @pytest.mark.parametrize("name", LATE)
    def test_waits_ahead(self, name):
        assert after(LATE[name], AHEAD)

    @pytest.mark.parametrize("name", RING)
    def test_weights_of_a_ring(self, name):
        assert after(RING[name], WIDENED)

    @pytest.mark.parametrize(
        ("config", "edit"),
        [
            *((config, without_signal(name)) for config in (FP8, OPTIONS, WIDE) for name in COUNTERS),
            (FP8, only(3, without_call_of("fence_proxy_async"))),
            (FP8, with_shorter_wait("l1_done")),
            (FP8, only(0, moved_write("h_ring", 1))),
            # Of two roles that dispatch, one alone.
            *((OPTIONS, only(n, without_signal("dispatched"))) for n in range(2)),
            *((OPTIONS, only(n, dropped(LOAD, "l1_done"))) for n in range(3)),
            *((OPTIONS, only(n, twice(ADD, "dispatched"))) for n in range(2)),
            *((OPTIONS, only(n, moved_write("x_ring", 16))) for n in range(2)),
            *((OPTIONS, only(n, lost_write("x_ring_scale"))) for n in range(2)),
            *((OPTIONS, only(n, without_call_of("fence_proxy_async"))) for n in range(6)),
            (OPTIONS, first_wave(plus)),
            (WIDE, always_ahead),
            (WIDE, only(1, moved_write("x_ring", 16))),
            (WIDE, only(0, lost_write("h_ring_scale"))),
            (WIDE, only(0, dropped(LOAD, "l2_done"))),
            (WIDE, kept(2, lambda v: plus(v, 1))),
        ],
    )
    def test_mutants_of_other_forms(self, config, edit):
        assert after(edit, config)


class TestPlacesOfWrites:
    """What a thread adds to a base is looked at for each thread."""

    def test_values(self):
        x, y = z3.Ints("x y")
        at = {"x": np.array([0, 1, 5]), "y": np.array([2, -3, 7])}
        term = z3.If(z3.And(x > 0, z3.Not(y == 7)), x * 4 + y / 2, y % 4 - x)
        assert evaluate(term, at).tolist() == [2, 2, -2]

    def test_a_division_by_what_may_be_negative(self):
        x = z3.Int("x")
        with pytest.raises(UnsupportedIR):
            evaluate(x / -2, {"x": np.array([1])})
