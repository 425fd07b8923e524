"""cp.async: copies of 4, 8 or 16 bytes from a tensor to shared memory, in commit groups of each thread."""

from typing import TYPE_CHECKING, Any

import numpy as np

from verify import ir
from verify.interp.device import access, errors
from verify.interp.device.barriers import Mbarrier
from verify.interp.device.block import Group, Wait
from verify.interp.device.flight import Entry, Operation
from verify.interp.device.memory import Storage

if TYPE_CHECKING:
    from verify.interp.device.values import Values

_SIZES = (4, 8, 16)


def pointer(m: "Values", node: ir.Expr, size: int | None) -> tuple[Storage, Any, np.ndarray]:
    """Return the storage and the first byte of each active lane's pointer; checks `size` bytes from it.

    Raises:
        OutOfBoundsError: some byte is outside of the allocation.
    """
    match node:
        case ir.AccessPtr(data=data, element=element, offset=offset):
            bits, index = element.bits, offset
        case ir.Call(op="address_of", args=(ir.Load(buffer=buffer, indices=(index,)),)):
            data, bits = buffer.data, buffer.dtype.bits
        case ir.Call(op="handle_add_byte_offset", args=(base, offset)):
            storage, first, threads = pointer(m, base, None)
            first = first + m.lanes_of(m.address(offset))
            _check(m, storage, first, size, threads)
            return storage, first, threads
        case ir.Var():
            data, bits, index = node, 8, ir.Const(ir.INT32, 0)
        case _:
            raise ir.UnsupportedIR("pointer that is no access_ptr and no address of an element")
    storage = m.block.storage(data)
    _, threads = m.active
    if isinstance(index, ir.Ramp):
        index = index.base
    first = m.lanes_of(m.address(index)) * bits
    if (first % access.BYTE_BITS).any():
        raise ir.UnsupportedIR("pointer to part of a byte")
    first = first // access.BYTE_BITS
    _check(m, storage, first, size, threads)
    return storage, first, threads


def _check(m: "Values", storage: Storage, first: np.ndarray, size: int | None, threads: np.ndarray) -> None:
    if size is None or not len(threads):
        return
    bad = (first < 0) | (first + size > storage.size_bytes)
    if bad.any():
        text = f"access of {size} bytes to {storage.name}, which has {storage.size_bytes}"
        at = int(first[bad][0])
        raise m.block.fault(errors.OutOfBoundsError, text, threads[bad], storage, at, size)


def _aligned(m: "Values", storage: Storage, first: np.ndarray, size: int, threads: np.ndarray) -> None:
    bad = (storage.base + first) % size != 0
    if bad.any() and m.block.run.checks.alignment:
        text = f"cp.async of {size} bytes at an address of {storage.name} that is no multiple of them"
        at = int(first[bad][0])
        raise m.block.fault(errors.MisalignedError, text, threads[bad], storage, at, size)


def _copy(m: "Values", group: Group, call: ir.Call) -> None:
    target, source, count, *predicate = call.args
    if not isinstance(count, ir.Const) or not isinstance(target, ir.AccessPtr):
        raise ir.UnsupportedIR("cp.async of a computed size or pointer")
    size = int(count.value) * target.element.bits // access.BYTE_BITS
    if size not in _SIZES:
        raise ir.UnsupportedIR(f"cp.async of {size} bytes")
    block = m.block
    to, first, threads = pointer(m, target, size)
    wanted = np.ones(len(threads), bool)
    if predicate:
        wanted = np.broadcast_to(m.lanes_of(m.evaluate(predicate[0])) != 0, wanted.shape)
    if to.kind != "shared":
        raise ir.UnsupportedIR(f"cp.async into {to.kind} memory")
    _aligned(m, to, first, size, threads)
    assert to.space is not None, "shared memory has a space"
    at = to.space.slots(to.base + first[:, None] + np.arange(size))
    agents = [block.clocks.agent(("cp.async", int(t))) for t in threads]
    components = np.array([c for c, _ in agents])
    ticks = np.array([k for _, k in agents], np.int32)
    known = block.clocks.known[threads]
    actor = block.actor(components, ticks, known, None)
    origin, begin, space = None, first, None
    if wanted.any():
        lanes = m.active[0][wanted]
        with m.masked(_only(m, lanes)):
            origin, begin, readers = pointer(m, source, size)
            _aligned(m, origin, begin, size, readers)
        space = origin.space
        assert space is not None, "a tensor has a space"
        begin = space.slots(begin[:, None] + np.arange(size))
        reader = block.actor(components[wanted], ticks[wanted], known[wanted], None)
        access.record(block, origin, begin, reader, is_write=False, threads=threads[wanted])
    access.record(block, to, at, actor, is_write=True, threads=threads)
    block.clocks.release(threads)

    def effect() -> None:
        octets = np.zeros((len(threads), size), np.uint8)
        if space is not None:
            octets[wanted] = space.data[begin]
        access.put(to, at, octets)

    op = Operation(f"cp.async into {to.name}", effect)
    block.pending.append(op)
    block.queues["cp.async"].add(Entry(op, op, threads, threads, {"write": (components, ticks)}))


def _only(m: "Values", lanes: np.ndarray) -> Any:
    import torch

    mask = torch.zeros(m.width, dtype=torch.bool)
    mask[torch.from_numpy(lanes)] = True
    return mask


def _commit(m: "Values", group: Group, call: ir.Call) -> None:
    m.block.queues["cp.async"].commit(m.active[1])


def _wait(m: "Values", group: Group, call: ir.Call) -> Wait:
    keep = m.uniform(call.args[0], "number of copy groups")
    block, (_, threads) = m.block, m.active
    queue = block.queues["cp.async"]
    ops = queue.outstanding(threads, keep, with_open=True)  # <0> is printed as wait_all

    def finish() -> None:
        queue.settle(threads, keep, block.clocks, with_open=True)

    text = f"its copies but {keep} groups"
    return Wait("flight", text, lambda: all(op.is_done for op in ops), finish, target=ops)


def _barrier_arrive(is_counted: bool) -> Any:
    def arrive(m: "Values", group: Group, call: ir.Call) -> None:
        """Arrive at an mbarrier once all copies that a thread has issued are complete."""
        block = m.block
        queue = block.queues["cp.async"]
        for barrier, threads in block.barrier(call.args[0]):
            barrier.check_visible(block, threads, is_async=False)
            if is_counted:
                barrier.pending += len(threads)
            for thread in threads.tolist():
                _arrive_after(m, queue.outstanding(np.array([thread]), 0, with_open=True), barrier, thread)

    return arrive


def _arrive_after(m: "Values", ops: list[Operation], barrier: Mbarrier, thread: int) -> None:
    block, who = m.block, np.array([thread])
    component, tick = block.clocks.agent(("cp.async", thread))
    rows = block.clocks.row_of(component, tick)

    def effect() -> None:
        barrier.arrive(block, who, rows, 1)

    done = Operation(f"cp.async arrival at {barrier.name}", effect)
    done.needs = tuple(ops)
    block.pending.append(done)


EFFECTS = {
    "ptx_cp_async": _copy,
    "ptx_commit_group": _commit,
    "ptx_wait_group": _wait,
    "ptx_cp_async_barrier": _barrier_arrive(True),
    "ptx_cp_async_barrier_noinc": _barrier_arrive(False),
}
