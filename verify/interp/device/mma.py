"""mma.sync: the product of one warp, from registers to registers, complete at once.

Register layouts are those of the PTX manual ("Matrix fragments for mma.m16n8k..."): in units of 32-bit
registers they are the same for every operand type.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from verify import ir
from verify.descriptors import mma_shape
from verify.interp import dtypes
from verify.interp.device import access, errors
from verify.interp.device.block import Group
from verify.interp.device.operands import numbers, register_operand

if TYPE_CHECKING:
    from verify.interp.device.values import Values

WARP = 32
_ROWS, _COLUMNS = 16, 8
_K_BYTES = (16, 32)


def _mma(m: "Values", group: Group, call: ir.Call) -> None:
    from verify.interp.device.warp import converged

    converged(m, call.op)
    shape, a_layout, b_layout, a_t, b_t, c_t, a, a_off, b, b_off, c, c_off, saturate, *rest = call.args
    rows, columns, k = mma_shape(shape)
    names = [ir.MATRIX_TYPES.get(t.value, "") if isinstance(t, ir.Str) else "" for t in (a_t, b_t, c_t)]
    layouts = [x.value if isinstance(x, ir.Str) else "" for x in (a_layout, b_layout)]
    k_bytes = k * dtypes.stored_dtype(names[0]).itemsize if names[0] else 0
    known = (rows, columns) == (_ROWS, _COLUMNS) and k_bytes in _K_BYTES and layouts == ["row", "col"]
    if len(m.active[1]) % WARP:
        raise m.block.fault(errors.BarrierDivergenceError, "mma.sync by part of a warp", m.active[1])
    if not known or "" in names or rest or m.uniform(saturate, "saturation flag"):
        raise ir.UnsupportedIR("mma.sync of this shape, these types or layouts")
    _, threads = m.active
    lane = np.arange(WARP)[:, None]
    a_at, b_at = np.arange(k_bytes // 2), np.arange(k_bytes // 4)
    a_rows = lane // 4 + a_at // 4 % 2 * 8
    a_columns = lane % 4 * 4 + a_at // 8 * 16 + a_at % 4
    b_columns = lane % 4 * 4 + b_at // 4 * 16 + b_at % 4
    left = _gathered(m, (a, a_off), threads, len(a_at), (_ROWS, k_bytes), a_rows, a_columns)
    right = _gathered(m, (b, b_off), threads, len(b_at), (_COLUMNS, k_bytes), lane // 4 + 0 * b_at, b_columns)
    size = dtypes.stored_dtype(names[2]).itemsize
    storage, first = register_operand(m, (c, c_off), 4 * size)
    old = torch.from_numpy(access.read_bytes(m, storage, first, 4 * size, threads))
    value = dtypes.to_carrier(dtypes.retype(old, "uint8", names[2]), names[2]).reshape(-1, WARP, 4)
    product = numbers(left.reshape(-1, _ROWS, k, k_bytes // k), names[0]) @ numbers(
        right.reshape(-1, _COLUMNS, k, k_bytes // k), names[1]
    ).transpose(1, 2)
    i = np.arange(4)
    total = product[:, torch.from_numpy(lane // 4 + i // 2 * 8), torch.from_numpy(lane % 4 * 2 + i % 2)]
    total = total + value.to(total.dtype)
    is_int = names[2] == "int32"
    result = dtypes.wrap(total, "int32") if is_int else dtypes.narrow(total, dtypes.stored_dtype(names[2]))
    access.write_bytes(m, storage, first, access.octets_of(result.reshape(-1, 4), names[2]), threads)


def _gathered(
    m: "Values",
    operand: tuple[Any, Any],
    threads: np.ndarray,
    size: int,
    shape: tuple[int, int],
    rows: np.ndarray,
    columns: np.ndarray,
) -> np.ndarray:
    """Return (warps, *shape) bytes of a matrix that lies in `size` bytes of each thread's registers."""
    storage, first = register_operand(m, operand, size)
    octets = access.read_bytes(m, storage, first, size, threads).reshape(-1, WARP, size)
    matrix = np.zeros((len(octets), *shape), np.uint8)
    matrix[:, rows, columns] = octets
    return matrix


EFFECTS = {"ptx_mma": _mma}
