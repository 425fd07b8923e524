"""dsv4-verify: prove the kernels of this library, or those of a file."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from verify import annotations, certificates, report
from verify import html as html_page
from verify.tasks import Dims, Task, TaskError, Workers, collect_seldom, load_file, parts_of, select, workers
from verify.verdict import EXIT_TOOL_ERROR, EXIT_UNDECIDED, VariantReport, Verdict, exit_code, worst

__all__ = ["command", "load_file", "main"]


@dataclass(frozen=True)
class Options:
    """How to check."""

    recheck: bool
    fresh: bool
    write: bool
    smt2: str | None = None


@dataclass(frozen=True)
class Output:
    """Where the answers go.

    Attributes:
        style: text, json or github, on stdout.
        html: page to write.
        replay: folder of replay scripts.
        started: when the command was.
    """

    style: str
    html: Path | None
    replay: Path | None
    started: float


def run_task(task: Task, options: Options) -> VariantReport:
    """Check one variant; with `write` keep its certificate."""
    if task.is_suite:
        return _run_suite(task, options)
    from verify.engine import check_kernel  # here: the parent process proves nothing

    loaded = task.load()
    collect_seldom()
    with task.compiler():
        result = check_kernel(
            task.kernel,
            task.variant,
            loaded.prim_func,
            loaded.contract,
            loaded.dims,
            recheck=options.recheck,
            fresh=options.fresh,
            smt2=Path(options.smt2) if options.smt2 is not None else None,
            dispatch=task.dispatch(),
            pass_configs=loaded.pass_configs,
        )
    if options.write and not result.reused:
        certificates.write(result, loaded.contract, certificates.own_folder() if task.dims else None)
    return result


def _run_suite(task: Task, options: Options) -> VariantReport:
    from verify import suites

    folder = Path(options.smt2) if options.smt2 is not None else None
    result = suites.check(
        task.kernel, task.variant, recheck=options.recheck, fresh=options.fresh, smt2=folder
    )
    if options.write and not result.reused:
        certificates.write(result, suites.NO_CONTRACT)
    return result


def is_current(task: Task, options: None = None) -> bool:
    """Return whether the variant's certificate is of the text, contract and verifier of today.

    The text is lowered again, whatever the certificate says of its source.
    """
    from verify import extract, suites

    del options
    if task.is_suite:
        return suites.is_current(task.kernel, task.variant)
    loaded = task.load()
    known = certificates.load(task.kernel, task.variant)
    with task.compiler():
        found = extract.extract(loaded.prim_func)
    return known is not None and certificates.matches(
        known, found.cuda_sha256, loaded.contract, loaded.dims, host_digest=found.host_sha256
    )


def _dims(text: str | None) -> Dims:
    """Return dims from `name=value,...`; BadParameter: it is not of that form."""
    found: dict[str, int] = {}
    for part in text.split(",") if text is not None else ():
        name, _, value = part.strip().partition("=")
        if not name.isidentifier() or not value.isdecimal() or name in found:
            raise click.BadParameter(f"requires name=number,... with each name once, got {text!r}")
        found[name] = int(value)
    return tuple(sorted(found.items()))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--kernel", "kernels", multiple=True, help="Only this kernel (repeatable).")
@click.option("--variant", "variants", multiple=True, help="Only this variant (repeatable).")
@click.option(
    "--dims",
    metavar="n=5120,k=2048",
    callback=lambda context, option, value: _dims(value),
    help="Of one --kernel: the variants for these dims, which the library does not ship. Their certificates "
    "(--write) go to $DSV4_CERTIFICATES or the user's cache, where launches find them.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), default=None, help="Write a page.")
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "github"]),
    default="text",
    show_default=True,
    help="github: findings as annotations of a workflow run.",
)
@click.option(
    "--replay",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Write a script for each REFUTED there, and run it.",
)
@click.option(
    "--fresh", is_flag=True, help="Prove (with --mutate: check) again what certificates (records) have."
)
@click.option(
    "--write", is_flag=True, help="Write certificates of what is proved; with --mutate: record the results."
)
@click.option(
    "--check", is_flag=True, help="Prove nothing: lower, and say whether all certificates are current."
)
@click.option(
    "--recheck",
    type=click.Choice(["cvc5", "none"]),
    default="cvc5",
    show_default=True,
    help="Second solver that proves again what z3 proved.",
)
@click.option(
    "--smt2",
    type=click.Path(file_okay=False),
    default=None,
    help="Prove again and store every query there as SMT-LIB.",
)
@click.option("--mutate", is_flag=True, help="Measure strength: the share of small faults that is noticed.")
@click.option("--operator", "operators", multiple=True, help="With --mutate: only this one (repeatable).")
@click.option(
    "--sample", type=click.IntRange(1), default=None, help="With --mutate: so many of an operator and kernel."
)
@click.option(
    "--results",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="With --mutate: file that keeps each outcome as it is found; what it has is not checked again.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=None,
    help="With --mutate: begin no mutant after that, and report those that are decided.",
)
@click.option("--corpus", is_flag=True, help="Check the corpus of known faults.")
@click.option("-j", "jobs", type=click.IntRange(1), default=None, help="Processes.  [default: CPUs]")
def command(
    file: Path | None,
    kernels: tuple[str, ...],
    variants: tuple[str, ...],
    dims: Dims,
    as_json: bool,
    html: Path | None,
    style: str,
    replay: Path | None,
    fresh: bool,
    write: bool,
    check: bool,
    recheck: str,
    smt2: str | None,
    mutate: bool,
    operators: tuple[str, ...],
    sample: int | None,
    results: Path | None,
    minutes: float | None,
    corpus: bool,
    jobs: int | None,
) -> None:
    """Prove every variant of every kernel and every suite of proofs, or the KERNELS of FILE.

    FILE is any Python file with a dict KERNELS (name -> PrimFunc) and, for symbolic dims, a dict
    CONTRACTS (name -> tuple of comparisons over dim names). A dict BATCH_DIMS (name -> dims that count
    rows) asks for batch_invariance, to which SHARED_ROWS (name -> tensor -> rows with one entry) belongs;
    IN_PLACE (name -> tensors) names tensors that the caller fills and the kernel updates; PASS_CONFIGS
    (name -> pass_configs of tilelang.jit) says how it is compiled.

    Exit status: 0 all PROVED, 1 any REFUTED, 2 any UNKNOWN or UNSUPPORTED, 3 the tool failed. Of --check:
    0 all certificates current, 2 any is not. Of --mutate and --corpus: 0 the goals are met, 1 they are not.
    """
    if write and (recheck == "none" or file is not None):
        raise click.UsageError("--write needs both solvers and registered kernels")
    if mutate and file is not None:
        raise click.UsageError("--mutate is of registered kernels")
    if dims and (mutate or corpus or file is not None):
        raise click.UsageError("--dims are of a registered kernel that is proved")
    if mutate and write and (kernels or variants or operators or sample):
        raise click.UsageError("what --mutate --write records is of all kernels")
    options = Options(recheck == "cvc5", fresh or write or smt2 is not None, write, smt2)
    one = file is not None or (variants and not mutate)
    count = 1 if one and jobs is None else jobs or os.cpu_count() or 1
    started = time.monotonic()
    with workers(count) as pool:
        try:
            if mutate:
                from verify.mutate.measure import Request, measure
                from verify.mutate.store import RECORDED

                asked = Request(
                    kernels,
                    variants,
                    operators,
                    sample,
                    results,
                    minutes,
                    replay is not None,
                    None if fresh else RECORDED,
                    RECORDED if write else None,
                    as_json,
                )
                sys.exit(measure(pool, asked))
            if corpus:
                from verify import corpus as known_faults

                sys.exit(known_faults.run(pool, "json" if as_json else style, html, replay))
            tasks = select(file, kernels, variants, dims)
        except TaskError as error:
            raise click.UsageError(str(error)) from error
        output = Output("json" if as_json else style, html, replay, started)
        status = _check(tasks, pool) if check else _prove(tasks, pool, options, output)
    sys.exit(status)


def _prove(tasks: list[Task], pool: Workers, options: Options, output: Output) -> int:
    console = Console(highlight=False)
    reports, ledger = [], report.Ledger()
    as_text = output.style == "text"
    with report.progress(Console(stderr=True), len(tasks), "proving") as advance:
        parts = parts_of(tasks, [certificates.cost(t.kernel, t.variant) for t in tasks])
        for task, result in zip(tasks, pool.map(run_task, tasks, options, parts), strict=True):
            reports.append(result)
            if as_text:
                report.print_report(console, result, ledger)
                if result.verdict is Verdict.REFUTED and output.replay is None:
                    console.print(f"  replay: {task.command} --replay DIR", markup=False, soft_wrap=True)
            advance()
    if any(task.file is None for task in tasks):
        from verify.signature.library import check_library

        for result in check_library(reports):
            if as_text:
                report.print_report(console, result, ledger)
    seconds = time.monotonic() - output.started
    if output.style == "json":
        click.echo(report.to_json(reports))
    elif output.style == "github":
        for line in (*annotations.lines(reports), *report.summary_lines(reports, seconds)):
            click.echo(line)
    else:
        report.print_summary(console, reports, ledger, seconds)
    if output.html is not None:
        html_page.write(output.html, reports, str(worst(r.verdict for r in reports)), seconds)
    if output.replay is not None:
        _replay(tasks, reports, pool, output.replay)
    return exit_code(r.verdict for r in reports)


def _replay(tasks: list[Task], reports: list[VariantReport], pool: Workers, folder: Path) -> None:
    """Replay every REFUTED and say on stderr, as stdout is the report's, how many are confirmed."""
    from verify.replay import figure, replay_report

    pairs = zip(tasks, reports, strict=False)  # reports on the library as a whole come last
    refuted = [(t, found) for t, found in pairs if found.verdict is Verdict.REFUTED and not t.is_suite]
    done = [d for found in pool.map(replay_report, refuted, str(folder)) for d in found]
    for item in done:
        click.echo(f"replay {item.script}: {item.prop}: {item.note}", err=True)
    click.echo(figure(done), err=True)


def _check(tasks: list[Task], pool: Workers) -> int:
    stale = []
    for task, current in zip(tasks, pool.map(is_current, tasks, None), strict=True):
        if not current:
            stale.append(task)
            click.echo(f"{task.kernel}/{task.variant}: no current certificate")
    click.echo(f"{len(tasks) - len(stale)} of {len(tasks)} certificates are current")
    unfit = _unfit(tasks)
    for name in unfit:
        click.echo(f"{name}: its certificate does not fit the others or the dispatcher")
    return EXIT_UNDECIDED if stale or unfit else 0


def _unfit(tasks: list[Task]) -> list[str]:
    """Return the variants whose certificates do not add up to one claim about the dispatcher."""
    from verify.signature.library import check_library

    known = [certificates.load(t.kernel, t.variant) for t in tasks if t.file is None]
    reports = [certificates.to_report(c) for c in known if c is not None]
    return [f"{r.kernel}/{r.variant}" for r in check_library(reports)]


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
