"""The indexer's scores over pages: missing pages, lengths, other batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_kernels import runtime
from dsv4_kernels.attention import index_logits_dense as dense
from dsv4_kernels.attention import index_logits_fp4 as fp4
from dsv4_kernels.attention import index_reference, reference
from dsv4_kernels.attention.hadamard_quant import hadamard_fp4
from dsv4_kernels.attention.index_cache import FP4, index_cache_write, page_bytes
from dsv4_kernels.attention.index_logits import PAGE_ROWS, PART_PAGES, SPEC, index_logits_paged
from dsv4_kernels.contract import ContractError
from tests.compare import bits, call, mismatch

DIMS = {"m": 3, "num_heads": 8, "num_parts": 1, "num_pages": 20, "ragged": 1}


@pytest.mark.interpret
def test_interpreter_matches_reference_on_ragged_queries():
    case = next(c for c in SPEC.cases if c.id == "ragged")
    inputs = SPEC.make_inputs(case.dims, torch.device("cpu"), 1)
    assert mismatch(SPEC, inputs, call(SPEC, inputs)) is None


def test_scores_are_those_of_the_formula():
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(128, 128, generator=generator).to(torch.float8_e4m3fn)
    q = torch.randn(1, 16, 128, generator=generator).to(torch.float8_e4m3fn)
    scale, weights = torch.rand(128, generator=generator), torch.randn(1, 16, generator=generator)
    table = torch.full((1, PART_PAGES), -1, dtype=torch.int32)
    table[0, 0], table[0, 2] = 1, 0
    lengths = torch.tensor([190], dtype=torch.int32)
    cache = index_reference.cache_write(keys, scale)
    got = index_logits_paged(q, weights, cache, table, lengths)[0]
    want = (weights[0] @ (q[0].float() @ (keys.float() * scale[:, None]).T).relu()).view(2, PAGE_ROWS)
    assert torch.allclose(got[:64], want[1], atol=1e-4)
    assert not got[64:128].any()
    assert torch.allclose(got[128:190], want[0, :62], atol=1e-4)
    assert (got[190:] == -torch.inf).all()


def test_contract_names_the_clause():
    q, weights, cache, table, lengths = SPEC.make_inputs(DIMS, torch.device("cpu"), 1)
    with pytest.raises(ContractError, match=r"page_table\.shape"):
        index_logits_paged(q, weights, cache, table.repeat(1, 2)[:, :17].clone(), lengths)
    with pytest.raises(ContractError, match="num_heads in"):
        index_logits_paged(q[:, :3].clone(), weights[:, :3].clone(), cache, table, lengths)


@pytest.mark.interpret
def test_fp4_keys_as_they_are_written_score_as_their_values():
    """Keys through the writer; queries of two tokens; of one key all but one scale are too small to count."""
    generator = torch.Generator().manual_seed(4)
    table = reference.rope_table(70, 160000.0, True)
    keys = torch.randn(70, 1, 128, generator=generator).to(torch.bfloat16)
    q = torch.randn(2, 8, 128, generator=generator).to(torch.bfloat16)
    codes, scale = hadamard_fp4(keys, torch.arange(70, dtype=torch.int32), table)
    scale.view(torch.uint8)[9, 0] = torch.tensor((120, 108, 109, 1), dtype=torch.uint8)
    pages = torch.full((3, page_bytes(FP4)), 255, dtype=torch.uint8)
    slots = torch.arange(70, dtype=torch.int32) + 64
    index_cache_write(pages, slots, codes[:, 0].contiguous(), scale[:, 0].contiguous())
    pages_of = torch.full((1, fp4.PART_PAGES), -1, dtype=torch.int32)
    pages_of[0, :2] = torch.tensor((1, 2))
    q_codes, q_scale = hadamard_fp4(q, torch.tensor((3, 4), dtype=torch.int32), table)
    weights, lengths = torch.randn(2, 8, generator=generator), torch.tensor((64, 70), dtype=torch.int32)
    got = fp4.index_logits_fp4(q_codes, q_scale, weights, pages, pages_of, lengths)

    wide = reference.quantized_fp4(reference.hadamard(reference.rope(keys, table)))[:, 0].double()
    e2m1 = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), dtype=torch.float64)
    code = torch.stack((codes[9, 0] & 15, codes[9, 0] >> 4), dim=-1).flatten().long()
    value = torch.where(code < 8, 1.0, -1.0) * e2m1[code & 7]
    kept = torch.tensor((2.0**-7, 0.0, 2.0**-18, 0.0), dtype=torch.float64)  # 12 binades below: zeros
    wide[9] = value * kept.repeat_interleave(32)
    heads = reference.quantized_fp4(reference.hadamard(reference.rope(q, table[3:5]))).double()
    want = torch.einsum("mh,mhk->mk", weights.double(), (heads @ wide.T).relu())
    spread = torch.einsum("mh,mhk->mk", weights.double().abs(), heads.abs() @ wide.abs().T)
    assert ((got[:, :64] - want[:, :64]).abs() <= 2.0**-5 * spread[:, :64]).all()
    assert ((got[1, 64:70] - want[1, 64:]).abs() <= 2.0**-5 * spread[1, 64:]).all()
    assert (got[0, 64:] == -torch.inf).all()
    assert (got[1, 70:] == -torch.inf).all()


@pytest.mark.interpret
@pytest.mark.parametrize("next_n", fp4.NEXT_N[1:])
def test_tokens_that_share_a_read_have_the_scores_that_they_have_alone(next_n):
    dims = {**DIMS, "m": 2, "next_n": next_n}
    q, q_scale, weights, cache, table, lengths = fp4.SPEC.make_inputs(dims, torch.device("cpu"), 1)
    inputs = (q, q_scale, weights, cache, table, lengths)
    full = fp4.index_logits_fp4(*inputs)
    assert mismatch(fp4.SPEC, inputs, full) is None
    token = slice(next_n - 1, None, next_n)
    scales = q_scale.view(torch.uint8)[token].clone().view(q_scale.dtype)
    alone = fp4.index_logits_fp4(
        q[token].clone(), scales, weights[token].clone(), cache, table, lengths[token].clone()
    )
    assert torch.equal(bits(alone), bits(full[token]))


def test_fp4_contract_names_the_clause():
    dims = {**DIMS, "next_n": 2}
    q, q_scale, weights, cache, table, lengths = fp4.SPEC.make_inputs(dims, torch.device("cpu"), 1)
    with pytest.raises(ContractError, match=r"page_table\.shape\[0\] in"):
        fp4.index_logits_fp4(q[:5].clone(), q_scale, weights, cache, table, lengths)
    with pytest.raises(ContractError, match=r"cache\.shape"):
        fp4.index_logits_fp4(q, q_scale, weights, cache[:, :4224].contiguous(), table, lengths)


def test_scores_of_contiguous_keys_are_those_of_the_same_keys_in_pages():
    q, weights, keys, scale, lengths = dense.SPEC.make_inputs(
        {"m": 5, "num_tiles": 4, "num_heads": 8, "ragged": 1}, torch.device("cpu"), 3
    )
    got = dense.index_logits(q, weights, keys, scale, lengths)
    table = torch.arange(PART_PAGES, dtype=torch.int32).repeat(5, 1)
    paged = index_logits_paged(q, weights, index_reference.cache_write(keys, scale), table, lengths)
    assert torch.equal(bits(got), bits(paged))
    assert (lengths < 1024).any()


@pytest.mark.interpret
@pytest.mark.parametrize("m", [1, 2, 4, 5, 6, 7, 8])
def test_any_number_of_queries_goes_in_groups(m):
    """Scores are the reference's, and those that the queries have among all, of every remainder by four."""
    dims = {"m": 8, "num_tiles": 2, "num_heads": 8, "ragged": 1}
    q, weights, keys, scale, lengths = dense.SPEC.make_inputs(dims, torch.device("cpu"), 6)
    full = dense.index_logits(q, weights, keys, scale, lengths)
    assert mismatch(dense.SPEC, (q, weights, keys, scale, lengths), full) is None
    own = slice(8 - m, 8)
    rows = q.view(torch.uint8)[own].clone().view(q.dtype), weights[own].clone()
    got = dense.index_logits(*rows, keys, scale, lengths[own].clone())
    assert got.shape == (m, 512)
    assert got.is_contiguous()
    assert torch.equal(bits(got), bits(full[own]))


