"""The kill rate, by operator and in all, and the survivors."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from verify.mutate.operators import OPERATORS
from verify.mutate.run import KILLED, Outcome
from verify.report import relative

GOAL_PERCENT, CRITICAL_PERCENT = 98.0, 100.0
_COLUMNS = ("mutants", "equivalent", "REFUTED", "UNKNOWN", "UNSUPPORTED", "FAILED", "survived")
_SHOWN_CHARACTERS = 400


def rate(outcomes: Sequence[Outcome]) -> float | None:
    """Return killed mutants in percent of those that are not equivalent; None without any."""
    decided = [o for o in outcomes if o.fate != "EQUIVALENT"]
    return 100 * sum(o.fate in KILLED for o in decided) / len(decided) if decided else None


def is_met(outcomes: Sequence[Outcome]) -> bool:
    """Return whether the goals are met: 98 % in all, and every critical one."""
    critical = [o for o in outcomes if o.operator in _CRITICAL]
    whole, strict = rate(outcomes), rate(critical)
    return (whole is None or whole >= GOAL_PERCENT) and (strict is None or strict >= CRITICAL_PERCENT)


_CRITICAL = frozenset(o.name for o in OPERATORS if o.critical)


def print_table(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Print one line for each operator, the totals, and each survivor with its change."""
    table = Table("operator", *_COLUMNS, "killed", "by", box=None, pad_edge=False)
    for operator in OPERATORS:
        mine = [o for o in outcomes if o.operator == operator.name]
        if mine:
            by = dict.fromkeys(o.prop for o in mine if o.prop)
            name = operator.name + (" *" if operator.critical else "")
            table.add_row(name, *_counts(mine), _percent(mine), ", ".join(by))
    console.print(table)
    critical = [o for o in outcomes if o.operator in _CRITICAL]
    console.print(f"killed: {_percent(outcomes)} of {_decided(outcomes)} not equivalent (goal 98 %)")
    console.print(f"critical (*): {_percent(critical)} of {_decided(critical)} (goal 100 %)")
    for line in _survivors(outcomes):
        console.print(escape(line), soft_wrap=True)


def _counts(outcomes: Sequence[Outcome]) -> Iterator[str]:
    fates = [o.fate for o in outcomes]
    yield str(len(fates))
    for fate in ("EQUIVALENT", *KILLED, "SURVIVED"):
        yield str(fates.count(fate) or "")


def _decided(outcomes: Sequence[Outcome]) -> int:
    return sum(o.fate != "EQUIVALENT" for o in outcomes)


def _percent(outcomes: Sequence[Outcome]) -> str:
    value = rate(outcomes)
    return "-" if value is None else f"{value:.1f} %"


def _survivors(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for title, fate in (("survived", "SURVIVED"), ("failed", "FAILED"), ("equivalent", "EQUIVALENT")):
        chosen = [o for o in outcomes if o.fate == fate]
        if chosen:
            yield f"{title}:"
        for o in chosen:
            place = relative(o.place) if o.place else "(no line)"
            yield f"  {place}: {o.operator} #{o.number} of {o.instance}: {o.reason}"
            yield f"    - {o.before[:_SHOWN_CHARACTERS]}"
            yield f"    + {o.after[:_SHOWN_CHARACTERS]}"
