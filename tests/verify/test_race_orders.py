"""Orders that hold for some of the rounds, threads or accesses alone, and must not pass for all of them."""

from dataclasses import replace
from functools import cache

import pytest
from tilelang import language as T

from tests.verify import samples
from tests.verify.barrier_kernels import BLOCK, BLOCK_K, ROLE, STAGES, WARP
from tests.verify.test_race import drop, follow, proved, refuted
from verify import ir
from verify.properties.race import PROPERTY
from verify.verdict import Verdict

THREADS, ROUNDS = 128, 4


@cache
def one_row_of_all():
    """Each round writes a row of its own, and reads the same one."""

    @T.prim_func
    def one_row_of_all_kernel(
        x: T.Tensor[(ROUNDS, THREADS), T.float32], out: T.Tensor[(ROUNDS, THREADS), T.float32]
    ):
        with T.Kernel(1, threads=THREADS):
            tile = T.alloc_shared((ROUNDS, THREADS), T.float32)
            tx = T.get_thread_binding()
            for row in T.serial(ROUNDS):
                tile[row, tx] = x[row, tx]
                T.sync_threads()
                out[row, tx] = tile[1, THREADS - 1 - tx]
                T.sync_threads()

    return one_row_of_all_kernel


@pytest.mark.parametrize("which", [0, 1])
def test_a_round_of_which_one_address_says_nothing_is_compared_with_all(which):
    proved(samples.context(one_row_of_all()))
    context = samples.context(one_row_of_all())
    drop(context, "tvm_storage_sync", which)
    refuted(context, "store to tile", "load from tile")


@cache
def other_periods(rounds):
    """A write goes round two rows, a read round three; the number of rounds is not known."""

    @T.prim_func
    def other_periods_kernel(
        x: T.Tensor[(rounds, THREADS), T.float32], out: T.Tensor[(rounds, THREADS), T.float32]
    ):
        with T.Kernel(1, threads=THREADS):
            tile = T.alloc_shared((3, THREADS), T.float32)
            tx = T.get_thread_binding()
            for row in T.serial(rounds):
                tile[row % 2, tx] = x[row, tx]
                T.sync_threads()
                out[row, tx] = tile[row % 3, THREADS - 1 - tx]
                T.sync_threads()

    return other_periods_kernel


def test_rounds_of_rings_of_different_lengths_are_not_taken_for_others():
    kernel = other_periods(T.dynamic("m"))
    proved(samples.context(kernel))
    context = samples.context(kernel)
    drop(context, "tvm_storage_sync", 0)
    refuted(context, "store to tile", "load from tile")


@cache
def handed_on():
    """An atomic adds to the row that the next round's takes its values from: two accesses of one call."""

    @T.prim_func
    def handed_on_kernel(x: T.Tensor[(ROUNDS + 1, 2 * THREADS), T.float32]):
        with T.Kernel(1, threads=THREADS):
            tile = T.alloc_shared((ROUNDS + 1, 2 * THREADS), T.float32)
            tx = T.get_thread_binding()
            for row in T.serial(ROUNDS + 1):
                tile[row, tx] = x[row, tx]
                tile[row, tx + THREADS] = x[row, tx + THREADS]
            T.sync_threads()
            for row in T.serial(ROUNDS):
                T.atomic_addx2(tile[row + 1, 2 * ((tx + 1) % THREADS)], tile[row, 2 * tx])
                T.sync_threads()
            for row in T.serial(ROUNDS + 1):
                x[row, tx] = tile[row, tx]
                x[row, tx + THREADS] = tile[row, tx + THREADS]

    return handed_on_kernel


def test_of_two_accesses_of_one_call_either_may_be_the_earlier():
    proved(samples.context(handed_on()))
    context = samples.context(handed_on())
    drop(context, "tvm_storage_sync", 1)
    refuted(context, "atomic_addx2_elem_op source", "atomic_addx2_elem_op on")


