"""Which task of `schedule` a round of a role's loops is, and what of a round has happened by when.

A *nest* is a loop over segments (or waves) and in it a loop over turns, with a part's events inside. Here
are the terms that say which task a round is by `schedule`, and what a task has to wait for; the compiled
loops are held against them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import z3

from megamoe import schedule
from megamoe.config import Config
from megamoe.ring import every, given, some
from megamoe.role_events import BLOCK, THREAD, Event, Followed, Loop
from megamoe.role_walk import Roles
from megamoe.schedule import Kind
from verify.encode import Hypothesis
from verify.ir import UnsupportedIR
from verify.solve import Obligation

_NUMBER, _LEFT_OUT = "ahead", "ahead.1"  # of a product in its segment; numbers that stand for none
MOST_ROUNDS = 8  # of an inner loop with a wait or a signal: each is looked at


@dataclass(frozen=True)
class Task:
    """A round's task by `schedule`, as terms.

    Attributes:
        exists: that the round has a task.
        kind: value of its Kind.
        block, part: which.
        offset: of a product, its number among those of its segment.
        before: of a product, the first block of its wave.
    """

    exists: z3.BoolRef
    kind: z3.ArithRef
    block: z3.ArithRef
    part: z3.ArithRef
    offset: z3.ArithRef
    before: z3.ArithRef

    def of(self, kind: Kind) -> z3.BoolRef:
        """Return that it is of a kind."""
        return z3.And(self.exists, self.kind == kind.value)


@dataclass(frozen=True)
class Wait:
    """What a task of a kind waits for: word `word` of `tensor` is at least `need`; only if `when`."""

    kind: Kind
    tensor: str
    when: z3.BoolRef
    word: z3.ArithRef
    need: int


@dataclass(frozen=True)
class Plan:
    """A kernel's sizes and the plan's facts, as terms."""

    config: Config
    roles: Roles

    @property
    def rank(self) -> z3.ArithRef:
        """Rank of the launch."""
        return self.roles.rank

    @property
    def cta(self) -> z3.ArithRef:
        """CTA of the rank."""
        return BLOCK if self.roles.ranks == 1 else BLOCK % self.config.ctas

    def word(self, block: z3.ArithRef) -> z3.ArithRef:
        """Return the element of a counter that is of a block."""
        return self.rank * self.config.pool_blocks + block

    def product(self, segment: z3.ArithRef, offset: z3.ArithRef, gap: z3.ArithRef) -> Task:
        """Return the product of a number among those of a segment, as `schedule.tasks` has it."""
        c, g = self.config, self.config.geometry
        before, first = self.roles.first(segment), self.roles.first(segment + 1)
        later = offset - schedule.l1_tasks(g, before, first)
        second = schedule.l2_offset(later, gap, c.ctas)
        is_first = later < 0
        has_second = z3.And(second >= 0, second < (first - before) * g.l2_tiles)
        one, other = schedule.spread(before, offset, g.l1_tiles), schedule.spread(before, second, g.l2_tiles)
        kind = z3.If(is_first, z3.IntVal(Kind.LINEAR1.value), z3.IntVal(Kind.LINEAR2.value))
        block, part = (z3.If(is_first, a, b) for a, b in zip(one, other, strict=True))
        return Task(z3.Or(is_first, has_second), kind, block, part, offset, before)

    def offset(self, segment: z3.ArithRef, turn: z3.ArithRef) -> z3.ArithRef:
        """Return the number of a turn's product among those of its segment."""
        c, g = self.config, self.config.geometry
        before = self.roles.first(segment)
        return schedule.share_start(before * g.tiles, self.cta, c.ctas) + turn * c.ctas - before * g.tiles

    def products(self, segment: z3.ArithRef, gap: z3.ArithRef) -> z3.ArithRef:
        """Return the numbers of products in a segment, those of none among them."""
        before, first = self.roles.first(segment), self.roles.first(segment + 1)
        return (first - before) * self.config.geometry.tiles + gap

    def gap(self, segment: z3.ArithRef) -> z3.ArithRef:
        """Return how many numbers of a segment are left out."""
        g = self.config.geometry
        before, first = self.roles.first(segment), self.roles.first(segment + 1)
        return schedule.gap(g, before, first, self.config.ctas, segment == g.num_waves)

    def dispatch(self, segment: z3.ArithRef, turn: z3.ArithRef) -> Task:
        """Return the dispatch of a turn, likewise; its offset is the number of all."""
        c, parts = self.config, self.config.geometry.dispatch_parts
        first = self.roles.first(segment + 1)
        number = schedule.share_start(first * parts, self.cta, c.ctas) + turn * c.ctas
        block, part = number / parts, number % parts
        exists = number < self.roles.first(segment + 2) * parts
        return Task(exists, z3.IntVal(Kind.DISPATCH.value), block, part, number, first)

    def waits(self, task: Task) -> tuple[Wait, ...]:
        """Return what a task waits for."""
        g, block = self.config.geometry, task.block
        x, h = schedule.x_freed_by(g, block), schedule.h_freed_by(g, block)
        rows, first, second = (schedule.complete(g, kind) for kind in Kind)
        one, two, three = Kind
        return (
            Wait(one, "l1_done", z3.And(task.of(one), x >= 0), self.word(x), first),
            Wait(two, "l2_done", z3.And(task.of(two), h >= 0), self.word(h), second),
            Wait(two, "dispatched", task.of(two), self.word(block), rows),
            Wait(three, "l1_done", task.of(three), self.word(block), first),
        )


