"""Mutation: operators change what they say and nothing else; kills and survivors are told apart."""

import pytest

from tests.verify import samples
from verify import ir
from verify.mutate import equivalence, instances, measure, rewrite, run, table
from verify.mutate.kill import Kill, kill
from verify.mutate.operators import OPERATORS, get
from verify.solve import remembering
from verify.tasks import TaskError, Workers
from verify.text import show
from verify.verdict import Verdict


@pytest.fixture(scope="module")
def gemm():
    return samples.context(samples.gemm()).extracted


def lines(function: ir.Function) -> list[str]:
    return [show(s) for s, _ in rewrite.statements(function.body) if not isinstance(s, ir.Seq)]


def test_operators_are_many_and_named_once():
    names = [o.name for o in OPERATORS]
    assert len(set(names)) == len(names) >= 20


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_a_mutant_differs_in_one_place_and_the_kernel_stays_as_it_was(gemm, operator):
    stage = getattr(gemm, operator.stage)
    before = lines(stage)
    for mutant in operator.mutants(gemm)[:2]:
        mutated = mutant.apply(gemm)
        after = lines(getattr(mutated, operator.stage))
        if mutant.new is not rewrite.NOTHING and not isinstance(mutant.old, ir.Stmt):
            assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
        assert after != before or operator.name == "int_narrowed"  # text leaves integer casts out
        assert mutant.diff()[0] != mutant.diff()[1]
    assert lines(getattr(gemm, operator.stage)) == before


@pytest.mark.parametrize(
    ("name", "prop"),
    [("guard_dropped", "bounds"), ("index_plus_1", "refinement"), ("extent_minus_1", "refinement")],
)
def test_a_fault_is_refuted_by_the_property_it_is_meant_for(name, prop):
    context = samples.context(samples.exponentials())
    assert kill(context.extracted, samples.ROWS, {}).verdict is Verdict.PROVED
    mutant = get(name).mutants(context.extracted)[0]
    killed = kill(mutant.apply(context.extracted), samples.ROWS, {}, mutant.operator.killers)
    assert killed.verdict is Verdict.REFUTED
    assert prop in mutant.operator.killers


def test_proofs_are_remembered_only_where_asked_for(monkeypatch):
    from verify.solve import Query

    asked = []
    solver = Query.solver
    monkeypatch.setattr(Query, "solver", lambda self, rlimit: asked.append(self.text) or solver(self, rlimit))
    extracted = samples.context(samples.exponentials()).extracted
    with remembering():
        kill(extracted, samples.ROWS, {})
        first = len(asked)
        kill(extracted, samples.ROWS, {})
        assert len(asked) < 2 * first
    asked.clear()
    for _ in range(2):
        kill(extracted, samples.ROWS, {})
    assert len(asked) >= 2 * first


def outcome(fate, operator="guard_dropped"):
    return run.Outcome("kernel/variant", operator, 0, fate, "", "", "", "a", "b", 0.0)


def test_the_rate_leaves_out_what_is_equivalent_and_counts_survivors():
    assert table.rate([outcome("REFUTED"), outcome("EQUIVALENT")]) == 100
    assert table.rate([outcome("REFUTED"), outcome("SURVIVED")]) == 50
    assert table.rate([outcome("EQUIVALENT")]) is None


def test_one_critical_survivor_misses_the_goal_and_one_in_a_hundred_others_does_not():
    many = [outcome("REFUTED", "index_plus_1")] * 99
    assert table.is_met([*many, outcome("SURVIVED", "index_plus_1")])
    assert not table.is_met([*many, outcome("SURVIVED", "wait_removed")])
    assert not table.is_met([*many, *[outcome("SURVIVED", "index_plus_1")] * 3])


def test_every_config_has_one_instance_at_small_dims():
    found = instances.instances()
    gemms = [i for i in found if i.spec.name == "fp8_fp4_gemm"]
    assert len(gemms) == len({v.kwargs["config"] for v in gemms[0].spec.variants})
    assert all(i.dims == dict(gemms[0].spec.small) for i in gemms)
    for instance in found:
        assert next(instance.arguments(0)), instance.id


def test_a_kernel_that_is_not_proved_is_not_mutated(monkeypatch):
    monkeypatch.setattr(run, "kill", lambda *args: Kill(Verdict.REFUTED, "bounds", "somewhere"))
    run._prepared.cache_clear()
    with pytest.raises(run.BaselineError, match="fp4_dequant"):
        run.run_work(run.Work("fp4_dequant/b32", ("guard_dropped",), 1, 0, 1))


def test_a_survivor_is_equivalent_only_if_the_interpreter_says_so(monkeypatch):
    monkeypatch.setattr(run, "kill", lambda *args: Kill(Verdict.PROVED))
    for difference, fate in ((None, "EQUIVALENT"), ("other bytes", "SURVIVED")):
        monkeypatch.setattr(equivalence, "difference", lambda *args, d=difference: d)
        run._prepared.cache_clear()
        (found,) = run.run_work(run.Work("fp4_dequant/b32", ("guard_dropped",), 1, 0, 1))
        assert found.fate == fate
        assert found.place
    run._prepared.cache_clear()


def test_what_selects_nothing_is_an_error():
    with pytest.raises(TaskError, match="no operator"):
        measure.measure(Workers(1, None), (), (), ("no_such",), 1, False)
    with pytest.raises(TaskError, match="nothing to mutate"):
        measure.measure(Workers(1, None), ("no_such",), (), (), 1, False)
