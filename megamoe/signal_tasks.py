"""What a round waits for and signals is what `schedule` says of its task: obligations about a nest of loops.

Waits end with the word's last value (or say in `status` that they were given up), are for the right words,
and lie before all that they order, with a barrier of the threads in between; signals are made once, behind a
fence and a barrier behind all that they say is done.
"""

from collections.abc import Iterator, Mapping, Sequence

import z3

from megamoe import schedule
from megamoe.ring import every, given, some
from megamoe.role_events import THREAD, Event, Followed, Loop
from megamoe.role_late import Late, carried
from megamoe.role_walk import Walk
from megamoe.schedule import Kind
from megamoe.signal_follow import STATUS, Signal
from megamoe.signal_rounds import Nest, Wait, asked, rounds_of
from verify.encode import Hypothesis
from verify.interp.device.flags import ACQ_REL, ACQUIRE, RELEASE, SEQ_CST
from verify.ir import UnsupportedIR
from verify.solve import Obligation

ACQUIRES, RELEASES = (ACQUIRE, ACQ_REL, SEQ_CST), (RELEASE, ACQ_REL, SEQ_CST)
COUNTED = {Kind.DISPATCH: "dispatched", Kind.LINEAR1: "l1_done", Kind.LINEAR2: "l2_done"}
END = 1 << 30  # behind all events


# --------------------------------------------------------------------------- waits
def ends(
    nest: Nest,
    poll: Event,
    need: z3.ArithRef | int,
    late: Sequence[Event],
    known: tuple[Hypothesis, ...],
) -> Iterator[Obligation]:
    """A wait ends as soon as its word is at least `need`, or says in `status` that it was given up."""
    if not isinstance(poll, Signal) or poll.flips:
        raise UnsupportedIR(f"{nest.name}: a wait of another form for {poll.what}")
    says = [e for e in late if e.kind == "max" and e.what == STATUS and e.at == poll.at + 1 and not e.elected]
    given_up = some(*(every(z3.BoolVal(True), *e.path) for e in says)) if says else z3.BoolVal(False)
    what = f"{nest.name}: a wait for {poll.what}"
    stops = z3.Implies(z3.Not(poll.goes_on), z3.Or(poll.word >= need, given_up))
    yield Obligation(f"{what} ends with the word's last value", poll.span, known, stops)
    reached = z3.Implies(poll.word >= need, z3.Not(poll.goes_on))
    yield Obligation(f"{what} ends once that is reached", poll.span, known, reached)


def waits(nest: Nest, touches: Sequence[Event]) -> Iterator[Obligation]:
    """A round waits for what its task waits for, and nothing else, and does before what it touches for it.

    Behind a wait its threads meet; behind that a fence lets bulk copies see what was waited for.
    """
    wanted = [w for w in nest.plan.waits(nest.task) if (w.kind is Kind.DISPATCH) == nest.is_dispatch]
    polls = nest.events("poll")
    for poll in polls:
        assert isinstance(poll, Signal)
        yield Obligation(
            f"{nest.name}: a wait for {poll.what} acquires",
            poll.span,
            (),
            z3.BoolVal(poll.order in ACQUIRES and not poll.elected),
        )
        meant = [w for w in wanted if w.tensor == poll.what]
        needs = {w.need for w in meant}
        if len(needs) != 1:
            raise UnsupportedIR(f"{nest.name}: a wait for {poll.what}")
        right = some(*(z3.And(w.when, poll.first == w.word) for w in meant))
        one = nest.leader == THREAD
        what = f"{nest.name}: a wait for {poll.what} is its task's, by one thread"
        yield Obligation(what, poll.span, asked(nest, poll), z3.And(right, one))
        yield from ends(nest, poll, needs.pop(), nest.events("max"), asked(nest, poll))
    for wait in wanted:
        yield from _waited(nest, wait, [p for p in polls if p.what == wait.tensor], touches)


def _waited(nest: Nest, wait: Wait, polls: list[Event], touches: Sequence[Event]) -> Iterator[Obligation]:
    links = [polls, meetings(nest)]
    if not nest.is_dispatch:  # what is touched are bulk copies
        links = [polls, nest.events("warp"), nest.events("proxy")]
    known = (*nest.known(), *given(wait.when))
    what = f"{nest.name}: it waits for {wait.tensor}"
    yield Obligation(what, None, known, nest.chain(links, -1, END))
    for event in touches:
        known = asked(nest, event, wait.when)
        goal = nest.chain(links, -1, event.at, rounds_of(event))
        yield Obligation(f"{what} before {event.kind} of {event.what}", event.span, known, goal)


def meetings(nest: Nest) -> list[Event]:
    """Barriers at which all threads of the part meet, and no others."""
    found = nest.found
    return [
        s
        for s in nest.events("sync")
        if s.value == found.part.threads
        and not s.elected
        and found.is_uniform(*s.path, *(x for loop in s.loops for x in (loop.start, loop.extent)))
    ]


