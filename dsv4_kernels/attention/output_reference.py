"""PyTorch reference of attention's output as `wo_a_fp8` takes it; imports nothing from the kernels."""

from collections.abc import Mapping

import torch

from dsv4_kernels.attention import decode_reference
from dsv4_kernels.attention.reference import (
    NOPE_DIM,
    angles,
    rope,
    rope_table,
    scaled_blocks,
    sparse_attention,
    sparse_attention_tolerance,
)
from dsv4_kernels.quant.reference import act_quant

BLOCK_K = 128  # dims a scale
E4M3_MAX = 448.0
AMAX_MIN = 1e-4
E4M3_HALF_STEP = 2.0**-4  # of a value, half of the last of three fraction bits
E4M3_HALF_LEAST = 2.0**-10  # half of the least value
BF16_STEP = 2.0**-8
THETA = 160000.0  # of layers with compressed entries


def make_angles(
    dims: Mapping[str, int], device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random positions of m queries, of which one is outside the table, and the table."""
    m, num_positions = dims["m"], dims["num_positions"]
    generator = torch.Generator(device).manual_seed(seed)
    positions = torch.randint(0, num_positions, (m,), generator=generator, device=device, dtype=torch.int32)
    positions[m // 3 : m // 3 + 1] = num_positions
    return positions, rope_table(num_positions, THETA, True, device)


def fp8_output(
    out: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate bf16 [m, heads, 512] back by the angles of `positions`, and cast it.

    Returns:
        codes: [m, heads, 512] e4m3.
        scale: [m, heads, 4] e8m0.
    """
    m, heads, dim = out.shape
    rotated = rope(out, angles(cos_sin, positions), inverse=True)
    codes, scale = act_quant(rotated.reshape(m, heads * dim), BLOCK_K)
    return codes.view(m, heads, dim), scale.view(m, heads, dim // BLOCK_K)


def sparse_attention_fp8(
    q: torch.Tensor,
    idx: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `fp8_output` of `sparse_attention`'s output, and its lse."""
    out, lse = sparse_attention(q, idx, kv, sink)
    return *fp8_output(out, positions, cos_sin), lse


def sparse_attention_fp8_tolerance(
    codes: torch.Tensor,
    scale: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    idx: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return bounds on |got - want| elementwise.

    The bf16 output's bound goes through the rotation, whose result is rounded to bf16 once. What a block's
    largest magnitude may be within it decides which scales are possible; where there is one alone, codes are
    apart by the bound over the scale and both roundings, elsewhere a power of two may come between them.
    """
    out, _ = sparse_attention(q, idx, kv, sink)
    bound, lse_bound = sparse_attention_tolerance(out, lse, q, idx, kv, sink)
    return *_fp8_tolerance(codes, scale, out, bound, positions, cos_sin), lse_bound


def _fp8_tolerance(
    codes: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    bound: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bounds on codes and scales that follow from `bound`, the one on the bf16 output."""
    cos, sin = (part[:, None].abs().double() for part in angles(cos_sin, positions).chunk(2, dim=-1))
    even, odd = bound[..., NOPE_DIM::2], bound[..., NOPE_DIM + 1 :: 2]
    rotated = rope(out, angles(cos_sin, positions), inverse=True).double()
    pair = torch.stack((even * cos + odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    bound = torch.cat((bound[..., :NOPE_DIM], pair), dim=-1)
    bound[..., NOPE_DIM:] += BF16_STEP * (rotated[..., NOPE_DIM:].abs() + pair)
    blocks, error = rotated.unflatten(-1, (-1, BLOCK_K)), bound.unflatten(-1, (-1, BLOCK_K))
    _, exponent = scaled_blocks(blocks, BLOCK_K, AMAX_MIN, E4M3_MAX)
    extremes = (blocks.abs() - error).clamp(min=0), blocks.abs() + error
    least, most = (scaled_blocks(e, BLOCK_K, AMAX_MIN, E4M3_MAX)[1] for e in extremes)
    apart = torch.maximum(most - exponent, exponent - least).squeeze(-1)
    got = torch.ldexp(blocks.abs() + error, -least).clamp(max=2 * E4M3_MAX)
    same = torch.ldexp(error, -exponent) + 2 * (E4M3_HALF_STEP * got + E4M3_HALF_LEAST)
    other = got + codes.double().abs().view_as(got)
    bound_codes = torch.where(apart[..., None] > 0, other, same)
    # e8m0 is compared as the number it means: a byte up doubles it.
    bound_scale = scale.double() * (torch.exp2(apart.double()) - 1)
    return bound_codes.flatten(-2), bound_scale


def sparse_decode_fp8(
    q: torch.Tensor, *inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `fp8_output` of `sparse_decode`'s output, and its lse; positions and the table come last."""
    *lists, positions, cos_sin = inputs
    out, lse = decode_reference.sparse_decode(q, *lists)
    return *fp8_output(out, positions, cos_sin), lse


def sparse_decode_fp8_tolerance(
    codes: torch.Tensor, scale: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, *inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return bounds as `sparse_attention_fp8_tolerance` derives them."""
    *lists, positions, cos_sin = inputs
    out, _ = decode_reference.sparse_decode(q, *lists)
    bound, lse_bound = decode_reference.sparse_decode_tolerance(out, lse, q, *lists)
    return *_fp8_tolerance(codes, scale, out, bound, positions, cos_sin), lse_bound


def fold_fp8(
    acc: torch.Tensor, top: torch.Tensor, total: torch.Tensor, *inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `fp8_output` of what `hca_fold` returns, and its lse."""
    sink, positions, cos_sin = inputs
    out, lse = decode_reference.hca_fold(acc, top, total, sink)
    return *fp8_output(out, positions, cos_sin), lse


def fold_fp8_tolerance(
    codes: torch.Tensor, scale: torch.Tensor, lse: torch.Tensor, *inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return bounds as `sparse_attention_fp8_tolerance` derives them."""
    *parts, sink, positions, cos_sin = inputs
    acc, top, total = parts
    out, _ = decode_reference.hca_fold(acc, top, total, sink)
    bound, lse_bound = decode_reference.hca_fold_tolerance(out, lse, acc, top, total, sink)
    return *_fp8_tolerance(codes, scale, out, bound, positions, cos_sin), lse_bound
