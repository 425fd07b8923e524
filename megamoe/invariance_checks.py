"""What suites `invariance*` ask of indices on their way: found by z3, then proved by both solvers.

Whether two indices are one decides what a read is a leaf of, so it has to be known at once. Each answer that
something is rested on is kept as an obligation of the claim, which is PROVED only if both solvers prove it.
"""

from typing import Any

import z3

from megamoe.invariance_values import Index, is_number
from megamoe.ring import given
from verify.ir import UnsupportedIR
from verify.solve import Obligation
from verify.symbols import summary

_RLIMIT = 2_000_000  # of one question


class Checks:
    """Facts that hold, and the obligations that they are."""

    def __init__(self) -> None:
        """Begin with none."""
        self._found: dict[tuple[int, ...], Obligation | None] = {}
        self._numbers: dict[int, z3.ArithRef] = {}
        self._asked: list[Any] = []  # keeps terms alive, so that their numbers stay theirs

    @property
    def obligations(self) -> list[Obligation]:
        """What was found to hold, each once."""
        return [o for o in self._found.values() if o is not None]

    def holds(self, what: str, goal: Index, assumed: tuple[Index, ...] = ()) -> bool:
        """Whether a condition holds wherever what is assumed does."""
        if isinstance(goal, bool):
            return goal
        key = (goal.get_id(), *(a.get_id() for a in assumed))
        if key not in self._found:
            self._asked += (goal, *assumed)
            proved = _proved(goal, assumed)
            self._found[key] = Obligation(what, None, given(*assumed), goal) if proved else None
        return self._found[key] is not None

    def same(self, what: str, a: Index, b: Index, assumed: tuple[Index, ...] = ()) -> bool:
        """Whether two indices are one number, or two conditions one."""
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        if not isinstance(a, int) and not isinstance(b, int) and a.eq(b):
            return True
        return self.holds(what, a == b, assumed)

    def decided(self, what: str, cond: Index, assumed: tuple[Index, ...]) -> bool | None:
        """Whether a condition holds; None: what is assumed does not say."""
        if isinstance(cond, bool):
            return cond
        for answer, goal in ((True, cond), (False, z3.Not(cond))):
            if self.holds(what, goal, assumed):
                return answer
        return None

    def number(self, what: str, index: Index, assumed: tuple[Index, ...] = ()) -> int:
        """Return the number that an index is.

        Raises:
            UnsupportedIR: it is not shown to be one.
        """
        if is_number(index):
            return index
        if z3.is_int(index):
            if index.get_id() not in self._numbers:
                self._asked.append(index)
                self._numbers[index.get_id()] = _at_zero(index)
            guess = self._numbers[index.get_id()]
            if z3.is_int_value(guess) and self.holds(what, index == guess, assumed):
                return guess.as_long()
        raise UnsupportedIR(f"{what} is {index}, which is no number")


def _at_zero(index: z3.ArithRef) -> z3.ArithRef:
    """Return an index where all symbols are 0: the number that it is, if it is one."""
    constants = [term for _, term in summary(index).applications if term.num_args() == 0]
    return z3.simplify(z3.substitute(index, *((term, z3.IntVal(0)) for term in constants)))


def _proved(goal: z3.BoolRef, assumed: tuple[Index, ...]) -> bool:
    simple = z3.simplify(goal, som=True)
    if z3.is_true(simple) or z3.is_false(simple):
        return z3.is_true(simple)
    solver = z3.Solver()
    solver.set("rlimit", _RLIMIT)
    solver.add(*assumed, z3.Not(simple))
    return solver.check() == z3.unsat
