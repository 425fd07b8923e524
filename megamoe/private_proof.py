"""A thread's own storage in the fused kernel: read where it has been written, untouched by the tensor core.

Each role is followed through the device IR once more (as by `role_follow`), with every write of a variable,
an array or a register: which elements, and on which conditions of this round. A read is behind a write of
each of its elements, on every way that leads to it: the writes' conditions are among its own, or follow from
them, by the solvers. What a loop writes counts behind it only where each round does, and there are some.

Registers that wgmma takes or adds to are the tensor core's until its group has been waited for: nobody
touches them, and `warpgroup_arrive` comes between what a thread has put there and the next wgmma.

An element of the combine buffers that has no row in this launch may be read, but not used.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import z3

from megamoe.ring import every, given, some
from megamoe.role_events import Box, Part
from megamoe.role_follow import Follower
from verify import ir
from verify.descriptors import mma_shape
from verify.ir import UnsupportedIR
from verify.properties import Issue
from verify.solve import Obligation
from verify.text import show

# Of a matrix; `role_follow` refuses one that is not set on every way.
_DESCRIPTOR = "local.descriptor"
# What is kept from one product to the next: an element, the variable that says so, and the least that does.
KEPT = (("held", 0, 1, 1), ("held", 3, 2, 0))
_TENSOR_CORE = frozenset(
    {"ptx_wgmma_rs", "ptx_wgmma_ss", "warpgroup_arrive", "warpgroup_commit_batch", "wait_wgmma"}
)
_READ = "read"  # by wgmma, in place of the shape that adds to registers
_A_REGISTERS = 16  # bytes of an 8-bit A of 64 rows and 32 columns that a thread holds
_WARPGROUP = 128
_TRUE = z3.BoolVal(True)
_STORE_B32, _B32_BITS = "dsv4_store_b32", 32

OnlyIf = Mapping[str, Callable[[z3.ArithRef, int], z3.BoolRef]]


@dataclass(frozen=True)
class _Write:
    """Elements (bits of `mask`) that are written on a path; `stale`: what they are of, where that matters."""

    mask: int
    path: tuple[z3.BoolRef, ...]
    stale: tuple[z3.BoolRef, ...] = ()
    ids: frozenset[int] = field(default_factory=frozenset)


def _write(mask: int, path: tuple[z3.BoolRef, ...], stale: tuple[z3.BoolRef, ...] = ()) -> _Write:
    return _Write(mask, path, stale, frozenset(t.get_id() for t in path))


@dataclass
class Found:
    """What is found of a kernel's private storage.

    Attributes:
        initialised: what has to be proved for every read to be of what was written.
        used: the same of elements that may be read before they are written, but not used.
        issues: what is not covered, or touches what the tensor core has.
        reads: how many reads there are; what is not among `initialised` holds by the program's order alone.
        seen: accesses, by id of the node.
    """

    initialised: list[Obligation] = field(default_factory=list)
    used: list[Obligation] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)
    reads: int = 0
    registers: int = 0
    seen: set[int] = field(default_factory=set)


def follow(
    function: ir.Function, parts: tuple[Part, ...], copies: Mapping[str, Box], only_if: OnlyIf
) -> Found:
    """Follow the private storage of every role.

    Args:
        function: device IR.
        parts: roles: all threads of a CTA.
        copies: boxes of copies by the names of their descriptors.
        only_if: tensors whose elements may reach what others see only on a condition, given by the first of
            those that are read and their number.

    Raises:
        UnsupportedIR: an operation without a meaning here.
    """
    found = Found()
    for part in parts:
        _Private(function, part, copies, only_if, found).run(function.body)
    for node in ir.walk(function.body):
        match node:
            case ir.Load(buffer=buffer) | ir.Store(buffer=buffer) if is_private(buffer):
                if id(node) not in found.seen:
                    found.issues.append(Issue(None, f"an access of {buffer.name} that no role makes"))
    return found


def is_private(buffer: ir.Buffer) -> bool:
    """Return whether a buffer is a thread's own variable, array or registers."""
    return buffer.scope.startswith("local") and not buffer.scope.startswith(_DESCRIPTOR)


