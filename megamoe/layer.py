"""The fused kernel as a layer on one rank: kernels for a few numbers of tokens, one set of weights."""

import math
from functools import cache

import torch
from torch import nn

from dsv4_kernels.gemm.folded_tile import BLOCK_K
from megamoe.config import Config
from megamoe.experts import Experts
from megamoe.virtual import VirtualRanks
from megamoe.weights import Packed, pack

# Most tokens of each kernel; a call takes the smallest that holds its tokens, with masked ones behind them.
BUCKETS = (8, 64, 512, 4096)


def config_for(
    tokens: int, *, topk: int, hidden: int, inter: int, num_experts: int, clamp: float, multiprocessors: int
) -> Config:
    """Return the kernel for up to `tokens` tokens on one rank; every choice gives the same bits.

    A block holds what an expert receives of evenly spread tokens, and some more. With few rows everything is
    one wave: no CTA stands still where one begins; with many, waves keep the rings small.
    """
    few, some, most = 16, 32, 128  # rows a block
    expected = tokens * topk / num_experts
    block_m = few if 4 * expected <= few else some if 2 * expected <= some else most
    is_small = tokens <= BUCKETS[2]
    ctas_per_sm = 2 if block_m == few else 1
    stages = 8 if block_m == some else 4
    while math.gcd(hidden // BLOCK_K, inter // BLOCK_K) % stages:
        stages //= 2
    return Config(
        num_ranks=1,
        launch_ranks=1,
        ctas=ctas_per_sm * multiprocessors,
        tokens=tokens,
        topk=topk,
        hidden=hidden,
        inter=inter,
        num_experts=num_experts,
        wave_experts=num_experts if is_small else min(num_experts, 4),
        block_m=block_m,
        dispatch_parts=block_m // 8 if block_m < most else 4,  # about a task a CTA in each wave
        num_stages=stages,
        clamp=clamp,
        ctas_per_sm=ctas_per_sm,
    )


class FusedLayer(nn.Module):
    """Routed experts of one rank by the fused kernel.

    A kernel is compiled, and its buffers are allocated, at the first call that needs it: call once with each
    size before capturing a graph. Buffers are integers, so that casting a model leaves them as they are.
    """

    def __init__(self, experts: Experts, *, topk: int, max_tokens: int) -> None:
        """Lay the weights out; `experts` are not kept.

        Raises:
            ValueError: weights whose scales cannot be folded.
        """
        super().__init__()
        packed = pack([(experts.l1.stacked(), experts.l2.stacked())])
        self.register_buffer("words", packed.words.view(torch.int32))
        self.register_buffer("offsets", packed.offsets)
        self.register_buffer("factor_bits", packed.factors.view(torch.int32))
        self.hidden, self.inter, self.clamp = experts.hidden, experts.inter, experts.clamp
        self.num_experts, self.topk, self.max_tokens = experts.num_experts, topk, max_tokens
        self._sizes: dict[int, _Sized] = {}

    def forward(
        self, x: torch.Tensor, x_scale: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ([tokens, hidden] bf16, [experts] int32 rows received).

        Args:
            x: [tokens, hidden] e4m3 on a Hopper GPU.
            x_scale: [tokens, hidden / 128] e8m0.
            topk_idx: [tokens, topk] integer experts, each once a token; negative: none.
            topk_weights: [tokens, topk] float32.
        """
        if not x.is_cuda:
            raise ValueError(f"mega_moe: requires CUDA tensors for the fused kernel, got {x.device}")
        size = next((b for b in BUCKETS if x.shape[0] <= b < self.max_tokens), self.max_tokens)
        if size not in self._sizes:
            self._sizes[size] = _Sized(self, size, x.device)
        return self._sizes[size].run(x, x_scale, topk_idx, topk_weights)

    def check(self) -> None:
        """Wait for the calls so far.

        Raises:
            WatchdogError: a wait was given up.
        """
        for sized in self._sizes.values():
            sized.ranks.check()


class _Sized:
    """The kernel for up to so many tokens, with buffers for its inputs."""

    def __init__(self, layer: FusedLayer, tokens: int, device: torch.device) -> None:
        config = config_for(
            tokens,
            topk=layer.topk,
            hidden=layer.hidden,
            inter=layer.inter,
            num_experts=layer.num_experts,
            clamp=layer.clamp,
            multiprocessors=_multiprocessors(device),
        )
        weights = Packed(
            layer.get_buffer("words").view(torch.uint32),
            layer.get_buffer("offsets"),
            layer.get_buffer("factor_bits").view(torch.float32),
        )
        self.ranks = VirtualRanks(config, weights, device)
        self.x = torch.zeros(1, tokens, layer.hidden, dtype=torch.uint8, device=device)
        self.x_scale = torch.zeros(1, tokens, layer.hidden // 128, dtype=torch.uint8, device=device)
        self.topk_idx = torch.empty(1, tokens, layer.topk, dtype=torch.int32, device=device)
        self.topk_weights = torch.zeros(1, tokens, layer.topk, dtype=torch.float32, device=device)

    def run(
        self, x: torch.Tensor, x_scale: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = min(x.shape[0], self.x.shape[1])  # the routing of tokens past them is masked
        self.x[0, :count] = x[:count].view(torch.uint8)
        self.x_scale[0, :count] = x_scale[:count].view(torch.uint8)
        self.topk_idx[0, :count] = topk_idx[:count]
        self.topk_idx[0, count:] = -1
        self.topk_weights[0, :count] = topk_weights[:count]
        plan = self.ranks.plan(self.topk_idx, self.topk_weights)
        y = self.ranks.launch(self.x.view(torch.float8_e4m3fn), self.x_scale, self.topk_idx, plan)
        if count < x.shape[0]:
            y = torch.cat((y, y.new_zeros(1, x.shape[0] - count, y.shape[2])), 1)
        return y[0, : x.shape[0]], plan.counts[0]


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
