"""Each class of fault, planted in a few statements, is found and typed right; its repair runs clean."""

import re
from pathlib import Path

import pytest
import torch

from tests.verify.device import build as b
from tests.verify.device.build import (
    BX,
    TX,
    add,
    buffer,
    call,
    const,
    ints,
    load,
    mul,
    op,
    pointer,
    store,
    sync,
)
from verify import ir
from verify.interp import device
from verify.interp.device import errors
from verify.interp.device.errors import BarrierIndexError

N = 64
ALL = tuple(device.POLICIES)


def out(count=N, kind="int32"):
    return buffer("out", kind, count, "global")


def shared(count=N, kind="int32"):
    return buffer("tile", kind, count, "shared.dyn")


def local(count, kind="int32"):
    return buffer("regs", kind, count, "local")


def expect(kernel, kind, *values, policies=ALL, **options):
    """Under every policy the kernel has a fault of class `kind` at a line of its own; return the last."""
    found = []
    for policy in policies:
        with pytest.raises(device.DeviceError) as caught:
            kernel.run(*(v.clone() for v in values), policy=policy, seed=3, **options)
        error = caught.value
        found.append(error)
        assert type(error) is kind, error
        assert error.where.span is None or error.where.span.path == "kernel.py"
    return found[-1]


# --------------------------------------------------------------------------- bounds, contents, alignment
def test_global_out_of_bounds():
    o = out()
    kernel = b.Kernel(threads=96, tensors=[o], body=[store(o, TX, TX)])
    error = expect(kernel, device.OutOfBoundsError, ints(N))
    assert error.where.threads[0] == N
    assert (error.where.storage, error.where.address, error.where.size) == ("out", 4 * N, 4)
    assert f"(out, 4 bytes at byte {4 * N}; block (0, 0, 0); thread {N}" in str(error)


def test_guard_makes_it_clean():
    o = out()
    kernel = b.Kernel(threads=96, tensors=[o], body=[b.when(op("lt", TX, N), store(o, TX, TX))])
    value = ints(N)
    kernel.run(value)
    assert value.tolist() == list(range(N))


def test_shared_out_of_its_allocation():
    o, s = out(), shared()
    kernel = b.Kernel(threads=N, tensors=[o], allocs=[s], body=[store(s, add(TX, 1), TX)])
    error = expect(kernel, device.OutOfBoundsError, ints(N))
    assert error.where.threads == (N - 1,)


def test_register_array_out_of_bounds():
    o, r = out(), local(2)
    kernel = b.Kernel(threads=N, tensors=[o], allocs=[r], body=[store(r, 2, TX)])
    expect(kernel, device.OutOfBoundsError, ints(N))


def test_uninitialised_shared():
    o, s = out(), shared()
    body = [b.when(op("lt", TX, N - 1), store(s, TX, TX)), sync(), store(o, TX, load(s, TX))]
    error = expect(
        b.Kernel(threads=N, tensors=[o], allocs=[s], body=body), device.UninitialisedReadError, ints(N)
    )
    assert error.where.threads == (N - 1,)
    assert error.where.address == 4 * (N - 1)


def test_uninitialised_byte_of_a_register():
    o, r = out(kind="int32"), local(4, "uint8")
    word = ir.Buffer("word", ir.DType("int32"), (const(1),), (), "local", r.data, const(0))
    stores = [store(r, k, 1) for k in range(3)]
    kernel = b.Kernel(threads=N, tensors=[o], allocs=[r], body=[*stores, store(o, TX, load(word, 0))])
    error = expect(kernel, device.UninitialisedReadError, ints(N))
    assert error.where.address == 3


def test_misaligned_vector():
    o, r = out(4 * N + 4), local(4)
    body = [*(store(r, k, k) for k in range(4)), store(o, add(mul(TX, 4), 1), load(r, 0, 4), 4)]
    expect(b.Kernel(threads=N, tensors=[o], allocs=[r], body=body), device.MisalignedError, ints(4 * N + 4))


