# REFUTED bounds: 128 iterations over 96 elements
"""A parallel loop longer than the buffer that it goes over."""

from tilelang import language as T

COLUMNS, WIDTH, THREADS = 96, 128, 128


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, COLUMNS), T.float32], out: T.Tensor[(m, COLUMNS), T.float32]):
        with T.Kernel(m, threads=THREADS) as b:
            shared = T.alloc_shared((COLUMNS,), T.float32)
            for j in T.Parallel(COLUMNS):
                shared[j] = x[b, j]
            for j in T.Parallel(WIDTH):
                shared[j] = shared[j] * 2.0
            for j in T.Parallel(COLUMNS):
                out[b, j] = shared[j]

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
