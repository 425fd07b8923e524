"""Operands of matrix instructions: types, numbers, register arrays."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from verify import ir
from verify.interp import dtypes
from verify.interp.device import errors
from verify.interp.device.memory import Storage

if TYPE_CHECKING:
    from verify.interp.device.values import Values

_TF32_DROPPED_BITS = 13


def numbers(octets: np.ndarray, name: str) -> torch.Tensor:
    """Return (..., bytes of an element) as exact numbers: float64, or int64 of integers."""
    stored = dtypes.retype(torch.from_numpy(np.ascontiguousarray(octets)), "uint8", name)[..., 0]
    value = dtypes.to_carrier(stored, name)
    if ir.DType(name).is_int:
        return value
    if name == "float32":  # the tensor core reads its upper 19 bits
        pattern = dtypes.to_bits(value, name) >> _TF32_DROPPED_BITS << _TF32_DROPPED_BITS
        return dtypes.from_bits(pattern, name).to(torch.float64)
    return (dtypes.decode(value, name) if name in dtypes.CODED else value).to(torch.float64)


def register_operand(m: "Values", operand: tuple[ir.Expr, ir.Expr], size: int) -> tuple[Storage, int]:
    """Return the register array of (variable, offset in elements), and the byte that `size` bytes start at.

    Raises:
        OutOfBoundsError: they are not all in the array.
    """
    data, offset = operand
    storage = m.block.storage(data) if isinstance(data, ir.Var) else None
    if storage is None or storage.registers is None or storage.element.bits < 8:
        raise ir.UnsupportedIR("register operand of a matrix instruction")
    first = m.uniform(offset, "register offset") * storage.element.bits // 8
    if not 0 <= first <= storage.size_bytes - size:
        text = f"matrix instruction uses {size} bytes of {storage.name}, which has {storage.size_bytes}"
        raise m.block.fault(errors.OutOfBoundsError, text, m.active[1], storage, first, size)
    return storage, first
