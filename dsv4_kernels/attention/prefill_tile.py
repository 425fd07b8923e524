"""The body of sparse prefill: 64 heads of one query over the entries that its indices name.

A block has 64 heads of one query, which share their keys. Two warpgroups: each sums 256 of 512 dims of every
logit, of q's half that it keeps in registers, and has 256 of 512 dims of the output. K and V are the same
entry, so that a gathered chunk of 64 keys is an operand of both products. Logits of the next chunk are
multiplied ahead of the values of this one, and the chunk after it arrives.

Reduction order of every row, whatever the batch: keys in the order of their list, in chunks of 64; a logit
sums dims 0..255 and dims 256..511 in steps of 16 in ascending order, then both; a chunk's weights, exp2 of
the logits less the maximum so far, are rounded to bf16 for the product with V, and the accumulator is
rescaled once a chunk. The sink joins the denominator last.
"""

import math
from typing import Any

from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout
from tvm import tirx

HEAD_DIM = 512
CHUNK = 64  # keys multiplied together
BLOCK_HEADS = 64  # rows of a wgmma instruction
WARPGROUPS = 2
HALF = CHUNK // WARPGROUPS  # keys of a chunk whose softmax one warpgroup computes
HALF_DIM = HEAD_DIM // WARPGROUPS  # dims that one warpgroup sums, and dims of its output
WARPGROUP = 128  # threads
THREADS = WARPGROUP * WARPGROUPS
SOFTMAX_SCALE = HEAD_DIM**-0.5
LOG2_E = math.log2(math.e)
EXP2_SCALE = SOFTMAX_SCALE * LOG2_E
MAX_FLOOR = -1e30  # below any logit, and finite: a difference of two is no nan
F32_INF = 0x7F800000
F32_MINUS_INF = 0xFF800000 - (1 << 32)  # as int32
# The copies of a loop become cp.async, and waiting for them is left to the kernel.
_ASYNC = {"parallel_async_without_async_commit_wait": True}
_ROWS = T.GemmWarpPolicy.FullRow  # warpgroups share out the rows of a product
_COLUMNS = T.GemmWarpPolicy.FullCol  # and here its columns
SLOTS = 3  # chunks in shared memory: one is multiplied by q, one by weights, one arrives


