"""What a term speaks of, and its parts."""

import numpy as np
import pytest
import z3

from verify import symbols
from verify.solve import Obligation, Prover
from verify.sync.evaluate import NotEvaluatedError, evaluate
from verify.verdict import Verdict

m, n, k = z3.Ints("m n k")
f = z3.Function("f", z3.IntSort(), z3.IntSort())


def test_the_symbols_of_a_term():
    found = symbols.summary(z3.And(f(m + 1) < n, z3.Bool("p")))
    assert found.names == {"f", "m", "n", "p"}
    assert {str(a) for _, a in found.applications} == {"f(m + 1)", "m", "n", "p"}
    assert symbols.summary(z3.IntVal(3)).names == frozenset()


@pytest.mark.parametrize(
    ("term", "linear"),
    [
        (3 * m + n / 4, True),
        (-3 * m, True),
        (m * (z3.IntVal(2) + 3), False),  # a number, but not as it stands
        (m / (z3.IntVal(2) + 3), False),
        (m * n, False),
        (m / n, False),
        (m % (n + 1), False),
        (z3.If(m * m > n, m, n), False),
    ],
)
def test_a_product_of_two_computed_operands_is_not_linear(term, linear):
    assert symbols.summary(term).linear is linear


@pytest.mark.parametrize(
    "term", [3 * m + n / 4, -3 * m, m * (z3.IntVal(2) + 3), m % (z3.IntVal(7) / 2), m * n]
)
def test_a_query_has_a_logic_that_allows_its_terms(term):
    obligation = Obligation("", None, (), z3.Or(term == k, term != k))
    assert [a.verdict for a in Prover().prove([obligation])] == [Verdict.PROVED]


def test_a_summary_outlives_the_term_it_was_asked_with():
    symbols.forget()
    first = symbols.summary(m + n * 7)
    for number in range(1000):  # terms that could take the freed address
        assert symbols.summary(z3.Int(f"x{number}") + number).names == {f"x{number}"}
    assert symbols.summary(m + n * 7) is first
    symbols.forget()
    assert symbols.summary(m + n * 7) is not first


def test_only_constants_that_occur_are_replaced():
    assert z3.eq(symbols.put(m + 1, [(m, n), (k, m)]), n + 1)
    same = n + 1
    assert symbols.put(same, [(m, k)]) is same
    assert z3.eq(symbols.put(m + n, [(m, n), (n, m)]), n + m)


def test_a_bound_variable_is_no_term_here():
    with pytest.raises(TypeError, match="bound"):
        symbols.summary(z3.ForAll([m], m > n))


def test_a_shared_part_is_one_part():
    part = m * 2
    nodes = symbols.summary(part + part / 3).nodes
    assert len(nodes) == 6  # m, 2, m * 2, 3, the quotient, the sum
    assert all(place < at for at, node in enumerate(nodes) for place in node.operands)


def test_values_of_a_term():
    values = {"m": np.arange(8)}
    assert evaluate(z3.If(m % 2 == 0, m / 2, -m), values).tolist() == [0, -1, 1, -3, 2, -5, 3, -7]
    with pytest.raises(NotEvaluatedError, match="n"):
        evaluate(m + n, values)
    with pytest.raises(NotEvaluatedError, match="f"):
        evaluate(f(m), values)