@cache
def added_twice():
    """What an atomic takes its values from has been added to by atomics."""

    @T.prim_func
    def added_twice_kernel(x: T.Tensor[(THREADS,), T.float32], out: T.Tensor[(2 * THREADS,), T.float32]):
        with T.Kernel(1, threads=THREADS):
            tile = T.alloc_shared((2 * THREADS,), T.float32)
            tx = T.get_thread_binding()
            tile[tx] = 0
            tile[tx + THREADS] = 0
            T.sync_threads()
            T.atomic_add(tile[(2 * tx + 2) % (2 * THREADS)], x[tx])
            T.sync_threads()
            T.atomic_addx2(out[2 * tx], tile[2 * tx])

    return added_twice_kernel


def test_the_source_of_an_atomic_is_read_like_any_other_memory():
    proved(samples.context(added_twice()))
    context = samples.context(added_twice())
    drop(context, "tvm_storage_sync", 1)
    refuted(context, "atomic_add_elem_op on", "atomic_addx2_elem_op source")


@cache
def product_of_copies():
    """wgmma reads what cp.async wrote."""
    m = T.dynamic("m")

    @T.prim_func
    def product_of_copies_kernel(
        x: T.Tensor[(m, ROUNDS * BLOCK_K), T.bfloat16],
        w: T.Tensor[(BLOCK, ROUNDS * BLOCK_K), T.bfloat16],
        out: T.Tensor[(m, BLOCK), T.float32],
    ):
        with T.Kernel(T.ceildiv(m, BLOCK), threads=THREADS) as bx:
            x_tile = T.alloc_shared((BLOCK, BLOCK_K), T.bfloat16)
            w_tile = T.alloc_shared((BLOCK, BLOCK_K), T.bfloat16)
            acc = T.alloc_fragment((BLOCK, BLOCK), T.float32)
            T.clear(acc)
            for k in T.serial(ROUNDS):
                T.async_copy(x[bx * BLOCK : bx * BLOCK + BLOCK, k * BLOCK_K : k * BLOCK_K + BLOCK_K], x_tile)
                T.async_copy(w[0:BLOCK, k * BLOCK_K : k * BLOCK_K + BLOCK_K], w_tile)
                T.ptx_wait_group(0)
                T.fence_proxy_async()
                T.sync_threads()
                T.gemm(x_tile, w_tile, acc, transpose_B=True)
            T.copy(acc, out[bx * BLOCK, 0])

    return product_of_copies_kernel


@pytest.mark.parametrize("behind", ["ptx_wait_group", "ptx_commit_group"])
def test_a_proxy_fence_before_the_copies_have_ended_orders_nothing(behind):
    context = samples.context(product_of_copies())
    drop(context, "fence_proxy_async")
    which = len(samples.calls(context.extracted.device, behind)) - 1
    follow(context, behind, which, ir.Call(ir.HANDLE, "fence_proxy_async", ()))
    if behind == "ptx_wait_group":
        proved(context)
    else:
        refuted(context, "cp.async into shared", "wgmma operand")


