"""Decode over all compressed entries of a request, straight from paged FP8 rows: HCA (report 2.3.2).

Keys are taken in chunks of 64, the window's two first; 13 of them are a group. Those of a group are folded in
ascending order, then the groups. Of few queries each chunk gets a block (`hca_chunks`) and one kernel folds
both levels (`hca_join`); of many each group gets a block that walks its chunks (`hca_groups`), and `hca_fold`
folds the groups. Both have the same bits, so a row's depend on nothing but its own keys.
Design and measurements: docs/attention.md.
"""

import torch

from dsv4_kernels.attention import hca_lists
from dsv4_kernels.attention.decode_body import MULTIPROCESSORS, choose
from dsv4_kernels.attention.hca_chunks import hca_chunks
from dsv4_kernels.attention.hca_fold import hca_fold
from dsv4_kernels.attention.hca_fold_fp8 import hca_fold_fp8
from dsv4_kernels.attention.hca_groups import hca_groups
from dsv4_kernels.attention.hca_join import MOST_CHUNKS, hca_join
from dsv4_kernels.attention.hca_join_fp8 import hca_join_fp8
from dsv4_kernels.attention.hca_lists import WINDOW_CHUNKS
from dsv4_kernels.attention.output_cast import require_epilogue
from dsv4_kernels.contract import ContractError, require_input

NAME = "hca_decode"
FP8_NAME = "hca_decode_fp8"
MOST_ROUNDS = 4  # of all multiprocessors with a chunk each, up to which chunks get blocks


def are_few(q: torch.Tensor, page_table: torch.Tensor) -> bool:
    """Return whether each chunk gets a block; False for what are no arguments, which are then refused."""
    if q.ndim != 3 or page_table.ndim != 2:
        return False
    num_chunks = WINDOW_CHUNKS + page_table.shape[1]
    blocks = q.shape[0] * num_chunks * (q.shape[1] // choose(q.shape[1]).block_h)
    return num_chunks <= MOST_CHUNKS and blocks <= MOST_ROUNDS * MULTIPROCESSORS


def hca_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    page_table: torch.Tensor,
    entry_length: torch.Tensor,
    sink: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend each query to its window and to all of its compressed entries; K and V are the same row.

    Logits are q . k / sqrt(512). The sink is one more logit of the softmax's denominator, without a value.
    Keys are taken in chunks of 64, the window's two, then a page each; each 13 are a group, within which they
    are folded in ascending order, and so are the groups. A query's bits depend on nothing but its own data,
    whatever the number of queries or pages.

    Args:
        q: [m, num_heads, 512] bf16, normed and rotated; the tokens of a request one after the other. m = 0 is
            allowed; num_heads a multiple of 8.
        cache: [pages, 37440] uint8, pages of 64 rows: see `cache_layout`. One pool: some pages are
            of windows, others of compressed entries.
        window_idx: [m, 128] int32, places (page * 64 + row); outside the cache: masked.
        window_length: [m] int32: places of `window_idx` from there on are masked.
        page_table: [m, num_pages] int32, the pages of each query's entries in order; any number of them. A
            page outside the cache is masked. A kernel is compiled for each number of pages: tables whose
            width grows in steps need few.
        entry_length: [m] int32: entries that the query sees.
        sink: [num_heads] fp32; -inf: none.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        out: [m, num_heads, 512] bf16, not yet rotated back; zeros where nothing is attended.
        lse: [m, num_heads] fp32, natural, without the sink; +inf where nothing is attended.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    args = (q, cache, window_idx, window_length, page_table, entry_length)
    _check(NAME, args, sink)
    if are_few(q, page_table):
        return hca_join(*hca_chunks(*args), sink)
    return hca_fold(*hca_groups(*args), sink)


def hca_decode_fp8(
    q: torch.Tensor,
    cache: torch.Tensor,
    window_idx: torch.Tensor,
    window_length: torch.Tensor,
    page_table: torch.Tensor,
    entry_length: torch.Tensor,
    sink: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend as `hca_decode`, rotate the last 64 dims of each head back, and cast to FP8.

    Codes and scales have the bits that inverse RoPE and `act_quant` of `hca_decode`'s output have. Seen as
    [m, groups, 4096] and [m, groups, 32] they are operands of `wo_a_fp8`.

    Args:
        q: [m, num_heads, 512] bf16, as of `hca_decode`.
        cache: [pages, 37440] uint8, likewise.
        window_idx: [m, 128] int32.
        window_length: [m] int32.
        page_table: [m, num_pages] int32.
        entry_length: [m] int32.
        sink: [num_heads] fp32.
        positions: [m] int32. A position outside the table makes the rotated dims zero.
        cos_sin: [num_positions, 64] fp32: 32 cosines, then 32 sines.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        codes: [m, num_heads, 512] e4m3; zeros where nothing is attended.
        scale: [m, num_heads, 4] e8m0, one for 128 dims.
        lse: [m, num_heads] fp32, natural, without the sink; +inf where nothing is attended.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    args = (q, cache, window_idx, window_length, page_table, entry_length)
    _check(FP8_NAME, args, sink, positions, cos_sin)
    if are_few(q, page_table):
        return hca_join_fp8(*hca_chunks(*args), sink, positions, cos_sin)
    return hca_fold_fp8(*hca_groups(*args), sink, positions, cos_sin)


def _check(name: str, args: tuple[torch.Tensor, ...], sink: torch.Tensor, *angles: torch.Tensor) -> None:
    """Check what the fold takes, which would refuse it after a launch; faults of `args` are named first."""
    try:
        q, (m, num_heads) = args[0], (*args[0].shape, 0, 0)[:2]
        if angles:
            require_epilogue(name, sink, *angles, m=m, num_heads=num_heads, device=q.device)
        else:
            require_input(name, "sink", sink, (num_heads,), dtype=torch.float32, device=q.device)
    except (AttributeError, ContractError):
        hca_lists.check(name, *args)
        raise
