"""Tall tiles and runs of tiles of `fp8_gemm`: the bits of wide tiles, and the batches that take them."""

from dataclasses import replace

import pytest
import torch

import dsv4_kernels
from dsv4_kernels.gemm import fp8_gemm
from dsv4_kernels.gemm.rounds import MULTIPROCESSORS
from tests.compare import bits, mismatch
from verify import interp

CPU = torch.device("cpu")
N, K = 512, 1024  # two wide tiles of weight rows; each stage of a ring, and again
NAN_SCALE = 255  # of e8m0
WIDE = fp8_gemm.Config(128, 256, 4, weights_first=False, warpgroups=2, form="wide")
FORMS = {
    "runs-64": fp8_gemm.Config(64, 128, 4, weights_first=False, warpgroups=1, form="runs", tiles=4),
    "runs-128": fp8_gemm.Config(128, 128, 4, weights_first=False, warpgroups=2, form="runs", tiles=2),
    "tall": fp8_gemm.Config(192, 128, 4, weights_first=False, warpgroups=3, form="tall"),
}


def _inputs(m, scale, n=N, k=K):
    dims = {"m": m, "n": n, "k": k, "f32_scales": int(scale == fp8_gemm.F32)}
    return fp8_gemm.SPEC.make_inputs(dims, CPU, 3)


def _run(scale, config, inputs):
    """Return the output of one form; rows that it does not write stay nan."""
    taken = [t.view(torch.uint8) if t.dtype == torch.float8_e8m0fnu else t for t in inputs]
    out = torch.full((len(inputs[0]), N), torch.nan, dtype=torch.bfloat16)
    interp.run(fp8_gemm.make_kernel(N, K, scale, config), *taken, out)
    return out


