"""What this library changes in the compiler for its own lowerings, and how caches are told of it.

`wgmma` counts the registers of an accumulator; `producer` lets one warp into the producer's loop;
`simplifier` asks z3 so that it answers sooner; all are in force inside `corrected()` alone. They decide the
CUDA text, and the compiler's disk cache knows nothing of them: kernels compiled inside carry their digest as
a flag.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from dsv4_kernels.tile import late, overlap, own_sync, producer, roles, simplifier, unroll, wgmma

__all__ = ["compile_flags", "corrected", "sources_sha256"]


@contextlib.contextmanager
def corrected() -> Iterator[None]:
    """Lower the library's way inside the block, in this thread: each lowering in `simplifier.lowering`."""
    with wgmma.corrected(), simplifier.quickly():
        yield


@cache
def sources_sha256() -> str:
    """Return a hash over the corrections: where it differs, so may the CUDA text of the same PrimFunc."""
    digest = hashlib.sha256()
    for module in (late, overlap, own_sync, producer, roles, simplifier, unroll, wgmma):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


def compile_flags() -> list[str]:
    """Return the flags for `tilelang.compile` of a kernel inside `corrected()`."""
    return [f"-DDSV4_CORRECTIONS_{sources_sha256()[:16]}"]
