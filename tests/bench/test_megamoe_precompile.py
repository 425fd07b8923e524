"""The benchmark over several GPUs: which kernels it is spared compiling, what memory they take, its forms."""

from dataclasses import replace

import pytest

from bench import megamoe, megamoe_precompile, megamoe_ranks


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (megamoe_ranks.TOKENS, [8, 512, 4096, 8192]),
        ((8, 4097), [8, 4097]),
        ((5,), [5]),  # the largest number is a size of its own: a layer's buffers hold no more
        ((9, 64), [64]),
    ],
)
def test_sizes_of_a_layer(tokens, sizes):
    assert megamoe_precompile.sizes(tokens) == sizes


@pytest.mark.parametrize("tokens", megamoe_ranks.TOKENS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("model", megamoe.SHAPES)
def test_buffers_are_no_larger_than_published_ones(model, ranks, tokens):
    c = replace(megamoe.config(model, tokens, 132, ranks=ranks), num_ranks=ranks)
    found = megamoe.memory(c)
    assert found["buffer_bytes"] <= found["published_bytes"]


@pytest.mark.parametrize("model", megamoe.SHAPES)
def test_a_ring_on_one_of_several_ranks_is_that_of_one_gpu(model):
    of_ranks = replace(megamoe.config(model, 4096, 132, ranks=2), **megamoe.ring_changes())
    assert of_ranks == megamoe.config(model, 4096, 132)
    assert not megamoe.config(model, 4096, 132, ranks=2).widened
