# REFUTED refinement: the flat index 69999 * 70000 + 69999 is cut to 32 bits
"""A constant index whose flat address does not fit 32 bits wraps to another element."""

from tilelang import language as T

ROWS, COLUMNS, THREADS = 70000, 70000, 128


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(a: T.Tensor[(ROWS, COLUMNS), T.int8], out: T.Tensor[(m, THREADS), T.int8]):
        with T.Kernel(m, threads=THREADS) as b:
            tx = T.get_thread_binding()
            out[b, tx] = a[ROWS - 1, COLUMNS - 1]

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
