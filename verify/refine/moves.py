"""Calls that write one place of memory, as the stores that they amount to.

An asynchronous copy is a store of what it reads: when it takes effect is for `race` to say. An atomic
update is a store of an operation of its own, so that neither level may have a plain store for it, and
it counts how often it is executed.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.evaluate import Evaluator
from verify.refine.inline import loads
from verify.refine.sym import Sym

# Without a result; those of several elements, which read them through a pointer, are not here.
ATOMICS = frozenset(f"atomic_{name}_elem_op" for name in ("add", "max", "min", "or"))


def is_atomic(value: ir.Expr) -> bool:
    """Return whether a stored value is an atomic update of what it is stored to."""
    return isinstance(value, ir.Call) and value.op in ATOMICS


def device_store(span: ir.Span | None, call: ir.Call) -> ir.Store | None:
    """Return the store that a call of the device IR amounts to, None where it is no such call.

    Raises:
        UnsupportedIR: a size or pointer is computed.
    """
    if call.op == "ptx_cp_async":
        target, source, size, *predicate = call.args
        if not (isinstance(target, ir.AccessPtr) and isinstance(source, ir.AccessPtr)):
            raise UnsupportedIR("ptx_cp_async of a computed pointer")
        if not isinstance(size, ir.Const) or target.element != source.element:
            raise UnsupportedIR("ptx_cp_async of a computed size or between two types")
        count = int(size.value)
        value: ir.Expr = _load(source, count)
        if predicate:
            value = ir.Select(value.dtype, predicate[0], value, ir.Const(value.dtype, 0), lazy=True)
        return ir.Store(span, _view(target), (_index(target, count),), value)
    if call.op in ATOMICS:
        pointer, operand, *order = call.args
        if not isinstance(pointer, ir.AccessPtr):
            raise UnsupportedIR(f"{call.op} on a computed pointer")
        value = ir.Call(pointer.element, call.op, (operand, *order))
        return ir.Store(span, _view(pointer), (pointer.offset,), value)
    return None


def tile_atomic(call: ir.Call) -> tuple[ir.Buffer, tuple[ir.Expr, ...], ir.Expr] | None:
    """Return buffer, indices and value of an atomic update in the tile IR, None where it is none.

    Raises:
        UnsupportedIR: it is not of one element.
    """
    if call.op not in ATOMICS:
        return None
    pointer, operand, *order = call.args
    match pointer:
        case ir.Call(op="access_ptr", args=(ir.Load(buffer=buffer, indices=indices), ir.Const(value=1), _)):
            return buffer, indices, ir.Call(buffer.dtype, call.op, (operand, *order))
    raise UnsupportedIR(f"{call.op} of several elements")


def _view(pointer: ir.AccessPtr) -> ir.Buffer:
    one, zero = ir.Const(ir.INT32, 1), ir.Const(ir.INT32, 0)
    return ir.Buffer(pointer.data.name, pointer.element, (), (one,), "", pointer.data, zero)


def _index(pointer: ir.AccessPtr, count: int) -> ir.Expr:
    if count == 1:
        return pointer.offset
    kind = pointer.offset.dtype
    return ir.Ramp(ir.DType(kind.name, count), pointer.offset, ir.Const(kind, 1))


def _load(pointer: ir.AccessPtr, count: int) -> ir.Load:
    kind = ir.DType(pointer.element.name, count) if count > 1 else pointer.element
    return ir.Load(kind, _view(pointer), (_index(pointer, count),))


def operand_columns(value: ir.Expr, evaluator: Evaluator, places: Sequence[Sym]) -> list[Sym]:
    """Return what tells updates of one place apart: the operand itself, or where it was read.

    Args:
        value: the update.
        evaluator: of its level, at its points.
        places: where each read in `value` lands.

    Raises:
        UnsupportedIR: the operand is computed from reads and coordinates together.
    """
    assert isinstance(value, ir.Call), "an update is a call"
    operand = value.args[0]
    if places:
        return list(places)
    if isinstance(operand, ir.Const):
        return []
    if any(True for _ in loads(operand)) or not operand.dtype.is_int:
        raise UnsupportedIR("operand of an atomic update that is neither read nor an index")
    return [evaluator.int(operand)]


def ranks(*columns: np.ndarray) -> np.ndarray:
    """Return for each row how many equal rows come before it."""
    if not columns:
        return np.zeros(0, dtype=np.int64)
    _, group = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    starts = np.concatenate(([0], np.cumsum(np.bincount(group))))
    found = np.empty(len(group), dtype=np.int64)
    for first, end in pairwise(starts):
        found[order[first:end]] = np.arange(end - first)
    return found
