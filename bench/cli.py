"""`dsv4-bench`: time kernels beside their peers, or show what was recorded."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import machine, table
from bench.rows import RESULTS, SUFFIX, Row, RowError, latest, read_rows

if TYPE_CHECKING:
    from bench.run import Job, Reporter

EXIT_OK, EXIT_FAILED, EXIT_NO_GPU = 0, 1, 2
NO_PEERS = "none"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--kernel", "kernels", multiple=True, metavar="NAME", help="Only this kernel; repeatable.")
@click.option(
    "--case",
    "cases",
    multiple=True,
    metavar="ID",
    help="Only this case, or those of this pattern; repeatable.",
)
@click.option(
    "--dims", metavar="JSON", multiple=True, help="Dims of a case of no name; needs --kernel; repeatable."
)
@click.option("--peers", metavar="A,B|none", help="Peers to time; by default those that each kernel names.")
@click.option(
    "--peer-timeout", default=300.0, show_default=True, metavar="S", help="Seconds a peer and kernel."
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Results file to append to; by default bench/results/<gpu>.jsonl.",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw rooflines into this PNG.")
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Show the latest rows of this results file instead of measuring; needs no GPU.",
)
@click.option("--list", "list_only", is_flag=True, help="List kernels, cases and peers; needs no GPU.")
def main(
    kernels: tuple[str, ...],
    cases: tuple[str, ...],
    dims: tuple[str, ...],
    peers: str | None,
    peer_timeout: float,
    out: Path | None,
    plot: Path | None,
    source: Path | None,
    list_only: bool,
) -> None:
    """Time kernels on the current GPU beside their peers.

    Each case is first compared with the PyTorch reference. Times are medians of CUDA-graph replays
    with the L2 evicted before each; limits are measured in the same run. Exits 0 if every case was
    right and timed, 1 if one was not, 2 without an NVIDIA GPU.
    """
    console = table.make_console()
    if source is not None:
        _show(_recorded(source, kernels, cases), plot, console)
    elif list_only:
        console.print(_listing(find_jobs(kernels, cases, dims)))
    elif not machine.has_gpu():
        click.echo(
            "dsv4-bench: no NVIDIA GPU that torch can use; --list and --from work without one", err=True
        )
        sys.exit(EXIT_NO_GPU)
    else:
        sys.exit(
            _measure(find_jobs(kernels, cases, dims), _peer_names(peers), peer_timeout, out, plot, console)
        )


def _recorded(source: Path, kernels: tuple[str, ...], cases: tuple[str, ...]) -> list[Row]:
    try:
        rows = latest(read_rows(source))
    except RowError as error:
        raise click.ClickException(str(error)) from error
    return [r for r in rows if (not kernels or r.kernel in kernels) and (not cases or r.case in cases)]


def _show(rows: list[Row], plot: Path | None, console: Console) -> None:
    table.print_rows(rows, console)
    for line in table.peer_errors(rows):
        console.print(line, style="yellow", markup=False)
    if plot is not None:
        from bench.plots import draw

        draw(rows, plot)
        console.print(f"wrote {plot}", markup=False)


def _listing(jobs: "list[Job]") -> Table:
    listing = Table("kernel", "case", "dims", "peers")
    for job in jobs:
        dims = " ".join(f"{name}={value}" for name, value in job.case.dims.items())
        listing.add_row(job.spec.name, job.case.id, dims, " ".join(job.spec.peers))
    return listing


def find_jobs(kernels: Sequence[str], cases: Sequence[str], dims: Sequence[str]) -> "list[Job]":
    """Return what `--kernel`, `--case` and `--dims` name.

    Raises:
        click.UsageError: there is no such kernel, case or dim, or dims are no JSON or without a kernel.
    """
    from bench.run import select_jobs

    if dims and (cases or not kernels):
        raise click.UsageError("--dims needs --kernel and goes without --case")
    try:
        return select_jobs(kernels, cases, [json.loads(text) for text in dims])
    except json.JSONDecodeError as error:
        raise click.BadParameter(f"--dims: {error}") from error
    except KeyError as error:
        raise click.BadParameter(str(error.args[0])) from error


def _peer_names(text: str | None) -> list[str] | None:
    from bench.adapters import ADAPTERS

    if text is None:
        return None
    names = [] if text == NO_PEERS else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in ADAPTERS]
    if unknown:
        raise click.BadParameter(f"no peer {', '.join(unknown)}; there are: {', '.join(ADAPTERS)}")
    return names


def _progress_reporter(progress: Progress) -> "Reporter":
    from bench.run import Reporter

    task = progress.add_task("starting")

    class ProgressReporter(Reporter):
        def start(self, steps: int) -> None:
            progress.update(task, total=steps, completed=-1)

        def step(self, text: str) -> None:
            progress.update(task, description=text, advance=1)

        def line(self, text: str) -> None:
            progress.console.print(text, markup=False, highlight=False)

    return ProgressReporter()


def _measure(
    jobs: "list[Job]",
    peers: list[str] | None,
    peer_timeout: float,
    out: Path | None,
    plot: Path | None,
    console: Console,
) -> int:
    from bench.run import run

    target = out or RESULTS / f"{machine.slug(machine.describe()['gpu'])}{SUFFIX}"
    columns = SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        outcome = run(jobs, target, peers, peer_timeout, _progress_reporter(progress))
    _show(outcome.rows, plot, console)
    console.print(f"{len(outcome.rows)} rows appended to {target}", markup=False)
    for job, error in outcome.errors:
        console.print(f"{job.label}: {error}", style="red", markup=False)
    return EXIT_FAILED if outcome.errors else EXIT_OK


if __name__ == "__main__":
    main()
