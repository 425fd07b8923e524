"""Property alignment: vectors, descriptors, launch limits, registers."""

from dataclasses import replace
from functools import cache

import pytest
import z3
from tilelang import language as T

from dsv4_kernels.contract import Contract
from tests.verify import samples
from verify import ir
from verify.instruction_limits import instruction_limits
from verify.verdict import Verdict
from verify.walk import Site


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


def staged_row_sums():
    """As samples.row_sums, beside another array in shared memory: both are views of one arena."""
    m = T.dynamic("m")

    @T.prim_func
    def staged_row_sums_kernel(x: T.Tensor[(m, 1024), T.float32], out: T.Tensor[(m,), T.float32]):
        with T.Kernel(m, threads=256) as bm:
            staged = T.alloc_shared((1024,), T.float32)
            frag = T.alloc_fragment((1, 1024), T.float32)
            total = T.alloc_fragment((1,), T.float32)
            for j in T.Parallel(1024):
                staged[j] = x[bm, j]
            for i, j in T.Parallel(1, 1024):
                frag[i, j] = staged[1023 - j]
            T.reduce_sum(frag, total, dim=1)
            for i in T.Parallel(1):
                out[bm + i] = total[i]

    return staged_row_sums_kernel


def workspace_views(context):
    is_view = lambda n: n.var.name == "workspace" and isinstance(n.value, ir.Call)  # noqa: E731
    return samples.nodes(context.extracted.device, ir.Bind, is_view)


@pytest.mark.parametrize("offset", [1, 2])
def test_a_reduction_workspace_off_its_slots_is_refuted(offset):
    context = samples.context(staged_row_sums())
    assert workspace_views(context)
    for view in workspace_views(context):
        base, place = view.value.args
        view.value.args = (base, ir.Const(ir.INT32, place.value + offset))
    refuted(context, "reduction workspace")


def test_a_reduction_through_slots_of_another_type_is_unsupported():
    context = samples.context(samples.row_sums())
    is_slots = lambda n: n.data.name == "workspace"  # noqa: E731
    for pointer in samples.nodes(context.extracted.device, ir.AccessPtr, is_slots):
        pointer.element = ir.DType("float64")
    assert samples.verdict(context, "alignment").verdict is Verdict.UNSUPPORTED


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


def one_a_row(blocks, size):
    """A kernel of a block a row, `blocks` of m of them, in clusters."""
    m = T.dynamic("m")

    @T.prim_func
    def one_a_row_kernel(out: T.Tensor[(m,), T.int32]):
        with T.Kernel(blocks(m), threads=32, cluster_dims=size) as row:
            if T.get_thread_binding() == 0 and row < m:  # pyright: ignore[reportOperatorIssue]
                out[row] = 1

    return samples.context(one_a_row_kernel, Contract(("0 < m", "m < 1024")))


def test_a_grid_of_whole_clusters_is_proved():
    result = samples.verdict(one_a_row(lambda m: T.ceildiv(m, 2) * 2, 2), "alignment")
    assert result.verdict is Verdict.PROVED, result.findings


@pytest.mark.parametrize(
    ("size", "blocks", "text"),
    [
        (2, lambda m: m, "blockIdx.x extent is a multiple of the cluster's"),
        (16, lambda m: m * 16, "at most 8 blocks a cluster"),
    ],
)
def test_a_grid_that_is_not_is_refuted(size, blocks, text):
    refuted(one_a_row(blocks, size), text)


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


def asks_for(registers: tuple[int, int], blocks: int):
    """Return `alignment` of a kernel whose roles, of a warpgroup each, ask for so many registers a thread."""

    @T.prim_func
    def kernel(out: T.Tensor[(384,), T.float32]):
        with T.Kernel(1, threads=384):
            T.annotate_min_blocks_per_sm(blocks)
            tx = T.get_thread_binding()
            if tx < 128:
                T.dec_max_nreg(registers[0])
            else:
                T.inc_max_nreg(registers[1])
            out[tx] = 0.0

    return samples.verdict(samples.context(kernel), "alignment")


