"""out = x @ w.T with FP8 operands: one scale for 1 x 128 of x and for 128 x 128 of w (V4's dense layers).

Producer warps bring tiles by TMA; each consumer warpgroup multiplies 128 channels, waits, and adds the
scaled partial sum to its fp32 accumulators while the other warpgroup has the tensor core. Few tokens
are the narrow side of the instruction, so that weights fill its 64 rows. Every variant adds the same
partial sums in the same order. Source: DeepSeek-V3 report 3.3.2; V4 inference fp8_gemm. Design: docs/gemm.md.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout, make_half_bank_swizzled_layout

from dsv4_kernels import runtime
from dsv4_kernels.contract import Contract, require_input, require_shape, require_tensor
from dsv4_kernels.gemm import (
    fp8_gemm_async,
    fp8_gemm_runs,
    fp8_gemm_tall,
    fp8_gemm_tiles,
    reference,
    wide_tile,
)
from dsv4_kernels.gemm.fp8_gemm_choice import BLOCK_K, BLOCK_N, E8M0, F32, MAX_TOKENS, Config, configs
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.scale import ue8m0_to_f32
from dsv4_kernels.tile.unroll import ring_unrolled

NAME = "fp8_gemm"
WARPGROUP = 128  # threads
INSTRUCTION_M = 64  # rows of one wgmma
_SCALE_DTYPES = {E8M0: torch.float8_e8m0fnu, F32: torch.float32}
CONTRACT = Contract(
    ("0 <= m", "m <= MAX_TOKENS", "0 < n", "n % BLOCK_N == 0", "0 < k", "k % BLOCK_K == 0", "k <= 65536"),
    consts={"MAX_TOKENS": MAX_TOKENS, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K},
)
_COLUMNS = T.GemmWarpPolicy.FullCol  # warpgroups share out the columns of a product


def make_kernel(n: int, k: int, scale: str, config: Config) -> Any:
    """Return the PrimFunc for n x k weights; the number of tokens m stays symbolic."""
    if config.form == "columns":
        make = _make_weights_first if config.weights_first else _make_tokens_first
        return make(n, k, scale, config)
    if config.form == "wide":
        return ring_unrolled(_make_wide(n, k, scale, config), config.num_stages)
    dtype = "uint8" if scale == E8M0 else "float32"
    if config.form == "tiles":
        return fp8_gemm_tiles.make_tiles(n, k, dtype, config.tiles, config.num_stages, config.held_columns)
    if config.form == "runs":
        return fp8_gemm_runs.make_runs(n, k, dtype, config.block_m, config.tiles, config.num_stages)
    if config.form == "tall":
        return fp8_gemm_tall.make_tall(n, k, dtype, config.num_stages)
    return fp8_gemm_async.make_flight(n, k, dtype, config.block_m, config.block_n, config.num_stages)


def _to_f32(scale: Any, is_e8m0: bool) -> Any:
    return ue8m0_to_f32(T.cast(scale, "int32"), 0) if is_e8m0 else scale


def _make_tokens_first(n: int, k: int, scale: str, config: Config) -> Any:
    m = T.dynamic("m")
    block_m, block_n = config.block_m, config.block_n
    # Accumulators and partial sums of the largest tile do not fit the registers together: rows are
    # multiplied half by half, through the same registers for partial sums.
    is_halved = block_m > INSTRUCTION_M
    rows = block_m // 2 if is_halved else block_m
    is_e8m0 = scale == E8M0
    scale_dtype = "uint8" if is_e8m0 else "float32"
    full_row = 64  # bf16 in 128 bytes, all banks
    swizzled = make_half_bank_swizzled_layout if block_n % full_row else make_full_bank_swizzled_layout

    @T.prim_func
    def fp8_gemm_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, k // BLOCK_K), scale_dtype],
        w: T.Tensor[(n, k), T.float8_e4m3fn],
        w_scale: T.Tensor[(n // BLOCK_N, k // BLOCK_K), scale_dtype],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, block_m), n // block_n, threads=WARPGROUP * config.warpgroups) as (bm, bn):
            x_tile = T.alloc_shared((block_m, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, BLOCK_K), T.float8_e4m3fn)
            out_tile = T.alloc_shared((block_m, block_n), T.bfloat16)
            part = T.alloc_fragment((rows, block_n), T.float32)
            factor = T.alloc_fragment((rows,), T.float32)
            acc = T.alloc_fragment((rows, block_n), T.float32)
            T.annotate_layout({out_tile: swizzled(out_tile)})
            # Written before the loop, out_tile has bytes of its own: the pipeline's are not reused for it.
            for i in T.Parallel(block_m):
                out_tile[i, 0] = T.cast(0, "bfloat16")
            T.clear(acc)
            if is_halved:
                factor1 = T.alloc_fragment((rows,), T.float32)
                acc1 = T.alloc_fragment((rows, block_n), T.float32)
                T.clear(acc1)
            for ko in T.Pipelined(k // BLOCK_K, num_stages=config.num_stages):
                T.copy(x[bm * block_m, ko * BLOCK_K], x_tile)
                T.copy(w[bn * block_n, ko * BLOCK_K], w_tile)
                # Scales are asked for before the product, so that they arrive under it.
                for i in T.Parallel(rows):
                    factor[i] = _to_f32(x_scale[bm * block_m + i, ko], is_e8m0)
                T.gemm(x_tile[0:rows, :], w_tile, part, transpose_B=True, clear_accum=True, policy=_COLUMNS)
                for i, j in T.Parallel(rows, block_n):
                    acc[i, j] += part[i, j] * (
                        factor[i] * _to_f32(w_scale[(bn * block_n + j) // BLOCK_N, ko], is_e8m0)
                    )
                if is_halved:
                    for i in T.Parallel(rows):
                        factor1[i] = _to_f32(x_scale[bm * block_m + rows + i, ko], is_e8m0)  # pyright: ignore[reportPossiblyUnboundVariable]
                    T.gemm(
                        x_tile[rows:block_m, :],
                        w_tile,
                        part,
                        transpose_B=True,
                        clear_accum=True,
                        policy=_COLUMNS,
                    )
                    for i, j in T.Parallel(rows, block_n):
                        acc1[i, j] += part[i, j] * (  # pyright: ignore[reportPossiblyUnboundVariable]
                            factor1[i] * _to_f32(w_scale[(bn * block_n + j) // BLOCK_N, ko], is_e8m0)  # pyright: ignore[reportPossiblyUnboundVariable]
                        )
            for i, j in T.Parallel(rows, block_n):
                out_tile[i, j] = T.cast(acc[i, j], "bfloat16")
            if is_halved:
                for i, j in T.Parallel(rows, block_n):
                    out_tile[rows + i, j] = T.cast(acc1[i, j], "bfloat16")  # pyright: ignore[reportPossiblyUnboundVariable]
            T.copy(out_tile, out[bm * block_m, bn * block_n], disable_tma=True)

    return fp8_gemm_kernel


def _make_wide(n: int, k: int, scale: str, config: Config) -> Any:
    m = T.dynamic("m")
    block_m, block_n, half, blocks = config.block_m, config.block_n, wide_tile.HALF, k // BLOCK_K
    is_e8m0 = scale == E8M0
    scale_dtype = "uint8" if is_e8m0 else "float32"
    is_async = blocks % wide_tile.COPY_SCALES == 0

    @T.prim_func
    def fp8_gemm_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, blocks), scale_dtype],
        w: T.Tensor[(n, k), T.float8_e4m3fn],
        w_scale: T.Tensor[(n // BLOCK_N, blocks), scale_dtype],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, block_m), n // block_n, threads=WARPGROUP * config.warpgroups) as (bm, bn):
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
            if is_async:
                T.async_copy(
                    x_scale[bm * block_m : (bm + 1) * block_m, 0:blocks],
                    x_scales[:, 0:blocks],
                    coalesced_width=wide_tile.COPY_SCALES,
                )
                T.copy(w_scale[bn * 2 : bn * 2 + 2, 0:blocks], w_scales, disable_tma=True)
                T.ptx_wait_group(0)
            else:
                T.copy(
                    x_scale[bm * block_m : (bm + 1) * block_m, 0:blocks],
                    x_scales[:, 0:blocks],
                    disable_tma=True,
                )
                T.copy(w_scale[bn * 2 : bn * 2 + 2, 0:blocks], w_scales, disable_tma=True)
            T.clear(acc0)
            T.clear(acc1)
            for ko in T.Pipelined(blocks, num_stages=config.num_stages):
                T.copy(x[bm * block_m, ko * BLOCK_K], x_tile)
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

    return fp8_gemm_kernel


def _make_weights_first(n: int, k: int, scale: str, config: Config) -> Any:
    m = T.dynamic("m")
    block_m, block_n = config.block_m, config.block_n
    is_e8m0 = scale == E8M0
    scale_dtype = "uint8" if is_e8m0 else "float32"
    blocks = _blocks_a_stage(k)

    @T.prim_func
    def fp8_gemm_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, k // BLOCK_K), scale_dtype],
        w: T.Tensor[(n, k), T.float8_e4m3fn],
        w_scale: T.Tensor[(n // BLOCK_N, k // BLOCK_K), scale_dtype],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, block_m), n // block_n, threads=WARPGROUP * config.warpgroups) as (bm, bn):
            if config.blocks_per_sm > 1:
                T.annotate_min_blocks_per_sm(config.blocks_per_sm)
                T.disable_warp_group_reg_alloc()
            x_tile = T.alloc_shared((block_m, blocks * BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, blocks * BLOCK_K), T.float8_e4m3fn)
            scales = T.alloc_shared((k // BLOCK_K, block_m), T.float32)
            part0 = T.alloc_fragment((block_n, block_m), T.float32)
            part1 = T.alloc_fragment((block_n, block_m), T.float32)
            part2 = T.alloc_fragment((block_n, block_m), T.float32)
            part3 = T.alloc_fragment((block_n, block_m), T.float32)
            acc = T.alloc_fragment((block_n, block_m), T.float32)
            for kb, j in T.Parallel(k // BLOCK_K, block_m):
                scales[kb, j] = _to_f32(x_scale[bm * block_m + j, kb], is_e8m0) * _to_f32(
                    w_scale[bn * block_n // BLOCK_N, kb], is_e8m0
                )
            T.clear(acc)
            for ko in T.Pipelined(k // (blocks * BLOCK_K), num_stages=config.num_stages):
                T.copy(x[bm * block_m, ko * blocks * BLOCK_K], x_tile)
                T.copy(w[bn * block_n, ko * blocks * BLOCK_K], w_tile)
                # All products of a stage but the last are under way together. The last is a plain gemm,
                # which waits for all: the compiler hands the tiles back after the statement.
                if blocks == 4:
                    T.wgmma_gemm(
                        w_tile[:, 0:128], x_tile[:, 0:128], part0, transpose_B=True, clear_accum=True
                    )
                    T.wgmma_gemm(
                        w_tile[:, 128:256], x_tile[:, 128:256], part1, transpose_B=True, clear_accum=True
                    )
                    T.wgmma_gemm(
                        w_tile[:, 256:384], x_tile[:, 256:384], part2, transpose_B=True, clear_accum=True
                    )
                    T.gemm(w_tile[:, 384:512], x_tile[:, 384:512], part3, transpose_B=True, clear_accum=True)
                    for i, j in T.Parallel(block_n, block_m):
                        acc[i, j] += part0[i, j] * scales[ko * blocks, j]
                    for i, j in T.Parallel(block_n, block_m):
                        acc[i, j] += part1[i, j] * scales[ko * blocks + 1, j]
                    for i, j in T.Parallel(block_n, block_m):
                        acc[i, j] += part2[i, j] * scales[ko * blocks + 2, j]
                    for i, j in T.Parallel(block_n, block_m):
                        acc[i, j] += part3[i, j] * scales[ko * blocks + 3, j]
                elif blocks == 2:
                    T.wgmma_gemm(
                        w_tile[:, 0:128], x_tile[:, 0:128], part0, transpose_B=True, clear_accum=True
                    )
                    T.gemm(w_tile[:, 128:256], x_tile[:, 128:256], part1, transpose_B=True, clear_accum=True)
                    for i, j in T.Parallel(block_n, block_m):
                        acc[i, j] += part0[i, j] * scales[ko * blocks, j]
                    for i, j in T.Parallel(block_n, block_m):
                        acc[i, j] += part1[i, j] * scales[ko * blocks + 1, j]
                else:
                    T.gemm(w_tile, x_tile, part0, transpose_B=True, clear_accum=True)
                    for i, j in T.Parallel(block_n, block_m):
                        acc[i, j] += part0[i, j] * scales[ko, j]
            for i, j in T.Parallel(block_n, block_m):
                out[bm * block_m + j, bn * block_n + i] = T.cast(acc[i, j], "bfloat16")

    return fp8_gemm_kernel


def _blocks_a_stage(k: int) -> int:
    return next(blocks for blocks in (4, 2, 1) if k % (blocks * BLOCK_K) == 0)


# n x k of V4's dense products (Flash, Pro).
SHAPES = (
    (1536, 4096),
    (32768, 1024),
    (4096, 8192),
    (65536, 1536),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
)
_F32_SHAPES = ((4096, 7168),)  # V3's scale format
# m x n x k of batches that tiles take which those of `SHAPES` for benchmarks do not.
_BETWEEN = (
    (512, 4096, 7168),
    (256, 4096, 7168),
    (256, 4096, 8192),
    (256, 7168, 2048),
    (512, 7168, 2048),
    (2048, 7168, 2048),
    (512, 1536, 4096),
    (1408, 1536, 4096),
    (2048, 1536, 4096),
    (256, 7168, 16384),
    (256, 32768, 1024),
    (256, 65536, 1536),
)


def _empty_output(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor
) -> torch.Tensor:
    return x.new_empty((x.shape[0], w.shape[0]), dtype=torch.bfloat16)


@operator(NAME, _empty_output)
def fp8_gemm(x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """Multiply FP8 activations by FP8 weights: out = (x * x_scale) @ (w * w_scale).T.

    The product of each 128 channels is scaled in fp32 by x_scale * w_scale, itself rounded to fp32, and
    added in the order of k, whatever m is, so a row of `out` depends, bit for bit, on its row of `x`
    alone. A nan scale (byte 255 of e8m0) makes the outputs it touches nan.

    Args:
        x: [m, k] e4m3, contiguous; m = 0 is allowed.
        x_scale: [m, k / 128] e8m0 or float32, contiguous.
        w: [n, k] e4m3, contiguous.
        w_scale: [n / 128, k / 128], of x_scale's dtype, contiguous.
        All 16-byte aligned, on one device; n and k multiples of 128, k up to 65536.

    Returns:
        [m, n] bf16.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(NAME, "x", x, dtype=torch.float8_e4m3fn, ndim=2)
    require_tensor(NAME, "w", w, dtype=torch.float8_e4m3fn, ndim=2, device=x.device)
    (m, k), n = x.shape, w.shape[0]
    CONTRACT.check(NAME, m=m, n=n, k=k)
    require_shape(NAME, "w", w, (n, k))
    scale = F32 if x_scale.dtype == torch.float32 else E8M0
    dtype = _SCALE_DTYPES[scale]
    require_input(NAME, "x_scale", x_scale, (m, k // BLOCK_K), dtype=dtype, device=x.device)
    require_input(NAME, "w_scale", w_scale, (n // BLOCK_N, k // BLOCK_K), dtype=dtype, device=x.device)
    if runtime.uses_reference(x):
        return reference.fp8_gemm(x, x_scale, w, w_scale)
    out = _empty_output(x, x_scale, w, w_scale)
    if m:
        if scale == E8M0:
            x_scale, w_scale = x_scale.view(torch.uint8), w_scale.view(torch.uint8)
        runtime.launch(make_kernel, _select(m, n, k, scale).kwargs, (x, x_scale, w, w_scale, out))
    return out


@cache
def _variant(n: int, k: int, scale: str, config: Config) -> Variant:
    name = f"n{n}-k{k}-{scale}-m{config.block_m}" + ("" if config.weights_first else f"x{config.block_n}")
    name += f"x{config.tiles}" if config.tiles > 1 else ""
    return Variant(name, {"n": n, "k": k, "scale": scale, "config": config})


@cache
def _variants(n: int, k: int, scale: str) -> tuple[tuple[int, Variant], ...]:
    return tuple((limit, _variant(n, k, scale, config)) for limit, config in configs(n, k, scale))


def _select(m: int, n: int, k: int, scale: str) -> Variant:
    return next(variant for limit, variant in _variants(n, k, scale) if m <= limit)


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    m, n, k = dims["m"], dims["n"], dims["k"]
    generator = torch.Generator(device).manual_seed(seed)

    def e4m3(rows: int) -> torch.Tensor:
        return torch.randn(rows, k, generator=generator, device=device).to(torch.float8_e4m3fn)

    def scales(rows: int) -> torch.Tensor:
        shape = (rows, k // BLOCK_K)
        if dims["f32_scales"]:
            return torch.rand(*shape, generator=generator, device=device) + 0.5
        low, high = 120, 130  # biased exponents
        codes = torch.randint(low, high, shape, generator=generator, device=device, dtype=torch.uint8)
        return codes.view(torch.float8_e8m0fnu)

    return e4m3(m), scales(m), e4m3(n), scales(n // BLOCK_N)


def _case(m: int, n: int, k: int, *tags: str, f32_scales: int = 0) -> Case:
    name = f"m{m}-n{n}-k{k}" + ("-f32" if f32_scales else "")
    return Case(name, {"m": m, "n": n, "k": k, "f32_scales": f32_scales}, tags)


SPEC = KernelSpec(
    name=NAME,
    fn=fp8_gemm,
    reference=reference.fp8_gemm,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(
        {
            variant.id: variant
            for scale, shapes in ((E8M0, SHAPES), (F32, _F32_SHAPES))
            for n, k in shapes
            for _, variant in _variants(n, k, scale)
        }.values()
    ),
    select=lambda d: _select(d["m"], d["n"], d["k"], F32 if d["f32_scales"] else E8M0),
    contract=CONTRACT,
    cases=(
        _case(0, 128, 128, "test"),
        _case(1, 128, 128, "test"),
        _case(17, 128, 512, "test"),
        _case(33, 256, 384, "test", f32_scales=1),
        _case(40, 128, 256, "test"),
        _case(131, 128, 256, "test"),
        _case(257, 256, 128, "test", f32_scales=1),
        _case(257, 256, 512, "test"),
        *(_case(m, n, k, "gpu", "bench") for n, k in SHAPES for m in (1, 16, 64, 128, 1024, 4096)),
        *(_case(m, n, k, "gpu", "bench", f32_scales=1) for n, k in _F32_SHAPES for m in (64, 4096)),
        *(_case(m, n, k, "gpu", "bench") for m, n, k in _BETWEEN),
    ),
    num_bytes=lambda d: (
        (d["m"] + d["n"]) * d["k"]
        + (d["m"] + d["n"] // BLOCK_N) * (d["k"] // BLOCK_K) * (4 if d["f32_scales"] else 1)
        + d["m"] * d["n"] * 2
    ),
    num_flops=lambda d: 2 * d["m"] * d["n"] * d["k"],
    tolerance=reference.fp8_gemm_tolerance,
    peers=("torch_scaled_mm", "deepgemm"),
    source="DeepSeek-V3 report 3.3.2; V4 inference fp8_gemm",
    small={"n": 256, "k": 1024},
)
