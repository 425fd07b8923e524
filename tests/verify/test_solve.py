"""What a prover asks, and how often."""

from dataclasses import replace

import pytest
import z3

from verify import solve
from verify.encode import Hypothesis
from verify.query import Query, Script
from verify.solve import Obligation, Prover, remembering
from verify.verdict import Verdict

X, Y = z3.Ints("x y")
SMALL = Hypothesis("x < 4", "shape", X < 4)
WIDE = Hypothesis("0 <= x", "contract", X >= 0)
HOLDS = Obligation("x < 9", None, (SMALL,), X < 9)
BESIDE = Hypothesis("z < 9", "shape", z3.Int("z") < 9)
FAILS = Obligation("x < 2", None, (SMALL, BESIDE), X < 2)
OTHER = Obligation("y = x -> y < 5", None, (SMALL, WIDE), z3.Implies(Y == X, Y < 5))


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch):
    """A mutant that was checked in this process leaves its questions to the next one, as it should."""
    monkeypatch.setattr(solve, "_remembered", None)


def asked(monkeypatch):
    """Note what z3 is asked, by the method that asks."""
    seen: list[str] = []
    check = z3.Solver.check

    def noted(self, *args):
        answer = check(self, *args)
        seen.append(str(answer))
        return answer

    monkeypatch.setattr(z3.Solver, "check", noted)
    return seen


def test_a_question_is_what_it_asserts_wherever_it_stands():
    alone = Query.of(OTHER.hypotheses, [OTHER.goal])
    first = Script.of([(o.hypotheses, [o.goal]) for o in (HOLDS, OTHER)])
    second = Script.of([(o.hypotheses, [o.goal]) for o in (OTHER, FAILS)])
    assert first.head != second.head
    assert first.questions[1] == second.questions[0] == alone.question
    assert len({*first.questions, *second.questions}) == 3


def test_what_was_proved_in_one_script_is_not_asked_in_another(monkeypatch):
    seen = asked(monkeypatch)
    with remembering():
        prover = Prover(recheck=False)
        assert prover.holding([HOLDS, OTHER]) == {id(HOLDS), id(OTHER)}
        assert len(seen) == 2
        answers = prover.prove([OTHER, FAILS, HOLDS])
    assert [a.verdict for a in answers] == [Verdict.PROVED, Verdict.REFUTED, Verdict.PROVED]
    assert seen[2] == "sat"  # the script asks of FAILS alone
    assert prover.queries >= 5


def test_other_goals_or_hypotheses_are_other_questions(monkeypatch):
    seen = asked(monkeypatch)
    with remembering():
        prover = Prover(recheck=False)
        prover.holding([HOLDS, OTHER])
        stronger = Obligation("x < 8", None, (SMALL,), X < 8)
        weaker = Obligation("x < 9", None, (WIDE,), X < 9)
        assert prover.holding([stronger, weaker]) == {id(stronger)}
    assert seen == ["unsat", "unsat", "unsat", "sat"]


def test_a_search_makes_no_counterexample_and_finds_what_holds(monkeypatch):
    seen = asked(monkeypatch)
    assert Prover(recheck=False).holding([HOLDS, FAILS, OTHER]) == {id(HOLDS), id(OTHER)}
    assert sorted(seen) == ["sat", "unsat", "unsat"]


def test_a_search_looks_at_each_goal_of_a_context_that_fails():
    holds_too = Obligation("x < 4", None, FAILS.hypotheses, X < 4)
    prover = Prover(recheck=False, minimise=False)
    assert prover.holding([FAILS, holds_too, OTHER]) == {id(holds_too), id(OTHER)}


def test_both_solvers_are_asked_of_what_z3_has_proved_before():
    with remembering():
        Prover(recheck=False).holding([HOLDS, OTHER])
        prover = Prover()
        assert {a.verdict for a in prover.prove([HOLDS, OTHER])} == {Verdict.PROVED}
    assert prover.decided == {"cvc5 unsat": 2, "z3 unsat": 2}


NARROW = Hypothesis("x <= 90", "contract", X <= 90)
LARGE = Obligation("x > -1", None, (SMALL, WIDE, NARROW), X > -1)
LESS = Obligation("x < 5", None, (SMALL, WIDE, NARROW, BESIDE), X < 5)


def of_cvc5(monkeypatch):
    """Note the texts that cvc5 gets."""
    seen: list[str] = []
    run = Prover._cvc5_run

    def noted(self, text, incremental, cores=False):
        seen.append(text)
        return run(self, text, incremental, cores)

    monkeypatch.setattr(Prover, "_cvc5_run", noted)
    return seen


def test_cvc5_has_only_the_clauses_that_proofs_of_z3_used(monkeypatch):
    seen = of_cvc5(monkeypatch)
    answers = Prover().prove([LARGE, LESS])
    assert [a.core for a in answers] == [{"0 <= x"}, set()]
    (text,) = seen
    assert "(>= x 0)" in text
    assert "90" not in text


def test_what_cvc5_proves_without_cores_alone_counts_all_clauses_as_used(monkeypatch):
    run = Prover._cvc5_run

    def without(self, text, incremental, cores=False):
        # A budget of nothing: cvc5 gives up where it is asked for cores.
        limit = 1 if cores else self.cvc5_rlimit
        return run(replace(self, cvc5_rlimit=limit), text, incremental, cores)

    monkeypatch.setattr(Prover, "_cvc5_run", without)
    monkeypatch.setattr(Prover, "_cvc5_proves", lambda self, script, cores: set())
    answers = Prover().prove([LARGE, LESS])
    assert [a.verdict for a in answers] == [Verdict.PROVED, Verdict.PROVED]
    assert {"0 <= x"} < answers[0].core | answers[1].core


def test_a_core_with_too_little_in_it_is_a_disagreement(monkeypatch):
    monkeypatch.setattr(z3.Solver, "unsat_core", lambda self: [])
    with pytest.raises(RuntimeError, match="z3 and cvc5 disagree"):
        Prover().prove([LARGE, LESS])


def test_a_wrong_answer_of_z3_in_a_script_is_a_disagreement(monkeypatch):
    monkeypatch.setattr(z3.Solver, "check", lambda self, *args: z3.unsat)
    monkeypatch.setattr(z3.Solver, "unsat_core", lambda self: [])
    with pytest.raises(RuntimeError, match="z3 and cvc5 disagree"):
        Prover().prove([HOLDS, FAILS])


def test_what_was_proved_before_keeps_its_core():
    with remembering():
        first = Prover().prove([LARGE, LESS])
        again = Prover().prove([LESS, LARGE])
    assert [a.core for a in again] == [first[1].core, first[0].core] == [set(), {"0 <= x"}]


def test_a_clause_and_a_guard_of_one_text_are_told_apart(monkeypatch):
    """What z3 used without a name cannot be left out for cvc5 where it has one."""
    guard = Hypothesis("if 0 <= x", "guard", X >= 0)
    guarded = Obligation("x > -1", None, (SMALL, guard, NARROW), X > -1)
    seen = asked(monkeypatch)
    with remembering():
        assert Prover().prove([guarded, LESS])[0].core == set()
        answers = Prover().prove([LARGE, LESS])
    assert answers[0].core == {"0 <= x"}
    assert len(seen) >= 3  # of LARGE by its own
