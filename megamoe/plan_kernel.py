"""`plan.make_plan` as one small kernel, a CTA for each expert; with several ranks, these meet first.

The ranks' inputs are complete when they have met: the fused kernel, launched behind, reads those of the peers
without a signal. Every CTA signals and waits for itself, so that none of them need be resident together.

A thread owns consecutive (rank, token, slot) entries. It counts how many of them go to each expert; the
counts of the threads before it say where its own rows begin. So rows stand in the order of the entries.
Threads first note which entries their expert's rows are; then all of them together look up what belongs to
these: one after the other, a thread's entries would each wait for the memory.
"""

import math
from dataclasses import dataclass
from typing import Any

from tilelang import language as T

from megamoe.buffer import combine_row
from megamoe.config import Config
from megamoe.signals import PHASE_START, rank_barrier
from verify.externs import signals as signals_between_gpus

MOST_THREADS, FEWEST_THREADS, WARP = 512, 256, 32
ENTRIES_A_THREAD = 16  # fewer are not worth more threads
SEEN_BYTES = 192 << 10  # of shared memory, for the counts of all threads
AT_ONCE = 8  # entries that a thread reads together: one after the other each waits for the memory
WORD_BITS = 24  # entries whose marks share a word, at most: without its sign


def threads_of(config: Config) -> int:
    """Return the threads of a CTA: more where each would have many entries, as far as their counts fit."""
    threads = FEWEST_THREADS
    entries = config.num_ranks * config.tokens * config.topk
    while (
        threads < MOST_THREADS
        and entries > threads * ENTRIES_A_THREAD
        and 2 * threads * config.num_experts * 4 <= SEEN_BYTES
    ):
        threads *= 2
    return threads


@dataclass(frozen=True)
class Shares:
    """How entries are shared out.

    Attributes:
        entries: of all ranks.
        threads: of a CTA.
        vector: entries of one load.
        share: entries of a thread.
        at_once: entries that a thread reads together.
        groups: so many at once have their marks in one word.
        words: of a thread's marks.
    """

    entries: int
    threads: int
    vector: int
    share: int
    at_once: int
    groups: int
    words: int


