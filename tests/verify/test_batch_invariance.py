"""batch_invariance: rows that see the batch, dispatchers that change the order, and sound kernels."""

from typing import Any

import pytest

from dsv4_kernels import registry
from tests.verify import invariance_kernels as kernels
from tests.verify import round_kernels as rounds
from tests.verify.refinement_kernels import halves_of_k
from tests.verify.samples import ROWS, exponentials, extracted, gemm, scale_rows
from verify import extract, ir
from verify.engine import check
from verify.properties import all_properties, batch_invariance
from verify.refine.inline import rewrite
from verify.signature.choice import UndecidedError, batch_bounds, may_meet, ranges
from verify.signature.dispatch import Dispatch, dispatch_of
from verify.signature.rounds import MAX_BACK
from verify.signature.rows import signature
from verify.verdict import Verdict, worst

PROPERTY = next(p for p in all_properties() if p.name == "batch_invariance")


def verdict(prim_func, siblings=None, select=None, batch_dims: Any = ("m",), shared: Any = None) -> Any:
    """Check the property alone, without regard to what it depends on."""
    dispatch = Dispatch(batch_dims, "own", {}, siblings or {}, select, shared_rows=shared or {})
    report = check("test", "own", extracted(prim_func), ROWS, {}, properties=[PROPERTY], dispatch=dispatch)
    (result,) = report.properties
    result.findings = [f for f in result.findings if not f.message.startswith("rests on")]
    result.verdict = worst(f.verdict for f in result.findings)
    return result


@pytest.mark.parametrize(
    ("prim_func", "message"),
    [
        (kernels.scaled_rows(32, leak=1), "a row reads scale"),
        (kernels.numbered_rows(), "depends on where the row lies"),
        (kernels.split_sums(True), "depends on the batch"),
        (kernels.tile_amax(), "a row reads x"),
        (kernels.rotated_sums(), "which element depends on the position"),
        (kernels.digit_counts(leak=1), "depends on where the row lies"),
    ],
    ids=["leak", "numbered", "split by the batch", "tile amax", "rotated by the batch", "counted by place"],
)
def test_rows_that_see_the_batch_are_refuted(prim_func, message):
    result = verdict(prim_func)
    assert result.verdict is Verdict.REFUTED, result.findings
    assert message in result.findings[0].message
    example = result.findings[0].counterexample
    assert example.values["first run"] != example.values["second run"]
    assert {"m", "row", "m'", "row'"} <= example.values.keys()
    assert 0 <= example.values["row'"] < example.values["m'"]


@pytest.mark.parametrize(
    "prim_func",
    [
        kernels.scaled_rows(32),
        kernels.clamped_rows(),
        kernels.split_sums(False),
        kernels.chunked_sums(16),
        kernels.reduced_rows(32, 128),
        kernels.chosen_elements(0),
        kernels.digit_counts(),
        kernels.product(64, 64),
        scale_rows(),
        exponentials(),
        gemm(),
    ],
)
def test_rows_of_their_own_are_proved(prim_func):
    result = verdict(prim_func)
    assert result.verdict is Verdict.PROVED, result.findings
    assert result.facts["signature"]


def test_a_choice_that_depends_on_the_position_is_not_proved():
    assert verdict(kernels.chosen_elements(1)).verdict is not Verdict.PROVED


def by_size(dims):
    return "own" if dims["m"] <= 64 else "other"


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (kernels.scaled_rows(32), kernels.scaled_rows(16)),
        (kernels.chunked_sums(64), kernels.chunked_sums(16)),
        (kernels.reduced_rows(32, 128), kernels.reduced_rows(64, 256)),
        (kernels.product(64, 64), kernels.product(128, 32)),
        (kernels.column_scales(True), kernels.column_scales(False)),
        (kernels.column_tiles(), kernels.column_scales(False)),
        (kernels.moving_sums(2), kernels.chunked_sums(16)),
        (kernels.moving_sums(3), kernels.chunked_sums(64)),
    ],
    ids=[
        "tile height",
        "chunks of a loop",
        "one tree of two layouts",
        "chunks of K",
        "halves of a tile",
        "halves of several tiles",
        "sums in two places",
        "sums in three places",
    ],
)
def test_variants_with_one_order_are_proved(own, other):
    result = verdict(own, {"other": lambda: other}, by_size)
    assert result.verdict is Verdict.PROVED, result.findings
    assert "own for 0 <= m <= 64; other for 65 <= m <= 65536" in " ".join(result.notes)


