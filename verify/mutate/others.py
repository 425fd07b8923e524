"""Kernels that are mutated beside the registered ones: those whose properties are claims of suites.

A module of MODULES has `mutated()`, its kernels, those that are the quickest to run first.
"""

import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

import torch

from verify import ir
from verify.confirm import data_of, violated
from verify.extract import Extracted
from verify.interp import device
from verify.interp.device.errors import StepLimitError
from verify.interp.errors import InterpreterError, UnsupportedOpError
from verify.mutate.equivalence import Difference
from verify.mutate.kill import RLIMIT, BaselineError, Kill, with_runs
from verify.properties import Claims
from verify.solve import Prover, by_z3_alone
from verify.verdict import Verdict

MODULES = ("megamoe.mutants", "megamoe.launch_mutants")
_SEEDS = (0, 1, 2)  # of schedules
_LONG = 200_000  # steps of a run that takes minutes: one schedule is all there is time for
_LONGER = 4  # times the kernel's steps: what takes more has no end
_WAVE = 128  # threads that start together: faster, with fewer schedules

Stage = tuple[str, Callable[[], Mapping[str, Claims]]]  # a suite, and what it claims


class Spec(Protocol):
    """What a kernel is called."""

    @property
    def name(self) -> str:
        """As `--kernel` takes it."""


class Other(Protocol):
    """A kernel, lowered from one configuration."""

    @property
    def spec(self) -> Spec:
        """What it is called."""

    @property
    def id(self) -> str:
        """Kernel and variant."""

    @property
    def variant(self) -> str:
        """Which of its configurations."""

    def source(self) -> str:
        """Return a hash of what the kernel and its claims follow from; see `source_of`."""

    def extract(self) -> Extracted:
        """Lower the kernel."""

    def arguments(self) -> tuple[torch.Tensor, ...]:
        """Return what the kernel is launched on, CPU tensors; the same each time."""

    def stages(self, extracted: Extracted, likely: Sequence[str]) -> Iterator[Stage]:
        """Yield what is claimed of the kernel as it is, or with a fault; suites of `likely` properties first.

        Every suite comes; what is in a stage may be part of what a later one claims, for a first look.
        """


@cache
def instances() -> tuple[Other, ...]:
    """Return every kernel of MODULES."""
    return tuple(found for name in MODULES for found in importlib.import_module(name).mutated())


def get(instance_id: str) -> Other | None:
    """Return the kernel of that id, if it is one of these."""
    return next((i for i in instances() if i.id == instance_id), None)


def source_of(instance: Other) -> str:
    """Return a hash of what the fates of a kernel's mutants follow from, beside the verifier."""
    return hashlib.sha256(instance.source().encode() + Path(__file__).read_bytes()).hexdigest()


@dataclass
class Runs:
    """Runs the mutants of a kernel whose blocks wait for each other in loops, thread by thread beside it.

    Schedules are random ones alone: one that prefers a thread lets it wait for ever.

    Attributes:
        runs: how many runs of a mutant equivalence rests on.
    """

    instance: Other
    original: Extracted
    runs: int = 0

    def difference(self, mutated: Extracted) -> Difference | None:
        """Return how a run tells the mutant from the kernel: a fault, or other bytes; None if none does.

        Raises:
            UnsupportedIR: the interpreter cannot run the kernel.
            UnsupportedOpError: likewise, or there is too little memory for it.
        """
        self.runs = 0
        steps, wanted = self._sound
        for seed in _SEEDS if steps <= _LONG else _SEEDS[:1]:
            self.runs += 1
            try:
                _, got = self._run(mutated, seed, max_steps=_LONGER * steps)
            except (UnsupportedOpError, ir.UnsupportedIR):
                raise
            except StepLimitError as error:
                return Difference("", f"StepLimitError: {error}")
            except InterpreterError as error:
                return Difference("run", f"{type(error).__name__}: {error}")
            if not all(map(torch.equal, got, wanted)):
                return Difference("run", f"other bytes (schedule {seed})")
        return None

    @cached_property
    def _sound(self) -> tuple[int, list[torch.Tensor]]:
        """What a run of the kernel takes, in steps, and the bytes of its arguments."""
        return self._run(self.original, _SEEDS[0])

    def _run(self, kernel: Extracted, seed: int, **limits: int) -> tuple[int, list[torch.Tensor]]:
        args = self.instance.arguments()
        try:
            summary = device.run(kernel, *args, seed=seed, wave_threads=_WAVE, **limits)
        except MemoryError as error:  # of shadow memory, which says nothing of the mutant
            raise UnsupportedOpError(f"no room for the run: {error}") from error
        return summary.steps, [a.view(torch.uint8) for a in args]


@dataclass
class SuiteJudge:
    """Checks the mutants of one kernel by the claims of its suites; as `kill.Judge` does by properties.

    Attributes:
        evaluates: compute what a violated claim says at its counterexample, which confirms it.
    """

    extracted: Extracted
    instance: Other
    referee: Runs
    evaluates: bool = False
    _is_proved: bool = field(default=False)

    def prove(self) -> None:
        """Prove every claim of the kernel itself.

        Raises:
            BaselineError: it is not PROVED.
        """
        if self._is_proved:
            return
        failed = self._decided(self.extracted, ())
        if failed.verdict is not Verdict.PROVED:
            raise BaselineError(f"{failed.verdict} {failed.prop}: {failed.message}")
        self._is_proved = True

    def kill(self, mutated: Extracted, likely: tuple[str, ...] = ()) -> Kill:
        """Check a mutant: REFUTED by a claim, or by a run at the first that is left open; by z3 alone.

        Raises:
            BaselineError: the kernel is not PROVED.
        """
        self.prove()
        return with_runs(lambda run: self._decided(mutated, likely, run), self.referee, mutated)

    def _decided(
        self, kernel: Extracted, likely: Sequence[str], run: Callable[[], Kill | None] = lambda: None
    ) -> Kill:
        undecided: Kill | None = None
        with by_z3_alone():
            for suite, claimed in self.instance.stages(kernel, likely):
                found = failure(suite, claimed, self.evaluates)
                if found is None:
                    continue
                if found.verdict is Verdict.REFUTED:
                    return found
                if undecided is None:
                    undecided = found
                    if (shown := run()) is not None:
                        return shown
        return undecided or Kill(Verdict.PROVED)


def failure(suite: str, claimed: Callable[[], Mapping[str, Claims]], evaluates: bool = False) -> Kill | None:
    """Return what keeps a suite from PROVED: a violation before what is not decided."""
    undecided: Kill | None = None
    try:
        every = claimed()
    except ir.UnsupportedIR as error:
        return Kill(Verdict.UNSUPPORTED, suite, str(error))
    for name, claims in every.items():
        prover = Prover(RLIMIT, recheck=False)
        for answer in (*claims.answers, *prover.answers(claims.obligations)):
            if answer.verdict is Verdict.REFUTED:
                shown = violated(answer, data_of(answer)) if evaluates else None
                return Kill(answer.verdict, suite, f"{name}: {answer.obligation.what}", evaluated=shown or "")
            if answer.verdict is not Verdict.PROVED and undecided is None:
                reason = f"{name}: {answer.obligation.what} ({answer.reason})"
                undecided = Kill(answer.verdict, suite, reason)
        for verdict, issues in (
            (Verdict.UNSUPPORTED, claims.unsupported),
            (Verdict.UNKNOWN, claims.unknown),
        ):
            if issues and undecided is None:
                undecided = Kill(verdict, suite, f"{name}: {issues[0].message}")
    return undecided
