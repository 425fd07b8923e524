"""The body of sparse prefill: 64 heads of one query over the entries that its indices name.

A block has 64 heads of one query, which share their keys. K and V are the same entry, so that a gathered
chunk of 64 keys is an operand of both products. A round takes two chunks: warpgroup 0 has the logits and the
softmax of the even one, warpgroup 1 those of the odd one, and each multiplies the weights of both by 256 of
the 512 dims of their values. The warpgroups meet nowhere in a round: each waits, by mbarriers, for what it
needs of the other, so that the softmax of one runs under products of the other.

    warpgroup 0: logits 0, softmax 0 | values 0, left             | gather 0, left  | values 1, left  | ...
    warpgroup 1: logits 1 | ...      | values 0, right; softmax 1 | gather 0, right | values 1, right | ...

What each warpgroup gathers for the next round are the dims that it multiplied: they are free as soon as it
says so itself.

Reduction order of every row, whatever the batch: keys in the order of their list, in chunks of 64; a logit
sums 512 dims in steps of 16 in ascending order; a chunk's weights, exp2 of the logits less the maximum so
far, are rounded to bf16 for the product with V, and the accumulator is rescaled once a chunk. Weights of even
and of odd chunks are summed apart, and added at the end. The sink joins the denominator last.
"""

import math
from collections.abc import Callable
from typing import Any

from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout
from tvm import tirx

HEAD_DIM = 512
CHUNK = 64  # keys whose weights are of one maximum
BLOCK_HEADS = 64  # rows of a wgmma instruction
WARPGROUPS = 2
WARPGROUP = 128  # threads
PAIR = WARPGROUPS * CHUNK  # keys of a round
ROW_LANES = 8  # threads of a warpgroup that copy a row
HALF_DIM = HEAD_DIM // WARPGROUPS  # dims of the output that one warpgroup has
THREADS = WARPGROUP * WARPGROUPS
SOFTMAX_SCALE = HEAD_DIM**-0.5
LOG2_E = math.log2(math.e)
EXP2_SCALE = SOFTMAX_SCALE * LOG2_E
MAX_FLOOR = -1e30  # below any logit, and finite: a difference of two is no nan
F32_INF = 0x7F800000
F32_MINUS_INF = 0xFF800000 - (1 << 32)  # as int32
# The copies of a loop become cp.async, and waiting for them is left to the kernel.
_ASYNC = {"parallel_async_without_async_commit_wait": True}
_COLUMNS = T.GemmWarpPolicy.FullCol  # warpgroups share out the columns of a product


def make_attend(n: Any, topk: Any) -> Any:
    """Return the macro for lists of `topk` indices into `n` entries, both of which may be symbolic.

    Its arguments are the kernel's tensors, the block's query and group of heads, and out_tile: [64, 512] bf16
    in shared memory, the result.
    """

    @T.macro
    def ask(idx: Any, places: Any, token: Any, first: Any):
        for i in T.Parallel(CHUNK):
            places[i] = T.if_then_else(first + i < topk, idx[token, first + i], -1)

    return make_attend_by(n, lambda idx, token: T.ceildiv(topk, PAIR), ask)


