"""What the threads of one role of a CTA do with memory that other CTAs see, read off the compiled IR.

As `role_follow`, with events for the words that CTAs signal by, for tensors that the kernel writes, and for
what orders one with the other (barriers of a warp, proxy fences). An access of memory that has no meaning
here is UNSUPPORTED: nothing that another CTA could see is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import z3

from megamoe.memo import of_a_kernel
from megamoe.role_events import OPAQUE, Box, Event, Followed, Part
from megamoe.role_follow import Follower
from verify import ir
from verify.externs import signals
from verify.interp.device.flags import RELAXED, order_of
from verify.ir import UnsupportedIR

LOAD, ADD, STORE, MAX = (
    "atomic_load_elem_op",
    "atomic_add_ret_elem_op",
    "atomic_store_elem_op",
    "atomic_max_elem_op",
)
STATUS = "status"  # what a watchdog says that a wait was given up by
EPOCHS = "epochs"  # numbers of barriers over ranks: read by those who meet, then written
POLLS = "polls"  # that a thread counts while it waits
FLIP = 1 << 31  # the bit of a grid barrier's word that turns over


@dataclass(frozen=True)
class Signal(Event):
    """An event of memory that other CTAs see, or of what orders such events.

    Kinds beside those of Event, `what` the tensor and `first` the element: add (1 word, `value` what is
    added), store (atomic), max (atomic, of `status`), poll (a loop until a word has a value), put and get
    (plain; elements from `first` to `last`), proxy (a fence), warp (a barrier of a warp).

    Attributes:
        stored: what a put stores, where that is an integer.
        order: memory order of an atomic operation.
        scope: of an atomic operation.
        goes_on: of a poll: that it goes round once more, when the word is `word` and so many polls are made;
            of one that `flips`, unless its word has turned over.
        word: of a poll: the word, a symbol.
        flips: of a poll: it ends once bit 31 of the word is not as it was when this thread last added to it.
    """

    stored: Any = None
    order: int = RELAXED
    scope: int = signals.DEVICE
    goes_on: Any = None
    word: Any = None
    flips: bool = False


def follow(function: ir.Function, part: Part, copies: Mapping[str, Box]) -> Followed:
    """Return what the threads of a part do; arguments and errors as of `role_follow.follow`."""
    follower = _Follower(function, part, copies)
    follower.run(function.body)
    return follower.found


@of_a_kernel
def _private(function: ir.Function) -> frozenset[ir.Var]:
    allocated = (n.buffer for n in ir.walk(function.body) if isinstance(n, ir.Alloc))
    return frozenset(buffer.data for buffer in allocated if buffer.scope.startswith("local"))


class _Follower(Follower):
    def __init__(self, function: ir.Function, part: Part, copies: Mapping[str, Box]) -> None:
        super().__init__(function, part, copies, ())
        self.private = _private(function)
        self.known: set[int] = set()  # atomic operations, by id, that are entered
        self.words: dict[int, z3.ArithRef] = {}  # what atomic loads return
        self.is_new = False  # `epochs` has been written

    def note(self, kind: str, what: str, node: Any, **fields: Any) -> None:
        """Enter an event."""
        self.found.events.append(
            Signal(
                kind,
                what,
                tuple(self.path),
                tuple(self.ranges),
                tuple(self.loops),
                self.elected,
                node,
                self.span,
                len(self.found.events),
                **fields,
            )
        )

    # ------------------------------------------------------------------ values
    def term(self, node: Any) -> z3.ExprRef:
        """Return a term as of the other follower; of atomic loads, and of `epochs` until it is written."""
        match node:
            case ir.Call(op="atomic_load_elem_op") if id(node) in self.words:
                return self.words[id(node)]
            case ir.Load(buffer=buffer, indices=(index,)) if self._is_epoch(buffer) and not self.is_new:
                return z3.Function(f"{EPOCHS}[]", z3.IntSort(), z3.IntSort())(self.integer(index))
        return super().term(node)

    def _is_epoch(self, buffer: ir.Buffer) -> bool:
        return buffer.scope == "global" and buffer.data.name == EPOCHS

    def reads(self, *nodes: Any) -> None:
        """Enter reads of what the kernel writes; refuse what has no meaning."""
        for top in nodes:
            self._gets(top)
            for node in ir.walk(top):
                match node:
                    case ir.AccessPtr(data=data) if not self._has_place(node):
                        raise UnsupportedIR(f"a pointer to {data.name}")
                    case ir.Call(op="address_of", args=(ir.Load(buffer=buffer), *_)):
                        if buffer.scope == "global":
                            raise UnsupportedIR(f"a pointer to {buffer.name}")
        super().reads(*nodes)

    def _gets(self, node: Any) -> None:
        """Enter reads in an expression, under the conditions on which it looks at its parts."""
        match node:
            case ir.Select(cond=cond, a=a, b=b, lazy=True) if cond.dtype.lanes == 1:
                self._gets(cond)
                known = self.boolean(cond)
                for side, term in ((a, known), (b, z3.Not(known))):
                    self.path.append(term)
                    self._gets(side)
                    self.path.pop()
                return
            case ir.Load(buffer=buffer, indices=(index,)) if self._is_seen(buffer):
                self._touch("get", buffer, node, index, node.dtype.lanes)
            case ir.Load(buffer=buffer) if self._is_seen(buffer):
                raise UnsupportedIR(f"{buffer.name} is not flat")
        for inner in ir.children(node):
            self._gets(inner)

    def _has_place(self, pointer: ir.AccessPtr) -> bool:
        """Return whether a pointer is to shared memory, a thread's own, or an atomic operation's word."""
        return pointer.data in self.shared or pointer.data in self.private or id(pointer) in self.known

    def _is_seen(self, buffer: ir.Buffer) -> bool:
        return buffer.scope == "global" and buffer.data.name in self.written

    def _touch(
        self, kind: str, buffer: ir.Buffer, node: Any, index: Any, lanes: int, stored: Any = None
    ) -> None:
        first = self.first(index)
        if first is None:
            raise UnsupportedIR(f"elements of {buffer.name} that are not neighbours")
        self.note(
            kind, buffer.data.name, node, first=first, last=first + lanes - 1, value=lanes, stored=stored
        )

    def _check_value(self, call: ir.Call) -> None:
        if call.op.startswith("atomic") and id(call) not in self.known:
            raise UnsupportedIR(f"{call.op} where it is not expected")
        super()._check_value(call)

    def _know(self, call: ir.Call) -> ir.AccessPtr:
        pointer = call.args[0]
        if (
            not isinstance(pointer, ir.AccessPtr)
            or pointer.data in self.shared
            or pointer.data in self.private
        ):
            raise UnsupportedIR(f"{call.op} of a computed pointer")
        self.known |= {id(call), id(pointer)}
        return pointer

    # ------------------------------------------------------------------ statements
    def _is_shared(self, node: Any) -> bool:
        """Keep loops with events of these kinds too."""
        for inner in ir.walk(node):
            match inner:
                case ir.Store(buffer=buffer) | ir.Load(buffer=buffer) if self._is_seen(buffer):
                    return True
                case ir.Call(op=op) if op.startswith("atomic") or op in ("fence_proxy_async", "sync_warp"):
                    return True
        return super()._is_shared(node)

    def _store(self, node: ir.Store) -> None:
        value, conditions = node.value, 0
        while isinstance(value, ir.Select | ir.Cast):
            if isinstance(value, ir.Select) and any(
                isinstance(n, ir.Call) and n.op == ADD for n in ir.walk(value.a)
            ):
                self.path.append(self.boolean(value.cond))
                conditions += 1
            value = value.a
        if isinstance(value, ir.Call) and value.op == ADD:
            pointer = self._know(value)
            self.reads(value.args[1])
            self.note(
                "add",
                pointer.data.name,
                node,
                first=self.integer(pointer.offset),
                value=self.integer(value.args[1]),
                order=order_of(value),
                scope=signals.scope_of(value.args, value.op),
            )
        del self.path[len(self.path) - conditions :]
        super()._store(node)
        if node.buffer.scope == "global":
            if len(node.indices) != 1:
                raise UnsupportedIR(f"{node.buffer.name} is not flat")
            kind = node.value.dtype
            stored = self.integer(node.value) if kind.is_int and kind.lanes == 1 else None
            self._touch("put", node.buffer, node, node.indices[0], kind.lanes, stored)
            self.is_new |= self._is_epoch(node.buffer)

    def _call(self, call: ir.Call) -> None:
        if call.op in (STORE, MAX):
            pointer = self._know(call)
            self.reads(call.args[1])
            self.note(
                "store" if call.op == STORE else "max",
                pointer.data.name,
                call,
                first=self.integer(pointer.offset),
                value=self.integer(call.args[1]),
                order=order_of(call),
                scope=signals.scope_of(call.args, call.op),
            )
            return
        if call.op in ("fence_proxy_async", "sync_warp"):
            self.note("proxy" if call.op == "fence_proxy_async" else "warp", "", call)
        super()._call(call)

    # ------------------------------------------------------------------ waits
    def _while(self, node: ir.While) -> None:
        loads = [n for n in ir.walk(node.cond) if isinstance(n, ir.Call) and n.op == LOAD]
        if not loads:
            super()._while(node)
            return
        if len(loads) > 1:
            raise UnsupportedIR("a wait for several words at once")
        pointer = self._know(loads[0])
        self.words[id(loads[0])] = word = self.symbol("word")
        self._only_polls(node.body)
        self.reads(node.cond)
        self._forget({POLLS})
        self.found.stored.append((POLLS, frozenset({OPAQUE})))
        flips = self._flips(node.cond, loads[0])
        self.note(
            "poll",
            pointer.data.name,
            node,
            first=self.integer(pointer.offset),
            order=order_of(loads[0]),
            scope=signals.scope_of(loads[0].args, LOAD),
            goes_on=self.boolean(node.cond.b if flips else node.cond),
            word=word,
            flips=flips,
        )

    def _only_polls(self, body: ir.Stmt | None) -> None:
        """A wait's rounds count polls and look at `status`, and do nothing else."""
        if not isinstance(body, ir.Store) or self.element(body.buffer, body.indices[0]) != POLLS:
            raise UnsupportedIR("a wait that does more than wait")
        for inner in ir.walk(body.value):
            match inner:
                case ir.Call(op="atomic_load_elem_op", args=(ir.AccessPtr(data=data), *_)):
                    if data.name != STATUS:
                        raise UnsupportedIR("a wait that looks at another word")
                    self._know(inner)
                case ir.Call():
                    raise UnsupportedIR(f"operation {inner.op} in a wait")
        self.reads(body.value)

    def _flips(self, cond: Any, load: ir.Call) -> bool:
        """Return whether a condition is ((old ^ word) & FLIP) == 0 and polls < a number."""
        match cond:
            case ir.BinOp(
                op="and",
                a=ir.BinOp(
                    op="eq",
                    a=ir.BinOp(
                        op="bitand",
                        a=ir.BinOp(op="bitxor", a=ir.Load(buffer=old), b=found),
                        b=ir.Const(value=bit),
                    ),
                    b=ir.Const(value=0),
                ),
                b=ir.BinOp(op="lt", a=ir.Load(buffer=polls), b=ir.Const()),
            ):
                return found is load and bit == FLIP and old.data.name == "old" and polls.data.name == POLLS
        return False
