"""The products of a CTA, as each of its roles walks through them: the same ones in the same order.

A role's walk is a loop over segments and in it a loop over turns, whose rounds are products or none. What a
round chooses and how many visits of a ring it makes are terms over the plan's tensors. By induction over the
rounds, all roles are at the same product, and their counters agree, if these terms are equal.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import z3

from megamoe.quotients import parted
from megamoe.ring import every, given
from megamoe.role_events import BLOCK, Event, Followed, Loop, Part
from megamoe.role_late import Late, carried
from verify.encode import Hypothesis
from verify.ir import UnsupportedIR
from verify.solve import Obligation

_WORD = 1 << 31


@dataclass(frozen=True)
class Ring:
    """Places that writers fill and readers empty in turn.

    Attributes:
        full: array of mbarriers that writers arrive at.
        empty: that readers arrive at.
        counter: variable in which each thread counts its visits.
        writers: parts, and how often an arriving thread of each arrives a visit.
        reader: part.
        places: shared buffers -> bytes of one place.
        bulk: writers are copies.
        prefilled: the writer whose part of the first turn is filled before the walk; "": there is none.
        aligned: every product begins at the first place.
        late: parts that leave some of a product's visits for later.
    """

    full: str
    empty: str
    counter: str
    writers: Mapping[str, int]
    reader: str
    places: Mapping[str, int]
    bulk: bool
    prefilled: str = ""
    aligned: bool = True
    late: Mapping[str, Late] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts that visit it."""
        return (*self.writers, self.reader)


@dataclass(frozen=True)
class Meeting:
    """A shared buffer that a part has to itself: its named barrier orders accesses.

    Attributes:
        part: name.
        size: bytes.
        ring: `full` of a ring that the part writes; accesses are inside its visits, so that those of two
            products are ordered (`ring.place`: a writer begins when all have done the turn before).
    """

    part: str
    size: int
    ring: str = ""


@dataclass(frozen=True)
class Pieces:
    """Pieces of weights that a part widens, from copies that it asks for itself some places ahead.

    The CTA's pieces of an expert are those whose number is the CTA's modulo all; experts come one after the
    other, in waves. Number n is the n-th of this sequence, from 0 on.

    Attributes:
        part: that widens; an elected lane of its first warp asks for the copies.
        loaded: array of mbarriers, one a place.
        count: variable that counts the pieces that a thread has widened.
        ahead, end: of the piece to ask for next: its number among all CTAs' and experts', and that of the
            first piece of the expert behind.
        places: shared buffers -> bytes of one place.
        source: of a piece (number of its expert, number in it, rank): tensor and coordinates by buffer.
        target: tensor that widened rows go to.
        target_bytes: of a piece there.
        first_target: where a piece begins there, in pieces: of a piece as in `source`.
        experts, waves, wave_experts: of a rank.
        expert_pieces: of one expert, all CTAs'.
    """

    part: str
    loaded: str
    count: str
    ahead: str
    end: str
    places: Mapping[str, int]
    source: Callable[..., Mapping[str, tuple[str, tuple[Any, ...]]]]
    target: str
    target_bytes: int
    first_target: Callable[..., Any]
    experts: int
    waves: int
    wave_experts: int
    expert_pieces: int


