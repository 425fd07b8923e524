"""The main loop of FP8 products over tiles of 128 rows by 256 weight rows, as a macro: one stage.

Two warpgroups share out the rows, 64 each; weight rows are multiplied half by half through the same registers
for partial sums. All scales of the tile lie in shared memory: a load from global memory in each stage,
or even one stage ahead, is what its other work cannot hide (docs/gemm.md). Sums are those of `fp8_tile`:
128 channels from zero, times the product of both scales, in the order of k.
"""

from collections.abc import Callable
from typing import Any

from tilelang import language as T

from dsv4_kernels.tile.shared import MAX_SHARED_BYTES

BLOCK_K = 128  # channels a scale, and a partial sum
BLOCK_M, BLOCK_N = 128, 256
HALF = 128  # weight rows a scale, and of one product
COPY_SCALES = 4  # at least, by one cp.async: plain copies of a byte each wait for the one before
_ROWS = T.GemmWarpPolicy.FullRow
_STAGE_BYTES = (BLOCK_M + BLOCK_N) * BLOCK_K
_SHARED_BYTES = MAX_SHARED_BYTES - 1024  # less what mbarriers take
PADDING = 4  # scales after each row of them, so that those of eight rows lie in eight banks
_ALIGNMENT = 1024  # bytes, of every buffer
_STAGES = (4, 3)


def num_stages(k: int, scale_bytes: int) -> int | None:
    """Return the depth of the pipeline that leaves room for the scales of k channels; None if too many."""
    blocks = k // BLOCK_K
    elements = BLOCK_M * (blocks + PADDING) + BLOCK_N // HALF * blocks
    scales = -(-elements * scale_bytes // _ALIGNMENT) * _ALIGNMENT + _ALIGNMENT
    return next((s for s in _STAGES if s * _STAGE_BYTES + scales <= _SHARED_BYTES), None)


@T.macro
def wide_stage(
    x_tile: Any,
    w_tile: Any,
    x_scales: Any,
    w_scales: Any,
    part: Any,
    factors: Any,
    accs: Any,
    kb: Any,
    to_f32: Callable[[Any], Any],
    first: Any = 0,
):
    """Multiply 128 channels by both halves of the weight rows, scale and add.

    Args:
        x_tile: [128, 128] e4m3 in shared memory.
        w_tile: [256, 128] e4m3 in shared memory.
        x_scales: [128, k / 128 + PADDING] scales in shared memory.
        w_scales: [2 or more, k / 128] scales in shared memory.
        part: [128, 128] float32 fragment, overwritten.
        factors: two [128] float32 fragments, overwritten.
        accs: two [128, 128] float32 fragments.
        kb: number of the block of channels.
        to_f32: float32 of a scale.
        first: row of w_scales that the first half has; the second half has the next.
    """
    for i in T.Parallel(BLOCK_M):
        factors[0][i] = to_f32(x_scales[i, kb]) * to_f32(w_scales[first, kb])
    for i in T.Parallel(BLOCK_M):
        factors[1][i] = to_f32(x_scales[i, kb]) * to_f32(w_scales[first + 1, kb])
    T.gemm(x_tile, w_tile[0:HALF, :], part, transpose_B=True, clear_accum=True, policy=_ROWS)
    for i, j in T.Parallel(BLOCK_M, HALF):
        accs[0][i, j] += part[i, j] * factors[0][i]
    T.gemm(x_tile, w_tile[HALF:BLOCK_N, :], part, transpose_B=True, clear_accum=True, policy=_ROWS)
    for i, j in T.Parallel(BLOCK_M, HALF):
        accs[1][i, j] += part[i, j] * factors[1][i]