# --------------------------------------------------------------------------- waits ahead
def ahead(
    walk: Walk, nest: Nest, polls: Sequence[Event], names: tuple[str, str, str]
) -> Iterator[Obligation]:
    """Waits under the product before are for what comes before that one.

    Args:
        walk: of the rows' warp.
        nest: likewise.
        polls: waits before the last rounds of the product before are asked for.
        names: variables that hold what is left of it, its segment, its number in the segment.
    """
    g, task, s = nest.plan.config.geometry, nest.task, nest.segment.var
    left, segment, number = names
    yield from carried(walk.name, Late(0, left, names), walk.segment, walk.turn, walk.has_product)
    leave, entry = walk.turn.leave, walk.turn.entry
    known = (*nest.known(), *given(task.exists))
    same = z3.And(nest.seen(leave[segment]) == s, nest.seen(leave[number]) == task.offset)
    yield Obligation(f"{walk.name}: which product is the one before", None, known, same)
    for poll in polls:
        goals = [
            z3.Implies(
                task.kind == kind.value,
                schedule.waits_ahead(g, kind, task.block, task.before, s, entry[segment], entry[number]) == 1,
            )
            for kind in (Kind.LINEAR1, Kind.LINEAR2)
        ]
        what = f"{walk.name}: a wait ahead for {poll.what} is for what comes before the product before"
        first = z3.And(entry[left] > 0, *goals)
        yield Obligation(what, poll.span, asked(nest, poll), first)


def nothing_before(walk: Walk, names: tuple[str, str, str]) -> Iterator[Obligation]:
    """Where nothing is left, the product before has no segment: an invariant of the rounds."""
    left, segment, _ = names

    def holds(now: Mapping[str, z3.ArithRef]) -> z3.BoolRef:
        return z3.Or(now[left] > 0, now[segment] == -2)

    yield Obligation(f"{walk.name}: no product before the first", None, (), holds(walk.segment.before))
    known = given(*walk.round(), holds(walk.turn.entry))
    yield Obligation(f"{walk.name}: nor later, or there is one", None, known, holds(walk.turn.leave))


# --------------------------------------------------------------------------- signals
def signals(nest: Nest, kinds: Sequence[Kind], *, others: int = 0) -> Iterator[Obligation]:
    """A round signals its task once, behind a fence and a barrier of its threads; `others` are of else."""
    task, adds = nest.task, nest.events("add")
    for kind in kinds:
        own = [a for a in adds if a.what == COUNTED[kind]]
        if len(own) != 1:
            raise UnsupportedIR(f"{nest.name}: {len(own)} signals of {COUNTED[kind]}")
        (add,) = own
        assert isinstance(add, Signal)
        plain = add.order in RELEASES and not add.elected and len(add.loops) == 2
        what = f"{nest.name}: the signal of {add.what}"
        yield Obligation(f"{what} releases, once a round", add.span, (), z3.BoolVal(plain))
        known = (*nest.known(), *given(*add.ranges))
        by_one = z3.And(task.of(kind), nest.leader == THREAD)
        once = every(z3.BoolVal(True), *add.path) == by_one
        yield Obligation(f"{what} is one thread's, if and only if there is the task", add.span, known, once)
        right = z3.And(add.first == nest.plan.word(task.block), add.value == 1)
        yield Obligation(f"{what} adds 1 to the word of its block", add.span, asked(nest, add), right)
    if len(adds) != len(kinds) + others:
        raise UnsupportedIR(f"{nest.name}: {len(adds)} signals")


def behind(nest: Nest, event: Event, kind: Kind, *more: z3.BoolRef) -> Obligation:
    """What a thread does is before its task's signal: a fence, a barrier of all threads, the signal."""
    adds = [a for a in nest.events("add") if a.what == COUNTED[kind]]
    goal = nest.chain([nest.events("proxy"), meetings(nest), adds], event.at, END, rounds_of(event))
    what = f"{nest.name}: {event.kind} of {event.what} before the signal, with a fence and a barrier between"
    return Obligation(what, event.span, asked(nest, event, *more), goal)


def handed(nest: Nest, event: Event, array: str) -> Obligation:
    """A finisher touches what its product is for behind its wait for the product."""
    waits_ = [w for w in nest.events("wait") if w.what == array]
    what = f"{nest.name}: {event.kind} of {event.what} behind the product"
    return Obligation(
        what, event.span, asked(nest, event), nest.chain([waits_], -1, event.at, rounds_of(event))
    )


def released(nest: Nest, event: Event, array: str) -> Obligation:
    """What a finisher writes for peers is before it says that the product is taken."""
    arrivals = [a for a in nest.events("arrive") if a.what == array]
    what = f"{nest.name}: {event.kind} of {event.what} before the product is given back"
    return Obligation(
        what, event.span, asked(nest, event), nest.chain([arrivals], event.at, END, rounds_of(event))
    )


def dispatch_nest(found: Followed) -> tuple[Loop, Loop] | None:
    """Return the loops in which a part dispatches, or None."""
    nests = {e.loops[:2] for e in found.events if e.kind == "add" and e.what == COUNTED[Kind.DISPATCH]}
    if not nests:
        return None
    if len(nests) > 1 or len(next(iter(nests))) != 2:
        raise UnsupportedIR(f"{found.part.name}: it dispatches in {len(nests)} nests of loops")
    segment, turn = nests.pop()
    return segment, turn
