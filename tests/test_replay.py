"""Calls that go as noted: same outputs, launches and errors as the checked call, on a stub of the driver."""

import ctypes
import inspect
import sys
import threading
import time
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv4_kernels import driver, replay, runtime
from dsv4_kernels.contract import ContractError, require_shape, require_tensor
from dsv4_kernels.host_text import Address, Launch, TensorMap
from dsv4_kernels.registry import operator

GRID, BLOCK, SHARED = (3, 2, 1), (128, 1, 1), 4096
STREAM = 77
CPU = torch.device("cpu")


def _fake(x, y, scale=1):
    return x.new_empty(x.shape)


def _checked(name, x, y, scale):
    require_tensor(name, "x", x, dtype=torch.float32, ndim=2)
    require_tensor(name, "y", y, dtype=torch.bfloat16, ndim=2, device=x.device)
    require_shape(name, "y", y, (x.shape[0] + 1, x.shape[1]))
    if scale < 1:
        raise ContractError(f"{name}: requires scale >= 1, got scale={scale}")


@operator("replay_probe", _fake)
def probe(x: torch.Tensor, y: torch.Tensor, scale: int = 1) -> torch.Tensor:
    _checked("replay_probe", x, y, scale)
    out = x.new_empty(x.shape)
    if x.shape[0]:
        runtime.launch(_checked, {"scale": scale}, (x.view(torch.int32), y[1:], out))
    return out


@operator("replay_in_place", lambda x, y: None, writes=("x",))
def in_place(x: torch.Tensor, y: torch.Tensor) -> None:
    runtime.launch(_checked, {}, (x, y, y))


@operator("replay_computes", lambda x, y: x.new_empty(x.shape))
def computes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(x.shape)
    runtime.launch(_checked, {}, (x, y + 1, out))
    return out


