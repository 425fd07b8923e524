"""The quick operators make the nodes that z3's own make, and leave to them what is none of theirs."""

import itertools

import pytest
import z3
from z3 import z3 as stock

from verify import terms

terms.use()
X, Y = z3.Ints("x y")
P, Q = z3.Bools("p q")
F = z3.Function("f", z3.IntSort(), z3.BoolSort(), z3.IntSort())
OTHER = z3.Context()
INTEGERS = [X, z3.Int("z") + 1, z3.IntVal(-3), z3.If(P, X, 2), F(X, P), z3.simplify(2 * X + X)]
NUMBERS = [0, -7, 1 << 40, 1 << 80]
BOOLEANS = [P, X < Y, z3.BoolVal(True), z3.Not(Q), z3.Or(P, Q)]
REALS = [z3.Real("r"), z3.RealVal(2)]
BINARY = ["add", "sub", "mul", "truediv", "mod", "lt", "le", "gt", "ge", "eq", "ne"]


def own(owner, name):
    """Return what z3 itself has there."""
    return terms.STOCK.get((owner, name), getattr(owner, name))


def methods(name, a, b):
    """Yield the methods that may decide `a name b`, each with its operands.

    Python asks the second operand of a comparison first where its class is derived from the first one's, as a
    number's is.
    """
    full = {"truediv": "div"}.get(name, name)
    mirrored = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}
    if isinstance(a, z3.ExprRef):
        yield f"__{full}__", a, b
    if isinstance(b, z3.ExprRef):
        yield f"__{mirrored[name]}__" if name in mirrored else f"__r{full}__", b, a


def assert_same(mine, theirs):
    assert mine.ctx is theirs.ctx
    assert mine.ast.value == theirs.ast.value, (mine.sexpr(), theirs.sexpr())
    assert isinstance(mine, type(own(stock, "_to_expr_ref")(theirs.ast, theirs.ctx)))


def assert_same_decl(mine, theirs):
    assert type(mine) is type(theirs)
    assert mine.ast.value == theirs.ast.value


@pytest.mark.parametrize("name", BINARY)
def test_binary_operators(name):
    pairs = [*itertools.product(INTEGERS, INTEGERS), *itertools.product(INTEGERS, NUMBERS)]
    pairs += [(b, a) for a, b in itertools.product(INTEGERS, NUMBERS)]
    if name in ("eq", "ne"):
        pairs += itertools.product(BOOLEANS, BOOLEANS)
    if name != "mod":  # not of reals
        pairs += [*itertools.product(REALS, REALS), (REALS[0], X), (REALS[0], 3), (3, REALS[0])]
    for a, b in pairs:
        for method, first, second in methods(name, a, b):
            owner = z3.ExprRef if name in ("eq", "ne") else z3.ArithRef
            assert_same(getattr(first, method)(second), own(owner, method)(first, second))


def test_operators_of_another_context():
    a, b = z3.Ints("x y", OTHER)
    for name in BINARY:
        for method, first, second in methods(name, a, b):
            owner = z3.ExprRef if name in ("eq", "ne") else z3.ArithRef
            assert_same(getattr(first, method)(second), own(owner, method)(first, second))
    assert_same(z3.simplify(a + 0), own(stock, "simplify")(a + 0))
    assert_same(z3.And(a < b, a > b), own(stock, "And")(a < b, a > b))


@pytest.mark.parametrize("name", ["And", "Or"])
def test_junctions(name):
    mine, theirs = getattr(z3, name), own(stock, name)
    for count in range(1, 4):
        for parts in itertools.product(BOOLEANS, repeat=count):
            assert_same(mine(*parts), theirs(*parts))
            assert_same(mine(list(parts)), theirs(list(parts)))
    assert_same(mine(P, True), theirs(P, True))
    assert_same(mine([True, False]), theirs([True, False]))
    assert_same(mine(), theirs())


