"""Kernels whose warpgroups wait for each other by mbarriers alone: no barriers of the compiler's own.

TileLang 0.1.15 puts a barrier of the whole block between any two accesses to shared memory that may meet. It
does not look for an order by mbarriers, so warpgroups that are meant to be out of step meet at each of them.

    kernel = own_sync(make_kernel(...))

asks for no such barriers in one kernel; what orders its accesses is then what it says, and property `race`
proves that it suffices. The request is an attribute of the PrimFunc, hence part of its text and of every
cache's key. It is followed wherever this module has been imported, and by `dsv4-verify`.
"""

from collections.abc import Callable
from typing import Any

import tilelang
from tilelang import tvm
from tvm import tirx

ATTRIBUTE = "dsv4_kernels.own_sync"  # of a PrimFunc that asks for no barriers
_OPTION = "tl.disable_thread_storage_sync"
_stock: Callable[[str], Any] = tilelang.transform.ThreadSync


def own_sync(prim_func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return the kernel with the request that no barriers be put into it."""
    return prim_func.with_attr(ATTRIBUTE, True)


def _thread_sync(scope: str) -> Any:
    stock = _stock(scope)

    def run(module: Any) -> Any:
        # Host and device are two functions by now, and the host's keeps the attributes.
        if not any(f.attrs and f.attrs.get(ATTRIBUTE, False) for f in module.functions.values()):
            return stock(module)
        now = tvm.transform.PassContext.current()
        config = {**dict(now.config), _OPTION: True}
        with tvm.transform.PassContext(now.opt_level, config=config):
            return stock(module)

    return run


tilelang.transform.ThreadSync = _thread_sync
