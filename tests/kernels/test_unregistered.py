"""Kernels that wait for their proofs, and so are in no registry: the registry's own cases, bit for bit."""

import pytest
import torch

from dsv4_kernels.attention.topk import TOPK_SPEC


def _cases(tag):
    return [
        pytest.param(spec, case, id=f"{spec.name}-{case.id}")
        for spec in (TOPK_SPEC,)
        for case in spec.cases
        if tag in case.tags
    ]


def _agrees(spec, case, device):
    inputs = spec.make_inputs(case.dims, torch.device(device), 1)
    got, want = spec.fn(*inputs), spec.reference(*inputs)
    if isinstance(got, torch.Tensor):
        got, want = (got,), (want,)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert torch.equal(mine.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


@pytest.mark.interpret
@pytest.mark.parametrize(("spec", "case"), _cases("test"))
def test_interpreter_matches_reference(spec, case):
    _agrees(spec, case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "case"), _cases("gpu"))
def test_gpu_matches_reference(spec, case):
    _agrees(spec, case, "cuda")
