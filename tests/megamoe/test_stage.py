"""The kernel that puts a rank's inputs where its peers read them: plain PyTorch, and the interpreter."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe import stage_kernel
from megamoe.proofs import CONFIG, OPTIONS
from verify import interp

UNTOUCHED = 7  # what lies where the call writes nothing


def expected(c, x, x_scale, idx, weights):
    """Return the four parts of all ranks after the call; a shared expert is each rank's first."""
    count, mine = len(x), slice(c.first_rank * c.tokens * c.topk, (c.first_rank + 1) * c.tokens * c.topk)
    parts = empty_parts(c)
    parts[0][c.first_rank, :count], parts[1][c.first_rank, :count] = x.view(torch.uint8), x_scale
    numbers = torch.full((c.tokens, c.topk), -1, dtype=torch.int32)
    factors = parts[3][0, mine].view(c.tokens, c.topk).clone()
    if c.shared:
        local = c.num_experts - 1  # routed ones of a rank, behind its shared one
        numbers[:count, :-1] = torch.where(idx < 0, idx, idx + idx // local + 1)
        numbers[:count, -1] = c.first_rank * c.num_experts
        factors[:count, :-1], factors[:count, -1] = weights, 1.0
    else:
        numbers[:count], factors[:count] = idx, weights
    parts[2][:, mine], parts[3][:, mine] = numbers.flatten(), factors.flatten()
    return parts


def empty_parts(c):
    """Return bytes of rows and of scales, and the routings, of all ranks."""
    rows = torch.full((c.num_ranks, c.x_rows, c.hidden), UNTOUCHED, dtype=torch.uint8)
    scales = torch.full((c.num_ranks, c.scale_rows, c.hidden // 128), UNTOUCHED, dtype=torch.uint8)
    words = torch.full((c.num_ranks, c.routing_words), UNTOUCHED, dtype=torch.int32)
    return [rows, scales, words, words.float()]


@pytest.mark.parametrize("first_rank", [0, 1])
@pytest.mark.parametrize("config", [CONFIG, OPTIONS], ids=["routed", "shared"])
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_it_puts_a_ranks_inputs_where_its_peers_read_them(config, first_rank, data):
    c = replace(config, first_rank=first_rank)
    routed = c.topk - 1 if c.shared else c.topk
    experts = c.num_ranks * (c.num_experts - 1 if c.shared else c.num_experts)
    count = data.draw(st.integers(0, c.tokens))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    x = torch.randint(0, 256, (count, c.hidden), generator=generator, dtype=torch.uint8)
    x_scale = torch.randint(0, 256, (count, c.hidden // 128), generator=generator, dtype=torch.uint8)
    idx = torch.randint(-1, experts, (count, routed), generator=generator, dtype=torch.int32)
    weights = torch.rand(count, routed, generator=generator)
    parts = empty_parts(c)
    codes = x.view(torch.float8_e4m3fn), parts[0].view(torch.float8_e4m3fn)
    interp.run(stage_kernel.make_kernel(c), codes[0], x_scale, idx, weights, codes[1], *parts[1:])
    for got, want in zip(parts, expected(c, x, x_scale, idx, weights), strict=True):
        assert torch.equal(got, want)
