"""The experts' weights as the fused kernel streams them: in the order in which its tiles read them.

A *step* is what one stage of the product's pipeline takes of the weights: 256 weight rows by 128 channels,
16 KB of codes and 1 KB of offsets, each in one piece of memory. An expert's steps stand tile by tile, linear
1 first; a tile's rows are 128 gate rows and the 128 up rows of the same channels, or 256 of linear 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsv4_kernels.gemm.fold import FoldedWeights
from dsv4_kernels.gemm.folded_tile import BLOCK_K, WORD

GROUP_N = 128  # weight rows of one product; a tile has two groups
TILE_N = 2 * GROUP_N
STEP_WORDS = BLOCK_K // WORD  # of a row


@dataclass(frozen=True)
class Packed:
    """Weights of the experts of one or more ranks.

    Attributes:
        words: [ranks, experts * steps, 256, 16] uint32 codes, as in `FoldedWeights`.
        offsets: [ranks, experts * steps, 256] int32, the four offsets of a row's 128 channels.
        factors: [ranks, experts * tiles, 256] float32.
    """

    words: torch.Tensor
    offsets: torch.Tensor
    factors: torch.Tensor


def pack(ranks: Sequence[tuple[FoldedWeights, FoldedWeights]]) -> Packed:
    """Lay both linears of each rank's experts out.

    Args:
        ranks: for each rank (linear 1, linear 2): words [experts, n, k / 8], offsets [experts, n, k / 32],
            factors [experts, n], with n = 2 * inter (gate rows first), k = hidden, and n = hidden, k = inter.

    Returns:
        The weights of all ranks, as the kernel takes them.
    """
    pieces = [(_tiles(l1, gated=True), _tiles(l2, gated=False)) for l1, l2 in ranks]

    def joined(part: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.stack([torch.cat((a[part], b[part]), 1).flatten(0, 1) for a, b in pieces]).view(dtype)

    return Packed(joined(0, torch.uint32), joined(1, torch.int32), joined(2, torch.float32))


def _tiles(w: FoldedWeights, *, gated: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return one linear's words [experts, steps, 256, 16], offsets and factors [experts, tiles, 256]."""
    experts, n = w.factors.shape
    tiles = n // TILE_N
    steps = w.words.shape[2] // STEP_WORDS

    def by_tile(values: torch.Tensor) -> torch.Tensor:  # [experts, n, ...] to [experts, tiles, 256, ...]
        if not gated:
            return values.view(experts, tiles, TILE_N, *values.shape[2:])
        halves = values.view(experts, 2, tiles, GROUP_N, *values.shape[2:])
        return halves.transpose(1, 2).flatten(2, 3)

    words = by_tile(w.words.view(torch.int32).view(experts, n, steps, STEP_WORDS))
    offsets = by_tile(w.offsets.contiguous().view(torch.int32).view(experts, n, steps))
    words = words.permute(0, 1, 3, 2, 4).reshape(experts, tiles * steps, TILE_N, STEP_WORDS)
    offsets = offsets.transpose(2, 3).reshape(experts, tiles * steps, TILE_N)
    return words, offsets, by_tile(w.factors).reshape(experts, tiles, TILE_N)
