# REFUTED bounds: six threads store from element 6 on into 8 elements
"""A shifted store runs past a shared buffer: guards of shared memory are the author's."""

from tilelang import language as T

SIZE, THREADS = 8, 32


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(out: T.Tensor[(m, SIZE), T.int32]):
        with T.Kernel(m, threads=THREADS) as b:
            shared = T.alloc_shared((SIZE,), T.int32)
            tx = T.get_thread_binding()
            if tx < SIZE:
                shared[tx] = tx
            T.sync_threads()
            if tx < 6:
                shared[tx + 6] = 7
            T.sync_threads()
            if tx < SIZE:
                out[b, tx] = shared[tx]

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
