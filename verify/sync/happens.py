"""A sufficient condition for one execution to happen before another, as a formula.

Happens-before is the transitive closure of program order, barriers and mbarrier phases, along the
causality order of the PTX memory model. The formula names who takes part in each step instead of
quantifying: the first execution of a barrier after the earlier access, the last wait before the
later one, an arrival that a completed phase must have had. Every candidate is only a disjunct, so a
missing one loses a proof and never a race.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import z3

from verify.encode import Encoder, Index, constants_of
from verify.intarith import conjunction, constant_of
from verify.symbols import simplified
from verify.sync.events import ASYNC_PROXY, Agent, Event, Events
from verify.sync.order import Instance, Point, before, last_before, next_after
from verify.sync.structure import Structure
from verify.walk import Site

MAX_PENDING = 8  # groups that a wait may leave pending, for which later waits are looked for
TRUE, FALSE = z3.BoolVal(True), z3.BoolVal(False)


class Phase(Protocol):
    """A phase of an mbarrier: the terms are over the constants of a site's scope."""

    @property
    def barrier(self) -> object:
        """Storage of the mbarrier array."""
        ...

    @property
    def slot(self) -> z3.ArithRef:
        """Index in the mbarrier array."""
        ...

    @property
    def number(self) -> z3.ArithRef:
        """0-based phase."""
        ...


class PhaseSource(Protocol):
    """Which phases waits and arrivals are about (see `verify/sync/phases.py`)."""

    def of_wait(self, site: Site) -> Phase:
        """Return the phase that has completed when the wait returns."""
        ...

    def of_arrival(self, site: Site) -> Phase:
        """Return the phase that an arrival, or the bytes of a TMA load, belong to."""
        ...


@dataclass(frozen=True)
class _Phase:
    barrier: object
    slot: z3.ArithRef
    number: z3.ArithRef


