"""Rows of several experts, each times its own FP8 weights; contiguous rows, scales 1 x 128 and 128 x 128.

One launch for all experts; a tile has one expert, and `expert[row]` says which. Sums are added in the order
of the dense product `fp8_gemm`. Layout of rows: `grouped_layout`. Source: V3 report 3.3.2; see docs/gemm.md.
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
from dsv4_kernels.gemm import grouped_reference, wide_tile
from dsv4_kernels.gemm.fp8_tile import BLOCK_K, FEW_STAGE_K, few_stage, rows_first_stage
from dsv4_kernels.gemm.grouped_cases import SHAPES, busy_experts, cases_of, experts_of
from dsv4_kernels.gemm.grouped_layout import ALIGNMENTS, iterations, require_rows, tile_for
from dsv4_kernels.registry import KernelSpec, Variant, operator
from dsv4_kernels.tile.scale import ue8m0_to_f32
from dsv4_kernels.tile.unroll import ring_unrolled

NAME = "grouped_fp8_gemm"
BLOCK_N = 128  # weight rows a scale
WARPGROUP = 128  # threads
INSTRUCTION_M = 64  # rows of one wgmma
MAX_ROWS = 65535 * ALIGNMENTS[0]  # the second launch extent is at most 65535


@dataclass(frozen=True)
class Config:
    """Tile and schedule.

    Attributes:
        block_m: rows a tile, and where experts may begin.
        block_n: weight rows a tile.
        num_stages: depth of the pipeline.
        weights_first: weights are the instruction's rows, four blocks of channels a stage; else rows of x
            are, and the warpgroups share out the weight rows.
        warpgroups: of consumers.
    """

    block_m: int
    block_n: int
    num_stages: int
    weights_first: bool
    warpgroups: int


CONTRACT = Contract(
    (
        "0 <= m",
        "m <= MAX_ROWS",
        "0 < n",
        "n % BLOCK_N == 0",
        "0 < k",
        "k % STAGE_K == 0",
        "k <= 65536",
        "0 < num_experts",
        "num_experts <= 4096",
        "expert < num_experts",
    ),
    consts={"MAX_ROWS": MAX_ROWS, "BLOCK_N": BLOCK_N, "STAGE_K": FEW_STAGE_K},
    tensors=frozenset({"expert"}),
)


def make_kernel(n: int, k: int, num_experts: int, alignment: int, config: Config) -> Any:
    """Return the PrimFunc for num_experts of n x k weights; the number of rows m stays symbolic."""
    make = _make_weights_first if config.weights_first else _make_rows_first
    depth = wide_tile.num_stages(k, scale_bytes=1)
    if config.block_n == wide_tile.BLOCK_N and n % wide_tile.BLOCK_N == 0 and depth is not None:
        return ring_unrolled(_make_wide(n, k, num_experts, config, depth), depth)
    return make(n, k, num_experts, config)


def _ue8m0(scale: Any) -> Any:
    return ue8m0_to_f32(T.cast(scale, "int32"), 0)


def _make_rows_first(n: int, k: int, num_experts: int, config: Config) -> Any:
    m = T.dynamic("m")
    block_n = config.block_n if n % config.block_n == 0 else BLOCK_N
    block_m, is_halved = config.block_m, config.block_m > INSTRUCTION_M
    rows = block_m // 2 if is_halved else block_m

    @T.prim_func
    def grouped_fp8_gemm_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, k // BLOCK_K), T.uint8],
        w: T.Tensor[(num_experts, n, k), T.float8_e4m3fn],
        w_scale: T.Tensor[(num_experts, n // BLOCK_N, k // BLOCK_K), T.uint8],
        expert: T.Tensor[(m,), T.int32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        # Weight rows first: blocks that run together read the same rows of x, and an expert at a time.
        with T.Kernel(n // block_n, T.ceildiv(m, block_m), threads=WARPGROUP * config.warpgroups) as (bn, bm):
            x_tile = T.alloc_shared((block_m, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, BLOCK_K), T.float8_e4m3fn)
            out_tile = T.alloc_shared((block_m, block_n), T.bfloat16)
            part = T.alloc_fragment((rows, block_n), T.float32)
            factor = T.alloc_fragment((rows,), T.float32)
            acc = T.alloc_fragment((rows, block_n), T.float32)
            T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})
            # Written before the loop, out_tile has bytes of its own: the pipeline's are not reused for it.
            for i in T.Parallel(block_m):
                out_tile[i, 0] = T.cast(0, "bfloat16")
            T.clear(acc)
            factor1, acc1 = None, None
            if is_halved:
                factor1 = T.alloc_fragment((rows,), T.float32)
                acc1 = T.alloc_fragment((rows, block_n), T.float32)
                T.clear(acc1)
            e = T.max(expert[bm * block_m], 0)  # a tile of padding alone multiplies nothing
            for ko in T.Pipelined(
                iterations(expert[bm * block_m], k // BLOCK_K), num_stages=config.num_stages
            ):
                T.copy(x[bm * block_m, ko * BLOCK_K], x_tile)
                T.copy(w[e, bn * block_n, ko * BLOCK_K], w_tile)
                rows_first_stage(
                    x_tile,
                    w_tile,
                    part,
                    (factor, factor1),
                    acc,
                    acc1,
                    ko,
                    lambda i, kb: _ue8m0(x_scale[bm * block_m + i, kb]),
                    lambda j, kb: _ue8m0(w_scale[e, (bn * block_n + j) // BLOCK_N, kb]),
                )
            for i, j in T.Parallel(rows, block_n):
                out_tile[i, j] = T.cast(acc[i, j], "bfloat16")
            if is_halved:
                for i, j in T.Parallel(rows, block_n):
                    out_tile[rows + i, j] = T.cast(acc1[i, j], "bfloat16")  # pyright: ignore[reportOptionalSubscript]
            T.copy(out_tile, out[bm * block_m, bn * block_n], disable_tma=True)

    return grouped_fp8_gemm_kernel


def _make_wide(n: int, k: int, num_experts: int, config: Config, depth: int) -> Any:
    m = T.dynamic("m")
    block_m, block_n, half, blocks = config.block_m, config.block_n, wide_tile.HALF, k // BLOCK_K
    is_async = blocks % wide_tile.COPY_SCALES == 0

    @T.prim_func
    def grouped_fp8_gemm_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, blocks), T.uint8],
        w: T.Tensor[(num_experts, n, k), T.float8_e4m3fn],
        w_scale: T.Tensor[(num_experts, n // BLOCK_N, blocks), T.uint8],
        expert: T.Tensor[(m,), T.int32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        # Weight rows first: blocks that run together read the same rows of x, and an expert at a time.
        with T.Kernel(n // block_n, T.ceildiv(m, block_m), threads=WARPGROUP * config.warpgroups) as (bn, bm):
            x_tile = T.alloc_shared((block_m, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, BLOCK_K), T.float8_e4m3fn)
            x_scales = T.alloc_shared((block_m, blocks + wide_tile.PADDING), T.uint8)
            w_scales = T.alloc_shared((block_n // BLOCK_N, blocks), T.uint8)
            out_tile = T.alloc_shared((block_m, block_n), T.bfloat16)  # takes bytes of what is over by then
            part = T.alloc_fragment((block_m, half), T.float32)
            factor0 = T.alloc_fragment((block_m,), T.float32)
            factor1 = T.alloc_fragment((block_m,), T.float32)
            acc0 = T.alloc_fragment((block_m, half), T.float32)
            acc1 = T.alloc_fragment((block_m, half), T.float32)
            T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})
            e = T.max(expert[bm * block_m], 0)  # a tile of padding alone: by any expert
            if is_async:
                T.async_copy(
                    x_scale[bm * block_m : (bm + 1) * block_m, 0:blocks],
                    x_scales[:, 0:blocks],
                    coalesced_width=wide_tile.COPY_SCALES,
                )
                T.copy(w_scale[e, bn * 2 : bn * 2 + 2, 0:blocks], w_scales, disable_tma=True)
                T.ptx_wait_group(0)
            else:
                T.copy(
                    x_scale[bm * block_m : (bm + 1) * block_m, 0:blocks],
                    x_scales[:, 0:blocks],
                    disable_tma=True,
                )
                T.copy(w_scale[e, bn * 2 : bn * 2 + 2, 0:blocks], w_scales, disable_tma=True)
            T.clear(acc0)
            T.clear(acc1)
            for ko in T.Pipelined(blocks, num_stages=depth):
                T.copy(x[bm * block_m, ko * BLOCK_K], x_tile)
                T.copy(w[e, bn * block_n, ko * BLOCK_K], w_tile)
                wide_tile.wide_stage(
                    x_tile, w_tile, x_scales, w_scales, part, (factor0, factor1), (acc0, acc1), ko, _ue8m0
                )
            for i, j in T.Parallel(block_m, half):
                out_tile[i, j] = T.cast(acc0[i, j], "bfloat16")
            for i, j in T.Parallel(block_m, half):
                out_tile[i, half + j] = T.cast(acc1[i, j], "bfloat16")
            T.copy(out_tile, out[bm * block_m, bn * block_n], disable_tma=True)

    return grouped_fp8_gemm_kernel


def _make_weights_first(n: int, k: int, num_experts: int, config: Config) -> Any:
    m = T.dynamic("m")
    block_m, block_n = config.block_m, config.block_n

    @T.prim_func
    def grouped_fp8_gemm_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, k // BLOCK_K), T.uint8],
        w: T.Tensor[(num_experts, n, k), T.float8_e4m3fn],
        w_scale: T.Tensor[(num_experts, n // BLOCK_N, k // BLOCK_K), T.uint8],
        expert: T.Tensor[(m,), T.int32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(n // block_n, T.ceildiv(m, block_m), threads=WARPGROUP * config.warpgroups) as (bn, bm):
            x_tile = T.alloc_shared((block_m, FEW_STAGE_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, FEW_STAGE_K), T.float8_e4m3fn)
            scales = T.alloc_shared((k // BLOCK_K, block_m), T.float32)
            acc = T.alloc_fragment((block_n, block_m), T.float32)
            e = T.max(expert[bm * block_m], 0)  # a tile of padding alone multiplies nothing
            for kb, j in T.Parallel(k // BLOCK_K, block_m):
                scales[kb, j] = _ue8m0(x_scale[bm * block_m + j, kb]) * _ue8m0(
                    w_scale[e, bn * block_n // BLOCK_N, kb]
                )
            T.clear(acc)
            for ko in T.Pipelined(
                iterations(expert[bm * block_m], k // FEW_STAGE_K), num_stages=config.num_stages
            ):
                T.copy(x[bm * block_m, ko * FEW_STAGE_K], x_tile)
                T.copy(w[e, bn * block_n, ko * FEW_STAGE_K], w_tile)
                few_stage(x_tile, w_tile, scales, acc, ko * 4, block_n, block_m)
            for i, j in T.Parallel(block_n, block_m):
                out[bm * block_m + j, bn * block_n + i] = T.cast(acc[i, j], "bfloat16")

    return grouped_fp8_gemm_kernel


# One tile for each alignment; every one adds the same sums in the same order.
_CONFIGS = {
    16: Config(block_m=16, block_n=64, num_stages=4, weights_first=True, warpgroups=1),
    64: Config(block_m=64, block_n=128, num_stages=6, weights_first=False, warpgroups=1),
    128: Config(block_m=128, block_n=256, num_stages=3, weights_first=False, warpgroups=2),
}


def _empty_output(x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], w.shape[1]), dtype=torch.bfloat16)


@operator(NAME, _empty_output)
def grouped_fp8_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    expert: torch.Tensor,
    alignment: int,
) -> torch.Tensor:
    """Multiply each row by the FP8 weights of its expert.

    The product of each 128 channels is scaled in fp32 by x_scale * w_scale and added in the order of k.
    So a row of `out` depends, bit for bit, on its row of `x` and its expert alone, and is that of `fp8_gemm`
    with the expert's weights. A nan scale (byte 255) makes the outputs it touches nan.

    Args:
        x: [m, k] e4m3, contiguous; m a multiple of alignment, 0 is allowed.
        x_scale: [m, k / 128] e8m0, contiguous.
        w: [num_experts, n, k] e4m3, contiguous.
        w_scale: [num_experts, n / 128, k / 128] e8m0, contiguous.
        expert: [m] int32, below num_experts (not checked: it stays on the device), contiguous. Rows of
            one aligned block have one expert, or -1 from some row on: see `grouped_layout`.
        alignment: of the experts' first rows, one of `grouped_layout.ALIGNMENTS`.
        All 16-byte aligned, on one device; n a multiple of 128, k of 512 up to 65536; at most 1048560 rows,
        4096 experts.

    Returns:
        [m, n] bf16; rows whose expert is negative hold unspecified values.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(NAME, "w", w, dtype=torch.float8_e4m3fn, ndim=3)
    num_experts, n, k = w.shape
    rows = x, x_scale, (BLOCK_K,), expert, alignment
    require_rows(NAME, CONTRACT, *rows, w.device, n=n, num_experts=num_experts)
    m = x.shape[0]
    require_shape(NAME, "x", x, (m, k))
    shape = num_experts, n // BLOCK_N, k // BLOCK_K
    require_input(NAME, "w_scale", w_scale, shape, dtype=torch.float8_e8m0fnu, device=w.device)
    if runtime.uses_reference(x):
        return grouped_reference.grouped_fp8_gemm(x, x_scale, w, w_scale, expert, alignment)
    out = _empty_output(x, x_scale, w)
    if m:
        args = (x, x_scale.view(torch.uint8), w, w_scale.view(torch.uint8), expert, out)
        runtime.launch(make_kernel, _variant(n, k, num_experts, tile_for(alignment, _CONFIGS)).kwargs, args)
    return out


