"""Program order of one thread, over symbolic loop counters.

A `Point` is a place in the code, an `Instance` one execution of it: by a thread, at values of the
loops around it. Two executions by one thread are ordered lexicographically by the loops that they
share and then by their places in the text; that is a formula over the counters, so trip counts may
be symbolic and back-edges need no special case.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import z3

from verify import ir
from verify.encode import Index, holds_for_the_call
from verify.intarith import conjunction
from verify.symbols import put
from verify.walk import Site


@dataclass(frozen=True, eq=False)
class Point:
    """A place in the text.

    Attributes:
        position: order in the text; the second number orders the parts of one statement.
        loops: the statements For and While around it, outermost first, with their counters.
    """

    site: Site
    position: tuple[int, int]

    @cached_property
    def loops(self) -> tuple[tuple[ir.Stmt, Index], ...]:
        """The loops around it with their counters, outermost first."""
        nodes: list[ir.Stmt] = [s for s in self.site.path if isinstance(s, (ir.For, ir.While))]
        if len(nodes) < len(self.site.scope.loops):  # the condition of a while loop is inside of it
            nodes.append(self.site.statement)
        return tuple(zip(nodes, self.site.scope.loops, strict=True))

    @cached_property
    def conditions(self) -> tuple[z3.BoolRef, ...]:
        """What holds where it is executed, besides what holds for the whole call."""
        return tuple(h.term for h in self.site.scope.hypotheses if not holds_for_the_call(h))

    @cached_property
    def conditions_at(self) -> dict[tuple[int, ...], tuple["Pairs", tuple[z3.BoolRef, ...]]]:
        """What `Instance.conditions` has found, by the addresses of the pairs, which stay alive with them."""
        return {}

    def shared_loops(self, other: "Point") -> int:
        """Return how many loops hold both places."""
        count = 0
        for (mine, _), (theirs, _) in zip(self.loops, other.loops, strict=False):
            if mine is not theirs:
                break
            count += 1
        return count


def in_other_arms(a: Point, b: Point) -> bool:
    """Return whether two places stand in the two arms of one choice."""
    mine, theirs = ((*p.site.path, p.site.statement) for p in (a, b))
    common = 0
    while common < min(len(mine), len(theirs)) and mine[common] is theirs[common]:
        common += 1
    choice = mine[common - 1] if common else None
    if not isinstance(choice, ir.If) or choice.orelse is None or common == min(len(mine), len(theirs)):
        return False
    first = any(s is mine[common] for s in _parts(choice.then))
    return first != any(s is theirs[common] for s in _parts(choice.then))


def _parts(stmt: ir.Stmt) -> Iterator[ir.Stmt]:
    if isinstance(stmt, ir.Seq):
        for inner in stmt.stmts:
            yield from _parts(inner)
    else:
        yield stmt


Pairs = tuple[tuple[z3.ArithRef, z3.ArithRef], ...]


@dataclass(frozen=True, eq=False)
class Instance:
    """One execution of a point.

    Attributes:
        thread: the launch constants of the point's terms -> the thread's and block's own values.
        counters: values of the loops around the point.
        lanes: likewise for vector lanes.
    """

    point: Point
    thread: Pairs
    counters: tuple[z3.ArithRef, ...]
    lanes: Pairs = ()

    @cached_property
    def _pairs(self) -> Pairs:
        own = [(i.const, c) for (_, i), c in zip(self.point.loops, self.counters, strict=True)]
        return tuple(p for p in (*self.thread, *self.lanes, *own) if not z3.eq(*p))

    def of(self, term: z3.ExprRef) -> z3.ExprRef:
        """Return a term of the point's scope for this execution."""
        return put(term, self._pairs)

    @cached_property
    def conditions(self) -> tuple[z3.BoolRef, ...]:
        """That the thread gets here with these counters, one condition each."""
        pairs = self._pairs
        key = tuple(part.ast.value for pair in pairs for part in pair)
        known = self.point.conditions_at
        if key not in known:
            known[key] = (pairs, tuple(self.of(c) for c in self.point.conditions))
        return known[key][1]

    @cached_property
    def happens(self) -> z3.BoolRef:
        """That the thread gets here with these counters."""
        return conjunction(list(self.conditions))

    def at(self, point: Point, counters: Sequence[z3.ArithRef]) -> "Instance":
        """Return the execution of another point by the same thread."""
        return Instance(point, self.thread, tuple(counters))


