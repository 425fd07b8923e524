"""`MegaMoE` on one rank: equal bits with plain PyTorch; routings that it refuses or masks."""

from typing import Any

import pytest
import torch

from dsv4_kernels.quant import reference as quant
from megamoe import Experts, MegaMoE, RawExperts, RoutingError, mega_moe, reference
from megamoe.launches import fp8_experts
from megamoe.routing import check_routing
from tests.megamoe import layers


def layer(**options):
    defaults = {"num_experts": layers.EXPERTS, "topk": layers.TOPK, "max_tokens": 64}
    return MegaMoE(*layers.both(), **{**defaults, **options})


def wanted(x, idx, weights, raw=None):
    l1, l2 = raw or layers.both()
    return reference.mega_moe(*quant.act_quant(x, 128), idx, weights, l1, l2)


def bits(tensor):
    return tensor.view(torch.int16)


@pytest.mark.parametrize(
    ("count", "masked", "skew"), [(0, 0.0, 1), (1, 0.0, 1), (33, 0.2, 1), (40, 0.0, 9), (5, 1.0, 1)]
)
def test_equals_plain_pytorch(count, masked, skew):
    x, idx, weights = layers.tokens(count, 3, masked, skew)
    out = layer()(x, idx, weights)
    assert torch.equal(bits(out), bits(wanted(x, idx, weights)))
    assert masked < 1 or not out.any()


@pytest.mark.parametrize("is_fp8", [False, True], ids=["FP4", "FP8"])
@pytest.mark.parametrize("has_shared", [False, True], ids=["routed", "shared"])
def test_formats_and_a_shared_expert_equal_plain_pytorch(is_fp8, has_shared):
    x, idx, weights = layers.tokens(21, 3, 0.2)
    raw = layers.both_fp8() if is_fp8 else layers.both()
    shared = layers.both_fp8(5, experts=1)
    sizes: dict[str, Any] = {"num_experts": layers.EXPERTS, "topk": layers.TOPK, "max_tokens": 64}
    codes = quant.act_quant(x, 128)
    out = MegaMoE(*raw, **sizes, shared=shared if has_shared else None)(x, idx, weights)
    routed = reference.mega_moe(*codes, idx, weights, *raw)
    with_shared = reference.mega_moe(*codes, idx, weights, *raw, shared=shared)
    assert torch.equal(bits(out), bits(with_shared if has_shared else routed))
    by_function = mega_moe(x, idx, weights, Experts(*raw), shared=Experts(*shared) if has_shared else None)
    assert torch.equal(bits(out), bits(by_function))
    assert not torch.equal(bits(routed), bits(with_shared))


def test_a_shared_expert_has_to_fit():
    raw, shared = layers.both(), layers.both_fp8(5)
    wide = (
        fp8_experts(4 * layers.INTER, layers.HIDDEN, 5, 1),
        fp8_experts(layers.HIDDEN, 2 * layers.INTER, 6, 1),
    )
    sizes: dict[str, Any] = {"num_experts": layers.EXPERTS, "topk": layers.TOPK, "max_tokens": 64}
    with pytest.raises(ValueError, match="requires one shared expert"):
        MegaMoE(*raw, **sizes, shared=shared)
    x, idx, weights = layers.tokens(4, 1)
    with pytest.raises(ValueError, match="got 1 with e4m3 weights and"):
        mega_moe(x, idx, weights, Experts(*raw), shared=Experts(*wide))
    with pytest.raises(ValueError, match="both linears of one format"):
        MegaMoE(raw[0], shared[1], **sizes)


def test_weights_that_cannot_be_folded():
    raw = layers.raw_experts(2 * layers.INTER, layers.HIDDEN, 5, spread=30), layers.both()[1]
    x, idx, weights = layers.tokens(9, 4)
    moe = MegaMoE(*raw, num_experts=layers.EXPERTS, topk=layers.TOPK, max_tokens=64)
    assert not moe.experts.l1.is_folded
    assert moe.experts.l2.is_folded
    assert torch.equal(bits(moe(x, idx, weights)), bits(wanted(x, idx, weights, raw)))


