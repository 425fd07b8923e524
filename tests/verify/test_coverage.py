"""Property coverage: every output element exactly once."""

from functools import cache
from typing import Any

import pytest
import z3
from tilelang import language as T

from dsv4_kernels.contract import Contract
from tests.verify import samples
from verify import ir, lemma
from verify.encode import Hypothesis, Index
from verify.inverse import Axis, Digit, NotDigitsError, Sum, candidate, decompose
from verify.verdict import Verdict


@pytest.mark.parametrize("kernel", samples.SOUND, ids=lambda k: k.__name__)
def test_sound_kernels_are_proved(kernel):
    result = samples.verdict(samples.context(kernel()), "coverage")
    assert result.verdict is Verdict.PROVED, result.findings


def refuted(context, text: str) -> Any:
    result = samples.verdict(context, "coverage")
    found = [f for f in result.findings if f.verdict is Verdict.REFUTED and text in f.message]
    assert found, result.findings
    return found[0].counterexample


def branches_around(context, name: str) -> list[tuple[Any, Any]]:
    found = []
    for branch in samples.nodes(context.extracted.device, ir.If):
        for node in ir.walk(branch.then):
            if isinstance(node, ir.Store) and node.buffer.data.name == name:
                found.append((branch, node))
    return found


def test_a_dropped_replication_guard_writes_twice():
    context = samples.context(samples.scale_rows())
    replicated = [b for b, _ in branches_around(context, "scale") if b.cond.op == "eq"]
    assert replicated
    replicated[0].cond = ir.Const(ir.BOOL, True)
    example = refuted(context, "written twice")
    assert example.values["tx'"] != example.thread["tx"] or example.values["bx'"] != example.block["bx"]


def test_a_guard_that_is_too_tight_leaves_elements_out():
    context = samples.context(samples.scale_rows())
    branch = next(b for b, _ in branches_around(context, "scale") if b.cond.op == "lt")
    branch.cond.b = samples.plus(branch.cond.b, -1)
    example = refuted(context, "no thread writes it")
    assert example.values["element"] == example.shape["m"] - 1


def test_a_grid_that_is_too_small_leaves_a_tma_tile_out():
    context = samples.context(samples.gemm_tma_store())
    for launch in samples.nodes(context.extracted.device, ir.Launch, lambda s: s.tag == "blockIdx.y"):
        launch.extent = ir.BinOp(ir.INT32, "floordiv", launch.extent.a.a, ir.Const(ir.INT32, 64))
    refuted(context, "no thread writes it")


@cache
def rows_of_slots():
    """Copies of numbered rows, which go out by TMA; the caller promises where the numbers lie."""
    m = T.dynamic("m")

    @T.prim_func
    def rows_of_slots_kernel(
        table: T.Tensor[(256, 64), T.bfloat16],
        slot: T.Tensor[(m,), T.int32],
        out: T.Tensor[(m, 64), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, 64), threads=128) as bm:
            rows = T.alloc_shared((64, 64), T.bfloat16)
            for i, j in T.Parallel(64, 64):
                rows[i, j] = T.if_then_else(bm * 64 + i < m, table[slot[bm * 64 + i], j], 0)
            T.copy(rows, out[bm * 64, 0])

    return rows_of_slots_kernel


def test_what_is_promised_of_the_data_does_not_depend_on_the_lane_that_stores():
    context = samples.context(rows_of_slots(), Contract((*samples.ROWS.clauses, "0 <= slot < 256")))
    assert samples.calls(context.extracted.device, "tma_store")
    result = samples.verdict(context, "coverage")
    assert result.verdict is Verdict.PROVED, result.findings


