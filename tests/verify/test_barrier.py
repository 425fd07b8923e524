"""Property barrier on sound kernels, on their broken IR and on kernels that diverge."""

import pytest
from tilelang import language as T

from tests.verify import samples
from verify import ir
from verify.verdict import Verdict


@pytest.mark.parametrize("kernel", samples.SOUND, ids=lambda k: k.__name__)
def test_sound_kernels_are_proved(kernel):
    result = samples.verdict(samples.context(kernel()), "barrier")
    assert result.verdict is Verdict.PROVED, result.findings


def refuted(context, text: str):
    result = samples.verdict(context, "barrier")
    assert result.verdict is Verdict.REFUTED, result.findings
    return next(f for f in result.findings if f.verdict is Verdict.REFUTED and text in f.message)


def half_block():
    """The compiler gives a barrier in a branch to the threads of the branch."""
    m = T.dynamic("m")

    @T.prim_func
    def half_block_kernel(x: T.Tensor[(m, 128), T.float32], out: T.Tensor[(m, 128), T.float32]):
        with T.Kernel(m, threads=128) as bm:
            tile = T.alloc_shared((128,), T.float32)
            tx = T.get_thread_binding()
            if tx < 64:
                tile[tx] = x[bm, tx]
                T.sync_threads()
                out[bm, tx] = tile[63 - tx]
            else:
                out[bm, tx] = x[bm, tx]

    return half_block_kernel


def test_a_barrier_of_half_the_block_is_proved():
    assert samples.verdict(samples.context(half_block()), "barrier").verdict is Verdict.PROVED


def test_a_block_barrier_in_a_branch_of_half_the_block_is_refuted():
    """tilelang #1026."""
    context = samples.context(half_block())
    call = samples.calls(context.extracted.device, "tvm_storage_sync")[0]
    call.args = call.args[:1]
    found = refuted(context, "barrier of the block")
    values = found.counterexample.values
    assert values["t1"] < 64 <= values["t2"] < 128
    assert found.counterexample.thread["tx"] == values["t1"]
    assert found.span.path == __file__


@pytest.mark.parametrize("count", [96, 128, 63])
def test_a_barrier_that_waits_for_another_number_of_threads_is_refuted(count):
    context = samples.context(half_block())
    call = samples.calls(context.extracted.device, "tvm_storage_sync")[0]
    call.args = (*call.args[:2], ir.Const(ir.INT32, count))
    found = refuted(context, f"{count} threads that it waits for")
    assert found.counterexample is None or found.counterexample.values["threads"] == 64


def test_a_barrier_of_a_part_of_a_warp_is_refuted():
    context = samples.context(half_block())
    branch = next(
        n
        for n in samples.nodes(context.extracted.device, ir.If)
        if any(isinstance(c, ir.Call) and c.op == "tvm_storage_sync" for c in ir.walk(n.then))
    )
    branch.cond.b = ir.Const(ir.INT32, 48)
    call = samples.calls(context.extracted.device, "tvm_storage_sync")[0]
    call.args = (*call.args[:2], ir.Const(ir.INT32, 48))
    refuted(context, "48 threads that it waits for")


def test_a_barrier_in_a_loop_of_different_lengths_is_refuted():
    context = samples.context(in_a_loop())
    loop = next(n for n in samples.nodes(context.extracted.device, ir.For) if n.kind == "serial")
    thread = next(n.var for n in samples.nodes(context.extracted.device, ir.Launch) if n.tag == "threadIdx.x")
    loop.extent = ir.BinOp(ir.INT32, "add", loop.extent, ir.BinOp(ir.INT32, "floordiv", thread, plain(32)))
    found = refuted(context, "barrier of the block")
    assert found.counterexample.loops


def in_a_loop():
    m = T.dynamic("m")

    @T.prim_func
    def loop_kernel(x: T.Tensor[(m, 128), T.float32], out: T.Tensor[(m, 128), T.float32]):
        with T.Kernel(1, threads=128):
            tile = T.alloc_shared((128,), T.float32)
            tx = T.get_thread_binding()
            for row in T.serial(m):
                tile[tx] = x[row, tx]
                out[row, tx] = tile[127 - tx]

    return loop_kernel


def plain(number: int) -> ir.Const:
    return ir.Const(ir.INT32, number)


def test_a_barrier_in_a_loop_of_symbolic_length_is_proved():
    assert samples.verdict(samples.context(in_a_loop()), "barrier").verdict is Verdict.PROVED