def make_attend_by(n: Any, rounds: Callable[[Any, Any], Any], ask: Any) -> Any:
    """Return the macro of `make_attend` for places that something else than a list says.

    Args:
        n: entries, may be symbolic.
        rounds: (the tensor that says places, the query) -> pairs of chunks that the query has, one or more.
        ask: macro (that tensor, fragment int32 [64], the query, number of its first key): fills the fragment
            with the places of 64 of the query's keys; one outside the entries is masked.
    """
    zero = tirx.FloatImm("bfloat16", 0.0)

    # A warpgroup copies its dims of a row; eight threads 128 bytes side by side, of four rows of the chunk.
    by_dims = T.Fragment(
        (CHUNK, HEAD_DIM),
        lambda i, j: (
            j // HALF_DIM * WARPGROUP + i % 16 * 8 + j // 8 % 8,
            i // 16 * 32 + j % HALF_DIM // 64 * 8 + j % 8,
        ),
    )
    # Each of the threads of its warpgroup that copy a row notes whether it counts: one place, one writer.
    by_row = T.Fragment(
        (WARPGROUPS, CHUNK, ROW_LANES), lambda w, i, lane: (w * WARPGROUP + i % 16 * 8 + lane, i // 16)
    )
    # The chunks of the logits where wgmma leaves them.
    by_chunk = T.Fragment(
        (WARPGROUPS, BLOCK_HEADS, CHUNK),
        lambda w, i, j: (
            w * WARPGROUP + i // 16 * 32 + i % 8 * 4 + j % 8 // 2,
            j // 8 * 4 + i % 16 // 8 * 2 + j % 2,
        ),
    )

    @T.macro
    def note(places_0: Any, places_1: Any, mask: Any):
        for w, i, lane in T.Parallel(WARPGROUPS, CHUNK, ROW_LANES, loop_layout=by_row):
            place = T.if_then_else(w == 0, places_0[i], places_1[i])
            is_valid = (place >= 0) and (place < n)
            mask[lane, w * CHUNK + i] = T.if_then_else(is_valid, 0.0, T.reinterpret(F32_MINUS_INF, "float32"))

    @T.macro
    def gather(kv: Any, places: Any, ring: Any, chunk: int):
        for i, j in T.Parallel(CHUNK, HEAD_DIM, loop_layout=by_dims, annotations=_ASYNC):
            is_valid = (places[i] >= 0) and (places[i] < n)
            ring[chunk * CHUNK + i, j] = T.if_then_else(is_valid, kv[places[i], j], zero)

    @T.macro
    def meet(group: Any):
        # All threads of a warpgroup, each by its own barrier.
        if group == 0:
            T.sync_threads(1, WARPGROUP)
        else:
            T.sync_threads(2, WARPGROUP)

    @T.macro
    def attend(q: Any, idx: Any, kv: Any, sink: Any, lse: Any, token: Any, bh: Any, out_tile: Any):
        group = T.get_thread_binding() // WARPGROUP
        ring = T.alloc_shared((PAIR, HEAD_DIM), T.bfloat16)
        q_tile = T.alloc_shared((BLOCK_HEADS, HEAD_DIM), T.bfloat16)
        weights = T.alloc_shared((WARPGROUPS, BLOCK_HEADS, CHUNK), T.bfloat16)
        mask = T.alloc_shared(
            (ROW_LANES, PAIR + ROW_LANES // 2), T.float32
        )  # 0 or -inf, which logits start from
        exchange = T.alloc_shared((WARPGROUPS, BLOCK_HEADS), T.float32)
        full_0 = T.alloc_barrier([THREADS])  # a chunk has arrived
        full_1 = T.alloc_barrier([THREADS])
        ready_0 = T.alloc_barrier([WARPGROUP])  # weights and maxima of a chunk are there
        ready_1 = T.alloc_barrier([WARPGROUP])
        taken_0 = T.alloc_barrier([WARPGROUP])  # and the other warpgroup has multiplied them
        taken_1 = T.alloc_barrier([WARPGROUP])
        places_0 = T.alloc_fragment((CHUNK,), T.int32)
        places_1 = T.alloc_fragment((CHUNK,), T.int32)
        acc = T.alloc_fragment((BLOCK_HEADS, HEAD_DIM), T.float32)
        logits = T.alloc_fragment((BLOCK_HEADS, PAIR), T.float32)
        chunks = T.alloc_fragment((WARPGROUPS, BLOCK_HEADS, CHUNK), T.float32)
        chunk_max = T.alloc_fragment((WARPGROUPS, BLOCK_HEADS), T.float32)
        chunk_sum = T.alloc_fragment((WARPGROUPS, BLOCK_HEADS), T.float32)
        own_max = T.alloc_fragment((WARPGROUPS, BLOCK_HEADS), T.float32)
        own_total = T.alloc_fragment((WARPGROUPS, BLOCK_HEADS), T.float32)
        row_max = T.alloc_fragment((BLOCK_HEADS,), T.float32)
        factor = T.alloc_fragment((BLOCK_HEADS,), T.float32)
        total = T.alloc_fragment((BLOCK_HEADS,), T.float32)
        T.annotate_layout({chunks: by_chunk, out_tile: make_full_bank_swizzled_layout(out_tile)})

        ask(idx, places_0, token, 0)
        ask(idx, places_1, token, CHUNK)
        for i, j in T.Parallel(BLOCK_HEADS, HEAD_DIM, loop_layout=by_dims, annotations=_ASYNC):
            q_tile[i, j] = q[token, bh * BLOCK_HEADS + i, j]
        gather(kv, places_0, ring, 0)
        T.cp_async_barrier_noinc(full_0)
        gather(kv, places_1, ring, 1)
        T.cp_async_barrier_noinc(full_1)
        note(places_0, places_1, mask)
        ask(idx, places_0, token, PAIR)
        ask(idx, places_1, token, PAIR + CHUNK)
        T.clear(acc)
        T.fill(row_max, MAX_FLOOR)
        T.clear(own_total)
        T.fence_proxy_async()
        T.sync_threads()
        for k in T.serial(rounds(idx, token)):
            for i, j in T.Parallel(BLOCK_HEADS, PAIR):
                logits[i, j] = mask[0, j]
            if group == 0:
                T.mbarrier_wait_parity(full_0, k % 2)
            else:
                T.mbarrier_wait_parity(full_1, k % 2)
            T.fence_proxy_async()
            T.gemm(q_tile, ring, logits, transpose_B=True, policy=_COLUMNS)
            for w, i, j in T.Parallel(WARPGROUPS, BLOCK_HEADS, CHUNK):
                chunks[w, i, j] = logits[i, w * CHUNK + j]
            T.reduce_max(chunks, chunk_max, dim=2)
            # What the other warpgroup read of the last round's maxima and weights may go now.
            if group == 0:
                T.mbarrier_wait_parity(taken_0, (k + 1) % 2)
            else:
                T.mbarrier_wait_parity(taken_1, (k + 1) % 2)
            for w, i in T.Parallel(WARPGROUPS, BLOCK_HEADS):
                exchange[w, i] = chunk_max[w, i]
            for w, i in T.Parallel(WARPGROUPS, BLOCK_HEADS):
                own_max[w, i] = T.max(row_max[i], chunk_max[w, i])
            for w, i, j in T.Parallel(WARPGROUPS, BLOCK_HEADS, CHUNK):
                if w == 0:
                    chunks[w, i, j] = T.exp2(chunks[w, i, j] * EXP2_SCALE - own_max[w, i] * EXP2_SCALE)
            for w, i, j in T.Parallel(WARPGROUPS, BLOCK_HEADS, CHUNK):
                if w == 0:
                    weights[w, i, j] = T.cast(chunks[w, i, j], "bfloat16")
            T.fence_proxy_async()
            if group == 0:
                T.mbarrier_arrive(ready_0)

            T.mbarrier_wait_parity(ready_0, k % 2)
            for i in T.Parallel(BLOCK_HEADS):
                factor[i] = row_max[i]
            for i in T.Parallel(BLOCK_HEADS):
                row_max[i] = T.max(row_max[i], exchange[0, i])
            for i in T.Parallel(BLOCK_HEADS):
                factor[i] = T.exp2((factor[i] - row_max[i]) * EXP2_SCALE)
            for i, j in T.Parallel(BLOCK_HEADS, HEAD_DIM):
                acc[i, j] *= factor[i]
            if group == 1:
                T.mbarrier_wait_parity(full_0, k % 2)
            T.fence_proxy_async()
            T.wgmma_gemm(weights[0, :, :], ring[0:CHUNK, :], acc, policy=_COLUMNS)
            # Under this product warpgroup 1 has its softmax, which begins with the maxima of the even chunk.
            for w, i in T.Parallel(WARPGROUPS, BLOCK_HEADS):
                own_max[w, i] = T.max(row_max[i], chunk_max[w, i])
            for w, i, j in T.Parallel(WARPGROUPS, BLOCK_HEADS, CHUNK):
                if w == 1:
                    chunks[w, i, j] = T.exp2(chunks[w, i, j] * EXP2_SCALE - own_max[w, i] * EXP2_SCALE)
            for w, i, j in T.Parallel(WARPGROUPS, BLOCK_HEADS, CHUNK):
                if w == 1:
                    weights[w, i, j] = T.cast(chunks[w, i, j], "bfloat16")
            T.fence_proxy_async()
            if group == 1:
                T.mbarrier_arrive(ready_1)
            T.reduce_sum(chunks, chunk_sum, dim=2)
            for w, i in T.Parallel(WARPGROUPS, BLOCK_HEADS):
                own_total[w, i] = own_total[w, i] * factor[i] + T.if_then_else(w == 0, chunk_sum[w, i], 0.0)
            T.wait_wgmma(0)
            if group == 1:
                T.mbarrier_arrive(taken_0)
            meet(group)
            note(places_0, places_1, mask)
            gather(kv, places_0, ring, 0)
            T.cp_async_barrier_noinc(full_0)
            ask(idx, places_0, token, (k + 2) * PAIR)

            T.mbarrier_wait_parity(ready_1, k % 2)
            for i in T.Parallel(BLOCK_HEADS):
                factor[i] = row_max[i]
            for i in T.Parallel(BLOCK_HEADS):
                row_max[i] = T.max(row_max[i], exchange[1, i])
            for i in T.Parallel(BLOCK_HEADS):
                factor[i] = T.exp2((factor[i] - row_max[i]) * EXP2_SCALE)
            for w, i in T.Parallel(WARPGROUPS, BLOCK_HEADS):
                own_total[w, i] = own_total[w, i] * factor[i] + T.if_then_else(w == 1, chunk_sum[w, i], 0.0)
            for i, j in T.Parallel(BLOCK_HEADS, HEAD_DIM):
                acc[i, j] *= factor[i]
            if group == 0:
                T.mbarrier_wait_parity(full_1, k % 2)
            T.fence_proxy_async()
            T.gemm(weights[1, :, :], ring[CHUNK:PAIR, :], acc, policy=_COLUMNS)
            if group == 0:
                T.mbarrier_arrive(taken_1)
            meet(group)
            gather(kv, places_1, ring, 1)
            T.cp_async_barrier_noinc(full_1)
            ask(idx, places_1, token, (k + 2) * PAIR + CHUNK)
        T.ptx_wait_group(0)  # the output takes the ring's place
        T.sync_threads()
        for w, i in T.Parallel(WARPGROUPS, BLOCK_HEADS):
            exchange[w, i] = own_total[w, i]
        T.sync_threads()
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
        T.fence_proxy_async()
        T.sync_threads()

    return attend
