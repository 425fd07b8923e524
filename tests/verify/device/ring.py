"""A warp-specialised product that tests edit: TMA ring, operand in registers, two wgmma groups in flight."""

from functools import cache

import torch
from tilelang import language as T

from verify.extract import extract

M, N, K, BLOCK_K = 64, 32, 512, 128
_ROWS = T.GemmWarpPolicy.FullRow


@cache
def ring_kernel():
    """out = a @ b.T, e4m3 in, float32 out; four blocks of K through a ring of two stages."""

    @T.prim_func
    def ring_kernel(
        a: T.Tensor[(M, K), T.float8_e4m3fn],
        b: T.Tensor[(N, K), T.float8_e4m3fn],
        out: T.Tensor[(M, N), T.float32],
    ):
        with T.Kernel(1, threads=128) as _:
            a_tile = T.alloc_shared((M, BLOCK_K), T.float8_e4m3fn)
            b_tile = T.alloc_shared((N, BLOCK_K), T.float8_e4m3fn)
            a0 = T.alloc_fragment((M, 32), T.float8_e4m3fn)
            a1 = T.alloc_fragment((M, 32), T.float8_e4m3fn)
            part0 = T.alloc_fragment((M, N), T.float32)
            part1 = T.alloc_fragment((M, N), T.float32)
            acc = T.alloc_fragment((M, N), T.float32)
            T.clear(acc)
            for ko in T.Pipelined(K // BLOCK_K, num_stages=2):
                T.copy(a[0, ko * BLOCK_K], a_tile)
                T.copy(b[0, ko * BLOCK_K], b_tile)
                T.copy(a_tile[:, 0:32], a0)
                T.wgmma_gemm(a0, b_tile[:, 0:32], part0, transpose_B=True, clear_accum=True, policy=_ROWS)
                T.copy(a_tile[:, 32:64], a1)
                T.gemm(a1, b_tile[:, 32:64], part1, transpose_B=True, clear_accum=True, policy=_ROWS)
                for i, j in T.Parallel(M, N):
                    acc[i, j] += part0[i, j] + part1[i, j]
            T.copy(acc, out)

    return ring_kernel


@cache
def ring():
    """The stages of the kernel."""
    return extract(ring_kernel())


def inputs():
    """Random operands and a place for the result."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, K, generator=generator).to(torch.float8_e4m3fn) for rows in (M, N))
    return a, b, torch.zeros(M, N)
