"""The written-out call: memory that is written anew where something changed, in the driver's layout."""

import ctypes
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from dsv4_kernels import driver, replay, runtime
from dsv4_kernels.contract import ContractError
from dsv4_kernels.registry import all_kernels
from tests.test_replay import STREAM, _inputs, in_place, probe, stub, two_outputs

__all__ = ["stub"]  # a fixture


def _wanted(x, y, out):
    """Return what the driver has to read for `probe`."""
    return [out.data_ptr(), x.shape[0], x.data_ptr()], (y.data_ptr() + 8 * 2).to_bytes(8, "little") * 16


def _known(call, *sets):
    """Make the addresses of `sets` known; return the operator's table of them."""
    for _ in range(4):
        for args in sets:
            call(*args)
    recent = call.__globals__["recent"].__self__
    assert len(recent) == len(sets)
    return recent


def test_known_calls_in_turn_are_launched_with_their_own_addresses(stub):
    sets = [_inputs() for _ in range(3)]
    sets += [(sets[0][0], sets[1][1]), (sets[1][0], sets[0][1])]  # of which one tensor changes
    _known(probe, *sets)
    for order in ([0, 1, 2, 3, 4], [0, 0, 3, 3, 1], [4, 0, 4, 1, 1]):
        kept = []  # outputs, so that each has another address
        for i in order:
            kept.append(probe(*sets[i]))
            assert list(stub.launches[-1][2:]) == list(_wanted(*sets[i], kept[-1]))
    assert len(stub.called) == 1
    assert len(stub.described) == 3  # of three tensors, each once
    unknown = _inputs()
    for args in (unknown, sets[0], unknown, unknown, sets[0]):
        out = probe(*args)
        assert list(stub.launches[-1][2:]) == list(_wanted(*args, out))


def test_a_frame_is_used_again(stub):
    args = _inputs()
    probe(*args)
    with mock.patch.object(
        driver._Layout, "memory", autospec=True, side_effect=driver._Layout.memory
    ) as made:
        for other in (args, args, args, _inputs(), args):
            probe(*other)
    assert made.call_count == 1


def test_one_question_serves_a_signature(stub, monkeypatch):
    """Tensors at other addresses are asked of as those of their signature; inference tensors otherwise."""
    made = []

    def guards(*args, **kwargs):
        made.append(real.TensorGuards(*args, **kwargs))
        return made[-1]

    real = replay._guards
    monkeypatch.setattr(replay, "_guards", SimpleNamespace(TensorGuards=guards))
    sets = [_inputs() for _ in range(4)]
    _known(probe, *sets)
    assert len(made) == 1
    with torch.inference_mode():
        other = _inputs()
    for args in (other, sets[0], other, sets[1]):
        out = probe(*args)
        assert list(stub.launches[-1][2:]) == list(_wanted(*args, out))
    assert len(made) == 2
    probe(*_inputs(5))
    probe(*_inputs(5))
    assert len(made) == 3
    assert len(stub.called) == 2
    with pytest.raises(ContractError):
        probe(sets[0][0].view(torch.int32), sets[0][1])
    needs = sets[0][0].requires_grad_()
    assert probe(needs, sets[0][1]).requires_grad


class _Other(torch.Tensor):
    """A subclass, which may mean other memory, or none."""


def test_tensors_of_other_kinds_at_known_addresses(stub):
    x, y = _inputs()
    _known(probe, (x, y))
    for count in (2, 3):
        probe(x.as_subclass(_Other), y)
        assert len(stub.called) == count
    parameter = torch.nn.Parameter(x, requires_grad=False)
    assert parameter.data_ptr() == x.data_ptr()
    for _ in range(3):
        assert type(probe(parameter, y)) is torch.Tensor
    out = probe(parameter, y)
    assert len(stub.called) == 4  # a signature of its own
    assert list(stub.launches[-1][2:]) == list(_wanted(x, y, out))
    x.resize_(5, 8)
    with pytest.raises(ContractError):
        probe(x, y)
    x.resize_(4, 8)
    x.t_()
    with pytest.raises(ContractError):
        probe(x, y)
    x.t_()
    probe(x, y)
    assert len(stub.called) == 4
    x.set_(_inputs()[0])  # pyright: ignore[reportArgumentType]
    out = probe(x, y)
    assert list(stub.launches[-1][2:]) == list(_wanted(x, y, out))
    assert len(stub.called) == 4


def test_known_addresses_are_bounded(stub, monkeypatch):
    monkeypatch.setattr(replay, "MAX_SIGNATURES", 3)
    recent = probe.__globals__["recent"].__self__
    kept = [_inputs() for _ in range(9)]
    for args in (*kept, *kept):
        probe(*args)
        assert len(recent) <= 3
    out = probe(*kept[-1])
    assert list(stub.launches[-1][2:]) == list(_wanted(*kept[-1], out))
    assert len(stub.called) == 1


