"""PyTorch references of products in parts; imports nothing from the kernels."""

import torch

from dsv4_kernels.gemm.reference import bf16_gemm_tolerance

_F32_STEP = 2.0**-24  # largest relative error of one rounding to fp32


def narrow_gemm_tolerance(
    out: torch.Tensor, x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype, num_parts: int
) -> tuple[torch.Tensor]:
    """Return a bound on |got - out| elementwise: that of each part's chain, and of adding the parts in fp32.

    A part's chain is off by what the whole one's bound gives it, without its rounding; each addition of parts
    rounds once, relative to at most the sum of all magnitudes. The result is rounded once to its type.
    """
    exact = torch.zeros(out.shape, dtype=torch.float32, device=out.device)  # no rounding of a part's own
    bound = torch.zeros(out.shape, dtype=torch.float64, device=out.device)
    for a, b in zip(x.chunk(num_parts, dim=1), w.chunk(num_parts, dim=1), strict=True):
        bound += bf16_gemm_tolerance(exact, a, b, torch.float32)[0]
    rounding = _F32_STEP if out_dtype == torch.float32 else 2.0**-8
    bound += num_parts * _F32_STEP * (x.double().abs() @ w.double().abs().T)
    return (bound + 2 * rounding * out.double().abs(),)


def fold_parts(parts: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Return [m, n] of the parts [m, parts, n] added in order in float32, rounded to `out_dtype`."""
    total = parts[:, 0]
    for part in range(1, parts.shape[1]):
        total = total + parts[:, part]
    return total.to(out_dtype)
