"""Follows one thread of the plan's kernel through its device IR, for any thread, CTA, rank and routing.

Thread, CTA and rank are symbols, and so are loop counters: a `Guide` says what the variables that a loop
changes hold in its n-th round (an equation that is to be proved, of the first round and of each next one),
and what shared memory holds once all threads have met behind its writes. What a guide says is a hint: if it
is wrong, or of another loop, an obligation fails. What is not followed is UNSUPPORTED.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import z3

from megamoe.plan_count import MINE, RANK, THREAD
from megamoe.plan_values import Bits, Guide, Key, Loop, Value, Values
from verify import ir
from verify.ir import UnsupportedIR

_INDICES = {"threadIdx.x": THREAD, "blockIdx.x": MINE, "blockIdx.y": RANK}
_AROUND = (ir.Launch, ir.Attr, ir.Block, ir.Assume)
_EFFECTS = ("atomic_store_elem_op", "atomic_max_elem_op")  # on words that no claim is about


def steps(function: ir.Function) -> list[list[ir.Stmt]]:
    """Return what a CTA does between its barriers.

    Raises:
        UnsupportedIR: a barrier stands under a condition or in a loop, or is of some threads alone.
    """
    found: list[list[ir.Stmt]] = [[]]
    for stmt in _flat(function.body):
        if _is_barrier(stmt):
            found.append([])
            continue
        for node in () if isinstance(stmt, _AROUND) else ir.walk(stmt):
            if isinstance(node, ir.Call) and ("sync" in node.op or "barrier" in node.op):
                raise UnsupportedIR(f"{node.op} under a condition or in a loop, or of some threads")
        found[-1].append(stmt)
    return found


def _is_barrier(stmt: ir.Stmt) -> bool:
    match stmt:
        case ir.Eval(value=ir.Call(op="tvm_storage_sync", args=(ir.Str(value="shared" | "shared.dyn"),))):
            return True
    return False


def _flat(node: ir.Stmt) -> Iterator[ir.Stmt]:
    match node:
        case ir.Seq(stmts=stmts):
            for stmt in stmts:
                yield from _flat(stmt)
        case ir.Launch() | ir.Attr() | ir.Block() | ir.Assume():
            yield node
            yield from _flat(node.body)
        case _:
            yield node


def accesses(nodes: Sequence[ir.Stmt]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the buffers that statements store to, and of those that they load from."""
    stores, loads = set(), set()
    for top in nodes:
        if isinstance(top, _AROUND):
            continue  # what is inside follows
        for node in ir.walk(top):
            if isinstance(node, ir.Store):
                stores.add(node.buffer.data.name)
            elif isinstance(node, ir.Load):
                loads.add(node.buffer.data.name)
    return frozenset(stores), frozenset(loads)


