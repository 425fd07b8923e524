"""PyTorch references of the grouped products; imports nothing from the kernels."""

from collections.abc import Callable

import torch

from dsv4_kernels.gemm import reference


def _by_expert(
    expert: torch.Tensor,
    shape: tuple[int, int],
    product: Callable[[torch.Tensor, int], torch.Tensor],
    empty: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Return [rows, n] whose rows of expert e are product(their numbers, e); `empty` where there is none."""
    out = torch.full(shape, empty, dtype=dtype, device=expert.device)
    for e in expert.unique().tolist():
        if e >= 0:
            rows = (expert == e).nonzero()[:, 0]
            out[rows] = product(rows, e).to(dtype)
    return out


def grouped_fp8_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    expert: torch.Tensor,
    alignment: int,
) -> torch.Tensor:
    """Return bf16 [m, n] of the exact products (float64) of rows and their experts' weights."""

    def product(rows: torch.Tensor, e: int) -> torch.Tensor:
        return reference.fp8_gemm(x[rows], x_scale[rows], w[e], w_scale[e])

    return _by_expert(expert, (x.shape[0], w.shape[1]), product)


def grouped_fp8_gemm_tolerance(
    out: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    expert: torch.Tensor,
    alignment: int,
) -> tuple[torch.Tensor]:
    """Return a bound on |got - out| elementwise: that of the dense product, none without an expert."""

    def bound(rows: torch.Tensor, e: int) -> torch.Tensor:
        return reference.fp8_gemm_tolerance(out[rows], x[rows], x_scale[rows], w[e], w_scale[e])[0]

    return (_by_expert(expert, (x.shape[0], w.shape[1]), bound, torch.inf, torch.float64),)


def by_row(blocks: torch.Tensor) -> torch.Tensor:
    """Return [n, ...] words or offsets of an expert whose [k / 128, n, ...] come block by block."""
    return blocks.transpose(0, 1).flatten(1).contiguous()


def grouped_fp8_fp4_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    words: torch.Tensor,
    offsets: torch.Tensor,
    factors: torch.Tensor,
    expert: torch.Tensor,
    alignment: int,
) -> torch.Tensor:
    """Return bf16 [m, n] of the exact products (float64) of rows and their experts' folded weights."""

    def product(rows: torch.Tensor, e: int) -> torch.Tensor:
        weights = by_row(words[e]), by_row(offsets[e]), factors[e]
        return reference.fp8_fp4_gemm_folded(x[rows], x_scale[rows], *weights)

    return _by_expert(expert, (x.shape[0], words.shape[2]), product)


def grouped_fp8_fp4_gemm_tolerance(
    out: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    words: torch.Tensor,
    offsets: torch.Tensor,
    factors: torch.Tensor,
    expert: torch.Tensor,
    alignment: int,
) -> tuple[torch.Tensor]:
    """Return a bound on |got - out| elementwise: that of the dense product, none without an expert."""

    def bound(rows: torch.Tensor, e: int) -> torch.Tensor:
        args = (x[rows], x_scale[rows], by_row(words[e]), by_row(offsets[e]), factors[e])
        return reference.fp8_fp4_gemm_folded_tolerance(out[rows], *args)[0]

    return (_by_expert(expert, (x.shape[0], words.shape[2]), bound, torch.inf, torch.float64),)


def _scaled_rows(x: torch.Tensor, x_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and 1 x 128 scales of one for the dense reference, with other scales applied already."""
    block = x.shape[1] // x_scale.shape[1]
    byte = x_scale.view(torch.uint8).int().repeat_interleave(block, dim=1)
    values = torch.where(byte == 255, torch.nan, torch.ldexp(x.double(), byte - 127))
    ones = torch.full((x.shape[0], x.shape[1] // 128), 127, dtype=torch.uint8, device=x.device)
    return values, ones.view(torch.float8_e8m0fnu)


def grouped_fp8_fp4_gemm_exact(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    expert: torch.Tensor,
    alignment: int,
) -> torch.Tensor:
    """Return bf16 [m, n] of the exact products (float64) of scaled rows and their experts' weights."""

    def product(rows: torch.Tensor, e: int) -> torch.Tensor:
        return reference.fp8_fp4_gemm(*_scaled_rows(x[rows], x_scale[rows]), w[e], w_scale[e])

    return _by_expert(expert, (x.shape[0], w.shape[1]), product)


def grouped_fp8_fp4_gemm_exact_tolerance(
    out: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    expert: torch.Tensor,
    alignment: int,
) -> tuple[torch.Tensor]:
    """Return a bound on |got - out| elementwise: that of the dense product, none without an expert."""

    def bound(rows: torch.Tensor, e: int) -> torch.Tensor:
        scaled = _scaled_rows(x[rows], x_scale[rows])
        return reference.fp8_fp4_gemm_tolerance(out[rows], *scaled, w[e], w_scale[e])[0]

    return (_by_expert(expert, (x.shape[0], w.shape[1]), bound, torch.inf, torch.float64),)