class HappensBefore:
    """Builds the formulas for one kernel."""

    def __init__(
        self, events: Events, structure: Structure, phases: PhaseSource | None, encoder: Encoder
    ) -> None:
        """Take the synchronisation of a kernel; `phases` may be None where it has no mbarrier."""
        self.events = events
        self.structure = structure
        self.phases = phases
        self.encoder = encoder
        self._fresh: dict[tuple[int, int | None], z3.ArithRef] = {}

    # ------------------------------------------------------------------ the usual way round a ring
    def in_round(self, first: Instance, a: Event, second: Instance, b: Event, side: int = 0) -> z3.BoolRef:
        """Return as `ordered`, looking only at waits and arrivals in the rounds of the accesses.

        The formula is small: that these happen is clear from the text. Formulas that are alternatives of
        each other are of different `side`s, 0 or 1: each has to hold for all third threads by itself.
        """
        if self.phases is None or a.space.kind == "local":
            return FALSE
        if a.agent is Agent.TMA_LOAD:
            waits = [(w, self._placed(second, w)) for w in self.structure.waits_before(b.point)]
            phase = _at(first, self.phases.of_arrival(a.point.site))
            options = [_reaches(phase, waited) for _, waited in waits]
            options += self._other_rounds(phase, first, second)
            if b.agent is Agent.TMA_LOAD:
                options += [self._after_release(phase, w, second, 2 * n + side) for n, w in enumerate(waits)]
            return _or(options)
        behind = [
            (w, self._placed(second, w), self._guarded(second, w, b.point))
            for w in self.events.waits
            if len(w.loops) == w.shared_loops(b.point) and w.position < b.point.position
        ]
        options = []
        for arrival, end in self._text_arrivals(a):
            arrived = _at(self._same_rounds(first, arrival), self.phases.of_arrival(arrival.site))
            made = self._guarded(first, arrival, end)
            for wait, waited, waiting in behind:
                if self._text_fenced(a, b, (end, arrival), wait):
                    options.append(_and([made, waiting, _reaches(arrived, waited)]))
        return _or(options)

    def _text_arrivals(self, a: Event) -> Iterable[tuple[Point, Point]]:
        """Yield arrivals in `a`'s round by which it has ended, each with what it comes after."""
        for end in self._text_ends(a):
            for arrival in self.events.arrivals:
                if len(arrival.loops) == arrival.shared_loops(end) and arrival.position > end.position:
                    yield arrival, end
        if a.agent is Agent.CP_ASYNC:
            for arrival in self.events.cp_arrivals:
                if (
                    len(arrival.loops) == arrival.shared_loops(a.point)
                    and arrival.position > a.point.position
                ):
                    yield arrival, a.point

    def _guarded(self, instance: Instance, point: Point, by: Point) -> z3.BoolRef:
        """Return that the thread of `instance`, which gets to `by`, gets to `point` in the same rounds."""
        return TRUE if self.structure.covered(point, by) else self._same_rounds(instance, point).happens

    def _placed(self, instance: Instance, wait: Point) -> "_Phase":
        assert self.phases is not None, "a kernel with waits has phases"
        return _at(self._same_rounds(instance, wait), self.phases.of_wait(wait.site))

    def _same_rounds(self, instance: Instance, point: Point) -> Instance:
        return instance.at(point, instance.counters[: len(point.loops)])

    def _other_rounds(self, phase: "_Phase", first: Instance, second: Instance) -> list[z3.BoolRef]:
        """Return waits in loops that `second` has left, in the rounds of `first`."""
        assert self.phases is not None, "a kernel with waits has phases"
        found = []
        for wait in self.events.waits:
            if wait.position < second.point.position:
                for at in _alike(second, first, wait):
                    reached = _reaches(phase, _at(at, self.phases.of_wait(wait.site)))
                    found.append(_and([*at.conditions, reached]))
        return found

    def _after_release(
        self, phase: "_Phase", wait: tuple[Point, "_Phase"], end: Instance, number: int
    ) -> z3.BoolRef:
        """Return that all who arrived in the phase waited for had themselves waited for `phase`."""
        assert self.phases is not None, "a kernel with waits has phases"
        if self.events.cp_arrivals:
            return FALSE  # the phase may be complete by arrivals that no thread makes
        parts = [wait[1].number >= 0]
        for arrival in self.events.arrivals:
            x = self._anyone(arrival, end, number)
            arrived = _at(x, self.phases.of_arrival(arrival.site))
            if arrived.barrier is not wait[1].barrier:
                continue
            belongs = z3.And(*x.conditions, arrived.slot == wait[1].slot, arrived.number == wait[1].number)
            seen = [_reaches(phase, self._placed(x, w)) for w in self.structure.waits_before(arrival)]
            parts.append(z3.Implies(belongs, _or(seen)))
        return conjunction(parts)

    def _text_ends(self, a: Event) -> list[Point]:
        """Return points in `a`'s round by which it has ended."""
        if a.agent is Agent.THREAD:
            return [a.point]
        follows = lambda p: self.structure.follows(p, a.point)  # noqa: E731
        commits = [c for c in self.events.commits.get(a.agent, []) if follows(c)]
        ends = []
        for wait, pending, reads_only in self.events.group_waits.get(a.agent, []):
            committed = a.agent is Agent.CP_ASYNC or any(c.position < wait.position for c in commits)
            if pending == 0 and committed and follows(wait) and not (reads_only and a.writes):
                ends.append(wait)
        return ends[:1]

    def _text_fenced(self, a: Event, b: Event, way: tuple[Point, Point], wait: Point) -> bool:
        if not a.writes or a.agent in ASYNC_PROXY or b.agent not in ASYNC_PROXY:
            return True
        end, arrival = way
        by_itself = a.agent is Agent.CP_ASYNC and arrival in self.events.cp_arrivals  # after any fence of its
        for fence in self.events.fences:
            if not by_itself and self.structure.follows(fence, end) and fence.position < arrival.position:
                return True
            if self.structure.follows(fence, wait) and fence.position < b.point.position:
                return True
        return False

    # ------------------------------------------------------------------ all ways

    def ordered(self, first: Instance, a: Event, second: Instance, b: Event, hops: int) -> z3.BoolRef:
        """Return a formula that implies that access `a` ends before access `b` begins.

        `first` and `second` are the executions; the order may pass through `hops` other threads.
        """
        if a.space.kind == "local":
            return self._registers(first, a, second, b)
        fenced = a.writes and a.agent not in ASYNC_PROXY and b.agent in ASYNC_PROXY
        if a.point.site.node is b.point.site.node and a.point.position[0] == b.point.position[0]:
            fenced = False
        if a.agent is Agent.TMA_LOAD:
            if self.phases is None:
                return FALSE
            phase = self.phases.of_arrival(a.point.site)
            return self._phase_before(_at(first, phase), first, second, hops)
        options = []
        for end, condition in self._ends(first, a):
            options.append(_and([condition, self.before(end, second, fenced, hops)]))
        if a.agent is Agent.CP_ASYNC:
            options += self._through_phases(first, second, self.events.cp_arrivals, fenced, by_itself=True)
        return _or(options)

    # ------------------------------------------------------------------ where an access ends
    def _ends(self, start: Instance, event: Event) -> Iterable[tuple[Instance, z3.BoolRef]]:
        """Yield points of the same thread by which an access has ended, each with its condition."""
        if event.agent is Agent.THREAD:
            yield start, TRUE
            return
        for wait, pending, reads_only in self.events.group_waits.get(event.agent, []):
            if reads_only and event.writes:
                continue
            for at in self._candidates(start, wait, pending):
                covered = self._covered(start, at, event.agent, pending)
                yield at, _and([before(start, at), at.happens, covered])

    def _candidates(self, start: Instance, wait: Point, pending: int) -> list[Instance]:
        found = next_after(start, wait)
        shared = start.point.shared_loops(wait)
        if 0 < pending <= MAX_PENDING and shared:  # a later round covers what an earlier one leaves
            for at in list(found):
                for more in range(1, pending + 1):
                    moved = (
                        *at.counters[: shared - 1],
                        at.counters[shared - 1] + more,
                        *at.counters[shared:],
                    )
                    found.append(at.at(wait, moved))
        return found

    def _covered(self, start: Instance, wait: Instance, agent: Agent, pending: int) -> z3.BoolRef:
        """Return that the group of `start` is none of the `pending` latest at `wait`."""
        if agent is Agent.CP_ASYNC and pending == 0:
            return TRUE  # cp.async.wait_all
        total, options = z3.IntVal(0), []
        for commit in self.events.commits.get(agent, []):
            own = {index.const.decl().name() for _, index in commit.loops}
            ranges = {r.get_id() for r in _ranges(commit)}
            guards = [c for c in commit.conditions if c.get_id() not in ranges]
            irregular = any(constant_of(i.extent) is None for _, i in commit.loops[1:])
            if irregular or any(
                constants_of(g) & own for g in guards
            ):  # made in some rounds only: not counted
                options.append(self._between(start, wait, commit))
                continue
            happens = conjunction([wait.at(commit, [i.const for _, i in commit.loops]).of(g) for g in guards])
            count = _executions(commit, wait) - _executions(commit, start)
            total = total + z3.If(happens, count, 0)
        enough = total > pending
        return _or([enough, *options]) if pending == 0 else enough

    def _between(self, start: Instance, end: Instance, point: Point) -> z3.BoolRef:
        """Return that the thread executes `point` after `start` and before `end`."""
        options = [
            _and([before(start, at), at.happens, before(at, end)])
            for at in [*next_after(start, point), *last_before(end, point)]
        ]
        return _or(options)

    def _any_between(self, start: Instance, end: Instance, points: Sequence[Point]) -> z3.BoolRef:
        return _or([self._between(start, end, p) for p in points])

    # ------------------------------------------------------------------ chains
    def before(self, start: Instance, end: Instance, fenced: bool, hops: int) -> z3.BoolRef:
        """Return a formula that implies that `start` happens before `end`.

        If `fenced`, a fence of the async proxy has to lie on the way.
        """
        same = _same_thread(start, end)
        direct = _and([same, before(start, end)])
        if fenced:
            direct = _and([direct, self._any_between(start, end, self.events.fences)])
        options = [direct]
        for barrier in self.events.barriers:
            if barrier.waits:
                options += self._through_barrier(start, end, barrier.point, fenced)
        for warp in self.events.warps:
            options += self._through_barrier(start, end, warp, fenced, warp=True)
        if self.phases is not None:
            options += self._through_phases(start, end, self.events.arrivals, fenced)
            if hops:
                options += self._through_arrival(end, lambda x: self.before(start, x, fenced, hops - 1))
        return _or(options)

    def _through_barrier(
        self, start: Instance, end: Instance, point: Point, fenced: bool, warp: bool = False
    ) -> list[z3.BoolRef]:
        found = []
        places = {tuple(c.get_id() for c in at.counters): at for at in next_after(start, point)}
        for at in last_before(end, point):
            places.setdefault(tuple(c.get_id() for c in at.counters), at)
        for at in places.values():
            arrive = Instance(point, start.thread, at.counters)
            leave = Instance(point, end.thread, at.counters)
            parts = [before(start, arrive), before(leave, end), *arrive.conditions, *leave.conditions]
            if warp:
                parts.append(_same_warp(arrive, leave))
            if fenced and not _false(conjunction(parts)):
                fences = self.events.fences
                sides = [self._any_between(start, arrive, fences), self._any_between(leave, end, fences)]
                parts.append(_or(sides))
            found.append(_and(parts))
        return found

    def _waits(self, end: Instance, hint: Instance | None) -> list[tuple[Instance, _Phase, z3.BoolRef]]:
        """Return waits before `end` in its thread, what they wait for and that they happen."""
        found = []
        if self.phases is None:
            return found
        for wait in self.events.waits:
            phase = self.phases.of_wait(wait.site)
            places = [*last_before(end, wait), *_alike(end, hint, wait)]
            for at in _distinct(places):
                happens = _and([before(at, end), *at.conditions])
                if not _false(happens):
                    found.append((at, _at(at, phase), happens))
        return found

    def _through_phases(
        self, start: Instance, end: Instance, arrivals: Sequence[Point], fenced: bool, by_itself: bool = False
    ) -> list[z3.BoolRef]:
        """Return that `start` precedes an arrival of a phase which a wait before `end` waits for.

        If `fenced`, a fence of the async proxy has to lie on the way: behind the wait, where the arrival is
        made by itself once copies have ended.
        """
        if self.phases is None:
            return []
        found = []
        waits = self._waits(end, start)
        for arrival in arrivals:
            phase = self.phases.of_arrival(arrival.site)
            for x in _distinct([*next_after(start, arrival), *_alike(start, end, arrival)]):
                happens = _and([before(start, x), *x.conditions])
                if _false(happens):
                    continue
                arrived = _at(x, phase)
                for w, waited, waiting in waits:
                    parts = [happens, waiting, _reaches(arrived, waited)]
                    if fenced:
                        fences = self.events.fences
                        sides = [] if by_itself else [self._any_between(start, x, fences)]
                        parts.append(_or([*sides, self._any_between(w, end, fences)]))
                    found.append(_and(parts))
        return found

    def _through_arrival(self, end: Instance, reached: Callable[[Instance], z3.BoolRef]) -> list[z3.BoolRef]:
        """Return that whatever arrived in a phase that `end` waited for was `reached`.

        A completed phase had an arrival at one of the arriving calls; which thread and round it was
        is left open.
        """
        assert self.phases is not None, "a kernel with waits has phases"
        found = []
        if self.events.cp_arrivals:
            return found  # a phase may be complete by arrivals that no thread makes
        for _, waited, waiting in self._waits(end, None):
            parts = [waiting, waited.number >= 0]
            for arrival in self.events.arrivals:
                phase = self.phases.of_arrival(arrival.site)
                x = self._anyone(arrival, end)
                arrived = _at(x, phase)
                same = [arrived.slot == waited.slot, arrived.number == waited.number]
                belongs = _and([*x.conditions, *same]) if arrived.barrier is waited.barrier else FALSE
                if not _false(belongs):
                    parts.append(z3.Implies(belongs, reached(x)))
            found.append(_and(parts))
        return found

    def _anyone(self, point: Point, like: Instance, number: int | None = None) -> Instance:
        """Return an execution by any thread of the block in any round.

        Its constants are new, since each alternative has to hold for all executions by itself;
        those of the same `number` are kept for formulas that never meet in one.
        """
        blocks = {a.get_id(): (a, b) for a, b in like.thread}
        thread: list[tuple[z3.ArithRef, z3.ArithRef]] = []
        for index in point.site.scope.launch:
            if index.tag.startswith("threadIdx"):
                thread.append((index.const, self._other(index, number)))
            elif index.const.get_id() in blocks:
                thread.append(blocks[index.const.get_id()])
        return Instance(point, tuple(thread), tuple(self._other(i, number) for _, i in point.loops))

    def _other(self, index: Index, number: int | None) -> z3.ArithRef:
        """Return a constant for `index` of a third thread."""
        key = (index.const.get_id(), number)
        if number is None or key not in self._fresh:
            self._fresh[key] = self.encoder.constant(f"{index.var.name}''")
        return self._fresh[key]

    def _phase_before(self, phase: _Phase, hint: Instance, end: Instance, hops: int) -> z3.BoolRef:
        """Return that `end` comes after the completion of `phase`."""
        options = [_and([waiting, _reaches(phase, waited)]) for _, waited, waiting in self._waits(end, hint)]
        for barrier in self.events.barriers:  # the thread that issued waits, then all meet
            if not barrier.waits:
                continue
            for at in last_before(end, barrier.point):
                leave = Instance(barrier.point, end.thread, at.counters)
                arrive = Instance(barrier.point, hint.thread, at.counters)
                seen = _or(
                    [
                        _and([waiting, _reaches(phase, waited)])
                        for _, waited, waiting in self._waits(arrive, hint)
                    ]
                )
                options.append(_and([before(leave, end), *leave.conditions, *arrive.conditions, seen]))
        if hops:
            options += self._through_arrival(end, lambda x: self._phase_before(phase, hint, x, hops - 1))
        return _or(options)

    # ------------------------------------------------------------------ registers
    def _registers(self, first: Instance, a: Event, second: Instance, b: Event) -> z3.BoolRef:
        """Order of accesses to one thread's registers, of which wgmma makes some."""
        if a.agent is Agent.WGMMA and b.agent is Agent.WGMMA and a.shape == b.shape:
            same = z3.And(first.of(a.first) == second.of(b.first), first.of(a.last) == second.of(b.last))
            if a.writes and b.writes:  # the tensor core keeps instructions of one shape in order
                return _or([_and([same, before(first, second)]), self._awaited(first, a, second)])
        if a.agent is Agent.WGMMA:
            return self._awaited(first, a, second)
        # What a thread does to registers is ordered before wgmma by warpgroup_arrive.
        return self._any_between(first, second, self.events.register_fences)

    def preceded(self, end: Instance, points: Sequence[Point]) -> z3.BoolRef:
        """Return a formula that implies that the thread executes one of `points` before `end`."""
        places = [at for p in points for at in last_before(end, p)]
        return _or([_and([before(at, end), *at.conditions]) for at in places])

    def _awaited(self, first: Instance, a: Event, second: Instance) -> z3.BoolRef:
        return _or([_and([condition, before(end, second)]) for end, condition in self._ends(first, a)])


