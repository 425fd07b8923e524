"""Rows of several experts, each times its own FP4 weights: FP8 activations, folded scales, contiguous rows.

One launch for all experts; a tile has one expert, and `expert[row]` says which. The main loop is that of
the dense product (`folded_tile.stage`), so a row's sums are added in the same order. Layouts of rows:
`grouped_layout`; of weights: `grouped_fold`. Source: DeepSeek-V4 report 5.2.1. Design: docs/gemm.md.
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
from dsv4_kernels.gemm import folded_tile, grouped_reference, grouped_wide
from dsv4_kernels.gemm.folded_tile import BLOCK_K, BLOCK_WORDS, SCALE_K
from dsv4_kernels.gemm.grouped_cases import SHAPES, busy_experts, cases_of, experts_of
from dsv4_kernels.gemm.grouped_layout import ALIGNMENTS, iterations, require_rows
from dsv4_kernels.registry import KernelSpec, Variant, operator
from dsv4_kernels.tile.late import released_late
from dsv4_kernels.tile.scale import ue8m0_to_f32
from dsv4_kernels.tile.shared import MAX_SHARED_BYTES

NAME = "grouped_fp8_fp4_gemm"
INSTRUCTION_M = 64  # weight rows of a product
WARPGROUP = 128  # threads
MAX_ROWS = 65535 * ALIGNMENTS[0]  # the second launch extent is at most 65535
STEP_K = 2 * BLOCK_K  # as in the dense product
MAX_K = 16384  # channels whose scales leave room for two stages of the largest tile
SHARED_BYTES = MAX_SHARED_BYTES - 1024  # less what mbarriers take
_BF16_BYTES, _F32_BYTES = 2, 4
_MAX_TWIN_ROWS = 96  # rows up to which two sets of sums and two of partial sums fit 240 registers
MANY = (96, 128, 256)  # heights of the tiles for many rows


@dataclass(frozen=True)
class Config:
    """Tile and schedule.

    Attributes:
        block_m: rows a tile, and where experts may begin.
        num_stages: depth of the pipeline of 128 channels a stage; fewer where scales of many channels leave
            less shared memory.
        warpgroups: of consumers, 128 weight rows each, in two halves; one where n is an odd multiple of 128.
        blocks: that share a multiprocessor, so that one's loads run under another's first and last steps.
    """

    block_m: int
    num_stages: int
    warpgroups: int
    blocks: int = 1


CONTRACT = Contract(
    (
        "0 <= m",
        "m <= MAX_ROWS",
        "0 < n",
        "n % BLOCK_N == 0",
        "0 < k",
        "k % STEP_K == 0",
        "k <= MAX_K",
        "0 < num_experts",
        "num_experts <= 4096",
        "expert < num_experts",
    ),
    consts={"MAX_ROWS": MAX_ROWS, "BLOCK_N": 128, "STEP_K": STEP_K, "MAX_K": MAX_K},
    tensors=frozenset({"expert"}),
)


def _stages_that_fit(k: int, block_m: int, block_n: int, blocks: int) -> int:
    """Return for how many stages a block has room beside the scales of x and the output tile."""
    held = block_m * block_n * _BF16_BYTES + k // BLOCK_K * block_m * _F32_BYTES
    a_stage = block_m * BLOCK_K + block_n * (BLOCK_K // 2 + BLOCK_K // SCALE_K)
    return (SHARED_BYTES // blocks - held) // a_stage


def make_kernel(n: int, k: int, num_experts: int, alignment: int, config: Config) -> Any:
    """Return the PrimFunc for num_experts of n x k weights; the number of rows m stays symbolic."""
    if config.block_m == grouped_wide.BLOCK_M:
        return grouped_wide.make_wide(n, k, num_experts, config.num_stages)
    m = T.dynamic("m")
    warpgroups = config.warpgroups if n % (2 * INSTRUCTION_M * config.warpgroups) == 0 else 1
    block_m, half_n = config.block_m, INSTRUCTION_M * warpgroups
    block_n = 2 * half_n
    num_stages = min(config.num_stages, _stages_that_fit(k, block_m, block_n, config.blocks))
    source = folded_tile.source()
    stage = folded_tile.stage if block_m <= _MAX_TWIN_ROWS else folded_tile.stage_in_turn

    @T.prim_func
    def grouped_fp8_fp4_gemm_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, k // BLOCK_K), T.uint8],
        words: T.Tensor[(num_experts, k // BLOCK_K, n, BLOCK_WORDS), T.uint32],
        offsets: T.Tensor[(num_experts, k // BLOCK_K, n), T.int32],
        factors: T.Tensor[(num_experts, n), T.float32],
        expert: T.Tensor[(m,), T.int32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        # Weight rows first: blocks that run together read the same rows of x, and an expert at a time.
        with T.Kernel(n // block_n, T.ceildiv(m, block_m), threads=WARPGROUP * warpgroups) as (bn, bm):
            T.import_source(source)
            if config.blocks > 1:
                T.disable_warp_group_reg_alloc()  # a share of the registers is too small to be shared out
                T.annotate_min_blocks_per_sm(config.blocks)
            x_tile = T.alloc_shared((block_m, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((1, block_n, BLOCK_WORDS), T.uint32)
            o_tile = T.alloc_shared((1, block_n), T.int32)
            x_scales = T.alloc_shared((k // BLOCK_K, block_m), T.float32)
            acc = T.alloc_fragment((half_n, block_m), T.float32)
            acc1 = T.alloc_fragment((half_n, block_m), T.float32)
            out_tile = T.alloc_shared((block_m, block_n), T.bfloat16)
            T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})
            # Written before the loop, out_tile has bytes of its own: the pipeline's are not reused for it.
            for j in T.Parallel(block_m):
                out_tile[j, 0] = T.cast(0, "bfloat16")
            for kb, j in T.Parallel(k // BLOCK_K, block_m):
                x_scales[kb, j] = ue8m0_to_f32(T.cast(x_scale[bm * block_m + j, kb], "int32"), 0)
            T.clear(acc)
            T.clear(acc1)
            e = T.max(expert[bm * block_m], 0)  # a tile of padding alone multiplies nothing
            for ko in T.Pipelined(iterations(expert[bm * block_m], k // BLOCK_K), num_stages=num_stages):
                T.copy(x[bm * block_m, ko * BLOCK_K], x_tile)
                T.copy(words[e, ko, bn * block_n, 0], w_tile)
                T.copy(offsets[e, ko, bn * block_n], o_tile)
                stage(x_tile, w_tile, o_tile, x_scales, acc, acc1, ko, block_m, half_n)
            for i, j in T.Parallel(half_n, block_m):
                out_tile[j, i] = T.cast(acc[i, j] * factors[e, bn * block_n + i], "bfloat16")
            for i, j in T.Parallel(half_n, block_m):
                out_tile[j, half_n + i] = T.cast(
                    acc1[i, j] * factors[e, bn * block_n + half_n + i], "bfloat16"
                )
            T.copy(out_tile, out[bm * block_m, bn * block_n], disable_tma=True)

    return released_late(grouped_fp8_fp4_gemm_kernel)


# One tile for each alignment (256: `grouped_wide`); every one adds the same sums in the same order.
_CONFIGS = {
    16: Config(block_m=16, num_stages=3, warpgroups=2, blocks=2),
    64: Config(block_m=64, num_stages=6, warpgroups=2),
    96: Config(block_m=96, num_stages=4, warpgroups=2),
    128: Config(block_m=128, num_stages=4, warpgroups=2),
}


def _empty_output(x: torch.Tensor, x_scale: torch.Tensor, words: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], words.shape[2]), dtype=torch.bfloat16)


@operator(NAME, _empty_output)
def grouped_fp8_fp4_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    words: torch.Tensor,
    offsets: torch.Tensor,
    factors: torch.Tensor,
    expert: torch.Tensor,
    alignment: int,
) -> torch.Tensor:
    """Multiply each row by the folded FP4 weights of its expert (see `grouped_fold.FoldedExperts`).

    Products of 128 channels are summed by the tensor core, scaled by x_scale (a power of two) in fp32
    and added in the order of k; the weight row's factor comes last. So a row of `out` depends, bit for bit,
    on its row of `x` and its expert alone, and is that of `fp8_fp4_gemm_folded` with the expert's weights.

    Args:
        x: [m, k] e4m3, contiguous; m a multiple of alignment, 0 is allowed.
        x_scale: [m, k / 128] e8m0, contiguous.
        words: [num_experts, k / 128, n, 16] int32, contiguous.
        offsets: [num_experts, k / 128, n, 4] uint8, at most MAX_OFFSET (not checked here), contiguous.
        factors: [num_experts, n] float32, contiguous.
        expert: [m] int32, below num_experts (not checked: it stays on the device), contiguous. Rows of
            one aligned block have one expert, or -1 from some row on: see `grouped_layout`.
        alignment: of the experts' first rows, one of `grouped_layout.ALIGNMENTS`.
        All 16-byte aligned, on one device; n a multiple of 128, k of 256 up to 16384; at most 1048560 rows,
        4096 experts.

    Returns:
        [m, n] bf16; rows whose expert is negative hold unspecified values.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(NAME, "words", words, dtype=torch.int32, ndim=4)
    num_experts, blocks, n, _ = words.shape
    rows = x, x_scale, (BLOCK_K,), expert, alignment
    require_rows(NAME, CONTRACT, *rows, words.device, n=n, num_experts=num_experts)
    m, k = x.shape[0], blocks * BLOCK_K
    require_shape(NAME, "x", x, (m, k))
    require_shape(NAME, "words", words, (num_experts, blocks, n, BLOCK_WORDS))
    shape = num_experts, blocks, n, BLOCK_K // SCALE_K
    require_input(NAME, "offsets", offsets, shape, dtype=torch.uint8, device=words.device)
    require_input(NAME, "factors", factors, (num_experts, n), dtype=torch.float32, device=words.device)
    if runtime.uses_reference(x):
        return grouped_reference.grouped_fp8_fp4_gemm(x, x_scale, words, offsets, factors, expert, alignment)
    out = _empty_output(x, x_scale, words)
    if m:
        words, offsets = words.view(torch.uint32), offsets.view(torch.int32).squeeze(-1)
        args = (x, x_scale.view(torch.uint8), words, offsets, factors, expert, out)
        runtime.launch(make_kernel, _variant(n, k, num_experts, alignment).kwargs, args)
    return out


