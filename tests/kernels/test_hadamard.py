"""The indexer's queries and keys: any bits of bf16, rows that are not finite among them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_kernels.attention import reference
from dsv4_kernels.attention.hadamard_quant import hadamard_fp4, hadamard_fp8
from tests.compare import bits

KINDS = {hadamard_fp4: reference.hadamard_fp4, hadamard_fp8: reference.hadamard_fp8}
SPECIAL = (0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81)
EXPONENT_BITS = 7  # above bf16's mantissa


def rows_of(seed, exponent, num_heads, special):
    """Return rows of values near one exponent, some with special ones, positions and angles."""
    generator = torch.Generator().manual_seed(seed)
    shape = (5, num_heads, 128)
    near = (exponent - torch.randint(0, 4, shape, generator=generator)).clamp(min=0) << EXPONENT_BITS
    raw = near | torch.randint(0, 128, shape, generator=generator)
    raw |= torch.randint(0, 2, shape, generator=generator) << 15
    for value in special:
        row = [int(torch.randint(0, n, (), generator=generator)) for n in shape]
        raw[tuple(row)] = value
    raw[4, 0] = 0
    positions = torch.tensor((0, 6, -1, 7, 3), dtype=torch.int32)
    return raw.to(torch.int16).view(torch.bfloat16), positions, reference.rope_table(7, 160000.0, True)


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", KINDS)
@settings(max_examples=6)
@given(
    seed=st.integers(1, 2**31),
    exponent=st.sampled_from((0, 1, 100, 127, 245, 254)),
    num_heads=st.sampled_from((1, 16)),
    special=st.lists(st.sampled_from(SPECIAL), max_size=2),
)
def test_any_values(kernel, seed, exponent, num_heads, special):
    inputs = rows_of(seed, exponent, num_heads, special)
    for got, want in zip(kernel(*inputs), KINDS[kernel](*inputs), strict=True):
        assert torch.equal(bits(got), bits(want))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("exponent", [0, 1, 100, 127, 245, 254])
def test_gpu_any_values(kernel, exponent):
    for seed in range(4):
        inputs = rows_of(seed, exponent, 64, SPECIAL[seed * 3 :][:3])
        found = kernel(*(x.cuda() for x in inputs))
        for got, want in zip(found, KINDS[kernel](*inputs), strict=True):
            assert torch.equal(bits(got.cpu()), bits(want))
