"""A launch: tensors, grid, and the loop that runs groups and completes operations."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from verify import host, ir
from verify.interp.device import errors, flags, tma
from verify.interp.device.barriers import Mbarrier
from verify.interp.device.block import Block, Group
from verify.interp.device.clocks import Clocks, Rows
from verify.interp.device.cluster import Cluster
from verify.interp.device.code import Program, flatten
from verify.interp.device.flight import Operation
from verify.interp.device.memory import Space, SparseSpace, Storage
from verify.interp.device.schedule import Policy
from verify.interp.device.shadow import Shadow
from verify.interp.device.step import release, step
from verify.interp.device.values import Values

MAX_THREADS = 1024
MAX_CLOCKED_THREADS = 4096  # of blocks that signal each other: each thread has a row of all their clocks
MAX_CLUSTER = 8  # blocks, without an attribute that allows more
MAX_GRID = (2**31 - 1, 65535, 65535)
WARP = 32
DEFAULT_MAX_STEPS = 200_000_000


@dataclass(frozen=True)
class Checks:
    """What a run looks for besides bounds, barriers and deadlock, which it always does.

    Attributes:
        races: data races, proxy fences, registers in flight.
        uninitialised: reads of bytes that nothing wrote.
        alignment: of vector accesses, copies and descriptors.
        overflow: of integer arithmetic on addresses.
        names: also of arithmetic on integers that get a name, wherever they are used.
        products: compute what wgmma multiplies, and not 0: for runs whose results nobody looks at.
    """

    races: bool = True
    uninitialised: bool = True
    alignment: bool = True
    overflow: bool = True
    names: bool = False
    products: bool = True


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        kernel, policy, seed: what was run, and how.
        blocks, steps: thread blocks, and instructions of groups.
        operations: asynchronous ones.
        schedule: digest of every choice that was made.
        seconds: of wall time.
    """

    kernel: str
    policy: str
    seed: int
    blocks: int
    steps: int
    operations: int
    schedule: str
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class Tensor:
    """A tensor argument: its bytes, or (for replay) how to make them where they are touched.

    Attributes:
        data: uint8, None for a sparse tensor.
        size_bits: in elements' bits.
        fill: contents of a sparse tensor: (first byte, bytes) -> uint8.
    """

    size_bits: int
    data: np.ndarray | None
    fill: Callable[[int, int], np.ndarray] | None = None


