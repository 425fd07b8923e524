"""One thread block: its threads in groups, its memory, barriers and operations in flight."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from verify import ir
from verify.interp.device import errors
from verify.interp.device.barriers import Mbarrier, NamedBarrier
from verify.interp.device.clocks import Clocks
from verify.interp.device.flight import Operation, Queue
from verify.interp.device.memory import POISON, Registers, Space, Storage
from verify.interp.device.shadow import Actor, Shadow
from verify.interp.device.values import Values

if TYPE_CHECKING:
    from verify.interp.device.cluster import Cluster
    from verify.interp.device.run import Run

ARENA_ALIGNMENT = 1024  # of buf_dyn_shmem in the CUDA text
STATIC_ALIGNMENT = 16
MBARRIER_BITS = 64


@dataclass(eq=False)
class Join:
    """Where groups that parted meet again.

    Attributes:
        pc: the instruction.
        mask: lanes that will come.
        arrived: groups that wait there.
    """

    pc: int
    mask: torch.Tensor
    arrived: list["Group"] = field(default_factory=list)


@dataclass(eq=False)
class Wait:
    """What a group waits for.

    Attributes:
        kind: barrier, mbarrier, memory, flight, join, warp.
        text: for a report.
        is_ready: whether it may go on.
        finish: run when it goes on.
        span: of the statement.
    """

    kind: str
    text: str
    is_ready: Callable[[], bool]
    finish: Callable[[], None] = lambda: None
    span: ir.Span | None = None
    target: Any = None


@dataclass(eq=False)
class Group:
    """Lanes of one wave that run together.

    Attributes:
        wave: number of the wave; its lanes are `threads`.
        mask: the lanes of this group.
        env: values of variables.
        joins: where its lanes meet others, innermost last.
        is_whole: whether it has all lanes of its wave.
        spins: by loop that waits for memory: (changes of memory, digest of its state) at its condition.
    """

    wave: int
    threads: np.ndarray
    mask: torch.Tensor
    env: dict[Any, Any]
    pc: int = 0
    joins: list[Join] = field(default_factory=list)
    wait: Wait | None = None
    is_done: bool = False
    is_whole: bool = True
    spins: dict[int, tuple[int, bytes]] = field(default_factory=dict)

    @property
    def active(self) -> np.ndarray:
        """Thread ids of its lanes."""
        return self.threads[self.mask.numpy()]


class Block:
    """The state of one thread block.

    Attributes:
        run: the launch.
        number, index: linear and (x, y, z) index in the grid.
        groups: those that have not exited, in no order of importance.
        pending: operations in flight that are not complete.
        exited: per thread.
        cluster, rank: the cluster it is part of, and its number there.
        cluster_arrivals, cluster_waits: of each thread at the cluster's barrier.
        visits: clock and statement of the last access by each agent of another block to shared memory here.
    """

    cluster: "Cluster"

    def __init__(
        self, run: "Run", number: int, index: tuple[int, int, int], clocks: Clocks | None = None
    ) -> None:
        """Set up memory and threads at the kernel's first instruction; `clocks` if blocks share them."""
        self.run, self.number, self.index = run, number, index
        self.threads = math.prod(run.block_shape)
        self.clocks = Clocks(self.threads) if clocks is None else clocks
        self.values = Values(self)
        self.exited = np.zeros(self.threads, bool)
        self.pending: list[Operation] = []
        self.named: dict[int, NamedBarrier] = {}
        self.mbarriers: dict[tuple[ir.Var, int], Mbarrier] = {}
        self.queues = {name: Queue(self.threads) for name in ("cp.async", "wgmma", "bulk")}
        self.wgmma_fences = np.zeros(self.threads, np.int32)
        self.wgmma_log: dict[int, list[Any]] = {}  # warp -> instructions issued
        self.last_wgmma: dict[int, Operation] = {}
        self.shared: Space | None = None
        self.rank = 0
        self.cluster_arrivals, self.cluster_waits = (np.zeros(self.threads, np.int64) for _ in range(2))
        self.visits: dict[int, tuple[int, int]] = {}
        self.statement = 0
        self.span: ir.Span | None = None
        self._uses: Counter[tuple[int, int]] = Counter()
        self._storages: dict[ir.Var, Storage] = dict(run.tensors)
        self._allocate()
        self.groups = self._waves()

    # ------------------------------------------------------------------ set-up
    def _allocate(self) -> None:
        run, offset, number = self.run, 0, 1
        shared: list[tuple[ir.Buffer, int]] = []
        for buffer in run.program.allocs:
            size_bits = self._size_bits(buffer)
            if buffer.scope.startswith("local"):
                tracked = run.uses_wgmma and not buffer.scope.startswith("local.descriptor")
                registers = Registers.of(self.threads, -(-size_bits // 8), tracked)
                self._storages[buffer.data] = Storage(
                    buffer.name, "local", buffer.dtype, size_bits, registers=registers
                )
            elif buffer.scope in ("shared.barrier", "shared.cluster_barrier"):
                self._storages[buffer.data] = Storage(buffer.name, "barrier", buffer.dtype, size_bits)
                offset += -(-size_bits // 8)
            elif buffer.scope in ("shared", "shared.dyn"):
                if buffer.scope == "shared.dyn" and run.dynamic_bytes is not None:
                    size_bits = min(size_bits, 8 * run.dynamic_bytes)  # what there is, whatever is declared
                shared.append((buffer, size_bits))
            else:
                raise ir.UnsupportedIR(f"allocation of scope {buffer.scope}")
        shared.sort(key=lambda s: s[0].scope == "shared.dyn")  # the dynamic arena comes last
        placed = []
        for buffer, size_bits in shared:
            step = ARENA_ALIGNMENT if buffer.scope == "shared.dyn" else STATIC_ALIGNMENT
            offset = -(-offset // step) * step
            placed.append((buffer, offset, size_bits))
            offset += -(-size_bits // 8)
        if not placed:
            return
        shadow = Shadow(offset, self.clocks) if run.checks.races else None
        space = self.shared = Space(np.full(offset, POISON, np.uint8), False, shadow)
        for buffer, base, size_bits in placed:
            self._storages[buffer.data] = Storage(
                buffer.name, "shared", buffer.dtype, size_bits, space, base, number
            )
            number += 1
        for var, call in run.program.views.items():
            self._view(var, call, number)
            number += 1

    def _view(self, var: ir.Var, call: ir.Call, number: int) -> None:
        base, offset = call.args
        arena = self._storages.get(base) if isinstance(base, ir.Var) else None
        if arena is None or not isinstance(offset, ir.Const):
            raise ir.UnsupportedIR(f"computed pointer {var.name}")
        start = int(offset.value)
        element, bits = self.run.view_sizes.get(var, (ir.DType("uint8"), arena.size_bits - start * 8))
        if start * 8 + bits > arena.size_bits:
            bits = max(arena.size_bits - start * 8, 0)  # what lies beyond the arena is out of bounds
        self._storages[var] = Storage(
            var.name, "shared", element, bits, arena.space, arena.base + start, number
        )

    def _size_bits(self, buffer: ir.Buffer) -> int:
        count = 1
        for extent in buffer.shape:
            count *= self.run.integer(extent)
        return count * buffer.dtype.bits

    def _waves(self) -> list[Group]:
        width, groups = self.run.wave_threads, []
        nx, ny, _ = self.run.block_shape
        for wave, first in enumerate(range(0, self.threads, width)):
            threads = np.arange(first, min(first + width, self.threads))
            lanes = torch.from_numpy(threads)
            env: dict[Any, Any] = dict(self.run.dims)
            for launch in self.run.program.launches:
                tag = launch.tag
                if tag.startswith("blockIdx."):
                    env[launch.var] = self.index["xyz".index(tag[-1])]
                    continue
                extent = self.run.block_shape["xyz".index(tag[-1])]
                position = {"x": lanes % nx, "y": lanes // nx % ny, "z": lanes // (nx * ny)}[tag[-1]]
                env[launch.var] = 0 if extent == 1 else position
            groups.append(Group(wave, threads, torch.ones(len(threads), dtype=torch.bool), env))
        return groups

    def close(self) -> None:
        """Let go of its memory, whose shadow takes hundreds of megabytes: it is part of many cycles."""
        self.shared = None
        self._storages.clear()
        self.pending.clear()
        self.queues.clear()
        self.last_wgmma.clear()
        self.wgmma_log.clear()
        self.mbarriers.clear()
        self.groups.clear()

    # ------------------------------------------------------------------ look-up
    def storage(self, data: ir.Var) -> Storage:
        """Return the memory behind a pointer.

        Raises:
            UnsupportedIR: it is no parameter, allocation or view.
        """
        found = self._storages.get(data)
        if found is None:
            raise ir.UnsupportedIR(f"storage of {data.name} is not known")
        return found

    def local_storages(self) -> list[Registers]:
        """Return the register arrays of its threads."""
        return [s.registers for s in self._storages.values() if s.registers is not None]

    def shared_storage(self, address: int) -> Storage | None:
        """Return the allocation that a byte of shared memory belongs to: the one it was written through."""
        found = None
        for storage in self._storages.values():
            if storage.kind == "shared" and storage.base <= address < storage.base + storage.size_bytes:
                owner = self.shared.owner if self.shared is not None else None
                if owner is not None and owner[address] == storage.number:
                    return storage
                if found is None or storage.size_bits < found.size_bits:
                    found = storage
        return found

    def barrier(self, node: ir.Expr) -> list[tuple[Mbarrier, np.ndarray]]:
        """Return the mbarriers that the active lanes name, and the threads that name each.

        Raises:
            OutOfBoundsError: the index is outside of the array.
        """
        if not isinstance(node, ir.Load) or len(node.indices) != 1:
            raise ir.UnsupportedIR("mbarrier that is no element of a barrier array")
        storage = self.storage(node.buffer.data)
        if storage.kind != "barrier":
            raise ir.UnsupportedIR(f"mbarrier in {storage.kind} memory")
        _, threads = self.values.active
        index = self.values.lanes_of(self.values.address(node.indices[0]))
        count = storage.size_bits // MBARRIER_BITS
        bad = (index < 0) | (index >= count)
        if bad.any():
            at = int(index[bad][0]) * MBARRIER_BITS // 8
            text = f"mbarrier {int(index[bad][0])} of {count}"
            raise self.fault(errors.BarrierIndexError, text, threads[bad], storage, at, MBARRIER_BITS // 8)
        found = []
        for value in np.unique(index).tolist():
            found.append((self.mbarrier(node.buffer.data, value), threads[index == value]))
        return found

    def mbarrier(self, data: ir.Var, index: int) -> Mbarrier:
        """Return element `index` of an array of mbarriers, which has it."""
        key = (data, index)
        if key not in self.mbarriers:
            of = f" of block {self.number}" if len(self.cluster.blocks) > 1 else ""
            self.mbarriers[key] = Mbarrier(f"{self.storage(data).name}[{index}]{of}", key)
        return self.mbarriers[key]

    def counterpart(self, storage: Storage, peer: "Block") -> Storage:
        """Return the allocation of `peer` at the place of one of this block's."""
        data = next(var for var, found in self._storages.items() if found is storage)
        return peer.storage(data)

    def note_landing(self, barrier: Mbarrier, threads: np.ndarray, phase: int, statement: int) -> None:
        """Note the phase of an mbarrier that a use of it by `threads` fell in, where that is asked for."""
        if self.run.landings is None:
            return
        for thread in threads.tolist():
            count = self._uses[statement, thread]
            self._uses[statement, thread] += 1
            self.run.landings[self.number, statement, thread, count] = barrier.name, phase

    def actor(
        self, components: np.ndarray, clocks: np.ndarray, known: np.ndarray, fenced: np.ndarray | None
    ) -> Actor:
        """Return who accesses memory in the statement that runs."""
        # Blocks that share clocks are told apart by components alone.
        first = self.cluster.blocks[0].number
        block, epoch = (0, 0) if self.run.shares_clocks else (first, self.run.epoch)
        return Actor(components, clocks, known, fenced, block, epoch, self.statement)

    def agent_name(self, component: int) -> str:
        """Return what a clock component stands for."""
        if component >= self.run.clocked_threads:
            return "an asynchronous operation"
        position, thread = divmod(component, self.threads)
        if self.run.shares_clocks:
            return f"thread {thread} of block {list(self.run.windows)[position]}"
        blocks = self.cluster.blocks
        return f"thread {thread}" + (f" of block {blocks[position].number}" if len(blocks) > 1 else "")

    # ------------------------------------------------------------------ faults
    def fault(
        self,
        kind: type[errors.DeviceError],
        reason: str,
        threads: np.ndarray | tuple[int, ...] = (),
        storage: Storage | None = None,
        address: int | None = None,
        size: int | None = None,
        *,
        other: ir.Span | None = None,
        span: ir.Span | None = None,
    ) -> errors.DeviceError:
        """Return a fault at the statement that runs."""
        where = errors.Where(
            span or self.span,
            other,
            self.index,
            tuple(int(t) for t in threads),
            storage.name if storage is not None else "",
            address,
            size,
        )
        return kind(reason, where)
