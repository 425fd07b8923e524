"""What a thread of the plan's kernel computes, as terms, and what `plan_follow` enters on the way.

A private variable holds a term, or is a set of bits; of the words that a thread has to itself, one is
followed that stands for any. Accesses of other memory are events.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import z3

from megamoe.plan_count import THREAD
from verify import ir
from verify.intarith import ARITHMETIC, COMPARE, WRAPPING, in_range
from verify.ir import UnsupportedIR
from verify.text import show

SIGN_BIT = 31
_WIDE = ("int32", "int64")


@dataclass(frozen=True)
class Bits:
    """A word of which each bit is known: `bit(k)` holds if bit k is set."""

    bit: Callable[[z3.ArithRef], z3.BoolRef]


Value = z3.ArithRef | Bits
Key = tuple[str, int]  # a private variable and its element


@dataclass(frozen=True)
class Loop:
    """A loop that is open: its counter, and what it is counted to."""

    var: z3.ArithRef
    extent: z3.ArithRef


@dataclass(frozen=True)
class Event:
    """An access of memory that several threads share.

    Attributes:
        kind: read or write.
        buffer: name.
        at: element.
        value: of a write.
        path: conditions on the way, and ranges of what they speak of.
        facts: what holds of symbols in them.
        loops: counters of the loops around it.
        number: in program order.
        interval: between two barriers of the CTA.
    """

    kind: str
    buffer: str
    at: z3.ArithRef
    value: z3.ArithRef | None
    path: tuple[z3.BoolRef, ...]
    facts: tuple[z3.BoolRef, ...]
    loops: tuple[z3.ArithRef, ...]
    number: int
    interval: int
    span: ir.Span | None


@dataclass(frozen=True)
class Goal:
    """Something to be proved where a thread comes by.

    Attributes:
        claim: which claim it is part of.
    """

    claim: str
    what: str
    span: ir.Span | None
    path: tuple[z3.BoolRef, ...]
    goal: z3.BoolRef


class Guide(Protocol):
    """What the follower is told of a kernel.

    Attributes:
        own: buffer of which each thread has a column: its name, rows, and columns.
        bits: private variables that are sets of bits.
        ended: tensor whose word says that a wait has given up.
    """

    own: tuple[str, int, int]
    bits: tuple[str, ...]
    ended: str

    def carried(
        self, stores: frozenset[str], loads: frozenset[str], around: Sequence[z3.ArithRef | int]
    ) -> Callable[[z3.ArithRef], Mapping[Key, Value]] | None:
        """Return what the variables hold at the start of each round of a loop, which stores and loads these.

        `around` are the counters of the loops around it. None: the loop is unrolled, if it is a constant one.
        """
        ...

    def contents(self, buffer: str, at: z3.ArithRef) -> tuple[z3.BoolRef, z3.ArithRef] | None:
        """Return whether an element has been written once all threads have met, and with what."""
        ...


class Values:
    """The state of a thread, and the terms of its expressions.

    Attributes:
        events: accesses of shared and of written memory.
        goals: what has to hold on the way.
        counters: symbols of loops, which differ from thread to thread.
        seen: ids of the accesses that were followed, or of those in waits that were looked at.
        assumed: whether a word that waits write when they give up was taken to say that none has.
        local: private variables.
        own_word: the word of the thread's own that is followed: that of any row.
        path: conditions on the way.
        facts: what holds of symbols that are not the guide's.
    """

    def __init__(self, guide: Guide) -> None:
        """Start with nothing written."""
        self.guide = guide
        self.events: list[Event] = []
        self.goals: list[Goal] = []
        self.counters: list[z3.ArithRef] = []
        self.seen: set[int] = set()
        self.assumed = False
        self.local: dict[Key, Value] = {}
        self.own_written: z3.BoolRef = z3.BoolVal(False)
        self.own_word: z3.ArithRef = z3.Int("unwritten")
        self.own_row = z3.Int("of_word")
        self.path: list[z3.BoolRef] = [z3.And(self.own_row >= 0, self.own_row < guide.own[1])]
        self.facts: list[z3.BoolRef] = []
        self.env: dict[ir.Var, z3.ExprRef] = {}
        self.loops: list[Loop] = []
        self.span: ir.Span | None = None
        self.interval = 0
        self.stored: list[frozenset[str]] = []
        self.written: frozenset[str] = frozenset()
        self._required: set[tuple[str, int, tuple[int, ...]]] = set()
        self._fresh = 0

    # ------------------------------------------------------------------ what is to be proved
    def require(self, claim: str, what: str, goal: z3.BoolRef) -> None:
        """Enter a goal of this place."""
        if z3.is_true(z3.simplify(goal)):
            return
        known = (*self.path, *self.facts)
        question = (claim, goal.get_id(), tuple(term.get_id() for term in known))
        if question not in self._required:
            self._required.add(question)
            self.goals.append(Goal(claim, what, self.span, known, goal))

    def same(self, what: str, found: Value | None, wanted: Value) -> None:
        """Require that a variable holds what a guide says."""
        if isinstance(found, Bits) and isinstance(wanted, Bits):
            bit = z3.Int("any_bit")
            self.path.append(z3.And(bit >= 0, bit < SIGN_BIT))
            self.require("walk", what, found.bit(bit) == wanted.bit(bit))
            self.path.pop()
        elif found is None or isinstance(found, Bits) or isinstance(wanted, Bits):
            raise UnsupportedIR(f"{what}: it may not have been written")
        else:
            self.require("walk", what, found == wanted)

    def _next(self) -> int:
        """Return a number that no symbol has."""
        self._fresh += 1
        return self._fresh

    # ------------------------------------------------------------------ values
    def integer(self, node: Any) -> z3.ArithRef:
        """Return the term of an integer."""
        match node:
            case ir.Const(value=float(value)):
                if str(value) != "0.0":
                    raise UnsupportedIR(f"the number {value}")
                return z3.IntVal(0)  # its bits
            case ir.Const(value=value):
                return z3.IntVal(int(value))
            case ir.Var():
                if node not in self.env:
                    raise UnsupportedIR(f"{node.name} is not known")
                return self.env[node]
            case ir.Cast(a=a) if node.dtype.name in _WIDE and a.dtype.name in _WIDE:
                return self._fits(node, self.integer(a))
            case ir.Select(cond=cond, a=a, b=b):
                return self._select(cond, a, b)
            case ir.BinOp(op="bitand", a=ir.BinOp(op="shr", a=word, b=number), b=ir.Const(value=1)):
                return self._bit(word, self.integer(number))
            case ir.BinOp(op="bitand", a=ir.Load() as word, b=ir.Const(value=1)):
                return self._bit(word, z3.IntVal(0))
            case ir.BinOp(op=op, a=a, b=b) if op in ARITHMETIC:
                return self._fits(node, ARITHMETIC[op](self.integer(a), self.integer(b)))
            case ir.Load(buffer=buffer, indices=(index,)) if node.dtype.lanes == 1:
                self.seen.add(id(node))
                return self._load(buffer, self.integer(index))
            case ir.Call(op="atomic_load_elem_op", args=(ir.AccessPtr(data=data) as word, *_)):
                if data.name == self.guide.ended and data.name not in self.written:
                    self.assumed = True
                    self.seen.add(id(word))
                    return z3.IntVal(0)
        raise UnsupportedIR(f"a value of {type(node).__name__} {getattr(node, 'op', '')}")

    def _fits(self, node: ir.Expr, term: z3.ArithRef) -> z3.ArithRef:
        """Require that a machine integer holds what is computed."""
        if node.dtype.name not in _WIDE:
            raise UnsupportedIR(f"arithmetic of {node.dtype}")
        if isinstance(node, ir.Cast) or node.op in WRAPPING:  # type: ignore[attr-defined]
            self.require("overflow", f"{show(node)} fits {node.dtype}", in_range(node.dtype, term))
        return term

    def boolean(self, node: Any) -> z3.BoolRef:
        """Return the term of a truth value."""
        match node:
            case ir.Const(value=value):
                return z3.BoolVal(bool(value))
            case ir.Not(a=a):
                return z3.Not(self.boolean(a))
            case ir.BinOp(op=op, a=a, b=b) if op in ("and", "or"):
                return (z3.And if op == "and" else z3.Or)(self.boolean(a), self.boolean(b))
            case ir.BinOp(op="ne", a=ir.Load() as word, b=ir.Const(value=0)) if self._bits(word):
                return self._is_set(word)
            case ir.BinOp(op=op, a=a, b=b) if op in COMPARE and {a.dtype.name, b.dtype.name} <= {*_WIDE}:
                return COMPARE[op](self.integer(a), self.integer(b))
        raise UnsupportedIR(f"a condition of {type(node).__name__} {getattr(node, 'op', '')}")

    def _select(self, cond: ir.Expr, a: ir.Expr, b: ir.Expr) -> z3.ArithRef:
        chosen = self.boolean(cond)
        values = []
        for condition, node in ((chosen, a), (z3.Not(chosen), b)):
            self.path.append(condition)
            values.append(self.integer(node))
            self.path.pop()
        return z3.If(chosen, *values)

    def _load(self, buffer: ir.Buffer, at: z3.ArithRef) -> z3.ArithRef:
        name = buffer.data.name
        if buffer.scope.startswith("local"):
            value = self.local.get(self._key(buffer, at))
            if value is None or isinstance(value, Bits):
                raise UnsupportedIR(f"{name} may not have been written, or is no number")
            return value
        if buffer.scope == "global" and name not in self.written:
            (size,) = buffer.shape
            self.require("written", f"{name} is read inside it", z3.And(at >= 0, at < self.integer(size)))
            return z3.Function(f"{name}[]", z3.IntSort(), z3.IntSort())(at)
        if name == self.guide.own[0] and name in self.stored[self.interval]:
            return self._load_own(at)
        held = self.guide.contents(name, at)
        if held is None:
            raise UnsupportedIR(f"nothing is known of {name}")
        self._event("read", name, at, None)
        self.require("written", f"what is read of {name} has been written", held[0])
        return held[1]

    def _key(self, buffer: ir.Buffer, at: z3.ArithRef) -> Key:
        at = z3.simplify(at)
        if not isinstance(at, z3.IntNumRef):
            raise UnsupportedIR(f"an element of {buffer.name} that is not constant")
        (size,) = buffer.shape
        if not (isinstance(size, ir.Const) and 0 <= at.as_long() < int(size.value)):
            raise UnsupportedIR(f"an element outside {buffer.name}")
        return buffer.data.name, at.as_long()

    # ------------------------------------------------------------------ bits
    def _bits(self, node: ir.Load) -> Bits | None:
        if not node.buffer.scope.startswith("local") or node.dtype.lanes != 1:
            return None
        value = self.local.get(self._key(node.buffer, self.integer(node.indices[0])))
        if not isinstance(value, Bits):
            return None
        self.seen.add(id(node))
        return value

    def _bit(self, word: Any, number: z3.ArithRef) -> z3.ArithRef:
        bits = self._bits(word) if isinstance(word, ir.Load) else None
        if bits is None:
            raise UnsupportedIR("a bit of what is no set of bits")
        self.require("walk", "a bit of a word", z3.And(number >= 0, number < SIGN_BIT))
        return z3.If(bits.bit(number), z3.IntVal(1), z3.IntVal(0))

    def _is_set(self, word: ir.Load) -> z3.BoolRef:
        """Return whether a word is not zero: if its first bit is set, or that of the loop's counter."""
        bits, some = self._bits(word), z3.Bool(f"is_set{self._next()}")
        assert bits is not None, "asked for bits alone"
        for number in (z3.IntVal(0), *(loop.var for loop in self.loops[-1:])):
            inside = z3.And(number >= 0, number < SIGN_BIT)
            self.facts.append(z3.Implies(z3.And(inside, bits.bit(number)), some))
        return some

    def _word(self, node: ir.Expr) -> Value:
        """Return the value of a store: a number, or a word whose bits are followed."""
        match node:
            case ir.BinOp(op="bitor", a=ir.Load() as word, b=added) if (bits := self._bits(word)) is not None:
                match added:
                    case ir.BinOp(op="shl", a=ir.Const(value=1), b=number):
                        at = self.integer(number)
                    case ir.Const(value=int(value)) if value > 0 and value & (value - 1) == 0:
                        at = z3.IntVal(value.bit_length() - 1)
                    case _:
                        raise UnsupportedIR("bits that are set")
                self.require("walk", "a bit of a word", z3.And(at >= 0, at < SIGN_BIT))
                return Bits(lambda k: z3.Or(bits.bit(k), k == at))
        return self.integer(node)

    # ------------------------------------------------------------------ words of a thread's own
    def _own_at(self, at: z3.ArithRef) -> z3.BoolRef:
        """Require an own word; return whether it is the one that is followed."""
        name, _, columns = self.guide.own
        held = self.guide.contents(name, at)
        assert held is not None, "a buffer of the threads' own has contents"
        own = z3.And(held[0], at % columns == THREAD)
        self.require("order", f"words of {name} are the thread's own", own)
        return at == self.own_row * columns + THREAD

    def _load_own(self, at: z3.ArithRef) -> z3.ArithRef:
        is_it = self._own_at(at)
        other = z3.Int(f"other{self._next()}")
        self.require("written", f"an own word of {self.guide.own[0]}", z3.Implies(is_it, self.own_written))
        self.facts.append(in_range(ir.INT32, other))
        return z3.If(is_it, self.own_word, other)

    def _lane(self, node: ir.Expr, lane: int) -> z3.ArithRef:
        match node:
            case ir.Broadcast(value=value):
                return self.integer(value)
            case ir.Select(cond=cond, a=a, b=b) if cond.dtype.lanes == 1:
                chosen = self.boolean(cond)
                values = []
                for condition, side in ((chosen, a), (z3.Not(chosen), b)):
                    self.path.append(condition)
                    values.append(self._lane(side, lane))
                    self.path.pop()
                return z3.If(chosen, *values)
            case ir.Load(buffer=buffer, indices=(ir.Ramp(base=base, stride=stride),)):
                self.seen.add(id(node))
                return self._load(buffer, self.integer(base) + self.integer(stride) * lane)
        raise UnsupportedIR(f"a vector of {type(node).__name__}")

    def _event(self, kind: str, buffer: str, at: z3.ArithRef, value: z3.ArithRef | None) -> None:
        loops = tuple(loop.var for loop in self.loops)
        number = len(self.events)
        self.events.append(
            Event(
                kind,
                buffer,
                at,
                value,
                tuple(self.path),
                tuple(self.facts),
                loops,
                number,
                self.interval,
                self.span,
            )
        )
