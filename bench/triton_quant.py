"""Plain Triton casts: what a person writes in an afternoon, as a baseline for ours.

Imports triton, which CPU builds of torch do not bring: only the benchmark imports this module.
"""

import torch
import triton
import triton.language as tl

_ROWS = 32  # scale blocks a program
_FP4_BLOCK = 32  # channels an FP4 scale
_ACT_AMAX_MIN = 1e-4
_FP4_AMAX_MIN = 6 * 2.0**-126


@triton.jit
def _scale_exponent(amax, largest_inverse: tl.constexpr):
    """Return the biased exponent of the least power of two >= amax / largest; 255 if amax is not finite."""
    bits = (amax * largest_inverse).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    return tl.where(amax < float("inf"), exponent, 255)


@triton.jit
def _act_quant_kernel(
    x, out, scale, num_blocks, amax_min: tl.constexpr, rows: tl.constexpr, block_k: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    offsets = row[:, None] * block_k + tl.arange(0, block_k)[None, :]
    mask = (row < num_blocks)[:, None]
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    magnitude = tl.where(values == values, tl.abs(values), float("inf"))  # max drops a nan
    exponent = _scale_exponent(tl.maximum(tl.max(magnitude, axis=1), amax_min), 1.0 / 448.0)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = tl.minimum(tl.maximum(values * inverse[:, None], -448.0), 448.0)
    code = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    code = tl.where((exponent == 255)[:, None], 0x7F, code).to(tl.uint8)
    tl.store(out + offsets, code, mask=mask)
    tl.store(scale + row, exponent.to(tl.uint8), mask=row < num_blocks)


@triton.jit
def _fp4_code(value, exponent):
    """Return the e2m1 code of value / scale: nearest, ties to even, saturating; 0 for a nan scale."""
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = tl.abs(value) * inverse[:, None]
    code = (
        (scaled > 0.25).to(tl.int32)
        + (scaled >= 0.75).to(tl.int32)
        + (scaled > 1.25).to(tl.int32)
        + (scaled >= 1.75).to(tl.int32)
        + (scaled > 2.5).to(tl.int32)
        + (scaled >= 3.5).to(tl.int32)
        + (scaled > 5.0).to(tl.int32)
    )
    sign = (value.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.where((exponent == 255)[:, None], 0, code | sign)


@triton.jit
def _fp4_quant_kernel(
    x, out, scale, num_blocks, amax_min: tl.constexpr, rows: tl.constexpr, pairs: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.arange(0, 2 * pairs)
    mask = (row < num_blocks)[:, None]
    values = tl.load(x + row[:, None] * (2 * pairs) + column[None, :], mask=mask, other=0.0).to(tl.float32)
    magnitude = tl.where(values == values, tl.abs(values), float("inf"))  # max drops a nan
    exponent = _scale_exponent(tl.maximum(tl.max(magnitude, axis=1), amax_min), 1.0 / 6.0)
    low, high = tl.split(tl.reshape(values, (rows, pairs, 2)))
    packed = (_fp4_code(low, exponent) | (_fp4_code(high, exponent) << 4)).to(tl.uint8)
    tl.store(out + row[:, None] * pairs + tl.arange(0, pairs)[None, :], packed, mask=mask)
    tl.store(scale + row, exponent.to(tl.uint8), mask=row < num_blocks)


def act_quant(x: torch.Tensor, block_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast bf16 [m, k] to e4m3 [m, k] and UE8M0 scales [m, k / block_k]."""
    m, k = x.shape
    out = x.new_empty((m, k), dtype=torch.uint8)
    scale = x.new_empty((m, k // block_k), dtype=torch.uint8)
    num_blocks = scale.numel()
    _act_quant_kernel[(triton.cdiv(num_blocks, _ROWS),)](
        x, out, scale, num_blocks, _ACT_AMAX_MIN, _ROWS, block_k
    )
    return out.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)


def fp4_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast bf16 [m, k] to packed e2m1 [m, k / 2] and UE8M0 scales [m, k / 32]."""
    m, k = x.shape
    out = x.new_empty((m, k // 2), dtype=torch.uint8)
    scale = x.new_empty((m, k // _FP4_BLOCK), dtype=torch.uint8)
    num_blocks = scale.numel()
    _fp4_quant_kernel[(triton.cdiv(num_blocks, _ROWS),)](
        x, out, scale, num_blocks, _FP4_AMAX_MIN, _ROWS, _FP4_BLOCK // 2
    )
    return out, scale.view(torch.float8_e8m0fnu)
