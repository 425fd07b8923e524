"""PyTorch references of the matrix products; imports nothing from the kernels.

Large outputs are computed some rows at a time: in float64 a batch would not leave a GPU room for others.
"""

from collections.abc import Callable

import torch

_ELEMENTS = 1 << 25  # of float64 outputs computed at a time: 256 MiB


def _by_rows(
    product: Callable[..., torch.Tensor], *operands: torch.Tensor, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return product(*operands) as `dtype`, so many rows of the operands at a time that memory is bounded."""
    rows = max(_ELEMENTS // max(columns, 1), 1)
    if operands[0].shape[0] <= rows:
        return product(*operands).to(dtype)
    parts = zip(*(operand.split(rows) for operand in operands), strict=True)
    return torch.cat([product(*part).to(dtype) for part in parts])


def _expand_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Return float64 [n, k] of packed e2m1 [n, k/2], the even index in the low nibble."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64, device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    return torch.where(codes >= 8, -values[codes & 7], values[codes & 7])


def _scaled(values: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """Return float64 values times their UE8M0 scales, one a 1 x block group."""
    byte = scale.view(torch.uint8).int().repeat_interleave(block, dim=-1)
    return torch.where(byte == 255, torch.nan, torch.ldexp(values.double(), byte - 127))


def _matmul(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a @ b.T of float64 operands as `dtype`."""
    return _by_rows(lambda rows: rows @ b.T, a, columns=b.shape[0], dtype=dtype)


def fp8_fp4_gemm(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor
) -> torch.Tensor:
    """Return bf16 [m, n] of the exact product (float64) of the scaled operands."""
    return _matmul(_scaled(x, x_scale, 128), _scaled(_expand_e2m1(w), w_scale, 32), torch.bfloat16)


def fp8_fp4_gemm_tolerance(
    out: torch.Tensor, x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor
) -> tuple[torch.Tensor]:
    """Return a bound on |got - out| elementwise, from how sm_90a adds.

    The tensor core aligns the 32 products of one instruction to the largest and keeps 13 bits below
    it, so a chunk of 32 is off by at most 32 * 2**-13 times its largest product, itself at most the
    product of the operands' largest magnitudes. Chunks are added in fp32 (five roundings of 2**-24
    a chunk, against the running sum's bound). Both results are rounded once to bf16, whose 8
    significant bits make that 2**-8 of the value each.
    """
    b = _scaled(_expand_e2m1(w), w_scale, 32).abs().unflatten(-1, (-1, 32))
    largest, every = b.amax(-1).T, b.flatten(-2).T

    def bound(out: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        a = a.abs().unflatten(-1, (-1, 32))
        chunks, sums = a.amax(-1) @ largest, a.flatten(-2) @ every
        return 32 * 2.0**-13 * chunks + 5 * 2.0**-24 * a.shape[-2] * sums + 2 * 2.0**-8 * out.double().abs()

    return (_by_rows(bound, out, _scaled(x, x_scale, 128), columns=out.shape[1], dtype=torch.float64),)


def _scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Return float64 values of float32 or UE8M0 scales."""
    if scale.dtype == torch.float32:
        return scale.double()
    byte = scale.view(torch.uint8).int()
    return torch.where(
        byte == 255, torch.nan, torch.ldexp(torch.ones_like(byte, dtype=torch.float64), byte - 127)
    )


def fp8_gemm(x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """Return bf16 [m, n] of the exact product (float64) of the scaled operands."""
    a = x.double() * _scale_values(x_scale).repeat_interleave(128, dim=1)
    b = w.double() * _scale_values(w_scale).repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
    return _matmul(a, b, torch.bfloat16)


def fp8_gemm_tolerance(
    out: torch.Tensor, x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor
) -> tuple[torch.Tensor]:
    """Return a bound on |got - out| elementwise, from how sm_90a adds.

    One instruction adds 32 products to the partial sum it is given: all 33 are aligned to the largest
    and keep 13 bits below it. The sum starts anew every 128 channels. Scaling a partial sum and adding it
    rounds in fp32, three times 2**-24 against all products so far. Both results are rounded once to
    bf16, whose 8 significant bits make that 2**-8 of the value each.
    """
    a = x.double() * _scale_values(x_scale).repeat_interleave(128, dim=1)
    b = w.double() * _scale_values(w_scale).repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
    return (_block_sum_bound(out, a, b),)


def _block_sum_bound(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _by_rows(
        lambda part, rows: _block_sum_bound_of(part, rows, b),
        out,
        a,
        columns=out.shape[1],
        dtype=torch.float64,
    )


def _block_sum_bound_of(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    channels, chunk = 128, 32
    rounds = a.shape[1] // channels
    bound = 3 * 2.0**-24 * rounds * (a.abs() @ b.abs().T) + 2 * 2.0**-8 * out.double().abs()
    partial = torch.zeros_like(bound)
    for start in range(0, a.shape[1], chunk):
        left, right = a[:, start : start + chunk], b[:, start : start + chunk]
        if start % channels == 0:
            partial = torch.zeros_like(bound)
        largest = torch.outer(left.abs().amax(1), right.abs().amax(1)).maximum(partial.abs())
        bound += (chunk + 1) * 2.0**-13 * largest
        partial += left @ right.T
    return bound


def _folded_weights(words: torch.Tensor, offsets: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return float64 [n, k] of folded weights (layout: `FoldedWeights`)."""
    n, k = words.shape[0], words.shape[1] * 8
    word = words.long() & 0xFFFFFFFF
    channels = torch.empty(n, k, dtype=torch.float64, device=words.device)
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64, device=words.device)
    position = torch.arange(k // 8, device=words.device)
    block, thread, group = position // 16, position % 16 // 4, position % 4
    for number in range(8):
        half, element = divmod(number, 4)
        holder = 2 * element + 1 - half
        magnitude = values[(word >> (4 * number)) & 7]
        sign = 1 - 2 * ((word >> (4 * holder + 3)) & 1)
        channels[:, block * 128 + group * 32 + half * 16 + thread * 4 + element] = magnitude * sign
    exponent = offsets.int().repeat_interleave(32, dim=1) - 5
    return torch.ldexp(channels, exponent) * factors.double()[:, None]


def fp4_widen(words: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return e4m3 [n, k] of folded weights without their rows' factors; every value is one of e4m3."""
    ones = torch.ones(words.shape[0], device=words.device)
    return _folded_weights(words, offsets, ones).to(torch.float8_e4m3fn)


def fp8_fp4_gemm_folded(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    words: torch.Tensor,
    offsets: torch.Tensor,
    factors: torch.Tensor,
) -> torch.Tensor:
    """Return bf16 [m, n] of the exact product (float64) of the scaled operands."""
    return _matmul(_scaled(x, x_scale, 128), _folded_weights(words, offsets, factors), torch.bfloat16)


def fp8_fp4_gemm_folded_tolerance(
    out: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    words: torch.Tensor,
    offsets: torch.Tensor,
    factors: torch.Tensor,
) -> tuple[torch.Tensor]:
    """Return a bound on |got - out| elementwise; as for `fp8_gemm`, whose sums are the same."""
    return (_block_sum_bound(out, _scaled(x, x_scale, 128), _folded_weights(words, offsets, factors)),)


# A bf16 instruction adds 16 exact products to the sum it is given: all 17 are aligned to the largest, keep at
# least 23 bits below it, and the sum is cut to fp32.
_BF16_CHUNK = 16
_BF16_CUTS = 18 * 2.0**-23


def mhc_gemm(x: torch.Tensor, fn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 [m, 32, 24] and [m, 32]: exact (float64) sums over each 32nd of the channels."""
    splits = 32
    a = x.double().unflatten(1, (splits, -1))
    b = (fn[0].double() + fn[1].double()).unflatten(1, (splits, -1))
    return torch.einsum("msk,nsk->msn", a, b).float(), a.square().sum(2).float()


def mhc_gemm_tolerance(
    parts: torch.Tensor, squares: torch.Tensor, x: torch.Tensor, fn: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bounds on |got - parts| and |got - squares| elementwise, from how sm_90a adds.

    Two chains of instructions make a part, each off by `_BF16_CUTS` of the sum of magnitudes at most. Squares
    of bf16 are exact in fp32: 128 columns of them are added one after the other, then the columns, each time
    with a rounding of 2**-24. Both references are rounded once.
    """
    splits, columns = 32, 128
    a = x.double().abs().unflatten(1, (splits, -1))
    b = (fn[0].double().abs() + fn[1].double().abs()).unflatten(1, (splits, -1))
    instructions = 2 * a.shape[2] // _BF16_CHUNK
    magnitudes = torch.einsum("msk,nsk->msn", a, b)
    additions = a.shape[2] // columns + columns
    return (
        (instructions * _BF16_CUTS + 2.0**-24) * magnitudes,
        (additions + 1) * 2.0**-24 * a.square().sum(2),
    )


def bf16_gemm(x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Return [m, n] of the exact product (float64), rounded once to `out_dtype`."""
    return _matmul(x.double(), w.double(), out_dtype)


def bf16_gemm_tolerance(
    out: torch.Tensor, x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype
) -> tuple[torch.Tensor]:
    """Return a bound on |got - out| elementwise, from how sm_90a adds.

    Each instruction is off by `_BF16_CUTS` of the largest number it adds: at most the sum so far, or the
    magnitudes of the 128 channels around it. Both results are rounded once to the output's type.
    """
    return (_chain_bound(out, x.double(), w.double()),)


def _chain_bound(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _by_rows(
        lambda part, rows: _chain_bound_of(part, rows, b), out, a, columns=out.shape[1], dtype=torch.float64
    )


def _chain_bound_of(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    channels = 128
    rounding = 2.0**-24 if out.dtype == torch.float32 else 2.0**-8
    bound = 2 * rounding * out.double().abs()
    total = torch.zeros_like(bound)
    for start in range(0, a.shape[1], channels):
        left, right = a[:, start : start + channels], b[:, start : start + channels]
        instructions = -(-left.shape[1] // _BF16_CHUNK)
        bound += instructions * _BF16_CUTS * (total.abs() + left.abs() @ right.abs().T)
        total += left @ right.T
    return bound


def wo_a_bf16(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return bf16 [m, groups, n] of the exact product (float64) of each group."""
    return torch.einsum("mgk,gnk->mgn", x.double(), w.double()).to(torch.bfloat16)


def wo_a_bf16_tolerance(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
    """Return a bound on |got - out| elementwise; sums are those of `bf16_gemm`."""
    groups = range(x.shape[1])
    return (torch.stack([_chain_bound(out[:, g], x[:, g].double(), w[g].double()) for g in groups], dim=1),)


def wo_a_fp8(x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """Return bf16 [m, groups, n] of the exact product (float64) of each group's scaled operands."""
    groups = range(x.shape[1])
    return torch.stack([fp8_gemm(x[:, g], x_scale[:, g], w[g], w_scale[g]) for g in groups], dim=1)


def wo_a_fp8_tolerance(
    out: torch.Tensor, x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor
) -> tuple[torch.Tensor]:
    """Return a bound on |got - out| elementwise; sums are those of `fp8_gemm`."""
    groups = range(x.shape[1])
    bounds = [fp8_gemm_tolerance(out[:, g], x[:, g], x_scale[:, g], w[g], w_scale[g])[0] for g in groups]
    return (torch.stack(bounds, dim=1),)