def test_a_variant_that_many_are_compared_with_is_followed_once(monkeypatch):
    followed = []

    def counted(function, *args):
        followed.append(function)
        return signature(function, *args)

    monkeypatch.setattr(batch_invariance, "signature", counted)
    monkeypatch.setattr(batch_invariance, "_kept", {})
    other = kernels.scaled_rows(16)
    own = kernels.scaled_rows(32)
    first, second = (verdict(own, {"other": lambda: other}, by_size) for _ in range(2))
    assert (first.verdict, first.facts) == (second.verdict, second.facts)
    assert first.verdict is Verdict.PROVED
    assert len(followed) == 3  # `own` is lowered each time, `other` is not
    verdict(own, {"other": lambda: other}, by_size, shared={"x": 2})
    assert len(followed) == 5  # to share rows is another question
    lowered = extract.lowered(other, None, extract.source_sha256(other))
    check("test", "other", lowered, ROWS, {}, properties=[PROPERTY], dispatch=Dispatch(("m",), "other"))
    assert len(followed) == 5  # nor is it for its own sake


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (kernels.chunked_sums(16), kernels.chunked_sums(16, is_reversed=True)),
        (kernels.split_sums(False), kernels.chunked_sums(16)),
    ],
    ids=["reversed", "split"],
)
def test_a_dispatcher_whose_variants_differ_is_refuted(own, other):
    result = verdict(own, {"other": lambda: other}, by_size)
    assert result.verdict is Verdict.REFUTED, result.findings
    assert "own and other compute out in different ways" in result.findings[0].message
    example = result.findings[0].counterexample
    assert example.values["m"] <= 64 < example.values["m'"]


def test_halves_that_read_what_is_the_other_halfs_are_told_apart():
    own = kernels.column_scales(False)
    for other in (kernels.column_scales(True, swapped=1), kernels.column_tiles(swapped=1)):
        assert verdict(own, {"other": lambda other=other: other}, by_size).verdict is not Verdict.PROVED


def test_sums_that_are_read_where_none_moved_to_are_told_apart():
    own, other = kernels.moving_sums(3, late=1), kernels.chunked_sums(16)
    assert verdict(own, {"other": lambda: other}, by_size).verdict is not Verdict.PROVED


def test_rows_of_a_product_have_the_operand_of_their_warpgroup():
    own, same, other = (halves_of_k(swapped) for swapped in (False, False, True))
    assert verdict(own, {"other": lambda: same}, by_size).verdict is Verdict.PROVED
    assert verdict(own, {"other": lambda: other}, by_size).verdict is not Verdict.PROVED


def test_entries_that_rows_share_are_their_own_only_if_declared():
    own, other = kernels.grouped_rows(64), kernels.grouped_rows(32)
    assert verdict(own).verdict is Verdict.UNKNOWN
    result = verdict(own, {"other": lambda: other}, by_size, shared={"expert": 64})
    assert result.verdict is Verdict.PROVED, result.findings
    assert any("expert has one entry for 64" in a for a in result.assumptions)
    assert verdict(own, shared={"expert": 32}).verdict is Verdict.UNKNOWN


def test_trees_of_other_layouts_are_told_apart():
    own, other = kernels.reduced_rows(32, 128), kernels.reduced_rows(2, 128)
    result = verdict(own, {"other": lambda: other}, by_size)
    assert result.verdict is Verdict.UNKNOWN  # the interpreter adds a row up in one order
    assert "in different ways" in result.findings[0].message


