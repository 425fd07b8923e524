# REFUTED race: the copy of this step lands while the last one is meant to be read
"""A pipelined loop reads the tile of the step before and then overwrites it."""

from tilelang import language as T

from dsv4_kernels.tile.producer import one_warp

STEPS, ROWS, COLUMNS, THREADS = 8, 16, 64, 128


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, STEPS * ROWS, 2 * COLUMNS), T.bfloat16],
        out: T.Tensor[(m, STEPS * ROWS, COLUMNS), T.bfloat16],
    ):
        with T.Kernel(m, threads=THREADS) as b:
            tile = T.alloc_shared((ROWS, COLUMNS), T.bfloat16)
            T.fill(tile, 0.0)
            for k in T.Pipelined(STEPS, num_stages=2):
                for i, j in T.Parallel(ROWS, COLUMNS):
                    out[b, k * ROWS + i, j] = tile[i, j]
                T.copy(x[b, k * ROWS : (k + 1) * ROWS, 0:COLUMNS], tile)

    return kernel


KERNELS = {"kernel": one_warp(make_kernel())}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
