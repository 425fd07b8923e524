"""The experts' weights as the fused kernel streams them: in the order in which its tiles read them.

A *step* is what one stage of the product's pipeline takes of the weights: 256 weight rows by 128 channels,
16 KB of codes and 1 KB of offsets, each in one piece of memory. An expert's steps stand tile by tile, linear
1 first; a tile's rows are 128 gate rows and the 128 up rows of the same channels, or 256 of linear 2.

Of e4m3 weights a step is 128 rows: as many bytes, and twice as many steps, one for each half of a tile's
rows, so that both halves together are 256 rows of 128 bytes in one piece. Their scale, one a 128 x 128,
stands where offsets do. The shared expert's steps come first; beside e2m1 weights its words stand as threads
hand them to the tensor core.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsv4_kernels.gemm.fold import FoldedWeights
from dsv4_kernels.gemm.folded_tile import BLOCK_K, WORD
from megamoe import schedule
from megamoe.reference import Fp8Experts

GROUP_N = 128  # weight rows of one product; a tile has two groups
TILE_N = 2 * GROUP_N
STEP_WORDS = BLOCK_K // WORD  # of a row
SCALE_WORDS = 32  # that say the scale of a step of e4m3 weights: 128 bytes, which a bulk copy is aligned to
FP8_STAGES = 2  # that 128 channels of a tile's e4m3 weights take
_UE8M0_BIAS = 127

Weights = FoldedWeights | Fp8Experts


def first_step(expert: Any, steps: Any, *, is_mixed: bool) -> Any:
    """Return the number of an expert's first step, where routed experts have `steps` each.

    Args:
        expert: its number, a Python int, a TileLang expression or a Z3 term, as `steps` may be.
        steps: of a routed expert.
        is_mixed: whether the first expert, the shared one, has e4m3 weights and the others have not.
    """
    if is_mixed:
        return schedule.choose(expert > 0, (expert + (FP8_STAGES - 1)) * steps, 0)
    return expert * steps


def stages(steps: Any, expert: Any, *, is_fp8: bool, is_mixed: bool) -> Any:
    """Return how many stages `steps` blocks of 128 channels of one of an expert's tiles take.

    Args: those of `first_step`; is_fp8: whether all experts have e4m3 weights.
    """
    if is_mixed:
        return schedule.choose(expert == 0, FP8_STAGES * steps, steps)
    return FP8_STAGES * steps if is_fp8 else steps


@dataclass(frozen=True)
class Packed:
    """Weights of the experts of one or more ranks.

    Attributes:
        words: [ranks, experts * steps, 256, 16] uint32 codes, as in `FoldedWeights`; of e4m3 weights alone
            [ranks, experts * steps, 128, 128] uint8; of the shared expert beside e2m1 weights see
            `fp8_words`.
        offsets: [ranks, experts * steps, 256] int32, the four offsets of a row's 128 channels; of e4m3
            weights the bits of a step's scale as float32, 256 times beside e2m1 weights, else 32 times.
        factors: [ranks, experts * tiles, 256] float32; 1 for e4m3 weights.
    """

    words: torch.Tensor
    offsets: torch.Tensor
    factors: torch.Tensor

    def arguments(
        self, steps: int, step_shape: tuple[int, int], offset_words: int, *, fp8: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the three as a kernel takes them: the same bytes, in its steps.

        Args:
            steps: of all experts of a rank, see `Config.all_steps`.
            step_shape: of a step's weights.
            offset_words: of a step.
            fp8: whether weights are e4m3.
        """
        words = self.words.view(torch.float8_e4m3fn if fp8 else torch.uint32)
        ranks = len(words)
        return (
            words.view(ranks, steps, *step_shape),
            self.offsets.view(ranks, steps, offset_words),
            self.factors,
        )


