# REFUTED bounds: the tensor core reads registers past the array
"""A register fragment of words is viewed as bytes and multiplied: the operand is offset in the wrong unit."""

from tilelang import language as T

from dsv4_kernels.tile.producer import one_warp

BLOCK_M, BLOCK_N, BLOCK_K, THREADS = 16, 64, 128, 128


def make_kernel(n: int = 256, k: int = 512):
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        w: T.Tensor[(n, k // 4), T.uint32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(n // BLOCK_N, T.ceildiv(m, BLOCK_M), threads=THREADS) as (bn, bm):
            x_tile = T.alloc_shared((BLOCK_M, BLOCK_K), T.float8_e4m3fn)
            words = T.alloc_fragment((BLOCK_N, BLOCK_K // 4), T.uint32)
            expanded = T.view(words, (BLOCK_N, BLOCK_K), T.float8_e4m3fn)
            acc = T.alloc_fragment((BLOCK_N, BLOCK_M), T.float32)
            T.clear(acc)
            for ko in T.Pipelined(k // BLOCK_K, num_stages=2):
                T.copy(x[bm * BLOCK_M, ko * BLOCK_K], x_tile)
                for i, j in T.Parallel(BLOCK_N, BLOCK_K // 4):
                    words[i, j] = w[bn * BLOCK_N + i, ko * (BLOCK_K // 4) + j]
                T.gemm(expanded, x_tile, acc, transpose_B=True)
            for i, j in T.Parallel(BLOCK_N, BLOCK_M):
                out[bm * BLOCK_M + j, bn * BLOCK_N + i] = T.cast(acc[i, j], "bfloat16")

    return kernel


KERNELS = {"kernel": one_warp(make_kernel())}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
