"""The indexer's keys in one launch: the bytes of three launches, in any company, written nowhere else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_kernels.attention import compressor_reference
from dsv4_kernels.attention.compressor_state import plan, state_rows
from dsv4_kernels.attention.hadamard_quant import hadamard_fp4, hadamard_fp8
from dsv4_kernels.attention.index_cache import FP4, FP8, PAGE_ROWS, index_cache_write, page_bytes
from dsv4_kernels.attention.index_compressor import index_compressor
from dsv4_kernels.attention.index_key_write import RATIO, SPEC, index_key_write
from dsv4_kernels.contract import ContractError

KINDS = (FP4, FP8)
CPU = torch.device("cpu")
ROW_INPUTS = (1, 6)  # slots and blocks: a row for each key


def inputs_of(m, kind, seed, decode=1, device=CPU, pages=3):
    dims = {"m": m, "num_tokens": max(m, 1) if decode else m * RATIO, "num_slots": 4, "num_positions": 300}
    dims = {**dims, "decode": decode, "pages": pages, "is_fp4": int(kind == FP4)}
    return list(SPEC.make_inputs(dims, device, seed))


def in_three(cache, slots, *rows, cos_sin):
    """Return the cache after the three launches that `index_key_write` is one of."""
    blocks = rows[4]
    keys = index_compressor(*rows)
    cast = hadamard_fp4 if cache.shape[1] == page_bytes(FP4) else hadamard_fp8
    first = (blocks[:, 2] // RATIO * RATIO).contiguous()
    codes, scale = (x[:, 0].contiguous() for x in cast(keys[:, None].contiguous(), first, cos_sin))
    return index_cache_write(cache.clone(), slots, codes, scale)


def assert_is_three(inputs):
    *args, cos_sin = inputs
    got = index_key_write(inputs[0].clone(), *inputs[1:])
    assert torch.equal(got, in_three(*args, cos_sin=cos_sin))
    return got


@pytest.mark.interpret
@settings(max_examples=4)
@given(
    m=st.integers(1, 70),
    kind=st.sampled_from(KINDS),
    decode=st.integers(0, 1),
    seed=st.integers(1, 99),
    special=st.sampled_from((None, torch.inf, torch.nan, 3e38, 1e-30)),
)
def test_interpreted_bytes_are_those_of_three_launches(m, kind, decode, seed, special):
    inputs = inputs_of(m, kind, seed, decode)
    if special is not None:
        inputs[2][0, seed] = special  # of a channel of some keys
    assert_is_three(inputs)


@pytest.mark.interpret
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_keep_their_signs(kind):
    """Of zeros alone, below zero where the weight is: RoPE leaves the first dims alone, not times one."""
    inputs = inputs_of(9, kind, 4)
    for rows in (inputs[2], inputs[4]):
        rows.zero_()
    inputs[8] = -inputs[8].abs()
    got = assert_is_three(inputs)
    wanted = compressor_reference.index_key_write(inputs[0].clone(), *inputs[1:])
    assert torch.equal(got, wanted)


@pytest.mark.interpret
@pytest.mark.parametrize("kind", KINDS)
def test_keys_do_not_depend_on_their_company(kind):
    inputs = inputs_of(20, kind, 5)
    whole = index_key_write(inputs[0].clone(), *inputs[1:])
    for picked in ([7], [3, 19, 0], list(range(19, -1, -1))):
        part = [x[picked].contiguous() if i in ROW_INPUTS else x for i, x in enumerate(inputs)]
        got = index_key_write(inputs[0].clone(), *part[1:])
        left = [i for i in range(20) if i not in picked]
        rest = [x[left].contiguous() if i in ROW_INPUTS else x for i, x in enumerate(inputs)]
        assert torch.equal(index_key_write(got, *rest[1:]), whole)


@pytest.mark.interpret
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_other_places_stay(kind):
    inputs = inputs_of(9, kind, 2)
    slots = torch.tensor((5, -1, 63, 64, 3 * PAGE_ROWS, 127, 2**31 - 1, -(2**31), 70), dtype=torch.int32)
    inputs[1] = slots
    got = assert_is_three(inputs)
    inside = slots[(slots >= 0) & (slots < 3 * PAGE_ROWS)].long()
    is_written = torch.zeros(3, page_bytes(kind), dtype=torch.bool)
    row_bytes = page_bytes(kind) // PAGE_ROWS - 4
    for page, row in zip((inside // PAGE_ROWS).tolist(), (inside % PAGE_ROWS).tolist(), strict=True):
        is_written[page, row * row_bytes :][:row_bytes] = True
        is_written[page, PAGE_ROWS * row_bytes + row * 4 :][:4] = True
    assert torch.equal(got[~is_written], inputs[0][~is_written])


def test_blocks_of_a_prompt_are_those_of_the_plan():
    """Keys of a request's first eleven tokens: two blocks, of which the first has no tokens before it."""
    inputs = inputs_of(2, FP4, 8, decode=0)
    blocks, _ = plan([0], [11], [2], RATIO)
    generator = torch.Generator().manual_seed(3)
    inputs[2], inputs[3] = (torch.randn(11, 256, generator=generator) for _ in range(2))
    inputs[4], inputs[5] = (torch.full((4, state_rows(RATIO), 256), torch.nan) for _ in range(2))
    inputs[1], inputs[6] = torch.tensor((70, 71), dtype=torch.int32), blocks
    assert len(blocks) == 2
    got = assert_is_three(inputs)
    assert not torch.equal(got[1], inputs[0][1])


