"""Buffers made from addresses (T.make_tensor): the memory of tensors that the caller names.

with interp.addressable(*tensors):
    interp.run(kernel, pointers)      # an int64 tensor of data_ptr() values
"""

import contextlib
import math
from collections.abc import Iterator

import torch

from verify import ir
from verify.interp import dtypes
from verify.interp.errors import InterpreterError
from verify.interp.memory import Storage

_registered: list[torch.Tensor] = []


@contextlib.contextmanager
def addressable(*tensors: torch.Tensor) -> Iterator[None]:
    """Let kernels that run inside the block reach `tensors`, contiguous and on the CPU, by address."""
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise InterpreterError("addressable: requires contiguous CPU tensors")
    before = len(_registered)
    _registered.extend(t.detach() for t in tensors)
    try:
        yield
    finally:
        del _registered[before:]


def storage_at(address: int, buffer: ir.Buffer) -> Storage:
    """Return the storage from `address` to the end of the registered tensor that it lies in.

    Raises:
        InterpreterError: no registered tensor holds the address, or it is not aligned to an element.
    """
    kind = dtypes.stored_dtype(buffer.dtype.name)
    for tensor in _registered:
        start = address - tensor.data_ptr()
        size = math.prod(tensor.shape) * tensor.element_size()
        if 0 <= start < size:
            if start % kind.itemsize or (size - start) % kind.itemsize:
                raise InterpreterError(
                    f"{buffer.name}: address {address:#x} is not aligned to {buffer.dtype}"
                )
            octets = tensor.view(-1).view(torch.uint8)[start:]
            return Storage(octets.view(kind), buffer.dtype.name, "global", is_written=True)
    raise InterpreterError(f"{buffer.name}: address {address:#x} is in no tensor that was made addressable")
