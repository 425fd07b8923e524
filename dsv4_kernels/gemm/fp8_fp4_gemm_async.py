"""The form of `fp8_fp4_gemm_folded` for few tokens; see docs/gemm.md.

Weight rows are the instruction's 64 rows: widened codes go straight to the registers it reads.
"""

from typing import Any

from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout

from dsv4_kernels.gemm.folded_tile import BLOCK_K, SCALE_K, WORD, source, widen
from dsv4_kernels.tile.scale import ue8m0_to_f32

WORDS = BLOCK_K // WORD  # of a row in a block
INSTRUCTION_M = 64  # weight rows of a warpgroup
WARPGROUP = 128  # threads
FLIGHT = 4  # blocks of channels under way together in `make_flight`
_ROWS = T.GemmWarpPolicy.FullRow


def make_flight(n: int, k: int, block_m: int, num_stages: int) -> Any:
    """Return the PrimFunc for tiles of 64 weight rows by block_m tokens, four blocks of channels a stage.

    Each block is widened while the products of those before are under way; all are waited for once.
    k is a multiple of 512.
    """
    m = T.dynamic("m")
    block_n = INSTRUCTION_M
    text = source()

    @T.prim_func
    def fp8_fp4_gemm_folded_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, k // BLOCK_K), T.uint8],
        words: T.Tensor[(n, k // WORD), T.uint32],
        offsets: T.Tensor[(n, k // BLOCK_K), T.int32],
        factors: T.Tensor[(n,), T.float32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, block_m), n // block_n, threads=WARPGROUP) as (bm, bn):
            T.import_source(text)
            x_tile = T.alloc_shared((block_m, FLIGHT * BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, FLIGHT * WORDS), T.uint32)
            x_scales = T.alloc_shared((k // BLOCK_K, block_m), T.float32)
            row_offsets = T.alloc_shared((block_n, k // BLOCK_K), T.int32)
            codes0 = T.alloc_fragment((block_n, 4, 4), T.uint32)
            offset0 = T.alloc_fragment((block_n,), T.int32)
            w0 = T.alloc_fragment((block_n, BLOCK_K), T.float8_e4m3fn)
            part0 = T.alloc_fragment((block_n, block_m), T.float32)
            codes1 = T.alloc_fragment((block_n, 4, 4), T.uint32)
            offset1 = T.alloc_fragment((block_n,), T.int32)
            w1 = T.alloc_fragment((block_n, BLOCK_K), T.float8_e4m3fn)
            part1 = T.alloc_fragment((block_n, block_m), T.float32)
            codes2 = T.alloc_fragment((block_n, 4, 4), T.uint32)
            offset2 = T.alloc_fragment((block_n,), T.int32)
            w2 = T.alloc_fragment((block_n, BLOCK_K), T.float8_e4m3fn)
            part2 = T.alloc_fragment((block_n, block_m), T.float32)
            codes3 = T.alloc_fragment((block_n, 4, 4), T.uint32)
            offset3 = T.alloc_fragment((block_n,), T.int32)
            w3 = T.alloc_fragment((block_n, BLOCK_K), T.float8_e4m3fn)
            part3 = T.alloc_fragment((block_n, block_m), T.float32)
            acc = T.alloc_fragment((block_n, block_m), T.float32)
            out_tile = T.alloc_shared((block_m, block_n), T.bfloat16)
            T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})
            # Written before the loop, out_tile has bytes of its own: the pipeline's are not reused for it.
            for j in T.Parallel(block_m):
                out_tile[j, 0] = T.cast(0, "bfloat16")
            for kb, j in T.Parallel(k // BLOCK_K, block_m):
                x_scales[kb, j] = ue8m0_to_f32(T.cast(x_scale[bm * block_m + j, kb], "int32"), 0)
            # A load from memory in each stage would be its longest wait.
            for i, kb in T.Parallel(block_n, k // BLOCK_K):
                row_offsets[i, kb] = offsets[bn * block_n + i, kb]
            T.clear(acc)
            for ko in T.Pipelined(k // (FLIGHT * BLOCK_K), num_stages=num_stages):
                T.copy(x[bm * block_m, ko * FLIGHT * BLOCK_K], x_tile)
                T.copy(words[bn * block_n, ko * FLIGHT * WORDS], w_tile)
                for i in T.Parallel(block_n):
                    offset0[i] = row_offsets[i, ko * FLIGHT + 0]
                for i, t, g in T.Parallel(block_n, 4, 4):
                    codes0[i, t, g] = w_tile[i, 0 + t * 4 + g]
                for i, g, h, t in T.Parallel(block_n, 4, 2, 4):
                    T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
                        "handle",
                        "dsv4_store_b32",
                        T.address_of(w0[i, g * SCALE_K + h * 16 + t * 4]),
                        widen(codes0[i, t, g], (offset0[i] >> (8 * g)) & 0xFF, h),
                    )
                T.wgmma_gemm(w0, x_tile[:, 0:128], part0, transpose_B=True, clear_accum=True, policy=_ROWS)
                for i in T.Parallel(block_n):
                    offset1[i] = row_offsets[i, ko * FLIGHT + 1]
                for i, t, g in T.Parallel(block_n, 4, 4):
                    codes1[i, t, g] = w_tile[i, 16 + t * 4 + g]
                for i, g, h, t in T.Parallel(block_n, 4, 2, 4):
                    T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
                        "handle",
                        "dsv4_store_b32",
                        T.address_of(w1[i, g * SCALE_K + h * 16 + t * 4]),
                        widen(codes1[i, t, g], (offset1[i] >> (8 * g)) & 0xFF, h),
                    )
                T.wgmma_gemm(w1, x_tile[:, 128:256], part1, transpose_B=True, clear_accum=True, policy=_ROWS)
                for i in T.Parallel(block_n):
                    offset2[i] = row_offsets[i, ko * FLIGHT + 2]
                for i, t, g in T.Parallel(block_n, 4, 4):
                    codes2[i, t, g] = w_tile[i, 32 + t * 4 + g]
                for i, g, h, t in T.Parallel(block_n, 4, 2, 4):
                    T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
                        "handle",
                        "dsv4_store_b32",
                        T.address_of(w2[i, g * SCALE_K + h * 16 + t * 4]),
                        widen(codes2[i, t, g], (offset2[i] >> (8 * g)) & 0xFF, h),
                    )
                T.wgmma_gemm(w2, x_tile[:, 256:384], part2, transpose_B=True, clear_accum=True, policy=_ROWS)
                for i in T.Parallel(block_n):
                    offset3[i] = row_offsets[i, ko * FLIGHT + 3]
                for i, t, g in T.Parallel(block_n, 4, 4):
                    codes3[i, t, g] = w_tile[i, 48 + t * 4 + g]
                for i, g, h, t in T.Parallel(block_n, 4, 2, 4):
                    T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
                        "handle",
                        "dsv4_store_b32",
                        T.address_of(w3[i, g * SCALE_K + h * 16 + t * 4]),
                        widen(codes3[i, t, g], (offset3[i] >> (8 * g)) & 0xFF, h),
                    )
                # Plain gemm waits for all products: the compiler hands x_tile back after it.
                T.gemm(w3, x_tile[:, 384:512], part3, transpose_B=True, clear_accum=True, policy=_ROWS)
                for i, j in T.Parallel(block_n, block_m):
                    acc[i, j] += part0[i, j] * x_scales[ko * FLIGHT + 0, j]
                for i, j in T.Parallel(block_n, block_m):
                    acc[i, j] += part1[i, j] * x_scales[ko * FLIGHT + 1, j]
                for i, j in T.Parallel(block_n, block_m):
                    acc[i, j] += part2[i, j] * x_scales[ko * FLIGHT + 2, j]
                for i, j in T.Parallel(block_n, block_m):
                    acc[i, j] += part3[i, j] * x_scales[ko * FLIGHT + 3, j]
            for i, j in T.Parallel(block_n, block_m):
                out_tile[j, i] = T.cast(acc[i, j] * factors[bn * block_n + i], "bfloat16")
            T.copy(out_tile, out[bm * block_m, bn * block_n], disable_tma=True)

    return fp8_fp4_gemm_folded_kernel
