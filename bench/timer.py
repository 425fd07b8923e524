"""How long a call takes on the GPU: medians of CUDA-graph replays with a cold L2.

The call is captured once, so that Python, the launcher and the driver stay out of the figure. Before
each replay a buffer larger than the L2 is written, outside the graph and outside the two events
around its launch: inputs come from memory, as they do between the layers of a model. A figure holds
the launch of the graph itself, 1 to 2 us, for us and for peers alike. A call that cannot be captured
is timed by events around it, and says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

GRAPH, EAGER = "graph", "eager"  # methods
REPLAYS = 50
WARMUP = 5
MIN_REPLAYS = 30  # percentiles of fewer say little
_FLUSH_BYTES = 256 << 20  # five times the L2 of an H100 or H200


@dataclass(frozen=True)
class Timing:
    """Median and spread of a number of replays."""

    us: float
    p20_us: float
    p80_us: float
    replays: int
    method: str


class Device(Protocol):
    """What timing needs of a device; a test hands in one with a clock of its own."""

    def prepare(self, call: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
        """Warm `call` up; return what to replay and the name of the method."""
        ...

    def flush_l2(self) -> None:
        """Evict the L2."""
        ...

    def record(self) -> Any:
        """Return a mark of this point in the device's work."""
        ...

    def synchronize(self) -> None:
        """Wait until every mark is reached."""
        ...

    def elapsed_us(self, start: Any, stop: Any) -> float:
        """Return the time between two marks that are reached."""
        ...


def time_call(call: Callable[[], Any], device: Device, replays: int = REPLAYS) -> Timing:
    """Return the median time of `call` over at least `MIN_REPLAYS` replays, each with a cold L2.

    Raises:
        ValueError: fewer replays than that.
    """
    if replays < MIN_REPLAYS:
        raise ValueError(f"time_call: requires replays >= {MIN_REPLAYS}, got replays={replays}")
    replay, method = device.prepare(call)
    marks = []
    # Everything is queued before anything is awaited: a pause between replays would let clocks drop.
    for _ in range(WARMUP + replays):
        device.flush_l2()
        start = device.record()
        replay()
        marks.append((start, device.record()))
    device.synchronize()
    return summarize([device.elapsed_us(start, stop) for start, stop in marks[WARMUP:]], method)


def summarize(samples: Sequence[float], method: str) -> Timing:
    """Return the median and the 20th and 80th percentile of `samples` (us)."""
    ordered = sorted(samples)
    return Timing(
        us=_percentile(ordered, 0.5),
        p20_us=_percentile(ordered, 0.2),
        p80_us=_percentile(ordered, 0.8),
        replays=len(ordered),
        method=method,
    )


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    """Interpolate linearly between the two samples around `fraction` of the way."""
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


class CudaDevice:
    """The current CUDA device."""

    def __init__(self) -> None:
        """Allocate the buffer that evicts the L2."""
        import torch

        self._torch = torch
        self._buffer = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def prepare(self, call: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
        """Compile and warm up by calling, then capture; fall back to calls if capture fails."""
        cuda = self._torch.cuda
        for _ in range(WARMUP):
            call()
        cuda.synchronize()
        graph = cuda.CUDAGraph()
        try:
            with cuda.graph(graph):
                call()
        except RuntimeError:
            cuda.synchronize()
            return call, EAGER
        return graph.replay, GRAPH

    def flush_l2(self) -> None:
        """Write more than the L2 holds."""
        self._buffer.zero_()

    def record(self) -> Any:
        """Return an event recorded on the current stream."""
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def synchronize(self) -> None:
        """Wait for the device."""
        self._torch.cuda.synchronize()

    def elapsed_us(self, start: Any, stop: Any) -> float:
        """Return the time between two events."""
        return start.elapsed_time(stop) * 1e3
