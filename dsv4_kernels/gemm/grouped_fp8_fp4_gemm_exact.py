"""Rows of several experts, each times its own FP4 weights as they came: exact for any scales of both.

One launch for all experts; a tile has one expert, and `expert[row]` says which. Scales of x are one for
1 x 128, as the reference kernel has them, or one for 1 x 32, as MegaMoE has them. Layouts of rows:
`grouped_layout`. Source: DeepSeek-V4 report 5.2.1; DeepGEMM MegaMoE's scales of x. Design: docs/gemm.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T
from tilelang.layout import make_half_bank_swizzled_layout

from dsv4_kernels import runtime
from dsv4_kernels.contract import Contract, require_input, require_shape, require_tensor
from dsv4_kernels.gemm import exact_tile, grouped_reference
from dsv4_kernels.gemm.exact_tile import BLOCK_K, SCALE_K
from dsv4_kernels.gemm.grouped_cases import SHAPES, busy_experts, cases_of, experts_of
from dsv4_kernels.gemm.grouped_layout import ALIGNMENTS, iterations, require_rows, tile_for
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.late import released_late
from dsv4_kernels.tile.scale import ue8m0_to_f32

NAME = "grouped_fp8_fp4_gemm_exact"
INSTRUCTION_M = 64  # weight rows a warpgroup
WARPGROUP = 128  # threads
MAX_ROWS = 65535 * ALIGNMENTS[0]  # the second launch extent is at most 65535
MAX_K = 16384  # channels whose scales fit shared memory beside the stages, with 1 x 32 scales of 64 rows
_TILES = (16, 64)  # rows
_X_BLOCKS = (BLOCK_K, SCALE_K)  # channels a scale of x


@dataclass(frozen=True)
class Config:
    """Tile and schedule.

    Attributes:
        block_m: rows a tile.
        num_stages: depth of the pipeline of 128 channels a stage.
        blocks: that share a multiprocessor, so that one's products run under another's widening.
        warpgroups: of consumers, which share out the weight rows, to the same end.
    """

    block_m: int
    num_stages: int
    blocks: int = 1
    warpgroups: int = 1


CONTRACT = Contract(
    (
        "0 <= m",
        "m <= MAX_ROWS",
        "0 < n",
        "n % BLOCK_N == 0",
        "0 < k",
        "k % BLOCK_K == 0",
        "k <= MAX_K",
        "0 < num_experts",
        "num_experts <= 4096",
        "expert < num_experts",
    ),
    consts={"MAX_ROWS": MAX_ROWS, "BLOCK_N": 128, "BLOCK_K": BLOCK_K, "MAX_K": MAX_K},
    tensors=frozenset({"expert"}),
)


def make_kernel(n: int, k: int, num_experts: int, alignment: int, x_block: int, config: Config) -> Any:
    """Return the PrimFunc for num_experts of n x k weights; the number of rows m stays symbolic.

    `w_scale` holds the four scales of 128 channels a word: the bytes of [num_experts, n, k / 32] as int32; so
    does `x_scale` where there is one for 32 channels.
    """
    m = T.dynamic("m")
    block_m, block_n = config.block_m, INSTRUCTION_M * config.warpgroups
    words, groups = k // BLOCK_K, BLOCK_K // SCALE_K
    is_fine = x_block == SCALE_K
    scale_dtype = "int32" if is_fine else "uint8"

    @T.prim_func
    def grouped_fp8_fp4_gemm_exact_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, words), scale_dtype],
        w: T.Tensor[(num_experts, n, k // 2), T.uint8],
        w_scale: T.Tensor[(num_experts, n, words), T.int32],
        expert: T.Tensor[(m,), T.int32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(n // block_n, T.ceildiv(m, block_m), threads=WARPGROUP * config.warpgroups) as (bn, bm):
            if config.blocks > 1:
                T.disable_warp_group_reg_alloc()  # a share of the registers is too small to be shared out
                T.annotate_min_blocks_per_sm(config.blocks)
            x_tile = T.alloc_shared((block_m, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, BLOCK_K // 2), T.uint8)
            x_scales = T.alloc_shared((k // x_block, block_m), T.float32)
            w_scales = T.alloc_shared((block_n, words + exact_tile.PADDING), T.int32)
            acc = T.alloc_fragment((block_n, block_m), T.float32)
            # 64-byte rows: without the swizzle four of eight rows meet in one bank.
            T.annotate_layout({w_tile: make_half_bank_swizzled_layout(w_tile)})
            e = T.max(expert[bm * block_m], 0)  # a tile of padding alone multiplies nothing
            if is_fine:
                for kb, j in T.Parallel(words, block_m):
                    word = x_scale[bm * block_m + j, kb]
                    x_scales[kb * groups, j] = ue8m0_to_f32(word, 0)
                    x_scales[kb * groups + 1, j] = ue8m0_to_f32(word, 1)
                    x_scales[kb * groups + 2, j] = ue8m0_to_f32(word, 2)
                    x_scales[kb * groups + 3, j] = ue8m0_to_f32(word, 3)
            else:
                for kb, j in T.Parallel(words, block_m):
                    x_scales[kb, j] = ue8m0_to_f32(T.cast(x_scale[bm * block_m + j, kb], "int32"), 0)
            for i, kb in T.Parallel(block_n, words):
                w_scales[i, kb] = w_scale[e, bn * block_n + i, kb]
            T.clear(acc)
            for ko in T.Pipelined(iterations(expert[bm * block_m], words), num_stages=config.num_stages):
                T.copy(x[bm * block_m, ko * BLOCK_K], x_tile)
                T.copy(w[e, bn * block_n, ko * (BLOCK_K // 2)], w_tile)
                exact_tile.stage(
                    x_tile,
                    w_tile,
                    w_scales,
                    acc,
                    ko,
                    _combine(x_scales, x_block),
                    block_m,
                    block_n,
                )
            for i, j in T.Parallel(block_n, block_m):
                out[bm * block_m + j, bn * block_n + i] = T.cast(acc[i, j], "bfloat16")

    return released_late(grouped_fp8_fp4_gemm_exact_kernel)


def _combine(x_scales: Any, x_block: int) -> Callable[[tuple, tuple, Any, Any], Any]:
    """Return how four sums of 32 channels become what is added: a block's scale last, others one by one."""
    if x_block == BLOCK_K:
        return lambda p, s, j, kb: (p[0] * s[0] + p[1] * s[1] + p[2] * s[2] + p[3] * s[3]) * x_scales[kb, j]
    groups = BLOCK_K // SCALE_K
    return lambda p, s, j, kb: (
        p[0] * s[0] * x_scales[kb * groups, j]
        + p[1] * s[1] * x_scales[kb * groups + 1, j]
        + p[2] * s[2] * x_scales[kb * groups + 2, j]
        + p[3] * s[3] * x_scales[kb * groups + 3, j]
    )


