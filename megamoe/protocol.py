"""The signals of the fused kernel, read off its compiled IR and followed through every interleaving.

`trace` runs the device IR of one thread on a routing and keeps what concerns other CTAs: atomics, waits,
barriers, and which slots of the rings it touches. Data are not computed: no branch that holds a signal
depends on them (one that did is UNSUPPORTED). `happens_before.analyse` links traces.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megamoe.memo import of_a_kernel
from verify import host, ir
from verify.externs import signals
from verify.interp.device.flags import RELAXED
from verify.ir import UnsupportedIR

FLIP = 1 << 31
_MASK = (1 << 32) - 1
_PROBE = 48  # values of a word that a wait's condition is tried on
ELECTED = 15  # lane that is taken to be the elected one: not the one that polls
_WARP = 32
_LOAD_PREFIX = 3  # arguments of a load through a descriptor before the coordinates
_SYNCHRONISES = {
    "tvm_storage_sync",
    "sync_grid",
    "sync_warp",
    "mbarrier_wait_parity",
    "ptx_arrive_barrier",
    "ptx_arrive_barrier_expect_tx",
}
_EVENTS = {*_SYNCHRONISES, "tma_load", "ptx_cp_async"}  # calls that are events, beside atomics
UNKNOWN = object()  # a value that follows from data


@dataclass(frozen=True)
class Event:
    """Something a thread does that other CTAs may see.

    Attributes:
        kind: add, store, wait (until the word is at least `value`), flip (until bit 31 of the word has turned
            since this thread's last add), sync (barrier of the CTA or of some of its warps), warp (of a
            warp), grid (of the launch), arrive (at an mbarrier), phase (wait for one of an mbarrier's), read,
            write.
        word: (tensor, index) of an atomic; (tensor, slot) of an access; (array, index) of an mbarrier.
        value: added, stored or waited for; number of a barrier; parity of a phase; of an arrival, whether a
            copy ends the phase with it.
        order: memory order of an atomic.
        scope: of an atomic: signals.DEVICE or signals.SYSTEM.
    """

    kind: str
    word: tuple[str, int] = ("", 0)
    value: int = 0
    order: int = 0
    scope: int = signals.DEVICE


@dataclass(frozen=True)
class Box:
    """What a load through a descriptor reads.

    Attributes:
        tensor: name.
        strides: of the tensor in elements, innermost first.
        extents: of the box, innermost first.
    """

    tensor: str
    strides: tuple[int, ...]
    extents: tuple[int, ...]

    def corners(self, at: Sequence[int]) -> Iterator[int]:
        """Yield, for the box at these coordinates, the first and last element of each innermost run."""
        runs = itertools.product(*(range(n) for n in self.extents[1:]))
        for run in runs:
            for first in (0, self.extents[0] - 1):
                places = (first, *run)
                yield sum((a + i) * s for a, i, s in zip(at, places, self.strides, strict=True))


def boxes(launch: host.Host) -> dict[str, Box]:
    """Return the boxes of a kernel's descriptors by the names of its parameters.

    Raises:
        UnsupportedIR: a stride is not constant.
    """
    found = {}
    for parameter, descriptor in launch.descriptors.items():
        item = descriptor.tensor.dtype.bits // 8
        strides = []
        for stride in descriptor.strides:
            if not isinstance(stride, ir.Const) or isinstance(stride.value, float):
                raise UnsupportedIR("a descriptor with strides that are not constant")
            strides.append(int(stride.value) // item)
        strides[0] = 1
        found[parameter.name] = Box(descriptor.tensor.name, tuple(strides), descriptor.box)
    return found


def mbarriers(function: ir.Function) -> dict[tuple[str, int], int]:
    """Return for how many arrivals each mbarrier of a kernel is initialised."""
    found = {}
    for node in ir.walk(function.body):
        match node:
            case ir.Call(
                op="ptx_init_barrier_thread_count",
                args=(ir.Load(buffer=buffer, indices=(ir.Const(value=at),)), ir.Const(value=count)),
            ):
                found[buffer.name, int(at)] = int(count)
    return found


@dataclass
class _Facts:
    """What is found once of a function's nodes, by their identity: threads run through them many times."""

    steering: frozenset[ir.Var]  # a thread's own variables that decide what it does, or where
    signals: dict[int, bool] = field(default_factory=dict)
    loads: dict[int, tuple[ir.Load, ...]] = field(default_factory=dict)
    quiet: dict[tuple[int, frozenset[str]], bool] = field(default_factory=dict)

    def has_signal(self, node: ir.Stmt | None) -> bool:
        """Return whether a statement signals or synchronises."""
        if id(node) not in self.signals:
            self.signals[id(node)] = _signals(node)
        return self.signals[id(node)]

    def loads_of(self, node: Any) -> tuple[ir.Load, ...]:
        """Return the reads of tensors in an expression."""
        if id(node) not in self.loads:
            found = (n for n in ir.walk(node) if isinstance(n, ir.Load) and n.buffer.scope == "global")
            self.loads[id(node)] = tuple(found)
        return self.loads[id(node)]

    def is_quiet(self, node: ir.Stmt | None, tensors: frozenset[str]) -> bool:
        """Return whether a statement makes no event and sets nothing that decides one.

        What it stores is not known then, as data are not anyway.

        Args:
            node: the statement.
            tensors: names of those whose accesses are events.
        """
        key = id(node), tensors
        if key not in self.quiet:
            self.quiet[key] = self._is_quiet(node, tensors)
        return self.quiet[key]

    def _is_quiet(self, node: ir.Stmt | None, tensors: frozenset[str]) -> bool:
        match node:
            case None | ir.Alloc() | ir.Decl():
                return True
            case ir.Seq(stmts=stmts):
                return all(self.is_quiet(stmt, tensors) for stmt in stmts)
            case ir.If(then=then, orelse=orelse):
                return self.is_quiet(then, tensors) and self.is_quiet(orelse, tensors)
            case ir.For(body=body) | ir.Attr(body=body):
                return self.is_quiet(body, tensors)
            case ir.Store(buffer=buffer, value=value):
                is_own = buffer.scope.startswith("local")
                if self.has_signal(node) or (is_own and buffer.data in self.steering):
                    return False
                named = {load.buffer.data.name for load in self.loads_of(value)}
                return not tensors & (named if is_own else named | {buffer.data.name})
            case ir.Eval(value=ir.Call(op=op)):
                return op not in _EVENTS and not self.has_signal(node)
        return False


def _steering(function: ir.Function) -> frozenset[ir.Var]:
    """Return the storage that conditions, lengths of loops, indices, names and events are computed from."""
    stored: dict[ir.Var, list[Any]] = {}
    pending: list[Any] = []
    for node in ir.walk(function.body):
        match node:
            case ir.If(cond=cond) | ir.While(cond=cond):
                pending.append(cond)
            case ir.For(start=start, extent=extent):
                pending += start, extent
            case ir.Bind(value=value):
                pending.append(value)
            case ir.Store(buffer=buffer, indices=indices, value=value):
                pending += indices
                stored.setdefault(buffer.data, []).append(value)
            case ir.Load(indices=indices):
                pending += indices
            case ir.Call(op=op, args=args) if op in _EVENTS or op.startswith("atomic"):
                pending += args
    found: set[ir.Var] = set()
    while pending:
        for node in ir.walk(pending.pop()):
            if isinstance(node, ir.Load) and node.buffer.data not in found:
                found.add(node.buffer.data)
                pending += stored.get(node.buffer.data, ())
    return frozenset(found)


@of_a_kernel
def _facts(function: ir.Function) -> _Facts:
    # Kept with what is found, so that its nodes' identities stay theirs.
    return _Facts(_steering(function))


@dataclass
class _Thread:
    block: tuple[int, int]
    thread: int
    tensors: Mapping[str, Sequence[int]]
    slots: Mapping[str, Callable[[int], int]]
    boxes: Mapping[str, Box]
    facts: _Facts
    env: dict[Any, Any] = field(default_factory=dict)
    local: dict[tuple[Any, int], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take the names of the tensors whose accesses are followed."""
        self.watched = frozenset(self.slots)

    # ------------------------------------------------------------------ values
    def value(self, node: Any, atomic: int | None = None) -> Any:
        """Return an integer or UNKNOWN; `atomic` stands for what an atomic load returns."""
        match node:
            case ir.Const(value=v):
                return int(v) if not isinstance(v, float) else UNKNOWN
            case ir.Var():
                return self.env.get(node, UNKNOWN)
            case ir.Cast(a=a):
                return self.value(a, atomic)
            case ir.Not(a=a):
                v = self.value(a, atomic)
                return UNKNOWN if v is UNKNOWN else int(not v)
            case ir.Select(cond=c, a=a, b=b):
                v = self.value(c, atomic)
                return UNKNOWN if v is UNKNOWN else self.value(a if v else b, atomic)
            case ir.BinOp(op=op, a=a, b=b):
                return _binary(op, self.value(a, atomic), lambda: self.value(b, atomic))
            case ir.Load(buffer=buffer, indices=(index,)):
                at = self.value(index, atomic)
                if at is UNKNOWN:
                    return UNKNOWN
                if buffer.scope.startswith("local"):
                    return self.local.get((buffer.data, at), UNKNOWN)
                known = self.tensors.get(buffer.data.name)
                return known[at] if known is not None and 0 <= at < len(known) else UNKNOWN
            case ir.Call(op="atomic_load_elem_op"):
                return UNKNOWN if atomic is None else atomic
            case ir.Call(op="tl_shuffle_elect", args=(ir.Const(value=extent),)):
                return int(self.thread % int(extent or self.thread + _WARP) == ELECTED)
        return UNKNOWN

    def word(self, pointer: Any) -> tuple[str, int]:
        """Return the word that an atomic's pointer names."""
        match pointer:
            case ir.AccessPtr(data=data, offset=offset):
                at = self.value(offset)
                if at is not UNKNOWN:
                    return data.name, at
        raise UnsupportedIR("an atomic whose address follows from data")

    # ------------------------------------------------------------------ statements
    def run(self, node: ir.Stmt | None) -> Iterator[Event]:
        """Yield the events of a statement."""
        match node:
            case None | ir.Alloc() | ir.Decl():
                return
            case ir.Seq(stmts=stmts):
                for stmt in stmts:
                    yield from self.run(stmt)
            case ir.Launch(var=var, tag=tag, body=body):
                x, y = self.block
                self.env[var] = {"blockIdx.x": x, "blockIdx.y": y, "threadIdx.x": self.thread}.get(tag, 0)
                yield from self.run(body)
            case ir.Assume(body=body) | ir.Attr(body=body) | ir.Block(body=body):
                yield from self.run(body)
            case ir.Bind(var=var, value=value):
                yield from self._reads(value)
                self.env[var] = self.value(value)
            case ir.If(cond=cond, then=then, orelse=orelse):
                chosen = self.value(cond)
                if chosen is not UNKNOWN:
                    yield from self.run(then if chosen else orelse)
                elif self.facts.has_signal(then) or self.facts.has_signal(orelse):
                    raise UnsupportedIR("a signal under a condition that follows from data")
            case ir.For():
                if not self.facts.is_quiet(node, self.watched):
                    yield from self._loop(node)
            case ir.While(cond=cond, body=body):
                yield from self._while(cond, body)
            case ir.Store():
                if not self.facts.is_quiet(node, self.watched):
                    yield from self._store(node)
            case ir.Eval(value=ir.Call() as call):
                yield from self._call(call)
            case _:
                raise UnsupportedIR(f"{type(node).__name__} in a trace")

    def _loop(self, loop: ir.For) -> Iterator[Event]:
        number, end = self.value(loop.start), self._end(loop)
        if number is UNKNOWN or end is UNKNOWN:
            if self.facts.has_signal(loop.body):
                raise UnsupportedIR("a signal in a loop whose length follows from data")
            return
        while number < end:
            self.env[loop.var] = number
            yield from self.run(loop.body)
            if self._end(loop) != end:  # the compiled loop reads it in every round
                raise UnsupportedIR("a loop whose length changes while it runs")
            number += 1

    def _end(self, loop: ir.For) -> Any:
        start, extent = self.value(loop.start), self.value(loop.extent)
        return UNKNOWN if start is UNKNOWN or extent is UNKNOWN else start + extent

    def _while(self, cond: ir.Expr, body: ir.Stmt) -> Iterator[Event]:
        atomics = [n for n in ir.walk(cond) if isinstance(n, ir.Call) and n.op == "atomic_load_elem_op"]
        if not atomics:
            while True:
                going = self.value(cond)
                if going is UNKNOWN:
                    raise UnsupportedIR("a loop whose end follows from data")
                if not going:
                    return
                yield from self.run(body)
        if len(atomics) > 1:
            raise UnsupportedIR("a wait for several words at once")
        word, order = self.word(atomics[0].args[0]), int(atomics[0].args[1].value)  # type: ignore[attr-defined]
        waits = [bool(self.value(cond, v)) for v in range(_PROBE)]
        old = next((v for (b, _), v in self.local.items() if b.name == "old"), None)
        if old is UNKNOWN:  # the condition compares with what this thread's add returned
            yield self._flip(cond, word, order)
            return
        need = waits.index(False) if False in waits else None
        if need is None or any(waits[need:]):
            raise UnsupportedIR("a wait that is not for at least some value")
        scope = signals.scope_of(atomics[0].args, atomics[0].op)
        yield Event("wait", word, need, order, scope)

    def _flip(self, cond: ir.Expr, word: tuple[str, int], order: int) -> Event:
        key = next(k for k in self.local if k[0].name == "old")
        for before in (0, 1, FLIP - 1, FLIP, FLIP + 1, _MASK):
            for now in (0, 5, FLIP - 1, FLIP, FLIP + 5, _MASK):
                self.local[key] = before
                if bool(self.value(cond, now)) != ((before ^ now) & FLIP == 0):
                    raise UnsupportedIR("a wait that is neither for a value nor for bit 31")
        self.local[key] = 0
        return Event("flip", word, 0, order)

    def _store(self, node: ir.Store) -> Iterator[Event]:
        yield from self._reads(node.value)
        index = node.indices[0]
        base = index.base if isinstance(index, ir.Ramp) else index
        at = self.value(base)
        if node.buffer.scope.startswith("local"):
            if at is not UNKNOWN and not self.facts.has_signal(node):
                self.local[(node.buffer.data, at)] = self.value(node.value)
            elif at is not UNKNOWN:
                value = node.value
                while isinstance(value, ir.Select | ir.Cast):  # guards that the compiler adds
                    taken = self.value(value.cond) if isinstance(value, ir.Select) else 1
                    if taken is UNKNOWN:
                        raise UnsupportedIR("a signal under a condition that follows from data")
                    value = value.a if taken or isinstance(value, ir.Cast) else value.b
                if isinstance(value, ir.Call) and value.op == "atomic_add_ret_elem_op":
                    yield from self._call(value)
                self.local[(node.buffer.data, at)] = self.value(node.value)
        elif node.buffer.scope == "global":
            yield from self._access("write", node.buffer.data.name, at)

    def _reads(self, node: Any) -> Iterator[Event]:
        for load in self.facts.loads_of(node):
            if load.buffer.data.name in self.slots:
                index = load.indices[0]
                base = index.base if isinstance(index, ir.Ramp) else index
                yield from self._access("read", load.buffer.data.name, self.value(base))

    def _mbarrier(self, node: Any) -> tuple[str, int]:
        match node:
            case ir.Load(buffer=buffer, indices=(index,)):
                at = self.value(index)
                if at is not UNKNOWN:
                    return buffer.name, at
        raise UnsupportedIR("an mbarrier whose number follows from data")

    def _load_box(self, call: ir.Call) -> Iterator[Event]:
        first = call.args[0]
        box = self.boxes.get(first.name) if isinstance(first, ir.Var) else None
        if box is None or box.tensor not in self.slots:
            return
        at = [self.value(a) for a in call.args[_LOAD_PREFIX : _LOAD_PREFIX + len(box.extents)]]
        if UNKNOWN in at:
            raise UnsupportedIR("a load whose place follows from data")
        for slot in sorted({self.slots[box.tensor](place) for place in box.corners(at)}):
            yield Event("read", (box.tensor, slot))

    def _access(self, kind: str, tensor: str, at: Any) -> Iterator[Event]:
        slot_of = self.slots.get(tensor)
        if slot_of is not None and at is not UNKNOWN:
            yield Event(kind, (tensor, slot_of(at)))

    def _call(self, call: ir.Call) -> Iterator[Event]:
        match call.op:
            case "tvm_storage_sync":
                yield Event("sync", value=self.value(call.args[1]) if len(call.args) > 1 else 0)
            case "sync_warp":
                yield Event("warp")
            case "mbarrier_wait_parity":
                yield Event("phase", self._mbarrier(call.args[0]), self.value(call.args[1]))
            case "ptx_arrive_barrier" | "ptx_arrive_barrier_expect_tx":
                brings = int(call.op == "ptx_arrive_barrier_expect_tx")
                yield Event("arrive", self._mbarrier(call.args[0]), brings)
            case "tma_load":
                yield from self._load_box(call)
            case "sync_grid":
                yield Event("grid")
            case "atomic_add_elem_op" | "atomic_add_ret_elem_op":
                # The CUDA template of an add that returns nothing drops the order.
                keeps = call.op == "atomic_add_ret_elem_op"
                order = int(call.args[2].value) if keeps else RELAXED  # type: ignore[attr-defined]
                yield Event("add", self.word(call.args[0]), self.value(call.args[1]), order)
            case "atomic_store_elem_op":
                order = int(call.args[2].value)  # type: ignore[attr-defined]
                scope = signals.scope_of(call.args, call.op)
                yield Event("store", self.word(call.args[0]), self.value(call.args[1]), order, scope)
            case "ptx_cp_async":
                source = call.args[1]
                if isinstance(source, ir.AccessPtr):
                    yield from self._access("read", source.data.name, self.value(source.offset))


def _binary(op: str, a: Any, later: Any) -> Any:
    if op == "and" and a is not UNKNOWN and not a:
        return 0
    b = later()
    if a is UNKNOWN or b is UNKNOWN:
        return 0 if op == "and" and b is not UNKNOWN and not b else UNKNOWN
    match op:
        case "add" | "sub" | "mul":
            return {"add": a + b, "sub": a - b, "mul": a * b}[op]
        case "floordiv":
            return a // b
        case "floormod":
            return a % b
        case "truncdiv":
            return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        case "truncmod":
            return abs(a) % abs(b) * (-1 if a < 0 else 1)
        case "min" | "max":
            return min(a, b) if op == "min" else max(a, b)
        case "shl" | "shr":
            return a << b if op == "shl" else a >> b
        case "bitand" | "bitor" | "bitxor":
            return {"bitand": a & b, "bitor": a | b, "bitxor": a ^ b}[op]
        case "and" | "or":
            return int(bool(a) and bool(b)) if op == "and" else int(bool(a) or bool(b))
        case "eq" | "ne" | "lt" | "le" | "gt" | "ge":
            return int({"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[op])
    return UNKNOWN


def _signals(node: ir.Stmt | None) -> bool:
    if node is None:
        return False
    return any(
        isinstance(n, ir.Call) and (n.op.startswith("atomic") or n.op in _SYNCHRONISES) for n in ir.walk(node)
    )


def trace(
    function: ir.Function,
    block: int | tuple[int, int],
    thread: int,
    tensors: Mapping[str, Sequence[int]],
    slots: Mapping[str, Callable[[int], int]],
    boxes: Mapping[str, Box] | None = None,
) -> list[Event]:
    """Return the events of one thread.

    Args:
        function: device IR.
        block: of the thread; x, or x and y.
        thread: its number in the block.
        tensors: contents of the integer tensors that steer it, flat, by name.
        slots: which slot an element belongs to, for each tensor whose plain accesses are wanted.
        boxes: of the kernel's descriptors.

    Raises:
        UnsupportedIR: a signal depends on data, or a wait is of an unknown form.
    """
    place = (block, 0) if isinstance(block, int) else block
    known = _facts(function)
    return list(_Thread(place, thread, tensors, slots, boxes or {}, known).run(function.body))