@operator("replay_two_outputs", lambda x, y: (x.new_empty(x.shape), x.new_empty(2)))
def two_outputs(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    workspace, second = torch.empty_like(x), x.new_empty(2)
    runtime.launch(_checked, {}, (x, y, workspace))
    first = x.new_empty(x.shape)
    runtime.launch(_checked, {}, (workspace, second, first))
    return first, second


class Stub(driver.Functions):
    """A driver, a module and a compiled kernel, which keep what they are given."""

    def __init__(self):
        super().__init__(b"")
        self.launches, self.called, self.described, self.devices = [], [], [], []
        self.results = []

    def launch(self, config, function, params, extra):
        """Read what cuLaunchKernelEx is told from memory, as it does."""
        assert extra is None
        extents = tuple((ctypes.c_uint32 * 7).from_address(config))
        stream, attributes, count = (ctypes.c_uint64 * 3).from_address(config + 32)
        assert (attributes, count) == (0, 0)
        self.launches.append((extents, stream, *self.params(params)))
        return self.result()

    def params(self, params):
        """Read a launch's parameters by the pointers at an address."""
        pointers = (ctypes.c_uint64 * 4).from_address(params)
        read = [ctypes.c_int64.from_address(p).value for p in pointers[:3]]
        assert pointers[3] % 64 == 0
        return read, bytes((ctypes.c_uint8 * 128).from_address(pointers[3]))

    def result(self):
        return self.results.pop(0) if self.results else 0

    def prepared(self, config, function, params):
        return lambda: self.launch(config, function, params, None)

    def describer(self, tensor):
        def describe(address):
            self.described.append((tensor, address))
            return address.to_bytes(8, "little") * 16

        return describe

    def use_device(self, device):
        self.devices.append(device)

    def check(self, result, what):
        raise driver.DriverError(f"{what}: {result}")

    def get(self, device, launch):
        return 1

    def __call__(self, args):
        self.called.append(args)
        replay.note_launch(self.direct, args)

    def direct(self, shapes, sources, device):
        box = TensorMap(1, 9, (8, 4), (16,), (8, 4), (1, 1), (0, 0, 0, 0))
        launch = Launch("probe", (Address(2), shapes[0][0], Address(0), box), GRID, BLOCK, SHARED)
        return driver.DirectLaunch(launch, self, device, sources)


@pytest.fixture
def stub(monkeypatch):
    made = Stub()
    monkeypatch.setattr(replay, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(driver, "driver", lambda: made)
    monkeypatch.setattr(driver, "current_stream", lambda device: STREAM)
    monkeypatch.setattr(runtime, "_launcher", lambda make_kernel, kwargs: made)
    monkeypatch.setattr(runtime, "_launchers", {})
    for fn in (probe, in_place, computes, two_outputs):
        monkeypatch.setitem(fn.__globals__, "current_device", lambda: -1)
        fn.__globals__["get"].__self__.clear()
        fn.__globals__["first"].__self__.forget()
    return made


def _inputs(rows=4, columns=8):
    return torch.zeros(rows, columns), torch.zeros(rows + 1, columns, dtype=torch.bfloat16)


def test_a_second_call_launches_what_the_first_did_with_its_own_addresses(stub):
    probe(*_inputs(), 3)
    assert len(stub.called) == 1
    assert not stub.launches
    x, y = _inputs()
    for _ in range(3):
        x, y = _inputs()
        out = probe(x, y, 3)
        assert (out.shape, out.dtype, out.is_contiguous()) == (x.shape, x.dtype, True)
        extents, stream, read, described = stub.launches[-1]
        assert extents == (*GRID, *BLOCK, SHARED)
        assert stream == STREAM
        assert read == [out.data_ptr(), x.shape[0], x.data_ptr()]
        second_row = y.data_ptr() + 8 * 2
        assert described == second_row.to_bytes(8, "little") * 16
    assert len(stub.called) == 1
    probe(x, y, scale=3)
    assert len(stub.called) == 1
    assert len({address for _, address in stub.described}) == len(stub.described)  # described once


@pytest.mark.parametrize("other", ["rows", "columns", "argument"])
def test_another_signature_runs_the_function(stub, other):
    probe(*_inputs())
    if other == "rows":
        probe(*_inputs(5))
    elif other == "columns":
        probe(*_inputs(4, 16))
    else:
        probe(*_inputs(), 2)
    assert len(stub.called) == 2
    assert not stub.launches


def _bad_calls():
    x, y = _inputs()
    storage = torch.zeros(4 * 8 * 4 + 4, dtype=torch.uint8)
    yield "dtype", (x.double(), y), {}
    yield "ndim", (x[0], y), {}
    yield "strided", (x.t().contiguous().t(), y), {}
    yield "unaligned", (storage[4:].view(torch.float32).view(4, 8), y), {}
    yield "shape", (x, y[1:]), {}
    yield "no tensor", (None, y), {}
    yield "a list", ([1.0], y), {}
    yield "argument", (x, y, 0), {}
    yield "no integer", (x, y, 0.5), {}
    yield "keyword", (x,), {"y": y.float()}


@pytest.mark.parametrize(("args", "kwargs"), [pytest.param(a, k, id=i) for i, a, k in _bad_calls()])
def test_errors_are_those_of_the_function(stub, args, kwargs):
    with pytest.raises(ContractError) as want:
        inspect.unwrap(probe)(*args, **kwargs)
    for _ in range(3):
        with pytest.raises(ContractError) as got:
            probe(*args, **kwargs)
        assert str(got.value).split("data_ptr()=")[0] == str(want.value).split("data_ptr()=")[0]
        probe(*_inputs())
    assert len(stub.called) == 1
    with pytest.raises(TypeError):
        probe(_inputs()[0])  # pyright: ignore[reportCallIssue]


def test_what_computes_is_never_noted(stub):
    for count in range(1, 8):
        computes(*_inputs())
        assert len(stub.called) == count
    assert not stub.launches


def test_tensors_that_share_memory_are_not_told_apart(stub):
    x = torch.zeros(4, 8)
    for _ in range(2):
        two_outputs(x, x)
    assert len(stub.called) == 4
    two_outputs(x, x.clone())
    two_outputs(x, x.clone())
    assert len(stub.called) == 6
    assert len(stub.launches) == 2


def test_several_launches_and_outputs(stub):
    two_outputs(*_inputs())
    x, y = _inputs()
    first, second = two_outputs(x, y)
    assert first.shape == x.shape
    assert second.shape == (2,)
    (_, _, (workspace, _, given), _), (_, _, (written, _, again), of_second) = stub.launches
    assert given == x.data_ptr()
    assert again == workspace
    assert written == first.data_ptr() != workspace
    assert of_second[:8] == second.data_ptr().to_bytes(8, "little")


def test_in_place(stub):
    x, y = _inputs()
    for _ in range(2):
        x, y = _inputs()
        assert in_place(x, y) is None
    assert len(stub.called) == 1
    assert stub.launches[0][2] == [y.data_ptr(), 4, x.data_ptr()]


def test_no_rows(stub):
    for _ in range(2):
        assert probe(torch.zeros(0, 8), torch.zeros(1, 8, dtype=torch.bfloat16)).shape == (0, 8)
    assert not stub.called
    assert not stub.launches


def test_torch_sees_the_call_where_it_has_to(stub):
    """A gradient, fake tensors and torch.compile meet the operator; autocast and inference change nothing."""
    probe(*_inputs())
    x, y = _inputs()
    out = probe(x.requires_grad_(), y)
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()
    with torch.no_grad():
        assert not probe(x, y).requires_grad
    with FakeTensorMode() as mode:
        fake = probe(mode.from_tensor(_inputs()[0]), mode.from_tensor(y))
    assert type(fake).__name__ == "FakeTensor"
    seen = []

    def look(graph, example_inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    traced = torch.compile(probe, fullgraph=True, backend=look)
    assert traced(*_inputs()).shape == (4, 8)
    assert seen == [torch.ops.dsv4.replay_probe.default]
    with torch.autocast("cpu"):
        probe(*_inputs())
    with torch.inference_mode():
        assert probe(*_inputs()).is_inference()
    assert len(stub.called) == 1


def test_backends_and_disabled(stub, monkeypatch):
    probe(*_inputs())
    with replay.disabled():
        probe(*_inputs())
    assert len(stub.called) == 2
    monkeypatch.setenv("DSV4_BACKEND", "auto")
    probe(*_inputs())
    assert len(stub.called) == 2
    monkeypatch.setenv("DSV4_BACKEND", "reference")
    probe(*_inputs())
    monkeypatch.delenv("DSV4_BACKEND")
    with runtime.backend("reference"):
        probe(*_inputs())
    assert len(stub.called) == 4
    assert len(stub.launches) == 1


def test_other_tensors_at_known_addresses(stub):
    """Where the tensors lie says which call it may be, and never that it is that call."""
    x, y = _inputs()
    for _ in range(4):
        probe(x, y)
    recent = probe.__globals__["recent"].__self__
    assert len(recent) == 1
    square = torch.zeros(8, 8)
    assert square[:4].view(torch.int32).data_ptr() == square.data_ptr()
    known, other = square[:4], torch.zeros(5, 8, dtype=torch.bfloat16)
    for _ in range(3):
        probe(known, other)
    assert len(recent) == 2
    assert len(stub.called) == 1
    for wrong in (known.view(torch.int32), known.view(8, 4), square[:3], known[:, :4], square[:4].t()):
        assert wrong.data_ptr() == known.data_ptr()
        with pytest.raises(ContractError):
            probe(wrong, other)
    with pytest.raises(ContractError):
        probe(known, other, 0)
    probe(known, other, 2)
    assert len(stub.called) == 2
    strided = torch.as_strided(square, (4, 8), (16, 1))
    with pytest.raises(ContractError, match="contiguous"):
        probe(strided, other)
    assert probe(square[:4].requires_grad_(), other).requires_grad


def test_another_device_is_current(stub, monkeypatch):
    probe(*_inputs())
    monkeypatch.setitem(probe.__globals__, "current_device", lambda: 1)
    probe(*_inputs())
    assert len(stub.called) == 2


def test_signatures_are_bounded(stub, monkeypatch):
    monkeypatch.setattr(replay, "MAX_SIGNATURES", 3)
    for rows in range(1, 9):
        probe(*_inputs(rows))
        assert len(probe.__globals__["get"].__self__) <= 3


def test_the_driver_refuses(stub):
    probe(*_inputs())
    stub.results = [driver.INVALID_CONTEXT]
    probe(*_inputs())
    assert stub.devices == [-1]
    assert len(stub.launches) == 2
    stub.results = [700]
    with pytest.raises(driver.DriverError, match="700"):
        probe(*_inputs())
    probe(*_inputs())


def test_threads_write_memory_of_their_own(stub):
    probe(*_inputs())
    calls, interval = [], sys.getswitchinterval()

    def run():
        for _ in range(200):
            x, y = _inputs()
            out = probe(x, y)
            calls.append((out.data_ptr(), 4, x.data_ptr()))

    threads = [threading.Thread(target=run) for _ in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert Counter(tuple(read) for _, _, read, _ in stub.launches) == Counter(calls)
    assert len(stub.called) == 1


def test_a_descriptor_is_encoded_as_the_driver_reads_it():
    """cuTensorMapEncodeTiled's arguments, in its order: cuda.h."""
    cuda, seen = driver.Driver.__new__(driver.Driver), []

    def encode(start, dtype, rank, address, dims, strides, box, steps, *modes):
        assert start % 64 == 0
        longs, words = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
        read = [t.from_address(p) for t, p in ((longs, dims), (longs, strides), (words, box), (words, steps))]
        seen.append((dtype, rank, address, *map(tuple, read), modes))
        ctypes.memset(start, 0xAB, 128)
        return 0 if address else 1

    pointer, number = ctypes.c_void_p, ctypes.c_uint32
    kind = ctypes.CFUNCTYPE(ctypes.c_int, pointer, number, number, *[pointer] * 5, *[number] * 4)
    cuda._encode = kind(encode)  # pyright: ignore[reportAttributeAccessIssue]
    cuda.check = Stub().check
    tensor = TensorMap(0, 9, (64, 48, 2), (128, 6144), (64, 16, 1), (1, 1, 1), (0, 3, 2, 0))
    describe = cuda.describer(tensor)
    assert describe(1 << 44) == bytes([0xAB]) * 128
    assert seen == [(9, 3, 1 << 44, (64, 48, 2), (128, 6144, 0), (64, 16, 1), (1, 1, 1), (0, 3, 2, 0))]
    with pytest.raises(driver.DriverError, match="cuTensorMapEncodeTiled"):
        describe(0)


def _least_us(call, rounds=40, calls=50):
    """Return the least CPU time (us) of a call over rounds: what else runs here adds to the others."""
    least = float("inf")
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(calls):
            call()
        least = min(least, time.thread_time() - start)
    return least / calls * 1e6


# A call takes 1.6 times what `torch.empty_strided` of its output takes, and with all checks 9 times.
MAX_COST = 3


def test_host_cost(stub):
    """A call that goes as noted costs a few allocations, whatever the machine."""
    stub.launch = lambda *args: 0
    x, y = _inputs()
    allocation = _least_us(lambda: torch.empty_strided((4, 8), (8, 1), dtype=torch.float32, device=CPU))
    with torch.no_grad():
        assert _least_us(lambda: probe(x, y)) < MAX_COST * allocation
    assert len(stub.called) == 1
