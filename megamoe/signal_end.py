"""The end of a launch: all CTAs of the rank meet, all ranks meet, all CTAs meet again, outputs are added.

Behind the last product consumers do, in this order and nothing else: a barrier over the grid, one over the
ranks (by CTA 0, between two over the grid; only where there are several), and then they read the combine
buffers. That such barriers hold whatever the interleaving is proved in `barrier` (suite `barriers`).
"""

from collections.abc import Iterator, Sequence

import z3

from megamoe.buffer import combine_row
from megamoe.ring import every, given, some
from megamoe.role_events import THREAD, Event, Followed
from megamoe.signal_follow import EPOCHS, FLIP, STATUS, Signal
from megamoe.signal_rounds import Plan
from megamoe.signal_tasks import ACQUIRES, RELEASES
from verify.externs.signals import SYSTEM
from verify.interp.device.flags import ACQ_REL, SEQ_CST
from verify.ir import UnsupportedIR
from verify.solve import Obligation

_GRID, _PEERS = "grid_word", "signals"
_STEP = 2  # what the epoch of the last barrier over ranks is ahead of that before the launch
_MEETS = (("sync", ""), ("add", _GRID), ("poll", _GRID), ("max", STATUS), ("sync", ""))
_RANKS = (("store", _PEERS), ("poll", _PEERS), ("max", STATUS))
_TRUE = z3.BoolVal(True)


def final(plan: Plan, found: Followed, begins: int) -> tuple[Iterator[Obligation], list[Event]]:
    """Return what has to be proved of consumers behind their products, and the events that it covers.

    Args:
        plan: sizes and facts.
        found: of the consumers.
        begins: number of the last event of a product.

    Raises:
        UnsupportedIR: they do something else.
    """
    several = plan.config.num_ranks > 1
    kinds = ("sync", "add", "store", "poll", "max", "put", "proxy", "warp", "copy", "arrive")
    events = [e for e in found.events if e.at > begins and e.kind in kinds and e.what != "y"]
    wanted = [*_MEETS, *_RANKS, *_MEETS, ("put", EPOCHS)] if several else [*_MEETS]
    same = len(events) == len(wanted) and all(
        e.kind == kind and what in ("", e.what) and not e.loops and not e.elected
        for e, (kind, what) in zip(events, wanted, strict=False)
    )
    if not same:
        raise UnsupportedIR(f"consumers do something else behind their products: {_said(events)}")
    reads = [e for e in found.events if e.at > begins and e.kind == "get" and e.what != EPOCHS]
    epochs = [e for e in found.events if e.kind == "get" and e.what == EPOCHS]
    writes = [e for e in found.events if e.kind == "put" and e.what == "y"]
    return _claims(plan, found, events, reads, writes, epochs), [*events, *reads, *writes, *epochs]


def _said(events: Sequence[Event]) -> str:
    return ", ".join(f"{e.kind} {e.what}" for e in events)


def _claims(
    plan: Plan,
    found: Followed,
    events: Sequence[Event],
    reads: Sequence[Event],
    writes: Sequence[Event],
    epochs: Sequence[Event],
) -> Iterator[Obligation]:
    c, several = plan.config, plan.config.num_ranks > 1
    yield from _grid(plan, found, events[: len(_MEETS)])
    if several:
        yield from _ranks(plan, events[len(_MEETS) : len(_MEETS) + len(_RANKS)])
        yield from _grid(plan, found, events[len(_MEETS) + len(_RANKS) : -1])
        put = events[-1]
        assert isinstance(put, Signal)
        old = z3.Function(f"{EPOCHS}[]", z3.IntSort(), z3.IntSort())(plan.rank)
        known = given(plan.roles.launched, *put.ranges)
        one = every(_TRUE, *put.path) == z3.And(plan.cta == 0, THREAD == 0)
        yield Obligation("one thread of CTA 0 counts the barriers of the rank", put.span, known, one)
        right = z3.And(put.first == plan.rank, put.stored == old + _STEP)
        yield Obligation("by what their epochs have gone on", put.span, (*known, *given(*put.path)), right)
        # CTA 0 alone reads them, before its threads have met once more.
        last = events[-2]
        for read in epochs:
            only = z3.And(plan.cta == 0, z3.BoolVal(read.at < last.at or read.at < put.at))
            where = (*given(plan.roles.launched, *read.ranges, *read.path),)
            yield Obligation("CTA 0 alone reads the count of barriers", read.span, where, only)
    behind = max(e.at for e in events if e.kind == "sync")
    for event in (*reads, *writes):
        yield Obligation(
            f"{event.kind} of {event.what} behind the last barrier",
            event.span,
            (),
            z3.BoolVal(event.at > behind),
        )
    for read in reads:
        if read.what != "combine":
            raise UnsupportedIR(f"consumers read {read.what} behind their products")
        known = given(plan.roles.launched, *read.ranges, *read.path)
        own = combine_row(c.first_rank + plan.rank, 0, 0, c.tokens, c.combine_rows) * c.hidden
        inside = z3.And(read.first >= own, read.last < own + c.topk * c.tokens * c.hidden)
        yield Obligation("what is added came to the CTA's own rank", read.span, known, inside)
    if not reads or not writes:
        raise UnsupportedIR("nothing is added behind the products")


