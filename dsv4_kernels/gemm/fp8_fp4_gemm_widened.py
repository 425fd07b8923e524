"""out = x @ w.T of many tokens with FP8 activations and folded FP4 weights, in two launches.

Where tokens are many, widening weights in every tile costs more than doing it once: `fp4_widen` writes them
as e4m3 to a workspace, and a product whose operands both come by TMA reads them there, in tiles of 128
tokens by 256 weight rows as the FP8 product's (`wide_tile`), or by 192 where their rounds cost less. Sums
are those of `fp8_fp4_gemm_folded`, which few tokens take: 128 channels from zero, times the scale of x, in
the order of k, the row's factor last.
Source: DeepSeek-V4 report 5.2.1. Design and measurements: docs/gemm.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout

from dsv4_kernels import runtime
from dsv4_kernels.contract import Contract
from dsv4_kernels.gemm import fp4_widen, fp8_fp4_gemm_folded, reference
from dsv4_kernels.gemm.fp8_fp4_gemm_folded import check_inputs, empty_output
from dsv4_kernels.gemm.rounds import ranges, rounds
from dsv4_kernels.gemm.wide_tile import BLOCK_K, BLOCK_M, BLOCK_N, COPY_SCALES, PADDING
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.late import released_late
from dsv4_kernels.tile.scale import ue8m0_to_f32
from dsv4_kernels.tile.unroll import ring_unrolled

NAME = "fp8_fp4_gemm_widened"
MAX_TOKENS = 2**31 - 256  # launch extents are int32
THREADS = 256  # two warpgroups of consumers
NUM_STAGES = 4  # of the ring; the scales of MAX_K channels leave room for them
# n x k for which the narrow tile was measured, tokens up to which it was, and what a round of it costs for
# one of the wide tile: 71.7 us for 89.1 at 1024 tokens (two rounds each), 170.8 for 176.6 at 2304 (5 and 4).
_NARROW_SHAPES, _NARROW_TOKENS, _NARROW_COST = frozenset({(6144, 7168)}), 2304, (4, 5)
_PIECE = 64  # columns of the narrow tile's output that are stored together
_ROWS = T.GemmWarpPolicy.FullRow


@dataclass(frozen=True)
class Config:
    """Tile of 128 tokens.

    Attributes:
        block_n: weight rows. Fewer than 256 leave registers for two sets of partial sums.
    """

    block_n: int


WIDE, NARROW = Config(BLOCK_N), Config(192)

CONTRACT = Contract(
    ("0 <= m", "m <= MAX_TOKENS", "0 < n", "n % BLOCK_N == 0", "0 < k", "k % STEP_K == 0", "k <= MAX_K"),
    consts={
        "MAX_TOKENS": MAX_TOKENS,
        "BLOCK_N": BLOCK_N,
        "STEP_K": fp4_widen.STEP_K,
        "MAX_K": fp8_fp4_gemm_folded.MAX_K,
    },
)


@T.macro
def _stage(x_tile: Any, w_tile: Any, x_scales: Any, part: Any, scale: Any, acc0: Any, acc1: Any, block: Any):
    """Multiply 128 channels by both halves of the weight rows in turn, scale and add."""
    half = acc0.shape[1]
    for i in T.Parallel(BLOCK_M):
        scale[i] = ue8m0_to_f32(T.cast(x_scales[i, block], "int32"), 0)
    T.gemm(x_tile, w_tile[0:half, :], part, transpose_B=True, clear_accum=True, policy=_ROWS)
    for i, j in T.Parallel(BLOCK_M, half):
        acc0[i, j] += part[i, j] * scale[i]
    T.gemm(x_tile, w_tile[half : 2 * half, :], part, transpose_B=True, clear_accum=True, policy=_ROWS)
    for i, j in T.Parallel(BLOCK_M, half):
        acc1[i, j] += part[i, j] * scale[i]


@T.macro
def _split_stage(
    x_tile: Any, w_tile: Any, x_scales: Any, parts: Any, scale: Any, acc0: Any, acc1: Any, block: Any
):
    """As `_stage`, with both halves under way: the first one's sums are added under the second's product."""
    half = acc0.shape[1]
    for i in T.Parallel(BLOCK_M):
        scale[i] = ue8m0_to_f32(T.cast(x_scales[i, block], "int32"), 0)
    T.wgmma_gemm(x_tile, w_tile[0:half, :], parts[0], transpose_B=True, clear_accum=True, policy=_ROWS)
    T.wgmma_gemm(
        x_tile, w_tile[half : 2 * half, :], parts[1], transpose_B=True, clear_accum=True, policy=_ROWS
    )
    T.wait_wgmma(1)
    for i, j in T.Parallel(BLOCK_M, half):
        acc0[i, j] += parts[0][i, j] * scale[i]
    T.wait_wgmma(0)
    for i, j in T.Parallel(BLOCK_M, half):
        acc1[i, j] += parts[1][i, j] * scale[i]


def make_kernel(n: int, k: int, config: Config = WIDE) -> Any:
    """Return the PrimFunc for n x k widened weights; the number of tokens m stays symbolic.

    Args:
        n: weight rows, a multiple of those of a tile.
        k: channels.
        config: tile.

    Raises:
        ValueError: n is no number of whole tiles.
    """
    if n % config.block_n:
        raise ValueError(f"{NAME}: requires n % {config.block_n} == 0, got {n=}")
    m = T.dynamic("m")
    blocks, block_n = k // BLOCK_K, config.block_n
    half, is_narrow = block_n // 2, block_n < BLOCK_N

    @T.prim_func
    def fp8_fp4_gemm_widened_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, blocks), T.uint8],
        w: T.Tensor[(n, k), T.float8_e4m3fn],
        factors: T.Tensor[(n,), T.float32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, BLOCK_M), n // block_n, threads=THREADS) as (bm, bn):
            x_tile = T.alloc_shared((BLOCK_M, BLOCK_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, BLOCK_K), T.float8_e4m3fn)
            x_scales = T.alloc_shared((BLOCK_M, blocks + PADDING), T.uint8)
            row_factors = T.alloc_shared((block_n,), T.float32)
            out_tile = T.alloc_shared((BLOCK_M, block_n), T.bfloat16)  # takes bytes of what is over by then
            part = T.alloc_fragment((BLOCK_M, half), T.float32)
            scale = T.alloc_fragment((BLOCK_M,), T.float32)
            acc0 = T.alloc_fragment((BLOCK_M, half), T.float32)
            acc1 = T.alloc_fragment((BLOCK_M, half), T.float32)
            if is_narrow:
                part1 = T.alloc_fragment((BLOCK_M, half), T.float32)
            T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})
            T.async_copy(
                x_scale[bm * BLOCK_M : (bm + 1) * BLOCK_M, 0:blocks],
                x_scales[:, 0:blocks],
                coalesced_width=COPY_SCALES,
            )
            T.copy(factors[bn * block_n : (bn + 1) * block_n], row_factors, disable_tma=True)
            T.ptx_wait_group(0)
            T.clear(acc0)
            T.clear(acc1)
            for ko in T.Pipelined(blocks, num_stages=NUM_STAGES):
                T.copy(x[bm * BLOCK_M, ko * BLOCK_K], x_tile)
                T.copy(w[bn * block_n, ko * BLOCK_K], w_tile)
                if is_narrow:
                    _split_stage(x_tile, w_tile, x_scales, (part, part1), scale, acc0, acc1, ko)
                else:
                    _stage(x_tile, w_tile, x_scales, part, scale, acc0, acc1, ko)
            # In registers first: the tile's bytes are then written without a barrier before each of them.
            for i, j in T.Parallel(BLOCK_M, half):
                acc0[i, j] = acc0[i, j] * row_factors[j]
            for i, j in T.Parallel(BLOCK_M, half):
                acc1[i, j] = acc1[i, j] * row_factors[half + j]
            for i, j in T.Parallel(BLOCK_M, half):
                out_tile[i, j] = T.cast(acc0[i, j], "bfloat16")
            for i, j in T.Parallel(BLOCK_M, half):
                out_tile[i, half + j] = T.cast(acc1[i, j], "bfloat16")
            if is_narrow:
                # Rows of 192 columns would be shared out by a division that cannot be inverted.
                for p in T.serial(block_n // _PIECE):
                    T.copy(
                        out_tile[:, p * _PIECE : p * _PIECE + _PIECE],
                        out[bm * BLOCK_M, bn * block_n + p * _PIECE],
                        disable_tma=True,
                    )
            else:
                T.copy(out_tile, out[bm * BLOCK_M, bn * block_n], disable_tma=True)

    kernel = ring_unrolled(fp8_fp4_gemm_widened_kernel, NUM_STAGES)
    return released_late(kernel) if is_narrow else kernel


def workspace_bytes(dims: Mapping[str, int]) -> int:
    """Return the bytes of the widened weights, which a call allocates beside its output."""
    return dims["n"] * dims["k"] if dims["m"] else 0


@operator(NAME, empty_output)
def fp8_fp4_gemm_widened(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    words: torch.Tensor,
    offsets: torch.Tensor,
    factors: torch.Tensor,
) -> torch.Tensor:
    """Multiply many FP8 activations by folded FP4 weights (see `fold.FoldedWeights`), widened first.

    A row of `out` has, bit for bit, what `fp8_fp4_gemm_folded` gives it: products of 128 channels are summed
    by the tensor core, scaled by x_scale in fp32 and added in the order of k; the row's factor comes last.

    Args:
        x: [m, k] e4m3, contiguous; m = 0 is allowed.
        x_scale: [m, k / 128] e8m0, contiguous.
        words: [n, k / 8] int32, contiguous.
        offsets: [n, k / 32] uint8, at most MAX_OFFSET (not checked here), contiguous.
        factors: [n] float32, contiguous.
        All 16-byte aligned, on one device; n a multiple of 256, k of 512 and at most 16384.

    Returns:
        [m, n] bf16. A call allocates n x k bytes beside it.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    m, n, k = check_inputs(NAME, CONTRACT, x, x_scale, words, offsets, factors)
    if runtime.uses_reference(x):
        return reference.fp8_fp4_gemm_folded(x, x_scale, words, offsets, factors)
    out = empty_output(x, x_scale, words, offsets, factors)
    if m:
        widened = x.new_empty((n, k))
        fp4_widen.launch(words, offsets, widened)
        args = (x, x_scale.view(torch.uint8), widened, factors, out)
        runtime.launch(make_kernel, _select(m, n, k).kwargs, args)
    return out


