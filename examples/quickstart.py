"""Quantise, multiply, compare: on the GPU where there is one, else the kernels' IR on the CPU."""

import click
import torch

import dsv4_kernels
from dsv4_kernels.gemm.fp8_fp4_gemm import fp8_fp4_gemm
from dsv4_kernels.quant.act_quant import act_quant
from dsv4_kernels.quant.fp4_quant import fp4_dequant, fp4_quant


def main() -> None:
    """Print how far the FP8 x FP4 product is from the exact product of its operands, and from bf16's."""
    on_gpu = torch.cuda.is_available()
    device, backend = ("cuda", "auto") if on_gpu else ("cpu", "interpret")
    torch.manual_seed(0)
    m, n, k = (64, 4096, 4096) if on_gpu else (64, 256, 512)
    x = torch.randn(m, k, device=device).to(torch.bfloat16)
    weight = torch.randn(n, k, device=device).to(torch.bfloat16)
    with dsv4_kernels.backend(backend):
        w, w_scale = fp4_quant(weight)  # once, when the weights are loaded
        x8, x_scale = act_quant(x)
        out = fp8_fp4_gemm(x8, x_scale, w, w_scale)
        w_back = fp4_dequant(w, w_scale)
    x_back = x8.double() * x_scale.double().repeat_interleave(128, dim=1)
    exact = x_back @ w_back.double().T
    plain = x.double() @ weight.double().T
    click.echo(f"{m} x {n} x {k} on {device} ({backend})")
    click.echo(f"against the exact product of the quantised operands: {_error(out, exact):.2e}")
    click.echo(f"against the bf16 operands (what quantisation costs): {_error(out, plain):.2e}")


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


if __name__ == "__main__":
    main()
