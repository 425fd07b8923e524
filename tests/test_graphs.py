"""Calls that are launched as CUDA graphs: with what kernels are given, and kernels where no graph may be."""

import ctypes
import gc
import struct
import threading
import weakref
from collections import deque
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from dsv4_kernels import driver, graphs
from tests import test_replay, test_written_out
from tests.test_replay import BLOCK, GRID, SHARED, STREAM, _inputs, in_place, probe, stub, two_outputs
from tests.test_written_out import _wanted

__all__ = ["stub"]  # a fixture
EXTENTS = (*GRID, *BLOCK, SHARED)


class _Graph:
    """A graph on the stub of the driver: it launches what its kernels were last set to."""

    def __init__(self, cuda, nodes, stream):
        self._cuda, self._nodes, self._stream = cuda, nodes, stream
        self._kernels: list[Any] = [None] * len(nodes)
        itself = weakref.proxy(self)  # or the garbage collector alone could free it
        self.set = [lambda i=i: itself._set(i) for i in range(len(nodes))]
        self.launch = lambda: itself._launch()
        cuda.made.append(stream)
        cuda.alive.append(weakref.ref(self))

    def _set(self, i):
        """Read CUDA_KERNEL_NODE_PARAMS, as the driver does."""
        function, *extents = struct.unpack_from("=Q7I", self._nodes[i])
        params, *rest = struct.unpack_from("=4Q", self._nodes[i], 40)
        assert (function, rest) == (1, [0, 0, 0])
        result = self._cuda.set_results.pop(0) if self._cuda.set_results else 0
        if not result:
            self._kernels[i] = (tuple(extents), self._stream, *self._cuda.params(params))
            self._cuda.sets += 1
        return result

    def _launch(self):
        result = self._cuda.result()
        if not result:
            assert None not in self._kernels
            self._cuda.launches += self._kernels
            self._cuda.graph_launches += 1
        return result


@pytest.fixture
def graphed(stub, monkeypatch):
    """A stub on which the second call that goes as noted is a graph's."""
    stub.made, stub.alive, stub.set_results, stub.sets, stub.graph_launches = [], [], [], 0, 0
    monkeypatch.setattr(driver, "is_capturing", lambda: False)
    monkeypatch.setattr(graphs, "Graph", _Graph)
    monkeypatch.setattr(graphs, "CALLS_BEFORE", 1)
    return stub


@pytest.mark.parametrize(
    "test",
    [
        test_replay.test_other_tensors_at_known_addresses,
        test_replay.test_threads_write_memory_of_their_own,
        test_written_out.test_deterministic_algorithms_fill_outputs,
        test_written_out.test_known_calls_in_turn_are_launched_with_their_own_addresses,
        test_written_out.test_outputs_are_tensors_of_their_own,
        test_written_out.test_tensors_of_other_kinds_at_known_addresses,
    ],
    ids=lambda test: test.__name__,
)
def test_a_graph_launches_what_kernels_do(graphed, test):
    test(graphed)
    assert graphed.graph_launches


def _launched(stub, args, out):
    """Check the latest launch, of `probe`."""
    x, y = args
    assert list(stub.launches[-1]) == [EXTENTS, STREAM, *_wanted(x, y, out)]


def test_parameters_are_set_where_an_address_changed(graphed):
    args, others = _inputs(), _inputs()
    kept = [probe(*args), probe(*args)][1:]
    assert (graphed.sets, graphed.graph_launches) == (0, 0)
    for new, sets in ((args, 1), (args, 2), (others, 3)):  # each output has an address of its own
        kept.append(probe(*new))
        _launched(graphed, new, kept[-1])
        assert graphed.sets == sets
    for _ in range(4):
        in_place(*args)
    assert graphed.sets == 4
    assert graphed.graph_launches == 5
    two_outputs(*args)
    two_outputs(*args)
    first = two_outputs(*args)
    assert graphed.sets == 6  # two kernels
    (_, _, (workspace, _, given), _), (_, _, (written, _, again), _) = graphed.launches[-2:]
    assert (given, again, written) == (args[0].data_ptr(), workspace, first[0].data_ptr())


def test_enough_calls_make_a_graph(graphed, monkeypatch):
    monkeypatch.setattr(graphs, "CALLS_BEFORE", 5)
    args = _inputs()
    for count in range(9):
        _launched(graphed, args, probe(*args)) if count else probe(*args)
        assert graphed.graph_launches == max(count - 5, 0)


