"""A CTA's rings in the compiled kernel: every thread's visits are the steps of `ring`, and nothing else is.

A part's round of the walk makes visits C, C + 1, ... of a ring, C its counter at the beginning. For each
visit v, its wait is for the turn of place v mod slots that `ring` has it wait for, its arrivals are as many
as the barrier counts, and whatever it touches of shared memory is of place v mod slots, between the two.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import z3

from megamoe.quotients import parted, same
from megamoe.ring import every, given, how_many, some
from megamoe.role_events import LINE, THREAD, WARP, Event, Followed, Loop
from megamoe.role_late import Copies, Late, same_copies
from megamoe.role_walk import Ring, Roles, Walk
from verify.ir import UnsupportedIR
from verify.solve import Obligation

_ACCESSES = ("read", "write", "tensor")


@dataclass(frozen=True)
class Visit:
    """Visit number `begin` + ... of a round's: the e-th of those that one pass through the code makes."""

    wait: Event
    arrivals: tuple[Event, ...]
    number: z3.ArithRef  # v
    happens: z3.BoolRef  # it is one of the product's


@dataclass(frozen=True)
class Visits:
    """A part's visits of a ring in one piece of code: a loop, or none around a single visit.

    Attributes:
        count: number of the first visit.
        visits: how many there are.
        is_behind: the code comes behind the walk.
    """

    ring: Ring
    walk: Walk
    slots: int
    loop: Loop | None
    waits: tuple[Event, ...]
    arrivals: tuple[Event, ...]
    count: z3.ArithRef
    visits: z3.ArithRef
    is_behind: bool = False

    @property
    def is_writer(self) -> bool:
        """Whether the part fills places."""
        return self.walk.name in self.ring.writers

    @property
    def passes(self) -> int:
        """Visits a pass through the code."""
        return len(self.waits)

    @property
    def base(self) -> z3.BoolRef:
        """The code is run."""
        return every(*self.loop.path) if self.loop and self.loop.path else self.walk.has_product

    @property
    def begin(self) -> z3.ArithRef:
        """Passes left out before the first visit: where each visit has a condition, of whole turns."""
        if self.loop is None or self.is_writer or self.ring.aligned:
            return z3.IntVal(0)
        return self.count % self.slots

    @property
    def first(self) -> z3.ArithRef:
        """The number that a visit in place 0 would have: `count` less `begin`."""
        return self.count if self.begin.eq(z3.IntVal(0)) else self.slots * (self.count / self.slots)

    @property
    def around(self) -> tuple[Loop, ...]:
        """All loops around the visits."""
        walk = () if self.is_behind else (self.walk.segment, self.walk.turn)
        return (*walk, *((self.loop,) if self.loop else ()))

    @property
    def events(self) -> list[Event]:
        """Events of the part where these visits are."""
        behind = [e for e in self.walk.found.events if e.loops[:1] == (self.loop,)]
        return behind if self.is_behind else self.walk.events()

    @property
    def copies(self) -> tuple[Event, ...]:
        """Copies of the visits."""
        return tuple(e for e in self.events if e.kind == "copy" and e.loops == self.around)

    def known(self) -> tuple[z3.BoolRef, ...]:
        """What holds in a round."""
        aligned = (self.count % self.slots == 0,) if self.ring.aligned else ()
        in_loop = (self.loop.range,) if self.loop else ()
        in_walk = (self.walk.roles.launched,) if self.is_behind else self.walk.round()
        return (*in_walk, *_threads(self.walk.found), self.count >= 0, *aligned, *in_loop, self.base)

    def by_rest(self, goal: z3.BoolRef) -> Iterator[tuple[tuple[z3.BoolRef, ...], z3.BoolRef]]:
        """Yield what is known, and a goal, for each rest of the passes by whole turns of an aligned ring.

        All cases there are, with the counter and the passes written as whole turns and a rest: solvers find
        quotients of sums hard otherwise.
        """
        if not (self.ring.aligned and self.loop and self.passes and self.slots % self.passes == 0):
            yield self.known(), goal
            return
        count = self.count
        known = (count >= 0, count % self.slots == 0, self.loop.range)
        a_turn, whole = self.slots // self.passes, z3.Int("whole")
        for rest in range(a_turn):
            written = [(count, self.slots * z3.Int("turn")), (self.loop.var, a_turn * whole + rest)]
            by_turns = parted(z3.substitute(goal, *written))
            yield tuple(z3.substitute(k, *written) for k in known), z3.simplify(by_turns)

    def each(self) -> Iterator[Visit]:
        """Yield the visits of a pass."""
        if not self.passes or (self.passes > 1 and len(self.arrivals) != self.passes):
            raise UnsupportedIR(
                f"{self.walk.name}: waits and arrivals of {self.ring.full} do not belong together"
            )
        for e, wait in enumerate(self.waits):
            own = self.arrivals if self.passes == 1 else (self.arrivals[e],)
            place = self.passes * (self.loop.var if self.loop else z3.IntVal(0)) + e
            happens = z3.And(place >= self.begin, place < self.begin + self.visits)
            yield Visit(wait, own, self.first + place, happens)


