"""Several ranks on one GPU: the fused kernel with every rank's buffers and CTAs on the same device.

The kernel, its order of tasks and its signals are those of one process a GPU; only the addresses of the
peers' buffers differ. With one rank it is the layer without any peer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dsv4_kernels.tile import simplifier
from megamoe import lowering, plan_kernel, signals
from megamoe.config import Config
from megamoe.experts import Experts
from megamoe.fused import make_kernel
from megamoe.plan import Plan
from megamoe.reference import Fp8Experts
from megamoe.schedule import Kind
from megamoe.signals import PHASE_SHIFT
from megamoe.trace import Event, events
from megamoe.weights import Packed, pack

# Tasks are chosen by data, which the compiler's own warp specialisation does not take. Barriers are the
# kernel's own: the compiler cannot tell stages of the ring apart, and would add two to each round.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_tma_lower": True,
    "tl.disable_thread_storage_sync": True,
}
_PHASES = {
    signals.PHASE_DISPATCH: "dispatch or widening: waiting for products to free the ring before block",
    signals.PHASE_LINEAR1: "linear 1: waiting for the rows, the ring or the widened weights of block",
    signals.PHASE_LINEAR2: "linear 2: waiting for linear 1 or the widened weights of block",
    signals.PHASE_START: "start: waiting for rank",
    signals.PHASE_COMBINE: "combine: waiting for rank",
    signals.PHASE_GRID: "a grid barrier: waiting for its own CTAs, phase",
}


class WatchdogError(RuntimeError):
    """A wait of the fused kernel was given up; the message names rank and phase."""


class CoResidencyError(ValueError):
    """The CTAs of a launch cannot all be resident, so that they could wait for ones that never start."""


def compile_kernel(config: Config, make: Callable[[Config], Any] = make_kernel) -> Any:
    """Return the compiled kernel that `make` describes."""
    import tilelang

    target = {"kind": "cuda", "arch": "sm_90a"}
    options = {"pass_configs": PASS_CONFIGS, "compile_flags": lowering.compile_flags()}
    with lowering.as_launched(), simplifier.lowering():
        return tilelang.compile(make(config), target=target, **options)


def packed_experts(ranks: Sequence[Experts], shared: Experts | None = None) -> Packed:
    """Return the weights of the ranks' experts, and of the shared one that each of them has, as the kernel's.

    Raises:
        ValueError: FP4 weights whose scales cannot be folded, or a shared expert without FP8 weights.
    """
    both = None
    if shared is not None:
        first, second = shared.l1.stacked(), shared.l2.stacked()
        if not (isinstance(first, Fp8Experts) and isinstance(second, Fp8Experts)):
            raise ValueError("mega_moe: requires e4m3 weights of the shared expert, got others")
        both = first, second
    return pack([(w.l1.stacked(), w.l2.stacked()) for w in ranks], both)


class VirtualRanks:
    """The expert layer of `config.num_ranks` ranks on one GPU; buffers are allocated once."""

    def __init__(
        self,
        config: Config,
        weights: Sequence[Experts] | Packed,
        device: torch.device | str = "cuda",
        shared: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Allocate and compile.

        Args:
            config: of the kernel.
            weights: of each rank of the launch, or laid out already.
            device: a Hopper GPU.
            shared: combine buffers [ranks * combine_rows, hidden] bf16 and signals [ranks, signal_words]
                int32, zero, of all ranks; None: on this GPU.

        Raises:
            CoResidencyError: the GPU has fewer multiprocessors than the launch has CTAs.
            ValueError: weights whose scales cannot be folded.
        """
        self.config = config
        count = torch.cuda.get_device_properties(device).multi_processor_count
        if config.launch_ranks * config.ctas > config.ctas_per_sm * count:
            raise CoResidencyError(
                f"mega_moe: requires launch_ranks * ctas <= ctas_per_sm * multiprocessors, got "
                f"{config.launch_ranks} * {config.ctas} on {config.ctas_per_sm} * {count}"
            )
        if config.launch_ranks > 1 and config.launch_ranks * config.num_experts > count:
            raise CoResidencyError(  # ranks meet in the plan's launch, of a CTA an expert
                f"mega_moe: requires launch_ranks * num_experts <= multiprocessors, got "
                f"{config.launch_ranks} * {config.num_experts} on {count}"
            )
        self._weights = weights if isinstance(weights, Packed) else packed_experts(weights)
        self._kernel = compile_kernel(config)
        self._plan_kernel = compile_kernel(config, plan_kernel.make_kernel)
        c, g = config, config.geometry

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        ranks = c.launch_ranks
        self.x_ring = zeros(ranks, *c.x_ring_shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
        self.x_ring_scale = zeros(ranks, g.x_ring, c.hidden // 128, c.block_m, dtype=torch.float32)
        self.h_ring = zeros(ranks, *c.h_ring_shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
        self.h_ring_scale = zeros(ranks, g.h_ring, c.inter // 128, c.block_m, dtype=torch.float32)
        self.wide_ring = zeros(ranks, *c.wide_ring_shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
        self.widened = zeros(ranks, c.widened_words, dtype=torch.int32)
        self.combine, self.signals = shared or (
            zeros(c.num_ranks * c.combine_rows, c.hidden, dtype=torch.bfloat16),
            zeros(c.num_ranks, c.signal_words, dtype=torch.int32),
        )
        self.counters = [zeros(ranks, c.pool_blocks, dtype=torch.int32) for _ in Kind]
        rows = c.pool_blocks * c.block_m
        self._plan = Plan(
            firsts=zeros(ranks, g.num_waves + 3, dtype=torch.int32),
            block_expert=zeros(ranks, c.pool_blocks, dtype=torch.int32),
            row_source=zeros(ranks, rows, dtype=torch.int32),
            row_target=zeros(ranks, rows, dtype=torch.int32),
            row_weight=zeros(ranks, rows, dtype=torch.float32),
            counts=zeros(ranks, c.num_experts, dtype=torch.int32),
        )
        self.grid_word = zeros(ranks, 1, dtype=torch.int32).view(torch.uint32)
        self.epochs = zeros(ranks, 1, dtype=torch.int32)
        self.status = zeros(ranks, c.status_words, dtype=torch.int32)

    def plan(self, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Plan:
        """Find where the rows of a routing go once the ranks have met; the host waits for nothing.

        Args:
            topk_idx: [ranks, tokens, topk] int32, global expert; negative: none. A token chooses an expert
                once.
            topk_weights: [ranks, tokens, topk] float32.

        Returns:
            The plan, in buffers that the next call writes again; see `plan.make_plan`.
        """
        p = self._plan
        self._plan_kernel(
            topk_idx.reshape(-1),
            topk_weights.reshape(-1),
            p.firsts,
            p.block_expert,
            p.row_source,
            p.row_target,
            p.row_weight,
            p.counts,
            self.signals,
            self.epochs,
            self.status,
        )
        return p

    def launch(
        self, x: torch.Tensor, x_scale: torch.Tensor, topk_idx: torch.Tensor, plan: Plan
    ) -> torch.Tensor:
        """Start the kernel; nothing is waited for.

        Args:
            x: [ranks, x_rows, hidden] e4m3, of all ranks.
            x_scale: [ranks, scale_rows, hidden / 128] uint8, UE8M0, of all ranks.
            topk_idx: [launch_ranks, tokens, topk] int32; negative: none.
            plan: from `plan`.

        Returns:
            [launch_ranks, tokens, hidden] bf16.
        """
        c = self.config
        y = torch.empty(c.launch_ranks, c.tokens, c.hidden, dtype=torch.bfloat16, device=x.device)
        self._kernel(
            x,
            x_scale,
            topk_idx,
            *c.arguments(self._weights),
            plan.firsts,
            plan.block_expert,
            plan.row_source,
            plan.row_target,
            plan.row_weight,
            self.x_ring,
            self.x_ring_scale,
            self.h_ring,
            self.h_ring_scale,
            self.combine,
            *self.counters,
            self.wide_ring,
            self.widened,
            self.grid_word,
            self.signals,
            self.epochs,
            self.status,
            y,
        )
        return y

    def check(self) -> None:
        """Wait for the launches so far.

        Raises:
            WatchdogError: a wait was given up; the buffers have to be allocated anew.
        """
        for rank, word in enumerate(self.status[:, 0].tolist(), self.config.first_rank):
            if word:
                phase, index = word >> PHASE_SHIFT, word & ((1 << PHASE_SHIFT) - 1)
                raise WatchdogError(f"mega_moe: rank {rank} gave up in {_PHASES[phase]} {index}")

    def events(self) -> list[Event]:
        """Return the timeline of the last launch, of a kernel with `trace`; the next one begins anew."""
        found = events(self.config, self.status.tolist(), self.config.first_rank)
        self.status[:, 1:] = 0
        return found
