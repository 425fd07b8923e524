# REFUTED bounds: threads past the tile read past the shared buffer
"""A thread loop over the rows of a tile, guarded by the shape and not by the tile."""

from tilelang import language as T

ROWS, COLUMNS, THREADS = 64, 128, 128


def make_kernel():
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, COLUMNS), T.float32], out: T.Tensor[(m,), T.float32]):
        with T.Kernel(T.ceildiv(m, ROWS), threads=THREADS) as b:
            tile = T.alloc_shared((ROWS, COLUMNS), T.float32)
            sums = T.alloc_fragment((ROWS,), T.float32)
            T.copy(x[b * ROWS, 0], tile)
            T.reduce_sum(tile, sums, dim=1)
            first = T.alloc_shared((ROWS,), T.float32)
            T.copy(sums, first)
            tx = T.get_thread_binding()
            if b * ROWS + tx < m:
                out[b * ROWS + tx] = first[tx]

    return kernel


KERNELS = {"kernel": make_kernel()}
CONTRACTS = {"kernel": ("0 <= m", "m <= 65536")}
