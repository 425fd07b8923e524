"""What holds during the evaluation of one statement, and what its parts share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.evaluate import Cond, Evaluator
from verify.refine.sym import Algebra, Sym, const
from verify.refine.tile import Step
from verify.signature.memo import Supposed
from verify.signature.normal import OTHER_RANGE
from verify.signature.program import Frame, LoopBody, Place
from verify.signature.terms import Terms


class BatchDependentError(Exception):
    """A trip count or condition that depends on the batch or on where the row lies."""


class PartlyWrittenError(UnsupportedIR):
    """Whether a statement writes an element depends on `cond`."""

    def __init__(self, what: str, cond: Cond) -> None:
        """Note the statement and the condition."""
        super().__init__(f"{what} writes a part that is not known")
        self.cond = cond


class FirstRoundError(PartlyWrittenError):
    """Whether a round is the first of its loop, so that `counter` is 0, depends on the element."""

    def __init__(self, counter: Sym, cond: Cond) -> None:
        """Note the counter, and the condition that there is a round before."""
        super().__init__("an earlier iteration", cond)
        self.counter = counter


@dataclass
class Settings:
    """What holds during one evaluation.

    Attributes:
        env: shape parameters and launch indices.
        known: normal forms of conditions that hold.
        facts: what holds where the statement writes.
        decide: whether a condition always holds where others do, or never does, None where neither; and
            whether trying all values of its variables settled that.
        order: reduction order of a floating-point reduce step, for its term.
        launch: launch variables by tag, with their extents.
        row: number of the row in the batch, None where the output has no rows.
        shared_rows: tensor -> how many consecutive rows have one entry, or equal ones.
    """

    env: Mapping[ir.Var, Sym]
    known: set[tuple]
    facts: Cond
    decide: Callable[[Cond, Cond], tuple[bool | None, bool]]
    order: Callable[[Step], object]
    tensors: Mapping[ir.Var, ir.Buffer]
    written: set[ir.Var]
    is_batch: Callable[[Sym], bool]
    launch: Mapping[str, tuple[ir.Var, ir.Expr]]
    row: Sym | None = None
    shared_rows: Mapping[str, int] = field(default_factory=dict)


@dataclass
class State:
    """What every part of an evaluation reads.

    Attributes:
        depth: counters of sums and choices that are open, each named by its depth.
        supposed: the facts, the ranges of loop counters, and the cases that are followed.
    """

    algebra: Algebra
    terms: Terms
    settings: Settings
    depth: int = 0
    supposed: Supposed = field(init=False)
    _evaluators: dict[tuple, Evaluator] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Suppose what holds of the statement."""
        self.supposed = Supposed(self.settings.facts)

    def holds(self, cond: Cond) -> bool | None:
        """Return whether `cond` always holds (True), never does (False), or depends (None)."""
        if not cond.mask:
            return False
        left = Cond(True, {k: v for k, v in cond.literals.items() if k not in self.settings.known})
        return True if left.is_true else self._decided(left)

    def _decided(self, cond: Cond) -> bool | None:
        facts = self.supposed.facts
        left = Cond(True, {k: v for k, v in cond.literals.items() if k not in facts.literals})
        value, alone = (True, True) if left.is_true else self.settings.decide(left, facts)
        self.supposed.note(cond, alone)
        return value

    def counter(self, name: str, low: int, high: int | None) -> Sym:
        """Return the symbol of a counter; the algebra knows symbols by name, so another range has another."""
        while True:
            symbol = self.algebra.var(name, low, high)
            if symbol.bounds() == (low, high):
                return symbol
            name += OTHER_RANGE

    def evaluator(self, place: Place | None) -> Evaluator:
        """Return an evaluator of integers at `place`, one for all that is evaluated there."""
        key = place.key if place is not None else ()
        if key not in self._evaluators:
            self._evaluators[key] = self._evaluator_at(place)
        return self._evaluators[key]

    def _evaluator_at(self, place: Place | None) -> Evaluator:
        values = dict(self.settings.env)
        here = place
        while here is not None:
            if isinstance(here.body, LoopBody) and here.body.loop is not None:
                value = here.value
                values[here.body.loop.var] = value.counter if isinstance(value, Frame) else const(value)
            here = here.outer
        return Evaluator(self.algebra, values)


def integer_of(expr: ir.Expr) -> int:
    """Return the value of a literal extent.

    Raises:
        UnsupportedIR: it is symbolic.
    """
    if not isinstance(expr, ir.Const):
        raise UnsupportedIR("symbolic extent of a tile operation")
    return int(expr.value)


def shape_of(buffer: ir.Buffer) -> tuple[int, ...]:
    """Return the extents of a buffer of the kernel.

    Raises:
        UnsupportedIR: one is symbolic.
    """
    return tuple(integer_of(e) for e in buffer.shape)
