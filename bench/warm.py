"""Have peers compile what they would on their first call, several shapes at a time.

    python -m bench.warm [--kernel NAME ...] [--case ID ...] [--peer NAME ...] [-j N] [--timeout S]

Peers that compile at run time keep what they made on disk. A benchmark that follows finds it there, so that
its time limits hold measurements alone: Humming's first call of a shape takes over a minute.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from time import monotonic

import click

from bench import peers
from bench.run import peers_of, select_jobs

COMPILING = ("humming", "deepgemm")  # peers that compile at run time
_WEIGHTS = ("n", "k", "num_experts", "groups")  # dims of a peer's weights; kernels of ours share them


def shapes(
    kernels: Sequence[str], names: Sequence[str], only: Sequence[str] = ()
) -> Iterator[tuple[str, str, list[dict[str, int]]]]:
    """Yield (peer, kernel, cases) for each shape of weights of the bench cases, or of those of `only`."""
    groups: dict[tuple[str, str], tuple[str, dict[str, dict[str, int]]]] = {}
    for job in select_jobs(kernels, only):
        dims = dict(job.case.dims)
        for name in peers_of(job.spec, None):
            if name in names:
                _, cases = groups.setdefault((name, str(weights_of(dims))), (job.spec.name, {}))
                cases.setdefault(str([dims.get(n) for n in ("m", "rows", "spread")]), dims)
    for (name, _), (kernel, cases) in groups.items():
        yield name, kernel, list(cases.values())


def weights_of(dims: Mapping[str, int]) -> dict[str, int]:
    """Return the dims of a case that its weights have."""
    return {n: dims[n] for n in _WEIGHTS if n in dims}


def compile_shape(name: str, kernel: str, cases: Sequence[dict[str, int]], timeout_s: float) -> str:
    """Compile a peer's kernels for one shape in a process of its own; return what went wrong."""
    command = [sys.executable, "-m", "bench.peers", name, "--kernel", kernel, "--ahead"]
    for dims in cases:
        command += ["--dims", json.dumps(dims)]
    try:
        done = subprocess.run(
            command, env=peers.environment(), capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return f"timed out after {timeout_s:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    return done.stdout.strip()


@click.command()
@click.option("--kernel", "kernels", multiple=True, metavar="NAME", help="Only its peers; repeatable.")
@click.option("--case", "cases", multiple=True, metavar="ID", help="Only these cases' shapes; repeatable.")
@click.option("--peer", "names", multiple=True, default=COMPILING, metavar="NAME", help="Only this one.")
@click.option("-j", "jobs", default=8, show_default=True, help="Processes; each holds a shape's weights.")
@click.option("--timeout", "timeout_s", default=300.0, show_default=True, metavar="S", help="Of each.")
def main(
    kernels: tuple[str, ...], cases: tuple[str, ...], names: tuple[str, ...], jobs: int, timeout_s: float
) -> None:
    """Compile peers' kernels for the benchmark's cases; needs a GPU."""
    began = monotonic()
    work = list(shapes(kernels, names, cases))
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(compile_shape, *job, timeout_s): job for job in work}
        for done, future in enumerate(as_completed(running), start=1):
            name, kernel, dims = running[future]
            error = future.result()
            click.echo(
                f"[{done}/{len(work)}] {monotonic() - began:.0f} s: {name} {kernel} {weights_of(dims[0])}"
                + (f": {error}" if error else "")
            )


if __name__ == "__main__":
    main()
