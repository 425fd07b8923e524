"""KV path: weighted RMS norm, RoPE on the last 64 dims, FP8 of the first 448 (report 2.3): a cache row.

A warp holds a row: a lane has 16 neighbouring dims, four lanes a scale block, the last four what is rotated.
Rounded step by step as the reference does it; the sum of squares is float64 (see `q_norm_rope`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import reference
from dsv4_kernels.contract import Contract, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.pairs import even_f32, odd_f32, rms_factor, rotated_pair, square_sum
from dsv4_kernels.tile.scale import (
    BF16_TO_F32_SHIFT,
    F32_NAN,
    UE8M0_NAN,
    ue8m0_reciprocal,
    ue8m0_scale,
)

NAME = "kv_entry"
HEAD_DIM = 512
ROPE_DIM = 64
NOPE_DIM = HEAD_DIM - ROPE_DIM
NORM_EPS = 1e-6
PAIRS = HEAD_DIM // 2  # of neighbouring dims
BLOCK_PAIRS = 64 // 2  # of a scale block
BLOCKS = PAIRS // BLOCK_PAIRS  # of a row: the last is rotated, as wide as a scale block, and kept in bf16
NOPE_BLOCKS = BLOCKS - 1
NOPE_PAIRS = NOPE_BLOCKS * BLOCK_PAIRS
VALUE_BYTES = NOPE_DIM + 2 * ROPE_DIM
SCALES = BLOCKS  # bytes a row: seven scales and one of padding
WARP = 32  # threads
LANE_PAIRS = PAIRS // WARP
BLOCK_LANES = BLOCK_PAIRS // LANE_PAIRS  # that hold a scale block
F32_MAGNITUDE = 0x7FFFFFFF  # all bits but the sign
E4M3_MAX = 448.0
AMAX_MIN = 1e-4  # keeps an all-zero block finite


@dataclass(frozen=True)
class Config:
    """Rows a block, one a warp, and its width."""

    block_m: int = 4
    threads: int = 128


CONTRACT = Contract(
    ("0 <= m", "m <= MAX_TOKENS", "0 < num_positions", "num_positions <= MAX_POSITIONS"),
    consts={"MAX_TOKENS": 2**31 - 256, "MAX_POSITIONS": 1 << 20},
)


def make_kernel(config: Config) -> Any:
    """Return the PrimFunc; tokens and the table's length stay symbolic."""
    m, num_positions = T.dynamic("m"), T.dynamic("num_positions")
    block_m = config.block_m
    pairs, dims = (block_m, PAIRS), (block_m, PAIRS, 2)
    by_pair = T.Fragment(pairs, lambda i, p: (i * WARP + p // LANE_PAIRS, p % LANE_PAIRS))
    by_dim = T.Fragment(dims, lambda i, p, e: (i * WARP + p // LANE_PAIRS, p % LANE_PAIRS * 2 + e))
    by_block = T.Fragment(
        (block_m, BLOCKS, 2 * BLOCK_PAIRS),
        lambda i, b, x: (i * WARP + b * BLOCK_LANES + x // (2 * LANE_PAIRS), x % (2 * LANE_PAIRS)),
    )
    by_lane = T.Fragment((block_m, BLOCK_PAIRS), lambda i, p: (i * WARP + p, 0))
    by_row = T.Fragment((block_m,), forward_fn=lambda i, rep: (i * WARP + rep, 0), replicate=WARP)

    def half(word: Any, e: Any) -> Any:
        return T.if_then_else(e == 0, even_f32(word), odd_f32(word))

    @T.prim_func
    def kv_entry_kernel(
        kv: T.Tensor[(m, PAIRS), T.int32],
        positions: T.Tensor[(m,), T.int32],
        weight: T.Tensor[(PAIRS,), T.int32],
        cos_sin: T.Tensor[(num_positions, 2, BLOCK_PAIRS), T.float32],
        nope: T.Tensor[(m, NOPE_PAIRS, 2), T.float8_e4m3fn],
        scale: T.Tensor[(m, BLOCKS), T.uint8],
        rope: T.Tensor[(m, BLOCK_PAIRS), T.int32],
    ):
        with T.Kernel(T.ceildiv(m, block_m), threads=config.threads) as bm:
            words = T.alloc_fragment(pairs, T.int32)
            norm_weight = T.alloc_fragment(pairs, T.int32)
            position = T.alloc_fragment((block_m,), T.int32)
            cos = T.alloc_fragment((block_m, BLOCK_PAIRS), T.float32)
            sin = T.alloc_fragment((block_m, BLOCK_PAIRS), T.float32)
            squares = T.alloc_fragment(pairs, T.float64)
            total = T.alloc_fragment((block_m,), T.float64)
            norm = T.alloc_fragment((block_m,), T.float32)
            values = T.alloc_fragment(dims, T.float32)
            halves = T.alloc_fragment(dims, T.bfloat16)
            rows = T.alloc_shared(dims, T.bfloat16)
            magnitude = T.alloc_fragment((block_m, BLOCKS, 2 * BLOCK_PAIRS), T.int32)
            amax = T.alloc_fragment((block_m, BLOCKS), T.int32)
            exponent = T.alloc_fragment((block_m, BLOCKS), T.int32)
            factor = T.alloc_fragment((block_m, BLOCKS), T.float32)
            codes = T.alloc_fragment(dims, T.float8_e4m3fn)
            T.annotate_layout({words: by_pair, norm_weight: by_pair, cos: by_lane, sin: by_lane})
            T.annotate_layout({squares: by_pair, position: by_row, values: by_dim, halves: by_dim})
            T.annotate_layout({magnitude: by_block, codes: by_dim})

            # All that is read is asked for before the first of it is used.
            for i in T.Parallel(block_m):
                position[i] = positions[bm * block_m + i]
            for i, p in T.Parallel(block_m, PAIRS):
                words[i, p] = kv[bm * block_m + i, p]
            for i, p in T.Parallel(block_m, PAIRS):
                norm_weight[i, p] = weight[p]
            for i, p in T.Parallel(block_m, BLOCK_PAIRS):
                cos[i, p] = cos_sin[position[i], 0, p]
            for i, p in T.Parallel(block_m, BLOCK_PAIRS):
                sin[i, p] = cos_sin[position[i], 1, p]
            for i, p in T.Parallel(block_m, PAIRS):
                squares[i, p] = square_sum(words[i, p])
            T.reduce_sum(squares, total, dim=1)
            for i in T.Parallel(block_m):
                norm[i] = rms_factor(total[i], HEAD_DIM, NORM_EPS)
            for i, p, e in T.Parallel(*dims):
                values[i, p, e] = half(words[i, p], e) * norm[i] * half(norm_weight[i, p], e)
            for i, p, e in T.Parallel(*dims):
                halves[i, p, e] = T.cast(values[i, p, e], "bfloat16")
            # The last four lanes have what is rotated: through shared memory each lane gets a pair of it.
            for i, p, e in T.Parallel(*dims):
                rows[i, p, e] = halves[i, p, e]
            for i, p, e in T.Parallel(*dims):
                values[i, p, e] = T.cast(halves[i, p, e], "float32")
            for i, p, e in T.Parallel(*dims):
                magnitude[i, p // BLOCK_PAIRS, p % BLOCK_PAIRS * 2 + e] = (
                    T.reinterpret(values[i, p, e], "int32") & F32_MAGNITUDE
                )
            T.reduce_max(magnitude, amax, dim=2)
            for i, b in T.Parallel(block_m, BLOCKS):
                exponent[i, b] = ue8m0_scale(amax[i, b] >> BF16_TO_F32_SHIFT, AMAX_MIN, 1.0 / E4M3_MAX)
            for i, b in T.Parallel(block_m, BLOCKS):
                scale[bm * block_m + i, b] = T.cast(
                    T.if_then_else(b < NOPE_BLOCKS, exponent[i, b], 0), "uint8"
                )
            for i, b in T.Parallel(block_m, BLOCKS):
                factor[i, b] = T.if_then_else(
                    exponent[i, b] == UE8M0_NAN,
                    T.reinterpret(F32_NAN, "float32"),
                    ue8m0_reciprocal(exponent[i, b]),
                )
            # No code needs a bound: of a finite block no value is beyond 448 times its scale.
            for i, p, e in T.Parallel(*dims):
                values[i, p, e] = values[i, p, e] * factor[i, p // BLOCK_PAIRS]
            for i, p, e in T.Parallel(*dims):
                codes[i, p, e] = T.cast(values[i, p, e], "float8_e4m3fn")
            for i, p, e in T.Parallel(block_m, NOPE_PAIRS, 2):
                nope[bm * block_m + i, p, e] = codes[i, p, e]
            for i, p in T.Parallel(block_m, BLOCK_PAIRS):
                rope[bm * block_m + i, p] = rotated_pair(
                    T.cast(rows[i, NOPE_PAIRS + p, 0], "float32"),
                    T.cast(rows[i, NOPE_PAIRS + p, 1], "float32"),
                    cos[i, p],
                    sin[i, p],
                )

    return kv_entry_kernel


def _empty_outputs(
    kv: torch.Tensor, positions: torch.Tensor, weight: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m = kv.shape[0]
    nope = kv.new_empty((m, NOPE_DIM), dtype=torch.float8_e4m3fn)
    return nope, kv.new_empty((m, SCALES), dtype=torch.uint8), kv.new_empty((m, ROPE_DIM))


@operator(NAME, _empty_outputs)
def kv_entry(
    kv: torch.Tensor, positions: torch.Tensor, weight: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norm a token's KV vector, rotate its last 64 dims, cast the others to FP8: a cache row's parts.

    A row is divided by sqrt(mean of squares + 1e-6), multiplied by `weight`, rounded to bf16. Its last 64
    dims are rotated in fp32 by the angles of the token's position and rounded again; each 64 of the others
    are divided by 2**ceil(log2(max(amax, 1e-4) / 448)) and rounded to e4m3. A block with an inf or nan has
    a nan scale (byte 255) and nan values.

    Args:
        kv: [m, 512] bf16; m = 0 is allowed.
        positions: [m] int32. A position outside the table makes the rotated dims zero.
        weight: [512] bf16.
        cos_sin: [num_positions, 64] fp32: 32 cosines, then 32 sines.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        nope: [m, 448] e4m3.
        scale: [m, 8] uint8: seven UE8M0 bytes and a zero.
        rope: [m, 64] bf16.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_tensor(NAME, "kv", kv, dtype=torch.bfloat16, ndim=2)
    require_tensor(NAME, "positions", positions, dtype=torch.int32, ndim=1, device=kv.device)
    require_tensor(NAME, "weight", weight, dtype=torch.bfloat16, ndim=1, device=kv.device)
    require_tensor(NAME, "cos_sin", cos_sin, dtype=torch.float32, ndim=2, device=kv.device)
    m, num_positions = kv.shape[0], cos_sin.shape[0]
    CONTRACT.check(NAME, m=m, num_positions=num_positions)
    require_shape(NAME, "kv", kv, (m, HEAD_DIM))
    require_shape(NAME, "positions", positions, (m,))
    require_shape(NAME, "weight", weight, (HEAD_DIM,))
    require_shape(NAME, "cos_sin", cos_sin, (num_positions, ROPE_DIM))
    if runtime.uses_reference(kv):
        return reference.kv_entry(kv, positions, weight, cos_sin)
    nope, scale, rope = _empty_outputs(kv, positions, weight, cos_sin)
    if m:
        args = (
            kv.view(torch.int32),
            positions,
            weight.view(torch.int32),
            cos_sin.view(num_positions, 2, BLOCK_PAIRS),
            nope.view(m, NOPE_PAIRS, 2),
            scale,
            rope.view(torch.int32),
        )
        runtime.launch(make_kernel, _VARIANT.kwargs, args)
    return nope, scale, rope


_VARIANT = Variant("d512", {"config": Config()})


def _make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    m, num_positions = dims["m"], dims["num_positions"]
    kv = torch.randn(m, HEAD_DIM, generator=generator, device=device) * 3
    positions = torch.randint(0, num_positions, (m,), generator=generator, device=device, dtype=torch.int32)
    weight = 1 + torch.randn(HEAD_DIM, generator=generator, device=device) / 4
    table = reference.rope_table(num_positions, 160000.0, True, device)
    return kv.to(torch.bfloat16), positions, weight.to(torch.bfloat16), table


def _case(case_id: str, m: int, num_positions: int, *tags: str) -> Case:
    return Case(case_id, {"m": m, "num_positions": num_positions}, tags or ("test",))


SPEC = KernelSpec(
    name=NAME,
    fn=kv_entry,
    reference=reference.kv_entry,
    make_inputs=_make_inputs,
    make_kernel=make_kernel,
    variants=(_VARIANT,),
    select=lambda dims: _VARIANT,
    contract=CONTRACT,
    cases=(
        _case("empty", 0, 5),
        _case("one-row", 1, 1),
        _case("ragged", 67, 300),
        _case("m64", 64, 8192, "gpu", "bench"),
        _case("m4096", 4096, 8192, "gpu", "bench"),
    ),
    num_bytes=lambda d: d["m"] * (HEAD_DIM * 2 + VALUE_BYTES + SCALES + 4 + ROPE_DIM * 4),
    source="DeepSeek-V4 report 2.3 and 3.5.1; reference model's attention",
    small={"m": 5, "num_positions": 2},
)
