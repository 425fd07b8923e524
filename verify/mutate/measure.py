"""`dsv4-verify --mutate`: the kill rate over the kernels."""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from verify.mutate import table
from verify.mutate.classes import Class, Listed, grouped
from verify.mutate.instances import Instance, instances
from verify.mutate.operators import OPERATORS
from verify.mutate.run import (
    Options,
    Outcome,
    Work,
    judge_work,
    list_mutants,
    replay_work,
    run_work,
    source_of,
    to_json,
)
from verify.mutate.store import Store
from verify.report import progress
from verify.tasks import TaskError, Workers
from verify.verdict import EXIT_PROVED, EXIT_REFUTED

_CHUNK = 100  # classes of one instance that a process takes at a time: preparing it costs as much as ten
_LEAST = 10  # at a time, where there are few
_PIECES = 4  # of a process, so that all end together
_FIRST = 2  # classes of each operator and kernel that come before the rest
_WIDTH = 160  # of the table, where the output is no terminal
_SECONDS_PER_MINUTE = 60
_RUNS = 8  # outcomes that a process takes to run at a time
_REPLAYS = 25  # likewise, to replay
_CRITICAL = frozenset(o.name for o in OPERATORS if o.critical)


@dataclass(frozen=True)
class Request:
    """What `--mutate` is asked for.

    Attributes:
        kernels, variants, operators: names; all there are where empty. Kernels are taken in their order.
        sample: at most so many classes of an operator and kernel.
        results: file that keeps outcomes, and has those of an earlier run.
        minutes: begin no mutant after that; what is left undecided is counted.
        replay: run the counterexample of each mutant that is REFUTED.
        as_json: print one JSON document.
    """

    kernels: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    sample: int | None = None
    results: Path | None = None
    minutes: float | None = None
    replay: bool = False
    as_json: bool = False


def measure(pool: Workers, request: Request) -> int:
    """Mutate, kill, print; return the exit status: 0 where the goals are met and all is decided, else 1.

    Raises:
        TaskError: a name selects nothing.
    """
    chosen, operators = _selected(request)
    started = time.time()
    until = None if request.minutes is None else started + request.minutes * _SECONDS_PER_MINUTE
    options = Options(request.results, request.replay, until)
    names = [i.id for i in chosen]
    sources = dict(zip(names, pool.map(source_of, names, None), strict=True))
    with progress(Console(stderr=True), len(chosen), "lowering") as advance:
        found = _sampled(_listed(pool, sources, operators, options, advance), request.sample)
    done = _known(found, sources, options)

    def run(title: str, function: Callable[[Work, Options], list[Outcome]], work: list[Work]) -> None:
        with progress(Console(stderr=True), len(work), title) as advance:
            for outcomes in pool.map(function, work, options):
                done.update((o.key, o) for o in outcomes)
                advance()

    def judge() -> None:
        waiting = [o for o in done.values() if o.awaits_runs]
        parts: list[list[Outcome]] = [[], [], []]  # critical ones that are PROVED, others, noticed ones
        for o in waiting:
            parts[2 if o.fate != "PROVED" else o.operator not in _CRITICAL].append(o)
        run("running", judge_work, [w for part in parts for w in _pieces(part, sources, _RUNS, order)])

    order = request.kernels
    judge()  # those of an earlier run
    run(
        "mutating", run_work, _work([c for c in found if c.chosen.key not in done], sources, pool.jobs, order)
    )
    judge()
    if options.replay:
        waiting = sorted((o for o in done.values() if o.awaits_replay), key=lambda o: o.key)
        critical = [o for o in waiting if o.operator in _CRITICAL]
        others = [o for o in waiting if o.operator not in _CRITICAL]
        parts = [w for part in (critical, others) for w in _in_turn(_pieces(part, sources, _REPLAYS, order))]
        run("replaying", replay_work, parts)
    outcomes = list(done.values())
    left = len(found) - len(done) + sum(o.awaits_runs for o in outcomes)
    if request.as_json:
        summary = {"percent": table.rate(outcomes), "refuted_percent": table.refuted_rate(outcomes)}
        print(json.dumps({**summary, "undecided": left, "mutants": to_json(outcomes)}, indent=2))  # noqa: T201
    else:
        console = Console(highlight=False)
        console.width = max(console.width, _WIDTH)
        members = sum(c.members for c in found)
        kernels = len({i.spec.name for i in chosen})
        console.print(
            f"{kernels} kernels, {len(chosen)} Configs, {len(operators)} operators: {members} mutants"
        )
        console.print(f"{len(found)} classes, one mutant of each checked, by z3 alone")
        table.print_table(console, outcomes, left)
        console.print(f"{time.time() - started:.0f} s, {pool.jobs} processes")
    return EXIT_PROVED if not left and table.is_met(outcomes) else EXIT_REFUTED


