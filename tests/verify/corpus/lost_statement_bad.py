# REFUTED init: the producer copies from a row of its own `at`, which nothing writes there
"""Warp specialisation leaves a statement on a register to the consumers, and its use to the producer."""

from tilelang import language as T

from dsv4_kernels.tile.producer import one_warp

STEPS, STAGES, BLOCK, BLOCK_K = 12, 3, 64, 64


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        a: T.Tensor[(m, STEPS * BLOCK_K), T.bfloat16],
        b: T.Tensor[(BLOCK, STEPS * BLOCK_K), T.bfloat16],
        out: T.Tensor[(m, BLOCK), T.float32],
    ):
        with T.Kernel(T.ceildiv(m, BLOCK), threads=128) as block:
            a_tile = T.alloc_shared((BLOCK, BLOCK_K), T.bfloat16)
            b_tile = T.alloc_shared((BLOCK, BLOCK_K), T.bfloat16)
            acc = T.alloc_fragment((BLOCK, BLOCK), T.float32)
            at = T.alloc_var(T.int32)
            T.clear(acc)
            for k in T.Pipelined(STEPS, num_stages=STAGES):
                at = k * BLOCK_K
                T.copy(a[block * BLOCK, at], a_tile)
                T.copy(b[0, at], b_tile)
                T.gemm(a_tile, b_tile, acc, transpose_B=True)
            T.copy(acc, out[block * BLOCK, 0])

    return one_warp(kernel)


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
