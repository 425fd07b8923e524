"""All parts of k in one block: the bits of parts that are written and folded; when it is chosen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv4_kernels
from dsv4_kernels.gemm import fold_parts, narrow_gemm, router_gemm
from dsv4_kernels.gemm.bf16_gemm import Config
from dsv4_kernels.gemm.narrow_summed import OUT_DTYPES, make_summed
from dsv4_kernels.tile.corrections import corrected
from dsv4_kernels.tile.unroll import ATTRIBUTE
from tests.compare import bits
from tests.verify.handover import composed_digest, digest_of, signature_of
from verify import interp
from verify.extract import extract

TORCH = {16: torch.bfloat16, 32: torch.float32}
SHIPPED = [(n, k, 16 if out == "bfloat16" else 32) for n, k, out in narrow_gemm.SHAPES]
SHIPPED += [(*shape, 32) for shape in router_gemm.SHAPES]
FORMS = sorted({(c, n, k, out) for n, k, out in SHIPPED for _, c in narrow_gemm._summed(n, k)}, key=str)
SHORT = 1024  # channels: one stage a part, or a few


def _operands(m, n, k, seed):
    """Small integers: every sum is exact, whatever the order in which the interpreter adds a chain."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(-8, 9, (rows, k), generator=generator).to(torch.bfloat16) for rows in (m, n))


def _summed(x, w, out_bits, config):
    out = torch.full((x.shape[0], w.shape[0]), torch.nan, dtype=TORCH[out_bits])
    interp.run(narrow_gemm.make_kernel(w.shape[0], x.shape[1], config, out_bits), x, w, out)
    return out


def _folded(x, w, out_bits):
    """Return what the other form computes: parts, written and added."""
    n, k = w.shape
    parts = x.new_empty((x.shape[0], narrow_gemm.PARTS, n), dtype=torch.float32)
    out = x.new_empty((x.shape[0], n), dtype=TORCH[out_bits])
    variant = narrow_gemm.select_for({"m": x.shape[0], "n": n, "k": k, "out_bits": narrow_gemm.PARTED}, 0)
    interp.run(narrow_gemm.make_kernel(**variant.kwargs), x, w, parts)
    interp.run(fold_parts.make_kernel(n, narrow_gemm.PARTS, OUT_DTYPES[out_bits]), parts, out)
    return out


@settings(max_examples=6)
@given(
    form=st.sampled_from(FORMS),
    m=st.integers(1, 140),
    steps=st.integers(1, 2),
    out_bits=st.sampled_from([16, 32]),
    seed=st.integers(0, 99),
)
def test_any_batch_has_the_bits_of_folded_parts(form, m, steps, out_bits, seed):
    config, n, _, _ = form
    x, w = _operands(m, n, steps * SHORT, seed)
    assert torch.equal(bits(_summed(x, w, out_bits, config)), bits(_folded(x, w, out_bits)))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_edges_of_every_tile(form):
    config, n, _, out_bits = form
    x, w = _operands(2 * config.block_m + 1, n, SHORT, 5)
    full = _folded(x, w, out_bits)
    for m in (1, config.block_m - 1, config.block_m, config.block_m + 1, 2 * config.block_m + 1):
        got = _summed(x[:m].clone(), w, out_bits, config)
        assert torch.equal(bits(got), bits(full[:m]))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_parts_are_added_first_to_last(form):
    """Sums that another order would round otherwise."""
    config, n, _, _ = form
    one, tiny = 1.0, 2.0**-24
    x = torch.zeros(2, SHORT, dtype=torch.bfloat16)
    step = SHORT // narrow_gemm.PARTS
    x[0, ::step] = torch.tensor([one, tiny, tiny, tiny], dtype=torch.bfloat16)
    x[1, ::step] = torch.tensor([tiny, tiny, tiny, one], dtype=torch.bfloat16)
    got = _summed(x, torch.ones(n, SHORT, dtype=torch.bfloat16), 32, config)
    assert (got[0] == one).all()
    assert (got[1] == one + 4 * tiny).all()  # 3 * tiny and one, to even


