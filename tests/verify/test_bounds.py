"""Property bounds on sound kernels and on their broken IR."""

from pathlib import Path
from typing import Any

import pytest

from tests.verify import samples
from verify import ir
from verify.verdict import Verdict


@pytest.mark.parametrize("kernel", samples.SOUND, ids=lambda k: k.__name__)
def test_sound_kernels_are_proved(kernel):
    result = samples.verdict(samples.context(kernel()), "bounds")
    assert result.verdict is Verdict.PROVED, result.findings
    assert result.solvers["z3 unsat"] == result.solvers["cvc5 unsat"] > 0


def refuted(context, text: str) -> Any:
    result = samples.verdict(context, "bounds")
    assert result.verdict is Verdict.REFUTED, result.findings
    found = [f for f in result.findings if f.verdict is Verdict.REFUTED and text in f.message]
    assert found, result.findings
    return found[0]


def global_stores(context, name: str) -> list[ir.Store]:
    keep = lambda s: s.buffer.scope == "global" and s.buffer.data.name == name  # noqa: E731
    return samples.nodes(context.extracted.device, ir.Store, keep)


def test_an_index_one_row_further_is_refuted_at_the_last_row():
    context = samples.context(samples.scale_rows())
    store = global_stores(context, "scale")[0]
    store.indices = (samples.plus(store.indices[0], 1),)
    found = refuted(context, "store to scale")
    example = found.counterexample
    assert example.shape == {"m": 1}
    assert example.values["element"] == example.values["extent"] == 1
    assert example.values["byte_address"] == 4
    assert found.span.path == samples.__file__
    assert "scale[bm * 32 + i]" in Path(samples.__file__).read_text().splitlines()[found.span.line - 1]


def test_a_dropped_guard_is_refuted():
    context = samples.context(samples.gemm())
    guards = [
        s
        for s in samples.nodes(context.extracted.device, ir.If)
        if global_stores_below(s) and s.orelse is None
    ]
    for guard in guards:
        guard.cond = ir.Const(ir.BOOL, True)
    refuted(context, "store to out")


def global_stores_below(node: ir.If) -> bool:
    return any(isinstance(n, ir.Store) and n.buffer.scope == "global" for n in ir.walk(node.then))


def test_a_wgmma_register_offset_past_the_accumulators_is_refuted():
    context = samples.context(samples.gemm())
    call = samples.calls(context.extracted.device, "ptx_wgmma_ss")[0]
    call.args = (*call.args[:11], samples.plus(call.args[11], 1), *call.args[12:])
    found = refuted(context, "wgmma accumulators")
    assert found.counterexample.values["elements"] == 32


def test_a_wgmma_descriptor_past_its_tile_is_refuted():
    context = samples.context(samples.gemm())
    call = samples.calls(context.extracted.device, "increase_descriptor_offset")[0]
    call.args = (call.args[0], samples.plus(call.args[1], 8192))
    refuted(context, "wgmma operand")


def test_a_tma_box_past_its_tile_is_refuted():
    context = samples.context(samples.gemm())
    pointer = samples.calls(context.extracted.device, "tma_load")[0].args[2]
    pointer.offset = samples.plus(pointer.offset, 64)
    refuted(context, "TMA load into")


def test_a_descriptor_of_another_extent_is_refuted():
    context = samples.context(samples.gemm())
    call = next(
        c
        for c in samples.calls(context.extracted.host, "tvm_call_packed")
        if "tensormap" in str(c.args[0].value)
    )
    call.args = (*call.args[:5], samples.plus(call.args[5], 64), *call.args[6:])
    refuted(context, "describes")


def test_an_mbarrier_past_the_array_is_refuted():
    context = samples.context(samples.gemm())
    call = samples.calls(context.extracted.device, "mbarrier_wait_parity")[0]
    call.args[0].indices = (samples.plus(call.args[0].indices[0], 4),)
    refuted(context, "mbarrier")


def test_a_reduction_past_its_workspace_is_refuted():
    context = samples.context(samples.row_sums())
    call = samples.calls(context.extracted.device, "call_extern")[0]
    call.args[2].offset = samples.plus(call.args[2].offset, 32)
    refuted(context, "reduction workspace")


def test_an_unknown_operation_is_unsupported():
    context = samples.context(samples.scale_rows())
    samples.calls(context.extracted.device, "call_extern")[0].args[0].value = "tl::somewhere"
    result = samples.verdict(context, "bounds")
    assert result.verdict is Verdict.UNSUPPORTED
    assert "tl::somewhere" in result.findings[0].message


def test_a_pointer_passed_to_a_known_operation_is_unsupported():
    context = samples.context(samples.gemm())
    call = samples.calls(context.extracted.device, "tvm_storage_sync")[0]
    call.args = (*call.args, ir.Var(ir.HANDLE, "somewhere"))
    assert samples.verdict(context, "bounds").verdict is Verdict.UNSUPPORTED


def test_a_contradictory_contract_is_refuted():
    from verify.engine import check

    context = samples.context(samples.scale_rows())
    report = check("k", "v", context.extracted, samples.Contract(("m < 0", "m > 0")), {})
    assert [(p.name, p.verdict) for p in report.properties] == [("contract", Verdict.REFUTED)]
    assert report.witness == {}
