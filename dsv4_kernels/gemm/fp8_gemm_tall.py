"""The form of `fp8_gemm` for batches whose wide tiles leave half a round of multiprocessors idle.

Tiles of 192 tokens by 128 weight rows, three warpgroups of 64 tokens: three quarters of the products of a
wide tile in 0.9 of its time. The same partial sums in the same order as every other form.
"""

from typing import Any

from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout

from dsv4_kernels.gemm.fp8_gemm_async import (
    BLOCK_K,
    BLOCK_N,
    INSTRUCTION_M,
    PADDING,
    WARPGROUP,
    load_scales,
    to_f32,
)
from dsv4_kernels.tile.unroll import ring_unrolled

TALL_M = 192  # tokens
_TALL_REGISTERS = 24, 160  # of a producer's and of a consumer's thread: 512 threads
_ROWS = T.GemmWarpPolicy.FullRow


def make_tall(n: int, k: int, scale_dtype: str, num_stages: int) -> Any:
    """Return the PrimFunc for tiles of 192 tokens by 128 weight rows."""
    m = T.dynamic("m")
    is_e8m0 = scale_dtype == "uint8"
    blocks = k // BLOCK_K
    producer, consumer = _TALL_REGISTERS

    @T.prim_func
    def fp8_gemm_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, blocks), scale_dtype],
        w: T.Tensor[(n, k), T.float8_e4m3fn],
        w_scale: T.Tensor[(n // BLOCK_N, blocks), scale_dtype],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        threads = TALL_M // INSTRUCTION_M * WARPGROUP
        with T.Kernel(T.ceildiv(m, TALL_M), n // BLOCK_N, threads=threads) as (bm, bn):
            T.annotate_producer_reg_dealloc(producer)
            T.annotate_consumer_reg_alloc(consumer)
            x_tile = T.alloc_shared((TALL_M, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((BLOCK_N, BLOCK_K), T.float8_e4m3fn)
            x_scales = T.alloc_shared((TALL_M, blocks + PADDING), scale_dtype)
            w_scales = T.alloc_shared((1, blocks), scale_dtype)
            out_tile = T.alloc_shared((TALL_M, BLOCK_N), T.bfloat16)  # takes bytes of what is over by then
            part = T.alloc_fragment((TALL_M, BLOCK_N), T.float32)
            factor = T.alloc_fragment((TALL_M,), T.float32)
            acc = T.alloc_fragment((TALL_M, BLOCK_N), T.float32)
            T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})
            rows = x_scale[bm * TALL_M : (bm + 1) * TALL_M, 0:blocks]
            load_scales(rows, w_scale[bn, 0:blocks], x_scales, w_scales)
            T.clear(acc)
            for ko in T.Pipelined(blocks, num_stages=num_stages):
                T.copy(x[bm * TALL_M, ko * BLOCK_K], x_tile)
                T.copy(w[bn * BLOCK_N, ko * BLOCK_K], w_tile)
                for i in T.Parallel(TALL_M):
                    factor[i] = to_f32(x_scales[i, ko], is_e8m0) * to_f32(w_scales[0, ko], is_e8m0)
                T.gemm(x_tile, w_tile, part, transpose_B=True, clear_accum=True, policy=_ROWS)
                for i, j in T.Parallel(TALL_M, BLOCK_N):
                    acc[i, j] += part[i, j] * factor[i]
            for i, j in T.Parallel(TALL_M, BLOCK_N):
                out_tile[i, j] = T.cast(acc[i, j], "bfloat16")
            T.copy(out_tile, out[bm * TALL_M, bn * BLOCK_N], disable_tma=True)

    return ring_unrolled(fp8_gemm_kernel, num_stages)