def test_nan_and_infinity_touch_their_rows_alone():
    config, n, _, out_bits = FORMS[0]
    x, w = _operands(5, n, SHORT, 1)
    x[2, 5], x[4, 300] = torch.nan, torch.inf
    got = _summed(x, w, out_bits, config)
    assert got[2].isnan().all()
    assert not got[4].isfinite().any()
    assert got[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(("n", "k", "out_bits"), SHIPPED)
def test_both_forms_compute_one_term(n, k, out_bits):
    """What the dispatcher may choose for a row, by either form: the same operations in the same order."""
    fold = signature_of(fold_parts.make_kernel(n, narrow_gemm.PARTS, OUT_DTYPES[out_bits]))
    digests = set()
    for variant in narrow_gemm.distinct(n, k, out_bits):
        made = signature_of(narrow_gemm.make_kernel(**variant.kwargs))
        if variant.kwargs["out_bits"] == narrow_gemm.PARTED:
            digests.add(composed_digest(made, "parts", fold, "folded"))
        else:
            digests.add(digest_of(made, "out"))
    assert len(digests) == 1
    kinds = {v.kwargs["out_bits"] for v in narrow_gemm.distinct(n, k, out_bits)}
    assert kinds == {narrow_gemm.PARTED, out_bits}


@pytest.mark.parametrize("parts", [2, 8])
def test_another_number_of_parts_is_another_term(parts):
    config = Config(block_m=64, block_n=64, block_k=128, num_stages=2)
    fold = signature_of(fold_parts.make_kernel(64, narrow_gemm.PARTS, "float32"))
    made = signature_of(narrow_gemm.make_kernel(64, 4096, config))
    want = composed_digest(made, "parts", fold, "folded")
    assert digest_of(signature_of(make_summed(64, 4096, narrow_gemm.PARTS, 32, config)), "out") == want
    assert digest_of(signature_of(make_summed(64, 4096, parts, 32, config)), "out") != want


def test_another_output_type_is_another_term():
    config = Config(block_m=64, block_n=64, block_k=128, num_stages=2)
    digests = {digest_of(signature_of(make_summed(64, 1024, 4, b, config)), "out") for b in (16, 32)}
    assert len(digests) == 2


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_ring_is_unrolled_by_the_rounds_of_a_part(form):
    config, n, k, out_bits = form
    kernel = narrow_gemm.make_kernel(n, k, config, out_bits)
    assert kernel.attrs[ATTRIBUTE] == k // narrow_gemm.PARTS // config.block_k


def test_the_text_differs_from_rounds_that_are_not_unrolled_in_the_pragma_alone():
    config = Config(block_m=64, block_n=64, block_k=128, num_stages=2)
    kernel = make_summed(64, 4096, narrow_gemm.PARTS, 32, config)
    with corrected():
        asked, plain = (extract(k).cuda_text.splitlines() for k in (kernel, kernel.without_attr(ATTRIBUTE)))
    pragmas = [line for line in asked if line.strip() == "#pragma unroll 8"]
    assert len(pragmas) == 2  # of the producer's loop and the consumer's
    assert [line for line in asked if line not in pragmas] == plain


@pytest.mark.parametrize(("n", "k", "out_bits"), SHIPPED)
def test_the_form_is_chosen_by_the_tokens(n, k, out_bits):
    after = narrow_gemm._summed_after(n, k)
    assert narrow_gemm.select(after, n, k, out_bits).kwargs["out_bits"] == narrow_gemm.PARTED
    for m in (after + 1, 4096, 8192, narrow_gemm.MAX_TOKENS):
        assert narrow_gemm.select(m, n, k, out_bits).kwargs["out_bits"] == out_bits
    dims = {"n": n, "k": k}
    assert narrow_gemm.workspace_bytes({"m": after, **dims}) == 16 * after * n
    assert narrow_gemm.workspace_bytes({"m": after + 1, **dims}) == 0


def test_a_call_takes_the_form_that_is_selected(monkeypatch):
    """A small shape in place of a measured one: the parts of one row are no longer written."""
    x, w = _operands(40, 64, SHORT, 7)
    with dsv4_kernels.backend("interpret"):
        want = narrow_gemm.narrow_gemm(x, w, torch.bfloat16)
        monkeypatch.setattr(narrow_gemm, "_summed_after", lambda n, k: 16)
        monkeypatch.setattr(narrow_gemm, "_summed", lambda n, k: narrow_gemm._SUMMED[64, 7168][1])
        monkeypatch.setattr(fold_parts, "launch", None)
        narrow_gemm.variants.cache_clear()
        try:
            got = narrow_gemm.narrow_gemm(x, w, torch.bfloat16)
        finally:
            narrow_gemm.variants.cache_clear()
    assert torch.equal(bits(got), bits(want))