def _selected(request: Request) -> tuple[list[Instance], tuple[str, ...]]:
    names = [o.name for o in OPERATORS]
    chosen = [
        i
        for i in instances()
        if (not request.kernels or i.spec.name in request.kernels)
        and (not request.variants or i.variant in request.variants)
    ]
    if not chosen:
        raise TaskError("nothing to mutate: " + ", ".join(i.id for i in instances()))
    if unknown := set(request.operators) - set(names):
        raise TaskError(f"no operator called {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    return chosen, request.operators or tuple(names)


def _listed(
    pool: Workers,
    sources: dict[str, str],
    operators: tuple[str, ...],
    options: Options,
    advance: Callable[[], None],
) -> list[Listed]:
    """Return the mutants of every instance; those that a file of results lists are not lowered for it."""
    every = tuple(o.name for o in OPERATORS)
    known = Store(options.results).listings(sources)
    wanted = every if options.results is not None else operators  # what is kept has to be whole
    missing = [(name, source, wanted) for name, source in sources.items() if name not in known]
    for (name, _, _), found in zip(missing, pool.map(list_mutants, missing, options), strict=True):
        known[name] = found
        advance()
    return [item for name in sources for item in known[name] if item.operator in operators]


def _sampled(found: Sequence[Listed], sample: int | None) -> list[Class]:
    """Return the classes: all, or of each kernel and operator those whose keys come first."""
    every = grouped(found)
    if sample is None:
        return every
    kept: list[Class] = []
    taken: dict[tuple[str, str], int] = {}
    for item in sorted(every, key=lambda c: c.chosen.key):
        place = (item.chosen.instance.partition("/")[0], item.chosen.operator)
        taken[place] = taken.get(place, 0) + 1
        if taken[place] <= sample:
            kept.append(item)
    return kept


def _known(found: Sequence[Class], sources: dict[str, str], options: Options) -> dict[str, Outcome]:
    """Return the outcomes that a file has of these classes."""
    keys = {c.chosen.key: c.members for c in found}
    kept = Store(options.results).outcomes(sources)
    return {key: Outcome(**{**fields, "members": keys[key]}) for key, fields in kept.items() if key in keys}


def _work(found: Sequence[Class], sources: dict[str, str], jobs: int, order: Sequence[str]) -> list[Work]:
    """Return the classes in pieces: critical ones and a few of each operator first, then the rest."""
    size = min(max(len(found) // (_PIECES * jobs), _LEAST), _CHUNK)
    first: list[Class] = []
    rest: list[Class] = []
    taken: Counter[tuple[str, str]] = Counter()
    for item in sorted(found, key=lambda c: c.chosen.key):
        place = (item.chosen.instance.partition("/")[0], item.chosen.operator)
        taken[place] += 1
        chosen = item.chosen.operator in _CRITICAL or taken[place] <= _FIRST
        (first if chosen else rest).append(item)
    return [*_pieces(first, sources, size, order), *_pieces(rest, sources, size, order)]


def _pieces(found: Sequence[Any], sources: dict[str, str], size: int, order: Sequence[str]) -> list[Work]:
    """Return classes or outcomes in pieces of one instance each: kernels in `order`, the longest first."""
    by_instance: dict[str, list[Any]] = {}
    for item in found:
        instance = item.instance if isinstance(item, Outcome) else item.chosen.instance
        by_instance.setdefault(instance, []).append(item)
    work = [
        Work(name, sources[name], tuple(mine[start : start + size]))
        for name, mine in by_instance.items()
        for start in range(0, len(mine), size)
    ]
    rank = {name: position for position, name in enumerate(order)}
    return sorted(work, key=lambda w: (rank.get(w.instance.partition("/")[0], len(rank)), -len(w.items)))


def _in_turn(pieces: Sequence[Work]) -> list[Work]:
    """Return pieces so that each instance's first comes before any's second: time may end before the last."""
    seen: Counter[str] = Counter()
    turns = []
    for piece in pieces:
        turns.append(seen[piece.instance])
        seen[piece.instance] += 1
    return [piece for _, piece in sorted(zip(turns, pieces, strict=True), key=lambda pair: pair[0])]