# Seen on an H100: 200 and 112, which is all that a multiprocessor has, and the block waited for ever.
@pytest.mark.parametrize(
    ("registers", "blocks", "verdict"),
    [
        ((112, 200), 1, Verdict.REFUTED),
        ((104, 200), 1, Verdict.PROVED),
        ((24, 240), 1, Verdict.PROVED),
        ((24, 104), 2, Verdict.PROVED),
        ((40, 104), 2, Verdict.REFUTED),
    ],
)
def test_a_block_hands_out_the_registers_that_it_was_launched_with(registers, blocks, verdict):
    assert asks_for(registers, blocks).verdict is verdict


def test_setmaxnreg_that_half_a_warpgroup_runs_is_unknown():
    context = samples.context(samples.gemm())
    is_role = lambda s: "set_max_nreg" in {n.op for n in ir.walk(s.then) if isinstance(n, ir.Call)}  # noqa: E731
    branch = samples.nodes(context.extracted.device, ir.If, is_role)[0]
    branch.cond.b = ir.Const(ir.INT32, 64)
    assert samples.verdict(context, "alignment").verdict is Verdict.UNKNOWN


# --------------------------------------------------------------------------- instructions
TEXT = ir.DType("string")


@cache
def shared(kernel):
    return samples.context(kernel())


def broken_limits(shape: str, kinds: tuple[str, str] = ("bf16", "bf16"), b_major: int = 1) -> str:
    """Return which limits of wgmma the product of `samples.gemm` breaks with another instruction."""
    context = shared(samples.gemm)
    call = samples.calls(context.extracted.device, "ptx_wgmma_ss")[0]
    before = call.args
    shown = (ir.Str(TEXT, shape), before[1], ir.Const(ir.BOOL, b_major), *(ir.Str(TEXT, k) for k in kinds))
    call.args = (*shown, *before[5:])
    try:
        (claim,) = [o for o in instruction_limits(context) if o.what.startswith("wgmma")]
    finally:
        call.args = before
    return str(claim.show.get("broken", ""))


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ("m64n12k16", "columns"),
        ("m64n264k16", "columns"),
        ("m128n64k16", "64 rows"),
        ("m64n64k8", "256 bits of K"),
        ("m64n24k16", ""),  # 24 columns in one instruction are legal
    ],
)
def test_shapes_of_wgmma(shape, text):
    assert broken_limits(shape) == text


def test_integer_products_take_fewer_shapes():
    assert broken_limits("m64n24k32", ("int8", "int8")) == ""
    assert broken_limits("m64n40k32", ("int8", "int8")) == "columns"


def test_an_operand_of_8_bits_is_k_major():
    kinds = ("e4m3", "e4m3")
    assert broken_limits("m64n64k32", kinds) == ""
    assert broken_limits("m64n64k32", kinds, b_major=0) == "K-major operands unless of 16 bits"


@pytest.mark.parametrize(("size", "legal"), [(4, True), (8, True), (16, True), (2, False), (12, False)])
def test_sizes_of_cp_async(size, legal):
    context = shared(samples.scale_rows)
    data = next(v for v in context.storages.by_var)
    count = ir.Const(ir.INT32, size)
    pointer = ir.AccessPtr(ir.HANDLE, data, ir.DType("uint8"), ir.Const(ir.INT32, 0), count, "w")
    call = ir.Call(ir.HANDLE, "ptx_cp_async", (pointer, pointer, count))
    site = context.device_sites[0]
    context.device_sites.append(Site(call, site.scope, None, site.statement, site.path))
    try:
        (claim,) = [o for o in instruction_limits(context) if o.what.startswith("cp.async")]
    finally:
        context.device_sites.pop()
    assert z3.is_true(claim.goal) == legal


def test_a_block_beyond_its_launch_bounds_is_refuted():
    context = samples.context(samples.scale_rows())
    text = context.extracted.cuda_text.replace("__launch_bounds__(128", "__launch_bounds__(96")
    context.extracted = replace(context.extracted, cuda_text=text)
    refuted(context, "__launch_bounds__")
