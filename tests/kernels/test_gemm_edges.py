"""Matrix products at their edges: numbers that are none, rows without an expert, rows as long as allowed."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_kernels.gemm import reference
from dsv4_kernels.gemm.fold import RawWeights
from dsv4_kernels.gemm.fp8_fp4_gemm_folded import MAX_OFFSET
from dsv4_kernels.gemm.grouped_cases import EVEN
from dsv4_kernels.gemm.grouped_fold import FoldedExperts, fold_experts
from dsv4_kernels.gemm.grouped_layout import ALIGNMENTS, PADDING, capacity, contiguous_layout
from dsv4_kernels.gemm.grouped_masked import grouped_fp4_linear_masked, grouped_fp8_gemm_masked
from dsv4_kernels.registry import all_kernels, get_kernel
from dsv4_kernels.tile.corrections import corrected
from tests.compare import as_tuple, bits, mismatch
from verify import extract, host, ir
from verify.properties import alignment as limits

CPU = torch.device("cpu")
NAN_CODE, NAN_SCALE = 0x7F, 255  # of e4m3, of e8m0
GROUPED = {"grouped_fp8_gemm": 512, "grouped_fp8_fp4_gemm": 512, "grouped_fp8_fp4_gemm_exact": 256}  # k
PRODUCTS = [k for k in all_kernels() if k.make_kernel.__module__.startswith("dsv4_kernels.gemm.")]
# Few rows and more than one tile of them.
SMALL = {
    "bf16_gemm": [{"m": m, "n": 128, "k": 512, "f32_out": out} for m, out in ((3, 1), (131, 0))],
    "fold_parts": [{"m": 19, "n": 128, "num_parts": 3, "f32_out": 1}],
    "fp8_fp4_gemm": [{"m": m, "n": 128, "k": 256} for m in (3, 131)],
    "fp8_fp4_gemm_folded": [{"m": m, "n": 128, "k": 512} for m in (3, 131)],
    "fp8_fp4_gemm_widened": [{"m": m, "n": 256, "k": 512} for m in (3, 131)],
    "fp8_gemm": [{"m": m, "n": 256, "k": 512, "f32_scales": f} for m in (3, 70, 300) for f in (0, 1)],
    "mhc_gemm": [{"m": 67, "k": 4096}],
    "narrow_gemm": [{"m": m, "n": 64, "k": 1024, "f32_out": out} for m, out in ((3, 1), (131, 0))],
    "router_gemm": [{"m": m, "n": 64, "k": 1024} for m in (3, 131)],
    "wo_a_bf16": [{"m": m, "groups": 2, "n": 256, "k": 256} for m in (3, 70)],
    "wo_a_fp8": [{"m": m, "groups": 2, "n": 256, "k": 256, "f32_scales": f} for m in (3, 70) for f in (0, 1)],
}


def grouped_dims(name, rows, alignment, num_experts=3):
    dims = {"n": 256, "k": GROUPED[name], "num_experts": num_experts, "alignment": alignment, "rows": rows}
    return {**dims, "spread": EVEN, "x_block": 128, "m": capacity(rows, num_experts, alignment)}


for _name in GROUPED:
    SMALL[_name] = [grouped_dims(_name, rows, alignment) for rows, alignment in ((20, 16), (150, 128))]


def wrong_numbers(dtype):
    """Return what an operand of this type may hold that is no finite number."""
    if dtype in (torch.bfloat16, torch.float32):
        return (torch.nan, torch.inf, -torch.inf)
    return {torch.float8_e4m3fn: (NAN_CODE,), torch.float8_e8m0fnu: (NAN_SCALE,)}.get(dtype, ())


def touched(kernel, name, at, operand, out, experts):
    """Return which elements of `out` element `at` of an operand reaches: rows of x, columns of weights."""
    mask = torch.zeros_like(out, dtype=torch.bool)
    if name in ("x", "x_scale"):
        if kernel.name == "mhc_gemm":  # parts [m, 32, ...] of the channels
            mask[at[0], at[1] * out.shape[1] // operand.shape[1]] = True
        else:
            mask[at[:-1]] = True
    elif name == "parts":
        mask[at[0], at[2]] = True
    else:  # [weight rows, ...], or those of each group or expert first
        depth = 0 if name == "factors" else 1
        *first, row = at[: len(at) - depth]
        block = out.shape[-1] // operand.shape[len(first)]
        columns = slice(row * block, (row + 1) * block)
        if experts is not None:
            mask[experts == first[0], columns] = True
        else:
            mask[(..., *first, columns)] = True
    return mask


def assert_touches(kernel, inputs, place, value, at):
    """What is no number at one place of an operand is none where it belongs, and changes no bit elsewhere."""
    name = list(inspect.signature(kernel.fn).parameters)[place]
    experts = inputs[-2] if kernel.name in GROUPED else None
    clean = as_tuple(kernel.fn(*inputs))
    changed = inputs[place].clone()
    raw = changed.view(torch.uint8) if changed.element_size() == 1 else changed
    raw[at] = value
    args = [changed if i == place else t for i, t in enumerate(inputs)]
    for before, after in zip(clean, as_tuple(kernel.fn(*args)), strict=True):
        counted = torch.ones_like(before, dtype=torch.bool)
        if experts is not None:  # rows without an expert hold anything
            counted &= (experts >= 0)[:, None]
        mask = touched(kernel, name, at, inputs[place], before, experts)
        assert before[counted].isfinite().all()
        assert torch.equal(after.isfinite()[counted], ~mask[counted]), name
        rest = counted & ~mask
        assert torch.equal(bits(after)[rest], bits(before)[rest]), name
        if value is not torch.inf and value != -torch.inf:
            assert after[counted & mask].isnan().all(), name


def poisonable(kernel, inputs):
    """Yield the place of each operand that can hold what is no number, and such a value."""
    for place, operand in enumerate(inputs):
        is_split = kernel.name == "mhc_gemm" and place == 1  # two parts of finite weights (`split_weights`)
        if isinstance(operand, torch.Tensor) and not is_split:
            yield from ((place, value) for value in wrong_numbers(operand.dtype))


def somewhere(kernel, inputs, place, generator):
    """Return an index of an operand: of a row that has an expert, where rows have some."""
    shape = inputs[place].shape
    at = [int(torch.randint(0, size, (), generator=generator)) for size in shape]
    if kernel.name in GROUPED:
        owned = (inputs[-2] >= 0).nonzero()[:, 0]
        if place < 2:
            at[0] = int(owned[at[0] % len(owned)])
    return tuple(at)


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", [k for k in PRODUCTS if k.name != "fp4_widen"], ids=lambda k: k.name)
def test_what_is_no_number_stays_where_it_belongs(kernel):
    """Each operand that can hold one, at some place; `fp4_widen` has none."""
    generator = torch.Generator().manual_seed(3)
    for dims in SMALL[kernel.name]:
        inputs = kernel.make_inputs(dims, CPU, 5)
        pairs = list(poisonable(kernel, inputs))
        assert len(pairs) >= 1
        for place, value in pairs:
            assert_touches(kernel, inputs, place, value, somewhere(kernel, inputs, place, generator))


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("name", "scale"),
    [("fp8_gemm", 252), ("fp8_fp4_gemm", 253), ("fp8_fp4_gemm_folded", 247), ("fp8_fp4_gemm_widened", 247)],
)
@pytest.mark.parametrize("m", [5, 70])
def test_what_is_beyond_the_output_is_infinite(name, scale, m):
    """128 channels of a row, scaled up, overflow in part: with their sign, and no other row does."""
    kernel = get_kernel(name)
    inputs = kernel.make_inputs({"m": m, "n": 256, "k": 512, "f32_scales": 0}, CPU, 4)
    inputs[1].view(torch.uint8)[2, 1] = scale
    if len(inputs) > 4:  # weights with a factor a row
        inputs[4].fill_(1.0)  # it comes last: sums that it would bring back have overflowed by then
    got = kernel.fn(*inputs)
    want = kernel.reference(*inputs)
    assert want[2].isinf().any()
    assert not want[2].isinf().all()
    assert torch.equal(got[2].isinf(), want[2].isinf())
    assert mismatch(kernel, inputs, got) is None


# As many channels as each contract allows, few rows of both operands.
LONGEST = {
    "bf16_gemm": {"m": 3, "n": 64, "k": 65536, "f32_out": 1},
    "fold_parts": {"m": 3, "n": 4096, "num_parts": 64, "f32_out": 1},
    "fp4_widen": {"m": 17, "k": 65536},
    "fp8_fp4_gemm": {"m": 3, "n": 128, "k": 65536},
    "fp8_fp4_gemm_folded": {"m": 3, "n": 128, "k": 16384},
    "fp8_fp4_gemm_widened": {"m": 3, "n": 256, "k": 16384},
    "fp8_gemm": {"m": 3, "n": 128, "k": 65536, "f32_scales": 0},
    "grouped_fp8_fp4_gemm": {**grouped_dims("grouped_fp8_fp4_gemm", 3, 16, 2), "n": 128, "k": 16384},
    "grouped_fp8_fp4_gemm_exact": {
        **grouped_dims("grouped_fp8_fp4_gemm_exact", 3, 16, 2), "n": 128, "k": 16384, "x_block": 32
    },
    "grouped_fp8_gemm": {**grouped_dims("grouped_fp8_gemm", 3, 16, 2), "n": 128, "k": 65536},
    "mhc_gemm": {"m": 3, "k": 65536},
    "narrow_gemm": {"m": 3, "n": 64, "k": 65536, "f32_out": 1},
    "router_gemm": {"m": 3, "n": 64, "k": 65536},
    "wo_a_bf16": {"m": 3, "groups": 1, "n": 256, "k": 65536},
    "wo_a_fp8": {"m": 3, "groups": 1, "n": 256, "k": 65536, "f32_scales": 0},
}  # fmt: skip


@pytest.mark.parametrize("kernel", PRODUCTS, ids=lambda k: k.name)
def test_the_longest_rows_are_those_of_the_contract(kernel):
    consts = kernel.contract.consts
    limit = 65536 if "k <= 65536" in kernel.contract.clauses else consts.get("MAX_K", 0)
    if kernel.name == "fold_parts":
        assert {"num_parts <= 64", "n <= 4096"} <= set(kernel.contract.clauses)
    else:
        assert LONGEST[kernel.name]["k"] == limit


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", PRODUCTS, ids=lambda k: k.name)
def test_the_longest_rows(kernel):
    inputs = kernel.make_inputs(LONGEST[kernel.name], CPU, 6)
    assert mismatch(kernel, inputs, kernel.fn(*inputs)) is None


@pytest.mark.slow
@pytest.mark.parametrize("kernel", PRODUCTS, ids=lambda k: k.name)
def test_the_longest_rows_leave_every_tile_room(kernel):
    """What a tile keeps of whole rows in shared memory fits a block, whichever tile the batch takes."""
    dims, chosen = LONGEST[kernel.name], {}
    batches = ALIGNMENTS if kernel.name in GROUPED else (1, 17, 33, 100, 300, 1024, 4096)
    for rows in batches:
        of_rows = {"alignment": rows, "m": rows} if kernel.name in GROUPED else {"m": rows}
        variant = kernel.select({**dims, **of_rows})
        chosen[variant.id] = variant
    for variant in chosen.values():
        with corrected():
            extracted = extract.extract(kernel.make_kernel(**variant.kwargs))
        facts = host.read_host(extracted.host, extracted.device, extracted.tile)
        shared = facts.extents.get("dynamic_shared")  # None: it has none
        if shared is not None:
            assert isinstance(shared, ir.Const)
            assert shared.value <= limits.MAX_SHARED_BYTES, variant.id


def poisoned(inputs, expert):
    """Return operands whose rows without an expert hold nothing but nan, scales included."""
    x, x_scale = (t.clone() for t in inputs[:2])
    x.view(torch.uint8)[expert < 0] = NAN_CODE
    x_scale.view(torch.uint8)[expert < 0] = NAN_SCALE
    return x, x_scale, *inputs[2:-2]


@pytest.mark.interpret
@pytest.mark.parametrize("name", GROUPED)
@settings(max_examples=5)
@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    alignment=st.sampled_from(ALIGNMENTS),
    spare=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_rows_without_an_expert_touch_nothing(name, counts, alignment, spare, seed):
    """Experts of any sizes, empty ones among them, and a whole tile or none of padding behind the last."""
    kernel = get_kernel(name)
    m = sum(-(-c // alignment) * alignment for c in counts) + spare * alignment
    dims = {**grouped_dims(name, 0, alignment, len(counts)), "m": m}
    inputs = kernel.make_inputs(dims, CPU, seed)
    expert, _ = contiguous_layout(torch.tensor(counts), alignment, m)
    args = *poisoned(inputs, expert), expert, alignment
    got = kernel.fn(*args)
    assert got.shape == (m, 256)
    assert not got[expert >= 0].isnan().any()
    got[expert < 0] = 0  # as the reference has them: what they hold is nobody's
    assert mismatch(kernel, args, got) is None


@pytest.mark.interpret
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("name", GROUPED)
def test_a_batch_of_padding_alone_ends(name, alignment):
    kernel = get_kernel(name)
    inputs = kernel.make_inputs({**grouped_dims(name, 0, alignment), "m": 2 * alignment}, CPU, 1)
    expert = torch.full((2 * alignment,), PADDING, dtype=torch.int32)
    assert kernel.fn(*poisoned(inputs, expert), expert, alignment).shape == (2 * alignment, 256)


@pytest.mark.interpret
@settings(max_examples=5)
@given(
    counts=st.lists(st.sampled_from((0, 1, 15, 16, 17, 63, 64)), min_size=2, max_size=3),
    expected_rows=st.sampled_from((1, 40, 1000)),
    seed=st.integers(0, 99),
)
def test_masked_rows_are_the_dense_product_whatever_lies_behind_them(counts, expected_rows, seed):
    """FP8 weights, folded FP4 weights, and FP4 weights as they came with 1 x 128 and 1 x 32 scales of x."""
    max_m, n, k, experts = 64, 128, 512, len(counts)
    device_counts = torch.tensor(counts, dtype=torch.int32)
    counted = torch.arange(max_m) < device_counts[:, None]

    def rows(name):
        dims = {**grouped_dims(name, 0, 16, experts), "n": n, "k": k, "m": experts * max_m}
        x, x_scale, *weights, _, _ = get_kernel(name).make_inputs(dims, CPU, seed)
        x, x_scale = x.unflatten(0, (experts, max_m)), x_scale.unflatten(0, (experts, max_m))
        x.view(torch.uint8)[~counted], x_scale.view(torch.uint8)[~counted] = NAN_CODE, NAN_SCALE
        return x, x_scale, weights

    def check(got, want, tolerance):
        for e, count in enumerate(counts):
            exact = want(e)
            (bound,) = tolerance(exact, e)
            assert ((got[e].double() - exact.double()).abs() <= bound)[:count].all()

    x, x_scale, (w, w_scale) = rows("grouped_fp8_gemm")
    check(
        grouped_fp8_gemm_masked(x, x_scale, w, w_scale, device_counts, expected_rows),
        lambda e: reference.fp8_gemm(x[e], x_scale[e], w[e], w_scale[e]),
        lambda out, e: reference.fp8_gemm_tolerance(out, x[e], x_scale[e], w[e], w_scale[e]),
    )
    x, x_scale, (w, w_scale) = rows("grouped_fp8_fp4_gemm_exact")
    w_scale.view(torch.uint8).clamp_(120, 120 + MAX_OFFSET)  # a row's span that can be folded
    folded, kept = fold_experts(w, w_scale), RawWeights(w, w_scale)
    by_32 = x_scale.view(torch.uint8).repeat_interleave(4, dim=2).view(x_scale.dtype)
    assert isinstance(folded, FoldedExperts)
    for weights, scale in ((kept, x_scale), (kept, by_32), (folded, x_scale)):
        check(
            grouped_fp4_linear_masked(x, scale, weights, device_counts, expected_rows),
            lambda e: reference.fp8_fp4_gemm(x[e], x_scale[e], w[e], w_scale[e]),
            lambda out, e: reference.fp8_fp4_gemm_tolerance(out, x[e], x_scale[e], w[e], w_scale[e]),
        )
