"""The signals of the fused kernel, read off its compiled IR and followed through every interleaving.

`trace` runs the device IR of one thread on a routing and keeps what concerns other CTAs: atomics, waits,
barriers, and which slots of the rings it touches. Data are not computed: no branch that holds a signal
depends on them (one that did is UNSUPPORTED). `analyse` links traces by what has to happen before what.
Waits are for the last value that a word takes, so the links are the same in every interleaving: if they
form no cycle, no schedule deadlocks, and conflicting accesses that they order are ordered in every schedule.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verify import ir
from verify.externs import signals
from verify.interp.device.flags import ACQ_REL, ACQUIRE, RELAXED, RELEASE, SEQ_CST
from verify.ir import UnsupportedIR

FLIP = 1 << 31
_MASK = (1 << 32) - 1
_PROBE = 48  # values of a word that a wait's condition is tried on
_RELEASES, _ACQUIRES = {RELEASE, ACQ_REL, SEQ_CST}, {ACQUIRE, ACQ_REL, SEQ_CST}
_ATOMICS = {"add", "store", "wait", "flip"}
UNKNOWN = object()  # a value that follows from data


@dataclass(frozen=True)
class Event:
    """Something a thread does that other CTAs may see.

    Attributes:
        kind: add, store, wait (until the word is at least `value`), flip (until bit 31 of the word has turned
            since this thread's last add), sync (CTA barrier), grid (barrier of the launch), read, write.
        word: (tensor, index) of an atomic; (tensor, slot) of an access.
        value: added, stored or waited for.
        order: memory order of an atomic.
        scope: of an atomic: signals.DEVICE or signals.SYSTEM.
    """

    kind: str
    word: tuple[str, int] = ("", 0)
    value: int = 0
    order: int = 0
    scope: int = signals.DEVICE


@dataclass
class Problem:
    """Something that `analyse` found wrong."""

    what: str


@dataclass
class _Thread:
    block: tuple[int, int]
    thread: int
    tensors: Mapping[str, Sequence[int]]
    slots: Mapping[str, Callable[[int], int]]
    env: dict[Any, Any] = field(default_factory=dict)
    local: dict[tuple[Any, int], Any] = field(default_factory=dict)

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
                elif _signals(then) or _signals(orelse):
                    raise UnsupportedIR("a signal under a condition that follows from data")
            case ir.For(var=var, start=start, extent=extent, body=body):
                yield from self._loop(var, self.value(start), self.value(extent), body)
            case ir.While(cond=cond, body=body):
                yield from self._while(cond, body)
            case ir.Store():
                yield from self._store(node)
            case ir.Eval(value=ir.Call() as call):
                yield from self._call(call)
            case _:
                raise UnsupportedIR(f"{type(node).__name__} in a trace")

    def _loop(self, var: ir.Var, start: Any, extent: Any, body: ir.Stmt) -> Iterator[Event]:
        if start is UNKNOWN or extent is UNKNOWN:
            if _signals(body):
                raise UnsupportedIR("a signal in a loop whose length follows from data")
            return
        for number in range(start, start + extent):
            self.env[var] = number
            yield from self.run(body)

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
            if at is not UNKNOWN and not _signals(node):
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
        for inner in ir.walk(node):
            if isinstance(inner, ir.Load) and inner.buffer.scope == "global":
                index = inner.indices[0]
                base = index.base if isinstance(index, ir.Ramp) else index
                yield from self._access("read", inner.buffer.data.name, self.value(base))

    def _access(self, kind: str, tensor: str, at: Any) -> Iterator[Event]:
        slot_of = self.slots.get(tensor)
        if slot_of is not None and at is not UNKNOWN:
            yield Event(kind, (tensor, slot_of(at)))

    def _call(self, call: ir.Call) -> Iterator[Event]:
        match call.op:
            case "tvm_storage_sync":
                yield Event("sync")
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
        isinstance(n, ir.Call) and (n.op.startswith("atomic") or n.op in ("tvm_storage_sync", "sync_grid"))
        for n in ir.walk(node)
    )


def trace(
    function: ir.Function,
    block: int | tuple[int, int],
    thread: int,
    tensors: Mapping[str, Sequence[int]],
    slots: Mapping[str, Callable[[int], int]],
) -> list[Event]:
    """Return the events of one thread.

    Args:
        function: device IR.
        block: of the thread; x, or x and y.
        thread: its number in the block.
        tensors: contents of the integer tensors that steer it, flat, by name.
        slots: which slot an element belongs to, for each tensor whose plain accesses are wanted.

    Raises:
        UnsupportedIR: a signal depends on data, or a wait is of an unknown form.
    """
    place = (block, 0) if isinstance(block, int) else block
    return list(_Thread(place, thread, tensors, slots).run(function.body))


# --------------------------------------------------------------------------- what happens before what
# A block's stretch k lies between its barriers k - 1 and k. Nodes: ("stretch", block, k),
# ("barrier", block, k), ("signal", number), ("grid", number).
Node = tuple[Any, ...]
_Place = tuple[int, int]  # (block, stretch)


class _Graph:
    """What has to happen before what."""

    def __init__(self) -> None:
        self.after: dict[Node, set[Node]] = defaultdict(set)
        self.signals = 0

    def block(self, number: int, barriers: int) -> None:
        """Enter a block that meets so many barriers."""
        for k in range(barriers):
            self.after["stretch", number, k].add(("barrier", number, k))
            self.after["barrier", number, k].add(("stretch", number, k + 1))
        self.after.setdefault(("stretch", number, barriers), set())

    def signal(self, source: _Place, target: _Place) -> None:
        """A signal orders what is before its block's last barrier with what is behind the waiter's next."""
        node = ("signal", self.signals)
        self.signals += 1
        if source[1]:
            self.after["barrier", source[0], source[1] - 1].add(node)
        self.after[node] |= {("barrier", *target), ("barrier", *source)}

    def meeting(self, number: int, places: Sequence[_Place]) -> None:
        """A barrier of the launch, which is a barrier of each block too."""
        for block, k in places:
            self.after["barrier", block, k].add(("grid", number))
            self.after["barrier", block, k].discard(("stretch", block, k + 1))
            self.after["grid", number].add(("stretch", block, k + 1))

    def sorted(self) -> tuple[list[Node], set[Node]]:
        """Return nodes in an order that respects the links, and those on or behind a cycle."""
        nodes = set(self.after) | {n for targets in self.after.values() for n in targets}
        before = dict.fromkeys(nodes, 0)
        for targets in self.after.values():
            for target in targets:
                before[target] += 1
        ready, order = [n for n in nodes if not before[n]], []
        while ready:
            order.append(node := ready.pop())
            for target in self.after.get(node, ()):
                before[target] -= 1
                if not before[target]:
                    ready.append(target)
        return order, nodes - set(order)


@dataclass
class _Found:
    """The events of a launch by what they are."""

    adds: dict[Any, list[tuple[_Place, Event]]] = field(default_factory=lambda: defaultdict(list))
    stores: dict[Any, list[tuple[_Place, Event]]] = field(default_factory=lambda: defaultdict(list))
    waits: list[tuple[_Place, Event]] = field(default_factory=list)
    flips: dict[Any, list[tuple[_Place, Event, int]]] = field(default_factory=lambda: defaultdict(list))
    grids: dict[int, list[_Place]] = field(default_factory=lambda: defaultdict(list))
    accesses: dict[Any, set[tuple[_Place, str]]] = field(default_factory=lambda: defaultdict(set))
    problems: list[Problem] = field(default_factory=list)


def analyse(traces: Mapping[int, Sequence[Sequence[Event]]], ctas: int) -> list[Problem]:
    """Return what is wrong with the signals of a launch; nothing means that no schedule goes wrong.

    Args:
        traces: for each block, the traces of its threads (those that signal, and any other).
        ctas: blocks of one rank; one rank's blocks are consecutive.
    """
    found, graph = _Found(), _Graph()
    for block, threads in traces.items():
        lengths = {_collect(found, block, number, events) for number, events in enumerate(threads)}
        if len(lengths) > 1:
            found.problems.append(Problem(f"block {block}: threads meet different numbers of barriers"))
        graph.block(block, max(lengths))
    for number, places in found.grids.items():
        if len(places) != len(traces):
            found.problems.append(Problem("not every block meets the barrier of the launch"))
        graph.meeting(number, places)
    _link_waits(found, graph, ctas)
    _link_flips(found, graph, traces, ctas)
    return [*found.problems, *_order(graph, found.accesses)]


def _collect(found: _Found, block: int, number: int, events: Sequence[Event]) -> int:
    """Enter a thread's events; return how many barriers it meets."""
    at, grids, has_waited = 0, 0, False
    turns: dict[Any, int] = defaultdict(int)
    for event in events:
        place = (block, at)
        if event.kind in _ATOMICS:
            found.accesses[event.word].add((place, "atomic"))
        match event.kind:
            case "sync" | "grid":
                if event.kind == "grid":
                    if number == 0:
                        found.grids[grids].append(place)
                    grids += 1
                at, has_waited = at + 1, False
            case "add" | "store":
                (found.adds if event.kind == "add" else found.stores)[event.word].append((place, event))
                if has_waited:
                    what = "a thread signals between its wait and the next barrier of the block"
                    found.problems.append(Problem(f"{event.word}: {what}"))
            case "wait":
                found.waits.append((place, event))
                has_waited = True
            case "flip":
                found.flips[event.word].append((place, event, turns[event.word]))
                turns[event.word] += 1
                has_waited = True
            case "read" | "write":
                found.accesses[event.word].add((place, event.kind))
    return at


def _link(
    found: _Found, graph: _Graph, source: tuple[_Place, Event], target: tuple[_Place, Event], ctas: int
) -> None:
    if source[1].order not in _RELEASES:
        found.problems.append(Problem(f"{source[1].word}: a signal that does not release"))
    elif target[1].order not in _ACQUIRES:
        found.problems.append(Problem(f"{target[1].word}: a wait that does not acquire"))
    elif source[0][0] // ctas != target[0][0] // ctas and (
        source[1].scope != signals.SYSTEM or target[1].scope != signals.SYSTEM
    ):
        found.problems.append(Problem(f"{source[1].word}: a signal between ranks below system scope"))
    else:
        graph.signal(source[0], target[0])