class Run:
    """One launch of a device function.

    Attributes:
        program: the instructions.
        tensors: memory of each pointer parameter.
        dims: values of integer parameters, device and host.
        read, written: names of tensors that the kernel reads, and writes.
        maps: TMA descriptors.
        epoch: grid-wide synchronisations so far.
        shares_clocks: blocks signal each other through memory: they run together, and know of each other.
        clocked_threads: threads that share clocks; `windows`: the part of each block.
        cluster_shape: blocks of a cluster, x first.
        flags: what those signals carry.
        dynamic_bytes: of shared memory that the host asks for, None if it does not say.
        landings: None, or of each use of an mbarrier its name and the phase that it fell in, by block,
            statement, thread and how often that thread had come there.
    """

    def __init__(
        self,
        device: ir.Function,
        launch: host.Host,
        tensors: Mapping[str, Tensor],
        dims: Mapping[str, int],
        *,
        policy: Policy,
        seed: int,
        checks: Checks,
        view_sizes: Mapping[ir.Var, tuple[ir.DType, int]],
        max_steps: int = DEFAULT_MAX_STEPS,
        wave_threads: int = WARP,
    ) -> None:
        """Prepare the launch; `tensors` by the names of the kernel's parameters.

        Raises:
            UnsupportedIR: the kernel holds something without a meaning here.
            LaunchError: the driver would refuse the launch.
        """
        self.device, self.policy, self.seed, self.checks = device, policy, seed, checks
        self.program: Program = flatten(device)
        self.rng = np.random.default_rng(seed)
        self.elected_lane = 0 if policy.elects_first else int(self.rng.integers(WARP))
        self.uses_wgmma = any(op.startswith("ptx_wgmma") for op in self.program.ops)
        self.view_sizes, self.wave_threads, self.max_steps = view_sizes, wave_threads, max_steps
        self.named = dict(dims)
        self.dims: dict[ir.Var, int] = {p: dims[p.name] for p in device.params if p.dtype.is_int}
        self.tensors = self._bind(launch, tensors)
        stored = {t.name: self.tensors[p] for p, t in launch.tensors.items()}
        for descriptor in launch.descriptors.values():
            name = descriptor.tensor.name  # what no thread touches but through a descriptor
            is_written = name in self.written
            stored.setdefault(name, self._storage(descriptor.tensor, tensors, is_written, name in self.read))
        self.maps = {
            p: tma.decode(d, stored[d.tensor.name], self.integer) for p, d in launch.descriptors.items()
        }
        self.grid, self.block_shape = self._extents(launch)
        self.cluster_shape = self._cluster_shape(launch)
        dynamic = launch.extents.get("dynamic_shared")
        self.dynamic_bytes = None if dynamic is None else self.integer(dynamic)
        self.steps = self.operations = self.epoch = self.grid_arrived = self.grid_threads = 0
        self.grid_rows: dict[int, Rows] = {}
        self.shares_clocks, self.flags = flags.signals(device.body), flags.Flags()
        self.clocked_threads = math.prod(self.block_shape) * self.cluster_size
        self.windows: dict[int, Clocks] = {}
        self.landings: dict[tuple[int, int, int, int], tuple[str, int]] | None = None
        self._digest = hashlib.blake2b(digest_size=8)

    # ------------------------------------------------------------------ set-up
    def integer(self, node: ir.Expr) -> int:
        """Return an expression over shape parameters."""
        if isinstance(node, ir.Const):
            return int(node.value)
        scalar = Values.__new__(Values)
        Values.__init__(scalar, None)  # type: ignore[arg-type]
        scalar.threads = np.zeros(1, np.int64)
        scalar.env = _ByName(self.named)  # type: ignore[assignment]
        value = scalar.evaluate(node)
        return int(value)  # type: ignore[arg-type]

    def _bind(self, launch: host.Host, tensors: Mapping[str, Tensor]) -> dict[ir.Var, Storage]:
        written, read = _uses(self.device, launch)
        self.read, self.written = read, written
        found: dict[ir.Var, Storage] = {}
        for param, buffer in launch.tensors.items():
            shared = buffer.name in written
            found[param] = self._storage(buffer, tensors, shared, buffer.name in read)
        return found

    def _storage(
        self, buffer: ir.Buffer, tensors: Mapping[str, Tensor], is_written: bool, is_read: bool = True
    ) -> Storage:
        given = tensors[buffer.name]
        size = 0 if given.data is None else len(given.data)
        shadow = Shadow(size, None, reads=is_read) if is_written and self.checks.races else None
        if given.data is not None:
            space = Space(given.data, True, shadow)
        else:
            assert given.fill is not None, "a sparse tensor has contents"
            space = SparseSpace(shadow, given.fill)
        return Storage(buffer.name, "global", buffer.dtype, given.size_bits, space)

    def _extents(self, given: host.Host) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Return grid and block as the host launches them; the device function says what it is made for."""
        made = {launch.tag: self.integer(launch.extent) for launch in self.program.launches}
        passed = {tag: self.integer(e) for tag, e in given.extents.items() if tag in made}
        extents = {**made, **passed}
        grid = tuple(extents.get(f"blockIdx.{a}", 1) for a in "xyz")
        block = tuple(extents.get(f"threadIdx.{a}", 1) for a in "xyz")
        total = block[0] * block[1] * block[2]
        if not 0 < total <= MAX_THREADS or any(
            not 0 <= g <= limit for g, limit in zip(grid, MAX_GRID, strict=True)
        ):
            raise errors.LaunchError(f"launch of a grid {grid} of blocks {block}", errors.Where())
        bound = math.prod(extent for tag, extent in made.items() if tag.startswith("threadIdx."))
        if total > bound:
            text = f"launch of {total} threads a block of a kernel made for {bound}"
            raise errors.LaunchError(text, errors.Where())
        return grid, block  # type: ignore[return-value]

    def _cluster_shape(self, given: host.Host) -> tuple[int, ...]:
        """Return the blocks of a cluster as the host launches it, which counts, or as it was made for."""
        made = self.device.attrs.get("cluster_dims") or (1, 1, 1)
        shape = tuple(
            self.integer(passed) if isinstance(passed, ir.Expr) else int(passed)
            for passed in (
                given.extents.get(f"tir.cluster_dim_{a}", n) for a, n in zip("xyz", made, strict=True)
            )
        )
        size = math.prod(shape)
        if not 0 < size <= MAX_CLUSTER or any(g % c for g, c in zip(self.grid, shape, strict=True)):
            text = f"launch of a grid {self.grid} in clusters of {shape} blocks"
            raise errors.LaunchError(text, errors.Where())
        return shape

    @property
    def cluster_size(self) -> int:
        """Blocks of a cluster."""
        return math.prod(self.cluster_shape)

    # ------------------------------------------------------------------ running
    def execute(self, only: "list[int] | None" = None, resident: int | None = None) -> Summary:
        """Run the grid, or the blocks whose linear numbers are given.

        Of blocks that may wait for each other, `resident` fit the chip together; None: all. Another starts
        when one has ended. A cluster of which one block is given runs whole.

        Raises:
            DeviceError: the first fault.
            UnsupportedOpError: something without a meaning here.
        """
        began = time.perf_counter()
        count = self.grid[0] * self.grid[1] * self.grid[2]
        numbers = list(range(count)) if only is None else only
        if not self.policy.elects_first:
            numbers = [numbers[i] for i in self.rng.permutation(len(numbers))]
        clusters = list(dict.fromkeys(self._cluster_of(n) for n in numbers))
        numbers = [n for cluster in clusters for n in cluster]
        if self.runs_together:
            if resident is not None and self.cluster_size > 1:
                raise ir.UnsupportedIR("clusters of which not all run together")
            self._share_clocks(numbers)
            waiting = [b for cluster in clusters for b in self._blocks(cluster)]
            self.grid_threads = sum(b.threads for b in waiting)
            self._together(waiting, resident)
        else:
            for cluster in clusters:
                self._together(self._blocks(cluster))
        return Summary(
            self.device.name,
            self.policy.name,
            self.seed,
            len(numbers),
            self.steps,
            self.operations,
            self._digest.hexdigest(),
            time.perf_counter() - began,
        )

    @property
    def runs_together(self) -> bool:
        """Whether blocks may wait for each other."""
        return "sync_grid" in self.program.ops or self.shares_clocks

    def _share_clocks(self, numbers: list[int]) -> None:
        if not self.shares_clocks or not numbers:
            return
        self.clocked_threads = math.prod(self.block_shape) * len(numbers)
        self._window(numbers)

    def _window(self, numbers: Sequence[int]) -> None:
        """Give these blocks clocks of one board."""
        threads = math.prod(self.block_shape)
        if threads * len(numbers) > MAX_CLOCKED_THREADS:
            text = f"{threads * len(numbers)} threads whose blocks signal each other"
            raise ir.UnsupportedIR(f"{text} (at most {MAX_CLOCKED_THREADS})")
        board = Clocks(threads, len(numbers))
        self.windows = {number: board.window(position) for position, number in enumerate(numbers)}

    def _index(self, number: int) -> tuple[int, int, int]:
        nx, ny, _ = self.grid
        return number % nx, number // nx % ny, number // (nx * ny)

    def _cluster_of(self, number: int) -> tuple[int, ...]:
        """Return the linear numbers of the blocks of a block's cluster, by rank."""
        (nx, ny, _), (cx, cy, cz) = self.grid, self.cluster_shape
        x, y, z = (i - i % c for i, c in zip(self._index(number), self.cluster_shape, strict=True))
        return tuple(
            x + i + nx * (y + j + ny * (z + k)) for k in range(cz) for j in range(cy) for i in range(cx)
        )

    def _blocks(self, numbers: Sequence[int]) -> list[Block]:
        """Return the blocks of a cluster, at their first instruction."""
        if len(numbers) > 1 and not self.shares_clocks:
            self._window(numbers)
        cluster = Cluster()
        for number in numbers:
            cluster.add(self._block(number))
        return cluster.blocks

    def _block(self, number: int) -> Block:
        shared = self.windows.get(number)
        block = Block(self, number, self._index(number), shared)
        if shared is not None and shared.first:
            return block
        for storage in {id(s.space): s for s in self.tensors.values()}.values():
            if storage.space is not None and storage.space.shadow is not None:
                storage.space.shadow.new_block(block.clocks)
        return block

    def _together(self, waiting: list[Block], resident: int | None = None) -> None:
        """Run blocks until all their threads have exited and nothing is in flight."""
        blocks, waiting = waiting[:resident], waiting[len(waiting[:resident]) :]
        while True:
            if waiting and (ended := [b for b in blocks if not b.groups and not b.pending]):
                for block in ended:
                    _check_end(block)
                    block.close()
                    blocks.remove(block)
                blocks += waiting[: len(ended)]
                del waiting[: len(ended)]
            groups = [(b, g) for b in blocks for g in b.groups if g.wait is None or g.wait.is_ready()]
            groups.sort(key=lambda pair: (pair[0].number, pair[1].wave, int(pair[1].mask.int().argmax())))
            pending = [(b, op) for b in blocks for op in b.pending if op.can_complete]
            if not groups and not pending:
                if self._relax(blocks):
                    continue
                if any(b.groups for b in blocks):
                    raise _stuck(blocks, len(waiting))
                for block in blocks:
                    _check_end(block)
                    block.close()
                return
            choice = self.policy.choose(self.rng, [g for _, g in groups], [op for _, op in pending])
            if isinstance(choice, Operation):
                block = next(b for b, op in pending if op is choice)
                self._note(b"o", [op for _, op in pending].index(choice))
                block.pending.remove(choice)
                self.operations += 1
                choice.complete()
            else:
                group, turn = choice
                block = next(b for b, g in groups if g is group)
                self._note(b"g", [g for _, g in groups].index(group))
                self._turn(block, group, turn)

    def _turn(self, block: Block, group: Group, turn: int) -> None:
        """Run a group for some instructions, or until it waits or something new is in flight."""
        in_flight = len(block.pending)
        for _ in range(turn):
            step(block, group)
            self.steps += 1
            if self.steps > self.max_steps:
                raise block.fault(errors.StepLimitError, f"no end after {self.max_steps} steps", group.active)
            if group.is_done or group not in block.groups:
                return
            if group.wait is not None and not group.wait.is_ready():
                return
            if len(block.pending) != in_flight and self.policy.parts_at_copies:
                return

    def _note(self, kind: bytes, index: int) -> None:
        self._digest.update(kind + index.to_bytes(4, "little"))

    def _relax(self, blocks: list[Block]) -> bool:
        """Nothing can run: let lanes that wait for the rest of their warp go on without it."""
        for block in blocks:
            for group in block.groups:
                if group.wait is not None and group.wait.kind == "join":
                    release(block, group.wait.target)
                    return True
        return False


