"""Property race on sound kernels, on their broken IR and on kernels that race."""

from functools import cache
from typing import Any

import pytest
from tilelang import language as T

from tests.verify import samples
from verify import ir
from verify.interp import device
from verify.interp.device.outcome import inputs
from verify.verdict import Verdict


@pytest.mark.parametrize("kernel", samples.SOUND, ids=lambda k: k.__name__)
def test_sound_kernels_are_proved(kernel):
    result = samples.verdict(samples.context(kernel()), "race")
    assert result.verdict is Verdict.PROVED, result.findings
    assert result.solvers["z3 unsat"] == result.solvers["cvc5 unsat"] > 0


def refuted(context, *texts: str) -> Any:
    result = samples.verdict(context, "race")
    assert result.verdict is Verdict.REFUTED, result.findings
    found = [f for f in result.findings if f.verdict is Verdict.REFUTED]
    return next(f for f in found if all(t in f.message for t in texts))


def proved(context) -> None:
    result = samples.verdict(context, "race")
    assert result.verdict is Verdict.PROVED, result.findings


def drop(context, op: str, which: int | None = None) -> None:
    """Take the calls of an operation out of the device IR; `which` counts them in program order."""
    seen = -1
    for node in samples.nodes(context.extracted.device, ir.Seq):
        kept = []
        for statement in node.stmts:
            call = statement.value if isinstance(statement, ir.Eval) else None
            if isinstance(call, ir.Call) and call.op == op:
                seen += 1
                if which is None or seen == which:
                    continue
            kept.append(statement)
        node.stmts = tuple(kept)
    assert seen >= (which or 0), f"no {op} in the kernel"


def follow(context, op: str, which: int, call: ir.Call) -> None:
    """Put a call behind the n-th one of an operation."""
    seen = -1
    for node in samples.nodes(context.extracted.device, ir.Seq):
        kept = []
        for statement in node.stmts:
            kept.append(statement)
            own = statement.value if isinstance(statement, ir.Eval) else None
            if isinstance(own, ir.Call) and own.op == op:
                seen += 1
                if seen == which:
                    kept.append(ir.Eval(statement.span, call))
        node.stmts = tuple(kept)
    assert seen >= which, f"no {op} in the kernel"


# --------------------------------------------------------------------------- barriers
@cache
def mirror():
    """Each round writes a row and reads it from the other end."""
    m = T.dynamic("m")

    @T.prim_func
    def mirror_kernel(x: T.Tensor[(m, 128), T.float32], out: T.Tensor[(m, 128), T.float32]):
        with T.Kernel(1, threads=128):
            tile = T.alloc_shared((128,), T.float32)
            tx = T.get_thread_binding()
            for row in T.serial(m):
                tile[tx] = x[row, tx]
                out[row, tx] = tile[127 - tx]

    return mirror_kernel


def test_a_loop_with_both_barriers_is_proved():
    proved(samples.context(mirror()))


def test_a_missing_barrier_is_refuted_in_one_round():
    context = samples.context(mirror())
    drop(context, "tvm_storage_sync", 1)
    values = refuted(context, "store to tile", "load from tile").counterexample.values
    assert values["t1"] + values["t2"] == 127
    assert values["byte_address"] == values["other byte_address"] == 4 * values["t1"]


def test_a_missing_barrier_on_the_back_edge_is_refuted_across_rounds():
    """tilelang #1781, #2613: the next round overwrites what this one still reads."""
    context = samples.context(mirror())
    drop(context, "tvm_storage_sync", 0)
    found = refuted(context, "store to tile", "load from tile")
    example = found.counterexample
    assert example.loops["row"] != example.values["other row"]
    assert example.values["t1"] + example.values["t2"] == 127
    assert found.span.path == __file__


@cache
def neighbours():
    """tilelang #2612: the compiler takes the barrier out of the branch, where it does nothing."""
    m = T.dynamic("m")

    @T.prim_func
    def neighbours_kernel(x: T.Tensor[(m, 128), T.float32], out: T.Tensor[(m, 128), T.float32]):
        with T.Kernel(m, threads=128) as bm:
            tile = T.alloc_shared((128,), T.float32)
            tx = T.get_thread_binding()
            tile[tx] = x[bm, tx]
            if tx % 4 == 0:
                for _ in T.serial(8):
                    tile[tx] = tile[tx] + tile[(tx + 4) % 128]
            out[bm, tx] = tile[tx]

    return neighbours_kernel


def test_a_barrier_taken_out_of_a_branch_is_refuted():
    values = refuted(samples.context(neighbours()), "store to tile", "load from tile").counterexample.values
    assert values["t1"] != values["t2"]
    assert values["t1"] % 4 == values["t2"] % 4 == 0


