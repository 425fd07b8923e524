"""How the expert layer's kernels are lowered: one way, for launches and for proofs."""

import contextlib
from collections.abc import Iterator

from dsv4_kernels.tile import corrections
from megamoe import fences


@contextlib.contextmanager
def as_launched() -> Iterator[None]:
    """Lower the layer's way inside the block, in this thread: each lowering in `simplifier.lowering`."""
    with corrections.corrected(), fences.by_hand():
        yield


def compile_flags() -> list[str]:
    """Return the flags for `tilelang.compile` inside `as_launched()`, by which caches tell its kernels."""
    return [*corrections.compile_flags(), *fences.COMPILE_FLAGS]