@dataclass(frozen=True)
class Roles:
    """What is declared of a kernel: the one place to change when a role or a ring is added.

    Attributes:
        parts: of a CTA: all of its threads.
        rings: with their mbarriers, all there are.
        meetings: other shared buffers, each of one part.
        kind: variable that is positive where a round of the walk has a product.
        steers: variables that say which.
        firsts: tensor of the waves' first blocks; waves + 3 a rank.
        waves, ctas: of a rank.
        ranks: of the launch.
        sources: shared buffer -> what a product's visit wants in it: see `role_sources`.
        ranges: what tensors of the plan hold: between which numbers.
        experts: tensor of the blocks' experts.
        look: variable of the search for the first product.
        most_rounds, most_visits: bounds that counters cannot reach the end of their type within.
        pieces: of weights, which a part of its own widens.
    """

    parts: tuple[Part, ...]
    rings: tuple[Ring, ...]
    meetings: Mapping[str, Meeting]
    waves: int
    ctas: int
    ranks: int
    sources: Mapping[str, Callable[..., Any]]
    ranges: Mapping[str, tuple[int, int]]
    most_rounds: int
    most_visits: int
    kind: str = "kind"
    steers: tuple[str, ...] = ("block", "tile")
    firsts: str = "firsts"
    look: str = "look"
    experts: str = "block_expert"
    pieces: Pieces | None = None

    @property
    def launched(self) -> z3.BoolRef:
        """That the CTA is one of the launch."""
        return z3.And(BLOCK >= 0, self.ranks * self.ctas > BLOCK)

    def first(self, number: z3.ArithRef) -> z3.ArithRef:
        """Return element `number` of the rank's `firsts`, as `follow` writes it."""
        tensor = z3.Function(f"{self.firsts}[]", z3.IntSort(), z3.IntSort())
        return tensor(number if self.ranks == 1 else self.rank * (self.waves + 3) + number)

    @property
    def rank(self) -> z3.ArithRef:
        """Return the CTA's rank in the launch, as `follow` writes it: of one rank it is 0."""
        return z3.IntVal(0) if self.ranks == 1 else BLOCK / self.ctas

    def ascends(self, *numbers: z3.ArithRef) -> tuple[Hypothesis, ...]:
        """Return what the plan promises of `firsts` at these numbers: from 0 on it ascends."""
        terms = [self.first(z3.IntVal(0)) == 0]
        for n in numbers:
            inside = z3.And(n >= 0, n < self.waves + 2)
            terms.append(z3.Implies(inside, self.first(n) <= self.first(n + 1)))
        label = f"{self.firsts} ascends from 0"
        return (*(Hypothesis(label, "contract", t) for t in terms), *self.in_range(*terms))

    def in_range(self, *terms: z3.ExprRef) -> tuple[Hypothesis, ...]:
        """Return what the plan promises of the elements of its tensors that occur in terms."""
        found, todo, seen = [], list(terms), set()
        while todo:
            term = todo.pop()
            if term.get_id() in seen:
                continue
            seen.add(term.get_id())
            todo += term.children()
            name = term.decl().name().removesuffix("[]") if z3.is_app(term) and term.num_args() == 1 else ""
            if name in self.ranges:
                low, high = self.ranges[name]
                within = z3.And(term >= low, term <= high)
                found.append(Hypothesis(f"{low} <= {name} <= {high}", "contract", within))
        return tuple(found)


@dataclass(frozen=True)
class Walk:
    """A part's way through its CTA's products."""

    roles: Roles
    found: Followed
    segment: Loop
    turn: Loop

    @property
    def name(self) -> str:
        """Of the part."""
        return self.found.part.name

    def events(self) -> list[Event]:
        """Return the events of a product, in program order."""
        return [e for e in self.found.events if self.holds(e)]

    def holds(self, event: Event) -> bool:
        """Return whether an event is one of a product."""
        return event.loops[:2] == (self.segment, self.turn)

    @property
    def has_product(self) -> z3.BoolRef:
        """That a round of the walk has a product."""
        return self.turn.leave[self.roles.kind] > 0

    def late(self, ring: Ring) -> Late | None:
        """Return what the part leaves of a product for later."""
        return ring.late.get(self.name)

    def count(self, ring: Ring) -> z3.ArithRef:
        """Return the number of the first visit of a round's product."""
        return self._number(ring, self.turn.entry)

    def visits(self, ring: Ring) -> z3.ArithRef:
        """Return how many visits a round's product has."""
        return self._number(ring, self.turn.leave) - self.count(ring)

    def _number(self, ring: Ring, now: Mapping[str, z3.ArithRef]) -> z3.ArithRef:
        late = self.late(ring)
        return now[ring.counter] if late is None else now[ring.counter] + late.lag(now[late.left])

    def round(self) -> tuple[z3.BoolRef, ...]:
        """That the counters of both loops are in range."""
        return (self.roles.launched, self.segment.range, self.turn.range)


