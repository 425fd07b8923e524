"""Terms are evaluated like z3 does, without z3, and what is not known stays so."""

import z3
from hypothesis import given
from hypothesis import strategies as st

from verify.arith import evaluate

X, Y, P = z3.Int("x"), z3.Int("y"), z3.Bool("p")
SMALL = st.integers(-9, 9)
TERMS = [
    X + Y * 3 - 2,
    X - Y - 1,
    -X * Y,
    X / Y,
    X % Y,
    z3.If(X < Y, X, Y) + z3.If(P, 1, 0),
    z3.And(X <= Y, P, X >= -Y),
    z3.Or(X > Y, z3.Not(P)),
    z3.Implies(P, X != Y),
    z3.Distinct(X, Y, z3.IntVal(3)),
    z3.Xor(P, X == Y),
]


@given(SMALL, SMALL, st.booleans())
def test_terms_have_the_value_that_z3_gives_them(x, y, p):
    values = {"x": x, "y": y, "p": int(p)}
    pairs = [(X, z3.IntVal(x)), (Y, z3.IntVal(y)), (P, z3.BoolVal(p))]
    for term in TERMS:
        want = z3.simplify(z3.substitute(term, *pairs))
        got = evaluate(term, values)
        if got is None:
            assert y == 0
            assert term.decl().kind() in (z3.Z3_OP_IDIV, z3.Z3_OP_MOD)
        else:
            assert str(want) == str(got)


def test_what_a_value_does_not_rest_on_need_not_be_known():
    unknown = z3.Function("f", z3.IntSort(), z3.IntSort())(X)
    values = {"x": 1}
    assert evaluate(unknown, values) is None
    assert evaluate(z3.And(unknown > 0, X > 1), values) is False
    assert evaluate(z3.Or(unknown > 0, X > 0), values) is True
    assert evaluate(z3.Implies(unknown > 0, X > 0), values) is True
    assert evaluate(z3.If(X > 0, X, unknown), values) == 1
    assert evaluate(z3.And(unknown > 0, X > 0), values) is None


def test_functions_are_known_at_some_operands():
    of, says = (z3.Function(n, z3.IntSort(), sort) for n, sort in (("of", X.sort()), ("says", P.sort())))
    values, table = {"x": 3, "y": 3}, {("of", (4,)): 7, ("of", (7,)): 0, ("says", (3,)): 0}
    assert evaluate(of(X + 1), values, table) == 7
    assert evaluate(of(1 + (Y + 0)), values, table) == 7  # another term, the same operand
    assert evaluate(of(of(X + 1)), values, table) == 0
    assert evaluate(says(Y), values, table) is False
    assert evaluate(of(X), values, table) is None
    assert evaluate(of(of(X)), values, table) is None
