"""Q path: RMS of each head without weight, then RoPE on its last 64 dims (report 2.3; V4's attention).

A warp holds a head: 32 lanes of 8 neighbouring dims, twice. Rows are read and written once, 16 bytes a lane,
as words of two bf16. Squares are summed in float64, whose order shows in no bit of a bf16 but for sums within
2**-53 of a rounding boundary, and the rest is rounded step by step as the reference does it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import reference
from dsv4_kernels.contract import Contract, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.pairs import (
    bf16_pair,
    even_f32,
    odd_f32,
    rms_factor,
    rotated_pair,
    round_to_bf16,
    square_sum,
)

NAME = "q_norm_rope"
HEAD_DIM = 512
ROPE_DIM = 64
NORM_EPS = 1e-6
HALF_PAIRS = HEAD_DIM // 2 // 2  # pairs of neighbouring dims in half a head, which 32 lanes hold at once
ROPE_PAIRS = ROPE_DIM // 2
WARP = 32  # threads
VECTOR = 4  # words a lane reads at once
FIRST_ROPE_PAIR = HALF_PAIRS - ROPE_PAIRS  # in the second half


@dataclass(frozen=True)
class Config:
    """Heads a block, one a warp, and its width."""

    block_heads: int = 4
    threads: int = 128


CONTRACT = Contract(
    (
        "0 <= m",
        "m <= MAX_TOKENS",
        "0 < num_positions",
        "num_positions <= MAX_POSITIONS",
        "0 < num_heads",
        "num_heads % BLOCK_HEADS == 0",
    ),
    consts={"MAX_TOKENS": 2**31 - 256, "MAX_POSITIONS": 1 << 20, "BLOCK_HEADS": Config.block_heads},
)


def make_kernel(num_heads: int, config: Config) -> Any:
    """Return the PrimFunc for `num_heads` heads a token; tokens and the table's length stay symbolic."""
    m, num_positions = T.dynamic("m"), T.dynamic("num_positions")
    block_heads = config.block_heads

    # A head is a warp's, and VECTOR neighbouring words of each half a lane's.
    by_warp = T.Fragment((block_heads, HALF_PAIRS), lambda i, p: (i * WARP + p // VECTOR, p % VECTOR))

    @T.prim_func
    def q_norm_rope_kernel(
        q: T.Tensor[(m, num_heads, 2, HALF_PAIRS), T.int32],
        positions: T.Tensor[(m,), T.int32],
        cos_sin: T.Tensor[(num_positions, 2, ROPE_PAIRS), T.float32],
        out: T.Tensor[(m, num_heads, 2, HALF_PAIRS), T.int32],
    ):
        with T.Kernel(m, num_heads // block_heads, threads=config.threads) as (token, bh):
            low = T.alloc_fragment((block_heads, HALF_PAIRS), T.int32)
            high = T.alloc_fragment((block_heads, HALF_PAIRS), T.int32)
            squares = T.alloc_fragment((block_heads, HALF_PAIRS), T.float64)
            total = T.alloc_fragment((block_heads,), T.float64)
            norm = T.alloc_fragment((block_heads,), T.float32)
            T.annotate_layout({low: by_warp, high: by_warp})

            for i, p in T.Parallel(block_heads, HALF_PAIRS):
                low[i, p] = q[token, bh * block_heads + i, 0, p]
            for i, p in T.Parallel(block_heads, HALF_PAIRS):
                high[i, p] = q[token, bh * block_heads + i, 1, p]
            for i, p in T.Parallel(block_heads, HALF_PAIRS):
                squares[i, p] = square_sum(low[i, p]) + square_sum(high[i, p])
            T.reduce_sum(squares, total, dim=1)
            for i in T.Parallel(block_heads):
                norm[i] = rms_factor(total[i], HEAD_DIM, NORM_EPS)
            for i, p in T.Parallel(block_heads, HALF_PAIRS):
                low[i, p] = bf16_pair(even_f32(low[i, p]) * norm[i], odd_f32(low[i, p]) * norm[i])
            for i, p in T.Parallel(block_heads, HALF_PAIRS):
                is_rotated = p >= FIRST_ROPE_PAIR
                cos = T.if_then_else(is_rotated, cos_sin[positions[token], 0, p - FIRST_ROPE_PAIR], 0.0)
                sin = T.if_then_else(is_rotated, cos_sin[positions[token], 1, p - FIRST_ROPE_PAIR], 0.0)
                cos = cos + T.if_then_else(is_rotated, 0.0, 1.0)
                even = round_to_bf16(even_f32(high[i, p]) * norm[i])
                odd = round_to_bf16(odd_f32(high[i, p]) * norm[i])
                high[i, p] = rotated_pair(even, odd, cos, sin)
            for i, half, p in T.Parallel(block_heads, 2, HALF_PAIRS):
                out[token, bh * block_heads + i, half, p] = T.if_then_else(half == 0, low[i, p], high[i, p])

    return q_norm_rope_kernel


def _empty_output(q: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(q)


@operator(NAME, _empty_output)
def q_norm_rope(q: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Norm each head of q and rotate its last 64 dims.

    A head is divided by sqrt(mean of squares + 1e-6) and rounded to bf16; then the pairs (2j, 2j + 1) of its
    last 64 dims are rotated in fp32 by the angles of the token's position and rounded again.

    Args:
        q: [m, num_heads, 512] bf16, contiguous, num_heads a multiple of 4; m = 0 is allowed.
        positions: [m] int32. A position outside the table makes the rotated dims zero.
        cos_sin: [num_positions, 64] fp32: 32 cosines, then 32 sines.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        [m, num_heads, 512] bf16.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(NAME, "q", q, dtype=torch.bfloat16, ndim=3)
    require_tensor(NAME, "positions", positions, dtype=torch.int32, ndim=1, device=q.device)
    require_tensor(NAME, "cos_sin", cos_sin, dtype=torch.float32, ndim=2, device=q.device)
    m, num_heads, _ = q.shape
    num_positions = cos_sin.shape[0]
    CONTRACT.check(NAME, m=m, num_heads=num_heads, num_positions=num_positions)
    require_shape(NAME, "q", q, (m, num_heads, HEAD_DIM))
    require_shape(NAME, "positions", positions, (m,))
    require_shape(NAME, "cos_sin", cos_sin, (num_positions, ROPE_DIM))
    if runtime.uses_reference(q):
        return reference.q_norm_rope(q, positions, cos_sin)
    out = torch.empty_like(q)
    if m:
        table = cos_sin.view(num_positions, 2, ROPE_PAIRS)
        args = (_words(q), positions, table, _words(out))
        runtime.launch(make_kernel, _variant(num_heads).kwargs, args)
    return out


def _words(heads: torch.Tensor) -> torch.Tensor:
    m, num_heads, _ = heads.shape
    return heads.view(torch.int32).view(m, num_heads, 2, HALF_PAIRS)


@cache
def _variant(num_heads: int) -> Variant:
    return Variant(f"h{num_heads}", {"num_heads": num_heads, "config": Config()})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    m, num_positions = dims["m"], dims["num_positions"]
    shape = (m, dims["num_heads"], HEAD_DIM)
    q = torch.randn(shape, generator=generator, device=device) * 3
    positions = torch.randint(0, num_positions, (m,), generator=generator, device=device, dtype=torch.int32)
    return q.to(torch.bfloat16), positions, reference.rope_table(num_positions, 160000.0, True, device)


def _case(case_id: str, m: int, num_heads: int, num_positions: int, *tags: str) -> Case:
    return Case(case_id, {"m": m, "num_heads": num_heads, "num_positions": num_positions}, tags or ("test",))


SPEC = KernelSpec(
    name=NAME,
    fn=q_norm_rope,
    reference=reference.q_norm_rope,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=tuple(_variant(h) for h in (64, 128)),
    select=lambda dims: _variant(dims["num_heads"]),
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 16, 5),
        _case("one-row", 1, 4, 1),
        _case("ragged", 7, 12, 300),
        _case("flash-64", 64, 64, 8192, "gpu", "bench"),
        _case("flash-4096", 4096, 64, 8192, "gpu", "bench"),
        _case("pro-64", 64, 128, 8192, "gpu", "bench"),
        _case("pro-4096", 4096, 128, 8192, "gpu", "bench"),
    ),
    num_bytes=lambda d: d["m"] * (d["num_heads"] * HEAD_DIM * 4 + 4 + ROPE_DIM * 4),
    source="DeepSeek-V4 report 2.3; reference model's attention",
    small={"m": 1, "num_heads": 4, "num_positions": 2},
)