def _link_waits(found: _Found, graph: _Graph, ctas: int) -> None:
    for place, wait in found.waits:
        word = wait.word
        if found.stores[word]:
            sources = [s for s in found.stores[word] if s[1].value == wait.value]
            if len(sources) != 1:
                what = f"waits for {wait.value}, which is stored {len(sources)} times"
                found.problems.append(Problem(f"{word}: {what}"))
        else:
            sources = found.adds[word]
            total = sum(event.value for _, event in sources)
            if total != wait.value:
                found.problems.append(Problem(f"{word}: waits for {wait.value}, and comes to {total}"))
        for source in sources:
            _link(found, graph, source, (place, wait), ctas)


def _link_flips(found: _Found, graph: _Graph, blocks: Mapping[int, Any], ctas: int) -> None:
    for word, passing in found.flips.items():
        by_block: dict[int, list[tuple[_Place, Event]]] = defaultdict(list)
        for place, event in found.adds[word]:
            by_block[place[0]].append((place, event))
        rank = [b for b in blocks if b // ctas == word[1]]
        for turn in sorted({t for _, _, t in passing}):
            arrivals = [by_block[b][turn] for b in rank if turn < len(by_block[b])]
            values = sorted(event.value for _, event in arrivals)
            if values != sorted([FLIP - (ctas - 1), *[1] * (ctas - 1)]):
                found.problems.append(Problem(f"{word}: {values} do not turn bit 31 over"))
            for place, event, its_turn in passing:
                for source in arrivals if its_turn == turn else ():
                    _link(found, graph, source, (place, event), ctas)


def _order(graph: _Graph, accesses: Mapping[Any, set[tuple[_Place, str]]]) -> list[Problem]:
    order, stuck = graph.sorted()
    if stuck:
        blocks = sorted({n[1] for n in stuck if n[0] == "barrier"})
        return [Problem(f"deadlock: blocks {blocks} wait for each other")]
    bit = {node: 1 << i for i, node in enumerate(order)}
    behind = dict.fromkeys(order, 0)
    for node in reversed(order):
        for target in graph.after.get(node, ()):
            behind[node] |= behind[target] | bit[target]

    def is_ordered(first: _Place, second: _Place) -> bool:
        return bool(behind.get(("barrier", *first), 0) & bit[("stretch", *second)])

    problems = []
    for word, touched in accesses.items():
        listed = sorted(touched)
        for i, (first, kind) in enumerate(listed):
            for second, other in listed[i + 1 :]:
                pair = {kind, other}
                if first[0] == second[0] or pair == {"atomic"} or not pair & {"write", "atomic"}:
                    continue
                if not is_ordered(first, second) and not is_ordered(second, first):
                    what = f"{kind} in stretch {first} and {other} in {second} are not ordered"
                    problems.append(Problem(f"{word}: {what}"))
    return problems