def test_functions():
    for a in BOOLEANS:
        assert_same(z3.Not(a), own(stock, "Not")(a))
        for b in BOOLEANS:
            assert_same(z3.Implies(a, b), own(stock, "Implies")(a, b))
        for b, c in itertools.product([*INTEGERS, *NUMBERS], repeat=2):
            assert_same(z3.If(a, b, c), own(stock, "If")(a, b, c))
        assert_same(z3.If(a, Q, P), own(stock, "If")(a, Q, P))
        assert_same(z3.If(a, REALS[0], 1), own(stock, "If")(a, REALS[0], 1))
        assert_same(F(X, a), own(z3.FuncDeclRef, "__call__")(F, X, a))
    assert_same(F(P, Q), own(z3.FuncDeclRef, "__call__")(F, P, Q))  # a Boolean for an integer
    for count in range(1, 4):
        for parts in itertools.product(INTEGERS, repeat=count):
            assert_same(z3.Sum(*parts), own(stock, "Sum")(*parts))
            assert_same(z3.Sum(list(parts)), own(stock, "Sum")(list(parts)))
    assert_same(z3.Sum(X, 2), own(stock, "Sum")(X, 2))
    for value in (*NUMBERS, True, "12", (1 << 63) - 1, -(1 << 63)):
        assert_same(z3.IntVal(value), own(stock, "IntVal")(value))
    assert_same(z3.Int("n"), own(stock, "Int")("n"))
    assert_same(z3.BoolVal(False), own(stock, "BoolVal")(False))
    for a in INTEGERS:
        assert_same(-a, own(z3.ArithRef, "__neg__")(a))


def test_simplified_and_substituted():
    for a in [*INTEGERS, *BOOLEANS, *REALS, X * 0 + 3 * Y / 4 % 2]:
        assert_same(z3.simplify(a), own(stock, "simplify")(a))
        assert_same(z3.simplify(a, som=True), own(stock, "simplify")(a, som=True))
        for pairs in ([(X, Y)], [(X, z3.IntVal(3)), (P, Q)], [(P, X < Y)]):
            assert_same(z3.substitute(a, *pairs), own(stock, "substitute")(a, *pairs))
            assert_same(z3.substitute(a, pairs), own(stock, "substitute")(a, pairs))
    with pytest.raises(z3.Z3Exception):
        z3.substitute(X, (X, P))


def test_questions():
    quantified = z3.ForAll([X], X < Y)
    known = [*INTEGERS, *BOOLEANS, *REALS, quantified, z3.IntSort(), F, z3.Int("x", OTHER), P == Q]
    known += [z3.BoolVal(False), z3.BoolVal(True, OTHER), z3.BoolVal(False, OTHER), z3.Int("x") + 1]
    for a, b in itertools.product(known, known):
        assert z3.eq(a, b) == a.eq(b) == own(z3.AstRef, "eq")(a, b)
    for a in [*known, 3, None]:
        assert z3.is_app(a) == own(stock, "is_app")(a)
        assert z3.is_true(a) == own(stock, "is_true")(a)
        assert z3.is_false(a) == own(stock, "is_false")(a)
        assert z3.is_int_value(a) == own(stock, "is_int_value")(a)
        for kind in (z3.Z3_OP_ANUM, z3.Z3_OP_ADD, z3.Z3_OP_TRUE, z3.Z3_OP_LT, z3.Z3_OP_UNINTERPRETED):
            assert z3.is_app_of(a, kind) == own(stock, "is_app_of")(a, kind)
        if isinstance(a, z3.ExprRef) and not z3.is_quantifier(a):
            assert a.get_id() == own(z3.ExprRef, "get_id")(a)
            assert_same_decl(a.decl(), own(z3.ExprRef, "decl")(a))
            assert a.num_args() == own(z3.ExprRef, "num_args")(a)
            for place in range(a.num_args()):
                assert_same(a.arg(place), own(z3.ExprRef, "arg")(a, place))
            for mine, theirs in zip(a.children(), own(z3.ExprRef, "children")(a), strict=True):
                assert_same(mine, theirs)
        if isinstance(a, z3.ArithRef):
            assert a.is_int() == own(z3.ArithRef, "is_int")(a)
    for value in (0, -7, 1 << 40, -(1 << 80)):
        assert z3.IntVal(value).as_long() == value
    assert F.name() == own(z3.FuncDeclRef, "name")(F) == "f"
    assert z3.FreshInt("v").decl().name().startswith("v!")


def test_terms_live_as_long_as_they_are_held():
    term = (z3.Int("only") + 5) * z3.Int("here")
    text = term.sexpr()
    for number in range(1000):
        assert z3.Int(f"other{number}") + number is not term
    assert term.sexpr() == text


def test_what_fails_raises():
    with pytest.raises(z3.Z3Exception):
        z3.And(P, X)
    with pytest.raises(z3.Z3Exception):
        F(X)
    with pytest.raises(z3.Z3Exception):
        F(X, P).arg(2)
    with pytest.raises((z3.Z3Exception, TypeError)):
        z3.ArithRef.__lt__(X, "a")