@cache
def two_loaders(apart):
    """Two warps load into one array, in later rounds into the same slots unless `apart`."""
    m, rounds = T.dynamic("m"), 8

    @T.prim_func
    def two_loaders_kernel(
        a: T.Tensor[(m, rounds * BLOCK_K), T.bfloat16],
        b: T.Tensor[(m, rounds * BLOCK_K), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, BLOCK), threads=2 * ROLE) as bm:
            tile = T.alloc_shared((4 * STAGES, BLOCK, BLOCK_K), T.bfloat16)
            full = T.alloc_barrier([1] * STAGES)
            empty = T.alloc_barrier([ROLE] * STAGES)
            other_full = T.alloc_barrier([1] * STAGES)
            other_empty = T.alloc_barrier([ROLE] * STAGES)
            thread = T.get_thread_binding()
            if thread >= ROLE and thread < ROLE + WARP:
                for ko in T.serial(rounds):
                    T.mbarrier_wait_parity(empty[ko % STAGES], ((ko // STAGES) % 2) ^ 1)
                    T.tma_copy(
                        a[bm * BLOCK : bm * BLOCK + BLOCK, ko * BLOCK_K : ko * BLOCK_K + BLOCK_K],
                        tile[ko % STAGES + T.if_then_else(ko < STAGES, STAGES, 0), :, :],
                        barrier=full[ko % STAGES],
                    )
                    if T.shuffle_elect(WARP):
                        T.mbarrier_arrive(full[ko % STAGES])
            elif thread >= ROLE + WARP and thread < ROLE + 2 * WARP:
                for ki in T.serial(rounds):
                    T.mbarrier_wait_parity(other_empty[ki % STAGES], ((ki // STAGES) % 2) ^ 1)
                    T.tma_copy(
                        b[bm * BLOCK : bm * BLOCK + BLOCK, ki * BLOCK_K : ki * BLOCK_K + BLOCK_K],
                        tile[
                            T.if_then_else(
                                ki < STAGES, 2 * STAGES + ki, (ki + 1) % STAGES + apart * 3 * STAGES
                            ),
                            :,
                            :,
                        ],
                        barrier=other_full[ki % STAGES],
                    )
                    if T.shuffle_elect(WARP):
                        T.mbarrier_arrive(other_full[ki % STAGES])
            elif thread < ROLE:
                for ko in T.serial(rounds):
                    T.mbarrier_wait_parity(full[ko % STAGES], (ko // STAGES) % 2)
                    T.mbarrier_wait_parity(other_full[ko % STAGES], (ko // STAGES) % 2)
                    T.mbarrier_arrive(empty[ko % STAGES])
                    T.mbarrier_arrive(other_empty[ko % STAGES])

    return two_loaders_kernel


def test_orders_one_way_and_the_other_are_not_of_one_third_thread():
    proved(samples.context(two_loaders(1)))
    refuted(samples.context(two_loaders(0)), "TMA load into tile", "TMA load into tile")


def test_a_fence_of_initialisation_behind_the_barrier_is_of_the_wrong_thread():
    context = samples.context(samples.gemm())
    drop(context, "ptx_fence_barrier_init")
    follow(context, "set_max_nreg", 0, ir.Call(ir.HANDLE, "ptx_fence_barrier_init", ()))
    result = samples.verdict(context, "race")
    assert result.verdict in (Verdict.REFUTED, Verdict.UNKNOWN), result.findings
    assert any("initialisation is fenced" in f.message for f in result.findings)


@cache
def counts_to_its_number():
    """A variable that each thread advances up to its own number; then all threads write one place."""

    @T.prim_func
    def counts_to_its_number_kernel(out: T.Tensor[(THREADS,), T.int32]):
        with T.Kernel(1, threads=16):
            tile = T.alloc_shared((THREADS,), T.int32)
            count = T.alloc_local((1,), T.int32)
            tx = T.get_thread_binding()
            count[0] = 0
            for k in T.serial(16):
                if k < tx:
                    count[0] = count[0] + 1
                if k >= tx:
                    tile[16 + (count[0] & 15) - tx] = tx
            out[tx] = tile[tx]

    return counts_to_its_number_kernel


def test_what_is_not_known_of_a_variable_is_not_the_same_in_all_threads():
    refuted(samples.context(counts_to_its_number()), "store to tile and store to tile")


@cache
def two_boxes():
    """TMA stores two boxes of one tensor."""
    m = T.dynamic("m")

    @T.prim_func
    def two_boxes_kernel(
        x: T.Tensor[(m, 2 * BLOCK_K), T.bfloat16], out: T.Tensor[(m, 2 * BLOCK_K), T.bfloat16]
    ):
        with T.Kernel(T.ceildiv(m, BLOCK), threads=THREADS) as bx:
            left = T.alloc_shared((BLOCK, BLOCK_K), T.bfloat16)
            right = T.alloc_shared((BLOCK, BLOCK_K), T.bfloat16)
            T.copy(x[bx * BLOCK, 0], left)
            T.copy(x[bx * BLOCK, BLOCK_K], right)
            T.copy(left, out[bx * BLOCK, 0])
            T.copy(right, out[bx * BLOCK, BLOCK_K])

    return two_boxes_kernel


def test_boxes_of_one_tensor_in_different_shapes_are_not_compared():
    proved(samples.context(two_boxes()))
    context = samples.context(two_boxes())
    copies = context.memory.tma
    assert [c.store for c in copies] == [True, True]
    descriptor = copies[1].descriptor
    copies[1] = replace(copies[1], descriptor=replace(descriptor, dims=descriptor.dims[::-1]))
    with pytest.raises(ir.UnsupportedIR, match="in different shapes"):
        PROPERTY.claims(context)
