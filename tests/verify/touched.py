"""Which bytes a run of the device interpreter touches: by statement, thread and round, as they are touched.

Two looks at one run. What the interpreter says of itself, where it checks an access, with the threads that
make it; and the positions of its memory's arrays that are read and written, whatever it says. The second must
be the first, or what is compared with `verify.access` would not be what happens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from verify import ir
from verify.interp.device import access, atomics, step, wgmma
from verify.interp.device.block import Block, Group
from verify.interp.device.code import Instruction
from verify.interp.device.flight import Operation
from verify.interp.device.memory import Storage

MBARRIER_BYTES = 8
_ONE_WAY = {"atomic_load_elem_op": "r", "atomic_store_elem_op": "w"}  # of atomics; the others do both


@dataclass
class Execution:
    """One statement, executed by some threads of one warpgroup.

    Attributes:
        threads: (n,) ids.
        indices: (n,) values of each launch index, by tag, and of the loops around, outermost first.
    """

    statement: ir.Stmt
    threads: np.ndarray
    launch: dict[str, np.ndarray]
    rounds: list[np.ndarray]


@dataclass
class Touch:
    """Bytes that an execution reads or writes.

    Attributes:
        execution: its number.
        place: the memory: `shared`, or a kind and a name.
        threads: (n,) that touch a row of `octets` each.
        octets: (n, size) positions in `place`.
        operand: A or B of a wgmma; its bytes stand for all of the warp, whose first thread is named.
    """

    execution: int
    place: str
    mode: str
    threads: np.ndarray
    octets: np.ndarray
    operand: str = ""


@dataclass
class Log:
    """What a run did.

    Attributes:
        places: storage variable -> its memory and the byte of it where the storage starts.
        moved: (execution, place, mode) -> positions of the arrays that were really accessed.
    """

    executions: list[Execution] = field(default_factory=list)
    touches: list[Touch] = field(default_factory=list)
    places: dict[ir.Var, tuple[str, int]] = field(default_factory=dict)
    moved: dict[tuple[int, str, str], list[np.ndarray]] = field(default_factory=dict)

    def said(self) -> dict[tuple[int, str, str], set[int]]:
        """Return the bytes of `touches`; those of a local array by thread and byte."""
        found: dict[tuple[int, str, str], set[int]] = {}
        for touch in self.touches:
            if touch.place.startswith("barrier"):  # they have no bytes, but a state
                continue
            key = touch.execution, touch.place, touch.mode
            rows = touch.threads[:, None] if touch.place.startswith("local") else 0
            found.setdefault(key, set()).update((touch.octets + (rows << _THREAD_BIT)).ravel().tolist())
        return found

    def done(self) -> dict[tuple[int, str, str], set[int]]:
        """Return the bytes of `moved`."""
        return {key: set(np.concatenate(parts).tolist()) for key, parts in self.moved.items()}


_THREAD_BIT = 32  # of a position in a local array: the thread is above it


class Watched(np.ndarray):
    """An array that tells `note` of every access through an index."""

    note: Any = None
    ids: Any = None

    def __getitem__(self, index: Any) -> Any:
        """Read elements."""
        if self.note is not None:
            self.note("r", self.ids[index])
        return self.view(np.ndarray)[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        """Write elements."""
        if self.note is not None:
            self.note("w", self.ids[index])
        self.view(np.ndarray)[index] = value


class _Watch:
    def __init__(self, function: ir.Function) -> None:
        self.log = Log()
        self.now = -1  # the execution that accesses memory
        self.atomic = ""
        self.silent = False
        self.around: dict[int, tuple[ir.Stmt, ...]] = {}
        self.rounds: dict[tuple[int, int], np.ndarray] = {}
        self._find_loops(function.body, ())
        self.descriptors = {
            n.buffer.data.name
            for n in ir.walk(function.body)
            if isinstance(n, ir.Alloc) and n.buffer.scope.startswith("local.descriptor")
        }

    def _find_loops(self, node: Any, around: tuple[ir.Stmt, ...]) -> None:
        if isinstance(node, ir.Stmt):
            self.around[id(node)] = around
        if isinstance(node, ir.While):
            around = (*around, node)
            self.around[id(node)] = around  # what its condition reads is read in each round
        inner = (*around, node) if isinstance(node, ir.For) else around
        for child in ir.children(node):
            if isinstance(child, ir.Stmt):
                self._find_loops(child, inner)

    # ------------------------------------------------------------------ executions
    def begin(self, block: Block, group: Group, ins: Instruction) -> None:
        """Note that the active lanes execute an instruction."""
        values, stmt = block.values, ins.stmt
        _, threads = values.active
        if isinstance(stmt, ir.While) and ins.kind in ("start", "next"):
            count = self.rounds.setdefault((block.number, id(stmt)), np.zeros(block.threads, np.int64))
            count[threads] = 0 if ins.kind == "start" else count[threads] + 1
        self.now = len(self.log.executions)
        launch = {launch.tag: values.lanes_of(group.env[launch.var]) for launch in block.run.program.launches}
        rounds = [
            values.lanes_of(group.env[loop.var])
            if isinstance(loop, ir.For)
            else self.rounds[block.number, id(loop)][threads]
            for loop in self.around.get(id(stmt), ())
        ]
        self.log.executions.append(Execution(stmt, threads.copy(), launch, [r.copy() for r in rounds]))

    # ------------------------------------------------------------------ what the interpreter says
    def touch(
        self, place: str, mode: str, threads: np.ndarray, octets: np.ndarray, operand: str = ""
    ) -> None:
        """Note bytes."""
        if place.removeprefix("local ") in self.descriptors:  # 64 bits that stand for memory, and are none
            return
        octets = np.broadcast_to(octets, (len(threads), octets.shape[-1]))
        self.log.touches.append(Touch(self.now, place, mode, np.array(threads), np.array(octets), operand))

    def recorded(
        self, storage: Storage, at: np.ndarray, is_write: bool, threads: np.ndarray, is_atomic: bool
    ) -> None:
        """Note an access that is checked for races."""
        if self.silent:
            return
        place = "shared" if storage.kind == "shared" else f"{storage.kind} {storage.name}"
        modes = "rw" if is_atomic else "w" if is_write else "r"
        for mode in _ONE_WAY.get(self.atomic, modes):
            self.touch(place, mode, threads, at)

    def registers(self, storage: Storage, mode: str, first: Any, size: int, threads: np.ndarray) -> None:
        """Note an access to a local array."""
        start = np.broadcast_to(np.asarray(first), threads.shape)
        self.touch(f"local {storage.name}", mode, threads, start[:, None] + np.arange(size))

    def product(self, part: Any, c: Storage, a: Storage | None) -> None:
        """Note what one warp's part of a wgmma touches."""
        for mode in "rw" if part.scale_out else "w":
            self.registers(c, mode, part.c_first, part.c_bytes, part.threads)
        if a is not None:
            self.registers(a, "r", part.a_first, wgmma.WARP_ROWS, part.threads)
        for name, at in (("A", part.a_at), ("B", part.b_at)):
            if at is not None:
                self.touch("shared", "r", part.threads[:1], at.reshape(1, -1), name)

    # ------------------------------------------------------------------ what happens
    def arrays(self, block: Block) -> None:
        """Watch the memory of a block."""
        for var, storage in block._storages.items():
            where = "shared" if storage.kind == "shared" else f"{storage.kind} {storage.name}"
            self.log.places[var] = where, storage.base
        for storage in (*block._storages.values(), *(t.storage for t in block.run.maps.values())):
            where = "shared" if storage.kind == "shared" else f"{storage.kind} {storage.name}"
            if storage.space is not None:
                storage.space.data = self._watched(storage.space.data, where)
            if storage.registers is not None and storage.name not in self.descriptors:
                storage.registers.data = self._watched(storage.registers.data, where)

    def _watched(self, data: np.ndarray, place: str) -> np.ndarray:
        if isinstance(data, Watched):
            return data
        made = data.view(Watched)
        rows, columns = data.shape if data.ndim > 1 else (1, data.shape[0])
        ids = (np.arange(rows)[:, None] << _THREAD_BIT) + np.arange(columns)
        made.ids = ids if data.ndim > 1 else ids[0]

        def note(mode: str, positions: Any) -> None:
            key = self.now, place, mode
            self.log.moved.setdefault(key, []).append(np.ravel(positions))

        made.note = note
        return made


