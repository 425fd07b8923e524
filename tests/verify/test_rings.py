"""Rings that a kernel fills ahead of their use by cp.async, in loops of symbolic length; and their faults."""

from typing import Any

import pytest
from tilelang import language as T

from dsv4_kernels.contract import Contract
from tests.verify import samples
from verify import ir
from verify.engine import check
from verify.properties import all_properties
from verify.signature.dispatch import Dispatch
from verify.verdict import Verdict, worst

WIDTH = 128
CONTRACT = Contract(("0 <= m", "m <= 65536", "0 < c", "c <= 65536"))
ASYNC = {"parallel_async_without_async_commit_wait": True}


def summed(
    pending: int = 0, behind: int = 1, first: int = 0, is_filled: bool = True, is_guarded: bool = False
) -> Any:
    """Sum a row's chunks, each gathered while the one before it is added.

    Args:
        pending: groups that a round leaves under way.
        behind: rounds after which a slot is filled that is filled `behind` rounds ahead.
        first: chunk that is gathered before the loop.
        is_filled: it is gathered at all.
        is_guarded: past the last chunk nothing is written, instead of that chunk again.
    """
    m = T.dynamic("m")
    c: Any = T.dynamic("c")

    @T.macro
    def gather(x: Any, ring: Any, row: Any, chunk: Any, slot: Any):
        for j in T.Parallel(WIDTH, annotations=ASYNC):
            ring[slot, j] = x[row, T.min(chunk, c - 1), j]
        T.ptx_commit_group()

    @T.prim_func
    def summed_kernel(x: T.Tensor[(m, c, WIDTH), T.float32], out: T.Tensor[(m, WIDTH), T.float32]):
        with T.Kernel(m, threads=WIDTH) as row:
            ring = T.alloc_shared((2, WIDTH), T.float32)
            total = T.alloc_fragment((WIDTH,), T.float32)
            T.clear(total)
            if is_filled:
                gather(x, ring, row, first, 0)
            for k in T.serial(c):
                T.ptx_wait_group(pending)
                T.sync_threads()
                if is_guarded:
                    if k + 1 < c:
                        gather(x, ring, row, k + 1, (k + behind) % 2)
                else:
                    gather(x, ring, row, k + 1, (k + behind) % 2)
                for j in T.Parallel(WIDTH):
                    total[j] += ring[k % 2, WIDTH - 1 - j]
            for j in T.Parallel(WIDTH):
                out[row, j] = total[j]

    return summed_kernel


def verdict(prim_func: Any, name: str) -> Any:
    """Check one property, without regard to what it depends on."""
    prop = next(p for p in all_properties() if p.name == name)
    extracted, dispatch = samples.extracted(prim_func), Dispatch(("m",), "own")
    (result,) = check("test", "own", extracted, CONTRACT, {}, properties=[prop], dispatch=dispatch).properties
    result.findings = [f for f in result.findings if not f.message.startswith("rests on")]
    result.verdict = worst(f.verdict for f in result.findings)
    return result


@pytest.mark.parametrize("name", ["bounds", "race", "init", "refinement", "batch_invariance"])
def test_a_ring_is_proved(name):
    result = verdict(summed(), name)
    assert result.verdict is Verdict.PROVED, result.findings


@pytest.mark.parametrize(
    ("prim_func", "name", "expected"),
    [
        (summed(pending=1), "race", {Verdict.REFUTED, Verdict.UNKNOWN}),
        (summed(behind=2), "race", {Verdict.REFUTED}),
        (summed(is_filled=False), "init", {Verdict.REFUTED, Verdict.UNKNOWN}),
        (summed(is_guarded=True), "init", {Verdict.UNKNOWN}),
    ],
    ids=[
        "a group under way",
        "the slot in use",
        "not filled",
        "filled under a condition",
    ],
)
def test_a_fault_is_not_proved(prim_func, name, expected):
    result = verdict(prim_func, name)
    assert result.verdict in expected, result.findings


