"""`dsv4-verify --mutate`: the kill rate over the kernels."""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from verify.mutate import others, table
from verify.mutate.classes import Class, Listed, Listing, by_form, grouped
from verify.mutate.forks import run_instance, shared
from verify.mutate.instances import Instance, instances
from verify.mutate.kill import BaselineError
from verify.mutate.operators import OPERATORS
from verify.mutate.run import Options, Outcome, Work, list_mutants, source_of, to_json
from verify.mutate.store import Store
from verify.report import progress
from verify.tasks import TaskError, Workers
from verify.verdict import EXIT_PROVED, EXIT_REFUTED

_FIRST = 2  # classes of each operator and kernel that come before the rest
_WIDTH = 160  # of the table, where the output is no terminal
_SECONDS_PER_MINUTE = 60
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
        recorded: results of the last whole run, which count where they still hold; None: none.
        record: file that gets the results in their place; None: none.
        as_json: print one JSON document.
    """

    kernels: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    sample: int | None = None
    results: Path | None = None
    minutes: float | None = None
    replay: bool = False
    recorded: Path | None = None
    record: Path | None = None
    as_json: bool = False


def measure(pool: Workers, request: Request) -> int:
    """Mutate, kill, print; return the exit status: 0 where the goals are met and all is decided, else 1.

    Raises:
        TaskError: a name selects nothing.
        BaselineError: a kernel itself is not PROVED; the others' mutants are checked.
    """
    until = None if request.minutes is None else time.time() + request.minutes * _SECONDS_PER_MINUTE
    with TemporaryDirectory() as folder:  # processes hand over what they find in a file
        results = request.results or Path(folder) / "results.jsonl"
        return _measure(pool, replace(request, results=results), Options(results, request.replay, until))


def _measure(pool: Workers, request: Request, options: Options) -> int:
    started = time.time()
    chosen, operators = _selected(request)
    names = [i.id for i in chosen]
    sources = dict(zip(names, pool.map(source_of, names, None), strict=True))
    store = Store(request.results, request.recorded)
    with progress(Console(stderr=True), len(chosen), "lowering") as advance:
        listings = _listings(pool, sources, store, options, advance)
    unregistered = [i.id for i in chosen if not isinstance(i, Instance)]
    mutated, found = classes_of(listings, operators, unregistered)
    found = _sampled(found, request.sample)
    done = known(found, sources, store)
    work = _work(found, done, sources, options, request.kernels)
    with progress(Console(stderr=True), len(work), "mutating") as advance:
        problems = []
        for problem in pool.map(run_instance, shared(work, store.seconds(), pool.jobs), options):
            problems += [problem] if problem else []
            advance()
    done = known(found, sources, store)
    if request.record is not None:
        store.record(request.record, sources, frozenset(done))
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
            f"{kernels} kernels, {len(chosen)} Configs of {len(mutated)} forms, "
            f"{len(operators)} operators: {members} mutants"
        )
        console.print(f"{len(found)} classes, one mutant of each checked, by z3 alone")
        table.print_table(console, outcomes, left)
        console.print(f"{time.time() - started:.0f} s, {pool.jobs} processes")
    if problems:
        raise BaselineError("; ".join(problems))
    return EXIT_PROVED if not left and table.is_met(outcomes) else EXIT_REFUTED


def _selected(request: Request) -> tuple[list[Instance | others.Other], tuple[str, ...]]:
    names, registered = [o.name for o in OPERATORS], instances()
    # Others are imported only where they are wanted.
    is_registered_alone = request.kernels and set(request.kernels) <= {i.spec.name for i in registered}
    chosen = [
        i
        for i in (*registered, *(() if is_registered_alone else others.instances()))
        if (not request.kernels or i.spec.name in request.kernels)
        and (not request.variants or i.variant in request.variants)
    ]
    if not chosen:
        raise TaskError("nothing to mutate: " + ", ".join(i.id for i in instances()))
    if unknown := set(request.operators) - set(names):
        raise TaskError(f"no operator called {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    return chosen, request.operators or tuple(names)


def _listings(
    pool: Workers,
    sources: dict[str, str],
    store: Store,
    options: Options,
    advance: Callable[[], None],
) -> dict[str, Listing]:
    """Return the mutants of every instance; those that results list are not lowered for it."""
    listings = store.listings(sources)
    missing = [(name, source) for name, source in sources.items() if name not in listings]
    for (name, _), found in zip(missing, pool.map(list_mutants, missing, options), strict=True):
        listings[name] = found
        advance()
    return {name: listings[name] for name in sources}


def classes_of(
    listings: Mapping[str, Listing], operators: Sequence[str], cheapest: Sequence[str] = ()
) -> tuple[frozenset[str], list[Class]]:
    """Return the instances that are mutated, one of each form, and the classes of their mutants.

    Args:
        listings: by instance.
        operators: that count.
        cheapest: instances of which the first that has a class stands for it: to run others takes longer.
    """
    mutated = frozenset(by_form(listings).values())
    items = [m for name in listings if name in mutated for m in listings[name].mutants]
    found = grouped([m for m in items if m.operator in operators])
    firsts: dict[str, Listed] = {}
    for name in cheapest:
        if name in mutated:
            for item in listings[name].mutants:
                firsts.setdefault(item.key, item)
    return mutated, [replace(c, chosen=firsts.get(c.chosen.key, c.chosen)) for c in found]


def _sampled(every: list[Class], sample: int | None) -> list[Class]:
    """Return the classes: all, or of each kernel and operator those whose keys come first."""
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


def known(found: Sequence[Class], sources: dict[str, str], store: Store) -> dict[str, Outcome]:
    """Return the outcomes that results have of these classes."""
    keys = {c.chosen.key: c.members for c in found}
    kept = store.outcomes(sources)
    return {key: Outcome(**{**fields, "members": keys[key]}) for key, fields in kept.items() if key in keys}


def _work(
    found: Sequence[Class],
    done: Mapping[str, Outcome],
    sources: Mapping[str, str],
    options: Options,
    order: Sequence[str],
) -> list[Work]:
    """Return what is left to do, one piece for each instance, in the order of kernels.

    Of each instance critical operators come first, then a few classes of each operator, then the rest; and
    what was checked before and awaits runs or a replay before what was not.
    """
    by_instance: dict[str, list[tuple[int, str, Class | Outcome]]] = {}
    taken: Counter[tuple[str, str]] = Counter()
    for item in sorted(found, key=lambda c: c.chosen.key):
        known_one, chosen = done.get(item.chosen.key), item.chosen
        place = (chosen.instance.partition("/")[0], chosen.operator)
        taken[place] += 1
        rank = 0 if chosen.operator in _CRITICAL else 1 if taken[place] <= _FIRST else 2
        if known_one is None:
            by_instance.setdefault(chosen.instance, []).append((rank, chosen.key, item))
        elif known_one.awaits_runs or (options.replay and known_one.awaits_replay):
            by_instance.setdefault(known_one.instance, []).append((rank, "", known_one))
    turn = {name: position for position, name in enumerate(order)}
    return [
        Work(name, sources[name], tuple(item for _, _, item in sorted(items, key=lambda i: i[:2])))
        for name, items in sorted(by_instance.items(), key=lambda p: turn.get(p[0].partition("/")[0], 0))
    ]
