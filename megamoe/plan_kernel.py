"""`plan.make_plan` as one small kernel, a CTA for each expert; with several ranks, these meet first.

The ranks' inputs are complete when they have met: the fused kernel, launched behind, reads those of the peers
without a signal. Every CTA signals and waits for itself, so that none of them need be resident together.

A thread owns consecutive (rank, token, slot) entries. It counts how many of them go to each expert; the
counts of the threads before it say where its own rows begin. So rows stand in the order of the entries.
"""

from typing import Any

from tilelang import language as T

from megamoe.buffer import combine_row
from megamoe.config import Config
from megamoe.signals import PHASE_START, rank_barrier
from verify.externs import signals as signals_between_gpus

THREADS = 256
AT_ONCE = 8  # entries that a thread reads together: one after the other each waits for the memory


def make_kernel(config: Config, at_once: int = AT_ONCE) -> Any:
    """Return the PrimFunc; places past a rank's last block are left as they are."""
    c, g = config, config.geometry
    ranks, tokens, topk, experts, block_m = c.num_ranks, c.tokens, c.topk, c.num_experts, c.block_m
    entries = ranks * tokens * topk
    share = -(-entries // THREADS)
    pool, firsts_len = c.pool_blocks, g.num_waves + 3
    local, first_expert = c.launch_ranks, c.first_rank * c.num_experts

    @T.macro
    def look_up(first: Any, group: Any, rank: Any, count: Any, topk_idx: Any, chosen: Any):
        """Put the experts of a thread's next entries, as numbers of its rank, in `chosen`; -1: no entry."""
        for i in T.unroll(at_once):
            number = group * at_once + i
            chosen[i] = T.if_then_else(
                (number < share) and (first + number < count[0]),
                topk_idx[first + number] - first_expert - rank * experts,
                -1,
            )

    @T.prim_func
    def megamoe_plan_kernel(
        topk_idx: T.Tensor[(ranks * tokens * topk,), T.int32],
        topk_weights: T.Tensor[(ranks * tokens * topk,), T.float32],
        firsts: T.Tensor[(local, firsts_len), T.int32],
        block_expert: T.Tensor[(local, pool), T.int32],
        row_source: T.Tensor[(local, pool * block_m), T.int32],
        row_target: T.Tensor[(local, pool * block_m), T.int32],
        row_weight: T.Tensor[(local, pool * block_m), T.float32],
        counts: T.Tensor[(local, experts), T.int32],
        signals: T.Tensor[(ranks, c.signal_words), T.int32],
        epochs: T.Tensor[(local, 1), T.int32],
        status: T.Tensor[(local, c.status_words), T.int32],
    ):
        with T.Kernel(experts, local, threads=THREADS) as (mine, rank):
            T.import_source(signals_between_gpus.source())
            # Peers write these while the kernel runs.
            T.annotate_restrict_buffers(topk_idx, topk_weights, signals, status)
            tx = T.get_thread_binding()
            polls = T.alloc_local((1,), T.int32)
            count_entries = T.alloc_local((1,), T.int32)
            seen = T.alloc_shared(
                (THREADS, experts + 1), T.int32
            )  # of a thread; rows begin in different banks
            count = T.alloc_shared((experts,), T.int32)
            total = T.alloc_local((1,), T.int32)
            place = T.alloc_local((1,), T.int32)
            chosen = T.alloc_local((at_once,), T.int32)
            before = T.alloc_local((1,), T.int32)
            rows = T.alloc_local((1,), T.int32)
            blocks = T.alloc_local((1,), T.int32)
            for e in T.serial(experts):
                seen[tx, e] = 0
            count_entries[0] = entries
            if ranks > 1:
                rank_barrier(c, signals, epochs, 1, PHASE_START, rank, status, polls)
                T.sync_threads()
                # Without a peer there is nothing to do: its routing may be half of one call, half of another.
                if T.atomic_load(status[rank, 0], memory_order="relaxed") != 0:
                    count_entries[0] = 0
            for group in T.serial(-(-share // at_once)):
                look_up(tx * share, group, rank, count_entries, topk_idx, chosen)
                for i in T.unroll(at_once):
                    if (chosen[i] >= 0) and (chosen[i] < experts):
                        seen[tx, chosen[i]] = seen[tx, chosen[i]] + 1
            T.sync_threads()
            total[0] = 0
            place[0] = 0
            for t in T.serial(THREADS):
                if t < tx:
                    place[0] = place[0] + seen[t, mine]
                if tx < experts:
                    total[0] = total[0] + seen[t, tx]
            # The compiler lays `count` where `seen` was: it may be written once nobody reads any more.
            T.sync_threads()
            if tx < experts:
                count[tx] = total[0]
            T.sync_threads()
            rows[0] = count[mine]
            blocks[0] = (rows[0] + (block_m - 1)) // block_m
            before[0] = 0
            for e in T.serial(experts):
                if e < mine:
                    before[0] = before[0] + (count[e] + (block_m - 1)) // block_m
            for group in T.serial(-(-share // at_once)):
                look_up(tx * share, group, rank, count_entries, topk_idx, chosen)
                for i in T.unroll(at_once):
                    if chosen[i] == mine:
                        entry = tx * share + group * at_once + i
                        source = entry // topk
                        slot = entry % topk
                        row = before[0] * block_m + place[0]
                        row_source[rank, row] = source
                        row_target[rank, row] = combine_row(
                            source // tokens, slot, source % tokens, tokens, c.combine_rows
                        )
                        row_weight[rank, row] = topk_weights[entry]
                        place[0] = place[0] + 1
            # The rest of the expert's last block.
            for i in T.serial(T.ceildiv(block_m, THREADS)):
                row = before[0] * block_m + rows[0] + i * THREADS + tx
                if row < (before[0] + blocks[0]) * block_m:
                    row_source[rank, row] = -1
                    row_target[rank, row] = -1
                    row_weight[rank, row] = T.float32(0)  # pyright: ignore[reportCallIssue]
            for i in T.serial(T.ceildiv(blocks[0] - tx, THREADS)):
                block_expert[rank, before[0] + i * THREADS + tx] = mine
            if tx == 0:
                counts[rank, mine] = rows[0]
            if mine == 0:
                for i in T.serial(T.ceildiv(firsts_len - tx, THREADS)):
                    total[0] = 0
                    for e in T.serial(experts):
                        if e < (i * THREADS + tx - 1) * c.wave_experts:
                            total[0] = total[0] + (count[e] + (block_m - 1)) // block_m
                    firsts[rank, i * THREADS + tx] = total[0]

    return megamoe_plan_kernel
