"""The form of `fp8_gemm` for some tokens, two products under way in a warpgroup; see docs/gemm.md.

Tokens are the instruction's 64 rows, shared out over the consumer warpgroups. All scales of the tile lie in
shared memory; nvcc unrolls the ring.
"""

from typing import Any

from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout, make_half_bank_swizzled_layout

from dsv4_kernels.tile.late import released_late
from dsv4_kernels.tile.scale import ue8m0_to_f32
from dsv4_kernels.tile.shared import MAX_SHARED_BYTES
from dsv4_kernels.tile.unroll import ring_unrolled

BLOCK_K = 128  # channels a scale, and a partial sum
BLOCK_N = 128  # weight rows a scale
WARPGROUP = 128  # threads
INSTRUCTION_M = 64  # rows of one wgmma
COPY_SCALES = 4  # at least, by one cp.async: plain copies of a byte each wait for the one before
PADDING = 4  # scales after each row of them, so that those of eight rows lie in eight banks
_ROWS = T.GemmWarpPolicy.FullRow
_SHARED_BYTES = MAX_SHARED_BYTES - 1024  # less what mbarriers take
_ALIGNMENT = 1024  # bytes, of every buffer
# Powers of two where they fit: stage and parity of an unrolled ring are then constants.
_STAGES = (8, 4, 3, 2)
_DEEP_STAGES = (8, 6, 5, 4, 3, 2)  # where loads bind, more of them are worth an address that is computed


