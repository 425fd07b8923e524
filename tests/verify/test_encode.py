"""Terms against Python's integers, data symbols, walks."""

import operator
from typing import Any

import pytest
import z3
from hypothesis import given, settings
from hypothesis import strategies as st

from verify import ir
from verify.encode import Encoder, Hypothesis, Scope, is_exact
from verify.solve import Obligation, Prover
from verify.verdict import Verdict
from verify.walk import walk

INT32 = st.integers(-(2**31), 2**31 - 1)


def constant(value: int, dtype: ir.DType = ir.INT32) -> ir.Const:
    return ir.Const(dtype, value)


def evaluate(expr: ir.Expr, **values: int) -> int:
    encoder = Encoder()
    term = encoder.term(expr, Scope())
    pairs = [(encoder.dim(name), z3.IntVal(value)) for name, value in values.items()]
    return z3.simplify(z3.substitute(term, *pairs)).as_long()


def variable(name: str) -> ir.Var:
    return ir.Var(ir.INT32, name)


def truncate(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


MEANINGS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "min": min,
    "max": max,
    "floordiv": operator.floordiv,
    "floormod": operator.mod,
    "truncdiv": truncate,
    "truncmod": lambda a, b: a - b * truncate(a, b),
    "bitand": operator.and_,
    "bitor": operator.or_,
    "bitxor": operator.xor,
}


@pytest.mark.parametrize("op", MEANINGS)
@given(a=INT32, b=INT32.filter(bool))
@settings(max_examples=40, deadline=None)
def test_an_operation_on_a_constant_means_what_python_means(op, a, b):
    assert evaluate(ir.BinOp(ir.INT32, op, variable("a"), constant(b)), a=a) == MEANINGS[op](a, b)


@pytest.mark.parametrize("op", MEANINGS)
@given(a=INT32, b=INT32.filter(bool))
@settings(max_examples=20, deadline=None)
def test_an_operation_on_two_variables_means_what_python_means(op, a, b):
    expr = ir.BinOp(ir.INT32, op, variable("a"), variable("b"))
    assert evaluate(expr, a=a, b=b) == MEANINGS[op](a, b)


@given(a=INT32, amount=st.integers(0, 31))
@settings(max_examples=40, deadline=None)
def test_shifts_by_a_constant_or_a_variable(a, amount):
    for by, values in ((constant(amount), {}), (variable("s"), {"s": amount})):
        assert evaluate(ir.BinOp(ir.INT32, "shr", variable("a"), by), a=a, **values) == a >> amount
        assert evaluate(ir.BinOp(ir.INT32, "shl", variable("a"), by), a=a, **values) == a << amount


def test_a_bit_operation_on_two_64_bit_variables_is_unsupported():
    wide = ir.DType("int64")
    expr = ir.BinOp(wide, "bitxor", ir.Var(wide, "a"), ir.Var(wide, "b"))
    with pytest.raises(ir.UnsupportedIR, match="bit operation"):
        Encoder().term(expr, Scope())


def local_array(name: str = "s") -> ir.Buffer:
    data = ir.Var(ir.HANDLE, name)
    return ir.Buffer(name, ir.INT32, (constant(8),), (), "local", data, constant(0))


def load(buffer: ir.Buffer, index: int = 0) -> ir.Load:
    return ir.Load(buffer.dtype, buffer, (constant(index),))


def test_data_arithmetic_is_encoded_with_its_wrapping():
    doubled = ir.BinOp(ir.INT32, "mul", load(local_array()), constant(2))
    term = Encoder().term(doubled, Scope())
    positive = Obligation("", None, (), term >= 0, {})
    bounded = Obligation("", None, (), z3.And(term >= -(2**31), term < 2**31), {})
    answers = Prover().prove([positive, bounded])
    assert [a.verdict for a in answers] == [Verdict.UNKNOWN, Verdict.PROVED]


def store(buffer: ir.Buffer, value: ir.Expr) -> ir.Store:
    return ir.Store(None, buffer, (constant(0),), value)


def test_a_value_read_twice_is_equal_unless_it_was_written_between():
    flag, out = local_array("flag"), local_array("out")
    body = ir.Seq(None, (store(out, load(flag)), store(out, load(flag)), store(flag, constant(1))))
    after = ir.Seq(None, (body, store(out, load(flag))))
    encoder = Encoder()
    sites: list[Any] = [
        s
        for s in walk(ir.Function("f", (), {}, after, {}), encoder, ())
        if isinstance(s.node, ir.Load) and s.node.buffer is flag
    ]
    first, second, third = (encoder.term(s.node, s.scope) for s in sites)
    assert z3.eq(first, second)
    assert not z3.eq(second, third)
    assert not is_exact([first])


