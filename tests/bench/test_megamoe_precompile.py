"""The benchmark over several GPUs: which kernels it is spared compiling, what memory they take, its forms."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import megamoe, megamoe_precompile, megamoe_ranks, precompile
from dsv4_kernels.gemm import fold
from dsv4_kernels.registry import get_kernel
from megamoe import virtual
from megamoe.layer import one_of
from megamoe.weights import Packed


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (megamoe_ranks.TOKENS, [8, 512, 4096, 8192]),
        ((8, 4097), [8, 4097]),
        ((5,), [5]),  # the largest number is a size of its own: a layer's buffers hold no more
        ((9, 64), [64]),
    ],
)
def test_sizes_of_a_layer(tokens, sizes):
    assert megamoe_precompile.sizes(tokens) == sizes


@pytest.mark.parametrize("fp8", [False, True], ids=["FP4", "FP8"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("model", megamoe.SHAPES)
def test_buffers_are_no_larger_than_published_ones(model, ranks, fp8):
    """All of them are, but for the ring of widened weights that one rank alone may have."""
    for tokens in (*megamoe_ranks.TOKENS, 3072):
        c = megamoe.config(model, tokens, 132, fp8=fp8, ranks=ranks)
        found = megamoe.memory(one_of(c, ranks, 0, 1.0) if ranks > 1 else c)
        assert found["symmetric_bytes"] <= found["published_bytes"], tokens
        ring = math.prod(c.wide_ring_shape) * c.widened
        assert not (ring and ranks > 1)
        assert found["buffer_bytes"] - ring <= found["published_bytes"], tokens


@pytest.mark.parametrize(
    ("model", "tokens", "ranks"), [("flash", 64, 1), ("flash", 4096, 1), ("flash", 512, 8), ("pro", 512, 4)]
)
def test_buffers_are_counted_as_a_rank_allocates_them(model, tokens, ranks, monkeypatch):
    monkeypatch.setattr(virtual, "compile_kernel", lambda *args: None)
    chip = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    c = megamoe.config(model, tokens, 132, ranks=ranks)
    c = one_of(c, ranks, 0, 1.0) if ranks > 1 else c
    meta = torch.device("meta")
    combine = torch.empty(c.num_ranks * c.combine_rows, c.hidden, dtype=torch.bfloat16, device=meta)
    signals = torch.empty(c.num_ranks, c.signal_words, dtype=torch.int32, device=meta)
    weights = Packed(*(torch.empty(1, device=meta) for _ in range(3)))
    rank = virtual.VirtualRanks(c, weights, meta, (combine, signals))
    own = [*rank.counters, *vars(rank._plan).values()]
    shared = "combine", "signals"
    own += [t for name, t in vars(rank).items() if isinstance(t, torch.Tensor) and name not in shared]
    found = megamoe.memory(c)
    left_out = 1 << 16  # what a kernel without a ring of weights has in its place, and a plan's counts
    assert abs(sum(t.nbytes for t in own) + found["symmetric_bytes"] - found["buffer_bytes"]) < left_out


@pytest.mark.parametrize("model", megamoe.SHAPES)
def test_a_ring_on_one_of_several_ranks_is_that_of_one_gpu(model):
    of_ranks = replace(megamoe.config(model, 4096, 132, ranks=2), **megamoe.ring_changes())
    assert of_ranks == megamoe.config(model, 4096, 132)
    assert not megamoe.config(model, 4096, 132, ranks=2).widened


def test_jobs_are_each_rank_s_kernels_or_one_launch_s():
    of_ranks = list(megamoe_precompile.jobs(("pro",), (8, 4096), 4, fp8=False, ring=True))
    assert len(of_ranks) == len(set(of_ranks)) == 3 * 4 * (1 + 2)
    assert {job.form for job in of_ranks if job.size == 8} == {""}
    at_once = list(megamoe_precompile.jobs(("flash",), (4096,), 4, fp8=False, virtual=True, timeline=True))
    assert [str(job).split()[0] for job in at_once] == ["fused", "fused", "fused", "plan"]
    assert all(job.rank is None for job in at_once)


@pytest.mark.parametrize("fp8", [False, True])
def test_products_are_all_that_an_expert_may_take(fp8):
    tokens, ranks = 512, 4
    listed = megamoe_precompile.products("pro", (tokens,), ranks, fp8=fp8)
    variants = {(p.kernel, get_kernel(p.kernel).select(dict(p.dims)).id) for p in listed}
    assert len(variants) == len(listed)
    dims = {"n": 6144, "k": 7168} | ({"f32_scales": 0} if fp8 else {})
    for m in (1, 16, 17, 300, 1023, 1024, 1500, tokens * ranks):
        name = "fp8_gemm" if fp8 else f"fp8_fp4_gemm_{'widened' if m >= fold.WIDENED_TOKENS else 'folded'}"
        assert (name, get_kernel(name).select({"m": m, **dims}).id) in variants


def test_what_fails_to_compile_is_counted():
    lines = []
    unknown = megamoe_precompile.Product("act_quant", (("k", 7),))  # the dims do not say which variant
    assert precompile.compile_all([unknown], 1, echo=lines.append) == 1
    assert lines == ["[1/1] act_quant k=7: 'block_k'"]
