"""Attention's kernels in the interpreter: lengths where something begins or ends, rows in any company."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_kernels.attention import (
    hca_chunks,
    hca_groups,
    hca_lists,
    hca_prefill,
    index_logits,
    index_logits_dense,
    index_logits_fp4,
    index_logits_fp4_dense,
    output_reference,
    reference,
    sparse_decode,
    sparse_decode_fp8,
    sparse_prefill,
    sparse_prefill_fp8,
    topk,
)
from dsv4_kernels.attention.hca_fold import hca_fold
from dsv4_kernels.attention.hca_fold_fp8 import hca_fold_fp8
from dsv4_kernels.attention.hca_join import hca_join
from dsv4_kernels.attention.sparse_parts import sparse_parts
from tests.compare import as_tuple, bits, mismatch

pytestmark = pytest.mark.interpret
# Nothing, one key, a block of 4, a chunk and a page of 64, the window and a block of 128; both sides of each.
EDGES = (0, 1, 3, 4, 5, 63, 64, 65, 127, 128, 129)
ROWS = len(EDGES)
CPU = torch.device("cpu")


def lengths(turn, edges=EDGES):
    """Return `edges` from place `turn` on, one for each row: two lists of a query meet in any pair."""
    return torch.tensor([edges[(i + turn) % len(edges)] for i in range(ROWS)], dtype=torch.int32)


def rows(tensor, picked):
    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    return raw[picked].view(tensor.dtype)


def assert_any_company(fn, inputs, by_row, got, picked):
    """Rows `picked`, in that order and as often, have the bits that they have among all."""
    part = [rows(x, picked) if i in by_row else x for i, x in enumerate(inputs)]
    for alone, among in zip(as_tuple(fn(*part)), as_tuple(got), strict=True):
        assert torch.equal(bits(alone), bits(among)[picked])


def assert_edges(spec, fn, inputs, by_row, picked):
    """`fn` agrees with the reference of `spec`, and rows `picked` have the same bits alone."""
    got = fn(*inputs)
    assert mismatch(spec, inputs, got) is None
    assert_any_company(fn, inputs, by_row, got, picked)


any_rows = given(
    turn=st.sampled_from((3, 8, 0, 5)), seed=st.integers(1, 99), picked=st.sampled_from(([5, 2], [4, 0, 4]))
)


@pytest.mark.slow
@settings(max_examples=1)
@any_rows
def test_decode_in_both_forms(turn, seed, picked):
    """A block for each chunk folded by another kernel, and one for all chunks: the same bits."""
    dims = {"m": ROWS, "num_heads": 8, "topk": 192, "window_pages": 2, "entry_pages": 3, "ragged": 1}
    inputs = list(sparse_decode.SPEC.make_inputs(dims, CPU, seed))
    inputs[3], inputs[6] = lengths(0), lengths(turn)
    got = sparse_decode.whole(*inputs)
    assert mismatch(sparse_decode.SPEC, inputs, got) is None
    parts = sparse_parts(*inputs[:-1])
    for part, whole in zip(hca_fold(*parts, inputs[-1]), got, strict=True):
        assert torch.equal(bits(part), bits(whole))
    # Their FP8 outputs: positions at the same edges, of which the last is outside the table.
    angles = lengths(turn), reference.rope_table(EDGES[-1], 160000.0, True)
    want = *output_reference.fp8_output(got[0], *angles), got[1]
    for forms in zip(
        sparse_decode_fp8.whole_fp8(*[*inputs, *angles]),
        hca_fold_fp8(*parts, inputs[-1], *angles),
        want,
        strict=True,
    ):
        assert torch.equal(bits(forms[0]), bits(forms[2]))
        assert torch.equal(bits(forms[1]), bits(forms[2]))
    assert_any_company(sparse_decode.whole, inputs, (0, 2, 3, 5, 6), got, picked)


@pytest.mark.slow
@settings(max_examples=1)
@any_rows
def test_hca_decode_in_both_forms(turn, seed, picked):
    """A block for each chunk, and one for each group; beside the other edges, both sides of a group's end."""
    dims = {"m": 6, "num_heads": 8, "num_pages": 13, "pages": 20, "ragged": 1}
    inputs = list(hca_lists.make_inputs(dims, CPU, seed))
    inputs[3] = lengths(turn)[:6]
    inputs[5] = torch.tensor((0, 1, 65, 703, 704, 705), dtype=torch.int32)
    by_row, sink = (0, 2, 3, 4, 5), torch.linspace(-2, 2, 8)
    assert_edges(hca_chunks.SPEC, hca_chunks.hca_chunks, inputs, by_row, picked)
    assert_edges(hca_groups.SPEC, hca_groups.hca_groups, inputs, by_row, picked)
    joined = hca_join(*hca_chunks.hca_chunks(*inputs), sink)
    for few, many in zip(joined, hca_fold(*hca_groups.hca_groups(*inputs), sink), strict=True):
        assert torch.equal(bits(few), bits(many))


