"""Warpgroups that wait by mbarriers alone: no barrier of the compiler's, and what their proofs look at."""

import pytest
from tilelang import language as T

from dsv4_kernels.tile.corrections import corrected
from dsv4_kernels.tile.own_sync import own_sync
from tests.verify import samples
from verify import ir
from verify.verdict import Verdict

ROWS, COLUMNS, THREADS = 64, 128, 256
BY_ROW = T.Fragment((2 * ROWS, COLUMNS), lambda i, j: (i % 16 * 16 + j // 8, i // 16 * 8 + j % 8))
ASYNC = {"parallel_async_without_async_commit_wait": True}


def make_kernel():
    """Copies of 128 rows that arrive by themselves; the last 64 are multiplied, 64 columns a warpgroup."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, 2 * ROWS, COLUMNS), T.bfloat16],
        w: T.Tensor[(ROWS, ROWS), T.bfloat16],
        out: T.Tensor[(m, ROWS, COLUMNS), T.float32],
    ):
        with T.Kernel(m, threads=THREADS) as b:
            left = T.alloc_shared((ROWS, ROWS), T.bfloat16)
            tall = T.alloc_shared((2 * ROWS, COLUMNS), T.bfloat16)
            acc = T.alloc_fragment((ROWS, COLUMNS), T.float32)
            full = T.alloc_barrier([THREADS])
            for i, j in T.Parallel(2 * ROWS, COLUMNS, loop_layout=BY_ROW, annotations=ASYNC):
                tall[i, j] = x[b, i, j]
            T.fence_proxy_async()  # orders nothing that has not ended yet
            T.cp_async_barrier_noinc(full)
            for i, j in T.Parallel(ROWS, ROWS):
                left[i, j] = w[i, j]
            T.fence_proxy_async()
            T.sync_threads()
            T.clear(acc)
            T.mbarrier_wait_parity(full, 0)
            T.fence_proxy_async()
            T.gemm(left, tall[ROWS : 2 * ROWS, :], acc, policy=T.GemmWarpPolicy.FullCol)
            for i, j in T.Parallel(ROWS, COLUMNS):
                out[b, i, j] = acc[i, j]

    return own_sync(kernel)


def context():
    with corrected():
        return samples.context(make_kernel())


def without_fence_behind_the_wait(found):
    for node in samples.nodes(found.extracted.device, ir.Seq):
        ops = [
            s.value.op if isinstance(s, ir.Eval) and isinstance(s.value, ir.Call) else "" for s in node.stmts
        ]
        if "mbarrier_wait_parity" in ops:
            first = ops.index("mbarrier_wait_parity")
            pairs = enumerate(zip(node.stmts, ops, strict=True))
            node.stmts = tuple(s for n, (s, op) in pairs if n < first or op != "fence_proxy_async")
            return
    raise AssertionError("the kernel waits nowhere")


def test_the_compiler_puts_no_barrier_of_its_own():
    # One is the kernel's, one follows the initialisation of mbarriers.
    assert len(samples.calls(context().extracted.device, "tvm_storage_sync")) == 2


@pytest.mark.parametrize("name", ["race", "mbarrier", "layout", "refinement", "init"])
def test_what_waits_by_mbarriers_is_proved(name):
    result = samples.verdict(context(), name)
    assert result.verdict is Verdict.PROVED, result.findings


def test_a_part_of_a_taller_operand_is_read_where_it_lies():
    result = samples.verdict(samples.context(make_kernel()), "refinement")  # as the compiler ships
    assert result.verdict is Verdict.REFUTED, result.findings


def test_copies_that_arrive_by_themselves_need_a_proxy_fence_behind_the_wait():
    found = context()
    without_fence_behind_the_wait(found)
    result = samples.verdict(found, "race")
    assert result.verdict is Verdict.REFUTED
    assert any("cp.async" in f.message and "operand B" in f.message for f in result.findings)
