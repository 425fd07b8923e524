"""The fused kernel as the layer of one rank: kernels for a few numbers of tokens, one set of weights."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dsv4_kernels.gemm.folded_tile import BLOCK_K
from megamoe import stage_kernel
from megamoe.config import WIDE_M, Config
from megamoe.experts import Experts
from megamoe.symmetric import KEPT_BYTES, PART_BYTES, SharedRegions
from megamoe.virtual import VirtualRanks, compile_kernel, packed_experts
from megamoe.weights import Packed

# Most tokens of each kernel; a call takes the smallest that holds its tokens, with masked ones behind them.
BUCKETS = (8, 64, 512, 4096)
BLOCKS = (16, 32, 112)  # rows a block
MANY_M = 96  # where an expert has more rows than that: its product's loop spills nothing
FEW = 4  # expected rows of an expert up to which two CTAs share a multiprocessor
MANY_STAGES_M = 32  # rows a block up to which a stage is small
# Shapes (hidden, inter, experts of a rank, experts a token) of FP4 weights that are widened to a ring, and
# from how many tokens on: measured faster there, on one GPU. Docs: megamoe.md.
WIDENED_FROM = {(4096, 2048, 32, 6): 3072, (7168, 3072, 48, 6): 4096}
WIDE_STAGES = 3  # of 48 KB: what shared memory has beside a product that is handed over
PART_ROWS = 8  # of a block, that one dispatch task copies
POLLS_A_SECOND = 4_000_000  # of the watchdog, about: an H100 takes 0.2 us each
MAX_TIMEOUT_S = 120.0  # its polls, and the more patient ones of the grid barrier, are counted in 32 bits


def bucket(tokens: int, max_tokens: int) -> int:
    """Return for up to how many tokens the kernel is that a layer for `max_tokens` takes for `tokens`."""
    return next((b for b in BUCKETS if tokens <= b < max_tokens), max_tokens)


def config_for(
    tokens: int,
    *,
    topk: int,
    hidden: int,
    inter: int,
    num_experts: int,
    clamp: float,
    multiprocessors: int,
    fp8: bool = False,
    shared: bool = False,
    ranks: int = 1,
) -> Config:
    """Return the kernel for up to `tokens` tokens on one of `ranks` ranks; every choice gives the same bits.

    Each rank has `num_experts` experts and so many tokens. The configuration is of one rank: see `one_of`.

    A block holds what an expert receives of evenly spread tokens, and some more. With few rows everything is
    one wave: no CTA stands still where one begins; with many, waves keep the rings small, and warps of their
    own dispatch a wave while the one before is multiplied. FP4 weights of some shapes are widened to a ring
    in memory (WIDENED_FROM).

    `topk` and `num_experts` are of the routed experts; `fp8` and `shared` are those of `Config`.
    """
    expected = tokens * topk / num_experts
    # As much more as an expert's rows deviate from that; the rest comes to a second block of some experts.
    block_m = next((rows for rows in BLOCKS if rows >= expected + math.sqrt(expected)), MANY_M)
    is_small = tokens <= BUCKETS[2]
    ctas_per_sm = 2 if expected <= FEW else 1
    stages = 8 if block_m <= MANY_STAGES_M and ctas_per_sm == 1 else 4
    while math.gcd(hidden // BLOCK_K, inter // BLOCK_K) % stages:
        stages //= 2
    least = WIDENED_FROM.get((hidden, inter, num_experts, topk))
    widened = not (fp8 or shared) and ranks == 1 and least is not None and tokens >= least
    wide = widened or (fp8 and block_m > MANY_STAGES_M and min(hidden, inter) >= WIDE_STAGES * BLOCK_K)
    if wide:
        block_m, stages = WIDE_M, WIDE_STAGES
    return Config(
        num_ranks=1,
        launch_ranks=1,
        ctas=ctas_per_sm * multiprocessors,
        tokens=tokens,
        topk=topk + shared,
        hidden=hidden,
        inter=inter,
        num_experts=num_experts + shared,
        wave_experts=num_experts + shared if is_small else min(num_experts, 4),
        block_m=block_m,
        dispatch_parts=block_m // PART_ROWS,
        num_stages=stages,
        clamp=clamp,
        ctas_per_sm=ctas_per_sm,
        fp8=fp8,
        shared=shared,
        dispatchers=not (is_small or widened),
        wide=wide,
        widened=widened,
    )


def one_of(config: Config, ranks: int, rank: int, timeout_s: float) -> Config:
    """Return the kernel of one of several ranks, a process each, whose waits end after about `timeout_s`."""
    return replace(
        config,
        num_ranks=ranks,
        first_rank=rank,
        share_bytes=PART_BYTES,
        kept_bytes=KEPT_BYTES,
        max_polls=int(timeout_s * POLLS_A_SECOND),
    )


class FusedLayer(nn.Module):
    """Routed experts of one rank by the fused kernel.

    A kernel is compiled, and its buffers are allocated, at the first call that needs it, on all ranks
    together: call once with each size before capturing a graph. Buffers are integers, so that casting a
    model leaves them as they are. A kernel that widens FP4 weights to a ring keeps two waves of experts as
    e4m3 beside them, 24 * hidden * inter bytes: 201 MB for a Flash layer and 528 MB for one of Pro, for each
    size it is called with.
    """

    def __init__(
        self,
        experts: Experts,
        *,
        topk: int,
        max_tokens: int,
        group: dist.ProcessGroup | None = None,
        timeout_s: float = 60.0,
        changes: Mapping[str, Any] | None = None,
        shared: Experts | None = None,
    ) -> None:
        """Lay the weights out; `experts` are not kept.

        Args:
            experts: this rank's.
            topk: experts a token.
            max_tokens: most tokens a call of one rank.
            group: ranks, each a process with a GPU of one NVLink domain; None: all, if torch.distributed is
                initialised.
            timeout_s: after about so long a rank gives up waiting for another; at most MAX_TIMEOUT_S.
            changes: of the kernels' `Config`, for measurements.
            shared: the shared expert, of every rank's own tokens.

        Raises:
            ValueError: weights whose scales cannot be folded, or a timeout past that.
        """
        super().__init__()
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise ValueError(
                f"mega_moe: requires 0 < timeout_s <= {MAX_TIMEOUT_S:g}, got timeout_s={timeout_s:g}"
            )
        packed = packed_experts([experts], shared)
        self.is_fp8, self.has_shared = experts.l1.is_fp8, shared is not None
        self.register_buffer("words", packed.words.view(torch.int32))
        self.register_buffer("offsets", packed.offsets)
        self.register_buffer("factor_bits", packed.factors.view(torch.int32))
        self.hidden, self.inter, self.clamp = experts.hidden, experts.inter, experts.clamp
        self.num_experts, self.topk, self.max_tokens = experts.num_experts, topk, max_tokens
        self.group, self.timeout_s, self.changes = group, timeout_s, dict(changes or {})
        has_group = dist.is_available() and dist.is_initialized()
        self.num_ranks = dist.get_world_size(group) if has_group else 1
        self.rank = dist.get_rank(group) if has_group else 0
        self._sizes: dict[int, _Sized] = {}

    def forward(
        self,
        x: torch.Tensor,
        x_scale: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        most_tokens: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ([tokens, hidden] bf16, [experts] int32 rows received).

        Args:
            x: [tokens, hidden] e4m3 on a Hopper GPU.
            x_scale: [tokens, hidden / 128] e8m0.
            topk_idx: [tokens, topk] integer experts of all ranks, each once a token; negative: none.
            topk_weights: [tokens, topk] float32.
            most_tokens: at least what any rank has in this call, the same on all ranks, which choose the
                kernel by it; None: this rank's tokens if it is alone, otherwise `max_tokens`.

        Raises:
            SymmetricMemoryError: the ranks cannot share memory.
            ValueError: the tensors are not on a GPU.
        """
        return self.sized(x, most_tokens).run(x, x_scale, topk_idx, topk_weights)

    def sized(self, x: torch.Tensor, most_tokens: int | None = None) -> "_Sized":
        """Return the kernel with its buffers for a call, made now if it is the first of its size."""
        if not x.is_cuda:
            raise ValueError(f"mega_moe: requires CUDA tensors for the fused kernel, got {x.device}")
        if most_tokens is None:
            most_tokens = x.shape[0] if self.num_ranks == 1 else self.max_tokens
        size = bucket(most_tokens, self.max_tokens)
        if size not in self._sizes:
            self._sizes[size] = _Sized(self, size, x.device)
        return self._sizes[size]

    def check(self) -> None:
        """Wait for the calls so far.

        Raises:
            WatchdogError: a wait was given up; the message names rank and phase. The layer has to be made
                anew.
        """
        for sized in self._sizes.values():
            sized.ranks.check()

    def close(self) -> None:
        """Free the buffers; no rank may call the layer any more. Every rank has to do so."""
        for sized in self._sizes.values():
            sized.close()
        self._sizes.clear()


