"""The expert layer as one persistent kernel: dispatch, linear 1, SwiGLU, linear 2, combine. Experimental.

Every CTA of a rank runs its share of the rank's tasks in the order of `schedule`; tasks wait on counters
of finished tasks that come before them in that order (`signals`). What a task does: `tasks`, `product`.
What peers touch (inputs, combine buffers, signals) is one tensor over all ranks in each rank's address space
(`symmetric`); the rest is of the ranks of the launch. Several ranks may be *virtual*: their buffers lie on
one GPU and their CTAs share it, with the same code and the same signals. Before the launch the ranks have met
(`plan_kernel`). Design: docs/megamoe.md.
"""

from functools import partial
from typing import Any

from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout, make_half_bank_swizzled_layout

from dsv4_kernels.gemm.folded_tile import BLOCK_K
from dsv4_kernels.tile import leader
from megamoe import trace
from megamoe.config import (
    CONSUMERS,
    FINISH_FIRST,
    FINISHERS,
    PIECE_ROWS,
    PIECES,
    ROWS_WARP,
    THREADS,
    WARP,
    WEIGHTS_WARP,
    Config,
)
from megamoe.product import ALIGNED_M, COPIES, RING_COPIES, fetch_weights
from megamoe.roles import (
    dispatch,
    each_product,
    finish,
    multiply,
    stream_rows,
    stream_weights,
)
from megamoe.rows import stream_held, stream_rows_ahead
from megamoe.signals import (
    CONSUMER_TEAM,
    DISPATCHER_TEAM,
    PHASE_COMBINE,
    grid_barrier,
    rank_barrier,
)
from megamoe.tasks import add_slots, find
from megamoe.weights import GROUP_N, STEP_WORDS, TILE_N
from megamoe.widen_ring import PIECE_COPIES, first_pieces, widen_wave
from verify import externs
from verify.externs import signals as between_gpus

INT32 = 1 << 31  # elements past which an index needs more bits


