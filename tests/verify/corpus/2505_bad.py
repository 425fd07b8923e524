# REFUTED race: the last group may not have landed
"""Four groups of asynchronous copies, and a wait that lets one of them be open."""

from tilelang import language as T

STEPS, THREADS, WORDS = 4, 128, 4


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, STEPS, THREADS * WORDS), T.float32],
        out: T.Tensor[(m, STEPS, THREADS * WORDS), T.float32],
    ):
        with T.Kernel(m, threads=THREADS) as b:
            ring = T.alloc_shared((STEPS, THREADS * WORDS), T.float32)
            for k in T.unroll(STEPS):
                T.async_copy(x[b, k, :], ring[k, :])
            T.ptx_wait_group(1)
            T.sync_threads()
            for k in T.unroll(STEPS):
                for j in T.Parallel(THREADS * WORDS):
                    out[b, k, j] = ring[k, j]

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
