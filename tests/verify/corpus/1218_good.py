# PROVED: the same, mended
"""The index is held within the table."""

from tilelang import language as T

SIZE, THREADS = 256, 128


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(slot: T.Tensor[(m, THREADS), T.int64], out: T.Tensor[(m, THREADS), T.float32]):
        with T.Kernel(m, threads=THREADS) as b:
            table = T.alloc_shared((SIZE,), T.float32)
            tx = T.get_thread_binding()
            for j in T.Parallel(SIZE):
                table[j] = T.cast(j, "float32")
            out[b, tx] = T.if_then_else(slot[b, tx] >= 0 and slot[b, tx] < SIZE, table[slot[b, tx]], 0.0)

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
