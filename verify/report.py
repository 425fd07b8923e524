"""Reports as text: one line a property, and everything a person needs about one that is not PROVED."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from verify.ir import Span
from verify.verdict import Counterexample, Finding, PropertyResult, VariantReport, Verdict, worst

_STYLES = {
    Verdict.PROVED: "green",
    Verdict.REFUTED: "bold red",
    Verdict.UNKNOWN: "yellow",
    Verdict.UNSUPPORTED: "magenta",
}


def place(span: Span | None) -> str:
    """Return path:line:column, the path from the working directory where it lies below it."""
    if span is None:
        return "-"
    path = Path(span.path)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{shown}:{span.line}:{span.column}"


def print_report(console: Console, report: VariantReport, *, verbose: bool) -> None:
    """Print the lines of one variant; those of PROVED properties only if `verbose`."""
    head = Text(f"{report.kernel} {report.variant} ", style="bold")
    head.append(str(report.verdict), style=_STYLES[report.verdict])
    cost = "certificate" if report.reused else f"{report.seconds:.1f} s"
    head.append(f"  cuda {report.cuda_sha256[:12]}, {cost}", style="dim")
    console.print(head)
    for prop in report.properties:
        if verbose or prop.verdict is not Verdict.PROVED:
            for line in _property_lines(prop):
                console.print(line, soft_wrap=True)
    if verbose:
        console.print(Text(f"  contract: {'; '.join(report.contract)}", style="dim"), soft_wrap=True)
        console.print(Text(f"  witness: {_pairs(report.witness)}", style="dim"), soft_wrap=True)
        if report.unused_clauses:
            console.print(Text(f"  needed by no proof: {'; '.join(report.unused_clauses)}", style="dim"))


def print_summary(console: Console, reports: Iterable[VariantReport]) -> None:
    """Print the assumptions that all verdicts rest on, and how many variants have which verdict."""
    reports = list(reports)
    ledger = sorted({a for r in reports for p in r.properties for a in p.assumptions})
    if ledger:
        console.print(f"{len(ledger)} assumptions:")
        for entry in ledger:
            console.print(Text(f"  {entry}", style="dim"), soft_wrap=True)
    counts = {v: sum(r.verdict is v for r in reports) for v in Verdict}
    line = Text(f"{len(reports)} variants: ")
    line.append(", ".join(f"{n} {v}" for v, n in counts.items() if n or v is Verdict.PROVED))
    line.stylize(_STYLES[worst(r.verdict for r in reports)])
    console.print(line)


def _property_lines(prop: PropertyResult) -> Iterator[Text]:
    solvers = ", ".join(f"{n} {name}" for name, n in sorted(prop.solvers.items()))
    line = Text(f"  {place(prop.span)}: " if prop.span else "  ")
    line.append(str(prop.verdict), style=_STYLES[prop.verdict])
    line.append(f" {prop.name}: {prop.obligations} obligations ({solvers or 'no query'})")
    yield line
    for note in prop.notes:
        yield Text(f"    note: {note}", style="dim")
    for finding in prop.findings:
        yield from _finding_lines(prop.name, finding)


def _finding_lines(name: str, finding: Finding) -> Iterator[Text]:
    line = Text(f"    {place(finding.span)}: ")
    line.append(str(finding.verdict), style=_STYLES[finding.verdict])
    line.append(f" {name}: {finding.message}")
    yield line
    if finding.counterexample is not None:
        yield from (Text(f"      {row}") for row in _example_lines(finding.counterexample))


def _example_lines(example: Counterexample) -> Iterator[str]:
    named = (
        ("shape", example.shape),
        ("block", example.block),
        ("thread", example.thread),
        ("loops", example.loops),
        ("found", example.values),
    )
    yield from (f"{label}: {_pairs(values)}" for label, values in named if values)
    yield from (f"| {line}" for line in example.excerpt.splitlines())


def _pairs(values: object) -> str:
    return ", ".join(f"{name}={value}" for name, value in dict(values).items())  # type: ignore[call-overload]
