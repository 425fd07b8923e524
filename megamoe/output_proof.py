"""The output `y` of the fused kernel: every element of every rank of the launch is written exactly once.

Also, that no two threads clear one word of a counter.

Consumers do it behind the last barrier, in one loop: round r of CTA c is *item* c + r * CTAs of its rank,
`chunk` channels of a token, and the items of a rank are its tokens' parts in order. Proved on the compiled
IR, with `signal_follow`'s events: a round takes place if and only if there is its item; items and (CTA,
round) correspond one to one; and what a round writes are the item's elements, once each (where it begins by
the solvers, what threads, inner rounds and lanes add by looking at each). What is read for it are the same
channels of its token's rows in the combine buffers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import z3

from megamoe.buffer import combine_row
from megamoe.config import Config
from megamoe.ring import every, given
from megamoe.role_events import BLOCK, THREAD, Event, Followed
from megamoe.signal_places import added, of_lanes, values
from verify.ir import UnsupportedIR
from verify.solve import Obligation

OUTPUT, ADDED = "y", "combine"
WRITER = "consumers"
_TRUE = z3.BoolVal(True)


@dataclass(frozen=True)
class _Rounds:
    """A CTA's rounds: in a loop, or one that no loop is around where there are fewer items than CTAs.

    Attributes:
        turn: number of a round.
        happens: that there is this round.
        outer: loops around it.
    """

    turn: z3.ArithRef
    happens: z3.BoolRef
    outer: int

    def holds(self, event: Event) -> bool:
        """Return whether an event is in a round."""
        return not self.outer or any(loop.var is self.turn for loop in event.loops[:1])


def written_once(config: Config, found: Mapping[str, Followed]) -> Iterator[Obligation]:
    """Yield what has to be proved of every element of `y`.

    Args:
        config: of the kernel.
        found: what `signal_follow.follow` finds of each part.

    Raises:
        UnsupportedIR: `y` is not written in one loop, or in one round, of the consumers.
    """
    c, own = config, found[WRITER]
    puts = _puts(own)
    others = [e for f in found.values() if f is not own for e in f.events if e.what == OUTPUT]
    yield Obligation(f"{WRITER} alone write {OUTPUT}", None, (), z3.BoolVal(not others))
    touched = {e.kind for e in own.events if e.what == OUTPUT}
    yield Obligation(f"{OUTPUT} is written, and nothing else", None, (), z3.BoolVal(touched == {"put"}))
    rounds = _rounds(puts)
    yield from items(c, own)
    item = BLOCK % c.ctas + rounds.turn * c.ctas
    base = BLOCK / c.ctas * (c.tokens * c.hidden) + item * c.chunk
    seen = []
    for put in puts:
        more, (lanes, rest) = added(put, put.first, base, rounds.outer), of_lanes(put, rounds.outer)
        known = given(_launched(c), *put.ranges, *lanes, rounds.happens)
        yield Obligation(f"a write of {OUTPUT} in every round", put.span, known, every(_TRUE, *rest))
        yield Obligation(f"a write of {OUTPUT} is at its place", put.span, known, put.first == base + more)
        (numbers,) = values(own, put, [more], rounds.outer)
        seen.append((numbers[:, None] + np.arange(put.value)).ravel())
    same = np.array_equal(np.sort(np.concatenate(seen)), np.arange(c.chunk))
    what = f"all channels of an item of {OUTPUT} are written, each once"
    yield Obligation(what, None, (), z3.BoolVal(same))


def cleared_once(
    config: Config, tensor: str, words: int, parts: Iterable[tuple[Followed, Event]], threads: int
) -> Iterator[Obligation]:
    """Yield what has to be proved for no word of a counter to be cleared by two threads, or in two rounds.

    Args:
        config: of the kernel.
        tensor: the counter.
        words: of a rank.
        parts: roles, and their writes of it: of all words together (suite `signals`, claim `counters`).
        threads: of a CTA.
    """
    c = config
    for found, put in parts:
        turn = put.loops[0].var if put.loops else z3.IntVal(0)
        word = (BLOCK % c.ctas) * threads + THREAD + turn * (c.ctas * threads)
        known = given(_launched(c), *put.ranges, *put.path)
        own = z3.And(put.first == BLOCK / c.ctas * words + word, word < words, turn >= 0)
        what = f"{found.part.name}: a thread clears words of its own of {tensor}"
        yield Obligation(what, put.span, known, own)
    at = [z3.Ints(f"cta{n} thread{n} turn{n}") for n in range(2)]
    numbers = [cta * threads + thread + turn * (c.ctas * threads) for cta, thread, turn in at]
    bounds = [z3.And(a >= 0, a < c.ctas, t >= 0, t < threads, r >= 0) for a, t, r in at]
    same = z3.And(*(a == b for a, b in zip(*at, strict=True)))
    what = f"words of {tensor} are of one thread and round each"
    yield Obligation(what, None, given(*bounds, numbers[0] == numbers[1]), same)


def _launched(config: Config) -> z3.BoolRef:
    return z3.And(BLOCK >= 0, config.launch_ranks * config.ctas > BLOCK)


def _puts(found: Followed) -> list[Event]:
    return [e for e in found.events if e.kind == "put" and e.what == OUTPUT]


def _rounds(puts: Sequence[Event]) -> _Rounds:
    outer = {put.loops[:1] for put in puts}
    if len(outer) != 1:
        raise UnsupportedIR(f"{OUTPUT} is written in {len(outer)} loops")
    if any(put.elected for put in puts):
        raise UnsupportedIR(f"one lane writes {OUTPUT} for others")
    loops = outer.pop()
    if loops and not isinstance(z3.simplify(loops[0].extent), z3.IntNumRef):
        (loop,) = loops
        return _Rounds(loop.var, every(_TRUE, *loop.path, loop.range), 1)
    around = [every(_TRUE, *of_lanes(put, 0)[1]) for put in puts]
    if any(not z3.eq(term, around[0]) for term in around):
        raise UnsupportedIR(f"{OUTPUT} is written on different conditions")
    return _Rounds(z3.IntVal(0), around[0], 0)


def items(config: Config, found: Followed) -> Iterator[Obligation]:
    """Rounds of all CTAs and the items of their rank correspond one to one; arguments as of `sources`."""
    c, rounds = config, _rounds(_puts(found))
    count = c.tokens * c.combine_parts
    whole = z3.BoolVal(c.chunk * c.combine_parts == c.hidden)
    yield Obligation("the items of a rank are all of its outputs", None, (), whole)
    cta, turn = BLOCK % c.ctas, rounds.turn
    exists = z3.And(turn >= 0, cta + turn * c.ctas < count)
    what = "a round if and only if it has an item"
    yield Obligation(what, None, given(_launched(c)), rounds.happens == exists)
    item, rank, of_cta, round_ = z3.Ints("item of_rank of_cta of_round")
    some = given(item >= 0, item < count, rank >= 0, rank < c.launch_ranks)
    at = [(BLOCK, rank * c.ctas + item % c.ctas)]
    at += [(turn, item / c.ctas)] if rounds.outer else []
    its_own = z3.And(_launched(c), rounds.happens, cta + turn * c.ctas == item, BLOCK / c.ctas == rank)
    yield Obligation("each item is some CTA's", None, some, z3.substitute(its_own, *at))
    another = given(of_cta >= 0, of_cta < c.ctas, round_ >= 0, of_cta + round_ * c.ctas == item)
    only = z3.And(of_cta == item % c.ctas, round_ == item / c.ctas)
    yield Obligation("each item is one CTA's, in one round", None, (*some, *another), only)


def sources(config: Config, found: Followed) -> Iterator[Obligation]:
    """What an item's rounds read of the combine buffers are its token's rows, at the item's channels.

    Args:
        config: of the kernel.
        found: of the consumers, see `written_once`.

    Raises:
        UnsupportedIR: see `written_once`.
    """
    c = config
    rounds = _rounds(_puts(found))
    reads = [e for e in found.events if e.kind == "get" and e.what == ADDED and rounds.holds(e)]
    others = [e for e in found.events if e.what == ADDED and e not in reads]
    yield Obligation(f"{WRITER} touch {ADDED} for {OUTPUT} alone", None, (), z3.BoolVal(not others))
    item = BLOCK % c.ctas + rounds.turn * c.ctas
    token, channel = item / c.combine_parts, item % c.combine_parts * c.chunk
    rank = c.first_rank + BLOCK / c.ctas
    for read in reads:
        slot = z3.Int("slot")
        row = combine_row(rank, slot, token, c.tokens, c.combine_rows)
        first = row * c.hidden + channel
        is_slot = slot == _own_row(c, read.first) / c.tokens
        known = given(_launched(c), *read.ranges, *read.path, rounds.happens, is_slot)
        inside = z3.And(slot >= 0, slot < c.topk, read.first >= first, read.last < first + c.chunk)
        what = f"{ADDED} is read where the item's token has a row"
        yield Obligation(what, read.span, known, inside)


def _own_row(config: Config, element: z3.ArithRef) -> z3.ArithRef:
    """Return which of the CTA's rank's rows in the combine buffers an element is of."""
    c = config
    return element / c.hidden - (c.first_rank + BLOCK / c.ctas) * c.combine_rows


def has_row(config: Config, element: z3.ArithRef, count: int) -> z3.BoolRef:
    """Return that the slot which so many elements of the combine buffers are of has an expert.

    Such rows are written in each launch: the plan has a row for each of them (suite `plan`). There is one way
    to write the element with a slot, a token and a channel (`sources` proves that there is one), which is
    easier for solvers than quotients.
    """
    c, rank = config, BLOCK / config.ctas
    slot, token, channel = z3.Ints("slot token channel")
    row = combine_row(c.first_rank + rank, slot, token, c.tokens, c.combine_rows)
    is_of = [element == row * c.hidden + channel, channel >= 0, channel + count <= c.hidden]
    is_of += [token >= 0, token < c.tokens, slot >= 0, slot < c.topk]
    chosen = z3.Function("topk_idx[]", z3.IntSort(), z3.IntSort())
    return z3.Implies(z3.And(*is_of), chosen((rank * c.tokens + token) * c.topk + slot) >= 0)
