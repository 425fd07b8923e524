"""Order that the text alone shows: a barrier, wait or fence on every way from one access to another.

Most pairs of accesses are ordered by a barrier that stands between them, whatever the counters are.
Two executions of a pair either share the rounds of all loops around both, or in one of those loops
one of them is in an earlier round; each such `Relation` is looked at by itself. Only what is left
open goes to the solver.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import z3

from verify.encode import constants_of, holds_for_the_call
from verify.intarith import constant_of
from verify.sync.collectives import Barrier, members
from verify.sync.events import ASYNC_PROXY, Agent, Event, Events
from verify.sync.order import Point


@dataclass(frozen=True)
class Relation:
    """How the rounds of two executions compare.

    Attributes:
        depth: of the outermost shared loop whose rounds differ; None where all are the same.
        forward: the first of the pair is in the earlier round.
    """

    depth: int | None = None
    forward: bool = True


def relations(a: Event, b: Event) -> Iterator[Relation]:
    """Yield every relation that two executions can have."""
    yield Relation()
    for depth in range(a.point.shared_loops(b.point)):
        yield Relation(depth, True)
        if a is not b:  # of two accesses of one statement, too, either may be the earlier
            yield Relation(depth, False)


class Structure:
    """Answers questions about the text of one kernel."""

    def __init__(self, events: Events, early: Sequence[Point] = ()) -> None:
        """Take the synchronisation of a kernel; `early` are fences that count before a barrier alone."""
        self.events = events
        self.early = early
        self._threads: dict[int, np.ndarray] = {}
        self._covered: dict[tuple[int, int], bool] = {}

    def ordered(self, a: Event, b: Event, relation: Relation) -> bool:
        """Return whether `a` ends before `b` begins, or `b` before `a`, in all executions so related."""
        if relation.depth is None:
            if a.point.position > b.point.position:
                a, b = b, a
        elif not relation.forward:
            a, b = b, a
        if a.space.kind == "local":
            return self._registers(a, b, relation.depth)
        return self._threads_ordered(a, b, relation.depth)

    # ------------------------------------------------------------------ threads of a block
    def _threads_ordered(self, a: Event, b: Event, depth: int | None) -> bool:
        if a.agent is Agent.TMA_LOAD:
            return False  # ends with a phase
        fenced = a.writes and a.agent not in ASYNC_PROXY and b.agent in ASYNC_PROXY
        for barrier in self.events.barriers:
            if not barrier.waits:
                continue
            for arrived, left in self._meets(a, b, barrier, depth):
                for end, here in self._ends(a, barrier.point, arrived, depth):
                    way = _Way(end, here, barrier.point, arrived, left)
                    if not fenced or self._fenced(way, b, depth):
                        return True
        return False

    def _meets(self, a: Event, b: Event, barrier: Barrier, depth: int | None) -> Iterator[tuple[bool, bool]]:
        """Yield whether the barrier stands in `a`'s round, and in `b`'s, on the way from `a` to `b`."""
        point = barrier.point
        after, ahead = point.position > a.point.position, point.position < b.point.position
        from_a = self.covered(point, a.point) and self._includes(point, b.point)
        from_b = self.covered(point, b.point) and self._includes(point, a.point)
        if depth is None:
            if after and ahead and (from_a or from_b):
                yield True, True
            return
        if not self._inside(point, a.point, depth):
            return
        if after and from_a:
            yield True, False
        if ahead and from_b:
            yield False, True

    def _inside(self, point: Point, other: Point, depth: int) -> bool:
        return point.shared_loops(other) > depth

    def _ends(
        self, a: Event, stop: Point, same_round: bool, depth: int | None
    ) -> Iterator[tuple[Point, bool]]:
        """Yield where an access has ended before its thread gets to `stop`, and whether in `a`'s round.

        Args:
            a: the access.
            stop: a barrier.
            same_round: it is met in `a`'s round; else in a later one of the loop at `depth`.
            depth: of the outermost shared loop whose rounds differ; None where all are the same.
        """
        if a.agent is Agent.THREAD:
            yield a.point, True
            return
        commits = self.events.commits.get(a.agent, [])
        for wait, pending, reads_only in self.events.group_waits.get(a.agent, []):
            if pending or (reads_only and a.writes):
                continue
            after = [c for c in commits if self._follows(c, a.point, depth)]
            here = self._follows(wait, a.point, depth) and not (same_round and wait.position > stop.position)
            if here and (a.agent is Agent.CP_ASYNC or any(c.position < wait.position for c in after)):
                yield wait, True
            # In a later round, before the barrier, the wait is for all that was committed in earlier ones.
            if not same_round and self._precedes(wait, stop, depth) and (a.agent is Agent.CP_ASYNC or after):
                yield wait, False

    def _follows(self, point: Point, start: Point, depth: int | None) -> bool:
        """Return whether the thread executes `point` after `start` in the same round."""
        inside = depth is None or self._inside(point, start, depth)
        return inside and point.position > start.position and self.covered(point, start)

    def _precedes(self, point: Point, end: Point, depth: int | None) -> bool:
        inside = depth is None or self._inside(point, end, depth)
        return inside and point.position < end.position and self.covered(point, end)

    def _fenced(self, way: "_Way", b: Event, depth: int | None) -> bool:
        """Return whether a fence lies between an access's end and the barrier, or between that and `b`."""
        for fence in (*self.events.fences, *self.early):
            if way.here:
                behind = self._follows(fence, way.end, depth)
                before = not way.arrived or fence.position < way.barrier.position
            else:
                behind = fence.position > way.end.position
                before = self._precedes(fence, way.barrier, depth)
            if behind and before:
                return True
        return any(
            self._precedes(f, b.point, depth) and (not way.left or f.position > way.barrier.position)
            for f in self.events.fences
        )

    # ------------------------------------------------------------------ registers of one thread
    def _registers(self, a: Event, b: Event, depth: int | None) -> bool:
        if a.agent is Agent.WGMMA:
            if b.agent is Agent.WGMMA and a.writes and b.writes and a.shape == b.shape and _same_bytes(a, b):
                return True  # the tensor core keeps instructions of one shape in order
            return self._awaited(a, b.point, depth)
        return any(self._between(f, a.point, b.point, depth) for f in self.events.register_fences)

    def _awaited(self, a: Event, end: Point, depth: int | None) -> bool:
        commits = self.events.commits.get(a.agent, [])
        for wait, pending, _ in self.events.group_waits.get(a.agent, []):
            if pending:
                continue
            here = self._follows(wait, a.point, depth) and (depth is not None or wait.position < end.position)
            there = depth is not None and self._precedes(wait, end, depth)
            if here and any(self._follows(c, a.point, depth) and c.position < wait.position for c in commits):
                return True
            if there and any(self._follows(c, a.point, depth) for c in commits):
                return True
        return False

    def _between(self, point: Point, start: Point, end: Point, depth: int | None) -> bool:
        follows, precedes = self._follows(point, start, depth), self._precedes(point, end, depth)
        if depth is not None:
            return follows or precedes
        return start.position < point.position < end.position and (
            self.covered(point, start) or self.covered(point, end)
        )

    # ------------------------------------------------------------------ conditions
    def covered(self, point: Point, by: Point) -> bool:
        """Return whether a thread that executes `by` executes `point` too, in the same rounds.

        Loops around `point` alone must run at least once.
        """
        key = (id(point), id(by))
        if key not in self._covered:
            self._covered[key] = self._covers(point, by)
        return self._covered[key]

    def _covers(self, point: Point, by: Point) -> bool:
        known = {t.get_id() for t in by.conditions}
        shared = point.shared_loops(by)
        own = set()
        for _, index in point.loops[shared:]:
            extent = constant_of(index.extent)
            if extent is None or extent < 1:
                return False
            own.add(index.const.decl().name())
        thread: bool | None = None
        for hypothesis in point.site.scope.hypotheses:
            if holds_for_the_call(hypothesis) or hypothesis.term.get_id() in known:
                continue
            if hypothesis.kind == "loop" and any(_ranges(hypothesis.term, n) for n in own):
                continue
            if thread is None:
                thread = self._includes(point, by)
            if not thread or not self._static(point, hypothesis.term):
                return False
        return True

    def _static(self, point: Point, term: z3.BoolRef) -> bool:
        thread = next(i.const for i in point.site.scope.launch if i.tag == "threadIdx.x")
        return constants_of(term) == {thread.decl().name()}

    def _includes(self, point: Point, other: Point) -> bool:
        """Return whether every thread that may get to `other` passes the thread guards of `point`."""
        return bool(np.all(self.threads(point) >= self.threads(other)))

    def threads(self, point: Point) -> np.ndarray:
        """Return which threads the guards on the thread index let through to `point`."""
        key = id(point.site)
        if key not in self._threads:
            scope = point.site.scope
            thread = next(i.const for i in scope.launch if i.tag == "threadIdx.x")
            self._threads[key] = members(scope.hypotheses, thread, self.events.threads)
        return self._threads[key]

    def follows(self, point: Point, start: Point) -> bool:
        """Return whether a thread executes `point` after `start` in the same rounds."""
        return self._follows(point, start, None)

    def ends(self, a: Event) -> bool:
        """Return whether a thread that starts an agent's access later waits for its end, whatever happens."""
        commits = [c for c in self.events.commits.get(a.agent, []) if self.follows(c, a.point)]
        waits = [w for w, pending, _ in self.events.group_waits.get(a.agent, []) if not pending]
        return any(self.follows(w, a.point) and any(c.position < w.position for c in commits) for w in waits)

    def preceded(self, end: Point, points: Sequence[Point]) -> bool:
        """Return whether a thread executes one of `points` before `end`, in the same rounds."""
        return any(self._precedes(p, end, None) for p in points)

    def waits_before(self, end: Point) -> list[Point]:
        """Return the waits on mbarriers that a thread executes, in the same rounds, before `end`."""
        keep = partial(self._precedes, end=end, depth=None)
        return [w for w in self.events.waits if len(w.loops) == w.shared_loops(end) and keep(w)]

    def arrivals_after(self, start: Point) -> list[Point]:
        """Return the arrivals that a thread executes, in the same rounds, after `start`."""
        keep = partial(self._follows, start=start, depth=None)
        return [x for x in self.events.arrivals if len(x.loops) == x.shared_loops(start) and keep(x)]


@dataclass(frozen=True)
class _Way:
    """From where an access has ended, through a barrier.

    Attributes:
        end: the access of a thread itself, or the wait for an agent's.
        here: the end is in the access's round; else before the barrier in the barrier's.
        arrived, left: the barrier is met in the round of the earlier access; in that of the later.
    """

    end: Point
    here: bool
    barrier: Point
    arrived: bool
    left: bool


def _same_bytes(a: Event, b: Event) -> bool:
    return z3.eq(a.first, b.first) and z3.eq(a.last, b.last) and constant_of(a.first) is not None


def _ranges(term: z3.BoolRef, name: str) -> bool:
    return constants_of(term) == {name}
