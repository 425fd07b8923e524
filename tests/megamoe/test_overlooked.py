"""Kernels that are wrong in a place that claims could overlook: not one of them is proved.

Each edit is wrong where another thread, another round or another branch is than the one that is looked at
first; or it takes away all that a claim is about.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import z3

from megamoe.config import CONSUMERS, FINISH_FIRST, WARP
from megamoe.instances import CONFIG, WIDENED
from megamoe.plan_values import Bits, Values
from megamoe.proofs import extracted
from tests.megamoe.role_edits import ARRIVE, EXPECT, calls, is_number, named_barriers, only, plus
from tests.megamoe.test_protocol import Edit, atomics, in_expr, mbarrier_calls
from tests.megamoe.test_refine_proof import after as refinement_after
from tests.megamoe.test_roles_proof import after as roles_after
from tests.megamoe.test_signals_proof import after as signals_after
from verify import ir

NOTHING = ir.Seq(None, ())
INIT = "ptx_init_barrier_thread_count"
THREAD = next(
    n.var
    for n in ir.walk(extracted(CONFIG).device.body)
    if isinstance(n, ir.Launch) and n.tag == "threadIdx.x"
)


def number(value: int) -> ir.Const:
    return ir.Const(THREAD.dtype, value)


def compared(op: str, a: ir.Expr, b: ir.Expr) -> ir.Expr:
    return ir.BinOp(ir.BOOL, op, a, b)


def no_scales(node: ir.Stmt) -> ir.Stmt | None:
    """Scales of rows are never copied; whoever would copy them arrives, and expects no bytes."""
    stmts = list(node.stmts) if isinstance(node, ir.Seq) else []
    for i, stmt in enumerate(stmts):
        pointers = (n for n in ir.walk(stmt) if isinstance(n, ir.AccessPtr))
        if calls(stmt, "tma_load") and any(p.data.name == "s_tile" for p in pointers):
            arrival = stmts[i - 1]
            assert mbarrier_calls(arrival, EXPECT, "full")
            assert isinstance(arrival, ir.Eval)
            assert isinstance(arrival.value, ir.Call)
            barrier, expected = arrival.value.args
            none = replace(arrival.value, args=(barrier, ir.Const(expected.dtype, 0)))
            return ir.Seq(None, (*stmts[: i - 1], replace(arrival, value=none), *stmts[i + 1 :]))
    return None


def read_by_others() -> Edit:
    """Routing weights are read by others than those that write them, who do not meet in between."""
    loads = (n for n in ir.walk(extracted(CONFIG).device.body) if isinstance(n, ir.Load))
    of_no_kind = compared("lt", number(5), next(n for n in loads if n.buffer.name == "kind"))
    never = only(0, lambda n: ir.If(None, of_no_kind, n, None) if named_barriers(n) else None)

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Store | ir.Bind) and any(
            isinstance(n, ir.Load) and n.buffer.name == "weight_tile" for n in ir.walk(node)
        ):
            writers = number(FINISH_FIRST + CONFIG.block_m)
            return ir.If(None, compared("ge", THREAD, writers), node, None)
        return never(node)

    return edit


def on_a_mask(node: ir.Stmt) -> ir.Stmt | None:
    """All threads go one block further, on a condition that is made of bits."""
    if not isinstance(node, ir.Store) or node.buffer.name != "block" or is_number(node.value, 0):
        return None
    always = compared("lt", THREAD, number(1 << 12))
    both = ir.BinOp(ir.BOOL, "bitand", always, always)
    return ir.Seq(None, (node, ir.If(None, both, replace(node, value=plus(node.value, 1)), None)))


def one_arrives(node: ir.Stmt) -> ir.Stmt | None:
    """One thread of the CTA arrives at `empty`, where one of each warp is waited for."""
    if mbarrier_calls(node, ARRIVE, "empty"):
        return ir.If(None, ir.Call(ir.BOOL, "tl_shuffle_elect", (number(0),)), node, None)
    if not mbarrier_calls(node, INIT, "empty"):
        return None
    assert isinstance(node, ir.Eval)
    assert isinstance(node.value, ir.Call)
    barrier, count = node.value.args
    fewer = ir.Const(count.dtype, CONSUMERS // WARP)
    return replace(node, value=replace(node.value, args=(barrier, fewer)))


def fence_of_the_first_rows(node: ir.Stmt) -> ir.Stmt | None:
    """Of the rounds that write the second ring, the fence comes behind the first alone."""
    stmts = list(node.stmts) if isinstance(node, ir.Seq) else []
    for i, stmt in enumerate(stmts):
        stores = (n for n in ir.walk(stmt) if isinstance(n, ir.Store))
        fences = [k for k in range(i, len(stmts)) if calls(stmts[k], "fence_proxy_async")]
        if isinstance(stmt, ir.For) and any(s.buffer.name == "h_ring" for s in stores) and fences:
            first = compared("eq", stmt.var, ir.Const(stmt.var.dtype, 0))
            fence = ir.If(None, first, stmts[fences[0]], None)
            stmts[i], stmts[fences[0]] = replace(stmt, body=ir.Seq(None, (stmt.body, fence))), NOTHING
            return ir.Seq(None, tuple(stmts))
    return None


def says_nothing(node: ir.Stmt) -> ir.Stmt | None:
    """A wait that is given up does not say so: no count of polls is negative."""
    if not isinstance(node, ir.If) or not isinstance(node.then, ir.Eval):
        return None
    if not any(atomics(node.then, "atomic_max_elem_op", "status")):
        return None
    (polls,) = (n for n in ir.walk(node.cond) if isinstance(n, ir.Load))
    negative = compared("lt", polls, ir.Const(polls.dtype, 0))
    return replace(node, cond=ir.BinOp(ir.BOOL, "and", node.cond, negative))


def guarded_more(number_: int) -> Edit:
    """Of the reads of a block's expert in a wait, one is left out for blocks that have one."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.While):
            return None
        reads = [n for n in ir.walk(node.cond) if isinstance(n, ir.Select) and is_expert(n.a)]
        if not reads:
            return None
        read = reads[number_]
        assert isinstance(read.cond, ir.BinOp)
        assert isinstance(read.cond.b, ir.BinOp)
        block = read.cond.b.a
        fewer = ir.BinOp(ir.BOOL, "and", read.cond, compared("lt", block, ir.Const(block.dtype, 3)))
        changed = replace(read, cond=fewer)
        return replace(node, cond=in_expr(node.cond, lambda e: changed if e is read else None))

    return edit


