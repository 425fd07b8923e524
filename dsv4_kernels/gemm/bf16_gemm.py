"""out = x @ w.T with bf16 operands (V4's compressor projections, router and output head), bf16 or fp32 out.

Producer warps bring tiles by TMA; a warpgroup multiplies 64 rows at a time. Few tokens are the narrow side of
the instruction where weights alone fill the machine, and narrow tiles spread few weight rows over it.
Every variant adds a row's products in chunks of 16 channels in the order of k, into one accumulator, so
its bits do not depend on the batch. Source: DeepSeek-V4 report 2.3, 3.3. Design: docs/gemm.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T
from tilelang.layout import make_full_bank_swizzled_layout

from dsv4_kernels import runtime
from dsv4_kernels.contract import Contract, ContractError, require_shape, require_tensor
from dsv4_kernels.gemm import bf16_gemm_tiles, reference
from dsv4_kernels.gemm.rounds import MULTIPROCESSORS, ranges, rounds
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "bf16_gemm"
WARPGROUP = 128  # threads
MAX_TOKENS = 2**31 - 256  # launch extents are int32
F32, BF16 = "float32", "bfloat16"  # kinds of outputs
KINDS = {torch.float32: F32, torch.bfloat16: BF16}


@dataclass(frozen=True)
class Config:
    """Tile and schedule.

    Attributes:
        block_m: tokens a tile.
        block_n: weight rows a tile.
        block_k: channels a stage.
        num_stages: depth of the pipeline.
        weights_first: weights are the instruction's rows; else tokens are.
        warpgroups: of consumers, which share out the instruction's rows, or its columns where there are 64
            rows.
        lends_ring: a bf16 output takes the bytes of stages that are over by then: room for one more.
        tiles: that a block multiplies in turn, see `bf16_gemm_tiles`; of one group alone.
    """

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    weights_first: bool = False
    warpgroups: int = 1
    lends_ring: bool = False
    tiles: int = 1


CONTRACT = Contract(
    ("0 <= m", "m <= MAX_TOKENS", "0 < n", "n % STEP_N == 0", "0 < k", "k % STEP_K == 0", "k <= 65536"),
    consts={"MAX_TOKENS": MAX_TOKENS, "STEP_N": 64, "STEP_K": 256},
)
_INSTRUCTION_M = 64  # rows of one wgmma


def make_kernel(n: int, k: int, out: str, config: Config, groups: int = 1) -> Any:
    """Return the PrimFunc for n x k weights; the number of tokens m stays symbolic.

    With several groups, group g of a token's channels meets group g of the weight rows alone.
    """
    if config.tiles > 1:
        if groups > 1:
            raise ValueError(f"{NAME}: requires groups == 1 of several tiles a block, got {groups=}")
        return bf16_gemm_tiles.make_tiles(n, k, out, config.tiles)
    make = _make_weights_first if config.weights_first else _make_tokens_first
    return make(n, k, out, config, groups)


def _make_tokens_first(n: int, k: int, out_dtype: str, config: Config, groups: int) -> Any:
    m = T.dynamic("m")
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    # fp32 rows of a fragment are whole sectors; bf16 leaves through shared memory for that.
    is_staged = out_dtype == BF16 and block_n % 64 == 0
    shares_rows = block_m > _INSTRUCTION_M
    policy = T.GemmWarpPolicy.FullRow if shares_rows else T.GemmWarpPolicy.FullCol

    @T.prim_func
    def bf16_gemm_kernel(
        x: T.Tensor[(m, groups * k), T.bfloat16],
        w: T.Tensor[(groups * n, k), T.bfloat16],
        out: T.Tensor[(m, groups * n), out_dtype],
    ):
        with T.Kernel(
            T.ceildiv(m, block_m), groups * n // block_n, threads=WARPGROUP * config.warpgroups
        ) as (bm, bn):
            x_tile = T.alloc_shared((block_m, block_k), T.bfloat16)
            w_tile = T.alloc_shared((block_n, block_k), T.bfloat16)
            acc = T.alloc_fragment((block_m, block_n), T.float32)
            if is_staged:
                out_tile = T.alloc_shared((block_m, block_n), out_dtype)
                T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})
                if not config.lends_ring:
                    # Written before the loop, out_tile has bytes of its own: the pipeline's are not reused.
                    for i in T.Parallel(block_m):
                        out_tile[i, 0] = T.cast(0, out_dtype)
            T.clear(acc)
            for ko in T.Pipelined(k // block_k, num_stages=config.num_stages):
                T.copy(x[bm * block_m, bn * block_n // n * k + ko * block_k], x_tile)
                T.copy(w[bn * block_n, ko * block_k], w_tile)
                T.gemm(x_tile, w_tile, acc, transpose_B=True, policy=policy)
            if is_staged:
                for i, j in T.Parallel(block_m, block_n):
                    out_tile[i, j] = T.cast(acc[i, j], out_dtype)  # pyright: ignore[reportPossiblyUnboundVariable]
                T.copy(out_tile, out[bm * block_m, bn * block_n], disable_tma=True)  # pyright: ignore[reportPossiblyUnboundVariable]
            else:
                for i, j in T.Parallel(block_m, block_n):
                    out[bm * block_m + i, bn * block_n + j] = T.cast(acc[i, j], out_dtype)

    return bf16_gemm_kernel


def _make_weights_first(n: int, k: int, out_dtype: str, config: Config, groups: int) -> Any:
    m = T.dynamic("m")
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k

    @T.prim_func
    def bf16_gemm_kernel(
        x: T.Tensor[(m, groups * k), T.bfloat16],
        w: T.Tensor[(groups * n, k), T.bfloat16],
        out: T.Tensor[(m, groups * n), out_dtype],
    ):
        with T.Kernel(
            T.ceildiv(m, block_m), groups * n // block_n, threads=WARPGROUP * config.warpgroups
        ) as (bm, bn):
            x_tile = T.alloc_shared((block_m, block_k), T.bfloat16)
            w_tile = T.alloc_shared((block_n, block_k), T.bfloat16)
            acc = T.alloc_fragment((block_n, block_m), T.float32)
            T.clear(acc)
            for ko in T.Pipelined(k // block_k, num_stages=config.num_stages):
                T.copy(x[bm * block_m, bn * block_n // n * k + ko * block_k], x_tile)
                T.copy(w[bn * block_n, ko * block_k], w_tile)
                T.gemm(w_tile, x_tile, acc, transpose_B=True)
            for i, j in T.Parallel(block_n, block_m):
                out[bm * block_m + j, bn * block_n + i] = T.cast(acc[i, j], out_dtype)

    return bf16_gemm_kernel


_HEAD = 16384  # weight rows from which few of them a tile fill the machine many times over
_SKINNY = 1024  # weight rows below which 64 of them a tile leave most of it idle
_ROUTER = 256  # weight rows up to which tiles of 32 only repeat the reads of x
_FEW = Config(block_m=16, block_n=64, block_k=256, num_stages=5, weights_first=True)
_NARROW = Config(block_m=64, block_n=16, block_k=256, num_stages=5)
_MIDDLE = Config(block_m=64, block_n=32, block_k=256, num_stages=4)
_SQUARE = Config(block_m=64, block_n=64, block_k=128, num_stages=6)
_WIDE = Config(block_m=64, block_n=128, block_k=64, num_stages=8, warpgroups=2)
_LARGE = Config(block_m=128, block_n=128, block_k=64, num_stages=6, warpgroups=2)
_DEEP = Config(block_m=128, block_n=256, block_k=128, num_stages=2, warpgroups=2)
_LARGEST = Config(block_m=128, block_n=256, block_k=64, num_stages=4, warpgroups=2)
_LARGEST_STAGED = Config(block_m=128, block_n=256, block_k=64, num_stages=3, warpgroups=2)
# Two tiles of tokens a block: costs of a round of them and of two rounds of one, 1.6 to 3 % less; tokens
# after which rounds decide, and up to which: beyond, a round that is added weighs little.
_PAIR = Config(**bf16_gemm_tiles.TILE, warpgroups=2, tiles=2)
_PAIR_COST, _PAIR_AFTER, _PAIR_TOKENS = (98, 100), 1024, 4224


def configs(n: int, out: str) -> tuple[tuple[int, Config], ...]:
    """Return (largest number of tokens, tile) pairs; every one adds in the same order.

    A tile is used while its blocks still run side by side; then comes the next larger one.
    """
    largest = _LARGEST_STAGED if out == BF16 else _LARGEST
    if n >= _HEAD and n % largest.block_n == 0:
        if out == BF16:
            return ((16, _FEW), (128, _LARGE), (MAX_TOKENS, largest))
        return ((16, _FEW), (128, _DEEP), (_PAIR_AFTER, largest), *_largest_or_pairs(n))
    few = (_FEW,) if n >= _SKINNY else (_NARROW, _MIDDLE) if n > _ROUTER else (_NARROW,)
    ladder = [c for c in (*few, _SQUARE, _WIDE, _LARGE, largest) if n % c.block_n == 0]
    limits = [MULTIPROCESSORS // (n // c.block_n) * c.block_m for c in ladder[:-1]]
    return (*zip(limits, ladder[:-1], strict=True), (MAX_TOKENS, ladder[-1]))


def _largest_or_pairs(n: int) -> tuple[tuple[int, Config], ...]:
    """Return the pairs for more than `_PAIR_AFTER` tokens: two tiles a block where their rounds cost less."""
    two, one = _PAIR_COST

    def choose(m: int) -> Config:
        tiles, columns = m // _LARGEST.block_m, n // _LARGEST.block_n
        of_pairs = _PAIR.tiles * rounds(-(-tiles // _PAIR.tiles) * columns)
        return _PAIR if of_pairs * two <= rounds(tiles * columns) * one else _LARGEST

    return ranges(choose, _PAIR_AFTER, _LARGEST.block_m, _PAIR_TOKENS, (MAX_TOKENS, _PAIR))


# n x k of V4: a compressor of CSA (values and scores of two series, Pro) and the output head (Flash).
SHAPES = ((2048, 7168, F32), (129280, 4096, F32))


def require_operands(name: str, contract: Contract, x: torch.Tensor, w: torch.Tensor) -> tuple[int, int, int]:
    """Check x [m, k] and w [n, k] of a bf16 product; return m, n and k.

    Raises:
        ContractError: they are no such tensors on one device, or `contract` does not admit their dims.
    """
    require_tensor(name, "x", x, dtype=torch.bfloat16, ndim=2)
    require_tensor(name, "w", w, dtype=torch.bfloat16, ndim=2, device=x.device)
    (m, k), n = x.shape, w.shape[0]
    contract.check(name, m=m, n=n, k=k)
    require_shape(name, "w", w, (n, k))
    return m, n, k


def require_kind(name: str, out_dtype: torch.dtype) -> None:
    """Check the dtype of an output; raises ContractError."""
    if out_dtype not in KINDS:
        raise ContractError(f"{name}: requires out_dtype in {(*KINDS,)}, got out_dtype={out_dtype}")


def _empty_output(x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return x.new_empty((x.shape[0], w.shape[0]), dtype=out_dtype)


@operator(NAME, _empty_output)
def bf16_gemm(x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Multiply bf16 activations by bf16 weights: out = x @ w.T.

    Products are exact and are added in the tensor core's fp32 accumulators, 16 channels at a time in the
    order of k, whatever m is, so a row of `out` depends, bit for bit, on its row of `x` alone. Few weight
    rows are faster in parts of k: `narrow_gemm`.

    Args:
        x: [m, k] bf16, contiguous; m = 0 is allowed.
        w: [n, k] bf16, contiguous.
        out_dtype: bfloat16 or float32.
        Both 16-byte aligned, on one device; n a multiple of 64, k of 256 up to 65536.

    Returns:
        [m, n] of `out_dtype`.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    m, n, k = require_operands(NAME, CONTRACT, x, w)
    require_kind(NAME, out_dtype)
    if runtime.uses_reference(x):
        return reference.bf16_gemm(x, w, out_dtype)
    out = _empty_output(x, w, out_dtype)
    if m:
        runtime.launch(make_kernel, _select(m, n, k, KINDS[out_dtype]).kwargs, (x, w, out))
    return out


def _variant(n: int, k: int, out: str, config: Config) -> Variant:
    name = f"n{n}-k{k}-{out}-{config.block_m}x{config.block_n}x{config.block_k}"
    name += f"x{config.tiles}" if config.tiles > 1 else ""
    return Variant(name, {"n": n, "k": k, "out": out, "config": config})


@cache
def _variants(n: int, k: int, out: str) -> tuple[tuple[int, Variant], ...]:
    return tuple((limit, _variant(n, k, out, config)) for limit, config in configs(n, out))


def _select(m: int, n: int, k: int, out: str) -> Variant:
    return next(variant for limit, variant in _variants(n, k, out) if m <= limit)


def make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[Any, ...]:
    """Return x [m, k] and w [n, k] in bf16, and the output's dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(dims["m"], dims["k"], generator=generator, device=device).to(torch.bfloat16)
    w = torch.randn(dims["n"], dims["k"], generator=generator, device=device).to(torch.bfloat16)
    return x, w, torch.float32 if dims["f32_out"] else torch.bfloat16


