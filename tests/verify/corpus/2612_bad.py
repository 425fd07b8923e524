# REFUTED race: threads read neighbours that write, with no barrier in the branch
"""A loop in a thread branch passes values on between threads: the barrier it needs cannot stand there."""

from tilelang import language as T

ROUNDS, THREADS = 3, 128


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, THREADS), T.float32], out: T.Tensor[(m, THREADS), T.float32]):
        with T.Kernel(m, threads=THREADS) as b:
            shared = T.alloc_shared((THREADS,), T.float32)
            for j in T.Parallel(THREADS):
                shared[j] = x[b, j]
            for _ in T.serial(ROUNDS):
                for j in T.Parallel(THREADS):
                    if j % 4 == 0:
                        shared[j] = shared[(j + 4) % THREADS] + 1.0
            for j in T.Parallel(THREADS):
                out[b, j] = shared[j]

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
