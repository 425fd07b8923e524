"""Property format: expressions on the bits of floats are conversions, exactly."""

import itertools
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from tilelang import language as T

from dsv4_kernels.contract import Contract
from dsv4_kernels.tile import scale as macros
from tests.verify import samples, test_externs
from verify import externs, formats, ir
from verify.tricks import catalogue, match
from verify.tricks.evaluate import OnArrays
from verify.verdict import Verdict

CONTRACT = Contract(("0 <= m", "m <= 65536"))


@cache
def elementwise(function, source: str, target: str):
    m = T.dynamic("m")

    @T.prim_func
    def elementwise_kernel(x: T.Tensor[(m, 128), source], out: T.Tensor[(m, 128), target]):
        with T.Kernel(m, threads=128) as bm:
            for j in T.Parallel(128):
                out[bm, j] = function(x[bm, j])

    return elementwise_kernel


def result_of(function, source: str, target: str):
    return samples.verdict(samples.context(elementwise(function, source, target), CONTRACT), "format")


def nibble_to_e4m3(byte):
    """Shift the two exponent bits and the mantissa into place, rebias, patch the subnormal 0.5."""
    code = T.cast(byte, "int32")
    magnitude = code & 7
    normal = ((magnitude >> 1) + 6) << 3 | (magnitude & 1) << 2
    patched = T.if_then_else(magnitude == 1, 0x30, T.if_then_else(magnitude == 0, 0, normal))
    return T.reinterpret(T.cast(patched | (code & 8) << 4, "uint8"), "float8_e4m3fn")


def ue8m0_ceil(value):
    bits = T.reinterpret(value, "int32")
    return (bits >> 23) + T.cast((bits & 0x7FFFFF) != 0, "int32")


def next_above(value):
    return T.reinterpret(T.reinterpret(value, "int32") + 1, "float32")


def with_sign(value, magnitude=0x7FFFFFFF, sign=-0x80000000, of=lambda v: v * v + T.float32(1)):
    """Return a computed number with the sign of `value`."""
    bits, own = T.reinterpret(of(value), "int32"), T.reinterpret(value, "int32")
    return T.reinterpret((bits & T.int32(magnitude)) | (own & T.int32(sign)), "float32")


def estimate(value, constant=0x7EF311C7):
    return T.reinterpret(constant - T.reinterpret(value, "int32"), "float32")


SOUND = {
    "next above": (next_above, "float32", "float32"),
    "sign of another": (with_sign, "float32", "float32"),
    "estimate of a reciprocal": (estimate, "float32", "float32"),
    "ue8m0": (lambda v: macros.ue8m0_to_f32(v, 0), "int32", "float32"),
    "ue8m0 byte 2": (lambda v: macros.ue8m0_to_f32(v, 2), "int32", "float32"),
    "reciprocal": (macros.ue8m0_reciprocal, "int32", "float32"),
    "e2m1 code": (lambda v: macros.e2m1_code(T.min(v, 6.0)), "float32", "int32"),
    "e2m1 to e4m3": (nibble_to_e4m3, "uint8", "float8_e4m3fn"),
    "f32 to ue8m0": (ue8m0_ceil, "float32", "int32"),
    "bf16 to f32": (macros.bf16_bits_to_f32, "int32", "float32"),
    "block scale": (lambda v: macros.ue8m0_scale(v, 1e-4, 1.0 / 448), "int32", "int32"),
}


@pytest.mark.parametrize("name", SOUND)
def test_exact_conversions_are_proved(name):
    result = result_of(*SOUND[name])
    assert result.verdict is Verdict.PROVED, result.findings
    assert result.obligations >= 1


def off_at_255(word):
    byte = word & 0xFF
    return T.reinterpret(T.max(byte << 23, 0x400000), "float32")  # byte 255 becomes inf


def off_at_0(word):
    byte = word & 0xFF
    quiet = ((byte + 1) >> 8) << 22
    return T.reinterpret((byte << 23) | quiet, "float32")  # byte 0 becomes 0


def floor_scale(value):
    return T.reinterpret(value, "int32") >> 23  # rounds down


def nearest_scale(value):
    return (T.reinterpret(value, "int32") + 0x400000) >> 23


def ties_away(value):
    return T.reinterpret(T.max(value, 0.0) + 4194304.0, "int32") - 0x4A800000


def without_subnormal(byte):
    code = T.cast(byte, "int32")
    magnitude = code & 7
    normal = ((magnitude >> 1) + 6) << 3 | (magnitude & 1) << 2
    patched = T.if_then_else(magnitude == 0, 0, normal)  # 0.5 becomes 1.5 * 2**-1
    return T.reinterpret(T.cast(patched | (code & 8) << 4, "uint8"), "float8_e4m3fn")


