"""The form of `fp8_gemm` for some tokens and many weight rows: a block multiplies several tiles in turn.

Tiles of 64 or 128 tokens by 128 weight rows, neighbours in the weight rows. As in `fp8_gemm_tiles`, the
producer loads a tile while the consumers store the one before, so that bytes keep coming. The blocks are one
round of multiprocessors.
"""

from typing import Any

from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout

from dsv4_kernels.gemm.fp8_gemm_async import (
    BLOCK_K,
    BLOCK_N,
    COPY_SCALES,
    INSTRUCTION_M,
    PADDING,
    WARPGROUP,
    to_f32,
)
from dsv4_kernels.tile.overlap import CONSUMER_REGISTERS, PRODUCER_REGISTERS, overlapped
from dsv4_kernels.tile.unroll import ring_unrolled

_ROWS = T.GemmWarpPolicy.FullRow


def make_runs(n: int, k: int, scale_dtype: str, block_m: int, tiles: int, num_stages: int) -> Any:
    """Return the PrimFunc for blocks of so many tiles of block_m tokens by 128 weight rows.

    Args:
        n: weight rows, a multiple of 128 * tiles.
        k: channels, a multiple of 512.
        scale_dtype: "uint8" or "float32".
        block_m: tokens of a tile, 64 or 128.
        tiles: of a block.
        num_stages: depth of the ring, a divisor of k / 128.

    Raises:
        ValueError: k is no multiple of 512 or of 128 * num_stages.
    """
    blocks = k // BLOCK_K
    if blocks % num_stages or blocks % COPY_SCALES:
        clause = f"k % {BLOCK_K * COPY_SCALES} == 0 and k % ({BLOCK_K} * num_stages) == 0"
        raise ValueError(f"fp8_gemm: requires {clause}, got {k=}, {num_stages=}")
    m = T.dynamic("m")
    is_e8m0 = scale_dtype == "uint8"

    @T.prim_func
    def fp8_gemm_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, blocks), scale_dtype],
        w: T.Tensor[(n, k), T.float8_e4m3fn],
        w_scale: T.Tensor[(n // BLOCK_N, blocks), scale_dtype],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        threads = block_m // INSTRUCTION_M * WARPGROUP
        with T.Kernel(T.ceildiv(m, block_m), n // (BLOCK_N * tiles), threads=threads) as (bm, bg):
            T.annotate_producer_reg_dealloc(PRODUCER_REGISTERS)
            T.annotate_consumer_reg_alloc(CONSUMER_REGISTERS)
            x_tile = T.alloc_shared((block_m, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((BLOCK_N, BLOCK_K), T.float8_e4m3fn)
            x_scales = T.alloc_shared((block_m, blocks + PADDING), scale_dtype)
            w_scales = T.alloc_shared((tiles, blocks), scale_dtype)
            out_tile = T.alloc_shared((block_m, BLOCK_N), T.bfloat16)
            part = T.alloc_fragment((block_m, BLOCK_N), T.float32)
            factor = T.alloc_fragment((block_m,), T.float32)
            acc = T.alloc_fragment((block_m, BLOCK_N), T.float32)
            T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})
            T.async_copy(
                x_scale[bm * block_m : (bm + 1) * block_m, 0:blocks],
                x_scales[:, 0:blocks],
                coalesced_width=COPY_SCALES,
            )
            T.copy(w_scale[bg * tiles : (bg + 1) * tiles, 0:blocks], w_scales, disable_tma=True)
            T.ptx_wait_group(0)
            for t in T.serial(tiles):
                T.clear(acc)
                for ko in T.Pipelined(blocks, num_stages=num_stages):
                    T.copy(x[bm * block_m, ko * BLOCK_K], x_tile)
                    T.copy(w[(bg * tiles + t) * BLOCK_N, ko * BLOCK_K], w_tile)
                    for i in T.Parallel(block_m):
                        factor[i] = to_f32(x_scales[i, ko], is_e8m0) * to_f32(w_scales[t, ko], is_e8m0)
                    T.gemm(x_tile, w_tile, part, transpose_B=True, clear_accum=True, policy=_ROWS)
                    for i, j in T.Parallel(block_m, BLOCK_N):
                        acc[i, j] += part[i, j] * factor[i]
                T.tma_store_wait(0)
                for i, j in T.Parallel(block_m, BLOCK_N):
                    out_tile[i, j] = T.cast(acc[i, j], "bfloat16")
                column = (bg * tiles + t) * BLOCK_N
                T.tma_copy(out_tile, out[bm * block_m : (bm + 1) * block_m, column : column + BLOCK_N])
            T.tma_store_wait(0)

    return overlapped(ring_unrolled(fp8_gemm_kernel, num_stages))
