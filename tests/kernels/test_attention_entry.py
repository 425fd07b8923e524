"""Query and KV paths at the edges: positions outside the table, values that are not finite."""

import pytest
import torch

from dsv4_kernels.attention import reference
from dsv4_kernels.attention.kv_entry import kv_entry
from dsv4_kernels.attention.q_norm_rope import q_norm_rope
from dsv4_kernels.contract import ContractError
from tests.compare import bits

TABLE = reference.rope_table(5, 160000.0, True)
POSITIONS = torch.tensor([4, -1, 5, 0], dtype=torch.int32)


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)


@pytest.mark.interpret
def test_positions_outside_the_table_give_zeros():
    q, kv, weight = rows(4, 4, 512), rows(4, 512), rows(512)
    out = q_norm_rope(q, POSITIONS, TABLE)
    nope, scale, rope = kv_entry(kv, POSITIONS, weight, TABLE)
    for row in (1, 2):
        assert not out[row, :, 448:].any()
        assert not rope[row].any()
    assert out[0, :, 448:].all()
    assert torch.equal(out, reference.q_norm_rope(q, POSITIONS, TABLE))
    for got, want in zip((nope, scale, rope), reference.kv_entry(kv, POSITIONS, weight, TABLE), strict=True):
        assert torch.equal(bits(got), bits(want))


@pytest.mark.interpret
def test_what_is_not_finite_shows_in_its_block():
    kv = rows(4, 512)
    kv[1, 70], kv[2, 500], kv[3] = torch.nan, torch.inf, 0
    weight = rows(512)
    got = kv_entry(kv, POSITIONS, weight, TABLE)
    for part, want in zip(got, reference.kv_entry(kv, POSITIONS, weight, TABLE), strict=True):
        assert torch.equal(bits(part), bits(want))
    nope, scale, rope = got
    assert (scale[1, :7] == 255).all()  # a nan makes the whole row's norm nan
    assert rope[2].isnan().any()
    assert not nope[3].float().any()
    assert (scale[:, 7] == 0).all()


def test_contract_names_the_clause():
    with pytest.raises(ContractError, match="num_heads % BLOCK_HEADS == 0"):
        q_norm_rope(rows(1, 3, 512), POSITIONS[:1], TABLE)
    with pytest.raises(ContractError, match=r"weight\.shape"):
        kv_entry(rows(1, 512), POSITIONS[:1], rows(256), TABLE)
