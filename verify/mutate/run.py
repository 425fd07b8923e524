"""Lower instances, kill their mutants, ask the interpreter about those that no property REFUTED."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import tilelang

from dsv4_kernels.tile.corrections import corrected
from verify import extract, ir
from verify.interp.errors import InterpreterError
from verify.mutate import classes, others
from verify.mutate.classes import Class, Listed, Listing
from verify.mutate.equivalence import Referee
from verify.mutate.instances import Instance, get, instances
from verify.mutate.kill import BaselineError, Judge, Kill
from verify.mutate.mutant import Mutant
from verify.mutate.operators import get as get_operator
from verify.mutate.store import Store
from verify.solve import Proved, remembering
from verify.verdict import Counterexample, Verdict

Fate = Literal["REFUTED", "UNKNOWN", "UNSUPPORTED", "FAILED", "EQUIVALENT", "SURVIVED", "PROVED"]
_MAX_STEPS = 100_000  # of a run of a replay: what is longer than a few of the small shapes does not end
_ALL_STEPS = 5_000  # of all runs for a claim that an evaluation confirms anyway
_ROOTS = (Path(__file__).parents[2], Path(tilelang.__file__).parents[1])  # of the project, of the compiler
_FOLDERS = re.compile("|".join(re.escape(f"{root}/") for root in _ROOTS))
UNDECIDED: tuple[Fate, ...] = ("UNKNOWN", "UNSUPPORTED", "FAILED")  # not PROVED, and not REFUTED either
NOTICED: tuple[Fate, ...] = ("REFUTED", *UNDECIDED)


@dataclass(frozen=True)
class Outcome:
    """One class of mutants and the fate of the one that was checked.

    Attributes:
        key: name of the class; `members` is its size over all instances.
        fate: the verdict on it. FAILED: a property itself broke down. SURVIVED (PROVED all the same) counts
            against the properties; EQUIVALENT does not: no property REFUTED it and every run was the same.
            PROVED: not run yet, which counts against them too.
        prop: the property that gave the verdict.
        reason: its message, or what the interpreter found.
        place: path:line:column of the author's statement.
        before, after: the innermost statement.
        replayed: whether a run of the counterexample confirms REFUTED; None where that was not asked.
        replay: what that run showed.
        seconds: of this process, all included.
        runs: of the mutant beside the kernel; None: the interpreter was not asked yet.
        model: the counterexample, by field, for a replay.
        evaluated: what `confirm.violated` said of its claim.
        by_run: a run confirms it, and not an evaluation.
    """

    key: str
    members: int
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
    replayed: bool | None = None
    replay: str = ""
    runs: int | None = None
    model: dict[str, dict[str, Any]] | None = None
    evaluated: str = ""
    by_run: bool = False

    @property
    def awaits_runs(self) -> bool:
        """Whether the interpreter has still to say if the mutant is equivalent."""
        return self.runs is None and self.fate in ("PROVED", *UNDECIDED)

    @property
    def awaits_replay(self) -> bool:
        """Whether its counterexample is known and was not run."""
        return self.fate == "REFUTED" and self.replayed is None and self.model is not None


@dataclass(frozen=True)
class Options:
    """How mutants are checked.

    Attributes:
        results: file of outcomes.
        replay: keep the counterexample of each that is REFUTED, and make it small, to be run.
        until: when no other is begun, in seconds since the epoch; None: never.
    """

    results: Path | None = None
    replay: bool = False
    until: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        return self.until is not None and time.time() > self.until


def _other(instance_id: str) -> others.Other | None:
    """Return the kernel of that id if it is no registered one, for which no other module is imported."""
    return None if any(i.id == instance_id for i in instances()) else others.get(instance_id)


def source_of(instance_id: str, options: Options | None = None) -> str:
    """Return the hash of what an instance is lowered from."""
    del options
    if (other := _other(instance_id)) is not None:
        return others.source_of(other)
    instance = get(instance_id)
    with corrected():
        return extract.source_sha256(instance.spec.make_kernel(**instance.kwargs))


def list_mutants(work: tuple[str, str], options: Options) -> Listing:
    """Lower an instance (id, source), return its mutants and keep the list."""
    instance_id, source = work
    instance = _other(instance_id) or get(instance_id)
    found = classes.listing(instance, instance.extract())
    Store(options.results).add_listing(source, instance_id, found)
    return found


@dataclass(frozen=True)
class Work:
    """Some classes (or outcomes) whose chosen mutants are of one instance, lowered from `source`."""

    instance: str
    source: str
    items: tuple[Any, ...]

    @property
    def kernel(self) -> str:
        """The kernel's name."""
        return self.instance.partition("/")[0]


