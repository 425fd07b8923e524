"""One correction to the compiler's wgmma generator, for this library's own lowerings.

TileLang 0.1.15 fences the registers of an accumulator before and after a product. Where several
warpgroups share out the rows, it names the registers of all of them: `warpgroup_fence_operand(part,
128)` on a `float part[64]`, beyond the array. A thread's own count does not depend on the number of
warpgroups. What it changes is part of the CUDA text, so certificates are of the corrected kernels.

Outside of `corrected()` the compiler is as it ships, in this and in every other thread.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from tilelang.cuda.intrinsics.macro.wgmma_macro_generator import TensorCoreIntrinEmitter
from tvm import DataType

_REGISTER_BITS = 32
_corrected: ContextVar[bool] = ContextVar("corrected", default=False)
_stock: Callable[[TensorCoreIntrinEmitter], int] = TensorCoreIntrinEmitter.wgmma_accum_regs.fget  # type: ignore[attr-defined]


@contextlib.contextmanager
def corrected() -> Iterator[None]:
    """Lower with the correction inside the block, in this thread."""
    token = _corrected.set(True)
    try:
        yield
    finally:
        _corrected.reset(token)


def is_corrected() -> bool:
    """Return whether a lowering here and now has the correction."""
    return _corrected.get()


def _accum_regs(self: TensorCoreIntrinEmitter) -> int:
    if not is_corrected():
        return _stock(self)
    bits = self.warp_rows * self.warp_cols * self.local_size_out * DataType(self.accum_dtype).bits
    return -(-bits // _REGISTER_BITS)


TensorCoreIntrinEmitter.wgmma_accum_regs = property(_accum_regs)  # type: ignore[method-assign]
