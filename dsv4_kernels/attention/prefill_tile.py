"""The body of sparse prefill: 64 heads of one query over the entries that its indices name.

A block has 64 heads of one query, which share their keys: two warpgroups, each with 32 keys of a chunk of 64
for the logits and 256 of 512 dims for the output. K and V are the same entry, so that a gathered chunk is an
operand of both products. While a chunk is multiplied, cp.async gathers the next one into the other slot, and
the indices of the one after it are on their way.

Reduction order of every row, whatever the batch: keys in the order of their list, in chunks of 64; a logit
sums 512 dims in steps of 16 in ascending order; a chunk's weights, exp2 of the logits less the maximum so
far, are rounded to bf16 for the product with V, and the accumulator is rescaled once a chunk. The sink joins
the denominator last.
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
HALF = CHUNK // WARPGROUPS  # keys of a chunk whose logits one warpgroup computes
SLOTS = 2  # chunks in shared memory: one is multiplied, one arrives
THREADS = 128 * WARPGROUPS
SOFTMAX_SCALE = HEAD_DIM**-0.5
LOG2_E = math.log2(math.e)
EXP2_SCALE = SOFTMAX_SCALE * LOG2_E
MAX_FLOOR = -1e30  # below any logit, and finite: a difference of two is no nan
F32_INF = 0x7F800000
F32_MINUS_INF = 0xFF800000 - (1 << 32)  # as int32
# The copies of a loop become cp.async, and waiting for them is left to the kernel.
_ASYNC = {"parallel_async_without_async_commit_wait": True}
_COLUMNS = T.GemmWarpPolicy.FullCol  # warpgroups share out the columns of a product


def make_attend(n: Any, topk: Any, head: int) -> Any:
    """Return the macro for lists of `topk` indices into `n` entries, both of which may be symbolic.

    `head` dims of q stay in registers. Its arguments are the kernel's tensors, the block's query and group of
    heads, and out_tile: [64, 512] bf16 in shared memory, the result.
    """
    num_chunks = T.ceildiv(topk, CHUNK)
    zero = tirx.FloatImm("bfloat16", 0.0)

    # Eight threads copy 128 contiguous bytes of a row, and have two rows of the chunk.
    by_row = T.Fragment(
        (CHUNK, HEAD_DIM), lambda i, j: (i % 32 * 8 + j // 8 % 8, i // 32 * 64 + j // 64 * 8 + j % 8)
    )
    # The halves of the logits where wgmma leaves them.
    by_half = T.Fragment(
        (WARPGROUPS, BLOCK_HEADS, HALF),
        lambda w, i, j: (
            w * 128 + i // 16 * 32 + i % 8 * 4 + j % 8 // 2,
            j // 8 * 4 + i % 16 // 8 * 2 + j % 2,
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
    def attend(q: Any, idx: Any, kv: Any, sink: Any, lse: Any, token: Any, bh: Any, out_tile: Any):
        ring = T.alloc_shared((SLOTS, CHUNK, HEAD_DIM), T.bfloat16)
        q_tail = T.alloc_shared((BLOCK_HEADS, HEAD_DIM - head), T.bfloat16)
        weights = T.alloc_shared((BLOCK_HEADS, CHUNK), T.bfloat16)
        mask = T.alloc_shared((SLOTS, CHUNK), T.float32)  # 0 or -inf, which logits start from
        exchange = T.alloc_shared((WARPGROUPS, BLOCK_HEADS), T.float32)
        q_head = T.alloc_fragment((BLOCK_HEADS, head), T.bfloat16)
        places = T.alloc_fragment((CHUNK,), T.int32)
        acc = T.alloc_fragment((BLOCK_HEADS, HEAD_DIM), T.float32)
        logits = T.alloc_fragment((BLOCK_HEADS, CHUNK), T.float32)
        halves = T.alloc_fragment((WARPGROUPS, BLOCK_HEADS, HALF), T.float32)
        half_max = T.alloc_fragment((WARPGROUPS, BLOCK_HEADS), T.float32)
        half_sum = T.alloc_fragment((WARPGROUPS, BLOCK_HEADS), T.float32)
        half_total = T.alloc_fragment((WARPGROUPS, BLOCK_HEADS), T.float32)
        row_max = T.alloc_fragment((BLOCK_HEADS,), T.float32)
        factor = T.alloc_fragment((BLOCK_HEADS,), T.float32)
        total = T.alloc_fragment((BLOCK_HEADS,), T.float32)
        T.annotate_layout({halves: by_half, out_tile: make_full_bank_swizzled_layout(out_tile)})

        ask(idx, places, token, 0)
        gather(kv, places, ring, mask, 0)
        ask(idx, places, token, 1)
        T.copy(q[token, bh * BLOCK_HEADS, 0], q_head)
        T.copy(q[token, bh * BLOCK_HEADS, head], q_tail)
        T.clear(acc)
        T.fill(row_max, MAX_FLOOR)
        T.clear(half_total)
        for k in T.serial(num_chunks):
            T.ptx_wait_group(0)
            T.fence_proxy_async()
            T.sync_threads()
            # Past the last chunk too, with masked indices: so every round is alike.
            gather(kv, places, ring, mask, (k + 1) % SLOTS)
            ask(idx, places, token, k + 2)
            for i, j in T.Parallel(BLOCK_HEADS, CHUNK):
                logits[i, j] = mask[k % SLOTS, j]
            T.wgmma_gemm(q_head, ring[k % SLOTS, :, 0:head], logits, transpose_B=True, policy=_COLUMNS)
            T.gemm(q_tail, ring[k % SLOTS, :, head:HEAD_DIM], logits, transpose_B=True, policy=_COLUMNS)
            # Each warpgroup has the maximum of its keys; both meet in shared memory.
            for w, i, j in T.Parallel(WARPGROUPS, BLOCK_HEADS, HALF):
                halves[w, i, j] = logits[i, w * HALF + j]
            T.reduce_max(halves, half_max, dim=2)
            for w, i in T.Parallel(WARPGROUPS, BLOCK_HEADS):
                exchange[w, i] = half_max[w, i]
            for i in T.Parallel(BLOCK_HEADS):
                factor[i] = row_max[i]
            for i in T.Parallel(BLOCK_HEADS):
                row_max[i] = T.max(row_max[i], T.max(exchange[0, i], exchange[1, i]))
            for i in T.Parallel(BLOCK_HEADS):
                factor[i] = T.exp2(factor[i] * EXP2_SCALE - row_max[i] * EXP2_SCALE)
            for i, j in T.Parallel(BLOCK_HEADS, CHUNK):
                logits[i, j] = T.exp2(logits[i, j] * EXP2_SCALE - row_max[i] * EXP2_SCALE)
            for w, i, j in T.Parallel(WARPGROUPS, BLOCK_HEADS, HALF):
                halves[w, i, j] = logits[i, w * HALF + j]
            T.reduce_sum(halves, half_sum, dim=2)
            for w, i in T.Parallel(WARPGROUPS, BLOCK_HEADS):
                half_total[w, i] = half_total[w, i] * factor[i] + half_sum[w, i]
            for i, j in T.Parallel(BLOCK_HEADS, CHUNK):
                weights[i, j] = T.cast(logits[i, j], "bfloat16")
            for i, j in T.Parallel(BLOCK_HEADS, HEAD_DIM):
                acc[i, j] *= factor[i]
            T.gemm(weights, ring[k % SLOTS, :, :], acc, policy=_COLUMNS)
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
