"""barrier where variables that each thread computes for itself decide who comes: lookups, searches, roles."""

import pytest
from tilelang import language as T

from dsv4_kernels.contract import Contract
from tests.verify.samples import verdict
from verify.extract import extract
from verify.properties import Context
from verify.verdict import Verdict

N, THREADS, WARP = 8, 128, 32
CONTRACT = Contract((f"0 <= firsts < {N}", f"0 <= kinds < {N}"))


def looked_up(how: str, whole_block: bool = True):
    """A barrier on what a thread has looked up in two steps."""

    @T.prim_func
    def kernel(
        firsts: T.Tensor[(N,), T.int32],
        kinds: T.Tensor[(N,), T.int32],
        out: T.Tensor[(N, THREADS), T.int32],
    ):
        with T.Kernel(N, threads=THREADS) as bm:
            tx = T.get_thread_binding()
            at = T.alloc_local((1,), T.int32)
            kind = T.alloc_local((1,), T.int32)
            table = T.alloc_shared((N,), T.int32)
            at[0] = 0
            kind[0] = 0
            if how == "by thread":
                at[0] = firsts[tx % N]
            if how == "by warp":
                at[0] = firsts[tx // WARP]
            if how == "in a loop":
                for i in T.serial(N):
                    if firsts[i] <= bm:
                        at[0] = i
            if how == "in a search":
                while (at[0] < N - 1) and (firsts[at[0]] <= bm):
                    at[0] = at[0] + 1
            if how == "in a search of its own":
                while (at[0] < N - 1) and (firsts[at[0]] <= tx):
                    at[0] = at[0] + 1
            if how == "one thread's":  # noqa: SIM102
                if tx == 3:
                    at[0] = firsts[bm]
            if how == "half's":  # noqa: SIM102
                if tx < THREADS // 2:
                    at[0] = firsts[bm]
            if how == "counted":
                for _ in T.serial(tx % N):
                    at[0] = T.min(at[0] + 1, N - 1)
            if how == "in shared memory":
                if tx < N:
                    table[tx] = firsts[tx]
                at[0] = table[bm]
            if how == "counted by all":
                at[0] = T.min(T.max(T.atomic_add(out[0, 0], 1, return_prev=True), 0), N - 1)
            if how == "by neighbours":
                at[0] = T.shfl_sync(firsts[tx % N], tx % WARP)
            if how == "by a leader":
                at[0] = T.shfl_sync(firsts[tx % N], 0)
            if how == "by block":
                at[0] = firsts[bm]
            if at[0] > 0:
                kind[0] = kinds[at[0]]
            if kind[0] > 2:
                if whole_block:
                    T.sync_threads()
                else:
                    T.sync_warp()
            out[bm, tx] = kind[0]

    return kernel


def written(which: str):
    """A tensor that the kernel writes is no place to look up in: others may write between two reads."""

    @T.prim_func
    def kernel(kinds: T.Tensor[(N,), T.int32], out: T.Tensor[(N, THREADS), T.int32]):
        with T.Kernel(N, threads=THREADS) as bm:
            tx = T.get_thread_binding()
            kind = T.alloc_local((1,), T.int32)
            kind[0] = kinds[bm] if which == "read" else out[bm, 0]
            if kind[0] > 2:
                T.sync_threads()
            out[bm, tx] = kind[0]

    return kernel


def roles(own: bool):
    """Two roles of two warps each, with a variable that either computes for its own use.

    Args:
        own: the barrier of the first role hangs on what both its warps have looked up; else on what one has.
    """
    half = THREADS // 2

    @T.prim_func
    def kernel(kinds: T.Tensor[(N,), T.int32], out: T.Tensor[(N, THREADS), T.int32]):
        with T.Kernel(N, threads=THREADS) as bm:
            tx = T.get_thread_binding()
            kind = T.alloc_local((1,), T.int32)
            kind[0] = 0
            if tx < half:
                if own:
                    kind[0] = kinds[bm]
                else:
                    if tx < WARP:
                        kind[0] = kinds[bm]
                if kind[0] > 2:
                    T.sync_threads(1, half)
            else:
                if tx < half + WARP:
                    kind[0] = kinds[bm]
                if kind[0] > 2:
                    T.sync_warp()
            out[bm, tx] = kind[0]

    return kernel


def result(kernel, contract=CONTRACT):
    return verdict(Context(extract(kernel), contract, {}), "barrier")


@pytest.mark.parametrize("how", ["by block", "in a loop", "in a search"])
@pytest.mark.parametrize("whole_block", [False, True])
def test_what_all_threads_look_up_alike_is_the_same(how, whole_block):
    found = result(looked_up(how, whole_block))
    assert found.verdict is Verdict.PROVED, found.findings
    assert any("written before they are read" in a for a in found.assumptions)


@pytest.mark.parametrize("how", ["by warp", "half's", "by a leader"])
def test_what_a_warp_looks_up_alike_is_the_same_in_the_warp_alone(how):
    found = result(looked_up(how, False))
    assert found.verdict is Verdict.PROVED, found.findings
    assert result(looked_up(how, True)).verdict is not Verdict.PROVED


@pytest.mark.parametrize("whole_block", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        "by thread",
        "in a search of its own",
        "one thread's",
        "counted",
        "in shared memory",
        "counted by all",
        "by neighbours",
    ],
)
def test_what_threads_find_each_for_itself_is_not(how, whole_block):
    assert result(looked_up(how, whole_block)).verdict in (Verdict.UNKNOWN, Verdict.REFUTED)


def test_a_tensor_that_the_kernel_writes_is_not_the_same_twice():
    contract = Contract((f"0 <= kinds < {N}",))
    assert result(written("read"), contract).verdict is Verdict.PROVED
    assert result(written("own"), contract).verdict is Verdict.UNKNOWN


def test_a_role_is_compared_within_itself():
    contract = Contract((f"0 <= kinds < {N}",))
    found = result(roles(True), contract)
    assert found.verdict is Verdict.PROVED, found.findings
    assert result(roles(False), contract).verdict in (Verdict.UNKNOWN, Verdict.REFUTED)
