"""One block of decode attention: 64 heads of a query over chunks of 64 cache rows.

Two warpgroups. Heads are the matrix instruction's rows: each warpgroup has 32 of a chunk's 64 keys for the
logits, and half of the block's dims for the output. Rows of the chunk after the next are on their way in
registers, those of the next are expanded into the other slot of shared memory while this chunk's logits are
multiplied. The first two chunks may come from another cache than the rest.

Reduction order of every row: keys in the order of their places, in chunks of 64; a logit sums 512 dims in
steps of 16 in ascending order; a chunk's weights, exp2 of the logits less the maximum so far, are rounded to
bf16 for the product with V, and the accumulator is rescaled once a chunk. Each warpgroup sums the weights of
its keys; both sums are added once, at the end.
"""

from dataclasses import dataclass
from typing import Any

from tilelang import language as T

from dsv4_kernels.attention import cache_rows
from dsv4_kernels.attention.cache_layout import HEAD_DIM, NOPE_DIM, ROPE_DIM
from dsv4_kernels.attention.cache_rows import load_rows, widen

CHUNK = cache_rows.ROWS  # keys between two rescalings
BLOCK_HEADS = 64  # rows of a wgmma instruction
WARPGROUPS = 2
THREADS = 128 * WARPGROUPS
HALF = CHUNK // WARPGROUPS  # keys of a chunk whose logits one warpgroup computes
SLOTS = 2  # chunks in shared memory: one is multiplied, one is expanded
AHEAD = 2  # chunks between the one that is multiplied and the one that is asked for
SOFTMAX_SCALE = HEAD_DIM**-0.5
LOG2_E = 1.4426950408889634
EXP2_SCALE = SOFTMAX_SCALE * LOG2_E
FLOOR = -1e30  # below any logit; finite, so that the difference of two is no nan
F32_INF = 0x7F800000
F32_MINUS_INF = 0xFF800000 - (1 << 32)  # as int32
COLUMNS = T.GemmWarpPolicy.FullCol  # warpgroups share out the columns of a product

