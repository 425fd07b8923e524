"""The main loop of products with folded FP4 weights, as a macro: one stage of 128 channels.

Shared by kernels that differ in where a tile's rows and weights come from. Every user adds the same
partial sums in the same order: 128 channels from zero, times the scale of x, in the order of k.
"""

from collections.abc import Callable
from typing import Any

from tilelang import language as T

from verify import externs

BLOCK_K = 128  # channels a scale of x, and a partial sum
SCALE_K = 32  # channels an offset
WORD = 8  # codes a word
BLOCK_WORDS = BLOCK_K // WORD  # of a weight row in a block
OFFSET_BIAS = 5  # offset 0 widens a code to its value times 2**-OFFSET_BIAS: no subnormals
MAX_OFFSET = 11  # 6 * 2**(11 - OFFSET_BIAS) = 384, below e4m3's 448
# e4m3 of 0 .5 1 1.5 and of 2 3 4 6, times 2**-OFFSET_BIAS; an offset adds one to each exponent but zero's.
_LOW, _LOW_STEP = 0x14100800, 0x08080800
_HIGH, _HIGH_STEP = 0x24201C18, 0x08080808
_ROWS = T.GemmWarpPolicy.FullRow


def source() -> str:
    """Return the text of the device functions that the stage calls."""
    return externs.source("dsv4_prmt", "dsv4_store_b32")


def widen(codes: Any, offset: Any, half: Any) -> Any:
    """Return the word of four e4m3: codes 4 half to 4 half + 3 of a folded word, times 2**(offset - bias)."""
    low = T.cast(_LOW + offset * _LOW_STEP, "uint32")
    high = T.cast(_HIGH + offset * _HIGH_STEP, "uint32")
    selector = (codes & T.uint32(0x77777777)) >> T.cast(16 * half, "uint32")  # pyright: ignore[reportCallIssue]
    signs = (codes << T.cast(4 * half, "uint32")) & T.uint32(0x80808080)  # pyright: ignore[reportCallIssue]
    return T.call_extern("uint32", "dsv4_prmt", low, high, selector) | signs  # pyright: ignore[reportAttributeAccessIssue]


@T.macro
def stage(
    x_tile: Any,
    w_tile: Any,
    o_tile: Any,
    x_scales: Any,
    acc: Any,
    acc1: Any,
    block: Any,
    block_m: int,
    half_n: int,
):
    """Widen 128 channels of twice half_n rows, multiply, scale and add; half of them under a product.

    The second half is widened while the tensor core has the first.

    Args:
        x_tile: [block_m, 128] e4m3 in shared memory.
        w_tile: [1, 2 half_n, 16] words in shared memory.
        o_tile: [1, 2 half_n] int32 in shared memory, the four offsets of each row.
        x_scales: [k / 128, block_m] float32 in shared memory.
        acc: [half_n, block_m] float32 fragment.
        acc1: that of the second half.
        block: number of the block of channels.
        block_m: rows of x.
        half_n: weight rows, 64 a warpgroup.
    """
    codes = T.alloc_fragment((half_n, 4, 4), T.uint32)
    codes1 = T.alloc_fragment((half_n, 4, 4), T.uint32)
    offset = T.alloc_fragment((half_n,), T.int32)
    offset1 = T.alloc_fragment((half_n,), T.int32)
    w = T.alloc_fragment((half_n, BLOCK_K), T.float8_e4m3fn)
    w1 = T.alloc_fragment((half_n, BLOCK_K), T.float8_e4m3fn)
    part = T.alloc_fragment((half_n, block_m), T.float32)
    part1 = T.alloc_fragment((half_n, block_m), T.float32)
    for i in T.Parallel(half_n):
        offset[i] = o_tile[0, i]
    for i, t, g in T.Parallel(half_n, 4, 4):
        codes[i, t, g] = w_tile[0, i, t * 4 + g]
    for i, g, h, t in T.Parallel(half_n, 4, 2, 4):
        T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
            "handle",
            "dsv4_store_b32",
            T.address_of(w[i, g * SCALE_K + h * 16 + t * 4]),
            widen(codes[i, t, g], (offset[i] >> (8 * g)) & 0xFF, h),
        )
    T.wgmma_gemm(w, x_tile, part, transpose_B=True, clear_accum=True, policy=_ROWS)
    for i in T.Parallel(half_n):
        offset1[i] = o_tile[0, half_n + i]
    for i, t, g in T.Parallel(half_n, 4, 4):
        codes1[i, t, g] = w_tile[0, half_n + i, t * 4 + g]
    for i, g, h, t in T.Parallel(half_n, 4, 2, 4):
        T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
            "handle",
            "dsv4_store_b32",
            T.address_of(w1[i, g * SCALE_K + h * 16 + t * 4]),
            widen(codes1[i, t, g], (offset1[i] >> (8 * g)) & 0xFF, h),
        )
    # Both products are waited for here, and only then are tiles handed back (`released_late`).
    T.wgmma_gemm(w1, x_tile, part1, transpose_B=True, clear_accum=True, policy=_ROWS)
    T.wait_wgmma(0)
    for i, j in T.Parallel(half_n, block_m):
        acc[i, j] += part[i, j] * x_scales[block, j]
    for i, j in T.Parallel(half_n, block_m):
        acc1[i, j] += part1[i, j] * x_scales[block, j]