def make_attend(n: Any, topk: Any) -> Any:
    """Return the macro for lists of `topk` indices into `n` entries, both of which may be symbolic.

    Its arguments are the kernel's tensors, the block's query and group of heads, and out_tile: [64, 512] bf16
    in shared memory, the result.
    """
    num_chunks = T.ceildiv(topk, CHUNK)
    zero = tirx.FloatImm("bfloat16", 0.0)

    # Eight threads copy 128 contiguous bytes of a row, and have two rows of the chunk.
    by_row = T.Fragment(
        (CHUNK, HEAD_DIM), lambda i, j: (i % 32 * 8 + j // 8 % 8, i // 32 * 64 + j // 64 * 8 + j % 8)
    )
    # Logits of 32 keys a warpgroup, where wgmma leaves them.
    by_half = T.Fragment(
        (WARPGROUPS, BLOCK_HEADS, HALF),
        lambda w, i, j: (
            w * 128 + i // 16 * 32 + i % 8 * 4 + j % 8 // 2,
            j // 8 * 4 + i % 16 // 8 * 2 + j % 2,
        ),
    )
    # Pairs of a thread's registers, those of 128 threads side by side: no bank twice.
    by_thread = T.Layout(
        (WARPGROUPS, BLOCK_HEADS, HALF),
        lambda w, i, j: (
            w * (BLOCK_HEADS * HALF)
            + (j // 8 * 2 + i % 16 // 8) * (2 * WARPGROUP)
            + (i // 16 * 32 + i % 8 * 4 + j % 8 // 2) * 2
            + j % 2
        ),
    )

    @T.macro
    def ask(idx: Any, places: Any, token: Any, chunk: Any):
        for i in T.Parallel(CHUNK):
            places[i] = T.if_then_else(chunk * CHUNK + i < topk, idx[token, chunk * CHUNK + i], -1)

    @T.macro
    def gather(kv: Any, places: Any, ring: Any, mask: Any, slot: Any):
        for i, j in T.Parallel(CHUNK, HEAD_DIM, loop_layout=by_row, annotations=_ASYNC):
            is_valid = (places[i] >= 0) and (places[i] < n)
            ring[slot, i, j] = T.if_then_else(is_valid, kv[places[i], j], zero)
        T.ptx_commit_group()
        for i in T.Parallel(CHUNK):
            is_valid = (places[i] >= 0) and (places[i] < n)
            mask[slot, i] = T.if_then_else(is_valid, 0.0, T.reinterpret(F32_MINUS_INF, "float32"))

    @T.macro
    def start_logits(q_half: Any, ring: Any, slot: Any, group: Any, first: Any, part: Any):
        # 256 dims, those of this warpgroup, of 32 keys.
        T.wgmma_gemm(
            q_half,
            ring[slot, first : first + HALF, group * HALF_DIM : group * HALF_DIM + HALF_DIM],
            part,
            transpose_B=True,
            clear_accum=True,
            policy=_ROWS,
        )

    @T.macro
    def softmax(
        low: Any,
        high: Any,
        swap: Any,
        mask: Any,
        slot: Any,
        halves: Any,
        exchange: Any,
        half_part: Any,
        half_total: Any,
        row_max: Any,
        factor: Any,
        weights: Any,
        turn: Any,
    ):
        for w, i, j in T.Parallel(WARPGROUPS, BLOCK_HEADS, HALF):
            swap[w, i, j] = T.if_then_else(w == 0, high[w * BLOCK_HEADS + i, j], low[w * BLOCK_HEADS + i, j])
        T.sync_threads()
        for w, i, j in T.Parallel(WARPGROUPS, BLOCK_HEADS, HALF):
            own = T.if_then_else(w == 0, low[w * BLOCK_HEADS + i, j], high[w * BLOCK_HEADS + i, j])
            halves[w, i, j] = own + swap[1 - w, i, j] + mask[slot, w * HALF + j]
        # Each warpgroup has the maximum of its keys; both meet in shared memory.
        T.reduce_max(halves, half_part, dim=2)
        for w, i in T.Parallel(WARPGROUPS, BLOCK_HEADS):
            exchange[w, i] = half_part[w, i]
        T.sync_threads()
        for i in T.Parallel(BLOCK_HEADS):
            factor[i] = row_max[i]
        for i in T.Parallel(BLOCK_HEADS):
            row_max[i] = T.max(row_max[i], T.max(exchange[0, i], exchange[1, i]))
        for i in T.Parallel(BLOCK_HEADS):
            factor[i] = T.exp2(factor[i] * EXP2_SCALE - row_max[i] * EXP2_SCALE)
        for w, i, j in T.Parallel(WARPGROUPS, BLOCK_HEADS, HALF):
            halves[w, i, j] = T.exp2(halves[w, i, j] * EXP2_SCALE - row_max[i] * EXP2_SCALE)
        T.reduce_sum(halves, half_part, dim=2)
        for w, i in T.Parallel(WARPGROUPS, BLOCK_HEADS):
            half_total[w, i] = half_total[w, i] * factor[i] + half_part[w, i]
        for w, i, j in T.Parallel(WARPGROUPS, BLOCK_HEADS, HALF):
            weights[turn, i, w * HALF + j] = T.cast(halves[w, i, j], "bfloat16")

    @T.macro
    def attend(q: Any, idx: Any, kv: Any, sink: Any, lse: Any, token: Any, bh: Any, out_tile: Any):
        group = T.get_thread_binding() // WARPGROUP
        ring = T.alloc_shared((SLOTS, CHUNK, HEAD_DIM), T.bfloat16)
        weights = T.alloc_shared((2, BLOCK_HEADS, CHUNK), T.bfloat16)
        swap = T.alloc_shared((WARPGROUPS, BLOCK_HEADS, HALF), T.float32)
        mask = T.alloc_shared((SLOTS, CHUNK), T.float32)  # 0 or -inf, added to logits
        exchange = T.alloc_shared((WARPGROUPS, BLOCK_HEADS), T.float32)
        q_half = T.alloc_fragment((WARPGROUPS * BLOCK_HEADS, HALF_DIM), T.bfloat16)
        places = T.alloc_fragment((CHUNK,), T.int32)
        acc = T.alloc_fragment((BLOCK_HEADS, HEAD_DIM), T.float32)
        low = T.alloc_fragment((WARPGROUPS * BLOCK_HEADS, HALF), T.float32)
        high = T.alloc_fragment((WARPGROUPS * BLOCK_HEADS, HALF), T.float32)
        halves = T.alloc_fragment((WARPGROUPS, BLOCK_HEADS, HALF), T.float32)
        half_part = T.alloc_fragment((WARPGROUPS, BLOCK_HEADS), T.float32)
        half_total = T.alloc_fragment((WARPGROUPS, BLOCK_HEADS), T.float32)
        row_max = T.alloc_fragment((BLOCK_HEADS,), T.float32)
        factor = T.alloc_fragment((BLOCK_HEADS,), T.float32)
        total = T.alloc_fragment((BLOCK_HEADS,), T.float32)
        T.annotate_layout(
            {halves: by_half, swap: by_thread, out_tile: make_full_bank_swizzled_layout(out_tile)}
        )

        ask(idx, places, token, 0)
        gather(kv, places, ring, mask, 0)
        ask(idx, places, token, 1)
        for w, i, j in T.Parallel(WARPGROUPS, BLOCK_HEADS, HALF_DIM):
            q_half[w * BLOCK_HEADS + i, j] = q[token, bh * BLOCK_HEADS + i, w * HALF_DIM + j]
        gather(kv, places, ring, mask, 1)
        ask(idx, places, token, 2)
        T.clear(acc)
        T.fill(row_max, MAX_FLOOR)
        T.clear(half_total)
        T.ptx_wait_group(1)
        T.fence_proxy_async()
        T.sync_threads()
        start_logits(q_half, ring, 0, group, 0, low)
        start_logits(q_half, ring, 0, group, HALF, high)
        T.wait_wgmma(0)
        softmax(
            low, high, swap, mask, 0, halves, exchange, half_part, half_total, row_max, factor, weights, 0
        )
        for k in T.serial(num_chunks):
            T.ptx_wait_group(0)
            T.fence_proxy_async()
            T.sync_threads()
            # Past the last chunk too, whose successors are masked: so every round is alike. Copies are asked
            # for first, as they have this round to arrive.
            gather(kv, places, ring, mask, (k + 2) % SLOTS)
            ask(idx, places, token, k + 3)
            start_logits(q_half, ring, (k + 1) % SLOTS, group, 0, low)
            for i, j in T.Parallel(BLOCK_HEADS, HEAD_DIM):
                acc[i, j] *= factor[i]
            start_logits(q_half, ring, (k + 1) % SLOTS, group, HALF, high)
            T.wgmma_gemm(weights[k % 2, :, :], ring[k % SLOTS, :, :], acc, policy=_COLUMNS)
            T.wait_wgmma(1)
            softmax(
                low,
                high,
                swap,
                mask,
                (k + 1) % SLOTS,
                halves,
                exchange,
                half_part,
                half_total,
                row_max,
                factor,
                weights,
                (k + 1) % 2,
            )
            T.wait_wgmma(0)
        T.ptx_wait_group(0)  # the output takes the ring's place
        for w, i in T.Parallel(WARPGROUPS, BLOCK_HEADS):
            exchange[w, i] = half_total[w, i]
        for i in T.Parallel(BLOCK_HEADS):
            total[i] = exchange[0, i] + exchange[1, i]
        for i in T.Parallel(BLOCK_HEADS):
            factor[i] = total[i] + T.exp2(sink[bh * BLOCK_HEADS + i] * LOG2_E - row_max[i] * EXP2_SCALE)
        for i in T.Parallel(BLOCK_HEADS):
            factor[i] = T.if_then_else(total[i] == 0.0, 0.0, 1.0 / factor[i])
        for i in T.Parallel(BLOCK_HEADS):
            lse[token, bh * BLOCK_HEADS + i] = T.if_then_else(
                total[i] == 0.0,
                T.reinterpret(F32_INF, "float32"),
                T.log(total[i]) + row_max[i] * SOFTMAX_SCALE,
            )
        for i, j in T.Parallel(BLOCK_HEADS, HEAD_DIM):
            out_tile[i, j] = T.cast(acc[i, j] * factor[i], "bfloat16")

    return attend
