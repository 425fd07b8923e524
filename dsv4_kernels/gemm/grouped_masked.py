"""Grouped products of the masked layout: room for max_m rows an expert, of which the first counts[e] count.

The same kernels as for contiguous rows, on the same rows in one matrix: tiles without a row that counts
read no weights and multiply nothing. Counts stay on the device, so a captured graph serves any
distribution of rows.
"""

import torch

from dsv4_kernels.contract import ContractError, require_input, require_tensor
from dsv4_kernels.gemm.fold import RawWeights
from dsv4_kernels.gemm.grouped_fold import FoldedExperts, grouped_fp4_linear
from dsv4_kernels.gemm.grouped_fp8_gemm import grouped_fp8_gemm
from dsv4_kernels.gemm.grouped_layout import alignment_for, masked_layout

NAME = "grouped_masked"
_ALIGNMENTS = (16, 64, 128)  # heights of tiles that all kernels have
_MAX_TILES = 4  # an expert has room for: one without rows costs a multiprocessor about a microsecond


def grouped_fp8_gemm_masked(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    counts: torch.Tensor,
    expected_rows: int,
) -> torch.Tensor:
    """Multiply the rows of each expert by its FP8 weights; see `grouped_fp8_gemm`.

    Args:
        x: [num_experts, max_m, k] e4m3, contiguous; max_m a multiple of 16.
        x_scale: [num_experts, max_m, k / 128] e8m0, contiguous.
        w: [num_experts, n, k] e4m3, contiguous.
        w_scale: [num_experts, n / 128, k / 128] e8m0, contiguous.
        counts: [num_experts] int32, at most max_m (not checked: it stays on the device).
        expected_rows: rows an expert to choose the tile for, a guess; no result depends on it.

    Returns:
        [num_experts, max_m, n] bf16; rows from counts[e] on hold unspecified values.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    expert, alignment = _layout(x, counts, expected_rows)
    out = grouped_fp8_gemm(x.flatten(0, 1), x_scale.flatten(0, 1), w, w_scale, expert, alignment)
    return out.unflatten(0, x.shape[:2])


def grouped_fp4_linear_masked(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weights: FoldedExperts | RawWeights,
    counts: torch.Tensor,
    expected_rows: int,
) -> torch.Tensor:
    """Multiply the rows of each expert by its FP4 weights; see `grouped_fp4_linear`.

    Args:
        x: [num_experts, max_m, k] e4m3, contiguous; max_m a multiple of 16.
        x_scale: [num_experts, max_m, k / 128] e8m0, contiguous; [..., k / 32] for weights as they came.
        weights: from `grouped_fold.fold_experts`, or `RawWeights` of the checkpoint.
        counts: [num_experts] int32, at most max_m (not checked: it stays on the device).
        expected_rows: rows an expert to choose the tile for, a guess; no result depends on it.

    Returns:
        [num_experts, max_m, n] bf16; rows from counts[e] on hold unspecified values.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    expert, alignment = _layout(x, counts, expected_rows)
    out = grouped_fp4_linear(x.flatten(0, 1), x_scale.flatten(0, 1), weights, expert, alignment)
    return out.unflatten(0, x.shape[:2])


def _layout(x: torch.Tensor, counts: torch.Tensor, expected_rows: int) -> tuple[torch.Tensor, int]:
    require_tensor(NAME, "x", x, dtype=torch.float8_e4m3fn, ndim=3)
    require_input(NAME, "counts", counts, (x.shape[0],), dtype=torch.int32, device=x.device)
    max_m = x.shape[1]
    return masked_layout(counts, max_m), _alignment(max_m, expected_rows)


def _alignment(max_m: int, expected_rows: int) -> int:
    """Return the height of the tiles: what suits the rows, larger where most tiles would have none."""
    fitting = [a for a in _ALIGNMENTS if max_m % a == 0]
    if not fitting:
        raise ContractError(f"{NAME}: requires max_m % {_ALIGNMENTS[0]} == 0, got max_m={max_m}")
    suits = alignment_for(expected_rows)
    return next((a for a in fitting if a >= suits and max_m <= _MAX_TILES * a), fitting[-1])
