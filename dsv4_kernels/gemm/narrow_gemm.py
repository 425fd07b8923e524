"""out = x @ w.T for few weight rows (router, the indexer's head weights): bf16 operands, k in parts.

A block that takes all of k is bound by one multiprocessor's share of memory, and few weight rows make few
blocks. So k is cut into `PARTS` equal parts, whatever the number of tokens; a part is one chain of additions
of 16 channels in the order of k, as in `bf16_gemm`, whatever its tile. `fold_parts` then adds the parts, the
first first; with many tokens a block has all parts and adds them itself, in that order (`narrow_summed`).
Source: DeepSeek-V4 report 2.3.1, 3.3; V4 inference Indexer. Design and measurements: docs/gemm.md.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.contract import Contract
from dsv4_kernels.gemm import fold_parts, narrow_reference, narrow_summed, reference
from dsv4_kernels.gemm.bf16_gemm import (
    BF16,
    F32,
    MAX_TOKENS,
    WARPGROUP,
    Config,
    make_inputs,
    require_kind,
    require_operands,
)
from dsv4_kernels.gemm.rounds import MULTIPROCESSORS, ranges, rounds
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator

NAME = "narrow_gemm"
PARTS = 4  # of k
STEP_K = PARTS * 256  # channels: a stage of each part
PARTED = 0  # bits of an output where its parts are written, for `fold_parts` to add
MAX_N = 4096  # weight rows; more of them fill the machine with whole rows of k
_INSTRUCTION_M = 64  # rows of one wgmma
# Consumer warpgroups that the usual 240 registers a thread do not fit, and what threads of such blocks get.
_CROWDED = 3
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 24, 160
CONTRACT = Contract(
    (
        "0 <= m",
        "m <= MAX_TOKENS",
        "0 < n",
        "n % 64 == 0",
        "n <= MAX_N",
        "0 < k",
        "k % STEP_K == 0",
        "k <= 65536",
    ),
    consts={"MAX_TOKENS": MAX_TOKENS, "MAX_N": MAX_N, "STEP_K": STEP_K},
)


def make_kernel(n: int, k: int, config: Config, out_bits: int = PARTED) -> Any:
    """Return the PrimFunc for n x k weights; the number of tokens m stays symbolic.

    It writes the sum of each part of k, or, with 16 or 32 bits an output, their sum.
    """
    if out_bits != PARTED:
        return narrow_summed.make_summed(n, k, PARTS, out_bits, config)
    m = T.dynamic("m")
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    steps = k // PARTS // block_k
    shares_rows = block_m == _INSTRUCTION_M * config.warpgroups > _INSTRUCTION_M
    policy = T.GemmWarpPolicy.FullRow if shares_rows else T.GemmWarpPolicy.FullCol
    threads = WARPGROUP * config.warpgroups

    @T.prim_func
    def narrow_gemm_kernel(
        x: T.Tensor[(m, k), T.bfloat16],
        w: T.Tensor[(n, k), T.bfloat16],
        parts: T.Tensor[(m, PARTS, n), T.float32],
    ):
        with T.Kernel(T.ceildiv(m, block_m), n // block_n, PARTS, threads=threads) as (bm, bn, part):
            if config.warpgroups == _CROWDED:
                T.annotate_producer_reg_dealloc(_PRODUCER_REGISTERS)
                T.annotate_consumer_reg_alloc(_CONSUMER_REGISTERS)
            x_tile = T.alloc_shared((block_m, block_k), T.bfloat16)
            w_tile = T.alloc_shared((block_n, block_k), T.bfloat16)
            acc = T.alloc_fragment((block_m, block_n), T.float32)
            T.clear(acc)
            for ko in T.Pipelined(steps, num_stages=config.num_stages):
                T.copy(x[bm * block_m, (part * steps + ko) * block_k], x_tile)
                T.copy(w[bn * block_n, (part * steps + ko) * block_k], w_tile)
                T.gemm(x_tile, w_tile, acc, transpose_B=True, policy=policy)
            for i, j in T.Parallel(block_m, block_n):
                parts[bm * block_m + i, part, bn * block_n + j] = acc[i, j]

    return narrow_gemm_kernel


_NARROW = Config(block_m=64, block_n=16, block_k=256, num_stages=5)
_MIDDLE = Config(block_m=64, block_n=32, block_k=256, num_stages=4)
_ROUTER = 256  # weight rows up to which tiles of 32 only repeat the reads of x
_SQUARE = Config(block_m=64, block_n=64, block_k=128, num_stages=6)
_TALL = Config(block_m=128, block_n=64, block_k=128, num_stages=4, warpgroups=2)
_LARGE = Config(block_m=128, block_n=128, block_k=64, num_stages=6, warpgroups=2)
# All experts of a router, so that x is read once. A round takes 7/8 of those of _LARGE over the same columns,
# the fold included: 27.7 us against 2 x 15.8 (256), 49.2 against 3 x 18.9 (384).
_WHOLE = {
    256: Config(block_m=128, block_n=256, block_k=64, num_stages=4, warpgroups=2),
    384: Config(block_m=128, block_n=384, block_k=64, num_stages=3, warpgroups=3),
}
_WHOLE_COST, _LARGE_COST = 7, 8
_MANY = 2 * MULTIPROCESSORS // PARTS * _LARGE.block_m  # tokens of two full rounds of whole tiles


def _configs(n: int) -> tuple[tuple[int, Config], ...]:
    """Return (largest number of tokens, tile) pairs; every one adds in the same order."""
    few = _NARROW if n <= _ROUTER else _MIDDLE
    ladder = [(MULTIPROCESSORS // (PARTS * n // c.block_n) * c.block_m, c) for c in (few, _SQUARE)]
    whole = _WHOLE.get(n)
    if whole is None:
        return (*ladder, (MAX_TOKENS, _LARGE if n % _LARGE.block_n == 0 else _TALL))

    def choose(m: int) -> Config:
        blocks = m // whole.block_m * PARTS
        columns = n // _LARGE.block_n
        is_whole = rounds(blocks) * columns * _WHOLE_COST < rounds(blocks * columns) * _LARGE_COST
        return whole if is_whole else _LARGE

    return (*ladder, *ranges(choose, ladder[-1][0], _LARGE.block_m, _MANY, (MAX_TOKENS, whole)))


# Tiles of all parts; each has the tokens with which its blocks are one round of multiprocessors.
_THIN = Config(block_m=32, block_n=64, block_k=256, num_stages=4, weights_first=True)
_BROAD = Config(block_m=64, block_n=128, block_k=64, num_stages=8, warpgroups=2)
_BROAD_DEEP = Config(block_m=64, block_n=128, block_k=64, num_stages=9, warpgroups=2)
_QUARTER = Config(block_m=64, block_n=96, block_k=128, num_stages=4, warpgroups=2)
_ALL_EXPERTS = Config(block_m=64, block_n=256, block_k=64, num_stages=5, warpgroups=2)
_HALF = Config(block_m=64, block_n=192, block_k=64, num_stages=7, warpgroups=2)
# By weight rows and channels: tokens after which a block has all parts, and (largest number of tokens, tile)
# pairs. Other shapes were not measured: their parts are written for every batch.
_SUMMED: dict[tuple[int, int], tuple[int, tuple[tuple[int, Config], ...]]] = {
    (64, 7168): (
        2560,
        ((32 * MULTIPROCESSORS, _THIN), (MAX_TOKENS, _SQUARE)),
    ),
    (256, 4096): (
        512,
        (
            (8 * MULTIPROCESSORS, _THIN),
            (16 * MULTIPROCESSORS, _SQUARE),
            (32 * MULTIPROCESSORS, _BROAD_DEEP),
            (MAX_TOKENS, _ALL_EXPERTS),
        ),
    ),
    (384, 7168): (
        1408,
        (
            (16 * MULTIPROCESSORS, _QUARTER),
            (MULTIPROCESSORS // 3 * _BROAD.block_m, _BROAD),  # three tiles a row
            (MAX_TOKENS, _HALF),
        ),
    ),
    # Small ones of no model, so that checks that need little work meet both forms in few batches.
    (128, 4096): (128, ((MAX_TOKENS, _SQUARE),)),
    (384, 4096): (128, ((MAX_TOKENS, _QUARTER),)),
}


def _summed(n: int, k: int) -> tuple[tuple[int, Config], ...]:
    """Return (largest number of tokens, tile) pairs of blocks that have all parts."""
    return _SUMMED[n, k][1] if (n, k) in _SUMMED else ()


def _summed_after(n: int, k: int) -> int:
    """Return the most tokens whose parts are written."""
    return _SUMMED[n, k][0] if (n, k) in _SUMMED else MAX_TOKENS


def multiply(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
    """Multiply into `out`; operands are as `narrow_gemm` checks them, and not empty."""
    m, (n, k) = x.shape[0], w.shape
    variant = select(m, n, k, 8 * out.element_size())
    if variant.kwargs["out_bits"] != PARTED:
        runtime.launch(make_kernel, variant.kwargs, (x, w, out))
        return
    parts = x.new_empty((m, PARTS, n), dtype=torch.float32)
    runtime.launch(make_kernel, variant.kwargs, (x, w, parts))
    fold_parts.launch(parts, out)


def workspace_bytes(dims: Mapping[str, int]) -> int:
    """Return the bytes of the parts, which a call allocates beside its output where they are written."""
    m, n, k = (dims[name] for name in ("m", "n", "k"))
    return 4 * PARTS * m * n if select(m, n, k, 32).kwargs["out_bits"] == PARTED else 0


def _empty_output(x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return x.new_empty((x.shape[0], w.shape[0]), dtype=out_dtype)


@operator(NAME, _empty_output)
def narrow_gemm(x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Multiply bf16 activations by few bf16 weight rows: out = x @ w.T, four parts of k.

    Products are exact. Those of each quarter of the channels are added in the tensor core's fp32
    accumulators, 16 channels at a time in the order of k; the four sums are then added in fp32, the first
    first. So a row of `out` depends, bit for bit, on its row of `x` alone, whatever m is.

    Args:
        x: [m, k] bf16, contiguous; m = 0 is allowed.
        w: [n, k] bf16, contiguous.
        out_dtype: float32 or bfloat16.
        Both 16-byte aligned, on one device; n a multiple of 64 up to 4096, k of 1024 up to 65536.

    Returns:
        [m, n] of `out_dtype`. A call allocates 16 bytes an output beside it, unless one block has all parts.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    m, _, _ = require_operands(NAME, CONTRACT, x, w)
    require_kind(NAME, out_dtype)
    if runtime.uses_reference(x):
        return reference.bf16_gemm(x, w, out_dtype)
    out = _empty_output(x, w, out_dtype)
    if m:
        multiply(x, w, out)
    return out


def _variant(n: int, k: int, config: Config, out_bits: int) -> Variant:
    form = f"-b{out_bits}" if out_bits != PARTED else ""
    name = f"n{n}-k{k}{form}-{config.block_m}x{config.block_n}x{config.block_k}"
    return Variant(name, {"n": n, "k": k, "out_bits": out_bits, "config": config})


@cache
def variants(n: int, k: int, out_bits: int) -> tuple[tuple[int, Variant], ...]:
    """Return (largest number of tokens, variant) pairs of one form: parts written, or an output's bits."""
    if out_bits == PARTED:
        # The tile of the most tokens whose parts are written is never asked for more.
        after = _summed_after(n, k)
        found = [pair for pair in _configs(n) if pair[0] < after]
        found.append((MAX_TOKENS, next(config for limit, config in _configs(n) if limit >= after)))
    else:
        found = _summed(n, k)
    return tuple((limit, _variant(n, k, config, out_bits)) for limit, config in found)


