"""What the roles of a CTA do for one product, and the walk over a CTA's products that they share. Macros.

All roles walk through the same products in the same order, each at its own pace.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from tilelang import language as T

from megamoe import schedule, trace
from megamoe.config import FINISH_FIRST, ROWS_WARP, WARP, WEIGHTS_WARP, Config
from megamoe.product import (
    ROW_COPIES,
    fetch_rows,
    fetch_weights,
    fetch_wide,
    product,
    product_fp8,
    product_wide,
)
from megamoe.schedule import Kind
from megamoe.signals import (
    CONSUMER_TEAM,
    DISPATCHER_TEAM,
    PHASE_DISPATCH,
    PHASE_LINEAR1,
    PHASE_LINEAR2,
    PHASE_SHIFT,
    Team,
    counted,
    finished,
    finishers_meet,
    meet,
    poll,
    signal,
)
from megamoe.tasks import (
    activate,
    choose,
    copy_rows,
    hand_over,
    hand_over_rows,
    hand_over_scaled_rows,
    send,
)
from megamoe.weights import FP8_STAGES, GROUP_N, TILE_N


@T.macro
def each_product(
    c: Config,
    firsts: Any,
    rank: Any,
    cta: Any,
    kind: Any,
    block: Any,
    tile: Any,
    later: Any,
    ahead: Any,
    segment: Any,
    body: Callable[[Any, Any, Any], Any],
):
    """Run `body` for each product of this CTA in a segment of the task order, in turn.

    Args:
        c: shape and tile.
        firsts: [ranks, num_waves + 3] first blocks of the waves.
        rank: of the launch.
        cta: of the rank.
        kind: [1], set for `body`, as are the next two.
        block: [1].
        tile: [1].
        later: [1], scratch.
        ahead: [3], scratch.
        segment: of the task order.
        body: emits what the role does, from the segment, the first block of its products and the product's
            number among them.
    """
    before = firsts[rank, segment]
    first = firsts[rank, segment + 1]
    left_out = schedule.gap(c.geometry, before, first, c.ctas, segment == c.geometry.num_waves)
    # In registers: the compiler would put all of it into every index, and keep what does not change between
    # products in registers that products need.
    ahead[0] = schedule.share_start(before * c.geometry.tiles, cta, c.ctas) - before * c.geometry.tiles
    ahead[1] = left_out
    # Where a loop ends is looked up again in each turn: it may not change with the loop.
    ahead[2] = T.ceildiv((first - before) * c.geometry.tiles + left_out - ahead[0], c.ctas)
    for _ in T.serial(ahead[2]):
        choose(c, before, first, ahead[0], ahead[1], kind, block, tile, later)
        if kind[0] > 0:
            body(segment, before, ahead[0])
        ahead[0] = ahead[0] + c.ctas


@T.macro
def dispatch(
    c: Config,
    firsts: Any,
    x: Any,
    x_scale: Any,
    row_source: Any,
    x_ring: Any,
    x_ring_scale: Any,
    dispatched: Any,
    l1_done: Any,
    rank: Any,
    cta: Any,
    block: Any,
    tile: Any,
    slot: Any,
    status: Any,
    polls: Any,
    previous: Any,
    begun: Any,
    wave: Any,
    team: Team,
):
    """A team: this CTA's share of the dispatch of a wave; `begun` [2] is when, for a trace."""
    g, parts, is_traced = c.geometry, c.dispatch_parts, c.trace > 0 and team is CONSUMER_TEAM
    first = firsts[rank, wave + 1]
    after = firsts[rank, wave + 2]
    start = schedule.share_start(first * parts, cta, c.ctas)
    for turn in T.serial(T.ceildiv(after * parts - start, c.ctas)):
        block[0] = (start + turn * c.ctas) // parts
        tile[0] = (start + turn * c.ctas) % parts
        slot[0] = schedule.x_slot(g, block[0])
        if is_traced:
            trace.begin(0, begun)
        if block[0] >= g.x_ring:
            code = (PHASE_DISPATCH << PHASE_SHIFT) + block[0]
            freed = schedule.x_freed_by(g, block[0])
            poll(c, l1_done, rank, freed, g.l1_tiles, code, status, polls, team.first)
            meet(team)
        copy_rows(
            c,
            x,
            x_scale,
            row_source,
            x_ring,
            x_ring_scale,
            rank,
            block[0],
            tile[0],
            slot[0],
            team is DISPATCHER_TEAM,
        )
        signal(dispatched, rank, block[0], previous, team)
        if is_traced:
            what = trace.code(Kind.DISPATCH.value, block[0], tile[0])
            trace.end(c, status, rank, cta, 0, 0, what, begun)


