"""Property layout: one-to-one layouts, views, and the hardware's own idea of where elements are."""

from functools import cache

import pytest
import tilelang
from tilelang import language as T

from dsv4_kernels.contract import Contract
from tests.verify import refinement_kernels, samples
from verify import ir, placements
from verify.verdict import Verdict

CONTRACT = Contract(("0 <= m", "m <= 65536"))


@cache
def sound(kernel):
    return samples.context(kernel())


@pytest.mark.parametrize("kernel", samples.SOUND, ids=lambda k: k.__name__)
def test_sound_kernels_are_proved(kernel):
    result = samples.verdict(sound(kernel), "layout")
    assert result.verdict is Verdict.PROVED, result.findings


def test_a_box_of_two_matrices_is_one_block_of_a_stage():
    context = samples.context(refinement_kernels.two_products(), CONTRACT)
    result = samples.verdict(context, "layout")
    assert result.verdict is Verdict.PROVED, result.findings


def refuted(context, text: str):
    result = samples.verdict(context, "layout")
    assert result.verdict is Verdict.REFUTED, result.findings
    assert any(text in f.message for f in result.findings), result.findings
    return result


def annotated(forward):
    """A tile through shared memory whose layout the author writes by hand."""
    m = T.dynamic("m")

    @T.prim_func
    def annotated_kernel(x: T.Tensor[(m, 64), T.float32], out: T.Tensor[(m, 64), T.float32]):
        with T.Kernel(T.ceildiv(m, 32), threads=128) as bm:
            tile = T.alloc_shared((32, 64), T.float32)
            T.annotate_layout({tile: tilelang.layout.Layout((32, 64), forward)})
            for i, j in T.Parallel(32, 64):
                tile[i, j] = x[bm * 32 + i, j]
            for i, j in T.Parallel(32, 64):
                out[bm * 32 + i, j] = tile[i, j]

    return annotated_kernel


def test_a_layout_by_hand_that_is_one_to_one_is_proved():
    context = samples.context(annotated(lambda i, j: [i, (j + i * 4) % 64]), CONTRACT)
    assert samples.verdict(context, "layout").verdict is Verdict.PROVED


