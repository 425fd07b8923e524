"""tilelang #2560: the flat index of a constant element wraps to int32; in bounds, another element.

REFUTED: read of big: expected address 4899999999, actual address 605032703
"""

from tilelang import language as T

SIDE = 70000  # SIDE * SIDE is past 2**31 elements


def make():
    @T.prim_func
    def kernel(big: T.Tensor[(SIDE, SIDE), T.int8], out: T.Tensor[(32,), T.int8]):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(32):
                out[i] = big[SIDE - 1, SIDE - 1]

    return kernel