def test_address_overflow():
    o = out()
    index = op("floormod", op("floormod", mul(mul(TX, 1 << 20), 1 << 10), 1 << 20), N)
    kernel = b.Kernel(threads=N, tensors=[o], body=[store(o, index, TX)])
    error = expect(kernel, device.AddressOverflowError, ints(N), checks=device.Checks(races=False))
    assert error.where.threads[0] in (2, 32)  # the first of the warp that runs first
    kernel.run(ints(N), checks=device.Checks(races=False, overflow=False))


# --------------------------------------------------------------------------- races
def reversal(*between):
    """out[t] = tile[N - 1 - t] after tile[t] = t."""
    o, s = out(), shared()
    body = [store(s, TX, TX), *between, store(o, TX, load(s, op("sub", N - 1, TX)))]
    return b.Kernel(threads=N, tensors=[o], allocs=[s], body=body)


def test_missing_barrier_races():
    for policy in ALL:
        with pytest.raises((device.DataRaceError, device.UninitialisedReadError)):
            reversal().run(ints(N), policy=policy)


def test_barrier_orders():
    value = ints(N)
    reversal(sync()).run(value)
    assert value.tolist() == list(reversed(range(N)))


def test_sync_of_a_warp_does_not_order_the_block():
    checks = device.Checks(uninitialised=False)
    expect(reversal(call("sync_warp")), device.DataRaceError, ints(N), checks=checks)


def test_sync_of_a_warp_orders_its_lanes():
    o, s = out(32), shared(32)
    body = [store(s, TX, TX), call("sync_warp"), store(o, TX, load(s, op("sub", 31, TX)))]
    b.Kernel(threads=32, tensors=[o], allocs=[s], body=body).run(ints(32))
    error = expect(
        b.Kernel(threads=32, tensors=[o], allocs=[s], body=[body[0], body[2]]), device.DataRaceError, ints(32)
    )
    assert error.where.other is not None


def test_write_after_read_races():
    o, s = out(), shared()
    body = [store(s, TX, TX), sync(), store(o, TX, load(s, op("bitxor", TX, 32))), store(s, TX, 0)]
    kernel = b.Kernel(threads=N, tensors=[o], allocs=[s], body=body)
    error = expect(kernel, device.DataRaceError, ints(N))
    assert "read" in error.reason or "write" in error.reason


def test_two_lanes_write_one_element():
    o = out()
    kernel = b.Kernel(threads=N, tensors=[o], body=[store(o, op("floordiv", TX, 2), TX)])
    expect(kernel, device.DataRaceError, ints(N))


def test_blocks_race_on_a_tensor():
    o = out()
    kernel = b.Kernel(threads=32, blocks=2, tensors=[o], body=[store(o, TX, BX)])
    error = expect(kernel, device.DataRaceError, ints(N))
    assert "another block" in error.reason
    apart = b.Kernel(threads=32, blocks=2, tensors=[o], body=[store(o, add(TX, mul(BX, 32)), BX)])
    apart.run(ints(N))


def test_atomics_do_not_race():
    o = out(1)
    body = [b.ir.Eval(b.span(), b.value_of("atomic_add_elem_op", "int32", pointer(o, 0, 1, "rw"), TX))]
    value = ints(1)
    b.Kernel(threads=N, blocks=3, tensors=[o], body=body).run(value)
    assert int(value) == 3 * N * (N - 1) // 2
    mixed = b.Kernel(threads=N, tensors=[o], body=[*body, store(o, 0, 1)])
    expect(mixed, device.DataRaceError, ints(1))


# --------------------------------------------------------------------------- barriers
def test_barrier_in_a_divergent_branch():
    kernel = b.Kernel(threads=N, body=[b.when(op("lt", TX, 40), sync())])
    expect(kernel, device.BarrierDivergenceError)


