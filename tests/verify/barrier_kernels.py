"""Kernels with mbarriers, for the tests of phases, protocols and schedules.

Unless `narrow` is False (by hand: `loading` is more than a warp), only the warp that loads waits in the
producer's role.
"""

from functools import cache
from typing import Any

from tilelang import language as T

from dsv4_kernels.tile.producer import one_warp

BLOCK, BLOCK_K, STAGES, CTAS = 64, 64, 3, 132
ROLE = 128  # threads of one role
WARP = 32  # the threads of the producer's role that wait: with more, some arrive nowhere
BYTES = 2 * BLOCK * BLOCK_K * 2  # of both operands of one stage


@cache
def persistent(n=1024, k=512, narrow=True):
    """Tiles by T.Persistent, a pipeline inside: the compiler counts phases over the waves."""
    m = T.dynamic("m")

    @T.prim_func
    def persistent_kernel(
        a: T.Tensor[(m, k), T.bfloat16], b: T.Tensor[(n, k), T.bfloat16], c: T.Tensor[(m, n), T.bfloat16]
    ):
        with T.Kernel(CTAS, threads=ROLE) as block:
            a_tile = T.alloc_shared((BLOCK, BLOCK_K), T.bfloat16)
            b_tile = T.alloc_shared((BLOCK, BLOCK_K), T.bfloat16)
            acc = T.alloc_fragment((BLOCK, BLOCK), T.float32)
            for bm, bn in T.Persistent([T.ceildiv(m, BLOCK), n // BLOCK], CTAS, block):
                T.clear(acc)
                for ko in T.Pipelined(k // BLOCK_K, num_stages=STAGES):
                    T.copy(a[bm * BLOCK, ko * BLOCK_K], a_tile)
                    T.copy(b[bn * BLOCK, ko * BLOCK_K], b_tile)
                    T.gemm(a_tile, b_tile, acc, transpose_B=True)
                T.copy(acc, c[bm * BLOCK, bn * BLOCK])

    return one_warp(persistent_kernel) if narrow else persistent_kernel


@cache
def counted(n=1024, k=STAGES * BLOCK_K, narrow=True):
    """A pipeline of one round at most, and of none where data says so."""
    m = T.dynamic("m")

    @T.prim_func
    def counted_kernel(
        a: T.Tensor[(m, k), T.bfloat16],
        b: T.Tensor[(n, k), T.bfloat16],
        owner: T.Tensor[(m,), T.int32],
        c: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, BLOCK), n // BLOCK, threads=ROLE) as (bm, bn):
            a_tile = T.alloc_shared((BLOCK, BLOCK_K), T.bfloat16)
            b_tile = T.alloc_shared((BLOCK, BLOCK_K), T.bfloat16)
            acc = T.alloc_fragment((BLOCK, BLOCK), T.float32)
            T.clear(acc)
            for ko in T.Pipelined(
                T.min(T.max(owner[bm * BLOCK], -1), 0) * STAGES + STAGES, num_stages=STAGES
            ):
                T.copy(a[bm * BLOCK, ko * BLOCK_K], a_tile)
                T.copy(b[bn * BLOCK, ko * BLOCK_K], b_tile)
                T.gemm(a_tile, b_tile, acc, transpose_B=True)
            T.copy(acc, c[bm * BLOCK, bn * BLOCK])

    return one_warp(counted_kernel) if narrow else counted_kernel


@cache
def waves(n=1024, k=512, narrow=True):
    """Tiles by a written loop over waves."""
    m = T.dynamic("m")

    @T.prim_func
    def waves_kernel(
        a: T.Tensor[(m, k), T.bfloat16], b: T.Tensor[(n, k), T.bfloat16], c: T.Tensor[(m, n), T.bfloat16]
    ):
        with T.Kernel(CTAS, threads=ROLE) as block:
            a_tile = T.alloc_shared((BLOCK, BLOCK_K), T.bfloat16)
            b_tile = T.alloc_shared((BLOCK, BLOCK_K), T.bfloat16)
            acc = T.alloc_fragment((BLOCK, BLOCK), T.float32)
            tiles: Any = T.ceildiv(m, BLOCK) * (n // BLOCK)
            for wave in T.serial(T.ceildiv(tiles - block, CTAS)):
                bm = (block + wave * CTAS) // (n // BLOCK)
                bn = (block + wave * CTAS) % (n // BLOCK)
                T.clear(acc)
                for ko in T.Pipelined(k // BLOCK_K, num_stages=STAGES):
                    T.copy(a[bm * BLOCK, ko * BLOCK_K], a_tile)
                    T.copy(b[bn * BLOCK, ko * BLOCK_K], b_tile)
                    T.gemm(a_tile, b_tile, acc, transpose_B=True)
                T.copy(acc, c[bm * BLOCK, bn * BLOCK])

    return one_warp(waves_kernel) if narrow else waves_kernel


@cache
def by_hand(n=1024, k=512, loading=WARP):
    """Two roles, a full and an empty barrier a stage."""
    m = T.dynamic("m")

    @T.prim_func
    def by_hand_kernel(
        a: T.Tensor[(m, k), T.bfloat16], b: T.Tensor[(n, k), T.bfloat16], c: T.Tensor[(m, n), T.bfloat16]
    ):
        with T.Kernel(T.ceildiv(m, BLOCK), n // BLOCK, threads=2 * ROLE) as (bm, bn):
            a_tile = T.alloc_shared((STAGES, BLOCK, BLOCK_K), T.bfloat16)
            b_tile = T.alloc_shared((STAGES, BLOCK, BLOCK_K), T.bfloat16)
            acc = T.alloc_fragment((BLOCK, BLOCK), T.float32)
            full = T.alloc_barrier([1] * STAGES)
            empty = T.alloc_barrier([ROLE] * STAGES)
            thread = T.get_thread_binding()
            if thread >= ROLE and thread < ROLE + loading:
                for ko in T.serial(k // BLOCK_K):
                    T.mbarrier_wait_parity(empty[ko % STAGES], ((ko // STAGES) % 2) ^ 1)
                    T.tma_copy(
                        a[bm * BLOCK : bm * BLOCK + BLOCK, ko * BLOCK_K : ko * BLOCK_K + BLOCK_K],
                        a_tile[ko % STAGES, :, :],
                        barrier=full[ko % STAGES],
                    )
                    T.tma_copy(
                        b[bn * BLOCK : bn * BLOCK + BLOCK, ko * BLOCK_K : ko * BLOCK_K + BLOCK_K],
                        b_tile[ko % STAGES, :, :],
                        barrier=full[ko % STAGES],
                    )
                    if T.shuffle_elect(loading):
                        T.mbarrier_arrive(full[ko % STAGES])
            elif thread < ROLE:
                T.clear(acc)
                for ko in T.serial(k // BLOCK_K):
                    T.mbarrier_wait_parity(full[ko % STAGES], (ko // STAGES) % 2)
                    T.gemm(a_tile[ko % STAGES, :, :], b_tile[ko % STAGES, :, :], acc, transpose_B=True)
                    T.mbarrier_arrive(empty[ko % STAGES])
                T.copy(acc, c[bm * BLOCK, bn * BLOCK])

    return by_hand_kernel


@cache
def attention(keys=1024, head_dim=64, narrow=True):
    """One operand loaded once, two in a pipeline: three barriers that go at different rates."""
    m = T.dynamic("m")

    @T.prim_func
    def attention_kernel(
        q: T.Tensor[(m, head_dim), T.bfloat16],
        k: T.Tensor[(keys, head_dim), T.bfloat16],
        v: T.Tensor[(keys, head_dim), T.bfloat16],
        out: T.Tensor[(m, head_dim), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, BLOCK), threads=ROLE) as block:
            q_tile = T.alloc_shared((BLOCK, head_dim), T.bfloat16)
            k_tile = T.alloc_shared((BLOCK, head_dim), T.bfloat16)
            v_tile = T.alloc_shared((BLOCK, head_dim), T.bfloat16)
            logits = T.alloc_fragment((BLOCK, BLOCK), T.float32)
            weights = T.alloc_fragment((BLOCK, BLOCK), T.bfloat16)
            acc = T.alloc_fragment((BLOCK, head_dim), T.float32)
            T.copy(q[block * BLOCK, 0], q_tile)
            T.clear(acc)
            for ko in T.Pipelined(keys // BLOCK, num_stages=2):
                T.copy(k[ko * BLOCK, 0], k_tile)
                T.clear(logits)
                T.gemm(q_tile, k_tile, logits, transpose_B=True)
                T.copy(logits, weights)
                T.copy(v[ko * BLOCK, 0], v_tile)
                T.gemm(weights, v_tile, acc)
            T.copy(acc, out[block * BLOCK, 0])

    return one_warp(attention_kernel) if narrow else attention_kernel
