"""The expert layer as one persistent kernel: dispatch, linear 1, SwiGLU, linear 2, combine. Experimental.

Every CTA of a rank runs its share of the rank's tasks in the order of `schedule`; tasks wait on counters
of finished tasks that come before them in that order. Several ranks may be *virtual*: their buffers lie
on one GPU and their CTAs share it, with the same code and the same signals. Design: docs/megamoe.md.
"""

import math
from dataclasses import dataclass
from typing import Any

from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout

from dsv4_kernels.gemm.folded_tile import BLOCK_K, SCALE_K, widen
from dsv4_kernels.tile.scale import (
    BF16_MAGNITUDE,
    F32_NAN,
    UE8M0_NAN,
    ue8m0_reciprocal,
    ue8m0_scale,
    ue8m0_to_f32,
)
from megamoe import schedule
from megamoe.schedule import Geometry, Kind
from megamoe.weights import GROUP_N, STEP_WORDS, TILE_N
from verify import externs

THREADS = 256
WEIGHT_COPIES = 2  # groups of asynchronous copies a stage: codes, offsets
COPIES = WEIGHT_COPIES + 1  # and rows
BOTH_M = 64  # up to so many rows a block, both products of a stage are under way together
AMAX_MIN = 1e-4
E4M3_MAX = 448.0
FLIP = 0x80000000  # the bit of a grid barrier's word that turns over when all have come
# What a rank was waiting for when the watchdog stopped it. A wait that is given up makes later ones fail
# too, so the largest code of all is kept, and earlier phases have larger ones.
PHASE_GRID, PHASE_COMBINE, PHASE_LINEAR2, PHASE_LINEAR1, PHASE_DISPATCH, PHASE_START = range(1, 7)
PHASE_SHIFT = 20  # status word: phase, and below it the peer or block waited for
_GRID_PATIENCE = 4  # waits of one CTA that a grid barrier outlasts: the cause is reported, not this


@dataclass(frozen=True)
class Config:
    """Shape and tile of one kernel.

    Attributes:
        num_ranks: ranks that exchange tokens.
        launch_ranks: ranks, from 0 on, that one launch covers; all of them unless a peer is to be lost.
        ctas: of each rank; all CTAs of the launch have to be resident together.
        tokens: most tokens a rank.
        topk: experts a token.
        hidden, inter: channels; multiples of 256.
        num_experts: of one rank.
        wave_experts: experts a wave.
        block_m: rows a block; the instruction's N.
        dispatch_parts: tasks that copy one block.
        num_stages: depth of the products' pipeline, of 128 channels a stage; divides both hidden / 128 and
            inter / 128, so that every product begins at stage 0.
        clamp: bound of the SwiGLU's inputs.
        max_polls: of one wait, before the watchdog gives up; a poll takes about a microsecond.
        cooperative: launch cooperatively, so that the driver refuses CTAs that cannot all be resident.
        ctas_per_sm: CTAs that share a multiprocessor; registers are held down to it.
    """

    num_ranks: int
    launch_ranks: int
    ctas: int
    tokens: int
    topk: int
    hidden: int
    inter: int
    num_experts: int
    wave_experts: int
    block_m: int
    dispatch_parts: int
    num_stages: int = 3
    clamp: float = 10.0
    max_polls: int = 2_000_000
    cooperative: bool = True
    ctas_per_sm: int = 1

    def __post_init__(self) -> None:
        """Check what the pipeline relies on."""
        if self.num_stages < 2 or math.gcd(self.l1_steps, self.l2_steps) % self.num_stages:
            got = f"{self.num_stages} for {self.l1_steps} and {self.l2_steps}"
            raise ValueError(
                f"mega_moe: requires num_stages >= 2 that divides both products' stages, got {got}"
            )

    @property
    def geometry(self) -> Geometry:
        """What `schedule` needs."""
        sizes = {
            "num_ranks": self.num_ranks,
            "tokens": self.tokens,
            "topk": self.topk,
            "num_experts": self.num_experts,
            "block_m": self.block_m,
        }
        x_ring, h_ring = schedule.rings(wave_experts=self.wave_experts, **sizes)
        return Geometry(
            dispatch_parts=self.dispatch_parts,
            l1_tiles=self.inter // GROUP_N,
            l2_tiles=self.hidden // TILE_N,
            num_experts=self.num_experts,
            wave_experts=self.wave_experts,
            x_ring=x_ring,
            h_ring=h_ring,
        )

    @property
    def l1_steps(self) -> int:
        """Stages of a linear-1 product."""
        return self.hidden // BLOCK_K

    @property
    def l2_steps(self) -> int:
        """Stages of a linear-2 product."""
        return self.inter // BLOCK_K

    @property
    def expert_steps(self) -> int:
        """Steps of one expert's weights, see `weights`."""
        g = self.geometry
        return g.l1_tiles * self.l1_steps + g.l2_tiles * self.l2_steps

    @property
    def combine_parts(self) -> int:
        """Parts of a token's channels that CTAs add up separately: more where there are few tokens."""
        parts = 1
        while self.tokens * parts < self.ctas and self.hidden % (4 * parts * THREADS) == 0:
            parts *= 2
        return parts

    @property
    def pool_blocks(self) -> int:
        """Blocks that one rank may receive."""
        return schedule.pool_blocks(
            num_ranks=self.num_ranks,
            tokens=self.tokens,
            topk=self.topk,
            num_experts=self.num_experts,
            block_m=self.block_m,
        )


