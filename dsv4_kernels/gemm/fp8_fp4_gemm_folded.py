"""out = x @ w.T with FP8 activations and FP4 weights whose scales are folded (`fold.fold_weights`).

Two byte permutes through a table of eight e4m3 bytes widen eight weights; the table is shifted by the
offset of their 32 channels, so products need scaling once in 128 channels, as FP8 weights do. Widened
weights go straight to the registers that the tensor core reads. Source: V4 report 5.2.1; see docs/gemm.md.
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
from dsv4_kernels.gemm import folded_few, folded_wide, fp8_fp4_gemm_async, reference
from dsv4_kernels.gemm.rounds import ranges, rounds
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.scale import ue8m0_to_f32
from verify import externs

NAME = "fp8_fp4_gemm_folded"
BLOCK_K = 128  # channels a scale of x, and a partial sum
SCALE_K = 32  # channels an offset
WORD = 8  # codes a word
STAGE_K = 2 * BLOCK_K
INSTRUCTION_M = 64  # weight rows of a warpgroup
WARPGROUP = 128  # threads
MAX_TOKENS = 2**31 - 256  # launch extents are int32
MAX_K = 16384  # channels whose scales leave every tile room for its pipeline
OFFSET_BIAS = 5  # offset 0 widens a code to its value times 2**-OFFSET_BIAS: no subnormals
MAX_OFFSET = 11  # 6 * 2**(11 - OFFSET_BIAS) = 384, below e4m3's 448
# e4m3 of 0 .5 1 1.5 and of 2 3 4 6, times 2**-OFFSET_BIAS; an offset adds one to each exponent but zero's.
_LOW, _LOW_STEP = 0x14100800, 0x08080800
_HIGH, _HIGH_STEP = 0x24201C18, 0x08080808


@dataclass(frozen=True)
class Config:
    """Tile and schedule.

    Attributes:
        block_m: tokens a tile; the instruction's N.
        num_stages: depth of the pipeline; 0: there is none.
        warpgroups: of consumers, 64 weight rows each; of "few", of blocks of channels.
        form: "pair": 256 channels a stage; "flight": see `fp8_fp4_gemm_async`; "wide": see `folded_wide`;
            "few": see `folded_few`.
    """

    block_m: int
    num_stages: int
    warpgroups: int
    form: str = "pair"


CONTRACT = Contract(
    ("0 <= m", "m <= MAX_TOKENS", "0 < n", "n % BLOCK_N == 0", "0 < k", "k % STAGE_K == 0", "k <= MAX_K"),
    consts={"MAX_TOKENS": MAX_TOKENS, "BLOCK_N": 128, "STAGE_K": STAGE_K, "MAX_K": MAX_K},
)
_ROWS = T.GemmWarpPolicy.FullRow
_TILE_N = 128  # weight rows a tile of more than 128 tokens


def make_kernel(n: int, k: int, config: Config) -> Any:
    """Return the PrimFunc for n x k weights; the number of tokens m stays symbolic.

    `offsets` holds the four offsets of 128 channels a word: the bytes of [n, k / 32], seen as int32.
    """
    if config.form == "flight":
        return fp8_fp4_gemm_async.make_flight(n, k, config.block_m, config.num_stages)
    if config.form == "few":
        return folded_few.make_few(n, k, config.block_m, config.warpgroups)
    if config.form == "wide":
        return folded_wide.make_wide(n, k, config.num_stages)
    return _make_pair(n, k, config)


def _make_pair(n: int, k: int, config: Config) -> Any:
    m = T.dynamic("m")
    block_m, block_n = config.block_m, INSTRUCTION_M * config.warpgroups
    source = externs.source("dsv4_prmt", "dsv4_store_b32")

    @T.prim_func
    def fp8_fp4_gemm_folded_kernel(
        x: T.Tensor[(m, k), T.float8_e4m3fn],
        x_scale: T.Tensor[(m, k // BLOCK_K), T.uint8],
        words: T.Tensor[(n, k // WORD), T.uint32],
        offsets: T.Tensor[(n, k // BLOCK_K), T.int32],
        factors: T.Tensor[(n,), T.float32],
        out: T.Tensor[(m, n), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, block_m), n // block_n, threads=WARPGROUP * config.warpgroups) as (bm, bn):
            T.import_source(source)
            x_tile = T.alloc_shared((block_m, STAGE_K), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, STAGE_K // WORD), T.uint32)
            x_scales = T.alloc_shared((k // BLOCK_K, block_m), T.float32)
            codes0 = T.alloc_fragment((block_n, 4, 4), T.uint32)
            codes1 = T.alloc_fragment((block_n, 4, 4), T.uint32)
            offset0 = T.alloc_fragment((block_n,), T.int32)
            offset1 = T.alloc_fragment((block_n,), T.int32)
            w0 = T.alloc_fragment((block_n, BLOCK_K), T.float8_e4m3fn)
            w1 = T.alloc_fragment((block_n, BLOCK_K), T.float8_e4m3fn)
            part0 = T.alloc_fragment((block_n, block_m), T.float32)
            part1 = T.alloc_fragment((block_n, block_m), T.float32)
            acc = T.alloc_fragment((block_n, block_m), T.float32)
            out_tile = T.alloc_shared((block_m, block_n), T.bfloat16)
            T.annotate_layout({out_tile: make_full_bank_swizzled_layout(out_tile)})
            # Written before the loop, out_tile has bytes of its own: the pipeline's are not reused for it.
            for j in T.Parallel(block_m):
                out_tile[j, 0] = T.cast(0, "bfloat16")
            for kb, j in T.Parallel(k // BLOCK_K, block_m):
                x_scales[kb, j] = ue8m0_to_f32(T.cast(x_scale[bm * block_m + j, kb], "int32"), 0)
            T.clear(acc)
            for ko in T.Pipelined(k // STAGE_K, num_stages=config.num_stages):
                T.copy(x[bm * block_m, ko * STAGE_K], x_tile)
                T.copy(words[bn * block_n, ko * (STAGE_K // WORD)], w_tile)
                for i in T.Parallel(block_n):
                    offset0[i] = offsets[bn * block_n + i, ko * 2]
                for i in T.Parallel(block_n):
                    offset1[i] = offsets[bn * block_n + i, ko * 2 + 1]
                for i, t, g in T.Parallel(block_n, 4, 4):
                    codes0[i, t, g] = w_tile[i, t * 4 + g]
                for i, g, h, t in T.Parallel(block_n, 4, 2, 4):
                    T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
                        "handle",
                        "dsv4_store_b32",
                        T.address_of(w0[i, g * SCALE_K + h * 16 + t * 4]),
                        _widen(codes0[i, t, g], (offset0[i] >> (8 * g)) & 0xFF, h),
                    )
                T.wgmma_gemm(
                    w0, x_tile[:, 0:BLOCK_K], part0, transpose_B=True, clear_accum=True, policy=_ROWS
                )
                for i, t, g in T.Parallel(block_n, 4, 4):
                    codes1[i, t, g] = w_tile[i, 16 + t * 4 + g]
                for i, g, h, t in T.Parallel(block_n, 4, 2, 4):
                    T.call_extern(  # pyright: ignore[reportAttributeAccessIssue]
                        "handle",
                        "dsv4_store_b32",
                        T.address_of(w1[i, g * SCALE_K + h * 16 + t * 4]),
                        _widen(codes1[i, t, g], (offset1[i] >> (8 * g)) & 0xFF, h),
                    )
                # Plain gemm waits for both products: the compiler hands x_tile back after it.
                T.gemm(
                    w1, x_tile[:, BLOCK_K:STAGE_K], part1, transpose_B=True, clear_accum=True, policy=_ROWS
                )
                for i, j in T.Parallel(block_n, block_m):
                    acc[i, j] += part0[i, j] * x_scales[ko * 2, j]
                for i, j in T.Parallel(block_n, block_m):
                    acc[i, j] += part1[i, j] * x_scales[ko * 2 + 1, j]
            for i, j in T.Parallel(block_n, block_m):
                out_tile[j, i] = T.cast(acc[i, j] * factors[bn * block_n + i], "bfloat16")
            T.copy(out_tile, out[bm * block_m, bn * block_n], disable_tma=True)

    return fp8_fp4_gemm_folded_kernel


def _widen(codes: Any, offset: Any, half: Any) -> Any:
    """Return the word of four e4m3: codes 4 half to 4 half + 3 of a folded word, times 2**(offset - bias)."""
    low = T.cast(_LOW + offset * _LOW_STEP, "uint32")
    high = T.cast(_HIGH + offset * _HIGH_STEP, "uint32")
    selector = (codes & T.uint32(0x77777777)) >> T.cast(16 * half, "uint32")  # pyright: ignore[reportCallIssue]
    signs = (codes << T.cast(4 * half, "uint32")) & T.uint32(0x80808080)  # pyright: ignore[reportCallIssue]
    return T.call_extern("uint32", "dsv4_prmt", low, high, selector) | signs  # pyright: ignore[reportAttributeAccessIssue]


_PAIR_M = 128  # tokens of a "pair" tile
_DEEP_PAIR_K = 12288  # channels up to which the scales of its tokens leave room for three stages
_PAIR_COST, _WIDE_COST = 5, 8  # of a round of tiles, one a multiprocessor; measured: 24 and 39 us at k = 4096
_FEW_TOKENS = 16
_FEW_WARPGROUPS = 2
# "few" was faster at 4096 x 2048 and 4096 x 4096, the weights it was measured for.
_FEW_N, _FEW_K = 4096, (2048, 4096)
_FLIGHT_TOKENS = 128
_MANY_TOKENS = 2048  # from here on rounds are many, and the wide tile's are cheaper by the token


def _is_few(n: int, k: int) -> bool:
    """Return whether few tokens take "few" for these weights."""
    is_measured = n >= _FEW_N and _FEW_K[0] <= k <= _FEW_K[1] and rounds(n // folded_few.BLOCK_N) == 1
    return is_measured and folded_few.serves(k, _FEW_TOKENS, _FEW_WARPGROUPS)


@cache
def _configs(n: int, k: int) -> tuple[tuple[int, Config], ...]:
    """Return (largest number of tokens, tile) pairs; every one adds in the same order."""
    pair = Config(_PAIR_M, num_stages=3 if k <= _DEEP_PAIR_K else 2, warpgroups=2)
    if k % (fp8_fp4_gemm_async.FLIGHT * BLOCK_K):
        few = Config(_FEW_TOKENS, num_stages=8, warpgroups=1)
        short = Config(64, num_stages=4, warpgroups=1)
        return ((_FEW_TOKENS, few), (_FLIGHT_TOKENS, short), (MAX_TOKENS, pair))
    few = Config(_FEW_TOKENS, num_stages=6, warpgroups=1, form="flight")
    if _is_few(n, k):
        few = Config(_FEW_TOKENS, num_stages=0, warpgroups=_FEW_WARPGROUPS, form="few")
    short = Config(64, num_stages=3, warpgroups=1, form="flight")
    depth = folded_wide.num_stages(k)
    if depth is None:
        return ((_FEW_TOKENS, few), (_FLIGHT_TOKENS, short), (MAX_TOKENS, pair))
    wide = Config(folded_wide.BLOCK_M, depth, folded_wide.WARPGROUPS, form="wide")

    def cost(m: int, config: Config, of_round: int) -> int:
        return rounds(-(-m // config.block_m) * (n // _TILE_N)) * of_round

    def choose(m: int) -> Config:
        return wide if cost(m, wide, _WIDE_COST) < cost(m, pair, _PAIR_COST) else pair

    found = ranges(choose, _FLIGHT_TOKENS, _PAIR_M, _MANY_TOKENS - 1, (MAX_TOKENS, wide))
    return ((_FEW_TOKENS, few), (_FLIGHT_TOKENS, short), *found)


# n x k of V4's experts (Flash, Pro): gate and up together, down.
SHAPES = ((4096, 4096), (4096, 2048), (6144, 7168), (7168, 3072))
# Of its dense layers, whose weights are FP8 there; timed on request, beside the FP8 product.
_DENSE_SHAPES = (
    (1536, 4096),
    (32768, 1024),
    (4096, 8192),
    (65536, 1536),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
)
_TOKENS = (1, 16, 64, 128, 1024, 4096)


def empty_output(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    words: torch.Tensor,
    offsets: torch.Tensor,
    factors: torch.Tensor,
) -> torch.Tensor:
    """Return the output of a product by folded weights, [m, n] bf16, not written yet."""
    return x.new_empty((x.shape[0], words.shape[0]), dtype=torch.bfloat16)


def check_inputs(
    name: str,
    contract: Contract,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    words: torch.Tensor,
    offsets: torch.Tensor,
    factors: torch.Tensor,
) -> tuple[int, int, int]:
    """Return (m, n, k) of a product by folded weights, its arguments as `fp8_fp4_gemm_folded` has them.

    Raises:
        ContractError: a clause of `contract`, whose kernel is `name`, or a tensor's own does not hold.
    """
    require_tensor(name, "x", x, dtype=torch.float8_e4m3fn, ndim=2)
    require_tensor(name, "words", words, dtype=torch.int32, ndim=2, device=x.device)
    (m, k), n = x.shape, words.shape[0]
    contract.check(name, m=m, n=n, k=k)
    require_shape(name, "words", words, (n, k // WORD))
    require_input(name, "x_scale", x_scale, (m, k // BLOCK_K), dtype=torch.float8_e8m0fnu, device=x.device)
    require_input(name, "offsets", offsets, (n, k // SCALE_K), dtype=torch.uint8, device=x.device)
    require_input(name, "factors", factors, (n,), dtype=torch.float32, device=x.device)
    return m, n, k


@operator(NAME, empty_output)
def fp8_fp4_gemm_folded(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    words: torch.Tensor,
    offsets: torch.Tensor,
    factors: torch.Tensor,
) -> torch.Tensor:
    """Multiply FP8 activations by folded FP4 weights (see `fold.FoldedWeights`).

    Products of 128 channels are summed by the tensor core, scaled by x_scale (a power of two) in fp32
    and added in the order of k, whatever m is; the row's factor comes last. So a row of `out` depends,
    bit for bit, on its row of `x` alone. Sums beyond fp32 stay infinite; a nan scale or factor stays nan.

    Args:
        x: [m, k] e4m3, contiguous; m = 0 is allowed.
        x_scale: [m, k / 128] e8m0, contiguous.
        words: [n, k / 8] int32, contiguous.
        offsets: [n, k / 32] uint8, at most MAX_OFFSET (not checked here), contiguous.
        factors: [n] float32, contiguous.
        All 16-byte aligned, on one device; n a multiple of 128, k of 256 and at most 16384.

    Returns:
        [m, n] bf16.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    m, n, k = check_inputs(NAME, CONTRACT, x, x_scale, words, offsets, factors)
    if runtime.uses_reference(x):
        return reference.fp8_fp4_gemm_folded(x, x_scale, words, offsets, factors)
    out = empty_output(x, x_scale, words, offsets, factors)
    if m:
        args = (
            x,
            x_scale.view(torch.uint8),
            words.view(torch.uint32),
            offsets.view(torch.int32),
            factors,
            out,
        )
        runtime.launch(make_kernel, _select(m, n, k).kwargs, args)
    return out


