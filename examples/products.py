"""Every matrix product of a layer, once: on the GPU where there is one, else the kernels' IR on the CPU.

Prints how far each is from the exact product of its operands, dequantised: bf16 outputs are rounded to 2**-9,
and the tensor core keeps 13 bits of a product of FP8 operands.
"""

from collections.abc import Iterator

import click
import torch

import dsv4_kernels
from dsv4_kernels.gemm.bf16_gemm import bf16_gemm
from dsv4_kernels.gemm.fold import FoldedWeights, fold_weights, fp4_linear
from dsv4_kernels.gemm.fold_parts import fold_parts
from dsv4_kernels.gemm.fp4_widen import fp4_widen
from dsv4_kernels.gemm.fp8_fp4_gemm import fp8_fp4_gemm
from dsv4_kernels.gemm.fp8_fp4_gemm_folded import fp8_fp4_gemm_folded
from dsv4_kernels.gemm.fp8_fp4_gemm_widened import fp8_fp4_gemm_widened
from dsv4_kernels.gemm.fp8_gemm import fp8_gemm
from dsv4_kernels.gemm.grouped_fold import fold_experts, grouped_fp4_linear
from dsv4_kernels.gemm.grouped_fp8_fp4_gemm_exact import grouped_fp8_fp4_gemm_exact
from dsv4_kernels.gemm.grouped_fp8_gemm import grouped_fp8_gemm
from dsv4_kernels.gemm.grouped_layout import alignment_for, capacity, contiguous_layout
from dsv4_kernels.gemm.grouped_masked import grouped_fp4_linear_masked, grouped_fp8_gemm_masked
from dsv4_kernels.gemm.mhc_gemm import mhc_gemm, split_weights
from dsv4_kernels.gemm.narrow_gemm import narrow_gemm
from dsv4_kernels.gemm.router_gemm import router_gemm
from dsv4_kernels.gemm.wo_a import wo_a_bf16, wo_a_fp8
from dsv4_kernels.quant.act_quant import act_quant
from dsv4_kernels.quant.fp4_quant import fp4_dequant, fp4_quant

M, N, K, EXPERTS, GROUPS = 33, 256, 1024, 3, 2
HIDDEN = 1024  # of a stream; hyper-connections have four
LARGEST_E4M3 = 448
Result = tuple[str, torch.Tensor, torch.Tensor]  # name, output, exact output


