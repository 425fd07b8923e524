"""Counterexamples are confirmed by a run, at shapes of any size; invented ones are not."""

import importlib
from functools import cache
from pathlib import Path

import pytest
import torch
from tilelang import language as T

from dsv4_kernels import registry
from dsv4_kernels.contract import Contract
from tests.verify import samples
from tests.verify.device import build, ring
from tests.verify.device.build import edit, is_call
from tests.verify.device.test_kernels import stages
from verify import host
from verify.confirm import confirm, shapes_of
from verify.extract import extract, tile_function
from verify.interp import device
from verify.interp.device import errors, outcome
from verify.interp.device.run import Checks, Run
from verify.interp.device.schedule import hurrying, starving
from verify.mutate.instances import instances
from verify.mutate.kill import Judge
from verify.mutate.operators import get as get_operator
from verify.properties import Context
from verify.tasks import load_file
from verify.verdict import Counterexample, Verdict

FOLDER = Path(__file__).parent.parent / "broken"


def refuted(name, property_name):
    """Return a broken kernel's stages and the counterexample of its refutation."""
    module = load_file(FOLDER / f"{name}.py")
    ((kernel, prim_func),) = module.KERNELS.items()
    extracted = extract(prim_func)
    context = Context(extracted, Contract(module.CONTRACTS[kernel]), {})
    result = samples.verdict(context, property_name)
    example = next(f.counterexample for f in result.findings if f.verdict is Verdict.REFUTED)
    return extracted, example


@pytest.mark.parametrize(
    ("name", "property_name", "kind"),
    [
        ("act_quant_shared_overrun", "bounds", device.OutOfBoundsError),
        ("fp4_quant_missing_guard", "bounds", device.OutOfBoundsError),
        ("act_quant_grid_overflow", "overflow", device.LaunchError),
        ("act_quant_tile_overlap", "coverage", device.DataRaceError),
        ("act_quant_lost_tail", "coverage", type(None)),
    ],
)
def test_refutations_are_confirmed(name, property_name, kind):
    extracted, example = refuted(name, property_name)
    found = device.replay(extracted, example, property_name)
    assert found.confirmed, found.note
    assert isinstance(found.fault, kind)
    if kind is device.OutOfBoundsError:
        assert found.exact


def test_an_invented_counterexample_is_not_confirmed():
    extracted = stages("act_quant/b32")
    example = Counterexample({"num_blocks": 2**31 - 256}, {"bx": 33554427}, {"tx": 127}, {}, {})
    for name in ("bounds", "overflow", "race", "alignment"):
        found = device.replay(extracted, example, name)
        assert not found.confirmed
        assert found.fault is None


def test_a_budget_is_of_all_runs_together():
    extracted = stages("act_quant/b32")
    example = Counterexample({"num_blocks": 3}, {"bx": 0}, {"tx": 0}, {}, {})
    budget = outcome.Budget(each=1000, left=100)
    found = device.replay(extracted, example, "race", max_steps=budget)
    assert not found.confirmed
    assert budget.left == 0
    assert 1 <= found.runs < device.replay(extracted, example, "race").runs


def test_a_fault_that_the_kernel_has_before_the_edit_confirms_nothing(monkeypatch):
    extracted, example = refuted("act_quant_shared_overrun", "bounds")
    assert device.replay(extracted, example, "bounds").confirmed
    assert device.replay(extracted, example, "bounds", sound=extracted).confirmed  # zeros are legal contents
    module = importlib.import_module("verify.interp.device.replay")
    monkeypatch.setattr(module, "_TRIALS", tuple(t for t in module._TRIALS if t[0] != "zeros"))
    assert device.replay(extracted, example, "bounds").confirmed
    assert not device.replay(extracted, example, "bounds", sound=extracted).confirmed


def test_results_are_compared_block_by_block(monkeypatch):
    extracted = samples.context(samples.exponentials()).extracted
    mutated = get_operator("index_plus_1").mutants(extracted)[0].apply(extracted)
    shape = {"m": 40}
    runs = []
    tile = outcome.interp.run_function
    monkeypatch.setattr(outcome.interp, "run_function", lambda *args: runs.append(args) or tile(*args))
    assert outcome.difference(extracted, shape) is None
    assert "elements of" in str(outcome.difference(mutated, shape))
    assert len(runs) == 1  # both have one tile program


@pytest.mark.parametrize("number", [0, 1])
def test_a_claim_about_index_data_is_run_with_the_data_of_the_model(number):
    """No fixed contents show that a row is past the end: the model says which one is."""
    instance = next(i for i in instances() if i.spec.name == "state_write")
    extracted = instance.extract()
    judge = Judge(extracted, instance.spec.contract, instance.dims, instance.dispatch, minimise=True)
    mutated = get_operator("guard_dropped").mutants(extracted)[number].apply(extracted)
    killed = judge.kill(mutated, ("bounds",))
    assert killed.verdict is Verdict.REFUTED
    assert killed.evaluated.startswith("evaluated:")  # with what the model says that memory holds
    assert killed.counterexample is not None
    assert any(name.endswith("]") for name in killed.counterexample.values)
    shown = confirm(
        judge.context(mutated), killed.counterexample, killed.prop, killed.message, sound=extracted
    )
    assert shown.confirmed, shown.note
    assert shown.by_run


