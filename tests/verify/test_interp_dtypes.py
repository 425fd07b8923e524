"""Casts and bit patterns of every scalar type, against tables enumerated here."""

import itertools
import math
import struct

import pytest
import tilelang.language as T
import torch

from verify import interp
from verify.interp import dtypes

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
NAN = float("nan")


def small_float(code, exponent_bits, mantissa_bits, bias):
    """Value of a small float's bits, by the definition; no special codes."""
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = code & (1 << mantissa_bits) - 1
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) & 1 else 1.0
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa * 2.0**-mantissa_bits) * 2.0 ** (exponent - bias)


def e4m3(code):
    return NAN if code & 0x7F == 0x7F else small_float(code, 4, 3, 7)


def e5m2(code):
    if code & 0x7F > 0x7C:
        return NAN
    return (
        math.copysign(math.inf, 1 - (code >> 7) * 2) if code & 0x7F == 0x7C else small_float(code, 5, 2, 15)
    )


def e8m0(code):
    return NAN if code == 255 else 2.0 ** (code - 127)


def e2m1(code):
    return -E2M1[code & 7] if code & 8 else E2M1[code & 7]


VALUES = {
    "float8_e4m3fn": [e4m3(c) for c in range(256)],
    "float8_e5m2": [e5m2(c) for c in range(256)],
    "float8_e8m0fnu": [e8m0(c) for c in range(256)],
    "float4_e2m1fn": [e2m1(c) for c in range(16)],
}
ALL_BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def nearest_even(x, name):
    """Code nearest to x among the finite ones, the even one of two as near; NaN as CUDA encodes it."""
    bits = 4 if name == "float4_e2m1fn" else 8
    if math.isnan(x):
        return 0x7 if bits == 4 else 0x7F
    table = VALUES[name][: 1 << (bits - 1)]
    finite = [c for c, v in enumerate(table) if math.isfinite(v)]
    magnitude = min(abs(x), table[finite[-1]])
    code = min(finite, key=lambda c: (abs(table[c] - magnitude), c & 1))
    return code | (math.copysign(1, x) < 0) << (bits - 1)


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def cast_kernel(source, target, n):
    @T.prim_func
    def cast(x: T.Tensor[(n,), source], y: T.Tensor[(n,), target]):
        with T.Kernel(1, threads=128) as _:
            for i in T.Parallel(n):
                y[i] = T.cast(x[i], target)

    return cast


@pytest.mark.parametrize("name", VALUES)
def test_decode_gives_every_code_its_defined_value(name):
    want = torch.tensor(VALUES[name], dtype=torch.float64)
    got = dtypes.decode(torch.arange(len(want), dtype=torch.uint8), name).double()
    assert same(got, want)
    assert torch.equal(torch.signbit(got)[~got.isnan()], torch.signbit(want)[~want.isnan()])


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"])
def test_encode_of_every_bf16_is_the_nearest_code(name):
    got = dtypes.encode(ALL_BF16.float(), name)
    want = torch.tensor([nearest_even(x, name) for x in ALL_BF16.float().tolist()], dtype=torch.uint8)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"])
def test_encode_at_and_beside_every_midpoint(name):
    finite = sorted({v for v in VALUES[name] if math.isfinite(v)})
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(finite)], dtype=torch.float32)
    points = torch.cat([torch.nextafter(middles, torch.tensor(s * math.inf)) for s in (-1, 1)] + [middles])
    want = torch.tensor([nearest_even(x, name) for x in points.tolist()], dtype=torch.uint8)
    assert torch.equal(dtypes.encode(points, name), want)


def test_encode_e4m3_agrees_with_torch_where_torch_does_not_overflow():
    x = ALL_BF16[ALL_BF16.abs() <= 448]
    want = x.to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(dtypes.encode(x.float(), "float8_e4m3fn"), want)


@pytest.mark.parametrize("name", VALUES)
def test_encode_is_the_inverse_of_decode(name):
    codes = torch.arange(len(VALUES[name]), dtype=torch.uint8)
    value = dtypes.decode(codes, name)
    keep = value.isfinite()
    assert torch.equal(dtypes.encode(value, name)[keep], codes[keep])


@pytest.mark.parametrize(
    ("x", "code"),
    [
        (1.0, 127),
        (1.0000001, 128),
        (-3.0, 129),  # the magnitude, rounded up
        (2.0**-127, 0),
        (1.5 * 2.0**-127, 1),
        (2.0**-149, 0),
        (0.0, 0),
        (2.0**127, 254),
        (3e38, 254),
        (math.inf, 254),
        (NAN, 255),
    ],
)
def test_encode_e8m0_rounds_up_and_saturates(x, code):
    assert dtypes.encode(torch.tensor([x]), "float8_e8m0fnu").tolist() == [code]


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_cast_to_16_bits_makes_nan_canonical(name):
    payload = torch.tensor([0x7FC00001, -0x00400000], dtype=torch.int32).view(torch.float32)
    assert payload.isnan().all()
    got = dtypes.cast(payload, "float32", name)
    assert got.view(torch.int16).tolist() == [0x7FFF, 0x7FFF]


def test_cast_from_float64_rounds_once():
    # Between two bf16 values, above the midpoint by less than float32 resolves.
    x = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8, 1 + 3 * 2.0**-8 - 2.0**-40], dtype=torch.float64)
    got = dtypes.cast(x, "float64", "bfloat16").double()
    assert got.tolist() == [1 + 2.0**-7, 1.0, 1 + 2.0**-7]


