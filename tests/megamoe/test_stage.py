"""The kernel that puts a rank's inputs where its peers read them: plain PyTorch, and the interpreter."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.megamoe_outputs import stage_parts, staged
from megamoe import stage_kernel
from megamoe.instances import CONFIG, OPTIONS
from verify import interp


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
    given = x.view(torch.float8_e4m3fn), x_scale, idx, weights
    parts = stage_parts(c)
    interp.run(stage_kernel.make_kernel(c), *given, *parts)
    for got, want in zip(parts, staged(c, *given), strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