def walk_of(roles: Roles, found: Followed) -> Walk | None:
    """Return a part's walk; None if it visits no ring.

    Raises:
        UnsupportedIR: it visits rings in more than one nest of loops, or counts visits elsewhere.
    """
    counters = [ring.counter for ring in roles.rings if found.part.name in ring.parts]
    nests = {e.loops[:2] for e in found.events if e.kind in ("wait", "arrive", "copy") and len(e.loops) > 1}
    if not nests:
        if counters:
            raise UnsupportedIR(f"{found.part.name}: no walk over products")
        return None
    if len(nests) > 1:
        raise UnsupportedIR(f"{found.part.name}: mbarriers in {len(nests)} nests of loops")
    walk = Walk(roles, found, *nests.pop())
    segment, turn = walk.segment, walk.turn
    if segment.path or turn.path or roles.kind not in turn.leave:
        raise UnsupportedIR(f"{walk.name}: its walk hangs on a condition, or has no kind of product")
    late = [ring.late[walk.name] for ring in roles.rings if walk.name in ring.late]
    lost = [name for one in late for name in (one.left, *one.kept) if name not in turn.leave]
    if lost:
        raise UnsupportedIR(f"{walk.name}: {lost[0]} is not set in a round")
    for counter in counters:
        kept = [
            (segment.before.get(counter), z3.IntVal(0)),
            (turn.before.get(counter), segment.entry.get(counter)),
            (segment.leave.get(counter), turn.after.get(counter)),
        ]
        if any(a is None or b is None or not z3.eq(a, b) for a, b in kept):
            raise UnsupportedIR(f"{walk.name}: {counter} does not count from 0, round by round")
    return walk


def same_walks(roles: Roles, walks: Mapping[str, Walk]) -> Iterator[Obligation]:
    """All parts walk through the same products, and their counters agree."""
    first, *others = walks.values()
    for walk in walks.values():
        terms = [walk.segment.extent, walk.turn.extent, *walk.round(), walk.turn.leave[roles.kind]]
        counted = [walk.turn.leave[r.counter] for r in roles.rings if walk.name in r.parts]
        late = [r.late[walk.name] for r in roles.rings if walk.name in r.late]
        counted += [walk.turn.leave[name] for one in late for name in one.kept]
        steered = [walk.turn.leave[name] for name in roles.steers if name in walk.turn.leave]
        uniform = z3.BoolVal(walk.found.is_uniform(*terms, *counted, *steered))
        yield Obligation(f"{walk.name}: all threads walk alike", None, (), uniform)
        short = z3.And(walk.turn.extent <= roles.most_rounds, walk.segment.extent <= roles.waves + 1)
        plan = roles.ascends(walk.segment.var, walk.segment.var + 1)
        in_segment = given(roles.launched, walk.segment.range)
        yield Obligation(f"{walk.name}: few rounds", None, (*in_segment, *plan), short)
        for ring in roles.rings:
            if walk.name in ring.parts:
                yield from _counts(roles, walk, ring)
    for other in others:
        name = f"{other.name} as {first.name}"
        loops = [(first.segment, other.segment, ()), (first.turn, other.turn, (first.segment.range,))]
        for what, (a, b, around) in zip(("segments", "turns"), loops, strict=True):
            same = z3.And(a.start == b.start, a.extent == b.extent)
            yield Obligation(f"{name}: the same {what}", None, given(roles.launched, *around), same)
        kinds = first.turn.leave[roles.kind] == other.turn.leave[roles.kind]
        yield Obligation(f"{name}: the same kinds of products", None, given(*first.round()), kinds)
        both = (*first.round(), first.has_product, other.has_product)
        for steer in roles.steers:
            same = first.turn.leave[steer] == other.turn.leave[steer]
            yield Obligation(f"{name}: the same {steer}", None, given(*both), same)
    for ring in roles.rings:
        reference, *rest = (walks[name] for name in ring.parts)
        for other in rest:
            both = given(*reference.round(), reference.has_product, other.has_product)
            same = reference.visits(ring) == other.visits(ring)
            what = f"{other.name} visits {ring.full} as often as {reference.name}"
            yield Obligation(what, None, both, same)


def _counts(roles: Roles, walk: Walk, ring: Ring) -> Iterator[Obligation]:
    slots = walk.found.slots(ring.full)
    visits, product = walk.visits(ring), given(*walk.round(), walk.has_product)
    enough = z3.And(visits >= slots, visits <= roles.most_visits)
    yield Obligation(f"{walk.name}: a product's visits of {ring.full}", None, product, enough)
    none = given(*walk.round(), z3.Not(walk.has_product))
    yield Obligation(f"{walk.name}: no visit of {ring.full} without a product", None, none, visits == 0)
    if ring.aligned:
        # Counters begin at 0, so by induction every product begins at the first place.
        yield Obligation(
            f"{walk.name}: visits of whole turns of {ring.full}", None, product, visits % slots == 0
        )
    late = walk.late(ring)
    if late is not None:
        made = walk.turn.leave[ring.counter] - walk.turn.entry[ring.counter]
        yield Obligation(f"{walk.name}: no visit of {ring.full} is taken back", None, product, made >= 0)
        yield from carried(walk.name, late, walk.segment, walk.turn, walk.has_product)
    total = (roles.waves + 1) * roles.most_rounds * roles.most_visits
    yield Obligation(f"{walk.name}: {ring.counter} does not wrap", None, (), z3.BoolVal(total < _WORD))


