"""References of products in pieces: what bounds their memory changes no value."""

import pytest
import torch

from bench import check
from dsv4_kernels.gemm import reference
from dsv4_kernels.registry import get_kernel
from tests import compare

CPU = torch.device("cpu")
CASES = [
    ("fp8_gemm", {"m": 40, "n": 128, "k": 256, "f32_scales": 0}),
    ("fp8_fp4_gemm", {"m": 40, "n": 128, "k": 256}),
    ("fp8_fp4_gemm_folded", {"m": 40, "n": 128, "k": 256}),
    ("fp8_fp4_gemm_widened", {"m": 40, "n": 256, "k": 512}),
    ("bf16_gemm", {"m": 40, "n": 64, "k": 256, "f32_out": 1}),
]


@pytest.mark.parametrize(("name", "dims"), CASES, ids=[name for name, _ in CASES])
def test_rows_in_pieces_give_the_whole(name, dims, monkeypatch):
    spec = get_kernel(name)
    inputs = spec.make_inputs(dims, CPU, 5)
    whole = spec.reference(*inputs)
    assert spec.tolerance is not None
    bound = spec.tolerance(whole, *inputs)[0]
    monkeypatch.setattr(reference, "_ELEMENTS", 7 * dims["n"])
    assert torch.equal(spec.reference(*inputs), whole)
    pieces = spec.tolerance(whole, *inputs)[0]
    assert pieces.dtype == bound.dtype
    assert torch.allclose(pieces, bound, rtol=1e-12, atol=0)


def test_comparisons_in_pieces_find_the_one_that_is_off(monkeypatch):
    spec = get_kernel("bf16_gemm")
    inputs = spec.make_inputs({"m": 40, "n": 64, "k": 256, "f32_out": 1}, CPU, 5)
    want = spec.reference(*inputs)
    monkeypatch.setattr(compare, "_ELEMENTS", 3 * 64)
    monkeypatch.setattr(check, "_ELEMENTS", 3 * 64)
    assert spec.tolerance is not None
    bound = spec.tolerance(want, *inputs)[0]
    assert compare.mismatch(spec, inputs, want) is None
    assert check._require_within(want, want, bound, "here") == 0
    off = want.clone()
    off[31, 5] += 2 * float(bound[31, 5])
    assert "(31, 5): 1 of 2560" in str(compare.mismatch(spec, inputs, off))
    with pytest.raises(check.WrongResultError, match=r"rows from 30 .* at \(1, 5\)"):
        check._require_within(off, want, bound, "here")
