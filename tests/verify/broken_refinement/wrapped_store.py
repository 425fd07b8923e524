"""tilelang #2560 for a store.

REFUTED: the device stores elsewhere: actual address 605032703
"""

from tilelang import language as T

SIDE = 70000  # SIDE * SIDE is past 2**31 elements


def make():
    @T.prim_func
    def kernel(big: T.Tensor[(SIDE, SIDE), T.int8]):
        with T.Kernel(1, threads=32):
            for _ in T.Parallel(1):
                big[SIDE - 1, SIDE - 1] = T.cast(1, "int8")

    return kernel
