"""Compile every variant into TileLang's disk cache, several at a time.

What runs afterwards finds its kernels there: on a borrowed GPU with many cores this turns minutes of
nvcc, one variant after the other, into seconds.
"""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import click

from bench.cli import find_jobs
from dsv4_kernels import runtime
from dsv4_kernels.registry import Variant, all_kernels, get_kernel

_MAX_WORKERS = 16  # each holds a compiler, 500 MB


def compile_variant(kernel: str, variant: Variant) -> None:
    """Compile one variant as a call of the public function would."""
    runtime.compiled(get_kernel(kernel).make_kernel, variant.kwargs)


def variants_of(
    kernels: Sequence[str], cases: Sequence[str] = (), dims: Sequence[str] = ()
) -> list[tuple[str, Variant]]:
    """Return every shipped variant of these kernels with its kernel, or those that cases or dims take."""
    if cases or dims:
        jobs = find_jobs(kernels, cases, dims)
        taken = {(job.spec.name, (v := job.spec.select(job.case.dims)).id): v for job in jobs}
        return [(kernel, variant) for (kernel, _), variant in taken.items()]
    specs = [spec for spec in all_kernels() if not kernels or spec.name in kernels]
    return [(spec.name, variant) for spec in specs for variant in spec.variants]


@click.command()
@click.option("--kernel", "kernels", multiple=True, metavar="NAME", help="Only this kernel; repeatable.")
@click.option("--case", "cases", multiple=True, metavar="ID", help="Only what this case takes; repeatable.")
@click.option("--dims", metavar="JSON", multiple=True, help="Only what these dims take; repeatable.")
@click.option("-j", "workers", default=_MAX_WORKERS, show_default=True, help="Processes, at most.")
def main(kernels: tuple[str, ...], cases: tuple[str, ...], dims: tuple[str, ...], workers: int) -> None:
    """Compile every shipped variant, or those of some cases; needs nvcc. Exits 1 if one does not compile."""
    keys = variants_of(kernels, cases, dims)
    context = multiprocessing.get_context("spawn")  # the compiler runs threads of its own
    failed = 0
    with ProcessPoolExecutor(min(os.cpu_count() or 1, workers), mp_context=context) as pool:
        jobs = {pool.submit(compile_variant, *key): key for key in keys}
        for done, job in enumerate(as_completed(jobs), start=1):
            error = job.exception()
            failed += error is not None
            kernel, variant = jobs[job]
            click.echo(f"[{done}/{len(keys)}] {kernel} {variant.id}{f': {error}' if error else ''}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
