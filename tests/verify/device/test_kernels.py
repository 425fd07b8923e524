"""Shipped kernels run clean under every policy and compute what the tile level computes, bit for bit."""

from functools import cache

import pytest
import torch

from dsv4_kernels.gemm import fp8_fp4_gemm
from dsv4_kernels.quant import act_quant, fp4_quant
from verify import interp
from verify.extract import extract
from verify.interp import device

WARPGROUP = 128


@cache
def stages(make, *args):
    return extract(make(*args))


def agrees(extracted, tensors, outputs, **options):
    """Run at both levels; `outputs` are positions of tensors to compare."""
    mine = [t.clone() for t in tensors]
    theirs = [t.clone() for t in tensors]
    summary = device.run(extracted, *mine, **options)
    interp.run_function(extracted.tile, tuple(theirs))
    for k in outputs:
        assert torch.equal(mine[k].view(torch.uint8), theirs[k].view(torch.uint8))
    return summary


def quant_inputs(blocks, block_k):
    generator = torch.Generator().manual_seed(blocks)
    x = (torch.randn(blocks, block_k, generator=generator) * 3).to(torch.bfloat16)
    x[0, 0], x[-1, -1] = float("inf"), float("nan")
    return x


@pytest.mark.parametrize(("block_k", "policy"), [(128, "late"), (64, "random"), (32, "ahead"), (32, "eager")])
def test_act_quant(block_k, policy):
    extracted = stages(act_quant.make_kernel, block_k, act_quant.Config())
    x = quant_inputs(67, block_k)
    out = torch.full(x.shape, float("nan")).to(torch.float8_e4m3fn)
    agrees(
        extracted, (x, out, torch.zeros(67, dtype=torch.uint8)), (1, 2), policy=policy, wave_threads=WARPGROUP
    )


def variant(spec):
    return stages(spec.make_kernel, *spec.variants[0].kwargs.values())


@pytest.mark.parametrize("policy", ["random", "behind"])
def test_fp4_quant(policy):
    x = quant_inputs(130, 32)
    words = x.view(torch.int32)
    out, scale = torch.zeros(130, 16, dtype=torch.uint8), torch.zeros(130, dtype=torch.uint8)
    extracted = variant(fp4_quant.SPECS[0])
    agrees(extracted, (words, out, scale), (1, 2), policy=policy, wave_threads=WARPGROUP)


@pytest.mark.parametrize("policy", ["random", "late"])
def test_fp4_dequant(policy):
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (130, 16), generator=generator, dtype=torch.uint8)
    scale = torch.randint(100, 150, (130,), generator=generator, dtype=torch.uint8)
    out = torch.zeros(130, 32, dtype=torch.bfloat16)
    extracted = variant(fp4_quant.SPECS[1])
    agrees(extracted, (packed, scale, out), (2,), policy=policy, wave_threads=WARPGROUP)


def gemm_inputs(m, n, k):
    generator = torch.Generator().manual_seed(m)

    def codes(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

    x = torch.randn(m, k, generator=generator).to(torch.float8_e4m3fn)
    w_scale = codes(115, 127, n, k // 32).view(torch.int32)
    out = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
    return x, codes(120, 130, m, k // 128), codes(0, 256, n, k // 2), w_scale, out


CONFIGS = [config for _, config in fp8_fp4_gemm._CONFIGS]


@pytest.mark.parametrize(
    ("config", "policy"), list(zip(CONFIGS, ["late", "random", "ahead", "eager"], strict=True)), ids=str
)
def test_fp8_fp4_gemm(config, policy):
    """A ragged last tile."""
    m, n, k = 5, config.block_n, 256
    extracted = stages(fp8_fp4_gemm.make_kernel, n, k, config)
    agrees(extracted, gemm_inputs(m, n, k), (4,), policy=policy, seed=1, wave_threads=WARPGROUP)


def test_fp8_fp4_gemm_warp_by_warp():
    config = CONFIGS[1]
    extracted = stages(fp8_fp4_gemm.make_kernel, config.block_n, 256, config)
    agrees(extracted, gemm_inputs(33, config.block_n, 256), (4,), policy="random", seed=2)


def test_explore():
    extracted = stages(act_quant.make_kernel, 32, act_quant.Config())
    x = quant_inputs(3, 32)
    out = torch.zeros(x.shape).to(torch.float8_e4m3fn)
    runs = device.explore(extracted, x, out, torch.zeros(3, dtype=torch.uint8), seeds=2)
    assert len(runs) == 2 * len(device.POLICIES)
