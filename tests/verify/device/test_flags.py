"""Blocks that signal each other through memory: release and acquire, waiting, deadlock, co-residency."""

# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false
# TileLang's language is typed for the tracer that runs it, not for the kernels written in it.

import pytest
import tilelang.language as T
import torch

from tests.verify.device import build as b
from tests.verify.device.build import BX, TX, buffer, call, ints, load, op, pointer, store, sync, when
from verify import ir
from verify.interp import device
from verify.interp.device.flags import ACQ_REL, ACQUIRE, RELAXED, RELEASE
from verify.interp.errors import UnsupportedOpError

N = 64
ALL = tuple(device.POLICIES)
FENCE = call("call_extern", "__threadfence")


def int_buffers():
    return buffer("data", "int32", N, "global"), buffer("flag", "int32", 2, "global")


def raise_flag(flag, order, at=0):
    return ir.Eval(b.span(), b.value_of("atomic_store_elem_op", "void", pointer(flag, at, 1, "w"), 1, order))


def wait_for(flag, order, at=0, until=1):
    seen = b.value_of("atomic_load_elem_op", "int32", pointer(flag, at, 1), order)
    return ir.While(b.span(), op("ne", seen, until), ir.Seq(None, ()))


def message(release, acquire, *, before=(), after=()):
    """Block 0 fills `data` and raises a flag; block 1 waits for it and copies."""
    data, flag = int_buffers()
    out = buffer("out", "int32", N, "global")
    sender = (
        store(data, TX, b.add(TX, 1)),
        sync(),
        when(op("eq", TX, 0), *before, raise_flag(flag, release)),
    )
    receiver = (
        when(op("eq", TX, 0), wait_for(flag, acquire), *after),
        sync(),
        store(out, TX, load(data, TX)),
    )
    body = [when(op("eq", BX, 0), *sender, other=receiver)]
    return b.Kernel(threads=N, blocks=2, tensors=[data, flag, out], body=body)


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize(
    "options",
    [
        {"release": RELEASE, "acquire": ACQUIRE},
        {"release": RELAXED, "acquire": RELAXED, "before": (FENCE,), "after": (FENCE,)},
        {"release": RELEASE, "acquire": RELAXED, "after": (FENCE,)},
    ],
    ids=["orders", "fences", "mixed"],
)
def test_a_message_arrives(policy, options):
    out = ints(N)
    message(**options).run(ints(N), ints(2), out, policy=policy, seed=1)
    assert torch.equal(out, torch.arange(1, N + 1, dtype=torch.int32))


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize(
    "options",
    [
        {"release": RELAXED, "acquire": ACQUIRE},
        {"release": RELEASE, "acquire": RELAXED},
        {"release": RELAXED, "acquire": RELAXED, "before": (FENCE,)},
        {"release": RELAXED, "acquire": RELAXED, "after": (FENCE,)},
    ],
    ids=["no-release", "no-acquire", "no-second-fence", "no-first-fence"],
)
def test_a_message_without_an_order_races(policy, options):
    with pytest.raises(device.DataRaceError) as caught:
        message(**options).run(ints(N), ints(2), ints(N), policy=policy, seed=1)
    assert "of block 0" in str(caught.value)


def test_a_release_before_the_barrier_does_not_cover_the_others():
    """Thread 0 raises the flag before it meets the threads that write."""
    data, flag = int_buffers()
    out = buffer("out", "int32", N, "global")
    sender = (store(data, TX, TX), when(op("eq", TX, 0), raise_flag(flag, RELEASE)), sync())
    receiver = (when(op("eq", TX, 0), wait_for(flag, ACQUIRE)), sync(), store(out, TX, load(data, TX)))
    kernel = b.Kernel(
        threads=N,
        blocks=2,
        tensors=[data, flag, out],
        body=[when(op("eq", BX, 0), *sender, other=receiver)],
    )
    with pytest.raises(device.DataRaceError):
        kernel.run(ints(N), ints(2), ints(N), policy="late", seed=0)


@pytest.mark.parametrize("policy", ALL)
def test_blocks_that_wait_for_each_other_are_a_deadlock(policy):
    _, flag = int_buffers()
    first = (wait_for(flag, ACQUIRE, at=0), raise_flag(flag, RELEASE, at=1))
    second = (wait_for(flag, ACQUIRE, at=1), raise_flag(flag, RELEASE, at=0))
    kernel = b.Kernel(
        threads=32,
        blocks=2,
        tensors=[flag],
        body=[when(op("eq", TX, 0), when(op("eq", BX, 0), *first, other=second))],
    )
    with pytest.raises(device.DeadlockError, match="memory to change"):
        kernel.run(ints(2), policy=policy, seed=2)


