# REFUTED bounds: rows past the end of the tile still write the shared buffer
"""fp4_quant with more threads than rows of the shared tile, and no guard."""

from tilelang import language as T

BLOCK_M, THREADS, PACKED = 96, 128, 16


def make_kernel():
    num_blocks = T.dynamic("num_blocks")

    @T.prim_func
    def fp4_quant_kernel(
        x: T.Tensor[(num_blocks, PACKED), T.uint8],
        out: T.Tensor[(num_blocks, PACKED), T.uint8],
    ):
        with T.Kernel(T.ceildiv(num_blocks, BLOCK_M), threads=THREADS) as bm:
            tx = T.get_thread_binding()
            tile = T.alloc_shared((BLOCK_M, PACKED), T.uint8)
            for j in T.serial(PACKED):
                tile[tx, j] = x[bm * BLOCK_M + tx, j]  # broken here
            if tx < BLOCK_M:
                for j in T.serial(PACKED):
                    out[bm * BLOCK_M + tx, j] = tile[tx, j]

    return fp4_quant_kernel


KERNELS = {"fp4_quant": make_kernel()}
CONTRACTS = {"fp4_quant": ("0 <= num_blocks", "num_blocks <= 1048576")}