@dataclass(frozen=True)
class Nest:
    """A part's two loops around what it does for a task.

    What a round has chosen is proved once to be the task of `schedule` (`rounds`); events are then seen with
    symbols in its place, of which no more is known than where they lie.

    Attributes:
        plan: sizes and facts.
        found: of the part.
        segment, turn: the loops.
        kind: DISPATCH, or LINEAR1 for products of either kind.
        leader: thread that waits and signals for the others.
        extra: more that is known in a round.
    """

    plan: Plan
    found: Followed
    segment: Loop
    turn: Loop
    kind: Kind
    leader: int
    extra: tuple[Hypothesis, ...] = field(default=())

    @property
    def name(self) -> str:
        """Of the part."""
        return self.found.part.name

    @property
    def is_dispatch(self) -> bool:
        """Whether tasks are dispatch."""
        return self.kind is Kind.DISPATCH

    @cached_property
    def task(self) -> Task:
        """The task of a round, as symbols."""
        kind, block, part, offset = z3.Ints("kind block part offset")
        first = self.plan.roles.first(self.segment.var)
        if self.is_dispatch:
            number = z3.IntVal(Kind.DISPATCH.value)
            return Task(z3.BoolVal(True), number, block, part, offset, first)
        return Task(kind > 0, kind, block, part, offset, first)

    @cached_property
    def _chosen(self) -> list[tuple[z3.ExprRef, z3.ExprRef]]:
        """Terms of the compiled loops and the symbols for them, in the order they are replaced in."""
        roles, leave = self.plan.roles, self.turn.leave
        steers = [
            (leave.get(name), own)
            for name, own in zip(roles.steers, (self.task.block, self.task.part), strict=True)
        ]
        if not self.is_dispatch:
            steers += [
                (leave.get(roles.kind), self.task.kind),
                (self.turn.entry.get(_NUMBER), self.task.offset),
            ]
        # Larger terms first: they are made of the others.
        known = [(term, own) for term, own in steers if term is not None]
        return sorted(known, key=lambda pair: -len(pair[0].sexpr()))

    def seen(self, term: Any) -> Any:
        """Return a term with symbols for what a round has chosen."""
        if not isinstance(term, z3.ExprRef):
            return term
        for old, own in self._chosen:
            term = z3.substitute(term, (old, own))
        return term

    @cached_property
    def _events(self) -> list[Event]:
        around, found = (self.segment, self.turn), []
        for e in self.found.events:
            if e.loops[:2] == around:
                names_ = ("first", "last", "value", "stored", "goes_on")
                changed = {n: self.seen(getattr(e, n)) for n in names_ if hasattr(e, n)}
                found.append(replace(e, path=tuple(map(self.seen, e.path)), **changed))
        return found

    def events(self, *kinds: str) -> list[Event]:
        """Return events of the kinds in a round, in program order."""
        return [e for e in self._events if e.kind in kinds]

    def known(self) -> tuple[Hypothesis, ...]:
        """Return what is known in a round of its task, beside the plan's facts."""
        s, roles, task, g = self.segment.var, self.plan.roles, self.task, self.plan.config.geometry
        low, high = (roles.first(s + n + self.is_dispatch) for n in (0, 1))
        parts: Any = g.dispatch_parts
        if not self.is_dispatch:
            parts = z3.If(task.kind == Kind.LINEAR1.value, z3.IntVal(g.l1_tiles), z3.IntVal(g.l2_tiles))
        inside = z3.And(low <= task.block, task.block < high, task.part >= 0, task.part < parts)
        kinds = [Kind.DISPATCH.value] if self.is_dispatch else [0, Kind.LINEAR1.value, Kind.LINEAR2.value]
        facts = given(roles.launched, *self.turn.path, self.segment.range, z3.Implies(task.exists, inside))
        return (*facts, *given(some(*(task.kind == k for k in kinds))), *roles.ascends(s, s + 1), *self.extra)

    def rounds(self) -> Iterator[Obligation]:
        """The loops have the turns that `schedule` says, and their variables its tasks."""
        yield from self._dispatches() if self.is_dispatch else self._products()

    def _around(self) -> tuple[Hypothesis, ...]:
        s, t, roles = self.segment.var, self.turn.var, self.plan.roles
        return (*given(roles.launched, *self.turn.path, self.segment.range, t >= 0), *roles.ascends(s, s + 1))

    def _dispatches(self) -> Iterator[Obligation]:
        s, t, leave = self.segment.var, self.turn.var, self.turn.leave
        task, known, roles = self.plan.dispatch(s, t), self._around(), self.plan.roles
        same = z3.And(self.turn.start == 0, (t < self.turn.extent) == task.exists)
        yield Obligation(f"{self.name}: the turns of a wave", None, known, same)
        if any(name not in leave for name in roles.steers):
            raise UnsupportedIR(f"{self.name}: it does not choose what to dispatch")
        known = (*known, *given(task.exists))
        for name, own in zip(roles.steers, (task.block, task.part), strict=True):
            yield Obligation(f"{self.name}: its {name} of dispatch", None, known, leave[name] == own)
        low, high = (roles.first(s + n) for n in (1, 2))
        parts = self.plan.config.geometry.dispatch_parts
        inside = z3.And(low <= task.block, task.block < high, task.part >= 0, task.part < parts)
        yield Obligation(f"{self.name}: of the wave's blocks", None, known, inside)

    def _products(self) -> Iterator[Obligation]:
        """First that the numbers are `schedule`'s, then, for any number, that what is chosen is."""
        s, t, leave, roles = self.segment.var, self.turn.var, self.turn.leave, self.plan.roles
        known, entry, left_out = self._around(), self.turn.entry, self.segment.leave.get(_LEFT_OUT)
        if left_out is None or _NUMBER not in entry or roles.kind not in leave:
            raise UnsupportedIR(f"{self.name}: it does not count its products")
        number, gap = self.plan.offset(s, t), self.plan.gap(s)
        has = number < self.plan.products(s, gap)
        same = z3.And(self.turn.start == 0, (t < self.turn.extent) == has)
        yield Obligation(f"{self.name}: the turns of a segment", None, known, same)
        right = z3.And(entry[_NUMBER] == number, number >= 0)
        yield Obligation(f"{self.name}: the numbers of its products", None, known, right)
        between = z3.And(left_out == gap, gap >= 0, gap < self.plan.config.ctas)
        yield Obligation(f"{self.name}: the numbers left out", None, known, between)
        offset, some_gap = z3.Ints("offset gap")
        new = [(entry[_NUMBER], offset), (left_out, some_gap)]
        terms = {n: z3.substitute(leave[n], *new) for n in (roles.kind, *roles.steers) if n in leave}
        task = self.plan.product(s, offset, some_gap)
        known = (*given(roles.launched, self.segment.range, offset >= 0), *roles.ascends(s, s + 1))
        known = (*known, *given(some_gap >= 0, some_gap < self.plan.config.ctas))
        kind = z3.If(task.exists, task.kind, z3.IntVal(0))
        yield Obligation(f"{self.name}: the kind of a product", None, known, terms[roles.kind] == kind)
        known = (*known, *given(task.exists))
        for name, own in zip(roles.steers, (task.block, task.part), strict=True):
            if name in terms:
                yield Obligation(f"{self.name}: the {name} of a product", None, known, terms[name] == own)
        g = self.plan.config.geometry
        parts = z3.If(task.kind == Kind.LINEAR1.value, z3.IntVal(g.l1_tiles), z3.IntVal(g.l2_tiles))
        low, high = (roles.first(s + n) for n in (0, 1))
        inside = z3.And(low <= task.block, task.block < high, task.part >= 0, task.part < parts)
        yield Obligation(f"{self.name}: of the wave's blocks", None, known, inside)

    # ------------------------------------------------------------------ what has happened
    def chain(
        self, links: Sequence[Sequence[Event]], after: int, before: int, rounds: tuple = ()
    ) -> z3.BoolRef:
        """Return that some event of each link happens, one behind the other, between two places in a round.

        Waits and signals are those of the leader; other events those of the thread that is asked about.
        Events in an inner loop may be in any of its rounds, those of one loop in the same; in a loop of
        `rounds`, which are those around one of the two places (`rounds_of`), in the round that it is in.
        """
        if not links:
            return z3.BoolVal(True)
        ways = []
        for event in links[0]:
            if event.elected or not after < event.at < before:
                continue
            for env in self._rounds(event, rounds):
                numbers = [(loop.var, z3.IntVal(n)) for loop, n in env if n is not None]
                happens = z3.substitute(every(z3.BoolVal(True), *event.path), *numbers)
                ways.append(
                    z3.And(self.by_leader(event, happens), self.chain(links[1:], event.at, before, env))
                )
        return z3.Or(*ways) if ways else z3.BoolVal(False)

    def by_leader(self, event: Event, term: z3.BoolRef) -> z3.BoolRef:
        """Return a term of an event as its thread has it: a wait's or a signal's is the leader."""
        if event.kind in ("poll", "add"):
            return z3.substitute(term, (THREAD, z3.IntVal(self.leader)))
        return term

    def _rounds(self, event: Event, rounds: tuple) -> Iterator[tuple]:
        todo = [tuple(r for r in rounds)]
        for loop in event.loops[2:]:
            if any(known is loop for known, _ in rounds):
                continue
            start, extent = z3.simplify(loop.start), z3.simplify(loop.extent)
            if not isinstance(start, z3.IntNumRef) or not isinstance(extent, z3.IntNumRef):
                raise UnsupportedIR(f"{self.name}: {event.kind} of {event.what} in a loop of unknown length")
            if extent.as_long() > MOST_ROUNDS:
                raise UnsupportedIR(f"{self.name}: {event.kind} of {event.what} in a long loop")
            numbers = range(start.as_long(), start.as_long() + extent.as_long())
            todo = [(*env, (loop, n)) for env in todo for n in numbers]
        yield from todo


def rounds_of(event: Event) -> tuple[tuple[Loop, None], ...]:
    """Return the inner loops around an event, each in the round that the event is in."""
    return tuple((loop, None) for loop in event.loops[2:])


def asked(nest: Nest, event: Event, *more: z3.BoolRef) -> tuple[Hypothesis, ...]:
    """Return what is known where an event of a nest happens."""
    terms = (*event.ranges, every(z3.BoolVal(True), *event.path), *more)
    return (*nest.known(), *given(*terms), *nest.plan.roles.in_range(*terms, event.first))
