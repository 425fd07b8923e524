"""Tasks of the fused kernel but for the product: dispatch, what follows a product, combine. Macros."""

import math
from typing import Any

from tilelang import language as T
from tilelang.layout import Fragment

from dsv4_kernels.gemm.folded_tile import BLOCK_K
from dsv4_kernels.tile.scale import (
    BF16_MAGNITUDE,
    F32_NAN,
    UE8M0_NAN,
    ue8m0_reciprocal,
    ue8m0_scale,
    ue8m0_to_f32,
)
from megamoe import quotient, schedule
from megamoe.buffer import combine_row
from megamoe.config import Config
from megamoe.schedule import Kind
from megamoe.weights import GROUP_N, TILE_N

AMAX_MIN = 1e-4
E4M3_MAX = 448.0
_TOGETHER = 8  # rows that a dispatch task reads at once
_CHUNK = 2048  # channels, of one or more rows, that two warps read at once: two loads of 16 bytes a thread
ROWS_AT_ONCE = 8  # rows of a block that the finishers activate together: 16 threads a row
SENT_AT_ONCE = 8  # and write to the combine buffers
_OPS = quotient.TileOps()


@T.macro
def choose(
    c: Config,
    before: Any,
    first: Any,
    offset: Any,
    left_out: Any,
    kind: Any,
    block: Any,
    tile: Any,
    later: Any,
):
    """Put kind, block and tile of product `offset` of a wave's in the three; kind 0: there is none."""
    kind[0] = 0
    num_l1 = schedule.l1_tasks(c.geometry, before, first)
    if offset < num_l1:
        kind[0] = Kind.LINEAR1.value
        block[0] = before + offset // c.geometry.l1_tiles
        tile[0] = offset % c.geometry.l1_tiles
    else:
        later[0] = schedule.l2_offset(offset - num_l1, left_out, c.ctas)
        if (later[0] >= 0) and (later[0] < (first - before) * c.geometry.l2_tiles):
            kind[0] = Kind.LINEAR2.value
            block[0] = before + later[0] // c.geometry.l2_tiles
            tile[0] = later[0] % c.geometry.l2_tiles


