"""Evaluators of terms, which decide small domains in the solvers' place, against the solvers' own arithmetic.

`values.evaluate` and `sync.evaluate` compute Z3 terms on arrays, `writes.tree` finds when a term repeats,
`signature.finite` tries all values of a condition, and `signature.terms` folds constants and tabulates words.
"""

import random

import numpy as np
import pytest
import z3

from verify import ir, values
from verify.interp.machine import Machine
from verify.refine.evaluate import Cond, compare
from verify.refine.sym import Algebra, Sym, const
from verify.signature import finite, terms
from verify.signature.terms import Terms, integer, is_power_of_two
from verify.sync import evaluate as enumeration
from verify.writes.tree import period_of_term

X, Y = z3.Ints("x y")
B = z3.Bool("b")
RANGES = {"x": range(-6, 14), "y": range(9), "b": (False, True)}
NUMBERS = (1, 2, 3, 4, 7, 8)


def random_term(rng: random.Random, depth: int) -> z3.ArithRef:
    if depth == 0:
        return rng.choice([X, Y, z3.IntVal(rng.randint(-4, 9))])
    a, b = random_term(rng, depth - 1), random_term(rng, depth - 1)
    number = z3.IntVal(rng.choice(NUMBERS))
    forms = [
        lambda: a + b,
        lambda: a - b,
        lambda: -a,
        lambda: a * b,
        lambda: a / number,
        lambda: a % number,
        lambda: z3.If(random_cond(rng, depth - 1), a, b),
        lambda: z3.Sum(a, b, number),
        lambda: a - b - number,
    ]
    return rng.choice(forms)()


def random_cond(rng: random.Random, depth: int) -> z3.BoolRef:
    a, b = random_term(rng, max(depth - 1, 0)), random_term(rng, max(depth - 1, 0))
    if depth <= 0:
        return rng.choice([B, a < b, z3.BoolVal(True)])
    p, q = random_cond(rng, depth - 1), random_cond(rng, depth - 1)
    forms = [
        *(lambda: a <= b, lambda: a < b, lambda: a >= b, lambda: a > b, lambda: a == b, lambda: a != b),
        *(lambda: z3.And(p, q, B), lambda: z3.Or(p, q), lambda: z3.Not(p), lambda: z3.Xor(p, q)),
        lambda: z3.Implies(p, q),
    ]
    return rng.choice(forms)()


def truth(term: z3.ExprRef, x: int, y: int, b: bool) -> int | bool:
    found = z3.simplify(z3.substitute(term, (X, z3.IntVal(x)), (Y, z3.IntVal(y)), (B, z3.BoolVal(b))))
    return z3.is_true(found) if z3.is_bool(found) else found.as_long()


@pytest.mark.parametrize("evaluator", [values.evaluate, enumeration.evaluate], ids=["values", "sync"])
def test_arrays_have_the_solvers_values(evaluator):
    rng = random.Random(0)
    points = [(rng.choice(RANGES["x"]), rng.choice(RANGES["y"]), rng.random() < 0.5) for _ in range(8)]
    named = {n: np.array([p[i] for p in points]) for i, n in enumerate(("x", "y", "b"))}
    kinds: set[int] = set()
    for number in range(160):
        term = random_term(rng, 3) if number % 2 else random_cond(rng, 3)
        kinds |= {t.decl().kind() for t in parts(term)}
        got = np.broadcast_to(np.asarray(evaluator(term, named)), (len(points),))
        assert got.tolist() == [truth(term, *p) for p in points], term
    handled = set(enumeration._HANDLERS) | {z3.Z3_OP_ITE, z3.Z3_OP_TRUE, z3.Z3_OP_UNINTERPRETED}
    assert handled <= kinds


def parts(term):
    yield term
    for child in term.children():
        yield from parts(child)


def test_terms_repeat_after_the_period_that_is_found():
    rng, found = random.Random(1), 0
    for _ in range(300):
        term = random_term(rng, 2) % z3.IntVal(rng.choice(NUMBERS)) + rng.choice([Y, Y % 3, z3.IntVal(1)])
        period = period_of_term(term, "x")
        if period is None:
            continue
        found += 1
        for x, y in ((-5, 2), (0, 7), (3, 1), (11, 8)):
            assert truth(term, x, y, True) == truth(term, x + period, y, True), (term, period)
    assert found > 100


# --------------------------------------------------------------------------- conditions on coordinates
def test_conditions_of_few_values_are_decided_as_the_solver_does():
    rng, algebra, told = random.Random(2), Algebra(), [0, 0, 0]
    i, j = algebra.var("x", 0, 3), algebra.var("y", 0, 4)

    def number(depth: int) -> Sym:
        if depth == 0:
            return rng.choice([i, j, const(rng.randint(-2, 5))])
        a, b = number(depth - 1), number(depth - 1)
        form = rng.randrange(6)
        if form < 2:
            return a + b if form else a - b
        if form < 4:
            return (algebra.floordiv if form == 2 else algebra.floormod)(a, rng.choice(NUMBERS))
        return algebra.extremum("min" if form == 4 else "max", a, b)

    for _ in range(100):
        facts = compare(rng.choice(("ge", "lt")), number(1), const(rng.randint(0, 3)))
        cond = compare(rng.choice(("lt", "le", "gt", "ge", "eq", "ne")), number(2), number(1))
        known, value = finite.decided(cond, facts)
        if not known:
            continue
        points = [(x, y) for x in range(4) for y in range(5) if truth(facts.z3_at(0), x, y, True)]
        held = {truth(cond.z3_at(0), x, y, True) for x, y in points}
        assert value == (next(iter(held)) if len(held) == 1 else None), (cond, facts)
        told[[True, False, None].index(value)] += 1
    assert min(told) > 1


