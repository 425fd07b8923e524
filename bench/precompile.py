"""Compile every variant into TileLang's disk cache, several at a time.

What runs afterwards finds its kernels there: on a borrowed GPU with many cores this turns minutes of
nvcc, one variant after the other, into seconds.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Protocol

import click

from bench.cli import find_jobs
from dsv4_kernels import runtime
from dsv4_kernels.registry import Variant, all_kernels, get_kernel

_MAX_WORKERS = 16  # each holds a compiler, 500 MB


class Work(Protocol):
    """What is compiled; printed as what it is."""

    def compile(self) -> None:
        """Compile it."""


@dataclass(frozen=True)
class Compiled:
    """One variant of a registered kernel."""

    kernel: str
    variant: Variant

    def __str__(self) -> str:
        """Say which."""
        return f"{self.kernel} {self.variant.id}"

    def compile(self) -> None:
        """Compile it as a call of the public function would."""
        runtime.compiled(get_kernel(self.kernel).make_kernel, self.variant.kwargs)


def compile_all(work: Sequence[Work], workers: int, echo: Callable[[str], None] = click.echo) -> int:
    """Compile side by side; return how many failed.

    Args:
        work: the longest first.
        workers: processes, at most; each holds a compiler, 500 MB to 1 GB.
        echo: gets a line for each.
    """
    context = multiprocessing.get_context("spawn")  # the compiler runs threads of its own
    failed = 0
    with ProcessPoolExecutor(max(min(workers, len(work)), 1), mp_context=context) as pool:
        running = {pool.submit(item.compile): item for item in work}
        for done, future in enumerate(as_completed(running), start=1):
            error = future.exception()
            failed += error is not None
            echo(f"[{done}/{len(work)}] {running[future]}{f': {error}' if error else ''}")
    return failed


def variants_of(
    kernels: Sequence[str], cases: Sequence[str] = (), dims: Sequence[str] = ()
) -> list[Compiled]:
    """Return every shipped variant of these kernels with its kernel, or those that cases or dims take."""
    if cases or dims:
        jobs = find_jobs(kernels, cases, dims)
        taken = {(job.spec.name, (v := job.spec.select(job.case.dims)).id): v for job in jobs}
        return [Compiled(kernel, variant) for (kernel, _), variant in taken.items()]
    specs = [spec for spec in all_kernels() if not kernels or spec.name in kernels]
    return [Compiled(spec.name, variant) for spec in specs for variant in spec.variants]


@click.command()
@click.option("--kernel", "kernels", multiple=True, metavar="NAME", help="Only this kernel; repeatable.")
@click.option("--case", "cases", multiple=True, metavar="ID", help="Only what this case takes; repeatable.")
@click.option("--dims", metavar="JSON", multiple=True, help="Only what these dims take; repeatable.")
@click.option("-j", "workers", default=_MAX_WORKERS, show_default=True, help="Processes, at most.")
def main(kernels: tuple[str, ...], cases: tuple[str, ...], dims: tuple[str, ...], workers: int) -> None:
    """Compile every shipped variant, or those of some cases; needs nvcc. Exits 1 if one does not compile."""
    work = variants_of(kernels, cases, dims)
    sys.exit(1 if compile_all(work, min(os.cpu_count() or 1, workers)) else 0)


if __name__ == "__main__":
    main()
