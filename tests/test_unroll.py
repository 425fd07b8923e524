"""Rings that nvcc unrolls: the CUDA text gets the pragma and nothing else, and the loops stay loops."""

import pytest

from dsv4_kernels.gemm import fp8_gemm
from dsv4_kernels.tile.corrections import corrected
from dsv4_kernels.tile.unroll import ATTRIBUTE
from verify import ir
from verify.extract import extract

CONFIG = fp8_gemm.Config(128, 256, num_stages=4, weights_first=False, warpgroups=2, form="wide")


@pytest.fixture(scope="module")
def pair():
    """The wide form of `fp8_gemm` as it ships, and without the request."""
    kernel = fp8_gemm.make_kernel(256, 1024, "e8m0", CONFIG)
    with corrected():
        return extract(kernel), extract(kernel.without_attr(ATTRIBUTE))


def test_the_text_differs_in_the_pragma_alone(pair):
    asked, plain = (e.cuda_text.splitlines() for e in pair)
    pragmas = [line for line in asked if line.strip() == "#pragma unroll 4"]
    assert len(pragmas) == 2  # of the producer's loop and the consumers'
    assert [line for line in asked if line not in pragmas] == plain


def test_the_loops_are_read_as_loops(pair):
    def kinds(function):
        return [node.kind for node in ir.walk(function.body) if isinstance(node, ir.For)]

    assert kinds(pair[0].device) == kinds(pair[1].device)
    assert "serial" in kinds(pair[0].device)