@T.macro
def stream_weights(
    c: Config,
    block_expert: Any,
    words: Any,
    offsets: Any,
    wide_ring: Any,
    widened: Any,
    rank: Any,
    kind: Any,
    block: Any,
    tile: Any,
    number: Any,
    count: Any,
    done: Any,
    full: Any,
    empty: Any,
    w_tile: Any,
    o_tile: Any,
    known: Any,
    status: Any,
    polls: Any,
):
    """Weights' warp: fetch a product's weights stage by stage; `number` and `count` [1] are scratch.

    `known` [1]: experts before this number have been widened, as far as the warp knows.
    """
    expert = block_expert[rank, block[0]]
    if c.widened:
        if expert >= known[0]:
            code = (PHASE_LINEAR1 << PHASE_SHIFT) + block[0]
            poll(c, widened, rank, expert, c.ctas, code, status, polls, WEIGHTS_WARP)
            T.sync_warp()
            T.fence_proxy_async()
            known[0] = expert + 1
        number[0] = expert % c.ring_experts * c.expert_steps
    else:
        number[0] = c.first_step(expert)
    if kind[0] == Kind.LINEAR1.value:
        count[0] = c.stages(c.used_l1_steps, expert)
        number[0] = number[0] + tile[0] * c.stages(c.l1_steps, expert)
    else:
        count[0] = c.stages(c.used_l2_steps, expert)
        number[0] = (
            number[0]
            + c.stages(c.geometry.l1_tiles * c.l1_steps, expert)
            + tile[0] * c.stages(c.l2_steps, expert)
        )
    for ko in T.serial(count[0]):
        if c.widened:
            if done[0] + ko >= c.num_stages:
                T.mbarrier_wait_parity(empty[c.stage(done[0], ko)], ((done[0] + ko) // c.num_stages + 1) & 1)
            fetch_wide(wide_ring, rank, number[0] + ko, c.stage(done[0], ko), full, w_tile)
        elif done[0] + ko >= c.num_stages:  # the first have been filled before the roles part
            T.mbarrier_wait_parity(empty[c.stage(done[0], ko)], ((done[0] + ko) // c.num_stages + 1) & 1)
            fetch_weights(words, offsets, rank, number[0] + ko, c.stage(done[0], ko), full, w_tile, o_tile)
    done[0] = done[0] + count[0]


@T.macro
def stream_rows(
    c: Config,
    block_expert: Any,
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
):
    """Rows' warp: wait for a product's rows and for the room of its outputs; fetch them stage by stage."""
    g = c.geometry
    if kind[0] == Kind.LINEAR1.value:
        slot[0] = schedule.x_slot(g, block[0])
        code = (PHASE_LINEAR1 << PHASE_SHIFT) + block[0]
        if block[0] >= g.h_ring:
            freed = schedule.h_freed_by(g, block[0])
            poll(c, l2_done, rank, freed, g.l2_tiles, code, status, polls, ROWS_WARP)
        poll(c, dispatched, rank, block[0], c.dispatch_parts, code, status, polls, ROWS_WARP)
        T.sync_warp()
        T.fence_proxy_async()
        stream = partial(_stream, c, x_ring, x_ring_scale, rank, slot[0], c.used_l1_steps, done, full, empty)
        by_format(c, block_expert[rank, block[0]], lambda fp8: stream(x_tile, s_tile, fp8))
    else:
        slot[0] = schedule.h_slot(g, block[0])
        code = (PHASE_LINEAR2 << PHASE_SHIFT) + block[0]
        poll(c, l1_done, rank, block[0], g.l1_tiles, code, status, polls, ROWS_WARP)
        T.sync_warp()
        T.fence_proxy_async()
        stream = partial(_stream, c, h_ring, h_ring_scale, rank, slot[0], c.used_l2_steps, done, full, empty)
        by_format(c, block_expert[rank, block[0]], lambda fp8: stream(x_tile, s_tile, fp8))


@T.macro
def _stream(
    c: Config,
    ring: Any,
    ring_scale: Any,
    rank: Any,
    slot: Any,
    steps: int,
    done: Any,
    full: Any,
    empty: Any,
    x_tile: Any,
    s_tile: Any,
    fp8: bool,
):
    stages = FP8_STAGES * steps if fp8 else steps
    for ko in T.serial(stages):
        stage = c.stage(done[0], ko)
        if done[0] + ko >= c.num_stages:
            T.mbarrier_wait_parity(empty[stage], ((done[0] + ko) // c.num_stages + 1) & 1)
        if not fp8:
            fetch_rows(c, ring, ring_scale, rank, slot, ko, stage, full, x_tile, s_tile)
        elif ko % FP8_STAGES == 0:
            fetch_rows(c, ring, ring_scale, rank, slot, ko // FP8_STAGES, stage, full, x_tile, s_tile)
        elif T.shuffle_elect(WARP):
            for _ in T.unroll(ROW_COPIES):  # the other half of the weight rows has its rows of x already
                T.barrier_arrive(full[stage])
    done[0] = done[0] + stages


@T.macro
def by_format(c: Config, expert: Any, body: Callable[[bool], Any]):
    """Run `body` with whether an expert's weights are e4m3."""
    if not c.is_mixed:
        body(c.fp8)
    elif expert == 0:
        body(True)
    else:
        body(False)


@T.macro
def finish(
    c: Config,
    block_expert: Any,
    row_weight: Any,
    row_target: Any,
    h_ring: Any,
    h_ring_scale: Any,
    combine: Any,
    l1_done: Any,
    l2_done: Any,
    widened: Any,
    rank: Any,
    cta: Any,
    kind: Any,
    block: Any,
    tile: Any,
    slot: Any,
    products: Any,
    handed: Any,
    taken: Any,
    weight_tile: Any,
    out_a: Any,
    out_b: Any,
    status: Any,
    previous: Any,
    begun: Any,
):
    """Finishers: what follows a product; `begun` [2] is when, for a trace."""
    for i in T.Parallel(c.block_m):
        weight_tile[i] = row_weight[rank, block[0] * c.block_m + i]
    finishers_meet()
    T.mbarrier_wait_parity(handed, products[0] & 1)
    if c.trace:
        trace.begin(FINISH_FIRST, begun)
    if kind[0] == Kind.LINEAR1.value:
        slot[0] = schedule.h_slot(c.geometry, block[0])
        if not c.copies_only:
            activate(c, h_ring, h_ring_scale, rank, tile[0], slot[0], weight_tile, out_a, out_b)
        T.barrier_arrive(taken)
        finished(l1_done, rank, block[0], previous)
    else:
        send(c, row_target, combine, rank, block[0], tile[0], out_a, out_b)
        T.barrier_arrive(taken)
        finished(l2_done, rank, block[0], previous)
        if c.widened:
            wave = block_expert[rank, block[0]] // c.wave_experts
            counted(widened, rank, c.num_experts + wave, previous)
    if c.trace:
        what = trace.code(kind[0], block[0], tile[0])
        trace.end(c, status, rank, cta, 1, FINISH_FIRST, what, begun)
    products[0] = products[0] + 1


@T.macro
def multiply(
    c: Config,
    block_expert: Any,
    factors: Any,
    rank: Any,
    cta: Any,
    kind: Any,
    block: Any,
    tile: Any,
    number: Any,
    count: Any,
    done: Any,
    products: Any,
    full: Any,
    empty: Any,
    handed: Any,
    taken: Any,
    x_tile: Any,
    s_tile: Any,
    w_tile: Any,
    o_tile: Any,
    factor_tile: Any,
    out_a: Any,
    out_b: Any,
    status: Any,
    begun: Any,
):
    """Consumers: a product, rounded and handed over once there is room."""
    factor_a = T.alloc_fragment((GROUP_N,), T.float32)
    factor_b = T.alloc_fragment((GROUP_N,), T.float32)
    shape = (c.block_m, GROUP_N) if c.wide else (GROUP_N, c.block_m)
    acc_a = T.alloc_fragment(shape, T.float32)
    acc_b = T.alloc_fragment(shape, T.float32)
    if c.trace:
        trace.begin(0, begun)
    expert = block_expert[rank, block[0]]
    number[0] = expert * c.geometry.tiles + tile[0]
    count[0] = c.stages(c.used_l1_steps, expert)
    if kind[0] == Kind.LINEAR2.value:
        number[0] = number[0] + c.geometry.l1_tiles
        count[0] = c.stages(c.used_l2_steps, expert)
    if not c.wide:
        for i in T.Parallel(GROUP_N):
            factor_a[i] = factors[rank, number[0], i]
            factor_b[i] = factors[rank, number[0], GROUP_N + i]
    factor = T.alloc_fragment((TILE_N,), T.float32) if c.widened else factor_tile
    if c.widened:
        for i in T.Parallel(TILE_N):  # a register a thread, on its way while the product is multiplied
            factor[i] = factors[rank, number[0], i]
    stages = full, empty, x_tile, s_tile, w_tile, o_tile
    if c.wide:
        product_wide(c, count[0], done[0], *stages, acc_a, acc_b)
    else:
        by_format(
            c,
            expert,
            lambda fp8: (product_fp8 if fp8 else product)(c, count[0], done[0], *stages, acc_a, acc_b),
        )
    done[0] = done[0] + count[0]
    if products[0] > 0:
        T.mbarrier_wait_parity(taken, (products[0] + 1) & 1)
    if c.widened:
        for i in T.Parallel(TILE_N):
            factor_tile[i] = factor[i]
        meet()
        hand_over_scaled_rows(c, acc_a, factor_tile, 0, out_a)
        hand_over_scaled_rows(c, acc_b, factor_tile, GROUP_N, out_b)
    elif c.wide:
        hand_over_rows(c, acc_a, out_a)
        hand_over_rows(c, acc_b, out_b)
    else:
        hand_over(c, acc_a, factor_a, out_a)
        hand_over(c, acc_b, factor_b, out_b)
    T.barrier_arrive(handed)
    if c.trace:
        what = trace.code(kind[0], block[0], tile[0])
        trace.end(c, status, rank, cta, 0, 0, what, begun)
    products[0] = products[0] + 1
