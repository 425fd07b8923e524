# REFUTED coverage: tiles are one row closer than they are high
"""act_quant whose neighbouring tiles share a row."""

from tilelang import language as T

BLOCK_M, BLOCK_K, THREADS = 64, 128, 128
STEP = BLOCK_M - 1


def make_kernel():
    num_blocks = T.dynamic("num_blocks")

    @T.prim_func
    def act_quant_kernel(
        x: T.Tensor[(num_blocks, BLOCK_K), T.bfloat16],
        out: T.Tensor[(num_blocks, BLOCK_K), T.float8_e4m3fn],
    ):
        with T.Kernel(T.ceildiv(num_blocks, STEP), threads=THREADS) as bm:
            for i, j in T.Parallel(BLOCK_M, BLOCK_K):
                out[bm * STEP + i, j] = T.cast(x[bm * STEP + i, j], "float8_e4m3fn")  # broken here

    return act_quant_kernel


KERNELS = {"act_quant": make_kernel()}
CONTRACTS = {"act_quant": ("0 <= num_blocks", "num_blocks <= 1048576")}