class _Sized:
    """The kernel for up to so many tokens a rank, with the inputs' places, which peers read.

    Tensors of all ranks are rank by rank; this one writes its own part, and its routing to every peer's.
    """

    def __init__(self, layer: FusedLayer, tokens: int, device: torch.device) -> None:
        ranks = layer.num_ranks
        config = config_for(
            tokens,
            topk=layer.topk,
            hidden=layer.hidden,
            inter=layer.inter,
            num_experts=layer.num_experts,
            clamp=layer.clamp,
            multiprocessors=_multiprocessors(device),
            fp8=layer.is_fp8,
            shared=layer.has_shared,
            ranks=ranks,
        )
        if ranks > 1:
            config = one_of(config, ranks, layer.rank, layer.timeout_s)
        config = replace(config, **layer.changes)
        weights = Packed(
            layer.get_buffer("words").view(torch.uint32),
            layer.get_buffer("offsets"),
            layer.get_buffer("factor_bits").view(torch.float32),
        )
        c, entries = config, ranks * tokens * config.topk
        parts = {
            "x": c.x_rows * c.hidden,
            "x_scale": c.scale_rows * (c.hidden // BLOCK_K),
            "topk_idx": 4 * c.routing_words,
            "topk_weights": 4 * c.routing_words,
            "combine": 2 * c.combine_rows * c.hidden,
            "signals": 4 * c.signal_words,
        }
        self._shared = SharedRegions(parts, layer.group, device) if ranks > 1 else None
        found = (
            self._shared.tensors
            if self._shared is not None
            else {
                name: torch.zeros(1, size, dtype=torch.uint8, device=device) for name, size in parts.items()
            }
        )
        self.x = found["x"].view(ranks, c.x_rows, c.hidden)
        self.x_scale = found["x_scale"].view(ranks, c.scale_rows, c.hidden // BLOCK_K)
        routing = (ranks, tokens, c.topk)  # of every rank, at every rank
        self._idx_parts = found["topk_idx"].view(torch.int32).view(ranks, c.routing_words)
        self._weight_parts = found["topk_weights"].view(torch.float32).view(ranks, c.routing_words)
        self.topk_idx = self._idx_parts[:, :entries].unflatten(1, routing)
        self.topk_weights = self._weight_parts[:, :entries].unflatten(1, routing)
        self._stage = compile_kernel(c, stage_kernel.make_kernel)
        combine = found["combine"].view(torch.bfloat16).view(ranks * c.combine_rows, c.hidden)
        self.ranks = VirtualRanks(config, weights, device, (combine, found["signals"].view(torch.int32)))
        if ranks > 1:
            torch.cuda.synchronize(device)
            dist.barrier(layer.group)  # compiled everywhere, so that nobody's first wait is for a compiler

    def run(
        self, x: torch.Tensor, x_scale: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        c = self.ranks.config
        me, count = c.first_rank, min(x.shape[0], c.tokens)  # the routing of tokens past them is masked
        codes = self.x.view(torch.float8_e4m3fn)
        if count:
            self._stage(
                x[:count].contiguous(),
                x_scale[:count].view(torch.uint8).contiguous(),
                topk_idx[:count].int().contiguous(),
                topk_weights[:count].contiguous(),
                codes,
                self.x_scale,
                self._idx_parts,
                self._weight_parts,
            )
        else:
            self.topk_idx[:, me] = -1
        plan = self.ranks.plan(self.topk_idx[me], self.topk_weights[me])
        y = self.ranks.launch(codes, self.x_scale, self.topk_idx[me, me].unsqueeze(0), plan)
        if count < x.shape[0]:
            y = torch.cat((y, y.new_zeros(1, x.shape[0] - count, y.shape[2])), 1)
        return y[0, : x.shape[0]], plan.counts[0, c.shared :]

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
