"""Host cost of a call: how long a public function takes to return on the CPU, before the GPU is done.

    python -m bench.host [--kernel NAME ...] [--out rows.jsonl] [--stub]

Calls are queued without waiting, fewer than the driver's queue holds, so that the GPU does not hold them
back. A call like an earlier one goes as that one did (`dsv4_kernels.replay`), launched as a graph; timed
beside it: calls with other tensors in turn; such calls with each kernel launched by itself; the function with
its checks; and the compiled kernels' own launchers, which allocate and check nothing of ours.
`--stub` needs no GPU and times Python's part alone: see `bench.host_stub`.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import click
import torch

from bench import host_stub
from bench.host_stub import SEED
from dsv4_kernels import replay, runtime
from dsv4_kernels.registry import KernelSpec, all_kernels

CALLS = 200  # of a round; the driver queues 1024 launches
ROUNDS = 15
_COLUMNS = {
    "call_us": "call",
    "least_us": "least",
    "in_turn_us": "other tensors in turn",
    "kernels_us": "by kernels",
    "checked_us": "with checks",
    "launcher_us": "launcher",
}


def call_us(call: Callable[[], Any], rounds: int = ROUNDS, calls: int = CALLS) -> tuple[float, float]:
    """Return the median and the least over rounds of the time (us) in which `call` returns."""
    samples = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return median(samples[1:]), min(samples[1:])


def measure(kernels: tuple[KernelSpec, ...]) -> Iterator[dict[str, Any]]:
    """Yield a row for the smallest benchmark case of each kernel.

    Microseconds of a call that goes as noted (median and least), of one whose tensors are others than those
    of the call before, of the first with kernels instead of a graph, of the same call with all checks and the
    compiler's host function, and of the compiler's launchers alone.
    """
    stream = torch.cuda.Stream()
    for spec in kernels:
        case = next((c for c in spec.cases if "bench" in c.tags), None)
        if case is None:
            continue
        inputs = spec.make_inputs(case.dims, torch.device("cuda"), SEED)
        launched: list[tuple[Any, ...]] = []
        launch = runtime.launch
        try:
            runtime.launch = lambda *args: launched.append(args) or launch(*args)  # noqa: B023
            with replay.disabled():
                spec.fn(*inputs)
        finally:
            runtime.launch = launch
        if launched:
            launches = [(runtime.compiled(make, kwargs), args) for make, kwargs, args in launched]
            yield {
                "kernel": spec.name,
                "case": case.id,
                **_times(spec.fn, inputs, launches, stream),
                "launches": len(launches),
                "gpu": torch.cuda.get_device_name(),
            }


def _times(
    fn: Callable[..., Any],
    inputs: tuple[Any, ...],
    launches: list[tuple[Any, Any]],
    stream: torch.cuda.Stream,
) -> dict[str, float]:
    others = tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in inputs)

    def call() -> None:
        fn(*inputs)

    def in_turn() -> None:
        fn(*inputs)
        fn(*others)

    def launchers() -> None:
        for kernel, args in launches:
            kernel(*args)

    torch.cuda.synchronize()
    with mock.patch.dict(os.environ, DSV4_LAUNCH="kernels"), torch.cuda.stream(stream):
        by_kernels, _ = call_us(call)  # calls in a stream go on as the first ones went
    whole, least = call_us(call)
    turns, _ = call_us(in_turn, calls=CALLS // 2)
    bare, _ = call_us(launchers)
    with replay.disabled():
        checked, _ = call_us(call)
    times = {
        "call_us": whole,
        "least_us": least,
        "in_turn_us": turns / 2,
        "kernels_us": by_kernels,
        "launcher_us": bare,
        "checked_us": checked,
    }
    return {name: round(us, 2) for name, us in times.items()}


@click.command()
@click.option("--kernel", "names", multiple=True, metavar="NAME", help="Only this kernel; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="File that gets a JSON line for each kernel.")
@click.option("--stub", "is_stub", is_flag=True, help="Without a GPU: a driver that does nothing.")
def main(names: tuple[str, ...], out: Path | None, is_stub: bool) -> None:
    """Print the host cost of each kernel's call."""
    kernels = tuple(k for k in all_kernels() if not names or k.name in names)
    with host_stub.stubbed() if is_stub else nullcontext():
        _write(host_stub.measure(kernels) if is_stub else measure(kernels), out)


def _write(rows: Iterable[dict[str, Any]], out: Path | None) -> None:
    for row in rows:
        times = ", ".join(f"{name} {row[key]:6.2f} us" for key, name in _COLUMNS.items() if key in row)
        click.echo(f"{row['kernel']:28s} {row['case']:26s} {times}")
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(row, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
