"""What the tests of the tile interpreter share."""

# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false
# TileLang's language is typed for the tracer that runs it, not for the kernels written in it.

import inspect

import tilelang.language as T
import torch

from verify import interp

INT = torch.int32


def launch(kernel, *tensors):
    interp.run(kernel, *tensors)
    return tensors[-1]


def line_of(test, text):
    """Line number of the only line of `test` that holds `text`."""
    lines, start = inspect.getsourcelines(test)
    (offset,) = [i for i, line in enumerate(lines) if text in line and "line_of" not in line]
    return start + offset


def grid_kernel(block=8):
    m, n = T.dynamic("m"), T.dynamic("n")

    @T.prim_func
    def kernel(x: T.Tensor[(4, m, n), T.int32], y: T.Tensor[(4, m, n), T.int32]):
        with T.Kernel(T.ceildiv(n, block), T.ceildiv(m, block), 4, threads=64) as (bn, bm, b):
            for i, j in T.Parallel(block, block):
                y[b, bm * block + i, bn * block + j] = (
                    x[b, bm * block + i, bn * block + j] * 3 + bm * 100 + bn
                )

    return kernel