def test_different_barriers():
    kernel = b.Kernel(threads=N, body=[b.when(op("lt", TX, 32), sync(), other=[sync()])])
    expect(kernel, device.BarrierDivergenceError)


def test_exited_threads_do_not_come():
    leave = b.when(op("ge", TX, 32), call("thread_return"))
    expect(b.Kernel(threads=N, body=[leave, sync()]), device.BarrierDivergenceError)


def test_named_barriers():
    o, s = out(), shared()
    produce = [store(s, TX, TX), call("named_barrier_arrive", 3, N)]
    consume = [call("tvm_storage_sync", "shared", 3, N), store(o, TX, load(s, op("sub", TX, 32)))]

    def kernel(*consumer):
        body = [b.when(op("lt", TX, 32), *produce, other=consumer)]
        return b.Kernel(threads=N, tensors=[o], allocs=[s], body=body)

    for policy in ALL:
        value = ints(N)
        kernel(*consume).run(value, policy=policy)
        assert value[32:].tolist() == list(range(32))
    wrong = [call("tvm_storage_sync", "shared", 3, 32), consume[1]]
    for policy in ALL:
        with pytest.raises(
            (device.BarrierDivergenceError, device.ArrivalError, device.UninitialisedReadError)
        ):
            kernel(*wrong).run(ints(N), policy=policy)


def test_shuffle_by_part_of_a_warp():
    o = out()
    shuffle = store(o, TX, b.value_of("shfl_xor_sync", "int32", const(0xFFFFFFFF, "uint32"), TX, 16, 32))
    kernel = b.Kernel(threads=32, tensors=[o], body=[b.when(op("lt", TX, 16), shuffle)])
    expect(kernel, device.BarrierDivergenceError, ints(N))


def test_lanes_that_wait_for_each_other_are_no_deadlock():
    """Lanes of one warp may part: one waits for what another does only after the branch."""
    o, bars = out(), buffer("bars", "uint64", 1, "shared.barrier")
    bar = load(bars, 0)
    body = [
        b.when(op("eq", TX, 0), call("ptx_init_barrier_thread_count", bar, 1)),
        sync(),
        b.when(op("eq", TX, 0), call("mbarrier_wait_parity", bar, 0)),
        b.when(op("eq", TX, 1), call("ptx_arrive_barrier", bar)),
        store(o, TX, TX),
    ]
    for policy in ALL:
        value = ints(N)
        b.Kernel(threads=N, tensors=[o], allocs=[bars], body=body).run(value, policy=policy)
        assert value.tolist() == list(range(N))


# --------------------------------------------------------------------------- mbarriers
def handover(*, arrive=32, count=32, parity=0, init=True, ordered=True):
    """Warp 0 fills the tile and arrives; warp 1 waits and reads it."""
    o, s = out(), shared()
    bars = buffer("bars", "uint64", 1, "shared.barrier")
    bar = load(bars, 0)
    start = [b.when(op("eq", TX, 0), call("ptx_init_barrier_thread_count", bar, count))] if init else []
    arrival = b.when(op("lt", TX, arrive), call("ptx_arrive_barrier", bar))
    consume = [call("mbarrier_wait_parity", bar, parity), store(o, TX, load(s, op("sub", TX, 32)))]
    body = [
        *start,
        *([sync()] if ordered else []),
        b.when(op("lt", TX, 32), store(s, TX, TX), arrival, other=consume),
    ]
    return b.Kernel(threads=N, tensors=[o], allocs=[s, bars], body=body)


def test_mbarrier_hands_over():
    for policy in ALL:
        value = ints(N)
        handover().run(value, policy=policy)
        assert value[32:].tolist() == list(range(32))


def test_missing_arrival_deadlocks():
    error = expect(handover(arrive=31), device.DeadlockError, ints(N))
    assert "parity 0 of bars[0]" in error.reason


