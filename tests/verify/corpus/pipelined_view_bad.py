# REFUTED race: every step reads stage 0, which the producer fills again
"""A pipelined shared tile is viewed in another type: the view stays at stage 0."""

from tilelang import language as T

from dsv4_kernels.tile.producer import one_warp

BLOCK_M, BLOCK_N, BLOCK_K, THREADS = 16, 64, 128, 128


def make_kernel(n: int = 256, k: int = 512):
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        w: T.Tensor[(n, k // 2), T.uint8],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(n // BLOCK_N, T.ceildiv(m, BLOCK_M), threads=THREADS) as (bn, bm):
            x_tile = T.alloc_shared((BLOCK_M, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((BLOCK_N, BLOCK_K // 2), T.uint8)
            expanded = T.alloc_fragment((BLOCK_N, BLOCK_K), T.float8_e4m3fn)
            acc = T.alloc_fragment((BLOCK_N, BLOCK_M), T.float32)
            T.clear(acc)
            for ko in T.Pipelined(k // BLOCK_K, num_stages=2):
                T.copy(x[bm * BLOCK_M, ko * BLOCK_K], x_tile)
                T.copy(w[bn * BLOCK_N, ko * (BLOCK_K // 2)], w_tile)
                T.copy(T.view(w_tile, (BLOCK_N, BLOCK_K), T.float4_e2m1fn), expanded)
                T.gemm(expanded, x_tile, acc, transpose_B=True)
            for i, j in T.Parallel(BLOCK_N, BLOCK_M):
                out[bm * BLOCK_M + j, bn * BLOCK_N + i] = T.cast(acc[i, j], "bfloat16")

    return kernel


KERNELS = {"kernel": one_warp(make_kernel())}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
