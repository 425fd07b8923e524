"""Two corrections to the compiler's wgmma generator, for this library's own lowerings.

TileLang 0.1.15 fences the registers of an accumulator before and after a product. Where several
warpgroups share out the rows, it names the registers of all of them: `warpgroup_fence_operand(part,
128)` on a `float part[64]`, beyond the array. A thread's own count does not depend on the number of
warpgroups.

Where B is a part of the rows of a taller buffer (K by N, N contiguous), it takes the panels of 64 columns to
be as tall as the part: every warpgroup but the first then starts at a wrong column (`layout` refutes it). The
descriptor has the right distance.

What they change is part of the CUDA text, so certificates are of the corrected kernels.

Outside of `corrected()` the compiler is as it ships, in this and in every other thread.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import wraps
from typing import Any

from tilelang.cuda.intrinsics.macro.wgmma_macro_generator import (
    TensorCoreIntrinEmitter,
    WGMMADescriptorParams,
)
from tvm import DataType

_REGISTER_BITS = 32
_UNIT_BYTES = 16  # of the strides in a descriptor
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


def _of_buffer(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return the generator of an instruction with the height of B's buffer instead of its part's."""

    @wraps(stock)
    def atom(self: TensorCoreIntrinEmitter, *args: Any, **kwargs: Any) -> Any:
        b = next(p for p in reversed((*args, *kwargs.values())) if isinstance(p, WGMMADescriptorParams))
        panel_bytes = b.swizzle_atom_elems * b.elems_in_bytes
        rows = b.leading_byte_offset * _UNIT_BYTES // panel_bytes
        if not is_corrected() or b.is_k_major or self.a_transposed or rows <= self.chunk:
            return stock(self, *args, **kwargs)
        part, self.chunk = self.chunk, rows
        try:
            return stock(self, *args, **kwargs)
        finally:
            self.chunk = part

    return atom


def _accum_regs(self: TensorCoreIntrinEmitter) -> int:
    if not is_corrected():
        return _stock(self)
    bits = self.warp_rows * self.warp_cols * self.local_size_out * DataType(self.accum_dtype).bits
    return -(-bits // _REGISTER_BITS)


TensorCoreIntrinEmitter.wgmma_ss_atom = _of_buffer(TensorCoreIntrinEmitter.wgmma_ss_atom)  # type: ignore[method-assign]
TensorCoreIntrinEmitter.wgmma_rs_atom = _of_buffer(TensorCoreIntrinEmitter.wgmma_rs_atom)  # type: ignore[method-assign]
TensorCoreIntrinEmitter.wgmma_accum_regs = property(_accum_regs)  # type: ignore[method-assign]