def test_a_capture_takes_kernels(graphed, monkeypatch):
    args, capturing = _inputs(), [True]
    monkeypatch.setattr(driver, "is_capturing", lambda: capturing[0])
    for _ in range(4):
        probe(*args)
    assert graphed.made == []
    capturing[0] = False
    for _ in range(3):
        probe(*args)
    assert graphed.graph_launches == 2
    capturing[0] = True
    _launched(graphed, args, probe(*args))
    assert graphed.graph_launches == 2
    capturing[0] = False
    _launched(graphed, args, probe(*args))
    assert graphed.graph_launches == 3


def test_each_stream_has_a_graph(graphed, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_STREAMS", 3)
    stream, args = [0], _inputs()
    monkeypatch.setattr(driver, "current_stream", lambda device: stream[0])
    probe(*args)
    for turn in range(4):
        for stream[0] in (0, 5, 1 << 47, 9):
            probe(*args)
            assert graphed.launches[-1][1] == stream[0]
        assert graphed.graph_launches == 3 * turn
    assert graphed.made == [0, 5, 1 << 47]


def test_the_legacy_stream_is_not_asked(graphed, monkeypatch):
    args = _inputs()
    monkeypatch.setattr(driver, "current_stream", lambda device: 0)
    asked = []
    monkeypatch.setattr(driver, "is_capturing", lambda: asked.append(1))
    for _ in range(6):
        probe(*args)
    assert graphed.graph_launches == 4
    assert len(asked) == 1


def test_a_taken_graph_leaves_kernels(graphed):
    args = _inputs()
    for _ in range(3):
        probe(*args)
    (check, device, run, at) = next(iter(probe.__globals__["recent"].__self__.values()))
    made = run.__globals__["graphs"].__self__[STREAM]
    taken = made.pop()
    _launched(graphed, args, probe(*args))
    assert graphed.graph_launches == 1
    made.append(taken)
    _launched(graphed, args, probe(*args))
    assert graphed.graph_launches == 2
    assert check(*args)
    assert (device, at) == (-1, tuple(t.data_ptr() for t in args))


@pytest.mark.parametrize("refused", ["launch", "set", "context", "describer"])
def test_what_a_graph_is_refused_kernels_do(graphed, refused):
    args, others = _inputs(), _inputs()
    for _ in range(3):
        probe(*args)
    assert graphed.graph_launches == 1
    if refused == "set":
        graphed.set_results = [1]
    elif refused == "describer":
        graphed.describer = None
        run = next(iter(probe.__globals__["recent"].__self__.values()))[2]

        def fails(address):
            raise driver.DriverError("cuTensorMapEncodeTiled")

        name = next(n for n in run.__globals__ if n.startswith("describe"))
        real, run.__globals__[name] = run.__globals__[name], fails
        with pytest.raises(driver.DriverError):
            probe(*others)
        run.__globals__[name] = real
    else:
        graphed.results = [1 if refused == "launch" else driver.INVALID_CONTEXT]
    for new in (others, args, others):
        out = probe(*new)
        _launched(graphed, new, out)
    assert graphed.graph_launches == (3 if refused == "context" else 1)
    assert graphed.made == [STREAM]  # not made again


def test_parameters_that_were_not_set_are_set_by_the_next_call(graphed):
    """A thread without a context may be the first with these tensors."""
    args, (x, y) = _inputs(), _inputs()
    for _ in range(3):
        in_place(*args)
    assert graphed.graph_launches == 1
    graphed.set_results = [driver.INVALID_CONTEXT]
    for _ in range(2):
        in_place(x, y)
        values, descriptor = [y.data_ptr(), x.shape[0], x.data_ptr()], y.data_ptr().to_bytes(8, "little") * 16
        assert list(graphed.launches[-1]) == [EXTENTS, STREAM, values, descriptor]
    assert graphed.graph_launches == 2


def test_the_environment_takes_kernels(graphed, monkeypatch):
    monkeypatch.setenv("DSV4_LAUNCH", "kernels")
    args = _inputs()
    for _ in range(4):
        probe(*args)
    assert graphed.made == []
    probe.__globals__["first"].__self__.forget()
    monkeypatch.setenv("DSV4_LAUNCH", "graph")
    with pytest.raises(ValueError, match="DSV4_LAUNCH"):
        probe(*args)
    monkeypatch.setenv("DSV4_LAUNCH", "graphs")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    for _ in range(4):
        probe(*args)
    assert graphed.made == []


def test_graphs_are_bounded_and_go_with_their_signature(graphed, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    monkeypatch.setattr(graphs.Graphs, "_order", deque())
    sets = [_inputs(rows) for rows in (1, 2, 3)]
    for args in sets:
        for _ in range(3):
            probe(*args)
    assert [graph() is None for graph in graphed.alive] == [True, False, False]
    by_graph = graphed.graph_launches
    probe(*sets[1])
    probe(*sets[2])
    assert graphed.graph_launches == by_graph + 2
    for count in (0, 1):  # a graph that was given up is made again, and another one goes
        _launched(graphed, sets[0], probe(*sets[0]))
        assert graphed.graph_launches == by_graph + 2 + count
    assert [graph() is None for graph in graphed.alive] == [True, True, False, False]
    probe.__globals__["first"].__self__.forget()
    gc.collect()
    assert all(graph() is None for graph in graphed.alive)


class _Library:
    """The driver's functions as its header has them: they keep what they are given."""

    def __init__(self, refuses=None):
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self.calls, self._refuses = [], refuses
        self._handles = iter(range(0x7F12_3456_7000, 0x7F12_3456_8000, 8))
        for name, *types in (
            ("cuThreadExchangeStreamCaptureMode", pointer),
            ("cuGraphCreate", pointer, ctypes.c_uint),
            ("cuGraphAddKernelNode_v2", pointer, pointer, pointer, size, pointer),
            ("cuGraphInstantiateWithFlags", pointer, pointer, ctypes.c_uint64),
            ("cuGraphExecKernelNodeSetParams_v2", pointer, pointer, pointer),
            ("cuGraphLaunch", pointer, pointer),
            ("cuGraphExecDestroy", pointer),
            ("cuGraphDestroy", pointer),
        ):
            setattr(self, name, ctypes.CFUNCTYPE(number, *types)(partial(self._called, name)))

    def _called(self, name, *args):
        if name == self._refuses:
            return 801
        given = args
        if name == "cuThreadExchangeStreamCaptureMode":
            mode = ctypes.c_int.from_address(args[0])
            given, mode.value = (mode.value,), 5
        elif name in ("cuGraphCreate", "cuGraphAddKernelNode_v2", "cuGraphInstantiateWithFlags"):
            made = ctypes.c_uint64.from_address(args[0])
            made.value, given = next(self._handles), args[1:]
            if name == "cuGraphAddKernelNode_v2":
                before = [ctypes.c_uint64.from_address(args[2]).value for _ in range(args[3])]
                given = args[1], before, args[4]
            given = (*given, made.value)
        self.calls.append((name, *given))
        return 0


def _cuda(library) -> Any:
    def check(result, what):
        if result:
            raise driver.DriverError(f"{what}: {result}")

    return SimpleNamespace(library=library, check=check)


def test_the_driver_is_called_as_its_header_says():
    library = _Library()
    nodes = [(ctypes.c_uint8 * 72)() for _ in range(2)]
    places = [ctypes.addressof(node) for node in nodes]
    graph = graphs.Graph(_cuda(library), nodes, 1 << 47)
    template, first, second, made = (0x7F12_3456_7000 + 8 * i for i in range(4))
    assert library.calls == [
        ("cuThreadExchangeStreamCaptureMode", 2),
        ("cuGraphCreate", 0, template),
        ("cuGraphAddKernelNode_v2", template, [], places[0], first),
        ("cuGraphAddKernelNode_v2", template, [first], places[1], second),
        ("cuGraphInstantiateWithFlags", template, 0, made),
        ("cuThreadExchangeStreamCaptureMode", 5),  # what it was
    ]
    library.calls.clear()
    assert [graph.set[1](), graph.set[0](), graph.launch()] == [0, 0, 0]
    del graph
    gc.collect()
    assert library.calls == [
        ("cuGraphExecKernelNodeSetParams_v2", made, second, places[1]),
        ("cuGraphExecKernelNodeSetParams_v2", made, first, places[0]),
        ("cuGraphLaunch", made, 1 << 47),
        ("cuThreadExchangeStreamCaptureMode", 2),
        ("cuGraphExecDestroy", made),
        ("cuGraphDestroy", template),
        ("cuThreadExchangeStreamCaptureMode", 5),
    ]


@pytest.mark.parametrize(
    "refused", ["cuGraphCreate", "cuGraphAddKernelNode_v2", "cuGraphInstantiateWithFlags"]
)
def test_a_graph_that_is_refused_leaves_nothing(refused):
    library = _Library(refused)
    with pytest.raises(driver.DriverError, match=refused):
        graphs.Graph(_cuda(library), [(ctypes.c_uint8 * 72)()], 0)
    gc.collect()
    names = [name for name, *_ in library.calls]
    assert names.count("cuGraphCreate") == names.count("cuGraphDestroy")
    assert "cuGraphExecDestroy" not in names
    assert names.count("cuThreadExchangeStreamCaptureMode") == 4


def test_threads_share_no_graph(graphed):
    """A call that finds the graph taken launches kernels; nothing is launched twice or lost."""
    args = _inputs()
    for _ in range(3):
        probe(*args)
    before, errors = len(graphed.launches), []

    def run():
        try:
            for _ in range(100):
                probe(*args)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(graphed.launches) == before + 400
    assert graphed.made == [STREAM]