def _grid(plan: Plan, found: Followed, events: Sequence[Event]) -> Iterator[Obligation]:
    """A barrier over the grid, of the form of `barrier.grid_barrier`."""
    before, add, poll, given_up, after = events
    assert isinstance(add, Signal)
    assert isinstance(poll, Signal)
    everybody = all(s.value == found.part.threads and not s.path for s in (before, after))
    yield Obligation("all consumers meet, and meet again", before.span, (), z3.BoolVal(everybody))
    plain = add.order in (ACQ_REL, SEQ_CST) and poll.order in ACQUIRES and poll.flips
    yield Obligation("a CTA comes and waits for bit 31 to turn over", add.span, (), z3.BoolVal(plain))
    into_old = getattr(getattr(add.node, "buffer", None), "name", "") == "old"
    yield Obligation("from what it was when it came", add.span, (), z3.BoolVal(into_old))
    known = given(plan.roles.launched, *add.ranges)
    for event in (add, poll):
        one = z3.And(every(_TRUE, *event.path) == (THREAD == 0), event.first == plan.rank)
        yield Obligation(f"thread 0 does, at the rank's word: {event.kind}", event.span, known, one)
    value = z3.If(plan.cta == 0, z3.IntVal(FLIP - (plan.config.ctas - 1)), z3.IntVal(1))
    yield Obligation("all together add 2^31", add.span, known, add.value == value)
    says = every(z3.BoolVal(given_up.at == poll.at + 1), *given_up.path)
    gave_up = (*known, *given(*poll.path, z3.Not(poll.goes_on)))
    yield Obligation("a barrier that is given up says so", given_up.span, gave_up, says)


def _ranks(plan: Plan, events: Sequence[Event]) -> Iterator[Obligation]:
    """A barrier over the ranks, of the form of `barrier.rank_barrier`: CTA 0, a thread a peer."""
    c, (store, poll, given_up) = plan.config, events
    assert isinstance(store, Signal)
    assert isinstance(poll, Signal)
    me = c.first_rank + plan.rank
    epoch = z3.Function(f"{EPOCHS}[]", z3.IntSort(), z3.IntSort())(plan.rank) + _STEP
    known = given(plan.roles.launched, *store.ranges)
    plain = store.order in RELEASES and poll.order in ACQUIRES and not poll.flips
    plain = plain and store.scope == poll.scope == SYSTEM
    yield Obligation("ranks release and acquire at system scope", store.span, (), z3.BoolVal(plain))
    for event in (store, poll):
        own = every(_TRUE, *event.path) == z3.And(plan.cta == 0, c.num_ranks > THREAD)
        yield Obligation(f"CTA 0 meets each peer: {event.kind}", event.span, known, own)
    goes = (*known, *given(*store.path))
    right = z3.And(store.first == THREAD * c.signal_words + me, store.value == epoch)
    yield Obligation("a peer's word of this rank has the next epoch", store.span, goes, right)
    right = poll.first == me * c.signal_words + THREAD
    yield Obligation("it waits for the peer's word of its own", poll.span, goes, right)
    gave_up = some(every(_TRUE, *given_up.path)) if given_up.at == poll.at + 1 else z3.BoolVal(False)
    reached = poll.word - epoch >= 0
    yield Obligation(
        "until that epoch has come",
        poll.span,
        goes,
        z3.And(
            z3.Implies(z3.Not(poll.goes_on), z3.Or(reached, gave_up)),
            z3.Implies(reached, z3.Not(poll.goes_on)),
        ),
    )