def distinct(n: int, k: int, out_bits: int) -> tuple[Variant, ...]:
    """Return the variants of these weights for outputs of so many bits, of both forms, each once."""
    both = (*variants(n, k, PARTED), *variants(n, k, out_bits))
    return tuple({variant.id: variant for _, variant in both}.values())


def select(m: int, n: int, k: int, out_bits: int) -> Variant:
    """Return the variant for m rows and outputs of so many bits; with PARTED, of those that write parts."""
    is_summed = out_bits != PARTED and m > _summed_after(n, k)
    return next(v for limit, v in variants(n, k, out_bits if is_summed else PARTED) if m <= limit)


def select_for(dims: Mapping[str, int], out_bits: int) -> Variant:
    """Return the variant for the dims of a case, or of a form.

    Dims with `out_bits` are those of one form, whose variants are compared with each other for every batch;
    that both forms add alike is compared beside them (tests/kernels/test_narrow_summed.py).
    """
    m, n, k = (dims[name] for name in ("m", "n", "k"))
    if "out_bits" not in dims:
        return select(m, n, k, out_bits)
    return next(v for limit, v in variants(n, k, dims["out_bits"]) if m <= limit)


# n x k of V4: the indexer's head weights (Pro), in bf16.
SHAPES = ((64, 7168, BF16),)
_BITS = {BF16: 16, F32: 32}