_FEW = Config(block_m=16, num_stages=4, blocks=4)
_SOME = Config(block_m=64, num_stages=4)
_MANY = Config(block_m=64, num_stages=4, warpgroups=2)
_MANY_K = 12288  # channels whose scales fit shared memory beside the stages of two warpgroups


def _config(block_m: int, k: int) -> Config:
    if block_m == _FEW.block_m:
        return _FEW
    return _MANY if k <= _MANY_K else _SOME


def _empty_output(x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], w.shape[1]), dtype=torch.bfloat16)


@operator(NAME, _empty_output)
def grouped_fp8_fp4_gemm_exact(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    expert: torch.Tensor,
    alignment: int,
) -> torch.Tensor:
    """Multiply each row by the FP4 weights of its expert; no range of exponents is assumed.

    Products of 32 channels are scaled by powers of two in fp32. With scales of x for 1 x 128, four of
    them are added before that scale is applied, as in `fp8_fp4_gemm`; sums of 128 channels are added in the
    order of k. So a row of `out` depends, bit for bit, on its row of `x` and its expert alone. A nan scale
    (byte 255) makes the outputs it touches nan.

    Args:
        x: [m, k] e4m3, contiguous; m a multiple of alignment, 0 is allowed.
        x_scale: [m, k / 128] or [m, k / 32] e8m0, contiguous.
        w: [num_experts, n, k / 2] uint8, two e2m1 a byte, the even channel in the low nibble, contiguous.
        w_scale: [num_experts, n, k / 32] e8m0, contiguous.
        expert: [m] int32, below num_experts (not checked: it stays on the device), contiguous. Rows of
            one aligned block have one expert, or -1 from some row on: see `grouped_layout`.
        alignment: of the experts' first rows, one of `grouped_layout.ALIGNMENTS`.
        All 16-byte aligned, on one device; n a multiple of 128, k of 128 up to 16384; at most 1048560 rows,
        4096 experts.

    Returns:
        [m, n] bf16; rows whose expert is negative hold unspecified values.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(NAME, "w", w, dtype=torch.uint8, ndim=3)
    num_experts, n, half = w.shape
    rows = x, x_scale, _X_BLOCKS, expert, alignment
    x_block = require_rows(NAME, CONTRACT, *rows, w.device, n=n, num_experts=num_experts)
    m, k = x.shape[0], 2 * half
    require_shape(NAME, "x", x, (m, k))
    shape = num_experts, n, k // SCALE_K
    require_input(NAME, "w_scale", w_scale, shape, dtype=torch.float8_e8m0fnu, device=w.device)
    if runtime.uses_reference(x):
        return grouped_reference.grouped_fp8_fp4_gemm_exact(x, x_scale, w, w_scale, expert, alignment)
    out = _empty_output(x, x_scale, w)
    if m:
        scales = x_scale.view(torch.int32 if x_block == SCALE_K else torch.uint8)
        args = (x, scales, w, w_scale.view(torch.int32), expert, out)
        variant = _variant(n, k, num_experts, tile_for(alignment, _TILES), x_block)
        runtime.launch(make_kernel, variant.kwargs, args)
    return out


@cache
def _variant(n: int, k: int, num_experts: int, alignment: int, x_block: int) -> Variant:
    dims = {"n": n, "k": k, "num_experts": num_experts, "alignment": alignment, "x_block": x_block}
    name = f"n{n}-k{k}-e{num_experts}-a{alignment}-x{x_block}"
    return Variant(name, {**dims, "config": _config(alignment, k)})


def _select(dims: Mapping[str, int]) -> Variant:
    alignment = tile_for(dims["alignment"], _TILES)
    return _variant(dims["n"], dims["k"], dims["num_experts"], alignment, dims["x_block"])


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[Any, ...]:
    n, k, num_experts, alignment = dims["n"], dims["k"], dims["num_experts"], dims["alignment"]
    m = -(-dims["m"] // alignment) * alignment
    generator = torch.Generator(device).manual_seed(seed)

    def codes(shape: tuple[int, ...], low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=torch.uint8)

    x = torch.randn(m, k, generator=generator, device=device).to(torch.float8_e4m3fn)
    x_scale = codes((m, k // dims["x_block"]), 120, 130).view(torch.float8_e8m0fnu)
    w = codes((num_experts, n, k // 2), 0, 256)
    w_scale = codes((num_experts, n, k // SCALE_K), 110, 127).view(torch.float8_e8m0fnu)
    return x, x_scale, w, w_scale, experts_of(dims, m, device), alignment


def _cases() -> tuple[Case, ...]:
    found = []
    for case in cases_of(SHAPES, BLOCK_K):
        for x_block in _X_BLOCKS:
            suffix = "" if x_block == BLOCK_K else f"-x{x_block}"
            found.append(Case(case.id + suffix, {**case.dims, "x_block": x_block}, case.tags))
    return tuple(found)


SPEC = KernelSpec(
    name=NAME,
    fn=grouped_fp8_fp4_gemm_exact,
    reference=grouped_reference.grouped_fp8_fp4_gemm_exact,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(
        _variant(*shape, tile, block) for shape in SHAPES for tile in _TILES for block in _X_BLOCKS
    ),
    select=_select,
    contract=CONTRACT,
    cases=_cases(),
    num_bytes=lambda d: (
        d["rows"] * (d["k"] + d["k"] // d["x_block"] + d["n"] * 2)
        + busy_experts(d) * d["n"] * (d["k"] // 2 + d["k"] // SCALE_K)
    ),
    num_flops=lambda d: 2 * d["rows"] * d["n"] * d["k"],
    tolerance=grouped_reference.grouped_fp8_fp4_gemm_exact_tolerance,
    peers=("deepgemm", "humming"),
    row_invariant=False,  # rows of a batch come with their experts: tests/kernels/test_grouped.py
    shared_rows={"expert": "alignment"},
    source="DeepSeek-V4 report 5.2.1; reference kernel fp4_gemm; DeepGEMM MegaMoE's 1 x 32 scales",
    small={"n": 256, "k": 512, "num_experts": 4},
)
