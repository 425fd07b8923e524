"""The second launch of `fp8_fp4_gemm_widened`: the product with weights that `fp4_widen` wrote.

Tiles of 128 tokens by 256 weight rows, as the FP8 product's (`wide_tile`): both operands come to shared
memory by TMA, two warpgroups share out the tokens, and weight rows are multiplied half by half through the
same registers. Sums are those of the other forms: 128 channels from zero, times the scale of x, in the order
of k, the row's factor last. With several tiles a block, one leaves by TMA under the next one's products.
"""

from typing import Any

from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout

from dsv4_kernels.tile.overlap import CONSUMER_REGISTERS, PRODUCER_REGISTERS, overlapped
from dsv4_kernels.tile.scale import ue8m0_to_f32
from dsv4_kernels.tile.unroll import ring_unrolled

BLOCK_K = 128  # channels a scale of x, and a partial sum
BLOCK_M, BLOCK_N = 128, 256
HALF = 128  # weight rows of one product
HELD_COLUMNS = 64  # of the output beside the ring, where a block has several tiles
THREADS = 256  # two warpgroups of consumers
_COPY_BYTES = 4  # at least, by one cp.async: plain copies of a byte each wait for the one before
_PADDING = 4  # scales after each row of them, so that those of eight rows lie in eight banks
_STAGES = (4, 3)
_STAGE_BYTES = (BLOCK_M + BLOCK_N) * BLOCK_K
_SHARED_BYTES = 232448 - 1024  # of a block on sm_90, less what mbarriers take
_ALIGNMENT = 1024  # bytes, of every buffer
_F32_BYTES, _BF16_BYTES = 4, 2
_ROWS = T.GemmWarpPolicy.FullRow


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def num_stages(k: int, tiles: int) -> int | None:
    """Return the depth of the ring beside what else is held; None if there is no room."""
    blocks = k // BLOCK_K
    held = _aligned(BLOCK_M * (blocks + _PADDING)) + _aligned(tiles * BLOCK_N * _F32_BYTES)
    if tiles > 1:
        held += BLOCK_M * HELD_COLUMNS * _BF16_BYTES
    for stages in _STAGES:
        if stages * _STAGE_BYTES + held <= _SHARED_BYTES and (tiles == 1 or blocks % stages == 0):
            return stages
    return None


@T.macro
def _stage(x_tile: Any, w_tile: Any, x_scales: Any, part: Any, scale: Any, acc0: Any, acc1: Any, block: Any):
    """Multiply 128 channels by both halves of the weight rows, scale and add."""
    for i in T.Parallel(BLOCK_M):
        scale[i] = ue8m0_to_f32(T.cast(x_scales[i, block], "int32"), 0)
    T.gemm(x_tile, w_tile[0:HALF, :], part, transpose_B=True, clear_accum=True, policy=_ROWS)
    for i, j in T.Parallel(BLOCK_M, HALF):
        acc0[i, j] += part[i, j] * scale[i]
    T.gemm(x_tile, w_tile[HALF:BLOCK_N, :], part, transpose_B=True, clear_accum=True, policy=_ROWS)
    for i, j in T.Parallel(BLOCK_M, HALF):
        acc1[i, j] += part[i, j] * scale[i]


def make_one(n: int, k: int, stages: int) -> Any:
    """Return the PrimFunc of one tile a block; n is a multiple of 256, k of 512."""
    m = T.dynamic("m")
    blocks = k // BLOCK_K

    @T.prim_func
    def fp8_fp4_gemm_widened_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, blocks), T.uint8],
        w: T.Tensor[(n, k), T.float8_e4m3fn],
        factors: T.Tensor[(n,), T.float32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, BLOCK_M), n // BLOCK_N, threads=THREADS) as (bm, bn):
            x_tile = T.alloc_shared((BLOCK_M, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((BLOCK_N, BLOCK_K), T.float8_e4m3fn)
            x_scales = T.alloc_shared((BLOCK_M, blocks + _PADDING), T.uint8)
            row_factors = T.alloc_shared((BLOCK_N,), T.float32)
            out_tile = T.alloc_shared((BLOCK_M, BLOCK_N), T.bfloat16)  # takes bytes of what is over by then
            part = T.alloc_fragment((BLOCK_M, HALF), T.float32)
            scale = T.alloc_fragment((BLOCK_M,), T.float32)
            acc0 = T.alloc_fragment((BLOCK_M, HALF), T.float32)
            acc1 = T.alloc_fragment((BLOCK_M, HALF), T.float32)
            T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})
            T.async_copy(
                x_scale[bm * BLOCK_M : (bm + 1) * BLOCK_M, 0:blocks],
                x_scales[:, 0:blocks],
                coalesced_width=_COPY_BYTES,
            )
            T.copy(factors[bn * BLOCK_N : (bn + 1) * BLOCK_N], row_factors, disable_tma=True)
            T.ptx_wait_group(0)
            T.clear(acc0)
            T.clear(acc1)
            for ko in T.Pipelined(blocks, num_stages=stages):
                T.copy(x[bm * BLOCK_M, ko * BLOCK_K], x_tile)
                T.copy(w[bn * BLOCK_N, ko * BLOCK_K], w_tile)
                _stage(x_tile, w_tile, x_scales, part, scale, acc0, acc1, ko)
            # In registers first: the tile's bytes are then written without a barrier before each of them.
            for i, j in T.Parallel(BLOCK_M, HALF):
                acc0[i, j] = acc0[i, j] * row_factors[j]
            for i, j in T.Parallel(BLOCK_M, HALF):
                acc1[i, j] = acc1[i, j] * row_factors[HALF + j]
            for i, j in T.Parallel(BLOCK_M, HALF):
                out_tile[i, j] = T.cast(acc0[i, j], "bfloat16")
            for i, j in T.Parallel(BLOCK_M, HALF):
                out_tile[i, HALF + j] = T.cast(acc1[i, j], "bfloat16")
            T.copy(out_tile, out[bm * BLOCK_M, bn * BLOCK_N], disable_tma=True)

    return ring_unrolled(fp8_fp4_gemm_widened_kernel, stages)


