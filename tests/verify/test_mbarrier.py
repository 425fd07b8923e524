"""Property mbarrier: protocols that hold for every trip count, and each way to break them."""

from functools import cache, partial

import pytest

from dsv4_kernels.contract import Contract
from tests.verify import barrier_kernels as kernels
from tests.verify import edits, samples
from verify import ir
from verify.engine import check
from verify.interp.device.replay import replay
from verify.properties import Context
from verify.properties.mbarrier import PROPERTY, Mbarrier
from verify.sync.phases import Phases
from verify.sync.rehearsal import find_fault
from verify.verdict import Verdict

ROWS = Contract(("0 <= m", "m <= 65536"))
SLOW = pytest.param(kernels.persistent, marks=pytest.mark.slow)
WAIT, ARRIVE, LOAD = "mbarrier_wait_parity", "ptx_arrive_barrier", "tma_load"
EXPECT, ARRIVE_EXPECT = "mbarrier_expect_tx", "ptx_arrive_barrier_expect_tx"
INIT = "ptx_init_barrier_thread_count"


class Alone(Mbarrier):
    """The property without those it rests on."""

    depends = ()


def result_of(extracted):
    report = check("kernel", "variant", extracted, ROWS, {}, properties=[Alone()])
    return report.properties[0]


@pytest.mark.parametrize("kernel", [kernels.by_hand, kernels.attention, kernels.counted, kernels.waves, SLOW])
def test_a_protocol_is_proved_for_every_trip_count(kernel):
    result = result_of(samples.extracted(kernel()))
    assert result.verdict is Verdict.PROVED, result.findings
    assert result.obligations > 30
    (assumption,) = result.assumptions
    assert "elect.sync" in assumption


@pytest.mark.parametrize(
    "kernel", [partial(kernels.by_hand, loading=kernels.ROLE), partial(kernels.waves, narrow=False)]
)
def test_warps_that_wait_and_arrive_nowhere_may_hang(kernel):
    extracted = samples.extracted(kernel())
    result = result_of(extracted)
    finding = next(f for f in result.findings if f.verdict is Verdict.REFUTED)
    assert "deadlock" in finding.message
    assert "one_warp" in finding.message
    example = finding.counterexample
    assert example is not None
    assert int(example.values["late"]) % kernels.ROLE == kernels.WARP
    shown = replay(extracted, example, "mbarrier")
    assert "DeadlockError" in type(shown.fault).__name__
    assert shown.runs == 1  # under the schedule that the finding names


def test_a_correct_protocol_has_no_fault_in_any_schedule_tried():
    context = Context(samples.extracted(kernels.waves()), ROWS, {})
    assert find_fault(context, Phases(context)) is None


def test_a_kernel_without_mbarriers_has_nothing_to_prove():
    result = result_of(samples.extracted(samples.scale_rows()))
    assert (result.verdict, result.obligations) == (Verdict.PROVED, 0)
    assert result.notes == ["the kernel has no mbarrier"]


def modulus(old, new):
    def change(expr):
        match expr:
            case ir.BinOp(op="floormod" | "truncmod", b=ir.Const(value=value)) if value == old:
                return ir.BinOp(expr.dtype, expr.op, expr.a, ir.Const(expr.dtype, new))
        return None

    return lambda e: edits.replaced(e, change)


def parity_of_the_round(expr):
    """`ko % 2` for `ko % 6 // 3`: the phase would change at every stage."""
    return ir.BinOp(expr.dtype, "floormod", expr.a.a, ir.Const(expr.dtype, 2))


def not_carried():
    """Count the phases of each tile from 0 again: the counters give way to the inner loop's."""
    inner: list[ir.Var] = []

    def change(expr):
        counter = isinstance(expr, ir.Load) and "phase_cnt" in expr.buffer.name
        return inner[-1] if counter else None

    count = edits.every_call((WAIT, ARRIVE, ARRIVE_EXPECT, EXPECT, LOAD), change)

    def edit(node):
        if isinstance(node, ir.For) and node.var.name == "ko":
            inner.append(node.var)
        return count(node) if inner else None

    return edit


@cache
def broken():
    """Return name -> (kernel, edit, what the finding says)."""
    by_hand = kernels.by_hand
    return {
        "flip of an empty wait dropped": (
            by_hand,
            edits.with_argument(WAIT, 0, 1, edits.unflipped),
            "deadlock",
        ),
        "parity by the round": (by_hand, edits.with_argument(WAIT, 1, 1, parity_of_the_round), "deadlock"),
        "arrival dropped": (by_hand, edits.dropped(ARRIVE, 0), "deadlock"),
        "arrival dropped, over waves": (kernels.waves, edits.dropped(ARRIVE, 0), "deadlock"),
        "full wait dropped": (by_hand, edits.dropped(WAIT, 1), "deadlock"),
        "empty wait dropped": (by_hand, edits.dropped(WAIT, 0), "more arrivals in a phase"),
        "count too small": (
            by_hand,
            edits.with_argument(INIT, 4, 1, edits.shifted(-1)),
            "one phase or another",
        ),
        "count too large": (by_hand, edits.with_argument(INIT, 4, 1, edits.shifted(1)), "deadlock"),
        "too many bytes expected": (
            by_hand,
            edits.with_argument(ARRIVE_EXPECT, 0, 1, edits.shifted(128)),
            "deadlock",
        ),
        "bytes of one load not expected": (by_hand, edits.dropped(EXPECT, 0), "deadlock"),
        "stages of a wait": (by_hand, edits.with_argument(WAIT, 1, 0, modulus(3, 2)), "deadlock"),
        "stages of an arrival": (by_hand, edits.with_argument(ARRIVE, 0, 0, modulus(3, 2)), "deadlock"),
        "producer stops early": (by_hand, edits.fewer_rounds(0), "deadlock"),
        "phase not carried over tiles": (kernels.waves, not_carried(), "deadlock"),
        "phase not carried, T.Persistent": (kernels.persistent, not_carried(), "deadlock"),
        "slot not initialised": (by_hand, edits.dropped(INIT, 2), "is initialised"),
        "no barrier after initialisation": (
            by_hand,
            edits.dropped("tvm_storage_sync", 0),
            "initialisation is seen",
        ),
    }


@pytest.mark.parametrize("name", list(broken()))
def test_a_broken_protocol_is_refuted_by_a_run(name):
    kernel, edit, says = broken()[name]
    result = result_of(edits.edited(kernel(), edit))
    assert result.verdict is Verdict.REFUTED, result.findings
    finding = next(f for f in result.findings if f.verdict is Verdict.REFUTED)
    assert says in finding.message
    example = finding.counterexample
    assert example is not None
    ROWS.check("kernel", **example.shape)
    assert example.block
    assert "slot" in example.values or "why" in example.values


def test_threads_need_no_fence_of_the_initialisation():
    """TMA does, which `race` shows."""
    edit = edits.dropped("ptx_fence_barrier_init", 0)
    assert result_of(edits.edited(kernels.by_hand(), edit)).verdict is Verdict.PROVED


def test_a_consumer_that_stops_early_leaves_phases_without_a_wait():
    assert result_of(edits.edited(kernels.by_hand(), edits.fewer_rounds(1))).verdict is Verdict.PROVED


def test_the_property_rests_on_integers_that_do_not_wrap():
    assert PROPERTY.depends == ("overflow", "bounds")