@pytest.mark.parametrize(
    ("target", "low", "high"),
    [("int32", -(2**31), 2**31 - 1), ("uint32", 0, 2**32 - 1), ("int64", -(2**63), 2**63 - 1)],
)
def test_cast_float_to_int_truncates_and_saturates(target, low, high):
    x = torch.tensor([1.9, -0.9, NAN, math.inf, -math.inf, 1e30, -1e30])
    assert dtypes.cast(x, "float32", target).tolist() == [1, 0, 0, high, low, high, low]


def test_cast_float_to_narrow_int_goes_through_32_bits():
    x = torch.tensor([300.0, -1.5, 1e10])
    assert dtypes.cast(x, "float32", "uint8").tolist() == [300 - 256, 0, 255]
    assert dtypes.cast(x, "float32", "int8").tolist() == [44, -1, -1]


@pytest.mark.parametrize("name", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_cast_int_wraps_like_c(name):
    x = [-(2**40) - 1, -129, -1, 0, 127, 128, 255, 65535, 2**31, 2**32 + 7]
    letter = {"int8": "b", "uint8": "B", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I"}[name]
    size = struct.calcsize(letter)
    want = [struct.unpack("<" + letter, struct.pack("<q", v)[:size])[0] for v in x]
    assert dtypes.cast(torch.tensor(x), "int64", name).tolist() == want


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int8", "uint16", "uint32", "int64"])
def test_bits_round_trip(name):
    pattern = torch.tensor([0, 1, 0x7F, 0x55])
    assert torch.equal(dtypes.to_bits(dtypes.from_bits(pattern, name), name), pattern)


def test_kernel_casts_all_e4m3_codes_to_float32():
    codes = torch.arange(256, dtype=torch.uint8)
    out = torch.empty(256)
    interp.run(cast_kernel("float8_e4m3fn", "float32", 256), codes.view(torch.float8_e4m3fn), out)
    assert same(out.double(), torch.tensor(VALUES["float8_e4m3fn"], dtype=torch.float64))


@pytest.mark.parametrize("given", [torch.uint8, torch.float8_e8m0fnu])
def test_kernel_casts_all_e8m0_codes_to_bfloat16(given):
    codes = torch.arange(256, dtype=torch.uint8)
    out = torch.empty(256, dtype=torch.bfloat16)
    interp.run(cast_kernel("float8_e8m0fnu", "bfloat16", 256), codes.view(given), out)
    assert same(out.double(), torch.tensor(VALUES["float8_e8m0fnu"], dtype=torch.float64))


@pytest.mark.parametrize("given", [torch.uint8, torch.int8, torch.float4_e2m1fn_x2])
def test_kernel_reads_packed_fp4_low_nibble_first(given):
    octets = torch.arange(256, dtype=torch.uint8)
    out = torch.empty(512)
    interp.run(cast_kernel("float4_e2m1fn", "float32", 512), octets.view(given), out)
    want = [e2m1(n) for o in range(256) for n in (o & 15, o >> 4)]
    assert torch.equal(out, torch.tensor(want))


def test_kernel_writes_packed_fp4():
    x = torch.tensor([6.0, -0.5, 2.4, 2.5, 100.0, -0.0, 5.0, 0.25])
    out = torch.full((4,), 0xEE, dtype=torch.uint8)
    interp.run(cast_kernel("float32", "float4_e2m1fn", 8), x, out)
    codes = [nearest_even(v, "float4_e2m1fn") for v in x.tolist()]
    assert out.tolist() == [lo | hi << 4 for lo, hi in zip(codes[::2], codes[1::2], strict=True)]


def test_kernel_casts_every_bf16_to_e4m3():
    out = torch.empty(1 << 16, dtype=torch.float8_e4m3fn)
    interp.run(cast_kernel("bfloat16", "float8_e4m3fn", 1 << 16), ALL_BF16, out)
    want = [nearest_even(x, "float8_e4m3fn") for x in ALL_BF16.float().tolist()]
    assert out.view(torch.uint8).tolist() == want


def test_kernel_copy_keeps_the_bits_of_a_nan():
    @T.prim_func
    def move(x: T.Tensor[(256,), T.float8_e5m2], y: T.Tensor[(256,), T.float8_e5m2]):
        with T.Kernel(1, threads=128) as _:
            s = T.alloc_shared((256,), T.float8_e5m2)
            T.copy(x, s)
            T.copy(s, y)

    codes = torch.arange(256, dtype=torch.uint8)
    out = torch.zeros(256, dtype=torch.uint8)
    interp.run(move, codes.view(torch.float8_e5m2), out.view(torch.float8_e5m2))
    assert torch.equal(out, codes)


def test_reinterpret_between_float_and_int():
    @T.prim_func
    def bits(x: T.Tensor[(6,), T.float32], y: T.Tensor[(6,), T.int32], h: T.Tensor[(6,), T.uint16]):
        with T.Kernel(1, threads=128) as _:
            for i in T.Parallel(6):
                y[i] = T.reinterpret(x[i], "int32")
                h[i] = T.reinterpret(T.cast(x[i], "bfloat16"), "uint16")

    x = torch.tensor([0.0, -0.0, 1.0, -2.5, math.inf, 1e-45])
    y, h = torch.empty(6, dtype=torch.int32), torch.empty(6, dtype=torch.uint16)
    interp.run(bits, x, y, h)
    assert torch.equal(y, x.view(torch.int32))
    assert h.tolist() == [0, 0x8000, 0x3F80, 0xC020, 0x7F80, 0]