def test_a_disjunction_is_decided_too():
    i = Algebra().var("x", 0, 5)
    low, high = compare("lt", i, const(2)), compare("ge", i, const(2))
    from verify.refine.evaluate import Literal

    either = Literal("or", (low, high))
    assert finite.decided(Cond(True, {either.key: either}), Cond()) == (True, True)


# --------------------------------------------------------------------------- terms of signatures
KINDS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("op", sorted(terms._FOLD))
def test_constants_fold_to_the_interpreters_values(op, name):
    kind = ir.DType(name)
    result = ir.BOOL if op in ("lt", "le", "gt", "ge", "eq", "ne") else kind
    low, high = kind.int_range
    edges = [v for v in (low, -9, -1, 0, 1, 3, 7, high) if low <= v <= high]
    made, left, right = Terms(), ir.Var(kind, "left"), ir.Var(kind, "right")
    for a in edges:
        for b in edges:
            if (op in ("shl", "shr") and not 0 <= b < kind.bits) or (op.startswith("floor") and b == 0):
                continue
            machine = Machine()
            machine.env.update({left: a, right: b})
            want = int(machine.tensor(ir.Cast(result, ir.BinOp(result, op, left, right))))
            got = integer(made.binary(op, result, made.const(a, kind), made.const(b, kind)))
            assert got == want, (a, b)


@pytest.mark.parametrize("op", ["add", "sub", "shl", "shr", "bitor", "bitxor", "mul"])
def test_what_is_dropped_changes_nothing(op):
    """The neutral operands, on each side."""
    made, kind = Terms(), ir.DType("int32")
    x = made.make("read", kind, "x")
    node = ir.Var(kind, "x")
    for number in (0, 1):
        for left in (True, False):
            pair = (x, made.const(number, kind)) if left else (made.const(number, kind), x)
            if made.binary(op, kind, *pair) is not x:
                continue
            for value in (-7, 0, 3, 2**31 - 1):
                machine = Machine()
                machine.env[node] = value
                nodes = (node, ir.Const(kind, number)) if left else (ir.Const(kind, number), node)
                assert int(machine.tensor(ir.BinOp(kind, op, *nodes))) == value


def test_a_cast_to_bool_is_a_test_for_zero():
    """Of a number that is even: its last bit says nothing."""
    made, kind = Terms(), ir.DType("int32")
    byte = made.make("cast", kind, made.make("read", ir.DType("uint8"), "code"))
    for mask, expected in ((254, True), (0, False)):
        test = made.make("cast", ir.BOOL, made.binary("bitand", kind, byte, made.const(mask, kind)))
        bits = made.make("select", kind, test, made.const(0x3F800000, kind), made.const(0x40000000, kind))
        word = made.make("reinterpret", ir.DType("float32"), bits)
        assert is_power_of_two(word)
        cut = terms._cut(test)
        if cut is not None:
            table = terms._tabulate(test, cut[0], np.arange(1 << cut[1]), {})
            assert table is not None
            assert bool(table.any()) is expected
            assert set(table.tolist()) <= {0, 1}
            if expected:
                assert table[2] == 1


def test_words_are_tabulated_as_the_interpreter_computes_them():
    rng, word = random.Random(3), ir.DType("int32")
    octet = ir.Var(ir.DType("uint8"), "code")
    compared = 0
    for _ in range(60):
        made = Terms()
        read = made.make("read", octet.dtype, "code")

        def grown(depth, made=made, read=read):
            if depth == 0:
                if rng.random() < 0.6:
                    return made.make("cast", word, read), ir.Cast(word, octet)
                number = rng.choice((0, 1, 2, 23, 127, 255, 1 << 22))
                return made.const(number, word), ir.Const(word, number)
            op = rng.choice(
                ("add", "sub", "mul", "min", "max", "bitand", "bitor", "bitxor", "shl", "shr", "select")
            )
            (a, x), (b, y) = grown(depth - 1), grown(depth - 1)
            if op == "select":
                test, cond = made.binary("lt", ir.BOOL, a, b), ir.BinOp(ir.BOOL, "lt", x, y)
                return made.make(op, word, test, a, b), ir.Select(word, cond, x, y, False)
            if op in ("shl", "shr"):
                amount = rng.randint(0, 23)
                b, y = made.const(amount, word), ir.Const(word, amount)
            return made.binary(op, word, a, b), ir.BinOp(word, op, x, y)

        term, node = grown(3)
        cut = terms._cut(term)
        if cut is None or cut[0].op == "const":
            continue
        codes = np.arange(256)
        if cut[0] is not read and cut[0].op != "cast":
            continue  # a masked part: its values are not the code's
        table = terms._tabulate(term, cut[0], codes, {})
        assert table is not None
        for code in (0, 1, 2, 100, 127, 128, 254, 255):
            machine = Machine()
            machine.env[octet] = code
            assert int(machine.tensor(node)) == int(table[code]), node
        compared += 1
    assert compared > 15
