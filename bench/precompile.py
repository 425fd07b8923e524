"""Compile every variant into TileLang's disk cache, several at a time.

What runs afterwards finds its kernels there: on a borrowed GPU with many cores this turns minutes of
nvcc, one variant after the other, into seconds.
"""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed

import click

from dsv4_kernels import runtime
from dsv4_kernels.registry import all_kernels, get_kernel

_MAX_WORKERS = 16  # each holds a compiler, 500 MB


def compile_variant(kernel: str, variant_id: str) -> None:
    """Compile one variant as a call of the public function would."""
    spec = get_kernel(kernel)
    variant = next(v for v in spec.variants if v.id == variant_id)
    runtime.compiled(spec.make_kernel, variant.kwargs)


@click.command()
@click.option("--kernel", "kernels", multiple=True, metavar="NAME", help="Only this kernel; repeatable.")
def main(kernels: tuple[str, ...]) -> None:
    """Compile every shipped variant; needs nvcc. Exits 1 if one does not compile."""
    specs = [spec for spec in all_kernels() if not kernels or spec.name in kernels]
    keys = [(spec.name, variant.id) for spec in specs for variant in spec.variants]
    context = multiprocessing.get_context("spawn")  # the compiler runs threads of its own
    failed = 0
    with ProcessPoolExecutor(min(os.cpu_count() or 1, _MAX_WORKERS), mp_context=context) as pool:
        jobs = {pool.submit(compile_variant, *key): key for key in keys}
        for done, job in enumerate(as_completed(jobs), start=1):
            error = job.exception()
            failed += error is not None
            click.echo(f"[{done}/{len(keys)}] {' '.join(jobs[job])}{f': {error}' if error else ''}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
