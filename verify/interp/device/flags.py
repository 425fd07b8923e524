"""Signals through memory: what an atomic write releases and a later atomic read acquires; waiting for one.

A location holds, beside its value, what the writers of its release sequence knew when they released it: a
release store starts it, a read-modify-write of any thread carries it on and adds to it if it releases, any
other store ends it. An acquire that reads the location knows it from then on, and so do threads that meet
the reader at a barrier. Fences do the same for relaxed operations around them. Scope is the device.

A loop that waits changes nothing but what it reads. A group that comes to the loop's condition twice in the
same state therefore waits until memory changes; if nothing can run, that is a deadlock.
"""

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from verify import ir
from verify.interp.device.clocks import Rows
from verify.interp.device.memory import Space

if TYPE_CHECKING:
    from verify.interp.device.block import Block, Group, Wait
    from verify.interp.device.code import Instruction

RELAXED, CONSUME, ACQUIRE, RELEASE, ACQ_REL, SEQ_CST = range(6)  # as TileLang numbers them
_ACQUIRES = frozenset({CONSUME, ACQUIRE, ACQ_REL, SEQ_CST})
_RELEASES = frozenset({RELEASE, ACQ_REL, SEQ_CST})
FENCES = frozenset({"__threadfence", "__threadfence_system"})


def order_of(call: ir.Call) -> int:
    """Return the memory order that an atomic operation is compiled with; one that names none is relaxed.

    TileLang 0.1.15's AtomicAdd, of everything but 16-bit floats, is CUDA's plain atomicAdd whatever order it
    is given; only the form that returns the old value has one.

    Raises:
        UnsupportedIR: the order is not a constant of those above.
    """
    if call.op == "atomic_add_elem_op" and _element(call.args[0]) not in ("float16", "bfloat16"):
        return RELAXED
    position = 1 if call.op == "atomic_load_elem_op" else 2
    if len(call.args) <= position:
        return RELAXED
    node = call.args[position]
    if not isinstance(node, ir.Const) or not RELAXED <= int(node.value) <= SEQ_CST:
        raise ir.UnsupportedIR(f"memory order of {call.op}")
    return int(node.value)


def _element(pointer: ir.Expr) -> str:
    match pointer:
        case ir.AccessPtr(element=element):
            return element.name
        case ir.Call(op="address_of", args=(ir.Load(buffer=buffer),)):
            return buffer.dtype.name
    raise ir.UnsupportedIR("atomic on a computed pointer")


def signals(body: ir.Stmt) -> bool:
    """Whether blocks of a kernel may wait for each other, or order accesses, through memory."""
    for node in ir.walk(body):
        if isinstance(node, ir.Call) and node.op.startswith("atomic") and order_of(node) != RELAXED:
            return True
        if isinstance(node, ir.Call) and fence_of(node):
            return True
        if isinstance(node, ir.While) and any(
            isinstance(n, ir.Call) and n.op.startswith("atomic") for n in ir.walk(node)
        ):
            return True
    return False


def fence_of(call: ir.Call) -> bool:
    """Whether a call is a memory fence."""
    name = call.args[0] if call.op == "call_extern" and call.args else None
    return isinstance(name, ir.Str) and name.value in FENCES


class Flags:
    """The release sequences of a launch, and what fences hold for relaxed operations.

    Attributes:
        released: by space and address: what the location's writers released.
        fenced: by block and thread: what its last fence released, for relaxed writes after it.
        observed: by block and thread: what relaxed reads have seen, for a fence after them.
    """

    def __init__(self) -> None:
        """Start with nothing released."""
        self.released: dict[tuple[int, int], Rows] = {}
        self.fenced: dict[tuple[int, int], Rows] = {}
        self.observed: dict[tuple[int, int], Rows] = {}

    def read(self, block: "Block", thread: Any, space: Space, address: int, order: int) -> None:
        """Note that a thread's atomic operation has read a location."""
        rows = self.released.get((id(space), address))
        if rows is None:
            return
        if order in _ACQUIRES:
            block.clocks.acquire(thread, rows)
        else:
            key = block.number, int(thread[0])
            self.observed[key] = block.clocks.join(self.observed.get(key), rows)

    def write(
        self, block: "Block", thread: Any, space: Space, address: int, order: int, *, is_update: bool
    ) -> None:
        """Note that a thread's atomic operation has written a location; `is_update` if it read it as well."""
        place = id(space), address
        kept = self.released.get(place) if is_update else None
        mine = self.fenced.get((block.number, int(thread[0])))
        if order in _RELEASES:
            mine = block.clocks.release(thread)
        if mine is not None:
            kept = block.clocks.join(kept, mine)
        if kept is None:
            self.released.pop(place, None)
        else:
            self.released[place] = kept

    def fence(self, block: "Block", threads: Any) -> None:
        """Run a memory fence by each of `threads`."""
        for position in range(len(threads)):
            thread = threads[position : position + 1]
            key = block.number, int(thread[0])
            seen = self.observed.pop(key, None)
            if seen is not None:
                block.clocks.acquire(thread, seen)
            self.fenced[key] = block.clocks.release(thread)


def spins(block: "Block", group: "Group", ins: "Instruction") -> "Wait | None":
    """At the condition of a While: return a wait for memory if nothing has changed since the last time."""
    from verify.interp.device.block import Wait

    run = block.run
    spaces = [s.space for s in run.tensors.values() if s.space is not None]
    spaces += [block.shared] if block.shared is not None else []

    def version() -> int:
        return sum(space.changes for space in spaces)

    state = hashlib.blake2b(digest_size=16)
    for key, value in group.env.items():
        octets = value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
        state.update(f"{id(key)}:".encode() + octets)
    for storage in block.local_storages():
        state.update(storage.data[group.active].tobytes())
    now = version()
    before = group.spins.get(ins.number)
    group.spins[ins.number] = now, state.digest()
    if before != group.spins[ins.number]:
        return None
    return Wait("memory", "memory to change", lambda: version() != now, span=ins.span)
