"""The warps that widen weights, in the compiled kernel: their walk over pieces, and the places of these.

The part asks for piece n + slots once all its threads have read piece n, behind a barrier of its own, and for
the first before its walk. With n counted from 0, the expert of a CTA's piece n is n div P and its place in it
n mod P, where P is the CTA's share of an expert: one of two constants. So what a thread counts, and what it
will ask for next, are terms of n; that they are follows by induction over the three loops of the walk. A
place is one of `ring`, whose readers meet instead of arriving at an mbarrier.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import z3

from megamoe import ring
from megamoe.ring import every, given
from megamoe.role_events import BLOCK, THREAD, WARP, Event, Followed, Loop, names
from megamoe.role_rings import Rings
from megamoe.role_walk import Pieces, Ring, Roles
from verify.ir import UnsupportedIR
from verify.solve import Obligation

_WORD = 1 << 31
_DEPTH = 3  # loops of the walk: waves, a wave's experts, pieces of an expert

State = dict[str, z3.ArithRef]


@dataclass(frozen=True)
class _Share:
    """What a CTA widens of an expert: `size` pieces, if `when` holds."""

    pieces: Pieces
    ctas: int
    when: z3.BoolRef
    size: int

    def expert(self, number: z3.ArithRef) -> z3.ArithRef:
        """Return the expert of a CTA's piece."""
        return number / self.size

    def within(self, number: z3.ArithRef) -> z3.ArithRef:
        """Return which of the expert's pieces, all CTAs', it is."""
        return BLOCK % self.ctas + number % self.size * self.ctas

    def ahead(self, number: z3.ArithRef) -> z3.ArithRef:
        """Return its number among those of all experts."""
        return self.expert(number) * self.pieces.expert_pieces + self.within(number)

    def end(self, number: z3.ArithRef) -> z3.ArithRef:
        """Return the number of the first piece of the expert behind."""
        return (self.expert(number) + 1) * self.pieces.expert_pieces

    @property
    def total(self) -> int:
        """Pieces of a CTA."""
        return self.pieces.experts * self.size


def _shares(pieces: Pieces, ctas: int) -> list[_Share]:
    """Return the two sizes of a share, or the one there is."""
    size, more = divmod(pieces.expert_pieces, ctas)
    if size == 0:
        raise UnsupportedIR("a CTA that has no piece of an expert")
    cta = BLOCK % ctas
    cases = [(z3.And(cta >= more, cta < ctas), size)]
    cases += [(z3.And(cta >= 0, cta < more), size + 1)] if more else []
    return [_Share(pieces, ctas, when, size) for when, size in cases]


