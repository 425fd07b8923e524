"""What reads of the fused kernel's tile IR are leaves, and of which element they have to be.

A leaf's name holds neither row, place, block, CTA nor rank: that its indices are those of the row that is
followed is asked of Z3 as it is read. What stands at these places is what the
suites `roles` and `signals` claim.
"""

from collections.abc import Sequence

import z3

from megamoe.config import Config
from megamoe.invariance_checks import Checks
from megamoe.invariance_terms import CHANNELS
from megamoe.invariance_values import ONE, Index, Term
from megamoe.schedule import Kind
from megamoe.weights import FP8_STAGES, GROUP_N, SCALE_WORDS, TILE_N
from verify.ir import UnsupportedIR
from verify.symbols import summary

ROW, CHANNEL = z3.Int("ROW"), z3.Int("CHANNEL")
BX, BLOCK, TILE, EXPERT = z3.Int("bx"), z3.Int("block[0]"), z3.Int("tile[0]"), z3.Int("EXPERT")
TARGET = z3.Int("TARGET")
HALVES = {"out_a": 0, "out_b": 1}


class Element:
    """Leaves in general: nothing is known."""

    awaited = "full"  # barriers of the places that are read

    def __init__(self, config: Config, checks: Checks) -> None:
        """Begin with a kernel's shape, and with what is asked of both solvers."""
        self.config, self.checks = config, checks
        self.assumed: tuple[Index, ...] = ()  # of the indices

    def same(self, what: str, a: Index, b: Index) -> bool:
        """Whether two indices are one."""
        return self.checks.same(what, a, b, self.assumed)

    def wants(self, what: str, index: Index, expected: Index) -> None:
        """Check that an index is the expected one.

        Raises:
            UnsupportedIR: it is not shown to be.
        """
        if not self.same(what, index, expected):
            raise UnsupportedIR(f"{what} is {index}, which is not shown to be {expected}")

    def own_rank(self, what: str, index: Index) -> None:
        """Check that an index is the CTA's rank."""
        self.wants(f"the rank of {what}", index, self.rank)

    @property
    def rank(self) -> Index:
        """The CTA's rank among those of the launch."""
        return BX / self.config.ctas if self.config.launch_ranks > 1 else 0

    def expert(self, at: tuple[Index, ...]) -> Index:
        """Return the expert of the block, which is what has to be asked for."""
        self.own_rank("block_expert", at[0])
        self.wants("the block whose expert is asked for", at[1], BLOCK)
        return EXPERT

    def choice(self, cond: Index) -> Term | None:
        """Return nothing: no condition is known."""
        return None

    def begin(self, name: str, indices: tuple[Index, ...], conditions: tuple[Index, ...]) -> None:
        """Refuse: no output is known."""
        raise UnsupportedIR(f"an output {name}")


class Products(Element):
    """Of a product: element (ROW, CHANNEL) of one half, by the stages that a round waits for."""

    def __init__(
        self, config: Config, checks: Checks, kind: Kind, fp8: bool, widened: Sequence[Sequence[Term]] = ()
    ) -> None:
        """Begin with the kind of product, the format of its weights and what has been widened to the ring.

        `widened` is what stands there of a weight row, by half of the rows and channel (`widened_bytes`).
        """
        super().__init__(config, checks)
        self.kind, self.fp8, self.widened = kind, fp8, widened
        self.waits: list[Index] = []

    def read(self, name: str, at: tuple[Index, ...]) -> Term | Index | None:
        """Return a leaf, see `Leaves`."""
        match name:
            case "block_expert":
                return self.expert(at)
            case "factors":
                self.own_rank(name, at[0])
                g = self.config.geometry
                number = EXPERT * g.tiles + TILE + (g.l1_tiles if self.kind is Kind.LINEAR2 else 0)
                self.wants("the tile whose factors are read", at[1], number)
                half = self._half("a factor", at[2])
                return ONE if self.fp8 else Term.of("weight factor", half)
            case "x_tile":
                self._first(self._visit(at[0]))
                self.wants("the row of x", at[1], ROW)
                return Term.of("x", self._number(at[2]))
            case "s_tile":
                self._first(self._visit(at[0]))
                self.wants("the row of a scale", at[1], ROW)
                return Term.of("scale of x")
            case "w_tile":
                return self._weight(self._visit(at[0]), at[1], self._number(at[2]))
            case "o_tile" if not self.config.widened:  # then it is of the pieces on their way
                return self._offset(self._visit(at[0]), at[1])
        return None

    def _visit(self, stage: Index) -> int:
        """Return which of the visits of this round a stage is of."""
        found = [i for i, awaited in enumerate(self.waits) if self.same("a stage", stage, awaited)]
        if len(found) != 1:
            raise UnsupportedIR(f"stage {stage} is of {len(found)} visits of the round")
        return found[0]

    def _first(self, visit: int) -> None:
        if visit:
            raise UnsupportedIR("rows of x that did not come with this visit")

    def _half(self, what: str, index: Index) -> int:
        for half in (0, 1):
            if self.same(what, index, CHANNEL + half * GROUP_N):
                return half
        raise UnsupportedIR(f"{what} of weight row {index}")

    def _weight(self, visit: int, row: Index, at: int) -> Term:
        if self.fp8 and self.config.is_mixed:  # as threads hand them over: `weights.fp8_words`
            name = z3.simplify(row, som=True)
            self.wants("a weight row", row, name)
            if summary(name).names != {str(CHANNEL)}:
                raise UnsupportedIR(f"words of weight row {row}")
            return Term.of("word of e4m3", visit, name.sexpr(), at)
        if self.fp8 and not self.config.wide:
            self.wants("the weight row", row, CHANNEL)
            return Term.of("e4m3", visit, at)
        half = self._half("a weight", row)
        if self.config.widened:
            if not 0 <= at < CHANNELS:
                raise UnsupportedIR(f"channel {at} of a weight row")
            return self.widened[half][at]
        return Term.of("e4m3" if self.fp8 else "codes", half, at)

    def _offset(self, visit: int, index: Index) -> Term:
        if not self.fp8:
            return Term.of("offsets", self._half("an offset", index))
        words = {0: visit} if not self.config.wide else {0: 0, SCALE_WORDS: 1}
        at = self._number(index)
        if at not in words:
            raise UnsupportedIR(f"a scale of e4m3 weights at {index}")
        return Term.of("scale of weights", words[at])

    def _number(self, index: Index) -> int:
        return self.checks.number("a channel", index)

    @property
    def visits(self) -> int:
        """Stages of 128 channels."""
        return FP8_STAGES if self.fp8 and not self.config.wide else 1


