"""Quantisers: rounding rule, special values, every code, bad calls."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv4_kernels
from dsv4_kernels.contract import ContractError
from dsv4_kernels.quant import reference
from dsv4_kernels.quant.act_quant import act_quant
from dsv4_kernels.quant.fp4_quant import fp4_dequant, fp4_quant
from tests.compare import bits

SPECIAL = (
    0x0000,
    0x8000,
    0x0001,
    0x8001,
    0x007F,
    0x0080,
    0x7F7F,
    0xFF7F,
    0x7F80,
    0xFF80,
    0x7FC0,
    0xFFC1,
    0x7F81,
)


def _bf16(rows):
    """Return bf16 [len(rows), len(rows[0])] of raw 16-bit patterns."""
    return torch.tensor(rows, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@st.composite
def patterns(draw, block):
    """Rows of raw bf16 patterns: plain values near one exponent, with some special ones among them."""
    m, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    exponent = draw(st.integers(0, 254))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    size = (m, blocks * block)
    spread = torch.randint(0, 1 + draw(st.integers(0, 12)), size, generator=generator)
    mantissa = torch.randint(0, 128, size, generator=generator)
    sign = torch.randint(0, 2, size, generator=generator) << 15
    raw = sign | ((exponent - spread).clamp(min=0) << 7) | mantissa
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=3)):
        raw[draw(st.integers(0, m - 1)), draw(st.integers(0, blocks * block - 1))] = value
    return raw.to(torch.int16).view(torch.bfloat16)


def _same(got, want):
    return all(torch.equal(bits(g), bits(w)) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("block", [128, 64, 32])
@settings(max_examples=25)
@given(data=st.data())
def test_act_quant_any_values(block, data):
    x = data.draw(patterns(block))
    with dsv4_kernels.backend("interpret"):
        assert _same(act_quant(x, block), reference.act_quant(x, block))


@settings(max_examples=40)
@given(patterns(32))
def test_fp4_quant_any_values(x):
    with dsv4_kernels.backend("interpret"):
        assert _same(fp4_quant(x), reference.fp4_quant(x))


def test_fp4_quant_rounds_ties_to_even():
    ties = {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6, 6.0: 7, 0.5: 1, 3.0: 5}
    values = [*ties, *(-t for t in ties)]
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, : len(values)] = torch.tensor(values)
    with dsv4_kernels.backend("interpret"):
        packed, scale = fp4_quant(x)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten()
    assert scale.view(torch.uint8).item() == 127
    assert codes[: len(values)].tolist() == [*ties.values(), *(8 | c for c in ties.values())]


def test_scale_is_the_least_power_of_two_that_fits():
    for raw in range(0x0080, 0x7F80, 97):  # bf16 magnitudes over all exponents
        x = _bf16([[raw] + [0] * 127])
        _, scale = act_quant(x)
        exponent = int(scale.view(torch.uint8)) - 127
        amax = max(float(x[0, 0]), 1e-4)
        assert amax <= 448 * 2.0**exponent
        assert amax > 448 * 2.0 ** (exponent - 1) or exponent == -22


def test_dequant_inverts_every_code_and_scale():
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)  # every byte under every scale
    scale = (
        torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous().view(torch.float8_e8m0fnu)
    )
    with dsv4_kernels.backend("interpret"):
        got = fp4_dequant(codes, scale)
    assert _same((got,), (reference.fp4_dequant(codes, scale),))


def test_quantised_codes_are_fixed_points():
    """Values that fp4 holds exactly come back exactly."""
    generator = torch.Generator().manual_seed(3)
    packed = torch.randint(0, 256, (8, 64), generator=generator, dtype=torch.uint8)
    packed[:, ::16] |= 7  # an element of magnitude 6 in every block fixes its scale
    scale = torch.randint(2, 250, (8, 4), generator=generator, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    x = fp4_dequant(packed, scale)
    again, scale_again = fp4_quant(x)
    assert torch.equal(again, packed)
    assert torch.equal(scale_again.view(torch.uint8), scale.view(torch.uint8))


X = torch.zeros(4, 256, dtype=torch.bfloat16)
NOT_A_TENSOR: Any = [1.0]


@pytest.mark.parametrize(
    ("call", "clause"),
    [
        (lambda: act_quant(X.float()), r"x\.dtype == torch.bfloat16, got x\.dtype=torch.float32"),
        (lambda: act_quant(X[0]), r"x\.ndim == 2, got x\.shape=\(256,\)"),
        (lambda: act_quant(X.T), r"x contiguous, got x\.stride\(\)=\(1, 256\)"),
        (lambda: act_quant(X[:, :128]), r"x contiguous"),
        (lambda: act_quant(X, 48), r"block_k in \(128, 64, 32\), got block_k=48"),
        (lambda: act_quant(X[:, :32].contiguous(), 64), r"k % block_k == 0, got k=32, block_k=64"),
        (lambda: act_quant(X[:, :0].contiguous()), r"0 < k, got k=0"),
        (lambda: act_quant(NOT_A_TENSOR), r"x to be a tensor, got x=list"),
        (lambda: act_quant(X.flatten()[1:129].view(1, 128)), r"x\.data_ptr\(\) % 16 == 0"),
        (lambda: fp4_quant(X[:, :48].contiguous()), r"k % BLOCK_K == 0, got k=48"),
        (lambda: fp4_quant(X.half()), r"x\.dtype == torch.bfloat16"),
        (lambda: fp4_dequant(X, X), r"packed\.dtype == torch.uint8"),
        (
            lambda: fp4_dequant(
                torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 2).to(torch.float8_e8m0fnu)
            ),
            r"scale\.shape == \(2, 1\), got scale\.shape=\(2, 2\)",
        ),
    ],
)
def test_bad_calls_name_the_clause_and_the_value(call, clause):
    with pytest.raises(ContractError, match=clause):
        call()
