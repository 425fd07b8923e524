"""A product of the fused kernel: 256 weight rows by a block of rows, fetched ahead. Macros.

Sums are added as in the dense product: 128 channels from zero, times the scale of x, in the order of k.
"""

from typing import Any

from tilelang import language as T

from dsv4_kernels.gemm.folded_tile import BLOCK_K, SCALE_K, widen
from megamoe.config import Config
from megamoe.schedule import Kind
from megamoe.weights import GROUP_N

WEIGHT_COPIES = 2  # groups of asynchronous copies a stage: codes, offsets
COPIES = WEIGHT_COPIES + 1  # and rows
BOTH_M = 64  # up to so many rows a block, both products of a stage are under way together
_ROWS = T.GemmWarpPolicy.FullRow


@T.macro
def fetch_weights(words: Any, offsets: Any, rank: Any, step: Any, stage: Any, w_tile: Any, o_tile: Any):
    """Start the copies of one step's weights into a stage; step -1: of nothing."""
    if step >= 0:
        T.async_copy(words[rank, step, :, :], w_tile[stage, :, :])
        T.async_copy(offsets[rank, step, :], o_tile[stage, :])
    else:
        for _ in T.serial(WEIGHT_COPIES):  # empty groups, so that a wait counts the same in every round
            T.ptx_commit_group()


@T.macro
def fetch_rows(
    c: Config, x_ring: Any, h_ring: Any, rank: Any, kind: Any, row: Any, ko: Any, stage: Any, x_tile: Any
):
    """Start the copy of a block's rows, 128 channels of them, into a stage."""
    if kind == Kind.LINEAR1.value:
        T.async_copy(
            x_ring[rank, row : row + c.block_m, ko * BLOCK_K : (ko + 1) * BLOCK_K], x_tile[stage, :, :]
        )
    else:
        T.async_copy(
            h_ring[rank, row : row + c.block_m, ko * BLOCK_K : (ko + 1) * BLOCK_K], x_tile[stage, :, :]
        )


@T.macro
def product(
    c: Config,
    x_ring: Any,
    h_ring: Any,
    words: Any,
    offsets: Any,
    rank: Any,
    kind: Any,
    row: Any,
    count: Any,
    step: Any,
    next_step: Any,
    x_tile: Any,
    w_tile: Any,
    o_tile: Any,
    scales: Any,
    acc_a: Any,
    acc_b: Any,
):
    """Multiply all channels of a block by 256 weight rows, and fetch the next product's first weights.

    Args:
        c: shape and tile.
        x_ring: rows of linear 1.
        h_ring: rows of linear 2.
        words: see `weights.Packed`.
        offsets: the same.
        rank: of the CTA.
        kind: of the task.
        row: first row of the block in its ring.
        count: stages, of 128 channels.
        step: the product's first step of weights; in the stages up to `c.ahead` already.
        next_step: that of the CTA's next product, or -1.
        x_tile: [num_stages, block_m, 128] e4m3, rows in shared memory.
        w_tile: [num_stages, 256, 16] words.
        o_tile: [num_stages, 256] int32.
        scales: [count, block_m] float32, of the rows.
        acc_a: [128, block_m] float32 fragment, the sums of the first 128 weight rows.
        acc_b: that of the others.
    """
    fetched = T.alloc_local((1,), T.int32)
    codes_a = T.alloc_fragment((GROUP_N, 4, 4), T.uint32)
    codes_b = T.alloc_fragment((GROUP_N, 4, 4), T.uint32)
    offset_a = T.alloc_fragment((GROUP_N,), T.int32)
    offset_b = T.alloc_fragment((GROUP_N,), T.int32)
    wide_a = T.alloc_fragment((GROUP_N, BLOCK_K), T.float8_e4m3fn)
    wide_b = T.alloc_fragment((GROUP_N, BLOCK_K), T.float8_e4m3fn)
    part_a = T.alloc_fragment((GROUP_N, c.block_m), T.float32)
    T.clear(acc_a)
    T.clear(acc_b)
    for ko in T.serial(count):
        # All but the newest stages have arrived for this thread; then for all, and then for the tensor
        # core. The stage that is fetched next was read in the round before.
        T.ptx_wait_group(COPIES * (c.ahead - 1))
        T.fence_proxy_async()
        T.sync_threads()
        # Weights are fetched on into the next product, rows to the end of this one.
        if ko + c.ahead < count:
            fetched[0] = step + ko + c.ahead
        else:
            fetched[0] = T.if_then_else(next_step >= 0, next_step + ko + c.ahead - count, -1)
        fetch_weights(words, offsets, rank, fetched[0], (ko + c.ahead) % c.num_stages, w_tile, o_tile)
        if ko + c.ahead < count:
            fetch_rows(
                c, x_ring, h_ring, rank, kind, row, ko + c.ahead, (ko + c.ahead) % c.num_stages, x_tile
            )
        else:
            T.ptx_commit_group()
        for i in T.Parallel(GROUP_N):
            offset_a[i] = o_tile[ko % c.num_stages, i]
            offset_b[i] = o_tile[ko % c.num_stages, GROUP_N + i]
        for i, t, q in T.Parallel(GROUP_N, 4, 4):
            codes_a[i, t, q] = w_tile[ko % c.num_stages, i, t * 4 + q]
        for i, q, h, t in T.Parallel(GROUP_N, 4, 2, 4):
            T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
                "handle",
                "dsv4_store_b32",
                T.address_of(wide_a[i, q * SCALE_K + h * 16 + t * 4]),
                widen(codes_a[i, t, q], (offset_a[i] >> (8 * q)) & 0xFF, h),
            )
        T.wgmma_gemm(
            wide_a,
            x_tile[ko % c.num_stages, :, :],
            part_a,
            transpose_B=True,
            clear_accum=True,
            policy=_ROWS,
        )
        for i, t, q in T.Parallel(GROUP_N, 4, 4):
            codes_b[i, t, q] = w_tile[ko % c.num_stages, GROUP_N + i, t * 4 + q]
        for i, q, h, t in T.Parallel(GROUP_N, 4, 2, 4):
            T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
                "handle",
                "dsv4_store_b32",
                T.address_of(wide_b[i, q * SCALE_K + h * 16 + t * 4]),
                widen(codes_b[i, t, q], (offset_b[i] >> (8 * q)) & 0xFF, h),
            )
        if c.block_m > BOTH_M:
            # Two sets of partial sums would not fit: the second product waits for the first.
            T.wait_wgmma(0)
            for i, j in T.Parallel(GROUP_N, c.block_m):
                acc_a[i, j] += part_a[i, j] * scales[ko, j]
            T.gemm(
                wide_b,
                x_tile[ko % c.num_stages, :, :],
                part_a,
                transpose_B=True,
                clear_accum=True,
                policy=_ROWS,
            )
            for i, j in T.Parallel(GROUP_N, c.block_m):
                acc_b[i, j] += part_a[i, j] * scales[ko, j]
        else:
            part_b = T.alloc_fragment((GROUP_N, c.block_m), T.float32)
            # Plain gemm waits for both products.
            T.gemm(
                wide_b,
                x_tile[ko % c.num_stages, :, :],
                part_b,
                transpose_B=True,
                clear_accum=True,
                policy=_ROWS,
            )
            for i, j in T.Parallel(GROUP_N, c.block_m):
                acc_a[i, j] += part_a[i, j] * scales[ko, j]
            for i, j in T.Parallel(GROUP_N, c.block_m):
                acc_b[i, j] += part_b[i, j] * scales[ko, j]
