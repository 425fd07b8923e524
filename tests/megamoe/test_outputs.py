"""MegaMoE's kernels in the interpreter against plain PyTorch, and what a GPU gave for the same cases."""

from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch

from bench import megamoe_outputs, outputs
from bench.status import OUTPUTS_PREFIX, TEST_RESULTS
from megamoe.reference import linear
from tests.megamoe.patient import patient

ROWS = [row for row in outputs.read(TEST_RESULTS) if row.kernel == megamoe_outputs.KERNEL]
CASES = [
    pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.name.startswith("fused") else [])
    for c in megamoe_outputs.CASES
]
FUSED = [pytest.param(c, id=c.name) for c in megamoe_outputs.CASES if c.name.startswith("fused")]
CUT = 2.0**-13  # of the largest term, below which the tensor core drops bits
EXP_ULPS = 3  # of the exponential, either way: two of the GPU's, one of the interpreter's


def digests(tensors):
    return tuple(map(outputs.digest, tensors))


@cache
def _interpreted(name):
    case = next(c for c in megamoe_outputs.CASES if c.name == name)
    with patch.dict(megamoe_outputs._VALUES, policy=patient()):
        return digests(case.interpreted())


@pytest.mark.parametrize("case", CASES)
def test_interpreter_gives_plain_pytorchs_bits_and_what_was_recorded(case):
    given, found = digests(case.inputs()), _interpreted(case.name)
    assert found == digests(case.expected())
    for row in (r for r in ROWS if r.case == case.name):
        is_as_recorded = row.passed and (row.inputs, row.outputs) == (given, found)
        # Only a row that disagrees asks whether it is of today's text, as in tests/test_outputs.py.
        assert is_as_recorded or case.extracted().cuda_sha256 != row.cuda_sha256, row


def test_every_case_is_recorded():
    """One GPU at least has a row of every case, with the bits that it has to give."""
    recorded = [{row.case for row in ROWS if row.gpu == gpu} for gpu in {row.gpu for row in ROWS}]
    assert any({case.name for case in megamoe_outputs.CASES} <= names for names in recorded)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_gpu_outputs_agree_with_plain_pytorch(case):
    row = megamoe_outputs.record(case)
    assert row.passed, row


def routed(layer):
    """Yield each routed expert's rows, weights of the rows, and both linears; the shared expert's last."""
    for number in range(layer.l1.w.shape[0]):
        token, slot = torch.nonzero(layer.topk_idx == number, as_tuple=True)
        linears = [(w.w[number], w.w_scale[number]) for w in (layer.l1, layer.l2)]
        yield token, layer.topk_weights[token, slot], linears
    if layer.shared is not None:
        token = torch.arange(len(layer.x))
        yield token, torch.ones(len(token)), [(w.w[0], w.w_scale[0]) for w in layer.shared]


def values(w, scale):
    """Return float64 weights times their scales, and a unit [n, k / 128] of which each is a multiple."""
    byte = scale.view(torch.uint8).int() - 127
    if w.dtype == torch.float8_e4m3fn:
        factor = torch.ldexp(torch.ones(byte.shape, dtype=torch.float64), byte).repeat_interleave(128, 0)
        return w.double() * factor.repeat_interleave(128, 1), factor
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    codes = torch.stack((w & 15, w >> 4), -1).flatten(-2).long()
    signed = torch.where(codes >= 8, -magnitudes[codes & 7], magnitudes[codes & 7])
    factor = torch.ldexp(torch.ones(byte.shape, dtype=torch.float64), byte)
    return signed * factor.repeat_interleave(32, 1), factor.unflatten(1, (-1, 4)).amin(2) / 2


@pytest.mark.parametrize("case", FUSED)
def test_no_product_of_a_case_rounds(case):
    """Linear 1's 128 terms, all added by their magnitudes, keep every bit; of linear 2's one is not zero."""
    layer = megamoe_outputs.layer(case.config)
    x = layer.x.double()
    unit = torch.ldexp(torch.ones(()).double(), torch.frexp(x[x != 0].abs().min())[1] - 1)
    assert torch.equal(x / unit, (x / unit).round())
    for _, _, (first, second) in routed(layer):
        weights, units = values(*first)
        terms = x.abs().unflatten(1, (-1, 128)).transpose(0, 1)
        sums = terms @ weights.abs().unflatten(1, (-1, 128)).permute(1, 2, 0)
        assert (sums * CUT <= unit * units.T[:, None]).all()
        assert ((values(*second)[0] != 0).unflatten(1, (-1, 128)).sum(2) == 1).all()


def hidden(gate_up, weight, clamp, ulps):
    """Return the reference's hidden state, its exponential off by so many ulps."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    exponential = (torch.exp(-gate).view(torch.int32) + ulps).view(torch.float32)
    return (gate / (1 + exponential) * up * weight[:, None]).to(torch.bfloat16)


@pytest.mark.parametrize("case", FUSED)
def test_no_hidden_state_of_a_case_depends_on_the_exponentials_last_bits(case):
    """Each step after it is monotonic, so what both ends give, all between them give."""
    layer, clamp = megamoe_outputs.layer(case.config), case.config.clamp
    scale = layer.x_scale.view(torch.uint8)
    seen = 0
    for token, weight, (first, _) in routed(layer):
        if len(token):
            x = layer.x.view(torch.uint8)[token].view(layer.x.dtype)
            gate_up = linear(x, scale[token].view(layer.x_scale.dtype), *first)
            low, high = (hidden(gate_up, weight, clamp, n) for n in (-EXP_ULPS, EXP_ULPS))
            assert torch.equal(low, high)
            assert (gate_up.abs() > clamp).any()
            seen += low.count_nonzero()
    assert seen > case.config.inter


def test_a_row_is_made_of_each_case(monkeypatch):
    """What the GPU does is stood in for by plain PyTorch; the rest is what runs there."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "stand-in")
    source = type("Kernel", (), {"get_kernel_source": lambda self: "text"})()
    monkeypatch.setattr(megamoe_outputs, "compile_kernel", lambda *args: source)
    for case in megamoe_outputs.CASES:
        row = megamoe_outputs.record(replace(case, on_gpu=case.expected))
        assert (row.kernel, row.variant, row.passed) == (megamoe_outputs.KERNEL, case.name, True)
        assert row.test == f"{OUTPUTS_PREFIX}{case.name}"
        assert len(row.outputs) == len(case.expected())
        wrong = replace(case, on_gpu=lambda: (torch.zeros(1),))
        assert not megamoe_outputs.record(wrong).passed
