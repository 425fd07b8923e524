"""The indexer's queries and keys: any bits of bf16, rows that are not finite among them; their codes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_kernels.attention import hadamard_codes, reference
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
    raw[0] &= 0x8000  # zeros of both signs
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


def as_f32(bits_of_f32):
    return bits_of_f32.astype(np.uint32).view(np.float32)


def bf16_of(values):
    """Return the bits of float32 values rounded to bf16: to nearest, ties to even."""
    word = values.view(np.uint32).astype(np.int64)
    return (word + 0x7FFF + (word >> 16 & 1)) >> 16


@pytest.mark.parametrize(("kind", "least", "largest"), [("fp4", 6 * 2.0**-126, 6), ("fp8", 1e-4, 448)])
@pytest.mark.parametrize("exponents", [range(8), range(115, 120), (127, 252, 253, 254)])
def test_scale_by_one_carry(kind, least, largest, exponents):
    """Every magnitude of these binades; between them, both sides are the same but for the exponent."""
    carry, bias, lowest = hadamard_codes._STEPS[kind]
    mantissas = np.arange(1 << 23, dtype=np.int64)
    for exponent in exponents:
        amax = (exponent << 23) + mantissas
        rounded = as_f32(bf16_of(as_f32(amax) * np.float32(128**-0.5)) << 16).astype(np.float64)
        fraction, power = np.frexp(np.maximum(rounded, np.float64(np.float32(least))) / largest)
        wanted = power - (fraction == 0.5) + 127
        assert np.array_equal(np.maximum((amax + carry >> 23) - bias, lowest), wanted)
        assert amax[-1] + carry < 1 << 31


def test_codes_of_every_magnitude_over_every_scale():
    """The steps of `cast_fp4`, float by float, against the thresholds of E2M1: ties to the even code."""
    half = as_f32(np.arange(0x7F80, dtype=np.int64) << 16)
    starts = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5, False))
    slope, sums = (np.float64(np.float32(x)) for x in (hadamard_codes.E2M1_SLOPE, hadamard_codes.E2M1_SUM))
    for scale in range(1, 254):
        exact = half.astype(np.float64) / 2.0 ** (scale - 127)
        half_in, exact = half[exact <= 6], exact[exact <= 6]
        wanted = sum((exact >= x if is_up else exact > x).astype(np.int64) for x, is_up in starts)
        factor = as_f32(np.array([254 - scale]) << 23) * np.float32(hadamard_codes.E2M1_FACTOR)
        scaled = half_in * factor
        # The sum is rounded twice here: by the next floats, too, codes are the same.
        small = (scaled.astype(np.float64) * slope + sums).astype(np.float32)
        for other in (small, np.nextafter(small, np.float32(1)), np.nextafter(small, np.float32(0))):
            got = bf16_of(np.maximum(scaled, other)) + hadamard_codes.E2M1_CARRY
            assert np.array_equal(got >> 6 & 7, wanted)
            assert np.all(got < 1 << 15)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("exponent", [0, 1, 100, 127, 245, 254])
def test_gpu_any_values(kernel, exponent):
    for seed in range(4):
        inputs = rows_of(seed, exponent, 64, SPECIAL[seed * 3 :][:3])
        found = kernel(*(x.cuda() for x in inputs))
        for got, want in zip(found, KINDS[kernel](*inputs), strict=True):
            assert torch.equal(bits(got.cpu()), bits(want))