def shares_of(config: Config, at_once: int = AT_ONCE, threads: int | None = None) -> Shares:
    """Return how a kernel's entries are shared out; arguments as of `make_kernel`."""
    entries = config.num_ranks * config.tokens * config.topk
    threads = threads or threads_of(config)
    vector = math.gcd(entries, 4)
    share = -(-entries // (threads * vector)) * vector
    at_once = min(at_once, share)
    groups = min(WORD_BITS // at_once, -(-share // at_once))
    words = -(-share // (at_once * groups))
    return Shares(entries, threads, vector, share, at_once, groups, words)


def make_kernel(config: Config, at_once: int = AT_ONCE, threads: int | None = None) -> Any:
    """Return the PrimFunc; places past a rank's last block are left as they are."""
    c, g = config, config.geometry
    ranks, tokens, topk, experts, block_m = c.num_ranks, c.tokens, c.topk, c.num_experts, c.block_m
    shares = shares_of(c, at_once, threads)
    entries, threads, vector, share = shares.entries, shares.threads, shares.vector, shares.share
    at_once, groups, words = shares.at_once, shares.groups, shares.words
    warps = threads // WARP
    pool, firsts_len = c.pool_blocks, g.num_waves + 3
    local, first_expert = c.launch_ranks, c.first_rank * c.num_experts

    @T.macro
    def look_up(first: Any, number: Any, rank: Any, count: Any, topk_idx: Any, chosen: Any):
        """Put the experts of a thread's entries from `number` on, of its rank, in `chosen`; < 0: none."""
        for i in T.unroll(at_once):
            chosen[i] = -1
        for i in T.unroll(at_once // vector):
            at = number + i * vector
            if (at < share) and (first + at < count[0]):
                for j in T.vectorized(vector):
                    chosen[i * vector + j] = topk_idx[first + at + j]
        for i in T.unroll(at_once):  # behind all loads: none waits for another
            chosen[i] = chosen[i] - first_expert - rank * experts

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
        with T.Kernel(experts, local, threads=threads) as (mine, rank):
            T.import_source(signals_between_gpus.source())
            # Peers write these while the kernel runs.
            T.annotate_restrict_buffers(topk_idx, topk_weights, signals, status)
            tx = T.get_thread_binding()
            polls = T.alloc_local((1,), T.int32)
            count_entries = T.alloc_local((1,), T.int32)
            seen = T.alloc_shared((experts, threads), T.int32)  # by a thread: each in a bank of its own
            partial = T.alloc_shared((experts, WARP + 1), T.int32)
            of_warp = T.alloc_shared((warps,), T.int32)
            count = T.alloc_shared((experts,), T.int32)
            blocks_of = T.alloc_shared((experts,), T.int32)
            total = T.alloc_local((1,), T.int32)
            place = T.alloc_local((1,), T.int32)
            chosen = T.alloc_local((at_once,), T.int32)
            found = T.alloc_local((words,), T.int32)  # a bit for each of a thread's entries: this expert's
            before = T.alloc_local((1,), T.int32)
            rows = T.alloc_local((1,), T.int32)
            blocks = T.alloc_local((1,), T.int32)
            entry = T.alloc_local((1,), T.int32)
            for e in T.serial(experts):
                seen[e, tx] = 0
            count_entries[0] = entries
            if ranks > 1:
                rank_barrier(c, signals, epochs, 1, PHASE_START, rank, status, polls)
                T.sync_threads()
                # Without a peer there is nothing to do: its routing may be half of one call, half of another.
                if T.atomic_load(status[rank, 0], memory_order="relaxed") != 0:
                    count_entries[0] = 0
            for word in T.unroll(words):
                found[word] = 0
                for group in T.serial(groups):
                    look_up(
                        tx * share, (word * groups + group) * at_once, rank, count_entries, topk_idx, chosen
                    )
                    for i in T.unroll(at_once):
                        if (chosen[i] >= 0) and (chosen[i] < experts):
                            seen[chosen[i], tx] = T.min(seen[chosen[i], tx], share - 1) + 1
                            if chosen[i] == mine:
                                found[word] = found[word] | (1 << (group * at_once + i))
            T.sync_threads()
            # Sums in two steps; that none is beyond its bound is what the prover would not see.
            for i in T.serial(-(-experts // warps)):
                expert = i * warps + tx // WARP
                if expert < experts:
                    total[0] = 0
                    for w in T.unroll(warps):
                        total[0] = T.min(
                            total[0] + bounded(seen[expert, w * WARP + tx % WARP], share), entries
                        )
                    partial[expert, tx % WARP] = total[0]
            total[0] = 0
            place[0] = 0
            for t in T.unroll(WARP):
                total[0] = T.min(total[0] + bounded(seen[mine, tx // WARP * WARP + t], share), entries)
                if t < tx % WARP:
                    place[0] = total[0]
            # The compiler lays arrays where others were: each is written once nobody reads those any more.
            T.sync_threads()
            if tx % WARP == 0:
                of_warp[tx // WARP] = total[0]
            T.sync_threads()
            total[0] = 0
            if tx < experts:
                for t in T.unroll(WARP):
                    total[0] = T.min(total[0] + bounded(partial[tx, t], entries), entries)
            for w in T.unroll(warps):
                if w < tx // WARP:
                    place[0] = T.min(place[0] + bounded(of_warp[w], entries), entries)
            T.sync_threads()
            if tx < experts:
                count[tx] = total[0]
                blocks_of[tx] = (total[0] + (block_m - 1)) // block_m
            T.sync_threads()
            rows[0] = bounded(count[mine], entries)
            blocks[0] = (rows[0] + (block_m - 1)) // block_m
            before[0] = 0
            for e in T.serial(experts):
                if e < mine:
                    before[0] = T.min(before[0] + bounded(blocks_of[e], pool), pool)
            # First only which entries: what belongs to them is looked up by all threads together.
            for word in T.unroll(words):
                if found[word] != 0:
                    for bit in T.serial(groups * at_once):
                        if ((found[word] >> bit) & 1) != 0:
                            row_source[rank, before[0] * block_m + place[0]] = (
                                tx * share + word * groups * at_once + bit
                            )
                            place[0] = T.min(place[0] + 1, entries)
            T.sync_threads()
            for i in T.serial(T.ceildiv(blocks[0] * block_m - tx, threads)):
                number = i * threads + tx
                row = before[0] * block_m + number
                if number < rows[0]:
                    entry[0] = bounded(row_source[rank, row], entries - 1)
                    source = entry[0] // topk
                    slot = entry[0] % topk
                    row_source[rank, row] = source
                    row_target[rank, row] = combine_row(
                        source // tokens, slot, source % tokens, tokens, c.combine_rows
                    )
                    row_weight[rank, row] = topk_weights[entry[0]]
                else:  # the rest of the expert's last block
                    row_source[rank, row] = -1
                    row_target[rank, row] = -1
                    row_weight[rank, row] = T.float32(0)  # pyright: ignore[reportCallIssue]
            for i in T.serial(T.ceildiv(blocks[0] - tx, threads)):
                block_expert[rank, before[0] + i * threads + tx] = mine
            if tx == 0:
                counts[rank, mine] = rows[0]
            if (mine == 0) and (tx < firsts_len):
                total[0] = 0
                for e in T.serial(experts):
                    if e < (tx - 1) * c.wave_experts:
                        total[0] = T.min(total[0] + bounded(blocks_of[e], pool), pool)
                firsts[rank, tx] = total[0]

    return megamoe_plan_kernel


def bounded(number: Any, most: int) -> Any:
    """Return a number from shared memory, of which the prover knows nothing, within what it can be."""
    return T.max(T.min(number, most), 0)
