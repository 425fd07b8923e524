"""Compressor: prefill in one go, in chunks and token by token; states that are reused; the softmax itself."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_kernels import runtime
from dsv4_kernels.attention import compressor_reference, layer_reference, reference
from dsv4_kernels.attention.compressor import RATIOS, SPEC, compressor
from dsv4_kernels.attention.compressor_pool import channels
from dsv4_kernels.attention.compressor_state import decode_plan, plan, state_rows, state_write
from dsv4_kernels.contract import ContractError
from tests.compare import bits

POSITIONS = 1024


def layer(ratio, tokens, device="cpu", seed=1):
    """Return kv and score rows of a request, then ape, norm weight and angles."""
    generator = torch.Generator(device).manual_seed(seed)
    width = channels(ratio, 512)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    weight = (1 + normal(512) / 4).to(torch.bfloat16)
    table = reference.rope_table(POSITIONS, 160000.0, True, torch.device(device))
    return normal(tokens, width), 3 * normal(tokens, width), normal(ratio, width), weight, table


def new_states(ratio, slots, device="cpu"):
    """Return states as an earlier request left them: numbers that must not be seen."""
    shape = (slots, state_rows(ratio), channels(ratio, 512))
    return torch.full(shape, torch.nan, device=device), torch.full(shape, torch.nan, device=device)


def append(rows, states, starts, lengths, slots, ratio, decode=False):
    """Run the tokens of several requests that follow each other in `rows`; return the entries' parts."""
    kv, score, ape, weight, table = rows
    if decode:
        positions = torch.tensor(starts, device=kv.device)[:, None] + torch.arange(
            lengths[0], device=kv.device
        )
        blocks, places = decode_plan(positions.int(), torch.tensor(slots, device=kv.device).int(), ratio)
    else:
        blocks, places = (x.to(kv.device) for x in plan(starts, lengths, slots, ratio))
    parts = compressor(kv, score, states[0], states[1], blocks, ape, weight, table)
    state_write(states[0], states[1], places, kv, score)
    kept = blocks[:, 0] >= 0
    return [part[kept] for part in parts]


def in_portions(rows, cuts, ratio, device="cpu", decode=False):
    """Return all entries' parts of one request that comes in portions, in slot 1 of 3."""
    kv, score, *rest = rows
    states, found = new_states(ratio, 3, device), []
    ends = [0, *cuts, len(kv)]
    for start, end in itertools.pairwise(ends):
        if end > start:
            portion = (kv[start:end].contiguous(), score[start:end].contiguous(), *rest)
            found.append(append(portion, states, [start], [end - start], [1], ratio, decode))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def same(got, want):
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(got, want, strict=True))


@settings(max_examples=5)
@given(data=st.data())
def test_entries_do_not_depend_on_how_tokens_come(data):
    ratio = data.draw(st.sampled_from(RATIOS))
    tokens = data.draw(st.sampled_from((1, 4, 5, 127, 128, 129, 260)))
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=5)))
    rows = layer(ratio, tokens, seed=data.draw(st.integers(0, 99)))
    whole = in_portions(rows, (), ratio)
    assert len(whole[0]) == tokens // ratio
    assert same(in_portions(rows, cuts, ratio), whole)


@pytest.mark.parametrize("ratio", RATIOS)
def test_token_by_token_is_prefill(ratio):
    rows = layer(ratio, 2 * ratio + 3)
    last = range(2 * ratio - 5, 2 * ratio + 3)
    assert same(in_portions(rows, last, ratio, decode=ratio == 4), in_portions(rows, (), ratio))


@pytest.mark.interpret
def test_interpreted_kernels_agree_on_state_and_tokens():
    rows = layer(4, 9)
    assert same(in_portions(rows, (3, 6), 4), in_portions(rows, (), 4))


@pytest.mark.interpret
def test_interpreted_block_of_128_matches_its_reference():
    case = next(c for c in SPEC.cases if c.id == "one-row-r128")
    inputs = SPEC.make_inputs(case.dims, torch.device("cpu"), 1)
    assert same(SPEC.fn(*inputs), SPEC.reference(*inputs))


