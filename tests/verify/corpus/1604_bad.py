# REFUTED race: the barrier leaves half of the writers out
"""Half of a block reads what the other half wrote, after a barrier of its own."""

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
                    shared[j] = x[b, k, j]
                if T.get_thread_binding() < THREADS // 2:
                    T.sync_threads(1, THREADS // 2)
                for j in T.Parallel(THREADS):
                    out[b, k, j] = shared[THREADS - 1 - j]
                T.sync_threads()

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
# The barriers are the author's: the compiler would set the one that is left out.
PASS_CONFIGS = {"kernel": {"tl.disable_thread_storage_sync": True}}