def test_wrong_parity():
    """Parity 1 has passed before anything happened: the consumer reads too early, or waits for ever."""
    kinds = device.DataRaceError, device.UninitialisedReadError, device.DeadlockError
    for policy in ALL:
        with pytest.raises(kinds):
            handover(parity=1).run(ints(N), policy=policy)


def test_too_many_arrivals():
    kernel = handover(count=33, arrive=32)
    expect(kernel, device.DeadlockError, ints(N))
    bars = buffer("bars", "uint64", 1, "shared.barrier")
    bar = load(bars, 0)
    body = [
        b.when(op("eq", TX, 0), call("ptx_init_barrier_thread_count", bar, 48)),
        sync(),
        call("ptx_arrive_barrier", bar),
    ]
    expect(b.Kernel(threads=N, allocs=[bars], body=body), device.ArrivalError)


def test_barrier_without_initialisation():
    expect(handover(init=False), device.BarrierInitError, ints(N))


def test_initialisation_that_is_not_visible():
    for policy in ALL:
        with pytest.raises(device.BarrierInitError):
            handover(ordered=False).run(ints(N), policy=policy)


def test_barrier_index_out_of_bounds():
    bars = buffer("bars", "uint64", 2, "shared.barrier")
    body = [b.when(op("eq", TX, 0), call("ptx_init_barrier_thread_count", load(bars, 2), 1))]
    expect(b.Kernel(threads=N, allocs=[bars], body=body), BarrierIndexError)


# --------------------------------------------------------------------------- cp.async
def copies(keep=0, wait=True, barrier=True, commits=1):
    """Each thread copies 4 elements; then reads those of its neighbour in the other warp."""
    o, x, s = out(), buffer("x", "int32", 4 * N, "global"), shared(4 * N)
    body = [call("ptx_cp_async", pointer(s, mul(TX, 4), 4, "w"), pointer(x, mul(TX, 4), 4), 4)]
    body += [call("ptx_commit_group")] * commits
    body += [call("ptx_wait_group", keep)] if wait else []
    body += [sync()] if barrier else []
    body += [store(o, TX, load(s, op("bitxor", mul(TX, 4), 4 * 32)))]
    return b.Kernel(threads=N, tensors=[o, x], allocs=[s], body=body)


def test_cp_async():
    x = torch.arange(4 * N, dtype=torch.int32)
    for policy in ALL:
        value = ints(N)
        copies().run(value, x, policy=policy)
        assert value.tolist() == [4 * (t ^ 32) for t in range(N)]


@pytest.mark.parametrize(
    "broken", [{"wait": False}, {"keep": 1}, {"barrier": False}, {"keep": 1, "commits": 1}]
)
def test_cp_async_without_its_wait(broken):
    x = torch.arange(4 * N, dtype=torch.int32)
    for policy in ALL:
        with pytest.raises((device.DataRaceError, device.UninitialisedReadError)):
            copies(**broken).run(ints(N), x, policy=policy)


# --------------------------------------------------------------------------- schedules
def test_a_seed_repeats_and_seeds_differ():
    runs = [reversal(sync()).run(ints(N), seed=seed, policy="random") for seed in (5, 5, 6, 7, 8)]
    assert runs[0] == runs[1]
    assert len({r.schedule for r in runs[1:]}) > 1


def test_step_limit():
    kernel = b.Kernel(threads=N, body=[ir.While(b.span(), const(True, "bool"), call("sync_warp"))])
    with pytest.raises(device.StepLimitError):
        kernel.run(max_steps=1000)


def test_every_class_of_fault_is_planted_somewhere():
    """In the files of this folder, by name; a new class without a planted fault fails here."""
    kinds = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.DeviceError) and name != "DeviceError"
    }
    folder = Path(__file__).parent
    planted = "".join(path.read_text() for path in folder.glob("test_*.py"))
    assert {name for name in kinds if not re.search(rf"\b{name}\b", planted)} == set()