@cache
def histogram():
    m = T.dynamic("m")

    @T.prim_func
    def histogram_kernel(x: T.Tensor[(m, 128), T.int32], out: T.Tensor[(m, 32), T.int32]):
        with T.Kernel(m, threads=128) as bm:
            count = T.alloc_shared((32,), T.int32)
            tx = T.get_thread_binding()
            if tx < 32:
                count[tx] = 0
            T.atomic_add(count[x[bm, tx] % 32], 1)
            if tx < 32:
                out[bm, tx] = count[tx]

    return histogram_kernel


def test_atomics_do_not_race_with_each_other():
    proved(samples.context(histogram()))


@pytest.mark.parametrize("which", [0, 1])
def test_an_atomic_beside_a_plain_access_is_refuted(which):
    """tilelang #1257: no barrier after the atomics."""
    context = samples.context(histogram())
    drop(context, "tvm_storage_sync", which)
    refuted(context, "atomic_add", "count")


def test_a_barrier_of_the_reduction_is_what_orders_its_workspace():
    context = samples.context(samples.row_sums())
    call = samples.calls(context.extracted.device, "call_extern")[0]
    call.args[2].data  # noqa: B018 - the workspace is an access_ptr
    store = next(
        s for s in samples.nodes(context.extracted.device, ir.Store) if any(n is call for n in ir.walk(s))
    )
    scope = store.span
    workspace = next(
        a.buffer for a in samples.nodes(context.extracted.device, ir.Alloc) if a.buffer.scope == "shared.dyn"
    )
    last = ir.Store(scope, workspace, (ir.Const(ir.INT32, 0),), ir.Const(ir.DType("float32"), 0.0))
    for node in samples.nodes(context.extracted.device, ir.Seq):
        if store in node.stmts:
            node.stmts = (*node.stmts, last)
    refuted(context, "reduction workspace", "store to workspace")


# --------------------------------------------------------------------------- blocks
@cache
def last_block_wins():
    m = T.dynamic("m")

    @T.prim_func
    def last_kernel(x: T.Tensor[(m, 128), T.float32], out: T.Tensor[(128,), T.float32]):
        with T.Kernel(m, threads=128) as bm:
            for i in T.Parallel(128):
                out[i] = x[bm, i]

    return last_kernel


def test_blocks_that_write_one_element_are_refuted():
    example = refuted(samples.context(last_block_wins()), "store to out").counterexample
    assert example.block["bx"] != example.values["other bx"]
    assert example.shape["m"] == 2
    assert example.values["byte_address"] == example.values["other byte_address"]


@cache
def shifted_in_place():
    m = T.dynamic("m")

    @T.prim_func
    def shifted_kernel(x: T.Tensor[(m, 128), T.float32]):
        with T.Kernel(m, threads=128) as bm:
            tx = T.get_thread_binding()
            x[bm, tx] = x[(1 + bm) % m, tx]  # pyright: ignore[reportOperatorIssue]

    return shifted_kernel


def test_blocks_that_read_what_others_write_are_refuted():
    example = refuted(samples.context(shifted_in_place()), "store to x", "load from x").counterexample
    assert example.block["bx"] != example.values["other bx"]


# --------------------------------------------------------------------------- TMA, mbarriers, wgmma
def test_a_dropped_warpgroup_wait_is_refuted():
    context = samples.context(samples.gemm())
    drop(context, "warpgroup_wait")
    refuted(context, "wgmma operand")


def test_a_dropped_wgmma_fence_is_refuted():
    context = samples.context(samples.gemm())
    drop(context, "warpgroup_arrive")
    refuted(context, "wgmma accumulators")


@cache
def product_by_chunks(rounds: int = 4):
    """Ordinary instructions read the accumulators of a round, and none writes them."""
    m = T.dynamic("m")

    @T.prim_func
    def product_by_chunks_kernel(
        x: T.Tensor[(m, rounds * 64), T.bfloat16],
        w: T.Tensor[(64, rounds * 64), T.bfloat16],
        out: T.Tensor[(m, rounds * 64), T.float32],
    ):
        with T.Kernel(T.ceildiv(m, 64), threads=128) as bx:
            x_tile = T.alloc_shared((64, 64), T.bfloat16)
            w_tile = T.alloc_shared((64, 64), T.bfloat16)
            acc = T.alloc_fragment((64, 64), T.float32)
            for k in T.serial(rounds):
                T.copy(x[bx * 64, k * 64], x_tile)
                T.copy(w[0, k * 64], w_tile)
                T.gemm(x_tile, w_tile, acc, transpose_B=True, clear_accum=True)
                T.copy(acc, out[bx * 64, k * 64])

    return product_by_chunks_kernel


