"""The launches of a noted call as one CUDA graph, whose parameters are set where an address changed.

The driver takes less than half as long to launch a graph that exists as to launch one kernel, and no longer
for two kernels in turn (`docs/host.md`). A graph belongs to a stream, so that calls in two streams do not
wait for each other, and to one call at a time: a thread that finds it taken launches kernels, as calls do in
a capture, and as all calls of a signature do until there were enough of them for a graph to pay.
"""

import ctypes
import os
import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

from dsv4_kernels import driver

LAUNCH_MODES = ("graphs", "kernels")
CALLS_BEFORE = 32  # of a signature: making and freeing a graph takes 45 us, a launch of one saves 2 us
MAX_STREAMS = 8  # of a signature, with a graph each
MAX_GRAPHS = 512  # of the process: the driver takes 115 KB of the GPU's memory for one
# CUDA_KERNEL_NODE_PARAMS: function, extents of grid and block and shared bytes, pointers to the parameters.
_NODE_BYTES, _NODE_EXTENTS, _NODE_PARAMS = 72, 8, 40
_EXTENTS_BYTES = 28  # the same seven numbers as at the start of CUlaunchConfig
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class Graph:
    """Kernels that run in turn.

    Attributes:
        launch: launches them and returns a CUresult.
        set: of each kernel: hands the driver its parameters of now, for later launches; returns a CUresult.
    """

    def __init__(self, cuda: driver.Driver, nodes: Sequence[Any], stream: int) -> None:
        """Make it, in the current context.

        Args:
            cuda: the driver.
            nodes: of each kernel a CUDA_KERNEL_NODE_PARAMS, which is kept.
            stream: that the graph is launched in.

        Raises:
            DriverError: the driver refused.
            AttributeError: it is too old.
        """
        library, pointer, reference = cuda.library, ctypes.c_void_p.from_param, ctypes.byref
        template, made, kernels = ctypes.c_void_p(), ctypes.c_void_p(), []

        def call(name: str, *args: Any) -> None:
            cuda.check(getattr(library, name)(*args), name)

        mode = ctypes.c_int(_RELAXED)  # otherwise it might end another thread's capture
        call("cuThreadExchangeStreamCaptureMode", reference(mode))
        try:
            call("cuGraphCreate", reference(template), 0)
            for node in nodes:
                kernel, before = ctypes.c_void_p(), (ctypes.c_void_p * 1)(*kernels[-1:])
                count = ctypes.c_size_t(len(kernels[-1:]))
                call("cuGraphAddKernelNode_v2", reference(kernel), template, before, count, node)
                kernels.append(kernel.value)
            call("cuGraphInstantiateWithFlags", reference(made), template, ctypes.c_uint64(0))
        finally:
            call("cuThreadExchangeStreamCaptureMode", reference(mode))
            # Launches under way keep what they need. At the process's end the driver frees it.
            weakref.finalize(self, _destroy, library, made, template).atexit = False
        graph, set_params = pointer(made.value), library.cuGraphExecKernelNodeSetParams_v2
        self.launch: Callable[[], int] = partial(library.cuGraphLaunch, graph, pointer(stream))
        self.set: list[Callable[[], int]] = [
            partial(set_params, graph, pointer(kernel), pointer(ctypes.addressof(node)))
            for kernel, node in zip(kernels, nodes, strict=True)
        ]
        self._nodes = nodes


def _destroy(library: Any, made: ctypes.c_void_p, template: ctypes.c_void_p) -> None:
    mode = ctypes.c_int(_RELAXED)
    library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    if made:
        library.cuGraphExecDestroy(made)
    if template:
        library.cuGraphDestroy(template)
    library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def _mode() -> str:
    """Return how calls are to be launched.

    Raises:
        ValueError: DSV4_LAUNCH is none of LAUNCH_MODES.
    """
    mode = os.environ.get("DSV4_LAUNCH", LAUNCH_MODES[0])
    if mode not in LAUNCH_MODES:
        raise ValueError(f"requires DSV4_LAUNCH in {LAUNCH_MODES}, got DSV4_LAUNCH={mode!r}")
    if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":  # somebody looks for the kernel that fails
        return "kernels"
    return mode


class Graphs:
    """The graphs of a noted call.

    Attributes:
        made: stream -> frames of its graphs that no call has; an empty list: none is to be made.
    """

    _order: ClassVar[deque[tuple["weakref.ref[Graphs]", int]]] = deque()  # those of the process, oldest first
    _lock = threading.Lock()

    def __init__(self, launches: Sequence[driver.DirectLaunch], num_outputs: int) -> None:
        """Nothing is made yet.

        Args:
            launches: of the call, in turn.
            num_outputs: how many addresses a frame keeps beside those of the arguments.

        Raises:
            ValueError: DSV4_LAUNCH is none of LAUNCH_MODES.
        """
        _mode()
        self._launches, self._num_outputs = launches, num_outputs
        self._calls = 0
        self.made: dict[int, list[list[Any]]] = {}

    def called(self, stream: int) -> None:
        """Note a call by kernels in a stream for which nothing was made yet; enough of them make a graph."""
        if driver.is_capturing():
            return
        self._calls += 1
        if self._calls < CALLS_BEFORE:
            return
        frames = self.made[stream] = []
        if _mode() == "graphs" and len(self.made) <= MAX_STREAMS:
            self._make_room(stream)
            with suppress(AttributeError, driver.DriverError):
                frames.append(self._frame(stream))

    def _make_room(self, stream: int) -> None:
        """Give up the oldest graphs of the process, if there are too many with that of `stream`."""
        with self._lock:
            self._order.append((weakref.ref(self), stream))
            while len(self._order) > MAX_GRAPHS:
                owner, of_stream = self._order.popleft()
                old = owner()
                if old is not None:
                    old.made.pop(of_stream, None)
                    old._calls = 0

    def _frame(self, stream: int) -> list[Any]:
        """Return a list: of each launch its words, what sets them and its descriptors' addresses; and more.

        First the arguments' addresses; last what launches, the graph, and the outputs' addresses: none yet.
        """
        memory = [launch.memory() for launch in self._launches]
        nodes = [_node(launch.function, *m) for launch, m in zip(self._launches, memory, strict=True)]
        graph = Graph(driver.driver(), nodes, stream)
        fields: list[Any] = [None]
        for launch, (words, _, _), set_params in zip(self._launches, memory, graph.set, strict=True):
            fields += [words, set_params, *[None for w in launch.written if w.describe is not None]]
        return [*fields, graph.launch, graph, *[None] * self._num_outputs]


def _node(function: int, words: memoryview, config: int, params: int) -> Any:
    """Return the CUDA_KERNEL_NODE_PARAMS of a launch in `words`; see `DirectLaunch.memory`."""
    node = (ctypes.c_uint8 * _NODE_BYTES)()
    struct.pack_into("=Q", node, 0, function)
    node[_NODE_EXTENTS : _NODE_EXTENTS + _EXTENTS_BYTES] = words.cast("B")[:_EXTENTS_BYTES]
    struct.pack_into("=Q", node, _NODE_PARAMS, params)
    return node
