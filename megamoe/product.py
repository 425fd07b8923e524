"""A product of the fused kernel: 256 weight rows by a block of rows, from stages that other warps fill.

Sums are added as in the dense product: 128 channels from zero, times the scale of x, in the order of k.

A stage is freed once all that a thread has read of it has come, not only been asked for: ptxas sends the
arrival off behind the loads without waiting for them, and under stores to a peer a load was seen to give
what the copy that refills the stage had brought (docs/megamoe.md). So a stage's scales are read once and
early, not behind its last product; that no load is under way there is read off the machine code.
"""

from typing import Any

from tilelang import language as T

from dsv4_kernels.gemm.folded_tile import BLOCK_K, SCALE_K, widen
from megamoe.config import WARP, Config
from megamoe.weights import FP8_STAGES, GROUP_N, SCALE_WORDS, TILE_N

COPIES = 4  # a stage: codes, offsets, rows, scales
RING_COPIES = 3  # of a stage whose weights have been widened: those, rows, scales
ROW_COPIES = 2  # of them by the rows' warp
ALIGNED_M = 32  # rows whose scales fill the 128 bytes that a bulk copy is aligned to
BOTH_M = 64  # up to so many rows a block, both products of a stage are under way together
_ROWS = T.GemmWarpPolicy.FullRow
_ARRIVES = {"emit_arrive": 1}  # the copying thread arrives at the stage's barrier itself


@T.macro
def fetch_weights(
    words: Any, offsets: Any, rank: Any, step: Any, stage: Any, full: Any, w_tile: Any, o_tile: Any
):
    """One warp: start the copies of one step's weights into a stage."""
    T.tma_copy(
        words[rank, step, :, :],
        w_tile[stage, :, :],
        barrier=full[stage],
        leader_scope_threads=WARP,
        annotations=_ARRIVES,
    )
    T.tma_copy(
        offsets[rank, step, :],
        o_tile[stage, :],
        barrier=full[stage],
        leader_scope_threads=WARP,
        annotations=_ARRIVES,
    )


@T.macro
def fetch_wide(wide_ring: Any, rank: Any, step: Any, stage: Any, full: Any, w_tile: Any):
    """One warp: start the copy of one step's widened weights into a stage."""
    T.tma_copy(
        wide_ring[rank, step, :, :],
        w_tile[stage, :, :],
        barrier=full[stage],
        leader_scope_threads=WARP,
        annotations=_ARRIVES,
    )


@T.macro
def fetch_rows(
    c: Config,
    ring: Any,
    ring_scale: Any,
    rank: Any,
    slot: Any,
    ko: Any,
    stage: Any,
    full: Any,
    x_tile: Any,
    s_tile: Any,
):
    """One warp: start the copies of a block's rows, 128 channels of them, and their scales into a stage."""
    T.tma_copy(
        ring[rank, slot * c.block_m : (slot + 1) * c.block_m, ko * BLOCK_K : (ko + 1) * BLOCK_K],
        x_tile[stage, :, :],
        barrier=full[stage],
        leader_scope_threads=WARP,
        annotations=_ARRIVES,
    )
    T.tma_copy(
        ring_scale[rank, slot, ko, :],
        s_tile[stage, 0 : c.block_m],
        barrier=full[stage],
        leader_scope_threads=WARP,
        annotations=_ARRIVES,
    )


@T.macro
def widen_rows(stage: Any, first: int, w_tile: Any, o_tile: Any, codes: Any, offset: Any, wide: Any):
    """Consumers: widen 128 channels of the weight rows from `first` on, 128 of them, to `wide`."""
    for i in T.Parallel(GROUP_N):
        offset[i] = o_tile[stage, first + i]
    for i, t, q in T.Parallel(GROUP_N, 4, 4):
        codes[i, t, q] = w_tile[stage, first + i, t * 4 + q]
    for i, q, h, t in T.Parallel(GROUP_N, 4, 2, 4):
        T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
            "handle",
            "dsv4_store_b32",
            T.address_of(wide[i, q * SCALE_K + h * 16 + t * 4]),
            widen(codes[i, t, q], (offset[i] >> (8 * q)) & 0xFF, h),
        )


@T.macro
def take_rows(stage: Any, w_tile: Any, words: Any, wide: Any):
    """Consumers: take the 128 channels of the 128 e4m3 weight rows of a stage to `wide`, see `fp8_words`."""
    for i, t, q, h in T.Parallel(GROUP_N, 4, 4, 2):
        words[i, t, q, h] = w_tile[stage, i // 2 * 4 + q // 2 * 2 + i % 2, t * 4 + q % 2 * 2 + h]
    for i, q, h, t in T.Parallel(GROUP_N, 4, 2, 4):
        T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
            "handle",
            "dsv4_store_b32",
            T.address_of(wide[i, q * SCALE_K + h * 16 + t * 4]),
            words[i, t, q, h],
        )


