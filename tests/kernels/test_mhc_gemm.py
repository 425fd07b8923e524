"""Skinny product of hyper-connections: shapes, accuracy of split weights, bad calls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv4_kernels
from dsv4_kernels.contract import ContractError
from dsv4_kernels.gemm.mhc_gemm import SPEC, mhc_gemm, split_weights
from tests.compare import bits, mismatch

CPU = torch.device("cpu")
SHORT = 4096  # channels: one stage a part
PARTS = 32


def _inputs(m, k=SHORT, seed=0):
    return list(SPEC.make_inputs({"m": m, "k": k}, CPU, seed))


def _interpreted(*inputs):
    with dsv4_kernels.backend("interpret"):
        return mhc_gemm(*inputs)


@settings(max_examples=8)
@given(m=st.integers(0, 130), k=st.sampled_from([SHORT, 2 * SHORT]), seed=st.integers(0, 99))
def test_any_shape(m, k, seed):
    inputs = _inputs(m, k, seed)
    assert mismatch(SPEC, inputs, _interpreted(*inputs)) is None


@given(st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=1, max_size=20), st.booleans())
def test_split_weights_keep_sixteen_bits(values, negative):
    fn = torch.tensor([values]) * (-1 if negative else 1)
    parts = split_weights(fn).double()
    assert ((parts[0] + parts[1] - fn.double()).abs() <= 2.0**-17 * fn.double().abs()).all()


def test_parts_add_up_to_the_product_of_fp32_weights():
    x = torch.randn(5, SHORT, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    fn = torch.randn(24, SHORT, generator=torch.Generator().manual_seed(2))
    parts, squares = _interpreted(x, split_weights(fn))
    exact = x.double() @ fn.double().T
    magnitudes = x.double().abs() @ fn.double().abs().T
    # 2**-17 of the weights, and 31 additions of fp32 on top of the parts' own rounding.
    assert ((parts.double().sum(1) - exact).abs() <= 2.0**-16 * magnitudes).all()
    total = x.double().square().sum(1)
    assert ((squares.double().sum(1) - total).abs() <= 2.0**-20 * total).all()


def test_each_part_has_its_own_channels():
    """One channel of each part is not zero: no part sees another's."""
    x = torch.zeros(2, SHORT, dtype=torch.bfloat16)
    width = SHORT // PARTS
    x[1, ::width] = torch.arange(1, PARTS + 1).to(torch.bfloat16)
    parts, squares = _interpreted(x, split_weights(torch.ones(24, SHORT)))
    assert torch.equal(parts[1], torch.arange(1.0, PARTS + 1)[:, None].expand(PARTS, 24))
    assert torch.equal(squares[1], torch.arange(1.0, PARTS + 1) ** 2)
    assert not parts[0].any()


def test_rows_do_not_depend_on_the_batch():
    x, fn = _inputs(140)
    full = _interpreted(x, fn)
    for first, count in ((0, 1), (63, 2), (64, 64), (7, 129)):
        for got, want in zip(_interpreted(x[first : first + count].clone(), fn), full, strict=True):
            assert torch.equal(bits(got), bits(want[first : first + count]))


def test_nan_touches_its_row_and_part_alone():
    x, fn = _inputs(3)
    x[1, 130] = torch.nan
    parts, squares = _interpreted(x, fn)
    assert parts[1, 1].isnan().all()
    assert squares[1, 1].isnan()
    assert int(parts.isnan().sum()) == 24
    assert int(squares.isnan().sum()) == 1


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        (lambda x, fn: (x.float(), fn), r"x\.dtype == torch.bfloat16, got x\.dtype=torch.float32"),
        (lambda x, fn: (x[:, :512].contiguous(), fn), r"k % STEP == 0, got k=512"),
        (lambda x, fn: (x.t(), fn), r"x contiguous"),
        (lambda x, fn: (x, fn[0]), r"fn\.ndim == 3"),
        (lambda x, fn: (x, fn.float()), r"fn\.dtype == torch.bfloat16"),
        (lambda x, fn: (x, fn[:, :23].contiguous()), r"fn\.shape == \(2, 24, 4096\), got fn\.shape=\(2, 23"),
        (lambda x, fn: (x, fn.to("meta")), r"fn\.device == cpu, got fn\.device=meta"),
    ],
)
def test_bad_calls_name_the_clause_and_the_value(change, clause):
    with pytest.raises(ContractError, match=clause):
        mhc_gemm(*change(*_inputs(4)))


def test_split_weights_wants_fp32():
    with pytest.raises(ContractError, match=r"fn\.dtype == torch.float32"):
        split_weights(torch.zeros(24, 64, dtype=torch.bfloat16))