# --------------------------------------------------------------------------- helpers
def _at(instance: Instance, phase: Phase) -> _Phase:
    return _Phase(phase.barrier, instance.of(phase.slot), instance.of(phase.number))


def _reaches(phase: _Phase, waited: _Phase) -> z3.BoolRef:
    """Return that a wait for `waited` returns after `phase` is complete: phases complete in turn."""
    if phase.barrier is not waited.barrier:
        return FALSE
    return z3.And(phase.slot == waited.slot, phase.number <= waited.number)


def _and(parts: Sequence[z3.BoolRef]) -> z3.BoolRef:
    kept = []
    for part in parts:
        if z3.is_true(part):
            continue
        if _false(part):
            return FALSE
        kept.append(part)
    return conjunction(kept)


def _or(parts: Sequence[z3.BoolRef]) -> z3.BoolRef:
    kept = []
    for part in parts:
        if z3.is_true(part):
            return TRUE
        if not _false(part):
            kept.append(part)
    return z3.Or(*kept) if len(kept) > 1 else (kept[0] if kept else FALSE)


def _false(term: z3.BoolRef) -> bool:
    return z3.is_false(term) or z3.is_false(simplified(term))


def _same_thread(a: Instance, b: Instance) -> z3.BoolRef:
    mine = {k.get_id(): (k, v) for k, v in a.thread}
    theirs = {k.get_id(): (k, v) for k, v in b.thread}
    parts = []
    for key in mine.keys() | theirs.keys():
        const = (mine.get(key) or theirs[key])[0]
        left, right = mine.get(key, (const, const))[1], theirs.get(key, (const, const))[1]
        if not z3.eq(left, right):
            parts.append(left == right)
    return conjunction(parts)


