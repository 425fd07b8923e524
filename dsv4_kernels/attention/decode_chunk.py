"""One chunk of 64 keys of sparse decode: logits, and weights relative to the chunk's own maximum.

Keys are the matrix instruction's rows and heads its columns: few heads are no padded tile. A chunk knows
nothing of other chunks, so it has the same bits in a block that takes one chunk (`sparse_parts`) and in one
that takes all of a query's (`sparse_decode`).
"""

from dataclasses import dataclass
from typing import Any

from tilelang import language as T

from dsv4_kernels.attention import cache_rows
from dsv4_kernels.attention.cache_layout import HEAD_DIM

CHUNK = cache_rows.ROWS  # keys between two rescalings
HEAD_LANES = 4  # threads that add a head's weights
LOG2_E = 1.4426950408889634
FLOOR = -1e30  # below any logit; finite, so that the difference of two is no nan
MASKED = -2e30  # below the floor by more than any exponent: exp2(MASKED - FLOOR) is 0
PAD = 4  # columns of a row of logits in shared memory that nothing uses: rows start in other banks
COLUMNS, ROWS = T.GemmWarpPolicy.FullCol, T.GemmWarpPolicy.FullRow


@dataclass(frozen=True)
class Weights:
    """What a chunk's logits become.

    Attributes:
        products: registers fp32 [64, heads], keys as rows.
        logits: shared memory fp32 [heads, 64 + PAD].
        weight, rounded: registers fp32 and bf16 [heads, 64].
        shared: shared memory bf16 [heads, 64].
        top, total: registers fp32 [heads]: the chunk's maximum, at least FLOOR, and its sum of weights.
    """

    products: Any
    logits: Any
    weight: Any
    rounded: Any
    shared: Any
    top: Any
    total: Any

    def layout(self, block_h: int, threads: int) -> dict[Any, Any]:
        """Return where a block's threads hold them.

        Equally many threads add a head's weights whatever the block: their tree decides a row's last bits. In
        blocks of fewer heads the threads that are left over compute the same once more.
        """
        by_head = T.Fragment(
            (block_h, CHUNK),
            forward_fn=lambda h, j, rep=0: (
                (rep * block_h + h) * HEAD_LANES + j % HEAD_LANES,
                j // HEAD_LANES,
            ),
            replicate=threads // (block_h * HEAD_LANES),
        )
        return {self.weight: by_head, self.rounded: by_head}


@T.macro
def weigh(keys: Any, q_tile: Any, places: Any, first: Any, block_h: Any, state: Any):
    """Multiply keys [64, 512] by q_tile [heads, 512] and set `state`; keys whose place is -1 are masked."""
    T.gemm(keys, q_tile, state.products, transpose_B=True, clear_accum=True, policy=COLUMNS)
    for j, h in T.Parallel(CHUNK, block_h):
        state.logits[h, j] = state.products[j, h]
    for h, j in T.Parallel(block_h, CHUNK):
        state.weight[h, j] = T.if_then_else(
            places[first + j] >= 0, state.logits[h, j] * (LOG2_E / HEAD_DIM**0.5), MASKED
        )
    T.fill(state.top, FLOOR)
    T.reduce_max(state.weight, state.top, dim=1, clear=False)
    for h, j in T.Parallel(block_h, CHUNK):
        state.weight[h, j] = T.exp2(state.weight[h, j] - state.top[h])
    T.reduce_sum(state.weight, state.total, dim=1)
    for h, j in T.Parallel(block_h, CHUNK):
        state.rounded[h, j] = T.cast(state.weight[h, j], "bfloat16")
    for h, j in T.Parallel(block_h, CHUNK):
        state.shared[h, j] = state.rounded[h, j]