def test_a_tma_store_by_every_lane_writes_twice():
    context = samples.context(samples.gemm_tma_store())
    elected = [
        b
        for b in samples.nodes(context.extracted.device, ir.If)
        if any(isinstance(n, ir.Call) and n.op == "tma_store" for n in ir.walk(b.then))
        and any(isinstance(n, ir.Call) and n.op == "tl_shuffle_elect" for n in ir.walk(b.cond))
    ]
    assert elected
    elected[-1].cond = ir.Const(ir.BOOL, True)
    refuted(context, "written twice")


def test_two_stores_to_one_place_are_refuted():
    context = samples.context(samples.scale_rows())
    branch, store = branches_around(context, "scale")[-1]
    again = ir.Store(store.span, store.buffer, store.indices, store.value)
    branch.then = ir.Seq(None, (branch.then, again)) if branch.then is store else branch.then
    if branch.then is not store and again not in list(ir.walk(branch.then)):
        branch.then = ir.Seq(None, (branch.then, again))
    refuted(context, "written twice")


def test_a_store_under_a_condition_on_data_is_not_proved():
    context = samples.context(samples.scale_rows())
    branch, _ = branches_around(context, "scale")[0]
    amax = samples.nodes(context.extracted.device, ir.Store, lambda s: s.buffer.scope == "local")[0]
    value = ir.Load(amax.buffer.dtype, amax.buffer, (ir.Const(ir.INT32, 0),))
    positive = ir.BinOp(ir.BOOL, "gt", value, ir.Const(value.dtype, 0.0))
    branch.cond = ir.BinOp(ir.BOOL, "and", branch.cond, positive)
    assert samples.verdict(context, "coverage").verdict in (Verdict.UNKNOWN, Verdict.REFUTED)


def forgotten_scale():
    """A kernel that never stores one of its outputs."""
    m = T.dynamic("m")

    @T.prim_func
    def forgotten_scale_kernel(
        x: T.Tensor[(m, 128), T.float32], y: T.Tensor[(m, 128), T.float32], scale: T.Tensor[(m,), T.float32]
    ):
        with T.Kernel(m, threads=128) as row:
            for i in T.Parallel(128):
                y[row, i] = x[row, i] * 2.0

    return forgotten_scale_kernel


def test_a_tensor_that_no_statement_touches_is_not_proved():
    result = samples.verdict(samples.context(forgotten_scale()), "coverage")
    assert result.verdict is Verdict.UNKNOWN
    assert any("scale is never accessed" in f.message for f in result.findings)


def test_an_election_combined_with_a_lane_is_not_proved():
    context = samples.context(samples.gemm_tma_store())
    branch = next(
        b
        for b in samples.nodes(context.extracted.device, ir.If)
        if any(isinstance(n, ir.Call) and n.op == "tma_store" for n in ir.walk(b.then))
        and any(isinstance(n, ir.Call) and n.op == "tl_shuffle_elect" for n in ir.walk(b.cond))
    )
    launches = samples.nodes(context.extracted.device, ir.Launch, lambda s: s.tag == "threadIdx.x")
    zero = ir.Const(ir.INT32, 0)
    lane = ir.BinOp(ir.INT32, "floormod", launches[0].var, ir.Const(ir.INT32, 32))
    branch.cond = ir.BinOp(ir.BOOL, "and", branch.cond, ir.BinOp(ir.BOOL, "eq", lane, zero))
    assert samples.verdict(context, "coverage").verdict is not Verdict.PROVED


def test_an_assumption_about_shapes_is_used_and_listed():
    context = samples.context(samples.scale_rows())
    guards = [b for b, _ in branches_around(context, "scale") if b.cond.op == "lt"]
    body = context.extracted.device.body
    m = next(p for p in context.extracted.device.params if p.dtype.is_int)
    rows = ir.BinOp(ir.INT32, "floormod", m, ir.Const(ir.INT32, 32))
    cond = ir.BinOp(ir.BOOL, "eq", rows, ir.Const(ir.INT32, 0))
    object.__setattr__(context.extracted.device, "body", ir.Assume(None, cond, body))
    for guard in guards:
        guard.cond = ir.Const(ir.BOOL, True)
    result = samples.verdict(context, "coverage")
    assert result.verdict is Verdict.PROVED, result.findings
    result = samples.verdict(context, "bounds")
    assert result.verdict is Verdict.PROVED, result.findings
    assert any(a.startswith("ASSUMED assume (m % 32) == 0") for a in result.assumptions)


