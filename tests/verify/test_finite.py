"""Conditions on coordinates of few values are decided by all of them, or left to the solvers."""

import pytest

from verify.refine.evaluate import Cond, compare
from verify.refine.sym import Algebra, const
from verify.signature.finite import MAX_POINTS, decided

ALGEBRA = Algebra()
I = ALGEBRA.var("i", 0, 7)  # noqa: E741 (as kernels call it)
J = ALGEBRA.var("j", 0, 15)
ROW = ALGEBRA.var("row", 0, None)
DIGIT = ALGEBRA.floormod(J, 4)
NOTHING = Cond()


@pytest.mark.parametrize(
    ("cond", "facts", "expected"),
    [
        (compare("lt", ALGEBRA.floordiv(DIGIT + I.scaled(4), 4) - I, const(1)), NOTHING, (True, True)),
        (compare("eq", DIGIT.scaled(2), const(3)), NOTHING, (True, False)),
        (compare("eq", DIGIT, const(3)), NOTHING, (True, None)),
        (compare("eq", DIGIT, const(3)), compare("eq", J, const(7)), (True, True)),
        (compare("lt", J, I), compare("ge", J, const(8)), (True, False)),
        (compare("lt", J, const(4)), compare("lt", J, I), (False, None)),
        (compare("lt", J, const(4)), compare("lt", J + ROW, const(9)), (False, None)),
        (compare("lt", I, const(4)), compare("lt", ROW, const(9)), (True, None)),
        (compare("lt", ROW, const(9)), NOTHING, (False, None)),
        (compare("ge", ALGEBRA.extremum("max", I, J), ALGEBRA.extremum("min", I, J)), NOTHING, (True, True)),
        (compare("lt", ALGEBRA.call("load", (I,), 0, 3), const(1)), NOTHING, (False, None)),
        (compare("lt", ALGEBRA.var("n", 0, MAX_POINTS), const(4)), NOTHING, (False, None)),
        (compare("lt", I, const(4)), compare("lt", I, const(-1)), (False, None)),  # nothing is possible
    ],
)
def test_what_all_values_say(cond, facts, expected):
    assert decided(cond, facts) == expected
