"""Matrix products at their edges on the GPU: as in the interpreter, and with as many rows as there can be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_kernels.gemm.grouped_layout import ALIGNMENTS, PADDING, contiguous_layout
from dsv4_kernels.registry import get_kernel
from tests.compare import as_tuple, bits, mismatch
from tests.kernels.test_gemm_edges import (
    GROUPED,
    LONGEST,
    NAN_CODE,
    PRODUCTS,
    assert_touches,
    grouped_dims,
    poisonable,
    poisoned,
    somewhere,
)

CUDA = torch.device("cuda")

# Batches that take each form of tiles, at weights that ship.
FORMS = {
    "bf16_gemm": ({"n": 2048, "k": 7168, "f32_out": 1}, (1, 17, 64, 128, 300, 1024, 4096)),
    "fold_parts": ({"n": 64, "num_parts": 4, "f32_out": 0}, (64, 4096)),
    "fp4_widen": ({"k": 2048}, (1, 300)),
    "fp8_fp4_gemm": ({"n": 4096, "k": 2048}, (1, 17, 64, 300)),
    "fp8_fp4_gemm_folded": ({"n": 4096, "k": 2048}, (1, 17, 100, 300, 4096)),
    "fp8_fp4_gemm_widened": ({"n": 4096, "k": 2048}, (1024,)),
    "fp8_gemm": ({"n": 1536, "k": 4096, "f32_scales": 0}, (1, 17, 64, 200, 300, 1000, 2000, 2300)),
    "mhc_gemm": ({"k": 16384}, (1, 300)),
    "narrow_gemm": ({"n": 64, "k": 7168, "f32_out": 0}, (1, 17, 128, 1024, 4096, 4300)),
    "router_gemm": ({"n": 384, "k": 7168}, (1, 17, 128, 200, 1024, 2048, 2500, 4096)),
    "wo_a_bf16": ({"groups": 8, "n": 1024, "k": 4096}, (1, 17, 64, 128, 300)),
    "wo_a_fp8": ({"groups": 8, "n": 1024, "k": 4096, "f32_scales": 0}, (1, 17, 100, 300)),
}


def shipped_forms():
    """Yield (kernel, dims) of each form, several tiles a block and each height of grouped tiles included."""
    for name, (dims, batches) in FORMS.items():
        yield from ((name, {**dims, "m": m}) for m in batches)
    yield from (("fp8_gemm", {"n": 32768, "k": 1024, "f32_scales": 0, "m": m}) for m in (64, 128, 300, 1024))
    yield "fp8_gemm", {"n": 4096, "k": 7168, "f32_scales": 1, "m": 300}
    for name in GROUPED:
        for alignment in ALIGNMENTS:
            dims = {**grouped_dims(name, 1000, alignment, 32), "n": 4096, "k": 2048}
            yield name, dims


def label(kernel, dims):
    return f"{kernel.select(dims).id} m={dims['m']}"


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [k for k in PRODUCTS if k.name != "fp4_widen"], ids=lambda k: k.name)
def test_gpu_what_is_no_number_stays_where_it_belongs(kernel, gpu_record):
    """As in the interpreter, in every form that ships."""
    generator = torch.Generator().manual_seed(4)
    for name, dims in shipped_forms():
        if name == kernel.name:
            inputs = kernel.make_inputs(dims, CUDA, 5)
            for place, value in poisonable(kernel, inputs):
                assert_touches(kernel, inputs, place, value, somewhere(kernel, inputs, place, generator))
            gpu_record(kernel, kernel.select(dims), f"no numbers {label(kernel, dims)}", True)


def any_codes(tensor, generator):
    """Return e4m3 numbers of all codes but nan; other types as they are."""
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor
    codes = torch.randint(0, 256, tensor.shape, generator=generator, device=CUDA, dtype=torch.uint8)
    return torch.where(codes & NAN_CODE == NAN_CODE, 0, codes).view(tensor.dtype)


def drawn_batch(kernel, data, seed):
    """Return dims and arguments: a batch of any size, or of experts of any sizes."""
    if kernel.name not in GROUPED:
        m = data.draw(st.one_of(st.integers(0, 140), st.integers(0, 4300)), label="m")
        dims = {**FORMS[kernel.name][0], "m": m}
        return dims, kernel.make_inputs(dims, CUDA, seed), None
    alignment = data.draw(st.sampled_from(ALIGNMENTS), label="alignment")
    counts = data.draw(st.lists(st.integers(0, 300), min_size=32, max_size=32), label="counts")
    m = sum(-(-c // alignment) * alignment for c in counts) + data.draw(st.integers(0, 1)) * alignment
    dims = {**grouped_dims(kernel.name, 0, alignment, len(counts)), "n": 4096, "k": 2048, "m": m}
    expert, _ = contiguous_layout(torch.tensor(counts, device=CUDA), alignment, m)
    inputs = kernel.make_inputs(dims, CUDA, seed)
    return dims, (*poisoned(inputs, expert), expert, alignment), expert


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", PRODUCTS, ids=lambda k: k.name)
@settings(max_examples=12)
@given(data=st.data())
def test_gpu_matches_reference_for_any_rows_and_values(kernel, data, gpu_record):
    seed = data.draw(st.integers(0, 2**31 - 1), label="seed")
    dims, args, expert = drawn_batch(kernel, data, seed)
    if expert is None and data.draw(st.booleans(), label="all codes"):
        generator = torch.Generator(CUDA).manual_seed(seed)
        args = tuple(any_codes(a, generator) if isinstance(a, torch.Tensor) else a for a in args)
    got = kernel.fn(*args)
    if expert is not None:
        got[expert < 0] = 0  # as the reference has them: what they hold is nobody's
    wrong = mismatch(kernel, args, got)
    if dims["m"]:
        gpu_record(kernel, kernel.select(dims), f"any rows {label(kernel, dims)}", wrong is None)
    assert wrong is None


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", PRODUCTS, ids=lambda k: k.name)
def test_gpu_the_longest_rows(kernel, gpu_record):
    """Near the reference, and the first ones have the same bits without the others."""
    rows, first = 160, 16 if kernel.name in GROUPED else 3
    dims = {**LONGEST[kernel.name], "m": rows}
    if kernel.name in GROUPED:
        dims["rows"] = rows
    many = kernel.make_inputs(dims, CUDA, 6)
    few = [i[:first].clone() if isinstance(i, torch.Tensor) and len(i) == rows else i for i in many]
    found = []
    for m, inputs in ((rows, many), (first, few)):
        got = kernel.fn(*inputs)
        wrong = mismatch(kernel, inputs, got)
        found.append([bits(part[:first]) for part in as_tuple(got)])
        right = wrong is None and all(map(torch.equal, found[0], found[-1]))
        gpu_record(kernel, kernel.select({**dims, "m": m}), f"longest rows m={m}", right)
        assert wrong is None
        assert right


POOL = 257  # rows that a large batch repeats
# The most rows that a contract admits, or so many that outputs or operands have more than 2**31 elements.
MOST_ROWS = {
    "bf16_gemm": {"m": 2**25 + 77, "n": 64, "k": 256, "f32_out": 0},
    "fold_parts": {"m": 2**23 + 77, "n": 64, "num_parts": 4, "f32_out": 1},
    "fp4_widen": {"m": 2**22 + 77, "k": 512},
    "fp8_fp4_gemm": {"m": 2**24 + 77, "n": 128, "k": 128},
    "fp8_fp4_gemm_folded": {"m": 2**24 + 77, "n": 128, "k": 256},
    "fp8_fp4_gemm_widened": {"m": 2**23 + 77, "n": 256, "k": 512},
    "fp8_gemm": {"m": 2**24 + 77, "n": 128, "k": 128, "f32_scales": 0},
    "mhc_gemm": {"m": 65535 * 64, "k": 4096},
    "narrow_gemm": {"m": 2**23 + 77, "n": 64, "k": 1024, "f32_out": 1},
    "router_gemm": {"m": 2**23 + 77, "n": 64, "k": 1024},
    "wo_a_bf16": {"m": 2**16 + 77, "groups": 256, "n": 256, "k": 256},
    "wo_a_fp8": {"m": 2**16 + 77, "groups": 256, "n": 256, "k": 256, "f32_scales": 0},
}


def raw_bytes(tensor):
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def repeated(tensor, rows):
    """Return `tensor` again and again up to so many rows."""
    times = -(-rows // len(tensor))
    return raw_bytes(tensor).repeat(times, *[1] * (tensor.dim() - 1))[:rows].view(tensor.dtype)


def assert_repeats(got, one, repeats_at_a_time=256):
    """The rows of `got` are those of `one` again and again, bit for bit."""
    got, one = (bits(t) if len(t) <= POOL else raw_bytes(t) for t in (got, one))
    got = got if got.dtype == one.dtype else got.view(one.dtype)
    for first in range(0, len(got), repeats_at_a_time * len(one)):
        part = got[first : first + repeats_at_a_time * len(one)]
        whole = len(part) // len(one)
        assert (part[: whole * len(one)].unflatten(0, (whole, len(one))) == one).all()
        assert torch.equal(part[whole * len(one) :], one[: len(part) - whole * len(one)])


@pytest.mark.gpu
@pytest.mark.parametrize("name", MOST_ROWS)
def test_gpu_the_most_rows(name, gpu_record):
    """Rows of a small batch, which agrees with the reference, again and again: the same bits throughout."""
    kernel, dims = get_kernel(name), MOST_ROWS[name]
    inputs = kernel.make_inputs({**dims, "m": POOL}, CUDA, 8)
    result = kernel.fn(*inputs)
    assert mismatch(kernel, inputs, result) is None
    rows = [isinstance(t, torch.Tensor) and len(t) == POOL for t in inputs]
    args = [repeated(t, dims["m"]) if r else t for r, t in zip(rows, inputs, strict=True)]
    for part, want in zip(as_tuple(kernel.fn(*args)), as_tuple(result), strict=True):
        assert len(part) == dims["m"]
        assert_repeats(part, want)
    gpu_record(kernel, kernel.select(dims), f"most rows m={dims['m']}", True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GROUPED)
def test_gpu_the_most_rows_and_experts(name, gpu_record):
    """65535 tiles of 16 rows, 4096 experts: the last without rows, and padding behind all of them."""
    kernel, experts, rows, pool = get_kernel(name), 4096, 65535 * 16, 16
    dims = {**grouped_dims(name, 0, pool, experts), "n": 128, "m": experts * pool}
    x, x_scale, *weights, _, _ = kernel.make_inputs(dims, CUDA, 8)
    x, x_scale = (
        x.view(torch.uint8)[:pool].view(x.dtype),
        x_scale.view(torch.uint8)[:pool].view(x_scale.dtype),
    )

    def call(count, expert):
        return kernel.fn(repeated(x, count), repeated(x_scale, count), *weights, expert.int().cuda(), pool)

    one = call(experts * pool, torch.arange(experts * pool) // pool)
    row, share = torch.arange(rows), rows // (experts - 1) // pool * pool
    got = call(rows, torch.where(row < share * (experts - 1), row // share, PADDING))
    times = share // pool
    same = got[: share * (experts - 1)].unflatten(0, (experts - 1, times, pool))
    assert (bits(same) == bits(one).unflatten(0, (experts, 1, pool))[:-1]).all()
    some = torch.isin(torch.arange(experts * pool) // pool, torch.tensor((0, 2047, experts - 1)))
    expert = torch.where(some, torch.arange(experts * pool) // pool, PADDING).int().cuda()
    one[~some.cuda()] = 0
    args = repeated(x, experts * pool), repeated(x_scale, experts * pool), *weights, expert, pool
    assert mismatch(kernel, args, one) is None
    gpu_record(kernel, kernel.select({**dims, "m": rows}), f"most rows m={rows} experts={experts}", True)
