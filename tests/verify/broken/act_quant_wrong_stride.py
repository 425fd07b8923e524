# REFUTED coverage: a row stride computed by hand that is one too small stays in bounds
"""act_quant that flattens its output with the wrong row stride."""

from tilelang import language as T

BLOCK_M, BLOCK_K, THREADS = 64, 128, 128


def make_kernel():
    num_blocks = T.dynamic("num_blocks")

    @T.prim_func
    def act_quant_kernel(
        x: T.Tensor[(num_blocks, BLOCK_K), T.bfloat16],
        out: T.Tensor[(num_blocks * BLOCK_K,), T.float8_e4m3fn],
    ):
        with T.Kernel(T.ceildiv(num_blocks, BLOCK_M), threads=THREADS) as bm:
            for i, j in T.Parallel(BLOCK_M, BLOCK_K):
                if bm * BLOCK_M + i < num_blocks:
                    out[(bm * BLOCK_M + i) * (BLOCK_K - 1) + j] = T.cast(  # broken here
                        x[bm * BLOCK_M + i, j], "float8_e4m3fn"
                    )

    return act_quant_kernel


KERNELS = {"act_quant": make_kernel()}
CONTRACTS = {"act_quant": ("0 <= num_blocks", "num_blocks <= 1048576")}
