"""Mutation: operators change what they say and nothing else; kills and survivors are told apart."""

import dataclasses
import json
import lzma
from types import SimpleNamespace

import pytest
import torch
import z3

from tests.verify import samples
from verify import bitvectors, ir, solve
from verify.mutate import classes, forks, instances, kill, measure, rewrite, run, store, table
from verify.mutate.equivalence import Difference, Referee
from verify.mutate.kill import BaselineError, Judge, Kill, decide
from verify.mutate.operators import OPERATORS, get
from verify.properties import Context
from verify.properties.refinement import changed
from verify.refine.run import readings, refine
from verify.solve import Obligation, Prover, by_z3_alone, remembering
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
    judge = Judge(context.extracted, samples.ROWS, {})
    assert judge.kill(context.extracted).verdict is Verdict.PROVED
    mutant = get(name).mutants(context.extracted)[0]
    killed = judge.kill(mutant.apply(context.extracted), mutant.operator.killers)
    assert killed.verdict is Verdict.REFUTED
    assert prop in mutant.operator.killers


def test_the_steps_that_a_mutant_changes_are_compared_first_and_alone(gemm):
    sound = Context(gemm, samples.ROWS, {})
    known = readings(gemm, sound.host, sound.hypotheses)
    assert len(known) > 1
    assert not refine(gemm, sound.host, sound.hypotheses, known).compared
    found = []
    for mutant in (*get("index_plus_1").mutants(gemm), *get("tma_coordinate").mutants(gemm)[:2]):
        context = Context(mutant.apply(gemm), samples.ROWS, {})
        looked = changed(context, known)
        assert {o.what for o in looked} <= {o.what for o in context.refinement.obligations}
        found += [a.verdict for a in Prover(recheck=False).prove(looked)]
    assert Verdict.REFUTED in found


def test_proofs_are_remembered_only_where_asked_for(monkeypatch):
    from verify.solve import Query

    asked = []
    solver = Query.solver
    monkeypatch.setattr(Query, "solver", lambda self, rlimit: asked.append(self.text) or solver(self, rlimit))
    extracted = samples.context(samples.exponentials()).extracted

    def check() -> int:
        asked.clear()
        decide(Context(extracted, samples.ROWS, {}))
        return len(asked)

    with remembering():
        first = check()
        assert check() < first
    assert check() >= first
    assert check() >= first


def outcome(fate, operator="guard_dropped", **more):
    return run.Outcome("key", 1, "kernel/variant", operator, 0, fate, "", "", "", "a", "b", 0.0, **more)


def test_the_rate_leaves_out_what_is_equivalent_and_counts_survivors():
    assert table.rate([outcome("REFUTED"), outcome("EQUIVALENT")]) == 100
    assert table.refuted_rate([outcome("REFUTED"), outcome("UNKNOWN")]) == 50
    assert table.rate([outcome("REFUTED"), outcome("SURVIVED")]) == 50
    assert table.rate([outcome("EQUIVALENT")]) is None


def test_replays_are_counted_by_how_they_confirm_and_what_is_left_is_said():
    confirmed = [outcome("REFUTED", replayed=True, by_run=True), outcome("REFUTED", replayed=True)]
    lines = [*table.summary([*confirmed, outcome("REFUTED", replayed=False), outcome("REFUTED")], 0)]
    assert lines[-1] == (
        "replay: 2 of 3 REFUTED are confirmed (66.67 %): 1 by runs, 1 by evaluation; 1 are not replayed"
    )


def test_what_runs_alone_refute_is_said():
    by_run = outcome("REFUTED", runs=1, replayed=True, by_run=True)
    first, *_ = table.summary([by_run, outcome("REFUTED"), outcome("UNKNOWN", runs=3)], 0)
    assert first.endswith("66.7 % REFUTED, 1 of them by a run alone")


def test_processes_are_shared_by_what_instances_take():
    pieces = [run.Work(f"{name}/1", "", (0,) * count) for name, count in (("c", 1), ("a", 30), ("b", 10))]
    found = forks.shared(pieces, {"a": 1.0, "b": 3.0}, 8)
    assert [(s.work.instance, s.width) for s in found] == [("a/1", 4), ("b/1", 4), ("c/1", 1)]


