"""The main loops of products with FP8 weights, as macros: one stage each.

Shared by kernels that differ in where a tile's rows and weights come from. Both add the same partial sums
in the same order: 128 channels from zero, times the product of both scales, in the order of k.
"""

from collections.abc import Callable
from typing import Any

from tilelang import language as T

BLOCK_K = 128  # channels a scale, and a partial sum
FEW_STAGE_K = 4 * BLOCK_K
_COLUMNS = T.GemmWarpPolicy.FullCol  # warpgroups share out the columns of a product


@T.macro
def rows_first_stage(
    x_tile: Any,
    w_tile: Any,
    part: Any,
    factor: Any,
    acc: Any,
    acc1: Any,
    kb: Any,
    x_factor: Callable[[Any, Any], Any],
    w_factor: Callable[[Any, Any], Any],
):
    """Multiply 128 channels, rows of x as the instruction's rows: all at once, or half by half.

    Args:
        x_tile: [rows or 2 rows, 128] e4m3 in shared memory.
        w_tile: [columns, 128] e4m3 in shared memory.
        part: [rows, columns] float32 fragment, overwritten.
        factor: two [rows] float32 fragments, overwritten; the second is None where acc1 is.
        acc: [rows, columns] float32 fragment.
        acc1: that of the second half, or None.
        kb: number of the block of channels.
        x_factor: scale of (row of the tile, kb).
        w_factor: scale of (column, kb).
    """
    rows, columns = part.shape
    # Scales are asked for before the product, so that they arrive under it.
    for i in T.Parallel(rows):
        factor[0][i] = x_factor(i, kb)
    T.gemm(x_tile[0:rows, :], w_tile, part, transpose_B=True, clear_accum=True, policy=_COLUMNS)
    for i, j in T.Parallel(rows, columns):
        acc[i, j] += part[i, j] * (factor[0][i] * w_factor(j, kb))
    if acc1 is not None:
        for i in T.Parallel(rows):
            factor[1][i] = x_factor(rows + i, kb)
        T.gemm(x_tile[rows : 2 * rows, :], w_tile, part, transpose_B=True, clear_accum=True, policy=_COLUMNS)
        for i, j in T.Parallel(rows, columns):
            acc1[i, j] += part[i, j] * (factor[1][i] * w_factor(j, kb))


@T.macro
def few_stage(x_tile: Any, w_tile: Any, scales: Any, acc: Any, first: Any, block_n: int, block_m: int):
    """Multiply four blocks of 128 channels, weights as the instruction's rows.

    Args:
        x_tile: [block_m, 512] e4m3 in shared memory.
        w_tile: [block_n, 512] e4m3 in shared memory.
        scales: [k / 128, block_m] float32 in shared memory, products of both scales.
        acc: [block_n, block_m] float32 fragment.
        first: number of the first block of channels.
        block_n: weight rows.
        block_m: rows of x.
    """
    part0 = T.alloc_fragment((block_n, block_m), T.float32)
    part1 = T.alloc_fragment((block_n, block_m), T.float32)
    part2 = T.alloc_fragment((block_n, block_m), T.float32)
    part3 = T.alloc_fragment((block_n, block_m), T.float32)
    # All products but the last are under way together. The last is a plain gemm, which waits for all:
    # the compiler hands the tiles back after the statement.
    T.wgmma_gemm(w_tile[:, 0:128], x_tile[:, 0:128], part0, transpose_B=True, clear_accum=True)
    T.wgmma_gemm(w_tile[:, 128:256], x_tile[:, 128:256], part1, transpose_B=True, clear_accum=True)
    T.wgmma_gemm(w_tile[:, 256:384], x_tile[:, 256:384], part2, transpose_B=True, clear_accum=True)
    T.gemm(w_tile[:, 384:512], x_tile[:, 384:512], part3, transpose_B=True, clear_accum=True)
    for i, j in T.Parallel(block_n, block_m):
        acc[i, j] += part0[i, j] * scales[first, j]
    for i, j in T.Parallel(block_n, block_m):
        acc[i, j] += part1[i, j] * scales[first + 1, j]
    for i, j in T.Parallel(block_n, block_m):
        acc[i, j] += part2[i, j] * scales[first + 2, j]
    for i, j in T.Parallel(block_n, block_m):
        acc[i, j] += part3[i, j] * scales[first + 3, j]
