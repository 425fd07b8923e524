"""TileLang programs that use instructions no shipped kernel uses: both levels agree, schedules too."""

from functools import cache

import pytest
import torch
from tilelang import language as T

from tests.verify.device.test_kernels import agrees
from verify.extract import extract
from verify.interp import device

NO_TMA = {"tl.disable_tma_lower": True, "tl.disable_warp_specialized": True}
_TORCH = {
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "float8_e5m2": torch.float8_e5m2,
    "int32": torch.int32,
}


@cache
def product(m, n, k, dtype, out_dtype, threads, transposed_a, transposed_b, stages, block_m):
    """c = a @ b by TMA or cp.async, wgmma or mma.sync, and out through shared memory."""
    accumulator = "int32" if dtype == "int8" else "float32"
    block_k = 64

    @T.prim_func
    def product_kernel(
        a: T.Tensor[(k, m) if transposed_a else (m, k), dtype],
        b: T.Tensor[(n, k) if transposed_b else (k, n), dtype],
        c: T.Tensor[(m, n), out_dtype],
    ):
        with T.Kernel(T.ceildiv(m, block_m), threads=threads) as by:
            a_tile = T.alloc_shared((block_k, block_m) if transposed_a else (block_m, block_k), dtype)
            b_tile = T.alloc_shared((n, block_k) if transposed_b else (block_k, n), dtype)
            c_tile = T.alloc_shared((block_m, n), out_dtype)
            acc = T.alloc_fragment((block_m, n), accumulator)
            T.clear(acc)
            for ko in T.Pipelined(k // block_k, num_stages=stages):
                if transposed_a:
                    T.copy(a[ko * block_k, by * block_m], a_tile)
                else:
                    T.copy(a[by * block_m, ko * block_k], a_tile)
                if transposed_b:
                    T.copy(b[0, ko * block_k], b_tile)
                else:
                    T.copy(b[ko * block_k, 0], b_tile)
                T.gemm(a_tile, b_tile, acc, transpose_A=transposed_a, transpose_B=transposed_b)
            T.copy(acc, c_tile)
            T.copy(c_tile, c[by * block_m, 0])

    return product_kernel


def small_integers(shape, dtype, seed):
    """Integers whose products and sums every type here holds exactly, in whatever order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).to(_TORCH[dtype])


CASES = {
    "bf16, wgmma ss, TMA store, stmatrix": ("bfloat16", "bfloat16", 128, False, True, 2, 64, None),
    "both operands MN-major": ("bfloat16", "bfloat16", 128, True, False, 2, 64, None),
    "two warpgroups": ("bfloat16", "bfloat16", 256, False, False, 2, 128, None),
    "int8": ("int8", "int32", 128, False, True, 2, 64, None),
    "e5m2": ("float8_e5m2", "bfloat16", 128, False, True, 2, 64, None),
    "mma.sync and ldmatrix": ("bfloat16", "bfloat16", 64, False, True, 2, 16, None),
    "mma.sync by cp.async": ("bfloat16", "bfloat16", 64, False, True, 2, 16, NO_TMA),
}


@pytest.mark.parametrize("name", CASES)
def test_products(name):
    dtype, out_dtype, threads, transposed_a, transposed_b, stages, block_m, configs = CASES[name]
    m, n, k = block_m, 64, 192
    kernel = product(m, n, k, dtype, out_dtype, threads, transposed_a, transposed_b, stages, block_m)
    extracted = extract(kernel, pass_configs=configs)
    a = small_integers((k, m) if transposed_a else (m, k), dtype, 0)
    b = small_integers((n, k) if transposed_b else (k, n), dtype, 1)
    c = torch.zeros((m, n), dtype=_TORCH[out_dtype])
    for policy in ("late", "random"):
        agrees(extracted, (a, b, c), (2,), policy=policy, seed=4)


def test_a_fence_that_the_compiler_leaves_out():
    """cp.async writes by the generic proxy; of wgmma's loads in the peeled last step no fence orders them."""
    kernel = product(64, 64, 192, "bfloat16", "bfloat16", 128, False, True, 2, 64)
    extracted = extract(kernel, pass_configs=NO_TMA)
    a, b = small_integers((64, 192), "bfloat16", 0), small_integers((64, 192), "bfloat16", 1)
    c = torch.zeros(64, 64, dtype=torch.bfloat16)
    with pytest.raises(device.ProxyFenceError):
        device.run(extracted, a, b, c, policy="late")
    agrees(extracted, (a, b, c), (2,), policy="late", checks=device.Checks(races=False))


@cache
def row_sums(threads):
    @T.prim_func
    def row_sums_kernel(
        a: T.Tensor[(8, 512), T.int32], total: T.Tensor[(8,), T.int32], most: T.Tensor[(8,), T.int32]
    ):
        with T.Kernel(2, threads=threads) as bm:
            rows = T.alloc_fragment((4, 512), T.int32)
            sums = T.alloc_fragment((4,), T.int32)
            maxima = T.alloc_fragment((4,), T.int32)
            T.copy(a[bm * 4, 0], rows)
            T.reduce_sum(rows, sums, dim=1)
            T.reduce_max(rows, maxima, dim=1)
            T.copy(sums, total[bm * 4])
            T.copy(maxima, most[bm * 4])

    return row_sums_kernel


@pytest.mark.parametrize("policy", list(device.POLICIES))
def test_reductions_through_shared_memory(policy):
    a = torch.randint(
        -(2**30), 2**30, (8, 512), generator=torch.Generator().manual_seed(0), dtype=torch.int32
    )
    out = torch.zeros(8, dtype=torch.int32)
    agrees(extract(row_sums(128)), (a, out, out.clone()), (1, 2), policy=policy)