@pytest.mark.interpret
@pytest.mark.parametrize("scale", [fp8_gemm.E8M0, fp8_gemm.F32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", ["one", "a tile but one", "a tile", "a tile and one", "two and some"])
def test_they_have_the_bits_of_wide_tiles_and_are_near_the_reference(form, tokens, scale):
    config = FORMS[form]
    number = {
        "one": 1,
        "a tile but one": config.block_m - 1,
        "a tile": config.block_m,
        "a tile and one": config.block_m + 1,
        "two and some": 2 * config.block_m + 13,
    }
    inputs = _inputs(number[tokens], scale)
    got = _run(scale, config, inputs)
    assert torch.equal(bits(got), bits(_run(scale, WIDE, inputs)))
    assert mismatch(fp8_gemm.SPEC, inputs, got) is None


@pytest.mark.interpret
@pytest.mark.parametrize("form", FORMS)
def test_a_scale_that_is_no_number_reaches_what_it_scales_alone(form):
    x, x_scale, w, w_scale = _inputs(70, fp8_gemm.E8M0)
    x_scale.view(torch.uint8)[65, 3] = NAN_SCALE
    w_scale.view(torch.uint8)[3, 6] = NAN_SCALE
    want = torch.zeros(70, N, dtype=torch.bool)
    want[65], want[:, 384:] = True, True
    assert torch.equal(_run(fp8_gemm.E8M0, FORMS[form], (x, x_scale, w, w_scale)).isnan(), want)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("n", "k", "tokens"),
    [(1536, 4096, (256, 257, 640, 641)), (7168, 2048, (128, 129, 256, 257))],
    ids=["1536 x 4096", "7168 x 2048"],
)
def test_rows_have_the_same_bits_on_both_sides_of_a_switch(n, k, tokens):
    x, x_scale, *weights = _inputs(max(tokens), fp8_gemm.E8M0, n, k)
    with dsv4_kernels.backend("interpret"):
        found = [fp8_gemm.fp8_gemm(x[:m], x_scale[:m], *weights) for m in (1, *tokens)]
    for out in found:
        assert torch.equal(bits(out), bits(found[-1][: len(out)]))


@pytest.mark.parametrize("backend", ["interpret", "reference"])
def test_no_rows_give_no_rows(backend):
    with dsv4_kernels.backend(backend):
        assert fp8_gemm.fp8_gemm(*_inputs(0, fp8_gemm.E8M0, 1536, 4096)).shape == (0, 1536)


def _tiles(n, k, tokens, scale=fp8_gemm.E8M0):
    configs = [fp8_gemm._select(m, n, k, scale).kwargs["config"] for m in tokens]
    return [f"{c.form} {c.block_m}x{c.block_n}" for c in configs]


@pytest.mark.parametrize(
    ("n", "k", "scale", "first", "last", "before", "added", "after"),
    [
        (1536, 4096, "e8m0", 257, 640, "flight 64x64", "flight 128x64", "flight 128x128"),
        (1536, 4096, "e8m0", 641, 1408, "flight 128x64", "flight 128x128", "tall 192x128"),
        (4096, 7168, "e8m0", 129, 256, "flight 64x64", "flight 128x64", "flight 128x128"),
        (4096, 7168, "f32", 129, 256, "flight 64x64", "flight 128x64", "flight 128x128"),
        (4096, 8192, "e8m0", 129, 256, "flight 64x64", "flight 128x64", "flight 128x128"),
        (7168, 2048, "e8m0", 129, 256, "flight 128x64", "flight 128x128", "wide 128x256"),
        (7168, 16384, "e8m0", 129, 256, "flight 128x64", "flight 128x128", "wide 128x256"),
    ],
)
def test_a_tile_is_taken_while_its_blocks_are_one_round_and_those_of_the_tile_before_are_not(
    n, k, scale, first, last, before, added, after
):
    found = _tiles(n, k, (first - 1, first, (first + last) // 2, last, last + 1), scale)
    assert found == [before, added, added, added, after]
    rows, columns = map(int, added.split()[1].split("x"))
    assert -(-last // rows) * (n // columns) <= MULTIPROCESSORS < -(-(last + 1) // rows) * (n // columns)


@pytest.mark.parametrize(("n", "k", "tiles"), [(32768, 1024, 2), (65536, 1536, 4)])
def test_runs_of_tiles_are_one_round_of_blocks(n, k, tiles):
    assert n // (128 * tiles) <= MULTIPROCESSORS < 2 * n // (128 * tiles)
    found = _tiles(n, k, (16, 17, 64, 65, 128, 129, 256))
    assert found == ["columns 16x64", *["runs 64x128"] * 2, *["runs 128x128"] * 2, *["wide 128x256"] * 2]
    assert {c.tiles for _, c in fp8_gemm.configs(n, k, fp8_gemm.E8M0) if c.form == "runs"} == {tiles}


@pytest.mark.parametrize(("k", "stages"), [(1024, 3), (768, 3)])
def test_runs_refuse_stages_and_scales_that_do_not_fit_a_tile(k, stages):
    config = replace(FORMS["runs-64"], num_stages=stages)
    with pytest.raises(ValueError, match=rf"k % 512 == 0 and .*, got {k=}, num_stages=3"):
        fp8_gemm.make_kernel(N, k, fp8_gemm.E8M0, config)


def test_tall_tiles_are_taken_where_they_are_as_few_rounds_as_wide_ones():
    """12 columns of tall tiles, 6 of wide ones: a round is 2112 tokens of the first, 2816 of the others."""
    tall = (1409, 1472, 2048, 2112, 2817, 4096, 4224, 5633, 6336)
    wide = (2113, 2816, 4225, 5632, 6337, 8192, 8193, 100_000, fp8_gemm.MAX_TOKENS)
    assert _tiles(1536, 4096, tall) == ["tall 192x128"] * len(tall)
    assert _tiles(1536, 4096, wide) == ["wide 128x256"] * len(wide)
    assert _tiles(1536, 4096, (1408,)) == ["flight 128x128"]


@pytest.mark.parametrize(
    ("n", "k", "scale"),
    [
        *((n, k, fp8_gemm.F32) for n, k in fp8_gemm.SHAPES if (n, k) != (4096, 7168)),
        *((n, k, fp8_gemm.E8M0) for n, k in ((1536, 7168), (4096, 4096), (2048, 4096), (7168, 4096))),
        *((n, k, fp8_gemm.E8M0) for n, k in ((32768, 1536), (65536, 1024), (16384, 1024))),
    ],
)
def test_what_was_not_measured_keeps_its_tiles(n, k, scale):
    found = fp8_gemm.configs(n, k, scale)
    assert {config.form for _, config in found}.isdisjoint({"tall", "runs"})
    ladders = {
        True: [(64, 32), (64, 64), (128, 128)],
        False: [(64, 128), (128, 128)] if n >= 16384 else [(64, 64), (128, 64)],
    }
    some = [(c.block_m, c.block_n) for _, c in found if c.block_m > 16 and c.form in ("flight", "columns")]
    assert some == ladders[n <= 4096]
