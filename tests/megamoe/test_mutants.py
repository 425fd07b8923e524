"""The fused kernel's mutants are judged by its suites, and run where these leave them open."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import z3

from megamoe import launch_mutants, mutants
from megamoe.instances import SMALL
from verify.encode import Hypothesis
from verify.interp.device import errors
from verify.interp.errors import UnsupportedOpError
from verify.mutate import measure, others, run
from verify.mutate.equivalence import Difference
from verify.mutate.kill import Kill
from verify.mutate.operators import get
from verify.properties import Claims, Issue
from verify.solve import Obligation
from verify.verdict import Verdict

FUSED = others.get("megamoe/fused")
PLAN = others.get("megamoe/plan")


def first(operator, statement=""):
    """Return the first mutant of an operator whose statement's text has a part."""
    found = get(operator).mutants(FUSED.extract())
    return next(m for m in found if statement in m.diff()[0])


def fails(suite, mutant):
    """Return what keeps a suite from PROVED of a mutant."""
    stages = dict(FUSED.stages(mutant.apply(FUSED.extract()), ()))
    return others.failure(suite, stages[suite])


def test_all_small_kernels_are_mutated():
    assert {i.config for i in mutants.mutated()} == set(SMALL.values())
    assert others.instances() == (*mutants.mutated(), *launch_mutants.mutated())
    chosen, _ = measure._selected(measure.Request())
    assert {i.id for i in others.instances()} < {i.id for i in chosen}
    chosen, _ = measure._selected(measure.Request(kernels=("megamoe",)))
    assert chosen == list(others.instances())
    chosen, _ = measure._selected(measure.Request(kernels=("megamoe",), variants=("fused-wide",)))
    assert [i.id for i in chosen] == ["megamoe/fused-wide"]
    assert FUSED.config == SMALL[""]
    assert others.get("act_quant/b128") is None


def test_kernels_are_launched_on_what_they_declare():
    for instance in launch_mutants.mutated():
        declared = [b for b in instance.extract().tile.buffers.values() if b.scope == "global"]
        assert len(declared) == len(instance.arguments())


def test_every_suite_is_asked_the_likely_ones_first():
    stages = [suite for suite, _ in FUSED.stages(FUSED.extract(), ("race", "mbarrier"))]
    assert stages[:3] == ["roles", "signals", "properties"]
    assert set(stages) == {"refinement", "roles", "signals", "properties", "machine", "protocol"}


def test_every_suite_of_the_plan_is_asked():
    stages = [suite for suite, _ in PLAN.stages(PLAN.extract(), ("race", "bounds"))]
    assert stages == ["properties", "meeting", "machine", "refinement", "plan"]


def test_a_source_is_of_the_kernel_and_of_what_proves_it():
    sources = {others.source_of(i) for i in others.instances()}
    assert len(sources) == len(others.instances())


@pytest.mark.parametrize(
    ("suite", "operator", "statement", "verdict"),
    [
        ("roles", "arrive_removed", "", Verdict.REFUTED),
        ("roles", "parity_flipped", "full", Verdict.REFUTED),
        ("signals", "store_dropped", "atomic_add", Verdict.UNSUPPORTED),
        ("refinement", "operation_changed", "", Verdict.REFUTED),
    ],
)
def test_a_suite_notices_a_fault(suite, operator, statement, verdict):
    assert fails(suite, first(operator, statement)).verdict is verdict


