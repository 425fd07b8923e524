"""Stages handed back late: arrivals move behind the last wait for products, and nothing else changes."""

import pytest
from tilelang import language as T

from dsv4_kernels.gemm import fp8_gemm_async
from dsv4_kernels.tile.corrections import corrected
from dsv4_kernels.tile.late import ATTRIBUTE, released_late
from verify.extract import extract

STAGES = 3


@pytest.fixture(scope="module")
def pair():
    """The flight of `fp8_gemm` as it ships, and without the request."""
    kernel = fp8_gemm_async.make_flight(256, 1536, "uint8", 128, 64, STAGES)
    with corrected():
        return tuple(extract(k).cuda_text.splitlines() for k in (kernel, kernel.without_attr(ATTRIBUTE)))


def _places(lines, what):
    return [i for i, line in enumerate(lines) if what in line]


def _handed_back(lines):
    """The line that hands a stage back: the last arrival."""
    return _places(lines, "].arrive()")[-1]


def test_the_text_differs_in_the_place_of_one_line(pair):
    asked, plain = pair
    there = _handed_back(asked)
    here = plain.index(asked[there])
    assert plain[:here] + plain[here + 1 :] == asked[:there] + asked[there + 1 :]


def test_a_stage_is_handed_back_behind_the_last_wait(pair):
    asked, plain = pair
    (first,), (last,) = (_places(asked, f"wait_wgmma<{left}>") for left in (1, 0))
    assert first < last < _handed_back(asked) == last + 1
    assert _handed_back(plain) < _places(plain, "wait_wgmma<1>")[0]


def test_a_kernel_that_waits_at_once_may_not_ask():
    @T.prim_func
    def kernel(x: T.Tensor[(512, 64), T.float16], out: T.Tensor[(64, 64), T.float32]):
        with T.Kernel(1, threads=128) as _:
            tile = T.alloc_shared((64, 64), T.float16)
            acc = T.alloc_fragment((64, 64), T.float32)
            T.clear(acc)
            T.copy(x[0, 0], tile)
            T.wgmma_gemm(tile, tile, acc, transpose_B=True)
            T.wait_wgmma(0)
            T.copy(acc, out)

    with corrected(), pytest.raises(ValueError, match="no stage is handed back"):
        extract(released_late(kernel))
