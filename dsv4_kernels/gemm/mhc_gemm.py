"""Mixing coefficients of manifold-constrained hyper-connections: x @ fn.T and each row's sum of squares.

Rows are long (28672 channels for V4-Pro) and outputs are 24, so the channels are cut into `SPLITS` equal
parts whatever the number of tokens. Each part's sums stand beside each other in the result and whoever
reads them adds them in order; no block waits for another. The fp32 weights are held as two bf16 parts
that together keep 16 significant bits (TF32: 11), so tiles of x go from memory to the tensor core
untouched. Source: DeepSeek-V4 report 2.2; DeepGEMM tf32_hc_prenorm_gemm. Design: docs/gemm.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.contract import Contract, require_input, require_tensor
from dsv4_kernels.gemm import reference
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "mhc_gemm"
NUM_OUTPUTS = 24  # 4 pre, 4 post and 4 x 4 residual coefficients
NUM_PARTS = 2  # bf16 parts of an fp32 weight
SPLITS = 32  # of the channels
_BLOCK_N = 32  # outputs, up to the next width of wgmma that the compiler lays out
BLOCK_K = 128  # channels a stage; squares are added by column of it
WARPGROUP = 128  # threads
MAX_TOKENS = 65535 * 64  # 64 a block, and a launch has 65535 blocks in its second dimension


@dataclass(frozen=True)
class Config:
    """Tile and schedule.

    Attributes:
        block_m: tokens a tile.
        num_stages: depth of the pipeline.
        blocks: that share a multiprocessor, so that one's loads run under another's first and last steps.
    """

    block_m: int = 64
    num_stages: int = 3
    blocks: int = 2


CONTRACT = Contract(
    ("0 <= m", "m <= MAX_TOKENS", "0 < k", "k % STEP == 0", "k <= 65536"),
    consts={"MAX_TOKENS": MAX_TOKENS, "STEP": SPLITS * BLOCK_K},
)


def make_kernel(k: int, config: Config) -> Any:
    """Return the PrimFunc for rows of k channels; the number of tokens m stays symbolic."""
    m = T.dynamic("m")
    block_m, block_k = config.block_m, BLOCK_K
    steps = k // SPLITS // block_k

    @T.prim_func
    def mhc_gemm_kernel(
        x: T.Tensor[(m, k), T.bfloat16],
        fn: T.Tensor[(NUM_PARTS, NUM_OUTPUTS, k), T.bfloat16],
        parts: T.Tensor[(m, SPLITS, NUM_OUTPUTS), T.float32],
        squares: T.Tensor[(m, SPLITS), T.float32],
    ):
        # Parts of one row are neighbours, so that the blocks that run together read whole rows.
        with T.Kernel(SPLITS, T.ceildiv(m, block_m), threads=WARPGROUP) as (split, bm):
            T.disable_warp_group_reg_alloc()
            T.annotate_min_blocks_per_sm(config.blocks)
            x_tile = T.alloc_shared((block_m, block_k), T.bfloat16)
            fn_tile = T.alloc_shared((NUM_PARTS, _BLOCK_N, block_k), T.bfloat16)
            values = T.alloc_fragment((block_m, block_k), T.bfloat16)
            square = T.alloc_fragment((block_m, block_k), T.float32)
            total = T.alloc_fragment((block_m,), T.float32)
            acc = T.alloc_fragment((block_m, _BLOCK_N), T.float32)
            T.clear(acc)
            T.clear(square)
            for ko in T.Pipelined(steps, num_stages=config.num_stages):
                T.copy(x[bm * block_m, (split * steps + ko) * block_k], x_tile)
                # Outputs 24 to 31 are beyond the tensor: they arrive as zeros.
                T.copy(
                    fn[
                        0:NUM_PARTS,
                        0:_BLOCK_N,
                        (split * steps + ko) * block_k : (split * steps + ko + 1) * block_k,
                    ],
                    fn_tile,
                )
                # Squares between the products: rows have come when the wait for both frees the stage.
                T.wgmma_gemm(x_tile, fn_tile[0, :, :], acc, transpose_B=True)
                T.copy(x_tile, values)
                for i, j in T.Parallel(block_m, block_k):
                    square[i, j] += T.cast(values[i, j], "float32") * T.cast(values[i, j], "float32")
                T.gemm(x_tile, fn_tile[1, :, :], acc, transpose_B=True)
            T.reduce_sum(square, total, dim=1)
            for i, j in T.Parallel(block_m, _BLOCK_N):
                if j < NUM_OUTPUTS:
                    parts[bm * block_m + i, split, j] = acc[i, j]
            for i in T.Parallel(block_m):
                squares[bm * block_m + i, split] = total[i]

    return mhc_gemm_kernel


def split_weights(fn: torch.Tensor) -> torch.Tensor:
    """Return fp32 weights as two bf16 parts, once at load: fn ~= parts[0] + parts[1].

    The first part is the weight to 8 significant bits and the second the rest to 8, so the sum is off by at
    most 2**-17 of the weight. The parts take as many bytes as the weights.

    Args:
        fn: [24, k] float32; finite, magnitudes from 2**-100 to the largest bf16, or zero.

    Returns:
        [2, 24, k] bf16, contiguous.

    Raises:
        ContractError: not two-dimensional float32.
    """
    require_tensor("split_weights", "fn", fn, dtype=torch.float32, ndim=2)
    high = fn.to(torch.bfloat16)
    return torch.stack((high, (fn - high.float()).to(torch.bfloat16)))


def _empty_outputs(x: torch.Tensor, fn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    m = x.shape[0]
    parts = x.new_empty((m, SPLITS, NUM_OUTPUTS), dtype=torch.float32)
    return parts, x.new_empty((m, SPLITS), dtype=torch.float32)


@operator(NAME, _empty_outputs)
def mhc_gemm(x: torch.Tensor, fn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply flattened streams by the mixing weights, and sum the squares of each row, in 32 parts.

    Part s holds the sums over channels [s * k / 32, (s + 1) * k / 32) of a row, in the tensor core's fp32
    accumulators: 128 channels by the first part of the weights, then the same by the second. Products are
    exact. Adding parts 0 to 31 in order gives the product and the sum of squares; a row's parts depend, bit
    for bit, on its row of `x` alone.

    Args:
        x: [m, k] bf16, contiguous, k = 4 * hidden (four streams, one after the other); m = 0 is allowed.
        fn: [2, 24, k] bf16 from `split_weights`, contiguous.
        Both 16-byte aligned, on one device; k a multiple of 4096 up to 65536, m up to 4194240.

    Returns:
        parts: [m, 32, 24] float32.
        squares: [m, 32] float32.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(NAME, "x", x, dtype=torch.bfloat16, ndim=2)
    m, k = x.shape
    CONTRACT.check(NAME, m=m, k=k)
    require_input(NAME, "fn", fn, (NUM_PARTS, NUM_OUTPUTS, k), dtype=torch.bfloat16, device=x.device)
    if runtime.uses_reference(x):
        return reference.mhc_gemm(x, fn)
    parts, squares = _empty_outputs(x, fn)
    if m:
        runtime.launch(make_kernel, _variant(k).kwargs, (x, fn, parts, squares))
    return parts, squares


@cache
def _variant(k: int) -> Variant:
    return Variant(f"k{k}", {"k": k, "config": Config()})


CHANNELS = (16384, 28672)  # four streams of Flash and of Pro


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(dims["m"], dims["k"], generator=generator, device=device)
    fn = torch.randn(NUM_OUTPUTS, dims["k"], generator=generator, device=device)
    return x.to(torch.bfloat16), split_weights(fn)


def _case(m: int, k: int, *tags: str) -> Case:
    return Case(f"m{m}-k{k}", {"m": m, "k": k}, tags)


SPEC = KernelSpec(
    name=NAME,
    fn=mhc_gemm,
    reference=reference.mhc_gemm,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(k) for k in CHANNELS),
    select=lambda d: _variant(d["k"]),
    contract=CONTRACT,
    cases=(
        _case(0, 4096, "test"),
        _case(1, 4096, "test"),
        _case(67, 8192, "test"),
        *(_case(m, k, "gpu", "bench") for k in CHANNELS for m in (1, 16, 64, 1024, 4096, 8192)),
    ),
    num_bytes=lambda d: 2 * d["m"] * d["k"] + 4 * NUM_OUTPUTS * d["k"] + 4 * d["m"] * (NUM_OUTPUTS + 1),
    num_flops=lambda d: 2 * d["m"] * NUM_OUTPUTS * d["k"],
    tolerance=reference.mhc_gemm_tolerance,
    peers=("deepgemm",),
    source="DeepSeek-V4 report 2.2; DeepGEMM tf32_hc_prenorm_gemm",
    small={"k": 16384},
)