class _Private(Follower):
    def __init__(
        self,
        function: ir.Function,
        part: Part,
        copies: Mapping[str, Box],
        only_if: OnlyIf,
        own: Found,
    ) -> None:
        super().__init__(function, part, copies, ())
        self.only_if, self.own = only_if, own
        self.sizes = {
            n.buffer.data: n.buffer
            for n in ir.walk(function.body)
            if isinstance(n, ir.Alloc) and is_private(n.buffer)
        }
        self.writes: dict[ir.Var, list[_Write]] = {}
        self.open: dict[ir.Var, str] = {}  # registers of wgmma in no group yet: the shape that adds to them
        self.groups: list[dict[ir.Var, str]] = []
        self.election = z3.BoolVal(True)  # of the lane that goes on, the same each time
        self.is_armed = False  # `warpgroup_arrive` came behind all that was put in registers
        self.alone: set[int] = set()  # bodies that begin and end with nothing under way
        self.is_kept = False  # what is read is put in private storage
        self.rounds: set[int] = set()  # bodies of loops that keep KEPT

    # ------------------------------------------------------------------ paths
    def _path(self, *more: z3.BoolRef) -> tuple[z3.BoolRef, ...]:
        return (*self.path, *((self.election,) if self.elected else ()), *more)

    def _issue(self, message: str) -> None:
        self.own.issues.append(Issue(self.span, f"{self.part.name}: {message}"))

    # ------------------------------------------------------------------ accesses
    def _mask(self, buffer: ir.Buffer, index: Any, lanes: int) -> int | None:
        """Return which elements an access touches; None: that is not constant."""
        first = self.first(index)
        return None if first is None else self._bits(buffer, first, lanes)

    def _bits(self, buffer: ir.Buffer, first: z3.ArithRef, count: int) -> int | None:
        at = z3.simplify(first)
        if not isinstance(at, z3.IntNumRef):
            return None
        if at.as_long() < 0 or at.as_long() + count > self._size(buffer):
            raise UnsupportedIR(f"{buffer.name} is left")
        return ((1 << count) - 1) << at.as_long()

    def _size(self, buffer: ir.Buffer) -> int:
        allocated = self.sizes.get(buffer.data)
        if allocated is None or allocated.dtype != buffer.dtype or len(allocated.shape) != 1:
            raise UnsupportedIR(f"{buffer.name} is another view of its storage")
        return self._constant(allocated.shape[0])

    def _read(self, buffer: ir.Buffer, mask: int | None, *, by_thread: bool = True) -> None:
        """A read of elements on the path as it is, by the thread or by wgmma."""
        self.own.reads += 1
        if by_thread:
            self._untouched(buffer.data, f"a read of {buffer.name}")
        left = (1 << self._size(buffer)) - 1 if mask is None else mask
        self._written(
            buffer, left, self._path(), f"{self.part.name}: {buffer.name} is written before it is read"
        )

    def _written(self, buffer: ir.Buffer, mask: int, path: tuple[z3.BoolRef, ...], what: str) -> None:
        """On a path, elements have been written."""
        writes = self.writes.get(buffer.data, [])
        ids = frozenset(t.get_id() for t in path)
        for write in reversed(writes):
            if write.ids <= ids:
                mask &= ~write.mask
        groups: dict[tuple[int, ...], int] = {}
        while mask:
            bit = mask & -mask
            mask ^= bit
            by = tuple(n for n, write in enumerate(writes) if write.mask & bit)
            groups[by] = groups.get(by, 0) | bit
        for by in groups:
            goal = some(*(every(*writes[n].path) for n in by)) if by else z3.BoolVal(False)
            self.own.initialised.append(Obligation(what, self.span, given(*self.ranges, *path), goal))

    def _wrote(self, buffer: ir.Buffer, mask: int | None, stale: tuple[z3.BoolRef, ...] = ()) -> None:
        self._untouched(buffer.data, f"a write of {buffer.name}")
        self.is_armed = False
        if mask is None:
            if stale:
                raise UnsupportedIR(f"what may be of no launch is put in {buffer.name}, at an unknown place")
            return
        before = self.writes.setdefault(buffer.data, [])
        path = self._path()
        new = _write(mask, path, stale)
        # What stood there on this path is gone.
        self.writes[buffer.data] = [w for w in before if not (w.mask & ~mask == 0 and new.ids <= w.ids)] + [
            new
        ]

    def _untouched(self, data: ir.Var, what: str) -> None:
        if self._under_way(data):
            self._issue(f"{what} while the tensor core has it")

    # ------------------------------------------------------------------ expressions
    def reads(self, *nodes: Any) -> None:
        """Enter reads of private storage too."""
        super().reads(*nodes)
        for node in nodes:
            self._values(node)
            if not self.is_kept:
                self._used(node)

    def _used(self, node: Any) -> None:
        """What a value is made of is this launch's, wherever it goes from here."""
        for term in self._stale(node, ()):
            what = f"{self.part.name}: what may be of no launch is not used"
            self.own.used.append(Obligation(what, self.span, given(*self.ranges, *self._path()), term))

    def _values(self, node: Any) -> None:
        match node:
            case ir.Select(cond=cond, a=a, b=b, lazy=True) if cond.dtype.lanes == 1:
                self._values(cond)
                known = self.boolean(cond)
                self._under(known, a)
                self._under(z3.Not(known), b)
            case ir.BinOp(op="and" | "or" as op, a=a, b=b) if a.dtype.lanes == 1:
                self._values(a)
                known = self.boolean(a)
                self._under(known if op == "and" else z3.Not(known), b)
            case ir.Load(buffer=buffer, indices=(index,)) if is_private(buffer):
                self.own.seen.add(id(node))
                self._values(index)
                self._read(buffer, self._mask(buffer, index, node.dtype.lanes))
            case ir.Load(buffer=buffer) if is_private(buffer):
                raise UnsupportedIR(f"{buffer.name} is not flat")
            case ir.Call(op="call_extern", args=(ir.Str(value=name), pointer, value)) if name == _STORE_B32:
                self._values(value)
                self._store_b32(pointer)
            case ir.Call(op="address_of", args=(ir.Load(buffer=buffer),)) if is_private(buffer):
                raise UnsupportedIR(f"a pointer to {buffer.name}")
            case ir.AccessPtr(data=data) if data in self.sizes:
                raise UnsupportedIR(f"a pointer to {data.name}")
            case ir.Var() if node in self.sizes:
                raise UnsupportedIR(f"a pointer to {node.name}")
            case _:
                for inner in ir.children(node):
                    self._values(inner)

    def _under(self, cond: z3.BoolRef, node: Any) -> None:
        self.path.append(cond)
        self._values(node)
        self.path.pop()

    def _store_b32(self, pointer: Any) -> None:
        match pointer:
            case ir.Call(op="address_of", args=(ir.Load(buffer=buffer, indices=(index,)) as load,)) if (
                is_private(buffer)
            ):
                self.own.seen.add(id(load))
                self._values(index)
                self._wrote(buffer, self._mask(buffer, index, _B32_BITS // buffer.dtype.bits))
            case _:
                raise UnsupportedIR(f"{_STORE_B32} to {show(pointer)}")

    # ------------------------------------------------------------------ statements
    def run(self, node: ir.Stmt | None) -> None:
        """Enter a statement's accesses."""
        if isinstance(node, ir.Alloc) and is_private(node.buffer):
            self.writes[node.buffer.data] = []
        is_alone, keeps = id(node) in self.alone, id(node) in self.rounds
        if is_alone:
            self._idle("begins")
        if keeps:
            self._keep()
        super().run(node)
        if is_alone:
            self._idle("ends")
        if keeps:
            self._kept("at the end of a round")

    def _idle(self, when: str) -> None:
        self.is_armed = False
        if self.open or self.groups:
            raise UnsupportedIR(f"a branch or a round {when} while the tensor core is at work")

    def _store(self, node: ir.Store) -> None:
        if not is_private(node.buffer):
            super()._store(node)
            return
        if len(node.indices) != 1:
            raise UnsupportedIR(f"{node.buffer.name} is not flat")
        stale = tuple(self._stale(node.value, ()))
        self.is_kept = True
        super()._store(node)
        self.is_kept = False
        self._used(node.indices[0])
        self.own.seen.add(id(node))
        mask = self._mask(node.buffer, node.indices[0], node.value.dtype.lanes)
        self._wrote(node.buffer, mask, stale)

    def _stale(self, value: Any, on: tuple[z3.BoolRef, ...]) -> list[z3.BoolRef]:
        """Return what has to hold for a value to be this launch's, where it is chosen on conditions."""
        match value:
            case ir.Select(cond=cond, a=a, b=b) if cond.dtype.lanes == 1:
                known = self.boolean(cond)
                sides = ((cond, on), (a, (*on, known)), (b, (*on, z3.Not(known))))
                return [term for side, where in sides for term in self._stale(side, where)]
            case ir.Load(buffer=buffer, indices=(index,)) if is_private(buffer):
                mask = self._mask(buffer, index, value.dtype.lanes)
                writes = self.writes.get(buffer.data, ())
                met = [w for w in writes if w.stale and (mask is None or w.mask & mask)]
                return [z3.Implies(every(_TRUE, *on, *w.path), term) for w in met for term in w.stale]
            case ir.Load(buffer=buffer, indices=(index,)) if self._may_be_old(buffer):
                if not isinstance(index, ir.Ramp) and index.dtype.lanes > 1:
                    raise UnsupportedIR(f"elements of {buffer.name} that are not neighbours")
                first = self.integer(index.base if isinstance(index, ir.Ramp) else index)
                term = self.only_if[buffer.data.name](first, value.dtype.lanes)
                return [z3.Implies(every(_TRUE, *on), term)]
            case _:
                return [term for inner in ir.children(value) for term in self._stale(inner, on)]

    def _may_be_old(self, buffer: ir.Buffer) -> bool:
        return buffer.scope == "global" and buffer.data.name in self.only_if

    def _if(self, node: ir.If) -> None:
        if isinstance(node.cond, ir.Call) and node.cond.op == "tl_shuffle_elect":
            self.election = z3.Bool(f"elected of {show(node.cond.args[0])}")
        if _works(node):
            self.alone |= {id(side) for side in (node.then, node.orelse) if side is not None}
        super()._if(node)
        if _works(node):
            self.is_armed = False

    def _for(self, node: ir.For) -> None:
        start, extent = self.integer(node.start), node.extent
        is_short = node.kind == "unrolled" and self._has_old(node.body, set())
        if isinstance(extent, ir.Const) and (is_short or self._hangs_on(node)):
            self.reads(node.start)
            for number in range(int(extent.value)):
                self.env[node.var] = z3.simplify(start + number)
                self.run(node.body)
            return
        if isinstance(extent, ir.Const) and node.kind == "unrolled" and self._has_barriers(node.body):
            super()._for(node)  # round by round
            return
        if _works(node):
            self.alone.add(id(node.body))
            self._idle("begins")
        keeps = self._keepers() & {
            n.buffer.data for n in ir.walk(node.body) if isinstance(n, ir.Store) and is_private(n.buffer)
        }
        if keeps:
            self.rounds.add(id(node.body))
            self._kept("before the first round")
        self._lose(node.body)
        before = {data: list(writes) for data, writes in self.writes.items()}
        around = frozenset(t.get_id() for t in self._path())
        super()._for(node)
        always = isinstance(extent, ir.Const) and int(extent.value) > 0
        for data, writes in self.writes.items():
            known = before.get(data, [])
            new = [w for w in writes if always and w.ids <= around and w not in known]
            self.writes[data] = [*known, *new]
        self._lose(node.body)
        if keeps:
            self._keep()

    def _while(self, node: ir.While) -> None:
        if _works(node):
            raise UnsupportedIR("the tensor core in a loop on a condition")
        for inner in ir.walk(node.body):
            if isinstance(inner, ir.Store) and is_private(inner.buffer):
                self.own.seen.add(id(inner))
        if isinstance(node.body, ir.Store):  # a search is not run
            self._values(node.body.value)
        self._lose(node.body)
        before = {data: list(writes) for data, writes in self.writes.items()}
        super()._while(node)
        self.writes = before

    def _lose(self, body: ir.Stmt) -> None:
        """Know nothing of what rounds put of no launch, maybe, from one to the next and behind them."""
        old: set[ir.Var] = set()
        stores = [n for n in ir.walk(body) if isinstance(n, ir.Store) and is_private(n.buffer)]
        while True:
            more = {n.buffer.data for n in stores if self._has_old(n.value, old)} - old
            if not more:
                break
            old |= more
        for data in old:
            self.writes[data] = []

    def _has_old(self, node: Any, old: set[ir.Var]) -> bool:
        loads = (n.buffer for n in ir.walk(node) if isinstance(n, ir.Load))
        return any(self._may_be_old(buffer) or buffer.data in old for buffer in loads)

    def _hangs_on(self, loop: ir.For) -> bool:
        """Return whether which elements a loop touches follows from its counter, or wgmma is in it alone."""
        moving = {loop.var}
        for node in ir.walk(loop.body):
            match node:
                case ir.Bind(var=var, value=value) if _mentions(value, moving):
                    moving.add(var)
                case ir.For(var=var, start=start, extent=extent) if _mentions((start, extent), moving):
                    moving.add(var)
                case ir.Load(buffer=buffer, indices=indices) | ir.Store(buffer=buffer, indices=indices):
                    if is_private(buffer) and _mentions(indices, moving):
                        return True
                case ir.Call(op="ptx_wgmma_rs" | "ptx_wgmma_ss"):
                    if not self._has_barriers(loop.body) and not any(
                        isinstance(n, ir.Call) and n.op in _TENSOR_CORE - {"ptx_wgmma_rs", "ptx_wgmma_ss"}
                        for n in ir.walk(loop.body)
                    ):
                        return True
        return False

    # ------------------------------------------------------------------ what products keep for the next
    def _keepers(self) -> set[ir.Var]:
        names = {name for name, *_ in KEPT}
        return {data for data in self.sizes if data.name in names}

    def _conditions(self) -> Iterator[tuple[ir.Buffer, int, z3.BoolRef]]:
        for name, element, says, least in KEPT:
            for data in self._keepers():
                if data.name == name:
                    label = name if says == 0 else f"{name}.{says}"
                    term = self.local[label] if label in self.local else self.symbol(label)
                    yield self.sizes[data], 1 << element, term >= least

    def _keep(self) -> None:
        """Suppose that what is kept has been written."""
        for buffer, mask, when in self._conditions():
            self.writes.setdefault(buffer.data, []).append(_write(mask, (when,)))

    def _kept(self, when: str) -> None:
        for buffer, mask, says in self._conditions():
            what = f"{self.part.name}: what {buffer.name} keeps has been written, {when}"
            self._written(buffer, mask, self._path(says), what)

    # ------------------------------------------------------------------ the tensor core
    def _call(self, call: ir.Call) -> None:
        super()._call(call)
        match call.op:
            case "ptx_wgmma_rs":
                shape, registers, at, sums, sums_at, adds = (call.args[n] for n in (0, 5, 6, 9, 10, 11))
                buffer = self._operand(registers)
                count = _A_REGISTERS * 8 // buffer.dtype.bits
                self._read(buffer, self._bits(buffer, self.integer(at), count), by_thread=False)
                if any(shape != _READ for shape in self._under_way(buffer.data)):
                    self._issue(f"wgmma reads {buffer.name}, which it is still to write")
                self._adds(shape, sums, sums_at, adds)
                if buffer.data in self.open and self.open[buffer.data] != _READ:
                    self._issue(f"wgmma adds to {buffer.name}, which it reads")
                self.open[buffer.data] = _READ
            case "ptx_wgmma_ss":
                self._adds(*(call.args[n] for n in (0, 10, 11, 12)))
            case "warpgroup_arrive":
                self.is_armed = True
            case "warpgroup_commit_batch":
                self.groups.append(self.open)
                self.open = {}
            case "wait_wgmma":
                pending = self._constant(call.args[0])
                self.groups = self.groups[len(self.groups) - pending :] if pending else []

    def _operand(self, node: Any) -> ir.Buffer:
        if not isinstance(node, ir.Var) or node not in self.sizes:
            raise UnsupportedIR("registers of wgmma that are no array")
        return self.sizes[node]

    def _under_way(self, data: ir.Var) -> list[str]:
        return [group[data] for group in (self.open, *self.groups) if data in group]

    def _adds(self, shape: Any, sums: Any, at: Any, adds: Any) -> None:
        """Wgmma adds to registers, or puts a product there: to a pending one of the same shape in order."""
        buffer, (m, n, _) = self._operand(sums), mma_shape(shape)
        mask = self._bits(buffer, self.integer(at), m * n // _WARPGROUP)
        if mask is None:
            raise UnsupportedIR(f"{buffer.name} at an unknown place")
        self.own.registers += 1
        if not self.is_armed:
            self._issue(f"wgmma to {buffer.name} without warpgroup_arrive behind what was put in registers")
        if any(kept != show(shape) for kept in self._under_way(buffer.data)):
            self._issue(f"wgmma to {buffer.name}, which another shape, or a read, is under way to")
        if not z3.is_false(z3.simplify(self.boolean(adds))):
            self._read(buffer, mask, by_thread=False)
        writes = self.writes.setdefault(buffer.data, [])
        writes.append(_write(mask, self._path()))
        self.open[buffer.data] = show(shape)


def _works(node: Any) -> bool:
    return any(isinstance(n, ir.Call) and n.op in _TENSOR_CORE for n in ir.walk(node))


def _mentions(node: Any, moving: set[ir.Var]) -> bool:
    parts = node if isinstance(node, tuple) else (node,)
    return any(isinstance(n, ir.Var) and n in moving for part in parts for n in ir.walk(part))
