"""The warp that fetches rows of wide products: it waits for a product's signals under the one before. Macros.

A wait takes as long as a round or two, and the ring of stages is three rounds deep: a warp that began to
wait when it had asked for all rows of a product would ask late for those of the next. So it leaves a
product's last rounds until it knows the next product, and waits for one signal between each two of them. It
may do so where all that it waits for comes before the product under way (`schedule.waits_ahead`), which
could never end otherwise.
"""

from functools import partial
from typing import Any

from tilelang import language as T

from megamoe import schedule
from megamoe.config import ROWS_WARP, Config
from megamoe.product import fetch_rows
from megamoe.schedule import Kind
from megamoe.signals import PHASE_LINEAR1, PHASE_LINEAR2, PHASE_SHIFT, poll

HELD_ROUNDS = 3  # that are left: one before each of two waits, and one behind them


def held_rounds(c: Config) -> int:
    """Return how many rounds of a product are left for later: none where products are shorter."""
    return HELD_ROUNDS if min(c.used_l1_steps, c.used_l2_steps) >= HELD_ROUNDS else 0


def _begun(c: Config, kind: Any) -> Any:
    """Return how many rounds of a product are not left for later."""
    steps = T.if_then_else(kind == Kind.LINEAR1.value, c.used_l1_steps, c.used_l2_steps)
    return steps - held_rounds(c)


@T.macro
def stream_rows_ahead(
    c: Config,
    x_ring: Any,
    x_ring_scale: Any,
    h_ring: Any,
    h_ring_scale: Any,
    dispatched: Any,
    l1_done: Any,
    l2_done: Any,
    rank: Any,
    kind: Any,
    block: Any,
    slot: Any,
    done: Any,
    full: Any,
    empty: Any,
    x_tile: Any,
    s_tile: Any,
    status: Any,
    polls: Any,
    held: Any,
    early: Any,
    segment: Any,
    before: Any,
    offset: Any,
):
    """Rows' warp: as `roles.stream_rows`, but the last rounds of a product are left for the next call.

    `held` [4] is the product before: place in its ring, kind, segment, number in the segment.
    """
    g = c.geometry
    rows = partial(
        _stream_wide, c, x_ring, x_ring_scale, h_ring, h_ring_scale, rank, done, full, empty, x_tile, s_tile
    )
    wait = partial(_await, c, dispatched, l1_done, l2_done, rank, kind, block, status, polls)
    last = held[2], held[3]
    if kind[0] == Kind.LINEAR1.value:
        slot[0] = schedule.x_slot(g, block[0])
        early[0] = schedule.waits_ahead(g, Kind.LINEAR1, block[0], before, segment, *last)
    else:
        slot[0] = schedule.h_slot(g, block[0])
        early[0] = schedule.waits_ahead(g, Kind.LINEAR2, block[0], before, segment, *last)
    if held_rounds(c) == 0:
        early[0] = 0
    if held[1] > 0:
        for k in T.serial(held_rounds(c)):
            if early[0] > 0:
                if k == 1:
                    wait(True)
                if k == 2:
                    wait(False)
            rows(held[1], held[0], _begun(c, held[1]) + k, 1)
    if early[0] == 0:
        wait(True)
        wait(False)
    T.fence_proxy_async()
    rows(kind[0], slot[0], 0, _begun(c, kind[0]))
    held[0] = slot[0]
    held[1] = kind[0]
    held[2] = segment
    held[3] = offset


@T.macro
def stream_held(
    c: Config,
    x_ring: Any,
    x_ring_scale: Any,
    h_ring: Any,
    h_ring_scale: Any,
    rank: Any,
    done: Any,
    full: Any,
    empty: Any,
    x_tile: Any,
    s_tile: Any,
    held: Any,
):
    """Rows' warp: the last rounds of the last product."""
    left = _begun(c, held[1]), held_rounds(c)
    rings = x_ring, x_ring_scale, h_ring, h_ring_scale
    _stream_wide(c, *rings, rank, done, full, empty, x_tile, s_tile, held[1], held[0], *left)


@T.macro
def _await(
    c: Config,
    dispatched: Any,
    l1_done: Any,
    l2_done: Any,
    rank: Any,
    kind: Any,
    block: Any,
    status: Any,
    polls: Any,
    room: bool,
):
    """Wait for the room of a product's outputs, or for its rows."""
    g = c.geometry
    if kind[0] == Kind.LINEAR1.value:
        code = (PHASE_LINEAR1 << PHASE_SHIFT) + block[0]
        if room:
            if block[0] >= g.h_ring:
                freed = schedule.h_freed_by(g, block[0])
                poll(c, l2_done, rank, freed, g.l2_tiles, code, status, polls, ROWS_WARP)
        else:
            poll(c, dispatched, rank, block[0], c.dispatch_parts, code, status, polls, ROWS_WARP)
    elif not room:
        code = (PHASE_LINEAR2 << PHASE_SHIFT) + block[0]
        poll(c, l1_done, rank, block[0], g.l1_tiles, code, status, polls, ROWS_WARP)
    T.sync_warp()


@T.macro
def _stream_wide(
    c: Config,
    x_ring: Any,
    x_ring_scale: Any,
    h_ring: Any,
    h_ring_scale: Any,
    rank: Any,
    done: Any,
    full: Any,
    empty: Any,
    x_tile: Any,
    s_tile: Any,
    kind: Any,
    slot: Any,
    first: Any,
    count: Any,
):
    for ko in T.serial(count):
        stage = c.stage(done[0], ko)
        if done[0] + ko >= c.num_stages:
            T.mbarrier_wait_parity(empty[stage], ((done[0] + ko) // c.num_stages + 1) & 1)
        if kind == Kind.LINEAR1.value:
            fetch_rows(c, x_ring, x_ring_scale, rank, slot, first + ko, stage, full, x_tile, s_tile)
        else:
            fetch_rows(c, h_ring, h_ring_scale, rank, slot, first + ko, stage, full, x_tile, s_tile)
    done[0] = done[0] + count