def launched(inputs, num_heads, config):
    """Return the scores of a Config that the dispatcher need not choose, of all groups; poisoned before."""
    q, weights, keys, scale, lengths = inputs
    groups, n = -(-len(q) // dense.QUERIES), len(keys)
    by_group = [dense.grouped(t, groups) for t in (q, weights, lengths)]
    out = torch.full((groups, dense.QUERIES, n), torch.nan, device=q.device)
    kwargs = {"num_heads": num_heads, "num_tiles": n // dense.TILE, "config": config}
    runtime.launch(dense.make_kernel, kwargs, (*by_group[:2], keys, scale, by_group[2], out))
    return out.flatten(0, 1)


@pytest.mark.interpret
@settings(max_examples=12)
@given(
    m=st.integers(1, 6),
    num_tiles=st.integers(1, 5),
    parts=st.integers(1, 12),
    warpgroups=st.integers(1, 2),
    seed=st.integers(0, 2**31 - 1),
)
def test_scores_do_not_depend_on_the_parts_of_the_keys(m, num_tiles, parts, warpgroups, seed):
    """Parts of unequal numbers of tiles, and more parts than there are tiles, included."""
    dims = {"m": m, "num_tiles": num_tiles, "num_heads": 8, "ragged": 1}
    inputs = dense.SPEC.make_inputs(dims, torch.device("cpu"), seed)
    inputs[4][0] = seed % 2 * 256 * num_tiles
    full = dense.index_logits(*inputs)
    assert mismatch(dense.SPEC, inputs, full) is None
    got = launched(inputs, 8, dense.Config(warpgroups=warpgroups, parts=parts))
    assert torch.equal(bits(got[:m]), bits(full))
    assert (got[m:] == -torch.inf).all()


@pytest.mark.parametrize(
    ("m", "n", "parts"),
    [
        (1, 65536, 128),
        (5, 65536, 64),
        (1, 16384, 64),  # two tiles each, no fewer
        (1, 4096, 16),
        (1, 512, 2),
        (1, 256, 1),
        (64, 65536, 8),
        (68, 65536, 6),
        (92, 65536, 4),
        (132, 65536, 4),
        (133, 65536, 3),
        (177, 65536, 2),
        (264, 65536, 2),
        (265, 65536, 3),  # two rounds of thirds
        (352, 65536, 3),
        (353, 65536, 1),
        (528, 65536, 1),
        (529, 65536, 3),  # four rounds of thirds
        (704, 65536, 3),
        (705, 65536, 2),  # three rounds of halves
        (792, 65536, 2),
        (793, 65536, 1),
        (1056, 65536, 1),
        (1057, 65536, 2),  # five rounds of halves
        (1320, 65536, 2),
        (1321, 65536, 1),
        (4096, 4096, 1),
    ],
)
def test_few_queries_have_as_many_parts_of_the_keys_as_there_are_multiprocessors_for(m, n, parts):
    chosen = [
        dense.SPEC.select({"num_heads": 64, "num_tiles": n // dense.TILE, **rows})
        for rows in ({"m": m}, {"groups": -(-m // dense.QUERIES)})
    ]
    assert chosen[0] is chosen[1]
    assert chosen[0].kwargs["config"].parts == parts


@pytest.mark.interpret
def test_what_is_no_number_is_none_in_its_own_scores_alone():
    """A nan in a query, key, weight or scale, and an infinite weight: in no other score, and not beyond."""
    dims = {"m": 6, "num_tiles": 1, "num_heads": 8, "ragged": 0}
    q, weights, keys, scale, _ = dense.SPEC.make_inputs(dims, torch.device("cpu"), 7)
    lengths = torch.tensor((256, 256, 256, 256, 130, 0), dtype=torch.int32)
    plain = dense.index_logits(q, weights, keys, scale, lengths)
    q.view(torch.uint8)[1, 3, 5] = 0x7F
    q.view(torch.uint8)[5, 0, 0] = 0x7F
    keys.view(torch.uint8)[129, 7] = 0xFF
    weights[2, 0], weights[3, 1] = torch.nan, torch.inf
    scale[131] = torch.nan
    got = dense.index_logits(q, weights, keys, scale, lengths)
    is_seen = torch.arange(256) < lengths[:, None]
    is_touched = torch.zeros(6, 256, dtype=torch.bool)
    is_touched[1:4], is_touched[:, (129, 131)] = True, True
    assert torch.equal(bits(got)[~is_touched], bits(plain)[~is_touched])
    assert (got[~is_seen] == -torch.inf).all()
    assert got[1:3].isnan().all()
    assert got[:, (129, 131)][is_seen[:, (129, 131)]].isnan().all()
    assert (got[3].isnan() | (got[3] == torch.inf))[scale > 0].all()
    expected = index_reference.index_logits(q, weights, keys, scale, lengths)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())


def test_dense_contract_names_the_clause():
    dims = {"m": 3, "num_tiles": 1, "num_heads": 8, "ragged": 1}
    q, weights, keys, scale, lengths = dense.SPEC.make_inputs(dims, torch.device("cpu"), 1)
    with pytest.raises(ContractError, match=r"scale\.shape"):
        dense.index_logits(q, weights, keys, scale[:16].clone(), lengths)
    with pytest.raises(ContractError, match="0 < num_tiles"):
        dense.index_logits(q, weights, keys[:0], scale[:0], lengths)
    with pytest.raises(ContractError, match="0 < num_tiles"):
        dense.index_logits(q, weights, keys[:200], scale, lengths)
    with pytest.raises(ContractError, match="num_heads in"):
        dense.index_logits(q[:, :3].clone(), weights[:, :3].clone(), keys, scale, lengths)


@pytest.mark.gpu
def test_gpu_dense_rows_do_not_depend_on_the_batch():
    dims = {"m": 70, "num_tiles": 10, "num_heads": 64, "ragged": 1}
    q, weights, keys, scale, lengths = dense.SPEC.make_inputs(dims, torch.device("cuda"), 3)
    full = dense.index_logits(q, weights, keys, scale, lengths)
    for first, count in ((0, 1), (7, 20), (69, 1)):
        own = slice(first, first + count)
        rows = q.view(torch.uint8)[own].clone().view(q.dtype), weights[own].clone()
        got = dense.index_logits(*rows, keys, scale, lengths[own].clone())
        assert torch.equal(bits(got), bits(full[own]))
    shorter = slice(0, 1536)
    some = keys.view(torch.uint8)[shorter].clone().view(keys.dtype), scale[shorter].clone()
    got = dense.index_logits(q, weights, *some, lengths)
    assert torch.equal(bits(got), bits(full[:, shorter]))
    # Tiles of another size, more on their way, all keys in one part.
    other = launched((q, weights, keys, scale, lengths), 64, dense.Config(warpgroups=1, num_stages=6))
    assert torch.equal(bits(other[:70]), bits(full))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", dense.SPEC.variants, ids=lambda v: v.id)
def test_gpu_every_number_of_parts_is_the_reference_and_gives_the_bits_of_one(variant, gpu_record):
    """Each variant that ships, on queries that the dispatcher might give another one."""
    dims = {"m": 23, "num_tiles": variant.kwargs["num_tiles"], "num_heads": 64, "ragged": 1}
    inputs = dense.SPEC.make_inputs(dims, torch.device("cuda"), 5)
    got, one = (launched(inputs, 64, config)[:23] for config in (variant.kwargs["config"], dense.Config()))
    wrong, same = mismatch(dense.SPEC, inputs, got), torch.equal(bits(got), bits(one))
    gpu_record(dense.SPEC, variant, "reference m23-ragged", wrong is None)
    gpu_record(dense.SPEC, variant, "rows of m23-ragged in one part", same)
    assert wrong is None
    assert same


@pytest.mark.gpu
@pytest.mark.parametrize("next_n", fp4.NEXT_N[1:])
def test_gpu_fp4_rows_depend_neither_on_the_batch_nor_on_other_tokens(next_n, gpu_record):
    dims = {**DIMS, "m": 35, "next_n": next_n, "num_heads": 64, "num_parts": 64, "num_pages": 900}
    variant = fp4.SPEC.select(dims)
    inputs = fp4.SPEC.make_inputs(dims, torch.device("cuda"), 3)
    q, q_scale, weights, cache, table, lengths = inputs
    full = fp4.index_logits_fp4(q, q_scale, weights, cache, table, lengths)

    def rows(tensor, step):
        raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
        return raw[step].clone().view(tensor.dtype)

    for first, count in ((0, 1), (7, 20), (34, 1)):
        own = slice(next_n * first, next_n * (first + count))
        own_q, own_scale, own_weights = (rows(t, own) for t in (q, q_scale, weights))
        requests = table[first : first + count].clone()
        got = fp4.index_logits_fp4(own_q, own_scale, own_weights, cache, requests, lengths[own].clone())
        same = torch.equal(bits(got), bits(full[own]))
        gpu_record(fp4.SPEC, variant, f"rows of requests {first} to {first + count}", same)
        assert same
    for token in range(next_n):
        own = slice(token, None, next_n)
        own_q, own_scale, own_weights = (rows(t, own) for t in (q, q_scale, weights))
        got = fp4.index_logits_fp4(own_q, own_scale, own_weights, cache, table, lengths[own].clone())
        same = torch.equal(bits(got), bits(full[own]))
        gpu_record(fp4.SPEC, variant, f"token {token} alone", same)
        assert same


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in SPEC.cases if "gpu" in c.tags], ids=lambda c: c.id)
def test_gpu_matches_reference(case):
    inputs = SPEC.make_inputs(case.dims, torch.device("cuda"), 1)
    assert mismatch(SPEC, inputs, SPEC.fn(*inputs)) is None


@pytest.mark.gpu
def test_gpu_rows_do_not_depend_on_the_batch():
    dims = {**DIMS, "m": 70, "num_heads": 64, "num_parts": 3, "num_pages": 900}
    inputs = SPEC.make_inputs(dims, torch.device("cuda"), 3)
    full = index_logits_paged(*inputs)
    for first, count in ((0, 1), (7, 20), (69, 1)):
        part = [x if i == 2 else x[first : first + count].clone() for i, x in enumerate(inputs)]
        assert torch.equal(bits(index_logits_paged(*part)), bits(full[first : first + count]))
