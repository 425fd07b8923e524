"""What the plan's kernel is held against: its variables, its shared memory and its outputs, as counts.

`plan_follow` and `plan_proof` prove that this is what the compiled kernel does; nothing here is assumed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import z3

from megamoe import plan_kernel
from megamoe.buffer import combine_row
from megamoe.config import Config
from megamoe.plan_count import (
    BLOCKS,
    COUNT,
    LANES,
    LANES_SUM,
    MINE,
    RANK,
    STRIDED,
    THREAD,
    Counts,
    least,
    one_if,
)
from megamoe.plan_values import Bits, Key, Value

WEIGHT = z3.Function("topk_weights[]", z3.IntSort(), z3.IntSort())  # the bits of a weight
NO_ROW, NO_WEIGHT = -1, 0
Carried = Callable[[z3.ArithRef], Mapping[Key, Value]]
_WARP, _LANE = THREAD / LANES, THREAD % LANES


@dataclass(frozen=True)
class Written:
    """What is written between two barriers: an element's domain, its value, and who writes it.

    Attributes:
        is_in: whether an element is of what this CTA writes.
        value: of an element.
        thread: that writes an element.
        rounds: counter of the loop around the write, where there is one.
    """

    is_in: Callable[[z3.ArithRef], z3.BoolRef]
    value: Callable[[z3.ArithRef], z3.ArithRef]
    thread: Callable[[z3.ArithRef], z3.ArithRef]
    rounds: Callable[[z3.ArithRef], z3.ArithRef] = lambda at: z3.IntVal(0)


class PlanGuide:
    """The plan's kernel of a config."""

    bits: tuple[str, ...] = ("found",)
    ended: str = "status"

    def __init__(self, config: Config) -> None:
        """Take the kernel's sizes, which `plan_kernel.make_kernel` chooses in the same way."""
        c = self.config = config
        self.shares = shares = plan_kernel.shares_of(c)
        self.counts = Counts(
            entries=shares.entries,
            share=shares.share,
            threads=shares.threads,
            experts=c.num_experts,
            block_m=c.block_m,
            pool=c.pool_blocks,
            first_expert=c.first_rank * c.num_experts,
        )
        self.own: tuple[str, int, int] = ("seen", c.num_experts, shares.threads)
        self.firsts_len = c.geometry.num_waves + 3
        self.first_block = RANK * c.pool_blocks + BLOCKS(MINE)
        self.first_row = self.first_block * c.block_m
        # Buffer -> what is written to it, in each of the intervals in which something is.
        self.writes = {
            "partial": (self._partial(),),
            "of_warp": (self._of_warp(),),
            "count": (self._of_experts(self.counts.rows),),
            "blocks_of": (self._of_experts(self.counts.blocks),),
            "row_source": (self._entries(), self._rows(self._source, NO_ROW)),
            "row_target": (self._rows(self.target, NO_ROW),),
            "row_weight": (self._rows(WEIGHT, NO_WEIGHT),),
            "block_expert": (self._blocks(),),
            "counts": (self._counts(),),
            "firsts": (self._firsts(),),
        }

    # ------------------------------------------------------------------ variables
    def carried(
        self, stores: frozenset[str], loads: frozenset[str], around: Sequence[z3.ArithRef | int]
    ) -> Carried | None:
        """Return what variables hold in each round of a loop, told by what it stores and loads."""
        many = self.shares.words > 1
        if stores == {"seen"}:
            return self._cleared
        if stores == {"chosen", "seen", "found"} and len(around) == int(many):
            return self._groups(around[0] if many else 0)
        if stores == {"seen", "found"}:
            return self._entries_of(around)
        if stores == {"total", "place"}:
            return self._first_places
        if stores == {"place"}:
            return lambda k: {("place", 0): self._place(least(k, _WARP) * LANES)}
        if stores == {"before"}:
            return lambda k: {("before", 0): BLOCKS(least(k, MINE))}
        if stores == {"row_source", "place"} and len(around) == int(many):
            word = around[0] if many else 0
            return lambda k: {("place", 0): COUNT(MINE, self.counts.until(THREAD, self._at(word, k)))}
        return self._totals(loads, around) if stores == {"total"} else None

    def _at(self, word: Any, number: Any) -> Any:
        return word * (self.shares.groups * self.shares.at_once) + number

    def _cleared(self, k: z3.ArithRef) -> Mapping[Key, Value]:
        word, unwritten = z3.Ints("of_word unwritten")
        return {("", 0): z3.If(word < k, 0, unwritten), ("", 1): one_if(word < k)}

    def _seen(self, word: Any, number: Any) -> Mapping[Key, Value]:
        """Return the state once a thread has seen `number` entries of those that share a word."""
        expert, n = z3.Int("of_word"), self.counts
        until = n.until(THREAD, self._at(word, number))

        def is_found(k: z3.ArithRef) -> z3.BoolRef:
            own, entry = self._at(word, k), THREAD * n.share + self._at(word, k)
            inside = z3.And(k >= 0, k < number, own < n.share, entry < n.entries)
            return z3.And(inside, n.is_of(MINE, entry))

        return {
            ("", 0): COUNT(expert, until) - n.before(expert, THREAD),
            ("", 1): z3.IntVal(1),
            ("found", word): Bits(is_found),
        }

    def _groups(self, word: Any) -> Carried:
        return lambda k: self._seen(word, k * self.shares.at_once)

    def _entries_of(self, around: Sequence[z3.ArithRef | int]) -> Carried:
        counters = [*around]
        word = counters.pop(0) if self.shares.words > 1 else 0
        group = counters.pop(0) if self.shares.groups > 1 and counters else 0
        return lambda k: self._seen(word, group * self.shares.at_once + k)

    def _of_warp_until(self, number: z3.ArithRef) -> z3.ArithRef:
        """Return the rows of the first `number` threads of the thread's warp."""
        before = self.counts.before
        return before(MINE, _WARP * LANES + number) - before(MINE, _WARP * LANES)

    def _first_places(self, k: z3.ArithRef) -> Mapping[Key, Value]:
        return {
            ("total", 0): self._of_warp_until(k),
            ("place", 0): self._of_warp_until(least(k, _LANE)),
        }

    def _place(self, threads: z3.ArithRef) -> z3.ArithRef:
        return self._of_warp_until(_LANE) + self.counts.before(MINE, threads)

    def _totals(self, loads: frozenset[str], around: Sequence[z3.ArithRef | int]) -> Carried | None:
        if "seen" in loads:
            expert = (around[0] * self.counts.warps if around else 0) + _WARP
            return lambda k: {("total", 0): STRIDED(expert, _LANE, k)}
        if "partial" in loads:
            return lambda k: {("total", 0): LANES_SUM(THREAD, k)}
        if "blocks_of" in loads:
            return lambda k: {("total", 0): BLOCKS(least(k, self._experts_before(THREAD)))}
        return None

    def _experts_before(self, number: z3.ArithRef) -> z3.ArithRef:
        """Return the experts of the waves before that of `firsts[number]`."""
        experts = (number - 1) * self.config.wave_experts
        return z3.If(experts < 0, 0, least(experts, self.config.num_experts))

    # ------------------------------------------------------------------ shared memory
    def contents(self, buffer: str, at: z3.ArithRef) -> tuple[z3.BoolRef, z3.ArithRef] | None:
        """Return whether an element has been written, and with what, behind the first writes of a buffer."""
        if buffer == self.own[0]:
            _, rows, columns = self.own
            inside = z3.And(at >= 0, at < rows * columns)
            return inside, self.counts.of_thread(at / columns, at % columns)
        if buffer not in self.writes:
            return None
        written = self.writes[buffer][0]
        return written.is_in(at), written.value(at)

    def _partial(self) -> Written:
        columns, n = LANES + 1, self.counts
        return Written(
            lambda at: z3.And(at >= 0, at < n.experts * columns, at % columns < LANES),
            lambda at: STRIDED(at / columns, at % columns, z3.IntVal(n.warps)),
            lambda at: at / columns % n.warps * LANES + at % columns,
            lambda at: at / columns / n.warps,
        )

    def _of_warp(self) -> Written:
        n = self.counts
        return Written(
            lambda at: z3.And(at >= 0, at < n.warps),
            lambda at: n.before(MINE, (at + 1) * LANES) - n.before(MINE, at * LANES),
            lambda at: at * LANES,
        )

    def _of_experts(self, value: Callable[[z3.ArithRef], z3.ArithRef]) -> Written:
        return Written(lambda at: z3.And(at >= 0, at < self.counts.experts), value, lambda at: at)

    # ------------------------------------------------------------------ memory of all CTAs
    def _entries(self) -> Written:
        """Which entries an expert's rows are."""
        n = self.counts

        def entry(at: z3.ArithRef) -> z3.ArithRef:
            return n.entry(MINE, at - self.first_row)

        return Written(
            lambda at: z3.And(at >= self.first_row, at < self.first_row + n.rows(MINE)),
            entry,
            lambda at: entry(at) / n.share,
            lambda at: entry(at) % n.share % (self.shares.groups * self.shares.at_once),
        )

    def _source(self, entry: z3.ArithRef) -> z3.ArithRef:
        return entry / self.config.topk

    def target(self, entry: z3.ArithRef) -> z3.ArithRef:
        """Return the row of the combine buffers that an entry's output goes to."""
        c, token = self.config, entry / self.config.topk
        return combine_row(token / c.tokens, entry % c.topk, token % c.tokens, c.tokens, c.combine_rows)

    def is_row(self, at: z3.ArithRef) -> z3.BoolRef:
        """Return whether a row is of the blocks of this CTA's expert."""
        rows = self.counts.blocks(MINE) * self.config.block_m
        return z3.And(at >= self.first_row, at < self.first_row + rows)

    def _rows(self, of_entry: Callable[[z3.ArithRef], z3.ArithRef], rest: int) -> Written:
        n = self.counts

        def value(at: z3.ArithRef) -> z3.ArithRef:
            number = at - self.first_row
            return z3.If(number < n.rows(MINE), of_entry(n.entry(MINE, number)), rest)

        return Written(
            self.is_row,
            value,
            lambda at: (at - self.first_row) % n.threads,
            lambda at: (at - self.first_row) / n.threads,
        )

    def _blocks(self) -> Written:
        def number(at: z3.ArithRef) -> z3.ArithRef:
            return at - self.first_block

        return Written(
            lambda at: z3.And(number(at) >= 0, number(at) < self.counts.blocks(MINE)),
            lambda at: MINE,
            lambda at: number(at) % self.counts.threads,
            lambda at: number(at) / self.counts.threads,
        )

    def _counts(self) -> Written:
        return Written(
            lambda at: at == RANK * self.counts.experts + MINE,
            lambda at: self.counts.rows(MINE),
            lambda at: z3.IntVal(0),
        )

    def _firsts(self) -> Written:
        def number(at: z3.ArithRef) -> z3.ArithRef:
            return at - RANK * self.firsts_len

        return Written(
            lambda at: z3.And(MINE == 0, number(at) >= 0, number(at) < self.firsts_len),
            lambda at: BLOCKS(self._experts_before(number(at))),
            number,
        )
