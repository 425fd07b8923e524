"""The reference of the attention layer: prefill, chunks and decode agree, and its parts do what they say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_kernels.attention import layer_reference as layers
from dsv4_kernels.attention import reference as ops

LENGTH = 150  # past the window, and past one block of 128
RATIOS = (0, 4, 128)


def small_layer(ratio, seed=3):
    dims = layers.Dims(
        hidden=32,
        num_heads=2,
        q_rank=16,
        num_groups=2,
        group_rank=8,
        ratio=ratio,
        index_heads=2,
        index_topk=6,
    )
    return layers.random_layer(dims, seed, 4 * LENGTH)


def tokens(count, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 32, generator=generator).to(torch.bfloat16)


def run(layer, x, portions):
    request = layers.Request.new(layer)
    out = [layers.append(layer, part, request) for part in x.split(portions)]
    return torch.cat(out), request


def assert_same(got, want):
    (out, request), (want_out, want_request) = got, want
    assert torch.equal(out, want_out)
    for name in ("window", "entries", "index_keys"):
        assert torch.equal(getattr(request, name), getattr(want_request, name)), name
    for name in ("state", "index_state"):
        if getattr(request, name) is not None:
            assert torch.equal(getattr(request, name).kv, getattr(want_request, name).kv)
            assert torch.equal(getattr(request, name).score, getattr(want_request, name).score)
    if request.selected:
        assert torch.equal(torch.cat(request.selected), torch.cat(want_request.selected))


@pytest.mark.parametrize("ratio", RATIOS)
def test_prefill_and_decode_agree(ratio):
    layer, x = small_layer(ratio), tokens(LENGTH)
    assert_same(run(layer, x, [1] * LENGTH), run(layer, x, [LENGTH]))


@pytest.mark.parametrize("ratio", RATIOS)
@settings(max_examples=3)
@given(data=st.data())
def test_any_portions_agree(ratio, data):
    cuts = data.draw(
        st.lists(st.sampled_from((1, 2, 3, 4, 5, 31, 64, 127, 128, 129)), min_size=1, max_size=4)
    )
    layer, x = small_layer(ratio), tokens(sum(cuts))
    assert_same(run(layer, x, cuts), run(layer, x, [sum(cuts)]))


@pytest.mark.parametrize("ratio", RATIOS)
def test_later_tokens_change_nothing_before(ratio):
    layer, x = small_layer(ratio), tokens(LENGTH)
    other = torch.cat((x[:137], tokens(13, seed=6)))
    assert torch.equal(run(layer, x, [LENGTH])[0][:137], run(layer, other, [LENGTH])[0][:137])


def test_first_overlapped_block_has_no_block_before():
    """Of entry 0, softmax runs over its own four tokens alone."""
    layer, x = small_layer(4), tokens(4)
    compressor = layer.compressor
    assert compressor is not None
    kv, score = compressor.rows(x, 0)
    entry = compressor.append(x, 0, compressor.new_state())
    weight = torch.softmax(score[:, 512:].double(), dim=0)
    assert torch.equal(entry[0], (weight * kv[:, 512:].double()).sum(0).to(torch.bfloat16))


def test_visibility_is_that_of_complete_blocks():
    layer, x = small_layer(4), tokens(30)
    _, request = run(layer, x, [30])
    for t, chosen in enumerate(torch.cat(request.selected)):
        valid = chosen[chosen >= 0]
        assert len(valid) == min(6, (t + 1) // 4)
        assert (valid < (t + 1) // 4).all()


def test_no_valid_key_gives_zeros_and_infinite_lse():
    q = torch.randn(2, 3, 512).to(torch.bfloat16)
    idx = torch.tensor([[-1, -1], [7, 0]], dtype=torch.int32)
    for sink in (torch.randn(3), torch.full((3,), -math.inf)):
        out, lse = ops.sparse_attention(q, idx, torch.randn(4, 512).to(torch.bfloat16), sink)
        assert not out[0].any()
        assert (lse[0] == math.inf).all()
        assert lse[1].isfinite().all()
        assert out[1].any()


def test_sink_only_scales():
    q, kv = torch.randn(1, 2, 512).to(torch.bfloat16), torch.randn(9, 512).to(torch.bfloat16)
    idx = torch.arange(9, dtype=torch.int32)[None]
    sink = torch.tensor([0.5, -1.0])
    out, lse = ops.sparse_attention(q, idx, kv, sink)
    plain, same_lse = ops.sparse_attention(q, idx, kv, torch.full((2,), -math.inf))
    assert torch.equal(lse, same_lse)
    factor = torch.sigmoid(lse.double() - sink)[0, :, None]
    torch.testing.assert_close(out[0].double(), plain[0].double() * factor, rtol=2**-7, atol=1e-6)


def test_topk_takes_the_lowest_place_at_a_tie():
    scores = torch.tensor([[1.0, 3.0, 3.0, -math.inf, 3.0], [-math.inf] * 5])
    assert ops.topk(scores, 4).tolist() == [[1, 2, 4, 0], [-1] * 4]
    assert ops.topk(scores, 7).shape == (2, 7)


def test_rope_turns_back():
    table = ops.rope_table(300, 160000.0, True)
    x = torch.randn(300, 2, 512).to(torch.bfloat16)
    back = ops.rope(ops.rope(x, table), table, inverse=True)
    assert torch.equal(back[..., :448], x[..., :448])
    torch.testing.assert_close(back, x, rtol=2**-6, atol=2**-6)
    assert torch.equal(ops.rope(x, table)[0], x[0])


def test_hadamard_is_its_own_inverse():
    x = torch.randint(-8, 8, (5, 128)).to(torch.bfloat16)
    wide = x.double() @ (ops.hadamard(torch.eye(128, dtype=torch.bfloat16)).double())
    torch.testing.assert_close(ops.hadamard(ops.hadamard(x)).double(), x.double(), rtol=2**-6, atol=2**-4)
    torch.testing.assert_close(ops.hadamard(x).double(), wide, rtol=2**-6, atol=2**-6)


def test_entries_survive_their_rows():
    entry = torch.randn(6, 512).to(torch.bfloat16) * torch.logspace(-6, 3, 6)[:, None].to(torch.bfloat16)
    once = ops.quantized_entry(entry)
    assert torch.equal(ops.quantized_entry(once), once)
    assert torch.equal(once[:, 448:], entry[:, 448:])
    assert (
        (once - entry).abs()[:, :448].double() <= entry.abs().amax(-1, keepdim=True).double() * 2**-4
    ).all()
