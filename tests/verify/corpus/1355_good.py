# PROVED: the same, mended
"""For every m whose rounding up fits int32."""

from tilelang import language as T

BLOCK, THREADS = 256, 128


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m,), T.uint8], out: T.Tensor[(m,), T.uint8]):
        with T.Kernel(T.ceildiv(m, BLOCK), threads=THREADS) as b:
            for j in T.Parallel(BLOCK):
                if b * BLOCK + j < m:
                    out[b * BLOCK + j] = x[b * BLOCK + j]

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 2147483392")}