@pytest.mark.parametrize("width", [1, 3])
def test_processes_of_one_instance_take_each_item_once(width, monkeypatch, tmp_path):
    taken, threads = tmp_path / "taken", torch.get_num_threads()

    def finish(work, item, options):
        with taken.open("a") as file:
            file.write(f"{item}\n")

    monkeypatch.setattr(forks, "prepared", lambda *args: SimpleNamespace(prove=lambda: None))
    monkeypatch.setattr(forks, "finish", finish)
    work = run.Work("a/1", "", tuple(range(20)))
    assert not forks.run_instance(forks.Shared(work, width), run.Options())
    assert sorted(map(int, taken.read_text().split())) == list(range(20))
    torch.set_num_threads(threads)


def test_critical_operators_and_a_few_of_each_come_first_and_what_is_open_before_what_is_new():
    def item(operator, key):
        return classes.Class(classes.Listed("kernel/variant", operator, 0, key), 1)

    found = [item("index_plus_1", key) for key in "cba"] + [item("wait_removed", "d")]
    open_one = dataclasses.replace(outcome("PROVED", "index_plus_1"), key="c")
    (work,) = measure._work(found, {"c": open_one}, {"kernel/variant": ""}, run.Options(), ())
    keys = [getattr(i, "key", "") or i.chosen.key for i in work.items]
    assert keys == ["d", "a", "b", "c"]


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
    for instance in {i.spec.name: i for i in found}.values():
        assert next(instance.arguments(0)), instance.id


def test_a_reduction_is_long_enough_for_a_ring_to_go_round():
    found = {i.variant: i for i in instances.instances() if i.spec.name == "fp8_fp4_gemm_folded"}
    few, many = found["n6144-k7168-m16"], found["n4096-k4096-m128"]
    assert many.kwargs == many.small
    assert many.small["k"] < few.kwargs["k"] <= few.own["k"]
    assert next(few.arguments(0))[0].shape[1] == few.kwargs["k"]


def test_a_config_that_does_not_serve_the_small_dims_has_its_own_reduction():
    found = {i.variant: i for i in instances.instances() if i.spec.name == "fp8_gemm"}
    tiles = found["n65536-k1536-e8m0-m128x256x4"]
    assert tiles.small["k"] // 128 % tiles.own["config"].num_stages
    assert tiles.kwargs["k"] == tiles.own["k"] == 1536


def test_weights_are_enough_for_a_block():
    found = {i.variant: i for i in instances.instances() if i.spec.name == "fp8_gemm"}
    for variant, rows in (("n32768-k1024-e8m0-m128x256x4", 1024), ("n65536-k1536-e8m0-m64x128x4", 512)):
        assert found[variant].small["n"] < rows == found[variant].kwargs["n"]
        assert rows in {tensor.shape[0] for tensor in next(found[variant].arguments(0))}


def test_each_stage_of_a_ring_is_one_class_and_each_argument_another(gemm):
    def keys(name):
        return {classes.key_of("gemm", m, None) for m in get(name).mutants(gemm)}

    assert 1 == len(keys("barrier_init_removed")) < len(get("barrier_init_removed").mutants(gemm))
    assert len(keys("tma_descriptor")) == len(get("tma_descriptor").mutants(gemm))
    a, b = (m for m in get("tma_coordinate").mutants(gemm)[:2])
    assert classes.key_of("gemm", a, None) != classes.key_of("gemm", b, None)
    assert classes.key_of("gemm", a, None) != classes.key_of("other", a, None)


def test_a_kernel_behind_another_gets_what_that_one_made():
    """Of two launches the second is the kernel's: it takes e4m3, of which the first was given words."""
    instance = next(i for i in instances.instances() if i.spec.name == "fp8_fp4_gemm_widened")
    x, _, widened, factors, out = next(instance.arguments(seed=0))
    assert x.dtype == widened.dtype == torch.float8_e4m3fn
    assert widened.shape == (len(factors), x.shape[1])
    assert widened.float().any()
    assert out.shape == (len(x), len(widened))


def test_few_instances_stand_for_all_classes():
    def item(instance, key):
        return classes.Listed(instance, "index_plus_1", 0, key)

    found = [item("a", "1"), item("b", "1"), item("b", "2"), item("c", "2"), item("c", "3"), item("b", "4")]
    groups = classes.grouped(found)
    assert [(g.chosen.instance, g.chosen.key, g.members) for g in groups] == [
        ("b", "1", 2),
        ("b", "2", 2),
        ("b", "4", 1),
        ("c", "3", 1),
    ]