WRONG = {
    "second above": (
        lambda v: T.reinterpret(T.reinterpret(v, "int32") + 2, "float32"),
        "float32",
        "float32",
        "",
    ),
    "next below": (
        lambda v: T.reinterpret(T.reinterpret(v, "int32") - 1, "float32"),
        "float32",
        "float32",
        "",
    ),
    "a bit of the magnitude lost": (lambda v: with_sign(v, 0x7FFFFFFE), "float32", "float32", ""),
    "both signs": (lambda v: with_sign(v, -1), "float32", "float32", ""),
    "no sign": (lambda v: with_sign(v, sign=0), "float32", "float32", "is no known conversion"),
    "a bit of the other's exponent": (
        lambda v: with_sign(v, 0x3FFFFFFF, -0x40000000),
        "float32",
        "float32",
        "is no known conversion",
    ),
    "estimate a little too large": (lambda v: estimate(v, 0x7F000001), "float32", "float32", ""),
    "estimate too small": (lambda v: estimate(v, 0x7E900000), "float32", "float32", ""),
    "estimate of half the reciprocal": (lambda v: estimate(v, 0x7E7311C7), "float32", "float32", ""),
    "nan lost": (off_at_255, "int32", "float32", "0xff"),
    "denormal lost": (off_at_0, "int32", "float32", "UE8M0 byte 0"),
    "rounded down": (floor_scale, "float32", "int32", "is no known conversion"),
    "rounded to nearest": (nearest_scale, "float32", "int32", "is no known conversion"),
    "one step for all binades": (ties_away, "float32", "int32", "E2M1 code"),
    "subnormal lost": (without_subnormal, "uint8", "float8_e4m3fn", "input 0x1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_at_some_input_is_not_proved(name):
    function, source, target, text = WRONG[name]
    result = result_of(function, source, target)
    assert result.verdict is Verdict.UNKNOWN
    assert any("no known conversion" in f.message and text in f.message for f in result.findings), (
        result.findings
    )


def test_another_divisor_is_not_taken_for_a_block_scale():
    """A product that is no division by an integer still has exact conversions in it, and no more."""
    wrong = float(np.float32(1 / 448) * np.float32(1 + 2**-8))
    result = result_of(lambda v: macros.ue8m0_scale(v, 1e-4, wrong), "int32", "int32")
    assert not any("least power of two" in n for n in result.notes)
    assert any("rounded up to a power of two" in n for n in result.notes)


# --------------------------------------------------------------------------- device functions
def test_a_table_of_e2m1_is_proved_and_another_refuted():
    context = samples.context(test_externs.expanding(), test_externs.CONTRACT)
    result = samples.verdict(context, "format")
    assert result.verdict is Verdict.PROVED
    assert any("times 2**0" in n for n in result.notes)
    call = next(c for c in samples.calls(context.extracted.device, "call_extern") if len(c.args) == 4)
    call.args = (*call.args[:-1], ir.Const(ir.INT32, int(call.args[-1].value) + 1))
    assert samples.verdict(context, "format").verdict is Verdict.REFUTED


@cache
def widening(step: int, mask: int, shift: int):
    """Codes widened through a table that an offset chooses at run time."""
    m = T.dynamic("m")
    source = externs.source("dsv4_prmt")

    @T.prim_func
    def widening_kernel(
        codes: T.Tensor[(m, 128), T.uint32],
        offsets: T.Tensor[(m, 128), T.int32],
        out: T.Tensor[(m, 128), T.uint32],
    ):
        with T.Kernel(m, threads=128) as bm:
            T.import_source(source)
            for j in T.Parallel(128):
                offset = (offsets[bm, j] >> 8) & 0xFF
                low = T.cast(0x14100800 + offset * step, "uint32")
                high = T.cast(0x24201C18 + offset * 0x08080808, "uint32")
                selector = codes[bm, j] & T.cast(mask, "uint32")
                signs = (codes[bm, j] << T.cast(shift, "uint32")) & T.cast(0x80808080, "uint32")
                out[bm, j] = test_externs.CALL("uint32", "dsv4_prmt", low, high, selector) | signs

    return widening_kernel


def test_a_table_chosen_at_run_time_is_proved_for_its_offsets():
    result = samples.verdict(samples.context(widening(0x08080800, 0x77777777, 0), CONTRACT), "format")
    assert result.verdict is Verdict.PROVED, result.findings
    assert any("crossed codes 0 to 3" in n and "2**(o -5) for o in 0 to 11" in n for n in result.notes)
    assert any("offsets) are in 0 to 11" in a for a in result.assumptions)


@pytest.mark.parametrize(
    ("step", "mask", "shift", "text"),
    [
        (0x08080808, 0x77777777, 0, "no table"),  # zero is scaled as well: exact for offset 0 alone
        (0x08080800, 0xFFFFFFFF, 0, "no known expansion"),  # bit 3 of a nibble replicates signs
        (0x08080800, 0x77777777, 3, "no known expansion"),
    ],
    ids=["zero scaled", "selector not masked", "signs elsewhere"],
)
def test_other_widenings_are_not_proved(step, mask, shift, text):
    result = samples.verdict(samples.context(widening(step, mask, shift), CONTRACT), "format")
    if text == "no table":
        assert any("for o in 0 to 0" in n for n in result.notes)
        assert any("are in 0 to 0" in a for a in result.assumptions)
        return
    assert result.verdict is Verdict.UNKNOWN
    assert any(text in f.message for f in result.findings)


# --------------------------------------------------------------------------- the catalogue itself
def test_estimates_are_off_by_an_eighth_at_most():
    """Of a binade and one where the estimate's exponent is the least; beside two solvers' bit-vectors."""
    meaning = catalogue.estimate(0x7EF311C7)
    assert meaning is not None
    for first in (127 << 23, meaning.domain[1] - (1 << 23)):
        bits = first + np.arange(1 << 23, dtype=np.int64)
        number, near = (b.astype(np.uint32).view(np.float32) for b in (bits, meaning.on_arrays(bits)))
        assert np.abs(number.astype(np.float64) * near - 1).max() <= 1 / 8


@pytest.mark.parametrize("constant", [0, -1, 0x00FFFFFF, 0x7F000001, 0x7E7311C7, 0x7FFFFFFF, 0xFFFFFFFF])
def test_other_constants_make_no_estimate(constant):
    assert catalogue.estimate(constant) is None


def test_the_next_above_counts_bits():
    (meaning,) = [m for m in catalogue.fixed() if m.name == "the next float32 above"]
    bits = np.array([0, 1, 0x7FFFFF, 0x800000, 0x3F7FFFFF, 0x3F800000, 0x7F7FFFFE, 0x7F7FFFFF])
    assert (meaning.on_arrays(bits) == bits + 1).all()
    assert meaning.domain == (0, 0x7F7FFFFF)


def test_scale_codes_are_the_least_powers_of_two():
    codes = catalogue.scale_codes(1e-4, 448)
    least = Fraction(float(np.float32(1e-4)))
    for bits in range(0, 0x7F80, 97):
        value = Fraction(float(np.uint32(bits << 16).view(np.float32)))
        scale = Fraction(2) ** (int(codes[bits]) - formats.UE8M0_BIAS)
        assert scale * 448 >= max(value, least) > scale * 224
    assert set(codes[0x7F80:]) == {255}


def test_e2m1_codes_of_every_midpoint_and_neighbour():
    (meaning,) = [m for m in catalogue.fixed() if m.name == "float32 magnitude to E2M1 code"]
    values = [Fraction(v) for v in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]
    inputs = [a + (b - a) * Fraction(k, 8) for a, b in itertools.pairwise(values) for k in range(9)]
    for value in inputs:
        bits = int(np.float32(float(value)).view(np.uint32))
        got = int(meaning.on_arrays(np.array([bits]))[0])
        best = min(abs(v - value) for v in values)
        ties = [c for c, v in enumerate(values) if abs(v - value) == best]
        assert got == (ties[0] if len(ties) == 1 else next(c for c in ties if c % 2 == 0))


@pytest.mark.parametrize("target", ["float8_e4m3fn", "float16", "bfloat16", "float32"])
def test_small_codes_against_torch(target):
    kind = getattr(torch, target)
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = np.arange(16)
    for meaning in catalogue.fixed():
        if meaning.target == (target,) and meaning.name.startswith("E2M1 code at bit 0 "):
            offset = int(meaning.name.split("2**")[1].split()[0]) if "2**" in meaning.name else 0
            value = (magnitudes * 2.0**offset)[codes & 7] * torch.where(torch.from_numpy(codes) > 7, -1, 1)
            size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[kind.itemsize]
            wanted = value.to(kind).view(size).to(torch.int64) & ((1 << 8 * kind.itemsize) - 1)
            assert (meaning.on_arrays(codes) == wanted.numpy()).all(), meaning.name


def test_each_reinterpret_is_found_once():
    x = ir.Var(ir.INT32, "x")
    cast = ir.Call(ir.DType("float32"), "reinterpret", (x,))
    both = ir.BinOp(ir.DType("float32"), "add", cast, cast)
    found = list(match.tricks(both))
    assert len(found) == 2
    assert all(t.meaning is None for t in found)  # any 32 bits, no conversion of them


def test_arrays_and_terms_agree_with_torch_on_float_rounding():
    x = ir.Var(ir.DType("float32"), "x")
    expr = ir.BinOp(x.dtype, "mul", x, ir.Const(x.dtype, 1 / 448))
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    got = OnArrays(frozenset({id(x)}), values)(expr)
    assert np.array_equal(got, (torch.from_numpy(values) * torch.tensor(1 / 448)).numpy())


def test_the_registry_is_what_the_format_property_checks():
    expanding = [e for e in externs.everything() if "expand" in e.name]
    assert len(expanding) == 5
    assert all({"low", "high"} <= set(e.word_parameters) for e in expanding)
