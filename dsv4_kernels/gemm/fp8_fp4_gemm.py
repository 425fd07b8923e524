"""out = x @ w.T with FP8 activations and packed FP4 weights (report 5.2.1; V4's routed experts).

The packed weights are the tensor core's M operand: each thread expands exactly the elements of its own
register fragment, so nothing is expanded in memory of any kind. One instruction covers one 1 x 32 weight
scale, and its partial sum is scaled in fp32 (by a power of two: exact) before it is added; no exponent
range is assumed. Design, predictions and measurements: docs/fp8_fp4_gemm.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T
from tilelang.layout import make_half_bank_swizzled_layout

from dsv4_kernels import runtime
from dsv4_kernels.contract import Contract, require_input, require_shape, require_tensor
from dsv4_kernels.gemm import reference
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.late import released_late
from dsv4_kernels.tile.scale import ue8m0_to_f32
from dsv4_kernels.tile.shared import MAX_SHARED_BYTES

NAME = "fp8_fp4_gemm"
BLOCK_K = 128  # channels a scale of x, and a pipeline stage
SCALE_K = 32  # channels a scale of w, and one wgmma of e4m3
THREADS_A_ROW = 2  # a warpgroup of 128 threads owns 64 rows of w
MAX_TOKENS = 2**31 - 256  # launch extents are int32


@dataclass(frozen=True)
class Config:
    """Tile and schedule.

    Attributes:
        block_m: tokens a tile; the instruction's N.
        block_n: weight rows a tile, 64 for each warpgroup of consumers.
        num_stages: depth of the pipeline of weight and activation tiles.
        overlap: expand the next 32 channels while the tensor core multiplies the last; holds four
            partial sums in registers instead of one.
        blocks: that share a multiprocessor, so that one starts while another ends.
    """

    block_m: int
    block_n: int
    num_stages: int
    overlap: bool
    blocks: int = 1


CONTRACT = Contract(
    ("0 <= m", "m <= MAX_TOKENS", "0 < n", "n % BLOCK_N == 0", "0 < k", "k % BLOCK_K == 0", "k <= 65536"),
    consts={"MAX_TOKENS": MAX_TOKENS, "BLOCK_N": 128, "BLOCK_K": BLOCK_K},
)


def make_kernel(n: int, k: int, config: Config) -> Any:
    """Return the PrimFunc for n x k weights; the number of tokens m stays symbolic.

    `w_scale` holds the four scales of 128 channels a word: the bytes of [n, k / 32], seen as int32.
    """
    return _make_overlapped(n, k, config) if config.overlap else _make_serial(n, k, config)


def _make_overlapped(n: int, k: int, config: Config) -> Any:
    m = T.dynamic("m")
    block_m, block_n = config.block_m, config.block_n

    @T.macro
    def expand(w_tile: Any, packed: Any, expanded: Any, group: int):
        T.copy(w_tile[:, group * (SCALE_K // 2) : (group + 1) * (SCALE_K // 2)], packed)
        T.copy(T.view(packed, (block_n, SCALE_K), T.float4_e2m1fn), expanded)

    @T.prim_func
    def fp8_fp4_gemm_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, k // BLOCK_K), T.uint8],
        w: T.Tensor[(n, k // 2), T.uint8],
        w_scale: T.Tensor[(n, k // BLOCK_K), T.int32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, block_m), n // block_n, threads=THREADS_A_ROW * block_n) as (bm, bn):
            if config.blocks > 1:
                T.disable_warp_group_reg_alloc()  # a share of the registers is too small to be shared out
                T.annotate_min_blocks_per_sm(config.blocks)
            x_tile = T.alloc_shared((block_m, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, BLOCK_K // 2), T.uint8)
            x_scales = T.alloc_shared((k // BLOCK_K, block_m), T.float32)
            w_scales = T.alloc_shared((k // BLOCK_K, block_n), T.int32)
            bytes0 = T.alloc_fragment((block_n, SCALE_K // 2), T.uint8)
            bytes1 = T.alloc_fragment((block_n, SCALE_K // 2), T.uint8)
            bytes2 = T.alloc_fragment((block_n, SCALE_K // 2), T.uint8)
            bytes3 = T.alloc_fragment((block_n, SCALE_K // 2), T.uint8)
            w0 = T.alloc_fragment((block_n, SCALE_K), T.float8_e4m3fn)
            w1 = T.alloc_fragment((block_n, SCALE_K), T.float8_e4m3fn)
            w2 = T.alloc_fragment((block_n, SCALE_K), T.float8_e4m3fn)
            w3 = T.alloc_fragment((block_n, SCALE_K), T.float8_e4m3fn)
            part0 = T.alloc_fragment((block_n, block_m), T.float32)
            part1 = T.alloc_fragment((block_n, block_m), T.float32)
            part2 = T.alloc_fragment((block_n, block_m), T.float32)
            part3 = T.alloc_fragment((block_n, block_m), T.float32)
            acc = T.alloc_fragment((block_n, block_m), T.float32)
            scale0 = T.alloc_fragment((block_n,), T.float32)
            scale1 = T.alloc_fragment((block_n,), T.float32)
            scale2 = T.alloc_fragment((block_n,), T.float32)
            scale3 = T.alloc_fragment((block_n,), T.float32)

            # 64-byte rows: without the swizzle four of eight rows meet in one bank.
            T.annotate_layout({w_tile: make_half_bank_swizzled_layout(w_tile)})
            for kb, j in T.Parallel(k // BLOCK_K, block_m):
                x_scales[kb, j] = ue8m0_to_f32(T.cast(x_scale[bm * block_m + j, kb], "int32"), 0)
            for i, kb in T.Parallel(block_n, k // BLOCK_K):
                w_scales[kb, i] = w_scale[bn * block_n + i, kb]
            T.clear(acc)
            for ko in T.Pipelined(k // BLOCK_K, num_stages=config.num_stages):
                T.copy(x[bm * block_m, ko * BLOCK_K], x_tile)
                T.copy(w[bn * block_n, ko * (BLOCK_K // 2)], w_tile)
                expand(w_tile, bytes0, w0, 0)
                T.wgmma_gemm(w0, x_tile[:, 0:32], part0, transpose_B=True, clear_accum=True, policy=_ROWS)
                expand(w_tile, bytes1, w1, 1)
                T.wgmma_gemm(w1, x_tile[:, 32:64], part1, transpose_B=True, clear_accum=True, policy=_ROWS)
                expand(w_tile, bytes2, w2, 2)
                T.wgmma_gemm(w2, x_tile[:, 64:96], part2, transpose_B=True, clear_accum=True, policy=_ROWS)
                expand(w_tile, bytes3, w3, 3)
                # All four products are waited for here, and only then are tiles handed back: the bytes of
                # the last one have come by then, which its operand in registers is made of.
                T.wgmma_gemm(w3, x_tile[:, 96:128], part3, transpose_B=True, clear_accum=True, policy=_ROWS)
                T.wait_wgmma(0)
                for i in T.Parallel(block_n):
                    scale0[i] = ue8m0_to_f32(w_scales[ko, i], 0)
                    scale1[i] = ue8m0_to_f32(w_scales[ko, i], 1)
                    scale2[i] = ue8m0_to_f32(w_scales[ko, i], 2)
                    scale3[i] = ue8m0_to_f32(w_scales[ko, i], 3)
                for i, j in T.Parallel(block_n, block_m):
                    acc[i, j] += (
                        part0[i, j] * scale0[i]
                        + part1[i, j] * scale1[i]
                        + part2[i, j] * scale2[i]
                        + part3[i, j] * scale3[i]
                    ) * x_scales[ko, j]
            for i, j in T.Parallel(block_n, block_m):
                out[bm * block_m + j, bn * block_n + i] = T.cast(acc[i, j], "bfloat16")

    return released_late(fp8_fp4_gemm_kernel)


def _make_serial(n: int, k: int, config: Config) -> Any:
    m = T.dynamic("m")
    block_m, block_n = config.block_m, config.block_n

    @T.prim_func
    def fp8_fp4_gemm_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, k // BLOCK_K), T.uint8],
        w: T.Tensor[(n, k // 2), T.uint8],
        w_scale: T.Tensor[(n, k // BLOCK_K), T.int32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, block_m), n // block_n, threads=THREADS_A_ROW * block_n) as (bm, bn):
            x_tile = T.alloc_shared((block_m, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, BLOCK_K // 2), T.uint8)
            x_scales = T.alloc_shared((k // BLOCK_K, block_m), T.float32)
            w_scales = T.alloc_shared((k // BLOCK_K, block_n), T.int32)
            packed = T.alloc_fragment((block_n, SCALE_K // 2), T.uint8)
            expanded = T.alloc_fragment((block_n, SCALE_K), T.float8_e4m3fn)
            part = T.alloc_fragment((block_n, block_m), T.float32)
            block_sum = T.alloc_fragment((block_n, block_m), T.float32)
            acc = T.alloc_fragment((block_n, block_m), T.float32)
            scale = T.alloc_fragment((block_n,), T.float32)

            # 64-byte rows: without the swizzle four of eight rows meet in one bank.
            T.annotate_layout({w_tile: make_half_bank_swizzled_layout(w_tile)})
            for kb, j in T.Parallel(k // BLOCK_K, block_m):
                x_scales[kb, j] = ue8m0_to_f32(T.cast(x_scale[bm * block_m + j, kb], "int32"), 0)
            for i, kb in T.Parallel(block_n, k // BLOCK_K):
                w_scales[kb, i] = w_scale[bn * block_n + i, kb]
            T.clear(acc)
            for ko in T.Pipelined(k // BLOCK_K, num_stages=config.num_stages):
                T.copy(x[bm * block_m, ko * BLOCK_K], x_tile)
                T.copy(w[bn * block_n, ko * (BLOCK_K // 2)], w_tile)
                T.clear(block_sum)
                for group in T.unroll(BLOCK_K // SCALE_K):
                    T.copy(w_tile[:, group * (SCALE_K // 2) : (group + 1) * (SCALE_K // 2)], packed)
                    T.copy(T.view(packed, (block_n, SCALE_K), T.float4_e2m1fn), expanded)
                    T.gemm(
                        expanded,
                        x_tile[:, group * SCALE_K : (group + 1) * SCALE_K],
                        part,
                        transpose_B=True,
                        clear_accum=True,
                        policy=_ROWS,
                    )
                    for i in T.Parallel(block_n):
                        scale[i] = ue8m0_to_f32(w_scales[ko, i], group)
                    for i, j in T.Parallel(block_n, block_m):
                        block_sum[i, j] += part[i, j] * scale[i]
                for i, j in T.Parallel(block_n, block_m):
                    acc[i, j] += block_sum[i, j] * x_scales[ko, j]
            for i, j in T.Parallel(block_n, block_m):
                out[bm * block_m + j, bn * block_n + i] = T.cast(acc[i, j], "bfloat16")

    return fp8_fp4_gemm_kernel


_ROWS = T.GemmWarpPolicy.FullRow  # warpgroups share no row of w, so each element is expanded once

_FEW = Config(block_m=16, block_n=64, num_stages=6, overlap=True)
_FEW_OF_MANY = Config(block_m=16, block_n=64, num_stages=4, overlap=True, blocks=4)
_SHARED_BYTES = MAX_SHARED_BYTES - 1024  # less what mbarriers take
_MANY = 16384  # weight rows from which there are tiles enough for several blocks a multiprocessor


def _shared_bytes(k: int, config: Config) -> int:
    """Return the shared memory of a tile: its ring, and a word of scales for each row and 128 channels."""
    stage = config.block_m * BLOCK_K + config.block_n * (BLOCK_K // 2)
    return config.num_stages * stage + 4 * (config.block_m + config.block_n) * (k // BLOCK_K)


@cache
def _configs(n: int, k: int) -> tuple[tuple[int, Config], ...]:
    """Return (largest number of tokens, tile) pairs; long rows have tiles whose scales fit, for all tokens.

    Every one adds in the same order, so a row's bits do not depend on m.
    """
    tiles = (
        (16, _FEW_OF_MANY if n >= _MANY else _FEW),
        (32, Config(block_m=32, block_n=64, num_stages=6, overlap=True)),
        (128, Config(block_m=64, block_n=64, num_stages=4, overlap=True)),
        (MAX_TOKENS, Config(block_m=128, block_n=64, num_stages=4, overlap=False)),
    )
    fitting = [tile for tile in tiles if _shared_bytes(k, tile[1]) <= _SHARED_BYTES]
    return (*fitting[:-1], (MAX_TOKENS, fitting[-1][1]))


# n x k of V4's products: experts (Flash, Pro; gate and up together, down), then its dense layers.
SHAPES = (
    (4096, 4096),
    (4096, 2048),
    (6144, 7168),
    (7168, 3072),
    (1536, 4096),
    (32768, 1024),
    (4096, 8192),
    (65536, 1536),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
)
_EXPERT_SHAPES = SHAPES[:4]


def _empty_output(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor
) -> torch.Tensor:
    return x.new_empty((x.shape[0], w.shape[0]), dtype=torch.bfloat16)


@operator(NAME, _empty_output)
def fp8_fp4_gemm(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor
) -> torch.Tensor:
    """Multiply FP8 activations by FP4 weights: out = (x * x_scale) @ (w * w_scale).T.

    The product of each 32 channels is scaled in fp32 by a power of two and added in the order of k,
    whatever m is, so a row of `out` depends, bit for bit, on its row of `x` alone. Sums of 128
    channels are held in fp32 before x_scale is applied: weights scaled past 2**110 may overflow to inf.
    A nan scale (byte 255) makes the outputs it touches nan.

    Args:
        x: [m, k] e4m3, contiguous; m = 0 is allowed.
        x_scale: [m, k / 128] e8m0, contiguous.
        w: [n, k / 2] uint8, two e2m1 a byte, the even channel in the low nibble, contiguous.
        w_scale: [n, k / 32] e8m0, contiguous.
        All 16-byte aligned, on one device; n and k multiples of 128, k up to 65536.

    Returns:
        [m, n] bf16.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(NAME, "x", x, dtype=torch.float8_e4m3fn, ndim=2)
    require_tensor(NAME, "w", w, dtype=torch.uint8, ndim=2, device=x.device)
    (m, k), n = x.shape, w.shape[0]
    CONTRACT.check(NAME, m=m, n=n, k=k)
    require_shape(NAME, "w", w, (n, k // 2))
    require_input(NAME, "x_scale", x_scale, (m, k // BLOCK_K), dtype=torch.float8_e8m0fnu, device=x.device)
    require_input(NAME, "w_scale", w_scale, (n, k // SCALE_K), dtype=torch.float8_e8m0fnu, device=x.device)
    if runtime.uses_reference(x):
        return reference.fp8_fp4_gemm(x, x_scale, w, w_scale)
    out = _empty_output(x, x_scale, w, w_scale)
    if m:
        args = (x, x_scale.view(torch.uint8), w, w_scale.view(torch.int32), out)
        runtime.launch(make_kernel, _select(m, n, k).kwargs, args)
    return out


@cache
def _variant(n: int, k: int, config: Config) -> Variant:
    return Variant(f"n{n}-k{k}-m{config.block_m}", {"n": n, "k": k, "config": config})


def _select(m: int, n: int, k: int) -> Variant:
    return _variant(n, k, next(config for limit, config in _configs(n, k) if m <= limit))


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    m, n, k = dims["m"], dims["n"], dims["k"]
    generator = torch.Generator(device).manual_seed(seed)

    def codes(rows: int, columns: int, low: int, high: int) -> torch.Tensor:
        return torch.randint(
            low, high, (rows, columns), generator=generator, device=device, dtype=torch.uint8
        )

    x = torch.randn(m, k, generator=generator, device=device).to(torch.float8_e4m3fn)
    x_scale = codes(m, k // BLOCK_K, 120, 130).view(torch.float8_e8m0fnu)
    return x, x_scale, codes(n, k // 2, 0, 256), codes(n, k // SCALE_K, 115, 127).view(torch.float8_e8m0fnu)


def _case(m: int, n: int, k: int, *tags: str) -> Case:
    return Case(f"m{m}-n{n}-k{k}", {"m": m, "n": n, "k": k}, tags)


SPEC = KernelSpec(
    name=NAME,
    fn=fp8_fp4_gemm,
    reference=reference.fp8_fp4_gemm,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(n, k, config) for n, k in SHAPES for _, config in _configs(n, k)),
    select=lambda dims: _select(dims["m"], dims["n"], dims["k"]),
    contract=CONTRACT,
    cases=(
        _case(0, 128, 128, "test"),
        _case(1, 128, 128, "test"),
        _case(17, 128, 256, "test"),
        _case(33, 256, 384, "test"),
        _case(64, 256, 512, "test"),
        _case(131, 128, 128, "test"),
        *(_case(m, n, k, "gpu", "bench") for n, k in _EXPERT_SHAPES for m in (1, 16, 64, 128, 1024, 4096)),
        *(_case(m, n, k, "gpu") for n, k in SHAPES[4:] for m in (3, 17, 64, 200)),
        _case(65536, 4096, 2048, "gpu"),
    ),
    num_bytes=lambda d: d["m"] * d["k"] * 129 // 128 + d["n"] * d["k"] * 17 // 32 + 2 * d["m"] * d["n"],
    num_flops=lambda d: 2 * d["m"] * d["n"] * d["k"],
    tolerance=reference.fp8_fp4_gemm_tolerance,
    peers=("torch_scaled_mm", "deepgemm", "humming"),
    source="DeepSeek-V4 report 5.2.1; reference kernel fp4_gemm",
    small={"n": 128, "k": 1024},
)
