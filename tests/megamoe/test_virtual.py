"""The fused kernel on a GPU: the bits of the unfused layer, whatever the number of virtual ranks."""

from dataclasses import replace

import pytest
import torch

from dsv4_kernels.quant.act_quant import act_quant
from megamoe import MegaMoE
from megamoe.experts import Experts
from megamoe.fused import Config
from megamoe.virtual import CoResidencyError, VirtualRanks, WatchdogError
from tests.megamoe import layers

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
TOKENS = 32  # of all ranks


def config(ranks, **changes):
    base = Config(
        num_ranks=ranks,
        launch_ranks=ranks,
        ctas=64 // ranks,
        tokens=TOKENS // ranks,
        topk=layers.TOPK,
        hidden=layers.HIDDEN,
        inter=layers.INTER,
        num_experts=layers.EXPERTS // ranks,
        wave_experts=1,
        block_m=16,
        dispatch_parts=2,
    )
    return replace(base, **changes)


def engine(ranks, **changes):
    c = config(ranks, **changes)
    l1, l2 = layers.both()
    shares = [
        Experts(layers.share(l1, rank, ranks), layers.share(l2, rank, ranks)).cuda() for rank in range(ranks)
    ]
    return VirtualRanks(c, shares)


def run(moe, x, idx, weights):
    c = moe.config
    by_rank = (c.num_ranks, c.tokens, -1)
    codes, scale = act_quant(x, 128)
    idx = idx.int().view(by_rank)
    y = moe.launch(
        codes.view(by_rank), scale.view(torch.uint8).view(by_rank), idx, moe.plan(idx, weights.view(by_rank))
    )
    moe.check()
    return y.view(-1, c.hidden).view(torch.int16)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_equals_the_unfused_layer(ranks):
    both = layers.both()
    alone = MegaMoE(*both, num_experts=layers.EXPERTS, topk=layers.TOPK, max_tokens=TOKENS).cuda()
    moe = engine(ranks)
    for seed, (masked, skew) in enumerate(((0.0, 1.0), (0.3, 8.0), (1.0, 1.0))):
        x, idx, weights = (t.cuda() for t in layers.tokens(TOKENS, seed, masked, skew))
        wanted = alone(x, idx, weights).view(torch.int16)
        for _ in range(10):
            assert torch.equal(run(moe, x, idx, weights), wanted)


def test_lost_peer_is_an_error_that_names_it():
    moe = engine(2, launch_ranks=1, max_polls=100_000)
    x, idx, weights = (t.cuda() for t in layers.tokens(TOKENS, 0))
    with pytest.raises(WatchdogError, match="rank 0 gave up in start: waiting for rank 1"):
        run(moe, x, idx, weights)


def test_refuses_more_ctas_than_fit():
    with pytest.raises(CoResidencyError, match=r"requires launch_ranks \* ctas <= multiprocessors"):
        engine(1, ctas=1 << 14)
