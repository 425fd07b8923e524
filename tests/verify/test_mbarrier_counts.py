"""What a phase gets and a wait waits for, where guards, trip counts or barriers are not those of all uses."""

from functools import cache

import pytest
from tilelang import language as T

from tests.verify import edits, samples
from tests.verify.test_mbarrier import result_of
from verify import ir
from verify.verdict import Verdict

THREADS, ROUNDS, WARP = 128, 8, 32
TILE = 64
TILE_BYTES = TILE * TILE * 2


def verdict(prim_func):
    return result_of(samples.extracted(prim_func)).verdict


@cache
def rounds_of_a_thread(own):
    """All threads arrive and wait in each round; if `own`, a thread's number says how many those are."""

    @T.prim_func
    def rounds_of_a_thread_kernel(out: T.Tensor[(THREADS,), T.float32]):
        with T.Kernel(1, threads=THREADS):
            bar = T.alloc_barrier([THREADS])
            tx = T.get_thread_binding()
            for k in T.serial(own * tx + 1):
                T.mbarrier_arrive(bar[0])
                T.mbarrier_wait_parity(bar[0], k % 2)
            out[tx] = 0.0

    return rounds_of_a_thread_kernel


def test_threads_that_arrive_less_often_than_others_are_not_passed():
    assert verdict(rounds_of_a_thread(0)) is Verdict.PROVED
    assert verdict(rounds_of_a_thread(1)) is Verdict.UNSUPPORTED


@cache
def arrives_twice(first):
    """Each thread arrives twice a phase, once of it in blocks from `first` on alone."""
    m = T.dynamic("m")

    @T.prim_func
    def arrives_twice_kernel(out: T.Tensor[(m, THREADS), T.float32]):
        with T.Kernel(m, threads=THREADS) as bm:
            bar = T.alloc_barrier([2 * THREADS])
            tx = T.get_thread_binding()
            for k in T.serial(ROUNDS):
                if bm >= first:
                    T.mbarrier_arrive(bar[0])
                T.mbarrier_arrive(bar[0])
                T.mbarrier_wait_parity(bar[0], k % 2)
            out[bm, tx] = 0.0

    return arrives_twice_kernel


def test_of_several_arrivals_of_a_phase_each_has_to_be_made():
    assert verdict(arrives_twice(0)) is Verdict.PROVED
    assert verdict(arrives_twice(1)) is Verdict.REFUTED


@cache
def one_phase_more(first):
    """A phase before the loop, in blocks from `first` on."""
    m = T.dynamic("m")

    @T.prim_func
    def one_phase_more_kernel(out: T.Tensor[(m, THREADS), T.float32]):
        with T.Kernel(m, threads=THREADS) as bm:
            bar = T.alloc_barrier([THREADS])
            tx = T.get_thread_binding()
            if bm >= first:
                T.mbarrier_arrive(bar[0])
                T.mbarrier_wait_parity(bar[0], 0)
            for k in T.serial(ROUNDS):
                T.mbarrier_arrive(bar[0])
                T.mbarrier_wait_parity(bar[0], (k + 1) % 2)
            out[bm, tx] = 0.0

    return one_phase_more_kernel


def test_a_visit_counts_where_it_is_made_alone():
    assert verdict(one_phase_more(0)) is Verdict.PROVED
    assert verdict(one_phase_more(1)) is Verdict.REFUTED


@cache
def loads_then_waits():
    """Two rounds load a tile each; behind them one more phase expects as many bytes."""
    m = T.dynamic("m")

    @T.prim_func
    def loads_then_waits_kernel(
        a: T.Tensor[(m, 2 * TILE), T.bfloat16], out: T.Tensor[(m, THREADS), T.bfloat16]
    ):
        with T.Kernel(m, threads=THREADS) as bm:
            bar = T.alloc_barrier([1])
            tile = T.alloc_shared((2, TILE, TILE), T.bfloat16)
            tx = T.get_thread_binding()
            if tx < WARP:
                for k in T.serial(2):
                    T.tma_copy(
                        a[bm * TILE : bm * TILE + TILE, k * TILE : k * TILE + TILE],
                        tile[k, :, :],
                        barrier=bar[0],
                    )
                    if T.shuffle_elect(WARP):
                        T.mbarrier_arrive(bar[0])
                        T.mbarrier_wait_parity(bar[0], k % 2)
                if T.shuffle_elect(WARP):
                    T.mbarrier_expect_tx(bar[0], 2 * TILE_BYTES)
                    T.mbarrier_arrive(bar[0])
                    T.mbarrier_wait_parity(bar[0], 0)
            T.sync_threads()
            out[bm, tx] = tile[0, tx % TILE, 0]

    return loads_then_waits_kernel


def expecting(*sizes):
    """Let the arrivals expect `sizes`, in place of statements of their own."""
    left = list(sizes)

    def edit(node):
        if edits.call_of(node, "mbarrier_expect_tx") is not None:
            return edits.nothing()
        call = edits.call_of(node, "ptx_arrive_barrier")
        if call is None:
            return None
        args = (call.args[0], ir.Const(ir.INT32, left.pop(0)))
        return ir.Eval(node.span, ir.Call(call.dtype, "ptx_arrive_barrier_expect_tx", args, call.annotations))

    return edit