def test_a_dispatcher_without_a_variant_for_some_batch_is_refuted():
    def select(dims):
        return next(name for limit, name in ((64, "own"), (4096, "other")) if dims["m"] <= limit)

    result = verdict(kernels.scaled_rows(32), {"other": lambda: kernels.scaled_rows(64)}, select)
    assert result.verdict is Verdict.REFUTED
    assert "no variant for this batch (4097 <= m <= 65536)" in result.findings[0].message
    assert result.findings[0].counterexample.shape == {"m": 4097}


def test_without_batch_dims_nothing_is_claimed():
    result = verdict(kernels.numbered_rows(), batch_dims=None)
    assert result.obligations == 0
    assert "not asked" in result.notes[0]


def test_ranges_follow_arithmetic_and_refuse_what_they_cannot():
    def select(dims):
        return "many" if (dims["m"] + 15) // 16 * 2 > 8 else "few"

    found = {(r.bounds["m"], r.variant) for r in ranges(select, {}, {"m": (0, 1000)})}
    assert found == {((0, 64), "few"), ((65, 1000), "many")}
    for refused in (lambda d: str(d["m"] % 3), lambda d: [0][d["m"]], lambda d: d["m"].bit_length()):
        with pytest.raises((UndecidedError, TypeError)):
            list(ranges(refused, {}, {"m": (0, 1000)}))


@pytest.mark.parametrize("spec", registry.all_kernels(), ids=lambda s: s.name)
def test_every_dispatcher_serves_every_batch(spec):
    for variant in spec.variants:
        dispatch: Any = dispatch_of(spec, variant)
        bounds = batch_bounds(spec.contract, dispatch.fixed, spec.batch_dims)
        found = list(ranges(dispatch.select, dispatch.fixed, bounds))
        own = [r for r in found if r.variant == variant.id]
        met = {r.variant for r in found if any(may_meet(r, o, spec.batch_dims) for o in own)}
        assert {variant.id} <= met <= {variant.id, *dispatch.siblings}
        for part in found:
            for ends in zip(*part.bounds.values(), strict=True):
                dims = {**dispatch.fixed, **dict(zip(part.bounds, ends, strict=True))}
                assert spec.select(dims).id == part.variant


def test_instructions_in_another_order_of_k_are_not_proved():
    found = extracted(gemm())
    loops = [n for n in ir.walk(found.device.body) if isinstance(n, ir.For) and calls_in(n, "ptx_wgmma_ss")]
    inner = loops[-1]
    assert isinstance(inner.extent, ir.Const)
    last = ir.Const(inner.var.dtype, int(inner.extent.value) - 1)
    mirrored = ir.BinOp(inner.var.dtype, "sub", last, inner.var)
    for call in calls_in(inner, "ptx_wgmma_ss"):
        args = [rewrite(a, lambda e: mirrored if e is inner.var else None) for a in call.args]
        call.args = tuple(args)
    report = check("test", "own", found, ROWS, {}, properties=[PROPERTY], dispatch=Dispatch(("m",)))
    (result,) = report.properties
    assert result.verdict is Verdict.UNKNOWN
    assert any("do not take K in ascending chunks" in f.message for f in result.findings)


def calls_in(node, op) -> Any:
    return [n for n in ir.walk(node) if isinstance(n, ir.Call) and n.op == op]


@pytest.mark.parametrize("prim_func", [kernels.pages(), kernels.grid_stride(False)], ids=["pages", "tiles"])
def test_rows_that_a_loop_writes_are_followed(prim_func):
    result = verdict(prim_func)
    assert result.verdict is Verdict.PROVED, result.findings


def test_what_a_tile_leaves_to_the_next_is_not_proved():
    result = verdict(kernels.grid_stride(True))
    assert result.verdict is Verdict.UNSUPPORTED
    assert any("an earlier iteration left" in f.message for f in result.findings)


@pytest.mark.parametrize(
    "prim_func",
    [
        rounds.two_sets(),
        rounds.late_sums(),
        rounds.late_sums(3),
        rounds.filled_ahead(),
        rounds.filled_ahead(3.0),
        rounds.running_sums(),
        rounds.rows_in_turn(),
    ],
    ids=[
        "two sets",
        "a round late",
        "three rounds late",
        "ahead",
        "ahead, another factor",
        "running",
        "rows",
    ],
)
def test_what_a_round_takes_over_from_rounds_before_is_followed(prim_func):
    result = verdict(prim_func)
    assert result.verdict is Verdict.PROVED, result.findings


