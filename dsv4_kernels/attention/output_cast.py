"""What follows attention before the grouped output projection: inverse RoPE, and FP8 with scales of 128.

Macros on a block's output in shared memory, bf16 [heads, 512]. Every step is rounded as `reference.rope`
and `quant.reference.act_quant` do it, so codes and scales have the bits of those of the bf16 output.
"""

from dataclasses import dataclass
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels.attention.reference import MAX_POSITIONS
from dsv4_kernels.contract import Contract, require_input, require_shape, require_tensor
from dsv4_kernels.quant.act_quant import AMAX_MIN, E4M3_MAX
from dsv4_kernels.tile.scale import BF16_MAGNITUDE, F32_NAN, UE8M0_NAN, ue8m0_reciprocal, ue8m0_scale

HEAD_DIM = 512
ROPE_DIM = 64
NOPE_DIM = HEAD_DIM - ROPE_DIM
ROPE_PAIRS = ROPE_DIM // 2
BLOCK_K = 128  # dims a scale: what `wo_a_fp8` multiplies together
BLOCKS = HEAD_DIM // BLOCK_K
_TABLE = Contract(
    ("0 < num_positions", "num_positions <= MAX_POSITIONS"), consts={"MAX_POSITIONS": MAX_POSITIONS}
)


def with_table(contract: Contract) -> Contract:
    """Return the contract of a kernel that takes the table of angles, too."""
    return Contract(
        (*contract.clauses, *_TABLE.clauses),
        consts={**contract.consts, **_TABLE.consts},
        tensors=contract.tensors,
    )


def require_epilogue(
    kernel: str,
    sink: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    *,
    m: int,
    num_heads: int,
    device: torch.device,
) -> None:
    """Check what the last step of attention takes beside its sums.

    Args:
        kernel: named by errors.
        sink: [num_heads] fp32.
        positions: [m] int32.
        cos_sin: [num_positions, 64] fp32.
        m: queries.
        num_heads: heads of each.
        device: of the other inputs.

    Raises:
        ContractError: a clause of `with_table`, a dtype, a device or a shape does not hold.
    """
    require_input(kernel, "sink", sink, (num_heads,), dtype=torch.float32, device=device)
    require_input(kernel, "positions", positions, (m,), dtype=torch.int32, device=device)
    require_tensor(kernel, "cos_sin", cos_sin, dtype=torch.float32, ndim=2, device=device)
    num_positions = cos_sin.shape[0]
    _TABLE.check(kernel, num_positions=num_positions)
    require_shape(kernel, "cos_sin", cos_sin, (num_positions, ROPE_DIM))


