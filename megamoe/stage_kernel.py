"""A rank's inputs of a call, put where its peers read them, as one launch before the plan's.

As separate copies they would be four launches of 1 to 2 us each, which few tokens feel. A CTA for each token
copies its row and scales to this rank's part, and its experts and weights to this rank's place in every
rank's routing; places behind the call's tokens are masked. Where there is a shared expert, it is each rank's
first: the others' numbers make room for it, and the last slot of each token names that of its own rank.
"""

from typing import Any

from tilelang import language as T

from dsv4_kernels.gemm.folded_tile import BLOCK_K
from megamoe.config import Config
from megamoe.routing import shared_number, shifted

THREADS = 128


def make_kernel(config: Config) -> Any:
    """Return the PrimFunc; the number of tokens of a call is an argument's size, at most `config.tokens`."""
    c = config
    ranks, tokens, topk, hidden = c.num_ranks, c.tokens, c.topk, c.hidden
    mine = c.first_rank * tokens * topk  # where this rank's routing begins in that of all
    routed = topk - 1 if c.shared else topk  # slots of a call's routing
    count = T.dynamic("count")

    def number(expert: Any) -> Any:
        return shifted(expert, c.num_experts - 1) if c.shared else expert

    @T.prim_func
    def megamoe_stage_kernel(
        # of this rank
        x: T.Tensor[(count, hidden), T.float8_e4m3fn],
        x_scale: T.Tensor[(count, hidden // BLOCK_K), T.uint8],
        topk_idx: T.Tensor[(count, routed), T.int32],
        topk_weights: T.Tensor[(count, routed), T.float32],
        # of all ranks; a rank's part of the routings holds those of all
        x_parts: T.Tensor[(ranks, c.x_rows, hidden), T.float8_e4m3fn],
        scale_parts: T.Tensor[(ranks, c.scale_rows, hidden // BLOCK_K), T.uint8],
        idx_parts: T.Tensor[(ranks, c.routing_words), T.int32],
        weight_parts: T.Tensor[(ranks, c.routing_words), T.float32],
    ):
        with T.Kernel(tokens, threads=THREADS) as token:
            if token < count:  # pyright: ignore[reportOperatorIssue]
                for ch in T.Parallel(hidden):
                    x_parts[c.first_rank, token, ch] = x[token, ch]
                for kb in T.Parallel(hidden // BLOCK_K):
                    scale_parts[c.first_rank, token, kb] = x_scale[token, kb]
                for peer, slot in T.Parallel(ranks, routed):
                    idx_parts[peer, mine + token * topk + slot] = number(topk_idx[token, slot])  # pyright: ignore[reportOperatorIssue]
                    weight_parts[peer, mine + token * topk + slot] = topk_weights[token, slot]  # pyright: ignore[reportOperatorIssue]
                if c.shared:
                    for peer in T.Parallel(ranks):
                        idx_parts[peer, mine + token * topk + routed] = shared_number(  # pyright: ignore[reportOperatorIssue]
                            c.first_rank, c.num_experts - 1
                        )
                        weight_parts[peer, mine + token * topk + routed] = T.float32(1)  # pyright: ignore[reportCallIssue, reportOperatorIssue]
            else:
                for peer, slot in T.Parallel(ranks, topk):
                    idx_parts[peer, mine + token * topk + slot] = -1  # pyright: ignore[reportOperatorIssue]

    return megamoe_stage_kernel
