"""Values of several lanes (`bfloat16x2`, ...): a tuple of components, lowest bits first."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from verify import ir
from verify.interp import arith, atomics, dtypes, intrinsics, memory
from verify.interp.lanes import Value

if TYPE_CHECKING:
    from verify.interp.exprs import Expressions

_BINARY = {"add2": "add", "sub2": "sub", "mul2": "mul", "max2": "max", "min2": "min"}
_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "abs2": torch.abs,
    "fma2": intrinsics.MATH["fma"],
    "max2_nan": torch.maximum,
    "min2_nan": torch.minimum,
}
_REINTERPRETS = ("reinterpret", "tvm_reinterpret")
_PATTERN_BITS = 64  # of the widest vector that a reinterpretation takes


def components(m: "Expressions", node: ir.Expr) -> tuple[Value, ...]:
    """Return the components of `node`; of a scalar, itself.

    Raises:
        UnsupportedIR: the vector expression has no meaning here.
    """
    count = node.dtype.lanes
    if count == 1:
        return (m.evaluate(node),)
    kind = ir.DType(node.dtype.name)
    match node:
        case ir.Var():
            found = m.vectors.get(node)
            if found is None:
                raise ir.UnsupportedIR(f"vector {node.name} used before it has a value")
            return found
        case ir.Broadcast(value=value):
            return (m.evaluate(value),) * count
        case ir.Load(buffer=buffer) if buffer.dtype.lanes == count:
            indices = tuple(m.evaluate(i) for i in node.indices)
            return tuple(memory.read(m, m.place(buffer, indices, c)) for c in range(count))
        case ir.BinOp(op=op, a=a, b=b):
            operand = ir.DType(a.dtype.name)
            pairs = zip(components(m, a), components(m, b), strict=True)
            return tuple(arith.binary(op, operand, x, y, m.lanes, m.mask) for x, y in pairs)
        case ir.Cast(a=a):
            source = a.dtype.name
            return tuple(dtypes.cast(m.lanes.tensor(p), source, kind.name) for p in components(m, a))
        case ir.Call(op=op, args=args) if op in _BINARY:
            pairs = zip(*(components(m, a) for a in args), strict=True)
            return tuple(arith.binary(_BINARY[op], kind, x, y, m.lanes, m.mask) for x, y in pairs)
        case ir.Call(op=op, args=args) if op in _FUNCTIONS:
            columns = zip(*(components(m, a) for a in args), strict=True)
            return tuple(_FUNCTIONS[op](*(m.lanes.tensor(p) for p in column)) for column in columns)
        case ir.Call(op=op) if op in atomics.PACKED_OPS:
            return atomics.apply_packed(m, node)
        case ir.Call(op="shuffle"):
            return shuffled(m, node)
        case ir.Call(op=op, args=args) if op in _REINTERPRETS:
            return reinterpreted(m, args[0], node.dtype)
    raise ir.UnsupportedIR(f"vector of {node.dtype}")


def shuffled(m: "Expressions", node: ir.Call) -> tuple[Value, ...]:
    """Return the components that a shuffle picks from its operands laid end to end."""
    given = [part for arg in node.args for part in components(m, arg)]
    return tuple(given[i] for i in node.annotations["indices"])


def reinterpreted(m: "Expressions", node: ir.Expr, target: ir.DType) -> tuple[Value, ...]:
    """Return the bits of `node` as components of a type of the same size."""
    source = node.dtype
    if not source.bits * source.lanes == target.bits * target.lanes <= _PATTERN_BITS:
        raise ir.UnsupportedIR(f"reinterpret of {source} as {target}")
    pattern = torch.zeros((), dtype=torch.int64)
    for place, part in enumerate(components(m, node)):
        pattern = pattern | dtypes.to_bits(m.lanes.tensor(part), source.name) << (place * source.bits)
    mask = (1 << target.bits) - 1 if target.bits < _PATTERN_BITS else -1
    parts = (pattern >> (place * target.bits) & mask for place in range(target.lanes))
    return tuple(dtypes.from_bits(bits, target.name) for bits in parts)


def packed(m: "Expressions", node: ir.Call) -> Value:
    """Return two 16-bit values in one 32-bit integer, the first in its low half (pack_b16)."""
    low, high = (dtypes.to_bits(m.tensor(a), a.dtype.name) for a in node.args)
    return dtypes.wrap(low | high << ir.DType(node.args[0].dtype.name).bits, node.dtype.name)
