# REFUTED bounds: a negative offset passes the test
"""A read at an offset from memory, with half of its predicate."""

from tilelang import language as T

THREADS = 128


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(start: T.Tensor[(m,), T.int32], out: T.Tensor[(m, THREADS), T.float32]):
        with T.Kernel(m, threads=THREADS) as b:
            tile = T.alloc_shared((2 * THREADS,), T.float32)
            for j in T.Parallel(2 * THREADS):
                tile[j] = T.cast(j, "float32")
            for j in T.Parallel(THREADS):
                out[b, j] = T.if_then_else(start[b] < THREADS, tile[j + start[b]], 0.0)

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
