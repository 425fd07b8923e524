"""One correction to the compiler's wgmma generator, applied on import.

TileLang 0.1.15 fences the registers of an accumulator before and after a product. Where several
warpgroups share out the rows, it names the registers of all of them: `warpgroup_fence_operand(part,
128)` on a `float part[64]`, beyond the array. A thread's own count does not depend on the number of
warpgroups. Kernels that split rows import this module; what it changes is part of the CUDA text, so
certificates are of the corrected kernels.
"""

from tilelang.cuda.intrinsics.macro.wgmma_macro_generator import TensorCoreIntrinEmitter
from tvm import DataType

_REGISTER_BITS = 32


def _accum_regs(self: TensorCoreIntrinEmitter) -> int:
    bits = self.warp_rows * self.warp_cols * self.local_size_out * DataType(self.accum_dtype).bits
    return -(-bits // _REGISTER_BITS)


TensorCoreIntrinEmitter.wgmma_accum_regs = property(_accum_regs)  # type: ignore[method-assign]