@T.macro
def find(
    c: Config, firsts: Any, block_expert: Any, rank: Any, number: Any, look: Any, upcoming: Any, later: Any
):
    """Put the first step and the expert of product `number` in `upcoming`; step -1: there is none."""
    while (look[0] < c.geometry.num_waves) and (number >= firsts[rank, look[0] + 1] * c.geometry.tiles):
        look[0] = look[0] + 1
    upcoming[0] = -1
    start = firsts[rank, look[0]]
    blocks = firsts[rank, look[0] + 1] - start
    offset = number - start * c.geometry.tiles
    if offset < blocks * c.geometry.l1_tiles:
        upcoming[1] = block_expert[rank, start + offset // c.geometry.l1_tiles]
        upcoming[0] = c.first_step(upcoming[1]) + offset % c.geometry.l1_tiles * c.stages(
            c.l1_steps, upcoming[1]
        )
    else:
        gap = schedule.gap(c.geometry, start, start + blocks, c.ctas, look[0] == c.geometry.num_waves)
        later[0] = offset - blocks * c.geometry.l1_tiles
        if schedule.l2_offset(later[0], gap, c.ctas) < 0:
            later[0] = later[0] + c.ctas
        later[0] = schedule.l2_offset(later[0], gap, c.ctas)
        if later[0] < blocks * c.geometry.l2_tiles:
            upcoming[1] = block_expert[rank, start + later[0] // c.geometry.l2_tiles]
            upcoming[0] = (
                c.first_step(upcoming[1])
                + c.stages(c.geometry.l1_tiles * c.l1_steps, upcoming[1])
                + later[0] % c.geometry.l2_tiles * c.stages(c.l2_steps, upcoming[1])
            )


@T.macro
def copy_rows(
    c: Config,
    x: Any,
    x_scale: Any,
    row_source: Any,
    x_ring: Any,
    x_ring_scale: Any,
    rank: Any,
    block: Any,
    part: Any,
    slot: Any,
    few: bool,
):
    """Copy one part of a block's rows from the ranks that have them to place `slot` of the ring.

    `few`: two warps with few registers do, some channels at a time; otherwise the consumers.
    """
    first = block * c.block_m + part * c.part_rows
    to = slot * c.block_m + part * c.part_rows
    # Some rows at a time are under way together: loads first, without a branch, then stores.
    if few:
        chunk = math.gcd(c.hidden, _CHUNK)
        some = math.gcd(c.part_rows, _CHUNK // chunk)
        pieces = T.alloc_fragment((some, chunk), T.float8_e4m3fn)
        for group in T.serial(c.part_rows // some):
            for piece in T.serial(c.hidden // chunk):
                for i, ch in T.Parallel(some, chunk):
                    src = row_source[rank, first + group * some + i]
                    place = T.max(T.min(src, c.num_ranks * c.tokens - 1), 0)
                    pieces[i, ch] = T.if_then_else(
                        src >= 0,
                        x[place // c.tokens, place % c.tokens, piece * chunk + ch],
                        T.cast(0, T.float8_e4m3fn),
                    )
                for i, ch in T.Parallel(some, chunk):
                    x_ring[rank, to + group * some + i, piece * chunk + ch] = pieces[i, ch]
    else:
        together = math.gcd(c.part_rows, _TOGETHER)
        rows = T.alloc_fragment((together, c.hidden), T.float8_e4m3fn)
        for group in T.serial(c.part_rows // together):
            for i, ch in T.Parallel(together, c.hidden):
                src = row_source[rank, first + group * together + i]
                place = T.max(T.min(src, c.num_ranks * c.tokens - 1), 0)
                rows[i, ch] = T.if_then_else(
                    src >= 0, x[place // c.tokens, place % c.tokens, ch], T.cast(0, T.float8_e4m3fn)
                )
            for i, ch in T.Parallel(together, c.hidden):
                x_ring[rank, to + group * together + i, ch] = rows[i, ch]
    for i, kb in T.Parallel(c.part_rows, c.hidden // BLOCK_K):
        src = row_source[rank, first + i]
        scale = T.if_then_else(src >= 0, x_scale[src // c.tokens, src % c.tokens, kb], T.cast(127, "uint8"))
        x_ring_scale[rank, slot, kb, part * c.part_rows + i] = ue8m0_to_f32(T.cast(scale, "int32"), 0)


def _turned(block_m: int) -> Fragment:
    """Return the layout of a product's sums, [128, block_m] over two warpgroups, for its transpose."""

    def thread(j: Any, i: Any) -> Any:
        return i // 64 * 128 + i % 64 // 16 * 32 + i % 8 * 4 + j % 8 // 2

    def register(j: Any, i: Any) -> Any:
        return j // 8 * 4 + i % 16 // 8 * 2 + j % 2

    return Fragment([block_m, GROUP_N], forward_thread_fn=thread, forward_index_fn=register)


@T.macro
def hand_over(c: Config, acc: Any, factor: Any, out_tile: Any):
    """Consumers: round half of a product, times the factors of its rows, to bf16, a row of the block a row.

    The sums lie weight row by weight row; `stmatrix` turns them as it stores them.
    """
    rounded = T.alloc_fragment((c.block_m, GROUP_N), T.bfloat16)
    T.annotate_layout({rounded: _turned(c.block_m)})
    for i, j in T.Parallel(GROUP_N, c.block_m):
        rounded[j, i] = T.cast(acc[i, j] * factor[i], "bfloat16")
    T.copy(rounded, out_tile)


@T.macro
def hand_over_rows(c: Config, acc: Any, out_tile: Any):
    """Consumers: round half of a product that lies row by row to bf16."""
    rounded = T.alloc_fragment((c.block_m, GROUP_N), T.bfloat16)
    for i, j in T.Parallel(c.block_m, GROUP_N):
        rounded[i, j] = T.cast(acc[i, j], "bfloat16")
    T.copy(rounded, out_tile)


@T.macro
def hand_over_scaled_rows(c: Config, acc: Any, factor_tile: Any, first: int, out_tile: Any):
    """Consumers: as `hand_over_rows`, times the factors of the weight rows, which stand from `first` on."""
    rounded = T.alloc_fragment((c.block_m, GROUP_N), T.bfloat16)
    for i, j in T.Parallel(c.block_m, GROUP_N):
        rounded[i, j] = T.cast(acc[i, j] * factor_tile[first + j], "bfloat16")
    T.copy(rounded, out_tile)


@T.macro
def activate(
    c: Config,
    h_ring: Any,
    h_ring_scale: Any,
    rank: Any,
    tile: Any,
    slot: Any,
    weight_tile: Any,
    out_a: Any,
    out_b: Any,
):
    """Finishers: SwiGLU of 128 channels of a block, times the routing weight, cast to FP8, a scale a row.

    silu(min(gate, clamp)) * clamp(up, -clamp, clamp) * weight, the quotient in steps: as one expression it
    would be written out many times over.
    """
    gate = T.alloc_fragment((ROWS_AT_ONCE, GROUP_N), T.bfloat16)
    up = T.alloc_fragment((ROWS_AT_ONCE, GROUP_N), T.bfloat16)
    hidden = T.alloc_fragment((ROWS_AT_ONCE, GROUP_N), T.bfloat16)
    low = T.alloc_fragment((ROWS_AT_ONCE, GROUP_N), T.float32)
    divisor = T.alloc_fragment((ROWS_AT_ONCE, GROUP_N), T.float32)
    near = T.alloc_fragment((ROWS_AT_ONCE, GROUP_N), T.float32)
    magnitude = T.alloc_fragment((ROWS_AT_ONCE, GROUP_N), T.int32)
    amax = T.alloc_fragment((ROWS_AT_ONCE,), T.int32)
    exponent = T.alloc_fragment((ROWS_AT_ONCE,), T.int32)
    inverse = T.alloc_fragment((ROWS_AT_ONCE,), T.float32)
    for group in T.serial(c.block_m // ROWS_AT_ONCE):
        row = group * ROWS_AT_ONCE
        T.copy(out_a[row : row + ROWS_AT_ONCE, :], gate)
        T.copy(out_b[row : row + ROWS_AT_ONCE, :], up)
        for i, j in T.Parallel(ROWS_AT_ONCE, GROUP_N):
            low[i, j] = below(T.cast(gate[i, j], "float32"), c.clamp)
        for i, j in T.Parallel(ROWS_AT_ONCE, GROUP_N):
            divisor[i, j] = (T.float32(1) + T.exp(-low[i, j])) * quotient.scale(_OPS, low[i, j])  # pyright: ignore[reportCallIssue, reportOperatorIssue]
        for i, j in T.Parallel(ROWS_AT_ONCE, GROUP_N):
            divisor[i, j] = quotient.bounded(_OPS, divisor[i, j])
        for i, j in T.Parallel(ROWS_AT_ONCE, GROUP_N):
            near[i, j] = quotient.guess(_OPS, divisor[i, j])
        for _ in T.unroll(quotient.ROUNDS):
            for i, j in T.Parallel(ROWS_AT_ONCE, GROUP_N):
                near[i, j] = quotient.closer(_OPS, divisor[i, j], near[i, j])
        for i, j in T.Parallel(ROWS_AT_ONCE, GROUP_N):
            near[i, j] = quotient.quotient(_OPS, low[i, j], divisor[i, j], near[i, j])
        for i, j in T.Parallel(ROWS_AT_ONCE, GROUP_N):
            low[i, j] = below(T.cast(up[i, j], "float32"), c.clamp)
        for i, j in T.Parallel(ROWS_AT_ONCE, GROUP_N):
            hidden[i, j] = T.cast(near[i, j] * above(low[i, j], -c.clamp) * weight_tile[row + i], "bfloat16")
        for i, j in T.Parallel(ROWS_AT_ONCE, GROUP_N):
            magnitude[i, j] = T.cast(T.reinterpret(hidden[i, j], "uint16"), "int32") & BF16_MAGNITUDE
        T.reduce_max(magnitude, amax, dim=1)
        for i in T.Parallel(ROWS_AT_ONCE):
            exponent[i] = ue8m0_scale(amax[i], AMAX_MIN, 1.0 / E4M3_MAX)
        for i in T.Parallel(ROWS_AT_ONCE):
            h_ring_scale[rank, slot, tile, row + i] = ue8m0_to_f32(exponent[i], 0)
        # A row that is not finite is nan by this. Nothing is beyond the largest of e4m3: the scale is rounded
        # up, and no bf16 amax is so little above 448 times a power of two that the product above is not.
        for i in T.Parallel(ROWS_AT_ONCE):
            inverse[i] = T.if_then_else(
                exponent[i] == UE8M0_NAN,
                T.reinterpret(F32_NAN, "float32"),
                ue8m0_reciprocal(exponent[i]),
            )
        for i, j in T.Parallel(ROWS_AT_ONCE, GROUP_N):
            h_ring[rank, slot * c.block_m + row + i, tile * GROUP_N + j] = T.cast(
                T.cast(hidden[i, j], "float32") * inverse[i], T.float8_e4m3fn
            )


@T.macro
def send(c: Config, row_target: Any, combine: Any, rank: Any, block: Any, tile: Any, out_a: Any, out_b: Any):
    """Finishers: write 256 channels of a block's outputs to the combine buffers of the ranks they are of."""
    for group in T.serial(c.block_m // SENT_AT_ONCE):
        for i, j in T.Parallel(SENT_AT_ONCE, GROUP_N):
            target = row_target[rank, block * c.block_m + group * SENT_AT_ONCE + i]
            if target >= 0:
                combine[target, tile * TILE_N + j] = out_a[group * SENT_AT_ONCE + i, j]
        for i, j in T.Parallel(SENT_AT_ONCE, GROUP_N):
            target = row_target[rank, block * c.block_m + group * SENT_AT_ONCE + i]
            if target >= 0:
                combine[target, tile * TILE_N + GROUP_N + j] = out_b[group * SENT_AT_ONCE + i, j]


@T.macro
def add_slots(
    c: Config,
    combine: Any,
    topk_idx: Any,
    y: Any,
    rank: Any,
    me: Any,
    token: Any,
    channel: Any,
    piece: Any,
    total: Any,
):
    """Add what a token's experts gave, in the order of its slots: `c.chunk` channels."""
    T.clear(total)
    for slot in T.unroll(c.topk):
        # Read whether it is there or not, so that the slots' reads are under way together; a sum
        # that starts at +0 keeps its bits when +0 is added.
        for ch in T.Parallel(c.chunk):
            row = combine_row(me, slot, token, c.tokens, c.combine_rows)
            piece[ch] = combine[row, channel + ch]
        for ch in T.Parallel(c.chunk):
            total[ch] += T.if_then_else(
                topk_idx[rank, token, slot] >= 0,
                T.cast(piece[ch], "float32"),
                T.float32(0),  # pyright: ignore[reportCallIssue]
            )
    for ch in T.Parallel(c.chunk):
        y[rank, token, channel + ch] = T.cast(total[ch], "bfloat16")


def below(value: Any, bound: float) -> Any:
    """Return min(value, bound); nan stays nan."""
    return T.if_then_else(value > bound, T.float32(bound), value)  # pyright: ignore[reportCallIssue]


def above(value: Any, bound: float) -> Any:
    """Return max(value, bound); nan stays nan."""
    return T.if_then_else(value < bound, T.float32(bound), value)  # pyright: ignore[reportCallIssue]
