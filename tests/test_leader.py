"""Products by a warp number from a shuffle: the CUDA text differs in that alone."""

import re

import pytest

from dsv4_kernels.gemm import fp8_gemm
from dsv4_kernels.tile import leader
from dsv4_kernels.tile.corrections import corrected
from verify import ir
from verify.extract import extract

THREADS = 256
CONFIG = fp8_gemm.Config(128, 256, num_stages=4, weights_first=False, warpgroups=2, form="wide")
BOUND = "  int leader = __shfl_sync((uint)4294967295, ((int)threadIdx.x), 0, 32);"


@pytest.fixture(scope="module")
def pair():
    """The wide form of `fp8_gemm` with the request, and as it ships."""
    kernel = fp8_gemm.make_kernel(256, 1024, "e8m0", CONFIG)
    with corrected():
        return extract(leader.uniform(kernel, THREADS)), extract(kernel)


def test_the_text_differs_in_operands_of_products_alone(pair):
    asked, plain = (e.cuda_text.splitlines() for e in pair)
    assert asked.count(BOUND) == 1
    asked.remove(BOUND)
    changed = [(a, b) for a, b in zip(asked, plain, strict=True) if a != b]
    assert changed
    for with_leader, with_thread in changed:
        assert "tl::wgmma_ss" in with_thread
        assert re.sub(r"\(leader & \d+\)", "((int)threadIdx.x)", with_leader) == with_thread


def test_all_products_ask_the_leader(pair):
    products = [n for n in ir.walk(pair[0].device.body) if isinstance(n, ir.Call) and n.op == "ptx_wgmma_ss"]
    threads = {
        n.var for n in ir.walk(pair[0].device.body) if isinstance(n, ir.Launch) and n.tag == "threadIdx.x"
    }
    assert products
    assert not any(n in threads for product in products for n in ir.walk(product))


def test_a_kernel_that_does_not_ask_stays_as_it_is(pair):
    assert "leader" not in pair[1].cuda_text
