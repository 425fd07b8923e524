"""Lower instances, kill their mutants, ask the interpreter about those that no property REFUTED."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

from dsv4_kernels.tile.wgmma import corrected
from verify import extract, ir
from verify.interp.errors import InterpreterError
from verify.mutate import classes
from verify.mutate.classes import Class, Listed
from verify.mutate.equivalence import Referee
from verify.mutate.instances import Instance, get
from verify.mutate.kill import BaselineError, Judge, Kill
from verify.mutate.mutant import Mutant
from verify.mutate.operators import get as get_operator
from verify.mutate.store import Store
from verify.solve import remembering
from verify.verdict import Counterexample, Verdict

Fate = Literal["REFUTED", "UNKNOWN", "UNSUPPORTED", "FAILED", "EQUIVALENT", "SURVIVED", "PROVED"]
_MAX_STEPS = 100_000  # of a replay: what is longer than a few of the small shapes does not end
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


def source_of(instance_id: str, options: Options | None = None) -> str:
    """Return the hash of what an instance is lowered from."""
    del options
    instance = get(instance_id)
    with corrected():
        return extract.source_sha256(instance.spec.make_kernel(**instance.kwargs))


def list_mutants(work: tuple[str, str, tuple[str, ...]], options: Options) -> list[Listed]:
    """Lower an instance (id, source, operators), return its mutants and keep the list."""
    instance_id, source, operators = work
    instance = get(instance_id)
    found = [*classes.listed(instance, instance.extract(), operators)]
    Store(options.results).add_listing(source, instance_id, found)
    return found


@dataclass(frozen=True)
class Work:
    """Some classes (or outcomes) whose chosen mutants are of one instance, lowered from `source`."""

    instance: str
    source: str
    items: tuple[Any, ...]


def run_work(work: Work, options: Options) -> list[Outcome]:
    """Check the mutants of a piece of work, and keep each outcome as it is found."""
    return _each(work, options, lambda at, item: _checked(at, item, options))


def judge_work(work: Work, options: Options) -> list[Outcome]:
    """Run the mutants of a piece of work, which were checked before, beside the kernel."""
    return _each(work, options, _judged)


def replay_work(work: Work, options: Options) -> list[Outcome]:
    """Run the counterexamples of a piece of work, whose mutants were REFUTED before."""
    return _each(work, options, _replayed)


def _each(work: Work, options: Options, check: Callable[["_Prepared", Any], Outcome]) -> list[Outcome]:
    outcomes = []
    for item in work.items:
        if options.until is not None and time.time() > options.until:
            break
        outcome = check(_prepared(work.instance, options.replay), item)
        Store(options.results).add_outcome(work.source, outcome)
        outcomes.append(outcome)
    return outcomes


@dataclass(frozen=True)
class _Prepared:
    instance: Instance
    judge: Judge
    referee: Referee
    places: classes.Places
    mutants: dict[str, list[Mutant]]  # by operator, filled as they are asked for

    def mutant(self, item: Listed | Outcome) -> Mutant:
        if item.operator not in self.mutants:
            self.mutants[item.operator] = get_operator(item.operator).mutants(self.judge.extracted)
        return self.mutants[item.operator][item.number]


_memory = ExitStack()  # lives as long as the process


@lru_cache(maxsize=1)
def _prepared(instance_id: str, minimise: bool) -> _Prepared:
    """Lower an instance; what is proved of it and of its mutants is remembered until the next one."""
    instance = get(instance_id)
    extracted = instance.extract()
    _memory.close()
    _memory.enter_context(remembering())
    judge = Judge(extracted, instance.spec.contract, instance.dims, instance.dispatch, minimise)
    return _Prepared(instance, judge, Referee(instance, extracted), classes.Places(extracted), {})


def _checked(at: _Prepared, chosen: Class, options: Options) -> Outcome:
    started = time.process_time()
    mutant = at.mutant(chosen.chosen)
    mutated = mutant.apply(at.judge.extracted)
    killed, fate = _fate(at, mutant, mutated)
    before, after = mutant.diff()
    return Outcome(
        chosen.chosen.key,
        chosen.members,
        at.instance.id,
        mutant.operator.name,
        chosen.chosen.number,
        fate,
        killed.prop,
        killed.message,
        str(at.places.of(mutant) or ""),
        before,
        after,
        time.process_time() - started,
        model=_plain(killed.counterexample) if options.replay and fate == "REFUTED" else None,
        evaluated=killed.evaluated,
    )


def _plain(found: Counterexample | None) -> dict[str, dict[str, Any]]:
    """Return what a replay takes of a counterexample, as plain data."""
    if found is None:
        return {}
    parts = {name: dict(getattr(found, name)) for name in ("shape", "block", "thread", "loops", "values")}
    return json.loads(json.dumps(parts, default=str))


def _fate(at: _Prepared, mutant: Mutant, mutated: extract.Extracted) -> tuple[Kill, Fate]:
    try:
        killed = at.judge.kill(mutated, mutant.operator.killers)
        return killed, killed.verdict.value
    except BaselineError as error:
        raise BaselineError(f"{at.instance.id}: {error}") from None
    except Exception as error:  # a property that breaks down does not say PROVED either
        return Kill(Verdict.UNKNOWN, "", f"{type(error).__name__}: {error}"), "FAILED"


def _judged(at: _Prepared, known: Outcome) -> Outcome:
    """Ask the interpreter about a mutant that no property REFUTED."""
    started = time.process_time()
    was_proved = known.fate == "PROVED"
    try:
        if not was_proved and at.referee.is_slow:  # noticed; counted as a fault that no proof refutes
            return replace(known, runs=0)
        found = at.referee.difference(at.mutant(known).apply(at.judge.extracted))
    except (ir.UnsupportedIR, InterpreterError, ImportError) as error:
        found = f"not decided by runs: {error}"
    runs, seconds = at.referee.runs, known.seconds + time.process_time() - started
    note = f"same bytes and no fault in {runs} runs" if found is None else found
    return replace(
        known,
        fate="EQUIVALENT" if found is None else "SURVIVED" if was_proved else known.fate,
        prop="" if found is None else known.prop,
        reason="; ".join(filter(None, (note, known.reason) if found is None else (known.reason, note))),
        runs=runs,
        seconds=seconds,
    )


def _replayed(at: _Prepared, known: Outcome) -> Outcome:
    """Run the counterexample of a mutant that is REFUTED."""
    from verify.confirm import Confirmation, confirm

    started = time.process_time()
    model = Counterexample(**cast(Any, known.model)) if known.model else None
    try:
        shown = confirm(
            at.judge.context(at.mutant(known).apply(at.judge.extracted)),
            model,
            known.prop,
            known.reason,
            sound=at.judge.extracted,
            max_steps=_MAX_STEPS,
            evaluated=known.evaluated,
        )
    except Exception as error:  # the interpreter broke down, which confirms nothing
        shown = Confirmation(False, False, f"{type(error).__name__}: {error}")
    return replace(
        known,
        replayed=shown.confirmed,
        replay=shown.note,
        by_run=shown.by_run,
        seconds=known.seconds + time.process_time() - started,
    )


def to_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return plain data."""
    return [asdict(o) for o in outcomes]
