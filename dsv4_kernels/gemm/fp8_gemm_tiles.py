"""The form of `fp8_gemm` for many tokens and few channels: a block multiplies several tiles in turn.

Tiles of 128 tokens by 256 weight rows (`wide_tile`), neighbours in the weight rows. The producer loads the
first stages of a tile while the consumers store the one before, and the scales of the tokens are read once.
Sums leave by TMA through bytes of their own, so the ring keeps its bytes: whole tiles, or by halves or
quarters where there is no room. A store's read is waited for only before its bytes are written again, so
that the last one of a tile happens under the next tile's products.
"""

from typing import Any

from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout

from dsv4_kernels.gemm import wide_tile
from dsv4_kernels.gemm.fp8_gemm_async import to_f32
from dsv4_kernels.tile.overlap import CONSUMER_REGISTERS, PRODUCER_REGISTERS, overlapped
from dsv4_kernels.tile.shared import MAX_SHARED_BYTES
from dsv4_kernels.tile.unroll import ring_unrolled

BLOCK_K = wide_tile.BLOCK_K
WARPGROUPS = 2
WARPGROUP = 128  # threads
_STAGES = (4, 3)  # of the ring: divisors of the rounds of a tile, so that each begins in the same stage
QUARTER = 64  # columns of a tile
_BARRIER = 1  # of the consumers, beside those of the compiler's own
_BF16_BYTES = 2
_SHARED_BYTES = MAX_SHARED_BYTES - 1024  # less what mbarriers take
_ALIGNMENT = 512  # bytes, of every buffer