def is_expert(node: ir.Expr) -> bool:
    return isinstance(node, ir.Load) and node.buffer.name == "block_expert"


ROLES: dict[str, Edit] = {
    "nothing is copied to a buffer": no_scales,
    "written by some threads, read by others": read_by_others(),
    "a condition that is made of bits": on_a_mask,
    "one thread for one of each warp": one_arrives,
}
# Waits, in the order of the program: of rows, of the dispatch, of the grid, of ranks, of the grid.
SIGNALS: dict[str, Edit] = {
    "a fence in the first round": fence_of_the_first_rows,
    **{f"wait {n} says nothing": only(n, says_nothing) for n in range(7)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROLES)
def test_what_roles_do(name):
    assert roles_after(ROLES[name])


@pytest.mark.slow
@pytest.mark.parametrize("read", [0, 1])
def test_guards_of_reads_that_one_statement_makes_twice(read):
    assert refinement_after(guarded_more(read), WIDENED)


def test_two_words_of_the_plans_kernel_are_not_zero_together():
    """Whether a word is zero says nothing of another that is asked for next."""
    values = Values(SimpleNamespace(own=("own", 1, WARP)))
    words = []
    for name in ("one", "other"):
        data, zero = ir.Var(ir.HANDLE, name), ir.Const(ir.INT32, 0)
        buffer = ir.Buffer(name, ir.INT32, (ir.Const(ir.INT32, 1),), (), "local", data, zero)
        values.local[name, 0] = Bits(lambda k, name=name: z3.Int(name) == k)
        words.append(ir.BinOp(ir.BOOL, "ne", ir.Load(ir.INT32, buffer, (zero,)), zero))
    one, other = map(values.boolean, words)
    assert not one.eq(other)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
def test_signals(name):
    assert signals_after(SIGNALS[name])