def _same_warp(a: Instance, b: Instance) -> z3.BoolRef:
    thread = next(i.const for i in a.point.site.scope.launch if i.tag == "threadIdx.x")
    return a.of(thread) / 32 == b.of(thread) / 32


def _distinct(places: Sequence[Instance]) -> list[Instance]:
    return list({tuple(c.get_id() for c in at.counters): at for at in places}.values())


def _alike(own: Instance, other: Instance | None, point: Point) -> list[Instance]:
    """Return the execution of `point` in the rounds that `other` is in, loop by loop from outside."""
    if other is None:
        return []
    shared = own.point.shared_loops(point)
    needed = len(point.loops)
    if len(other.counters) < needed or needed == shared:
        return []
    return [own.at(point, (*own.counters[:shared], *other.counters[shared:needed]))]


def _ranges(point: Point) -> list[z3.BoolRef]:
    """Return the hypotheses that only say that the loop counters are in range."""
    return [h.term for h in point.site.scope.hypotheses if h.kind in ("loop", "launch")]


def _executions(point: Point, end: Instance) -> z3.ArithRef:
    """Return how often `point` is executed before `end`, if its loops run in full."""
    shared = end.point.shared_loops(point)
    total = z3.IntVal(0)
    tail = z3.IntVal(1)
    for _, index in reversed(point.loops[shared:]):
        tail = tail * index.extent
    for depth in reversed(range(shared)):
        index = point.loops[depth][1]
        if depth == shared - 1 and point.position < end.point.position:
            total = total + tail
        total = total + (end.counters[depth] - index.start) * tail
        tail = tail * index.extent
    if not shared and point.position < end.point.position:
        total = total + tail
    return z3.simplify(total)
