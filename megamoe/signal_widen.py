"""Signals of weights that are widened to a ring: who widens, who copies from the ring, who says it is free.

Warps that widen go through the waves' experts in turn, and say of each that their CTA's share of it is there.
The warp that fetches weights waits for an expert of a larger number than any before it: as each CTA widens
experts in ascending order, all before it are there then too. Finishers count the linear 2 of each wave, for
which those wait who widen the second wave behind it, whose experts have the same places.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import z3

from megamoe.config import DISPATCH_FIRST
from megamoe.ring import every, given
from megamoe.role_events import THREAD, Event, Followed
from megamoe.role_walk import Walk
from megamoe.schedule import Kind
from megamoe.signal_follow import Signal
from megamoe.signal_rounds import Nest, Plan, asked, rounds_of
from megamoe.signal_tasks import ACQUIRES, END, RELEASES, ends, handed, meetings
from verify.encode import Hypothesis
from verify.ir import UnsupportedIR
from verify.solve import Obligation

WORDS, TENSOR, PART = "widened", "wide_ring", "wideners"
_KNOWN = "look"  # experts before this number have been waited for
_TRUE = z3.BoolVal(True)


def _expert(nest: Nest) -> z3.ArithRef:
    """Return the expert of a round's product."""
    experts = z3.Function(f"{nest.plan.roles.experts}[]", z3.IntSort(), z3.IntSort())
    return experts(nest.plan.word(nest.task.block))


def _word(plan: Plan, number: z3.ArithRef | int) -> z3.ArithRef:
    return plan.rank * plan.config.widened_words + number


def with_experts(nest: Nest) -> Nest:
    """Return a nest of products with what the plan says of a block's expert: it is of the block's wave."""
    expert, wave = _expert(nest), nest.segment.var - 1
    own = z3.Implies(nest.task.exists, expert / nest.plan.config.wave_experts == wave)
    fact = Hypothesis("a block's expert is of the block's wave", "contract", own)
    return replace(nest, extra=(*nest.extra, fact, *nest.plan.roles.in_range(expert)))


def fetched(walk: Walk, nest: Nest) -> Iterator[Obligation]:
    """Weights are copied from the ring behind a wait for their expert, or for one behind it."""
    polls, copies = nest.events("poll"), [e for e in nest.events("copy") if e.source == TENSOR]
    if not copies or nest.events("put", "get", "add", "store"):
        raise UnsupportedIR(f"{nest.name}: it does not fetch weights alone")
    expert = _expert(nest)
    for poll in polls:
        assert isinstance(poll, Signal)
        plain = z3.BoolVal(poll.what == WORDS and poll.order in ACQUIRES and not poll.elected)
        yield Obligation(f"{nest.name}: a wait for {poll.what} acquires", poll.span, (), plain)
        right = z3.And(poll.first == _word(nest.plan, expert), nest.leader == THREAD)
        known = asked(nest, poll)
        yield Obligation(f"{nest.name}: a wait is for its expert, by one thread", poll.span, known, right)
        yield from ends(nest, poll, nest.plan.config.ctas, nest.events("max"), known)
    entry, leave = walk.turn.entry.get(_KNOWN), walk.turn.leave.get(_KNOWN)
    passed = [
        (walk.segment.before.get(_KNOWN), z3.IntVal(0)),
        (walk.turn.before.get(_KNOWN), walk.segment.entry.get(_KNOWN)),
        (walk.segment.leave.get(_KNOWN), walk.turn.after.get(_KNOWN)),
    ]
    if entry is None or leave is None or any(a is None or b is None or not z3.eq(a, b) for a, b in passed):
        raise UnsupportedIR(f"{nest.name}: {_KNOWN} is not kept from round to round")
    links = [polls, nest.events("warp"), nest.events("proxy")]
    for copy in copies:
        there = z3.Or(entry > expert, nest.chain(links, -1, copy.at, rounds_of(copy)))
        what = f"{nest.name}: {copy.source} is copied behind a wait for the expert, or for one behind it"
        yield Obligation(what, copy.span, asked(nest, copy), there)
    waited = z3.And(expert >= entry, nest.task.exists)
    after = nest.seen(leave) == z3.If(waited, expert + 1, entry)
    yield Obligation(f"{nest.name}: which experts it has waited for", None, nest.known(), after)
    goal = nest.chain(links, -1, END)
    yield Obligation(f"{nest.name}: it waits for the expert", None, (*nest.known(), *given(waited)), goal)


def counted(nest: Nest, array: str) -> Iterator[Obligation]:
    """Finishers add 1 to the word of a linear 2's wave, behind the product."""
    adds = [a for a in nest.events("add") if a.what == WORDS]
    if len(adds) != 1:
        raise UnsupportedIR(f"{nest.name}: {len(adds)} signals of {WORDS}")
    (add,) = adds
    assert isinstance(add, Signal)
    plain = add.order in RELEASES and not add.elected and len(add.loops) == 2
    yield Obligation(f"{nest.name}: {WORDS} is released, once a round", add.span, (), z3.BoolVal(plain))
    once = every(_TRUE, *add.path) == z3.And(nest.task.of(Kind.LINEAR2), nest.leader == THREAD)
    known = (*nest.known(), *given(*add.ranges))
    yield Obligation(f"{nest.name}: {WORDS} of each linear 2, by one thread", add.span, known, once)
    wave = nest.plan.config.num_experts + nest.segment.var - 1
    right = z3.And(add.first == _word(nest.plan, wave), add.value == 1)
    yield Obligation(f"{nest.name}: the word is its wave's", add.span, asked(nest, add), right)
    yield handed(nest, add, array)