def num_stages(k: int, scale_bytes: int, block_m: int, block_n: int, deep: bool = False) -> int | None:
    """Return the depth of the pipeline beside the scales of k channels; None if there is no room for one."""
    blocks = k // BLOCK_K
    scales = -(-block_m * (blocks + PADDING) * scale_bytes // _ALIGNMENT) * _ALIGNMENT
    scales += -(-blocks * scale_bytes // _ALIGNMENT) * _ALIGNMENT
    stage = 2 * BLOCK_K * (block_m + block_n)
    return next((s for s in (_DEEP_STAGES if deep else _STAGES) if s * stage + scales <= _SHARED_BYTES), None)


def to_f32(scale: Any, is_e8m0: bool) -> Any:
    """Return a scale of either kind as float32."""
    return ue8m0_to_f32(T.cast(scale, "int32"), 0) if is_e8m0 else scale


@T.macro
def load_scales(rows: Any, w_row: Any, x_scales: Any, w_scales: Any):
    """Bring all scales of a tile to shared memory.

    Args:
        rows: [block_m, blocks] scales of the tile's tokens.
        w_row: [blocks] scales of its weight rows.
        x_scales: [block_m, blocks + PADDING] in shared memory.
        w_scales: [1, blocks] in shared memory.
    """
    blocks = w_scales.shape[1]
    if blocks % COPY_SCALES == 0:
        T.async_copy(rows, x_scales[:, 0:blocks], coalesced_width=COPY_SCALES)
        T.copy(w_row, w_scales[0, 0:blocks], disable_tma=True)
        T.ptx_wait_group(0)
    else:
        T.copy(rows, x_scales[:, 0:blocks], disable_tma=True)
        T.copy(w_row, w_scales[0, 0:blocks], disable_tma=True)


@T.macro
def two_products(rows: Any, columns: Any, part0: Any, part1: Any):
    """Multiply two blocks of channels, both products under way together; warpgroups share out the rows.

    Both are waited for.

    Args:
        rows: [block_rows, 256] e4m3 in shared memory.
        columns: [block_columns, 256] e4m3 in shared memory.
        part0: [block_rows, block_columns] float32 fragment, overwritten.
        part1: so, of the second block.
    """
    T.wgmma_gemm(rows[:, 0:128], columns[:, 0:128], part0, transpose_B=True, clear_accum=True, policy=_ROWS)
    # Plain gemm waits for both products: the compiler hands the tiles back after it.
    T.gemm(rows[:, 128:256], columns[:, 128:256], part1, transpose_B=True, clear_accum=True, policy=_ROWS)


@T.macro
def product(rows: Any, columns: Any, part: Any, first: int):
    """Begin the product of the block of channels that starts at `first`; nothing is waited for.

    Args:
        rows: [block_rows, 256] e4m3 in shared memory.
        columns: [block_columns, 256] e4m3 in shared memory.
        part: [block_rows, block_columns] float32 fragment, overwritten.
        first: 0 or 128.
    """
    T.wgmma_gemm(
        rows[:, first : first + BLOCK_K],
        columns[:, first : first + BLOCK_K],
        part,
        transpose_B=True,
        clear_accum=True,
        policy=_ROWS,
    )


def make_flight(n: int, k: int, scale_dtype: str, block_m: int, block_n: int, num_stages: int) -> Any:
    """Return the PrimFunc for tiles of block_m tokens by block_n weight rows, two blocks of k a stage.

    Both blocks' products are under way together. With two warpgroups the first's sums are added under the
    second; with one, where that gains nothing, both are waited for at once.
    """
    m = T.dynamic("m")
    is_e8m0 = scale_dtype == "uint8"
    blocks = k // BLOCK_K
    split = block_m > INSTRUCTION_M
    full_row = 64  # bf16 in 128 bytes, all banks
    swizzled = make_half_bank_swizzled_layout if block_n % full_row else make_full_bank_swizzled_layout

    @T.prim_func
    def fp8_gemm_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, blocks), scale_dtype],
        w: T.Tensor[(n, k), T.float8_e4m3fn],
        w_scale: T.Tensor[(n // BLOCK_N, blocks), scale_dtype],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        threads = block_m // INSTRUCTION_M * WARPGROUP
        with T.Kernel(T.ceildiv(m, block_m), n // block_n, threads=threads) as (bm, bn):
            x_tile = T.alloc_shared((block_m, 2 * BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, 2 * BLOCK_K), T.float8_e4m3fn)
            x_scales = T.alloc_shared((block_m, blocks + PADDING), scale_dtype)
            w_scales = T.alloc_shared((1, blocks), scale_dtype)
            # Takes bytes of what is over by then.
            out_tile = T.alloc_shared((block_m, block_n), T.bfloat16)
            part0 = T.alloc_fragment((block_m, block_n), T.float32)
            part1 = T.alloc_fragment((block_m, block_n), T.float32)
            factor0 = T.alloc_fragment((block_m,), T.float32)
            factor1 = T.alloc_fragment((block_m,), T.float32)
            acc = T.alloc_fragment((block_m, block_n), T.float32)
            T.annotate_layout({out_tile: swizzled(out_tile)})
            rows, row = x_scale[bm * block_m : (bm + 1) * block_m, 0:blocks], bn * block_n // BLOCK_N
            load_scales(rows, w_scale[row, 0:blocks], x_scales, w_scales)
            T.clear(acc)
            for ko in T.Pipelined(blocks // 2, num_stages=num_stages):
                T.copy(x[bm * block_m, ko * 2 * BLOCK_K], x_tile)
                T.copy(w[bn * block_n, ko * 2 * BLOCK_K], w_tile)
                for i in T.Parallel(block_m):
                    factor0[i] = to_f32(x_scales[i, ko * 2], is_e8m0) * to_f32(w_scales[0, ko * 2], is_e8m0)
                if split:
                    product(x_tile, w_tile, part0, 0)
                for i in T.Parallel(block_m):
                    factor1[i] = to_f32(x_scales[i, ko * 2 + 1], is_e8m0) * to_f32(
                        w_scales[0, ko * 2 + 1], is_e8m0
                    )
                if split:
                    product(x_tile, w_tile, part1, BLOCK_K)
                    T.wait_wgmma(1)
                else:
                    two_products(x_tile, w_tile, part0, part1)
                for i, j in T.Parallel(block_m, block_n):
                    acc[i, j] += part0[i, j] * factor0[i]
                if split:
                    T.wait_wgmma(0)
                for i, j in T.Parallel(block_m, block_n):
                    acc[i, j] += part1[i, j] * factor1[i]
            for i, j in T.Parallel(block_m, block_n):
                out_tile[i, j] = T.cast(acc[i, j], "bfloat16")
            T.copy(out_tile, out[bm * block_m, bn * block_n], disable_tma=True)

    kernel = ring_unrolled(fp8_gemm_kernel, num_stages)
    return released_late(kernel) if split else kernel
