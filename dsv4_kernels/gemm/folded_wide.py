"""The form of `fp8_fp4_gemm_folded` for many tokens: tiles of 256 by 128 weight rows; see docs/gemm.md.

A block of channels is widened once for all 256 tokens, which are multiplied half by half through the same
registers for partial sums. Sums are those of the other forms: 128 channels from zero, times the scale of x,
in the order of k.
"""

from typing import Any

from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout

from dsv4_kernels.gemm.folded_tile import BLOCK_K, BLOCK_WORDS, WORD, source, wide_stage
from dsv4_kernels.tile.late import released_late
from dsv4_kernels.tile.scale import ue8m0_to_f32
from dsv4_kernels.tile.shared import MAX_SHARED_BYTES

BLOCK_M, BLOCK_N = 256, 128
HALF = 128  # tokens of one product
WARPGROUPS = 2
_THREADS = WARPGROUPS * 128
_COPY_BYTES = 4  # at least, by one cp.async: plain copies of a byte each wait for the one before
_PADDING = 4  # offsets and scales after each row of them, so that those of eight rows lie in eight banks
_F32_BYTES, _OFFSETS_BYTES = 4, 4  # of a scale; of the offsets of a row's 128 channels
_STAGE_BYTES = BLOCK_M * BLOCK_K + BLOCK_N * BLOCK_K // 2
_SHARED_BYTES = MAX_SHARED_BYTES - 2048  # less what mbarriers and alignment take
_MAX_STAGES, _MIN_STAGES = 4, 2


def num_stages(k: int) -> int | None:
    """Return the depth of the pipeline beside scales and offsets of k channels; None if there is no room."""
    blocks = k // BLOCK_K
    held = BLOCK_M * (blocks * _F32_BYTES + blocks + _PADDING)
    held += BLOCK_N * (blocks + _PADDING) * _OFFSETS_BYTES
    stages = min((_SHARED_BYTES - held) // _STAGE_BYTES, _MAX_STAGES)
    return stages if stages >= _MIN_STAGES else None


def make_wide(n: int, k: int, stages: int) -> Any:
    """Return the PrimFunc for tiles of 128 weight rows by 256 tokens; k is a multiple of 512."""
    m = T.dynamic("m")
    blocks = k // BLOCK_K
    text = source()

    @T.prim_func
    def fp8_fp4_gemm_folded_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, blocks), T.uint8],
        words: T.Tensor[(n, k // WORD), T.uint32],
        offsets: T.Tensor[(n, blocks), T.int32],
        factors: T.Tensor[(n,), T.float32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, BLOCK_M), n // BLOCK_N, threads=_THREADS) as (bm, bn):
            T.import_source(text)
            x_tile = T.alloc_shared((BLOCK_M, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((BLOCK_N, BLOCK_WORDS), T.uint32)
            scale_codes = T.alloc_shared((BLOCK_M, blocks + _PADDING), T.uint8)
            x_scales = T.alloc_shared((blocks, BLOCK_M), T.float32)
            row_offsets = T.alloc_shared((BLOCK_N, blocks + _PADDING), T.int32)
            acc0 = T.alloc_fragment((BLOCK_N, HALF), T.float32)
            acc1 = T.alloc_fragment((BLOCK_N, HALF), T.float32)
            out_tile = T.alloc_shared((BLOCK_M, BLOCK_N), T.bfloat16)  # takes bytes of what is over by then
            T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})
            T.async_copy(
                x_scale[bm * BLOCK_M : (bm + 1) * BLOCK_M, 0:blocks],
                scale_codes[:, 0:blocks],
                coalesced_width=_COPY_BYTES,
            )
            T.async_copy(
                offsets[bn * BLOCK_N : (bn + 1) * BLOCK_N, 0:blocks],
                row_offsets[:, 0:blocks],
                coalesced_width=_COPY_BYTES,
            )
            T.ptx_wait_group(0)
            for kb, j in T.Parallel(blocks, BLOCK_M):
                x_scales[kb, j] = ue8m0_to_f32(T.cast(scale_codes[j, kb], "int32"), 0)
            T.clear(acc0)
            T.clear(acc1)
            for ko in T.Pipelined(blocks, num_stages=stages):
                T.copy(x[bm * BLOCK_M, ko * BLOCK_K], x_tile)
                T.copy(words[bn * BLOCK_N, ko * BLOCK_WORDS], w_tile)
                wide_stage(
                    x_tile,
                    x_scales,
                    (acc0, acc1),
                    ko,
                    HALF,
                    BLOCK_N,
                    lambda row, word: w_tile[row, word],
                    lambda row, block: row_offsets[row, block],
                )
            for i, j in T.Parallel(BLOCK_N, HALF):
                out_tile[j, i] = T.cast(acc0[i, j] * factors[bn * BLOCK_N + i], "bfloat16")
            for i, j in T.Parallel(BLOCK_N, HALF):
                out_tile[HALF + j, i] = T.cast(acc1[i, j] * factors[bn * BLOCK_N + i], "bfloat16")
            T.copy(out_tile, out[bm * BLOCK_M, bn * BLOCK_N], disable_tma=True)

    return released_late(fp8_fp4_gemm_folded_kernel)
