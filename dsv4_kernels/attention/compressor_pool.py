"""Pooling of a block of tokens: softmax over its rows, channel by channel, as a macro (report 2.3.1).

Shared by the compressor of entries (512 dims) and the indexer's (128). A thread has four channels; sums are
in the order of rows, in fixed groups, each step rounded as IEEE says.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels.attention.compressor_state import FRESH, LAST, OVERLAPPING, POSITION, SLOT, state_rows
from dsv4_kernels.contract import ContractError, require_shape, require_tensor
from dsv4_kernels.tile.pairs import bf16_pair, even_f32, odd_f32, rms_factor, square_sum
from dsv4_kernels.tile.softmax import exp_weight

LANE_DIMS = 4  # of a thread: 16 bytes
MAX_POSITIONS = 1 << 20
NORM_EPS = 1e-6
FLOOR = -1e30  # below any score; finite, so that the difference of two is no nan
F32_MINUS_INF = 0xFF800000 - 2**32  # as an int32


@dataclass(frozen=True)
class Config:
    """How rows are summed, and what shares a multiprocessor.

    Attributes:
        groups: of rows, summed side by side and added in order.
        step: rows of a group between two rescalings.
        blocks: entries a multiprocessor at once.
    """

    groups: int
    step: int
    blocks: int

    def threads(self, dim: int) -> int:
        """Return the threads of a block whose entries have `dim` channels."""
        return self.groups * dim // LANE_DIMS


CLAUSES = (
    "0 <= m",
    "m <= MAX_TOKENS",
    "0 < num_tokens",
    "num_tokens <= MAX_TOKENS",
    "0 < num_slots",
    "num_slots <= MAX_SLOTS",
)
CONSTS = {"MAX_TOKENS": 2**31 - 256, "MAX_SLOTS": 1 << 20, "MAX_POSITIONS": MAX_POSITIONS}


def channels(ratio: int, dim: int) -> int:
    """Return the channels of a row: series b, then a, where blocks overlap."""
    return 2 * dim if ratio == OVERLAPPING else dim


def pooling(ratio: int, dim: int, config: Config) -> Callable[..., None]:
    """Return the macro that leaves an entry's means of `dim` channels in shared memory.

    It takes mean [dim] fp32 (shared), then kv, score, kv_state, score_state, ape, blocks as `compressor` has
    them, and the entry's number.
    """
    rows, groups = state_rows(ratio), config.groups
    group_rows = rows // groups
    step_rows = config.step
    steps = group_rows // step_rows
    lanes = dim // LANE_DIMS  # threads that hold a row
    by_lane = T.Fragment(
        (groups, step_rows, dim),
        lambda g, j, d: (g * lanes + d // LANE_DIMS, j * LANE_DIMS + d % LANE_DIMS),
    )

    def column(row: Any, d: Any) -> Any:
        """Return the channel of dim `d` in a row: series b of the block before, series a of this one."""
        return row // ratio * dim + d if ratio == OVERLAPPING else d

    def largest(tops: Any, d: Any) -> Any:
        value = tops[0, d]
        for g in range(1, groups):
            value = T.max(value, tops[g, d])
        return value

    def added(parts: Any, d: Any) -> Any:
        value = parts[0, d]
        for g in range(1, groups):
            value = T.ieee_add(value, parts[g, d])
        return value

    @T.macro
    def load(target: Any, tokens: Any, state: Any, blocks: Any, entry: Any, step: Any, empty: Any):
        for g, j, d in T.Parallel(groups, step_rows, dim):
            row = g * group_rows + step * step_rows + j
            behind = rows - 1 - row  # tokens before the block's last
            position = T.min(T.max(blocks[entry, POSITION], -1), MAX_POSITIONS) - behind
            target[g, j, d] = T.if_then_else(
                behind < blocks[entry, FRESH],
                tokens[T.max(blocks[entry, LAST], -1) - behind, column(row, d)],
                T.if_then_else(
                    position >= 0,
                    state[blocks[entry, SLOT], position % rows, column(row, d)],
                    empty,
                ),
            )

    @T.macro
    def load_step(scores: Any, values: Any, bias: Any, sources: Any, blocks: Any, entry: Any, step: Any):
        load(scores, sources[0], sources[1], blocks, entry, step, T.reinterpret(F32_MINUS_INF, "float32"))
        load(values, sources[2], sources[3], blocks, entry, step, 0.0)
        for g, j, d in T.Parallel(groups, step_rows, dim):
            row = g * group_rows + step * step_rows + j
            bias[g, j, d] = sources[4][row % ratio, column(row, d)]

    @T.macro
    def add_step(scores: Any, values: Any, bias: Any, top: Any, factor: Any, total: Any, acc: Any, step: Any):
        for g, j, d in T.Parallel(groups, step_rows, dim):
            scores[g, j, d] = scores[g, j, d] + bias[g, j, d]
        for g, d in T.Parallel(groups, dim):
            factor[g, d] = top[g, d]
        for j in T.unroll(step_rows):
            for g, d in T.Parallel(groups, dim):
                top[g, d] = T.max(top[g, d], scores[g, j, d])
        for g, d in T.Parallel(groups, dim):
            factor[g, d] = exp_weight(factor[g, d] - top[g, d])
        for g, j, d in T.Parallel(groups, step_rows, dim):
            scores[g, j, d] = exp_weight(scores[g, j, d] - top[g, d])
        for g, d in T.Parallel(groups, dim):
            total[g, d] = T.ieee_mul(total[g, d], factor[g, d])
        for g, d in T.Parallel(groups, dim):
            acc[g, d] = T.ieee_mul(acc[g, d], factor[g, d])
        for j in T.unroll(step_rows):
            for g, d in T.Parallel(groups, dim):
                total[g, d] = T.ieee_add(total[g, d], scores[g, j, d])
            for g, d in T.Parallel(groups, dim):
                acc[g, d] = T.ieee_fmaf(scores[g, j, d], values[g, j, d], acc[g, d])

    @T.macro
    def add_steps(
        next_scores: Any,
        next_values: Any,
        next_bias: Any,
        sources: Any,
        blocks: Any,
        entry: Any,
        top: Any,
        factor: Any,
        total: Any,
        acc: Any,
    ):
        scores = T.alloc_fragment((groups, step_rows, dim), T.float32)
        values = T.alloc_fragment((groups, step_rows, dim), T.float32)
        bias = T.alloc_fragment((groups, step_rows, dim), T.float32)
        T.annotate_layout({scores: by_lane, values: by_lane, bias: by_lane})
        for step in T.serial(steps):
            for g, j, d in T.Parallel(groups, step_rows, dim):
                scores[g, j, d] = next_scores[g, j, d]
            for g, j, d in T.Parallel(groups, step_rows, dim):
                values[g, j, d] = next_values[g, j, d]
            for g, j, d in T.Parallel(groups, step_rows, dim):
                bias[g, j, d] = next_bias[g, j, d]
            # The next rows are on their way while these are summed.
            if step + 1 < steps:
                load_step(next_scores, next_values, next_bias, sources, blocks, entry, step + 1)
            add_step(scores, values, bias, top, factor, total, acc, step)

    @T.macro
    def combine(top: Any, factor: Any, total: Any, acc: Any):
        tops = T.alloc_shared((groups, dim), T.float32)
        totals = T.alloc_shared((groups, dim), T.float32)
        accs = T.alloc_shared((groups, dim), T.float32)
        for g, d in T.Parallel(groups, dim):
            tops[g, d] = top[g, d]
        for g, d in T.Parallel(groups, dim):
            factor[g, d] = exp_weight(top[g, d] - largest(tops, d))
        for g, d in T.Parallel(groups, dim):
            totals[g, d] = T.ieee_mul(total[g, d], factor[g, d])
        for g, d in T.Parallel(groups, dim):
            accs[g, d] = T.ieee_mul(acc[g, d], factor[g, d])
        for g, d in T.Parallel(groups, dim):
            total[g, d] = added(totals, d)
        for g, d in T.Parallel(groups, dim):
            acc[g, d] = added(accs, d)

    @T.macro
    def pool(
        mean: Any,
        kv: Any,
        score: Any,
        kv_state: Any,
        score_state: Any,
        ape: Any,
        blocks: Any,
        entry: Any,
    ):
        top = T.alloc_fragment((groups, dim), T.float32)
        factor = T.alloc_fragment((groups, dim), T.float32)
        total = T.alloc_fragment((groups, dim), T.float32)
        acc = T.alloc_fragment((groups, dim), T.float32)
        next_scores = T.alloc_fragment((groups, step_rows, dim), T.float32)
        next_values = T.alloc_fragment((groups, step_rows, dim), T.float32)
        next_bias = T.alloc_fragment((groups, step_rows, dim), T.float32)
        T.annotate_layout({next_scores: by_lane, next_values: by_lane, next_bias: by_lane})
        sources = (score, score_state, kv, kv_state, ape)
        T.fill(top, FLOOR)
        T.clear(total)
        T.clear(acc)
        load_step(next_scores, next_values, next_bias, sources, blocks, entry, 0)
        if steps == 1:
            add_step(next_scores, next_values, next_bias, top, factor, total, acc, 0)
        else:
            add_steps(next_scores, next_values, next_bias, sources, blocks, entry, top, factor, total, acc)
        if groups > 1:
            combine(top, factor, total, acc)
        for g, d in T.Parallel(groups, dim):
            factor[g, d] = T.ieee_fdiv(acc[g, d], total[g, d])
        for d in T.Parallel(dim):
            mean[d] = factor[0, d]

    return pool


@T.macro
def rms_norm(mean: Any, weight: Any, words: Any, dim: Any):
    """Leave the normed means as words of two bf16; a norm's steps are those of the reference, one by one.

    Args:
        mean: [dim] fp32 in shared memory.
        weight: [dim / 2] int32 fragment, words of two bf16.
        words: [dim / 2] int32 fragment, the result.
        dim: channels.
    """
    squares = T.alloc_fragment((dim // 2,), T.float64)
    square_total = T.alloc_fragment((1,), T.float64)
    norm = T.alloc_fragment((1,), T.float32)
    for p in T.Parallel(dim // 2):
        words[p] = bf16_pair(mean[2 * p], mean[2 * p + 1])
    for p in T.Parallel(dim // 2):
        squares[p] = square_sum(words[p])
    T.reduce_sum(squares, square_total, dim=0)
    norm[0] = rms_factor(square_total[0], dim, NORM_EPS)
    for p in T.Parallel(dim // 2):
        words[p] = bf16_pair(
            even_f32(words[p]) * norm[0] * even_f32(weight[p]),
            odd_f32(words[p]) * norm[0] * odd_f32(weight[p]),
        )


def require_rows(
    name: str,
    dim: int,
    ratios: tuple[int, ...],
    kv: torch.Tensor,
    score: torch.Tensor,
    kv_state: torch.Tensor,
    score_state: torch.Tensor,
    blocks: torch.Tensor,
    ape: torch.Tensor,
    weight: torch.Tensor,
) -> None:
    """Raise ContractError unless tensors are as `compressor` has them, for entries of `dim` channels."""
    require_tensor(name, "kv", kv, dtype=torch.float32, ndim=2)
    require_tensor(name, "score", score, dtype=torch.float32, ndim=2, device=kv.device)
    require_tensor(name, "kv_state", kv_state, dtype=torch.float32, ndim=3, device=kv.device)
    require_tensor(name, "score_state", score_state, dtype=torch.float32, ndim=3, device=kv.device)
    require_tensor(name, "blocks", blocks, dtype=torch.int32, ndim=2, device=kv.device)
    require_tensor(name, "ape", ape, dtype=torch.float32, ndim=2, device=kv.device)
    require_tensor(name, "weight", weight, dtype=torch.bfloat16, ndim=1, device=kv.device)
    ratio = ape.shape[0]
    if ratio not in ratios:
        raise ContractError(f"{name}: requires ape.shape[0] in {ratios}, got ape.shape={tuple(ape.shape)}")
    width, rows = channels(ratio, dim), state_rows(ratio)
    for label, tensor in (("kv", kv), ("score", score)):
        require_shape(name, label, tensor, (kv.shape[0], width))
    for label, tensor in (("kv_state", kv_state), ("score_state", score_state)):
        require_shape(name, label, tensor, (kv_state.shape[0], rows, width))
    require_shape(name, "blocks", blocks, (blocks.shape[0], 4))
    require_shape(name, "ape", ape, (ratio, width))
    require_shape(name, "weight", weight, (dim,))


def make_rows(dims: Mapping[str, int], dim: int, device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return blocks of requests in all states: new, continued from state, and a few without a block."""
    generator = torch.Generator(device).manual_seed(seed)
    m, num_tokens, num_slots, ratio = dims["m"], dims["num_tokens"], dims["num_slots"], dims["ratio"]
    rows, width = state_rows(ratio), channels(ratio, dim)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def integers(high: torch.Tensor | int) -> torch.Tensor:
        return (torch.rand(m, generator=generator, device=device) * high).long()

    if dims["decode"]:
        last, fresh = integers(num_tokens), 1 + integers(1)
        position = integers(dims["num_positions"] // ratio) * ratio + ratio - 1
        blocks = torch.stack((last, fresh, position, integers(num_slots)), dim=1)
        if m > 2:
            blocks[m // 2] = torch.tensor((-1, 0, -1, -1), device=device)
    else:
        last = torch.arange(1, m + 1, device=device) * ratio - 1
        blocks = torch.stack((last, last + 1, last, torch.zeros_like(last)), dim=1)
    weight = (1 + normal(dim) / 4).to(torch.bfloat16)
    tokens = normal(num_tokens, width), 2 * normal(num_tokens, width)
    states = normal(num_slots, rows, width), 2 * normal(num_slots, rows, width)
    return *tokens, *states, blocks.to(torch.int32), normal(ratio, width), weight