def _case(m: int, n: int, k: int, out: str, *tags: str) -> Case:
    return Case(f"m{m}-n{n}-k{k}-{out}", {"m": m, "n": n, "k": k, "f32_out": int(out == F32)}, tags)


SPEC = KernelSpec(
    name=NAME,
    fn=bf16_gemm,
    reference=reference.bf16_gemm,
    make_inputs=make_inputs,
    make_kernel=make_kernel,
    variants=tuple({v.id: v for shape in SHAPES for _, v in _variants(*shape)}.values()),
    select=lambda d: _select(d["m"], d["n"], d["k"], F32 if d["f32_out"] else BF16),
    contract=CONTRACT,
    cases=(
        _case(0, 64, 256, F32, "test"),
        _case(1, 64, 256, BF16, "test"),
        _case(17, 128, 512, F32, "test"),
        _case(131, 256, 256, BF16, "test"),
        _case(300, 192, 256, F32, "test"),
        *(_case(m, *shape, "gpu", "bench") for shape in SHAPES for m in (1, 16, 64, 128, 1024, 4096)),
    ),
    num_bytes=lambda d: 2 * (d["m"] + d["n"]) * d["k"] + d["m"] * d["n"] * (4 if d["f32_out"] else 2),
    num_flops=lambda d: 2 * d["m"] * d["n"] * d["k"],
    tolerance=reference.bf16_gemm_tolerance,
    peers=("torch_matmul",),
    source="DeepSeek-V4 report 2.3, 3.3; V4 inference Compressor, ParallelHead",
    small={"n": 256, "k": 2048},
)