def _tolerance(
    out: torch.Tensor, x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype
) -> tuple[torch.Tensor]:
    return narrow_reference.narrow_gemm_tolerance(out, x, w, out_dtype, PARTS)


def _case(m: int, n: int, k: int, out: str, *tags: str) -> Case:
    return Case(f"m{m}-n{n}-k{k}-{out}", {"m": m, "n": n, "k": k, "f32_out": int(out == F32)}, tags)


SPEC = KernelSpec(
    name=NAME,
    fn=narrow_gemm,
    reference=reference.bf16_gemm,
    make_inputs=make_inputs,
    make_kernel=make_kernel,
    variants=tuple(variant for n, k, out in SHAPES for variant in distinct(n, k, _BITS[out])),
    select=lambda d: select_for(d, 32 if d.get("f32_out") else 16),
    contract=CONTRACT,
    cases=(
        _case(0, 64, 1024, F32, "test"),
        _case(1, 64, 1024, BF16, "test"),
        _case(70, 128, 2048, F32, "test"),
        _case(300, 64, 1024, BF16, "test"),
        *(_case(m, *shape, "gpu", "bench") for shape in SHAPES for m in (1, 16, 64, 128, 1024, 4096)),
    ),
    num_bytes=lambda d: 2 * (d["m"] + d["n"]) * d["k"] + d["m"] * d["n"] * (4 if d["f32_out"] else 2),
    num_flops=lambda d: 2 * d["m"] * d["n"] * d["k"],
    tolerance=_tolerance,
    peers=("torch_matmul",),
    source="DeepSeek-V4 report 2.3.1, 3.3; V4 inference Indexer",
    small={"n": 128, "k": 4096},
    workspace_bytes=workspace_bytes,
)
