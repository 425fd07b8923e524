"""Mutate instances, kill the mutants, ask about the survivors."""

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from verify import extract, ir
from verify.extract import Extracted
from verify.mutate import equivalence
from verify.mutate.instances import Instance, get
from verify.mutate.kill import kill
from verify.mutate.mutant import Mutant
from verify.mutate.operators import OPERATORS
from verify.origin import Origins
from verify.solve import remembering
from verify.verdict import Verdict

Fate = Literal["REFUTED", "UNKNOWN", "UNSUPPORTED", "FAILED", "EQUIVALENT", "SURVIVED"]
KILLED: tuple[Fate, ...] = ("REFUTED", "UNKNOWN", "UNSUPPORTED", "FAILED")


@dataclass(frozen=True)
class Outcome:
    """One mutant and its fate.

    Attributes:
        fate: the verdict that killed it; FAILED where a property itself broke down; SURVIVED counts against
            the properties, EQUIVALENT does not.
        prop: the property that killed it.
        reason: the property's message, or what the interpreter found on a survivor.
        place: path:line:column of the author's statement.
        before, after: the innermost statement.
    """

    instance: str
    operator: str
    number: int
    fate: Fate
    prop: str
    reason: str
    place: str
    before: str
    after: str
    seconds: float


@dataclass(frozen=True)
class Work:
    """A share of the mutants of one instance: every `shares`-th from `share` on."""

    instance: str
    operators: tuple[str, ...]
    sample: int | None
    share: int
    shares: int


class BaselineError(RuntimeError):
    """The kernel itself is not PROVED, so that its mutants say nothing."""


def run_work(work: Work, options: None = None) -> list[Outcome]:
    """Check a share of the mutants."""
    del options
    instance, extracted = _prepared(work.instance)
    origins = Origins(extracted.tile)
    outcomes = []
    for number, mutant in _chosen(extracted, work)[work.share :: work.shares]:
        started = time.monotonic()
        fate, prop, reason = _fate(instance, extracted, mutant)
        before, after = mutant.diff()
        outcomes.append(
            Outcome(
                work.instance,
                mutant.operator.name,
                number,
                fate,
                prop,
                reason,
                str(origins.of(mutant.statement, (mutant.statement.span,)) or ""),
                before,
                after,
                time.monotonic() - started,
            )
        )
    return outcomes


def _chosen(extracted: Extracted, work: Work) -> list[tuple[int, Mutant]]:
    """Return (number within its operator, mutant): all, or a sample that a seed fixes."""
    chosen: list[tuple[int, Mutant]] = []
    for operator in OPERATORS:
        if operator.name in work.operators:
            numbered = list(enumerate(operator.mutants(extracted)))
            if work.sample is not None and len(numbered) > work.sample:
                generator = random.Random(f"{work.instance} {operator.name}")
                numbered = sorted(generator.sample(numbered, work.sample), key=lambda pair: pair[0])
            chosen += numbered
    return chosen


def _fate(instance: Instance, extracted: Extracted, mutant: Mutant) -> tuple[Fate, str, str]:
    mutated = mutant.apply(extracted)
    try:
        killed = kill(mutated, instance.spec.contract, instance.dims, mutant.operator.killers)
    except Exception as error:  # a property that breaks down does not say PROVED either
        return "FAILED", "", f"{type(error).__name__}: {error}"
    if killed.verdict is not Verdict.PROVED:
        return killed.verdict.value, killed.prop, killed.message
    try:
        found = equivalence.difference(instance, extracted, mutated)
    except (ir.UnsupportedIR, ImportError) as error:
        return "SURVIVED", "", f"not decided: {error}"
    if found is None:
        return "EQUIVALENT", "", "same bytes and no fault in every run"
    return "SURVIVED", "", found


_memory = ExitStack()  # lives as long as the process


@lru_cache(maxsize=1)
def _prepared(instance_id: str) -> tuple[Instance, Extracted]:
    """Lower an instance, and see that it is PROVED; its proofs are then remembered."""
    instance = get(instance_id)
    extracted = extract.extract(instance.spec.make_kernel(**instance.kwargs))
    _memory.close()
    _memory.enter_context(remembering())
    baseline = kill(extracted, instance.spec.contract, instance.dims)
    if baseline.verdict is not Verdict.PROVED:
        raise BaselineError(f"{instance_id}: {baseline.verdict} {baseline.prop}: {baseline.message}")
    return instance, extracted


def to_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return plain data."""
    from dataclasses import asdict

    return [asdict(o) for o in outcomes]