def test_bytes_of_one_phase_are_not_those_of_another_too():
    found = result_of(edits.edited(loads_then_waits(), expecting(TILE_BYTES, 2 * TILE_BYTES)))
    assert found.verdict is Verdict.REFUTED, found.findings


@cache
def barrier_between(by_sum):
    """Half of the threads wait for the others, who come after a barrier of the block, or a reduction."""
    m = T.dynamic("m")

    @T.prim_func
    def barrier_between_kernel(a: T.Tensor[(m, THREADS), T.float32], out: T.Tensor[(m,), T.float32]):
        with T.Kernel(m, threads=THREADS) as bm:
            bar = T.alloc_barrier([THREADS // 2])
            values = T.alloc_fragment((1, THREADS), T.float32)
            total = T.alloc_fragment((1,), T.float32)
            tx = T.get_thread_binding()
            T.copy(a[bm, 0], values)
            if tx < THREADS // 2:
                T.mbarrier_wait_parity(bar[0], 0)
            if by_sum:
                T.reduce_sum(values, total, dim=1)
            else:
                T.sync_threads()
                T.clear(total)
            if tx >= THREADS // 2:
                T.mbarrier_arrive(bar[0])
            T.copy(total, out[bm])

    return barrier_between_kernel


@pytest.mark.parametrize("by_sum", [False, True])
def test_a_reduction_is_a_barrier_between_a_wait_and_its_arrival(by_sum):
    assert verdict(barrier_between(by_sum)) is (Verdict.UNKNOWN if by_sum else Verdict.REFUTED)


def test_the_kernels_are_lowered_as_they_are_written():
    device = samples.extracted(barrier_between(True)).device
    assert samples.calls(device, "call_extern")
    assert [c.op for c in samples.calls(device, "mbarrier_wait_parity")]


@cache
def half_of_a_warp(is_late, elects):
    """Half of a warp waits for the other, which arrives before or after the warp does something together."""

    @T.prim_func
    def half_of_a_warp_kernel(out: T.Tensor[(WARP,), T.int32]):
        with T.Kernel(1, threads=WARP):
            bar = T.alloc_barrier([WARP // 2])
            tx = T.get_thread_binding()
            if not is_late and tx >= WARP // 2:
                T.mbarrier_arrive(bar[0])
            if tx < WARP // 2:
                T.mbarrier_wait_parity(bar[0], 0)
            if elects:
                if T.shuffle_elect(WARP):
                    out[0] = 1
            else:
                out[tx] = T.shfl_sync(tx, 0)
            if is_late and tx >= WARP // 2:
                T.mbarrier_arrive(bar[0])
            out[tx] = 0

    return half_of_a_warp_kernel


@pytest.mark.parametrize("elects", [False, True])
def test_what_a_warp_does_together_is_between_a_wait_and_its_arrival(elects):
    assert verdict(half_of_a_warp(False, elects)) is Verdict.PROVED
    assert verdict(half_of_a_warp(True, elects)) is Verdict.UNKNOWN


@cache
def one_lane(elects):
    """The elected lane loads; it arrives, or the lane with the least number does."""
    m = T.dynamic("m")

    @T.prim_func
    def one_lane_kernel(a: T.Tensor[(m, TILE), T.bfloat16], out: T.Tensor[(m, THREADS), T.bfloat16]):
        with T.Kernel(m, threads=THREADS) as bm:
            bar = T.alloc_barrier([1])
            tile = T.alloc_shared((TILE, TILE), T.bfloat16)
            tx = T.get_thread_binding()
            if tx < WARP:
                T.tma_copy(a[bm * TILE : bm * TILE + TILE, 0:TILE], tile, barrier=bar[0])
                if elects:
                    if T.shuffle_elect(WARP):
                        T.mbarrier_arrive(bar[0])
                else:
                    if tx == 0:
                        T.mbarrier_arrive(bar[0])
            T.mbarrier_wait_parity(bar[0], 0)
            out[bm, tx] = tile[0, tx % TILE]

    return one_lane_kernel


def test_the_elected_lane_is_none_that_is_known_by_its_number():
    assert verdict(one_lane(True)) is Verdict.PROVED
    assert verdict(one_lane(False)) is Verdict.UNKNOWN


@cache
def loads_ahead(waits):
    """A warp loads round after round into one slot; if it `waits`, for the bytes of the round before."""
    m = T.dynamic("m")

    @T.prim_func
    def loads_ahead_kernel(a: T.Tensor[(m, 4 * TILE), T.bfloat16], out: T.Tensor[(m, THREADS), T.bfloat16]):
        with T.Kernel(m, threads=THREADS) as bm:
            bar = T.alloc_barrier([1])
            tile = T.alloc_shared((4, TILE, TILE), T.bfloat16)
            tx = T.get_thread_binding()
            if tx < WARP:
                for k in T.serial(4):
                    T.tma_copy(
                        a[bm * TILE : bm * TILE + TILE, k * TILE : k * TILE + TILE],
                        tile[k, :, :],
                        barrier=bar[0],
                    )
                    if T.shuffle_elect(WARP):
                        T.mbarrier_arrive(bar[0])
                    if waits:
                        T.mbarrier_wait_parity(bar[0], k % 2)
            out[bm, tx] = 0

    return loads_ahead_kernel


def test_a_phase_that_waits_for_bytes_does_not_end_with_its_only_arrival():
    assert verdict(loads_ahead(True)) is Verdict.PROVED
    assert verdict(loads_ahead(False)) is not Verdict.PROVED