def test_a_class_of_several_instances_is_checked_on_the_cheapest():
    def listing(form, instance, *keys):
        return classes.Listing(form, tuple(classes.Listed(instance, "index_plus_1", 0, k) for k in keys))

    listings = {
        "a/most": listing("x", "a/most", "1", "2", "3"),
        "a/quick": listing("y", "a/quick", "2"),
        "a/slow": listing("z", "a/slow", "2", "3"),
        "a/like": listing("z", "a/like", "3"),
    }

    def chosen(*cheapest):
        _, found = measure.classes_of(listings, ["index_plus_1"], cheapest)
        return {c.chosen.key: (c.chosen.instance, c.members) for c in found}

    assert chosen() == {"1": ("a/most", 1), "2": ("a/most", 3), "3": ("a/most", 2)}
    ordered = chosen("a/quick", "a/like", "a/slow", "a/most")  # a/like is of a form that another stands for
    assert ordered == {"1": ("a/most", 1), "2": ("a/quick", 3), "3": ("a/slow", 2)}


def test_outcomes_are_kept_for_one_source_and_one_verifier(tmp_path, monkeypatch):
    kept = store.Store(tmp_path / "results.jsonl")
    kept.add_outcome("source", outcome("REFUTED"))
    found = classes.Listing("form", (classes.Listed("kernel/variant", "extent_plus_1", 3, "key"),))
    kept.add_listing("source", "kernel/variant", found)
    assert kept.outcomes({"kernel/variant": "source"})["key"]["fate"] == "REFUTED"
    assert not kept.outcomes({"kernel/variant": "other"})
    assert kept.listings({"kernel/variant": "source"}) == {"kernel/variant": found}
    monkeypatch.setattr(store, "stamp", lambda kind: "later")
    assert not kept.outcomes({"kernel/variant": "source"})


def test_recorded_results_are_one_line_for_each_class_and_count_before_a_run_s_own(tmp_path):
    run_s_own, recorded = store.Store(tmp_path / "results.jsonl"), tmp_path / "recorded.jsonl.xz"
    sources = {"kernel/variant": "source"}
    run_s_own.add_listing("source", "kernel/variant", classes.Listing("form", ()))
    for fate in ("PROVED", "EQUIVALENT"):
        run_s_own.add_outcome("source", outcome(fate))
    run_s_own.record(recorded, sources, frozenset({"key"}))
    clone = store.Store(None, recorded)
    assert clone.outcomes(sources) == run_s_own.outcomes(sources)
    assert clone.outcomes(sources)["key"]["fate"] == "EQUIVALENT"
    assert clone.listings(sources) == run_s_own.listings(sources)
    assert len(lzma.decompress(recorded.read_bytes()).splitlines()) == 2
    store.Store(tmp_path / "later.jsonl").add_outcome("source", outcome("REFUTED"))
    both = store.Store(tmp_path / "later.jsonl", recorded)
    assert both.outcomes(sources)["key"]["fate"] == "REFUTED"


def test_one_config_of_each_form_is_mutated_the_one_with_most_classes():
    def listing(form, *keys):
        return classes.Listing(form, tuple(classes.Listed("", "index_plus_1", 0, k) for k in keys))

    listings = {
        "a/1": listing("x", "1"),
        "a/2": listing("x", "1", "2"),
        "a/3": listing("y"),
        "b/1": listing("x"),
    }
    assert classes.by_form(listings) == {"a/1": "a/2", "a/2": "a/2", "a/3": "a/3", "b/1": "b/1"}


def test_a_form_is_of_lines_and_kinds_and_not_of_numbers(gemm):
    def form(extracted):
        return classes.form_of(extracted, classes.Places(extracted))

    changed = next(m for m in get("literal_changed").mutants(gemm)).apply(gemm)
    without = next(m for m in get("wait_removed").mutants(gemm)).apply(gemm)
    loops = [s for s, _ in rewrite.statements(gemm.device.body) if isinstance(s, ir.For)]
    loop = next(s for s in loops if s.kind == "unrolled")
    twice = rewrite.replace(gemm.device, loop, ir.Seq(None, (loop.body, loop.body)))
    assert form(changed) == form(gemm) == form(dataclasses.replace(gemm, device=twice))
    assert form(without) != form(gemm)


REQUEST = measure.Request(("fp4_dequant",), operators=("guard_dropped",), sample=1)


