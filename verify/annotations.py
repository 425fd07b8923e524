"""Findings as workflow annotations, which code hosting shows beside the line."""

from collections.abc import Iterator, Sequence

from verify.report import relative
from verify.verdict import Finding, VariantReport, Verdict


def lines(reports: Sequence[VariantReport]) -> Iterator[str]:
    """Yield one line for each finding: an error where REFUTED, else a warning; equal ones once."""
    seen: set[str] = set()
    for report in reports:
        for result in report.properties:
            for finding in result.findings:
                line = _annotation(f"{report.kernel}/{report.variant}", result.name, finding)
                if line not in seen:
                    seen.add(line)
                    yield line


def _annotation(variant: str, prop: str, finding: Finding) -> str:
    level = "error" if finding.verdict is Verdict.REFUTED else "warning"
    fields = {"title": f"{finding.verdict} {prop}"}
    if finding.span is not None:
        fields |= {"file": relative(finding.span.path), "line": str(finding.span.line)}
        fields["col"] = str(finding.span.column)
    text = f"{variant}: {finding.message}"
    if finding.counterexample is not None:
        shape = ", ".join(f"{k}={v}" for k, v in finding.counterexample.shape.items())
        text += f"\nshape: {shape}" if shape else ""
    pairs = ",".join(f"{name}={_escaped(value, ':,')}" for name, value in fields.items())
    return f"::{level} {pairs}::{_escaped(text, '')}"


def _escaped(text: str, more: str) -> str:
    """Return `text` with the characters replaced that end a line, a field or the message."""
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return text
