"""Loops on a condition, waits for other CTAs, atomics whose old value is used, and ranges of data."""

import pytest
from tilelang import language as T

from dsv4_kernels.contract import Contract
from tests.verify.samples import verdict
from verify.extract import extract
from verify.properties import Context
from verify.verdict import Verdict

N, THREADS, LIMIT = 8, 128, 1000


def search(stop: int):
    """Find the part of an ascending list that a row belongs to; sound if it stops at the last but one."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(firsts: T.Tensor[(N,), T.int32], out: T.Tensor[(m, THREADS), T.int32]):
        with T.Kernel(m, threads=THREADS) as bm:
            at = T.alloc_local((1,), T.int32)
            found = T.alloc_shared((N,), T.int32)
            for i in T.Parallel(N):
                found[i] = i
            at[0] = 0
            while (at[0] < stop) and (firsts[at[0]] <= bm):
                at[0] = at[0] + 1
            for j in T.Parallel(THREADS):
                out[bm, j] = found[at[0]]

    return kernel


def divergent(by_block: bool):
    """A barrier behind a search: all threads search alike, or each for its own number."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(firsts: T.Tensor[(N,), T.int32], out: T.Tensor[(m, THREADS), T.int32]):
        with T.Kernel(m, threads=THREADS) as bm:
            tx = T.get_thread_binding()
            at = T.alloc_local((1,), T.int32)
            at[0] = 0
            while (at[0] < N) and (firsts[at[0]] <= (bm if by_block else tx)):
                at[0] = at[0] + 1
            if at[0] < N:
                T.sync_threads()
            out[bm, tx] = at[0]

    return kernel


def chosen(both: bool):
    """What two branches leave in a variable is known behind them; with one it may be anything."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m,), T.int32], out: T.Tensor[(m, THREADS), T.int32]):
        with T.Kernel(m, threads=THREADS) as bm:
            at = T.alloc_local((1,), T.int32)
            table = T.alloc_shared((N,), T.int32)
            for i in T.Parallel(N):
                table[i] = i
            if both:
                at[0] = N - 1
            if x[bm] > 0:
                at[0] = 0
            for j in T.Parallel(THREADS):
                out[bm, j] = table[at[0]]

    return kernel


def wait(limit: int):
    """Wait for a word, at most so many polls; what is counted must fit."""

    @T.prim_func
    def kernel(flag: T.Tensor[(1,), T.int32], out: T.Tensor[(1,), T.int32]):
        with T.Kernel(1, threads=THREADS):
            polls = T.alloc_local((1,), T.int32)
            table = T.alloc_shared((LIMIT + 1,), T.int32)
            for i in T.Parallel(LIMIT + 1):
                table[i] = i
            polls[0] = 0
            if T.get_thread_binding() == 0:
                while (T.atomic_load(flag[0], memory_order="acquire") == 0) and (polls[0] < limit):
                    polls[0] = polls[0] + 1
                out[0] = table[polls[0]]

    return kernel


def grid(uniform: bool):
    """A barrier of all blocks, which all come to, or but the last."""

    @T.prim_func
    def kernel(x: T.Tensor[(N, THREADS), T.float32], out: T.Tensor[(N, THREADS), T.float32]):
        with T.Kernel(N, threads=THREADS) as bm:
            if uniform:
                T.sync_grid()
            else:
                if bm < N - 1:  # pyright: ignore[reportOperatorIssue]
                    T.sync_grid()
            for j in T.Parallel(THREADS):
                out[bm, j] = x[bm, j]

    return kernel


def ticket(used: bool):
    """A number from a shared counter: which block gets which differs from run to run."""

    @T.prim_func
    def kernel(counter: T.Tensor[(1,), T.int32], out: T.Tensor[(N,), T.int32]):
        with T.Kernel(N, threads=THREADS) as bm:
            old = T.alloc_local((1,), T.int32)
            if T.get_thread_binding() == 0:
                old[0] = T.atomic_add(counter[0], 1, return_prev=True)
                out[bm] = old[0] if used else bm

    return kernel


def scaled(factor: int):
    """An address from data: its product fits the type for what the contract lets through."""

    @T.prim_func
    def kernel(
        idx: T.Tensor[(N,), T.int32], x: T.Tensor[(N * 1024,), T.float32], out: T.Tensor[(N,), T.float32]
    ):
        with T.Kernel(N, threads=THREADS) as bm:
            at = T.alloc_local((1,), T.int32)
            if T.get_thread_binding() == 0:
                at[0] = idx[bm] * factor
                out[bm] = x[T.min(at[0], N * 1024 - 1)]

    return kernel


def summed(step: int):
    """A count over rounds whose number data decide: at most as many as the contract lets through."""

    @T.prim_func
    def kernel(n: T.Tensor[(N,), T.int32], x: T.Tensor[(4 * N,), T.float32], out: T.Tensor[(N,), T.float32]):
        with T.Kernel(N, threads=THREADS) as bm:
            done = T.alloc_local((1,), T.int32)
            done[0] = 0
            for i in T.serial(n[bm]):
                if x[i % N] > 0:
                    done[0] = done[0] + step
            if T.get_thread_binding() == 0:
                out[bm] = x[T.min(done[0], 4 * N - 1)]

    return kernel


def result(kernel, name: str, *clauses: str):
    configs = {"tl.disable_thread_storage_sync": True}
    return verdict(Context(extract(kernel, pass_configs=configs), Contract(clauses), {}), name)


M = ("0 <= m", "m <= 65536")


@pytest.mark.parametrize(
    ("kernel", "name", "clauses", "is_sound"),
    [
        (lambda: search(N - 1), "bounds", M, True),
        (lambda: search(N), "bounds", M, False),
        (lambda: search(N - 1), "overflow", M, True),
        (lambda: divergent(True), "barrier", M, True),
        (lambda: divergent(False), "barrier", M, False),
        (lambda: chosen(True), "bounds", M, True),
        (lambda: chosen(False), "bounds", M, False),
        (lambda: wait(LIMIT), "bounds", (), True),
        (lambda: wait(LIMIT + 1), "bounds", (), False),
        (lambda: grid(True), "barrier", (), True),
        (lambda: grid(False), "barrier", (), False),
        (lambda: ticket(False), "determinism", (), True),
        (lambda: ticket(True), "determinism", (), False),
        (lambda: summed(1 << 20), "overflow", ("0 <= n < 2047",), True),
        (lambda: summed(1 << 20), "overflow", ("0 <= n < 4096",), False),
        (lambda: scaled(1 << 20), "overflow", ("0 <= idx < 2048",), True),
        (lambda: scaled(1 << 20), "overflow", ("0 <= idx < 2049",), False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_and_good(kernel, name, clauses, is_sound):
    found = result(kernel(), name, *clauses)
    assert (found.verdict is Verdict.PROVED) is is_sound, found.findings


def test_a_grid_barrier_that_a_block_leaves_out_is_refuted():
    assert result(grid(False), "barrier").verdict is Verdict.REFUTED


def test_a_ticket_that_is_stored_is_refuted():
    assert result(ticket(True), "determinism").verdict is Verdict.REFUTED


def test_a_promise_that_the_encoding_rests_on_is_listed():
    found = result(scaled(1 << 20), "overflow", "0 <= idx < 2048")
    assert any("0 <= idx < 2048 (every element of idx" in a for a in found.assumptions)
