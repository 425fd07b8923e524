"""The fused kernel on a GPU: the bits of the unfused layer, whatever the number of virtual ranks."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv4_kernels.quant.act_quant import act_quant
from megamoe import MegaMoE
from megamoe.config import Config
from megamoe.experts import Experts
from megamoe.layer import config_for
from megamoe.plan import make_plan
from megamoe.routing import with_shared
from megamoe.virtual import CoResidencyError, VirtualRanks, WatchdogError, packed_experts
from tests.megamoe import compiled, layers

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
TOKENS = 32  # of all ranks
RANKS = (1, 2, 4, 8)
MAX_TOKENS = 20  # of the module: two kernels, for 8 tokens and for 20
FEW_CTAS = 16  # of a rank: no more than an expert has pieces to be widened
LOST = {"launch_ranks": 1, "max_polls": 100_000}
OPTIONS = {
    "FP8": {"fp8": True},
    "shared expert": {"shared": True},
    "FP8, shared expert, dispatchers": {"fp8": True, "shared": True, "dispatchers": True},
    "dispatchers": {"dispatchers": True},
    "widened": {"wide": True, "widened": True, "block_m": 128, "ctas": FEW_CTAS},
    "FP8, wide": {"fp8": True, "wide": True, "block_m": 128},
    "FP8, wide, shared expert, dispatchers": {
        "fp8": True,
        "wide": True,
        "block_m": 128,
        "shared": True,
        "dispatchers": True,
    },
}
OPTION_RANKS = (1, 2)
REPEATS = 100
PERMUTED = {**{str(ranks): (ranks, {}) for ranks in RANKS}, "2, widened": (2, OPTIONS["widened"])}


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
        num_stages=2,
    )
    if changes.get("shared"):
        base = replace(base, topk=layers.TOPK + 1, num_experts=layers.EXPERTS // ranks + 1)
    return replace(base, **changes)


def multiprocessors():
    return torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132


def module_config(tokens, **options):
    return config_for(
        tokens,
        topk=layers.TOPK,
        hidden=layers.HIDDEN,
        inter=layers.INTER,
        num_experts=layers.EXPERTS,
        clamp=10.0,
        multiprocessors=multiprocessors(),
        **options,
    )


def work():
    """Return what the tests compile."""
    configs = [*(config(r) for r in RANKS), config(2, **LOST)]
    configs += [config(ranks, **changes) for ranks in OPTION_RANKS for changes in OPTIONS.values()]
    of_modules = [module_config(8), module_config(MAX_TOKENS)]
    of_modules += [module_config(8, shared=True, fp8=fp8) for fp8 in (False, True)]
    found = compiled.kernels([*configs, *of_modules], ("fused", "plan"))
    found += compiled.kernels(of_modules, ("stage",))
    return found + compiled.products(TOKENS) + compiled.products(TOKENS, fp8=True)


@pytest.fixture(scope="module", autouse=True)
def side_by_side():
    compiled.side_by_side(work())


def engine(ranks, **changes):
    c = config(ranks, **changes)
    l1, l2 = layers.both()
    shares = [
        Experts(layers.share(l1, rank, ranks), layers.share(l2, rank, ranks)).cuda()
        for rank in range(c.first_rank, c.first_rank + c.launch_ranks)
    ]
    return VirtualRanks(c, shares)


def run(moe, x, idx, weights):
    c = moe.config
    by_rank = (c.num_ranks, c.tokens, -1)
    codes, scale = act_quant(x, 128)
    idx = idx.int().view(by_rank)
    plan = moe.plan(idx, weights.view(by_rank))
    scale = scale.view(torch.uint8).view(by_rank)
    y = moe.launch(codes.view(by_rank), scale, idx[: c.launch_ranks], plan)
    moe.check()
    return y.view(-1, c.hidden).view(torch.int16)


def check_plan(moe, idx, weights):
    c = moe.config
    by_rank = (c.num_ranks, c.tokens, -1)
    idx, weights = idx.int().view(by_rank), weights.view(by_rank)
    sizes = {"geometry": c.geometry, "block_m": c.block_m, "pool_blocks": c.pool_blocks}
    wanted, found = make_plan(idx, weights, **sizes), moe.plan(idx, weights)
    assert torch.equal(found.firsts, wanted.firsts)
    assert torch.equal(found.counts, wanted.counts)
    for rank, blocks in enumerate(wanted.firsts[:, -1].tolist()):
        assert torch.equal(found.block_expert[rank, :blocks], wanted.block_expert[rank, :blocks])
        rows = blocks * c.block_m
        for name in ("row_source", "row_target", "row_weight"):
            assert torch.equal(getattr(found, name)[rank, :rows], getattr(wanted, name)[rank, :rows])


@pytest.mark.parametrize("ranks", RANKS)
def test_equals_the_unfused_layer(ranks, layer_record):
    both = layers.both()
    alone = MegaMoE(*both, num_experts=layers.EXPERTS, topk=layers.TOPK, max_tokens=TOKENS).cuda()
    moe = engine(ranks)
    for seed, (masked, skew) in enumerate(((0.0, 1.0), (0.3, 8.0), (1.0, 1.0))):
        x, idx, weights = (t.cuda() for t in layers.tokens(TOKENS, seed, masked, skew))
        check_plan(moe, idx, weights)
        wanted = alone(x, idx, weights).view(torch.int16)
        for _ in range(10):
            assert torch.equal(run(moe, x, idx, weights), wanted)
    layer_record(moe.config, f"{ranks} virtual ranks", "virtual, unfused bits", True)


@pytest.mark.parametrize(("ranks", "changes"), PERMUTED.values(), ids=PERMUTED.keys())
def test_rows_do_not_depend_on_their_neighbours(ranks, changes, layer_record):
    """A token gives its bits in any place, on any rank, among any others, in each of many calls."""
    moe = engine(ranks, **changes)
    x, idx, weights = (t.cuda() for t in layers.tokens(TOKENS, 3, 0.1, 4.0))
    wanted = run(moe, x, idx, weights)
    equal = torch.ones((), dtype=torch.bool, device="cuda")
    generator = torch.Generator("cuda").manual_seed(5)
    for _ in range(REPEATS):
        order = torch.randperm(TOKENS, generator=generator, device="cuda")
        equal &= (run(moe, x[order], idx[order], weights[order]) == wanted[order]).all()
        equal &= (run(moe, x, idx, weights) == wanted).all()
    layer_record(moe.config, f"{ranks} virtual ranks", f"virtual, permuted, {REPEATS} repeats", bool(equal))
    assert equal


def option_weights(options):
    """Return both linears of all experts, and of the shared one."""
    both = layers.both_fp8() if options.get("fp8") else layers.both()
    return both, layers.both_fp8(5, experts=1) if options.get("shared") else None


@pytest.mark.parametrize("ranks", OPTION_RANKS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_equal_the_unfused_layer(ranks, options, layer_record):
    c = config(ranks, **options)
    both, shared = option_weights(options)
    sizes: dict[str, Any] = {"num_experts": layers.EXPERTS, "topk": layers.TOPK, "max_tokens": TOKENS}
    alone = MegaMoE(*both, **sizes, shared=shared).cuda()
    shares = [Experts(*layers.share_of(both, rank, ranks)).cuda() for rank in range(ranks)]
    moe = VirtualRanks(c, packed_experts(shares, shared and Experts(*shared).cuda()))
    for seed, (masked, skew) in enumerate(((0.0, 1.0), (0.3, 8.0), (1.0, 1.0))):
        x, idx, weights = (t.cuda() for t in layers.tokens(TOKENS, seed, masked, skew))
        wanted = alone(x, idx, weights).view(torch.int16)
        if shared:
            by_rank = (ranks, c.tokens, -1)
            idx, weights = with_shared(idx.view(by_rank), weights.view(by_rank), layers.EXPERTS // ranks)
        check_plan(moe, idx, weights)
        for _ in range(10):
            assert torch.equal(run(moe, x, idx, weights), wanted)
    name = ", ".join(kind for kind, value in OPTIONS.items() if value == options)
    layer_record(c, f"{ranks} virtual ranks, {name}", "virtual, unfused bits", True)


@pytest.mark.parametrize("options", [{}, {"fp8": True}], ids=["FP4", "FP8"])
def test_module_with_a_shared_expert(options, layer_record):
    both, shared = option_weights({"shared": True, **options})
    sizes: dict[str, Any] = {
        "num_experts": layers.EXPERTS,
        "topk": layers.TOPK,
        "max_tokens": 8,
        "shared": shared,
    }
    local, fused = (MegaMoE(*both, **sizes, backend=kind).cuda() for kind in ("local", "fused"))
    for count in (0, 1, 8):
        x, idx, weights = (t.cuda() for t in layers.tokens(count, count))
        assert torch.equal(fused(x, idx, weights).view(torch.int16), local(x, idx, weights).view(torch.int16))
    fused.fused.check()
    name = "FP8, shared expert" if options else "shared expert"
    layer_record(module_config(8, shared=True, **options), f"module, {name}", "module, unfused bits", True)


def test_module(layer_record):
    sizes: dict[str, Any] = {"num_experts": layers.EXPERTS, "topk": layers.TOPK, "max_tokens": MAX_TOKENS}
    options = {**sizes, "count_received": True, "bad_routing": "mask"}
    local = MegaMoE(*layers.both(), **options).cuda()
    fused = MegaMoE(*layers.both(), **options, backend="fused").cuda()
    for count in (0, 1, 8, 9, MAX_TOKENS, MAX_TOKENS + 3):
        x, idx, weights = (t.cuda() for t in layers.tokens(count, count))
        assert torch.equal(fused(x, idx, weights).view(torch.int16), local(x, idx, weights).view(torch.int16))
    fused.fused.check()
    assert fused.received is not None
    assert local.received is not None
    assert torch.equal(fused.received, local.received)
    check_graph(fused, local)
    for most in (8, MAX_TOKENS):
        test = "module, unfused bits, no tokens and too many, under a graph"
        layer_record(module_config(most), f"module, {most} tokens", test, True)


def check_graph(fused, local):
    """A graph that was captured with some tokens gives others theirs, and the rows that experts received."""
    x, idx, weights = (t.cuda() for t in layers.tokens(MAX_TOKENS, 1))
    fixed = x.clone(), idx.int(), weights.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused(*fixed)
    for seed in (2, 3):
        other = [t.cuda() for t in layers.tokens(MAX_TOKENS, seed, 0.3, 4.0)]
        for place, value in zip(fixed, other, strict=True):
            place.copy_(value)
        graph.replay()
        fused.fused.check()
        assert torch.equal(y.view(torch.int16), local(*other).view(torch.int16))
        assert torch.equal(fused.received, local.received)


def test_lost_peer_is_an_error_that_names_it(layer_record):
    moe = engine(2, **LOST)
    x, idx, weights = (t.cuda() for t in layers.tokens(TOKENS, 0))
    with pytest.raises(WatchdogError, match=r"rank 0 gave up in (start|combine): waiting for rank 1"):
        run(moe, x, idx, weights)
    layer_record(moe.config, "rank 0 of 2 virtual ranks", "virtual, lost peer named", True)


def test_refuses_more_ctas_than_fit():
    with pytest.raises(CoResidencyError, match=r"requires launch_ranks \* ctas <= ctas_per_sm \* multi"):
        engine(1, ctas=1 << 14)
