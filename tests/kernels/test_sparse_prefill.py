"""Sparse prefill at the edges: lists around a chunk's end, masked indices, nothing to attend, sinks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_kernels.attention import output_reference, reference
from dsv4_kernels.attention.sparse_prefill import SPEC, sparse_prefill
from dsv4_kernels.attention.sparse_prefill_fp8 import SPEC as FP8_SPEC
from dsv4_kernels.attention.sparse_prefill_fp8 import sparse_prefill_fp8
from dsv4_kernels.contract import ContractError
from tests.compare import bits, mismatch

HEADS = 64


def inputs(m, n, topk, seed=3):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(m, HEADS, 512, generator=generator).to(torch.bfloat16)
    kv = torch.randn(n, 512, generator=generator).to(torch.bfloat16)
    idx = torch.randint(0, n, (m, topk), generator=generator, dtype=torch.int32)
    return q, idx, kv, torch.randn(HEADS, generator=generator)


def check(*args):
    got = sparse_prefill(*args)
    assert mismatch(SPEC, args, got) is None
    return got


@pytest.mark.interpret
@settings(max_examples=4, deadline=None)
@given(
    topk=st.sampled_from([1, 4, 63, 64, 65, 127, 128, 129, 193]),
    n=st.integers(1, 200),
    first=st.integers(0, 193),
    stray=st.sampled_from([-1, -(2**31), 2**31 - 1]),
)
def test_lists_of_any_length_with_masked_places(topk, n, first, stray):
    q, idx, kv, sink = inputs(2, n, topk)
    idx[0, first:] = stray
    idx[1, :first] = n
    check(q, idx, kv, sink)


@pytest.mark.interpret
def test_nothing_to_attend_gives_zeros_and_an_infinite_lse():
    q, idx, kv, sink = inputs(3, 5, 70)
    idx[1] = -1
    sink[:2] = torch.tensor([-math.inf, 20.0])
    out, lse = check(q, idx, kv, sink)
    assert not bits(out[1]).any()
    assert (lse[1] == math.inf).all()
    assert lse[0].isfinite().all()


@pytest.mark.interpret
def test_a_masked_place_changes_no_bit():
    q, idx, kv, sink = inputs(1, 90, 64)
    longer = torch.cat((idx, torch.full((1, 64), -1, dtype=torch.int32), idx[:, :0]), dim=1)
    for got, want in zip(sparse_prefill(q, longer, kv, sink), sparse_prefill(q, idx, kv, sink), strict=True):
        assert torch.equal(bits(got), bits(want))


@pytest.mark.interpret
@pytest.mark.parametrize("heads", [16])
def test_a_shard_of_the_heads_has_the_bits_of_the_whole(heads):
    q, idx, kv, sink = inputs(2, 90, 70)
    idx[0, 3] = -1
    positions, table = torch.tensor([3, 4], dtype=torch.int32), reference.rope_table(5, 160000.0, True)
    shard = q[:, -heads:].contiguous(), idx, kv, sink[-heads:].contiguous()
    for got, want in zip(sparse_prefill(*shard), sparse_prefill(q, idx, kv, sink), strict=True):
        assert torch.equal(bits(got), bits(want[:, -heads:]))
    whole = sparse_prefill_fp8(q, idx, kv, sink, positions, table)
    for got, want in zip(sparse_prefill_fp8(*shard, positions, table), whole, strict=True):
        assert torch.equal(bits(got), bits(want[:, -heads:]))


@pytest.mark.interpret
def test_logits_far_apart():
    q, idx, kv, sink = inputs(1, 64, 129)
    q, kv = q * 30, kv * 30
    check(q, idx, kv, sink)


@pytest.mark.interpret
def test_codes_and_scales_have_the_bits_of_the_bf16_output_rotated_back_and_cast():
    q, idx, kv, sink = inputs(4, 90, 70)
    idx[1] = -1
    q[2], kv[7] = q[2] * 1e-30, kv[7] * 1e4
    table = reference.rope_table(50, 160000.0, True)
    positions = torch.tensor([0, 3, 49, 50], dtype=torch.int32)
    out, lse = sparse_prefill(q, idx, kv, sink)
    codes, scale, same = sparse_prefill_fp8(q, idx, kv, sink, positions, table)
    for got, want in zip((codes, scale), output_reference.fp8_output(out, positions, table), strict=True):
        assert torch.equal(bits(got), bits(want))
    assert torch.equal(bits(same), bits(lse))
    assert (codes[1].float() == 0).all()
    turned = output_reference.fp8_output(out, torch.full_like(positions, -1), table)[0]
    assert not torch.equal(bits(codes[0]), bits(turned[0]))


def test_the_inverse_rotation_undoes_the_rotation():
    x = torch.randn(5, 2, 512, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    angles = reference.angles(reference.rope_table(9, 10000.0, False), torch.arange(4, 9, dtype=torch.int32))
    back = reference.rope(reference.rope(x, angles), angles, inverse=True)
    assert torch.equal(back[..., :448], x[..., :448])
    assert (back.float() - x.float()).abs().max() <= 4 * 2.0**-8 * x.float().abs().max()


def test_contract_names_the_clause():
    q, idx, kv, sink = inputs(1, 4, 8)
    with pytest.raises(ContractError, match="num_heads % HEAD_GROUP == 0"):
        sparse_prefill(q[:, :12].contiguous(), idx, kv, sink[:12])
    with pytest.raises(ContractError, match="0 < topk"):
        sparse_prefill(q, idx[:, :0], kv, sink)
    with pytest.raises(ContractError, match=r"kv\.shape"):
        sparse_prefill(q, idx, kv[:, :256].contiguous(), sink)


def test_reference_is_plain_softmax_where_there_is_no_sink():
    q, idx, kv, sink = inputs(2, 9, 5)
    out, lse = reference.sparse_attention(q, idx, kv, torch.full_like(sink, -math.inf))
    keys = kv[idx.long()].double()
    logits = torch.einsum("mhd,mkd->mhk", q.double(), keys) / 512**0.5
    want = (torch.softmax(logits, -1) @ keys).to(torch.bfloat16)
    assert torch.equal(out, want)
    assert torch.allclose(lse, torch.logsumexp(logits, -1).float())


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
def test_gpu_codes_and_scales_have_the_bits_of_the_bf16_output_rotated_back_and_cast(heads, gpu_record):
    dims = {"m": 70, "num_heads": heads, "topk": 1152, "n": 3000, "num_positions": 300}
    q, idx, kv, sink, positions, table = FP8_SPEC.make_inputs(dims, torch.device("cuda"), 3)
    out, lse = sparse_prefill(q, idx, kv, sink)
    want = *output_reference.fp8_output(out, positions, table), lse
    found = zip(sparse_prefill_fp8(q, idx, kv, sink, positions, table), want, strict=True)
    same = all(torch.equal(bits(g), bits(w)) for g, w in found)
    gpu_record(FP8_SPEC, FP8_SPEC.select(dims), "codes and scales of 70 rows", same)
    assert same
    if heads == min(s.kwargs["num_heads"] for s in FP8_SPEC.variants):
        return
    half = slice(heads // 2, heads)  # of a query's heads: other blocks, neighbours of other queries
    shard = q[:, half].contiguous(), idx, kv, sink[half].contiguous()
    found = zip(sparse_prefill(*shard), (out[:, half], lse[:, half]), strict=True)
    same = all(torch.equal(bits(g), bits(w)) for g, w in found)
    gpu_record(SPEC, SPEC.select({**dims, "num_heads": heads // 2}), f"rows of a half of {heads} heads", same)
    assert same
