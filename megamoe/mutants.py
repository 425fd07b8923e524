"""The fused kernel's mutants: `dsv4-verify --mutate --kernel megamoe`.

Faults are those of the verifier's operators, in the device IR and the launch of the small kernels, which have
every part of the code. The judges are what is proved of the kernel: the claims of the suites `refinement*`,
`roles*`, `signals*`, `properties*`, `machine*` and `protocol*`, of the mutant. What they leave open, or
prove, runs thread by thread beside the kernel. Of the kernels launched before it see `launch_mutants`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from dsv4_kernels.contract import Contract
from megamoe import (
    launches,
    machine_proof,
    proofs,
    properties_proof,
    refine_proof,
    roles_proof,
    signals_proof,
)
from megamoe.config import Config
from megamoe.instances import SMALL
from verify.extract import Extracted
from verify.host import read_host
from verify.mutate.others import Stage
from verify.properties import Claims, Context
from verify.properties.refinement import changed
from verify.refine.run import readings

# Suites that say what a property of the verifier says, the likeliest first.
_SUITES = {
    "refinement": ("refinement",),
    "mbarrier": ("roles",),
    "race": ("roles", "signals", "properties"),
    "init": ("properties", "roles"),
    "coverage": ("signals", "properties"),
    "schedule": ("signals",),
    **dict.fromkeys(("overflow", "alignment", "banks", "barrier", "bounds", "determinism"), ("machine",)),
}
_OTHERWISE = ("refinement", "roles", "signals", "properties", "protocol", "machine")
_CHEAPEST = ("-fp8", "", "-options", "-wide", "-ahead", "-widened")  # to run: 11 s of CPU to 200


@dataclass(frozen=True)
class Spec:
    """What the kernel is called."""

    name: str = proofs.SUITES["order"].kernel


@dataclass(frozen=True)
class Instance:
    """One of the small kernels.

    Attributes:
        form: suffix of its suites.
    """

    form: str
    config: Config
    spec: Spec = Spec()

    @property
    def variant(self) -> str:
        """The kernel's name in `dsv4-verify megamoe/kernels.py`."""
        return f"fused{self.form}"

    @property
    def id(self) -> str:
        """Kernel and variant."""
        return f"{self.spec.name}/{self.variant}"

    def source(self) -> str:
        """Return a hash of the kernel and of all that its claims are made by."""
        return proofs.SUITES[f"refinement{self.form}"].digest()

    def extract(self) -> Extracted:
        """Lower the kernel."""
        return proofs.extracted(self.config)

    def arguments(self) -> tuple[torch.Tensor, ...]:
        """Return what the kernel is launched on, CPU tensors; rows of few tokens."""
        return tuple(launches.random(0, self.config).arguments)

    def stages(self, extracted: Extracted, likely: Sequence[str]) -> Iterator[Stage]:
        """Yield the claims of each suite, those that are about `likely` properties first."""
        for suite in ordered(likely, _SUITES, _OTHERWISE):
            if suite == "refinement":
                yield suite, partial(self._steps, extracted)
            yield suite, partial(self._claims(suite), extracted)

    def _claims(self, suite: str) -> Callable[[Extracted], Mapping[str, Claims]]:
        return {
            "refinement": refine_proof.claims,
            "roles": self._roles,
            "signals": self._signals,
            "properties": self._properties,
            "machine": self._machine,
            "protocol": self._protocol,
        }[suite]

    def _steps(self, extracted: Extracted) -> Mapping[str, Claims]:
        """Return the claim `refinement` of the steps alone that read otherwise than the kernel's."""
        return {"refinement": Claims(changed(_refined(extracted), self._readings))}

    @cached_property
    def _readings(self) -> Mapping[int, str]:
        sound = _refined(self.extract())
        return readings(sound.extracted, sound.host, sound.hypotheses)

    def _roles(self, extracted: Extracted) -> Mapping[str, Claims]:
        copies = roles_proof.boxes(read_host(extracted.host, extracted.device, extracted.tile))
        return roles_proof.claims(extracted.device, copies, roles_proof.roles_of(self.config))

    def _signals(self, extracted: Extracted) -> Mapping[str, Claims]:
        copies = roles_proof.boxes(read_host(extracted.host, extracted.device, extracted.tile))
        return signals_proof.claims(extracted.device, copies, self.config)

    def _properties(self, extracted: Extracted) -> Mapping[str, Claims]:
        # A mutant has the kernel's CUDA text: that `roles` and `signals` hold of it is asked for itself.
        suites = {"roles": f"roles{self.form}", "signals": f"signals{self.form}"}
        missing = properties_proof.missing_of(extracted.cuda_sha256, suites)
        copies = roles_proof.boxes(read_host(extracted.host, extracted.device, extracted.tile))
        return properties_proof.claims(extracted.device, copies, self.config, missing)

    def _machine(self, extracted: Extracted) -> Mapping[str, Claims]:
        return machine_proof.claims(extracted, self.config, f"properties{self.form}")

    def _protocol(self, extracted: Extracted) -> Mapping[str, Claims]:
        return {"signals": proofs.signals_followed(self.form, extracted.device)}


def ordered(
    likely: Sequence[str], suites: Mapping[str, Sequence[str]], otherwise: Sequence[str]
) -> Iterable[str]:
    """Return the suites, once each: those about `likely` properties, then the others as they stand."""
    return dict.fromkeys((*(suite for name in likely for suite in suites.get(name, ())), *otherwise))


def mutated() -> tuple[Instance, ...]:
    """Return the kernels whose mutants are checked."""
    return tuple(Instance(form, SMALL[form]) for form in _CHEAPEST)


def _refined(extracted: Extracted) -> Context:
    host = read_host(extracted.host, extracted.device, extracted.tile)
    kernel, launch, _ = refine_proof.rewritten(extracted, host)
    context = Context(kernel, Contract(()), {})
    context.__dict__["host"] = launch  # with the notes that threads share
    return context
