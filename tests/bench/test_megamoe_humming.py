"""The unfused chain of Humming's products, with plain products in their place."""

import pytest
import torch

from bench import megamoe_humming as humming

TOKENS, HIDDEN, INTER, EXPERTS, TOPK = 9, 64, 96, 5, 3


def packed(n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(0, 256, (EXPERTS, n, k // 2), generator=generator, dtype=torch.uint8)
    return w, torch.randint(122, 127, (EXPERTS, n, k // 32), generator=generator, dtype=torch.uint8)


def product(weights, ends):
    """Multiply rows that stand expert by expert."""
    experts = [humming.dequantised(w, s) for w, s in zip(*weights, strict=True)]

    def call(rows, scale):
        x = rows.float() * scale
        parts = [x[a:b] @ w.T for a, b, w in zip(ends, ends[1:], experts, strict=False)]
        return torch.cat(parts).bfloat16()

    return call


def activate(gate_up):
    gate, up = gate_up.float().chunk(2, dim=1)
    gate, up = gate.clamp(max=humming.CLAMP), up.clamp(-humming.CLAMP, humming.CLAMP)
    hidden = torch.nn.functional.silu(gate) * up
    scale = hidden.abs().amax(1, keepdim=True) / 448.0
    return (hidden / scale).to(torch.float8_e4m3fn), scale


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    idx = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOPK, -1).indices.int()
    weights = torch.rand(TOKENS, TOPK, generator=generator)
    scale = x.float().abs().amax(1, keepdim=True) / 448.0
    return x, (x.float() / scale).to(torch.float8_e4m3fn), scale, idx, weights


def outputs(case, where):
    x, codes, scale, idx, weights = case
    l1, l2 = packed(2 * INTER, HIDDEN, 1), packed(HIDDEN, INTER, 2)
    ends = where.ends.tolist()
    call = humming.chain(
        codes, scale, weights, where, product(l1, ends), activate, product(l2, ends), compiles=False
    )
    return call(), humming.expected(x, idx, weights, l1, l2)


def test_the_chain_is_the_layer(case):
    found, wanted = outputs(case, humming.routed(case[3], EXPERTS))
    humming.check(found, wanted)


def test_rows_of_other_tokens_are_refused(case):
    where = humming.routed(case[3], EXPERTS)
    found, wanted = outputs(case, where._replace(place=where.place.roll(1, 0)))
    with pytest.raises(ValueError, match="off by"):
        humming.check(found, wanted)


def test_rows_stand_expert_by_expert(case):
    idx = case[3]
    where = humming.routed(idx, EXPERTS)
    assert torch.equal(where.token[where.place], torch.arange(TOKENS)[:, None].expand(-1, TOPK))
    for expert, (first, last) in enumerate(zip(where.ends, where.ends[1:], strict=False)):
        rows = where.place[idx == expert]
        assert sorted(rows.tolist()) == list(range(first, last))
