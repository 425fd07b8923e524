"""Grouped output projection: each group of a token's heads by the group's own weights, FP8 or bf16.

out[t, g] = x[t, g] @ w[g].T for 8 groups (V4-Flash) or 16 (V4-Pro) of 4096 channels and 1024 outputs. A
column tile of the output belongs to one group, so it is a plain product whose tiles of x start at that
group's channels; sums are those of `fp8_gemm` and `bf16_gemm`. V4 report 2.3.3. Design: docs/gemm.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout

from dsv4_kernels import runtime
from dsv4_kernels.contract import Contract, require_input, require_shape, require_tensor
from dsv4_kernels.gemm import bf16_gemm, reference, wide_tile
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.scale import ue8m0_to_f32
from dsv4_kernels.tile.unroll import ring_unrolled

FP8_NAME, BF16_NAME = "wo_a_fp8", "wo_a_bf16"
BLOCK_K = 128  # channels a scale, and a partial sum
BLOCK_N = 128  # outputs a scale
WARPGROUP = 128  # threads
MAX_TOKENS = 2**31 - 256  # launch extents are int32
E8M0, F32 = "e8m0", "f32"  # kinds of scales
_SCALE_DTYPES = {E8M0: torch.float8_e8m0fnu, F32: torch.float32}
_COLUMNS = T.GemmWarpPolicy.FullCol  # warpgroups share out the columns of a product


@dataclass(frozen=True)
class Config:
    """Tile and schedule of the FP8 product.

    Attributes:
        block_m: tokens a tile.
        block_n: outputs a tile.
        num_stages: depth of the pipeline.
        warpgroups: of consumers; two share out the tokens, see `wide_tile`.
    """

    block_m: int
    block_n: int
    num_stages: int
    warpgroups: int


CONTRACT = Contract(
    (
        "0 <= m",
        "m <= MAX_TOKENS",
        "0 < groups",
        "groups <= 256",
        "0 < n",
        "n % 256 == 0",
        "n <= 65536",
        "0 < k",
        "k % 256 == 0",
        "k <= 65536",
    ),
    consts={"MAX_TOKENS": MAX_TOKENS},
)


def make_fp8_kernel(groups: int, n: int, k: int, scale: str, config: Config) -> Any:
    """Return the PrimFunc for groups x n x k weights; the number of tokens m stays symbolic."""
    if config.warpgroups > 1:
        return ring_unrolled(_make_wide(groups, n, k, scale, config), config.num_stages)
    return _make_few(groups, n, k, scale, config)


def _to_f32(value: Any, is_e8m0: bool) -> Any:
    return ue8m0_to_f32(T.cast(value, "int32"), 0) if is_e8m0 else value


def _make_few(groups: int, n: int, k: int, scale: str, config: Config) -> Any:
    m = T.dynamic("m")
    block_m, block_n = config.block_m, config.block_n
    is_e8m0 = scale == E8M0
    scale_dtype = "uint8" if is_e8m0 else "float32"
    blocks = k // BLOCK_K

    @T.prim_func
    def wo_a_fp8_kernel(
        x: T.Tensor[(m, groups * k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, groups * blocks), scale_dtype],
        w: T.Tensor[(groups * n, k), T.float8_e4m3fn],
        w_scale: T.Tensor[(groups * n // BLOCK_N, blocks), scale_dtype],
        out: T.Tensor[(m, groups * n), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, block_m), groups * n // block_n, threads=WARPGROUP) as (bm, bn):
            x_tile = T.alloc_shared((block_m, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, BLOCK_K), T.float8_e4m3fn)
            out_tile = T.alloc_shared((block_m, block_n), T.bfloat16)
            part = T.alloc_fragment((block_m, block_n), T.float32)
            factor = T.alloc_fragment((block_m,), T.float32)
            acc = T.alloc_fragment((block_m, block_n), T.float32)
            T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})
            # Written before the loop, out_tile has bytes of its own: the pipeline's are not reused for it.
            for i in T.Parallel(block_m):
                out_tile[i, 0] = T.cast(0, "bfloat16")
            T.clear(acc)
            for ko in T.Pipelined(blocks, num_stages=config.num_stages):
                T.copy(x[bm * block_m, bn * block_n // n * k + ko * BLOCK_K], x_tile)
                T.copy(w[bn * block_n, ko * BLOCK_K], w_tile)
                # Scales are asked for before the product, so that they arrive under it.
                for i in T.Parallel(block_m):
                    factor[i] = _to_f32(x_scale[bm * block_m + i, bn * block_n // n * blocks + ko], is_e8m0)
                T.gemm(x_tile, w_tile, part, transpose_B=True, clear_accum=True, policy=_COLUMNS)
                for i, j in T.Parallel(block_m, block_n):
                    acc[i, j] += part[i, j] * (
                        factor[i] * _to_f32(w_scale[(bn * block_n + j) // BLOCK_N, ko], is_e8m0)
                    )
            for i, j in T.Parallel(block_m, block_n):
                out_tile[i, j] = T.cast(acc[i, j], "bfloat16")
            T.copy(out_tile, out[bm * block_m, bn * block_n], disable_tma=True)

    return wo_a_fp8_kernel


def _make_wide(groups: int, n: int, k: int, scale: str, config: Config) -> Any:
    m = T.dynamic("m")
    block_m, block_n, half = config.block_m, config.block_n, wide_tile.HALF
    is_e8m0 = scale == E8M0
    scale_dtype = "uint8" if is_e8m0 else "float32"
    blocks = k // BLOCK_K
    is_async = blocks % wide_tile.COPY_SCALES == 0

    @T.prim_func
    def wo_a_fp8_kernel(
        x: T.Tensor[(m, groups * k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, groups * blocks), scale_dtype],
        w: T.Tensor[(groups * n, k), T.float8_e4m3fn],
        w_scale: T.Tensor[(groups * n // BLOCK_N, blocks), scale_dtype],
        out: T.Tensor[(m, groups * n), T.bfloat16],
    ):
        with T.Kernel(
            T.ceildiv(m, block_m), groups * n // block_n, threads=WARPGROUP * config.warpgroups
        ) as (bm, bn):
            x_tile = T.alloc_shared((block_m, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, BLOCK_K), T.float8_e4m3fn)
            x_scales = T.alloc_shared((block_m, blocks + wide_tile.PADDING), scale_dtype)
            w_scales = T.alloc_shared((block_n // BLOCK_N, blocks), scale_dtype)
            out_tile = T.alloc_shared((block_m, block_n), T.bfloat16)  # takes bytes of what is over by then
            part = T.alloc_fragment((block_m, half), T.float32)
            factor0 = T.alloc_fragment((block_m,), T.float32)
            factor1 = T.alloc_fragment((block_m,), T.float32)
            acc0 = T.alloc_fragment((block_m, half), T.float32)
            acc1 = T.alloc_fragment((block_m, half), T.float32)
            T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})
            group = bn * block_n // n
            if is_async:
                T.async_copy(
                    x_scale[bm * block_m : (bm + 1) * block_m, group * blocks : (group + 1) * blocks],
                    x_scales[:, 0:blocks],
                    coalesced_width=wide_tile.COPY_SCALES,
                )
                T.copy(w_scale[bn * 2 : bn * 2 + 2, 0:blocks], w_scales, disable_tma=True)
                T.ptx_wait_group(0)
            else:
                T.copy(
                    x_scale[bm * block_m : (bm + 1) * block_m, group * blocks : (group + 1) * blocks],
                    x_scales[:, 0:blocks],
                    disable_tma=True,
                )
                T.copy(w_scale[bn * 2 : bn * 2 + 2, 0:blocks], w_scales, disable_tma=True)
            T.clear(acc0)
            T.clear(acc1)
            for ko in T.Pipelined(blocks, num_stages=config.num_stages):
                T.copy(x[bm * block_m, bn * block_n // n * k + ko * BLOCK_K], x_tile)
                T.copy(w[bn * block_n, ko * BLOCK_K], w_tile)
                wide_tile.wide_stage(
                    x_tile,
                    w_tile,
                    x_scales,
                    w_scales,
                    part,
                    (factor0, factor1),
                    (acc0, acc1),
                    ko,
                    lambda value: _to_f32(value, is_e8m0),
                )
            for i, j in T.Parallel(block_m, half):
                out_tile[i, j] = T.cast(acc0[i, j], "bfloat16")
            for i, j in T.Parallel(block_m, half):
                out_tile[i, half + j] = T.cast(acc1[i, j], "bfloat16")
            T.copy(out_tile, out[bm * block_m, bn * block_n], disable_tma=True)

    return wo_a_fp8_kernel


def make_bf16_kernel(groups: int, n: int, k: int, config: bf16_gemm.Config) -> Any:
    """Return the PrimFunc for groups x n x k weights; the number of tokens m stays symbolic."""
    return bf16_gemm.make_kernel(n, k, bf16_gemm.BF16, config, groups)


_FEW_FP8 = Config(block_m=64, block_n=64, num_stages=8, warpgroups=1)
_FEW_WIDE_FP8 = Config(block_m=64, block_n=128, num_stages=6, warpgroups=1)
_WIDE = 16384  # outputs of all groups from which 128 of them a tile fill the machine
# Tokens up to which tiles of one warpgroup are chosen: one of them a column where these fill the machine.
_FEW, _FEW_SLIM = 64, 128
# bf16: with up to 16 tokens shared memory holds weights, not padding; each next tile has the tokens with
# which its blocks run side by side, on nearly all multiprocessors (8 and 16 groups of 1024 outputs).
_FEWEST_BF16 = bf16_gemm.Config(block_m=16, block_n=64, block_k=256, num_stages=5, weights_first=True)
_SQUARE_BF16 = bf16_gemm.Config(block_m=64, block_n=64, block_k=128, num_stages=5)
_TALL_BF16 = bf16_gemm.Config(block_m=128, block_n=64, block_k=128, num_stages=4, warpgroups=2)
_BROAD_BF16 = bf16_gemm.Config(block_m=64, block_n=128, block_k=128, num_stages=4, warpgroups=2)
_LARGE_BF16 = bf16_gemm.Config(block_m=128, block_n=128, block_k=64, num_stages=6, warpgroups=2)
_LARGEST_BF16 = bf16_gemm.Config(
    block_m=128, block_n=256, block_k=64, num_stages=4, warpgroups=2, lends_ring=True
)
_SLIM_BF16 = (
    (16, _FEWEST_BF16),
    (64, _SQUARE_BF16),
    (128, _TALL_BF16),
    (256, _LARGE_BF16),
    (MAX_TOKENS, _LARGEST_BF16),
)
_WIDE_BF16 = ((16, _FEWEST_BF16), (64, _BROAD_BF16), (128, _LARGE_BF16), (MAX_TOKENS, _LARGEST_BF16))
GROUPS, N, K = (8, 16), 1024, 4096  # Flash and Pro


def _require_operands(
    name: str, x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype
) -> tuple[int, int, int, int]:
    require_tensor(name, "x", x, dtype=dtype, ndim=3)
    require_tensor(name, "w", w, dtype=dtype, ndim=3, device=x.device)
    (m, groups, k), n = x.shape, w.shape[1]
    CONTRACT.check(name, m=m, groups=groups, n=n, k=k)
    require_shape(name, "w", w, (groups, n, k))
    return m, groups, n, k


def _empty_output(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], x.shape[1], w.shape[1]), dtype=torch.bfloat16)


@operator(FP8_NAME, lambda x, x_scale, w, w_scale: _empty_output(x, w))
def wo_a_fp8(x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """Project each group of FP8 head outputs: out[:, g] = (x * x_scale)[:, g] @ (w * w_scale)[g].T.

    The product of each 128 channels is scaled in fp32 by x_scale * w_scale, itself rounded to fp32, and
    added in the order of k, whatever m is, so a token's row of `out` depends, bit for bit, on its row of `x`
    alone. A nan scale (byte 255 of e8m0) makes the outputs it touches nan.

    Args:
        x: [m, groups, k] e4m3, contiguous; m = 0 is allowed.
        x_scale: [m, groups, k / 128] e8m0 or float32, contiguous.
        w: [groups, n, k] e4m3, contiguous.
        w_scale: [groups, n / 128, k / 128], of x_scale's dtype, contiguous.
        All 16-byte aligned, on one device; n and k multiples of 256 up to 65536, up to 256 groups.

    Returns:
        [m, groups, n] bf16.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    m, groups, n, k = _require_operands(FP8_NAME, x, w, torch.float8_e4m3fn)
    scale = F32 if x_scale.dtype == torch.float32 else E8M0
    dtype = _SCALE_DTYPES[scale]
    require_input(FP8_NAME, "x_scale", x_scale, (m, groups, k // BLOCK_K), dtype=dtype, device=x.device)
    require_input(
        FP8_NAME, "w_scale", w_scale, (groups, n // BLOCK_N, k // BLOCK_K), dtype=dtype, device=x.device
    )
    if runtime.uses_reference(x):
        return reference.wo_a_fp8(x, x_scale, w, w_scale)
    out = _empty_output(x, w)
    if m:
        if scale == E8M0:
            x_scale, w_scale = x_scale.view(torch.uint8), w_scale.view(torch.uint8)
        args = (x.view(m, -1), x_scale.view(m, -1), w.view(-1, k), w_scale.view(-1, k // BLOCK_K))
        variant = _select_fp8(m, groups, n, k, scale)
        runtime.launch(make_fp8_kernel, variant.kwargs, (*args, out.view(m, -1)))
    return out


@operator(BF16_NAME, _empty_output)
def wo_a_bf16(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Project each group of bf16 head outputs: out[:, g] = x[:, g] @ w[g].T.

    Products are exact and are added as in `bf16_gemm`, whatever m is, so a token's row of `out` depends, bit
    for bit, on its row of `x` alone.

    Args:
        x: [m, groups, k] bf16, contiguous; m = 0 is allowed.
        w: [groups, n, k] bf16, contiguous.
        Both 16-byte aligned, on one device; n and k multiples of 256 up to 65536, up to 256 groups.

    Returns:
        [m, groups, n] bf16.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    m, groups, n, k = _require_operands(BF16_NAME, x, w, torch.bfloat16)
    if runtime.uses_reference(x):
        return reference.wo_a_bf16(x, w)
    out = _empty_output(x, w)
    if m:
        variant = _select_bf16(m, groups, n, k)
        runtime.launch(make_bf16_kernel, variant.kwargs, (x.view(m, -1), w.view(-1, k), out.view(m, -1)))
    return out


def _many_fp8(k: int, scale: str) -> Config | None:
    """Return the widest tile, None where its scales leave no room for a pipeline."""
    depth = wide_tile.num_stages(k, 1 if scale == E8M0 else 4)
    return None if depth is None else Config(wide_tile.BLOCK_M, wide_tile.BLOCK_N, depth, warpgroups=2)


@cache
def _variants_fp8(groups: int, n: int, k: int, scale: str) -> tuple[Variant, Variant]:
    """Return the variants for few and for many tokens."""
    few_fp8 = _FEW_WIDE_FP8 if groups * n >= _WIDE else _FEW_FP8
    pair = few_fp8, _many_fp8(k, scale) or few_fp8
    name, dims = f"g{groups}-n{n}-k{k}-{scale}", {"groups": groups, "n": n, "k": k, "scale": scale}
    few, many = (Variant(f"{name}-m{c.block_m}", {**dims, "config": c}) for c in pair)
    return few, many


def _select_fp8(m: int, groups: int, n: int, k: int, scale: str) -> Variant:
    few, many = _variants_fp8(groups, n, k, scale)
    return few if m <= (_FEW if groups * n >= _WIDE else _FEW_SLIM) else many


@cache
def _variants_bf16(groups: int, n: int, k: int) -> tuple[tuple[int, Variant], ...]:
    """Return (largest number of tokens, variant) pairs; every one adds in the same order."""
    dims = {"groups": groups, "n": n, "k": k}
    return tuple(
        (limit, Variant(f"g{groups}-n{n}-k{k}-{c.block_m}x{c.block_n}x{c.block_k}", {**dims, "config": c}))
        for limit, c in (_WIDE_BF16 if groups * n >= _WIDE else _SLIM_BF16)
    )


def _select_bf16(m: int, groups: int, n: int, k: int) -> Variant:
    return next(variant for limit, variant in _variants_bf16(groups, n, k) if m <= limit)


def _bf16(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device).to(torch.bfloat16)


def _make_bf16_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    m, groups, n, k = (dims[name] for name in ("m", "groups", "n", "k"))
    return _bf16((m, groups, k), generator), _bf16((groups, n, k), generator)


def _make_fp8_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    x, w = (t.to(torch.float8_e4m3fn) for t in _make_bf16_inputs(dims, device, seed))

    def scales(*shape: int) -> torch.Tensor:
        if dims["f32_scales"]:
            return torch.rand(*shape, generator=generator, device=device) + 0.5
        low, high = 120, 130  # biased exponents
        codes = torch.randint(low, high, shape, generator=generator, device=device, dtype=torch.uint8)
        return codes.view(torch.float8_e8m0fnu)

    m, groups, n, blocks = dims["m"], dims["groups"], dims["n"], dims["k"] // BLOCK_K
    return x, scales(m, groups, blocks), w, scales(groups, n // BLOCK_N, blocks)


def _case(m: int, groups: int, n: int, k: int, *tags: str, f32_scales: int | None = None) -> Case:
    dims = {"m": m, "groups": groups, "n": n, "k": k}
    if f32_scales is not None:
        dims["f32_scales"] = f32_scales
    return Case(f"m{m}-g{groups}-n{n}-k{k}" + ("-f32" if f32_scales else ""), dims, tags)


def _num_elements(dims: Mapping[str, int]) -> int:
    """Return how many elements both operands have."""
    return dims["groups"] * dims["k"] * (dims["m"] + dims["n"])


_BENCH_TOKENS = (1, 16, 64, 128, 1024, 4096)
_SOURCE = "DeepSeek-V4 report 2.3.3 (grouped output projection); DeepGEMM fp8_einsum bhr,hdr->bhd"
SPECS = (
    KernelSpec(
        name=FP8_NAME,
        fn=wo_a_fp8,
        reference=reference.wo_a_fp8,
        make_inputs=_make_fp8_inputs,
        make_kernel=make_fp8_kernel,
        variants=tuple(v for g in GROUPS for v in _variants_fp8(g, N, K, E8M0)),
        select=lambda d: _select_fp8(d["m"], d["groups"], d["n"], d["k"], F32 if d["f32_scales"] else E8M0),
        contract=CONTRACT,
        cases=(
            _case(0, 2, 256, 256, "test", f32_scales=0),
            _case(1, 2, 256, 256, "test", f32_scales=0),
            _case(35, 2, 256, 512, "test", f32_scales=1),
            _case(67, 3, 256, 256, "test", f32_scales=0),
            _case(130, 2, 512, 256, "test", f32_scales=1),
            *(_case(m, g, N, K, "gpu", "bench", f32_scales=0) for g in GROUPS for m in _BENCH_TOKENS),
        ),
        num_bytes=lambda d: (
            _num_elements(d)
            + d["groups"] * (d["m"] + d["n"] // BLOCK_N) * (d["k"] // BLOCK_K) * (4 if d["f32_scales"] else 1)
            + 2 * d["m"] * d["groups"] * d["n"]
        ),
        num_flops=lambda d: 2 * d["m"] * d["groups"] * d["n"] * d["k"],
        tolerance=reference.wo_a_fp8_tolerance,
        peers=("deepgemm",),
        source=_SOURCE,
        small={"groups": 2, "n": 512, "k": 1536},
    ),
    KernelSpec(
        name=BF16_NAME,
        fn=wo_a_bf16,
        reference=reference.wo_a_bf16,
        make_inputs=_make_bf16_inputs,
        make_kernel=make_bf16_kernel,
        variants=tuple(v for g in GROUPS for _, v in _variants_bf16(g, N, K)),
        select=lambda d: _select_bf16(d["m"], d["groups"], d["n"], d["k"]),
        contract=CONTRACT,
        cases=(
            _case(0, 2, 256, 256, "test"),
            _case(1, 2, 256, 256, "test"),
            _case(67, 3, 256, 512, "test"),
            _case(130, 2, 512, 256, "test"),
            *(_case(m, g, N, K, "gpu", "bench") for g in GROUPS for m in _BENCH_TOKENS),
        ),
        num_bytes=lambda d: 2 * (_num_elements(d) + d["m"] * d["groups"] * d["n"]),
        num_flops=lambda d: 2 * d["m"] * d["groups"] * d["n"] * d["k"],
        tolerance=reference.wo_a_bf16_tolerance,
        peers=("torch_matmul",),
        source=_SOURCE,
        small={"groups": 2, "n": 512, "k": 1536},
    ),
)
