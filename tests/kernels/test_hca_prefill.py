"""HCA prefill: the bits of `sparse_prefill` with the list, at edges of window and entries, in any company."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_kernels.attention import reference
from dsv4_kernels.attention.hca_prefill import MAX_LENGTH, RANGES, SPEC, hca_prefill, ranges_of
from dsv4_kernels.attention.sparse_prefill import sparse_prefill
from dsv4_kernels.contract import ContractError
from tests.compare import bits, mismatch

HEADS = 64
WINDOW, RATIO = 128, 128


def ranges(*queries):
    """Return the tensors of queries given as (window_end, window_length, entry_start, entry_length)."""
    return tuple(torch.tensor(queries, dtype=torch.int32).T.contiguous().unbind(0))


def inputs(n, *queries, heads=HEADS, seed=3):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(len(queries), heads, 512, generator=generator).to(torch.bfloat16)
    kv = torch.randn(n, 512, generator=generator).to(torch.bfloat16)
    ends = [x.clone() for x in ranges(*queries)]
    return q, *ends, kv, torch.randn(heads, generator=generator)


def same_bits(got, want):
    return all(torch.equal(bits(g), bits(w)) for g, w in zip(got, want, strict=True))


def listed(q, window_end, window_length, entry_start, entry_length, kv, sink):
    """Return `sparse_prefill` of the same rows."""
    idx = reference.range_lists(window_end, window_length, entry_start, entry_length)
    return sparse_prefill(q, idx, kv, sink)


def check(*args):
    got = hca_prefill(*args)
    assert mismatch(SPEC, args, got) is None
    assert same_bits(got, listed(*args))
    return got


@pytest.mark.interpret
@settings(max_examples=4, deadline=None)
@given(
    n=st.integers(1, 300),
    window=st.tuples(st.integers(0, 310), st.sampled_from([0, 1, 63, 64, 65, 127, 128])),
    entries=st.tuples(
        st.integers(0, 310), st.sampled_from([0, 1, 4, 63, 64, 65, 127, 128, 129, 191, 192, 193])
    ),
)
def test_windows_and_entries_of_any_length(n, window, entries):
    check(*inputs(n, (*window, *entries), (n, WINDOW, 0, n)))


@pytest.mark.interpret
def test_nothing_to_attend_gives_zeros_and_an_infinite_lse():
    q, *ends, kv, sink = inputs(5, (5, 3, 0, 5), (5, 0, 0, 0), (0, 128, 5, 8), (1, 1, 9, 0))
    sink[:2] = torch.tensor([-math.inf, 20.0])
    out, lse = check(q, *ends, kv, sink)
    assert not bits(out[1:3]).any()
    assert (lse[1:3] == math.inf).all()
    assert lse[[0, 3]].isfinite().all()
    out, lse = hca_prefill(q, *ends, kv[:0], sink)
    assert not bits(out).any()
    assert (lse == math.inf).all()


@pytest.mark.interpret
def test_any_numbers_mask_what_lies_outside():
    least, most = -(2**31), 2**31 - 1
    places, counts = ((least, most), (most, least)), ((most, 130), (least, least))
    far = [(end, window, start, entries) for end, start in places for window, entries in counts]
    q, *ends, kv, sink = inputs(40, *far, (20, most, -5, 12), (-1, 128, -200, 250), (170, -1, 40, 3))
    _, lse = check(q, *ends, kv, sink)
    assert (lse[[0, 1, 2, 3, 6]] == math.inf).all()
    assert lse[4:6].isfinite().all()
    ends[3][4] = MAX_LENGTH + 1
    assert reference.range_lists(*ends).shape == (7, WINDOW + MAX_LENGTH)


@pytest.mark.interpret
def test_rows_that_a_query_does_not_see_may_hold_anything():
    q, *ends, kv, sink = inputs(200, (150, 20, 160, 30), (10, 10, 160, 1))
    want = hca_prefill(q, *ends, kv, sink)
    for row in (10, 129, 150, 159, 190, 199):
        kv[row] = math.nan
    assert same_bits(hca_prefill(q, *ends, kv, sink), want)


@pytest.mark.interpret
@pytest.mark.parametrize("heads", [16])
def test_a_shard_of_the_heads_has_the_bits_of_the_whole(heads):
    q, *ends, kv, sink = inputs(200, (100, 90, 120, 70), (3, 3, 7, 1))
    whole = hca_prefill(q, *ends, kv, sink)
    shard = hca_prefill(q[:, -heads:].contiguous(), *ends, kv, sink[-heads:].contiguous())
    assert same_bits(shard, [x[:, -heads:] for x in whole])


@pytest.mark.interpret
def test_logits_far_apart():
    q, *ends, kv, sink = inputs(150, (140, 128, 10, 130))
    check(q * 30, *ends, kv * 30, sink)


@pytest.mark.parametrize(
    ("start", "count"), [(0, 1), (0, 130), (126, 3), (127, 1), (128, 1), (1000, 40), (8191, 2)]
)
def test_ranges_of_a_request_are_the_layers_list(start, count):
    """Of the rows that the layer has: 128 of the ring, oldest first, these tokens', and the entries."""
    ends = ranges_of(start, count, WINDOW, WINDOW + count)
    position = torch.arange(start, start + count)[:, None]
    window = position - start + 1 + torch.arange(WINDOW)
    window = torch.where(window + start >= WINDOW, window, -1)
    entry = torch.arange(int((position[-1] + 1) // RATIO))
    entry = torch.where(entry < (position + 1) // RATIO, entry + WINDOW + count, -1)
    assert torch.equal(reference.range_lists(*ends), torch.cat((window, entry), dim=1).int())
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in ends)


def test_requests_are_concatenated():
    """A request's queries have the bits, in the reference, that they have alone."""
    one, two = ranges_of(250, 3, 128, 131), ranges_of(0, 2, 140, 142)
    q, *_, kv, sink = inputs(150, *[(0, 0, 0, 0)] * 5, heads=8)
    both = [torch.cat(pair) for pair in zip(one, two, strict=True)]
    whole = hca_prefill(q, *both, kv, sink)
    alone = [
        hca_prefill(q[part].contiguous(), *ends, kv, sink)
        for part, ends in ((slice(0, 3), one), (slice(3, 5), two))
    ]
    for got, *parts in zip(whole, *alone, strict=True):
        assert torch.equal(bits(got), bits(torch.cat(parts)))


def test_contract_names_the_clause():
    q, *ends, kv, sink = inputs(4, (4, 4, 0, 4))
    with pytest.raises(ContractError, match="num_heads % HEAD_GROUP == 0"):
        hca_prefill(q[:, :12].contiguous(), *ends, kv, sink[:12])
    with pytest.raises(ContractError, match=r"kv\.shape"):
        hca_prefill(q, *ends, kv[:, :256].contiguous(), sink)
    for k, name in enumerate(RANGES):
        wrong = [x.long() if i == k else x for i, x in enumerate(ends)]
        with pytest.raises(ContractError, match=rf"{name}\.dtype"):
            hca_prefill(q, *wrong, kv, sink)
        wrong = [x[:0] if i == k else x for i, x in enumerate(ends)]
        with pytest.raises(ContractError, match=rf"{name}\.shape"):
            hca_prefill(q, *wrong, kv, sink)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
def test_gpu_rows_have_the_bits_of_sparse_prefill_in_any_batch(heads, gpu_record):
    """Ragged queries, some of them empty; then any of them alone, and the last half of their heads."""
    dims = {"m": 70, "num_heads": heads, "entries": 1100, "n": 2000, "ragged": 1}
    args = SPEC.make_inputs(dims, torch.device("cuda"), 3)
    full = hca_prefill(*args)
    same = same_bits(full, listed(*args))
    gpu_record(SPEC, SPEC.select(dims), "bits of sparse_prefill, 70 ragged rows", same)
    assert same
    for first, count in ((0, 1), (7, 20), (35, 1), (69, 1)):
        part = [x[first : first + count].clone() if i < 5 else x for i, x in enumerate(args)]
        same = same_bits(hca_prefill(*part), [x[first : first + count] for x in full])
        gpu_record(SPEC, SPEC.select(dims), f"rows {first} to {first + count - 1} of 70", same)
        assert same
    if heads > 8:
        half = slice(heads // 2, heads)
        shard = args[0][:, half].contiguous(), *args[1:6], args[6][half].contiguous()
        assert same_bits(hca_prefill(*shard), [x[:, half] for x in full])


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize("entries", [512, 8192])
def test_gpu_the_last_tokens_of_a_context_have_the_bits_of_sparse_prefill(heads, entries, gpu_record):
    dims = {"m": 300, "num_heads": heads, "entries": entries, "n": 428 + entries, "ragged": 0}
    args = SPEC.make_inputs(dims, torch.device("cuda"), 4)
    same = same_bits(hca_prefill(*args), listed(*args))
    gpu_record(SPEC, SPEC.select(dims), f"bits of sparse_prefill, {entries} entries", same)
    assert same
