"""Equations of quotients and remainders that are written otherwise: they say the same."""

from itertools import product

import pytest
import z3

from megamoe.quotients import is_odd, parted, same
from verify.solve import Obligation, Prover
from verify.verdict import Verdict

X, Y, Z = z3.Ints("x y z")


def holds(goal: z3.BoolRef) -> bool:
    """Return whether a goal holds at all points of a cube around 0."""
    points = product(range(-5, 6), range(-5, 6), range(-1, 3))
    return all(
        z3.is_true(z3.simplify(z3.substitute(goal, *zip((X, Y, Z), map(z3.IntVal, at), strict=True))))
        for at in points
    )


def test_numbers_of_an_odd_difference_have_different_parities():
    goal = is_odd(X - Y) == (X % 2 != Y % 2)
    (answer,) = Prover().prove([Obligation("the same", None, (), goal)])
    assert answer.verdict is Verdict.PROVED


class TestSame:
    @pytest.mark.parametrize(
        ("of_x", "of_y"),
        [
            (X % 3, Y % 3),
            (X / 3, Y / 3),
            (0 + (X / 3 + 1) % 2 * 1, (Y / 3 + 1) % 2),
            (z3.If(Z > 0, X, X + 1) % 4 * 128, Y % 4 * 128),
        ],
    )
    def test_what_is_made_alike_is_said_to_be_of_equal_numbers(self, of_x: z3.ArithRef, of_y: z3.ArithRef):
        by = 4 if "4" in str(of_y) else 3
        found = same(of_x, of_y, Y, by)
        assert z3.is_or(found)
        assert holds(found == (of_x == of_y))

    @pytest.mark.parametrize("other", [X % 3 + 1, X % 4, X / 3, X + Y % 3, z3.IntVal(2)])
    def test_of_anything_else_nothing_is_added(self, other: z3.ArithRef):
        assert same(other, Y % 3, Y, 3).eq(other == Y % 3)


class TestParted:
    @pytest.mark.parametrize(
        ("term", "wanted"),
        [
            ((4 * X + 4 * Y) / 4, X + Y),
            ((8 * X - 4 * Y + 3) / 4, 2 * X - Y),
            ((4 * X + Y) / 4, X + Y / 4),
            ((4 * X + Y) % 4, Y % 4),
            ((2 * X + 4 * Y + 5) % 2, z3.IntVal(1)),
            ((6 * X / 3 + 1) % 2, z3.IntVal(1)),
            ((-4 * X - 1) / 4, -1 - X),
            (z3.If((4 * X + 1) % 4 == Z, 4 * Y / 4, Z), z3.If(z3.IntVal(1) == Z, Y, Z)),
        ],
    )
    def test_multiples_are_taken_out(self, term: z3.ArithRef, wanted: z3.ArithRef):
        found = parted(term)
        assert z3.simplify(found).eq(z3.simplify(wanted))
        assert holds(found == term)

    @pytest.mark.parametrize("term", [X / Y, X % Y, X / 3, (X + 1) / 2, X + Y])
    def test_the_rest_stays_as_it_is(self, term: z3.ArithRef):
        assert holds(parted(term) == term)
        assert str(z3.simplify(parted(term))) == str(z3.simplify(term))
