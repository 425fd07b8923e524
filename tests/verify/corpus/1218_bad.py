# REFUTED bounds: nothing bounds the index: accesses of shared memory get no guard
"""A table in shared memory is read at a 64-bit index from memory."""

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
            out[b, tx] = table[slot[b, tx]]

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
