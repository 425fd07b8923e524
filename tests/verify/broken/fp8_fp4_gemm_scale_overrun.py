# REFUTED bounds: the scales of a tile are read one row late
"""fp8_fp4_gemm that reads its shared activation scales off by one."""

from tilelang import language as T

BLOCK_M, BLOCK_N, BLOCK_K, THREADS = 64, 64, 128, 128


def make_kernel(n: int, k: int):
    m = T.dynamic("m")

    @T.prim_func
    def fp8_fp4_gemm_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m,), T.float32],
        w: T.Tensor[(n, k), T.float8_e4m3fn],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(n // BLOCK_N, T.ceildiv(m, BLOCK_M), threads=THREADS) as (bn, bm):
            x_tile = T.alloc_shared((BLOCK_M, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((BLOCK_N, BLOCK_K), T.float8_e4m3fn)
            scales = T.alloc_shared((BLOCK_M,), T.float32)
            acc = T.alloc_fragment((BLOCK_M, BLOCK_N), T.float32)
            T.copy(x_scale[bm * BLOCK_M], scales)
            T.clear(acc)
            for ko in T.Pipelined(k // BLOCK_K, num_stages=2):
                T.copy(x[bm * BLOCK_M, ko * BLOCK_K], x_tile)
                T.copy(w[bn * BLOCK_N, ko * BLOCK_K], w_tile)
                T.gemm(x_tile, w_tile, acc, transpose_B=True)
            for i, j in T.Parallel(BLOCK_M, BLOCK_N):  # broken here, in the body
                out[bm * BLOCK_M + i, bn * BLOCK_N + j] = T.cast(acc[i, j] * scales[i + 1], "bfloat16")

    return fp8_fp4_gemm_kernel


KERNELS = {"fp8_fp4_gemm": make_kernel(256, 512)}
CONTRACTS = {"fp8_fp4_gemm": ("0 <= m", "m <= 65536")}