# --------------------------------------------------------------------------- the first product
def first_product(
    roles: Roles, walk: Walk, guard: z3.BoolRef, copies: list[tuple[Event, Event, Loop]]
) -> Iterator[Obligation]:
    """What is filled before the walk is of the walk's first product, and there is some if there is a product.

    Args:
        roles: of the kernel.
        walk: of the part that fills.
        guard: under which it fills.
        copies: one of before the walk and the same of a product; the former's loop.
    """
    search = walk.found.searches.get(roles.look)
    if search is None:
        raise UnsupportedIR(f"{walk.name}: no search for the first product")
    s, t, n, at = z3.Int("s"), z3.Int("t"), search.found, walk.segment.var
    kind, extent = walk.turn.leave[roles.kind], walk.turn.extent

    def kind_at(segment: z3.ArithRef, turn: z3.ArithRef) -> z3.ArithRef:
        return z3.substitute(kind, (at, segment), (walk.turn.var, turn))

    def extent_at(segment: z3.ArithRef) -> z3.ArithRef:
        return z3.substitute(extent, (at, segment))

    def goes_on(number: z3.ArithRef) -> z3.BoolRef:
        """The search went past a number, if it lies before the one that was found."""
        return z3.Implies(z3.And(number >= search.start, number < n), search.goes_on(number))

    of_n = (roles.launched, n >= search.start, z3.Not(search.goes_on(n)), goes_on(n - 1))
    found = (*of_n, goes_on(s), goes_on(s - 1))
    numbers = (n - 1, n, n + 1, s - 1, s, s + 1)
    known = (*given(*found, walk.segment.start == 0, walk.turn.start == 0), *roles.ascends(*numbers))
    known = (*known, *roles.in_range(guard, *found, kind_at(s, t)))
    segments = walk.segment.extent
    zero, one = z3.IntVal(0), z3.IntVal(1)
    turn = z3.If(kind_at(n, zero) > 0, zero, one)
    exists = z3.And(n >= 0, n < segments, turn < extent_at(n), kind_at(n, turn) > 0)
    is_round = z3.And(s >= 0, s < segments, t >= 0, t < extent_at(s))
    starts = z3.And(search.start == 0, walk.segment.start == 0, walk.turn.start == 0)
    yield Obligation("the search and the walk begin at 0", None, (), starts)
    yield Obligation("what is filled is of a product", None, (*known, *given(guard)), exists)
    before = given(is_round, s < n)
    yield Obligation("no product before it", None, (*known, *before), kind_at(s, t) <= 0)
    nothing = (*known, *given(z3.Not(guard), is_round))
    yield Obligation("nothing is filled only if there is no product", None, nothing, kind_at(s, t) <= 0)
    # Of each of the two turns by itself: a term with one of two in it takes solvers several times as long.
    for turn, chosen in ((zero, kind_at(n, zero) > 0), (one, kind_at(n, zero) <= 0)):
        hold = (*given(*of_n), *roles.ascends(n - 1, n, n + 1), *given(chosen, guard))
        hold = (*hold, *roles.in_range(guard, *of_n, kind_at(n, turn)))
        for early, late, loop in copies:
            (rounds,) = late.loops[2:]
            changes = [(at, n), (walk.turn.var, turn), (rounds.var, loop.var)]
            changes += [(walk.count(ring), zero) for ring in roles.rings if walk.name in ring.parts]
            pairs = [
                (parted(a), parted(z3.substitute(b, *changes)))
                for a, b in zip(early.coordinates, late.coordinates, strict=True)
            ]
            same = every(*(a == b for a, b in pairs if not a.eq(b)))
            what = f"{early.what}: what the first product's round would fetch"
            yield Obligation(what, early.span, (*hold, *given(loop.range)), same)