def widening(plan: Plan, found: Followed) -> tuple[Iterator[Obligation], list[Event]]:
    """Return what has to be proved of the warps that widen, and the events that it covers.

    Raises:
        UnsupportedIR: they do something else.
    """
    events = {k: [e for e in found.events if e.kind == k] for k in ("add", "poll", "max")}
    puts = [e for e in found.events if e.kind == "put" and e.loops[1:]]
    adds, polls = events["add"], events["poll"]
    if len(adds) != 1 or len(polls) != 1 or len(adds[0].loops) != 2 or polls[0].loops != adds[0].loops[:1]:
        raise UnsupportedIR(f"{PART}: {len(adds)} signals and {len(polls)} waits")
    if not puts or any(e.loops[:2] != adds[0].loops or e.what != TENSOR for e in puts):
        raise UnsupportedIR(f"{PART}: they write something else")
    return _widening(plan, found, adds[0], polls[0], puts), [*adds, *polls, *events["max"], *puts]


def _widening(
    plan: Plan, found: Followed, add: Event, poll: Event, puts: Sequence[Event]
) -> Iterator[Obligation]:
    c, (wave, turn) = plan.config, add.loops
    nest = Nest(plan, found, wave, turn, Kind.DISPATCH, DISPATCH_FIRST)
    assert isinstance(add, Signal)
    assert isinstance(poll, Signal)
    around = given(plan.roles.launched, wave.range)
    whole = z3.And(z3.BoolVal(not wave.path and not turn.path), wave.start == 0)
    whole = z3.And(whole, wave.extent == c.geometry.num_waves)
    yield Obligation(f"{PART}: all waves", None, (), whole)
    i, expert = turn.var, wave.var * c.wave_experts + turn.var
    own = z3.And(i >= 0, i < c.wave_experts, expert < c.num_experts)
    yield Obligation(f"{PART}: all experts of a wave, in turn", None, around, turn.range == own)
    plain = add.order in RELEASES and not add.elected and poll.order in ACQUIRES and not poll.elected
    yield Obligation(f"{PART}: they acquire and release", add.span, (), z3.BoolVal(plain))
    known = (*around, *given(*add.ranges))
    once = every(_TRUE, *add.path) == (nest.leader == THREAD)
    yield Obligation(f"{PART}: one thread signals each expert", add.span, known, once)
    right = z3.And(z3.BoolVal(add.what == WORDS), add.first == _word(plan, expert), add.value == 1)
    yield Obligation(f"{PART}: by adding 1 to its word", add.span, known, right)
    for put in puts:
        goal = nest.chain([nest.events("proxy"), meetings(nest), [add]], put.at, END, rounds_of(put))
        said = (*around, *given(*put.ranges, every(_TRUE, *put.path)))
        what = f"{PART}: what is widened comes before the signal, with a fence and a barrier between"
        yield Obligation(what, put.span, said, goal)
    # The place of an expert is that of one two waves before.
    known = (*around, *given(*poll.ranges))
    when = every(_TRUE, *poll.path) == z3.And(wave.var >= 2, nest.leader == THREAD)
    yield Obligation(f"{PART}: from the third wave on one thread waits", poll.span, known, when)
    known = (*known, *given(every(_TRUE, *poll.path)))
    right = z3.And(z3.BoolVal(poll.what == WORDS), poll.first == _word(plan, c.num_experts + wave.var - 2))
    yield Obligation(f"{PART}: for the wave two before", poll.span, known, right)
    blocks = plan.roles.first(wave.var) - plan.roles.first(wave.var - 1)
    if c.launch_ranks == 1:  # as the compiler writes it
        yield Obligation(f"{PART}: there is one rank", None, given(plan.roles.launched), plan.rank == 0)
        blocks = z3.simplify(z3.substitute(blocks, (plan.rank, z3.IntVal(0))))
    maxes = [e for e in found.events if e.kind == "max"]
    yield from ends(nest, poll, blocks * c.geometry.l2_tiles, maxes, known)
    behind = [
        e
        for e in found.events
        if e.kind == "sync" and e.loops == poll.loops and e.value == len(found.part.numbers)
    ]
    goal = nest.chain([[poll], behind], -1, min(p.at for p in puts))
    later = (*around, *given(wave.var >= 2))
    yield Obligation(f"{PART}: all threads meet behind the wait, and then widen", None, later, goal)
    uniform = all(found.is_uniform(*s.path) and not s.elected for s in behind)
    yield Obligation(f"{PART}: all of them come", None, (), z3.BoolVal(uniform))
    place = z3.Int("place")
    other = given(place >= 0, place < expert, place % c.ring_experts == expert % c.ring_experts)
    earlier = place / c.wave_experts <= wave.var - 2
    yield Obligation(
        "places of experts are free two waves later", None, (*around, *other, *given(own)), earlier
    )
