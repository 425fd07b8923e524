"""Expressions over the lanes of a wave: a scalar is (lanes,), a vector (elements, lanes), or one Python int.

The scalar semantics are those of the tile level (`arith`, `dtypes`, `intrinsics`); what differs is that
a value may be a vector, that memory is bytes, and that arithmetic on addresses may be watched for
overflow.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from verify import ir
from verify.interp import arith, dtypes, intrinsics
from verify.interp.device import errors
from verify.interp.device.code import Instruction
from verify.interp.errors import InterpreterError
from verify.interp.exprs import Expressions
from verify.interp.lanes import Value

if TYPE_CHECKING:
    from verify.interp.device.block import Block

_EXACT: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
}
# Division of a signed integer by a positive constant: neither overflows nor divides by zero.
_FLOORS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "floordiv": lambda a, b: a >> b.bit_length() - 1 if b & (b - 1) == 0 else a // b,
    "floormod": lambda a, b: a & (b - 1) if b & (b - 1) == 0 else a % b,
}
_WATCHED = ("int32", "uint32", "int64")
_NEAR_INT64 = 2.0**62  # products of int64 beyond this count as overflow
_REINTERPRETS = ("reinterpret", "tvm_reinterpret")
_PAIRS: dict[str, str] = {"add2": "add", "sub2": "sub", "mul2": "mul", "max2": "max", "min2": "min"}
_FAST = {"__exp": "exp", "__exp10": "exp10", "__log": "log", "__log2": "log2", "__log10": "log10",
         "__tan": "tan", "__cos": "cos", "__sin": "sin", "fma2": "fma"}  # fmt: skip


class Values(Expressions):
    """Evaluates for one wave at a time.

    Attributes:
        block: the thread block.
        threads: thread id of each lane.
        instruction: the one that runs.
    """

    def __init__(self, block: "Block") -> None:
        """Start without a wave."""
        super().__init__()
        self.block = block
        self.threads = np.zeros(0, np.int64)
        self.instruction: Instruction | None = None
        self._depth = 0
        self._active: tuple[torch.Tensor | None, np.ndarray, np.ndarray] | None = None

    def evaluate(self, node: ir.Expr) -> Value:
        """Return the value of `node` in every active lane; other lanes hold anything."""
        handler = _HANDLERS.get(type(node))
        if handler is None:
            raise ir.UnsupportedIR(f"expression {type(node).__name__} in device code")
        return handler(self, node)

    @property
    def width(self) -> int:
        """Lanes of the wave."""
        return len(self.threads)

    @property
    def active(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions and thread ids of the active lanes."""
        if self._active is None or self._active[0] is not self.mask:
            mask = self.mask
            if mask is None:
                lanes = np.arange(self.width)
            else:
                lanes = np.flatnonzero((mask if mask.dim() < 2 else mask.any(0)).expand(self.width).numpy())
            self._active = (mask, lanes, self.threads[lanes])
        return self._active[1:]

    def new_wave(self, threads: np.ndarray, env: dict[Any, Any], mask: torch.Tensor | None) -> None:
        """Evaluate for these lanes from now on."""
        self.threads, self.env, self.mask, self._active = threads, env, mask, None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """In this context integer arithmetic makes an address."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def address(self, node: ir.Expr) -> Value:
        """Return the value of an index or offset."""
        with self.watching():
            return self.evaluate(node)

    def lanes_of(self, value: Value) -> np.ndarray:
        """Return an integer value for every active lane."""
        lanes, _ = self.active
        if isinstance(value, int):
            return np.full(len(lanes), value, np.int64)
        tensor = self.lanes.tensor(value)
        if tensor.dim() == 0:
            return np.full(len(lanes), int(tensor), np.int64)
        return np.broadcast_to(tensor.numpy(), (self.width,))[lanes]

    def uniform(self, node: ir.Expr, what: str) -> int:
        """Return the value of `node`, which all active lanes share."""
        value = self.evaluate(node)
        if isinstance(value, int):
            return value
        values = np.unique(self.lanes_of(value))
        if len(values) != 1:
            raise self.block.fault(
                errors.BarrierDivergenceError, f"{what} differs between the lanes of a warp"
            )
        return int(values[0])

    # ------------------------------------------------------------------ nodes
    def _const(self, node: ir.Const) -> Value:
        value = self._constants.get(node)
        if value is None:
            value = self._constants[node] = dtypes.constant(node.value, ir.DType(node.dtype.name))
        return value

    def _var(self, node: ir.Var) -> Value:
        if node not in self.env:
            raise InterpreterError(f"{node.name} is used before it has a value")
        return self.env[node]  # type: ignore[return-value]

    def _binop(self, node: ir.BinOp) -> Value:
        if node.op in ("and", "or"):
            return self._logical(node)
        a, b = self.evaluate(node.a), self.evaluate(node.b)
        kind = node.a.dtype if node.a.dtype.lanes == 1 else ir.DType(node.a.dtype.name)
        if self._depth and node.op in _EXACT and kind.name in _WATCHED:
            return self._exact(node, kind, a, b)
        if (
            node.op in _FLOORS
            and isinstance(b, int)
            and b > 0
            and isinstance(a, torch.Tensor)
            and kind.is_signed
        ):
            return _FLOORS[node.op](a, b)
        return arith.binary(node.op, kind, a, b, self.lanes, self.mask)

    def _exact(self, node: ir.BinOp, kind: ir.DType, a: Any, b: Any) -> Value:
        """Return a sum, difference or product that should not leave its type's range."""
        result = _EXACT[node.op](a, b)
        low, high = kind.int_range
        if isinstance(result, int):
            bad = not low <= result <= high
        elif kind.bits == 64:
            bad = node.op == "mul" and self._any(_as_float(a) * _as_float(b), _NEAR_INT64)
        else:
            numbers = result.numpy()
            bad = numbers.max() > high or numbers.min() < low
            bad = bad and self._any_active((result < low) | (result > high))
        if bad:
            if self.block.run.checks.overflow:
                text = f"{kind} {node.op} of an address leaves the type's range"
                raise self.block.fault(errors.AddressOverflowError, text, *self._first(result, kind))
            return arith.binary(node.op, kind, a, b, self.lanes, self.mask)
        return result

    def _any(self, value: Any, limit: float) -> bool:
        outside = torch.as_tensor(value).abs() > limit
        return self._any_active(outside)

    def _any_active(self, outside: torch.Tensor) -> bool:
        return bool((outside if self.mask is None else outside & self.mask).any())

    def _first(self, result: Any, kind: ir.DType) -> tuple[np.ndarray]:
        """Return the threads whose result is outside of the type."""
        lanes, threads = self.active
        if isinstance(result, int) or kind.bits == 64:
            return (threads,)
        values = np.broadcast_to(result.numpy(), (*result.shape[:-1], self.width))[..., lanes]
        low, high = kind.int_range
        outside = (values < low) | (values > high)
        return (threads[outside if outside.ndim == 1 else outside.any(0)],)

    def _cast(self, node: ir.Cast) -> Value:
        value = self.evaluate(node.a)
        source, target = node.a.dtype.name, node.dtype.name
        if isinstance(value, int) and node.dtype.is_int and target != "uint64":
            return value != 0 if target == "bool" else self.lanes.normalize(int(value), ir.DType(target))
        result = dtypes.cast(self.lanes.tensor(value), source, target)
        if self._depth and target in _WATCHED and source in ("int64", "uint32") and node.a.dtype.is_int:
            changed = result != self.lanes.tensor(value)
            if self._any_active(changed) and self.block.run.checks.overflow:
                text = f"{source} address does not fit {target}"
                raise self.block.fault(errors.AddressOverflowError, text, self.active[1])
        return result

    def _select(self, node: ir.Select) -> Value:
        cond = self._truth(node.cond)
        if not isinstance(cond, torch.Tensor):
            return self.evaluate(node.a if cond else node.b)
        yes = cond if self.mask is None else self.mask & cond
        if not bool(yes.any()):
            return self.evaluate(node.b)
        no = ~cond if self.mask is None else self.mask & ~cond
        if not bool(no.any()):
            return self.evaluate(node.a)
        return super()._select(node) if node.cond.dtype.name != "bool" else self._both(cond, node)

    def _both(self, cond: torch.Tensor, node: ir.Select) -> Value:
        with self.masked(cond):
            a = self.tensor(node.a)
        with self.masked(~cond):
            b = self.tensor(node.b)
        return torch.where(cond, a, b)

    def _load(self, node: ir.Load) -> Value:
        from verify.interp.device import access

        return access.load(self, node)

    def _ramp(self, node: ir.Ramp) -> Value:
        base, stride = self.evaluate(node.base), self.evaluate(node.stride)
        steps = torch.arange(node.dtype.lanes).view(-1, 1)
        if isinstance(stride, torch.Tensor) and stride.dim() == 0:
            stride = int(stride)
        return self.lanes.tensor(base) + steps * stride  # type: ignore[operator]

    def _broadcast(self, node: ir.Broadcast) -> Value:
        return self.evaluate(node.value)

    def _call(self, node: ir.Call) -> Value:
        from verify.interp.device import atomics, warp

        if node in self.env:  # a reduction, computed by the instructions before this one
            return self.env[node]  # type: ignore[index, return-value]
        op, args = node.op, node.args
        if op in warp.VALUES:
            return warp.VALUES[op](self, node)
        if op == "block_rank_in_cluster":
            return self.block.rank
        if op in atomics.OPS:
            return atomics.apply(self, node)
        if op in _PAIRS:
            values = (self.tensor(a) for a in args[:2])
            return arith.floating(_PAIRS[op], *values)
        if op in _FAST:
            return self._math(ir.Call(node.dtype, _FAST[op], args))
        if op in ("fmul", "fast_rcp", "ieee_frsqrt"):
            return self._scalar_float(node)
        if op in _REINTERPRETS:
            return self._reinterpret(node)
        if op == "large_uint_imm":
            low, high = (int(a.value) for a in args)  # type: ignore[attr-defined]
            return dtypes.constant(high << 32 | low, node.dtype)
        if op == "clz":
            return _clz(dtypes.to_bits(self.tensor(args[0]), args[0].dtype.name), args[0].dtype.bits)
        if op in ("pack_b16", "pack_b8x4"):
            return self._pack(node)
        if op == "abs2":
            return self.tensor(args[0]).abs()
        return super()._call(node)

    def _scalar_float(self, node: ir.Call) -> Value:
        values = [self.tensor(a) for a in node.args if not isinstance(a, ir.Str)]
        if node.op == "fmul":
            return arith.floating("mul", *values[:2])
        if node.op == "fast_rcp":
            return torch.reciprocal(values[0])
        return intrinsics.MATH["rsqrt"](values[0])

    def _pack(self, node: ir.Call) -> Value:
        bits = node.args[0].dtype.bits
        total = torch.zeros((), dtype=torch.int64)
        for k, arg in enumerate(node.args):
            total = total | dtypes.to_bits(self.tensor(arg), arg.dtype.name) << bits * k
        return dtypes.from_bits(total, node.dtype.name)

    def _reinterpret(self, node: ir.Call) -> Value:
        """Return the same bits as another type, of as many bits in all; element 0 is lowest."""
        operand = node.args[0]
        source, target = operand.dtype, node.dtype
        pattern = dtypes.to_bits(self.tensor(operand), source.name)
        if source.bits == target.bits:
            return dtypes.from_bits(pattern, target.name)
        if source.bits * source.lanes != target.bits * target.lanes:
            raise ir.UnsupportedIR(f"reinterpret of {source} as {target}")
        rows = pattern.expand(source.lanes, self.width) if source.lanes > 1 else pattern.expand(1, self.width)
        if source.bits > target.bits:
            per, ones = source.bits // target.bits, (1 << target.bits) - 1
            parts = [rows >> target.bits * k & ones for k in range(per)]
            rows = torch.stack(parts, 1).reshape(-1, self.width)
        else:
            per = target.bits // source.bits
            wide = rows.reshape(-1, per, self.width)
            shifts = (torch.arange(per) * source.bits).view(1, -1, 1)
            rows = (wide << shifts).sum(1)
        result = dtypes.from_bits(rows, target.name)
        return result[0] if target.lanes == 1 else result


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) else value.to(torch.float64)


def _clz(pattern: torch.Tensor, bits: int) -> torch.Tensor:
    count = torch.full_like(pattern, bits)
    for k in range(bits):
        count = torch.where(pattern >> k & 1 == 1, bits - 1 - k, count)
    return count


_HANDLERS: dict[type, Callable[[Values, Any], Value]] = {
    ir.Const: Values._const,
    ir.Var: Values._var,
    ir.BinOp: Values._binop,
    ir.Not: Values._not,
    ir.Cast: Values._cast,
    ir.Select: Values._select,
    ir.Load: Values._load,
    ir.Ramp: Values._ramp,
    ir.Broadcast: Values._broadcast,
    ir.Let: Values._let,
    ir.Call: Values._call,
}
