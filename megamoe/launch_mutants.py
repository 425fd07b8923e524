"""Mutants of the kernels launched before the fused one: that of the inputs, and the plan's.

Judges are the suites of those kernels (`launch_proofs`), of the mutant. The plan's are those of two and of
three ranks, which meet first; the inputs' those without and with a shared expert.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dsv4_kernels.gemm.folded_tile import BLOCK_K
from megamoe import (
    launch_proofs,
    plan_machine,
    plan_proof,
    plan_properties,
    proofs,
    properties_proof,
    refine_plan,
    stage_proof,
)
from megamoe.config import Config
from megamoe.instances import PLANS, STAGES
from megamoe.mutants import Spec, ordered
from megamoe.plan_guide import PlanGuide
from verify.extract import Extracted
from verify.mutate.others import Stage
from verify.properties import Claims

_KERNEL = Spec()
_SMALL_PLANS, _SMALL_STAGES = ("plan", "plan-odd"), ("stage", "stage-options")
_FEWER = 3  # tokens of a call less than there may be
# Suites of the plan's kernel that say what a property of the verifier says, the likeliest first.
_SUITES = {
    "refinement": ("refinement",),
    "race": ("properties", "meeting"),
    **dict.fromkeys(("init", "coverage", "schedule"), ("properties",)),
    **dict.fromkeys(plan_machine.CLAIMS, ("machine",)),
}
_OTHERWISE = ("refinement", "plan", "properties", "machine", "meeting")


@dataclass(frozen=True)
class _Instance:
    """A kernel.

    Attributes:
        variant: its name among PLANS or STAGES, that of a suite of its.
    """

    variant: str
    config: Config
    spec: Spec = _KERNEL

    @property
    def id(self) -> str:
        """Kernel and variant."""
        return f"{self.spec.name}/{self.variant}"

    def source(self) -> str:
        """Return a hash of the kernel and of all that its claims are made by."""
        return proofs.SUITES[self.variant].digest()


class PlanInstance(_Instance):
    """A plan's kernel."""

    def extract(self) -> Extracted:
        """Lower the kernel."""
        return launch_proofs.plan_extracted(self.config)

    def arguments(self) -> tuple[torch.Tensor, ...]:
        """Return what the kernel is launched on, CPU tensors; some slots are masked."""
        c = self.config
        generator = torch.Generator().manual_seed(0)
        entries, local, rows = c.num_ranks * c.tokens * c.topk, c.launch_ranks, c.pool_blocks * c.block_m
        experts = c.num_ranks * c.num_experts

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32)

        return (
            torch.randint(-1, experts, (entries,), generator=generator, dtype=torch.int32),
            torch.rand(entries, generator=generator),
            zeros(local, c.geometry.num_waves + 3),
            zeros(local, c.pool_blocks),
            zeros(local, rows),
            zeros(local, rows),
            torch.zeros(local, rows),
            zeros(local, c.num_experts),
            zeros(c.num_ranks, c.signal_words),
            zeros(local, 1),
            zeros(local, c.status_words),
        )

    def stages(self, extracted: Extracted, likely: Sequence[str]) -> Iterator[Stage]:
        """Yield the claims of each suite, those that are about `likely` properties first."""
        claimed: dict[str, Callable[[Extracted], Mapping[str, Claims]]] = {
            "refinement": refine_plan.claims,
            "plan": lambda e: plan_proof.claims(e.device, PlanGuide(self.config)),
            "properties": self._properties,
            "machine": lambda e: plan_machine.claims(
                e, self.config, self.variant, f"properties-{self.variant}"
            ),
            "meeting": lambda e: {"meeting": proofs.meeting(self.config, e.device)},
        }
        for suite in ordered(likely, _SUITES, _OTHERWISE):
            yield suite, partial(claimed[suite], extracted)

    def _properties(self, extracted: Extracted) -> Mapping[str, Claims]:
        # A mutant has the kernel's CUDA text: that `plan` holds of it is asked for itself.
        missing = properties_proof.missing_of(extracted.cuda_sha256, {"plan": self.variant})
        return plan_properties.claims(extracted.device, PlanGuide(self.config), missing)


class StageInstance(_Instance):
    """A kernel of the inputs."""

    def extract(self) -> Extracted:
        """Lower the kernel."""
        return launch_proofs.stage_extracted(self.config)

    def arguments(self) -> tuple[torch.Tensor, ...]:
        """Return what the kernel is launched on, CPU tensors; fewer tokens than there may be."""
        c = self.config
        generator = torch.Generator().manual_seed(0)
        count, routed = c.tokens - _FEWER, c.topk - c.shared

        def some(*shape: int) -> torch.Tensor:
            return torch.randint(0, 120, shape, generator=generator, dtype=torch.uint8)

        x_parts = torch.zeros(c.num_ranks, c.x_rows, c.hidden, dtype=torch.uint8)
        return (
            some(count, c.hidden).view(torch.float8_e4m3fn),
            some(count, c.hidden // BLOCK_K),
            torch.randint(-1, c.num_experts, (count, routed), generator=generator, dtype=torch.int32),
            torch.rand(count, routed, generator=generator),
            x_parts.view(torch.float8_e4m3fn),
            torch.zeros(c.num_ranks, c.scale_rows, c.hidden // BLOCK_K, dtype=torch.uint8),
            torch.zeros(c.num_ranks, c.routing_words, dtype=torch.int32),
            torch.zeros(c.num_ranks, c.routing_words),
        )

    def stages(self, extracted: Extracted, likely: Sequence[str]) -> Iterator[Stage]:
        """Yield all claims: there is one suite."""
        del likely
        yield "stage", lambda: stage_proof.claims(extracted, self.config, self.variant)


def mutated() -> tuple[PlanInstance | StageInstance, ...]:
    """Return the kernels whose mutants are checked."""
    return (
        *(PlanInstance(name, PLANS[name]) for name in _SMALL_PLANS),
        *(StageInstance(name, STAGES[name]) for name in _SMALL_STAGES),
    )
