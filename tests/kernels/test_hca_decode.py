"""HCA decode: agrees with attention over a list of all entries; both forms, batches and missing pages."""

import pytest
import torch

from dsv4_kernels.attention import decode_reference, hca_lists, output_reference, reference
from dsv4_kernels.attention.hca_chunks import SPEC as CHUNKS_SPEC
from dsv4_kernels.attention.hca_chunks import hca_chunks
from dsv4_kernels.attention.hca_decode import are_few, hca_decode, hca_decode_fp8
from dsv4_kernels.attention.hca_fold import hca_fold
from dsv4_kernels.attention.hca_fold_fp8 import hca_fold_fp8
from dsv4_kernels.attention.hca_groups import SPEC as GROUPS_SPEC
from dsv4_kernels.attention.hca_groups import hca_groups
from dsv4_kernels.attention.hca_join import hca_join
from dsv4_kernels.attention.hca_join_fp8 import hca_join_fp8
from dsv4_kernels.contract import ContractError
from tests.compare import bits
from tests.kernels.test_decode import trees_of_sums

PAGE_ROWS, GROUP = 64, 13
DIMS = {"m": 3, "num_heads": 8, "num_pages": 14, "pages": 20, "ragged": 1}
BY_ROW = (0, 2, 3, 4, 5)  # arguments that have a row for each query


def inputs_of(dims, device="cpu", seed=5):
    inputs = hca_lists.make_inputs(dims, torch.device(device), seed)
    generator = torch.Generator(device).manual_seed(seed)
    return [*inputs, torch.randn(dims["num_heads"], generator=generator, device=device)]


def in_both_forms(inputs, angles=()):
    """Return what `hca_decode` does with few queries, and with many; with `angles`, `hca_decode_fp8`."""
    *lists, sink = inputs
    join, fold = (hca_join_fp8, hca_fold_fp8) if angles else (hca_join, hca_fold)
    return join(*hca_chunks(*lists), sink, *angles), fold(*hca_groups(*lists), sink, *angles)


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(bits(a), bits(b))


def test_it_is_attention_over_the_list_of_all_entries():
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