def test_contract_names_the_clause():
    inputs = inputs_of(3, FP4, 1)
    with pytest.raises(
        ContractError, match=r"^index_key_write: requires cache\.shape\[1\] in \(4352, 8448\)"
    ):
        index_key_write(inputs[0][:, :4224].contiguous(), *inputs[1:])
    with pytest.raises(ContractError, match=r"slots\.shape"):
        index_key_write(inputs[0], inputs[1][:2].clone(), *inputs[2:])
    with pytest.raises(ContractError, match=r"cos_sin\.shape"):
        index_key_write(*inputs[:-1], inputs[-1][:, :32].contiguous())
    with pytest.raises(ContractError, match="0 < num_positions"):
        index_key_write(*inputs[:-1], inputs[-1][:0])
    with pytest.raises(ContractError, match=r"ape\.shape"):
        index_key_write(*inputs[:7], inputs[7][:3].clone(), *inputs[8:])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "decode"), [(1, 1), (3, 1), (64, 1), (257, 0), (1024, 0), (16384, 0)])
def test_gpu_bytes_are_those_of_three_launches(m, kind, decode, gpu_record):
    *args, table = inputs_of(m, kind, 7, decode, torch.device("cuda"), pages=1024)
    inputs = [*args, table]
    got = index_key_write(inputs[0].clone(), *inputs[1:])
    same = torch.equal(got, in_three(*args, cos_sin=table))
    dims = {"is_fp4": int(kind == FP4)}
    gpu_record(SPEC, SPEC.select(dims), f"three launches m={m}", same)
    assert same


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_rows_do_not_depend_on_the_batch(kind, gpu_record):
    inputs = inputs_of(200, kind, 3, device=torch.device("cuda"), pages=16)
    whole = index_key_write(inputs[0].clone(), *inputs[1:])
    for cuts in ([1, 199], [7, 20, 173], [100, 100], [64, 1, 135]):
        got, first = inputs[0].clone(), 0
        for count in cuts:
            rows = slice(first, first + count)
            part = [x[rows].clone() if i in ROW_INPUTS else x for i, x in enumerate(inputs)]
            index_key_write(got, *part[1:])
            first += count
        same = torch.equal(got, whole)
        gpu_record(SPEC, SPEC.select({"is_fp4": int(kind == FP4)}), f"rows in portions {cuts}", same)
        assert same