def _visits(
    ring: Ring,
    walk: Walk,
    loop: Loop | None,
    events: Sequence[Event],
    count: z3.ArithRef,
    visits: z3.ArithRef,
) -> Visits:
    waits, arrivals = (tuple(e for e in events if e.kind == kind) for kind in ("wait", "arrive"))
    return Visits(ring, walk, walk.found.slots(ring.full), loop, waits, arrivals, count, visits)


def _copies_of(piece: Visits, kept: dict[str, z3.ArithRef]) -> Copies:
    assert piece.loop is not None, "late visits are in a loop"
    return Copies(piece.loop, piece.copies, kept)


def _threads(found: Followed) -> tuple[z3.BoolRef, ...]:
    return (found.part.first <= THREAD, found.part.numbers[-1] >= THREAD)


def _iff(a: z3.BoolRef, b: z3.BoolRef) -> z3.BoolRef:
    return a == b


@dataclass
class Rings:
    """Everything that the parts of a kernel do with mbarriers and shared memory; `claimed`: proved."""

    roles: Roles
    found: dict[str, Followed]
    walks: dict[str, Walk]
    claimed: set[tuple[str, int]] = field(default_factory=set)

    def claim(self, part: str, *events: Event) -> None:
        """Note that something is proved of events of a part."""
        self.claimed |= {(part, event.at) for event in events}

    # ------------------------------------------------------------------ visits
    def visits(self, ring: Ring, walk: Walk) -> list[Visits]:
        """Return a part's pieces of code that visit a ring."""
        waits_at, arrives_at = (
            (ring.empty, ring.full) if walk.name in ring.writers else (ring.full, ring.empty)
        )
        pieces: dict[tuple[Loop, ...], list[Event]] = {}
        for event in walk.events():
            if event.kind in ("wait", "arrive") and event.what in (ring.full, ring.empty):
                if event.what != (waits_at if event.kind == "wait" else arrives_at):
                    raise UnsupportedIR(f"{walk.name}: {event.kind} at {event.what}")
                pieces.setdefault(event.loops[2:], []).append(event)
        if any(len(loops) > 1 for loops in pieces):
            raise UnsupportedIR(f"{walk.name}: mbarriers in nested loops")
        return [
            _visits(ring, walk, loops[0] if loops else None, events, walk.count(ring), walk.visits(ring))
            for loops, events in pieces.items()
        ]

    def late_visits(self, ring: Ring, walk: Walk, late: Late) -> tuple[Visits, Visits, Visits]:
        """Return a late part's pieces of code: of the product before, of a product, behind the walk."""
        pieces = self.visits(ring, walk)
        if len(pieces) != 2 or any(p.loop is None for p in pieces):
            raise UnsupportedIR(f"{walk.name}: {len(pieces)} pieces of code visit {ring.full} late")
        entry, leave = walk.turn.entry, walk.turn.leave
        before = replace(pieces[0], count=entry[ring.counter], visits=late.lag(entry[late.left]))
        own = replace(pieces[1], visits=walk.visits(ring) - late.lag(leave[late.left]))
        return before, own, self._behind(ring, walk, late)

    def _late(self, late: Late, before: Visits, own: Visits, last: Visits) -> Iterator[Obligation]:
        """They run where they have visits, one behind the other, and fetch what their products want."""
        ring, walk = own.ring, own.walk
        entry, after = walk.turn.entry, walk.segment.after
        round_ = (*walk.round(), walk.has_product)
        what = f"{walk.name}: when a piece of code visits {ring.full}"
        yield Obligation(what, None, given(*round_), _iff(before.base, entry[late.left] > 0))
        yield Obligation(what, None, given(*round_), own.base)
        yield Obligation(f"{what} behind its walk", None, (), _iff(last.base, after[late.left] > 0))
        ends = [max(e.at for e in (*p.waits, *p.arrivals)) for p in (before, own)]
        begins = [min(e.at for e in (*p.waits, *p.arrivals)) for p in (own, last)]
        ordered = all(a < b for a, b in zip(ends, begins, strict=True))
        yield Obligation(f"{walk.name}: late visits come first", None, (), z3.BoolVal(ordered))
        head = _copies_of(own, {})
        for piece, now in ((before, entry), (last, after)):
            tail = _copies_of(piece, {name: now[name] for name in late.kept})
            yield from same_copies(walk.name, late, head, tail, walk.turn, walk.visits(ring), round_)

    def _behind(self, ring: Ring, walk: Walk, late: Late) -> Visits:
        after = walk.segment.after
        begins = max(e.at for e in walk.events())
        events = [
            e
            for e in walk.found.events
            if e.at > begins and e.kind in ("wait", "arrive") and e.what in (ring.full, ring.empty)
        ]
        loops = {e.loops for e in events}
        kinds = {(e.kind, e.what) for e in events}
        if len(loops) != 1 or kinds != {("wait", ring.empty), ("arrive", ring.full)}:
            raise UnsupportedIR(f"{walk.name}: no single loop behind its walk visits {ring.full}")
        (loop,) = loops.pop()
        piece = _visits(ring, walk, loop, events, after[ring.counter], late.lag(after[late.left]))
        return replace(piece, is_behind=True)

    def ring(self, ring: Ring) -> Iterator[Obligation]:
        """Every visit of a ring is one of `ring`'s, by the right threads."""
        if not self.walks[ring.reader].found.slots(ring.full):
            raise UnsupportedIR(f"no mbarriers {ring.full}")
        arrivals = 0
        for name in ring.parts:
            walk = self.walks[name]
            late = walk.late(ring)
            if late is not None:
                pieces = self.late_visits(ring, walk, late)
                yield from self._late(late, *pieces)
            else:
                pieces = self.visits(ring, walk)
                once = how_many(p.base for p in pieces) == 1
                product = given(*walk.round(), walk.has_product)
                what = f"{name}: one piece of code visits {ring.full} a product"
                yield Obligation(what, None, product, once)
            for piece in pieces:
                yield from self._piece(piece)
            threads = {_threads_of(walk, e) for p in pieces for e in p.arrivals}
            if len(threads) > 1:
                raise UnsupportedIR(f"{name}: some arrivals are one lane's, and some all threads'")
            total = sum(threads) * ring.writers.get(name, 1)
            if name == ring.reader:
                yield from self._counted(ring.empty, walk, total)
            else:
                arrivals += total
            yield from self._places(ring, walk, pieces)
        yield from self._counted(ring.full, self.walks[ring.reader], arrivals)

    def _counted(self, array: str, walk: Walk, arrivals: int) -> Iterator[Obligation]:
        counts = {c for (a, _), c in walk.found.counts.items() if a == array}
        what = f"{arrivals} arrivals at {array} a turn, which counts {sorted(counts)}"
        yield Obligation(what, None, (), z3.BoolVal(counts == {arrivals}))

    def _piece(self, piece: Visits) -> Iterator[Obligation]:
        ring, walk, slots = piece.ring, piece.walk, piece.slots
        known, name = piece.known(), f"{walk.name}, {ring.full}"
        if piece.loop is not None:
            enough = piece.begin + piece.visits <= piece.passes * piece.loop.extent
            whole = z3.And(piece.loop.start == 0, enough)
            outside = given(*(k for k in known if not z3.eq(k, piece.loop.range)))
            yield Obligation(f"{name}: all visits of a product", None, outside, whole)
        waits_from = slots if piece.is_writer else 0
        arrives_from = slots if ring.prefilled == walk.name else 0
        times = ring.writers.get(walk.name, 1)
        for visit in piece.each():
            v, wait = visit.number, visit.wait
            waits = _iff(wait.guard, z3.And(visit.happens, v >= waits_from))
            parity = (parted(v / slots) + (1 if piece.is_writer else 0)) % 2
            place, right = same(wait.first, parted(v % slots), v, slots), same(wait.value, parity, v, slots)
            yield Obligation(f"{name}: a wait a visit", wait.span, given(*known), waits)
            for case, goal in piece.by_rest(place):
                yield Obligation(f"{name}: the wait's place", wait.span, given(*case), goal)
            for case, goal in piece.by_rest(right):
                yield Obligation(f"{name}: the wait is for its turn", wait.span, given(*case), goal)
            made = how_many(a.guard for a in visit.arrivals)
            wanted = z3.If(z3.And(visit.happens, v >= arrives_from), times, 0)
            yield Obligation(f"{name}: arrivals a visit", wait.span, given(*known), made == wanted)
            for arrival in visit.arrivals:
                place = z3.Implies(arrival.guard, arrival.first == wait.first)
                behind = z3.BoolVal(arrival.at > wait.at)
                yield Obligation(f"{name}: the arrival's place", arrival.span, given(*known), place)
                yield Obligation(f"{name}: the arrival is behind the wait", arrival.span, (), behind)
        inside = given(*(k for k in known if not z3.eq(k, piece.base)))
        for event in (*piece.waits, *piece.arrivals):
            only = z3.Implies(event.guard, piece.base if piece.is_behind else walk.has_product)
            yield Obligation(f"{name}: only for a product", event.span, inside, only)
            alike = walk.found.is_uniform(*event.path, *(x for o in event.loops for x in (o.start, o.extent)))
            yield Obligation(f"{name}: all threads come", event.span, (), z3.BoolVal(alike))
        if any(e.elected for e in piece.waits):
            raise UnsupportedIR(f"{walk.name}: one lane waits for others")
        self.claim(walk.name, *piece.waits, *piece.arrivals)

    # ------------------------------------------------------------------ what a visit touches
    def _places(self, ring: Ring, walk: Walk, pieces: Sequence[Visits]) -> Iterator[Obligation]:
        behind = [e for p in pieces if p.is_behind for e in p.events]
        events = [
            e for e in (*walk.events(), *behind) if e.what in ring.places and e.kind in ("copy", *_ACCESSES)
        ]
        is_writer = walk.name in ring.writers
        kinds = ({"copy"} if ring.bulk else {"write"}) if is_writer else {"read", "tensor"}
        for event in events:
            if event.kind not in kinds:
                raise UnsupportedIR(f"{walk.name}: {event.kind} of {event.what}")
            around = [p for p in pieces if event.loops[: len(p.around)] == p.around]
            inside = [self.inside(ring, piece, visit, event) for piece in around for visit in piece.each()]
            known = {k for p in around for k in p.known() if not z3.eq(k, p.base)}
            what = f"{walk.name}: {event.kind} of {event.what} between its visit's wait and arrival"
            given_ = given(*sorted(known, key=z3.AstRef.get_id), *event.ranges, event.guard)
            yield Obligation(what, event.span, given_, some(*inside))
            self.claim(walk.name, event)
        if is_writer and ring.bulk:
            for piece in pieces:
                yield from self.copies(ring, piece.events, piece.arrivals, piece.known())
        if not is_writer:
            yield from self._drained(ring, walk, pieces)

    def inside(self, ring: Ring, piece: Visits, visit: Visit, event: Event) -> z3.BoolRef:
        """Return that an event lies in its visit's place, behind the wait and before the arrivals."""
        # The wait names the visit's place, which is proved of it.
        place, size = z3.simplify(visit.wait.first), ring.places[event.what]  # as places of copies are
        if visit.wait.at > event.at or (event.kind == "tensor" and size % LINE):
            return z3.BoolVal(False)
        # A copy comes behind the arrival that expects it: `copies`.
        early = [a for a in visit.arrivals if a.at < event.at] if event.kind != "copy" else []
        return z3.And(
            visit.happens,
            *(z3.Not(a.guard) for a in early),
            event.first >= place * size,
            event.last < (place + 1) * size,
        )

    def within(self, ring: Ring, walk: Walk, events: Sequence[Event]) -> Iterator[Obligation]:
        """A writer's events lie inside its visits of a ring with one place: two writers' turns are apart."""
        if walk.name not in ring.writers or walk.found.slots(ring.full) != 1:
            raise UnsupportedIR(f"{walk.name}: no writer of one place of {ring.full}")
        pieces = self.visits(ring, walk)
        for event in events:
            inside = [
                every(visit.happens, *(z3.Not(a.guard) for a in visit.arrivals if a.at < event.at))
                for piece in pieces
                if event.loops[: len(piece.around)] == piece.around
                for visit in piece.each()
                if visit.wait.at < event.at
            ]
            known = {k for piece in pieces for k in piece.known() if not z3.eq(k, piece.base)}
            what = f"{walk.name}: {event.kind} of {event.what} inside a visit of {ring.full}"
            hold = given(*sorted(known, key=z3.AstRef.get_id), *event.ranges, event.guard)
            yield Obligation(what, event.span, hold, some(*inside) if inside else z3.BoolVal(False))

    def copies(
        self,
        ring: Ring,
        events: Sequence[Event],
        arrivals: Sequence[Event],
        known: tuple[z3.BoolRef, ...],
    ) -> Iterator[Obligation]:
        """An arrival expects the bytes of the copy that the same thread starts next, at the same mbarrier."""
        following = dict(zip((e.at for e in events), events[1:], strict=False))
        paired = set()
        for arrival in arrivals:
            copy = following.get(arrival.at)
            if copy is None or copy.kind != "copy" or not _together(arrival, copy):
                expects = z3.Implies(arrival.guard, arrival.value == 0)
                yield Obligation(
                    f"no bytes expected at {ring.full} but a copy's", arrival.span, given(*known), expects
                )
                continue
            paired.add(copy.at)
            array, number = copy.barrier
            same = z3.And(
                z3.BoolVal(array == ring.full), number == arrival.first, arrival.value == copy.value
            )
            what = f"the bytes of a copy to {copy.what} are expected where it arrives"
            yield Obligation(what, copy.span, given(*known, copy.guard), same)
        loops = arrivals[0].loops if arrivals else ()
        # Those of an inner loop among them, which no arrival expects.
        copies = [
            e for e in events if e.kind == "copy" and e.loops[: len(loops)] == loops and e.what in ring.places
        ]
        for copy in copies:
            expected = z3.BoolVal(copy.at in paired)
            yield Obligation(f"a copy to {copy.what} is expected", copy.span, (), expected)
            for other in copies:
                if other.at > copy.at and other.what == copy.what:
                    apart = z3.Not(z3.And(copy.guard, other.guard))
                    yield Obligation(f"one copy a visit to {copy.what}", copy.span, given(*known), apart)

    def _drained(self, ring: Ring, walk: Walk, pieces: Sequence[Visits]) -> Iterator[Obligation]:
        """The tensor core has read its operands before their place is given back."""
        for piece in pieces:
            loops = (walk.segment, walk.turn, *((piece.loop,) if piece.loop else ()))
            events = [e for e in walk.events() if e.loops[: len(loops)] == loops]
            open_: list[Event] = []
            groups: list[list[Event]] = []
            arrivals = {e.at for e in piece.arrivals}
            for event in events:
                if event.kind in ("commit", "drain") and event.loops != loops:
                    raise UnsupportedIR(f"{walk.name}: groups of the tensor core in a loop of their own")
                if event.kind == "tensor":
                    open_.append(event)
                elif event.kind == "commit":
                    yield from _reach(walk, open_, event)
                    groups.append(open_)
                    open_ = []
                elif event.kind == "drain":
                    done = groups[: len(groups) - event.value]
                    if event.value and any(not _same_path(t, event) for g in groups for t in g):
                        raise UnsupportedIR(f"{walk.name}: groups of the tensor core on a condition")
                    yield from _reach(walk, [t for g in done for t in g], event)
                    groups = groups[len(done) :]
                elif event.at in arrivals:
                    none = z3.BoolVal(not open_ and not groups)
                    yield Obligation(
                        f"{walk.name}: no read of the tensor core under way", event.span, (), none
                    )
                if event.kind in ("commit", "drain"):
                    self.claim(walk.name, event)
            none = z3.BoolVal(not open_ and not groups)
            yield Obligation(f"{walk.name}: none behind a round", None, (), none)

    # ------------------------------------------------------------------ before and behind the walk
    def prefilled(self, ring: Ring) -> Iterator[tuple[Obligation, None] | tuple[None, tuple]]:
        """What is filled before the walk: visits 0 to slots - 1, once, without a wait.

        Yields obligations, then (guard, copies) for `role_walk.first_product`.
        """
        walk = self.walks[ring.prefilled]
        slots = walk.found.slots(ring.full)
        events = [e for e in walk.found.events if not walk.holds(e) and e.kind in ("wait", "arrive", "copy")]
        loops = {e.loops for e in events}
        if len(loops) != 1 or len(next(iter(loops))) != 1:
            raise UnsupportedIR(f"{walk.name}: no single loop before the walk fills {ring.full}")
        (loop,) = loops.pop()
        guard = every(*loop.path)
        known = (self.roles.launched, *_threads(walk.found), guard, loop.range)
        name = f"{walk.name}, before the walk"
        whole = z3.And(loop.start == 0, loop.extent == slots)
        yield Obligation(f"{name}: every place", None, given(*_threads(walk.found), guard), whole), None
        arrivals = [e for e in events if e.kind == "arrive"]
        right = all(e.kind != "wait" and e.at < self._walk_begins(walk) for e in events)
        yield Obligation(f"{name}: no wait", None, (), z3.BoolVal(right)), None
        made = how_many(a.guard for a in arrivals) == ring.writers[walk.name]
        alike = walk.found.is_uniform(*loop.path, loop.extent)
        yield Obligation(f"{name}: all lanes alike", None, (), z3.BoolVal(alike)), None
        yield Obligation(f"{name}: arrivals a place", None, given(*known), made), None
        for event in events:
            at = event.first if event.kind == "arrive" else event.barrier[1]
            array = event.what if event.kind == "arrive" else event.barrier[0]
            place = z3.And(z3.BoolVal(array == ring.full and event.elected), at == loop.var)
            yield Obligation(f"{name}: the place", event.span, given(*known, event.guard), place), None
            if event.kind == "copy":
                size = ring.places.get(event.what, 0)
                inside = z3.And(event.first >= loop.var * size, event.last < (loop.var + 1) * size)
                yield (
                    Obligation(f"{name}: inside the place", event.span, given(*known, event.guard), inside),
                    None,
                )
        for obligation in self.copies(ring, walk.found.events, arrivals, known):
            yield obligation, None
        self.claim(walk.name, *events)
        late = {e.what: e for e in walk.events() if e.kind == "copy" and e.what in ring.places}
        copies = [e for e in events if e.kind == "copy"]
        same = sorted(e.what for e in copies) == sorted(late)
        yield Obligation(f"{name}: the copies of a round", None, (), z3.BoolVal(same)), None
        yield None, (guard, [(e, late[e.what], loop) for e in copies if e.what in late])

    def _walk_begins(self, walk: Walk) -> int:
        return min(e.at for e in walk.events())

    def last_waits(self, ring: Ring) -> Iterator[Obligation]:
        """A writer's wait behind its walk is for the last turn, as if it were to write another."""
        for name in ring.writers:
            walk = self.walks[name]
            slots, total = walk.found.slots(ring.full), walk.segment.after[ring.counter]
            for event in walk.found.events:
                if event.kind == "wait" and event.what == ring.empty and not event.loops and slots == 1:
                    when = _iff(event.guard, total >= 1)
                    parity = z3.And(event.first == 0, event.value == (total + 1) % 2)
                    known = given(*_threads(walk.found), total >= 0)
                    what = f"{name}: the wait behind the last product"
                    goal = z3.And(when, z3.Implies(event.guard, parity))
                    yield Obligation(what, event.span, known, goal)
                    behind = z3.BoolVal(event.at > max(e.at for e in walk.events()))
                    yield Obligation(f"{what} is behind it", event.span, (), behind)
                    self.claim(name, event)


def _threads_of(walk: Walk, arrival: Event) -> int:
    return walk.found.part.threads // WARP if arrival.elected else walk.found.part.threads


def _same_path(a: Event, b: Event) -> bool:
    return len(a.path) == len(b.path) and all(map(z3.eq, a.path, b.path))


def _together(a: Event, b: Event) -> bool:
    return _same_path(a, b) and a.loops == b.loops and a.elected == b.elected


def _reach(walk: Walk, events: Sequence[Event], by: Event) -> Iterator[Obligation]:
    for event in events:
        goal = z3.Implies(event.guard, by.guard)
        what = f"{walk.name}: {by.kind} of what the tensor core reads of {event.what}"
        yield Obligation(what, by.span, given(*event.ranges), goal)