def before(first: Instance, second: Instance) -> z3.BoolRef:
    """Return that one thread executes `first` before `second`."""
    term = z3.BoolVal(first.point.position < second.point.position)
    for depth in reversed(range(first.point.shared_loops(second.point))):
        a, b = first.counters[depth], second.counters[depth]
        if not z3.eq(a, b):
            term = z3.Or(a < b, z3.And(a == b, term))
    return term


def in_step(first: Instance, second: Instance) -> z3.BoolRef:
    """Return that `first` is taken for the earlier of two executions that share the rounds around both.

    In the text as it stands; of the arms of a choice, which run side by side, loop by loop the earlier round,
    or the same.
    """
    a, b = first.point, second.point
    if not in_other_arms(a, b):
        return z3.BoolVal(a.position < b.position)
    shared = a.shared_loops(b)
    mine, theirs = (
        [c for (s, _), c in zip(i.point.loops[shared:], i.counters[shared:], strict=True) if is_serial(s)]
        for i in (first, second)
    )
    term = z3.BoolVal(True)
    for p, q in reversed(list(zip(mine, theirs, strict=False))):
        term = z3.Or(p < q, z3.And(p == q, term))
    return term


def is_serial(loop: ir.Stmt) -> bool:
    """Return whether a loop is one of the tile program."""
    return isinstance(loop, ir.For) and loop.kind == "serial"


def next_after(start: Instance, point: Point) -> list[Instance]:
    """Return the executions of `point` that may be the thread's first after `start`.

    In the same iteration of the loops around both, or in the next of one of them. Whether any of
    them happens is left to its conditions.
    """
    shared = start.point.shared_loops(point)
    found = []
    if point.position > start.point.position:
        found.append(start.at(point, _first(point, start, start.counters[:shared])))
    for depth in reversed(range(shared)):
        outer = (*start.counters[:depth], start.counters[depth] + 1)
        found.append(start.at(point, _first(point, start, outer)))
    return found


def last_before(end: Instance, point: Point) -> list[Instance]:
    """Return the executions of `point` that may be the thread's last before `end`, as `next_after`."""
    shared = end.point.shared_loops(point)
    found = []
    if point.position < end.point.position:
        found.append(end.at(point, _last(point, end, end.counters[:shared])))
    for depth in reversed(range(shared)):
        outer = (*end.counters[:depth], end.counters[depth] - 1)
        found.append(end.at(point, _last(point, end, outer)))
    return found


def _first(point: Point, thread: Instance, outer: tuple[z3.ArithRef, ...]) -> tuple[z3.ArithRef, ...]:
    counters = list(outer)
    for _, index in point.loops[len(outer) :]:
        counters.append(_inside(point, thread, counters, index.start))
    return tuple(counters)


def _last(point: Point, thread: Instance, outer: tuple[z3.ArithRef, ...]) -> tuple[z3.ArithRef, ...]:
    counters = list(outer)
    for _, index in point.loops[len(outer) :]:
        counters.append(z3.simplify(_inside(point, thread, counters, index.start + index.extent - 1)))
    return tuple(counters)


def _inside(
    point: Point, thread: Instance, counters: Sequence[z3.ArithRef], term: z3.ArithRef
) -> z3.ArithRef:
    """Return a bound of a loop around `point`, with the loops further out at `counters`."""
    own = [(i.const, c) for (_, i), c in zip(point.loops, counters, strict=False)]
    pairs = [*thread.thread, *own]
    return put(term, pairs)
