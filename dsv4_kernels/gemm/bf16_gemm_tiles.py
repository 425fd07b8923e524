"""The form of `bf16_gemm` for many tokens and many weight rows: a block multiplies several tiles in turn.

Tiles of 128 tokens by 256 weight rows, neighbours in the tokens, so that weights that were read for one are
read again from the L2. As in `fp8_gemm_tiles`, the producer loads the first stages of a tile while the
consumers store the one before. Sums leave by TMA, 64 columns at a time, through bytes of their own; a store's
read is waited for only before its bytes are written again.
"""

from typing import Any

from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout

from dsv4_kernels.tile.overlap import CONSUMER_REGISTERS, PRODUCER_REGISTERS, overlapped
from dsv4_kernels.tile.unroll import ring_unrolled

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
NUM_STAGES = 4  # of the ring: a divisor of the rounds of a tile, so that each begins in the same stage
TILE = {"block_m": BLOCK_M, "block_n": BLOCK_N, "block_k": BLOCK_K, "num_stages": NUM_STAGES}
_HELD_COLUMNS = 64  # of the output in shared memory
_THREADS = 256  # of two consumer warpgroups


def make_tiles(n: int, k: int, out_dtype: str, tiles: int) -> Any:
    """Return the PrimFunc for blocks of so many tiles; the number of tokens m stays symbolic.

    Args:
        n: weight rows, a multiple of 256.
        k: channels, a multiple of 256.
        out_dtype: "float32" or "bfloat16".
        tiles: of a block.
    """
    m = T.dynamic("m")

    @T.prim_func
    def bf16_gemm_kernel(
        x: T.Tensor[(m, k), T.bfloat16],
        w: T.Tensor[(n, k), T.bfloat16],
        out: T.Tensor[(m, n), out_dtype],
    ):
        with T.Kernel(T.ceildiv(m, BLOCK_M * tiles), n // BLOCK_N, threads=_THREADS) as (bg, bn):
            T.annotate_producer_reg_dealloc(PRODUCER_REGISTERS)
            T.annotate_consumer_reg_alloc(CONSUMER_REGISTERS)
            x_tile = T.alloc_shared((BLOCK_M, BLOCK_K), T.bfloat16)
            w_tile = T.alloc_shared((BLOCK_N, BLOCK_K), T.bfloat16)
            out_tile = T.alloc_shared((BLOCK_M, _HELD_COLUMNS), out_dtype)
            acc = T.alloc_fragment((BLOCK_M, BLOCK_N), T.float32)
            T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})
            for t in T.serial(tiles):
                row = (bg * tiles + t) * BLOCK_M
                T.clear(acc)
                for ko in T.Pipelined(k // BLOCK_K, num_stages=NUM_STAGES):
                    T.copy(x[row, ko * BLOCK_K], x_tile)
                    T.copy(w[bn * BLOCK_N, ko * BLOCK_K], w_tile)
                    T.gemm(x_tile, w_tile, acc, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
                for q in T.unroll(BLOCK_N // _HELD_COLUMNS):
                    T.tma_store_wait(0)
                    for i, j in T.Parallel(BLOCK_M, _HELD_COLUMNS):
                        out_tile[i, j] = T.cast(acc[i, q * _HELD_COLUMNS + j], out_dtype)
                    column = bn * BLOCK_N + q * _HELD_COLUMNS
                    T.tma_copy(out_tile, out[row : row + BLOCK_M, column : column + _HELD_COLUMNS])
            T.tma_store_wait(0)

    return overlapped(ring_unrolled(bf16_gemm_kernel, NUM_STAGES))