@dataclass
class Widening:
    """The widening part of a kernel; `rings` notes what is proved of its events."""

    roles: Roles
    pieces: Pieces
    found: Followed
    rings: Rings

    @cached_property
    def slots(self) -> int:
        """Places."""
        return self.found.slots(self.pieces.loaded)

    @cached_property
    def wait(self) -> Event:
        """The one wait for a piece."""
        waits = [e for e in self.found.events if e.kind == "wait"]
        if len(waits) != 1 or len(waits[0].loops) != _DEPTH or any(o.path for o in waits[0].loops):
            raise UnsupportedIR(f"{self.found.part.name}: no single wait in {_DEPTH} loops on no condition")
        return waits[0]

    @cached_property
    def first(self) -> Loop:
        """The loop before the walk that asks for the first pieces."""
        loops = {e.loops for e in self.found.events if e.kind == "copy" and e.loops != self.wait.loops}
        if len(loops) != 1 or len(next(iter(loops))) != 1:
            raise UnsupportedIR(f"{self.found.part.name}: no single loop asks for the first pieces")
        return next(iter(loops))[0]

    @property
    def threads(self) -> tuple[z3.BoolRef, ...]:
        """Of which threads and CTAs the claims are."""
        part = self.found.part
        return self.roles.launched, part.first <= THREAD, part.numbers[-1] >= THREAD

    @property
    def asks(self) -> z3.BoolRef:
        """A thread is of the warp that asks for copies."""
        return self.found.part.first + WARP > THREAD

    @property
    def rank(self) -> z3.ArithRef:
        """Of the CTA."""
        return BLOCK / self.roles.ctas

    def holds(
        self, share: _Share, state: State, number: z3.ArithRef, *, is_first: bool = False
    ) -> z3.BoolRef:
        """What a thread counts before piece `number`; `is_first`: before it asks for that, in `first`."""
        p = self.pieces
        if not {p.ahead, p.end} <= state.keys() or (p.count not in state and not is_first):
            raise UnsupportedIR(f"{self.found.part.name}: {p.ahead} or {p.count} is not kept in its walk")
        next_ = number if is_first else number + self.slots
        ahead = z3.And(state[p.ahead] == share.ahead(next_), state[p.end] == share.end(next_))
        return (
            z3.Implies(self.asks, ahead)
            if is_first
            else z3.And(state[p.count] == number, z3.Implies(self.asks, ahead))
        )

    # ------------------------------------------------------------------ claims
    def obligations(self) -> Iterator[Obligation]:
        """Every piece is widened once, from a place that holds it, and goes where products look for it."""
        p, name = self.pieces, self.found.part.name
        yield from ring.place(ring.Steps(bulk=True, meets=True))
        yield from ring.turns(self.slots)
        shares = _shares(p, self.roles.ctas)
        few = all(share.total + self.slots < _WORD for share in shares)
        yield Obligation(f"{name}: {p.count} does not wrap", None, (), z3.BoolVal(few))
        whole = z3.BoolVal(p.waves * p.wave_experts >= p.experts)
        yield Obligation(f"{name}: the waves are all experts", None, (), whole)
        for share in shares:
            yield from self._walk(share)
            yield from self._asked(share, self.first.var, (self.first,))
            yield from self._visits(share)
        yield from self._threads()
        self.rings.claim(name, self.wait)

    def _walk(self, share: _Share) -> Iterator[Obligation]:
        """By induction over the loops, what is counted is what `_Share` says."""
        p, name = self.pieces, f"{self.found.part.name}, {share.size} pieces an expert"
        wave, expert, turn = self.wait.loops
        known = (*self.threads, share.when)
        in_first = every(*self.first.path) if self.first.path else z3.BoolVal(True)
        yield Obligation(f"{name}: one warp asks first", None, given(*known), in_first == self.asks)
        whole = z3.And(self.first.start == 0, self.first.extent == self.slots)
        yield Obligation(f"{name}: it asks for every place", None, given(*known), whole)
        first, zero = self.first, z3.IntVal(0)
        yield Obligation(
            f"{name}: the first piece",
            None,
            given(*known),
            self.holds(share, first.before, zero, is_first=True),
        )
        before = self.holds(share, first.entry, first.var, is_first=True)
        after = self.holds(share, first.leave, first.var + 1, is_first=True)
        yield Obligation(f"{name}: the next of the first", None, given(*known, first.range, before), after)
        begun = self.holds(share, first.after, z3.IntVal(self.slots), is_first=True)
        yield Obligation(
            f"{name}: the walk begins", None, given(*known, begun), self.holds(share, wave.before, zero)
        )
        of_wave = z3.If(
            wave.var * p.wave_experts < p.experts, wave.var * p.wave_experts, z3.IntVal(p.experts)
        )
        after_wave = z3.substitute(of_wave, (wave.var, wave.var + 1))
        in_wave = p.experts - wave.var * p.wave_experts
        rest = z3.If(in_wave < p.wave_experts, in_wave, z3.IntVal(p.wave_experts))
        sizes = [(wave, z3.IntVal(p.waves)), (expert, rest), (turn, z3.IntVal(share.size))]
        for depth, (loop, size) in enumerate(sizes):
            known_there = given(*known, *(o.range for o in self.wait.loops[:depth]))
            rounds = z3.And(loop.start == 0, loop.extent == size)
            yield Obligation(f"{name}: all rounds of loop {depth}", None, known_there, rounds)
        of_expert = wave.var * p.wave_experts + expert.var
        nest = [
            (wave, of_wave * share.size, after_wave * share.size),
            (expert, of_expert * share.size, (of_expert + 1) * share.size),
            (turn, of_expert * share.size + turn.var, of_expert * share.size + turn.var + 1),
        ]
        for depth, (loop, now, then) in enumerate(nest):
            known = (*known, loop.range, self.holds(share, loop.entry, now))
            if depth + 1 < _DEPTH:
                inner, at, _ = nest[depth + 1]
                begins = self.holds(share, inner.before, z3.substitute(at, (inner.var, zero)))
                yield Obligation(f"{name}: loop {depth + 1} begins", None, given(*known), begins)
                ended = self.holds(share, inner.after, z3.substitute(at, (inner.var, inner.extent)))
                left = given(*known, ended)
            else:
                left = given(*known)
            yield Obligation(
                f"{name}: a round of loop {depth}", None, left, self.holds(share, loop.leave, then)
            )

    def _number(self) -> z3.ArithRef:
        """Return what counts pieces in a visit."""
        return self.wait.loops[-1].entry[self.pieces.count]

    def _in_visit(self, share: _Share) -> tuple[z3.BoolRef, ...]:
        wave, expert, turn = self.wait.loops
        number = (wave.var * self.pieces.wave_experts + expert.var) * share.size + turn.var
        around = (loop.range for loop in self.wait.loops)
        return (*self.threads, share.when, *around, self.holds(share, turn.entry, number))

    def _asked(self, share: _Share, number: z3.ArithRef, loops: tuple[Loop, ...]) -> Iterator[Obligation]:
        """The copies in some loops are of piece `number`, if there is one, and come to its place."""
        p, name = self.pieces, f"{self.found.part.name}, {share.size} pieces an expert"
        is_first = loops == (self.first,)
        known = (
            (
                *self.threads,
                share.when,
                self.first.range,
                self.holds(share, self.first.entry, number, is_first=True),
            )
            if is_first
            else self._in_visit(share)
        )
        arrivals, copies = (
            [e for e in self.found.events if e.kind == kind and e.loops == loops]
            for kind in ("arrive", "copy")
        )
        there_is = z3.And(self.asks, number < share.total)
        counts = {c for (array, _), c in self.found.counts.items() if array == p.loaded}
        as_many = z3.BoolVal(counts == {len(arrivals)} and sorted(e.what for e in copies) == sorted(p.places))
        yield Obligation(f"{name}: arrivals and copies a piece", None, (), as_many)
        for event in (*arrivals, *copies):
            array, at = (event.what, event.first) if event.kind == "arrive" else event.barrier
            right = z3.BoolVal(array == p.loaded and event.elected and (is_first or self._is_read(event)))
            what = f"{name}: a piece is asked for if there is one, when its place has been read"
            yield Obligation(what, event.span, given(*known), z3.And(right, event.guard == there_is))
            place = at == number % self.slots
            yield Obligation(f"{name}: the place", event.span, given(*known, event.guard), place)
        own = Ring(p.loaded, "", p.count, {}, self.found.part.name, p.places, bulk=True)
        yield from self.rings.copies(own, self.found.events, arrivals, known)
        source = p.source(share.expert(number), share.within(number), self.rank)
        for copy in copies:
            size, (tensor, wanted) = p.places.get(copy.what, 0), source.get(copy.what, ("", ()))
            at = number % self.slots * size
            inside = z3.And(copy.first >= at, copy.last < at + size)
            yield Obligation(f"{name}: inside the place", copy.span, given(*known, copy.guard), inside)
            if tensor != copy.source or len(wanted) != len(copy.coordinates):
                raise UnsupportedIR(f"{name}: {copy.source} is copied to {copy.what}")
            same = every(*(a == b for a, b in zip(copy.coordinates, wanted, strict=True)))
            what = f"{name}: {copy.source} of the piece"
            yield Obligation(what, copy.span, given(*known, copy.guard), same)
        self.rings.claim(self.found.part.name, *arrivals, *copies)

    def _visits(self, share: _Share) -> Iterator[Obligation]:
        p, name, wait = self.pieces, f"{self.found.part.name}, {share.size} pieces an expert", self.wait
        known, number = self._in_visit(share), self._number()
        turn = z3.And(wait.first == number % self.slots, wait.value == number / self.slots % 2)
        own = z3.BoolVal(wait.what == p.loaded and not wait.elected)
        yield Obligation(f"{name}: the wait", wait.span, given(*known), z3.And(own, wait.guard, turn))
        there_is = z3.And(number >= 0, number < share.total)
        yield Obligation(f"{name}: what is waited for is asked for", wait.span, given(*known), there_is)
        yield from self._asked(share, number + self.slots, wait.loops)
        for event in self._of_visits("read", p.places):
            size = p.places[event.what]
            at = number % self.slots * size
            inside = z3.And(event.first >= at, event.last < at + size, z3.BoolVal(self._is_between(event)))
            what = f"{name}: {event.what} is read in its place, between the wait and the barrier"
            yield Obligation(what, event.span, given(*known, *event.ranges, event.guard), inside)
            self.rings.claim(self.found.part.name, event)
        yield from self._stores(share, known)

    def _stores(self, share: _Share, known: tuple[z3.BoolRef, ...]) -> Iterator[Obligation]:
        """What is widened is written where products look for it, each byte of a piece once."""
        p, name = self.pieces, f"{self.found.part.name}, {share.size} pieces an expert"
        wave, expert, turn = self.wait.loops
        place = wave.var * p.wave_experts + expert.var, BLOCK % self.roles.ctas + turn.var * self.roles.ctas
        begin = p.first_target(*place, self.rank) * p.target_bytes
        stores = self._of_visits("store", (p.target,))
        if len(stores) != 1:
            raise UnsupportedIR(f"{name}: {len(stores)} stores to {p.target}")
        (store,) = stores
        inside = z3.And(store.first >= begin, store.last < begin + p.target_bytes)
        right = z3.And(inside, store.guard, z3.BoolVal(store.at > self.wait.at and not store.elected))
        there = given(*known, *store.ranges)
        yield Obligation(f"{name}: {p.target} is written where the piece belongs", store.span, there, right)
        # As many bytes as there are, and none twice: all of them.
        outer = set().union(*(names(loop.var) for loop in self.wait.loops), names(BLOCK))
        own = sorted(set().union(*map(names, store.ranges)) - outer)
        other = [(z3.Int(n), z3.Int(f"{n}_other")) for n in own]
        ranges = [z3.substitute(r, *other) for r in store.ranges]
        same = every(*(a == b for a, b in other))
        apart = z3.Or(
            same,
            store.last < z3.substitute(store.first, *other),
            z3.substitute(store.last, *other) < store.first,
        )
        once = given(*known, *store.ranges, *ranges)
        yield Obligation(f"{name}: no byte of a piece is written twice", store.span, once, apart)
        bytes_ = z3.simplify(store.last - store.first + 1)
        each = _rounds(store.ranges, own)
        count = (
            z3.BoolVal(each * bytes_.as_long() == p.target_bytes)
            if z3.is_int_value(bytes_)
            else z3.BoolVal(False)
        )
        yield Obligation(f"{name}: as many bytes are written as a piece has", store.span, (), count)
        self.rings.claim(self.found.part.name, store)

    def _of_visits(self, kind: str, whats: Container[str]) -> list[Event]:
        """Return the events of a kind, of these buffers or tensors, inside a visit."""
        loops = self.wait.loops
        return [
            e for e in self.found.events if e.kind == kind and e.what in whats and e.loops[:_DEPTH] == loops
        ]

    @cached_property
    def _barriers(self) -> list[int]:
        """Where in a visit all threads meet."""
        part, loops = self.found.part, self.wait.loops
        return [
            e.at
            for e in self.found.events
            if e.kind == "sync"
            and e.loops == loops
            and not e.path
            and e.value == part.threads
            and not e.elected
        ]

    def _is_between(self, event: Event) -> bool:
        """Behind the wait and before a barrier before whatever is asked for in the visit."""
        asked = [
            e.at for e in self.found.events if e.kind in ("arrive", "copy") and e.loops == self.wait.loops
        ]
        return self.wait.at < event.at and any(event.at < b < min(asked, default=0) for b in self._barriers)

    def _is_read(self, event: Event) -> bool:
        """Behind a barrier that comes behind all reads of the visit."""
        reads = [e.at for e in self._of_visits("read", self.pieces.places)]
        return any(max(reads, default=self.wait.at) < b < event.at for b in self._barriers)

    def _threads(self) -> Iterator[Obligation]:
        """All threads walk alike."""
        loops = self.wait.loops
        terms = [*(x for o in loops for x in (o.start, o.extent)), self._number()]
        alike = z3.BoolVal(self.found.is_uniform(*terms))
        yield Obligation(f"{self.found.part.name}: all threads walk alike", None, (), alike)
        before = z3.BoolVal(all(e.at < self.wait.at for e in self.found.events if e.loops == (self.first,)))
        yield Obligation(f"{self.found.part.name}: the first are asked for before", None, (), before)


def _rounds(ranges: Sequence[z3.BoolRef], variables: Sequence[str]) -> int:
    """Return how many values variables with constant ranges take together; 0: some are not constant."""
    total = 1
    for name in variables:
        var, solver = z3.Int(name), z3.Optimize()
        own = [r for r in ranges if names(r) == {name}]
        bounds = []
        for find in (solver.minimize, solver.maximize):
            solver.push()
            solver.add(*own)
            handle = find(var)
            if solver.check() != z3.sat or not z3.is_int_value(handle.value()):
                return 0
            bounds.append(handle.value().as_long())
            solver.pop()
        total *= bounds[1] - bounds[0] + 1
    return total
