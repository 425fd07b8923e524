# REFUTED race: thread 1 writes what thread 0 reads
"""Neighbours swap values: two threads, one place, though each names it by its own index."""

from tilelang import language as T

STEPS, THREADS = 4, 128


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, STEPS, THREADS), T.float32], out: T.Tensor[(m, STEPS, THREADS), T.float32]):
        with T.Kernel(m, threads=THREADS) as b:
            shared = T.alloc_shared((THREADS,), T.float32)
            for k in T.serial(STEPS):
                for j in T.Parallel(THREADS):
                    shared[j ^ 1] = x[b, k, j]
                for j in T.Parallel(THREADS):
                    out[b, k, j] = shared[j]
                T.sync_threads()

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
# The barriers are the author's: the compiler would set the one that is left out.
PASS_CONFIGS = {"kernel": {"tl.disable_thread_storage_sync": True}}
