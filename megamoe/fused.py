"""The expert layer as one persistent kernel: dispatch, linear 1, SwiGLU, linear 2, combine. Experimental.

Every CTA of a rank runs its share of the rank's tasks in the order of `schedule`; tasks wait on counters
of finished tasks that come before them in that order. Several ranks may be *virtual*: their buffers lie
on one GPU and their CTAs share it, with the same code and the same signals. Design: docs/megamoe.md.
"""

from dataclasses import dataclass
from typing import Any

from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout

from dsv4_kernels.gemm.fp8_fp4_gemm_folded import BLOCK_K, SCALE_K, WORD, _widen
from dsv4_kernels.tile.scale import (
    BF16_MAGNITUDE,
    F32_NAN,
    UE8M0_NAN,
    ue8m0_reciprocal,
    ue8m0_scale,
    ue8m0_to_f32,
)
from megamoe import schedule
from megamoe.schedule import Geometry
from verify import externs

THREADS = 256
GROUP_N = 128  # weight rows of one product; a tile has two: gate and up, or neighbours
TILE_N = 2 * GROUP_N
BLOCK_WORDS = BLOCK_K // WORD
COPIES = 3  # groups of asynchronous copies a stage
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
        num_stages: depth of the products' pipelines, of 256 channels a stage.
        clamp: bound of the SwiGLU's inputs.
        max_polls: of one wait, before the watchdog gives up; a poll takes about a microsecond.
        cooperative: launch cooperatively, so that the driver refuses CTAs that cannot all be resident.
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
    ctas, parts, l1_tiles, l2_tiles = c.ctas, c.dispatch_parts, g.l1_tiles, g.l2_tiles
    x_rows, h_rows = g.x_ring * block_m, g.h_ring * block_m
    widest = max(hidden, inter) // BLOCK_K
    rows_policy = T.GemmWarpPolicy.FullRow
    source = externs.source("dsv4_prmt", "dsv4_store_b32")
    firsts_len = g.num_waves + 3

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
    def fetch(
        ring: Any,
        words: Any,
        rank: Any,
        row: Any,
        expert: Any,
        row_a: Any,
        row_b: Any,
        ko: Any,
        channels: int,
        x_tile: Any,
        tile_a: Any,
        tile_b: Any,
    ):
        stage = ko % c.num_stages
        if ko < channels // BLOCK_K:
            T.async_copy(
                ring[rank, row : row + block_m, ko * BLOCK_K : (ko + 1) * BLOCK_K], x_tile[stage, :, :]
            )
            T.async_copy(
                words[rank, expert, row_a : row_a + GROUP_N, ko * BLOCK_WORDS : (ko + 1) * BLOCK_WORDS],
                tile_a[stage, :, :],
            )
            T.async_copy(
                words[rank, expert, row_b : row_b + GROUP_N, ko * BLOCK_WORDS : (ko + 1) * BLOCK_WORDS],
                tile_b[stage, :, :],
            )
        else:
            for _ in T.serial(COPIES):  # empty groups, so that the wait counts the same in every round
                T.ptx_commit_group()

    @T.macro
    def product(
        ring: Any,
        ring_scale: Any,
        words: Any,
        offsets: Any,
        rank: Any,
        row: Any,
        expert: Any,
        row_a: Any,
        row_b: Any,
        channels: int,
        x_tile: Any,
        tile_a: Any,
        tile_b: Any,
        scales: Any,
        acc_a: Any,
        acc_b: Any,
    ):
        codes_a = T.alloc_fragment((GROUP_N, 4, 4), T.uint32)
        codes_b = T.alloc_fragment((GROUP_N, 4, 4), T.uint32)
        offset_a = T.alloc_fragment((GROUP_N,), T.int32)
        offset_b = T.alloc_fragment((GROUP_N,), T.int32)
        next_a = T.alloc_fragment((GROUP_N,), T.int32)
        next_b = T.alloc_fragment((GROUP_N,), T.int32)
        wide_a = T.alloc_fragment((GROUP_N, BLOCK_K), T.float8_e4m3fn)
        wide_b = T.alloc_fragment((GROUP_N, BLOCK_K), T.float8_e4m3fn)
        part_a = T.alloc_fragment((GROUP_N, block_m), T.float32)
        part_b = T.alloc_fragment((GROUP_N, block_m), T.float32)
        for kb, j in T.Parallel(channels // BLOCK_K, block_m):
            scales[kb, j] = ue8m0_to_f32(T.cast(ring_scale[rank, row + j, kb], "int32"), 0)
        T.clear(acc_a)
        T.clear(acc_b)
        for i in T.Parallel(GROUP_N):
            next_a[i] = offsets[rank, expert, row_a + i, 0]
        for i in T.Parallel(GROUP_N):
            next_b[i] = offsets[rank, expert, row_b + i, 0]
        for ahead in T.serial(c.num_stages - 1):
            fetch(ring, words, rank, row, expert, row_a, row_b, ahead, channels, x_tile, tile_a, tile_b)
        for ko in T.serial(channels // BLOCK_K):
            # All but the newest stages have arrived for this thread; then for all, and then for the tensor
            # core. The stage that is fetched next was read in the round before.
            T.ptx_wait_group(COPIES * (c.num_stages - 2))
            T.fence_proxy_async()
            T.sync_threads()
            fetch(
                ring,
                words,
                rank,
                row,
                expert,
                row_a,
                row_b,
                ko + c.num_stages - 1,
                channels,
                x_tile,
                tile_a,
                tile_b,
            )
            # Offsets are asked for one round ahead, so that they arrive under a product.
            for i in T.Parallel(GROUP_N):
                offset_a[i] = next_a[i]
                offset_b[i] = next_b[i]
            if ko + 1 < channels // BLOCK_K:
                for i in T.Parallel(GROUP_N):
                    next_a[i] = offsets[rank, expert, row_a + i, ko + 1]
                for i in T.Parallel(GROUP_N):
                    next_b[i] = offsets[rank, expert, row_b + i, ko + 1]
            for i, t, q in T.Parallel(GROUP_N, 4, 4):
                codes_a[i, t, q] = tile_a[ko % c.num_stages, i, t * 4 + q]
            for i, q, h, t in T.Parallel(GROUP_N, 4, 2, 4):
                T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
                    "handle",
                    "dsv4_store_b32",
                    T.address_of(wide_a[i, q * SCALE_K + h * 16 + t * 4]),
                    _widen(codes_a[i, t, q], (offset_a[i] >> (8 * q)) & 0xFF, h),
                )
            T.wgmma_gemm(
                wide_a,
                x_tile[ko % c.num_stages, :, :],
                part_a,
                transpose_B=True,
                clear_accum=True,
                policy=rows_policy,
            )
            for i, t, q in T.Parallel(GROUP_N, 4, 4):
                codes_b[i, t, q] = tile_b[ko % c.num_stages, i, t * 4 + q]
            for i, q, h, t in T.Parallel(GROUP_N, 4, 2, 4):
                T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
                    "handle",
                    "dsv4_store_b32",
                    T.address_of(wide_b[i, q * SCALE_K + h * 16 + t * 4]),
                    _widen(codes_b[i, t, q], (offset_b[i] >> (8 * q)) & 0xFF, h),
                )
            # Plain gemm waits for both products.
            T.gemm(
                wide_b,
                x_tile[ko % c.num_stages, :, :],
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
        # every rank's inputs and weights
        x: T.Tensor[(ranks, tokens, hidden), T.float8_e4m3fn],
        x_scale: T.Tensor[(ranks, tokens, hidden // BLOCK_K), T.uint8],
        topk_idx: T.Tensor[(ranks, tokens, c.topk), T.int32],
        l1_words: T.Tensor[(ranks, c.num_experts, 2 * inter, hidden // WORD), T.uint32],
        l1_offsets: T.Tensor[(ranks, c.num_experts, 2 * inter, hidden // BLOCK_K), T.int32],
        l1_factors: T.Tensor[(ranks, c.num_experts, 2 * inter), T.float32],
        l2_words: T.Tensor[(ranks, c.num_experts, hidden, inter // WORD), T.uint32],
        l2_offsets: T.Tensor[(ranks, c.num_experts, hidden, inter // BLOCK_K), T.int32],
        l2_factors: T.Tensor[(ranks, c.num_experts, hidden), T.float32],
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
            segment = T.alloc_var(T.int32)
            x_tile = T.alloc_shared((c.num_stages, block_m, BLOCK_K), T.float8_e4m3fn)
            tile_a = T.alloc_shared((c.num_stages, GROUP_N, BLOCK_WORDS), T.uint32)
            tile_b = T.alloc_shared((c.num_stages, GROUP_N, BLOCK_WORDS), T.uint32)
            scales = T.alloc_shared((widest, block_m), T.float32)
            h_tile = T.alloc_shared((block_m, GROUP_N), T.bfloat16)
            h_frag = T.alloc_fragment((block_m, GROUP_N), T.bfloat16)
            magnitude = T.alloc_fragment((block_m, GROUP_N), T.int32)
            amax = T.alloc_fragment((block_m,), T.int32)
            exponent = T.alloc_fragment((block_m,), T.int32)
            acc_a = T.alloc_fragment((GROUP_N, block_m), T.float32)
            acc_b = T.alloc_fragment((GROUP_N, block_m), T.float32)
            out_a = T.alloc_shared((block_m, GROUP_N), T.bfloat16)
            out_b = T.alloc_shared((block_m, GROUP_N), T.bfloat16)
            total = T.alloc_fragment((hidden,), T.float32)
            T.annotate_layout({tile: make_full_bank_swizzled_layout(tile) for tile in (h_tile, out_a, out_b)})

            for b in T.serial(T.ceildiv(pool - cta * THREADS - tx, ctas * THREADS)):
                dispatched[rank, cta * THREADS + tx + b * ctas * THREADS] = 0
                l1_done[rank, cta * THREADS + tx + b * ctas * THREADS] = 0
                l2_done[rank, cta * THREADS + tx + b * ctas * THREADS] = 0
            if c.cooperative:
                T.sync_grid()
            else:
                grid_barrier(grid_word, rank, cta, status, polls, old)
            rank_barrier(signals, epochs, 1, PHASE_START, rank, cta, status, polls)
            grid_barrier(grid_word, rank, cta, status, polls, old)

            segment = 0
            num_tasks = schedule.segment_start(g, firsts[rank, firsts_len - 1], firsts[rank, firsts_len - 1])
            for turn in T.serial(T.ceildiv(num_tasks - cta, ctas)):
                task = cta + turn * ctas
                while task >= schedule.segment_start(g, firsts[rank, segment + 1], firsts[rank, segment + 2]):
                    segment = segment + 1
                before = firsts[rank, segment]
                first = firsts[rank, segment + 1]
                after = firsts[rank, segment + 2]
                offset = task - schedule.segment_start(g, before, first)
                num_dispatch = schedule.dispatch_tasks(g, first, after)
                num_l1 = schedule.l1_tasks(g, before, first)
                if offset < num_dispatch:
                    block = first + offset // parts
                    part = offset % parts
                    if block >= g.x_ring:
                        wait(
                            l1_done,
                            rank,
                            schedule.x_freed_by(g, block),
                            l1_tiles,
                            (PHASE_DISPATCH << PHASE_SHIFT) + block,
                            status,
                            polls,
                        )
                    for i, ch in T.Parallel(part_rows, hidden):
                        src = row_source[rank, block * block_m + part * part_rows + i]
                        x_ring[rank, schedule.x_slot(g, block) * block_m + part * part_rows + i, ch] = (
                            T.if_then_else(
                                src >= 0, x[src // tokens, src % tokens, ch], T.cast(0, T.float8_e4m3fn)
                            )
                        )
                    for i, kb in T.Parallel(part_rows, hidden // BLOCK_K):
                        src = row_source[rank, block * block_m + part * part_rows + i]
                        x_ring_scale[rank, schedule.x_slot(g, block) * block_m + part * part_rows + i, kb] = (
                            T.if_then_else(
                                src >= 0, x_scale[src // tokens, src % tokens, kb], T.cast(127, "uint8")
                            )
                        )
                    signal(dispatched, rank, block, previous)
                elif offset < num_dispatch + num_l1:
                    block = before + (offset - num_dispatch) // l1_tiles
                    tile = (offset - num_dispatch) % l1_tiles
                    expert = block_expert[rank, block]
                    if block >= g.h_ring:
                        wait(
                            l2_done,
                            rank,
                            schedule.h_freed_by(g, block),
                            l2_tiles,
                            (PHASE_LINEAR1 << PHASE_SHIFT) + block,
                            status,
                            polls,
                        )
                    wait(
                        dispatched, rank, block, parts, (PHASE_LINEAR1 << PHASE_SHIFT) + block, status, polls
                    )
                    product(
                        x_ring,
                        x_ring_scale,
                        l1_words,
                        l1_offsets,
                        rank,
                        schedule.x_slot(g, block) * block_m,
                        expert,
                        tile * GROUP_N,
                        inter + tile * GROUP_N,
                        hidden,
                        x_tile,
                        tile_a,
                        tile_b,
                        scales,
                        acc_a,
                        acc_b,
                    )
                    for i, j in T.Parallel(GROUP_N, block_m):
                        gate = _round(acc_a[i, j] * l1_factors[rank, expert, tile * GROUP_N + i])
                        up = _round(acc_b[i, j] * l1_factors[rank, expert, inter + tile * GROUP_N + i])
                        h_tile[j, i] = T.cast(
                            swiglu(gate, up, row_weight[rank, block * block_m + j], c.clamp), "bfloat16"
                        )
                    T.copy(h_tile, h_frag)
                    for i, j in T.Parallel(block_m, GROUP_N):
                        magnitude[i, j] = (
                            T.cast(T.reinterpret(h_frag[i, j], "uint16"), "int32") & BF16_MAGNITUDE
                        )
                    T.reduce_max(magnitude, amax, dim=1)
                    for i in T.Parallel(block_m):
                        exponent[i] = ue8m0_scale(amax[i], AMAX_MIN, 1.0 / E4M3_MAX)
                    for i in T.Parallel(block_m):
                        h_ring_scale[rank, schedule.h_slot(g, block) * block_m + i, tile] = T.cast(
                            exponent[i], "uint8"
                        )
                    for i, j in T.Parallel(block_m, GROUP_N):
                        scaled = T.cast(h_frag[i, j], "float32") * ue8m0_reciprocal(exponent[i])
                        h_ring[rank, schedule.h_slot(g, block) * block_m + i, tile * GROUP_N + j] = T.cast(
                            T.if_then_else(
                                exponent[i] == UE8M0_NAN,
                                T.reinterpret(F32_NAN, "float32"),
                                T.clamp(scaled, -E4M3_MAX, E4M3_MAX),
                            ),
                            T.float8_e4m3fn,
                        )
                    signal(l1_done, rank, block, previous)
                else:
                    block = before + (offset - num_dispatch - num_l1) // l2_tiles
                    tile = (offset - num_dispatch - num_l1) % l2_tiles
                    expert = block_expert[rank, block]
                    wait(
                        l1_done, rank, block, l1_tiles, (PHASE_LINEAR2 << PHASE_SHIFT) + block, status, polls
                    )
                    product(
                        h_ring,
                        h_ring_scale,
                        l2_words,
                        l2_offsets,
                        rank,
                        schedule.h_slot(g, block) * block_m,
                        expert,
                        tile * TILE_N,
                        tile * TILE_N + GROUP_N,
                        inter,
                        x_tile,
                        tile_a,
                        tile_b,
                        scales,
                        acc_a,
                        acc_b,
                    )
                    for i, j in T.Parallel(GROUP_N, block_m):
                        out_a[j, i] = T.cast(
                            acc_a[i, j] * l2_factors[rank, expert, tile * TILE_N + i], "bfloat16"
                        )
                    for i, j in T.Parallel(GROUP_N, block_m):
                        out_b[j, i] = T.cast(
                            acc_b[i, j] * l2_factors[rank, expert, tile * TILE_N + GROUP_N + i], "bfloat16"
                        )
                    for i, j in T.Parallel(block_m, GROUP_N):
                        target = row_target[rank, block * block_m + i]
                        if target >= 0:
                            combine[target, tile * TILE_N + j] = out_a[i, j]
                    for i, j in T.Parallel(block_m, GROUP_N):
                        target = row_target[rank, block * block_m + i]
                        if target >= 0:
                            combine[target, tile * TILE_N + GROUP_N + j] = out_b[i, j]
                    signal(l2_done, rank, block, previous)

            grid_barrier(grid_word, rank, cta, status, polls, old)
            rank_barrier(signals, epochs, 2, PHASE_COMBINE, rank, cta, status, polls)
            grid_barrier(grid_word, rank, cta, status, polls, old)
            if cta == 0 and tx == 0:
                epochs[rank, 0] = epochs[rank, 0] + 2

            for turn in T.serial(T.ceildiv(tokens - cta, ctas)):
                token = cta + turn * ctas
                T.clear(total)
                for slot in T.serial(c.topk):
                    if topk_idx[rank, token, slot] >= 0:
                        for ch in T.Parallel(hidden):
                            total[ch] += T.cast(
                                combine[(rank * c.topk + slot) * tokens + token, ch], "float32"
                            )
                for ch in T.Parallel(hidden):
                    y[rank, token, ch] = T.cast(total[ch], "bfloat16")

    return megamoe_kernel


def _round(value: Any) -> Any:
    return T.cast(T.cast(value, "bfloat16"), "float32")


def swiglu(gate: Any, up: Any, weight: Any, clamp: float) -> Any:
    """Return silu(min(gate, clamp)) * clamp(up, -clamp, clamp) * weight; nan stays nan."""
    low = T.if_then_else(gate > clamp, T.float32(clamp), gate)  # pyright: ignore[reportCallIssue]
    high = T.if_then_else(up > clamp, T.float32(clamp), T.if_then_else(up < -clamp, T.float32(-clamp), up))  # pyright: ignore[reportCallIssue, reportOperatorIssue]
    return low / (T.float32(1) + T.exp(-low)) * high * weight  # pyright: ignore[reportCallIssue, reportOperatorIssue]