class _ByName(dict):
    """Values of shape parameters, by the name of the variable."""

    def __init__(self, named: Mapping[str, int]) -> None:
        super().__init__()
        self._named = named

    def __contains__(self, key: object) -> bool:
        return (isinstance(key, ir.Var) and key.name in self._named) or dict.__contains__(self, key)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, ir.Var) and key.name in self._named:
            return self._named[key.name]
        return dict.__getitem__(self, key)


def _uses(device: ir.Function, launch: host.Host) -> tuple[set[str], set[str]]:
    """Return names of the tensors that the kernel writes and that it reads."""
    names = {p: b.name for p, b in launch.tensors.items()}
    maps = {p: d.tensor.name for p, d in launch.descriptors.items()}
    written: set[str] = set()
    read: set[str] = set()
    for node in ir.walk(device.body):
        match node:
            case ir.Store(buffer=buffer) if buffer.data in names:
                written.add(names[buffer.data])
            case ir.Load(buffer=buffer) if buffer.data in names:
                read.add(names[buffer.data])
            case ir.AccessPtr(data=data, mode=mode) if data in names:
                written |= {names[data]} if "w" in mode else set()
                read |= {names[data]} if "r" in mode else set()
            case ir.Call(op="tma_store", args=(ir.Var() as first, *_)) if first in maps:
                written.add(maps[first])
            case ir.Call(op="tma_load" | "tma_load_multicast", args=(ir.Var() as first, *_)) if first in maps:
                read.add(maps[first])
            case ir.Call(op=op, args=args) if op.startswith("atomic"):
                inner = {n.buffer.data for a in args for n in ir.walk(a) if isinstance(n, ir.Load)}
                written |= {names[d] for d in inner if d in names}
            case _:
                pass
    return written, read


