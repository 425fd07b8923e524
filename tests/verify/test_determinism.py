"""determinism: atomics that meet, values that depend on arrival, and atomics that are harmless."""

import pytest
from tilelang import language as T

from tests.verify.samples import SOUND, context, verdict
from verify import ir
from verify.verdict import Verdict

THREADS = 128


def split_k():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, THREADS), T.float32], out: T.Tensor[(m,), T.float32]):
        with T.Kernel(m, 4, threads=THREADS) as (bm, bk):
            part = T.alloc_fragment((32,), T.float32)
            total = T.alloc_fragment((1,), T.float32)
            T.copy(x[bm, bk * 32], part)
            T.reduce_sum(part, total, dim=0)
            for i in T.Parallel(1):
                T.atomic_add(out[bm + i], total[i])

    return kernel


def one_update_an_element():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, THREADS), T.float32], out: T.Tensor[(m, THREADS), T.float32]):
        with T.Kernel(m, threads=THREADS) as bm:
            for j in T.Parallel(THREADS):
                T.atomic_add(out[bm, j], x[bm, j])

    return kernel


def histogram():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m,), T.int32], out: T.Tensor[(THREADS,), T.int32]):
        with T.Kernel(T.ceildiv(m, THREADS), threads=THREADS) as bm:
            counts = T.alloc_shared((THREADS,), T.int32)
            T.clear(counts)
            for i in T.Parallel(THREADS):
                if bm * THREADS + i < m:
                    T.atomic_add(counts[x[bm * THREADS + i] % THREADS], 1)
            for i in T.Parallel(THREADS):
                T.atomic_add(out[i], counts[i])

    return kernel


def sum_then_maximum():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m,), T.int32], out: T.Tensor[(1,), T.int32]):
        with T.Kernel(T.ceildiv(m, THREADS), threads=THREADS) as bm:
            for i in T.Parallel(THREADS):
                if bm * THREADS + i < m:
                    T.atomic_add(out[0], x[bm * THREADS + i])
                    T.atomic_max(out[0], x[bm * THREADS + i])

    return kernel


def slots_by_arrival():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m,), T.int32], count: T.Tensor[(1,), T.int32], out: T.Tensor[(m,), T.int32]):
        with T.Kernel(T.ceildiv(m, THREADS), threads=THREADS) as bm:
            row = bm * THREADS + T.get_thread_binding()
            slot = T.alloc_var(T.int32)
            if row < m:
                slot = T.atomic_add(count[0], 1, return_prev=True)
                out[slot] = x[row]

    return kernel


def loops_from_arrival():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(count: T.Tensor[(1,), T.int32], out: T.Tensor[(m,), T.int32]):
        with T.Kernel(m, threads=THREADS) as bm:
            tx = T.get_thread_binding()
            if tx == 0:
                for i in T.serial(T.min(T.atomic_add(count[0], 1, return_prev=True), 3), 4):
                    out[bm] = i

    return kernel


def stamped():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m,), T.int64], out: T.Tensor[(m,), T.int64]):
        with T.Kernel(m, threads=1) as bm:
            out[bm] = x[bm] + T.call_extern("int64", "clock64")  # type: ignore[attr-defined]

    return kernel


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (split_k, "two threads update one element of out by atomic add"),
        (sum_then_maximum, "atomic add and max meet in one element of out"),
        (slots_by_arrival, "where out is written depends on the value that atomic add on count returns"),
        (stamped, "what is written to out depends on 'clock64'()"),
    ],
)
def test_results_that_depend_on_arrival_are_refuted(make, message):
    result = verdict(context(make()), "determinism")
    assert result.verdict is Verdict.REFUTED
    found = [f for f in result.findings if f.verdict is Verdict.REFUTED and message in f.message]
    assert found
    assert found[0].counterexample.shape["m"] >= 1


def test_two_different_blocks_or_threads_are_named():
    result = verdict(context(split_k()), "determinism")
    example = result.findings[0].counterexample
    runs = [(example.block["bx"], example.block["by"], example.thread["tx"])]
    runs.append(tuple(example.values[name] for name in ("bx'", "by'", "tx'")))
    assert runs[0] != runs[1]
    assert runs[0][0] == runs[1][0] == example.values["element"]


@pytest.mark.parametrize("make", [one_update_an_element, histogram, *SOUND])
def test_kernels_without_an_order_are_proved(make):
    result = verdict(context(make()), "determinism")
    assert result.verdict is Verdict.PROVED, result.findings


def test_harmless_atomics_say_why():
    notes = " ".join(verdict(context(histogram()), "determinism").notes)
    assert "counts: integer atomic add, commutative" in notes
    assert "out: integer atomic add, commutative" in notes
    assert "at most one update" in " ".join(verdict(context(one_update_an_element()), "determinism").notes)


def test_a_loop_that_begins_at_an_unstable_value_is_refuted():
    found = context(loops_from_arrival())
    (loop,) = (n for n in ir.walk(found.extracted.device.body) if isinstance(n, ir.For))
    loop.extent = ir.Const(ir.INT32, 1)  # where it begins alone tells what is written
    messages = [f.message for f in verdict(found, "determinism").findings]
    assert any("whether out is written depends on the value that atomic add" in m for m in messages)
