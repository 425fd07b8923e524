# REFUTED determinism: the order of arrival decides what is written
"""Tickets are drawn by an atomic addition and written where the ticket says."""

from tilelang import language as T

THREADS = 128


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(count: T.Tensor[(1,), T.int32], out: T.Tensor[(m, THREADS), T.int32]):
        with T.Kernel(m, threads=THREADS) as b:
            tx = T.get_thread_binding()
            ticket = T.atomic_add(count[0], 1, return_prev=True)
            if ticket < m * THREADS:
                out[ticket // THREADS, ticket % THREADS] = b * THREADS + tx

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
