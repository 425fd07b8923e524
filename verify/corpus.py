"""`dsv4-verify --corpus`: small kernels with known faults, and the same without the fault.

Each file of the corpus states the expected verdict in its first line: `# REFUTED race: why` or
`# PROVED: why`. A bad kernel counts if the property that is named is REFUTED, a good one if every
property is PROVED.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from verify.report import progress
from verify.tasks import Task, TaskError, Workers, load_file
from verify.verdict import EXIT_PROVED, EXIT_REFUTED, VariantReport, Verdict

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


def run(pool: Workers) -> int:
    """Check the corpus and print the table and the figure; 0 where the goal is met, else 1."""
    chosen, reports = entries(), []
    with progress(Console(stderr=True), len(chosen), "corpus") as advance:
        for report in pool.map(run_entry, chosen, None):
            reports.append(report)
            advance()
    console = Console(highlight=False)
    print_table(console, chosen, reports)
    return EXIT_PROVED if rate(chosen, reports) >= GOAL_PERCENT else EXIT_REFUTED


def rate(chosen: Sequence[Entry], reports: Sequence[VariantReport]) -> float:
    """Return the files whose verdict is the expected one, in percent."""
    return 100 * sum(e.is_met(r) for e, r in zip(chosen, reports, strict=True)) / len(chosen)


def print_table(console: Console, chosen: Sequence[Entry], reports: Sequence[VariantReport]) -> None:
    """Print one line for each file, and how many are as expected."""
    table = Table("file", "expected", "got", "", "why", box=None, pad_edge=False)
    for entry, report in zip(chosen, reports, strict=True):
        expected = f"{entry.expected} {entry.prop}".strip()
        failed = [f"{p.verdict} {p.name}" for p in report.properties if p.verdict is not Verdict.PROVED]
        got = next((f for f in failed if f == expected), failed[0] if failed else "PROVED")
        mark = "ok" if entry.is_met(report) else "[bold red]NOT AS EXPECTED[/]"
        table.add_row(entry.path.stem, expected, got, mark, escape(entry.why))
    console.print(table)
    for kind in (Verdict.REFUTED, Verdict.PROVED):
        pairs = [(e, r) for e, r in zip(chosen, reports, strict=True) if e.expected is kind]
        met = sum(e.is_met(r) for e, r in pairs)
        console.print(f"{met} of {len(pairs)} {'bad' if kind is Verdict.REFUTED else 'good'} ones are {kind}")
    console.print(f"as expected: {rate(chosen, reports):.1f} % (goal {GOAL_PERCENT:.0f} %)")