@cache
def _tiles(n: int, k: int) -> tuple[tuple[int, Config], ...]:
    """Return (largest number of tokens, tile) pairs."""
    if (n, k) not in _NARROW_SHAPES:
        return ((MAX_TOKENS, WIDE),)
    narrow, wide = _NARROW_COST

    def choose(m: int) -> Config:
        number = {c: rounds(m // BLOCK_M * (n // c.block_n)) for c in (NARROW, WIDE)}
        return NARROW if number[NARROW] * narrow <= number[WIDE] * wide else WIDE

    return ranges(choose, 0, BLOCK_M, _NARROW_TOKENS, (MAX_TOKENS, WIDE))


@cache
def _variant(n: int, k: int, config: Config) -> Variant:
    tile = "" if config == WIDE else f"-r{config.block_n}"
    return Variant(f"n{n}-k{k}{tile}", {"n": n, "k": k, "config": config})


def _select(m: int, n: int, k: int) -> Variant:
    return _variant(n, k, next(config for limit, config in _tiles(n, k) if m <= limit))


# n x k of V4's experts (Flash, Pro): gate and up together, down.
SHAPES = fp4_widen.SHAPES


def _case(m: int, n: int, k: int, *tags: str) -> Case:
    return Case(f"m{m}-n{n}-k{k}", {"m": m, "n": n, "k": k}, tags)


SPEC = KernelSpec(
    name=NAME,
    fn=fp8_fp4_gemm_widened,
    reference=reference.fp8_fp4_gemm_folded,
    make_inputs=fp8_fp4_gemm_folded.SPEC.make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(n, k, c) for n, k in SHAPES for c in dict.fromkeys(c for _, c in _tiles(n, k))),
    select=lambda d: _select(d["m"], d["n"], d["k"]),
    contract=CONTRACT,
    cases=(
        _case(0, 256, 512, "test"),
        _case(1, 256, 512, "test"),
        _case(131, 512, 1024, "test"),
        *(_case(m, n, k, "gpu", "bench") for n, k in SHAPES for m in (1024, 4096)),
    ),
    num_bytes=fp8_fp4_gemm_folded.SPEC.num_bytes,
    num_flops=fp8_fp4_gemm_folded.SPEC.num_flops,
    tolerance=reference.fp8_fp4_gemm_folded_tolerance,
    peers=("deepgemm", "humming"),
    source="DeepSeek-V4 report 5.2.1; reference kernel fp4_gemm",
    small={"n": 768, "k": 1024},  # of both tiles
    workspace_bytes=workspace_bytes,
)
