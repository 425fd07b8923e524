"""A place that some threads fill and others read, with an mbarrier for either, as a transition system.

The ring of stages has such a place for each stage, and what is handed over between consumers and finishers is
one. Its *turns* are numbered. A writer waits until the turn before has been read (not before the first),
fills its part of the place and arrives at `full`; a reader waits until the turn is full, reads, and arrives
at `empty`. Writers and readers come each by themselves, any number of them, and waits know the parity of a
turn alone. A *bulk* writer is a copy: what it has started arrives, and its bytes come later; the phase ends
when all writers have arrived and no bytes are missing.

Of a writer i: in(i) turns begun, up(i) arrivals, down(i) turns whose bytes are there. Of a reader: got(j)
    turns begun, left(j) arrivals. full and empty count the phases that have ended. The invariant is about one
    writer, one reader and both counts, so it holds for any number of either; that a phase ends when all have
    come follows from the barrier's count and from the invariant, by which nobody has come twice. No counter
    is bounded. `roles_proof` shows on the compiled kernel that its threads take these steps and no others.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import z3

from megamoe.quotients import is_odd
from verify.encode import Hypothesis
from verify.solve import Obligation


def given(*terms: z3.BoolRef) -> tuple[Hypothesis, ...]:
    """Return terms as what a proof may use."""
    return tuple(Hypothesis("what the threads do", "definition", t) for t in terms)


def every(*terms: z3.BoolRef) -> z3.BoolRef:
    """Return that all of the terms hold."""
    if not terms:
        return z3.BoolVal(True)
    return terms[0] if len(terms) == 1 else z3.And(*terms)


def some(*terms: z3.BoolRef) -> z3.BoolRef:
    """Return that one of the terms holds."""
    return terms[0] if len(terms) == 1 else z3.Or(*terms)


def how_many(terms: Iterable[z3.BoolRef]) -> z3.ArithRef:
    """Return how many of the terms hold."""
    return sum((z3.If(t, z3.IntVal(1), z3.IntVal(0)) for t in terms), z3.IntVal(0))


@dataclass(frozen=True)
class Steps:
    """What the threads of a place do; a mutant changes one.

    Attributes:
        bulk: writers are copies.
        writer_parity: what is added to a writer's turn to have the parity that it waits for, less 1.
        reader_parity: that of a reader.
        first: turns that a writer begins without a wait.
        early: a reader arrives before it has read.
        missing: of the arrivals that end a phase.
        meets: a barrier of the readers, which writers pass too, is what they wait for instead of a parity.
    """

    bulk: bool = False
    writer_parity: int = 1
    reader_parity: int = 0
    first: int = 1
    early: bool = False
    missing: int = 0
    meets: bool = False


@dataclass(frozen=True)
class _State:
    begun: z3.ArithRef  # of a writer: turns begun
    up: z3.ArithRef  # arrivals at `full`
    down: z3.ArithRef  # turns whose bytes are there
    got: z3.ArithRef  # of a reader: turns begun
    left: z3.ArithRef  # arrivals at `empty`
    reading: z3.ArithRef  # turns read
    full: z3.ArithRef  # phases that have ended
    empty: z3.ArithRef

    def to(self, **changed: z3.ArithRef) -> "_State":
        return _State(**{**vars(self), **changed})

    def holds(self, bulk: bool) -> z3.BoolRef:
        """The invariant."""
        writer = [
            self.down <= self.up,
            self.up <= self.begun,
            self.begun <= self.down + 1 if bulk else self.begun <= self.up + 1,
            self.full <= self.down if bulk else self.full <= self.up,
            self.begun <= self.empty + 1,
        ]
        reader = [
            self.empty <= self.left,
            self.left <= self.got,
            self.reading <= self.got,
            self.left <= self.reading,
            self.got <= self.left + 1,
            self.got <= self.full,
        ]
        return z3.And(self.empty >= 0, self.empty <= self.full, self.full <= self.empty + 1, *writer, *reader)


def place(steps: Steps) -> Iterator[Obligation]:
    """A turn is filled once and read by all before the next is filled; parities tell turns apart.

    Yields what has to be proved: that the invariant holds at first and after each step, that each arrival
        counts for its own turn and each wait ends with its own, and that whoever waits goes on once the
        others have come.
    """
    fields = ("begun", "up", "down", "got", "left", "reading", "full", "empty")
    now = _State(*(z3.Int(name) for name in fields))
    kind = ("copies" if steps.bulk else "threads") + (", readers who meet" if steps.meets else "")

    def claim(what: str, before: z3.BoolRef, goal: z3.BoolRef) -> Obligation:
        return Obligation(f"{kind}: {what}", None, given(now.holds(steps.bulk), before), goal)

    def step(what: str, before: z3.BoolRef, after: _State) -> Obligation:
        return claim(f"after {what}", before, after.holds(steps.bulk))

    zero = _State(*(z3.IntVal(0),) * len(fields))
    yield Obligation(f"{kind}: at the start", None, (), zero.holds(steps.bulk))

    def passes(ended: z3.ArithRef, parity: z3.ArithRef) -> z3.BoolRef:
        """A wait for a parity: the phase of that parity has ended, the one under way has the other."""
        return is_odd(ended - parity)

    def has_waited() -> z3.BoolRef:
        """That a writer's wait for the turn before has ended."""
        return now.empty >= now.begun if steps.meets else passes(now.empty, now.begun + steps.writer_parity)

    may_begin = now.begun == now.up
    waited = z3.Or(now.begun < steps.first, has_waited())
    writes = z3.And(may_begin, waited)
    yield claim("a writer begins when all have read the turn before", writes, now.empty >= now.begun)
    yield step("a writer has begun", writes, now.to(begun=now.begun + 1))
    another = now.to(up=z3.Int("up_of_another"), down=z3.Int("down_of_another"), begun=z3.Int("of_another"))
    alike = z3.And(writes, another.holds(steps.bulk))
    done = (another.down if steps.bulk else another.up) >= now.begun
    yield claim("a writer begins when all writers have done the turn before", alike, done)
    arrives = now.up < now.begun
    yield claim("a writer's arrival is of its turn", arrives, now.up == now.full)
    bulk = {} if steps.bulk else {"down": now.down + 1}
    settled = z3.BoolVal(True) if steps.bulk else now.down == now.up
    yield step("a writer has arrived", z3.And(arrives, settled), now.to(up=now.up + 1, **bulk))
    if steps.bulk:
        yield step("bytes have come", now.down < now.up, now.to(down=now.down + 1))
    # Of `count` writers the others have arrived at most once in this phase, as this one has.
    count, others = z3.Ints("count others")
    at_most = z3.And(count >= 1, others >= 0, others <= count - 1)
    came = now.up - now.full
    no_bytes = now.down == now.up if steps.bulk else z3.BoolVal(True)
    ends = z3.And(at_most, others + came == count - steps.missing, no_bytes)
    yield claim("a writer arrives at most once a phase", z3.BoolVal(True), z3.And(came >= 0, came <= 1))
    yield step("a turn is full", ends, now.to(full=now.full + 1))
    reads = z3.And(now.got == now.left, passes(now.full, now.got + steps.reader_parity))
    yield claim("a reader begins when its turn is full", reads, now.full == now.got + 1)
    yield step("a reader has begun", reads, now.to(got=now.got + 1))
    yield step("a reader has read", now.reading < now.got, now.to(reading=now.reading + 1))
    leaves = z3.And(now.left < now.got, z3.BoolVal(True) if steps.early else now.left < now.reading)
    yield claim("a reader's arrival is of its turn", leaves, now.left == now.empty)
    yield step("a reader has left", leaves, now.to(left=now.left + 1))
    gone = now.left - now.empty
    yield claim("a reader arrives at most once a phase", z3.BoolVal(True), z3.And(gone >= 0, gone <= 1))
    empties = z3.And(at_most, others + gone == count - steps.missing)
    yield step("a turn has been read", empties, now.to(empty=now.empty + 1))
    # What it is for. A writer is at work from its beginning until its arrival, or until its bytes have come.
    writing = now.begun > (now.down if steps.bulk else now.up)
    busy = now.got > now.reading
    yield claim("nobody reads while somebody writes", busy, z3.Not(writing))
    yield claim("a reader finds its own turn", busy, (now.down if steps.bulk else now.up) == now.got)
    yield claim("nobody is two phases ahead of a reader", z3.BoolVal(True), now.full <= now.got + 1)
    ahead = z3.And(now.empty + 1 >= now.begun, now.empty <= now.begun)
    yield claim("nobody is two phases ahead of a writer", z3.BoolVal(True), ahead)
    # No deadlock: once all writers of a turn have come it is full, and its readers' wait ends; and back.
    written = z3.And(came == 1, others == count - 1, no_bytes)
    yield claim("a turn that all have written is full", z3.And(at_most, written), ends)
    is_full = now.full == now.got + 1
    yield claim("a full turn's readers go on", is_full, passes(now.full, now.got + steps.reader_parity))
    has_room = z3.And(now.empty == now.begun, now.begun >= 1)
    yield claim("once a turn has been read its writers go on", has_room, has_waited())