def masked_lists(module, turn, seed, **dims):
    """Return inputs of a prefill kernel whose lists end at the edges."""
    dims = {"m": ROWS, "num_heads": 8, "topk": EDGES[-1], "n": 200, **dims}
    inputs = list(module.SPEC.make_inputs(dims, CPU, seed))
    place = torch.arange(dims["topk"], dtype=torch.int32)
    inputs[1] = torch.where(place < lengths(turn)[:, None], inputs[1].clamp(0, 199), -1)
    return inputs


@settings(max_examples=1)
@any_rows
def test_prefill(turn, seed, picked):
    inputs = masked_lists(sparse_prefill, turn, seed)
    assert_edges(sparse_prefill.SPEC, sparse_prefill.sparse_prefill, inputs, (0, 1), picked)


@settings(max_examples=1)
@any_rows
def test_hca_prefill(turn, seed, picked):
    """Windows of each length beside entries of another, and on both sides of a round's end."""
    dims = {"m": ROWS, "num_heads": 8, "entries": EDGES[-1], "n": 200, "ragged": 1}
    inputs = list(hca_prefill.SPEC.make_inputs(dims, CPU, seed))
    inputs[2], inputs[4] = lengths(0).clamp(max=128), lengths(turn, (*EDGES[1:-2], 191, 192, 193))
    assert_edges(hca_prefill.SPEC, hca_prefill.hca_prefill, inputs, (0, 1, 2, 3, 4), picked)


@settings(max_examples=1)
@any_rows
def test_prefill_with_fp8_output(turn, seed, picked):
    inputs = masked_lists(sparse_prefill_fp8, turn, seed, num_positions=7)
    assert_edges(sparse_prefill_fp8.SPEC, sparse_prefill_fp8.sparse_prefill_fp8, inputs, (0, 1, 4), picked)


@settings(max_examples=2)
@any_rows
def test_scores_over_pages(turn, seed, picked):
    dims = {"m": ROWS, "num_heads": 8, "num_parts": 1, "num_pages": 20, "ragged": 1}
    inputs = list(index_logits.SPEC.make_inputs(dims, CPU, seed))
    inputs[4] = lengths(turn, (*EDGES[:-2], 1023, 1024, 1025))
    assert_edges(index_logits.SPEC, index_logits.index_logits_paged, inputs, (0, 1, 3, 4), picked)


@settings(max_examples=2)
@any_rows
def test_scores_over_contiguous_keys(turn, seed, picked):
    dims = {"m": ROWS, "num_heads": 8, "num_tiles": 2, "ragged": 1}
    inputs = list(index_logits_dense.SPEC.make_inputs(dims, CPU, seed))
    tiles = (0, 1, 63, 64, 65, 128, 191, 192, 193, 256, 383, 384, 385, 512)  # of 128 keys
    for edges in (tiles, (*EDGES[2:], 255, 256, 257, 511, 512)):
        inputs[4] = lengths(turn, edges)
        assert_edges(index_logits_dense.SPEC, index_logits_dense.index_logits, inputs, (0, 1, 4), picked)


@settings(max_examples=1)
@any_rows
def test_scores_over_fp4_pages(turn, seed, picked):
    dims = {"m": ROWS, "next_n": 1, "num_heads": 8, "num_parts": 1, "num_pages": 20, "ragged": 1}
    inputs = list(index_logits_fp4.SPEC.make_inputs(dims, CPU, seed))
    inputs[5] = lengths(turn, (*EDGES[:-2], 1023, 1024, 1025))
    assert_edges(index_logits_fp4.SPEC, index_logits_fp4.index_logits_fp4, inputs, (0, 1, 2, 4, 5), picked)


@settings(max_examples=2)
@any_rows
def test_scores_over_contiguous_fp4_keys(turn, seed, picked):
    dims = {"m": ROWS, "num_heads": 8, "num_tiles": 2, "ragged": 1}
    inputs = list(index_logits_fp4_dense.SPEC.make_inputs(dims, CPU, seed))
    for edges in (EDGES, (*EDGES[4:], 255, 256, 257, 383, 384, 385, 511, 512)):
        inputs[5] = lengths(turn, edges)
        fn = index_logits_fp4_dense.index_logits_fp4_dense
        assert_edges(index_logits_fp4_dense.SPEC, fn, inputs, (0, 1, 2, 5), picked)


def test_topk():
    """As many visible scores as are selected, and one less and more; fewer than a block's words."""
    k = 512
    scores = torch.randn(6, 516, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    visible = torch.tensor((1, 4, 129, 511, 512, 513), dtype=torch.int32)
    got = topk.topk(scores, visible, k)
    assert torch.equal(got, reference.index_topk(scores, visible, k))
    assert_any_company(lambda s, n: topk.topk(s, n, k), (scores, visible), (0, 1), got, [5, 2])