_LANES = THREADS // CHUNK  # threads that hold a row
NOPE_AT, ROPE_AT, SCALES_AT = cache_rows.layouts(THREADS)
PLACE_AT = T.Fragment((CHUNK,), forward_fn=lambda j, rep: (j * _LANES + rep, 0), replicate=_LANES)
# The halves of the logits where wgmma leaves them.
HALVES_AT = T.Fragment(
    (WARPGROUPS, BLOCK_HEADS, HALF),
    lambda w, i, j: (w * 128 + i // 16 * 32 + i % 8 * 4 + j % 8 // 2, j // 8 * 4 + i % 16 // 8 * 2 + j % 2),
)


@dataclass(frozen=True)
class Rows:
    """Registers of a chunk's rows.

    Attributes:
        place: [64] int32.
        nope: [64, 448] e4m3; wide: the same as bf16.
        rope: [64, 64] bf16.
        scales: [64, 2] int32, four UE8M0 bytes each.
    """

    place: Any
    nope: Any
    wide: Any
    rope: Any
    scales: Any

    def layout(self) -> dict[Any, Any]:
        """Return where a block's threads hold them."""
        return {
            self.place: PLACE_AT,
            self.nope: NOPE_AT,
            self.wide: NOPE_AT,
            self.rope: ROPE_AT,
            self.scales: SCALES_AT,
        }


@dataclass(frozen=True)
class Softmax:
    """State of a block's 64 heads, and what a chunk needs on the way.

    Attributes:
        logits: registers [64, 64]; halves: the same by warpgroup, [2, 64, 32].
        half_max, half_sum, half_total: registers [2, 64]; total: of the keys so far.
        row_max, factor: registers [64].
        exchange: shared memory [2, 2, 64]; chunks take turns.
        weights: shared memory [64, 64] bf16.
    """

    logits: Any
    halves: Any
    half_max: Any
    half_sum: Any
    half_total: Any
    row_max: Any
    factor: Any
    exchange: Any
    weights: Any


@T.macro
def gather(pages: Any, places: Any, first: Any, rows: Any):
    """Ask for the rows at places[first:first + 64] of a cache, which comes as e4m3, bf16 and words."""
    # Registers: places are then read once, and no load waits behind a branch.
    for j in T.Parallel(CHUNK):
        rows.place[j] = places[first + j]
    load_rows(pages[0], pages[1], pages[2], rows.place, 0, rows.nope, rows.rope, rows.scales)


@T.macro
def expand(rows: Any, ring: Any, slot: Any):
    """Expand gathered rows into a slot of the ring [2, 64, 512] bf16."""
    widen(rows.nope, rows.scales, rows.wide)
    for j, d in T.Parallel(CHUNK, NOPE_DIM):
        ring[slot, j, d] = rows.wide[j, d]
    for j, d in T.Parallel(CHUNK, ROPE_DIM):
        ring[slot, j, NOPE_DIM + d] = rows.rope[j, d]


@T.macro
def attend(
    num_chunks: Any,
    entries: Any,
    places: Any,
    mask: Any,
    q_tile: Any,
    ring: Any,
    rows: Any,
    state: Any,
    acc: Any,
    first_dim: Any,
    num_dims: Any,
):
    """Attend to `num_chunks` chunks, of which the first is in the ring and the second asked for.

    Args:
        num_chunks: at least 1.
        entries: the cache of all chunks from the third on.
        places: shared memory int32 [64 * (num_chunks + 2)], -1 where nothing is, as in the last two chunks.
        mask: shared memory fp32 [64 * num_chunks]: 0, or -inf where a place is -1.
        q_tile: shared memory bf16 [64, 512].
        ring: shared memory bf16 [2, 64, 512].
        rows: of the chunk asked for.
        state: set here from the start.
        acc: registers fp32 [64, num_dims].
        first_dim: of those that acc sums.
        num_dims: a multiple of 16.
    """
    T.clear(acc)
    T.fill(state.row_max, FLOOR)
    T.clear(state.half_total)
    for c in T.serial(num_chunks):
        for i, j in T.Parallel(BLOCK_HEADS, CHUNK):
            state.logits[i, j] = mask[c * CHUNK + j]
        T.wgmma_gemm(q_tile, ring[c % SLOTS, :, :], state.logits, transpose_B=True, policy=COLUMNS)
        # Past the last chunk too, with zeros: so every round is alike.
        expand(rows, ring, (c + 1) % SLOTS)
        gather(entries, places, (c + AHEAD) * CHUNK, rows)
        T.wait_wgmma(0)
        # Each warpgroup has the maximum of its keys; both meet in shared memory.
        for w, i, j in T.Parallel(WARPGROUPS, BLOCK_HEADS, HALF):
            state.halves[w, i, j] = state.logits[i, w * HALF + j]
        T.reduce_max(state.halves, state.half_max, dim=2)
        for w, i in T.Parallel(WARPGROUPS, BLOCK_HEADS):
            state.exchange[c % 2, w, i] = state.half_max[w, i]
        for i in T.Parallel(BLOCK_HEADS):
            state.factor[i] = state.row_max[i]
        for i in T.Parallel(BLOCK_HEADS):
            state.row_max[i] = T.max(
                state.row_max[i], T.max(state.exchange[c % 2, 0, i], state.exchange[c % 2, 1, i])
            )
        for i in T.Parallel(BLOCK_HEADS):
            state.factor[i] = T.exp2(state.factor[i] * EXP2_SCALE - state.row_max[i] * EXP2_SCALE)
        for i, j in T.Parallel(BLOCK_HEADS, CHUNK):
            state.logits[i, j] = T.exp2(state.logits[i, j] * EXP2_SCALE - state.row_max[i] * EXP2_SCALE)
        for i, j in T.Parallel(BLOCK_HEADS, CHUNK):
            state.weights[i, j] = T.cast(state.logits[i, j], "bfloat16")
        for w, i, j in T.Parallel(WARPGROUPS, BLOCK_HEADS, HALF):
            state.halves[w, i, j] = state.logits[i, w * HALF + j]
        T.reduce_sum(state.halves, state.half_sum, dim=2)
        for w, i in T.Parallel(WARPGROUPS, BLOCK_HEADS):
            state.half_total[w, i] = state.half_total[w, i] * state.factor[i] + state.half_sum[w, i]
        for i, j in T.Parallel(BLOCK_HEADS, num_dims):
            acc[i, j] *= state.factor[i]
        T.gemm(state.weights, ring[c % SLOTS, :, first_dim : first_dim + num_dims], acc, policy=COLUMNS)


@T.macro
def join_totals(state: Any, total: Any):
    """Add both warpgroups' sums of weights into registers [64]."""
    for w, i in T.Parallel(WARPGROUPS, BLOCK_HEADS):
        state.exchange[0, w, i] = state.half_total[w, i]
    for i in T.Parallel(BLOCK_HEADS):
        total[i] = state.exchange[0, 0, i] + state.exchange[0, 1, i]
