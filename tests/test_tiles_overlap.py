"""Tiles of a block that follow each other without a barrier: what leaves the text, and what stays."""

import pytest

from dsv4_kernels.gemm import fp8_gemm, wide_tile
from dsv4_kernels.tile.corrections import corrected
from dsv4_kernels.tile.overlap import ATTRIBUTE
from verify.extract import extract

CONFIG = fp8_gemm.Config(128, 256, 4, False, 2, "tiles", tiles=2, held_columns=wide_tile.HALF)
BARRIER = "__syncthreads();"


@pytest.fixture(scope="module")
def texts():
    """The form of several tiles as it ships, and without the request: lines from the loop over tiles on."""
    kernel = fp8_gemm.make_kernel(512, 512, "e8m0", CONFIG)
    with corrected():
        found = [extract(k).cuda_text for k in (kernel, kernel.without_attr(ATTRIBUTE))]
    return [[line.strip() for line in text.splitlines()] for text in found]


def _tiles(lines):
    return lines[next(i for i, line in enumerate(lines) if line.startswith("for (int t = 0; t < 2;")) :]


def test_no_barrier_of_the_block_is_left_in_the_loop_over_tiles(texts):
    asked, plain = texts
    assert BARRIER not in _tiles(asked)
    assert _tiles(plain)[1] == BARRIER
    assert _tiles(plain).count(BARRIER) == 1


def test_what_comes_before_the_loop_stays(texts):
    asked, plain = (lines[: len(lines) - len(_tiles(lines))] for lines in texts)
    assert asked == plain
    assert BARRIER in asked


def test_rounds_are_counted_by_the_loops(texts):
    asked, plain = (" ".join(_tiles(lines)) for lines in texts)
    assert "phase_cnt" in plain
    assert "phase_cnt" not in asked
    for word in ("wgmma_ss", "tma_load(", "tma_store(", ".wait(", ".arrive(", "__sync_thread_partial"):
        assert asked.count(word) == plain.count(word) > 0