@pytest.mark.parametrize("rounds", [1, 4])
def test_a_first_wgmma_without_a_fence_is_refuted(rounds):
    """No register access makes the fence needed, but PTX asks for one before the first wgmma."""
    context = samples.context(product_by_chunks(rounds))
    proved(context)
    context = samples.context(product_by_chunks(rounds))
    drop(context, "warpgroup_arrive")
    refuted(context, "the first wgmma")


def test_a_consumer_that_does_not_wait_for_the_load_is_refuted():
    context = samples.context(samples.gemm())
    drop(context, "mbarrier_wait_parity", 1)
    example = refuted(context, "TMA load into", "wgmma operand").counterexample
    assert {"byte_address", "other byte_address", "other ko"} <= set(example.values)


def test_a_missing_proxy_fence_before_a_tma_store_is_refuted():
    context = samples.context(samples.gemm_tma_store())
    drop(context, "fence_proxy_async")
    refuted(context, "stmatrix", "TMA store from out_tile")


@pytest.mark.parametrize("which", [1, 2])
def test_a_missing_barrier_around_an_epilogue_in_shared_memory_is_refuted(which):
    """tilelang #2204: the output tile lies where an operand tile was."""
    context = samples.context(samples.gemm_tma_store())
    drop(context, "tvm_storage_sync", which)
    refuted(context, "stmatrix")


def test_operand_tiles_that_share_memory_are_refuted():
    """tilelang #2204, #2199: two allocations alive at once in one place of the arena."""
    context = samples.context(samples.gemm())
    views = samples.nodes(
        context.extracted.device,
        ir.Bind,
        lambda n: isinstance(n.value, ir.Call) and n.value.op == "handle_add_byte_offset",
    )
    for view in views:
        view.value.args = (view.value.args[0], ir.Const(ir.INT32, 0))
    refuted(context, "x_tile", "w_tile")


def test_barriers_initialised_late_are_refuted():
    context = samples.context(samples.gemm())
    drop(context, "tvm_storage_sync", 0)
    refuted(context, "mbarrier")


def test_an_unfenced_initialisation_of_barriers_is_refuted():
    context = samples.context(samples.gemm())
    drop(context, "ptx_fence_barrier_init")
    refuted(context, "mbarrier initialisation is fenced")


@pytest.mark.parametrize("role", ["loads", "computes"])
def test_a_proxy_fence_shows_an_initialisation_to_the_copies_of_its_own_threads(role):
    """PTX asks for a fence on the way from initialisation to copy: before the barrier or behind it."""
    context = samples.context(samples.gemm())
    drop(context, "ptx_fence_barrier_init")
    follow(context, "set_max_nreg", int(role == "computes"), ir.Call(ir.HANDLE, "fence_proxy_async", ()))
    tensors = inputs(context.extracted.tile, {"m": 1})
    assert tensors is not None
    if role == "loads":
        proved(context)
        device.run(context.extracted, *tensors)
    else:
        refuted(context, "initialisation is fenced")
        with pytest.raises(device.BarrierInitError, match="without a fence"):
            device.run(context.extracted, *tensors)


def test_a_store_that_outlives_the_block_is_unknown():
    context = samples.context(samples.gemm_tma_store())
    drop(context, "tma_store_wait")
    result = samples.verdict(context, "race")
    assert result.verdict is Verdict.UNKNOWN
    assert "when the block ends" in result.findings[0].message


def test_an_unknown_synchronisation_is_unsupported():
    context = samples.context(samples.gemm())
    samples.calls(context.extracted.device, "prefetch_tma_descriptor")[0].op = "cluster_sync"
    assert samples.verdict(context, "race").verdict is Verdict.UNSUPPORTED


def test_both_places_are_reported():
    found = refuted(samples.context(neighbours()), "store to tile", "load from tile")
    assert found.span.path == __file__
    assert str(found.counterexample.values["other place"]).startswith(__file__)
    assert {"buffer", "access", "other access", "t1", "t2", "bytes", "other bytes"} <= set(
        found.counterexample.values
    )


def test_products_of_two_row_blocks_in_one_warpgroup_are_proved():
    """The instruction stands in a loop over the row blocks; it does not race with itself."""
    proved(samples.context(samples.gemm(128)))


def test_products_of_two_row_blocks_without_a_fence_are_refuted():
    context = samples.context(samples.gemm(128))
    drop(context, "warpgroup_arrive")
    refuted(context, "wgmma accumulators")