def agrees(lists, got):
    """Compare with attention over the list of all entries, within its bound."""
    q, cache, window_idx, window_length, table, entry_length, sink = lists
    place = torch.arange(table.shape[1] * PAGE_ROWS)
    page = table[:, place // PAGE_ROWS]
    idx = torch.where(page >= 0, page * PAGE_ROWS + place % PAGE_ROWS, -1).to(torch.int32)
    named = (q, cache, window_idx, window_length, cache, idx, entry_length, sink)
    want = decode_reference.sparse_decode(*named)
    for g, w, bound in zip(got, want, decode_reference.sparse_decode_tolerance(*want, *named), strict=True):
        assert torch.equal(g.isinf(), w.isinf())
        assert ((g.double() - w.double()).abs()[~g.isinf()] <= bound[~g.isinf()]).all()


@pytest.mark.interpret
@pytest.mark.parametrize("num_pages", [1, 14])
def test_both_forms_have_the_same_bits(num_pages):
    """A group that ends early, alone and behind a full one; lengths around chunks; FP8 output, too."""
    inputs = inputs_of({**DIMS, "num_pages": num_pages})
    inputs[3] = torch.tensor((0, 128, 65), dtype=torch.int32)
    inputs[5] = torch.tensor((0, num_pages * PAGE_ROWS, num_pages * PAGE_ROWS - 63), dtype=torch.int32)
    few, many = in_both_forms(inputs)
    assert_same(few, many)
    agrees(inputs, few)
    assert not few[0][0].any()
    assert few[1][0].eq(torch.inf).all()
    positions = torch.tensor([4, 5, 9], dtype=torch.int32)
    angles = positions, reference.rope_table(9, 160000.0, True)
    want = *output_reference.fp8_output(few[0], *angles), few[1]
    for got in in_both_forms(inputs, angles):
        assert_same(got, want)
    assert not want[0][2, :, 448:].float().any()  # a position outside the table
    turned = output_reference.fp8_output(few[0], positions - 4, angles[1])[0]
    assert not torch.equal(bits(want[0][1]), bits(turned[1]))


def test_all_forms_add_the_weights_of_a_head_by_one_tree():
    """Of which the interpreter knows nothing: it adds in the text's order, whatever the threads do."""
    dims = {"m": 1, "num_pages": 12, "pages": 1}
    forms = (CHUNKS_SPEC, 16), (CHUNKS_SPEC, 64), (GROUPS_SPEC, 16), (GROUPS_SPEC, 64)
    trees = [trees_of_sums(spec, heads, **dims) for spec, heads in forms]
    assert len(set().union(*trees)) == 1


def test_a_wider_table_changes_nothing():
    inputs = inputs_of(DIMS)
    inputs[5] = inputs[5].clamp(max=DIMS["num_pages"] * PAGE_ROWS)
    wider = [*inputs]
    for more in (1, GROUP):
        wider[4] = torch.nn.functional.pad(inputs[4], (0, more), value=7)
        assert_same(hca_decode(*wider), hca_decode(*inputs))


def test_few_are_as_many_chunks_as_a_few_rounds_of_the_multiprocessors():
    def few(m, num_heads, num_pages):
        return are_few(torch.empty(m, num_heads, 512), torch.empty(m, num_pages))

    assert few(4, 64, 128)
    assert not few(5, 64, 128)
    assert few(2, 128, 128)
    assert not few(3, 128, 128)
    assert few(8, 8, 64)
    assert not few(1, 64, 256)  # more groups than a block of the fold takes
    assert not are_few(torch.empty(1, 64), torch.empty(1, 1))


def test_nothing_to_attend_gives_zeros():
    q, cache, window_idx, _, table, entry_length, sink = inputs_of(DIMS)
    nothing = torch.zeros_like(entry_length)
    out, lse = hca_decode(q, cache, window_idx, nothing, table, nothing, sink)
    assert not out.float().any()
    assert (lse == torch.inf).all()


@pytest.mark.interpret
def test_codes_and_scales_of_the_fold_have_the_bits_of_its_bf16_output_rotated_back_and_cast():
    """Eleven parts; a query without keys, a position outside the table."""
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
        hca_fold_fp8(*hca_groups(*inputs[:-1]), inputs[-1], positions[:1], table)
    with pytest.raises(ContractError, match=r"hca_join_fp8: .*positions\.shape"):
        hca_join_fp8(*hca_chunks(*inputs[:-1]), inputs[-1], positions[:1], table)


def test_contract_names_the_clause():
    q, cache, window_idx, window_length, table, entry_length, sink = inputs_of(DIMS)
    with pytest.raises(ContractError, match=r"page_table\.shape"):
        hca_decode(q, cache, window_idx, window_length, table[:2].clone(), entry_length, sink)
    with pytest.raises(ContractError, match="0 < num_pages"):
        hca_decode(q, cache, window_idx, window_length, table[:, :0].clone(), entry_length, sink)
    with pytest.raises(ContractError, match="num_heads % HEADS == 0"):
        hca_decode(q[:, :3].clone(), cache, window_idx, window_length, table, entry_length, sink)
    sums = torch.zeros(1, 209, 8, 512), torch.zeros(1, 209, 8), torch.zeros(1, 209, 8)
    with pytest.raises(ContractError, match="num_chunks <= MOST_CHUNKS"):
        hca_join(*sums, torch.zeros(8))


GPU_DIMS = {"m": 70, "num_pages": 40, "pages": 300, "ragged": 1}


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads", [64, 128])
@pytest.mark.parametrize("num_pages", [40, 128])
def test_gpu_rows_do_not_depend_on_the_batch(num_heads, num_pages, gpu_record):
    """Both forms, of 70 queries and of some; a wider table of the shorter one."""
    dims = {**GPU_DIMS, "num_heads": num_heads, "num_pages": num_pages}
    inputs = inputs_of(dims, "cuda")
    few, full = in_both_forms(inputs)
    same = all(torch.equal(bits(a), bits(b)) for a, b in zip(few, full, strict=True))
    for first, count in ((0, 1), (7, 20), (69, 1)):
        part = [x[first : first + count].clone() if i in BY_ROW else x for i, x in enumerate(inputs)]
        part[5] = part[5].clamp(max=num_pages * PAGE_ROWS)
        rows = [x[first : first + count] for x in full]
        for got in (*in_both_forms(part), hca_decode(*part)):
            same &= all(torch.equal(bits(a), bits(b)) for a, b in zip(got, rows, strict=True))
        if num_pages != hca_lists.MILLION:
            part[4] = torch.nn.functional.pad(part[4], (0, 8), value=3)
            same &= all(torch.equal(bits(a), bits(b)) for a, b in zip(hca_decode(*part), rows, strict=True))
    if num_pages == hca_lists.MILLION:
        for spec in (CHUNKS_SPEC, GROUPS_SPEC):
            gpu_record(spec, spec.select(dims), "rows of 70 in both forms", same)
    assert same


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads", [64, 128])
def test_gpu_codes_and_scales_are_those_of_the_bf16_output(num_heads):
    inputs = inputs_of({**GPU_DIMS, "num_heads": num_heads, "num_pages": 128}, "cuda")
    positions = torch.arange(70, dtype=torch.int32, device="cuda")  # the last outside the table
    angles = positions, reference.rope_table(69, 160000.0, True, torch.device("cuda"))
    out, lse = hca_decode(*inputs)
    want = *output_reference.fp8_output(out, *angles), lse
    for got in (*in_both_forms(inputs, angles), hca_decode_fp8(*inputs, *angles)):
        assert_same(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 9])
def test_gpu_one_function_in_a_graph_and_compiled(m):
    """Either form: captured as a CUDA graph and replayed on other data, and traced by torch.compile."""
    dims = {**GPU_DIMS, "m": m, "num_heads": 64, "num_pages": 128, "pages": 300}
    first, second = inputs_of(dims, "cuda"), inputs_of(dims, "cuda", 6)
    assert are_few(first[0], first[4]) == (m == 1)
    want = hca_decode(*second)
    assert_same(torch.compile(hca_decode)(*second), want)
    held = [x.clone() for x in first]
    hca_decode(*held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = hca_decode(*held)
    for mine, other in zip(held, second, strict=True):
        mine.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(got, want)
