# PROVED: the same, mended
"""It is checked as it is."""

from tilelang import language as T

COLUMNS, THREADS = 128, 128


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, COLUMNS), T.float32],
        row: T.Tensor[(m,), T.int64],
        out: T.Tensor[(m, COLUMNS), T.float32],
    ):
        with T.Kernel(m, threads=THREADS) as b:
            tx = T.get_thread_binding()
            out[b, tx] = T.if_then_else(row[b] >= 0 and row[b] < T.cast(m, "int64"), x[row[b], tx], 0.0)

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
