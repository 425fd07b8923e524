"""Obligations that are open as a whole and taken apart by tail blocks and warp roles."""

from functools import partial
from itertools import combinations
from types import SimpleNamespace

import pytest
import z3

from verify import engine, solve, suites
from verify.cases import MAX_CASES, cases_of, covering
from verify.encode import Hypothesis
from verify.properties import Claims
from verify.solve import MAX_OPEN, Obligation, Prover
from verify.verdict import Verdict

B, N, M, C, T, U = z3.Ints("b n m c t u")
BLOCKS = Hypothesis("blockIdx.x b < n", "launch", z3.And(B >= 0, B < N))
THREADS = Hypothesis("threadIdx.x t < 384", "launch", z3.And(T >= 0, T < 384))
PAIR = Hypothesis("threadIdx.x t < 256", "launch", z3.And(T >= 0, T < 256))

# Every tile of c rows begins inside m rows, if the grid is ceildiv(m, c): cvc5 sees it of the last block and
# of the others, and not of all of them.
SHAPE = Hypothesis("n == ceildiv(m, c)", "shape", z3.And(C >= 1, M >= 1, (M + C - 1) / C == N))
STARTS = Obligation("a tile starts inside", None, (BLOCKS, SHAPE), B * C < M)
OVER = Hypothesis("n == m // c + 1", "shape", z3.And(C >= 1, M >= 1, M / C + 1 == N))
OVERRUN = Obligation("a tile starts inside", None, (BLOCKS, OVER), B * C < M)  # fails where c divides m
POSITIVE = Hypothesis("c, m >= 0", "shape", z3.And(C >= 0, M >= 0))
SCALED = Obligation("scaled by warpgroup", None, (PAIR, POSITIVE), T / 128 * C * M * M <= C * M * M)

SMALL = partial(Prover, rlimit=1_000_000, cvc5_rlimit=100_000)
TINY = partial(Prover, rlimit=30_000, cvc5_rlimit=3_000)
TRIES = partial(Prover, rlimit=10_000, cvc5_rlimit=2_000)


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch):
    monkeypatch.setattr(solve, "_remembered", None)


def labels(splits):
    return [[case.label for case in cases] for cases in splits]


def open_as_a_whole(monkeypatch):
    """Let z3 give up on what has no case among its hypotheses."""
    ask = Prover._z3

    def without(self, query):
        if self.queries == 0:
            self.queries += 1
            return "unknown", None, "canceled"
        return ask(self, query)

    monkeypatch.setattr(Prover, "_z3", without)


def always(term):
    solver = z3.Solver()
    return solver.check(z3.Not(term)) == z3.unsat


@pytest.mark.parametrize(
    "cases",
    [
        *cases_of((BLOCKS, THREADS), z3.And(B < 7, z3.Or(T < 32, T == 200))),
        covering([("b > 3", B > 3), ("c < b", C < B), ("b * c == 0", B * C == 0)]),
        covering([("true", z3.BoolVal(True))]),
    ],
)
def test_exactly_one_case_holds(cases):
    terms = [case.term for case in cases]
    assert len(cases) > 1
    assert always(z3.Or(*terms))
    assert all(always(z3.Not(z3.And(a, b))) for a, b in combinations(terms, 2))


def test_tails_come_first_and_roles_are_where_guards_and_warpgroups_say():
    assert labels(cases_of((BLOCKS, THREADS), z3.And(B < 7, T != 383))) == [
        ["b is the last", "not b is the last"],
        ["t < 128", "not t < 128, t < 256", "not t < 256, t < 383", "not t < 383"],
    ]
    guard = Hypothesis("if t >= 32", "guard", T >= 32)
    ((*cases,),) = labels(cases_of((PAIR, guard), z3.IntVal(64) > T))
    assert [c.split(", ")[-1] for c in cases] == ["t < 32", "t < 64", "t < 128", "not t < 128"]


def test_nothing_is_split_by_an_index_of_which_nothing_speaks():
    assert cases_of((BLOCKS, THREADS), C > 0) == []
    one = Hypothesis("blockIdx.y b < 1", "launch", z3.And(B >= 0, B < 1))
    warp = Hypothesis("threadIdx.x t < 32", "launch", z3.And(T >= 0, T < 32))
    assert cases_of((one, warp), B + T < 40) == []
    for other in (z3.And(B >= 1, B < N), z3.And(B >= 0, C < N), z3.Or(B >= 0, B < N), B != C):
        assert cases_of((Hypothesis("two accesses", "launch", other),), B > 3) == []
    assert cases_of((Hypothesis("a round", "loop", BLOCKS.term),), B > 3) == []


def test_many_guards_leave_roles_to_warpgroups():
    guards = z3.And(*(n != T for n in range(1, 30, 3)))
    ((*cases,),) = cases_of((THREADS,), guards)
    assert len(cases) == 3
    huge = Hypothesis("threadIdx.x t < 1024", "launch", z3.And(T >= 0, T < 1024))
    ((*cases,),) = cases_of((huge,), guards)
    assert len(cases) == MAX_CASES


@pytest.mark.parametrize(("obligation", "prover"), [(STARTS, SMALL), (SCALED, TINY)])
def test_what_is_open_as_a_whole_is_proved_by_cases(obligation, prover):
    (whole,) = prover().prove([obligation])
    assert whole.verdict is Verdict.UNKNOWN
    parts = prover(by_cases=True)
    (answer,) = parts.prove([obligation])
    assert answer.verdict is Verdict.PROVED
    assert answer.obligation is obligation
    assert parts.queries == 3  # as a whole, and two cases
    assert (parts.decided["z3 unsat"], parts.decided["cvc5 unsat"]) == (2, 2)