@T.macro
def take_scales(c: Config, stage: Any, s_tile: Any, scale: Any):
    """Consumers: take the scales of a stage's rows to registers."""
    for j in T.Parallel(c.block_m):
        scale[j] = s_tile[stage, j]


@T.macro
def product_fp8(
    c: Config,
    count: Any,
    done: Any,
    full: Any,
    empty: Any,
    x_tile: Any,
    s_tile: Any,
    w_tile: Any,
    o_tile: Any,
    acc_a: Any,
    acc_b: Any,
):
    """As `product`, by e4m3 weights: 128 channels are two stages, one for each half of the weight rows.

    Rows of x and their scales come with the first. Sums are scaled by the product of both scales.

    Args: those of `product`.
    """
    part = T.alloc_fragment((GROUP_N, c.block_m), T.float32)
    scale = T.alloc_fragment((c.block_m,), T.float32)
    factor_a = T.alloc_local((1,), T.float32)
    factor_b = T.alloc_local((1,), T.float32)
    T.clear(acc_a)
    T.clear(acc_b)
    if c.is_mixed:
        words_a = T.alloc_fragment((GROUP_N, 4, 4, 2), T.uint32)
        words_b = T.alloc_fragment((GROUP_N, 4, 4, 2), T.uint32)
        wide_a = T.alloc_fragment((GROUP_N, BLOCK_K), T.float8_e4m3fn)
        wide_b = T.alloc_fragment((GROUP_N, BLOCK_K), T.float8_e4m3fn)
    for ko in T.serial(count // FP8_STAGES):
        first = ko * FP8_STAGES % c.num_stages
        second = first + 1  # there is an even number of them
        T.mbarrier_wait_parity(full[first], (done + ko * FP8_STAGES) // c.num_stages & 1)
        T.mbarrier_wait_parity(full[second], (done + ko * FP8_STAGES) // c.num_stages & 1)
        take_scales(c, first, s_tile, scale)
        if c.is_mixed:
            take_rows(first, w_tile, words_a, wide_a)
            T.wgmma_gemm(wide_a, x_tile[first, :, :], part, transpose_B=True, clear_accum=True, policy=_ROWS)
            take_rows(second, w_tile, words_b, wide_b)
        else:
            T.wgmma_gemm(
                w_tile[first, :, :],
                x_tile[first, :, :],
                part,
                transpose_B=True,
                clear_accum=True,
                policy=_ROWS,
            )
        factor_a[0] = T.reinterpret(o_tile[first, 0], "float32")
        factor_b[0] = T.reinterpret(o_tile[second, 0], "float32")
        T.wait_wgmma(0)
        for i, j in T.Parallel(GROUP_N, c.block_m):
            acc_a[i, j] += part[i, j] * (scale[j] * factor_a[0])
        if c.is_mixed:
            T.wgmma_gemm(wide_b, x_tile[first, :, :], part, transpose_B=True, clear_accum=True, policy=_ROWS)
        else:
            T.wgmma_gemm(
                w_tile[second, :, :],
                x_tile[first, :, :],
                part,
                transpose_B=True,
                clear_accum=True,
                policy=_ROWS,
            )
        T.wait_wgmma(0)
        for i, j in T.Parallel(GROUP_N, c.block_m):
            acc_b[i, j] += part[i, j] * (scale[j] * factor_b[0])
        T.barrier_arrive(empty[first])
        T.barrier_arrive(empty[second])


@T.macro
def product(
    c: Config,
    count: Any,
    done: Any,
    full: Any,
    empty: Any,
    x_tile: Any,
    s_tile: Any,
    w_tile: Any,
    o_tile: Any,
    acc_a: Any,
    acc_b: Any,
):
    """Multiply all channels of a block by 256 weight rows.

    Args:
        c: shape and tile.
        count: stages, of 128 channels.
        done: stages multiplied before.
        full: barriers of filled stages.
        empty: barriers of stages that have been read.
        x_tile: [num_stages, block_m, 128] e4m3, rows in shared memory.
        s_tile: [num_stages, block_m] float32, their scales.
        w_tile: [num_stages, 256, 16] words.
        o_tile: [num_stages, 256] int32.
        acc_a: [128, block_m] float32 fragment, the sums of the first 128 weight rows.
        acc_b: that of the others.
    """
    codes_a = T.alloc_fragment((GROUP_N, 4, 4), T.uint32)
    codes_b = T.alloc_fragment((GROUP_N, 4, 4), T.uint32)
    offset_a = T.alloc_fragment((GROUP_N,), T.int32)
    offset_b = T.alloc_fragment((GROUP_N,), T.int32)
    wide_a = T.alloc_fragment((GROUP_N, BLOCK_K), T.float8_e4m3fn)
    wide_b = T.alloc_fragment((GROUP_N, BLOCK_K), T.float8_e4m3fn)
    part_a = T.alloc_fragment((GROUP_N, c.block_m), T.float32)
    scale = T.alloc_fragment((c.block_m,), T.float32)
    T.clear(acc_a)
    T.clear(acc_b)
    for ko in T.serial(count):
        T.mbarrier_wait_parity(full[ko % c.num_stages], (done + ko) // c.num_stages & 1)
        if c.block_m <= BOTH_M:  # otherwise there are no registers for them before the first product is done
            take_scales(c, ko % c.num_stages, s_tile, scale)
        widen_rows(ko % c.num_stages, 0, w_tile, o_tile, codes_a, offset_a, wide_a)
        T.wgmma_gemm(
            wide_a,
            x_tile[ko % c.num_stages, :, :],
            part_a,
            transpose_B=True,
            clear_accum=True,
            policy=_ROWS,
        )
        widen_rows(ko % c.num_stages, GROUP_N, w_tile, o_tile, codes_b, offset_b, wide_b)
        if c.block_m > BOTH_M:
            # Two sets of partial sums would not fit: the second product waits for the first.
            T.wait_wgmma(0)
            take_scales(c, ko % c.num_stages, s_tile, scale)
            for i, j in T.Parallel(GROUP_N, c.block_m):
                acc_a[i, j] += part_a[i, j] * scale[j]
            T.wgmma_gemm(
                wide_b,
                x_tile[ko % c.num_stages, :, :],
                part_a,
                transpose_B=True,
                clear_accum=True,
                policy=_ROWS,
            )
            T.wait_wgmma(0)
            for i, j in T.Parallel(GROUP_N, c.block_m):
                acc_b[i, j] += part_a[i, j] * scale[j]
        else:
            part_b = T.alloc_fragment((GROUP_N, c.block_m), T.float32)
            T.wgmma_gemm(
                wide_b,
                x_tile[ko % c.num_stages, :, :],
                part_b,
                transpose_B=True,
                clear_accum=True,
                policy=_ROWS,
            )
            T.wait_wgmma(1)
            for i, j in T.Parallel(GROUP_N, c.block_m):
                acc_a[i, j] += part_a[i, j] * scale[j]
            T.wait_wgmma(0)
            for i, j in T.Parallel(GROUP_N, c.block_m):
                acc_b[i, j] += part_b[i, j] * scale[j]
        T.barrier_arrive(empty[ko % c.num_stages])


@T.macro
def product_wide(
    c: Config,
    count: Any,
    done: Any,
    full: Any,
    empty: Any,
    x_tile: Any,
    s_tile: Any,
    w_tile: Any,
    o_tile: Any,
    acc_a: Any,
    acc_b: Any,
):
    """As `product`, rows of the block the instruction's rows, by e4m3 weights in shared memory.

    Both halves of the weight rows are multiplied in turn: two sets of partial sums would not fit. Rounds are
    those of whole turns of the ring, so that a stage's addresses are constants; those before the product's
    first and behind its last are left out.

    Args: those of `product`, but w_tile: [num_stages, 256, 128] e4m3, o_tile: [num_stages, 64] int32, the
        bits of both halves' scales, 32 times each, and sums [block_m, 128].
    """
    part = T.alloc_fragment((c.block_m, GROUP_N), T.float32)
    factor_a = T.alloc_fragment((c.block_m,), T.float32)
    factor_b = T.alloc_fragment((c.block_m,), T.float32)
    T.clear(acc_a)
    T.clear(acc_b)
    begin = done % c.num_stages
    for turn in T.serial(T.ceildiv(begin + count, c.num_stages)):
        for stage in T.unroll(c.num_stages):
            if (turn * c.num_stages + stage >= begin) and (turn * c.num_stages + stage < begin + count):
                T.mbarrier_wait_parity(full[stage], (done // c.num_stages + turn) & 1)
                if c.widened:
                    for i in T.Parallel(c.block_m):
                        factor_a[i] = s_tile[stage, i]
                else:
                    for i in T.Parallel(c.block_m):
                        factor_a[i] = s_tile[stage, i] * T.reinterpret(o_tile[stage, 0], "float32")
                    for i in T.Parallel(c.block_m):
                        factor_b[i] = s_tile[stage, i] * T.reinterpret(o_tile[stage, SCALE_WORDS], "float32")
                T.wgmma_gemm(
                    x_tile[stage, :, :],
                    w_tile[stage, 0:GROUP_N, :],
                    part,
                    transpose_B=True,
                    clear_accum=True,
                    policy=_ROWS,
                )
                T.wait_wgmma(0)
                for i, j in T.Parallel(c.block_m, GROUP_N):
                    acc_a[i, j] += part[i, j] * factor_a[i]
                T.wgmma_gemm(
                    x_tile[stage, :, :],
                    w_tile[stage, GROUP_N:TILE_N, :],
                    part,
                    transpose_B=True,
                    clear_accum=True,
                    policy=_ROWS,
                )
                T.wait_wgmma(0)
                T.barrier_arrive(empty[stage])
                for i, j in T.Parallel(c.block_m, GROUP_N):
                    acc_b[i, j] += part[i, j] * (factor_a[i] if c.widened else factor_b[i])
