"""A warp-specialised product with one statement changed: the fault that this makes is found and typed."""

from dataclasses import replace

import pytest

from tests.verify.device import ring
from tests.verify.device.build import edit, is_call, rewrite
from verify import ir
from verify.interp import device

WARPGROUP = 128


def run(extracted, policy="late", **options):
    return device.run(extracted, *ring.inputs(), policy=policy, wave_threads=WARPGROUP, **options)


def without(*names):
    """Drop every call of these names."""
    return edit(ring.ring(), lambda node: None if is_call(node, *names) else node)


def nth(name, number, change):
    """Change the call of `name` with that number in program order."""
    count = iter(range(1 << 20))

    def apply(node):
        if is_call(node, name) and next(count) == number:
            return change(node)
        return node

    return edit(ring.ring(), apply)


def with_argument(position, value):
    def change(node):
        call = node.value
        args = (*call.args[:position], ir.Const(ir.INT32, value), *call.args[position + 1 :])
        return replace(node, value=replace(call, args=args))

    return change


def drop(node):
    return None


def flipped(node):
    parity = node.value.args[1]
    other = ir.BinOp(ir.INT32, "bitxor", parity, ir.Const(ir.INT32, 1))
    return replace(node, value=replace(node.value, args=(node.value.args[0], other)))


RACES = device.DataRaceError, device.UninitialisedReadError
CASES = {
    "consumer does not wait for a": (lambda: nth("mbarrier_wait_parity", 2, drop), RACES),
    "consumer does not wait for b": (lambda: nth("mbarrier_wait_parity", 3, drop), RACES),
    "consumer waits for the other parity": (
        lambda: nth("mbarrier_wait_parity", 2, flipped),
        (*RACES, device.DeadlockError),
    ),
    "producer does not wait for an empty slot": (
        lambda: nth("mbarrier_wait_parity", 0, drop),
        (*RACES, device.ArrivalError),
    ),
    "one group of products is not waited for": (
        lambda: nth("warpgroup_wait", 0, with_argument(0, 1)),
        (device.AsyncRegisterError,),
    ),
    "a slot is handed back before it was read": (lambda: edit(ring.ring(), early), RACES),
    "too few bytes expected": (
        lambda: nth("ptx_arrive_barrier_expect_tx", 1, with_argument(1, 2048)),
        (device.TransactionError,),
    ),
    "too many bytes expected": (
        lambda: nth("ptx_arrive_barrier_expect_tx", 0, with_argument(1, 1 << 14)),
        (device.TransactionError,),
    ),
    "one arrival too few for the count": (
        lambda: nth("ptx_init_barrier_thread_count", 0, with_argument(1, 2)),
        (device.DeadlockError, device.TransactionError),
    ),
    "more arrivals than the count": (
        lambda: nth("ptx_init_barrier_thread_count", 4, with_argument(1, 64)),
        (device.ArrivalError,),
    ),
    "no barrier after the initialisation": (
        lambda: without("tvm_storage_sync"),
        (device.BarrierInitError, *RACES),
    ),
    "no fence after the initialisation": (
        lambda: without("ptx_fence_barrier_init"),
        (device.BarrierInitError,),
    ),
    "no wait for the products": (lambda: without("warpgroup_wait"), (device.AsyncRegisterError,)),
    "no fence of the operand registers": (lambda: without("warpgroup_arrive"), (device.AsyncRegisterError,)),
    "descriptor moved by 8 bytes": (
        lambda: nth("increase_descriptor_offset", 1, with_argument(1, 1032)),
        (device.MisalignedError,),
    ),
    "descriptor beyond its tile": (
        lambda: nth("increase_descriptor_offset", 0, with_argument(1, 1 << 14)),
        (device.OutOfBoundsError, device.UninitialisedReadError),
    ),
    "box at an odd place": (lambda: edit(ring.ring(), shift_box), (device.MisalignedError,)),
    "half of a warpgroup skips a product": (
        lambda: nth("ptx_wgmma_rs", 0, half),
        (device.BarrierDivergenceError,),
    ),
    "illegal register count": (lambda: nth("set_max_nreg", 0, with_argument(0, 20)), (device.LaunchError,)),
}


def early(node):
    """Move the consumers' arrivals to the start of their loop."""
    if isinstance(node, ir.For) and any(is_call(n, "ptx_wgmma_rs") for n in ir.walk(node)):
        arrivals = [n for n in ir.walk(node) if is_call(n, "ptx_arrive_barrier")]
        waits = [n for n in ir.walk(node) if is_call(n, "mbarrier_wait_parity")]
        rest = rewrite(node.body, lambda n: None if n in arrivals or n in waits else n)
        return replace(node, body=ir.Seq(None, (*waits, *arrivals, rest)))
    return node


def shift_box(node):
    if is_call(node, "tma_load"):
        args = list(node.value.args)
        target = args[2]
        offset = ir.BinOp(ir.INT32, "add", target.offset, ir.Const(ir.INT32, 16))
        args[2] = replace(target, offset=offset)
        return replace(node, value=replace(node.value, args=tuple(args)))
    return node


def half(node):
    thread = next(
        n.var for n in ir.walk(ring.ring().device.body) if isinstance(n, ir.Launch) and n.tag == "threadIdx.x"
    )
    cond = ir.BinOp(ir.BOOL, "lt", thread, ir.Const(ir.INT32, 192))
    return ir.If(node.span, cond, node, None)


@pytest.mark.parametrize("name", CASES)
def test_planted(name):
    make, kinds = CASES[name]
    edited = make()
    for policy in ("late", "ahead"):
        with pytest.raises(kinds) as caught:
            run(edited, policy)
        assert isinstance(caught.value, device.DeviceError)
        assert caught.value.where.block == (0, 0, 0) or not caught.value.where.block


def test_unedited_is_clean():
    for policy in ("late", "ahead", "random"):
        run(ring.ring(), policy)


LAUNCH_ARGUMENTS = 9  # name, three tensors, grid, three block extents, shared memory


def relaunched(position, value):
    """Return the kernel with another constant among the arguments of its launch."""
    extracted = ring.ring()

    def change(node):
        if isinstance(node, ir.Call) and node.op == "tvm_call_packed" and len(node.args) == LAUNCH_ARGUMENTS:
            args = list(node.args)
            args[position] = ir.Const(args[position].dtype, value)
            return replace(node, args=tuple(args))
        return node

    body = rewrite(extracted.host.body, change)
    assert body is not extracted.host.body
    return replace(extracted, host=replace(extracted.host, body=body))


@pytest.mark.parametrize(
    ("position", "value", "kinds"),
    [
        (5, 288, (device.LaunchError,)),  # threads
        (5, 255, (device.BarrierDivergenceError, device.DeadlockError)),
        (8, 4096, (device.OutOfBoundsError,)),  # bytes of dynamic shared memory
    ],
)
def test_launches_that_do_not_fit(position, value, kinds):
    """The host's launch counts, not what the device function was made for."""
    with pytest.raises(kinds):
        run(relaunched(position, value))


def test_the_host_says_how_many_blocks():
    assert run(relaunched(4, 0)).blocks == 0
    with pytest.raises(device.DataRaceError):
        run(relaunched(4, 2))