@pytest.mark.parametrize("where", ["launch", "describer", "second launch"])
def test_after_an_error_nothing_half_written_is_used(stub, where):
    call = two_outputs if where == "second launch" else probe
    first, second = _inputs(), _inputs()
    _known(call, first)
    if where == "describer":
        real = stub.describer

        def describer(tensor):
            describe = real(tensor)

            def fails_once(address):
                if address == second[1].data_ptr() + 8 * 2 and not failed:
                    failed.append(address)
                    raise driver.DriverError("cuTensorMapEncodeTiled")
                return describe(address)

            return fails_once

        failed = []
        stub.describer = describer
        probe.__globals__["first"].__self__.forget()
        _known(call, first)
    elif where == "launch":
        stub.results = [700]
    else:
        stub.results = [0, 700]
    with pytest.raises(driver.DriverError):
        call(*second)
    for args in (second, first, second, second):
        outs = call(*args)
        if call is probe:
            assert list(stub.launches[-1][2:]) == list(_wanted(*args, outs))
        else:
            (_, _, (workspace, _, given), _), (_, _, (written, _, again), _) = stub.launches[-2:]
            assert (given, again, written) == (args[0].data_ptr(), workspace, outs[0].data_ptr())


def test_the_stream_is_that_of_the_call(stub, monkeypatch):
    streams = [STREAM]
    monkeypatch.setattr(driver, "current_stream", lambda device: streams[-1])
    args = _inputs()
    for stream in (1, 2, 2, 3, 0, 1 << 47):
        streams.append(stream)
        in_place(*args)
        probe(*args)
        two_outputs(*args)
    assert [launch[1] for launch in stub.launches] == [
        s for s in (2, 2, 3, 0, 1 << 47) for _ in range(4)
    ]  # the first calls were noted


def test_outputs_are_tensors_of_their_own(stub):
    args = _inputs()
    _known(two_outputs, args)
    first, second = two_outputs(*args)
    third, fourth = two_outputs(*args)
    storages = {t.untyped_storage().data_ptr() for t in (first, second, third, fourth)}
    assert len(storages) == 4
    for t in (first, second):
        assert t.untyped_storage().nbytes() == t.numel() * 4
        assert (t.storage_offset(), t._base, t.requires_grad, t._version) == (0, None, False, 0)


def test_deterministic_algorithms_fill_outputs(stub):
    args = _inputs()
    _known(probe, args)
    torch.use_deterministic_algorithms(True)
    try:
        assert probe(*args).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(stub.called) == 1


def test_another_device_is_current_for_a_known_call(stub, monkeypatch):
    args = _inputs()
    recent = _known(probe, args)
    monkeypatch.setitem(probe.__globals__, "current_device", lambda: 1)
    for count in (2, 3):
        probe(*args)
        assert len(stub.called) == count
    assert len(recent) == 1
    monkeypatch.setitem(probe.__globals__, "current_device", lambda: -1)
    probe(*args)
    assert len(stub.called) == 3


def test_blocks_are_of_their_thread(stub):
    """Another thread's block makes calls of this one no other; when the last one ends, none asks."""
    args = _inputs()
    _known(probe, args)
    inside, leave = threading.Event(), threading.Event()

    def elsewhere():
        with runtime.backend("reference"), replay.disabled():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    inside.wait()
    assert replay.blocks.count == 2
    probe(*args)
    assert len(stub.called) == 1
    with replay.disabled():
        leave.set()
        thread.join()
        assert replay.blocks.count == 1
        probe(*args)
    assert len(stub.called) == 2
    with pytest.raises(TypeError), runtime.backend("reference"):
        probe()  # pyright: ignore[reportCallIssue]
    assert replay.blocks.count == 0
    probe(*args)
    assert len(stub.called) == 2


def test_while_torch_exports_the_dispatcher_is_asked(stub):
    class Model(torch.nn.Module):
        def forward(self, x, y):
            return probe(x, y)

    _known(probe, _inputs())
    for strict in (True, False):
        exported = torch.export.export(Model(), _inputs(), strict=strict)
        targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
        assert targets == [torch.ops.dsv4.replay_probe.default]
    dispatched = mock.Mock()
    args = _inputs()
    with (
        mock.patch.dict(probe.__globals__, dispatched=dispatched),
        mock.patch.object(torch.compiler, "_is_compiling_flag", True),
    ):
        probe(*args)
    dispatched.assert_called_once_with(*args, 1)


def test_the_driver_is_called_as_its_header_says():
    """cuLaunchKernelEx(config, function, params, extra): cuda.h. All 64 bits of each; no extra."""
    cuda, seen = driver.Driver.__new__(driver.Driver), []
    pointer = ctypes.c_void_p

    def launch(*args):
        seen.append(args)
        return 7

    cuda._launch = ctypes.CFUNCTYPE(ctypes.c_int, *[pointer] * 4)(launch)  # pyright: ignore[reportAttributeAccessIssue]
    addresses = 0x7F12_3456_7890_ABC0, 0x8765_4321_0FED_CBA8, 0x7F12_3456_7890_AD00
    prepared = cuda.prepared(*addresses)
    assert [prepared(), prepared()] == [7, 7]
    assert seen == [(*addresses, None)] * 2
    # As the driver is called: a function of a library, whose arguments have no types.
    untyped = ctypes.CDLL(None)["memcmp"]
    memory = (ctypes.c_uint64 * 2)(5, 5)
    place = ctypes.addressof(memory)
    cuda._launch = untyped
    assert cuda.prepared(place, place + 8, 8)() == 0
    memory[1] = 6
    assert cuda.prepared(place, place + 8, 8)() < 0


def test_the_stub_of_the_bench_times_a_kernel():
    """In a process of its own: what is noted there would stay."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "bench.host", "--stub", "--kernel", "fp4_dequant"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "fp4_dequant" in done.stdout
    assert "other tensors in turn" in done.stdout
    assert "fp4_dequant" in {k.name for k in all_kernels()}
