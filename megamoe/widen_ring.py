"""FP4 weights widened once a launch, beside the products, to a ring in memory. Macros.

Two warps of a CTA, a team, widen the experts of the next wave for wide products: bulk copies bring codes and
offsets to shared memory some pieces ahead, since inputs wait for nobody, and threads store e4m3 rows to the
ring. A place in the ring is always written by the same thread. Signals: a word of `widened` an expert says
how many CTAs have widened their share; behind them a word a wave says how many linear-2 products of it are
done, after which its places may be written again.
"""

from typing import Any

from tilelang import language as T

from dsv4_kernels.gemm.folded_tile import SCALE_K, widen
from megamoe import schedule
from megamoe.config import DISPATCH_FIRST, DISPATCHERS, PIECE_ROWS, PIECES, WARP, Config
from megamoe.signals import DISPATCHER_TEAM, PHASE_DISPATCH, PHASE_SHIFT, meet, poll, signal
from megamoe.weights import TILE_N

PIECE_COPIES = 2  # codes, offsets
_ARRIVES = {"emit_arrive": 1}
_QUARTERS = 4  # of a row's 128 channels, with an offset each: a thread widens one
WORDS = 4  # of a quarter
_PIECES_A_STEP = TILE_N // PIECE_ROWS
# Of a CTA's walk over its pieces: how many it has widened; the next piece to ask for, among those of all
# experts, and the first of the expert behind.
COUNT, AHEAD, END = range(3)
_AT_ONCE = DISPATCHERS // _QUARTERS  # rows


@T.macro
def fetch_piece(
    c: Config,
    words: Any,
    offsets: Any,
    rank: Any,
    cta: Any,
    walk: Any,
    place: Any,
    loaded: Any,
    codes_tile: Any,
    offset_tile: Any,
):
    """One warp: start the copies of the next piece of this CTA's, if there is one, to a place of three."""
    if walk[AHEAD] < c.num_experts * c.expert_pieces:
        step = walk[AHEAD] // _PIECES_A_STEP
        row = walk[AHEAD] % _PIECES_A_STEP * PIECE_ROWS
        T.tma_copy(
            words[rank, step, row : row + PIECE_ROWS, :],
            codes_tile[place, :, :],
            barrier=loaded[place],
            leader_scope_threads=WARP,
            annotations=_ARRIVES,
        )
        T.tma_copy(
            offsets[rank, step, row : row + PIECE_ROWS],
            offset_tile[place, :],
            barrier=loaded[place],
            leader_scope_threads=WARP,
            annotations=_ARRIVES,
        )
    walk[AHEAD] = walk[AHEAD] + c.ctas
    if walk[AHEAD] >= walk[END]:
        walk[AHEAD] = walk[END] + cta
        walk[END] = walk[END] + c.expert_pieces


@T.macro
def first_pieces(
    c: Config,
    words: Any,
    offsets: Any,
    rank: Any,
    cta: Any,
    walk: Any,
    loaded: Any,
    codes_tile: Any,
    offset_tile: Any,
):
    """Set `walk` up; the team's first warp starts the copies of the first pieces."""
    walk[COUNT] = 0
    walk[AHEAD] = cta
    walk[END] = c.expert_pieces
    if T.get_thread_binding() // WARP == DISPATCH_FIRST // WARP:
        for place in T.serial(PIECES):
            fetch_piece(c, words, offsets, rank, cta, walk, place, loaded, codes_tile, offset_tile)


@T.macro
def widen_share(
    c: Config,
    words: Any,
    offsets: Any,
    wide_ring: Any,
    rank: Any,
    cta: Any,
    expert: Any,
    walk: Any,
    loaded: Any,
    codes_tile: Any,
    offset_tile: Any,
):
    """The team: widen this CTA's share of an expert."""
    codes = T.alloc_local((2 * WORDS,), T.uint32)
    wide = T.alloc_local((SCALE_K,), T.float8_e4m3fn)
    offset = T.alloc_local((2,), T.int32)
    lane = T.get_thread_binding() - DISPATCH_FIRST
    quarter = lane % _QUARTERS
    for turn in T.serial(schedule.pieces(c.expert_pieces, cta, c.ctas)):
        piece = cta + turn * c.ctas
        step = expert % c.ring_experts * c.expert_steps + piece // _PIECES_A_STEP
        place = walk[COUNT] % PIECES
        T.mbarrier_wait_parity(loaded[place], walk[COUNT] // PIECES & 1)
        for group in T.unroll(PIECE_ROWS // (2 * _AT_ONCE)):
            row = group * 2 * _AT_ONCE + lane // _QUARTERS
            # Both rows' loads first: the other warps of the CTA leave a warp few turns, so it waits seldom.
            for part in T.unroll(2):
                offset[part] = offset_tile[place, row + part * _AT_ONCE]
                for t in T.unroll(WORDS):
                    codes[part * WORDS + t] = codes_tile[
                        place, row + part * _AT_ONCE, t * _QUARTERS + quarter
                    ]
            for part in T.unroll(2):
                for h in T.unroll(2):
                    for t in T.unroll(WORDS):
                        T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
                            "handle",
                            "dsv4_store_b32",
                            T.address_of(wide[h * 16 + t * 4]),
                            widen(codes[part * WORDS + t], (offset[part] >> (8 * quarter)) & 0xFF, h),
                        )
                    for e in T.vectorized(16):
                        wide_ring[
                            rank,
                            step,
                            piece % _PIECES_A_STEP * PIECE_ROWS + row + part * _AT_ONCE,
                            quarter * SCALE_K + h * 16 + e,
                        ] = wide[h * 16 + e]
        meet(DISPATCHER_TEAM)
        if T.get_thread_binding() < DISPATCH_FIRST + WARP:
            fetch_piece(c, words, offsets, rank, cta, walk, place, loaded, codes_tile, offset_tile)
        walk[COUNT] = walk[COUNT] + 1


@T.macro
def widen_wave(
    c: Config,
    firsts: Any,
    words: Any,
    offsets: Any,
    wide_ring: Any,
    widened: Any,
    rank: Any,
    cta: Any,
    wave: Any,
    walk: Any,
    loaded: Any,
    codes_tile: Any,
    offset_tile: Any,
    status: Any,
    polls: Any,
    previous: Any,
):
    """The team: this CTA's share of a wave's experts, once the products that read their places are done."""
    g = c.geometry
    if wave >= 2:
        freed = g.l2_tiles * (firsts[rank, wave] - firsts[rank, wave - 1])
        code = (PHASE_DISPATCH << PHASE_SHIFT) + firsts[rank, wave + 1]
        poll(c, widened, rank, c.num_experts + wave - 2, freed, code, status, polls, DISPATCH_FIRST)
        meet(DISPATCHER_TEAM)
    for i in T.serial(T.min(g.wave_experts, c.num_experts - wave * g.wave_experts)):
        expert = wave * g.wave_experts + i
        widen_share(c, words, offsets, wide_ring, rank, cta, expert, walk, loaded, codes_tile, offset_tile)
        signal(widened, rank, expert, previous, DISPATCHER_TEAM)
