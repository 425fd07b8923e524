"""The form of `narrow_gemm` for many tokens: a block multiplies all parts of k and adds them in registers.

Each part is one chain of additions from zero, and the parts are added as `fold_parts` does, the first first:
the same bits as parts that are written and read again, in one launch and without a workspace. nvcc unrolls
the ring by the rounds of a part.
"""

from typing import Any

from tilelang import language as T

from dsv4_kernels.gemm.bf16_gemm import BF16, F32, WARPGROUP, Config
from dsv4_kernels.tile.unroll import ring_unrolled

_INSTRUCTION_M = 64  # rows of one wgmma
OUT_DTYPES = {16: BF16, 32: F32}  # by bits


def make_summed(n: int, k: int, parts: int, out_bits: int, config: Config) -> Any:
    """Return the PrimFunc for n x k weights; the number of tokens m stays symbolic.

    Args:
        n: weight rows, a multiple of the tile's.
        k: channels, a multiple of parts * block_k.
        parts: of k, whose sums are added one after the other.
        out_bits: of an output, 16 or 32.
        config: tile and schedule; `weights_first` as in `bf16_gemm`.
    """
    m = T.dynamic("m")
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    steps = k // parts // block_k  # of a part
    weights_first, out_dtype = config.weights_first, OUT_DTYPES[out_bits]
    rows, columns = (block_n, block_m) if weights_first else (block_m, block_n)
    shares_rows = rows == _INSTRUCTION_M * config.warpgroups > _INSTRUCTION_M
    policy = T.GemmWarpPolicy.FullRow if shares_rows else T.GemmWarpPolicy.FullCol

    @T.prim_func
    def narrow_gemm_kernel(
        x: T.Tensor[(m, k), T.bfloat16],
        w: T.Tensor[(n, k), T.bfloat16],
        out: T.Tensor[(m, n), out_dtype],
    ):
        with T.Kernel(T.ceildiv(m, block_m), n // block_n, threads=WARPGROUP * config.warpgroups) as (bm, bn):
            x_tile = T.alloc_shared((block_m, block_k), T.bfloat16)
            w_tile = T.alloc_shared((block_n, block_k), T.bfloat16)
            acc = T.alloc_fragment((rows, columns), T.float32)
            total = T.alloc_fragment((rows, columns), T.float32)
            T.clear(acc)
            T.clear(total)
            for ko in T.Pipelined(parts * steps, num_stages=config.num_stages):
                T.copy(x[bm * block_m, ko * block_k], x_tile)
                T.copy(w[bn * block_n, ko * block_k], w_tile)
                if weights_first:
                    T.gemm(w_tile, x_tile, acc, transpose_B=True, policy=policy)
                else:
                    T.gemm(x_tile, w_tile, acc, transpose_B=True, policy=policy)
                if ko % steps == steps - 1:
                    # The first part is taken as it is: zero plus -0 would be 0.
                    for i, j in T.Parallel(rows, columns):
                        total[i, j] = T.if_then_else(ko == steps - 1, acc[i, j], total[i, j] + acc[i, j])
                    T.clear(acc)
            if weights_first:
                for i, j in T.Parallel(rows, columns):
                    out[bm * block_m + j, bn * block_n + i] = T.cast(total[i, j], out_dtype)
            else:
                for i, j in T.Parallel(rows, columns):
                    out[bm * block_m + i, bn * block_n + j] = T.cast(total[i, j], out_dtype)

    # Unrolled by the rounds of a part, whether a part ends is a constant.
    return ring_unrolled(narrow_gemm_kernel, steps)
