"""Reports for people (text) and for programs (JSON)."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from verify.hints import hint
from verify.ir import Span
from verify.verdict import Counterexample, Finding, PropertyResult, VariantReport, Verdict, exit_code

_STYLES = {
    Verdict.PROVED: "green",
    Verdict.REFUTED: "bold red",
    Verdict.UNKNOWN: "yellow",
    Verdict.UNSUPPORTED: "magenta",
}


class Ledger:
    """Assumptions by number, so that each verdict can name its own and the text is printed once."""

    def __init__(self) -> None:
        """Start empty."""
        self._numbers: dict[str, int] = {}

    def cite(self, assumptions: Sequence[str]) -> str:
        """Return the numbers of `assumptions`, as `[A1 A4]`; empty for none."""
        numbers = [self._numbers.setdefault(a, len(self._numbers) + 1) for a in dict.fromkeys(assumptions)]
        return "[" + " ".join(f"A{n}" for n in numbers) + "]" if numbers else ""

    def lines(self) -> list[str]:
        """Return every assumption cited so far with its number."""
        return [f"A{number} {text}" for text, number in self._numbers.items()]


def print_report(console: Console, report: VariantReport, ledger: Ledger) -> None:
    """Print one variant: a line for each property, its findings, and the contract."""
    origin = "certificate" if report.reused else f"{report.seconds:.1f} s"
    digest = f" cuda {report.cuda_sha256[:12]}" if report.cuda_sha256 else ""
    console.print(f"[bold]{escape(report.kernel)}/{escape(report.variant)}[/] ({origin}){digest}")
    for result in report.properties:
        _print_property(console, result, ledger)
    if report.contract:
        console.print(escape("  contract: " + "; ".join(report.contract)), soft_wrap=True)
        console.print(escape(f"  satisfied by: {_pairs(report.witness) or 'nothing'}"), soft_wrap=True)
    for clause in report.unused_clauses:
        console.print(escape(f"  unused clause: {clause}"), soft_wrap=True)


def print_summary(console: Console, reports: Sequence[VariantReport], ledger: Ledger, seconds: float) -> None:
    """Print the assumptions that were cited, how many variants got which verdict, and what it took."""
    if ledger.lines():
        console.print("assumptions:")
    for line in ledger.lines():
        console.print(escape(f"  {line}"), soft_wrap=True)
    for line in summary_lines(reports, seconds):
        console.print(escape(line), soft_wrap=True)


def summary_lines(reports: Sequence[VariantReport], seconds: float) -> list[str]:
    """Return how many variants got which verdict, what was proved twice, and what it took."""
    counts = Counter(r.verdict for r in reports)
    parts = [f"{counts[v]} {v}" for v in Verdict if counts[v]]
    lines = [f"{len(reports)} variants: " + (", ".join(parts) or "none")]
    return [*lines, _rechecked(reports), _times(reports, seconds)]


def _rechecked(reports: Sequence[VariantReport]) -> str:
    """Return how many of z3's proofs cvc5 proved again; those undecided, or asked again in parts, apart."""
    first = second = alone = 0
    for prop in (p for r in reports for p in r.properties):
        first += prop.solvers.get("z3 unsat", 0)
        second += prop.solvers.get("cvc5 unsat", 0)
        alone += prop.solvers.get("z3 alone unsat", 0)
    first += alone
    share = f" ({100 * second / first:.1f} %)" if first else ""
    parts = f"; by z3 alone, so undecided or asked again in parts: {alone}" if alone else ""
    return f"queries proved by z3: {first}; proved again by cvc5: {second}{share}{parts}"


def _times(reports: Sequence[VariantReport], seconds: float) -> str:
    """Return the time that variants took, those from certificates apart, and the time in all."""
    reused = sum(r.reused for r in reports)
    proved = [r for r in reports if not r.reused]
    parts = [f"{reused} from certificates"] if reused else []
    if proved:
        lowering = median(r.lowering_seconds for r in proved)
        slowest = max(proved, key=lambda r: r.seconds)
        parts.append(
            f"{len(proved)} checked: median {median(r.seconds for r in proved):.1f} s (of it lowering by the "
            f"compiler: median {lowering:.1f} s), worst {slowest.seconds:.1f} s "
            f"({slowest.kernel}/{slowest.variant})"
        )
        busiest = max(proved, key=lambda r: r.cpu_seconds)
        parts.append(
            f"of CPU: median {median(r.cpu_seconds for r in proved):.1f} s (lowering "
            f"{median(r.lowering_cpu_seconds for r in proved):.1f} s, cvc5 "
            f"{median(r.recheck_cpu_seconds for r in proved):.1f} s), worst {busiest.cpu_seconds:.1f} s "
            f"({busiest.kernel}/{busiest.variant}), sum {sum(r.cpu_seconds for r in proved):.0f} s"
        )
    return "; ".join([*parts, f"{seconds:.1f} s in all"])


def to_json(reports: Sequence[VariantReport]) -> str:
    """Return all reports as one JSON document."""
    document: dict[str, Any] = {
        "exit_code": exit_code(r.verdict for r in reports),
        "variants": [r.to_json() for r in reports],
    }
    return json.dumps(document, indent=2)


def _print_property(console: Console, result: PropertyResult, ledger: Ledger) -> None:
    style = _STYLES[result.verdict]
    solved = ", ".join(f"{name}: {count}" for name, count in result.solvers.items())
    cost = f"{result.obligations} obligations" + (f" ({solved})" if solved else "")
    text = f"{result.name}: {cost} {ledger.cite(result.assumptions)}".rstrip()
    console.print(f"{escape(_place(result.span))}[{style}]{result.verdict}[/] {escape(text)}", soft_wrap=True)
    for finding in result.findings:
        _print_finding(console, result.name, finding)
    for note in result.notes:
        console.print(escape(f"    note: {note}"), soft_wrap=True)


def _print_finding(console: Console, name: str, finding: Finding) -> None:
    style = _STYLES[finding.verdict]
    console.print(
        f"  {escape(_place(finding.span))}[{style}]{finding.verdict}[/] {escape(name)}: "
        f"{escape(finding.message)}",
        soft_wrap=True,
    )
    if finding.counterexample is not None:
        for line in describe(finding.counterexample):
            console.print(escape(f"      {line}"), soft_wrap=True)
    if finding.verdict is Verdict.REFUTED and hint(name):
        console.print(escape(f"      hint: {hint(name)}"), soft_wrap=True)


def describe(found: Counterexample) -> list[str]:
    """Return a counterexample as lines: shape, block, thread, loops, values, IR."""
    groups = {"shape": found.shape, "block": found.block, "thread": found.thread, "loops": found.loops}
    lines = [f"{name}: {_pairs(values)}" for name, values in groups.items() if values]
    lines += [f"{name}: {value}" for name, value in found.values.items()]
    return lines + [f"| {line}" for line in found.excerpt.splitlines()]


def _pairs(values: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _place(span: Span | None) -> str:
    return f"{relative(span.path)}:{span.line}:{span.column}: " if span is not None else ""


def relative(path: str) -> str:
    """Return `path` from the current directory, where it lies below it."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return path


@contextmanager
def progress(console: Console, total: int, what: str) -> Iterator[Callable[[], None]]:
    """Show a bar on a terminal; what is yielded advances it."""
    if not console.is_terminal or total == 1:
        yield lambda: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
