"""Rows of grouped products: which expert each belongs to, and where its rows begin.

Contiguous: rows of all experts in one matrix [m, k], sorted by expert. Each expert begins at a multiple
of `alignment` rows, and an int32 [m] names the expert of each row; -1 marks rows that pad an expert up to
the next, whose results are unspecified. As in DeepGEMM, whose alignment is 128; smaller ones waste less
where experts have few rows.

Masked: [num_experts, max_m, k] with an int32 [num_experts] of rows that count; what follows is ignored. It
is the contiguous layout with a fixed distance between experts (`masked_layout`).
"""

from collections.abc import Iterable
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels.contract import Contract, ContractError, require_input, require_tensor

ALIGNMENTS = (16, 64, 96, 128, 256)  # rows
PADDING = -1  # expert of a row that belongs to none


def alignment_for(rows_an_expert: int, tiles: tuple[int, ...] = (128,)) -> int:
    """Return the alignment that suits experts of about `rows_an_expert` rows.

    Args:
        rows_an_expert: a host integer, a guess.
        tiles: heights of a kernel's tiles for many rows; the tallest of those that pad least is taken.
    """
    few, some = 16, 64
    if rows_an_expert <= some:
        return few if rows_an_expert <= few else some
    return min(tiles, key=lambda tile: (-(-rows_an_expert // tile) * tile, -tile))


def tile_for(alignment: int, tiles: Iterable[int]) -> int:
    """Return the largest of a kernel's tile heights that no expert's first row falls within."""
    return max(tile for tile in tiles if alignment % tile == 0)


def capacity(num_rows: int, num_experts: int, alignment: int) -> int:
    """Return rows that hold any distribution of `num_rows` rows over the experts, each padded."""
    padded = num_rows + min(num_rows, num_experts) * (alignment - 1)
    return -(-padded // alignment) * alignment


def contiguous_layout(
    counts: torch.Tensor, alignment: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the expert of each row and where each expert begins, without waiting for the device.

    Args:
        counts: [num_experts] int32 or int64, rows of each expert.
        alignment: one of `ALIGNMENTS`.
        num_rows: of the matrix, a multiple of `alignment` that holds all experts padded (`capacity`).

    Returns:
        [num_rows] int32 experts, PADDING where there is none; [num_experts] int64 first rows.
    """
    padded = (counts.long() + (alignment - 1)) // alignment * alignment
    ends = padded.cumsum(0)
    starts = ends - padded
    row = torch.arange(num_rows, device=counts.device)
    expert = torch.searchsorted(ends, row, right=True)
    known = expert.clamp(max=counts.shape[0] - 1)
    belongs = (expert < counts.shape[0]) & (row - starts[known] < counts[known])
    return torch.where(belongs, expert, PADDING).int(), starts


def masked_layout(counts: torch.Tensor, max_m: int) -> torch.Tensor:
    """Return the [num_experts * max_m] int32 expert of each row, without waiting for the device.

    Args:
        counts: [num_experts] int32 or int64, rows of each expert that count.
        max_m: rows that each has room for.
    """
    row = torch.arange(max_m, device=counts.device)
    number = torch.arange(counts.shape[0], device=counts.device, dtype=torch.int32)
    return torch.where(row < counts[:, None], number[:, None], PADDING).int().flatten()


def iterations(expert: Any, count: int) -> Any:
    """Return `count` for the number of an expert and 0 for padding, as an int32 expression without a branch.

    Its form alone shows that it lies between the two, which the proofs of what a pipeline reads rest on.
    """
    return T.min(T.max(expert, PADDING), 0) * count + count


def require_rows(
    kernel: str,
    contract: Contract,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_blocks: tuple[int, ...],
    expert: torch.Tensor,
    alignment: int,
    device: torch.device,
    **dims: int,
) -> int:
    """Check what all grouped products take: rows, their scales and experts, and the contract over the dims.

    Args:
        kernel: name, for errors.
        contract: over m, k and `dims`.
        x: [m, k] e4m3.
        x_scale: [m, k / block] e8m0 for a block of `x_blocks`.
        x_blocks: channels that a scale of x may have.
        expert: [m] int32.
        alignment: one of `ALIGNMENTS`; m is a multiple of it, since an expert could begin there.
        device: of the weights.
        dims: what the weights say.

    Returns:
        Channels a scale of x.

    Raises:
        ContractError: a clause above does not hold.
    """
    require_tensor(kernel, "x", x, dtype=torch.float8_e4m3fn, ndim=2, device=device)
    m, k = x.shape
    if alignment not in ALIGNMENTS:
        raise ContractError(f"{kernel}: requires alignment in {ALIGNMENTS}, got alignment={alignment}")
    if m % alignment:
        raise ContractError(f"{kernel}: requires m % alignment == 0, got m={m}, alignment={alignment}")
    contract.check(kernel, m=m, k=k, **dims)
    require_tensor(kernel, "x_scale", x_scale, dtype=torch.float8_e8m0fnu, ndim=2, device=device)
    require_input(kernel, "expert", expert, (m,), dtype=torch.int32, device=device)
    for block in x_blocks:
        if x_scale.shape == (m, k // block):
            return block
    shapes = " or ".join(str((m, k // block)) for block in x_blocks)
    raise ContractError(
        f"{kernel}: requires x_scale.shape == {shapes}, got x_scale.shape={tuple(x_scale.shape)}"
    )