def test_a_private_variable_is_followed_within_straight_code():
    cell = ir.Buffer("v", ir.INT32, (constant(1),), (), "local.var", ir.Var(ir.HANDLE, "v"), constant(0))
    m, out = variable("m"), local_array("out")
    follow = ir.Seq(None, (store(cell, ir.BinOp(ir.INT32, "add", m, constant(1))), store(out, load(cell))))
    branch = ir.If(None, ir.BinOp(ir.BOOL, "lt", m, constant(4)), store(cell, constant(7)), None)
    body = ir.Seq(None, (follow, branch, store(out, load(cell))))
    encoder = Encoder()
    sites = walk(ir.Function("f", (m,), {}, body, {}), encoder, ())
    first, second = (encoder.term(s.node, s.scope) for s in sites if isinstance(s.node, ir.Load))
    dim = encoder.dim("m")
    assert z3.eq(first, dim + 1)
    solver = z3.Solver()
    solver.add(second != z3.If(dim < 4, 7, dim + 1))  # behind both branches
    assert solver.check() == z3.unsat


def test_a_value_that_a_loop_writes_differs_between_rounds():
    flag = local_array("flag")
    loop = ir.For(
        None, variable("i"), constant(0), constant(4), "serial", ir.Seq(None, (store(flag, load(flag)),)), {}
    )
    encoder = Encoder()
    sites = walk(ir.Function("f", (), {}, loop, {}), encoder, ())
    site: Any = next(s for s in sites if isinstance(s.node, ir.Load))
    counter = site.scope.loops[0].const
    term = encoder.term(site.node, site.scope)
    moved = z3.substitute(term, (counter, z3.IntVal(3)))
    assert not z3.eq(term, moved)


def test_guards_hold_below_branches_and_lazy_selects():
    m, flag = variable("m"), local_array("flag")
    below = ir.BinOp(ir.BOOL, "lt", m, constant(8))
    body = ir.If(
        None,
        below,
        store(flag, ir.Select(ir.INT32, below, load(flag), load(flag), lazy=True)),
        store(flag, constant(0)),
    )
    sites = walk(ir.Function("f", (m,), {}, body, {}), Encoder(), ())
    stores = [s for s in sites if isinstance(s.node, ir.Store)]
    assert [[h.label for h in s.scope.hypotheses] for s in stores] == [["if m < 8"], ["else of m < 8"]]
    loads = [s for s in sites if isinstance(s.node, ir.Load)]
    assert [s.scope.hypotheses[-1].label for s in loads] == ["if m < 8", "else of m < 8"]