def shares(k: int, scale_bytes: int, tiles: int, least: int = wide_tile.HALF) -> tuple[int, int] | None:
    """Return how shared memory is shared out beside the scales; None if there is no room.

    Args:
        k: channels.
        scale_bytes: of a scale.
        tiles: of a block.
        least: columns of the output to hold: of half of a tile, or QUARTER.

    Returns:
        Depth of the ring, and columns of the output that are held: of a whole tile, or of half or a quarter.
    """
    blocks = k // BLOCK_K
    if blocks % wide_tile.COPY_SCALES:
        return None
    scales = 0
    for elements in (wide_tile.BLOCK_M * (blocks + wide_tile.PADDING), 2 * tiles * blocks):
        scales += -(-elements * scale_bytes // _ALIGNMENT) * _ALIGNMENT
    stage = (wide_tile.BLOCK_M + wide_tile.BLOCK_N) * BLOCK_K
    column = wide_tile.BLOCK_M * _BF16_BYTES
    for stages in (s for s in _STAGES if blocks % s == 0):
        for columns in (c for c in (wide_tile.BLOCK_N, wide_tile.HALF, QUARTER) if c >= least):
            if stages * stage + columns * column + scales <= _SHARED_BYTES:
                return stages, columns
    return None


def make_tiles(n: int, k: int, scale_dtype: str, tiles: int, num_stages: int, held_columns: int) -> Any:
    """Return the PrimFunc for blocks of so many tiles; n is a multiple of 256 * tiles.

    Args:
        n: weight rows.
        k: channels.
        scale_dtype: "uint8" or "float32".
        tiles: of a block.
        num_stages: depth of the ring, see `shares`.
        held_columns: of the output in shared memory, see `shares`.

    Raises:
        ValueError: the stages do not divide the rounds of a tile.
    """
    if k // BLOCK_K % num_stages:
        raise ValueError(f"fp8_gemm: requires k / {BLOCK_K} % num_stages == 0, got {k=}, {num_stages=}")
    m = T.dynamic("m")
    block_m, block_n, half, blocks = wide_tile.BLOCK_M, wide_tile.BLOCK_N, wide_tile.HALF, k // BLOCK_K
    is_e8m0 = scale_dtype == "uint8"
    halves = 2 * tiles

    @T.macro
    def store_whole(accs: Any, out_tile: Any, out: Any, row: Any, column: Any):
        T.tma_store_wait(0)
        for i, j in T.Parallel(block_m, half):
            out_tile[i, j] = T.cast(accs[0][i, j], "bfloat16")
        for i, j in T.Parallel(block_m, half):
            out_tile[i, half + j] = T.cast(accs[1][i, j], "bfloat16")
        T.tma_copy(out_tile, out[row : row + block_m, column : column + block_n])

    @T.macro
    def store_halves(accs: Any, out_tile: Any, out: Any, row: Any, column: Any):
        T.tma_store_wait(0)
        for i, j in T.Parallel(block_m, half):
            out_tile[i, j] = T.cast(accs[0][i, j], "bfloat16")
        T.tma_copy(out_tile, out[row : row + block_m, column : column + half])
        T.tma_store_wait(0)
        for i, j in T.Parallel(block_m, half):
            out_tile[i, j] = T.cast(accs[1][i, j], "bfloat16")
        T.tma_copy(out_tile, out[row : row + block_m, column + half : column + block_n])

    # Both loops count quarters from the tile's first column: so the number of a tile is a quotient of the
    # column alone, and `batch_invariance` finds the terms of tiles that are stored whole. The compiler puts
    # no barrier before writes under a condition, so the second loop has its own.
    @T.macro
    def store_quarters(accs: Any, out_tile: Any, out: Any, row: Any, column: Any):
        for q in T.unroll(half // QUARTER):
            T.tma_store_wait(0)
            for i, j in T.Parallel(block_m, QUARTER):
                out_tile[i, j] = T.cast(accs[0][i, q * QUARTER + j], "bfloat16")
            first = column + q * QUARTER
            T.tma_copy(out_tile, out[row : row + block_m, first : first + QUARTER])
        for q in T.unroll(block_n // QUARTER):
            T.tma_store_wait(0)
            T.sync_threads(_BARRIER, WARPGROUPS * WARPGROUP)
            if q >= half // QUARTER:
                for i, j in T.Parallel(block_m, QUARTER):
                    out_tile[i, j] = T.cast(accs[1][i, q * QUARTER - half + j], "bfloat16")
                first = column + q * QUARTER
                T.tma_copy(out_tile, out[row : row + block_m, first : first + QUARTER])

    store = {block_n: store_whole, half: store_halves, QUARTER: store_quarters}[held_columns]

    @T.prim_func
    def fp8_gemm_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, blocks), scale_dtype],
        w: T.Tensor[(n, k), T.float8_e4m3fn],
        w_scale: T.Tensor[(n // half, blocks), scale_dtype],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        threads = WARPGROUP * WARPGROUPS
        with T.Kernel(T.ceildiv(m, block_m), n // (block_n * tiles), threads=threads) as (bm, bg):
            T.annotate_producer_reg_dealloc(PRODUCER_REGISTERS)
            T.annotate_consumer_reg_alloc(CONSUMER_REGISTERS)
            x_tile = T.alloc_shared((block_m, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, BLOCK_K), T.float8_e4m3fn)
            x_scales = T.alloc_shared((block_m, blocks + wide_tile.PADDING), scale_dtype)
            w_scales = T.alloc_shared((halves, blocks), scale_dtype)
            out_tile = T.alloc_shared((block_m, held_columns), T.bfloat16)
            part = T.alloc_fragment((block_m, half), T.float32)
            factor0 = T.alloc_fragment((block_m,), T.float32)
            factor1 = T.alloc_fragment((block_m,), T.float32)
            acc0 = T.alloc_fragment((block_m, half), T.float32)
            acc1 = T.alloc_fragment((block_m, half), T.float32)
            T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})
            T.async_copy(
                x_scale[bm * block_m : (bm + 1) * block_m, 0:blocks],
                x_scales[:, 0:blocks],
                coalesced_width=wide_tile.COPY_SCALES,
            )
            T.copy(w_scale[bg * halves : (bg + 1) * halves, 0:blocks], w_scales, disable_tma=True)
            T.ptx_wait_group(0)
            for t in T.serial(tiles):
                T.clear(acc0)
                T.clear(acc1)
                for ko in T.Pipelined(blocks, num_stages=num_stages):
                    T.copy(x[bm * block_m, ko * BLOCK_K], x_tile)
                    T.copy(w[(bg * tiles + t) * block_n, ko * BLOCK_K], w_tile)
                    wide_tile.wide_stage(
                        x_tile,
                        w_tile,
                        x_scales,
                        w_scales,
                        part,
                        (factor0, factor1),
                        (acc0, acc1),
                        ko,
                        lambda value: to_f32(value, is_e8m0),
                        t * 2,
                    )
                store((acc0, acc1), out_tile, out, bm * block_m, (bg * tiles + t) * block_n)
            T.tma_store_wait(0)

    return overlapped(ring_unrolled(fp8_gemm_kernel, num_stages))
