# REFUTED mbarrier: four phases end where one is meant
"""The consumers' barrier counts one warp of four."""

from tilelang import language as T

STEPS, STAGES, ROWS, COLUMNS, THREADS = 8, 2, 16, 64, 256
CONSUMERS, PRODUCERS = 128, 128


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, STEPS, ROWS, 2 * COLUMNS), T.bfloat16],
        out: T.Tensor[(m, STEPS, ROWS, COLUMNS), T.bfloat16],
    ):
        with T.Kernel(m, threads=THREADS) as b:
            ring = T.alloc_shared((STAGES, ROWS, COLUMNS), T.bfloat16)
            full = T.alloc_barrier([PRODUCERS] * STAGES)
            empty = T.alloc_barrier([32] * STAGES)
            tx = T.get_thread_binding()
            if tx >= CONSUMERS:
                for k in T.serial(STEPS):
                    T.mbarrier_wait_parity(empty[k % STAGES], (k // STAGES % 2) ^ 1)
                    T.tma_copy(x[b, k, 0:ROWS, 0:COLUMNS], ring[k % STAGES, :, :], barrier=full[k % STAGES])
                    T.mbarrier_arrive(full[k % STAGES])
            else:
                for k in T.serial(STEPS):
                    T.mbarrier_wait_parity(full[k % STAGES], k // STAGES % 2)
                    for i in T.serial(ROWS * COLUMNS // CONSUMERS):
                        out[b, k, i * 2 + tx // COLUMNS, tx % COLUMNS] = ring[
                            k % STAGES, i * 2 + tx // COLUMNS, tx % COLUMNS
                        ]
                    T.mbarrier_arrive(empty[k % STAGES])

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
