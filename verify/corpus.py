"""`dsv4-verify --corpus`: small kernels with known faults, and the same without the fault.

Each file of the corpus states the expected verdict in its first line: `# REFUTED race: why` or
`# PROVED: why`. A bad kernel counts if the property that is named is REFUTED, a good one if every
property is PROVED.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from verify import annotations
from verify import html as html_page
from verify.replay import Replayed, figure, replay_report
from verify.report import progress
from verify.tasks import Task, TaskError, Workers, load_file
from verify.verdict import EXIT_PROVED, EXIT_REFUTED, VariantReport, Verdict, worst

FOLDER = Path(__file__).parent.parent / "tests" / "verify" / "corpus"
GOAL_PERCENT = 90.0


@dataclass(frozen=True)
class Entry:
    """One file of the corpus.

    Attributes:
        issue: what the file's name says before `_bad` or `_good`.
        expected: the verdict of its first line.
        prop: the property that has to be REFUTED; empty where all have to be PROVED.
        why: the rest of the line.
    """

    path: Path
    issue: str
    expected: Verdict
    prop: str
    why: str

    @classmethod
    def read(cls, path: Path) -> "Entry":
        """Read the first line of a file.

        Raises:
            TaskError: it states no verdict, or one that does not fit the file's name.
        """
        first = path.read_text().splitlines()[0].removeprefix("# ")
        head, _, why = first.partition(":")
        words = head.split()
        issue, _, kind = path.stem.rpartition("_")
        wanted = {"bad": ("REFUTED", 2), "good": ("PROVED", 1)}.get(kind)
        if wanted is None or (words[:1], len(words)) != ([wanted[0]], wanted[1]):
            raise TaskError(
                f"{path}: the first line has to be '# REFUTED <property>: why' or '# PROVED: why'"
            )
        return cls(path, issue, Verdict(words[0]), words[1] if len(words) > 1 else "", why.strip())

    def is_met(self, report: VariantReport) -> bool:
        """Return whether the report says what the file expects."""
        if self.expected is Verdict.PROVED:
            return report.verdict is Verdict.PROVED
        return any(p.name == self.prop and p.verdict is Verdict.REFUTED for p in report.properties)


def entries(folder: Path = FOLDER) -> list[Entry]:
    """Return every file of the corpus.

    Raises:
        TaskError: there is none.
    """
    found = [Entry.read(path) for path in sorted(folder.glob("*_*.py"))]
    if not found:
        raise TaskError(f"no corpus in {folder}; it is part of the repository, not of the package")
    return found


def run_entry(entry: Entry, options: None = None) -> VariantReport:
    """Check the one kernel of a file with both solvers."""
    from verify.engine import check_kernel

    del options
    (name,) = load_file(entry.path).KERNELS
    task = Task(entry.path.stem, name, str(entry.path)).load()
    return check_kernel(
        entry.path.stem,
        name,
        task.prim_func,
        task.contract,
        task.dims,
        fresh=True,
        pass_configs=task.pass_configs,
    )


def run(pool: Workers, style: str = "text", html: Path | None = None, folder: Path | None = None) -> int:
    """Check the corpus and print the table and the figure; 0 where the goals are met, else 1.

    Args:
        pool: processes.
        style: text, json or github (annotations for what is not as expected).
        html: page to write.
        folder: gets a replay script for each REFUTED; every one of them has to be confirmed.
    """
    started = time.monotonic()
    chosen, reports = entries(), []
    with progress(Console(stderr=True), len(chosen), "corpus") as advance:
        for report in pool.map(run_entry, chosen, None):
            reports.append(report)
            advance()
    figures = [*_figures(chosen, reports)]
    met = rate(chosen, reports) >= GOAL_PERCENT
    if folder is not None:
        done = _replayed(pool, chosen, reports, folder)
        figures += [figure(done), *(f"not confirmed: {d.script}: {d.note}" for d in done if not d.confirmed)]
        met = met and all(d.confirmed for d in done)
    status = EXIT_PROVED if met else EXIT_REFUTED
    console = Console(highlight=False)
    if style == "json":
        files = [
            {"file": e.path.name, "expected": f"{e.expected} {e.prop}".strip(), "met": e.is_met(r)}
            for e, r in zip(chosen, reports, strict=True)
        ]
        data = {
            "exit_code": status,
            "figures": figures,
            "files": files,
            "variants": [r.to_json() for r in reports],
        }
        console.print(json.dumps(data, indent=2), soft_wrap=True, markup=False)
    elif style == "github":
        wrong = [r for e, r in zip(chosen, reports, strict=True) if not e.is_met(r)]
        for line in (*annotations.lines(wrong), *figures):
            console.print(line, soft_wrap=True, markup=False)
    else:
        print_table(console, chosen, reports)
        for line in (*reasons(chosen, reports), *left_out()):
            console.print(line, soft_wrap=True, markup=False)
        for line in figures:
            console.print(escape(line), soft_wrap=True)
    if html is not None:
        decisive = str(worst(r.verdict for r in reports))
        html_page.write(html, reports, decisive, time.monotonic() - started)
    return status


def _replayed(
    pool: Workers, chosen: Sequence[Entry], reports: Sequence[VariantReport], folder: Path
) -> list[Replayed]:
    pairs = [
        (Task(e.path.stem, r.variant, str(e.path)), r)
        for e, r in zip(chosen, reports, strict=True)
        if r.verdict is Verdict.REFUTED
    ]
    with progress(Console(stderr=True), len(pairs), "replaying") as advance:
        done: list[Replayed] = []
        for found in pool.map(replay_report, pairs, str(folder)):
            done += found
            advance()
    return done


def rate(chosen: Sequence[Entry], reports: Sequence[VariantReport]) -> float:
    """Return the files whose verdict is the expected one, in percent."""
    return 100 * sum(e.is_met(r) for e, r in zip(chosen, reports, strict=True)) / len(chosen)


def reasons(chosen: Sequence[Entry], reports: Sequence[VariantReport]) -> list[str]:
    """Return for each file that is not as expected what the properties say of it."""
    lines = []
    for entry, report in zip(chosen, reports, strict=True):
        if entry.is_met(report):
            continue
        found = [(p.name, f) for p in report.properties for f in p.findings]
        lines += [f"{entry.path.stem}: {f.verdict} {name}: {f.message}" for name, f in found]
        lines += [] if found else [f"{entry.path.stem}: {report.verdict}, with no finding"]
    return lines


def left_out(readme: Path = FOLDER / "README.md") -> list[str]:
    """Return which reported faults have no file, and why: the table under "Not here" of the corpus."""
    _, _, table = readme.read_text().partition("Not here:")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return [f"not here: {' '.join(row[0].split())}: {row[1].strip()}" for row in rows[1:] if len(row) == 2]


def print_table(console: Console, chosen: Sequence[Entry], reports: Sequence[VariantReport]) -> None:
    """Print one line for each file."""
    table = Table("file", "expected", "got", "", "why", box=None, pad_edge=False)
    for entry, report in zip(chosen, reports, strict=True):
        expected = f"{entry.expected} {entry.prop}".strip()
        failed = [f"{p.verdict} {p.name}" for p in report.properties if p.verdict is not Verdict.PROVED]
        got = next((f for f in failed if f == expected), failed[0] if failed else "PROVED")
        mark = "ok" if entry.is_met(report) else "[bold red]NOT AS EXPECTED[/]"
        table.add_row(entry.path.stem, expected, got, mark, escape(entry.why))
    console.print(table)


def _figures(chosen: Sequence[Entry], reports: Sequence[VariantReport]) -> Iterator[str]:
    for kind in (Verdict.REFUTED, Verdict.PROVED):
        pairs = [(e, r) for e, r in zip(chosen, reports, strict=True) if e.expected is kind]
        met = sum(e.is_met(r) for e, r in pairs)
        yield f"{met} of {len(pairs)} {'bad' if kind is Verdict.REFUTED else 'good'} ones are {kind}"
    yield f"as expected: {rate(chosen, reports):.1f} % (goal {GOAL_PERCENT:.0f} %)"