def test_a_block_that_waits_for_one_that_does_not_fit_is_a_deadlock():
    data, flag = int_buffers()
    receiver = (when(op("eq", TX, 0), wait_for(flag, ACQUIRE)), sync())
    sender = (store(data, TX, TX), sync(), when(op("eq", TX, 0), raise_flag(flag, RELEASE)))
    kernels = {
        order: b.Kernel(
            threads=N, blocks=2, tensors=[data, flag], body=[when(op("eq", BX, 0), *first, other=second)]
        )
        for order, first, second in (("sends", sender, receiver), ("waits", receiver, sender))
    }
    kernels["sends"].run(ints(N), ints(2), policy="ahead", resident=1)
    kernels["waits"].run(ints(N), ints(2), policy="ahead")
    with pytest.raises(device.DeadlockError, match="1 blocks have not started"):
        kernels["waits"].run(ints(N), ints(2), policy="ahead", resident=1)


# ------------------------------------------------------------------------------ as TileLang lowers it
def split_sum(order, splits=4, n=64):
    """Add `splits` parts in the order of their index, by whichever block comes last."""

    @T.prim_func
    def kernel(
        x: T.Tensor[(splits, n), T.float32],
        parts: T.Tensor[(splits, n), T.float32],
        counter: T.Tensor[(1,), T.int32],
        out: T.Tensor[(n,), T.float32],
    ):
        with T.Kernel(splits, threads=n) as s:
            last = T.alloc_shared((1,), T.int32)
            tx = T.get_thread_binding()
            total = T.alloc_var(T.float32)
            parts[s, tx] = x[s, tx] * 2.0
            T.sync_threads()
            if tx == 0:
                last[0] = T.atomic_add(counter[0], 1, memory_order=order, return_prev=True)
            T.sync_threads()
            if last[0] == splits - 1:
                total = 0.0
                for k in T.serial(splits):
                    total = total + parts[k, tx]
                out[tx] = total

    return kernel


def test_the_last_block_sees_what_the_others_wrote():
    x = torch.randn(4, 64)
    out = torch.empty(64)
    args = (x, torch.empty(4, 64), torch.zeros(1, dtype=torch.int32), out)
    device.explore(split_sum("acq_rel"), *args, seeds=2)
    assert torch.equal(out, ((x[0] * 2 + x[1] * 2) + x[2] * 2) + x[3] * 2)


@pytest.mark.parametrize("order", ["relaxed", "release", "acquire"])
def test_the_last_block_needs_both_orders(order):
    args = (torch.randn(4, 64), torch.empty(4, 64), torch.zeros(1, dtype=torch.int32), torch.empty(64))
    with pytest.raises(device.DataRaceError):
        device.run(split_sum(order), *args, policy="ahead")


def grid_barrier(blocks=3, rounds=3, release="release", acquire="acquire", returns=True):
    """Each block adds its neighbour's element, behind a barrier that counts up and is never reset."""

    @T.prim_func
    def kernel(x: T.Tensor[(rounds + 1, blocks), T.int32], counter: T.Tensor[(1,), T.int32]):
        with T.Kernel(blocks, threads=32) as s:
            tx = T.get_thread_binding()
            ticket = T.alloc_var(T.int32)
            if tx == 0:
                for r in T.serial(rounds):
                    x[r + 1, s] = x[r, s] + x[r, (s + 1) % blocks]
                    if returns:
                        ticket = T.atomic_add(counter[0], 1, memory_order=release, return_prev=True)  # noqa: F841
                    else:
                        T.atomic_add(counter[0], 1, memory_order=release)
                    while T.atomic_load(counter[0], memory_order=acquire) < blocks * (r + 1):
                        T.evaluate(0)

    return kernel


def test_a_grid_barrier_of_atomics():
    x = torch.zeros(4, 3, dtype=torch.int32)
    x[0] = torch.tensor([1, 10, 100])
    device.explore(grid_barrier(), x, torch.zeros(1, dtype=torch.int32), seeds=2)
    want = x[0]
    for r in range(3):
        want = want + want.roll(-1)
        assert torch.equal(x[r + 1], want)


# An add without a result is compiled without its order.
@pytest.mark.parametrize("orders", [{"release": "relaxed"}, {"acquire": "relaxed"}, {"returns": False}])
def test_a_grid_barrier_without_an_order_races(orders):
    with pytest.raises(device.DataRaceError):
        device.run(grid_barrier(**orders), torch.zeros(4, 3, dtype=torch.int32), ints(1), policy="late")


def test_too_many_threads_are_unsupported():
    _, flag = int_buffers()
    kernel = b.Kernel(
        threads=1024, blocks=8, tensors=[flag], body=[when(op("eq", TX, 0), raise_flag(flag, ACQ_REL))]
    )
    with pytest.raises(UnsupportedOpError, match="8192 threads whose blocks signal"):
        kernel.run(ints(2))


def test_a_sum_whose_order_is_the_schedules_differs_between_schedules():
    @T.prim_func
    def adds(x: T.Tensor[(3,), T.float32], out: T.Tensor[(1,), T.float32]):
        with T.Kernel(3, threads=32) as bx:
            if T.get_thread_binding() == 0:
                T.atomic_add(out[0], x[bx])

    exact, rounded = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1e8, 1.0, -1e8])
    device.explore(adds, exact, torch.zeros(1))
    with pytest.raises(device.ScheduleDependentError, match="of out_handle differ between"):
        device.explore(adds, rounded, torch.zeros(1))
