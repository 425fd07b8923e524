"""The exact index arithmetic against plain Python integers, and Z3 on what it cannot decide."""

import random

import numpy as np
import pytest
import z3

from verify import ir
from verify.ir import INT32, BinOp, Const, Select, Var
from verify.layouts import swizzle_address
from verify.refine.evaluate import Evaluator, compare
from verify.refine.sym import Algebra, Sym, at, const, z3_term

THREADS, BLOCKS, STEPS = 16, 5, 9
TX, BX, KO = Var(INT32, "tx"), Var(INT32, "bx"), Var(INT32, "ko")


def evaluator() -> Evaluator:
    algebra = Algebra()
    symbols = {BX: algebra.var("bx", 0, BLOCKS - 1), KO: algebra.var("ko", 0, STEPS - 1)}
    return Evaluator(algebra, {TX: const(np.arange(THREADS)), **symbols})


def random_index(rng: random.Random, depth: int) -> ir.Expr:
    if depth == 0 or rng.random() < 0.15:
        return rng.choice([TX, BX, KO, Const(INT32, rng.randint(0, 40))])
    op = rng.choice(
        ["add", "add", "mul", "sub", "floordiv", "floormod", "floordiv", "floormod", "min", "max"]
    )
    left = random_index(rng, depth - 1)
    if op in ("floordiv", "floormod"):
        return BinOp(INT32, op, left, Const(INT32, rng.choice([1, 2, 3, 4, 7, 8, 16])))
    if op == "mul":
        return BinOp(INT32, op, left, Const(INT32, rng.randint(0, 9)))
    return BinOp(INT32, op, left, random_index(rng, depth - 1))


def plain(expr: ir.Expr, env: dict[Var, int]) -> int:
    match expr:
        case Const(value=value):
            return int(value)
        case Var():
            return env[expr]
        case BinOp(op=op, a=a, b=b):
            x, y = plain(a, env), plain(b, env)
            return {
                "add": lambda: x + y,
                "sub": lambda: x - y,
                "mul": lambda: x * y,
                "floordiv": lambda: x // y,
                "floormod": lambda: x % y,
                "min": lambda: min(x, y),
                "max": lambda: max(x, y),
            }[op]()
    raise AssertionError(expr)


def concrete(value: Sym, point: int, bx: int, ko: int) -> int:
    term = z3.substitute(z3_term(value, point), (z3.Int("bx"), z3.IntVal(bx)), (z3.Int("ko"), z3.IntVal(ko)))
    return z3.simplify(term).as_long()


@pytest.mark.parametrize("seed", range(60))
def test_normal_form_has_the_value_of_the_expression(seed):
    rng = random.Random(seed)
    expr = random_index(rng, 5)
    value = evaluator().int(expr)
    low, high = value.bounds()
    for _ in range(12):
        tx, bx, ko = rng.randrange(THREADS), rng.randrange(BLOCKS), rng.randrange(STEPS)
        want = plain(expr, {TX: tx, BX: bx, KO: ko})
        assert concrete(value, tx, bx, ko) == want
        assert low is not None
        assert high is not None
        assert low <= want <= high


@pytest.mark.parametrize("seed", range(40))
def test_comparison_has_the_truth_value_of_the_expression(seed):
    rng = random.Random(1000 + seed)
    a, b = random_index(rng, 3), random_index(rng, 3)
    kind = rng.choice(["lt", "le", "gt", "ge", "eq", "ne"])
    e = evaluator()
    cond = compare(kind, e.int(a), e.int(b))
    for _ in range(12):
        tx, bx, ko = rng.randrange(THREADS), rng.randrange(BLOCKS), rng.randrange(STEPS)
        env = {TX: tx, BX: bx, KO: ko}
        x, y = plain(a, env), plain(b, env)
        want = {"lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y, "eq": x == y, "ne": x != y}[kind]
        values = ((z3.Int("bx"), z3.IntVal(bx)), (z3.Int("ko"), z3.IntVal(ko)))
        assert z3.is_true(z3.simplify(z3.substitute(cond.z3_at(tx), *values))) == want


def test_equal_addresses_written_differently_have_one_normal_form():
    e = evaluator()
    four, eight = Const(INT32, 4), Const(INT32, 8)
    split = BinOp(INT32, "floordiv", BinOp(INT32, "floormod", KO, eight), four)
    nested = BinOp(
        INT32,
        "sub",
        BinOp(INT32, "floordiv", KO, four),
        BinOp(INT32, "mul", BinOp(INT32, "floordiv", KO, eight), Const(INT32, 2)),
    )
    assert e.int(split).key == e.int(nested).key
    assert e.int(split).key != e.int(BinOp(INT32, "floormod", KO, four)).key


def test_choice_by_thread_is_followed():
    e = evaluator()
    low = BinOp(ir.BOOL, "lt", TX, Const(INT32, 3))
    value = e.int(Select(INT32, low, TX, BX, lazy=False))
    assert [at(value.constant, k) for k in range(5)] == [0, 1, 2, 0, 0]


def test_large_coefficients_are_refused_not_wrapped():
    big = const(np.array([1 << 40, 1]))
    with pytest.raises(ir.UnsupportedIR, match="61 bits"):
        _ = big * const(np.array([1 << 40, 1]))


@pytest.mark.parametrize("span", [32, 64, 128])
def test_swizzle_permutes_its_period_and_keeps_chunks_whole(span):
    address = np.arange(span * 8)
    swizzled = swizzle_address(address, span)
    assert sorted(swizzled) == list(address)
    assert (swizzled % 16 == address % 16).all()
    assert (swizzled // 128 == address // 128).all()
    # The eight rows of a core matrix, one chunk each, fall into different chunks of a span.
    rows = swizzle_address(np.arange(8) * span, span)
    assert len(set((rows % 128) // 16)) == 8 if span == 128 else len(set((rows % 128) // 16)) >= 4
