"""Paged caches and sparse decode: layout, skipped places, edges of lists, other batches."""

import inspect

import pytest
import torch

from dsv4_kernels import runtime
from dsv4_kernels.attention import (
    cache_layout,
    decode_reference,
    hca_decode,
    hca_groups,
    output_reference,
    reference,
    sparse_decode_fp8,
)
from dsv4_kernels.attention.cache import cache_read, cache_write
from dsv4_kernels.attention.decode_lists import make_cache
from dsv4_kernels.attention.hca_fold import hca_fold
from dsv4_kernels.attention.hca_fold_fp8 import hca_fold_fp8
from dsv4_kernels.attention.sparse_decode import SPEC, sparse_decode, whole
from dsv4_kernels.attention.sparse_parts import SPEC as PARTS_SPEC
from dsv4_kernels.attention.sparse_parts import sparse_parts
from dsv4_kernels.contract import Contract, ContractError
from dsv4_kernels.tile.corrections import corrected
from tests.compare import bits
from verify.externs.elements import as_stores
from verify.extract import extract
from verify.properties import Context
from verify.refine.tile import Reduce, read_tile

PAGE_ROWS = cache_layout.PAGE_ROWS


def entries(count, seed=1):
    return torch.randn(count, 512, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def empty_cache(pages):
    return torch.zeros(pages, cache_layout.page_bytes(PAGE_ROWS), dtype=torch.uint8)


def lists(m, width, high, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (m, width), generator=generator, dtype=torch.int32)


def counts(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_pages_have_the_sizes_that_are_published():
    assert (cache_layout.page_bytes(64), cache_layout.page_bytes(2)) == (37440, 1728)
    for rows in (1, 2, 64, 256):
        page = torch.zeros(1, cache_layout.page_bytes(rows), dtype=torch.uint8)
        assert decode_reference.rows_of(page) == rows


@pytest.mark.interpret
def test_a_row_lies_where_the_layout_says_and_nothing_else_changes():
    nope, scale, rope = reference.fp8_entry(entries(3))
    cache = torch.full_like(empty_cache(2), 7)
    assert cache_write(cache, counts(65, -1, 2), nope, scale, rope) is cache
    page, row = cache[1], 1
    assert torch.equal(page[row * 576 :][:448], nope[0].view(torch.uint8))
    assert torch.equal(page[row * 576 + 448 :][:128], rope[0].view(torch.uint8))
    assert torch.equal(page[64 * 576 + row * 8 :][:8], scale[0])
    assert int((cache != 7).sum()) <= 2 * 584
    cache[1, 576:1152], cache[1, 36872:36880], cache[0, 1152:1728], cache[0, 36880:36888] = 7, 7, 7, 7
    assert (cache == 7).all()


@pytest.mark.interpret
def test_what_is_written_is_read_back_as_attention_sees_it():
    rows = entries(70)
    cache = empty_cache(2)
    places = torch.randperm(128, generator=torch.Generator().manual_seed(5))[:70].to(torch.int32)
    cache_write(cache, places, *reference.fp8_entry(rows))
    assert torch.equal(cache_read(cache, places), reference.quantized_entry(rows))
    assert not cache_read(cache, counts(-1, 128, 2**31 - 1)).any()


@pytest.mark.interpret
def test_decode_attends_to_the_entries_that_the_lists_name():
    window, compressed = entries(128), entries(192, seed=2)
    caches = [
        decode_reference.cache_write(empty_cache(3), torch.arange(len(e)), *reference.fp8_entry(e))
        for e in (window, compressed)
    ]
    m, heads, topk = 2, 8, 128
    q = torch.randn(m, heads, 512, generator=torch.Generator().manual_seed(8)).to(torch.bfloat16)
    window_idx, entry_idx = lists(m, 128, 128), lists(m, topk, 192)
    entry_idx[0, 5], entry_idx[1, 70] = -1, 3 * PAGE_ROWS
    sink = torch.linspace(-2, 2, heads)
    got = sparse_decode(
        q, caches[0], window_idx, counts(128, 77), caches[1], entry_idx, counts(topk, 1), sink
    )
    keys = reference.quantized_entry(torch.cat((window, compressed)))
    idx = torch.cat(
        (window_idx, torch.where((entry_idx >= 0) & (entry_idx < 192), entry_idx + 128, -1)), dim=1
    )
    idx[1, 77:128], idx[1, 129:] = -1, -1
    want = reference.sparse_attention(q, idx, keys, sink)
    bounds = reference.sparse_attention_tolerance(*want, q, idx, keys, sink)
    for g, w, bound in zip(got, want, bounds, strict=True):
        assert ((g.double() - w.double()).abs() <= bound).all()


@pytest.mark.interpret
@pytest.mark.parametrize("num_heads", [16, 64])
def test_a_block_for_each_chunk_gives_the_bits_of_one_for_all(num_heads):
    dims = {"m": 3, "num_heads": num_heads, "topk": 64, "window_pages": 2, "entry_pages": 3, "ragged": 1}
    inputs = SPEC.make_inputs(dims, torch.device("cpu"), 11)
    parts = hca_fold(*sparse_parts(*inputs[:-1]), inputs[-1])
    for got, want in zip(parts, whole(*inputs), strict=True):
        assert torch.equal(bits(got), bits(want))


def trees_of_sums(spec, num_heads, **dims):
    """Return in which orders the threads of the compiled form add a head's weights."""
    variant = spec.select({"num_heads": num_heads, **dims})
    with corrected():
        extracted = extract(spec.make_kernel(**variant.kwargs))
    refinement = Context(extracted, spec.contract, variant.dims()).refinement
    assert not refinement.unsupported
    steps = read_tile(as_stores(extracted.tile)).steps
    sums = [s.number for s in steps if isinstance(s, Reduce) and s.op == "sum"]
    assert len(sums) == 1
    return refinement.orders[sums[0]]


def test_all_forms_add_the_weights_of_a_head_by_one_tree():
    """The interpreter adds in the text's order, whatever the threads do."""
    forms = (SPEC, 16), (SPEC, 64), (PARTS_SPEC, 64)
    assert len(set().union(*(trees_of_sums(*form, topk=64) for form in forms))) == 1


@pytest.mark.interpret
def test_codes_and_scales_have_the_bits_of_the_bf16_output_rotated_back_and_cast(monkeypatch):
    """Both forms; a query without keys, a head whose scale is the floor's, a position outside the table."""
    dims = {"m": 3, "num_heads": 8, "topk": 64, "window_pages": 2, "entry_pages": 3, "ragged": 1}
    inputs = list(sparse_decode_fp8.SPEC.make_inputs({**dims, "num_positions": 9}, torch.device("cpu"), 4))
    inputs[3], inputs[6], inputs[8] = counts(128, 0, 7), counts(64, 0, 0), counts(8, 3, 9)
    inputs[7][:] = torch.tensor([-torch.inf, 40, 0, 1, -1, 2, 3, 4])
    positions, table = inputs[8:]
    out, lse = whole(*inputs[:8])
    want = *output_reference.fp8_output(out, positions, table), lse
    for few in (False, True):  # of 64 heads few queries are, and those are long here
        monkeypatch.setattr(sparse_decode_fp8, "are_few", lambda q, few=few: few)
        for got, expected in zip(sparse_decode_fp8.sparse_decode_fp8(*inputs), want, strict=True):
            assert torch.equal(bits(got), bits(expected))
    assert not want[0][1].float().any()
    assert (lse[1] == torch.inf).all()
    assert not want[0][2, :, 448:].float().any()  # a position outside the table
    assert want[0][2, :, :448].float().any()
    turned = output_reference.fp8_output(out, torch.zeros_like(positions), table)[0]
    assert not torch.equal(bits(want[0][0]), bits(turned[0]))


@pytest.mark.interpret
def test_a_query_without_keys_gives_zeros_and_an_infinite_lse():
    q = torch.ones(1, 8, 512, dtype=torch.bfloat16)
    cache = make_cache(1, torch.device("cpu"), torch.Generator().manual_seed(1))
    idx = lists(1, 128, 64)
    for sink in (torch.zeros(8), torch.full((8,), -torch.inf)):
        out, lse = sparse_decode(q, cache, idx, counts(0), cache, idx - 64, counts(128), sink)
        assert not out.any()
        assert (lse == torch.inf).all()


def test_contract_names_the_clause():
    q, cache, idx = torch.ones(1, 8, 512, dtype=torch.bfloat16), empty_cache(1), lists(1, 128, 64)
    args = (counts(1), cache, lists(1, 96, 64), counts(1), torch.zeros(8))
    with pytest.raises(ContractError, match="topk % CHUNK == 0"):
        sparse_decode(q, cache, idx, *args)
    with pytest.raises(ContractError, match=r"window_cache\.shape"):
        sparse_decode(q, cache[:, :36864].contiguous(), idx, *args[:2], idx, *args[3:])


def test_contract_of_an_fp8_output_names_the_clause():
    dims = {"m": 2, "num_heads": 8, "topk": 64, "window_pages": 1, "entry_pages": 1, "ragged": 1}
    inputs = sparse_decode_fp8.SPEC.make_inputs({**dims, "num_positions": 3}, torch.device("cpu"), 1)
    *lists, sink, positions, table = inputs
    fn = sparse_decode_fp8.sparse_decode_fp8
    for name, refused in (
        (r"sparse_decode_fp8: requires .*positions\.shape", (positions[:1], table)),
        (r"cos_sin\.shape", (positions, table[:, :32].contiguous())),
        ("0 < num_positions", (positions, table[:0])),
    ):
        with pytest.raises(ContractError, match=name):
            fn(*[*lists, sink, *refused])
    parts = sparse_parts(*lists)
    with pytest.raises(ContractError, match=r"hca_fold_fp8: requires .*positions\.shape"):
        hca_fold_fp8(*parts, sink, positions[:1], table)


OF_TWO_LAUNCHES = (
    (sparse_decode, SPEC),
    (hca_decode.hca_decode, hca_groups.SPEC),
    (sparse_decode_fp8.sparse_decode_fp8, sparse_decode_fp8.SPEC),
    (hca_decode.hca_decode_fp8, hca_groups.SPEC),
)
TAKEN_BY_THE_SECOND = ("sink", "positions", "cos_sin")


@pytest.mark.parametrize(
    ("fn", "spec", "name"),
    [
        pytest.param(fn, spec, name, id=f"{fn.__name__}-{name}")
        for fn, spec in OF_TWO_LAUNCHES
        for name in TAKEN_BY_THE_SECOND
        if name in inspect.signature(fn).parameters
    ],
)
def test_what_the_second_launch_takes_is_checked_before_the_first(fn, spec, name, monkeypatch):
    dims = {
        "m": 1,
        "num_heads": 64,
        "topk": 64,
        "window_pages": 1,
        "entry_pages": 1,
        "num_pages": 1,
        "pages": 1,
    }
    names = inspect.signature(fn).parameters
    made = spec.make_inputs({**dims, "ragged": 1, "num_positions": 3}, torch.device("cpu"), 1)
    inputs = {**dict(zip(names, made, strict=False)), "sink": torch.zeros(64)}
    if "positions" in names:
        inputs |= {"positions": counts(2), "cos_sin": torch.zeros(3, 64)}
    launched = []
    monkeypatch.setattr(runtime, "launch", lambda *args: launched.append(args))
    with runtime.backend("interpret"):
        fn(**inputs)
        assert len(launched) == 2
        launched.clear()
        for wrong in (inputs[name][:0], inputs[name].double(), inputs[name][None], inputs[name].to("meta")):
            with pytest.raises(ContractError, match=rf"{fn.__name__}: requires .*{name}|num_positions"):
                fn(**{**inputs, name: wrong})
    assert not launched


def test_distinct_is_a_clause_on_data():
    contract = Contract(("0 < m", "distinct(slots)"), tensors=frozenset({"slots"}))
    contract.check("k", m=1)
    assert contract.distinct == {"slots": "distinct(slots)"}
    assert contract.names() == {"m", "slots"}
    with pytest.raises(SyntaxError):
        Contract(("distinct(slots, m)",))


@pytest.mark.gpu
@pytest.mark.parametrize(("num_heads", "topk"), [(64, 512), (128, 1024)])
def test_gpu_rows_do_not_depend_on_the_batch(num_heads, topk, gpu_record):
    """Of 150 and 50 queries each gets a block for 64 heads, of 20 (Flash) and one a block for each chunk."""
    dims = {
        "m": 150,
        "num_heads": num_heads,
        "topk": topk,
        "window_pages": 40,
        "entry_pages": 90,
        "ragged": 1,
    }
    inputs = SPEC.make_inputs(dims, torch.device("cuda"), 3)
    full = sparse_decode(*inputs)
    for first, count in ((0, 1), (7, 20), (100, 50)):
        # Copies: a slice of lengths need not start at 16 bytes, which the contract asks for.
        part = (x[first : first + count].clone() if i in (0, 2, 3, 5, 6) else x for i, x in enumerate(inputs))
        rows = zip(sparse_decode(*part), full, strict=True)
        same = all(torch.equal(bits(got), bits(want[first : first + count])) for got, want in rows)
        gpu_record(SPEC, SPEC.select(dims), f"rows of 150 in both forms m={count}", same)
        assert same


@pytest.mark.gpu
@pytest.mark.parametrize(("num_heads", "topk"), [(64, 512), (128, 1024)])
def test_gpu_codes_and_scales_do_not_depend_on_the_batch_and_are_those_of_the_bf16_output(
    num_heads, topk, gpu_record
):
    """As above; the output of either form is that of `sparse_decode`, rotated back and cast."""
    dims = {"m": 150, "num_heads": num_heads, "topk": topk, "window_pages": 40, "entry_pages": 90}
    dims |= {"ragged": 1, "num_positions": 300}
    inputs = sparse_decode_fp8.SPEC.make_inputs(dims, torch.device("cuda"), 3)
    out, lse = sparse_decode(*inputs[:8])
    full = *output_reference.fp8_output(out, *inputs[8:]), lse
    for first, count in ((0, 150), (0, 1), (7, 20), (100, 50)):
        part = (
            x[first : first + count].clone() if i in (0, 2, 3, 5, 6, 8) else x for i, x in enumerate(inputs)
        )
        rows = zip(sparse_decode_fp8.sparse_decode_fp8(*part), full, strict=True)
        same = all(torch.equal(bits(got), bits(want[first : first + count])) for got, want in rows)
        spec = sparse_decode_fp8.SPEC
        gpu_record(spec, spec.select(dims), f"rows of 150 in both forms m={count}", same)
        assert same