def make_tiles(n: int, k: int, tiles: int, stages: int) -> Any:
    """Return the PrimFunc of several tiles a block; n is a multiple of 256 * tiles, k / 128 one of stages."""
    m = T.dynamic("m")
    blocks = k // BLOCK_K
    width = HELD_COLUMNS

    @T.macro
    def store_half(acc: Any, row_factors: Any, out_tile: Any, out: Any, row: Any, first: Any, column: Any):
        # In registers first: the tile's bytes are then written without a barrier before each of them.
        for i, j in T.Parallel(BLOCK_M, HALF):
            acc[i, j] = acc[i, j] * row_factors[first + j]
        for q in T.unroll(HALF // width):
            T.tma_store_wait(0)
            for i, j in T.Parallel(BLOCK_M, width):
                out_tile[i, j] = T.cast(acc[i, q * width + j], "bfloat16")
            T.tma_copy(out_tile, out[row : row + BLOCK_M, column + q * width : column + (q + 1) * width])

    @T.prim_func
    def fp8_fp4_gemm_widened_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, blocks), T.uint8],
        w: T.Tensor[(n, k), T.float8_e4m3fn],
        factors: T.Tensor[(n,), T.float32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, BLOCK_M), n // (BLOCK_N * tiles), threads=THREADS) as (bm, bg):
            T.annotate_producer_reg_dealloc(PRODUCER_REGISTERS)
            T.annotate_consumer_reg_alloc(CONSUMER_REGISTERS)
            x_tile = T.alloc_shared((BLOCK_M, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((BLOCK_N, BLOCK_K), T.float8_e4m3fn)
            x_scales = T.alloc_shared((BLOCK_M, blocks + _PADDING), T.uint8)
            row_factors = T.alloc_shared((tiles * BLOCK_N,), T.float32)
            out_tile = T.alloc_shared((BLOCK_M, width), T.bfloat16)
            part = T.alloc_fragment((BLOCK_M, HALF), T.float32)
            scale = T.alloc_fragment((BLOCK_M,), T.float32)
            acc0 = T.alloc_fragment((BLOCK_M, HALF), T.float32)
            acc1 = T.alloc_fragment((BLOCK_M, HALF), T.float32)
            T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})
            T.async_copy(
                x_scale[bm * BLOCK_M : (bm + 1) * BLOCK_M, 0:blocks],
                x_scales[:, 0:blocks],
                coalesced_width=_COPY_BYTES,
            )
            T.copy(factors[bg * tiles * BLOCK_N : (bg + 1) * tiles * BLOCK_N], row_factors, disable_tma=True)
            T.ptx_wait_group(0)
            for t in T.serial(tiles):
                T.clear(acc0)
                T.clear(acc1)
                for ko in T.Pipelined(blocks, num_stages=stages):
                    T.copy(x[bm * BLOCK_M, ko * BLOCK_K], x_tile)
                    T.copy(w[(bg * tiles + t) * BLOCK_N, ko * BLOCK_K], w_tile)
                    _stage(x_tile, w_tile, x_scales, part, scale, acc0, acc1, ko)
                store_half(
                    acc0,
                    row_factors,
                    out_tile,
                    out,
                    bm * BLOCK_M,
                    t * BLOCK_N,
                    (bg * tiles + t) * BLOCK_N,
                )
                store_half(
                    acc1,
                    row_factors,
                    out_tile,
                    out,
                    bm * BLOCK_M,
                    t * BLOCK_N + HALF,
                    (bg * tiles + t) * BLOCK_N + HALF,
                )
            T.tma_store_wait(0)

    return overlapped(ring_unrolled(fp8_fp4_gemm_widened_kernel, stages))
