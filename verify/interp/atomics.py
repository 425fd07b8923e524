"""Atomic updates of memory by many lanes.

Lanes that meet in one element update it one after the other, in an order that is the hardware's and
is not promised here either.
"""

from typing import TYPE_CHECKING

import torch

from verify import ir
from verify.interp import arith, dtypes, memory
from verify.interp.lanes import Value
from verify.interp.memory import Place

if TYPE_CHECKING:
    from verify.interp.exprs import Expressions

_UPDATES = {
    "atomic_add_elem_op": "add",
    "atomic_add_ret_elem_op": "add",
    "atomic_max_elem_op": "max",
    "atomic_max_ret_elem_op": "max",
    "atomic_min_elem_op": "min",
    "atomic_min_ret_elem_op": "min",
    "atomic_or_elem_op": "bitor",
}
_PACKED = {
    "atomic_addx2_elem_op": 2,
    "atomic_addx2_ret_elem_op": 2,
    "atomic_addx4_elem_op": 4,
    "atomic_addx4_ret_elem_op": 4,
}
PACKED_OPS = frozenset(_PACKED)
TRUTH_OPS = frozenset({"any_of", "all_of"})
_WRAPPING = (torch.int32, torch.int64)  # of which torch adds as the machine does
OPS = frozenset({*_UPDATES, "atomic_load_elem_op", "atomic_store_elem_op"})


def apply(machine: "Expressions", node: ir.Call) -> Value:
    """Run the atomic call `node`; return the element's previous value where the op has one."""
    place = _pointee(machine, node.args[0])
    name = place.storage.element
    if node.op == "atomic_load_elem_op":
        return memory.read(machine, place)
    value = machine.cast_to(node.args[1], name)
    if node.op == "atomic_store_elem_op":
        memory.write(machine, place, value)
        return 0
    previous = update(machine, place, _UPDATES[node.op], value, "_ret_" in node.op)
    return 0 if previous is None else previous


def update(
    machine: "Expressions", place: Place, op: str, value: torch.Tensor, returns: bool
) -> torch.Tensor | None:
    """Combine `value` of each active lane into its element; return the previous values if asked for."""
    storage = place.storage
    name = storage.element
    if name in dtypes.CODED:
        raise ir.UnsupportedIR(f"atomic {op} of {name}")
    flat, keep = memory.addresses(machine, place)
    address, operand = flat[keep], value.broadcast_to(flat.shape)[keep]
    data = memory.flat_data(storage)
    if op == "add" and not returns and data.dtype in _WRAPPING:  # in any order, and at once
        data.index_add_(0, address, operand.to(data.dtype))
        storage.written()
        return None
    before = torch.zeros(address.shape, dtype=dtypes.carrier_dtype(name))
    for turn in turns(address):
        target = address[turn]
        before[turn] = dtypes.to_carrier(data[target], name)
        kind = ir.DType(name)
        after = arith.binary(op, kind, before[turn], operand[turn], machine.lanes, None)
        data[target] = dtypes.to_stored(machine.lanes.tensor(after), name)
    storage.written()
    if not returns:
        return None
    result = torch.zeros(flat.shape, dtype=before.dtype)
    result[keep] = before
    return result


def turns(address: torch.Tensor) -> list[torch.Tensor]:
    """Split lanes into groups, in order, none of which holds an address twice."""
    if address.numel() == 0:
        return []
    order = torch.argsort(address, stable=True)
    starts = torch.ones_like(order, dtype=torch.bool)
    starts[1:] = address[order][1:] != address[order][:-1]
    position = torch.arange(order.numel())
    rank = position - torch.where(starts, position, 0).cummax(0).values
    by_rank = torch.argsort(rank, stable=True)
    counts = torch.bincount(rank)
    return list(torch.split(order[by_rank], counts.tolist()))


def apply_packed(machine: "Expressions", node: ir.Call) -> tuple[Value, ...]:
    """Run an atomic addition of 2 or 4 adjacent elements; return their previous values."""
    count = _PACKED[node.op]
    before: list[Value] = []
    for place in range(count):
        target = pointee_at(machine, node.args[0], place)
        value = memory.read(machine, pointee_at(machine, node.args[1], place))
        previous = update(machine, target, "add", value, "_ret_" in node.op)
        before.append(0 if previous is None else previous)
    return tuple(before)


def reduce_truth(machine: "Expressions", node: ir.Call) -> Value:
    """Return whether any, or all, of the elements behind a pointer are true; args: pointer, number."""
    wants_all = node.op == "all_of"
    result: torch.Tensor | None = None
    for place in range(machine.integer(node.args[1], "number of elements")):
        value = memory.read(machine, pointee_at(machine, node.args[0], place)) != 0
        result = value if result is None else (result & value if wants_all else result | value)
    return wants_all if result is None else result


def pointee_at(machine: "Expressions", node: ir.Expr, index: int) -> Place:
    """Return the element `index` places after the one that a pointer points at."""
    first = _pointee(machine, node)
    flat = torch.tensor(index)
    for value, stride in zip(first.indices, first.strides, strict=True):
        flat = flat + machine.lanes.tensor(value) * stride
    span = 1 + sum((extent - 1) * stride for extent, stride in zip(first.shape, first.strides, strict=True))
    return Place(first.buffer, first.storage, (flat,), (span,), (1,), first.offset)


def _pointee(machine: "Expressions", node: ir.Expr) -> Place:
    if isinstance(node, ir.Call) and node.op in ("access_ptr", "address_of"):
        node = node.args[0]
    if not isinstance(node, ir.Load):
        raise ir.UnsupportedIR(f"atomic on {type(node).__name__}")
    return machine.place(node.buffer, tuple(machine.evaluate(i) for i in node.indices))