def make_kernel(config: Config) -> Any:
    """Return the PrimFunc; all sizes but the routing are constants of it."""
    c, g = config, config.geometry
    ranks, tokens, hidden, inter, block_m = c.num_ranks, c.tokens, c.hidden, c.inter, c.block_m
    pool, part_rows = c.pool_blocks, c.block_m // c.dispatch_parts
    ctas, parts, l1_tiles, l2_tiles, tiles = c.ctas, c.dispatch_parts, g.l1_tiles, g.l2_tiles, g.tiles
    stages, ahead = c.num_stages, c.num_stages - 1
    x_rows, h_rows = g.x_ring * block_m, g.h_ring * block_m
    l1_steps, l2_steps, expert_steps = c.l1_steps, c.l2_steps, c.expert_steps
    widest = max(l1_steps, l2_steps)
    rows_policy = T.GemmWarpPolicy.FullRow
    source = externs.source("dsv4_prmt", "dsv4_store_b32")
    firsts_len = g.num_waves + 3
    chunk = hidden // c.combine_parts
    in_turn = block_m > BOTH_M

    @T.macro
    def wait(counter: Any, rank: Any, index: Any, least: Any, code: Any, status: Any, polls: Any):
        if T.get_thread_binding() == 0:
            polls[0] = 0
            while (T.atomic_load(counter[rank, index], memory_order="acquire") < least) and (
                polls[0] < c.max_polls
            ):
                polls[0] = T.if_then_else(
                    T.atomic_load(status[rank, 0], memory_order="relaxed") == 0, polls[0] + 1, c.max_polls
                )
            if polls[0] >= c.max_polls:
                T.atomic_max(status[rank, 0], code)
        T.sync_threads()

    @T.macro
    def signal(counter: Any, rank: Any, index: Any, previous: Any):
        T.sync_threads()
        if T.get_thread_binding() == 0:
            # With the old value asked for: an integer add that returns nothing is compiled as relaxed.
            previous[0] = T.atomic_add(counter[rank, index], 1, return_prev=True, memory_order="release")

    @T.macro
    def grid_barrier(grid_word: Any, rank: Any, cta: Any, status: Any, polls: Any, old: Any):
        T.sync_threads()
        if T.get_thread_binding() == 0:
            old[0] = T.atomic_add(
                grid_word[rank, 0],
                T.if_then_else(cta == 0, T.uint32(FLIP - (ctas - 1)), T.uint32(1)),  # pyright: ignore[reportCallIssue]
                return_prev=True,
                memory_order="acq_rel",
            )
            polls[0] = 0
            while (
                ((old[0] ^ T.atomic_load(grid_word[rank, 0], memory_order="acquire")) & T.uint32(FLIP))  # pyright: ignore[reportCallIssue]
                == T.uint32(0)  # pyright: ignore[reportCallIssue]
            ) and (polls[0] < _GRID_PATIENCE * c.max_polls):
                polls[0] = polls[0] + 1
            if polls[0] >= _GRID_PATIENCE * c.max_polls:
                T.atomic_max(status[rank, 0], PHASE_GRID << PHASE_SHIFT)
        T.sync_threads()

    @T.macro
    def rank_barrier(
        signals: Any, epochs: Any, step: Any, phase: Any, rank: Any, cta: Any, status: Any, polls: Any
    ):
        if cta == 0:
            peer = T.get_thread_binding()
            if peer < ranks:
                T.atomic_store(signals[peer, rank], epochs[rank, 0] + step, memory_order="release")
                polls[0] = 0
                while (
                    T.atomic_load(signals[rank, peer], memory_order="acquire") - (epochs[rank, 0] + step) < 0
                ) and (polls[0] < c.max_polls):
                    polls[0] = polls[0] + 1
                if polls[0] >= c.max_polls:
                    T.atomic_max(status[rank, 0], (phase << PHASE_SHIFT) + peer)

    @T.macro
    def find(firsts: Any, block_expert: Any, rank: Any, number: Any, look: Any, upcoming: Any, later: Any):
        """Put the first step and the expert of product `number` in `upcoming`; step -1: there is none."""
        while (look[0] < g.num_waves) and (number >= firsts[rank, look[0] + 1] * tiles):
            look[0] = look[0] + 1
        upcoming[0] = -1
        start = firsts[rank, look[0]]
        blocks = firsts[rank, look[0] + 1] - start
        offset = number - start * tiles
        if offset < blocks * l1_tiles:
            upcoming[1] = block_expert[rank, start + offset // l1_tiles]
            upcoming[0] = upcoming[1] * expert_steps + offset % l1_tiles * l1_steps
        else:
            gap = schedule.gap(g, start, start + blocks, ctas, look[0] == g.num_waves)
            later[0] = offset - blocks * l1_tiles
            if schedule.l2_offset(later[0], gap, ctas) < 0:
                later[0] = later[0] + ctas
            later[0] = schedule.l2_offset(later[0], gap, ctas)
            if later[0] < blocks * l2_tiles:
                upcoming[1] = block_expert[rank, start + later[0] // l2_tiles]
                upcoming[0] = (
                    upcoming[1] * expert_steps + l1_tiles * l1_steps + later[0] % l2_tiles * l2_steps
                )

    @T.macro
    def fetch_weights(words: Any, offsets: Any, rank: Any, step: Any, stage: Any, w_tile: Any, o_tile: Any):
        if step >= 0:
            T.async_copy(words[rank, step, :, :], w_tile[stage, :, :])
            T.async_copy(offsets[rank, step, :], o_tile[stage, :])
        else:
            for _ in T.serial(WEIGHT_COPIES):  # empty groups, so that a wait counts the same in every round
                T.ptx_commit_group()

    @T.macro
    def fetch_rows(
        x_ring: Any, h_ring: Any, rank: Any, kind: Any, row: Any, ko: Any, stage: Any, x_tile: Any
    ):
        if kind == Kind.LINEAR1.value:
            T.async_copy(
                x_ring[rank, row : row + block_m, ko * BLOCK_K : (ko + 1) * BLOCK_K], x_tile[stage, :, :]
            )
        else:
            T.async_copy(
                h_ring[rank, row : row + block_m, ko * BLOCK_K : (ko + 1) * BLOCK_K], x_tile[stage, :, :]
            )

    @T.macro
    def product(
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
        fetched = T.alloc_local((1,), T.int32)
        codes_a = T.alloc_fragment((GROUP_N, 4, 4), T.uint32)
        codes_b = T.alloc_fragment((GROUP_N, 4, 4), T.uint32)
        offset_a = T.alloc_fragment((GROUP_N,), T.int32)
        offset_b = T.alloc_fragment((GROUP_N,), T.int32)
        wide_a = T.alloc_fragment((GROUP_N, BLOCK_K), T.float8_e4m3fn)
        wide_b = T.alloc_fragment((GROUP_N, BLOCK_K), T.float8_e4m3fn)
        part_a = T.alloc_fragment((GROUP_N, block_m), T.float32)
        T.clear(acc_a)
        T.clear(acc_b)
        for ko in T.serial(count):
            # All but the newest stages have arrived for this thread; then for all, and then for the tensor
            # core. The stage that is fetched next was read in the round before.
            T.ptx_wait_group(COPIES * (ahead - 1))
            T.fence_proxy_async()
            T.sync_threads()
            # Weights are fetched on into the next product, rows to the end of this one.
            if ko + ahead < count:
                fetched[0] = step + ko + ahead
            else:
                fetched[0] = T.if_then_else(next_step >= 0, next_step + ko + ahead - count, -1)
            fetch_weights(words, offsets, rank, fetched[0], (ko + ahead) % stages, w_tile, o_tile)
            if ko + ahead < count:
                fetch_rows(x_ring, h_ring, rank, kind, row, ko + ahead, (ko + ahead) % stages, x_tile)
            else:
                T.ptx_commit_group()
            for i in T.Parallel(GROUP_N):
                offset_a[i] = o_tile[ko % stages, i]
                offset_b[i] = o_tile[ko % stages, GROUP_N + i]
            for i, t, q in T.Parallel(GROUP_N, 4, 4):
                codes_a[i, t, q] = w_tile[ko % stages, i, t * 4 + q]
            for i, q, h, t in T.Parallel(GROUP_N, 4, 2, 4):
                T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
                    "handle",
                    "dsv4_store_b32",
                    T.address_of(wide_a[i, q * SCALE_K + h * 16 + t * 4]),
                    widen(codes_a[i, t, q], (offset_a[i] >> (8 * q)) & 0xFF, h),
                )
            T.wgmma_gemm(
                wide_a,
                x_tile[ko % stages, :, :],
                part_a,
                transpose_B=True,
                clear_accum=True,
                policy=rows_policy,
            )
            for i, t, q in T.Parallel(GROUP_N, 4, 4):
                codes_b[i, t, q] = w_tile[ko % stages, GROUP_N + i, t * 4 + q]
            for i, q, h, t in T.Parallel(GROUP_N, 4, 2, 4):
                T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
                    "handle",
                    "dsv4_store_b32",
                    T.address_of(wide_b[i, q * SCALE_K + h * 16 + t * 4]),
                    widen(codes_b[i, t, q], (offset_b[i] >> (8 * q)) & 0xFF, h),
                )
            if in_turn:
                # Two sets of partial sums would not fit: the second product waits for the first.
                T.wait_wgmma(0)
                for i, j in T.Parallel(GROUP_N, block_m):
                    acc_a[i, j] += part_a[i, j] * scales[ko, j]
                T.gemm(
                    wide_b,
                    x_tile[ko % stages, :, :],
                    part_a,
                    transpose_B=True,
                    clear_accum=True,
                    policy=rows_policy,
                )
                for i, j in T.Parallel(GROUP_N, block_m):
                    acc_b[i, j] += part_a[i, j] * scales[ko, j]
            else:
                part_b = T.alloc_fragment((GROUP_N, block_m), T.float32)
                # Plain gemm waits for both products.
                T.gemm(
                    wide_b,
                    x_tile[ko % stages, :, :],
                    part_b,
                    transpose_B=True,
                    clear_accum=True,
                    policy=rows_policy,
                )
                for i, j in T.Parallel(GROUP_N, block_m):
                    acc_a[i, j] += part_a[i, j] * scales[ko, j]
                for i, j in T.Parallel(GROUP_N, block_m):
                    acc_b[i, j] += part_b[i, j] * scales[ko, j]

    @T.prim_func
    def megamoe_kernel(
        # every rank's inputs and weights (`weights.Packed`)
        x: T.Tensor[(ranks, tokens, hidden), T.float8_e4m3fn],
        x_scale: T.Tensor[(ranks, tokens, hidden // BLOCK_K), T.uint8],
        topk_idx: T.Tensor[(ranks, tokens, c.topk), T.int32],
        words: T.Tensor[(ranks, c.num_experts * expert_steps, TILE_N, STEP_WORDS), T.uint32],
        offsets: T.Tensor[(ranks, c.num_experts * expert_steps, TILE_N), T.int32],
        factors: T.Tensor[(ranks, c.num_experts * tiles, TILE_N), T.float32],
        # the plan of the rows that each rank receives
        firsts: T.Tensor[(ranks, firsts_len), T.int32],
        block_expert: T.Tensor[(ranks, pool), T.int32],
        row_source: T.Tensor[(ranks, pool * block_m), T.int32],
        row_target: T.Tensor[(ranks, pool * block_m), T.int32],
        row_weight: T.Tensor[(ranks, pool * block_m), T.float32],
        # rings, combine buffer, signals
        x_ring: T.Tensor[(ranks, x_rows, hidden), T.float8_e4m3fn],
        x_ring_scale: T.Tensor[(ranks, x_rows, hidden // BLOCK_K), T.uint8],
        h_ring: T.Tensor[(ranks, h_rows, inter), T.float8_e4m3fn],
        h_ring_scale: T.Tensor[(ranks, h_rows, inter // BLOCK_K), T.uint8],
        combine: T.Tensor[(ranks * c.topk * tokens, hidden), T.bfloat16],
        dispatched: T.Tensor[(ranks, pool), T.int32],
        l1_done: T.Tensor[(ranks, pool), T.int32],
        l2_done: T.Tensor[(ranks, pool), T.int32],
        grid_word: T.Tensor[(ranks, 1), T.uint32],
        signals: T.Tensor[(ranks, ranks), T.int32],
        epochs: T.Tensor[(ranks, 1), T.int32],
        status: T.Tensor[(ranks, 1), T.int32],
        y: T.Tensor[(ranks, tokens, hidden), T.bfloat16],
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
            upcoming = T.alloc_local((2,), T.int32)  # first step and expert of this CTA's next product
            # What steers a product is kept in registers: put into every index, it takes the compiler minutes
            # to simplify.
            first_step = T.alloc_local((1,), T.int32)
            block = T.alloc_local((1,), T.int32)
            tile = T.alloc_local((1,), T.int32)
            slot_row = T.alloc_local((1,), T.int32)
            out_row = T.alloc_local((1,), T.int32)
            kind = T.alloc_local((1,), T.int32)
            count = T.alloc_local((1,), T.int32)
            number = T.alloc_local((1,), T.int32)
            x_tile = T.alloc_shared((stages, block_m, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((stages, TILE_N, STEP_WORDS), T.uint32)
            o_tile = T.alloc_shared((stages, TILE_N), T.int32)
            scales = T.alloc_shared((widest, block_m), T.float32)
            out_tile = T.alloc_shared((block_m, GROUP_N), T.bfloat16)
            h_frag = T.alloc_fragment((block_m, GROUP_N), T.bfloat16)
            magnitude = T.alloc_fragment((block_m, GROUP_N), T.int32)
            amax = T.alloc_fragment((block_m,), T.int32)
            exponent = T.alloc_fragment((block_m,), T.int32)
            factor_a = T.alloc_fragment((GROUP_N,), T.float32)
            factor_b = T.alloc_fragment((GROUP_N,), T.float32)
            acc_a = T.alloc_fragment((GROUP_N, block_m), T.float32)
            acc_b = T.alloc_fragment((GROUP_N, block_m), T.float32)
            piece = T.alloc_fragment((chunk,), T.bfloat16)
            total = T.alloc_fragment((chunk,), T.float32)
            T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})

            # The first product's weights travel while the ranks meet and rows are dispatched.
            look[0] = 0
            find(firsts, block_expert, rank, cta, look, upcoming, later)
            for stage in T.serial(ahead):
                fetch_weights(
                    words,
                    offsets,
                    rank,
                    T.if_then_else(upcoming[0] >= 0, upcoming[0] + stage, -1),
                    stage,
                    w_tile,
                    o_tile,
                )
            for b in T.serial(T.ceildiv(pool - cta * THREADS - tx, ctas * THREADS)):
                dispatched[rank, cta * THREADS + tx + b * ctas * THREADS] = 0
                l1_done[rank, cta * THREADS + tx + b * ctas * THREADS] = 0
                l2_done[rank, cta * THREADS + tx + b * ctas * THREADS] = 0
            if c.cooperative:
                T.sync_grid()
            else:
                grid_barrier(grid_word, rank, cta, status, polls, old)
            if ranks > 1:
                rank_barrier(signals, epochs, 1, PHASE_START, rank, cta, status, polls)
                grid_barrier(grid_word, rank, cta, status, polls, old)

            for segment in T.serial(g.num_waves + 1):
                before = firsts[rank, segment]
                first = firsts[rank, segment + 1]
                after = firsts[rank, segment + 2]
                start = schedule.share_start(first * parts, cta, ctas)
                for turn in T.serial(T.ceildiv(after * parts - start, ctas)):
                    block[0] = (start + turn * ctas) // parts
                    tile[0] = (start + turn * ctas) % parts
                    slot_row[0] = schedule.x_slot(g, block[0]) * block_m + tile[0] * part_rows
                    if block[0] >= g.x_ring:
                        wait(
                            l1_done,
                            rank,
                            schedule.x_freed_by(g, block[0]),
                            l1_tiles,
                            (PHASE_DISPATCH << PHASE_SHIFT) + block[0],
                            status,
                            polls,
                        )
                    for i, ch in T.Parallel(part_rows, hidden):
                        src = row_source[rank, block[0] * block_m + tile[0] * part_rows + i]
                        x_ring[rank, slot_row[0] + i, ch] = T.if_then_else(
                            src >= 0, x[src // tokens, src % tokens, ch], T.cast(0, T.float8_e4m3fn)
                        )
                    for i, kb in T.Parallel(part_rows, hidden // BLOCK_K):
                        src = row_source[rank, block[0] * block_m + tile[0] * part_rows + i]
                        x_ring_scale[rank, slot_row[0] + i, kb] = T.if_then_else(
                            src >= 0, x_scale[src // tokens, src % tokens, kb], T.cast(127, "uint8")
                        )
                    signal(dispatched, rank, block[0], previous)

                begin = schedule.share_start(before * tiles, cta, ctas)
                left_out = schedule.gap(g, before, first, ctas, segment == g.num_waves)
                for turn in T.serial(T.ceildiv(first * tiles + left_out - begin, ctas)):
                    offset = begin + turn * ctas - before * tiles
                    num_l1 = schedule.l1_tasks(g, before, first)
                    first_step[0] = upcoming[0]
                    kind[0] = 0
                    if offset < num_l1:
                        kind[0] = Kind.LINEAR1.value
                        count[0] = l1_steps
                        block[0] = before + offset // l1_tiles
                        tile[0] = offset % l1_tiles
                        slot_row[0] = schedule.x_slot(g, block[0]) * block_m
                        out_row[0] = schedule.h_slot(g, block[0]) * block_m
                        number[0] = upcoming[1] * tiles + tile[0]
                        if block[0] >= g.h_ring:
                            wait(
                                l2_done,
                                rank,
                                schedule.h_freed_by(g, block[0]),
                                l2_tiles,
                                (PHASE_LINEAR1 << PHASE_SHIFT) + block[0],
                                status,
                                polls,
                            )
                        wait(
                            dispatched,
                            rank,
                            block[0],
                            parts,
                            (PHASE_LINEAR1 << PHASE_SHIFT) + block[0],
                            status,
                            polls,
                        )
                    else:
                        later[0] = schedule.l2_offset(offset - num_l1, left_out, ctas)
                        if (later[0] >= 0) and (later[0] < (first - before) * l2_tiles):
                            kind[0] = Kind.LINEAR2.value
                            count[0] = l2_steps
                            block[0] = before + later[0] // l2_tiles
                            tile[0] = later[0] % l2_tiles
                            slot_row[0] = schedule.h_slot(g, block[0]) * block_m
                            number[0] = upcoming[1] * tiles + l1_tiles + tile[0]
                            wait(
                                l1_done,
                                rank,
                                block[0],
                                l1_tiles,
                                (PHASE_LINEAR2 << PHASE_SHIFT) + block[0],
                                status,
                                polls,
                            )
                    if kind[0] > 0:
                        for stage in T.serial(ahead):
                            fetch_rows(x_ring, h_ring, rank, kind[0], slot_row[0], stage, stage, x_tile)
                            for _ in T.serial(WEIGHT_COPIES):
                                T.ptx_commit_group()
                        if kind[0] == Kind.LINEAR1.value:
                            for kb, j in T.Parallel(l1_steps, block_m):
                                scales[kb, j] = ue8m0_to_f32(
                                    T.cast(x_ring_scale[rank, slot_row[0] + j, kb], "int32"), 0
                                )
                        else:
                            for kb, j in T.Parallel(l2_steps, block_m):
                                scales[kb, j] = ue8m0_to_f32(
                                    T.cast(h_ring_scale[rank, slot_row[0] + j, kb], "int32"), 0
                                )
                        for i in T.Parallel(GROUP_N):
                            factor_a[i] = factors[rank, number[0], i]
                            factor_b[i] = factors[rank, number[0], GROUP_N + i]
                        find(firsts, block_expert, rank, begin + (turn + 1) * ctas, look, upcoming, later)
                        product(
                            x_ring,
                            h_ring,
                            words,
                            offsets,
                            rank,
                            kind[0],
                            slot_row[0],
                            count[0],
                            first_step[0],
                            upcoming[0],
                            x_tile,
                            w_tile,
                            o_tile,
                            scales,
                            acc_a,
                            acc_b,
                        )
                        if kind[0] == Kind.LINEAR1.value:
                            for i, j in T.Parallel(GROUP_N, block_m):
                                gate = _round(acc_a[i, j] * factor_a[i])
                                up = _round(acc_b[i, j] * factor_b[i])
                                out_tile[j, i] = T.cast(
                                    swiglu(gate, up, row_weight[rank, block[0] * block_m + j], c.clamp),
                                    "bfloat16",
                                )
                            T.sync_threads()
                            T.copy(out_tile, h_frag)
                            for i, j in T.Parallel(block_m, GROUP_N):
                                magnitude[i, j] = (
                                    T.cast(T.reinterpret(h_frag[i, j], "uint16"), "int32") & BF16_MAGNITUDE
                                )
                            T.reduce_max(magnitude, amax, dim=1)
                            for i in T.Parallel(block_m):
                                exponent[i] = ue8m0_scale(amax[i], AMAX_MIN, 1.0 / E4M3_MAX)
                            for i in T.Parallel(block_m):
                                h_ring_scale[rank, out_row[0] + i, tile[0]] = T.cast(exponent[i], "uint8")
                            for i, j in T.Parallel(block_m, GROUP_N):
                                scaled = T.cast(h_frag[i, j], "float32") * ue8m0_reciprocal(exponent[i])
                                h_ring[rank, out_row[0] + i, tile[0] * GROUP_N + j] = T.cast(
                                    T.if_then_else(
                                        exponent[i] == UE8M0_NAN,
                                        T.reinterpret(F32_NAN, "float32"),
                                        T.clamp(scaled, -E4M3_MAX, E4M3_MAX),
                                    ),
                                    T.float8_e4m3fn,
                                )
                            signal(l1_done, rank, block[0], previous)
                        else:
                            for i, j in T.Parallel(GROUP_N, block_m):
                                out_tile[j, i] = T.cast(acc_a[i, j] * factor_a[i], "bfloat16")
                            T.sync_threads()
                            for i, j in T.Parallel(block_m, GROUP_N):
                                target = row_target[rank, block[0] * block_m + i]
                                if target >= 0:
                                    combine[target, tile[0] * TILE_N + j] = out_tile[i, j]
                            T.sync_threads()
                            for i, j in T.Parallel(GROUP_N, block_m):
                                out_tile[j, i] = T.cast(acc_b[i, j] * factor_b[i], "bfloat16")
                            T.sync_threads()
                            for i, j in T.Parallel(block_m, GROUP_N):
                                target = row_target[rank, block[0] * block_m + i]
                                if target >= 0:
                                    combine[target, tile[0] * TILE_N + GROUP_N + j] = out_tile[i, j]
                            signal(l2_done, rank, block[0], previous)

            grid_barrier(grid_word, rank, cta, status, polls, old)
            if ranks > 1:
                rank_barrier(signals, epochs, 2, PHASE_COMBINE, rank, cta, status, polls)
                grid_barrier(grid_word, rank, cta, status, polls, old)
                if cta == 0 and tx == 0:
                    epochs[rank, 0] = epochs[rank, 0] + 2

            for turn in T.serial(T.ceildiv(tokens * c.combine_parts - cta, ctas)):
                token = (cta + turn * ctas) // c.combine_parts
                channel = (cta + turn * ctas) % c.combine_parts * chunk
                T.clear(total)
                for slot in T.unroll(c.topk):
                    # Read whether it is there or not, so that the slots' reads are under way together; a sum
                    # that starts at +0 keeps its bits when +0 is added.
                    for ch in T.Parallel(chunk):
                        piece[ch] = combine[(rank * c.topk + slot) * tokens + token, channel + ch]
                    for ch in T.Parallel(chunk):
                        total[ch] += T.if_then_else(
                            topk_idx[rank, token, slot] >= 0,
                            T.cast(piece[ch], "float32"),
                            T.float32(0),  # pyright: ignore[reportCallIssue]
                        )
                for ch in T.Parallel(chunk):
                    y[rank, token, channel + ch] = T.cast(total[ch], "bfloat16")

    return megamoe_kernel


def _round(value: Any) -> Any:
    return T.cast(T.cast(value, "bfloat16"), "float32")


def swiglu(gate: Any, up: Any, weight: Any, clamp: float) -> Any:
    """Return silu(min(gate, clamp)) * clamp(up, -clamp, clamp) * weight; nan stays nan."""
    low = T.if_then_else(gate > clamp, T.float32(clamp), gate)  # pyright: ignore[reportCallIssue]
    high = T.if_then_else(up > clamp, T.float32(clamp), T.if_then_else(up < -clamp, T.float32(-clamp), up))  # pyright: ignore[reportCallIssue, reportOperatorIssue]
    return low / (T.float32(1) + T.exp(-low)) * high * weight  # pyright: ignore[reportCallIssue, reportOperatorIssue]