def test_requests_of_one_call_do_not_meet():
    ratio, lengths, starts = 4, [7, 1, 9, 0], [0, 0, 0, 0]
    rows = layer(ratio, sum(lengths))
    states = new_states(ratio, 4)
    together = append(rows, states, starts, lengths, [2, 0, 3, 1], ratio)
    first, alone = 0, []
    for length in lengths:
        part = [x[first : first + length].contiguous() for x in rows[:2]]
        alone.append(in_portions((*part, *rows[2:]), (), ratio) if length else [x[:0] for x in together])
        first += length
    assert same(together, [torch.cat(parts) for parts in zip(*alone, strict=True)])


@pytest.mark.interpret
@pytest.mark.parametrize(("ratio", "lengths"), [(4, (1, 4, 3, 9, 5, 8)), (128, (1, 4, 127, 129, 5, 128))])
def test_interpreted_requests_of_any_length(ratio, lengths):
    """Ragged requests of one call: each has the reference's bits of its tokens alone."""
    rows = layer(ratio, sum(lengths))
    states = new_states(ratio, len(lengths))
    together = append(rows, states, [0] * len(lengths), lengths, [3, 0, 5, 1, 2, 4], ratio)
    with runtime.backend("reference"):
        parts = zip(*(x.split(lengths) for x in rows[:2]), strict=True)
        alone = [in_portions((*part, *rows[2:]), (), ratio) for part in parts]
    assert same(together, [torch.cat(parts) for parts in zip(*alone, strict=True)])


@pytest.mark.parametrize("ratio", RATIOS)
def test_pooling_is_the_softmax_of_the_layer(ratio):
    """A mean of at most 128 rows in fp32: 2**-16 of the largest value; then at most one step of bf16."""
    generator = torch.Generator().manual_seed(4)
    shape = (4, 2 * ratio if ratio == 4 else ratio, 512)
    kv, score = torch.randn(shape, generator=generator), 5 * torch.randn(shape, generator=generator)
    score[0, :3], score[1, 0] = -torch.inf, 60.0
    want = layer_reference.pool(kv, score).double()
    error = (compressor_reference.pool(kv, score).double() - want).abs()
    assert (error <= 2.0**-16 * kv.abs().amax(1) + 2.0**-7 * want.abs()).all()


def test_exp_is_within_its_bound():
    x = -torch.rand(1 << 16, generator=torch.Generator().manual_seed(2)) * 86
    exact = x.double().exp()
    assert ((compressor_reference.exp_weight(x).double() - exact).abs() <= 2.0**-19 * exact).all()
    ends = compressor_reference.exp_weight(torch.tensor([0.0, -1e30, -torch.inf]))
    assert ends[0] == 1
    assert (ends[1:] < 2.0**-123).all()


def test_contract_names_the_clause():
    kv, score, ape, weight, table = layer(4, 5)
    states, blocks = new_states(4, 1), torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(ContractError, match=r"ape\.shape"):
        compressor(kv, score, *states, blocks, ape[:3].clone(), weight, table)
    with pytest.raises(ContractError, match=r"blocks\.shape"):
        compressor(kv, score, *states, blocks[:, :3].contiguous(), ape, weight, table)
    with pytest.raises(ContractError, match=r"score_state\.shape"):
        state_write(new_states(4, 1)[0], new_states(4, 2)[1], blocks[0, :1].clone(), kv[:1], score[:1])


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", RATIOS)
def test_gpu_entries_do_not_depend_on_how_tokens_come(ratio):
    rows = layer(ratio, 700, "cuda")
    whole = in_portions(rows, (), ratio, "cuda")
    assert same(in_portions(rows, (1, 5, 130, 131, 400), ratio, "cuda"), whole)
    assert same(in_portions(rows, range(1, 700), ratio, "cuda", decode=True), whole)
    kv, score, ape, weight, table = (x.cpu() for x in rows)
    want = in_portions((kv, score, ape, weight, table), (), ratio)
    assert same([x.cpu() for x in whole], want)


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", RATIOS)
def test_gpu_rows_do_not_depend_on_the_batch(ratio):
    dims = {"m": 200, "num_tokens": 200, "num_slots": 64, "num_positions": 8192, "ratio": ratio, "decode": 1}
    inputs = SPEC.make_inputs(dims, torch.device("cuda"), 3)
    full = compressor(*inputs)
    for first, count in ((0, 1), (7, 20), (100, 100)):
        part = [x[first : first + count].clone() if i == 4 else x for i, x in enumerate(inputs)]
        assert same(compressor(*part), [x[first : first + count] for x in full])