def test_neighbours_do_not_matter():
    x, idx, weights = layers.tokens(30, 6)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    moe = layer()
    assert torch.equal(bits(moe(x, idx, weights)[order]), bits(moe(x[order], idx[order], weights[order])))


def test_quantised_input_and_cast_modules():
    x, idx, weights = layers.tokens(8, 7)
    codes, scale = quant.act_quant(x, 128)
    moe = layer().to(torch.bfloat16)
    assert torch.equal(bits(moe(codes, idx, weights, scale)), bits(layer()(x, idx, weights)))


def test_counts_received_rows():
    x, idx, weights = layers.tokens(20, 8)
    moe = layer(count_received=True)
    moe(x, idx, weights)
    moe(x, idx, weights)
    assert moe.received is not None
    assert moe.received.tolist() == (2 * torch.bincount(idx[idx >= 0], minlength=layers.EXPERTS)).tolist()


class TestRouting:
    def refused(self, idx, message, max_tokens=4):
        with pytest.raises(RoutingError, match=message):
            check_routing(torch.tensor(idx), num_experts=8, max_tokens=max_tokens, bad_routing="raise")

    def test_raises_with_the_first_bad_entry(self):
        self.refused([[0, 1], [2, 8]], r"-1 <= expert < 8, got topk_idx\[1, 1\]=8")
        self.refused([[0, -2]], r"got topk_idx\[0, 1\]=-2")
        self.refused([[3, -1, 3]], r"at most once a token, got topk_idx\[0, 2\]=3")
        self.refused([[0]] * 5, "requires tokens <= 4, got tokens=5")

    def test_masks_and_counts(self):
        idx = torch.tensor([[0, 8, 0], [-5, -1, 2], [-1, -1, -1], [7, 6, 5], [1, -1, 2]])
        routing = check_routing(idx, num_experts=8, max_tokens=4, bad_routing="mask")
        expected = [[0, -1, -1], [-1, -1, 2], [-1, -1, -1], [7, 6, 5], [-1, -1, -1]]
        assert routing.topk_idx.tolist() == expected
        assert routing.num_masked == 5

    def test_module_masks(self):
        x, idx, weights = layers.tokens(6, 9, masked=0.0)
        idx[0, 0], idx[1, 1] = 99, idx[1, 0]
        clean = idx.clone()
        clean[0, 0] = clean[1, 1] = -1
        clean[5] = -1
        moe = layer(bad_routing="mask", max_tokens=5)
        assert torch.equal(bits(moe(x, idx, weights)), bits(wanted(x, clean, weights)))
        assert moe.num_masked == 2 + layers.TOPK
        by_function = mega_moe(x[:5], idx[:5], weights[:5], Experts(*layers.both()), bad_routing="mask")
        assert torch.equal(bits(by_function), bits(wanted(x, clean, weights)[:5]))

    def test_the_shared_expert_has_no_tokens_past_the_room(self):
        x, idx, weights = layers.tokens(6, 9, masked=0.0)
        moe = layer(bad_routing="mask", max_tokens=5, shared=layers.both_fp8(5, experts=1))
        y = moe(x, idx, weights)
        assert torch.equal(bits(y[:5]), bits(moe(x[:5], idx[:5], weights[:5])))
        assert y[:5].any(-1).all()
        assert not y[5].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "magic"}, "requires backend in"),
        ({"bad_routing": "ignore"}, "requires bad_routing in"),
        ({"num_experts": 9}, "requires 9 experts over 1 ranks, got 8"),
    ],
)
def test_refuses_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)


def test_fused_kernel_refuses_cpu_tensors():
    with pytest.raises(ValueError, match="requires CUDA tensors for the fused kernel, got cpu"):
        layer(backend="fused")(*layers.tokens(4, 1))


def test_refuses_shapes():
    x, idx, weights = layers.tokens(4, 1)
    moe = layer()
    for arguments in ((x[:, :128], idx, weights), (x, idx[:, :2], weights), (x, idx, weights.double())):
        with pytest.raises(ValueError, match="mega_moe: requires"):
            moe(*arguments)
    l1, l2 = layers.both()
    with pytest.raises(ValueError, match="requires l1"):
        MegaMoE(l1, RawExperts(l2.w[:, :128], l2.w_scale), num_experts=8, topk=3, max_tokens=4)
