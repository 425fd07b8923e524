"""Reductions over the lanes of a T.Parallel loop: reducers, and fragments that a loop accumulates into.

    for i, j in T.Parallel(m, n):
        acc[i] = T.max(acc[i], x[i, j])     # several iterations update one element

Iterations that meet in one element are combined in some order. For min, max, bit operations and integer
sums no order matters; a float sum is computed in float64 and rounded once (`tileops` says how far another
order can be).
"""

from typing import TYPE_CHECKING

import torch

from verify import ir
from verify.interp import arith, atomics, dtypes, memory
from verify.interp.memory import Place

if TYPE_CHECKING:
    from verify.interp.statements import Statements

REDUCER_OPS = {
    "sum": "add",
    "max": "max",
    "min": "min",
    "bitand": "bitand",
    "bitor": "bitor",
    "bitxor": "bitxor",
}
_ACCUMULATING = frozenset({*REDUCER_OPS.values(), "mul"})


def identity(op: str, kind: ir.DType) -> int | float:
    """Return the value of type `kind` that changes nothing when combined by `op` (a BinOp's name)."""
    if op in ("add", "bitor", "bitxor"):
        return 0
    if not kind.is_int:
        return float("-inf") if op == "max" else float("inf")
    low, high = kind.int_range
    if op == "bitand":
        return -1 if kind.is_signed else high
    return low if op == "max" else high


def update(m: "Statements", node: ir.Call) -> None:
    """Contribute to a reducer; args: the element, as a Load, and the contribution."""
    target, value = node.args
    if not isinstance(target, ir.Load) or target.buffer.data not in m.reducers:
        raise ir.UnsupportedIR("reducer_update of what is no reducer")
    name = target.buffer.dtype.name
    place = m.place(target.buffer, tuple(m.evaluate(i) for i in target.indices))
    combine(m, place, REDUCER_OPS[m.reducers[target.buffer.data]], m.cast_to(value, name))


def store(m: "Statements", stmt: ir.Store) -> bool:
    """Run `stmt` if it accumulates into a fragment's element from several lanes; return whether it did."""
    found = _accumulation(stmt) if stmt.buffer.scope == "local.fragment" and m.is_parallel else None
    if found is None:
        return False
    op, contribution = found
    place = m.place(stmt.buffer, tuple(m.evaluate(i) for i in stmt.indices))
    if memory.is_injective(m, place):
        return False
    flat, keep = memory.addresses(m, place)
    if not bool((torch.bincount(flat[keep]) > 1).any()):
        return False
    combine(m, place, op, m.cast_to(contribution, stmt.buffer.dtype.name), (flat, keep))
    return True


def _accumulation(stmt: ir.Store) -> tuple[str, ir.Expr] | None:
    """Return (op, x) where `stmt` is `b[i] = op(b[i], x)` or `op(x, b[i])`."""
    value = stmt.value
    if not isinstance(value, ir.BinOp) or value.op not in _ACCUMULATING:
        return None
    for own, other in ((value.a, value.b), (value.b, value.a)):
        if (
            isinstance(own, ir.Load)
            and own.buffer is stmt.buffer
            and all(same(a, b) for a, b in zip(own.indices, stmt.indices, strict=True))
        ):
            return value.op, other
    return None


def same(a: ir.Expr, b: ir.Expr) -> bool:
    """Return whether two expressions are spelled alike."""
    if a is b:
        return True
    if type(a) is not type(b) or a.dtype != b.dtype or isinstance(a, ir.Var):
        return False
    match a:
        case ir.Const():
            return a.value == b.value  # type: ignore[attr-defined]
        case ir.BinOp() | ir.Cast() | ir.Not() | ir.Select():
            if isinstance(a, ir.BinOp) and a.op != b.op:  # type: ignore[attr-defined]
                return False
            return all(same(x, y) for x, y in zip(ir.children(a), ir.children(b), strict=True))
        case ir.Load():
            return a.buffer is b.buffer and all(  # type: ignore[attr-defined]
                same(x, y)
                for x, y in zip(a.indices, b.indices, strict=True)  # type: ignore[attr-defined]
            )
    return False


def combine(
    m: "Statements",
    place: Place,
    op: str,
    value: torch.Tensor,
    where: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Combine `value` of every active lane into its element by `op`; `where` is `memory.addresses` of it."""
    storage, kind = place.storage, ir.DType(place.storage.element)
    flat, keep = where or memory.addresses(m, place)
    address, operand = flat[keep], value.broadcast_to(flat.shape)[keep]
    if not address.numel():
        return
    data = memory.flat_data(storage)
    old = dtypes.to_carrier(data, kind.name)
    if op in ("min", "max"):
        new = _extreme(op, kind, old, address, operand)
    elif op == "add" and kind.is_int:
        new = dtypes.wrap(old.index_add(0, address, operand), kind.name)
    elif op == "add":
        total = old.to(torch.float64).index_add(0, address, operand.to(torch.float64))
        new = dtypes.cast(total, "float64", kind.name)
    else:
        new = old.clone()
        for turn in atomics.turns(address):
            at = address[turn]
            new[at] = m.lanes.tensor(arith.binary(op, kind, new[at], operand[turn], m.lanes, None))
    touched = torch.zeros(data.shape, dtype=torch.bool).index_fill_(0, address, True)
    data.copy_(torch.where(touched, dtypes.to_stored(new, kind.name), data))
    storage.written()


def _extreme(
    op: str, kind: ir.DType, old: torch.Tensor, address: torch.Tensor, operand: torch.Tensor
) -> torch.Tensor:
    """Return CUDA's min or max of each of `old` and its operands: NaN loses, -0 is below +0."""
    if kind.is_int:
        keys, values = dtypes.unsigned_order(old, kind.name), dtypes.unsigned_order(operand, kind.name)
        merged = keys.scatter_reduce(0, address, values, "amax" if op == "max" else "amin")
        return dtypes.unsigned_order(merged, kind.name)
    nan = torch.iinfo(torch.int64).min if op == "max" else torch.iinfo(torch.int64).max
    keys, values = (torch.where(x.isnan(), nan, _key(x, kind)) for x in (old, operand))
    merged = keys.scatter_reduce(0, address, values, "amax" if op == "max" else "amin")
    result = dtypes.from_bits(_key_bits(torch.where(merged == nan, 0, merged), kind), kind.name)
    return torch.where(merged == nan, old, result)


def _key(value: torch.Tensor, kind: ir.DType) -> torch.Tensor:
    """Return integers in the order of the floats, -0 below +0."""
    pattern = dtypes.to_bits(value, kind.name)
    top = 1 << (kind.bits - 1)
    if kind.bits == 64:
        return torch.where(pattern < 0, pattern ^ torch.iinfo(torch.int64).max, pattern)
    return torch.where(pattern >= top, top - 1 - pattern, pattern)


def _key_bits(key: torch.Tensor, kind: ir.DType) -> torch.Tensor:
    top = 1 << (kind.bits - 1)
    if kind.bits == 64:
        return torch.where(key < 0, key ^ torch.iinfo(torch.int64).max, key)
    return torch.where(key < 0, top - 1 - key, key)