@T.macro
def stage_in_turn(
    x_tile: Any,
    w_tile: Any,
    o_tile: Any,
    x_scales: Any,
    acc: Any,
    acc1: Any,
    block: Any,
    block_m: int,
    half_n: int,
):
    """As `stage`, for tiles whose sums leave registers for one set of partial sums: the halves take turns.

    Args: those of `stage`.
    """
    codes = T.alloc_fragment((half_n, 4, 4), T.uint32)
    codes1 = T.alloc_fragment((half_n, 4, 4), T.uint32)
    offset = T.alloc_fragment((half_n,), T.int32)
    offset1 = T.alloc_fragment((half_n,), T.int32)
    w = T.alloc_fragment((half_n, BLOCK_K), T.float8_e4m3fn)
    w1 = T.alloc_fragment((half_n, BLOCK_K), T.float8_e4m3fn)
    part = T.alloc_fragment((half_n, block_m), T.float32)
    for i in T.Parallel(half_n):
        offset[i] = o_tile[0, i]
    for i, t, g in T.Parallel(half_n, 4, 4):
        codes[i, t, g] = w_tile[0, i, t * 4 + g]
    for i, g, h, t in T.Parallel(half_n, 4, 2, 4):
        T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
            "handle",
            "dsv4_store_b32",
            T.address_of(w[i, g * SCALE_K + h * 16 + t * 4]),
            widen(codes[i, t, g], (offset[i] >> (8 * g)) & 0xFF, h),
        )
    T.gemm(w, x_tile, part, transpose_B=True, clear_accum=True, policy=_ROWS)
    for i, j in T.Parallel(half_n, block_m):
        acc[i, j] += part[i, j] * x_scales[block, j]
    for i in T.Parallel(half_n):
        offset1[i] = o_tile[0, half_n + i]
    for i, t, g in T.Parallel(half_n, 4, 4):
        codes1[i, t, g] = w_tile[0, half_n + i, t * 4 + g]
    for i, g, h, t in T.Parallel(half_n, 4, 2, 4):
        T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
            "handle",
            "dsv4_store_b32",
            T.address_of(w1[i, g * SCALE_K + h * 16 + t * 4]),
            widen(codes1[i, t, g], (offset1[i] >> (8 * g)) & 0xFF, h),
        )
    T.wgmma_gemm(w1, x_tile, part, transpose_B=True, clear_accum=True, policy=_ROWS)
    T.wait_wgmma(0)
    for i, j in T.Parallel(half_n, block_m):
        acc1[i, j] += part[i, j] * x_scales[block, j]


@T.macro
def wide_stage(
    x_tile: Any,
    x_scales: Any,
    accs: Any,
    block: Any,
    half: int,
    rows: int,
    code: Callable[[Any, Any], Any],
    offsets_of: Callable[[Any, Any], Any],
):
    """Widen 128 channels of `rows` weight rows once and multiply them by two halves of the tokens in turn.

    Args:
        x_tile: [2 half, 128] e4m3 in shared memory.
        x_scales: [k / 128, 2 half] float32 in shared memory.
        accs: two [rows, half] float32 fragments.
        block: number of the block of channels.
        half: tokens of one product.
        rows: weight rows, 64 a warpgroup.
        code: word (of 16) of a weight row, in shared memory.
        offsets_of: the four offsets of (weight row, block), in shared memory.
    """
    codes = T.alloc_fragment((rows, 4, 4), T.uint32)
    offset = T.alloc_fragment((rows,), T.int32)
    w = T.alloc_fragment((rows, BLOCK_K), T.float8_e4m3fn)
    part = T.alloc_fragment((rows, half), T.float32)
    quarter = half // 2
    scale0 = T.alloc_fragment((half,), T.float32)
    scale1 = T.alloc_fragment((half,), T.float32)
    for i in T.Parallel(rows):
        offset[i] = offsets_of(i, block)
    for i, t, g in T.Parallel(rows, 4, 4):
        codes[i, t, g] = code(i, t * 4 + g)
    for i, g, h, t in T.Parallel(rows, 4, 2, 4):
        T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
            "handle",
            "dsv4_store_b32",
            T.address_of(w[i, g * SCALE_K + h * 16 + t * 4]),
            widen(codes[i, t, g], (offset[i] >> (8 * g)) & 0xFF, h),
        )
    # Half of the scales are asked for before the product, and arrive under it; registers end there. The rest
    # arrives while sums are added that need the first half.
    for j in T.Parallel(quarter):
        scale0[j] = x_scales[block, j]
    T.gemm(w, x_tile[0:half, :], part, transpose_B=True, clear_accum=True, policy=_ROWS)
    for j in T.Parallel(quarter):
        scale0[quarter + j] = x_scales[block, quarter + j]
    for i, j in T.Parallel(rows, half):
        accs[0][i, j] += part[i, j] * scale0[j]
    for j in T.Parallel(quarter):
        scale1[j] = x_scales[block, half + j]
    T.wgmma_gemm(w, x_tile[half : 2 * half, :], part, transpose_B=True, clear_accum=True, policy=_ROWS)
    T.wait_wgmma(0)
    for j in T.Parallel(quarter):
        scale1[quarter + j] = x_scales[block, half + quarter + j]
    for i, j in T.Parallel(rows, half):
        accs[1][i, j] += part[i, j] * scale1[j]
