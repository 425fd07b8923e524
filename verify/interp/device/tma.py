"""TMA: boxes of tensors through descriptors, and bulk copies of consecutive bytes.

Elements of a box outside of the tensor are filled with zeros on a load and skipped on a store. In
shared memory the box is dense, innermost dimension first, with 16-byte chunks permuted by the
descriptor's swizzle (CUDA driver API, cuTensorMapEncodeTiled; PTX ISA, "Tensors").
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from verify import host, ir
from verify.interp import arith, dtypes
from verify.interp.device import access, errors
from verify.interp.device.async_copy import pointer
from verify.interp.device.barriers import Mbarrier
from verify.interp.device.block import Group, Wait
from verify.interp.device.flight import Entry, Operation
from verify.interp.device.memory import Storage
from verify.interp.device.shadow import Actor
from verify.layouts import swizzle_address

if TYPE_CHECKING:
    from verify.interp.device.block import Block
    from verify.interp.device.values import Values

# CUtensorMapDataType -> bits of one element.
_ELEMENT_BITS = dict(enumerate((8, 16, 32, 32, 64, 64, 16, 32, 64, 16, 32, 32, 32, 4)))
_SWIZZLE_BYTES = {0: 0, 1: 32, 2: 64, 3: 128}  # CUtensorMapSwizzle
SHARED_ALIGNMENT = 128
BULK_ALIGNMENT = 16
STRIDE_ALIGNMENT = 16
MAX_BOX, MAX_RANK = 256, 5
_MULTICAST_MASK = 0xFFFF  # 16 bits
MAX_STRIDE, MAX_EXTENT = 2**40, 2**32
_LOAD_PREFIX, _MULTICAST_PREFIX, _STORE_PREFIX = 3, 4, 2  # arguments before the coordinates


@dataclass(frozen=True)
class TensorMap:
    """A descriptor with the launch's numbers.

    Attributes:
        storage: the tensor.
        bits: of an element.
        dims, strides_bytes, box: innermost first.
        swizzle_bytes: span of the swizzle, 0 for none.
    """

    name: str
    storage: Storage
    bits: int
    dims: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    box: tuple[int, ...]
    swizzle_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes of a box."""
        return math.prod(self.box) * self.bits // 8

    def elements(self, coordinates: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return of each element of the box its bit address in the tensor, and whether it is inside."""
        shape = tuple(reversed(self.box))
        index = np.indices(shape).reshape(len(shape), -1)[::-1]
        at = [i + c for i, c in zip(index, coordinates, strict=True)]
        inside = np.ones(index.shape[1], bool)
        for position, extent in zip(at, self.dims, strict=True):
            inside &= (position >= 0) & (position < extent)
        address = at[0] * self.bits
        for position, stride in zip(at[1:], self.strides_bytes[1:], strict=True):
            address = address + position * stride * 8
        return address, inside

    def shared_bytes(self, start: int) -> np.ndarray:
        """Return the address of each byte of the box whose first is at `start`."""
        return swizzle_address(start + np.arange(self.size_bytes), self.swizzle_bytes)


def decode(given: host.Descriptor, storage: Storage, number: Any) -> TensorMap:
    """Return a descriptor, its extents computed by `number`.

    Raises:
        UnsupportedIR: it uses something that has no meaning here.
        LaunchError: the driver would refuse it.
    """
    if given.interleave or given.oob_fill or any(s != 1 for s in given.element_strides):
        raise ir.UnsupportedIR(f"{given.name} with interleaving, element strides or NaN fill")
    if given.dtype not in _ELEMENT_BITS or given.swizzle not in _SWIZZLE_BYTES:
        raise ir.UnsupportedIR(f"{given.name} of type {given.dtype} with swizzle {given.swizzle}")
    dims = tuple(number(d) for d in given.dims)
    strides = tuple(number(s) for s in given.strides)
    bits, span = _ELEMENT_BITS[given.dtype], _SWIZZLE_BYTES[given.swizzle]
    row = given.box[0] * bits // 8
    rules = (
        (1 <= len(dims) <= MAX_RANK, f"rank {len(dims)}"),
        (all(0 < d <= MAX_EXTENT for d in dims), f"extents {dims}"),
        (all(0 < b <= MAX_BOX for b in given.box), f"box {given.box}"),
        (all(s % STRIDE_ALIGNMENT == 0 and 0 <= s < MAX_STRIDE for s in strides[1:]), f"strides {strides}"),
        (row % BULK_ALIGNMENT == 0, f"inner box of {row} bytes"),
        (not span or row <= span, f"inner box of {row} bytes with a swizzle of {span}"),
    )
    for holds, what in rules:
        if not holds:
            raise errors.LaunchError(
                f"TMA descriptor {given.name}: {what}", errors.Where(storage=storage.name)
            )
    return TensorMap(given.name, storage, bits, dims, strides, given.box, span)


# --------------------------------------------------------------------------- issue
@dataclass
class _Issue:
    """One copy by one thread: its agent, checked and recorded."""

    m: "Values"
    thread: int
    component: int
    tick: int

    @property
    def actor(self) -> Actor:
        block, who = self.m.block, np.array([self.thread])
        known, fenced = block.clocks.known[who], block.clocks.fenced[who]
        ids = np.array([self.component]), np.array([self.tick], np.int32)
        return block.actor(*ids, known, fenced)

    def record(self, storage: Storage, at: np.ndarray, *, is_write: bool, is_atomic: bool = False) -> None:
        who = np.array([self.thread])
        access.record(
            self.m.block,
            storage,
            at[None, :],
            self.actor,
            is_write=is_write,
            threads=who,
            is_atomic=is_atomic,
        )

    def aligned(self, storage: Storage, first: int, needed: int, what: str) -> None:
        if (storage.base + first) % needed and self.m.block.run.checks.alignment:
            text = f"{what} at an address of {storage.name} that is no multiple of {needed}"
            raise self.m.block.fault(errors.MisalignedError, text, (self.thread,), storage, first)


def _load(m: "Values", group: Group, call: ir.Call) -> None:
    if isinstance(call.args[0], ir.Var) and call.args[0] in m.block.run.maps:
        _load_box(m, call)
    else:
        _load_bulk(m, call)


def _load_box(m: "Values", call: ir.Call) -> None:
    tensor_map = m.block.run.maps[call.args[0]]  # type: ignore[index]
    coordinates = [
        m.lanes_of(m.address(c)) for c in call.args[_LOAD_PREFIX : _LOAD_PREFIX + len(tensor_map.box)]
    ]
    size = tensor_map.size_bytes
    storage, first, threads = pointer(m, call.args[2], size)
    for k, (thread, barrier) in enumerate(_one_each(m, call.args[1], threads)):
        address, inside = tensor_map.elements(tuple(int(c[k]) for c in coordinates))
        _issue_load(m, thread, barrier, storage, int(first[k]), tensor_map, address, inside)


def _load_multicast(m: "Values", group: Group, call: ir.Call) -> None:
    """Load a box into the blocks of a mask; args: descriptor, mbarrier, destination, mask, coordinates.

    In each of them the bytes go to the same place, and complete the mbarrier of the same place.
    """
    if not isinstance(call.args[0], ir.Var) or call.args[0] not in m.block.run.maps:
        raise ir.UnsupportedIR("multicast of a bulk copy")
    block, tensor_map = m.block, m.block.run.maps[call.args[0]]
    end = _MULTICAST_PREFIX + len(tensor_map.box)
    coordinates = [m.lanes_of(m.address(c)) for c in call.args[_MULTICAST_PREFIX:end]]
    storage, first, threads = pointer(m, call.args[2], tensor_map.size_bytes)
    masks = m.lanes_of(m.evaluate(call.args[3])) & _MULTICAST_MASK
    for k, (thread, barrier) in enumerate(_one_each(m, call.args[1], threads)):
        address, inside = tensor_map.elements(tuple(int(c[k]) for c in coordinates))
        mask, who = int(masks[k]), threads[k : k + 1]
        if not mask:
            raise block.fault(errors.ClusterRankError, "multicast to no block", who)
        for rank in (r for r in range(mask.bit_length()) if mask >> r & 1):
            peer = block.cluster.member(block, rank, who)
            there, target = block.counterpart(storage, peer), peer.mbarrier(*barrier.key)
            _issue_load(m, thread, target, there, int(first[k]), tensor_map, address, inside, peer)


def _one_each(m: "Values", node: ir.Expr, threads: np.ndarray) -> list[tuple[int, Mbarrier]]:
    """Return each active thread with the mbarrier it names."""
    named = {int(t): barrier for barrier, who in m.block.barrier(node) for t in who}
    return [(int(t), named[int(t)]) for t in threads]


def _issue_load(
    m: "Values",
    thread: int,
    barrier: Mbarrier,
    storage: Storage,
    first: int,
    tensor_map: TensorMap,
    address: np.ndarray,
    inside: np.ndarray,
    peer: "Block | None" = None,
) -> None:
    """Load a box; `barrier` and `storage` are those of `peer`, None: of the block that runs."""
    block, who = m.block, np.array([thread])
    issue = _Issue(m, thread, *block.clocks.once(block.clocks.known[thread]))
    barrier.check_visible(block, who, is_async=True)
    if peer is not None:
        block.cluster.visit(block, peer, np.array([issue.component]), np.array([issue.tick]), who)
    period = max(SHARED_ALIGNMENT, 8 * tensor_map.swizzle_bytes)
    issue.aligned(storage, first, period, "TMA load")
    at = tensor_map.shared_bytes(storage.base + first)
    source, bits = tensor_map.storage, tensor_map.bits
    octets, per = _tensor_bytes(source, address[inside], bits)
    issue.record(source, octets.ravel(), is_write=False)
    issue.record(storage, at, is_write=True)
    space = source.space
    assert space is not None, "a tensor has a space"

    def effect() -> None:
        whole = np.zeros(len(at), np.uint8)
        if bits >= 8:
            whole.reshape(-1, per)[inside] = space.data[octets]
        else:
            codes = np.zeros(len(inside), np.uint8)
            codes[inside] = space.data[octets[:, 0]] >> (address[inside] % 8) & ((1 << bits) - 1)
            whole[:] = (codes.reshape(len(at), -1) << (np.arange(8 // bits, dtype=np.uint8) * bits)).sum(-1)
        access.put(storage, at, whole)
        barrier.complete(block, len(at), block.clocks.row_of(issue.component, issue.tick))

    _launch_load(m, thread, barrier, effect, f"TMA load of {len(at)} bytes into {storage.name}")


def _launch_load(m: "Values", thread: int, barrier: Mbarrier, effect: Any, name: str) -> None:
    block = m.block
    op = Operation(name, effect)
    block.pending.append(op)
    barrier.inflight.append((op, barrier.phase))
    block.clocks.release(np.array([thread]))


def _tensor_bytes(storage: Storage, address: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
    """Return positions (elements, bytes) of elements at bit addresses of a tensor."""
    per = max(bits // 8, 1)
    assert storage.space is not None, "a tensor has a space"
    return storage.space.slots((address // 8)[:, None] + np.arange(per)), per


def _load_bulk(m: "Values", call: ir.Call) -> None:
    """Copy consecutive bytes; args: destination, source, mbarrier, bytes, eviction hint."""
    target, source, node, count = call.args[:4]
    size = m.uniform(count, "size of a bulk copy")
    storage, first, threads = pointer(m, target, size)
    origin, begin, _ = pointer(m, source, size)
    block, space = m.block, origin.space
    if storage.kind != "shared" or space is None:
        raise ir.UnsupportedIR("bulk copy to other than shared memory")
    for k, (thread, barrier) in enumerate(_one_each(m, node, threads)):
        barrier.check_visible(block, np.array([thread]), is_async=True)
        issue = _Issue(m, thread, *block.clocks.once(block.clocks.known[thread]))
        for place, start in ((storage, int(first[k])), (origin, int(begin[k]))):
            issue.aligned(place, start, BULK_ALIGNMENT, "bulk copy")
        if size % BULK_ALIGNMENT:
            raise block.fault(errors.MisalignedError, f"bulk copy of {size} bytes", (thread,), storage)
        at = storage.base + int(first[k]) + np.arange(size)
        octets = space.slots(origin.base + int(begin[k]) + np.arange(size))
        issue.record(origin, octets, is_write=False)
        issue.record(storage, at, is_write=True)

        def effect(
            at: np.ndarray = at, octets: np.ndarray = octets, issue: _Issue = issue, to: Mbarrier = barrier
        ) -> None:
            access.put(storage, at, space.data[octets])
            to.complete(block, size, block.clocks.row_of(issue.component, issue.tick))

        _launch_load(m, thread, barrier, effect, f"bulk copy of {size} bytes into {storage.name}")


def _store_cluster(m: "Values", group: Group, call: ir.Call) -> None:
    """Copy bytes to another block; args: destination, source, rank, bytes, mbarrier.

    Before the copy it arrives at that block's mbarrier, which expects the bytes, and fences (TileLang's
    copy_sm90.h).
    """
    target, source, rank, count, node = call.args
    size = m.uniform(count, "size of a bulk copy")
    storage, first, threads = pointer(m, target, size)
    origin, begin, _ = pointer(m, source, size)
    block, ranks = m.block, m.lanes_of(m.evaluate(rank))
    if storage.kind != "shared" or origin.kind != "shared" or size % BULK_ALIGNMENT:
        raise ir.UnsupportedIR(
            f"copy of {size} bytes from {origin.kind} to another block's {storage.kind} memory"
        )
    for k, (thread, named) in enumerate(_one_each(m, node, threads)):
        who = threads[k : k + 1]
        peer = block.cluster.member(block, int(ranks[k]), who)
        there, barrier = block.counterpart(storage, peer), peer.mbarrier(*named.key)
        barrier.check_visible(block, who, is_async=True)
        block.cluster.visit(block, peer, who + block.clocks.first, block.clocks.own(who), who)
        barrier.expect(block, size, who)
        barrier.arrive(block, who, block.clocks.release(who))
        block.clocks.fence(who)
        issue = _Issue(m, thread, *block.clocks.once(block.clocks.known[thread]))
        block.cluster.visit(block, peer, np.array([issue.component]), np.array([issue.tick]), who)
        block.visits[issue.component] = issue.tick, block.statement  # it reads here until it is done
        for place, start in ((there, int(first[k])), (origin, int(begin[k]))):
            issue.aligned(place, start, BULK_ALIGNMENT, "copy to another block")
        at, read = (p.base + int(f[k]) + np.arange(size) for p, f in ((there, first), (origin, begin)))
        access.check_written(block, origin, read[None, :], who)
        issue.record(origin, read, is_write=False)
        issue.record(there, at, is_write=True)

        def effect(
            at: np.ndarray = at,
            read: np.ndarray = read,
            issue: _Issue = issue,
            to: Mbarrier = barrier,
            there: Storage = there,
        ) -> None:
            assert origin.space is not None, "shared memory has a space"
            access.put(there, at, origin.space.data[read])
            to.complete(block, size, block.clocks.row_of(issue.component, issue.tick))

        _launch_load(m, thread, barrier, effect, f"copy of {size} bytes into {there.name} of another block")


# --------------------------------------------------------------------------- stores
def _store(m: "Values", group: Group, call: ir.Call) -> None:
    if isinstance(call.args[0], ir.Var) and call.args[0] in m.block.run.maps:
        _store_box(m, call)
    else:
        _store_bulk(m, call)


def _store_box(m: "Values", call: ir.Call) -> None:
    tensor_map = m.block.run.maps[call.args[0]]  # type: ignore[index]
    rank = len(tensor_map.box)
    coordinates = [m.lanes_of(m.address(c)) for c in call.args[_STORE_PREFIX : _STORE_PREFIX + rank]]
    adds = bool(m.uniform(call.args[-2], "reduction flag"))
    if tensor_map.bits < 8:
        raise ir.UnsupportedIR("TMA store of packed elements")
    storage, first, threads = pointer(m, call.args[1], tensor_map.size_bytes)
    for k, thread in enumerate(threads.tolist()):
        address, inside = tensor_map.elements(tuple(int(c[k]) for c in coordinates))
        at = tensor_map.shared_bytes(storage.base + int(first[k]))
        octets, per = _tensor_bytes(tensor_map.storage, address[inside], tensor_map.bits)
        period = max(SHARED_ALIGNMENT, 8 * tensor_map.swizzle_bytes)
        kept = at.reshape(-1, per)[inside]
        _issue_store(m, thread, storage, int(first[k]), period, at, kept, tensor_map.storage, octets, adds)


def _store_bulk(m: "Values", call: ir.Call) -> None:
    """Copy consecutive bytes; args: destination, source, bytes, reduction flag, eviction hint."""
    target, source, count, reduce, *_ = call.args
    size = m.uniform(count, "size of a bulk copy")
    storage, first, threads = pointer(m, source, size)
    goal, begin, _ = pointer(m, target, size)
    if storage.kind != "shared" or goal.space is None or size % BULK_ALIGNMENT:
        raise ir.UnsupportedIR(f"bulk store of {size} bytes from {storage.kind} memory")
    adds = bool(m.uniform(reduce, "reduction flag"))
    per = goal.element.bits // 8
    for k, thread in enumerate(threads.tolist()):
        at = storage.base + int(first[k]) + np.arange(size)
        octets = goal.space.slots(goal.base + int(begin[k]) + np.arange(size))
        shape = (-1, per)
        _issue_store(
            m,
            thread,
            storage,
            int(first[k]),
            BULK_ALIGNMENT,
            at,
            at.reshape(shape),
            goal,
            octets.reshape(shape),
            adds,
        )


def _issue_store(
    m: "Values",
    thread: int,
    storage: Storage,
    first: int,
    alignment: int,
    at: np.ndarray,
    kept: np.ndarray,
    goal: Storage,
    octets: np.ndarray,
    adds: bool,
) -> None:
    """Read `at` of shared memory and write its part `kept` to positions `octets` of the tensor."""
    block, who, space = m.block, np.array([thread]), goal.space
    assert space is not None, "a tensor has a space"
    assert storage.space is not None, "shared memory has a space"
    source = storage.space
    agents = {phase: block.clocks.agent(("bulk", phase, thread)) for phase in ("read", "write")}
    reader, writer = (_Issue(m, thread, *agents[phase]) for phase in ("read", "write"))
    reader.aligned(storage, first, alignment, "TMA store")
    access.check_written(block, storage, at[None, :], who)
    reader.record(storage, at, is_write=False)
    if octets.size:
        writer.record(goal, octets.ravel(), is_write=True, is_atomic=adds)
    held: list[np.ndarray] = []

    def read() -> None:
        held.append(source.data[kept].copy())

    def write() -> None:
        values = _added(space.data[octets], held[0], goal.element.name) if adds else held[0]
        space.data[octets] = values
        space.changes += 1

    name = f"TMA store from {storage.name}"
    first_half = Operation(f"{name} (read)", read)
    second_half = Operation(name, write, needs=(first_half,))
    block.pending += [first_half, second_half]
    ids = {p: (np.array([c]), np.array([t], np.int32)) for p, (c, t) in agents.items()}
    block.queues["bulk"].add(Entry(first_half, second_half, who, who, ids))
    block.clocks.release(who)


def _added(old: np.ndarray, new: np.ndarray, name: str) -> np.ndarray:
    """Return the bytes of old + new, elements of type `name`."""
    a, b = (torch.from_numpy(np.ascontiguousarray(x)) for x in (old, new))
    x, y = (dtypes.to_carrier(dtypes.retype(t, "uint8", name), name) for t in (a, b))
    total = dtypes.wrap(x + y, name) if ir.DType(name).is_int else arith.floating("add", x, y)
    return (
        dtypes.to_stored(total, name).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
    )


def _arrive(m: "Values", group: Group, call: ir.Call) -> None:
    m.block.queues["bulk"].commit(m.active[1])


def _wait(m: "Values", group: Group, call: ir.Call) -> Wait:
    """Wait for bulk stores; args: groups left, whether only their sources have to be read."""
    keep = m.uniform(call.args[0], "number of store groups")
    only_read = len(call.args) == 1 or bool(m.uniform(call.args[1], "read flag"))
    phase = "read" if only_read else "write"
    block, (_, threads) = m.block, m.active
    queue = block.queues["bulk"]
    ops = queue.outstanding(threads, keep, phase=phase)

    def finish() -> None:
        queue.settle(threads, keep, block.clocks, phase=phase)

    return Wait(
        "flight", f"its TMA stores but {keep}", lambda: all(op.is_done for op in ops), finish, target=ops
    )


EFFECTS = {
    "tma_load": _load,
    "tma_load_multicast": _load_multicast,
    "tma_store": _store,
    "tma_store_cluster": _store_cluster,
    "tma_store_arrive": _arrive,
    "tma_store_wait": _wait,
}
