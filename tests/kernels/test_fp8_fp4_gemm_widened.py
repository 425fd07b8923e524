"""Folded FP4 weights widened first: every code at every offset, and the bits of `fp8_fp4_gemm_folded`."""

import pytest
import torch

from dsv4_kernels import runtime
from dsv4_kernels.contract import ContractError
from dsv4_kernels.gemm import fp8_fp4_gemm_widened as module
from dsv4_kernels.gemm.fold import WIDENED_TOKENS, FoldedWeights, fold_weights, fp4_linear
from dsv4_kernels.gemm.fp4_widen import fp4_widen
from dsv4_kernels.gemm.fp8_fp4_gemm_folded import MAX_K, fp8_fp4_gemm_folded
from dsv4_kernels.gemm.fp8_fp4_gemm_widened import SPEC, fp8_fp4_gemm_widened
from dsv4_kernels.registry import Variant
from tests.compare import bits
from verify import extract, host, ir
from verify.properties import alignment

M, N = 131, 512  # a whole tile of tokens and a few; two tiles of weight rows
UE8M0_BIAS = 127
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of e2m1
CODES, OFFSETS = 16, 12
CPU = torch.device("cpu")


def _interpreted(function, *args):
    with runtime.backend("interpret"):
        return function(*args)


@pytest.mark.interpret
def test_every_code_at_every_offset_and_place_is_widened_exactly():
    """Row r holds code (r + channel) % 16 scaled by 2**offset: from codes as the checkpoint has them."""
    channels = torch.arange(512)
    codes = (channels + torch.arange(128)[:, None]) % CODES
    offsets = (channels[None, ::32] // 32 + torch.arange(128)[:, None]) % OFFSETS
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    scales = (offsets + UE8M0_BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)
    folded = fold_weights(packed, scales)
    assert isinstance(folded, FoldedWeights)
    got = _interpreted(fp4_widen, folded.words, folded.offsets)
    sign = torch.where(codes >= CODES // 2, -1.0, 1.0)
    value = torch.tensor(MAGNITUDES)[codes % (CODES // 2)] * sign
    want = torch.ldexp(value, offsets.repeat_interleave(32, 1))
    assert torch.equal(got.float() * folded.factors[:, None], want)
    assert torch.equal(got.float().signbit(), want.signbit())  # of zeros too


@pytest.mark.interpret
@pytest.mark.parametrize("m", [1, M, 257])
def test_it_has_the_bits_of_the_product_that_widens_in_each_tile(m):
    inputs = SPEC.make_inputs({"m": m, "n": N, "k": 1024}, CPU, 0)
    want = _interpreted(fp8_fp4_gemm_folded, *inputs)
    assert torch.equal(bits(_interpreted(fp8_fp4_gemm_widened, *inputs)), bits(want))


@pytest.mark.interpret
@pytest.mark.parametrize("m", [1, M, 257])
def test_narrow_tiles_have_the_bits_of_wide_ones(m, monkeypatch):
    n, k = 768, 1024
    inputs = SPEC.make_inputs({"m": m, "n": n, "k": k}, CPU, 2)
    want = _interpreted(fp8_fp4_gemm_widened, *inputs)
    narrow = Variant("narrow", {"n": n, "k": k, "config": module.NARROW})
    monkeypatch.setattr(module, "_select", lambda *_: narrow)
    assert torch.equal(bits(_interpreted(fp8_fp4_gemm_widened, *inputs)), bits(want))


def test_narrow_tiles_serve_where_their_rounds_cost_less():
    """Of four fifths of a wide one: 256 blocks for 192 are two rounds each, 352 for 264 three and two."""
    taken = [
        m for m in range(128, 4097, 128) if SPEC.select({"m": m, "n": 6144, "k": 7168}).id.endswith("-r192")
    ]
    rounds = {m: [-(-(m // 128 * 6144 // block_n) // 132) for block_n in (192, 256)] for m in taken}
    assert {1024, 1536, 2304} <= set(taken)
    assert not {1152, 1408, 2048, 2432, 4096} & set(taken)
    assert all(narrow * 4 <= wide * 5 for narrow, wide in rounds.values())
    assert not any(
        "-r192" in SPEC.select({"m": 1024, "n": n, "k": k}).id for n, k in module.SHAPES if n != 6144
    )


@pytest.mark.interpret
def test_nan_scales_reach_their_rows_alone():
    x, x_scale, *weights = SPEC.make_inputs({"m": M, "n": N, "k": 1536}, CPU, 1)
    want = _interpreted(fp8_fp4_gemm_folded, x, x_scale, *weights)
    x_scale.view(torch.uint8)[5, 1] = 255
    got = _interpreted(fp8_fp4_gemm_widened, x, x_scale, *weights)
    nan = torch.arange(M) == 5
    assert torch.equal(got.isnan(), nan[:, None].expand(M, N))
    assert torch.equal(bits(got[~nan]), bits(want[~nan]))


@pytest.mark.parametrize("config", [module.WIDE, module.NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("k", [512, MAX_K])
def test_scales_of_the_longest_rows_leave_room(k, config):
    extracted = extract.extract(module.make_kernel(768, k, config))
    facts = host.read_host(extracted.host, extracted.device, extracted.tile)
    shared = facts.extents["dynamic_shared"]
    assert isinstance(shared, ir.Const)
    assert 0 < shared.value <= alignment.MAX_SHARED_BYTES


def test_the_workspace_is_a_byte_a_weight():
    assert SPEC.workspace_bytes({"m": 1024, "n": 4096, "k": 2048}) == 4096 * 2048
    assert SPEC.workspace_bytes({"m": 0, "n": 4096, "k": 2048}) == 0


@pytest.mark.parametrize(("m", "n", "k"), [(1, 128, 512), (1, 256, 768)])
def test_other_shapes_are_refused(m, n, k):
    x = torch.zeros(m, k, dtype=torch.float8_e4m3fn)
    words = torch.zeros(n, k // 8, dtype=torch.int32)
    with pytest.raises(ContractError, match="fp8_fp4_gemm_widened: requires"):
        fp8_fp4_gemm_widened(x, x, words, x, x)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), module.SHAPES)
def test_gpu_linear_has_the_bits_of_one_form_on_both_sides_of_the_change(n, k, gpu_record):
    inputs = SPEC.make_inputs({"m": 4097, "n": n, "k": k}, torch.device("cuda"), 3)
    x, x_scale, *weights = inputs
    want = bits(fp8_fp4_gemm_folded(*inputs))
    for m in (1, 1000, 1023, 1024, 1025, 2048, 4096, 4097):
        same = True
        for _ in range(3):
            got = fp4_linear(x[-m:].clone(), x_scale[-m:].clone(), FoldedWeights(*weights))
            same = same and torch.equal(bits(got), want[-m:])
        if m >= WIDENED_TOKENS:
            gpu_record(SPEC, SPEC.select({"m": m, "n": n, "k": k}), f"linear n{n}-k{k} m={m}", same)
        assert same, m