@cache
def _variant(n: int, k: int, num_experts: int, alignment: int) -> Variant:
    kwargs = {"n": n, "k": k, "num_experts": num_experts, "alignment": alignment}
    return Variant(f"n{n}-k{k}-e{num_experts}-a{alignment}", {**kwargs, "config": _CONFIGS[alignment]})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[Any, ...]:
    n, k, num_experts, alignment = dims["n"], dims["k"], dims["num_experts"], dims["alignment"]
    m = -(-dims["m"] // alignment) * alignment
    generator = torch.Generator(device).manual_seed(seed)

    def e4m3(*shape: int) -> torch.Tensor:
        values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        for part in values if len(shape) > 2 else (values,):
            part.copy_(torch.randn(part.shape, generator=generator, device=device))
        return values

    def scales(*shape: int) -> torch.Tensor:
        low, high = 120, 130  # biased exponents
        codes = torch.randint(low, high, shape, generator=generator, device=device, dtype=torch.uint8)
        return codes.view(torch.float8_e8m0fnu)

    w = e4m3(num_experts, n, k), scales(num_experts, n // BLOCK_N, k // BLOCK_K)
    return e4m3(m, k), scales(m, k // BLOCK_K), *w, experts_of(dims, m, device), alignment


SPEC = KernelSpec(
    name=NAME,
    fn=grouped_fp8_gemm,
    reference=grouped_reference.grouped_fp8_gemm,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(*shape, alignment) for shape in SHAPES for alignment in _CONFIGS),
    select=lambda d: _variant(d["n"], d["k"], d["num_experts"], tile_for(d["alignment"], _CONFIGS)),
    contract=CONTRACT,
    cases=cases_of(SHAPES, FEW_STAGE_K),
    num_bytes=lambda d: (
        d["rows"] * (d["k"] + d["k"] // BLOCK_K + d["n"] * 2)
        + busy_experts(d) * (d["n"] * d["k"] + d["n"] // BLOCK_N * (d["k"] // BLOCK_K))
    ),
    num_flops=lambda d: 2 * d["rows"] * d["n"] * d["k"],
    tolerance=grouped_reference.grouped_fp8_gemm_tolerance,
    peers=("deepgemm",),
    row_invariant=False,  # rows of a batch come with their experts: tests/kernels/test_grouped.py
    shared_rows={"expert": "alignment"},
    source="DeepSeek-V3 report 3.3.2; V4 inference fp8_gemm; DeepGEMM's contiguous layout",
    small={"n": 256, "k": 1024, "num_experts": 4},
)
