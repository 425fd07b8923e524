"""The form of `grouped_fp8_fp4_gemm` for many rows an expert: tiles of 256 rows by 128 weight rows.

The main loop is that of the dense product's tile (`folded_tile.wide_stage`): a block of channels is widened
once for 256 rows, and sums are added in the same order as by all other tiles.
"""

from typing import Any

from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout

from dsv4_kernels.gemm.folded_tile import BLOCK_K, BLOCK_WORDS, SCALE_K, source, wide_stage
from dsv4_kernels.gemm.grouped_layout import iterations
from dsv4_kernels.tile.late import released_late
from dsv4_kernels.tile.scale import ue8m0_to_f32
from dsv4_kernels.tile.shared import MAX_SHARED_BYTES
from dsv4_kernels.tile.unroll import ring_unrolled

BLOCK_M, BLOCK_N = 256, 128
HALF = 128  # rows of one product
_THREADS = 256  # of two warpgroups
_SCALE_BYTES = 4  # float32
_STAGE_BYTES = BLOCK_M * BLOCK_K + BLOCK_N * (BLOCK_K // 2 + BLOCK_K // SCALE_K)
_SHARED_BYTES = MAX_SHARED_BYTES - 2048  # less what mbarriers and alignment take
_MAX_STAGES = 4


def num_stages(k: int) -> int:
    """Return the depth of the pipeline beside the scales of k channels, at most MAX_K of the product."""
    held = BLOCK_M * (k // BLOCK_K) * _SCALE_BYTES
    return min((_SHARED_BYTES - held) // _STAGE_BYTES, _MAX_STAGES)


def make_wide(n: int, k: int, num_experts: int, stages: int) -> Any:
    """Return the PrimFunc for tiles of 256 rows, each of one expert, by 128 weight rows."""
    m = T.dynamic("m")
    blocks = k // BLOCK_K
    text = source()

    @T.prim_func
    def grouped_fp8_fp4_gemm_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, blocks), T.uint8],
        words: T.Tensor[(num_experts, blocks, n, BLOCK_WORDS), T.uint32],
        offsets: T.Tensor[(num_experts, blocks, n), T.int32],
        factors: T.Tensor[(num_experts, n), T.float32],
        expert: T.Tensor[(m,), T.int32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(n // BLOCK_N, T.ceildiv(m, BLOCK_M), threads=_THREADS) as (bn, bm):
            T.import_source(text)
            x_tile = T.alloc_shared((BLOCK_M, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((1, BLOCK_N, BLOCK_WORDS), T.uint32)
            o_tile = T.alloc_shared((1, BLOCK_N), T.int32)
            x_scales = T.alloc_shared((blocks, BLOCK_M), T.float32)
            acc0 = T.alloc_fragment((BLOCK_N, HALF), T.float32)
            acc1 = T.alloc_fragment((BLOCK_N, HALF), T.float32)
            out_tile = T.alloc_shared((BLOCK_M, BLOCK_N), T.bfloat16)  # takes bytes of what is over by then
            T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})
            for kb, j in T.Parallel(blocks, BLOCK_M):
                x_scales[kb, j] = ue8m0_to_f32(T.cast(x_scale[bm * BLOCK_M + j, kb], "int32"), 0)
            T.clear(acc0)
            T.clear(acc1)
            e = T.max(expert[bm * BLOCK_M], 0)  # a tile of padding alone multiplies nothing
            for ko in T.Pipelined(iterations(expert[bm * BLOCK_M], blocks), num_stages=stages):
                T.copy(x[bm * BLOCK_M, ko * BLOCK_K], x_tile)
                T.copy(words[e, ko, bn * BLOCK_N, 0], w_tile)
                T.copy(offsets[e, ko, bn * BLOCK_N], o_tile)
                wide_stage(
                    x_tile,
                    x_scales,
                    (acc0, acc1),
                    ko,
                    HALF,
                    BLOCK_N,
                    lambda row, word: w_tile[0, row, word],
                    lambda row, _: o_tile[0, row],
                )
            for i, j in T.Parallel(BLOCK_N, HALF):
                out_tile[j, i] = T.cast(acc0[i, j] * factors[e, bn * BLOCK_N + i], "bfloat16")
            for i, j in T.Parallel(BLOCK_N, HALF):
                out_tile[HALF + j, i] = T.cast(acc1[i, j] * factors[e, bn * BLOCK_N + i], "bfloat16")
            T.copy(out_tile, out[bm * BLOCK_M, bn * BLOCK_N], disable_tma=True)

    return released_late(ring_unrolled(grouped_fp8_fp4_gemm_kernel, stages))
