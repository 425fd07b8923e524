"""A product of two blocks that share one operand by multicast, as a kernel whose tests edit it.

Each block has 32 rows of b; its neighbour's copy of `a` comes from the first. A stage is written again once
every consumer warp of both blocks has arrived at the `free` mbarrier of each.
"""

# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false
# TileLang's language is typed for the tracer that runs it, not for the kernels written in it.

from functools import cache

import tilelang.language as T
import torch

from dsv4_kernels.tile.own_sync import own_sync
from dsv4_kernels.tile.producer import one_warp
from verify.extract import extract

M, N, K, BLOCK_N, BLOCK_K, STAGES, SIZE = 64, 64, 512, 32, 128, 2, 2
CONSUMERS, WARP = 128, 32
A_BYTES, B_BYTES = M * BLOCK_K, BLOCK_N * BLOCK_K
ALL = 2**SIZE - 1  # mask


@cache
def ring_kernel():
    """out = a @ b.T, e4m3 in, float32 out; four blocks of K through a ring of two stages."""

    @T.prim_func
    def cluster_ring_kernel(
        a: T.Tensor[(M, K), T.float8_e4m3fn],
        b: T.Tensor[(N, K), T.float8_e4m3fn],
        out: T.Tensor[(M, N), T.float32],
    ):
        with T.Kernel(N // BLOCK_N, threads=2 * CONSUMERS, cluster_dims=SIZE) as bn:
            a_tile = T.alloc_shared((STAGES, M, BLOCK_K), T.float8_e4m3fn)
            b_tile = T.alloc_shared((STAGES, BLOCK_N, BLOCK_K), T.float8_e4m3fn)
            full = T.alloc_barrier([1] * STAGES)
            free = T.alloc_cluster_barrier([SIZE * CONSUMERS // WARP] * STAGES)
            acc = T.alloc_fragment((M, BLOCK_N), T.float32)
            tx = T.get_thread_binding()
            if tx >= CONSUMERS:
                if tx < CONSUMERS + WARP:
                    for ko in T.serial(K // BLOCK_K):
                        T.mbarrier_wait_parity(free[ko % STAGES], ((ko // STAGES) % 2) ^ 1)
                        T.tma_copy(
                            a[0:M, ko * BLOCK_K : (ko + 1) * BLOCK_K],
                            a_tile[ko % STAGES, :, :],
                            barrier=full[ko % STAGES],
                            cluster_mask=ALL,
                            leader_scope_threads=WARP,
                        )
                        T.tma_copy(
                            b[bn * BLOCK_N : (bn + 1) * BLOCK_N, ko * BLOCK_K : (ko + 1) * BLOCK_K],
                            b_tile[ko % STAGES, :, :],
                            barrier=full[ko % STAGES],
                            leader_scope_threads=WARP,
                        )
                        if T.shuffle_elect(WARP):
                            T.barrier_arrive(full[ko % STAGES])
            else:
                T.clear(acc)
                for ko in T.serial(K // BLOCK_K):
                    T.mbarrier_wait_parity(full[ko % STAGES], (ko // STAGES) % 2)
                    T.gemm(a_tile[ko % STAGES, :, :], b_tile[ko % STAGES, :, :], acc, transpose_B=True)
                    if tx % WARP < SIZE:
                        T.ptx_arrive_cluster_barrier(free[ko % STAGES], tx % WARP)
                T.copy(acc, out[0, bn * BLOCK_N], disable_tma=True)
            T.cluster_sync()

    return own_sync(cluster_ring_kernel)


@cache
def ring():
    """The stages of the kernel."""
    return extract(ring_kernel())


@cache
def specialised():
    """The same product as TileLang 0.1.15 specialises it."""

    @T.prim_func
    def specialised_kernel(
        a: T.Tensor[(M, K), T.float8_e4m3fn],
        b: T.Tensor[(N, K), T.float8_e4m3fn],
        out: T.Tensor[(M, N), T.float32],
    ):
        with T.Kernel(N // BLOCK_N, threads=CONSUMERS, cluster_dims=SIZE) as bn:
            a_tile = T.alloc_shared((M, BLOCK_K), T.float8_e4m3fn)
            b_tile = T.alloc_shared((BLOCK_N, BLOCK_K), T.float8_e4m3fn)
            acc = T.alloc_fragment((M, BLOCK_N), T.float32)
            T.clear(acc)
            for ko in T.Pipelined(K // BLOCK_K, num_stages=STAGES):
                T.copy_cluster(a[0, ko * BLOCK_K], a_tile, cluster_mask=ALL)
                T.copy(b[bn * BLOCK_N, ko * BLOCK_K], b_tile)
                T.gemm(a_tile, b_tile, acc, transpose_B=True)
            T.copy(acc, out[0, bn * BLOCK_N], disable_tma=True)

    return extract(one_warp(specialised_kernel))


EXCHANGED = 128  # elements


@cache
def exchange(bulk):
    """Each of two blocks gives its row to the other: by a bulk copy, or element by element."""

    @T.prim_func
    def exchange_kernel(
        x: T.Tensor[(SIZE, EXCHANGED), T.float32],
        out: T.Tensor[(SIZE, EXCHANGED), T.float32],
    ):
        with T.Kernel(SIZE, threads=EXCHANGED, cluster_dims=SIZE) as block:
            mine = T.alloc_shared((EXCHANGED,), T.float32)
            other = T.alloc_shared((EXCHANGED,), T.float32)
            T.copy(x[block, 0:EXCHANGED], mine, disable_tma=True)
            if bulk:
                arrived = T.alloc_cluster_barrier([1])
                T.copy_cluster(
                    mine, other, dst_block=1 - T.block_rank_in_cluster(), remote_barrier=arrived[0]
                )
                T.mbarrier_wait_parity(arrived[0], 0)
            else:
                T.cluster_sync()
                T.copy_cluster(mine, other, dst_block=1 - T.block_rank_in_cluster())
                T.cluster_sync()
            T.copy(other, out[block, 0:EXCHANGED], disable_tma=True)
            if bulk:
                T.cluster_sync()

    return extract(exchange_kernel)


def inputs():
    """Operands whose sums are exact, and a place for the result."""
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randint(-4, 5, (rows, K), generator=generator).float().to(torch.float8_e4m3fn)
        for rows in (M, N)
    )
    return a, b, torch.zeros(M, N)