class Epilogue(Element):
    """Of what follows a product: an element of `h`, of its scales, or of a row that is sent."""

    def read(self, name: str, at: tuple[Index, ...]) -> Term | Index | None:
        """Return a leaf, see `Leaves`."""
        match name:
            case "out_a" | "out_b":
                self.wants("the row of a product", at[0], self.row)
                return Term.of("product", *self._column(HALVES[name], at[1]))
            case "block_expert":
                return self.expert(at)
            case "row_weight":
                self.own_rank(name, at[0])
                self.wants("the row of a weight", at[1], BLOCK * self.config.block_m + self.row)
                return Term.of("routing weight")
            case "row_target":
                self.own_rank(name, at[0])
                self.row = at[1] - BLOCK * self.config.block_m
                return TARGET
        return None

    def _column(self, half: int, at: Index) -> tuple[int | str, ...]:
        if self.sent:
            self.wants("the channel that is sent", at + half * GROUP_N, self.column)
            return (half, "own channel")
        if self.column is not None and self.same("a channel", at, self.column):
            return (half, "own channel")
        if z3.is_const(at) and str(at).startswith("along#"):
            return (half, "each of 128")
        raise UnsupportedIR(f"channel {at} of a product")

    def begin(self, name: str, indices: tuple[Index, ...], conditions: tuple[Index, ...]) -> None:
        """Take note of the element of an output."""
        c = self.config
        self.sent = name == "combine"
        if self.sent:
            self.wants("the row that is sent", indices[0], TARGET)
            if len(conditions) != 1 or not self.same("where rows are sent", conditions[0], TARGET >= 0):
                raise UnsupportedIR(f"rows are sent where {conditions}")
            self.column = indices[1] - TILE * TILE_N
            return
        if conditions:
            raise UnsupportedIR(f"{name} is written where {conditions}")
        self.own_rank(name, indices[0])
        slot = BLOCK % c.geometry.h_ring
        if name == "h_ring":
            self.row = indices[1] - slot * c.block_m
            self.column = indices[2] - TILE * CHANNELS
        elif name == "h_ring_scale":
            self.wants("the slot of a scale", indices[1], slot)
            self.wants("the channels of a scale", indices[2], TILE)
            self.row, self.column = indices[3], None


class Sums(Element):
    """Of an element of `y`: what a token's slots brought."""

    def read(self, name: str, at: tuple[Index, ...]) -> Term | Index | None:
        """Return a leaf, see `Leaves`."""
        c = self.config
        match name:
            case "combine":
                self.wants("the channel", at[1], self.channel)
                me = c.first_rank + self.rank
                for slot in range(c.topk):
                    row = me * c.combine_rows + slot * c.tokens + self.token
                    if self.same("a row of combine", at[0], row):
                        return Term.of("expert output", slot)
                raise UnsupportedIR(f"row {at[0]} of combine")
            case "topk_idx":
                self.own_rank(name, at[0])
                self.wants("the token", at[1], self.token)
                return z3.Int(f"EXPERT OF SLOT {self.checks.number('a slot', at[2])}")
        return None

    def choice(self, cond: Index) -> Term | None:
        """Return whether a slot has an expert."""
        for slot in range(self.config.topk):
            if self.same("a slot's condition", cond, z3.Int(f"EXPERT OF SLOT {slot}") >= 0):
                return Term.of("slot is taken", slot)
        return None

    def begin(self, name: str, indices: tuple[Index, ...], conditions: tuple[Index, ...]) -> None:
        """Take note of the element of `y`."""
        if conditions:
            raise UnsupportedIR(f"{name} is written where {conditions}")
        self.own_rank(name, indices[0])
        self.token, self.channel = indices[1], indices[2]
