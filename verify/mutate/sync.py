"""Operators on synchronisation: barriers, mbarriers, asynchronous copies and products."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from verify import ir
from verify.mutate.mutant import Operator, calls, with_arg
from verify.mutate.rewrite import NOTHING, add

Path = tuple[ir.Stmt, ...]
Pairs = Iterator[tuple[Any, Any]]
WARP_THREADS = 32
WGMMA_SCALE_D = {"ptx_wgmma_rs": 11, "ptx_wgmma_ss": 12}  # argument: add to D, or overwrite it


def _removed(*names: str):
    def make(statement: ir.Stmt, path: Path) -> Pairs:
        for _ in calls(statement, *names):
            yield statement, NOTHING

    return make


def _parity(statement: ir.Stmt, path: Path) -> Pairs:
    for call in calls(statement, "mbarrier_wait_parity", "ptx_wait_barrier"):
        parity = call.args[1]
        yield call, with_arg(call, 1, ir.BinOp(parity.dtype, "bitxor", parity, ir.Const(parity.dtype, 1)))


def _loosened(*names: str):
    def make(statement: ir.Stmt, path: Path) -> Pairs:
        for call in calls(statement, *names):
            if call.args:
                yield call, with_arg(call, 0, add(call.args[0], 1))

    return make


def _bytes(statement: ir.Stmt, path: Path) -> Pairs:
    for call in calls(statement, "ptx_arrive_barrier_expect_tx", "mbarrier_expect_tx"):
        amount = call.args[1]
        half = ir.Const(amount.dtype, 2)
        yield call, with_arg(call, 1, ir.BinOp(amount.dtype, "floordiv", amount, half))
        yield call, with_arg(call, 1, ir.BinOp(amount.dtype, "mul", amount, half))


def _count(statement: ir.Stmt, path: Path) -> Pairs:
    for call in calls(statement, "ptx_init_barrier_thread_count"):
        for step in (1, -1):
            yield call, with_arg(call, 1, add(call.args[1], step))


def _which_barrier(statement: ir.Stmt, path: Path) -> Pairs:
    names = ("mbarrier_wait_parity", "ptx_arrive_barrier", "ptx_arrive_barrier_expect_tx", "tma_load")
    for call in calls(statement, *names):
        for position, arg in enumerate(call.args):
            if isinstance(arg, ir.Load) and arg.buffer.scope == "shared.barrier":
                for step in (1, -1):
                    yield call, with_arg(call, position, replace(arg, indices=(add(arg.indices[0], step),)))


def _fewer_threads(statement: ir.Stmt, path: Path) -> Pairs:
    for call in calls(statement, "tvm_storage_sync"):
        if len(call.args) >= 3:  # scope, barrier, threads
            for step in (WARP_THREADS, -WARP_THREADS):
                yield call, with_arg(call, 2, add(call.args[2], step))


def _elected(statement: ir.Stmt, path: Path) -> Pairs:
    if isinstance(statement, ir.If) and is_election(statement.cond):
        yield statement, statement.then


def is_election(cond: ir.Expr) -> bool:
    """Return whether a condition is true of one elected lane or thread."""
    return any(isinstance(n, ir.Call) and n.op in ("tl_shuffle_elect", "elect_sync") for n in ir.walk(cond))


def _earlier(*names: str):
    """Move a statement before the one that precedes it."""

    def make(statement: ir.Stmt, path: Path) -> Pairs:
        if not isinstance(statement, ir.Seq):
            return
        for position, child in enumerate(statement.stmts[1:], 1):
            before = statement.stmts[position - 1]
            if any(calls(child, *names)) and not isinstance(before, (ir.Alloc, ir.Decl, ir.Bind)):
                order = [*statement.stmts]
                order[position - 1 : position + 1] = child, before
                yield statement, replace(statement, stmts=tuple(order))

    return make


def _scale_d(statement: ir.Stmt, path: Path) -> Pairs:
    for call in calls(statement, *WGMMA_SCALE_D):
        position = WGMMA_SCALE_D[call.op]
        flag = call.args[position]
        if isinstance(flag, ir.Const):
            yield call, with_arg(call, position, replace(flag, value=type(flag.value)(not flag.value)))


SYNC = ("race", "barrier", "mbarrier", "init")

OPERATORS = (
    Operator("barrier_removed", ("race", "mbarrier", "barrier"), _removed("tvm_storage_sync"), critical=True),
    Operator("barrier_threads", ("barrier", "race"), _fewer_threads),
    Operator("wait_removed", SYNC, _removed("mbarrier_wait_parity", "ptx_wait_barrier"), critical=True),
    Operator("parity_flipped", ("mbarrier", "race"), _parity, critical=True),
    Operator("arrive_removed", ("mbarrier", "race"), _removed("ptx_arrive_barrier"), critical=True),
    Operator(
        "expect_removed",
        ("mbarrier", "race"),
        _removed("ptx_arrive_barrier_expect_tx", "mbarrier_expect_tx"),
        critical=True,
    ),
    Operator("arrive_earlier", ("race", "mbarrier"), _earlier("ptx_arrive_barrier")),
    Operator("wait_later", ("race", "mbarrier"), _earlier("tma_load", "ptx_wgmma_rs", "ptx_wgmma_ss")),
    Operator("expect_bytes", ("mbarrier", "race"), _bytes),
    Operator("init_count", ("mbarrier", "race"), _count),
    Operator("which_barrier", ("mbarrier", "race", "bounds"), _which_barrier),
    Operator("barrier_init_removed", ("mbarrier",), _removed("ptx_init_barrier_thread_count")),
    Operator("election_dropped", ("mbarrier", "race", "coverage"), _elected),
    Operator(
        "proxy_fence_removed", ("race", "mbarrier"), _removed("fence_proxy_async", "ptx_fence_barrier_init")
    ),
    Operator("wgmma_wait_removed", ("race",), _removed("warpgroup_wait", "wait_wgmma"), critical=True),
    Operator("wgmma_wait_loosened", ("race",), _loosened("warpgroup_wait", "wait_wgmma")),
    Operator("wgmma_fence_removed", ("race",), _removed("warpgroup_arrive")),
    Operator("wgmma_commit_removed", ("race",), _removed("warpgroup_commit_batch")),
    Operator("wgmma_scale_d", ("refinement", "init"), _scale_d),
    Operator("copy_wait_removed", ("race",), _removed("ptx_wait_group", "tma_store_wait"), critical=True),
    Operator("copy_wait_loosened", ("race",), _loosened("ptx_wait_group", "tma_store_wait")),
    Operator("copy_commit_removed", ("race",), _removed("ptx_commit_group", "tma_store_arrive")),
)
