"""The host's part of a call without a GPU: CPU tensors, the kernels' launches, a driver that does nothing.

Inside `stubbed()` operators on CPU tensors do what they do on a GPU, up to the driver: launches are read from
the compiler's host text, laid out and handed to a C function that returns at once. Allocations are those of
the CPU allocator. So what is left of a call is mostly Python, and two forms of it can be compared anywhere;
nothing is computed.
"""

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from dsv4_kernels import driver, graphs, host_text, replay, runtime
from dsv4_kernels.registry import KernelSpec
from dsv4_kernels.tile import corrections, simplifier
from verify.extract import TARGET

SEED = 3
CALLS, ROUNDS = 50, 400  # the least of many short rounds: other processes only add
MAX_DIM = 20_000  # of a case: inputs are made on the CPU


# Of the C library: takes an address, does nothing and returns 0.
_NOTHING = ctypes.CDLL(None)["pthread_mutexattr_destroy"]


class _Driver(driver.Driver):
    """A driver whose launches return at once."""

    def __init__(self) -> None:
        self._launch = _NOTHING

    def describer(self, tensor: host_text.TensorMap) -> Callable[[int], bytes]:
        return lambda address: address.to_bytes(8, "little") * driver.MAP_WORDS


class _Graph(graphs.Graph):
    """A graph that does nothing."""

    def __init__(self, cuda: driver.Driver, nodes: Sequence[Any], stream: int) -> None:
        node = ctypes.c_void_p.from_param(ctypes.addressof(nodes[0]))
        self.launch = partial(_NOTHING, node, node)
        self.set = [partial(_NOTHING, node, node, node) for _ in nodes]


class _Kernel:
    """A kernel that is lowered and does not run."""

    def __init__(self, make_kernel: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
        import tilelang
        from tilelang import tvm

        target = dict(TARGET)
        with corrections.corrected(), simplifier.lowering(), tvm.target.Target(target):
            lowered = tilelang.lower(make_kernel(**kwargs), target=target, enable_host_codegen=True)
        if lowered.rt_mod is None:
            raise RuntimeError(f"{make_kernel.__module__}: lowered without a host function")
        self._host = host_text.read_host(lowered.rt_mod.inspect_source(), lowered.kernel_source)

    def __call__(self, args: tuple[torch.Tensor, ...]) -> None:
        replay.note_launch(self._direct, args)

    def _direct(
        self, shapes: Sequence[Sequence[int]], sources: Sequence[replay.Source], device: int
    ) -> driver.DirectLaunch:
        functions: Any = SimpleNamespace(get=lambda index, launch: 1)
        return driver.DirectLaunch(self._host.launch(shapes), functions, device, sources)


@contextmanager
def stubbed() -> Iterator[None]:
    """Run operators on CPU tensors up to the driver inside the block.

    What they note there is never forgotten: a process that was in such a block computes nothing on the CPU.
    """
    cuda, kernels = _Driver(), {}

    def kernel(make_kernel: Callable[..., Any], kwargs: Mapping[str, Any]) -> _Kernel:
        key = (make_kernel, *kwargs.items())
        if key not in kernels:
            kernels[key] = _Kernel(make_kernel, kwargs)
        return kernels[key]

    with (
        mock.patch.object(replay, "DEVICE_TYPE", "cpu"),
        mock.patch.object(driver, "driver", return_value=cuda),
        mock.patch.object(driver, "current_stream", abs),  # a function in C as torch's: device -> a number
        mock.patch.object(driver, "is_capturing", bool),  # likewise: False
        mock.patch.object(graphs, "Graph", _Graph),
        mock.patch.object(runtime, "_launcher", kernel),
        mock.patch.object(runtime, "_launchers", {}),
    ):
        yield


def least_us(call: Callable[[], Any]) -> float:
    """Return the least time (us) of a call over rounds."""
    least = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        least = min(least, time.perf_counter() - start)
    return least / CALLS * 1e6


def measure(kernels: Sequence[KernelSpec]) -> Iterator[dict[str, Any]]:
    """Yield a row for the smallest case of each kernel that launches and is noted, in `stubbed()`.

    Microseconds of a call with the tensors of the call before, and of one with others in turn.
    """
    for spec in kernels:
        for case in sorted(spec.cases, key=lambda c: sum(c.dims.values())):
            if max(case.dims.values()) > MAX_DIM:
                continue
            inputs = spec.make_inputs(case.dims, torch.device("cpu"), SEED)
            with mock.patch.object(replay, "note_launch", wraps=replay.note_launch) as noted:
                spec.fn(*inputs)
                num_launches = noted.call_count
                spec.fn(*inputs)
            if num_launches and noted.call_count == num_launches:
                yield {"kernel": spec.name, "case": case.id, **_row(spec, inputs)}
                break


def _row(spec: KernelSpec, inputs: tuple[Any, ...]) -> dict[str, float]:
    others = tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in inputs)

    def in_turn() -> None:
        spec.fn(*inputs)
        spec.fn(*others)

    in_turn()
    return {
        "call_us": round(least_us(lambda: spec.fn(*inputs)), 2),
        "in_turn_us": round(least_us(in_turn) / 2, 2),
    }