@cache
def _variant(n: int, k: int, num_experts: int, alignment: int) -> Variant:
    kwargs = {"n": n, "k": k, "num_experts": num_experts, "alignment": alignment}
    return Variant(f"n{n}-k{k}-e{num_experts}-a{alignment}", {**kwargs, "config": _config(k, alignment)})


def _config(k: int, alignment: int) -> Config:
    if alignment == grouped_wide.BLOCK_M:
        return Config(grouped_wide.BLOCK_M, grouped_wide.num_stages(k), warpgroups=2)
    return _CONFIGS[alignment]


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[Any, ...]:
    n, k, num_experts, alignment = dims["n"], dims["k"], dims["num_experts"], dims["alignment"]
    m = -(-dims["m"] // alignment) * alignment
    generator = torch.Generator(device).manual_seed(seed)

    def integers(shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=dtype)

    x = torch.randn(m, k, generator=generator, device=device).to(torch.float8_e4m3fn)
    x_scale = integers((m, k // BLOCK_K), 120, 130, torch.uint8).view(torch.float8_e8m0fnu)
    by_block = num_experts, k // BLOCK_K, n
    words = integers((*by_block, BLOCK_K // 2), 0, 256, torch.uint8).view(torch.int32)
    offsets = integers((*by_block, BLOCK_K // SCALE_K), 0, folded_tile.MAX_OFFSET + 1, torch.uint8)
    exponents = integers((num_experts, n), -8, 3, torch.int32)
    factors = torch.ldexp(torch.ones(num_experts, n, device=device), exponents)
    return x, x_scale, words, offsets, factors, experts_of(dims, m, device), alignment


def _select(dims: Mapping[str, int]) -> Variant:
    return _variant(dims["n"], dims["k"], dims["num_experts"], dims["alignment"])


_CASES = cases_of(SHAPES, STEP_K, MANY)

SPEC = KernelSpec(
    name=NAME,
    fn=grouped_fp8_fp4_gemm,
    reference=grouped_reference.grouped_fp8_fp4_gemm,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple({_select(c.dims).id: _select(c.dims) for c in _CASES if "gpu" in c.tags}.values()),
    select=_select,
    contract=CONTRACT,
    cases=_CASES,
    num_bytes=lambda d: (
        d["rows"] * (d["k"] + d["k"] // BLOCK_K + d["n"] * 2)
        + busy_experts(d) * d["n"] * (d["k"] // 2 + d["k"] // SCALE_K + 4)
    ),
    num_flops=lambda d: 2 * d["rows"] * d["n"] * d["k"],
    tolerance=grouped_reference.grouped_fp8_fp4_gemm_tolerance,
    peers=("deepgemm", "humming"),
    row_invariant=False,  # rows of a batch come with their experts: tests/kernels/test_grouped.py
    shared_rows={"expert": "alignment"},
    source="DeepSeek-V4 report 5.2.1; reference kernel fp4_gemm; DeepGEMM's contiguous layout",
    small={"n": 256, "k": 1024, "num_experts": 4},
)