def guard(context, statement_of: str, bound: int) -> None:
    """Put the calls of an operation under `if tx < bound`."""
    device = context.extracted.device
    thread = next(n.var for n in samples.nodes(device, ir.Launch) if n.tag == "threadIdx.x")
    condition = ir.BinOp(ir.BOOL, "lt", thread, plain(bound))
    for node in samples.nodes(device, ir.Seq):
        node.stmts = tuple(
            ir.If(s.span, condition, s, None)
            if isinstance(s, ir.Eval) and isinstance(s.value, ir.Call) and s.value.op == statement_of
            else s
            for s in node.stmts
        )


@pytest.mark.parametrize(
    "op", ["warpgroup_arrive", "warpgroup_commit_batch", "warpgroup_wait", "set_max_nreg"]
)
def test_a_warpgroup_operation_by_half_a_warpgroup_is_refuted(op):
    context = samples.context(samples.gemm())
    guard(context, op, 192)
    found = refuted(context, f"{op} is executed by all 128 threads")
    assert found.counterexample.values["t1"] // 128 == found.counterexample.values["t2"] // 128


def test_an_election_by_a_part_of_a_warp_is_refuted():
    context = samples.context(samples.gemm())
    guard(context, "mbarrier_wait_parity", 40)  # says nothing of elections
    assert samples.verdict(context, "barrier").verdict is Verdict.PROVED
    branches = samples.nodes(context.extracted.device, ir.If)
    elections = [b for b in branches if isinstance(b.cond, ir.Call) and b.cond.op == "tl_shuffle_elect"]
    election = elections[-1]  # that of the producer
    thread = next(n.var for n in samples.nodes(context.extracted.device, ir.Launch) if n.tag == "threadIdx.x")
    lanes = ir.BinOp(ir.BOOL, "lt", thread, plain(16))
    election.then, election.cond = ir.If(None, election.cond, election.then, None), lanes
    refuted(context, "tl_shuffle_elect is executed by all 32 threads")


def test_a_reduction_by_a_part_of_the_threads_is_refuted():
    context = samples.context(samples.row_sums())
    device = context.extracted.device
    thread = next(n.var for n in samples.nodes(device, ir.Launch) if n.tag == "threadIdx.x")
    for node in samples.nodes(device, ir.Seq):
        node.stmts = tuple(
            ir.If(s.span, ir.BinOp(ir.BOOL, "lt", thread, plain(128)), s, None)
            if isinstance(s, ir.Store)
            and any(isinstance(c, ir.Call) and c.op == "call_extern" for c in ir.walk(s))
            else s
            for s in node.stmts
        )
    refuted(context, "256 threads that it waits for")


def test_one_number_for_different_threads_is_unknown():
    context = samples.context(half_block())
    device = context.extracted.device
    branch = next(
        n
        for n in samples.nodes(device, ir.If)
        if n.orelse is not None
        and any(isinstance(c, ir.Call) and c.op == "tvm_storage_sync" for c in ir.walk(n))
    )
    call = samples.calls(device, "tvm_storage_sync")[0]
    again = ir.Eval(branch.span, ir.Call(call.dtype, call.op, call.args))
    branch.orelse = ir.Seq(branch.span, (again, branch.orelse))
    result = samples.verdict(context, "barrier")
    assert result.verdict is Verdict.UNKNOWN
    assert "shared by different threads" in result.findings[0].message


@pytest.mark.parametrize(("op", "wanted"), [("sync_grid", "REFUTED"), ("cluster_sync", "UNSUPPORTED")])
def test_barriers_of_more_than_a_block(op, wanted):
    """Half a block comes to the grid's barrier; a cluster's has no meaning here."""
    context = samples.context(half_block())
    call = samples.calls(context.extracted.device, "tvm_storage_sync")[0]
    call.op, call.args = op, ()
    assert samples.verdict(context, "barrier").verdict is Verdict(wanted)


def half_a_condition(first: int, shuffles: bool):
    """An election behind `&&`, or a shuffle in a branch of `?:`, is evaluated by some threads alone."""

    @T.prim_func
    def half_a_condition_kernel(out: T.Tensor[(128,), T.int32]):
        with T.Kernel(1, threads=128):
            tx = T.get_thread_binding()
            if shuffles:
                out[tx] = T.if_then_else(tx >= first, T.shfl_sync(tx, 0), 0)
            else:
                if tx >= first and T.shuffle_elect(128):
                    out[tx] = 1

    return half_a_condition_kernel


@pytest.mark.parametrize("shuffles", [False, True])
def test_what_is_evaluated_on_a_condition_takes_whole_warps(shuffles):
    assert (
        samples.verdict(samples.context(half_a_condition(32, shuffles)), "barrier").verdict is Verdict.PROVED
    )
    refuted(samples.context(half_a_condition(5, shuffles)), "executed by all 32 threads together")