def finish(work: Work, item: Class | Outcome, options: Options) -> Outcome:
    """Check one class, run it where no property decided, replay its counterexample; keep what was found."""
    at, store = prepared(work.instance, options.replay), Store(options.results)
    with remembering(at.proved):
        outcome = item if isinstance(item, Outcome) else _checked(at, item, options)
        if outcome.awaits_runs:
            outcome = _judged(at, outcome)
        if outcome is not item:
            store.add_outcome(work.source, outcome)
        if options.replay and outcome.awaits_replay:
            outcome = _replayed(at, outcome)
            store.add_outcome(work.source, outcome)
    return outcome


@dataclass(frozen=True)
class Prepared:
    """An instance that is lowered, and what its mutants are checked with.

    Attributes:
        mutants: by operator, filled as they are asked for.
        proved: of the kernel and of its mutants, remembered as long as this is.
    """

    instance: Instance | others.Other
    judge: Judge | others.SuiteJudge
    referee: Referee | others.Runs
    places: classes.Places
    mutants: dict[str, list[Mutant]] = field(default_factory=dict)
    proved: Proved = field(default_factory=dict)

    def prove(self) -> None:
        """Prove every property of the kernel itself.

        Raises:
            BaselineError: it is not PROVED.
        """
        with remembering(self.proved):
            self.judge.prove()

    def mutant(self, item: Listed | Outcome) -> Mutant:
        """Return the mutant that a listing or an outcome is about."""
        if item.operator not in self.mutants:
            self.mutants[item.operator] = get_operator(item.operator).mutants(self.judge.extracted)
        return self.mutants[item.operator][item.number]


@lru_cache(maxsize=1)
def prepared(instance_id: str, minimise: bool) -> Prepared:
    """Lower an instance; it is kept until the next one."""
    if (other := _other(instance_id)) is not None:
        extracted = other.extract()
        runs = others.Runs(other, extracted)
        judge = others.SuiteJudge(extracted, other, runs, minimise)
        return Prepared(other, judge, runs, classes.Places(extracted))
    instance = get(instance_id)
    extracted = instance.extract()
    referee = Referee(instance, extracted)
    judge = Judge(extracted, instance.spec.contract, instance.dims, instance.dispatch, minimise, referee)
    return Prepared(instance, judge, referee, classes.Places(extracted))


def _checked(at: Prepared, chosen: Class, options: Options) -> Outcome:
    started = time.process_time()
    mutant = at.mutant(chosen.chosen)
    mutated = mutant.apply(at.judge.extracted)
    killed, fate = _fate(at, mutant, mutated)
    before, after = mutant.diff()
    by_run = fate == "REFUTED" and killed.runs is not None
    outcome = Outcome(
        chosen.chosen.key,
        chosen.members,
        at.instance.id,
        mutant.operator.name,
        chosen.chosen.number,
        fate,
        killed.prop,
        anywhere(killed.message),
        anywhere(str(at.places.of(mutant) or "")),
        before,
        after,
        time.process_time() - started,
        replayed=True if by_run else None,
        replay=anywhere(killed.shown) if by_run else "",
        model=_plain(killed.counterexample) if options.replay and fate == "REFUTED" and not by_run else None,
        evaluated=killed.evaluated,
        by_run=by_run,
    )
    return outcome if killed.runs is None else _seen(outcome, killed.runs, killed.shown or None)


