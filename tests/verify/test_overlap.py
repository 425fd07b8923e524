"""Digit by digit is the same as by comparison, and simple where digits do not run over."""

from typing import Any

import pytest
import z3
from hypothesis import given
from hypothesis import strategies as st

from verify.overlap import carried_out, meet, meet_by_digits
from verify.ranges import Range

X, Y, U, V = z3.Ints("x y u v")
RANGES = {"x": Range(-40, 40), "y": Range(-40, 40), "u": Range(0, 5), "v": Range(0, 5)}


def known(symbol):
    return RANGES[symbol.decl().name()]


def place(x, u, big=24, small=6):
    return x / 4 * big + x % 4 * small + u


PAIRS: list[tuple[Any, int, Any, int]] = [
    (place(X, U), 1, place(Y, V), 1),
    (place(X, U * 1), 2, place(Y, V) + 1, 3),
    (place(X, U, 21, 5), 1, place(Y, V), 2),  # digits run over
    (3 * (place(X, U) - 7), 4, (place(Y, V) + 2) * 3, 2),
    (place(X, z3.IntVal(0)), 3, place(Y, z3.IntVal(3)), 3),  # never meet
    (X * Y, 1, U + 2 * V, 3),
    (X - U, 1, X - V, 1),
    (z3.IntVal(3), 2, z3.IntVal(4), 1),
    (z3.IntVal(3), 1, z3.IntVal(4), 1),
]


@pytest.mark.parametrize("pair", range(len(PAIRS)))
@given(x=st.integers(-40, 40), y=st.integers(-40, 40), u=st.integers(0, 5), v=st.integers(0, 5))
def test_both_say_the_same(pair, x, y, u, v):
    values = [(s, z3.IntVal(n)) for s, n in ((X, x), (Y, y), (U, u), (V, v))]

    def value(term):
        return z3.is_true(z3.simplify(z3.substitute(term, *values)))

    first, count, other, other_count = PAIRS[pair]
    digits = meet_by_digits(first, count, other, other_count, known)
    assert value(digits) is value(meet(first, count, other, other_count))


def test_digits_that_do_not_run_over_are_compared_each():
    found = meet_by_digits(place(X, U), 1, place(Y, V), 1, known)
    same = z3.And(X / 4 == Y / 4, X % 4 == Y % 4, U == V)
    assert [z3.simplify(p.arg(0) - p.arg(1)).sexpr() for p in found.children()[:3]] == [
        z3.simplify(p.arg(0) - p.arg(1)).sexpr() for p in same.children()
    ]


def test_parts_of_a_row_that_do_not_overlap_never_meet():
    assert z3.is_false(meet_by_digits(place(X, z3.IntVal(0)), 3, place(Y, z3.IntVal(3)), 3, known))


QUOTIENTS: list[Any] = [
    (16 * X + Y) / 16,
    (16 * X + Y) % 16,
    (16384 * (X / 128) + 2048 * U) / 16 % 64,
    (32 * X - 48 * Y + 7) / 16,
    (32 * X - 48 * Y + 7) % 16,
    (3 * (4 * X + 1) - 6 * (U + 8 * V)) / 12,
    (X * Y + 5 * X) % 5,
    X / (U + 1),
]


@pytest.mark.parametrize("number", range(len(QUOTIENTS)))
@given(x=st.integers(-400, 400), y=st.integers(-400, 400), u=st.integers(0, 5), v=st.integers(-5, 5))
def test_quotients_carried_out_are_equal(number, x, y, u, v):
    values = [(s, z3.IntVal(n)) for s, n in ((X, x), (Y, y), (U, u), (V, v))]
    left, right = (
        z3.simplify(z3.substitute(t, *values)) for t in (carried_out(QUOTIENTS[number]), QUOTIENTS[number])
    )
    assert left.as_long() == right.as_long()


def test_the_start_of_a_descriptor_is_a_sum_of_digits():
    start = 16 * ((16384 * (X / 128) + 2048 * U) / 16)
    digits = 16384 * (X / 128) + 2048 * U
    assert z3.eq(z3.simplify(carried_out(start - start % 1024)), z3.simplify(digits))
