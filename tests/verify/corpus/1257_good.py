# PROVED: the same, mended
"""The sum is read after a barrier."""

from tilelang import language as T

THREADS = 128


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, THREADS), T.int32], out: T.Tensor[(m, THREADS), T.int32]):
        with T.Kernel(m, threads=THREADS) as b:
            total = T.alloc_shared((1,), T.int32)
            T.clear(total)
            T.sync_threads()
            for j in T.Parallel(THREADS):
                T.atomic_add(total[0], x[b, j])
            T.sync_threads()
            for j in T.Parallel(THREADS):
                out[b, j] = total[0]

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
# The barriers are the author's: the compiler would set the one that is left out.
PASS_CONFIGS = {"kernel": {"tl.disable_thread_storage_sync": True}}