def _stuck(blocks: list[Block], waiting: int) -> errors.DeviceError:
    """Return the fault of a state in which nothing can run; `waiting` blocks have not started."""
    block = next(b for b in blocks if b.groups)
    waits = [(g, g.wait) for g in block.groups if g.wait is not None]
    for other in block.cluster.blocks:
        for wait in (g.wait for g in other.groups):
            if wait is not None and wait.kind == "mbarrier":
                fault = _bytes_missing(other, wait.target)
                if fault is not None:
                    return fault
    text = "; ".join(f"threads {_range(g.active)} wait for {w.text}" for g, w in waits)
    exited = sum(int(b.exited.sum()) for b in block.cluster.blocks)
    text += f"; {exited} threads have exited" if exited else ""
    text += f"; {waiting} blocks have not started" if waiting else ""
    numbered = [(g, w) for g, w in waits if w.kind in ("barrier", "warp")]
    first, wait = waits[0]
    if numbered and (
        exited or len({id(w.target) for _, w in numbered}) > 1 or all(w.kind == "warp" for _, w in numbered)
    ):
        first, wait = numbered[0]
        others = [w.span for _, w in waits if w is not wait]
        return block.fault(
            errors.BarrierDivergenceError,
            f"threads do not meet: {text}",
            first.active,
            span=wait.span,
            other=others[0] if others else None,
        )
    return block.fault(errors.DeadlockError, f"deadlock: {text}", first.active, span=wait.span)


