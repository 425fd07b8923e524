"""Proxy fences of a kernel's own, instead of those that the compiler would add.

TileLang 0.1.15 puts a proxy fence, with a memory barrier, before a product if copies were started since the
last one. A kernel that fences what has arrived, before the barrier that hands it over, needs no other;
without the added ones it is up to 2 % faster (docs/megamoe.md).

Inside `by_hand()` the compiler adds none, in this thread; the interpreter reports a product that reads what
no fence has handed over.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from tilelang.cuda import transform

# The compiler's cache does not know of `by_hand`: kernels compiled inside it carry this flag in their key.
COMPILE_FLAGS = ["-DDSV4_FENCES_BY_HAND"]
_by_hand: ContextVar[bool] = ContextVar("by_hand", default=False)
_stock: Callable[[], Any] = transform.InjectFenceProxy


@contextlib.contextmanager
def by_hand() -> Iterator[None]:
    """Lower without added fences inside the block, in this thread."""
    token = _by_hand.set(True)
    try:
        yield
    finally:
        _by_hand.reset(token)


def _inject() -> Any:
    return (lambda module: module) if _by_hand.get() else _stock()


transform.InjectFenceProxy = _inject
