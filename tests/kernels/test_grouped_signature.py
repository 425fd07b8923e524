"""Grouped products add in one order whatever the alignment, which a batch decides, and with it the tile.

`batch_invariance` holds variants of one alignment against each other: it is no dim that counts rows.
"""

import pytest

from dsv4_kernels.gemm import (
    grouped_fp8_fp4_gemm,
    grouped_fp8_fp4_gemm_exact,
    grouped_fp8_gemm,
    grouped_wide,
)
from dsv4_kernels.gemm.grouped_cases import SHAPES
from dsv4_kernels.gemm.grouped_layout import ALIGNMENTS
from dsv4_kernels.tile.corrections import corrected
from verify import extract
from verify.signature.rows import signature

KINDS = (
    (grouped_fp8_gemm, 128),
    (grouped_fp8_fp4_gemm, 128),
    (grouped_fp8_fp4_gemm_exact, 128),
    (grouped_fp8_fp4_gemm_exact, 32),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("module", "x_block"), KINDS, ids=[f"{m.NAME}-{b}" for m, b in KINDS])
def test_every_alignment_computes_one_term(module, x_block, shape, monkeypatch):
    # Of a row with an expert: loops are taken apart where they have a length.
    for maker in (module, grouped_wide):
        monkeypatch.setattr(maker, "iterations", lambda expert, count: count)
    dims = dict(zip(("n", "k", "num_experts"), shape, strict=True))
    terms = {}
    for alignment in ALIGNMENTS:
        variant = module.SPEC.select({**dims, "alignment": alignment, "x_block": x_block})
        with corrected():
            function = extract.tile_function(module.make_kernel(**variant.kwargs))
        found = signature(function, ("m",), (), lambda step: "any", {"expert": alignment})
        assert not found.problems, variant.id
        assert not found.unsupported, variant.id
        terms[variant.id] = found.as_runs(swaps=True)["out"]
    assert len(terms) > 1
    assert len(set(terms.values())) == 1, terms