def pack(
    ranks: Sequence[tuple[Weights, Weights]], shared: tuple[Fp8Experts, Fp8Experts] | None = None
) -> Packed:
    """Lay both linears of each rank's experts out.

    Args:
        ranks: for each rank (linear 1, linear 2): words [experts, n, k / 8], offsets [experts, n, k / 32],
            factors [experts, n], with n = 2 * inter (gate rows first), k = hidden, and n = hidden, k = inter;
            or e4m3 weights [experts, n, k].
        shared: both linears of the shared expert, the same for all ranks; None: there is none.

    Returns:
        The weights of all ranks, as the kernel takes them.
    """
    is_mixed = shared is not None and any(isinstance(w, FoldedWeights) for pair in ranks for w in pair)

    def both(l1: Weights, l2: Weights) -> tuple[_Tiles, _Tiles]:
        return _tiles(l1, gated=True, is_mixed=is_mixed), _tiles(l2, gated=False, is_mixed=is_mixed)

    pieces = [both(*pair) for pair in ranks]
    before = [] if shared is None else [both(*shared)]

    def of_rank(pieces: list[tuple[_Tiles, _Tiles]], part: int) -> torch.Tensor:
        return torch.cat([torch.cat((a[part], b[part]), 1).flatten(0, 1) for a, b in pieces])

    def joined(part: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.stack([of_rank([*before, piece], part) for piece in pieces]).view(dtype)

    words = torch.uint8 if pieces[0][0][0].dtype == torch.uint8 else torch.uint32
    return Packed(joined(0, words), joined(1, torch.int32), joined(2, torch.float32))


_Tiles = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _tiles(w: Weights, *, gated: bool, is_mixed: bool) -> _Tiles:
    """Return one linear's words [experts, steps, ...], offsets and factors [experts, tiles, 256]."""
    if isinstance(w, Fp8Experts):
        return _fp8_tiles(w, gated=gated, as_words=is_mixed)
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


def fp8_words(codes: torch.Tensor) -> torch.Tensor:
    """Return e4m3 codes [..., 128 rows, 128 channels] uint8 as words [..., 256, 16] int32.

    They stand as threads read them: word (q, h, t) of row i holds channels 32 q + 16 h + 4 t + (0..3) and is
    in row 4 (i // 2) + 2 (q // 2) + i % 2, column 4 t + 2 (q % 2) + h. So a thread has four words in a piece,
    and eight threads, of two rows, 128 bytes.
    """
    lead = codes.shape[:-2]
    words = (
        codes.contiguous().view(torch.int32).view(*lead, GROUP_N // 2, 2, 2, 2, 2, 4)
    )  # i, i%2, q//2, q%2, h, t
    order = [len(lead) + axis for axis in (0, 2, 1, 5, 3, 4)]
    return words.permute(*range(len(lead)), *order).reshape(*lead, TILE_N, STEP_WORDS)


def _fp8_tiles(w: Fp8Experts, *, gated: bool, as_words: bool) -> _Tiles:
    experts, n, k = w.w.shape
    tiles, blocks = n // TILE_N, k // BLOCK_K

    def by_tile(values: torch.Tensor) -> torch.Tensor:  # [experts, groups, ...] to [experts, tiles, 2, ...]
        if not gated:
            return values.unflatten(1, (tiles, 2))
        return values.unflatten(1, (2, tiles)).transpose(1, 2)

    codes = w.w.view(torch.uint8).view(experts, n // GROUP_N, GROUP_N, blocks, BLOCK_K).transpose(2, 3)
    codes = by_tile(codes).transpose(2, 3).reshape(experts, FP8_STAGES * tiles * blocks, GROUP_N, BLOCK_K)
    byte = by_tile(w.w_scale.view(torch.uint8)).transpose(2, 3).reshape(experts, -1).int()
    scale = torch.ldexp(torch.ones_like(byte, dtype=torch.float32), byte - _UE8M0_BIAS)
    scale = torch.where(byte == 2 * _UE8M0_BIAS + 1, torch.nan, scale)
    offsets = scale.view(torch.int32)[:, :, None].expand(-1, -1, TILE_N if as_words else SCALE_WORDS)
    words = fp8_words(codes) if as_words else codes
    return words, offsets, torch.ones(experts, tiles, TILE_N, device=w.w.device)
