"""Pages of the indexer's keys: what is read is what was written, by place, and zeros outside."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_kernels.attention import index_logits_dense, index_logits_fp4_dense, reference
from dsv4_kernels.attention.hadamard_quant import hadamard_fp4, hadamard_fp8
from dsv4_kernels.attention.index_cache import (
    FP4,
    FP8,
    PAGE_ROWS,
    READ_SPEC,
    index_cache_read,
    index_cache_write,
    page_bytes,
)
from dsv4_kernels.contract import ContractError
from dsv4_kernels.quant.fp4_quant import fp4_dequant
from tests.compare import bits

KINDS = (FP4, FP8)


def keys_of(kind, count, seed=1):
    """Return codes and scales of random keys, and the keys before the cast."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 128, generator=generator).to(torch.bfloat16)
    table = reference.rope_table(count, 160000.0, True)
    positions = torch.arange(count, dtype=torch.int32)
    codes, scale = (hadamard_fp4 if kind == FP4 else hadamard_fp8)(x, positions, table)
    wide = reference.hadamard(reference.rope(x, table))[:, 0]
    return codes[:, 0].contiguous(), scale[:, 0].contiguous(), wide


def pages_of(kind, codes, scale, pages=3, seed=2):
    """Return pages with the keys at random places, and these."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(pages * PAGE_ROWS, generator=generator)[: len(codes)].to(torch.int32)
    cache = torch.full((pages, page_bytes(kind)), 255, dtype=torch.uint8)
    return index_cache_write(cache, slots, codes, scale), slots


@pytest.mark.interpret
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=3)
@given(count=st.integers(1, 100), seed=st.integers(1, 99))
def test_what_is_read_is_what_was_written(kind, count, seed):
    codes, scale, _ = keys_of(kind, count, seed)
    cache, slots = pages_of(kind, codes, scale, seed=seed)
    got, got_scale = index_cache_read(cache, slots)
    assert torch.equal(bits(got), bits(codes))
    want = scale if kind == FP4 else scale.float()[:, 0]
    assert got_scale.shape == want.shape
    assert torch.equal(bits(got_scale), bits(want))


@pytest.mark.interpret
@pytest.mark.parametrize("kind", KINDS)
def test_places_outside_and_any_company(kind):
    codes, scale, _ = keys_of(kind, 90)
    cache, slots = pages_of(kind, codes, scale)
    places = slots.clone()
    outside = torch.tensor((-1, 3 * PAGE_ROWS, -(2**31), 2**31 - 1, -64), dtype=torch.int32)
    places[[0, 13, 31, 32, 89]] = outside
    got, got_scale = index_cache_read(cache, places)
    is_inside = ~torch.isin(places, outside)
    assert not bits(got)[~is_inside].any()
    assert not bits(got_scale)[~is_inside].any()
    assert torch.equal(bits(got)[is_inside], bits(codes)[is_inside])
    for picked in ([32], [89, 3, 3, 0], list(range(20, 80))):  # a place may be read twice
        part = index_cache_read(cache, places[picked].contiguous())
        assert torch.equal(bits(part[0]), bits(got)[picked])
        assert torch.equal(bits(part[1]), bits(got_scale)[picked])


def test_keys_read_are_those_that_scores_over_contiguous_keys_take():
    codes, scale, wide = keys_of(FP4, 128)
    found = index_cache_read(*pages_of(FP4, codes, scale))
    assert torch.equal(fp4_dequant(*found), reference.quantized_fp4(wide))
    dims = {"m": 2, "num_heads": 8, "num_tiles": 1, "ragged": 0}
    cpu = torch.device("cpu")
    q, q_scale, weights, keys, _, lengths = index_logits_fp4_dense.SPEC.make_inputs(dims, cpu, 1)
    slots = torch.arange(len(keys), dtype=torch.int32)
    codes, scale, _ = keys_of(FP4, len(keys))
    cache, slots = pages_of(FP4, codes, scale, pages=len(keys) // PAGE_ROWS)
    score = index_logits_fp4_dense.index_logits_fp4_dense
    found = index_cache_read(cache, slots)
    assert torch.equal(
        score(q, q_scale, weights, *found, lengths), score(q, q_scale, weights, codes, scale, lengths)
    )
    q, weights, keys, _, lengths = index_logits_dense.SPEC.make_inputs(dims, cpu, 1)
    codes, scale, _ = keys_of(FP8, len(keys))
    cache, slots = pages_of(FP8, codes, scale, pages=len(keys) // PAGE_ROWS)
    found = index_cache_read(cache, slots)
    want = index_logits_dense.index_logits(q, weights, codes, scale.float()[:, 0].contiguous(), lengths)
    assert torch.equal(index_logits_dense.index_logits(q, weights, *found, lengths), want)


def test_contract_names_the_clause():
    cache, places = torch.zeros(2, page_bytes(FP4), dtype=torch.uint8), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ContractError, match=r"^index_cache_read: requires cache\.shape"):
        index_cache_read(cache[:, :4224].contiguous(), places)
    with pytest.raises(ContractError, match="0 < pages"):
        index_cache_read(cache[:0], places)
    with pytest.raises(ContractError, match="places"):
        index_cache_read(cache, places.long())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_rows_do_not_depend_on_the_batch(kind, gpu_record):
    dims = {"m": 4096, "pages": 1024, "is_fp4": int(kind == FP4)}
    cache, places = READ_SPEC.make_inputs(dims, torch.device("cuda"), 3)
    full = index_cache_read(cache, places)
    for first, count in ((0, 1), (7, 20), (100, 333), (4000, 96), (1, 4095)):
        rows = slice(first, first + count)
        part = index_cache_read(cache, places[rows].clone())
        same = all(torch.equal(bits(p), bits(f)[rows]) for p, f in zip(part, full, strict=True))
        gpu_record(READ_SPEC, READ_SPEC.select(dims), f"rows {first} to {first + count}", same)
        assert same