def test_what_is_assumed_in_a_branch_is_no_assumption_about_the_call():
    context = samples.context(samples.scale_rows())
    branch, _ = branches_around(context, "scale")[-1]
    m = next(p for p in context.extracted.device.params if p.dtype.is_int)
    large = ir.BinOp(ir.BOOL, "gt", m, ir.Const(ir.INT32, 100))
    branch.then = ir.If(None, large, ir.Assume(None, large, branch.then), None)
    refuted(context, "every element of scale is written")


def test_leaving_the_kernel_early_is_unsupported():
    context = samples.context(samples.scale_rows())
    sync = samples.calls(context.extracted.device, "call_extern")[0]
    sync.op, sync.args = "thread_return", ()
    assert samples.verdict(context, "coverage").verdict is Verdict.UNSUPPORTED


def test_an_index_comes_apart_into_digits():
    b, t = z3.Ints("b t")
    term = b * 4096 + t / 8 * 128 + t % 8 * 16 - 64
    digits = {Digit("b", 1, None): 4096, Digit("t", 8, None): 128, Digit("t", 1, 8): 16}
    assert decompose(term, {"b": None, "t": 128}) == Sum(-64, digits)


def test_nested_digits_and_sums_are_taken_apart():
    i, v = z3.Ints("i v")
    extents = {"i": 8, "v": 4}
    assert decompose((i * 4 + v) / 8, extents) == Sum(0, {Digit("i", 2, None): 1})
    assert decompose((i * 4 + v) % 8, extents) == Sum(0, {Digit("i", 1, 2): 4, Digit("v", 1, None): 1})
    assert decompose(i % 4 / 2, extents) == Sum(0, {Digit("i", 2, 2): 1})


def test_what_is_no_sum_of_digits_is_refused():
    i, j = z3.Ints("i j")
    with pytest.raises(NotDigitsError):
        decompose(i * j, {"i": 8, "j": 8})
    with pytest.raises(NotDigitsError):
        decompose((i + j) / 3, {"i": 8, "j": 8})


@pytest.mark.parametrize("least", [0, 32, 5])
def test_the_least_value_of_a_digit_is_that_of_its_own_bounds(least):
    tx = z3.Int("tx")
    index = Index(ir.Var(ir.INT32, "tx"), tx, z3.IntVal(0), z3.IntVal(128), "threadIdx.x")
    bound = Hypothesis("bound", "guard", z3.And(tx >= least, tx < 128))
    inverse = candidate((Axis(tx * 4, 4),), (index,), (bound,))
    assert inverse.low == {Digit("tx", 1, None): least}


@pytest.mark.parametrize("name", ["x", "y"])
def test_a_lemma_that_fails_is_not_one_that_holds_of_other_bounds(name):
    prover, value = lemma.small_prover(), z3.Int(name)
    for _ in range(2):
        for bound, holds in ((5, False), (3, True)):
            given = (Hypothesis("bound", "guard", value < bound),)
            assert lemma.holds(prover, given, value < 4) is holds
    assert prover.queries <= 1, "what is known by its text is not asked again"


def test_a_lemma_about_data_of_one_type_is_not_one_about_another(monkeypatch):
    class Unsure(z3.Solver):
        def check(self, *assumptions):
            return z3.unknown

    monkeypatch.setattr(lemma, "look", lambda terms: Unsure())
    for dtype, holds in (("uint8", True), ("int32", False)):
        data = z3.Int(f"data!{dtype}~x")
        assert lemma.holds(lemma.small_prover(), (), data <= 255) is holds
