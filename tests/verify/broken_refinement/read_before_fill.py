"""tilelang #2668: a pipelined loop reads a buffer before it refills it; the device reads the refill.

UNSUPPORTED: tile is used outside of the loop that fills it ahead
"""

from tilelang import language as T


def make():
    n, steps = 128, 8

    @T.prim_func
    def kernel(x: T.Tensor[(steps, n), T.float32], out: T.Tensor[(steps, n), T.float32]):
        with T.Kernel(1, threads=128):
            tile = T.alloc_shared((n,), T.float32)
            T.clear(tile)
            for k in T.Pipelined(steps, num_stages=2):
                for i in T.Parallel(n):
                    out[k, i] = tile[i]
                T.copy(x[k, :], tile)

    return kernel
