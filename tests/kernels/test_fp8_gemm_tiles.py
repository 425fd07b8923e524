"""Several tiles a block in `fp8_gemm`: the bits of one tile a block, and the batches that take it."""

import pytest
import torch

from dsv4_kernels.gemm import fp8_gemm, wide_tile
from dsv4_kernels.gemm.fp8_gemm_tiles import QUARTER, shares
from dsv4_kernels.gemm.rounds import ranges, rounds
from tests.compare import bits
from verify import interp

M, N = 131, 512  # a whole tile of tokens and a few; two tiles of weight rows
NAN_SCALE = 255  # of e8m0
ONE = fp8_gemm.Config(128, 256, 4, weights_first=False, warpgroups=2, form="wide")
SEVERAL = {
    columns: fp8_gemm.Config(128, 256, stages, False, 2, "tiles", tiles=2, held_columns=columns)
    for stages, columns in ((4, QUARTER), (4, wide_tile.HALF), (3, wide_tile.BLOCK_N))
}
# Rounds of a tile that its stages divide.
CHANNELS = {QUARTER: 512, wide_tile.HALF: 512, wide_tile.BLOCK_N: 1536}


def _bytes(tensors):
    """Return the tensors as the kernels take them: scales of e8m0 as bytes."""
    return [t.view(torch.uint8) if t.dtype == torch.float8_e8m0fnu else t for t in tensors]


def _run(scale, config, inputs):
    out = torch.full((M, N), torch.nan, dtype=torch.bfloat16)
    interp.run(fp8_gemm.make_kernel(N, inputs[0].shape[1], scale, config), *inputs, out)
    return out


@pytest.mark.parametrize("columns", SEVERAL)
@pytest.mark.parametrize("scale", [fp8_gemm.E8M0, fp8_gemm.F32])
def test_they_have_the_bits_of_one_tile_a_block(columns, scale):
    dims = {"m": M, "n": N, "k": CHANNELS[columns], "f32_scales": int(scale == fp8_gemm.F32)}
    x, x_scale, w, w_scale = _bytes(fp8_gemm.SPEC.make_inputs(dims, torch.device("cpu"), 0))
    if scale == fp8_gemm.E8M0:
        w_scale[2, 1] = NAN_SCALE  # of the second tile's first half alone
    want, got = (_run(scale, config, (x, x_scale, w, w_scale)) for config in (ONE, SEVERAL[columns]))
    nan = torch.zeros(N, dtype=torch.bool)
    nan[256:384] = scale == fp8_gemm.E8M0
    assert torch.equal(got.isnan(), nan.expand(M, N))
    assert torch.equal(bits(got[:, ~nan]), bits(want[:, ~nan]))


def test_stages_that_do_not_divide_a_tiles_rounds_are_refused():
    with pytest.raises(ValueError, match=r"num_stages == 0, got k=1024, num_stages=3"):
        fp8_gemm.make_kernel(N, 1024, fp8_gemm.E8M0, SEVERAL[wide_tile.BLOCK_N])


def _forms(n, k, tokens, scale=fp8_gemm.E8M0):
    return [fp8_gemm._select(m, n, k, scale).kwargs["config"].form for m in tokens]


def test_the_dispatcher_takes_them_where_they_add_no_round():
    """At 32768 rows 1024 tokens are 1024 tiles, 8 rounds of 132; in blocks of four, 2 rounds of four.

    4352 tokens are 33 rounds, but 36 in blocks of four; with 8192 and more one round in 64 is worth it.
    """
    some, others = (385, 512, 1000, 1024, 2048, 4000, 4096, 4224, 8192, 9999), (257, 384, 513, 1025, 4352)
    assert _forms(32768, 1024, some) == ["tiles"] * len(some)
    assert _forms(32768, 1024, others) == ["wide"] * len(others)
    assert _forms(65536, 1536, (512, 1000, 1024, 1025, 4096, 8192)) == ["tiles"] * 3 + ["wide"] * 3
    for n, k, scale in ((7168, 2048, "f32"), (4096, 1024, "e8m0"), (32768, 1024, "f32")):
        assert "tiles" not in _forms(n, k, (*some, *others), scale)


def _tiles(m):
    return fp8_gemm._select(m, 7168, 2048, fp8_gemm.E8M0).kwargs["config"].tiles


def test_a_block_has_the_most_tiles_that_add_no_round():
    """Of 28 tiles of weight rows; 4096 tokens: 896, 7 rounds of 132; 128 blocks of seven are one of seven."""
    assert [_tiles(m) for m in (512, 1024, 1536, 2048, 3072, 4096, 8192, 8193)] == [1, 2, 1, 4, 2, 7, 7, 1]
    for m in range(384, 8193, 128):
        blocks = m // 128 * 28
        assert _tiles(m) == max(t for t in (1, 2, 4, 7) if rounds(blocks // t) * t <= rounds(blocks))


def test_shared_memory_is_shared_out():
    assert shares(1024, 1, 4) == (4, wide_tile.HALF)
    assert shares(1536, 1, 4) == (3, wide_tile.BLOCK_N)
    assert shares(1024, 4, 4) is None  # scales of four bytes leave no room for a ring of four stages
    assert shares(2048, 1, 7) is None
    assert shares(2048, 1, 7, QUARTER) == (4, QUARTER)  # halves would need 1024 bytes more than there are
    assert shares(1024, 1, 4, QUARTER) == (4, wide_tile.HALF)  # no fewer than there is room for
    assert shares(1280, 1, 4) is None  # rows of ten bytes of scales cannot be copied by four


def test_ranges_merge_neighbours_and_end_with_the_rest():
    assert [rounds(blocks) for blocks in (1, 132, 133, 264, 265)] == [1, 1, 2, 2, 3]
    found = ranges(lambda m: "even" if m // 10 % 2 == 0 else "odd", 15, 10, 50, (99, "odd"))
    assert found == ((20, "even"), (30, "odd"), (40, "even"), (99, "odd"))
