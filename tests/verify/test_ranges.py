"""Ranges hold every value of a term, and are known where its form says so."""

import pytest
import z3
from hypothesis import given
from hypothesis import strategies as st

from verify.ranges import Range, range_of

X, Y = z3.Int("x"), z3.Int("y")


def smaller(a, b):
    return z3.If(a <= b, a, b)


def larger(a, b):
    return z3.If(a >= b, a, b)


CLAMPED = smaller(larger(X, z3.IntVal(-1)), z3.IntVal(5))
TERMS = [
    CLAMPED,
    CLAMPED * 3 + Y % 4 - 2,
    -2 * CLAMPED - smaller(Y % 8, z3.IntVal(3)),
    z3.If(z3.Not(X <= 7), z3.IntVal(7), X),
    z3.If(X > 4, X, z3.IntVal(9)),
    (CLAMPED + 9) % 32,
    (CLAMPED * 7) % 8,
    X * Y + 1,
    X / 3,
]


@given(st.integers(-40, 40), st.integers(-40, 40))
def test_ranges_hold_every_value(x, y):
    for term in TERMS:
        for form in (term, z3.simplify(term)):
            value = z3.simplify(z3.substitute(form, (X, z3.IntVal(x)), (Y, z3.IntVal(y)))).as_long()
            found = range_of(form)
            assert found.low is None or found.low <= value
            assert found.high is None or value <= found.high


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        (CLAMPED, Range(-1, 5)),
        (CLAMPED * 16 + 16, Range(0, 96)),
        (3 - CLAMPED, Range(-2, 4)),
        ((CLAMPED + 1 + 2**31) % 2**32 - 2**31, Range(0, 6)),
        (larger(X, z3.IntVal(0)), Range(0, None)),
        (X, Range()),
    ],
)
def test_known_forms(term, expected):
    assert range_of(term) == expected
    assert range_of(z3.simplify(term)) == expected