def test_another_first_round_is_another_sum():
    """Rows do not see the batch, whichever chunk comes first; but what is added has another signature."""
    results = [verdict(summed(first=first), "batch_invariance") for first in (0, 1, 2)]
    assert all(r.verdict is Verdict.PROVED for r in results)
    assert len({r.facts["signature"] for r in results}) == len(results)


def test_a_ring_without_barrier_is_refuted():
    context = samples.context(summed(), CONTRACT)
    for node in samples.nodes(context.extracted.device, ir.Seq):
        node.stmts = tuple(
            s
            for s in node.stmts
            if not (
                isinstance(s, ir.Eval) and isinstance(s.value, ir.Call) and s.value.op == "tvm_storage_sync"
            )
        )
    assert samples.verdict(context, "race").verdict is Verdict.REFUTED


def reductions(is_own: bool) -> Any:
    """Two sums of different lengths; the longer one reads another row beyond the shorter one's length."""
    m = T.dynamic("m")

    @T.prim_func
    def reductions_kernel(x: T.Tensor[(m, 32), T.float32], out: T.Tensor[(m,), T.float32]):
        with T.Kernel(m, threads=32) as row:
            few = T.alloc_fragment((1, 8), T.float32)
            many = T.alloc_fragment((1, 32), T.float32)
            few_total = T.alloc_fragment((1,), T.float32)
            total = T.alloc_fragment((1,), T.float32)
            for i, j in T.Parallel(1, 8):
                few[i, j] = x[row, j]
            for i, j in T.Parallel(1, 32):
                many[i, j] = T.if_then_else(j < 8, x[row, j], x[row if is_own else 0, j])
            T.reduce_sum(few, few_total, dim=1)
            T.reduce_sum(many, total, dim=1)
            for i in T.Parallel(1):
                out[row] = few_total[i] + total[i]

    return reductions_kernel


@pytest.mark.parametrize("is_own", [True, False])
def test_counters_of_two_lengths_are_two(is_own):
    result = verdict(reductions(is_own), "batch_invariance")
    assert (result.verdict is Verdict.PROVED) == is_own, result.findings


def across_warpgroups() -> Any:
    """Row maxima and sums whose columns are shared out over two warpgroups."""
    m = T.dynamic("m")
    layout = T.Fragment(
        (64, 64),
        lambda i, j: (
            j // 32 * 128 + i // 16 * 32 + i % 8 * 4 + j % 8 // 2,
            j % 32 // 8 * 4 + i % 16 // 8 * 2 + j % 2,
        ),
    )

    @T.prim_func
    def across_kernel(x: T.Tensor[(m, 64), T.float32], out: T.Tensor[(m, 64), T.float32]):
        with T.Kernel(T.ceildiv(m, 64), threads=256) as bm:
            rows = T.alloc_fragment((64, 64), T.float32)
            largest = T.alloc_fragment((64,), T.float32)
            total = T.alloc_fragment((64,), T.float32)
            T.annotate_layout({rows: layout})
            for i, j in T.Parallel(64, 64):
                rows[i, j] = x[bm * 64 + i, j]
            T.reduce_max(rows, largest, dim=1)
            T.reduce_sum(rows, total, dim=1)
            for i, j in T.Parallel(64, 64):
                out[bm * 64 + i, j] = (rows[i, j] - largest[i]) * total[i]

    return across_kernel


@pytest.mark.parametrize("name", ["bounds", "refinement"])
def test_reductions_in_two_exchanges_are_proved(name):
    result = samples.verdict(samples.context(across_warpgroups(), samples.ROWS), name)
    assert result.verdict is Verdict.PROVED, result.findings


def test_a_second_exchange_of_the_same_threads_is_refuted():
    context = samples.context(across_warpgroups(), samples.ROWS)
    for node in samples.nodes(context.extracted.device, ir.Str):
        node.value = node.value.replace("tl::SumOp, 4, 1,", "tl::SumOp, 256, 128,")
    assert samples.verdict(context, "refinement").verdict is Verdict.REFUTED
