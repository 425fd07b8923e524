"""The indexer's scores over contiguous FP4 keys: the bits that pages give, parts, groups, nan and inf."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_kernels import runtime
from dsv4_kernels.attention import index_logits_fp4 as paged
from dsv4_kernels.attention import index_logits_fp4_dense as dense
from dsv4_kernels.attention import index_reference, reference
from dsv4_kernels.attention.hadamard_quant import hadamard_fp4
from dsv4_kernels.attention.index_logits_dense import LADDER, SHIPPED
from dsv4_kernels.contract import ContractError
from tests.compare import bits, mismatch

CPU = torch.device("cpu")
DIMS = {"m": 3, "num_tiles": 2, "num_heads": 8, "ragged": 1}


def in_pages(inputs, next_n):
    """Return arguments of `index_logits_fp4`: the same keys in pages in reverse order, one table for all."""
    q, q_scale, weights, keys, scale, lengths = inputs
    num_pages = len(keys) // paged.PAGE_ROWS
    codes = keys.view(num_pages, -1).flip(0)
    cache = torch.cat((codes, scale.view(torch.uint8).view(num_pages, -1).flip(0)), dim=1).contiguous()
    width = -(-num_pages // paged.PART_PAGES) * paged.PART_PAGES
    table = torch.full((len(q) // next_n, width), -1, dtype=torch.int32, device=q.device)
    table[:, :num_pages] = torch.arange(num_pages - 1, -1, -1, dtype=torch.int32, device=q.device)
    return q, q_scale, weights, cache, table, lengths


def rows(inputs, own):
    """Return the inputs of some of the queries."""
    q, q_scale, weights, keys, scale, lengths = inputs
    some = q_scale.view(torch.uint8)[own].clone().view(q_scale.dtype)
    return q[own].clone(), some, weights[own].clone(), keys, scale, lengths[own].clone()


def launched(inputs, num_heads, config):
    """Return the scores of a Config that the dispatcher need not choose, of all groups; poisoned before."""
    q, q_scale, weights, keys, scale, lengths = inputs
    groups, n = -(-len(q) // dense.QUERIES), len(keys)
    words = q.view(torch.int32), q_scale.view(torch.int32).squeeze(-1), weights, lengths
    by_group = [dense.grouped(t, groups, dense.QUERIES) for t in words]
    out = torch.full((groups, dense.QUERIES, n), torch.nan, device=q.device)
    kwargs = {"num_heads": num_heads, "num_tiles": n // dense.TILE, "config": config}
    shared = keys.view(torch.uint32), scale.view(torch.uint32).view(-1, dense.WORDS)
    args = (by_group[0].view(torch.uint32), *by_group[1:3], *shared, by_group[3], out)
    runtime.launch(dense.make_kernel, kwargs, args)
    return out.flatten(0, 1)


@pytest.mark.interpret
@settings(max_examples=10)
@given(
    requests=st.integers(1, 3),
    next_n=st.integers(1, 4),
    num_tiles=st.integers(1, 3),
    seed=st.integers(0, 2**31 - 1),
)
def test_scores_are_those_of_the_same_keys_in_pages(requests, next_n, num_tiles, seed):
    """Bit for bit, whatever the number of tokens that share a read of the pages; and the reference's."""
    inputs = dense.SPEC.make_inputs({**DIMS, "m": requests * next_n, "num_tiles": num_tiles}, CPU, seed)
    got = dense.index_logits_fp4_dense(*inputs)
    assert mismatch(dense.SPEC, inputs, got) is None
    pages = paged.index_logits_fp4(*in_pages(inputs, next_n))
    assert torch.equal(bits(got), bits(pages[:, : got.shape[1]]))
    assert (pages[:, got.shape[1] :][inputs[5] <= got.shape[1]] == -torch.inf).all()


@pytest.mark.interpret
def test_keys_as_they_are_quantised_score_as_their_values():
    """Queries and keys through `hadamard_fp4`; of one key all but one scale are too small to count."""
    generator = torch.Generator().manual_seed(4)
    table = reference.rope_table(256, 160000.0, True)
    keys = torch.randn(256, 1, 128, generator=generator).to(torch.bfloat16)
    q = torch.randn(2, 8, 128, generator=generator).to(torch.bfloat16)
    codes, scale = (
        t[:, 0].contiguous() for t in hadamard_fp4(keys, torch.arange(256, dtype=torch.int32), table)
    )
    scale.view(torch.uint8)[9] = torch.tensor((120, 108, 109, 1), dtype=torch.uint8)
    q_codes, q_scale = hadamard_fp4(q, torch.tensor((3, 4), dtype=torch.int32), table)
    weights, lengths = torch.randn(2, 8, generator=generator), torch.tensor((64, 256), dtype=torch.int32)
    got = dense.index_logits_fp4_dense(q_codes, q_scale, weights, codes, scale, lengths)

    wide = reference.quantized_fp4(reference.hadamard(reference.rope(keys, table)))[:, 0].double()
    e2m1 = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), dtype=torch.float64)
    code = torch.stack((codes[9] & 15, codes[9] >> 4), dim=-1).flatten().long()
    value = torch.where(code < 8, 1.0, -1.0) * e2m1[code & 7]
    kept = torch.tensor((2.0**-7, 0.0, 2.0**-18, 0.0), dtype=torch.float64)  # 12 binades below: zeros
    wide[9] = value * kept.repeat_interleave(32)
    heads = reference.quantized_fp4(reference.hadamard(reference.rope(q, table[3:5]))).double()
    want = torch.einsum("mh,mhk->mk", weights.double(), (heads @ wide.T).relu())
    spread = torch.einsum("mh,mhk->mk", weights.double().abs(), heads.abs() @ wide.abs().T)
    close = (got - want).abs() <= 2.0**-5 * spread
    assert close[0, :64].all()
    assert close[1].all()
    assert (got[0, 64:] == -torch.inf).all()


