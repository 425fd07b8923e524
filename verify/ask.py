"""Whether a condition always holds, never does, or neither: looks by z3 alone.

Nothing rests on an answer: what was found is stated as an obligation, and proved by both solvers as all
others are. So points that were found once refute later claims at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import z3

from verify.encode import Hypothesis
from verify.lemma import near
from verify.query import SEED, stated

_MAX_POINTS = 32  # of one context; the latest


@dataclass
class _Context:
    """What is known, and points at which it holds."""

    known: list[Hypothesis]
    points: list[z3.ModelRef] = field(default_factory=list)


class Asker:
    """Decides conditions of one kernel.

    Attributes:
        rlimit: z3 resource units for each of the two questions about a condition.
    """

    def __init__(self, rlimit: int) -> None:
        """Know nothing yet."""
        self.rlimit = rlimit
        self._contexts: dict[tuple[int, ...], _Context] = {}

    def decide(
        self, hypotheses: Sequence[Hypothesis], condition: z3.BoolRef
    ) -> tuple[bool, Sequence[Hypothesis]] | None:
        """Return whether `condition` holds wherever the hypotheses do, or nowhere, and those that say so.

        Those that speak of nothing else than the condition does are tried first. None if neither is found.
        """
        context = self._context(stated(hypotheses, [condition]))
        seen = {True: False, False: False}
        for point in context.points:
            _note(seen, point, condition)
        close = near(hypotheses, condition)
        for value, otherwise in ((True, z3.Not(condition)), (False, condition)):
            if seen[not value]:
                continue
            if self._solver(stated(close, [condition]), otherwise).check() == z3.unsat:
                return value, close
            solver = self._solver(context.known, otherwise)
            answer = solver.check()
            if answer == z3.unsat:
                return value, hypotheses
            if answer == z3.sat:
                point = solver.model()
                context.points = [*context.points[1 - _MAX_POINTS :], point]
                _note(seen, point, condition)
        return None

    def _solver(self, known: Sequence[Hypothesis], claim: z3.BoolRef) -> z3.Solver:
        # One for each question: z3 answers what it may rewrite as a whole several times as fast as what is
        # pushed onto earlier questions.
        solver = z3.Solver()
        solver.set("rlimit", self.rlimit)
        solver.set("random_seed", SEED)
        solver.add(*(h.term for h in known), claim)
        return solver

    def _context(self, known: list[Hypothesis]) -> _Context:
        key = tuple(h.term.get_id() for h in known)  # terms stay alive, so that ids stay theirs
        return self._contexts.setdefault(key, _Context(known))


def _note(seen: dict[bool, bool], point: z3.ModelRef, condition: z3.BoolRef) -> None:
    value = point.eval(condition, model_completion=True)
    if z3.is_true(value) or z3.is_false(value):
        seen[z3.is_true(value)] = True
