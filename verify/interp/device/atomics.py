"""Atomic updates by the lanes of a warp, one after another in an order the schedule chooses."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from verify import ir
from verify.interp import arith, dtypes
from verify.interp.device import access, errors, flags
from verify.interp.device.async_copy import pointer
from verify.interp.device.block import Group
from verify.interp.lanes import Value

if TYPE_CHECKING:
    from verify.interp.device.values import Values

_UPDATES = {
    **{f"atomic_add{w}{r}_elem_op": "add" for w in ("", "x2", "x4") for r in ("", "_ret")},
    "atomic_max_elem_op": "max",
    "atomic_max_ret_elem_op": "max",
    "atomic_min_elem_op": "min",
    "atomic_min_ret_elem_op": "min",
    "atomic_or_elem_op": "bitor",
}
OPS = frozenset({*_UPDATES, "atomic_load_elem_op", "atomic_store_elem_op"})


def apply(m: "Values", node: ir.Call) -> Value:
    """Run an atomic operation for the active lanes; return previous values."""
    kind = _element(node.args[0])
    count = 2 if "x2" in node.op else 4 if "x4" in node.op else 1
    size = kind.bits * count // access.BYTE_BITS
    lanes, threads = m.active
    result = torch.zeros((count, m.width), dtype=dtypes.carrier_dtype(kind.name))
    if not len(lanes):
        return result if count > 1 else result[0]
    storage, first, _ = pointer(m, node.args[0], size)
    if storage.space is None:
        raise ir.UnsupportedIR(f"atomic on {storage.kind} memory")
    bad = (storage.base + first) % size != 0
    if bad.any() and m.block.run.checks.alignment:
        text = f"atomic of {size} bytes at an address that is no multiple of them"
        raise m.block.fault(errors.MisalignedError, text, threads[bad], storage, int(first[bad][0]), size)
    operand = None if node.op == "atomic_load_elem_op" else _operand(m, node, kind, count)
    order, signals = flags.order_of(node), m.block.run.flags
    space = storage.space
    at = storage.space.slots(storage.base + first[:, None] + np.arange(size))
    access.check_written(m.block, storage, at, threads)
    if operand is None:
        actor = access.lanes_actor(m.block, threads)
        access.record(m.block, storage, at, actor, is_write=True, threads=threads, is_atomic=True)
        stored = dtypes.retype(torch.from_numpy(storage.space.data[at]), "uint8", kind.name)
        result[:, torch.from_numpy(lanes)] = dtypes.to_carrier(stored, kind.name).t()
        for k in range(len(lanes)):
            signals.read(m.block, threads[k : k + 1], space, int(at[k, 0]), order)
        return result if count > 1 else result[0]
    for k in m.block.run.rng.permutation(len(lanes)).tolist():
        one = slice(k, k + 1)
        actor = access.lanes_actor(m.block, threads[one])
        access.record(m.block, storage, at[one], actor, is_write=True, threads=threads[one], is_atomic=True)
        stored = dtypes.retype(torch.from_numpy(storage.space.data[at[k]]), "uint8", kind.name)
        old = dtypes.to_carrier(stored, kind.name)
        result[:, lanes[k]] = old
        new = operand[:, lanes[k]]
        is_update = node.op in _UPDATES
        if is_update:
            new = m.lanes.tensor(arith.binary(_UPDATES[node.op], kind, old, new, m.lanes, None))
            signals.read(m.block, threads[one], space, int(at[k, 0]), order)
        signals.write(m.block, threads[one], space, int(at[k, 0]), order, is_update=is_update)
        access.put(storage, at[k], access.octets_of(new, kind.name))
    return result if count > 1 else result[0]


def _element(node: ir.Expr) -> ir.DType:
    match node:
        case ir.AccessPtr(element=element):
            return ir.DType(element.name)
        case ir.Call(op="address_of", args=(ir.Load(buffer=buffer),)):
            return ir.DType(buffer.dtype.name)
    raise ir.UnsupportedIR("atomic on a computed pointer")


def _operand(m: "Values", node: ir.Call, kind: ir.DType, count: int) -> torch.Tensor:
    value = node.args[1]
    if count == 1:
        return m.cast_to(value, kind.name).expand(1, m.width)
    if value.dtype.name != "handle":
        return m.tensor(value).expand(count, m.width)
    storage, first, threads = pointer(m, value, kind.bits * count // access.BYTE_BITS)
    octets = access.read_bytes(m, storage, first, kind.bits * count // access.BYTE_BITS, threads)
    stored = dtypes.retype(torch.from_numpy(octets), "uint8", kind.name)
    full = torch.zeros((count, m.width), dtype=dtypes.carrier_dtype(kind.name))
    full[:, torch.from_numpy(m.active[0])] = dtypes.to_carrier(stored, kind.name).t()
    return full


def _evaluate(m: "Values", group: Group, call: ir.Call) -> None:
    apply(m, call)


EFFECTS = dict.fromkeys(OPS, _evaluate)
