"""Property overflow: machine ranges of everything that becomes an address."""

import pytest

from dsv4_kernels.contract import Contract
from tests.verify import samples
from verify import ir
from verify.verdict import Verdict


def overflow(kernel, *clauses):
    return samples.verdict(samples.context(kernel(), Contract(clauses)), "overflow")


@pytest.mark.parametrize("kernel", samples.SOUND, ids=lambda k: k.__name__)
def test_sound_kernels_are_proved(kernel):
    assert overflow(kernel, "0 <= m", "m <= 65536").verdict is Verdict.PROVED


def test_rounding_up_the_grid_wraps_for_the_largest_shapes():
    result = overflow(samples.scale_rows, "0 <= m", "m <= 2147483647")
    assert result.verdict is Verdict.REFUTED
    assert result.findings[0].counterexample.shape["m"] == 2**31 - 31
    assert overflow(samples.scale_rows, "0 <= m", "m <= 2147483616").verdict is Verdict.PROVED


def test_a_shape_without_a_bound_does_not_fit_its_parameter():
    result = overflow(samples.scale_rows)
    assert result.verdict is Verdict.REFUTED
    assert any("the host casts" in f.message for f in result.findings)


def test_an_index_in_too_few_bits_is_refuted():
    context = samples.context(samples.scale_rows(), Contract(("0 <= m", "m <= 2000000000")))
    wide = lambda s: s.buffer.scope == "global" and s.indices[0].dtype.name == "int64"  # noqa: E731
    stores = samples.nodes(context.extracted.device, ir.Store, wide)
    assert stores
    for store in stores:
        store.indices = (ir.Cast(ir.DType("int32", store.indices[0].dtype.lanes), store.indices[0]),)
    result = samples.verdict(context, "overflow")
    assert result.verdict is Verdict.REFUTED
    assert "cast to int32" in result.findings[0].message
    assert result.findings[0].counterexample.values["value"] >= 2**31


def test_a_division_by_what_may_be_zero_is_refuted():
    context = samples.context(samples.scale_rows())
    store = samples.nodes(context.extracted.device, ir.Store, lambda s: s.buffer.data.name == "scale")[0]
    m = next(p for p in context.extracted.device.params if p.dtype.is_int)
    store.indices = (ir.BinOp(ir.INT32, "floordiv", ir.Cast(ir.INT32, store.indices[0]), m),)
    messages = [f.message for f in samples.verdict(context, "overflow").findings]
    assert not any("positive divisor" in m for m in messages)  # rows below m exist: m is not 0 there
    guard = samples.nodes(context.extracted.device, ir.If, lambda s: store in ir.walk(s.then))
    for branch in guard:
        branch.cond = ir.Const(ir.BOOL, True)
    launch = samples.nodes(context.extracted.device, ir.Launch, lambda s: s.tag == "blockIdx.x")[0]
    launch.extent = ir.Const(ir.INT32, 1)
    messages = [f.message for f in samples.verdict(context, "overflow").findings]
    assert any("positive divisor" in m for m in messages)


def test_what_a_variable_holds_is_covered_where_it_becomes_an_address():
    result = overflow(samples.indexed_by_variable, "0 <= m", "m <= 2147483520")
    assert result.verdict is Verdict.PROVED, result.findings
    context = samples.context(samples.indexed_by_variable(), Contract(("0 <= m", "m <= 2147483520")))
    cell = samples.nodes(context.extracted.device, ir.Store, lambda s: s.buffer.scope == "local.var")[0]
    cell.value = ir.BinOp(ir.INT32, "mul", cell.value, ir.Const(ir.INT32, 2))
    assert samples.verdict(context, "overflow").verdict is Verdict.REFUTED


def test_data_arithmetic_is_counted_and_not_proved():
    note = overflow(samples.gemm, "0 <= m", "m <= 65536").notes[0]
    assert note.startswith("data arithmetic, wraps by definition:")
