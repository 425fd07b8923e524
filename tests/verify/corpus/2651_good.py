# PROVED: the same, mended
"""Each thread writes its own place."""

from tilelang import language as T

THREADS = 128


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(out: T.Tensor[(m, THREADS), T.int32]):
        with T.Kernel(m, threads=THREADS) as b:
            tx = T.get_thread_binding()
            out[b, tx] = b * THREADS + tx

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