def test_a_proof_by_cases_used_what_either_case_used(monkeypatch):
    open_as_a_whole(monkeypatch)
    last = Hypothesis("last is small", "contract", z3.Implies(B == N - 1, C < 4))
    rest = Hypothesis("rest is small", "assume", z3.Implies(B < N - 1, C < 3))
    monkeypatch.setattr(solve.Prover, "_cvc5", by_cases_alone(Prover._cvc5))
    (answer,) = Prover(by_cases=True).prove([Obligation("c < 4", None, (BLOCKS, last, rest), C < 4)])
    assert answer.verdict is Verdict.PROVED
    assert answer.core == {"last is small", "rest is small"}


def by_cases_alone(ask):
    """Let cvc5 give up on the first question, of the whole."""
    seen = []

    def without(self, query):
        seen.append(query)
        return ask(self, query) if len(seen) > 1 else "unknown"

    return without


def test_what_is_false_is_refuted_as_a_whole_or_in_a_case(monkeypatch):
    assert [a.verdict for a in SMALL(by_cases=True).prove([OVERRUN])] == [Verdict.REFUTED]
    open_as_a_whole(monkeypatch)
    prover = SMALL(by_cases=True)
    (answer,) = prover.prove([OVERRUN])
    assert answer.verdict is Verdict.REFUTED
    assert answer.obligation is OVERRUN
    assert prover.queries == 2  # the last block fails
    point = [z3.Int(name) == value for name, value in answer.model.items()]
    assert z3.Solver().check(BLOCKS.term, OVER.term, z3.Not(OVERRUN.goal), *point) == z3.sat


def test_a_counterexample_in_the_last_case_is_found(monkeypatch):
    open_as_a_whole(monkeypatch)
    (answer,) = Prover(by_cases=True).prove([Obligation("t < 300", None, (THREADS,), T < 300)])
    assert answer.verdict is Verdict.REFUTED
    assert answer.model["t"] == 300


def test_a_model_that_may_be_no_run_stays_unknown(monkeypatch):
    open_as_a_whole(monkeypatch)
    inexact = Obligation("t < 300", None, (THREADS,), T < 300, exact=False)
    (answer,) = Prover(by_cases=True).prove([inexact])
    assert answer.verdict is Verdict.UNKNOWN
    assert answer.model


def test_one_open_case_leaves_all_open():
    shape = Hypothesis("m == n c", "shape", z3.And(C >= 1, N * C == M))
    (answer,) = TRIES(by_cases=True).prove(
        [Obligation("a tile fits", None, (BLOCKS, shape), (B + 1) * C <= M)]
    )
    assert answer.verdict is Verdict.UNKNOWN
    assert "open where not b is the last" in answer.reason


def test_a_case_that_z3_proves_alone_is_open(monkeypatch):
    monkeypatch.setattr(Prover, "_cvc5", lambda self, query: "unknown")
    prover = SMALL(by_cases=True)
    assert [a.verdict for a in prover.prove([STARTS])] == [Verdict.UNKNOWN]
    assert prover.decided == {"z3 alone unsat": 3}


def test_nothing_is_split_that_is_decided_or_by_z3_alone(monkeypatch):
    def never(*args):
        raise AssertionError("split")

    monkeypatch.setattr(solve, "cases_of", never)
    holds = Obligation("t < 400", None, (THREADS,), T < 400)
    fails = Obligation("t < 300", None, (THREADS,), T < 300)
    found = Prover(by_cases=True).prove([holds, fails])
    assert [a.verdict for a in found] == [Verdict.PROVED, Verdict.REFUTED]
    searches = (TINY(), TINY(by_cases=True, recheck=False, rlimit=100))
    assert [a.verdict for p in searches for a in p.prove([STARTS])] == [Verdict.UNKNOWN] * 2


def test_after_many_that_stay_open_no_more_are_split(monkeypatch):
    monkeypatch.setattr(Prover, "_decide", lambda self, query: ("unknown", None, "canceled"))
    prover = Prover(by_cases=True)
    reasons = [prover._cases(STARTS, "canceled").reason for _ in range(MAX_OPEN + 1)]
    assert ["by cases" in r for r in reasons] == [True] * MAX_OPEN + [False]


def test_a_split_by_roles_has_room_beside_many_tails():
    tags = [Hypothesis(f"blockIdx.{n}", "launch", z3.And(i >= 0, i < N)) for n, i in enumerate((B, C, M, U))]
    splits = labels(cases_of((*tags, THREADS), B + C + M + U + T < 9))
    assert [cases[0] for cases in splits] == [*(f"{n} is the last" for n in "bcm"), "t < 128"]


def test_verdicts_of_properties_are_by_cases(monkeypatch):
    monkeypatch.setattr(engine, "Prover", SMALL)
    prop = SimpleNamespace(name="bounds", depends=(), claims=lambda context: Claims(obligations=[STARTS]))
    context = SimpleNamespace(encoder=SimpleNamespace(relied=()))
    result = engine._property(context, prop, SimpleNamespace(first=None), recheck=True, smt2=None)
    assert (result.verdict, result.obligations, result.queries) == (Verdict.PROVED, 1, 3)


def test_verdicts_of_claims_are_by_cases_too(monkeypatch):
    monkeypatch.setattr(suites, "Prover", SMALL)
    result = suites._claim("starts", lambda: Claims(obligations=[STARTS]), recheck=True, smt2=None)
    assert (result.verdict, result.obligations, result.queries) == (Verdict.PROVED, 1, 3)