def test_a_value_that_is_stored_late_is_the_same_computation():
    """However late, and also where the first round's is from before the loop."""
    late, later = (signed(rounds.late_sums(delay)) for delay in (1, 3))
    assert late.digest == later.digest
    (ahead,), (other,) = (signed(rounds.filled_ahead(by)).outputs["out"].terms for by in (2.0, 3.0))
    assert (ahead.op, other.op) == ("mul", "select")


def signed(prim_func) -> Any:
    return signature(extract.tile_function(prim_func), ("m",), (), lambda step: "any")


@pytest.mark.parametrize(
    ("prim_func", "message"),
    [
        (rounds.two_sets("always"), "a row reads x"),
        (rounds.two_sets("batch"), "a row reads x"),
        (rounds.rows_in_turn(late=True), "a row reads x"),
    ],
    ids=["sets swapped", "swapped by the batch", "of the row before"],
)
def test_what_rounds_take_over_from_other_rows_is_refuted(prim_func, message):
    result = verdict(prim_func)
    assert result.verdict is Verdict.REFUTED, result.findings
    assert any(message in f.message for f in result.findings)


def test_what_no_round_before_has_written_is_not_proved():
    result = verdict(rounds.late_sums(is_set=False))
    assert result.verdict is Verdict.UNSUPPORTED
    assert any("read before it is written" in f.message for f in result.findings)


def test_what_is_carried_through_many_rounds_is_a_fold():
    few, many = (verdict(rounds.late_sums(delay)) for delay in (MAX_BACK, MAX_BACK + 1))
    assert few.verdict is many.verdict is Verdict.PROVED
    (few,), (many,) = (signed(rounds.late_sums(MAX_BACK + n)).outputs["out"].terms for n in (0, 1))
    assert (few.op, many.op) == ("reduce", "fold")


def test_a_loop_may_be_as_long_as_the_rows_own_data_says():
    """As tiles of padding in a grouped product: no iteration where there is no expert."""
    assert verdict(kernels.counted_sums(32), shared={"count": 32}).verdict is Verdict.PROVED
    for prim_func, shared in (
        (kernels.counted_sums(32), {"count": 16}),  # an entry of other rows of the tile
        (kernels.counted_sums(32), {}),
        (kernels.counted_sums(32, leak=1), {"count": 32}),
    ):
        result = verdict(prim_func, shared=shared)
        assert result.verdict in (Verdict.REFUTED, Verdict.UNKNOWN)
        assert "range of the loop" in result.findings[0].message


def test_two_ways_have_to_be_of_the_same_elements_in_each_variant():
    own, same, other = (
        kernels.two_factors(2.0, 3.0, 32),
        kernels.two_factors(2.0, 3.0, 16),
        kernels.two_factors(3.0, 2.0, 16),
    )
    assert verdict(own, {"other": lambda: same}, by_size).verdict is Verdict.PROVED
    result = verdict(own, {"other": lambda: other}, by_size)
    assert result.verdict is Verdict.REFUTED, result.findings
    assert "own and other compute out in different ways" in result.findings[0].message


@pytest.mark.parametrize("make", [kernels.by_threads, kernels.by_other_threads])
def test_what_other_threads_have_written_is_followed(make):
    assert verdict(make()).verdict is Verdict.PROVED
    assert verdict(make(1)).verdict is not Verdict.PROVED


def test_a_count_of_each_threads_additions_is_not_proved():
    own, other = kernels.counted_by_each(128), kernels.counted_by_each(256)
    assert verdict(own, {"other": lambda: other}, by_size).verdict is not Verdict.PROVED


def test_a_dispatcher_that_looks_the_batch_up_in_a_table_is_not_followed():
    with pytest.raises(UndecidedError, match="in a table"):
        list(ranges(lambda dims: {16: "few"}.get(dims["m"], "many"), {}, {"m": (0, 1000)}))