@pytest.mark.interpret
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 15, 16, 17])
def test_any_number_of_queries_goes_in_groups(m):
    """Scores are the reference's, and those that the queries have among all, of remainders by eight."""
    inputs = dense.SPEC.make_inputs({**DIMS, "m": 17}, CPU, 6)
    full = dense.index_logits_fp4_dense(*inputs)
    assert mismatch(dense.SPEC, inputs, full) is None
    own = slice(17 - m, 17)
    got = dense.index_logits_fp4_dense(*rows(inputs, own))
    assert got.shape == (m, 512)
    assert got.is_contiguous()
    assert torch.equal(bits(got), bits(full[own]))


@pytest.mark.interpret
@settings(max_examples=12)
@given(
    m=st.integers(1, 9),
    num_tiles=st.integers(1, 5),
    parts=st.integers(1, 12),
    seed=st.integers(0, 2**31 - 1),
)
def test_scores_do_not_depend_on_the_parts_of_the_keys(m, num_tiles, parts, seed):
    """Parts of unequal numbers of tiles, and more parts than there are tiles, included."""
    inputs = dense.SPEC.make_inputs({**DIMS, "m": m, "num_tiles": num_tiles}, CPU, seed)
    inputs[5][0] = seed % 2 * 256 * num_tiles
    full = dense.index_logits_fp4_dense(*inputs)
    assert mismatch(dense.SPEC, inputs, full) is None
    got = launched(inputs, 8, dense.Config(parts=parts))
    assert torch.equal(bits(got[:m]), bits(full))
    assert (got[m:] == -torch.inf).all()


@pytest.mark.interpret
def test_what_is_no_number_is_none_in_its_own_scores_alone():
    """A nan scale of a head or key, a nan or infinite weight: in no other score, and not beyond."""
    q, q_scale, weights, keys, scale, _ = dense.SPEC.make_inputs({**DIMS, "m": 6, "num_tiles": 1}, CPU, 7)
    lengths = torch.tensor((256, 256, 256, 256, 130, 0), dtype=torch.int32)
    plain = dense.index_logits_fp4_dense(q, q_scale, weights, keys, scale, lengths)
    q_scale.view(torch.uint8)[1, 3, 2] = 255
    q_scale.view(torch.uint8)[5, 0, 0] = 255
    scale.view(torch.uint8)[129, 3], scale.view(torch.uint8)[131, 0] = 255, 255
    weights[2, 0], weights[3, 1] = torch.nan, torch.inf
    inputs = q, q_scale, weights, keys, scale, lengths
    got = dense.index_logits_fp4_dense(*inputs)
    is_seen = torch.arange(256) < lengths[:, None]
    is_touched = torch.zeros(6, 256, dtype=torch.bool)
    is_touched[1:4], is_touched[:, (129, 131)] = True, True
    assert torch.equal(bits(got)[~is_touched], bits(plain)[~is_touched])
    assert (got[~is_seen] == -torch.inf).all()
    assert got[1:3].isnan().all()
    assert got[:, (129, 131)][is_seen[:, (129, 131)]].isnan().all()
    expected = index_reference.index_logits_fp4_dense(*inputs)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())
    assert torch.equal(bits(got), bits(paged.index_logits_fp4(*in_pages(inputs, 1))[:, :256]))


@pytest.mark.interpret
@pytest.mark.parametrize("exponent", [-6, -24])
def test_tiny_weights_have_the_same_bits(exponent):
    """Half of 2**-119, a weight's product with its head's largest scale, is the least normal number."""
    q, q_scale, weights, keys, scale, lengths = dense.SPEC.make_inputs({**DIMS, "num_tiles": 1}, CPU, 8)
    q_scale.view(torch.uint8).fill_(127 - 113)
    weights = torch.where(weights < 0, -1.0, 1.0) * 2.0**exponent * (1 + weights.abs().frac())
    inputs = q, q_scale, weights, keys, scale, lengths
    got = dense.index_logits_fp4_dense(*inputs)
    assert torch.equal(bits(got), bits(paged.index_logits_fp4(*in_pages(inputs, 1))[:, :256]))
    assert (got[got.isfinite()] != 0).any()


