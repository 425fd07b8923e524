"""Property alignment: vectors, descriptors, launch limits, registers."""

import pytest

from dsv4_kernels.contract import Contract
from tests.verify import samples
from verify import ir
from verify.verdict import Verdict


@pytest.mark.parametrize("kernel", samples.SOUND, ids=lambda k: k.__name__)
def test_sound_kernels_are_proved(kernel):
    result = samples.verdict(samples.context(kernel()), "alignment")
    assert result.verdict is Verdict.PROVED, result.findings


def refuted(context, text: str):
    result = samples.verdict(context, "alignment")
    assert result.verdict is Verdict.REFUTED, result.findings
    assert any(text in f.message for f in result.findings), result.findings


def test_a_vector_one_element_off_is_refuted():
    context = samples.context(samples.scale_rows())
    vector = lambda s: s.buffer.data.name == "out" and isinstance(s.indices[0], ir.Ramp)  # noqa: E731
    store = samples.nodes(context.extracted.device, ir.Store, vector)[0]
    ramp = store.indices[0]
    ramp.base = samples.plus(ramp.base, 1)
    refuted(context, "store to out")


def test_a_tile_off_its_swizzle_pattern_is_refuted():
    context = samples.context(samples.gemm())
    pointer = samples.calls(context.extracted.device, "tma_load")[0].args[2]
    pointer.offset = samples.plus(pointer.offset, -64)
    refuted(context, "TMA load into")


def test_an_operand_that_starts_inside_a_swizzle_atom_is_refuted():
    context = samples.context(samples.gemm())
    call = samples.calls(context.extracted.device, "increase_descriptor_offset")[0]
    call.args = (call.args[0], samples.plus(call.args[1], -128))
    refuted(context, "wgmma operand")


@pytest.mark.parametrize(
    ("position", "value"),
    [(9, 512), (9, 128), (8, 65), (13, 1)],
    ids=[
        "box over 256",
        "inner box over the swizzle span",
        "inner box bytes",
        "swizzle narrower than the box",
    ],
)
def test_a_descriptor_outside_the_limits_is_refuted(position, value):
    context = samples.context(samples.gemm())
    call = next(
        c
        for c in samples.calls(context.extracted.host, "tvm_call_packed")
        if "tensormap" in str(c.args[0].value)
    )
    # callee, descriptor, dtype, rank, pointer, 2 dims, 2 strides, 2 box extents, 2 steps, 4 modes
    args = list(call.args)
    assert len(args) == 17
    inner = {8: 9, 9: 10 if value == 512 else 9}.get(position, 14)
    args[inner] = ir.Const(ir.INT32, value)
    call.args = tuple(args)
    refuted(context, "driver's limits")


def test_a_grid_over_the_limit_is_refuted():
    context = samples.context(samples.gemm(), Contract(("0 <= m", "m <= 5000000")))
    refuted(context, "blockIdx.y extent at most 65535")


def test_a_launch_with_another_extent_is_refuted():
    context = samples.context(samples.scale_rows())
    call = next(c for c in samples.calls(context.extracted.host, "tvm_call_packed") if len(c.args) > 6)
    args = list(call.args)
    args[-3] = ir.Const(ir.INT32, 256)  # threadIdx.x
    call.args = tuple(args)
    refuted(context, "threadIdx.x is launched with the extent")


def test_more_shared_memory_than_there_is_is_refuted():
    context = samples.context(samples.gemm())
    call = next(c for c in samples.calls(context.extracted.host, "tvm_call_packed") if len(c.args) == 11)
    call.args = (*call.args[:-1], ir.Const(ir.INT32, 227 * 1024))
    refuted(context, "shared memory at most")


def test_more_registers_than_there_are_is_refuted():
    context = samples.context(samples.gemm())
    for call in samples.calls(context.extracted.device, "set_max_nreg"):
        call.args = (ir.Const(ir.INT32, 264), *call.args[1:])
    refuted(context, "setmaxnreg 264")


def test_setmaxnreg_that_half_a_warpgroup_runs_is_unknown():
    context = samples.context(samples.gemm())
    is_role = lambda s: "set_max_nreg" in {n.op for n in ir.walk(s.then) if isinstance(n, ir.Call)}  # noqa: E731
    branch = samples.nodes(context.extracted.device, ir.If, is_role)[0]
    branch.cond.b = ir.Const(ir.INT32, 64)
    assert samples.verdict(context, "alignment").verdict is Verdict.UNKNOWN
