"""Registered device functions: their texts mean what is registered, and kernels may bring in no others."""

from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from tilelang import language as T

from dsv4_kernels.contract import Contract
from tests.verify import samples
from verify import externs, formats, interp, ir
from verify.externs import ctext, proof
from verify.externs.registry import Extern, register
from verify.externs.words import MASK
from verify.verdict import Verdict

LOW, HIGH = formats.e4m3_table(0)
CALL = getattr(T, "call_extern")  # noqa: B009  (declared dynamically)
CONTRACT = Contract(("0 <= m", "m <= 65536"))


# --------------------------------------------------------------------------- texts
@pytest.mark.parametrize("extern", externs.everything(), ids=lambda e: e.name)
def test_every_text_computes_its_meaning(extern):
    assert proof.proved(extern.name) == ()


def wrong(name: str, body: str, meaning, **more) -> Extern:
    return Extern(
        name, f"__device__ __forceinline__ unsigned {name}(unsigned a) {{ {body} }}\n", meaning, **more
    )


def test_a_text_that_computes_something_else_has_a_counterexample():
    extern = wrong("off_by_one", "return a + 2u;", lambda words, v, _: words.add(v["a"], words.const(1)))
    failed = [q.decide() for q in proof.questions(extern)]
    assert any(d.is_refuted for d in failed)


def test_a_shift_by_32_is_not_defined():
    extern = wrong("wide_shift", "return 1u << a;", lambda words, v, _: words.shl(words.const(1), v["a"]))
    assert not all(q.decide().is_valid for q in proof.questions(extern))


@pytest.mark.parametrize(
    "body",
    [
        "return a / 3u;",
        "return a + 1;",
        "return b;",
        "unsigned x; return x;",
        'asm("mul.lo.u32 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(a)); return a;',
        'asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(a) : "r"(a), "r"(a), "r"(a), "r"(a)); return a;',
        "a = 1u;",
        "return a; a = 1u;",
        "for (;;) {} return a;",
        "return unknown(a);",
    ],
)
def test_other_texts_are_not_understood(body):
    with pytest.raises(ir.UnsupportedIR):
        ctext.parse(f"__device__ __forceinline__ unsigned f(unsigned a) {{ {body} }}", {})


def test_a_name_has_one_meaning():
    with pytest.raises(ValueError, match="new name"):
        register(externs.everything()[0])


# --------------------------------------------------------------------------- FP4 to FP8
def test_lossless_offsets_are_exactly_the_exact_ones():
    assert formats.lossless_offsets() == range(-8, 7)
    step, top = Fraction(1, 2**9), 448
    for offset in range(-30, 30):
        values = [Fraction(v) * Fraction(2) ** offset for v in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]
        exact = all(v <= top and v % step == 0 for v in values)
        assert exact == (offset in formats.lossless_offsets())
    with pytest.raises(ValueError, match="offset"):
        formats.e4m3_table(7)


@pytest.mark.parametrize("offset", formats.lossless_offsets())
def test_expansion_of_every_code_pair_is_the_exact_product(offset):
    """All 2**16 lower halves against torch's own e4m3."""
    codes = np.arange(1 << 16)
    word = externs.apply("dsv4_expand_e2m1x4", codes, *formats.e4m3_table(offset))[0]
    octets = torch.from_numpy(word.astype(np.uint32).view(np.uint8).reshape(-1, 4).copy())
    got = octets.view(torch.float8_e4m3fn).float()
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) * 2.0**offset
    nibbles = torch.stack([torch.from_numpy(codes >> (4 * n) & 15) for n in range(4)], dim=1)
    wanted = magnitudes[nibbles & 7] * torch.where(nibbles > 7, -1, 1)
    assert torch.equal(got, wanted)


def test_crossed_codes_expand_to_the_same_words():
    codes = np.random.default_rng(0).integers(0, 1 << 32, 4096)
    for suffix in ("", "_apart"):
        plain = externs.apply(f"dsv4_expand_e2m1x8{suffix}", codes, LOW, HIGH)
        crossed = externs.apply(f"dsv4_expand_crossed_e2m1x8{suffix}", externs.cross_signs(codes), LOW, HIGH)
        assert all(np.array_equal(a, b) for a, b in zip(plain, crossed, strict=True))


