# REFUTED overflow: 2**32 + 1 reads as 1
"""A row number of 64 bits is cut to 32 before it is checked."""

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
            index = T.cast(row[b], "int32")
            out[b, tx] = T.if_then_else(index < T.cast(m, "int32"), x[T.max(index, 0), tx], 0.0)

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