@pytest.mark.parametrize(
    ("m", "n", "parts"),
    [
        (1, 65536, 128),
        (9, 65536, 64),
        (1, 16384, 64),
        (1, 4096, 16),
        (1, 256, 1),
        (64, 65536, 16),
        (4096, 4096, 1),
    ],
)
def test_few_groups_have_as_many_parts_of_the_keys_as_there_are_multiprocessors_for(m, n, parts):
    dims = {"num_heads": 64, "num_tiles": n // dense.TILE}
    chosen = [dense.SPEC.select({**dims, **rows}) for rows in ({"m": m}, {"groups": -(-m // dense.QUERIES)})]
    assert chosen[0] is chosen[1]
    assert chosen[0].kwargs["config"].parts == parts


def test_every_number_of_parts_that_is_chosen_ships():
    shipped = {v.id for v in dense.SPEC.variants}
    most = [groups for groups, _ in LADDER]
    for n in SHIPPED:
        for groups in (1, *most, *(m + 1 for m in most)):
            dims = {"num_heads": 64, "num_tiles": n // dense.TILE, "groups": groups}
            assert dense.SPEC.select(dims).id in shipped


def test_contract_names_the_clause():
    q, q_scale, weights, keys, scale, lengths = dense.SPEC.make_inputs(DIMS, CPU, 1)
    call = dense.index_logits_fp4_dense
    with pytest.raises(ContractError, match=r"scale\.shape"):
        call(q, q_scale, weights, keys, scale[:16].clone(), lengths)
    with pytest.raises(ContractError, match="0 < num_tiles"):
        call(q, q_scale, weights, keys[:0], scale[:0], lengths)
    with pytest.raises(ContractError, match="0 < num_tiles"):
        call(q, q_scale, weights, keys[:200], scale, lengths)
    with pytest.raises(ContractError, match=r"keys\.shape"):
        call(q, q_scale, weights, keys[:300], scale, lengths)
    with pytest.raises(ContractError, match="num_heads in"):
        call(
            q[:, :3].clone(),
            q_scale.view(torch.uint8)[:, :3].clone().view(q_scale.dtype),
            weights,
            keys,
            scale,
            lengths,
        )


@pytest.mark.gpu
@pytest.mark.parametrize(("num_heads", "next_n"), [(64, 1), (64, 2), (64, 4), (8, 3)])
def test_gpu_scores_are_those_of_the_same_keys_in_pages(num_heads, next_n, gpu_record):
    dims = {"m": 36, "num_tiles": 12, "num_heads": num_heads, "ragged": 1}
    inputs = dense.SPEC.make_inputs(dims, torch.device("cuda"), 3)
    got = dense.index_logits_fp4_dense(*inputs)
    same = torch.equal(bits(got), bits(paged.index_logits_fp4(*in_pages(inputs, next_n))))
    gpu_record(dense.SPEC, dense.SPEC.select(dims), f"keys in pages, {next_n} tokens a request", same)
    assert same


@pytest.mark.gpu
def test_gpu_rows_do_not_depend_on_the_batch(gpu_record):
    dims = {"m": 70, "num_tiles": 10, "num_heads": 64, "ragged": 1}
    inputs = dense.SPEC.make_inputs(dims, torch.device("cuda"), 3)
    full = dense.index_logits_fp4_dense(*inputs)
    for first, count in ((0, 1), (7, 20), (69, 1)):
        own = slice(first, first + count)
        same = torch.equal(bits(dense.index_logits_fp4_dense(*rows(inputs, own))), bits(full[own]))
        gpu_record(dense.SPEC, dense.SPEC.select({**dims, "m": count}), f"rows of 70 m={count}", same)
        assert same
    some = inputs[3][:1536].clone(), inputs[4].view(torch.uint8)[:1536].clone().view(inputs[4].dtype)
    got = dense.index_logits_fp4_dense(*inputs[:3], *some, inputs[5])
    same = torch.equal(bits(got), bits(full[:, :1536]))
    gpu_record(dense.SPEC, dense.SPEC.select({**dims, "num_tiles": 6}), "rows of 2560 keys n=1536", same)
    assert same
    # More tiles on their way, all keys in one part.
    other = launched(inputs, 64, dense.Config(num_stages=6))
    same = torch.equal(bits(other[:70]), bits(full))
    gpu_record(dense.SPEC, dense.SPEC.select(dims), "rows of 70, six tiles on their way", same)
    assert same


@pytest.mark.gpu
@pytest.mark.parametrize("variant", dense.SPEC.variants, ids=lambda v: v.id)
def test_gpu_every_variant_matches_the_reference(variant, gpu_record):
    """Of the fewest groups that the dispatcher takes it for; the last group lacks a query."""
    dims = {name: variant.kwargs[name] for name in ("num_heads", "num_tiles")}
    groups = next(g for g in range(1, 1 << 10) if dense.SPEC.select({**dims, "groups": g}) == variant)
    m = groups * dense.QUERIES - 1
    inputs = dense.SPEC.make_inputs({**dims, "m": m, "ragged": 1}, torch.device("cuda"), groups)
    wrong = mismatch(dense.SPEC, inputs, dense.index_logits_fp4_dense(*inputs))
    gpu_record(dense.SPEC, variant, f"variants m={m}", wrong is None)
    assert wrong is None