# --------------------------------------------------------------------------- kernels
@cache
def expanding(threads: int = 128, text: str = externs.source("dsv4_expand_e2m1x4", "dsv4_store_b32")):
    """Words of codes expanded straight into the registers of a wgmma operand."""
    m = T.dynamic("m")

    @T.prim_func
    def expanding_kernel(
        w: T.Tensor[(64, 4), T.int32],
        x: T.Tensor[(m, 32), T.float8_e4m3fn],
        out: T.Tensor[(m, 64), T.float32],
    ):
        with T.Kernel(T.ceildiv(m, 32), threads=threads) as bm:
            T.import_source(text)
            words = T.alloc_shared((64, 4), T.int32)
            x_tile = T.alloc_shared((32, 32), T.float8_e4m3fn)
            expanded = T.alloc_fragment((64, 32), T.float8_e4m3fn)
            acc = T.alloc_fragment((64, 32), T.float32)
            T.copy(w, words)
            T.copy(x[bm * 32, 0], x_tile)
            for i, j in T.Parallel(64, 8):
                codes = T.shift_right(words[i, j // 2], (j % 2) * 16)
                word = CALL("int32", "dsv4_expand_e2m1x4", codes, LOW, HIGH)
                CALL("handle", "dsv4_store_b32", T.address_of(expanded[i, j * 4]), word)
            T.gemm(expanded, x_tile, acc, transpose_B=True, clear_accum=True)
            for i, j in T.Parallel(64, 32):
                out[bm * 32 + j, i] = acc[i, j]

    return expanding_kernel


@cache
def sound():
    return samples.context(expanding(), CONTRACT)


@pytest.mark.parametrize("name", ["overflow", "bounds", "alignment", "refinement"])
def test_a_kernel_that_stores_words_into_registers_is_proved(name):
    result = samples.verdict(sound(), name)
    assert result.verdict is Verdict.PROVED, result.findings


def test_words_stored_by_half_of_the_warpgroups_are_refuted():
    """The operand is held by both warpgroups, and the compiler lets one of them run the loop."""
    result = samples.verdict(samples.context(expanding(threads=256), CONTRACT), "refinement")
    assert result.verdict is Verdict.REFUTED
    assert "not written" in result.findings[0].message


def test_the_interpreter_runs_the_meaning():
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-(2**31), 2**31, (64, 4), generator=generator, dtype=torch.int64).to(torch.int32)
    x = torch.randn(5, 32, generator=generator).to(torch.float8_e4m3fn)
    out = torch.empty(5, 64)
    interp.run(expanding(), w, x, out)
    octets = np.stack(externs.apply("dsv4_expand_e2m1x8", w.numpy(), LOW, HIGH), axis=-1).astype(np.uint32)
    values = torch.from_numpy(octets.view(np.uint8).reshape(64, 32)).view(torch.float8_e4m3fn)
    assert torch.equal(out, x.float() @ values.float().T)


def test_another_text_is_unsupported():
    text = externs.source("dsv4_expand_e2m1x4", "dsv4_store_b32").replace("0x9D8C", "0x9D8D")
    result = samples.verdict(samples.context(expanding(text=text), CONTRACT), "bounds")
    assert result.verdict is Verdict.UNSUPPORTED
    assert any("not registered" in f.message for f in result.findings)


def test_a_text_that_is_not_imported_is_unsupported():
    result = samples.verdict(
        samples.context(expanding(text=externs.source("dsv4_store_b32")), CONTRACT), "bounds"
    )
    assert any("is not imported" in f.message for f in result.findings)


def test_a_word_store_off_by_one_element_is_refuted():
    context = samples.context(expanding(), CONTRACT)
    call = next(
        c for c in samples.calls(context.extracted.device, "call_extern") if "store" in c.args[0].value
    )
    load = call.args[1].args[0]
    load.indices = (samples.plus(load.indices[0], 1),)
    for name in ("bounds", "alignment", "refinement"):
        assert samples.verdict(context, name).verdict is Verdict.REFUTED


def test_words_keep_their_bits():
    assert externs.apply("dsv4_prmt", -1, 0, 0x7654)[0] == 0
    assert externs.apply("dsv4_prmt", -1, 0, 0x3210)[0] == MASK
    assert externs.apply("dsv4_prmt", 0x80, 0, 0x8888)[0] == MASK
