"""Rounds of a launch, and tiles by the number of tokens that they decide between.

Where a block takes all of a multiprocessor's shared memory, a launch is rounds of as many blocks as there are
multiprocessors, and its last round takes as long as a full one. So a larger tile, which does more with the
bytes it reads, is the better one only for those batches whose blocks it packs into few enough rounds.
"""

from collections.abc import Callable
from typing import TypeVar

MULTIPROCESSORS = 132  # of an H100 or H200

_Tile = TypeVar("_Tile")


def rounds(blocks: int) -> int:
    """Return how many rounds so many blocks take, one a multiprocessor."""
    return -(-blocks // MULTIPROCESSORS)


def ranges(
    choose: Callable[[int], _Tile], after: int, step: int, last: int, rest: tuple[int, _Tile]
) -> tuple[tuple[int, _Tile], ...]:
    """Return (largest number of tokens, tile) pairs for more than `after` tokens.

    Args:
        choose: tokens, as many as whole tiles hold, to the tile for them.
        after: tokens that have a tile already.
        step: tokens of a tile, which decide the number of blocks.
        last: tokens up to which `choose` is asked.
        rest: the most tokens of all, and the tile for more than `last`.
    """
    pairs = [(m, choose(m)) for m in range(after // step * step + step, last + 1, step)] + [rest]
    following = [tile for _, tile in pairs[1:]] + [None]
    return tuple(pair for pair, after_it in zip(pairs, following, strict=True) if pair[1] != after_it)
