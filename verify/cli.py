"""`dsv4-verify`: prove this library's kernels, or those of any Python file.

Exit codes: 0 every verdict is PROVED; 1 any REFUTED; 2 any UNKNOWN or UNSUPPORTED; 3 the tool failed.
"""

import importlib.util
import json
import multiprocessing
import sys
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from dsv4_kernels.contract import Contract
from dsv4_kernels.registry import all_kernels, get_kernel
from verify import certificates
from verify.verdict import EXIT_TOOL_ERROR, PropertyResult, VariantReport, Verdict, exit_code


@dataclass(frozen=True)
class Job:
    """One variant to prove; names alone, so that it can be sent to another process.

    Attributes:
        path: a file with KERNELS and CONTRACTS; None for a kernel of the registry.
    """

    kernel: str
    variant: str
    path: str | None = None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--kernel", "kernels", multiple=True, help="Only this kernel (repeatable).")
@click.option("--variant", "variants", multiple=True, help="Only this variant (repeatable).")
@click.option("--json", "as_json", is_flag=True, help="Print reports as one JSON array.")
@click.option("--fresh", is_flag=True, help="Prove again what a certificate covers.")
@click.option("--write", is_flag=True, help="Write certificates of what is PROVED.")
@click.option("--recheck", type=click.Choice(["cvc5", "none"]), default="cvc5", help="Second solver.")
@click.option("-j", "--jobs", type=click.IntRange(1), default=2, show_default=True, help="Processes.")
@click.option("-v", "--verbose", is_flag=True, help="Show PROVED properties too.")
def main(
    file: str | None,
    kernels: tuple[str, ...],
    variants: tuple[str, ...],
    as_json: bool,
    fresh: bool,
    write: bool,
    recheck: str,
    jobs: int,
    verbose: bool,
) -> None:
    """Prove kernels: every variant that this library ships, or those in FILE.

    FILE is a Python file with a dict KERNELS (name -> PrimFunc, symbolic dims by T.dynamic) and a dict
    CONTRACTS (name -> tuple of comparisons over dim names).
    """
    try:
        work = _jobs(file, kernels, variants)
        reports = _run_all(work, fresh or recheck == "none", recheck == "cvc5", jobs)
    except (KeyError, AttributeError, SyntaxError, ValueError) as error:
        raise SystemExit(_tool_error(error)) from error
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(_tool_error(error)) from error
    if write:
        for report in reports:
            if report.verdict is Verdict.PROVED and not report.reused:
                certificates.save(report.to_json())
    _show(reports, as_json, verbose)
    raise SystemExit(exit_code(r.verdict for r in reports))


def _tool_error(error: Exception) -> int:
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    click.echo(f"dsv4-verify: {message}", err=True)
    return EXIT_TOOL_ERROR


def _show(reports: list[VariantReport], as_json: bool, verbose: bool) -> None:
    from verify import report as text

    if as_json:
        click.echo(json.dumps([r.to_json() for r in reports], indent=1))
        return
    console = Console(highlight=False)
    for report in reports:
        text.print_report(console, report, verbose=verbose)
    text.print_summary(console, reports)


def _jobs(file: str | None, kernels: tuple[str, ...], variants: tuple[str, ...]) -> list[Job]:
    if file is not None:
        found = [Job(name, name, file) for name in _load(file).KERNELS]
    else:
        specs = [get_kernel(name) for name in kernels] or list(all_kernels())
        found = [Job(spec.name, variant.id) for spec in specs for variant in spec.variants]
    chosen = [
        j for j in found if (not variants or j.variant in variants) and (not kernels or j.kernel in kernels)
    ]
    if not chosen:
        raise ValueError("no kernel matches")
    return chosen


def _load(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("KERNELS", "CONTRACTS"):
        if not isinstance(getattr(module, name, None), Mapping):
            raise ValueError(f"{file}: requires a dict {name}")
    return module


def _run_all(work: list[Job], fresh: bool, recheck: bool, jobs: int) -> list[VariantReport]:
    reports: dict[Job, VariantReport] = {}
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("proving", total=len(work))
        for job, report in _reports(work, fresh, recheck, jobs):
            reports[job] = report
            progress.advance(task)
    return [reports[job] for job in work]


def _reports(work: list[Job], fresh: bool, recheck: bool, jobs: int) -> Iterator[tuple[Job, VariantReport]]:
    if jobs == 1 or len(work) == 1:
        yield from ((job, run_job(job, fresh, recheck)) for job in work)
        return
    # Compiler and solvers keep threads and global state: fresh processes, never forks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(work)), mp_context=context) as pool:
        futures = {pool.submit(run_job, job, fresh, recheck): job for job in work}
        for future in as_completed(futures):
            yield futures[future], future.result()


def run_job(job: Job, fresh: bool, recheck: bool) -> VariantReport:
    """Extract one variant and prove it, or take its certificate where one covers it and `fresh` is off."""
    from verify.extract import extract

    prim_func, contract, dims = _subject(job)
    extracted = extract(prim_func)
    if not fresh and job.path is None:
        certificate = certificates.load(job.kernel, job.variant)
        if (
            certificate is not None
            and certificate["cuda_sha256"] == extracted.cuda_sha256
            and certificate["verifier_sha256"] == certificates.verifier_sha256()
            and certificate["contract"] == list(contract.clauses)
        ):
            return _from_certificate(certificate)
    from verify.engine import verify

    return verify(job.kernel, job.variant, extracted, contract, dims, recheck=recheck)


def _subject(job: Job) -> tuple[Any, Contract, dict[str, int]]:
    if job.path is not None:
        module = _load(job.path)
        return module.KERNELS[job.kernel], Contract(tuple(module.CONTRACTS.get(job.kernel, ()))), {}
    spec = get_kernel(job.kernel)
    variant = next(v for v in spec.variants if v.id == job.variant)
    return spec.make_kernel(**variant.kwargs), spec.contract, variant.dims()


def _from_certificate(data: Mapping[str, Any]) -> VariantReport:
    known = PropertyResult.__dataclass_fields__
    properties = [
        PropertyResult(
            **{**{k: v for k, v in p.items() if k in known}, "verdict": Verdict(p["verdict"]), "span": None}
        )
        for p in data["properties"]
    ]
    return VariantReport(
        data["kernel"],
        data["variant"],
        data["cuda_sha256"],
        tuple(data["contract"]),
        dict(data["dims"]),
        dict(data["witness"]),
        properties,
        list(data["unused_clauses"]),
        dict(data["versions"]),
        reused=True,
    )
