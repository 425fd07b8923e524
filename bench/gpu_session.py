"""One command for a borrowed GPU: compile, record, test, benchmark, keep what came, print a short table.

Each stage is a process with a time limit of its own; one that fails or is cut short leaves what it had
written and does not stop the next. Nothing is fetched, so it also runs on a machine without network.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from xml.etree import ElementTree

import click

from bench import table
from bench.rows import latest, read_rows
from bench.status import ROOT, TEST_RESULTS

JUNIT, ROWS, PLOT = "junit.xml", "bench.jsonl", "roofline.png"
_TAIL_LINES = 30  # of the log of a stage that failed
_TIMED_OUT = 124  # as the shell's timeout exits


@dataclass(frozen=True)
class Stage:
    """One process of the session."""

    name: str
    command: Sequence[str]
    timeout_s: float


def run_stage(stage: Stage, log: Path) -> tuple[int, float]:
    """Run a stage with its output in `log`; return its exit status (124: out of time) and seconds."""
    began = monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # so that a stage's own processes end with it
        )
        try:
            status = process.wait(stage.timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = _TIMED_OUT
    return status, monotonic() - began


def junit_counts(path: Path) -> str:
    """Return passed, failed and skipped of a JUnit file, and the name of each failed test."""
    if not path.exists():
        return "no test report"
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    failed = [
        c.get("name", "") for c in cases if c.find("failure") is not None or c.find("error") is not None
    ]
    skipped = sum(c.find("skipped") is not None for c in cases)
    counts = f"{len(cases) - len(failed) - skipped} passed, {len(failed)} failed, {skipped} skipped"
    return "\n".join([counts, *(f"  failed: {name}" for name in failed)])


def make_stages(
    out: Path, timeouts_s: Mapping[str, float], peer_timeout_s: float, kernels: Sequence[str]
) -> list[Stage]:
    """Return the stages in order; results go into the folder `out`."""
    python, only = [sys.executable, "-m"], [word for name in kernels for word in ("--kernel", name)]
    tests = ["pytest", "-m", "gpu", "tests", "-q", f"--junitxml={out / JUNIT}"]
    # Tests of the prover may need what a borrowed machine lacks: the others still run.
    tests += ["--continue-on-collection-errors"]
    measure = ["bench.cli", "--out", str(out / ROWS), "--plot", str(out / PLOT)]
    measure += ["--peer-timeout", str(peer_timeout_s)]
    commands = {
        "compile": ["bench.precompile", *only],
        "outputs": ["bench.record_outputs", *only],
        "tests": tests,
        "bench": [*measure, *only],
    }
    return [Stage(name, [*python, *words], timeouts_s[name]) for name, words in commands.items()]


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="For results.")
@click.option("--compile-timeout", default=120.0, show_default=True, metavar="S")
@click.option("--outputs-timeout", default=90.0, show_default=True, metavar="S")
@click.option("--tests-timeout", default=180.0, show_default=True, metavar="S")
@click.option("--bench-timeout", default=270.0, show_default=True, metavar="S")
@click.option("--peer-timeout", default=120.0, show_default=True, metavar="S", help="A peer and kernel.")
@click.option("--kernel", "kernels", multiple=True, metavar="NAME", help="Compile and time only this one.")
@click.option(
    "--skip", type=click.Choice(["compile", "outputs", "tests", "bench"]), multiple=True, help="Leave out."
)
def main(
    out: Path,
    compile_timeout: float,
    outputs_timeout: float,
    tests_timeout: float,
    bench_timeout: float,
    peer_timeout: float,
    kernels: tuple[str, ...],
    skip: tuple[str, ...],
) -> None:
    """Compile, test and benchmark on this GPU, into the folder OUT; exits 1 if a stage failed."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    timeouts_s = {
        "compile": compile_timeout,
        "outputs": outputs_timeout,
        "tests": tests_timeout,
        "bench": bench_timeout,
    }
    console = table.make_console()
    summary, failed = [], False
    for stage in make_stages(out, timeouts_s, peer_timeout, kernels):
        if stage.name in skip:
            continue
        log = out / f"{stage.name}.log"
        status, seconds = run_stage(stage, log)
        failed |= status != 0
        summary.append(f"{stage.name}: exit {status} after {seconds:.0f} s")
        if status != 0:
            last_lines = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            console.print("\n".join(last_lines), markup=False, highlight=False)
    for path in sorted(TEST_RESULTS.glob("*.jsonl")):
        shutil.copy(path, out / f"tests-{path.name}")

    rows = latest(read_rows(out / ROWS))
    table.print_rows(rows, console)
    for line in [*table.peer_errors(rows), junit_counts(out / JUNIT), *summary]:
        console.print(line, markup=False, highlight=False)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
