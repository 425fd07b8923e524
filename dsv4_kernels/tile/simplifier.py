"""What the compiler's simplifiers ask z3, asked with settings that answer sooner.

Two thirds of a lowering are questions of TileLang's simplifiers to z3, whose older arithmetic answers them in
half of the time. Each question has a budget, so other settings may decide more of them or fewer; they are
therefore part of how the library compiles (`corrections`), and proofs lower with them as launches do. The
pass that places barriers comes to other ends with them and keeps the compiler's.

Settings are those of the process: one lowering at a time may have them, and z3 solvers that are made while
it runs have them too.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import tilelang
import z3

# Swizzles are integers taken for bits and back, on which z3 spends its whole budget without an answer; it
# gives up at once if it knows nothing of such conversions.
SETTINGS = {
    "smt.arith.solver": "2",
    "smt.relevancy": "0",
    "smt.arith.propagate_eqs": "false",
    "smt.bv.enable_int2bv": "false",
}

_asked: ContextVar[bool] = ContextVar("asked", default=False)
_before: ContextVar[Mapping[str, str] | None] = ContextVar("before", default=None)  # inside `lowering`
_stock: Callable[[str], Any] = tilelang.transform.ThreadSync


@contextlib.contextmanager
def quickly() -> Iterator[None]:
    """Let lowerings inside the block, in this thread, ask so."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def is_quick() -> bool:
    """Return whether a lowering here and now asks so."""
    return _asked.get()


@contextlib.contextmanager
def lowering() -> Iterator[None]:
    """Have the settings inside the block, which is one lowering, if it is to ask so."""
    if not is_quick():
        yield
        return
    before = {name: z3.get_param(name) for name in SETTINGS}
    token = _before.set(before)
    try:
        with _having(SETTINGS, before):
            yield
    finally:
        _before.reset(token)


@contextlib.contextmanager
def _having(values: Mapping[str, str], after: Mapping[str, str]) -> Iterator[None]:
    for name, value in values.items():
        z3.set_param(name, value)
    try:
        yield
    finally:
        for name, value in after.items():
            z3.set_param(name, value)


def _thread_sync(scope: str) -> Any:
    stock = _stock(scope)

    def run(module: Any) -> Any:
        before = _before.get()
        if before is None:
            return stock(module)
        with _having(before, SETTINGS):
            return stock(module)

    return run


tilelang.transform.ThreadSync = _thread_sync