class TestProver:
    m, b = z3.Ints("m b")
    known = (Hypothesis("0 <= b", "contract", b >= 0), Hypothesis("b < m", "assume", b < m))

    def test_a_proof_needs_both_solvers_and_names_what_it_used(self):
        prover = Prover()
        spare = Hypothesis("m <= 100", "contract", self.m <= 100)
        answer = prover.prove([Obligation("", None, (*self.known, spare), self.m > 0)])[0]
        assert answer.verdict is Verdict.PROVED
        assert answer.core == {"0 <= b", "b < m"}
        assert prover.decided == {"z3 unsat": 1, "cvc5 unsat": 1}

    def test_what_holds_by_the_meaning_of_the_ir_is_used_but_not_named(self):
        guard = Hypothesis("if b < m", "guard", self.b < self.m)
        (answer,) = Prover().prove([Obligation("", None, (self.known[0], guard), self.m > 0)])
        assert answer.verdict is Verdict.PROVED
        assert answer.core == {"0 <= b"}

    def test_one_failure_of_a_batch_does_not_hide_the_rest(self):
        goals = [self.m > 0, self.b < 7, self.m >= self.b]
        answers = Prover().prove([Obligation(str(g), None, self.known, g) for g in goals])
        assert {a.obligation.what: a.verdict for a in answers} == {
            "m > 0": Verdict.PROVED,
            "b < 7": Verdict.REFUTED,
            "m >= b": Verdict.PROVED,
        }

    def test_contexts_of_one_script_are_proved_apart(self):
        low = Hypothesis("b <= 3", "assume", self.b <= 3)
        high = Hypothesis("b >= 5", "assume", self.b >= 5)
        spare = Hypothesis("m <= 100", "contract", self.m <= 100)
        obligations = [
            Obligation("low", None, (*self.known, low), self.b < 4),
            Obligation("neither", None, (*self.known, spare), self.b < 4),
            Obligation("high", None, (*self.known, high), self.m > 5),
            Obligation("both", None, (*self.known, low, high), z3.BoolVal(False)),
        ]
        prover = Prover()
        answers = {a.obligation.what: a for a in prover.prove(obligations)}
        assert {what for what, a in answers.items() if a.verdict is Verdict.PROVED} == {"low", "high", "both"}
        assert answers["neither"].verdict is Verdict.REFUTED
        assert answers["neither"].model["b"] >= 4
        assert answers["low"].core == {"b <= 3"}
        assert answers["high"].core == {"b < m", "b >= 5"}
        assert answers["both"].core == {"b <= 3", "b >= 5"}
        assert prover.decided == {"z3 unsat": 3, "cvc5 unsat": 3, "z3 sat": 1}

    def test_what_cvc5_proves_only_by_itself_counts_once(self, monkeypatch):
        monkeypatch.setattr(Prover, "_cvc5_proves", lambda self, script, cores: set())
        low = Hypothesis("b <= 3", "assume", self.b <= 3)
        obligations = [
            Obligation("", None, self.known, self.m > 0),
            Obligation("", None, (*self.known, low), self.b < 4),
        ]
        prover = Prover()
        answers = prover.prove(obligations)
        assert {a.verdict for a in answers} == {Verdict.PROVED}
        assert answers[1].core == {"b <= 3"}
        assert prover.queries == 2
        assert prover.decided == {"z3 unsat": 2, "cvc5 unsat": 2}

    def test_what_cvc5_does_not_prove_in_a_script_is_not_proved(self, monkeypatch):
        monkeypatch.setattr(Prover, "_cvc5_proves", lambda self, script, cores: set())
        monkeypatch.setattr(Prover, "_cvc5", lambda self, query: "unknown")
        low = Hypothesis("b <= 3", "assume", self.b <= 3)
        obligations = [
            Obligation("", None, self.known, self.m > 0),
            Obligation("", None, (*self.known, low), self.b < 4),
        ]
        prover = Prover()
        assert {a.verdict for a in prover.prove(obligations)} == {Verdict.UNKNOWN}
        assert prover.decided == {"z3 alone unsat": 2}
        assert {a.verdict for a in Prover(recheck=False).prove(obligations)} == {Verdict.PROVED}

    def test_what_z3_does_not_prove_in_a_script_is_not_asked_of_cvc5_there(self, monkeypatch):
        asked = []
        proves = Prover._cvc5_proves
        monkeypatch.setattr(
            Prover, "_cvc5_proves", lambda self, script, n: asked.append(list(n)) or proves(self, script, n)
        )
        low = Hypothesis("b <= 3", "assume", self.b <= 3)
        obligations = [
            Obligation("", None, self.known, self.b < 4),
            Obligation("", None, (*self.known, low), self.b < 4),
        ]
        assert [a.verdict for a in Prover().prove(obligations)] == [Verdict.REFUTED, Verdict.PROVED]
        assert asked == [[1]]

    def test_a_model_is_made_small(self):
        shape = Hypothesis("m <= 1000000", "contract", self.m <= 1000000)
        answer = Prover().prove([Obligation("", None, (*self.known, shape), self.b < 7, {"b": self.b})])[0]
        assert (answer.model["m"], answer.shown["b"]) == (8, 7)

    def test_a_budget_that_is_spent_gives_unknown(self):
        x, y, z = z3.Ints("x y z")
        positive = Hypothesis("positive", "shape", z3.And(x > 0, y > 0, z > 0))
        goal = x * x * x + y * y * y != z * z * z
        answer = Prover(rlimit=1000, cvc5_rlimit=1000).prove([Obligation("", None, (positive,), goal)])[0]
        assert answer.verdict is Verdict.UNKNOWN

    def test_what_turns_on_parity_is_proved_beside_what_does_not(self):
        even = Hypothesis("m == 2 a + 4 b", "shape", self.m == 2 * z3.Int("a") + 4 * self.b)
        odd = Hypothesis("m == 2 c + 1", "shape", self.m == 2 * z3.Int("c") + 1)
        obligations = [
            Obligation("", None, (*self.known, even), self.m + 1 != 2 * z3.Int("d")),
            Obligation("", None, (even, odd), z3.BoolVal(False)),
        ]
        assert [a.verdict for a in Prover().prove(obligations)] == [Verdict.PROVED] * 2

    def test_verdicts_repeat(self):
        obligations = [Obligation("", None, self.known, self.m > 1)]
        first, second = Prover(), Prover()
        assert first.prove(obligations) == second.prove(obligations)
        assert first.rlimit_used == second.rlimit_used
