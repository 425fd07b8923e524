# PROVED: the same, mended
"""One more block, guarded."""

from tilelang import language as T

COLUMNS, BLOCK, THREADS = 320, 128, 128


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, COLUMNS), T.float32], out: T.Tensor[(m, COLUMNS), T.float32]):
        with T.Kernel(m, T.ceildiv(COLUMNS, BLOCK), threads=THREADS) as (b, c):
            for j in T.Parallel(BLOCK):
                out[b, c * BLOCK + j] = x[b, c * BLOCK + j] * 2.0

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
