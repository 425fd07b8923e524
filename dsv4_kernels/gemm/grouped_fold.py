"""FP4 weights of several experts laid out once, each expert as `fold.fold_weights` does, and their product.

The same bytes as in the checkpoint. An expert with a row whose scales span too much to be folded keeps
all experts of the layer as they came: then the exact product, which scales every 32 channels, takes them.
"""

from dataclasses import dataclass

import torch

from dsv4_kernels.contract import ContractError, require_input, require_tensor
from dsv4_kernels.gemm.fold import FoldedWeights, RawWeights, fold_weights
from dsv4_kernels.gemm.folded_tile import BLOCK_K, SCALE_K
from dsv4_kernels.gemm.grouped_fp8_fp4_gemm import grouped_fp8_fp4_gemm
from dsv4_kernels.gemm.grouped_fp8_fp4_gemm_exact import grouped_fp8_fp4_gemm_exact

NAME = "fold_experts"


@dataclass(frozen=True)
class FoldedExperts:
    """FP4 weights of experts as `grouped_fp8_fp4_gemm` takes them; each word as in `fold.FoldedWeights`.

    128 channels of all rows are neighbours, so that what a tile reads in a stage is contiguous.

    Attributes:
        words: [num_experts, k / 128, n, 16] int32.
        offsets: [num_experts, k / 128, n, 4] uint8.
        factors: [num_experts, n] float32.
    """

    words: torch.Tensor
    offsets: torch.Tensor
    factors: torch.Tensor


def fold_experts(w: torch.Tensor, w_scale: torch.Tensor) -> FoldedExperts | RawWeights:
    """Lay the weights of experts out for the fast product where that is exact for all, else keep them.

    Args:
        w: [num_experts, n, k / 2] uint8, two e2m1 a byte, the even channel in the low nibble, contiguous.
        w_scale: [num_experts, n, k / 32] e8m0, contiguous; n a multiple of 128, k of 256.

    Returns:
        Weights for `grouped_fp4_linear`.
    """
    require_tensor(NAME, "w", w, dtype=torch.uint8, ndim=3)
    num_experts, n, half = w.shape
    shape = num_experts, n, 2 * half // SCALE_K
    require_input(NAME, "w_scale", w_scale, shape, dtype=torch.float8_e8m0fnu, device=w.device)
    folded, blocks = [], 2 * half // BLOCK_K
    for e in range(num_experts):
        one = fold_weights(w[e], w_scale[e])
        if not isinstance(one, FoldedWeights):
            return RawWeights(w, w_scale)
        folded.append(one)
    return FoldedExperts(
        torch.stack([_by_block(one.words, blocks) for one in folded]),
        torch.stack([_by_block(one.offsets, blocks) for one in folded]),
        torch.stack([one.factors for one in folded]),
    )


def _by_block(rows: torch.Tensor, blocks: int) -> torch.Tensor:
    """Return [blocks, n, ...], block by block, of [n, ...] that come in the order of channels."""
    return rows.unflatten(1, (blocks, -1)).transpose(0, 1)


def grouped_fp4_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weights: FoldedExperts | RawWeights,
    expert: torch.Tensor,
    alignment: int,
) -> torch.Tensor:
    """Multiply each row by the FP4 weights of its expert; exact scaling either way.

    Args:
        x: [m, k] e4m3, contiguous.
        x_scale: [m, k / 128] e8m0, contiguous; [m, k / 32] for weights as they came.
        weights: from `fold_experts`, or `RawWeights` of the checkpoint.
        expert: [m] int32, as `grouped_fp8_fp4_gemm` takes it.
        alignment: likewise.

    Returns:
        [m, n] bf16.

    Raises:
        ContractError: folded weights with scales of x for 1 x 32, or as the products say.
    """
    if isinstance(weights, RawWeights):
        return grouped_fp8_fp4_gemm_exact(x, x_scale, weights.w, weights.w_scale, expert, alignment)
    if x_scale.dim() == x.dim() and x_scale.shape[-1] * SCALE_K == x.shape[-1]:
        raise ContractError(
            f"{NAME}: requires weights as they came for 1 x 32 scales of x, got FoldedExperts"
        )
    folded = weights.words, weights.offsets, weights.factors
    return grouped_fp8_fp4_gemm(x, x_scale, *folded, expert, alignment)