def _seen(known: Outcome, runs: int, found: str | None) -> Outcome:
    """Return an outcome with what runs beside the kernel showed: nothing (None), or what."""
    if known.fate == "REFUTED":
        return replace(known, runs=runs)
    note = f"same bytes and no fault in {runs} runs" if found is None else anywhere(found)
    return replace(
        known,
        fate="EQUIVALENT" if found is None else "SURVIVED" if known.fate == "PROVED" else known.fate,
        prop="" if found is None else known.prop,
        reason="; ".join(filter(None, (note, known.reason) if found is None else (known.reason, note))),
        runs=runs,
    )


def anywhere(text: str) -> str:
    """Return a text without the folders that are this machine's own: results go from one to another."""
    return _FOLDERS.sub("", text)


def _plain(found: Counterexample | None) -> dict[str, dict[str, Any]]:
    """Return what a replay takes of a counterexample, as plain data."""
    if found is None:
        return {}
    parts = {name: dict(getattr(found, name)) for name in ("shape", "block", "thread", "loops", "values")}
    return json.loads(json.dumps(parts, default=str))


def _fate(at: Prepared, mutant: Mutant, mutated: extract.Extracted) -> tuple[Kill, Fate]:
    try:
        killed = at.judge.kill(mutated, mutant.operator.killers)
        return killed, killed.verdict.value
    except BaselineError as error:
        raise BaselineError(f"{at.instance.id}: {error}") from None
    except Exception as error:  # a property that breaks down does not say PROVED either
        return Kill(Verdict.UNKNOWN, "", f"{type(error).__name__}: {error}"), "FAILED"


def _judged(at: Prepared, known: Outcome) -> Outcome:
    """Ask the interpreter about a mutant that no property REFUTED."""
    started = time.process_time()
    _, note = _shown(at, known)
    seconds = known.seconds + time.process_time() - started
    return replace(_seen(known, at.referee.runs, note), seconds=seconds)


def _shown(at: Prepared, known: Outcome) -> tuple[bool, str | None]:
    """Run a mutant beside its kernel: whether that shows a fault, and what it shows; None: nothing."""
    try:
        found = at.referee.difference(at.mutant(known).apply(at.judge.extracted))
    except (ir.UnsupportedIR, InterpreterError, ImportError) as error:
        return False, f"not decided by runs: {error}"
    return (False, None) if found is None else (bool(found.prop), found.note)


def _replayed(at: Prepared, known: Outcome) -> Outcome:
    """Run the counterexample of a mutant that is REFUTED; of a suite's claim see `_of_suite`."""
    if isinstance(at.judge, others.SuiteJudge):
        return _of_suite(at, known)
    from verify.confirm import Confirmation, confirm
    from verify.interp.device.outcome import Budget

    started = time.process_time()
    model = Counterexample(**cast(Any, known.model)) if known.model else None
    try:
        shown = confirm(
            at.judge.context(at.mutant(known).apply(at.judge.extracted)),
            model,
            known.prop,
            known.reason,
            sound=at.judge.extracted,
            max_steps=Budget(_MAX_STEPS, _ALL_STEPS) if known.evaluated else _MAX_STEPS,
            evaluated=known.evaluated,
        )
    except Exception as error:  # the interpreter broke down, which confirms nothing
        shown = Confirmation(False, False, f"{type(error).__name__}: {error}")
    return replace(
        known,
        replayed=shown.confirmed,
        replay=anywhere(shown.note),
        by_run=shown.by_run,
        seconds=known.seconds + time.process_time() - started,
    )


def _of_suite(at: Prepared, known: Outcome) -> Outcome:
    """Confirm what a suite refutes: by what the claim says at its counterexample, else beside the kernel.

    A claim is about every schedule and routing, and its counterexample a state of one of them: the run, of a
    given routing, need not come by it.
    """
    if known.evaluated:
        return replace(known, replayed=True, replay=anywhere(known.evaluated))
    started = time.process_time()
    is_fault, note = _shown(at, known)
    return replace(
        known,
        replayed=is_fault,
        replay=anywhere(note or "no fault and the same bytes"),
        by_run=is_fault,
        seconds=known.seconds + time.process_time() - started,
    )


def to_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return plain data."""
    return [asdict(o) for o in outcomes]