class TestSuiteJudge:
    """On stages of its own: what is REFUTED, what is left open, what a run then shows."""

    @pytest.fixture
    def judge(self):
        def judge(kernel, mutated, shown=None):
            class Instance:
                def stages(self, extracted, likely):
                    del likely
                    claims = {"sound": kernel, "mutant": mutated}[extracted]
                    return iter((name, lambda c=claims[name]: {"claim": c}) for name in claims)

            class Runs:
                runs = 1

                def difference(self, extracted):
                    del extracted
                    return shown

            return others.SuiteJudge("sound", Instance(), Runs())

        return judge

    def test_the_kernel_has_to_be_proved(self, judge):
        with pytest.raises(others.BaselineError, match="UNKNOWN b: claim: not seen"):
            judge({"a": Claims(), "b": Claims(unknown=[Issue(None, "not seen")])}, {}).kill("mutant")

    def test_a_run_decides_what_a_suite_leaves_open(self, judge):
        sound, left = {"a": Claims()}, {"a": Claims(unsupported=[Issue(None, "no words")])}
        shown = judge(sound, left, Difference("race", "other bytes")).kill("mutant")
        assert (shown.verdict, shown.prop, shown.runs) == (Verdict.REFUTED, "race", 1)
        same = judge(sound, left).kill("mutant")
        assert (same.verdict, same.prop, same.runs) == (Verdict.UNSUPPORTED, "a", 1)
        endless = judge(sound, left, Difference("", "no end")).kill("mutant")
        assert (endless.verdict, endless.shown) == (Verdict.UNSUPPORTED, "no end")

    @pytest.mark.parametrize(
        ("shown", "replayed", "note"),
        [
            (Difference("race", "other bytes"), True, "other bytes"),
            (Difference("", "no end"), False, "no end"),
            (None, False, "no fault and the same bytes"),
        ],
    )
    def test_what_a_suite_refutes_is_replayed_beside_the_kernel(self, judge, shown, replayed, note):
        of_suites = judge({}, {}, shown)
        mutant = SimpleNamespace(apply=lambda extracted: "mutant")
        at = SimpleNamespace(judge=of_suites, referee=of_suites.referee, mutant=lambda known: mutant)
        known = run.Outcome("", 1, "", "", 0, "REFUTED", "roles", "", "", "", "", 1.0, model={})
        assert known.awaits_replay
        found = run._replayed(at, known)
        assert (found.replayed, found.replay, found.fate) == (replayed, note, "REFUTED")
        assert found.by_run is replayed
        assert not found.awaits_replay

    def test_a_claim_is_evaluated_at_its_counterexample(self, judge):
        x, of = z3.Int("x"), z3.Function("of", z3.IntSort(), z3.IntSort())
        known = (Hypothesis("rows", "contract", of(x) >= 3), Hypothesis("row", "contract", x == 2))
        claims = {"a": Claims([Obligation("few rows", None, known, of(x + 0) < 3)])}
        of_suites = dataclasses.replace(judge({}, claims), evaluates=True)
        found = of_suites.kill("mutant")
        assert (found.verdict, found.message) == (Verdict.REFUTED, "claim: few rows")
        assert found.evaluated == "evaluated: few rows fails"
        assert judge({}, claims).kill("mutant").evaluated == ""
        outcome = run.Outcome(
            "", 1, "", "", 0, "REFUTED", "a", "", "", "", "", 1.0, model={}, evaluated=found.evaluated
        )
        replayed = run._replayed(SimpleNamespace(judge=of_suites), outcome)
        assert (replayed.replayed, replayed.by_run, replayed.replay) == (True, False, found.evaluated)

    def test_nothing_noticed(self, judge):
        assert judge({"a": Claims()}, {"a": Claims()}).kill("mutant") == Kill(Verdict.PROVED)


@pytest.mark.slow
def test_a_run_shows_a_fault():
    """Of the plan's kernel, whose run is the shortest."""
    instance = others.get("megamoe/plan")
    kernel = instance.extract()
    second = list(get("barrier_removed").mutants(kernel))[1]
    found = others.Runs(instance, kernel).difference(second.apply(kernel))
    assert found.prop == "run"
    assert "DataRaceError" in found.note


def test_a_run_is_like_the_kernel_s_or_tells_it_apart(monkeypatch):
    class Given:
        def arguments(self):
            return (torch.zeros(4),)

    def run(kernel, tensor, *, seed, max_steps=10, **_):
        if kernel == "faulty" and seed:
            raise errors.DataRaceError("a race", errors.Where())
        if max_steps < 40 and kernel == "longer":
            raise errors.StepLimitError("no end", errors.Where())
        tensor += kernel == "other"
        return SimpleNamespace(steps=10 if kernel != "short" else 5)

    def without_memory(*args, **limits):
        raise MemoryError("100 GiB")

    monkeypatch.setattr(others.device, "run", without_memory)
    with pytest.raises(UnsupportedOpError, match="no room for the run: 100 GiB"):
        others.Runs(Given(), "kernel").difference("kernel")
    monkeypatch.setattr(others.device, "run", run)
    sound = others.Runs(Given(), "kernel")
    assert sound.difference("kernel") is None
    assert sound.runs == 3
    assert sound.difference("longer") is None
    assert others.Runs(Given(), "short").difference("longer") == Difference("", "StepLimitError: no end")
    assert sound.difference("faulty") == Difference("run", "DataRaceError: a race")
    assert sound.runs == 2
    assert sound.difference("other") == Difference("run", "other bytes (schedule 0)")
    monkeypatch.setattr(others, "_LONG", 9)
    assert sound.difference("kernel") is None
    assert sound.runs == 1