ROWS = Contract(("0 <= m", "m <= 8", "0 <= n", "n <= 8"))


@cache
def gathered(is_short, is_guarded=True):
    """Stages of a kernel that keeps two entries of a table; `is_short`: a third one has no place."""
    m, n = T.dynamic("m"), T.dynamic("n")

    @T.prim_func
    def kernel(rows: T.Tensor[(m,), T.int32], table: T.Tensor[(n,), T.int32], out: T.Tensor[(1,), T.int32]):
        with T.Kernel(1, threads=32) as _:
            kept = T.alloc_local((2,), T.int32)
            for k in T.serial(m):
                kept[k if is_short else k % 2] = T.if_then_else(
                    n > 0 if is_guarded else True, table[rows[k]], 0
                )
            if T.get_thread_binding() == 0:
                out[0] = kept[0]

    without_guards_of_its_own = {"tl.disable_safe_memory_legalize": True}
    return extract(kernel, pass_configs=without_guards_of_its_own)


def test_a_model_with_an_empty_tensor_is_run_as_it_is():
    """Only the third round has the fault, and the small shape that would stand for the model's has one."""
    context = Context(gathered(True), ROWS, {})
    example = Counterexample({"m": 3, "n": 0}, {}, {}, {}, {})
    shown = confirm(context, example, "bounds", sound=gathered(False))
    assert shown.confirmed, shown.note
    assert shown.by_run
    assert [s["m"] for s in shapes_of(context, example)] == [1, 3]  # an empty tensor has no results


def test_rows_of_an_empty_tensor_confirm_nothing_that_the_kernel_has_too():
    unguarded = gathered(False, is_guarded=False)
    example = Counterexample({"m": 3, "n": 0}, {}, {}, {}, {})
    assert device.replay(unguarded, example, "bounds", sound=gathered(False)).confirmed
    assert not device.replay(unguarded, example, "bounds", sound=unguarded).confirmed


def test_elements_that_become_addresses_by_way_of_another_array_are_indices():
    spec = next(s for s in registry.all_kernels() if s.name == "cache_read")
    tile = tile_function(spec.make_kernel(**spec.variants[0].kwargs))
    assert "places" in {data.name for data in outcome._indices(tile)}
    dims = {"pages": 3, "m": 65}
    position = next(n for n, p in enumerate(tile.params) if tile.buffers[p].name == "places")
    near, far = (
        (outcome.inputs(tile, dims, indices=chosen, max_bytes=1 << 26) or [])[position]
        for chosen in (None, outcome._far(dims))
    )
    assert isinstance(near, torch.Tensor)
    assert isinstance(far, torch.Tensor)
    assert set(near.tolist()) == {0, 1}
    assert far.max() > 3 * 64 - 1  # past the last row of the cache


def _phases(count, policy):
    """Run two warps that each arrive at an mbarrier for `count` threads; return the phase of each arrival."""
    bars = build.buffer("bars", "uint64", 1, "shared.barrier")
    bar = build.load(bars, 0)
    init = build.call("ptx_init_barrier_thread_count", bar, count)
    body = [
        build.when(build.op("eq", build.TX, 0), init),
        build.sync(),
        build.when(build.op("lt", build.TX, 32), build.call("ptx_arrive_barrier", bar)),
        build.when(build.op("ge", build.TX, 32), build.call("ptx_arrive_barrier", bar)),
    ]
    function = build.Kernel(threads=64, allocs=[bars], body=body).function
    made = Run(
        function, host.Host({}, {}, {}, {}, ()), {}, {}, policy=policy, seed=0, checks=Checks(), view_sizes={}
    )
    made.landings = {}
    made.execute()
    return {thread: phase for (_, _, thread, _), (_, phase) in made.landings.items()}


def test_arrivals_are_noted_with_their_phase():
    """One warp completes a phase: which of them lands in the first depends on who is late, or hurries."""
    first, second = set(range(32)), set(range(32, 64))
    for late, policy in ((first, starving(0)), (second, starving(32)), (second, hurrying(0, late=True))):
        phases = _phases(32, policy)
        assert {t for t, phase in phases.items() if phase == 1} == late
        assert set(_phases(64, policy).values()) == {0}


def test_an_mbarrier_that_nothing_orders_after_its_initialisation_is_a_race():
    extracted = edit(ring.ring(), lambda n: None if is_call(n, "ptx_init_barrier_thread_count") else n)
    found = device.replay(extracted, Counterexample({}, {}, {}, {}, {}), "race")
    assert found.confirmed
    assert isinstance(found.fault, errors.BarrierInitError)