@pytest.mark.parametrize(
    "forward",
    [lambda i, j: [i, j // 2 * 2], lambda i, j: [i // 2, (j + i) % 64], lambda i, j: [i, (i * j) % 64]],
    ids=["pairs meet", "rows meet", "columns meet"],
)
def test_a_layout_that_is_not_is_refuted(forward):
    context = samples.context(annotated(lambda i, j: [i, (j + i * 4) % 64]), CONTRACT)
    replace_layouts(context, tilelang.layout.Layout((32, 64), forward))
    refuted(context, "no two elements in one address")


def test_a_layout_that_leaves_its_allocation_is_refuted():
    context = samples.context(annotated(lambda i, j: [i, (j + i * 4) % 64]), CONTRACT)
    replace_layouts(context, tilelang.layout.Layout((32, 64), lambda i, j: [i * 2, j]))
    refuted(context, "fits its allocation")


def replace_layouts(context, layout):
    for block in samples.nodes(context.extracted.lowered, ir.Block):
        block.layouts |= dict.fromkeys(block.layouts, layout)


def test_a_fragment_held_by_other_threads_is_refuted():
    context = samples.context(samples.scale_rows())
    wide = tilelang.layout.Fragment(
        (32, 128), forward_thread_fn=lambda i, j: i * 8 + j // 16, forward_index_fn=lambda i, j: j % 16
    )
    for block in samples.nodes(context.extracted.lowered, ir.Block):
        block.layouts |= {v: wide for v in block.layouts if v.name == "frag"}
    refuted(context, "threads 0 to 255 are launched")


# --------------------------------------------------------------------------- hardware
def descriptor_fields(context):
    return samples.calls(context.extracted.device, "initialize_wgmma_descriptor")[0]


@pytest.mark.parametrize(("field", "value"), [(2, 2), (2, 3), (4, 128)], ids=["64 B", "32 B", "stride"])
def test_a_wgmma_descriptor_of_another_layout_is_refuted(field, value):
    context = samples.context(samples.gemm())
    call = descriptor_fields(context)
    args = list(call.args)
    args[field] = ir.Const(ir.INT32, value)
    call.args = tuple(args)
    refuted(context, "descriptor and layout")


def test_a_tma_descriptor_of_another_swizzle_is_refuted():
    context = samples.context(samples.gemm())
    call = next(
        c
        for c in samples.calls(context.extracted.host, "tvm_call_packed")
        if "tensormap" in str(c.args[0].value)
    )
    args = list(call.args)
    args[-3] = ir.Const(ir.INT32, 2)
    call.args = tuple(args)
    refuted(context, "box and layout")


def test_a_start_between_two_rows_is_refuted():
    context = samples.context(samples.gemm())
    call = samples.calls(context.extracted.device, "increase_descriptor_offset")[0]
    call.args = (call.args[0], samples.plus(call.args[1], 128))
    refuted(context, "descriptor and layout")


def test_an_accumulator_from_another_register_is_refuted():
    context = samples.context(samples.gemm())
    call = samples.calls(context.extracted.device, "ptx_wgmma_ss")[0]
    args = list(call.args)
    args[11] = ir.Const(ir.INT32, 2)
    call.args = tuple(args)
    refuted(context, "inside the array")


# --------------------------------------------------------------------------- tables
def test_replicas_in_one_register_are_found():
    fragment = tilelang.layout.Fragment(
        (8,), forward_thread_fn=lambda i, rep: i + rep * 0, forward_index_fn=lambda i: 0, replicate=2
    )
    placement = placements.tabulate(fragment)
    assert placement.idle_replica() == 0
    assert placement.collision() is None


def test_two_elements_in_one_register_are_found():
    fragment = tilelang.layout.Fragment(
        (8, 4), forward_thread_fn=lambda i, j: i, forward_index_fn=lambda i, j: j // 2
    )
    assert placements.tabulate(fragment).collision() is not None


def test_the_inverse_is_compared():
    layout = tilelang.layout.Layout((8, 16), lambda i, j: [j, i])
    other = placements.tabulate(tilelang.layout.Layout((8, 16), lambda i, j: [(j + 1) % 16, i]))
    assert placements.inverse_differs(layout, placements.tabulate(layout)) is None
    assert placements.inverse_differs(layout, other) is not None


# --------------------------------------------------------------------------- stages of one row
def rows_in_stages(chosen: bool = False):
    """Rows through a ring whose stages are a row each; `chosen`: which stage a tensor says."""
    stages, count, width = 3, 6, 64

    @T.prim_func
    def kernel(
        x: T.Tensor[(8, count, width), T.float32],
        which: T.Tensor[(8, count), T.int32],
        out: T.Tensor[(8, count, width), T.float32],
    ):
        with T.Kernel(8, threads=width) as b:
            ring = T.alloc_shared((stages, width), T.float32)
            full = T.alloc_barrier([1] * stages)
            stage = T.alloc_local((1,), T.int32)
            tx = T.get_thread_binding()
            for k in T.serial(count):
                stage[0] = which[b, k] % stages if chosen else k % stages
                T.tma_copy(x[b, k, 0:width], ring[stage[0], :], barrier=full[k % stages])
                T.barrier_arrive(full[k % stages])
                T.barrier_wait(full[k % stages], k // stages % 2)
                out[b, k, tx] = ring[stage[0], tx]
                T.sync_threads()

    return kernel


@pytest.mark.parametrize("chosen", [False, True])
def test_a_stage_may_be_one_row(chosen):
    context = samples.context(rows_in_stages(chosen), Contract(("0 <= which < 1000",)))
    result = samples.verdict(context, "layout")
    assert result.verdict is Verdict.PROVED, result.findings
    assert "hardware accesses compared: 1" in " ".join(result.notes)


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("elements", [1, 32, 63])
def test_a_row_that_starts_inside_another_is_not_proved(chosen, elements):
    context = samples.context(rows_in_stages(chosen), Contract(("0 <= which < 1000",)))
    (call,) = samples.calls(context.extracted.device, "tma_load")
    (pointer,) = [a for a in call.args if isinstance(a, ir.AccessPtr)]
    pointer.offset = samples.plus(pointer.offset, elements)
    result = samples.verdict(context, "layout")
    assert result.verdict is (Verdict.UNKNOWN if chosen else Verdict.REFUTED)
    assert any("box and layout" in f.message for f in result.findings), result.findings


def test_a_row_of_a_stage_that_data_take_apart_is_not_proved():
    context = samples.context(rows_in_stages(True), Contract(("0 <= which < 1000",)))
    (call,) = samples.calls(context.extracted.device, "tma_load")
    (pointer,) = [a for a in call.args if isinstance(a, ir.AccessPtr)]
    half = ir.BinOp(ir.INT32, "floordiv", pointer.offset, ir.Const(ir.INT32, 2))
    pointer.offset = half
    assert samples.verdict(context, "layout").verdict is not Verdict.PROVED


# --------------------------------------------------------------------------- buffers of one name
def twice(first: int, second: int):
    """Two buffers of one name in scopes of their own."""
    m = T.dynamic("m")

    @T.macro
    def doubled(width: int, part: int, x, out, bm):
        tile = T.alloc_fragment((32, width), T.float32)
        T.copy(x[bm * 32, 0], tile)
        for i, j in T.Parallel(32, width):
            out[part, bm * 32 + i, j] = tile[i, j] * T.float32(2)  # pyright: ignore[reportCallIssue]

    @T.prim_func
    def kernel(x: T.Tensor[(m, 128), T.float32], out: T.Tensor[(2, m, 128), T.float32]):
        with T.Kernel(T.ceildiv(m, 32), threads=128) as bm:
            if bm % 2 == 0:  # pyright: ignore[reportOperatorIssue]
                doubled(first, 0, x, out, bm)
            else:
                doubled(second, 1, x, out, bm)

    return kernel


def allocated(context, name: str) -> list[ir.Buffer]:
    blocks = samples.nodes(context.extracted.lowered, ir.Block)
    return [b for block in blocks for b in block.allocs if b.name == name]


@pytest.mark.parametrize("widths", [(64, 128), (128, 64), (64, 64)])
def test_buffers_of_one_name_are_told_apart(widths):
    context = samples.context(twice(*widths), CONTRACT)
    assert len(allocated(context, "tile")) == 2
    result = samples.verdict(context, "layout")
    assert result.verdict is Verdict.PROVED, result.findings


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_them_that_leaves_its_allocation_is_refuted(which):
    context = samples.context(twice(64, 128), CONTRACT)
    buffer = allocated(context, "tile")[which]
    buffer.shape = (ir.Const(ir.INT32, 8),)
    refuted(context, "fits its allocation")


def test_one_of_two_alike_that_leaves_its_allocation_is_not_proved():
    context = samples.context(twice(64, 64), CONTRACT)
    allocated(context, "tile")[1].shape = (ir.Const(ir.INT32, 8),)
    assert samples.verdict(context, "layout").verdict is Verdict.UNSUPPORTED
