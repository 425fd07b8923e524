"""HCA decode: agrees with attention over a list of all entries; parts, batches and missing pages."""

import pytest
import torch

from dsv4_kernels.attention import decode_reference, output_reference, reference
from dsv4_kernels.attention.hca_decode import PARTS_SPEC, hca_decode, hca_decode_fp8, hca_parts
from dsv4_kernels.attention.hca_fold import hca_fold
from dsv4_kernels.attention.hca_fold_fp8 import hca_fold_fp8
from dsv4_kernels.contract import ContractError
from tests.compare import bits

PAGE_ROWS, PART_PAGES = 64, 8
DIMS = {"m": 3, "num_heads": 8, "num_parts": 2, "pages": 20, "ragged": 1}


def inputs_of(dims, device="cpu", seed=5):
    inputs = PARTS_SPEC.make_inputs(dims, torch.device(device), seed)
    generator = torch.Generator(device).manual_seed(seed)
    return [*inputs, torch.randn(dims["num_heads"], generator=generator, device=device)]


def test_parts_are_attention_over_the_list_of_all_entries():
    q, cache, window_idx, window_length, table, entry_length, sink = inputs_of(DIMS)
    got = hca_decode(q, cache, window_idx, window_length, table, entry_length, sink)
    place = torch.arange(table.shape[1] * PAGE_ROWS)
    page = table[:, place // PAGE_ROWS]
    idx = torch.where(page >= 0, page * PAGE_ROWS + place % PAGE_ROWS, -1).to(torch.int32)
    lists = (cache, window_idx, window_length, cache, idx, entry_length, sink)
    want = decode_reference.sparse_decode(q, *lists)
    # Both are float64; parts are rounded to fp32 in between, and both outputs to bf16.
    assert ((got[0].double() - want[0].double()).abs() <= 2.0**-7 * want[0].double().abs() + 2.0**-20).all()
    assert torch.allclose(got[1], want[1], atol=2.0**-18, rtol=2.0**-20)


def test_more_pages_than_a_query_has_change_nothing():
    q, cache, window_idx, window_length, table, entry_length, sink = inputs_of(DIMS)
    wider = torch.nn.functional.pad(table, (0, PART_PAGES), value=7)
    short = entry_length.clamp(max=table.shape[1] * PAGE_ROWS)
    args = (q, cache, window_idx, window_length)
    for a, b in zip(
        hca_decode(*args, table, short, sink), hca_decode(*args, wider, short, sink), strict=True
    ):
        assert torch.equal(bits(a), bits(b))


def test_nothing_to_attend_gives_zeros():
    q, cache, window_idx, _, table, entry_length, sink = inputs_of(DIMS)
    nothing = torch.zeros_like(entry_length)
    out, lse = hca_decode(q, cache, window_idx, nothing, table, nothing, sink)
    assert not out.float().any()
    assert (lse == torch.inf).all()


@pytest.mark.interpret
def test_codes_and_scales_of_the_fold_have_the_bits_of_its_bf16_output_rotated_back_and_cast():
    """Parts of the window and of 1024 entries; a query without keys, a position outside the table."""
    m, parts, heads, num_positions = 4, 11, 8, 9
    generator = torch.Generator().manual_seed(2)
    acc = torch.randn(m, parts, heads, 512, generator=generator)
    top = 4 * torch.randn(m, parts, heads, generator=generator)
    total = 1 + 63 * torch.rand(m, parts, heads, generator=generator)
    acc[1], top[1], total[1] = 0, -1e30, 0
    acc[2, :, 0] *= 1e-8  # its scale is the floor's
    acc[0, 3], top[0, 3], total[0, 3] = 0, -1e30, 0
    sink = torch.linspace(-2, 2, heads)
    positions = torch.tensor([num_positions - 1, 2, 3, num_positions], dtype=torch.int32)
    table = reference.rope_table(num_positions, 160000.0, True)
    out, lse = hca_fold(acc, top, total, sink)
    codes, scale, same = hca_fold_fp8(acc, top, total, sink, positions, table)
    for got, want in zip((codes, scale), output_reference.fp8_output(out, positions, table), strict=True):
        assert torch.equal(bits(got), bits(want))
    assert torch.equal(bits(same), bits(lse))
    assert not codes[1].float().any()
    assert (lse[1] == torch.inf).all()
    assert not codes[3, :, 448:].float().any()


def test_fp8_output_is_that_of_the_bf16_output():
    inputs = inputs_of(DIMS)
    positions, table = torch.tensor([0, 5, 6], dtype=torch.int32), reference.rope_table(7, 160000.0, True)
    codes, scale, lse = hca_decode_fp8(*[*inputs, positions, table])
    out, want_lse = hca_decode(*inputs)
    for got, want in zip((codes, scale), output_reference.fp8_output(out, positions, table), strict=True):
        assert torch.equal(bits(got), bits(want))
    assert torch.equal(bits(lse), bits(want_lse))
    with pytest.raises(ContractError, match=r"positions\.shape"):
        hca_fold_fp8(*hca_parts(*inputs[:-1]), inputs[-1], positions[:1], table)


def test_contract_names_the_clause():
    q, cache, window_idx, window_length, table, entry_length, sink = inputs_of(DIMS)
    with pytest.raises(ContractError, match=r"page_table\.shape"):
        hca_decode(q, cache, window_idx, window_length, table[:, :9].clone(), entry_length, sink)
    with pytest.raises(ContractError, match="num_heads % HEADS == 0"):
        hca_decode(q[:, :3].clone(), cache, window_idx, window_length, table, entry_length, sink)


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads", [64, 128])
def test_gpu_rows_do_not_depend_on_the_batch(num_heads):
    dims = {**DIMS, "m": 70, "num_heads": num_heads, "num_parts": 5, "pages": 300}
    inputs = inputs_of(dims, "cuda")
    full = hca_decode(*inputs)
    for first, count in ((0, 1), (7, 20), (69, 1)):
        part = [x[first : first + count].clone() if i in (0, 2, 3, 4, 5) else x for i, x in enumerate(inputs)]
        part[4] = torch.nn.functional.pad(part[4], (0, PART_PAGES), value=3)
        longest = torch.full_like(part[5], dims["num_parts"] * PART_PAGES * PAGE_ROWS)
        part[5] = torch.minimum(part[5], longest)
        for got, want in zip(hca_decode(*part), full, strict=True):
            assert torch.equal(bits(got), bits(want[first : first + count]))


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads", [64, 128])
def test_gpu_codes_and_scales_are_those_of_the_bf16_output(num_heads):
    dims = {**DIMS, "m": 70, "num_heads": num_heads, "num_parts": 5, "pages": 300}
    inputs = inputs_of(dims, "cuda")
    positions = torch.arange(70, dtype=torch.int32, device="cuda")  # the last outside the table
    table = reference.rope_table(69, 160000.0, True, torch.device("cuda"))
    out, lse = hca_decode(*inputs)
    want = *output_reference.fp8_output(out, positions, table), lse
    for got, expected in zip(hca_decode_fp8(*[*inputs, positions, table]), want, strict=True):
        assert torch.equal(bits(got), bits(expected))
