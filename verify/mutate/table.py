"""The kill rate, by operator and in all, and the survivors."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from verify.mutate.operators import OPERATORS
from verify.mutate.run import NOTICED, UNDECIDED, Outcome
from verify.report import relative

GOAL_PERCENT, CRITICAL_PERCENT = 98.0, 100.0
_COLUMNS = ("classes", "mutants", "equivalent", *NOTICED, "survived", "not run")
_SHOWN_CHARACTERS = 400
_CRITICAL = frozenset(o.name for o in OPERATORS if o.critical)


def rate(outcomes: Sequence[Outcome]) -> float | None:
    """Return the classes that are not PROVED, in percent of those not equivalent; None without any."""
    return _share(outcomes, NOTICED)


def refuted_rate(outcomes: Sequence[Outcome]) -> float | None:
    """Return the classes that are REFUTED, likewise."""
    return _share(outcomes, ("REFUTED",))


def _share(outcomes: Sequence[Outcome], fates: Sequence[str]) -> float | None:
    decided = [o for o in outcomes if o.fate != "EQUIVALENT"]
    return 100 * sum(o.fate in fates for o in decided) / len(decided) if decided else None


def is_met(outcomes: Sequence[Outcome]) -> bool:
    """Return whether the goals are met: 98 % in all, and every critical one."""
    critical = [o for o in outcomes if o.operator in _CRITICAL]
    whole, strict = rate(outcomes), rate(critical)
    return (whole is None or whole >= GOAL_PERCENT) and (strict is None or strict >= CRITICAL_PERCENT)


def print_table(console: Console, outcomes: Sequence[Outcome], left: int = 0) -> None:
    """Print one line for each operator, the totals, and each survivor with its change.

    Args:
        console: where to.
        outcomes: of the classes that were checked.
        left: how many were not.
    """
    table = Table("operator", *_COLUMNS, "noticed", "by", box=None, pad_edge=False)
    for operator in OPERATORS:
        mine = [o for o in outcomes if o.operator == operator.name]
        if mine:
            by = dict.fromkeys(o.prop for o in mine if o.prop)
            name = operator.name + (" *" if operator.critical else "")
            table.add_row(name, *_counts(mine), _percent(rate(mine)), ", ".join(by))
    console.print(table)
    for line in summary(outcomes, left):
        console.print(line, soft_wrap=True)
    for line in _listed(outcomes):
        console.print(escape(line), soft_wrap=True)


def summary(outcomes: Sequence[Outcome], left: int) -> Iterator[str]:
    """Yield the figures: noticed at all, by proof, critical ones, counterexamples that a run confirms."""
    critical = [o for o in outcomes if o.operator in _CRITICAL]
    for title, mine, goal in (("all", outcomes, GOAL_PERCENT), ("critical (*)", critical, CRITICAL_PERCENT)):
        alone = sum(o.fate == "REFUTED" and o.runs is not None for o in mine)
        yield (
            f"{title}: {_percent(rate(mine))} of {_decided(mine)} not equivalent noticed "
            f"(goal {goal:.0f} %), {_percent(refuted_rate(mine))} REFUTED"
            + (f", {alone} of them by a run alone" if alone else "")
        )
    replayed = [o for o in outcomes if o.replayed is not None]
    if replayed:
        count, runs = sum(bool(o.replayed) for o in replayed), sum(o.by_run for o in replayed)
        open_ones = sum(o.fate == "REFUTED" for o in outcomes) - len(replayed)
        rest = f"; {open_ones} are not replayed" if open_ones else ""
        share = f"{100 * count / len(replayed):.2f} %"
        yield (
            f"replay: {count} of {len(replayed)} REFUTED are confirmed ({share}): {runs} by runs, "
            f"{count - runs} by evaluation{rest}"
        )
    if left:
        yield f"{left} classes are left undecided"


def _counts(outcomes: Sequence[Outcome]) -> Iterator[str]:
    fates = [o.fate for o in outcomes]
    yield str(len(fates))
    yield str(sum(o.members for o in outcomes))
    for fate in ("EQUIVALENT", *NOTICED, "SURVIVED", "PROVED"):
        yield str(fates.count(fate) or "")


def _decided(outcomes: Sequence[Outcome]) -> int:
    return sum(o.fate != "EQUIVALENT" for o in outcomes)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def _listed(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield every class that is not REFUTED, and every refutation that no run confirms."""
    groups = [
        ("survived", ("SURVIVED",)),
        ("PROVED, and not run yet: counted as survivors", ("PROVED",)),
        ("noticed, not REFUTED", UNDECIDED),
        ("equivalent", ("EQUIVALENT",)),
    ]
    for title, fates in groups:
        yield from _lines(title, [o for o in outcomes if o.fate in fates])
    unconfirmed = [o for o in outcomes if o.replayed is False]
    yield from _lines("REFUTED, not confirmed", unconfirmed)


def _lines(title: str, outcomes: Sequence[Outcome]) -> Iterator[str]:
    if outcomes:
        yield f"{title}:"
    for o in outcomes:
        place = relative(o.place) if o.place else "(no line)"
        why = o.replay if o.replayed is False else o.reason
        head = f"{place}: {o.operator} #{o.number} of {o.instance}"
        yield f"  {head}: {o.fate} {o.prop}: {why[:_SHOWN_CHARACTERS]}"
        yield f"    - {o.before[:_SHOWN_CHARACTERS]}"
        yield f"    + {o.after[:_SHOWN_CHARACTERS]}"
