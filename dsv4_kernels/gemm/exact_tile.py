"""The main loop of products with FP4 weights as they came, as a macro: one stage of 128 channels.

Each 32 channels are one instruction, whose sum is scaled by a power of two before it is added: exact for
every exponent. The weights are widened in the registers that the tensor core reads.
"""

from collections.abc import Callable
from typing import Any

from tilelang import language as T

from dsv4_kernels.tile.scale import ue8m0_to_f32

BLOCK_K = 128  # channels of a stage
SCALE_K = 32  # channels a scale of w, and one wgmma of e4m3
PADDING = 1  # words after each row of scales, so that those of one row and of one column lie in many banks
_ROWS = T.GemmWarpPolicy.FullRow


@T.macro
def _expand(w_tile: Any, packed: Any, expanded: Any, group: int, block_n: int):
    T.copy(w_tile[:, group * (SCALE_K // 2) : (group + 1) * (SCALE_K // 2)], packed)
    T.copy(T.view(packed, (block_n, SCALE_K), T.float4_e2m1fn), expanded)


@T.macro
def stage(
    x_tile: Any,
    w_tile: Any,
    w_scales: Any,
    acc: Any,
    kb: Any,
    combine: Callable[[tuple, tuple, Any, Any], Any],
    block_m: int,
    block_n: int,
):
    """Widen 32 channels while the tensor core has the last 32, then scale all four sums and add.

    Args:
        x_tile: [block_m, 128] e4m3 in shared memory.
        w_tile: [block_n, 64] bytes in shared memory.
        w_scales: [block_n, k / 128 + PADDING] int32 in shared memory, four UE8M0 scales each.
        acc: [block_n, block_m] float32 fragment.
        kb: number of the block of channels.
        combine: (four partial sums, their weight scales, row of the tile, kb) -> what is added.
        block_m: rows of x.
        block_n: weight rows, 64 a warpgroup.
    """
    bytes0 = T.alloc_fragment((block_n, SCALE_K // 2), T.uint8)
    bytes1 = T.alloc_fragment((block_n, SCALE_K // 2), T.uint8)
    bytes2 = T.alloc_fragment((block_n, SCALE_K // 2), T.uint8)
    bytes3 = T.alloc_fragment((block_n, SCALE_K // 2), T.uint8)
    w0 = T.alloc_fragment((block_n, SCALE_K), T.float8_e4m3fn)
    w1 = T.alloc_fragment((block_n, SCALE_K), T.float8_e4m3fn)
    w2 = T.alloc_fragment((block_n, SCALE_K), T.float8_e4m3fn)
    w3 = T.alloc_fragment((block_n, SCALE_K), T.float8_e4m3fn)
    part0 = T.alloc_fragment((block_n, block_m), T.float32)
    part1 = T.alloc_fragment((block_n, block_m), T.float32)
    part2 = T.alloc_fragment((block_n, block_m), T.float32)
    part3 = T.alloc_fragment((block_n, block_m), T.float32)
    scale0 = T.alloc_fragment((block_n,), T.float32)
    scale1 = T.alloc_fragment((block_n,), T.float32)
    scale2 = T.alloc_fragment((block_n,), T.float32)
    scale3 = T.alloc_fragment((block_n,), T.float32)
    _expand(w_tile, bytes0, w0, 0, block_n)
    T.wgmma_gemm(w0, x_tile[:, 0:32], part0, transpose_B=True, clear_accum=True, policy=_ROWS)
    _expand(w_tile, bytes1, w1, 1, block_n)
    T.wgmma_gemm(w1, x_tile[:, 32:64], part1, transpose_B=True, clear_accum=True, policy=_ROWS)
    _expand(w_tile, bytes2, w2, 2, block_n)
    T.wgmma_gemm(w2, x_tile[:, 64:96], part2, transpose_B=True, clear_accum=True, policy=_ROWS)
    _expand(w_tile, bytes3, w3, 3, block_n)
    # All four products are waited for here, and only then are tiles handed back (`released_late`): the
    # bytes of the last one have come by then, which its operand in registers is made of.
    T.wgmma_gemm(w3, x_tile[:, 96:128], part3, transpose_B=True, clear_accum=True, policy=_ROWS)
    T.wait_wgmma(0)
    for i in T.Parallel(block_n):
        scale0[i] = ue8m0_to_f32(w_scales[i, kb], 0)
        scale1[i] = ue8m0_to_f32(w_scales[i, kb], 1)
        scale2[i] = ue8m0_to_f32(w_scales[i, kb], 2)
        scale3[i] = ue8m0_to_f32(w_scales[i, kb], 3)
    for i, j in T.Parallel(block_n, block_m):
        acc[i, j] += combine(
            (part0[i, j], part1[i, j], part2[i, j], part3[i, j]),
            (scale0[i], scale1[i], scale2[i], scale3[i]),
            j,
            kb,
        )