def make_kernel(config: Config) -> Any:
    """Return the PrimFunc; all sizes but the routing are constants of it."""
    c, g = config, config.geometry
    ranks, local = c.num_ranks, c.launch_ranks
    tokens, hidden, inter, block_m = c.tokens, c.hidden, c.inter, c.block_m
    pool, ctas, tiles = c.pool_blocks, c.ctas, g.tiles
    stages, registers = c.num_stages, c.registers
    source = externs.source("dsv4_prmt", "dsv4_store_b32") + between_gpus.source()
    if c.trace:
        source = source + trace.SOURCE

    w_type = T.float8_e4m3fn if c.fp8 else T.uint32
    tile_type = T.float8_e4m3fn if c.widened else w_type

    @T.prim_func
    def megamoe_kernel(
        # inputs of all ranks; routing and weights (`weights.Packed`) of the ranks of the launch
        x: T.Tensor[(ranks, c.x_rows, hidden), T.float8_e4m3fn],
        x_scale: T.Tensor[(ranks, c.scale_rows, hidden // BLOCK_K), T.uint8],
        topk_idx: T.Tensor[(local, tokens, c.topk), T.int32],
        words: T.Tensor[(local, c.all_steps, *c.step_shape), w_type],
        offsets: T.Tensor[(local, c.all_steps, c.offset_words), T.int32],
        factors: T.Tensor[(local, c.num_experts * tiles, TILE_N), T.float32],
        # the plan of the rows that each rank receives
        firsts: T.Tensor[(local, g.num_waves + 3), T.int32],
        block_expert: T.Tensor[(local, pool), T.int32],
        row_source: T.Tensor[(local, pool * block_m), T.int32],
        row_target: T.Tensor[(local, pool * block_m), T.int32],
        row_weight: T.Tensor[(local, pool * block_m), T.float32],
        # rings, combine buffers of all ranks, counters, signals of all ranks
        x_ring: T.Tensor[(local, *c.x_ring_shape), T.float8_e4m3fn],
        x_ring_scale: T.Tensor[(local, g.x_ring, hidden // BLOCK_K, block_m), T.float32],
        h_ring: T.Tensor[(local, *c.h_ring_shape), T.float8_e4m3fn],
        h_ring_scale: T.Tensor[(local, g.h_ring, inter // BLOCK_K, block_m), T.float32],
        combine: T.Tensor[(ranks * c.combine_rows, hidden), T.bfloat16],
        dispatched: T.Tensor[(local, pool), T.int32],
        l1_done: T.Tensor[(local, pool), T.int32],
        l2_done: T.Tensor[(local, pool), T.int32],
        wide_ring: T.Tensor[(local, *c.wide_ring_shape), T.float8_e4m3fn],
        widened: T.Tensor[(local, c.widened_words), T.int32],
        grid_word: T.Tensor[(local, 1), T.uint32],
        signals: T.Tensor[(ranks, c.signal_words), T.int32],
        epochs: T.Tensor[(local, 1), T.int32],
        status: T.Tensor[(local, c.status_words), T.int32],
        y: T.Tensor[(local, tokens, hidden), T.bfloat16],
    ):
        with T.Kernel(c.launch_ranks * ctas, threads=THREADS) as bx:
            T.import_source(source)
            T.annotate_min_blocks_per_sm(c.ctas_per_sm)
            # CTAs write these for each other. A restrict pointer would let the compiler move a read of them
            # above the barrier after a wait: nobody else, it says, writes what it points to.
            T.annotate_restrict_buffers(
                x_ring,
                x_ring_scale,
                h_ring,
                h_ring_scale,
                combine,
                dispatched,
                l1_done,
                l2_done,
                *((wide_ring, widened) if c.widened else ()),
                grid_word,
                signals,
                epochs,
                status,
            )
            rank = bx // ctas  # pyright: ignore[reportOperatorIssue]
            cta = bx % ctas  # pyright: ignore[reportOperatorIssue]
            tx = T.get_thread_binding()
            polls = T.alloc_local((1,), T.int32)
            old = T.alloc_local((1,), T.uint32)
            previous = T.alloc_local((1,), T.int32)
            look = T.alloc_local((1,), T.int32)
            later = T.alloc_local((1,), T.int32)
            ahead = T.alloc_local((3,), T.int32)
            held = T.alloc_local((4,), T.int32)
            early = T.alloc_local((1,), T.int32)
            upcoming = T.alloc_local((2,), T.int32)  # first step and expert of this CTA's next product
            # What steers a product is kept in registers: put into every index, it takes the compiler minutes
            # to simplify.
            block = T.alloc_local((1,), T.int32)
            tile = T.alloc_local((1,), T.int32)
            slot = T.alloc_local((1,), T.int32)
            kind = T.alloc_local((1,), T.int32)
            count = T.alloc_local((1,), T.int32)
            number = T.alloc_local((1,), T.int32)
            done = T.alloc_local((1,), T.int32)  # stages that this thread has filled or read
            products = T.alloc_local((1,), T.int32)  # that it has handed over or taken
            full = T.alloc_barrier([RING_COPIES if c.widened else COPIES] * stages)
            empty = T.alloc_barrier([CONSUMERS] * stages)
            x_tile = T.alloc_shared((stages, block_m, BLOCK_K), T.float8_e4m3fn)
            s_tile = T.alloc_shared((stages, -(-block_m // ALIGNED_M) * ALIGNED_M), T.float32)
            w_tile = T.alloc_shared((stages, *c.stage_shape), tile_type)
            # Offsets of a stage; of weights that are widened once, those of the pieces on their way.
            o_tile = T.alloc_shared((PIECES, PIECE_ROWS) if c.widened else (stages, c.offset_words), T.int32)
            if c.widened:
                pieces = T.alloc_local((3,), T.int32)  # the walk of those who widen over them
                loaded = T.alloc_barrier([PIECE_COPIES] * PIECES)
                codes_tile = T.alloc_shared((PIECES, PIECE_ROWS, STEP_WORDS), T.uint32)
                factor_tile = T.alloc_shared((TILE_N,), T.float32)
                T.annotate_layout({codes_tile: make_half_bank_swizzled_layout(codes_tile)})
            else:
                pieces = loaded = codes_tile = factor_tile = None
            # A product on its way to those who finish it, and the routing weights of its rows.
            handed = T.alloc_barrier([CONSUMERS])
            taken = T.alloc_barrier([FINISHERS])
            out_a = T.alloc_shared((block_m, GROUP_N), T.bfloat16)
            out_b = T.alloc_shared((block_m, GROUP_N), T.bfloat16)
            weight_tile = T.alloc_shared((block_m,), T.float32)
            piece = T.alloc_fragment((c.chunk,), T.bfloat16)
            total = T.alloc_fragment((c.chunk,), T.float32)
            T.annotate_layout({half: make_full_bank_swizzled_layout(half) for half in (out_a, out_b)})

            # What a search may leave as it was is set first, so that all it ever holds is known.
            look[0] = 0
            polls[0] = 0
            upcoming[0] = -1
            upcoming[1] = 0
            count[0] = 0
            # The first product's weights travel while the CTAs meet and rows are dispatched.
            if c.widened:
                first_pieces(c, words, offsets, rank, cta, pieces, loaded, codes_tile, o_tile)
            elif tx // WARP == WEIGHTS_WARP // WARP:
                find(c, firsts, block_expert, rank, cta, look, upcoming, later)
                if upcoming[0] >= 0:
                    for stage in T.serial(min(stages, c.used_l1_steps)):
                        fetch_weights(words, offsets, rank, upcoming[0] + stage, stage, full, w_tile, o_tile)
            for b in T.serial(T.ceildiv(pool - cta * THREADS - tx, ctas * THREADS)):
                dispatched[rank, cta * THREADS + tx + b * ctas * THREADS] = 0
                l1_done[rank, cta * THREADS + tx + b * ctas * THREADS] = 0
                l2_done[rank, cta * THREADS + tx + b * ctas * THREADS] = 0
            if c.widened:
                for b in T.serial(T.ceildiv(c.widened_words - cta * THREADS - tx, ctas * THREADS)):
                    widened[rank, cta * THREADS + tx + b * ctas * THREADS] = 0
            T.sync_grid()

            walk = partial(each_product, c, firsts, rank, cta, kind, block, tile, later, ahead)
            dispatched_by = (
                firsts,
                x,
                x_scale,
                row_source,
                x_ring,
                x_ring_scale,
                dispatched,
                l1_done,
                rank,
                cta,
                block,
                tile,
                slot,
                status,
                polls,
                previous,
                upcoming,
            )
            done[0] = 0
            products[0] = 0
            if tx >= FINISH_FIRST:
                T.dec_max_nreg(registers[1])
                if c.trace:
                    upcoming[0] = 0
                for segment in T.serial(g.num_waves + 1):
                    walk(
                        segment,
                        lambda *_: finish(
                            c,
                            block_expert,
                            row_weight,
                            row_target,
                            h_ring,
                            h_ring_scale,
                            combine,
                            l1_done,
                            l2_done,
                            widened,
                            rank,
                            cta,
                            kind,
                            block,
                            tile,
                            slot,
                            products,
                            handed,
                            taken,
                            weight_tile,
                            out_a,
                            out_b,
                            status,
                            previous,
                            upcoming,
                        ),
                    )
            elif tx >= CONSUMERS:
                T.dec_max_nreg(registers[1])
                if tx < ROWS_WARP:
                    for segment in T.serial(g.num_waves + 1):
                        walk(
                            segment,
                            lambda *_: stream_weights(
                                c,
                                block_expert,
                                words,
                                offsets,
                                wide_ring,
                                widened,
                                rank,
                                kind,
                                block,
                                tile,
                                number,
                                count,
                                done,
                                full,
                                empty,
                                w_tile,
                                o_tile,
                                look,
                                status,
                                polls,
                            ),
                        )
                elif tx < ROWS_WARP + WARP:
                    if c.wide:
                        held[1] = 0
                        held[2] = -2
                        for segment in T.serial(g.num_waves + 1):
                            walk(
                                segment,
                                lambda *place: stream_rows_ahead(
                                    c,
                                    x_ring,
                                    x_ring_scale,
                                    h_ring,
                                    h_ring_scale,
                                    dispatched,
                                    l1_done,
                                    l2_done,
                                    rank,
                                    kind,
                                    block,
                                    slot,
                                    done,
                                    full,
                                    empty,
                                    x_tile,
                                    s_tile,
                                    status,
                                    polls,
                                    held,
                                    early,
                                    *place,
                                ),
                            )
                        if held[1] > 0:
                            stream_held(
                                c,
                                x_ring,
                                x_ring_scale,
                                h_ring,
                                h_ring_scale,
                                rank,
                                done,
                                full,
                                empty,
                                x_tile,
                                s_tile,
                                held,
                            )
                    else:
                        for segment in T.serial(g.num_waves + 1):
                            walk(
                                segment,
                                lambda *_: stream_rows(
                                    c,
                                    block_expert,
                                    x_ring,
                                    x_ring_scale,
                                    h_ring,
                                    h_ring_scale,
                                    dispatched,
                                    l1_done,
                                    l2_done,
                                    rank,
                                    kind,
                                    block,
                                    slot,
                                    done,
                                    full,
                                    empty,
                                    x_tile,
                                    s_tile,
                                    status,
                                    polls,
                                ),
                            )
                elif c.widened:
                    for wave in T.serial(g.num_waves):
                        widen_wave(
                            c,
                            firsts,
                            words,
                            offsets,
                            wide_ring,
                            widened,
                            rank,
                            cta,
                            wave,
                            pieces,
                            loaded,
                            codes_tile,
                            o_tile,
                            status,
                            polls,
                            previous,
                        )
                elif c.dispatchers:
                    for wave in T.serial(1, g.num_waves):
                        dispatch(c, *dispatched_by, wave, DISPATCHER_TEAM)
            else:
                T.inc_max_nreg(registers[0])
                if c.trace:
                    upcoming[0] = 0
                    trace.place(c, status, rank, cta)
                for segment in T.serial(g.num_waves + 1):
                    if segment == 0 if c.dispatchers else True:
                        dispatch(c, *dispatched_by, segment, CONSUMER_TEAM)

                    walk(
                        segment,
                        lambda *_: multiply(
                            c,
                            block_expert,
                            factors,
                            rank,
                            cta,
                            kind,
                            block,
                            tile,
                            number,
                            count,
                            done,
                            products,
                            full,
                            empty,
                            handed,
                            taken,
                            x_tile,
                            s_tile,
                            w_tile,
                            o_tile,
                            factor_tile,
                            out_a,
                            out_b,
                            status,
                            upcoming,
                        ),
                    )

                if c.trace:
                    trace.begin(0, upcoming)
                # What the finishers wrote comes before what the rank says next.
                if products[0] > 0:
                    T.mbarrier_wait_parity(taken, (products[0] + 1) & 1)
                grid_barrier(c, grid_word, rank, cta, status, polls, old)
                if ranks > 1:
                    if cta == 0:
                        rank_barrier(c, signals, epochs, 2, PHASE_COMBINE, rank, status, polls)
                    grid_barrier(c, grid_word, rank, cta, status, polls, old)
                    if cta == 0 and tx == 0:
                        epochs[rank, 0] = epochs[rank, 0] + 2

                if c.trace:
                    what = trace.code(trace.BARRIER, 0, 0)
                    trace.end(c, status, rank, cta, 0, 0, what, upcoming)
                    trace.begin(0, upcoming)
                # A register, where a rank's rows begin past 32 bits: the compiler widens indices that may
                # not fit, but not constants.
                if ranks * c.combine_rows * hidden >= INT32:
                    number[0] = c.first_rank + rank
                me = number[0] if ranks * c.combine_rows * hidden >= INT32 else c.first_rank + rank
                for turn in T.serial(T.ceildiv(tokens * c.combine_parts - cta, ctas)):
                    token = (cta + turn * ctas) // c.combine_parts
                    channel = (cta + turn * ctas) % c.combine_parts * c.chunk
                    add_slots(c, combine, topk_idx, y, rank, me, token, channel, piece, total)
                if c.trace:
                    what = trace.code(trace.COMBINE, 0, 0)
                    trace.end(c, status, rank, cta, 0, 0, what, upcoming)

    return leader.uniform(megamoe_kernel, CONSUMERS)
