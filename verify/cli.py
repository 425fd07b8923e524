"""dsv4-verify: prove the kernels of this library, or those of a file."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from dsv4_kernels.contract import Contract
from verify import certificates, extract, report
from verify.engine import check_kernel
from verify.verdict import EXIT_TOOL_ERROR, EXIT_UNDECIDED, VariantReport, exit_code


@dataclass(frozen=True)
class Task:
    """One variant to check: of a registered kernel, or of a file's KERNELS."""

    kernel: str
    variant: str
    file: str | None = None

    def load(self) -> tuple[Any, Contract, dict[str, int]]:
        """Return the PrimFunc, its contract and the dims that it fixes."""
        if self.file is not None:
            module = load_file(Path(self.file))
            clauses = getattr(module, "CONTRACTS", {}).get(self.variant, ())
            return module.KERNELS[self.variant], Contract(tuple(clauses)), {}
        from dsv4_kernels import registry

        spec = registry.get_kernel(self.kernel)
        variant = next(v for v in spec.variants if v.id == self.variant)
        return spec.make_kernel(**variant.kwargs), spec.contract, variant.dims()


@dataclass(frozen=True)
class Options:
    """How to check."""

    recheck: bool
    fresh: bool
    write: bool


def run_task(task: Task, options: Options) -> VariantReport:
    """Check one variant; with `write` keep its certificate."""
    prim_func, contract, dims = task.load()
    result = check_kernel(
        task.kernel, task.variant, prim_func, contract, dims, recheck=options.recheck, fresh=options.fresh
    )
    if options.write and not result.reused:
        certificates.write(result, contract)
    return result


def is_current(task: Task) -> bool:
    """Return whether the variant's certificate is of the text, contract and verifier of today."""
    prim_func, contract, dims = task.load()
    known = certificates.load(task.kernel, task.variant)
    digest = extract.extract(prim_func).cuda_sha256
    return known is not None and certificates.matches(known, digest, contract, dims)


def load_file(path: Path) -> ModuleType:
    """Import a Python file that defines KERNELS."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise click.UsageError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, "KERNELS", None), dict):
        raise click.UsageError(f"{path} defines no dict KERNELS (name -> PrimFunc)")
    return module


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--kernel", "kernels", multiple=True, help="Only this kernel (repeatable).")
@click.option("--variant", "variants", multiple=True, help="Only this variant (repeatable).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--fresh", is_flag=True, help="Prove again even where a certificate matches.")
@click.option("--write", is_flag=True, help="Write certificates of what is proved.")
@click.option("--check", is_flag=True, help="Prove nothing: only say whether all certificates are current.")
@click.option(
    "--recheck",
    type=click.Choice(["cvc5", "none"]),
    default="cvc5",
    show_default=True,
    help="Second solver that proves again what z3 proved.",
)
@click.option("-j", "jobs", type=click.IntRange(1), default=None, help="Processes.  [default: CPUs]")
def command(
    file: Path | None,
    kernels: tuple[str, ...],
    variants: tuple[str, ...],
    as_json: bool,
    fresh: bool,
    write: bool,
    check: bool,
    recheck: str,
    jobs: int | None,
) -> None:
    """Prove every variant of every kernel, or the KERNELS of FILE.

    FILE is any Python file with a dict KERNELS (name -> PrimFunc) and, for symbolic dims, a dict
    CONTRACTS (name -> tuple of comparisons over dim names).

    Exit status: 0 all PROVED, 1 any REFUTED, 2 any UNKNOWN or UNSUPPORTED, 3 the tool failed.
    """
    if write and (recheck == "none" or file is not None):
        raise click.UsageError("--write needs both solvers and registered kernels")
    tasks = select_tasks(file, kernels, variants)
    workers = min(jobs or os.cpu_count() or 1, len(tasks))
    if check:
        sys.exit(_check_certificates(tasks, workers))
    options = Options(recheck == "cvc5", fresh or write, write)
    console = Console(highlight=False)
    progress = Console(stderr=True)
    reports, ledger = [], report.Ledger()
    with _mapped(run_task, tasks, options, workers) as results, _progress(progress, len(tasks)) as advance:
        for result in results:
            reports.append(result)
            if not as_json:
                report.print_report(console, result, ledger)
            advance()
    if as_json:
        click.echo(report.to_json(reports))
    else:
        report.print_summary(console, reports, ledger)
    sys.exit(exit_code(r.verdict for r in reports))


def select_tasks(file: Path | None, kernels: tuple[str, ...], variants: tuple[str, ...]) -> list[Task]:
    """Return what to check; a name that selects nothing is an error."""
    if file is not None:
        tasks = [Task(file.stem, name, str(file)) for name in load_file(file).KERNELS]
        kernels = ()
    else:
        from dsv4_kernels import registry

        tasks = [Task(s.name, v.id) for s in registry.all_kernels() for v in s.variants]
    unknown = (set(kernels) - {t.kernel for t in tasks}) | (set(variants) - {t.variant for t in tasks})
    if unknown:
        raise click.UsageError(f"no kernel or variant called {', '.join(sorted(unknown))}")
    chosen = [
        t for t in tasks if (not kernels or t.kernel in kernels) and (not variants or t.variant in variants)
    ]
    if not chosen:
        raise click.UsageError("nothing to check")
    return chosen


def _check_certificates(tasks: list[Task], workers: int) -> int:
    stale = []
    with _mapped(_is_current, tasks, None, workers) as results:
        for task, current in zip(tasks, results, strict=True):
            if not current:
                stale.append(task)
                click.echo(f"{task.kernel}/{task.variant}: no current certificate")
    click.echo(f"{len(tasks) - len(stale)} of {len(tasks)} certificates are current")
    return EXIT_UNDECIDED if stale else 0


def _is_current(task: Task, options: None) -> bool:
    del options
    return is_current(task)


@contextmanager
def _mapped(
    function: Callable[[Task, Any], Any], tasks: list[Task], options: Any, workers: int
) -> Iterator[Iterator[Any]]:
    if workers == 1:
        yield (function(task, options) for task in tasks)
        return
    # A fresh process each: the compiler keeps state, and threads do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield pool.map(function, tasks, [options] * len(tasks))


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[], None]]:
    if not console.is_terminal or total == 1:
        yield lambda: None
        return
    columns = (TextColumn("proving"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def main() -> None:
    """Run the command; a failure of the tool itself exits with status 3."""
    try:
        command(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_TOOL_ERROR)
    except click.Abort:
        sys.exit(EXIT_TOOL_ERROR)
    except Exception:
        Console(stderr=True).print_exception()
        sys.exit(EXIT_TOOL_ERROR)


if __name__ == "__main__":
    main()
