"""Which kernels the benchmark over several GPUs is spared compiling."""

import pytest

from bench import megamoe_precompile, megamoe_ranks


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
