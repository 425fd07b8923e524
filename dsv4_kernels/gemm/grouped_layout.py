"""Rows of grouped products: which expert each belongs to, and where its rows begin.

Contiguous: rows of all experts in one matrix [m, k], sorted by expert. Each expert begins at a multiple
of `alignment` rows, and an int32 [m] names the expert of each row; -1 marks rows that pad an expert up to
the next, whose results are unspecified. As in DeepGEMM, whose alignment is 128; smaller ones waste less
where experts have few rows.

Masked: [num_experts, max_m, k] with an int32 [num_experts] of rows that count; what follows is ignored. It
is the contiguous layout with a fixed distance between experts (`masked_layout`).
"""

import torch

from dsv4_kernels.contract import ContractError

ALIGNMENTS = (16, 64, 128)  # rows; each has one tile height
PADDING = -1  # expert of a row that belongs to none


def alignment_for(rows_an_expert: int) -> int:
    """Return the alignment that suits experts of about `rows_an_expert` rows (a host integer)."""
    few, some = 16, 64
    return ALIGNMENTS[0 if rows_an_expert <= few else 1 if rows_an_expert <= some else 2]


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


def require_alignment(kernel: str, m: int, alignment: int) -> None:
    """Raise ContractError unless `alignment` is known and m rows end where an expert could begin."""
    if alignment not in ALIGNMENTS:
        raise ContractError(f"{kernel}: requires alignment in {ALIGNMENTS}, got alignment={alignment}")
    if m % alignment:
        raise ContractError(f"{kernel}: requires m % alignment == 0, got m={m}, alignment={alignment}")