@contextmanager
def watching(function: ir.Function) -> Iterator[Log]:
    """In this context runs of `function` are logged."""
    watch = _Watch(function)
    record, put = access.record, access.put
    read, write, octets_of = access._read_registers, access._write_registers, access.read_bytes
    launch, apply, barrier = wgmma._launch, atomics.apply, Block.barrier
    allocate, made, complete = Block._allocate, Operation.__init__, Operation.complete

    def recorded(block: Any, storage: Any, at: Any, actor: Any, *, is_write: bool, threads: Any, **more: Any):
        watch.recorded(storage, at, is_write, threads, more.get("is_atomic", False))
        return record(block, storage, at, actor, is_write=is_write, threads=threads, **more)

    def putting(storage: Storage, at: np.ndarray, octets: np.ndarray) -> None:
        space = storage.space
        assert space is not None
        data = space.data
        space.data = data.view(np.ndarray)  # that old bytes are compared with new ones is no access
        put(storage, at, octets)
        space.data = data
        if isinstance(data, Watched):
            data.note("w", at)

    def reading(m: Any, storage: Any, first: Any, size: int, threads: Any, is_partial: bool):
        if not is_partial:
            watch.registers(storage, "r", first, size, threads)
        return read(m, storage, first, size, threads, is_partial)

    def writing(m: Any, storage: Any, first: Any, octets: Any, threads: Any):
        watch.registers(storage, "w", first, octets.shape[1], threads)
        write(m, storage, first, octets, threads)

    def generic(m: Any, storage: Any, first: Any, size: int, threads: Any, is_partial: bool = False):
        watch.silent = is_partial  # the rest of a byte of which one code is written
        found = octets_of(m, storage, first, size, threads, is_partial)
        watch.silent = False
        return found

    def launching(m: Any, warp: int, part: Any, c: Any, a: Any, shared: Any):
        watch.product(part, c, a)
        watch.silent = True  # there A is checked as a whole, for each of the four warps
        launch(m, warp, part, c, a, shared)
        watch.silent = False

    def atomic(m: Any, node: ir.Call):
        watch.atomic = node.op
        found = apply(m, node)
        watch.atomic = ""
        return found

    def barriers(block: Block, node: ir.Expr):
        found = barrier(block, node)
        for one, threads in found:
            data, index = next(key for key, b in block.mbarriers.items() if b is one)
            octets = index * MBARRIER_BYTES + np.arange(MBARRIER_BYTES)
            for mode in "rw":
                watch.touch(f"barrier {block.storage(data).name}", mode, threads, octets[None, :])
        return found

    def allocating(block: Block) -> None:
        allocate(block)
        watch.arrays(block)

    def issued(op: Any, *args: Any, **more: Any) -> None:
        made(op, *args, **more)
        op.issued = watch.now

    def completing(op: Any) -> None:
        watch.now = op.issued
        complete(op)

    def begun(handler: Any):
        def run(block: Block, group: Group, ins: Instruction) -> None:
            watch.begin(block, group, ins)
            handler(block, group, ins)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for kind, handler in list(step._HANDLERS.items()):
            patch.setitem(step._HANDLERS, kind, begun(handler))
        for owner, name, new in (
            (access, "record", recorded), (access, "put", putting), (access, "read_bytes", generic),
            (access, "_read_registers", reading), (access, "_write_registers", writing),
            (wgmma, "_launch", launching), (atomics, "apply", atomic), (Block, "barrier", barriers),
            (Block, "_allocate", allocating), (Operation, "__init__", issued),
            (Operation, "complete", completing),
        ):  # fmt: skip
            patch.setattr(owner, name, new)
        yield watch.log