@pytest.fixture
def prepared_anew():
    run.prepared.cache_clear()
    yield
    run.prepared.cache_clear()


@pytest.mark.usefixtures("prepared_anew")
def test_a_kernel_that_is_not_proved_is_not_mutated(monkeypatch):
    def unproved(self, mutated, likely):
        raise BaselineError("REFUTED bounds: somewhere")

    monkeypatch.setattr(Judge, "kill", unproved)
    with pytest.raises(BaselineError, match="fp4_dequant/b32: REFUTED"):
        measure.measure(Workers(1, None), REQUEST)
    assert solve._remembered is None  # what else this process proves is asked anew


@pytest.mark.usefixtures("prepared_anew")
@pytest.mark.parametrize(
    ("verdict", "difference", "fate"),
    [
        (Verdict.PROVED, None, "EQUIVALENT"),
        (Verdict.UNKNOWN, None, "EQUIVALENT"),
        (Verdict.PROVED, Difference("refinement", "other bytes"), "SURVIVED"),
        (Verdict.UNKNOWN, Difference("refinement", "other bytes"), "REFUTED"),
        (Verdict.UNKNOWN, Difference("", "StepLimitError: no end"), "UNKNOWN"),
    ],
)
def test_what_no_property_refutes_is_equivalent_only_if_runs_say_so(
    verdict, difference, fate, monkeypatch, tmp_path, capsys
):
    def decided(context, likely, minimise, before, run, first):
        return (run() if verdict is Verdict.UNKNOWN else None) or Kill(verdict, "bounds", "why")

    monkeypatch.setattr(kill, "decide", decided)
    monkeypatch.setattr(Referee, "difference", lambda *args: difference)
    asked = dataclasses.replace(REQUEST, results=tmp_path / "results.jsonl", as_json=True)
    status = int(fate == "SURVIVED")
    assert measure.measure(Workers(1, None), asked) == status
    (mutant,) = json.loads(capsys.readouterr().out)["mutants"]
    assert mutant["fate"] == fate
    assert mutant["place"]
    monkeypatch.setattr(run, "_checked", lambda *args: pytest.fail("checked again"))
    assert measure.measure(Workers(1, None), asked) == status
    assert json.loads(capsys.readouterr().out)["mutants"] == [mutant]


@pytest.mark.usefixtures("prepared_anew")
def test_a_run_that_is_out_of_time_says_what_is_left_and_does_not_pass(capsys):
    asked = dataclasses.replace(REQUEST, minutes=-1, as_json=True)
    assert measure.measure(Workers(1, None), asked) == 1
    assert json.loads(capsys.readouterr().out)["undecided"] == 1


def test_what_selects_nothing_is_an_error():
    with pytest.raises(TaskError, match="no operator"):
        measure.measure(Workers(1, None), measure.Request(operators=("no_such",)))
    with pytest.raises(TaskError, match="nothing to mutate"):
        measure.measure(Workers(1, None), measure.Request(("no_such",)))


def test_mutants_need_no_second_solver(monkeypatch):
    def absent(*args, **kwargs):
        raise ModuleNotFoundError("cvc5")

    monkeypatch.setattr(bitvectors, "_cvc5", absent)
    monkeypatch.setattr(Prover, "_cvc5_run", absent)
    a, b = z3.BitVecs("a b", 32)
    product = bitvectors.Question("products commute", (), a * b == b * a)
    x, y, z = z3.Ints("x y z")
    hard = Obligation("no cubes", None, (), x * x * x + y * y * y + z * z * z != 114, {})
    with by_z3_alone():
        bitvectors.decide_text.cache_clear()
        assert product.decide().is_valid
        assert [a.verdict for a in Prover(rlimit=1000).prove([hard])] == [Verdict.UNKNOWN]
    bitvectors.decide_text.cache_clear()
    with pytest.raises(ModuleNotFoundError):
        product.decide()
    with pytest.raises(ModuleNotFoundError):
        Prover(rlimit=1000).prove([hard])


def test_a_condition_that_is_a_variable_is_negated_where_it_stands():
    flag, body = ir.Var(ir.BOOL, "flag"), ir.Seq(None, ())
    branch = ir.If(None, flag, body, None)
    ((old, new),) = get("guard_negated").make(branch, ())
    assert old is branch
    assert isinstance(new.cond, ir.Not)
    assert new.cond.a is flag