def empty_fp8_output(
    like: torch.Tensor, m: int, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Allocate codes, scale and lse on the device of `like`.

    Returns:
        codes: [m, num_heads, 512] e4m3.
        scale: [m, num_heads, 4] e8m0.
        lse: [m, num_heads] fp32.
    """
    return (
        like.new_empty((m, num_heads, HEAD_DIM), dtype=torch.float8_e4m3fn),
        like.new_empty((m, num_heads, BLOCKS), dtype=torch.float8_e8m0fnu),
        like.new_empty((m, num_heads), dtype=torch.float32),
    )


def blocks_of(
    codes: torch.Tensor, scale: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return views as kernels write them: codes as [m, num_heads, 4, 128], scales as bytes."""
    return codes.view(*scale.shape, BLOCK_K), scale.view(torch.uint8), lse


def by_row(heads: int, threads: int, lanes: int = 8, blocks: int = BLOCKS) -> Any:
    """Return the layout of [heads, blocks, BLOCK_K]: `lanes` threads a scale's dims, neighbours each."""
    vector, rows = BLOCK_K // lanes, threads // (blocks * lanes)
    return T.Fragment(
        (heads, blocks, BLOCK_K),
        lambda i, b, j: (
            i % rows * (blocks * lanes) + b * lanes + j // vector,
            i // rows * vector + j % vector,
        ),
    )


def _where(condition: Any, value: Any, other: Any) -> Any:
    """Return `value` where a condition holds, or where there is none, else `other`."""
    return value if condition is None else T.if_then_else(condition, value, other)


@T.macro
def rotate_back(
    tile: Any,
    rotated: Any,
    cos_sin: Any,
    position: Any,
    heads: int,
    first: int = NOPE_DIM,
    is_rotated: Any = None,
):
    """Rotate 64 dims of each head by the negative angles of `position`; zeros outside the table.

    Args:
        tile: [heads, dims] bf16 in shared memory, updated.
        rotated: [heads, 64] fp32 fragment, overwritten.
        cos_sin: [num_positions, 64] fp32: 32 cosines, then 32 sines.
        position: number of a row of it.
        heads: how many.
        first: of the tile's dims; those of a whole head end with the ones that are rotated.
        is_rotated: condition, without which the dims stay as they are; None: always rotated.
    """
    for i, j in T.Parallel(heads, ROPE_DIM):
        even = T.cast(tile[i, first + j // 2 * 2], "float32")
        odd = T.cast(tile[i, first + j // 2 * 2 + 1], "float32")
        cos = cos_sin[position, j // 2]
        sin = -cos_sin[position, ROPE_PAIRS + j // 2]
        rotated[i, j] = _where(
            is_rotated,
            T.if_then_else(
                j % 2 == 0,
                T.ieee_sub(T.ieee_mul(even, cos), T.ieee_mul(odd, sin)),
                T.ieee_add(T.ieee_mul(even, sin), T.ieee_mul(odd, cos)),
            ),
            T.cast(tile[i, first + j], "float32"),
        )
    T.sync_threads()
    for i, j in T.Parallel(heads, ROPE_DIM):
        tile[i, first + j] = T.cast(rotated[i, j], "bfloat16")
    T.sync_threads()


@T.macro
def quantize(
    tile: Any,
    values: Any,
    magnitude: Any,
    amax: Any,
    exponent: Any,
    codes: Any,
    scale: Any,
    heads: int,
    blocks: int = BLOCKS,
):
    """Cast blocks of 128 dims to e4m3 with power-of-two scales, as `act_quant` does.

    Args:
        tile: [heads, dims] bf16 in shared memory.
        values: [heads, blocks, 128] bf16 fragment of layout `by_row`, overwritten.
        magnitude: [heads, blocks, 128] int32 fragment, overwritten.
        amax: [heads, blocks] int32 fragment, overwritten.
        exponent: [heads, blocks] int32 fragment, overwritten: the scales' UE8M0 bytes.
        codes: [heads, blocks, 128] e4m3 fragment, the result.
        scale: [heads, blocks] uint8 fragment, the result.
        heads: how many.
        blocks: of a head: four, or those of a part of it.
    """
    for i, b, j in T.Parallel(heads, blocks, BLOCK_K):
        values[i, b, j] = tile[i, b * BLOCK_K + j]
    for i, b, j in T.Parallel(heads, blocks, BLOCK_K):
        magnitude[i, b, j] = T.cast(T.reinterpret(values[i, b, j], "uint16"), "int32") & BF16_MAGNITUDE
    T.reduce_max(magnitude, amax, dim=2)
    for i, b in T.Parallel(heads, blocks):
        exponent[i, b] = ue8m0_scale(amax[i, b], AMAX_MIN, 1.0 / E4M3_MAX)
    for i, b, j in T.Parallel(heads, blocks, BLOCK_K):
        scaled = T.cast(values[i, b, j], "float32") * ue8m0_reciprocal(exponent[i, b])
        # A clamp would turn nan into 448, so a block that is not finite is nan by its scale.
        value = T.if_then_else(
            exponent[i, b] == UE8M0_NAN,
            T.reinterpret(F32_NAN, "float32"),
            T.clamp(scaled, -E4M3_MAX, E4M3_MAX),
        )
        codes[i, b, j] = T.cast(value, "float8_e4m3fn")
    for i, b in T.Parallel(heads, blocks):
        scale[i, b] = T.cast(exponent[i, b], "uint8")


@dataclass(frozen=True)
class Fp8Output:
    """A kernel's tensors that have to do with its output.

    Attributes:
        positions: [m] int32.
        cos_sin: [num_positions, 64] fp32: 32 cosines, then 32 sines.
        codes: [m, num_heads, 4, 128] e4m3.
        scale: [m, num_heads, 4] uint8: UE8M0 bytes.
    """

    positions: Any
    cos_sin: Any
    codes: Any
    scale: Any


def make_put(heads: int, threads: int, lanes: int = 8) -> Any:
    """Return the macro that rotates a tile bf16 [heads, 512] in shared memory back, casts and stores it.

    Its arguments are an `Fp8Output`, the query, the number of its group of `heads` heads, and the tile, which
    every thread sees.
    """
    cast_layout = by_row(heads, threads, lanes)

    @T.macro
    def put(outputs: Any, query: Any, group: Any, tile: Any):
        rotated = T.alloc_fragment((heads, ROPE_DIM), T.float32)
        values = T.alloc_fragment((heads, BLOCKS, BLOCK_K), T.bfloat16)
        magnitude = T.alloc_fragment((heads, BLOCKS, BLOCK_K), T.int32)
        codes = T.alloc_fragment((heads, BLOCKS, BLOCK_K), T.float8_e4m3fn)
        amax = T.alloc_fragment((heads, BLOCKS), T.int32)
        exponent = T.alloc_fragment((heads, BLOCKS), T.int32)
        scale_bytes = T.alloc_fragment((heads, BLOCKS), T.uint8)  # the body may have a storage called scales
        T.annotate_layout({values: cast_layout, codes: cast_layout})
        rotate_back(tile, rotated, outputs.cos_sin, outputs.positions[query], heads)
        quantize(tile, values, magnitude, amax, exponent, codes, scale_bytes, heads)
        for i, b, j in T.Parallel(heads, BLOCKS, BLOCK_K):
            outputs.codes[query, group * heads + i, b, j] = codes[i, b, j]
        for i, b in T.Parallel(heads, BLOCKS):
            outputs.scale[query, group * heads + i, b] = scale_bytes[i, b]

    return put