@cache
def _variant(n: int, k: int, config: Config) -> Variant:
    return Variant(f"n{n}-k{k}-m{config.block_m}", {"n": n, "k": k, "config": config})


def _variants(n: int, k: int) -> list[Variant]:
    return [_variant(n, k, config) for _, config in _configs(n, k)]


def _select(m: int, n: int, k: int) -> Variant:
    return _variant(n, k, next(config for limit, config in _configs(n, k) if m <= limit))


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    m, n, k = dims["m"], dims["n"], dims["k"]
    generator = torch.Generator(device).manual_seed(seed)

    def integers(shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=dtype)

    x = torch.randn(m, k, generator=generator, device=device).to(torch.float8_e4m3fn)
    x_scale = integers((m, k // BLOCK_K), 120, 130, torch.uint8).view(torch.float8_e8m0fnu)
    words = integers((n, k // 2), 0, 256, torch.uint8).view(torch.int32)
    offsets = integers((n, k // SCALE_K), 0, MAX_OFFSET + 1, torch.uint8)
    factors = torch.ldexp(torch.ones(n, device=device), integers((n,), -8, 3, torch.int32))
    return x, x_scale, words, offsets, factors


def _case(m: int, n: int, k: int, *tags: str) -> Case:
    return Case(f"m{m}-n{n}-k{k}", {"m": m, "n": n, "k": k}, tags)


SPEC = KernelSpec(
    name=NAME,
    fn=fp8_fp4_gemm_folded,
    reference=reference.fp8_fp4_gemm_folded,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple({v.id: v for n, k in SHAPES for v in _variants(n, k)}.values()),
    select=lambda d: _select(d["m"], d["n"], d["k"]),
    contract=CONTRACT,
    cases=(
        _case(0, 128, 256, "test"),
        _case(1, 128, 256, "test"),
        _case(5, 128, 512, "test"),
        _case(17, 128, 512, "test"),
        _case(131, 256, 256, "test"),
        _case(257, 128, 512, "test"),
        *(_case(m, n, k, "gpu", "bench") for n, k in SHAPES for m in _TOKENS),
        *(_case(m, n, k, "gpu") for n, k in _DENSE_SHAPES for m in _TOKENS),
    ),
    num_bytes=lambda d: (
        d["m"] * d["k"]
        + d["m"] * (d["k"] // BLOCK_K)
        + d["n"] * (d["k"] // 2 + d["k"] // SCALE_K + 4)
        + d["m"] * d["n"] * 2
    ),
    num_flops=lambda d: 2 * d["m"] * d["n"] * d["k"],
    tolerance=reference.fp8_fp4_gemm_folded_tolerance,
    peers=("deepgemm", "humming"),
    source="DeepSeek-V4 report 5.2.1; reference kernel fp4_gemm",
    small={"n": 256, "k": 1024},
)
