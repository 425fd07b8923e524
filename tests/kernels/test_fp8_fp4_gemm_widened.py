"""Folded FP4 weights widened first: every code at every offset, and the bits of `fp8_fp4_gemm_folded`."""

import pytest
import torch

from dsv4_kernels import runtime
from dsv4_kernels.contract import ContractError
from dsv4_kernels.gemm import fp8_fp4_gemm_widened as module
from dsv4_kernels.gemm import widened_tile
from dsv4_kernels.gemm.fold import FoldedWeights, fold_weights
from dsv4_kernels.gemm.fp4_widen import fp4_widen
from dsv4_kernels.gemm.fp8_fp4_gemm_folded import MAX_K, fp8_fp4_gemm_folded
from dsv4_kernels.gemm.fp8_fp4_gemm_widened import SPEC, fp8_fp4_gemm_widened
from tests.compare import bits
from verify import interp

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
@pytest.mark.parametrize(("k", "tiles"), [(512, 2), (1536, 2), (2048, 2)])
def test_several_tiles_a_block_have_the_same_bits(k, tiles):
    x, x_scale, words, offsets, factors = SPEC.make_inputs({"m": M, "n": N, "k": k}, CPU, 1)
    x_scale = x_scale.view(torch.uint8)
    x_scale[5, 1] = 255  # nan, of one row
    widened = _interpreted(fp4_widen, words, offsets)
    outs = []
    for config in (module.Config(3), module.Config(4, tiles)):
        outs.append(torch.full((M, N), torch.nan, dtype=torch.bfloat16))
        kernel = module.make_kernel(N, k, config)
        interp.run(kernel, x, x_scale, widened, factors, outs[-1])
    nan = (torch.arange(M) == 5)[:, None].expand(M, N)
    assert torch.equal(outs[0].isnan(), nan)
    assert torch.equal(bits(outs[0][~nan]), bits(outs[1][~nan]))


def test_scales_of_all_channels_leave_room_for_a_ring():
    assert all(widened_tile.num_stages(k, 1) in (3, 4) for k in range(512, MAX_K + 1, 512))
    assert widened_tile.num_stages(4096, 4) == 4


@pytest.mark.parametrize(("m", "n", "k"), [(1, 128, 512), (1, 256, 768)])
def test_other_shapes_are_refused(m, n, k):
    x = torch.zeros(m, k, dtype=torch.float8_e4m3fn)
    words = torch.zeros(n, k // 8, dtype=torch.int32)
    with pytest.raises(ContractError, match="fp8_fp4_gemm_widened: requires"):
        fp8_fp4_gemm_widened(x, x, words, x, x)