def turns(slots: int) -> Iterator[Obligation]:
    """Visits of a ring of `slots` places in turn are the turns of its places; waits are for earlier visits.

    Visit v is of place v mod slots, and its turn there v div slots. A writer's wait is for readers `slots`
    visits earlier, a reader's for writers of the same visit: a wait for an event of smaller rank.
    """
    v, w = z3.Ints("v w")
    visits = given(v >= 0, w >= 0)
    before = given(v >= slots)
    previous = z3.And((v - slots) % slots == v % slots, (v - slots) / slots == v / slots - 1)
    yield Obligation("the turn before is `slots` visits before", None, (*visits, *before), previous)
    same = given(v % slots == w % slots)
    apart = z3.And((v / slots == w / slots) == (v == w), z3.Implies(v < w, v / slots < w / slots))
    yield Obligation("a place's turns are its visits in turn", None, (*visits, *same), apart)
    first = (v < slots) == (v / slots < 1)
    yield Obligation("the first turns are the first visits", None, visits, first)
    parity = (v / slots + 1) % 2 == (v / slots - 1) % 2
    yield Obligation("the parity of the turn before", None, visits, parity)

    def rank(visit: z3.ArithRef, reader: int) -> z3.ArithRef:
        return 2 * visit + reader

    waits = z3.And(rank(v - slots, 1) < rank(v, 0), rank(v, 0) < rank(v, 1), rank(v, 1) < rank(v + 1, 0))
    yield Obligation("waits are for earlier events", None, (*visits, *before), waits)