class Follower(Values):
    """See the module.

    Attributes:
        steps: statements between two barriers of the CTA.
        stored: buffers that are written between them.
        extents: of the launch, by tag.
        shared: storages that are no tensors.
    """

    def __init__(self, function: ir.Function, guide: Guide) -> None:
        """Follow a thread through all of the kernel.

        Raises:
            UnsupportedIR: an operation without a meaning here.
        """
        super().__init__(guide)
        self.extents: dict[str, int] = {}
        self.around: list[z3.ArithRef | int] = []
        self.steps = steps(function)
        self.shared = {
            node.buffer.data
            for node in ir.walk(function.body)
            if isinstance(node, ir.Decl | ir.Alloc) and node.buffer.scope != "global"
        }
        self.stored = [accesses(step)[0] for step in self.steps]
        self.written = frozenset().union(*self.stored)
        own = guide.own[0]
        for number, step in enumerate(self.steps):
            self.interval = number
            for stmt in step:
                self.run(stmt)
            if own in self.stored[number] - frozenset().union(*self.stored[number + 1 :]):
                self._own_is_done()

    def _own_is_done(self) -> None:
        name, _, columns = self.guide.own
        held = self.guide.contents(name, self.own_row * columns + THREAD)
        assert held is not None, "a buffer of the threads' own has contents"
        self.path.append(held[0])
        self.require("written", f"each thread has written its {name}", self.own_written)
        self.require("walk", f"what {name} holds", self.own_word == held[1])
        self.path.pop()

    # ------------------------------------------------------------------ statements
    def run(self, node: ir.Stmt | None) -> None:
        """Follow a statement."""
        if node is not None and node.span is not None:
            self.span = node.span
        match node:
            case None | ir.Alloc() | ir.Decl() | ir.Attr() | ir.Block() | ir.Assume():
                return  # what is inside the last three follows
            case ir.Launch(var=var, tag=tag, extent=ir.Const(value=extent)):
                self.extents[tag] = int(extent)
                self.env[var] = _INDICES.get(tag, z3.IntVal(0))
                if tag in _INDICES:
                    self.path.append(z3.And(_INDICES[tag] >= 0, _INDICES[tag] < int(extent)))
                elif int(extent) != 1:
                    raise UnsupportedIR(f"a launch over {tag}")
            case ir.Seq(stmts=stmts):
                for stmt in stmts:
                    self.run(stmt)
            case ir.Bind(var=var, value=value):
                if var.dtype.name != "handle":  # of which `places` knows
                    self.env[var] = self.integer(value)
            case ir.If():
                self._if(node)
            case ir.For():
                self._for(node)
            case ir.While():
                self._while(node)
            case ir.Store():
                self._store(node)
            case ir.Eval(value=ir.Call(op=op) as call) if op in _EFFECTS:
                self._check_unfollowed([call])
            case _:
                raise UnsupportedIR(f"{type(node).__name__} in a plan")

    def _state(self) -> dict[Key, Value]:
        return {
            **self.local,
            ("", 0): self.own_word,
            ("", 1): z3.If(self.own_written, z3.IntVal(1), z3.IntVal(0)),
        }

    def _restore(self, state: Mapping[Key, Value]) -> None:
        self.local = dict(state)
        self.own_word = self.local.pop(("", 0))  # type: ignore[assignment]
        self.own_written = self.local.pop(("", 1)) == 1  # type: ignore[assignment]

    def _if(self, node: ir.If) -> None:
        if node.orelse is None and isinstance(node.then, ir.For) and self._is_kept(node.cond, node.then):
            # The same as the loop with the condition in it.
            self._for(node.then, node.cond)
            return
        depth = len(self.path)
        cond = self.boolean(node.cond)
        before, sides = self._state(), []
        for condition, side in ((cond, node.then), (z3.Not(cond), node.orelse)):
            self._restore(before)
            self.path.append(condition)
            self.run(side)
            sides.append(self._state())
            self.path[depth:] = []
        taken, other = sides
        self._restore({k: _merged(cond, taken[k], other[k]) for k in taken.keys() & other.keys()})

    def _is_kept(self, cond: ir.Expr, loop: ir.For) -> bool:
        """Return whether a condition on a set of bits is the same in all rounds of a loop."""
        match cond:
            case ir.BinOp(op="ne", a=ir.Load(buffer=buffer, indices=(index,)), b=ir.Const(value=0)):
                known = not any(isinstance(node, ir.Load | ir.Call) for node in ir.walk(index))
                is_kept = buffer.data.name not in accesses([loop])[0]
                return buffer.scope.startswith("local") and known and is_kept
        return False

    def _for(self, node: ir.For, cond: ir.Expr | None = None) -> None:
        start, extent = self.integer(node.start), z3.simplify(self.integer(node.extent))
        if not z3.eq(z3.simplify(start), z3.IntVal(0)):
            raise UnsupportedIR("a loop that does not start at 0")
        stores, loads = accesses([node])
        held = self.guide.carried(stores, loads, self.around)
        if held is None and isinstance(extent, z3.IntNumRef) and node.kind == "unrolled":
            for number in range(extent.as_long()):
                self._round(node, z3.IntVal(number), number, cond)
            return
        if held is not None and node.kind == "unrolled" and self._is_array(node):
            self._by_steps(node, extent, held)
            return
        depth, facts, counter = len(self.path), len(self.facts), z3.Int(f"round{len(self.counters)}")
        self.counters.append(counter)
        changed = self._changed(node)
        before = self._state()
        wanted = held(z3.IntVal(0)) if held is not None else {}
        later = held(counter) if held is not None else {}
        self._compare("at the start", wanted, before)
        if held is not None:
            self.require("walk", "a loop's length", extent >= 0)
        kept = {k: v for k, v in before.items() if k not in changed}
        if ("", 0) in changed and ("", 0) not in wanted:
            raise UnsupportedIR(f"a loop that writes {self.guide.own[0]}")
        self.path.append(z3.And(counter >= 0, counter < extent))
        self.loops.append(Loop(counter, extent))
        self._restore({**kept, **later})
        self._round(node, counter, counter, cond)
        self.loops.pop()
        if held is not None:
            self._compare("in the next round", held(counter + 1), self._state())
        self.path[depth:], self.facts[facts:] = [], []
        self._restore({**kept, **(held(extent) if held is not None else {})})

    def _changed(self, loop: ir.For) -> set[Key]:
        """Return what a loop may change of a thread's state."""
        found: set[Key] = {("", 0), ("", 1)} if self.guide.own[0] in accesses([loop])[0] else set()
        bound = {node.var for node in ir.walk(loop) if isinstance(node, ir.For | ir.Bind)}
        for node in ir.walk(loop):
            if isinstance(node, ir.Store) and node.buffer.scope.startswith("local"):
                (index,) = node.indices
                simple = not any(n in bound or isinstance(n, ir.Ramp | ir.Load) for n in ir.walk(index))
                at = z3.simplify(self.integer(index)) if simple else z3.Int("any")
                if z3.is_int_value(at):
                    found.add((node.buffer.data.name, at.as_long()))
                else:
                    found |= {key for key in self.local if key[0] == node.buffer.data.name}
        return found

    def _round(
        self, node: ir.For, counter: z3.ArithRef, number: z3.ArithRef | int, cond: ir.Expr | None
    ) -> None:
        self.env[node.var] = counter
        self.around.append(number)
        self.run(node.body if cond is None else ir.If(node.span, cond, node.body, None))
        self.around.pop()

    def _by_steps(
        self, node: ir.For, extent: Any, held: Callable[[z3.ArithRef], Mapping[Key, Value]]
    ) -> None:
        """Follow an unrolled loop round by round, holding its variables against the guide in between."""
        self._compare("at the start", held(z3.IntVal(0)), self._state())
        for number in range(extent.as_long()):
            self._restore({**self._state(), **held(z3.IntVal(number))})
            self._round(node, z3.IntVal(number), number, None)
            self._compare("in the next round", held(z3.IntVal(number + 1)), self._state())
        self._restore({**self._state(), **held(extent)})

    def _is_array(self, node: ir.For) -> bool:
        """Return whether a loop's counter picks elements of private variables."""
        return any(
            isinstance(n, ir.Load | ir.Store)
            and n.buffer.scope.startswith("local")
            and any(inner is node.var for index in n.indices for inner in ir.walk(index))
            for n in ir.walk(node.body)
        )

    def _compare(self, when: str, wanted: Mapping[Key, Value], state: Mapping[Key, Value]) -> None:
        for key, value in wanted.items():
            name = key[0] or self.guide.own[0]
            self.same(f"{name} {when}", state.get(key), value)

    def _while(self, node: ir.While) -> None:
        """Of a wait only what it may change: private variables, which are written before it."""
        self._check_unfollowed([node.cond, node.body])
        for inner in ir.walk(node.body):
            if isinstance(inner, ir.Store) and inner.buffer.scope.startswith("local"):
                self.seen.add(id(inner))
                for key in [k for k in self.local if k[0] == inner.buffer.data.name]:
                    self.local[key] = z3.Int(f"waited{len(self.counters)}")
                    self.counters.append(self.local[key])
            elif isinstance(inner, ir.Store) or (isinstance(inner, ir.Call) and inner.op in _EFFECTS):
                raise UnsupportedIR("a wait that writes")

    def _check_unfollowed(self, nodes: Sequence[Any]) -> None:
        """Refuse what the claims are about where nothing follows it."""
        for top in nodes:
            for node in ir.walk(top):
                match node:
                    case ir.Load(buffer=ir.Buffer(data=data)) | ir.AccessPtr(data=data):
                        of_claims = data in self.shared or data.name in self.written
                        is_private = isinstance(node, ir.Load) and node.buffer.scope.startswith("local")
                        if of_claims and not is_private:
                            raise UnsupportedIR(f"an access of {data.name} that is not followed")
                        if is_private:
                            self.integer(node)  # which has been written
                        self.seen.add(id(node))

    def _store(self, node: ir.Store) -> None:
        self.seen.add(id(node))
        name, scope, (index,) = node.buffer.data.name, node.buffer.scope, node.indices
        if scope.startswith("local"):
            if isinstance(index, ir.Ramp):
                self._store_lanes(node, index)
            else:
                key, value = self._key(node.buffer, self.integer(index)), self._word(node.value)
                is_zero = not isinstance(value, Bits) and z3.eq(value, z3.IntVal(0))
                is_empty = name in self.guide.bits and is_zero
                self.local[key] = Bits(lambda k: z3.BoolVal(False)) if is_empty else value
            return
        at, value = self.integer(index), self.integer(node.value)
        if name == self.guide.own[0]:
            is_it = self._own_at(at)
            self.own_word = z3.If(is_it, value, self.own_word)
            self.own_written = z3.Or(is_it, self.own_written)
        else:
            self._event("write", name, at, value)

    def _store_lanes(self, node: ir.Store, index: ir.Ramp) -> None:
        for lane in range(node.value.dtype.lanes):
            at = self._key(node.buffer, self.integer(index.base) + self.integer(index.stride) * lane)
            self.local[at] = self._lane(node.value, lane)


def _merged(cond: z3.BoolRef, a: Value, b: Value) -> Value:
    if isinstance(a, Bits) and isinstance(b, Bits):
        return a if a is b else Bits(lambda k: z3.If(cond, a.bit(k), b.bit(k)))
    if isinstance(a, Bits) or isinstance(b, Bits):
        raise UnsupportedIR("a word that is a set of bits on one way alone")
    return a if z3.eq(a, b) else z3.If(cond, a, b)