def _bytes_missing(block: Block, barriers: list[Mbarrier]) -> errors.DeviceError | None:
    for barrier in barriers:
        if barrier.pending == 0 and barrier.bytes:
            return block.fault(errors.TransactionError, f"{barrier} never gets its bytes")
    return None


def _range(threads: np.ndarray) -> str:
    if len(threads) > 1 and int(threads[-1]) - int(threads[0]) == len(threads) - 1:
        return f"{threads[0]}-{threads[-1]}"
    return ",".join(str(t) for t in threads.tolist())


def _check_end(block: Block) -> None:
    """Check what has to hold when a block ends."""
    for number, barrier in block.named.items():
        if barrier.arrived:
            text = f"block ends with {barrier.arrived} of {barrier.count} arrivals at barrier {number}"
            raise block.fault(errors.BarrierDivergenceError, text, span=barrier.span)
    for barrier in block.mbarriers.values():
        if barrier.count and barrier.bytes:
            raise block.fault(errors.TransactionError, f"block ends with {barrier}")


def flat_bytes(tensor: torch.Tensor, span: int) -> np.ndarray:
    """Return the memory of a tensor from its first element on, `span` elements, as uint8."""
    flat = tensor.detach().as_strided((span,), (1,), tensor.storage_offset())
    return flat.view(torch.uint8).numpy()