def quantise_weights(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [n, k] bf16 weights as e4m3 and [n / 128, k / 128] e8m0 scales, as a checkpoint has them."""
    blocks = w.float().unflatten(1, (-1, 128)).unflatten(0, (-1, 128))  # [n / 128, 128, k / 128, 128]
    exponent = (blocks.abs().amax((1, 3), keepdim=True) / LARGEST_E4M3).log2().ceil()
    scale = torch.exp2(exponent)
    values = (blocks / scale).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
    return values, scale[:, 0, :, 0].to(torch.float8_e8m0fnu)


def exact(values: torch.Tensor, scale: torch.Tensor, *block: int) -> torch.Tensor:
    """Return float64 values times their scales, one a block of the last dims."""
    factor = scale.double()
    for dim, size in enumerate(reversed(block)):
        factor = factor.repeat_interleave(size, dim=-1 - dim)
    return values.double() * factor


def dense(device: str) -> Iterator[Result]:
    """Yield the dense products: FP8, FP4 in three forms, bf16, few weight rows, the router."""
    x = torch.randn(M, K, device=device).to(torch.bfloat16)
    w = torch.randn(N, K, device=device).to(torch.bfloat16)
    x8, x_scale = act_quant(x)  # e4m3, a scale for 1 x 128
    rows = exact(x8, x_scale, 128)

    w8, w8_scale = quantise_weights(w)
    yield "fp8_gemm", fp8_gemm(x8, x_scale, w8, w8_scale), rows @ exact(w8, w8_scale, 128, 128).T

    w4, w4_scale = fp4_quant(w)  # packed e2m1, a scale for 1 x 32
    want = rows @ fp4_dequant(w4, w4_scale).double().T
    yield "fp8_fp4_gemm", fp8_fp4_gemm(x8, x_scale, w4, w4_scale), want
    weights = fold_weights(w4, w4_scale)  # once, at load; `RawWeights` where scales span too much
    yield "fp4_linear", fp4_linear(x8, x_scale, weights), want  # takes the form for its tokens
    assert isinstance(weights, FoldedWeights)
    folded = weights.words, weights.offsets, weights.factors
    yield "fp8_fp4_gemm_folded", fp8_fp4_gemm_folded(x8, x_scale, *folded), want
    yield "fp8_fp4_gemm_widened", fp8_fp4_gemm_widened(x8, x_scale, *folded), want
    widened = fp4_widen(weights.words, weights.offsets)  # what it does first
    yield "fp4_widen", widened.float() * weights.factors[:, None], fp4_dequant(w4, w4_scale).double()

    plain = x.double() @ w.double().T
    yield "bf16_gemm", bf16_gemm(x, w, torch.float32), plain
    yield "narrow_gemm", narrow_gemm(x, w), plain
    yield "router_gemm", router_gemm(x, w), plain  # logits of N experts, fp32
    parts = torch.stack([x[:, i::4].float() @ w[:, i::4].float().T for i in range(4)], dim=1)
    yield "fold_parts", fold_parts(parts), parts.double().sum(1)


def projections(device: str) -> Iterator[Result]:
    """Yield the grouped output projection and the mixing coefficients of hyper-connections."""
    x = torch.randn(M, GROUPS, K, device=device).to(torch.bfloat16)
    w = torch.randn(GROUPS, N, K, device=device).to(torch.bfloat16)
    yield "wo_a_bf16", wo_a_bf16(x, w), torch.einsum("mgk,gnk->mgn", x.double(), w.double())
    x8, x_scale = (t.unflatten(0, (M, GROUPS)) for t in act_quant(x.flatten(0, 1)))
    w8, w_scale = (torch.stack(t) for t in zip(*map(quantise_weights, w), strict=True))
    want = torch.einsum("mgk,gnk->mgn", exact(x8, x_scale, 128), exact(w8, w_scale, 128, 128))
    yield "wo_a_fp8", wo_a_fp8(x8, x_scale, w8, w_scale), want

    streams = torch.randn(M, 4 * HIDDEN, device=device).to(torch.bfloat16)
    fn = torch.randn(24, 4 * HIDDEN, device=device)
    parts, squares = mhc_gemm(streams, split_weights(fn))  # sums of 32 parts of k: add them in order
    total, square = parts[:, 0], squares[:, 0]
    for part in range(1, parts.shape[1]):
        total, square = total + parts[:, part], square + squares[:, part]
    yield "mhc_gemm", total, streams.double() @ fn.double().T
    yield "mhc_gemm, squares", square, streams.double().square().sum(1)


def experts(device: str) -> Iterator[Result]:
    """Yield the products of rows sorted by expert, contiguous and masked; one expert has none."""
    counts = torch.tensor([20, 0, 13], device=device)
    alignment = alignment_for(12)  # a guess at the rows of an expert
    m = capacity(M, EXPERTS, alignment)
    expert, _ = contiguous_layout(counts, alignment, m)  # -1: padding
    x8, x_scale = act_quant(torch.randn(m, K, device=device).to(torch.bfloat16))
    w = torch.randn(EXPERTS, N, K, device=device).to(torch.bfloat16)
    rows, own = exact(x8, x_scale, 128), expert >= 0

    def of_its_expert(weights: torch.Tensor) -> torch.Tensor:
        return torch.einsum("mk,mnk->mn", rows[own], weights[expert[own].long()])

    w8, w8_scale = (torch.stack(t) for t in zip(*map(quantise_weights, w), strict=True))
    w8_exact = exact(w8, w8_scale, 128, 128)
    got = grouped_fp8_gemm(x8, x_scale, w8, w8_scale, expert, alignment)
    yield "grouped_fp8_gemm", got[own], of_its_expert(w8_exact)
    w4, w4_scale = (t.unflatten(0, (EXPERTS, N)) for t in fp4_quant(w.flatten(0, 1)))
    w4_exact = fp4_dequant(w4.flatten(0, 1), w4_scale.flatten(0, 1)).double().unflatten(0, (EXPERTS, N))
    weights = fold_experts(w4, w4_scale)  # once, at load
    got = grouped_fp4_linear(x8, x_scale, weights, expert, alignment)
    yield "grouped_fp8_fp4_gemm", got[own], of_its_expert(w4_exact)
    got = grouped_fp8_fp4_gemm_exact(x8, x_scale, w4, w4_scale, expert, alignment)
    yield "grouped_fp8_fp4_gemm_exact", got[own], of_its_expert(w4_exact)

    max_m = 32  # room for each expert; counts stay on the device
    x8, x_scale = act_quant(torch.randn(EXPERTS * max_m, K, device=device).to(torch.bfloat16))
    x8, x_scale = x8.unflatten(0, (EXPERTS, max_m)), x_scale.unflatten(0, (EXPERTS, max_m))
    counted = torch.arange(max_m, device=device) < counts[:, None]
    rows = exact(x8, x_scale, 128)
    got = grouped_fp8_gemm_masked(x8, x_scale, w8, w8_scale, counts.int(), expected_rows=12)
    yield "grouped_fp8_gemm_masked", got[counted], (rows @ w8_exact.mT)[counted]
    got = grouped_fp4_linear_masked(x8, x_scale, weights, counts.int(), expected_rows=12)
    yield "grouped_fp4_linear_masked", got[counted], (rows @ w4_exact.mT)[counted]


def main() -> None:
    """Print one line a product."""
    on_gpu = torch.cuda.is_available()
    device, backend = ("cuda", "auto") if on_gpu else ("cpu", "interpret")
    torch.manual_seed(0)
    with dsv4_kernels.backend(backend):
        for part in (dense, projections, experts):
            for name, got, want in part(device):
                error = float((got.double() - want).norm() / want.norm())
                click.echo(f"{name:28} {tuple(got.shape)!s:14} {got.dtype!s:16} {error:.1e}")


if __name__ == "__main__":
    main()
