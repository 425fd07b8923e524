"""Compile the fused expert layer's kernels into TileLang's disk cache, several at a time.

    python -m bench.megamoe_precompile --ranks 4 --model flash --tokens 8192 [--weights fp8] [--ring] [-j 16]

Each rank of several has kernels of its own (its number is a constant of them), and one for every size of the
layer's buckets. Processes that torchrun starts would each compile theirs, one after the other, while the rest
wait; what they find in the cache they load.
"""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

import click

from bench.megamoe import RING_FROM, SHAPES, TOKENS, WEIGHTS, ring_changes
from bench.megamoe import config as config_of

_TIMEOUT_S = 20.0  # of the watchdog, as bench.megamoe_ranks has it
_MULTIPROCESSORS = 132  # of an H100 or H200, where there is no GPU to ask


def sizes(tokens: tuple[int, ...]) -> list[int]:
    """Return most tokens of the kernels that a layer for the largest of `tokens` takes for them."""
    from megamoe.layer import bucket

    return sorted({bucket(t, max(tokens)) for t in tokens})


def compile_one(
    model: str, size: int, ranks: int, rank: int, kernel: str, *, fp8: bool, ring: bool = False
) -> None:
    """Compile one kernel (fused, plan or stage) of a rank of a layer, as `FusedLayer` would."""
    from megamoe import fused, plan_kernel, stage_kernel
    from megamoe.layer import one_of
    from megamoe.virtual import compile_kernel

    config = config_of(model, size, _MULTIPROCESSORS, fp8=fp8, ranks=ranks)
    if ranks > 1:
        config = one_of(config, ranks, rank, _TIMEOUT_S)
    if ring:
        config = replace(config, **ring_changes())
    makers = {"fused": fused, "plan": plan_kernel, "stage": stage_kernel}
    compile_kernel(config, makers[kernel].make_kernel)


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(sorted(SHAPES)), default=("flash",))
@click.option("--tokens", "tokens", multiple=True, type=int, default=TOKENS, help="Of a rank.")
@click.option("--ranks", default=1, help="A process each.")
@click.option("--weights", type=click.Choice(WEIGHTS), default="fp4", help="Of the routed experts.")
@click.option("--ring", is_flag=True, help=f"From {RING_FROM} tokens on, kernels with a ring too.")
@click.option("-j", "workers", default=os.cpu_count() or 1, help="Processes, 1 GB each.")
def main(
    models: tuple[str, ...], tokens: tuple[int, ...], ranks: int, weights: str, ring: bool, workers: int
) -> None:
    """Compile all kernels of these layers; needs nvcc. Exits 1 if one does not compile."""
    kernels = [
        (model, size, ranks, rank, kernel, has_ring)
        for kernel in ("fused", "plan", "stage")  # the longest first
        for model in models
        for size in sizes(tokens)
        for rank in range(ranks)
        for has_ring in (False, True)[: 1 + (ring and size >= RING_FROM)]
    ]
    context = multiprocessing.get_context("spawn")  # the compiler runs threads of its own
    failed = 0
    with ProcessPoolExecutor(min(workers, len(kernels)), mp_context=context) as pool:
        jobs = {pool.submit(compile_one, *k[:-1], fp8=weights == "fp8", ring=k[-1]): k for k in kernels}
        for done, job in enumerate(as_completed(jobs), start=1):
            error = job.exception()
            failed += error is not None
            note = f": {error}" if error else ""
            click.echo(f"[{done}/{len(kernels)}] {' '.join(map(str, jobs[job]))}{note}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
