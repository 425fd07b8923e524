# REFUTED bounds: the upper nibble of the last byte is read one past the codes
"""fp4_quant whose pairing of codes starts one element late."""

from tilelang import language as T

THREADS, BLOCK_K = 128, 32


def make_kernel():
    num_blocks = T.dynamic("num_blocks")

    @T.prim_func
    def fp4_quant_kernel(
        x: T.Tensor[(num_blocks, BLOCK_K), T.bfloat16],
        out: T.Tensor[(num_blocks, BLOCK_K // 2), T.uint8],
    ):
        with T.Kernel(T.ceildiv(num_blocks, THREADS), threads=THREADS) as bm:
            tx = T.get_thread_binding()
            codes = T.alloc_local((BLOCK_K,), T.int32)
            row = bm * THREADS + tx
            if row < num_blocks:
                for j in T.serial(BLOCK_K):
                    codes[j] = T.cast(x[row, j], "int32") & 15
                for j in T.serial(BLOCK_K // 2):
                    out[row, j] = T.cast(codes[2 * j + 1] | (codes[2 * j + 2] << 4), "uint8")  # broken here

    return fp4_quant_kernel


KERNELS = {"fp4_quant": make_kernel()}
CONTRACTS = {"fp4_quant": ("0 <= num_blocks", "num_blocks <= 1048576")}
