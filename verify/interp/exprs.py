"""Evaluation of expressions over all lanes at once."""

from collections.abc import Callable
from typing import Any

import torch

from verify import externs, ir
from verify.externs import elements
from verify.interp import arith, atomics, dtypes, intrinsics, memory, pointers, vectors, warps
from verify.interp.errors import InterpreterError
from verify.interp.lanes import Affine, Lanes, Mask, Value, both, is_active
from verify.interp.memory import Place, Storage

_REINTERPRETS = ("reinterpret", "tvm_reinterpret")

_UNBOUND = "{} is used before it has a value"


class UnboundError(InterpreterError):
    """A variable has no value yet."""


class Expressions:
    """The part of the machine that computes values.

    Attributes:
        env: values of variables; an ir.Expr stands for a binding whose operands are bound later
            (TileLang places the tile index of T.Persistent before the loop that counts it).
        storages: by the pointer of the buffers on them.
        lanes, mask: which instances the current evaluation stands for, and which of them are active.
        thread_vars: launch indices of threads.
        vectors: components of variables of several lanes.
        absent: pointers of the tensor parameters that None was passed for.
        is_tile_op: inside a tile op, whose lanes are elements.
        is_block_wide: inside a T.Parallel loop or tile op, which the whole thread block runs once.
    """

    def __init__(self) -> None:
        """Start with one lane and no variables."""
        self.env: dict[ir.Var, Value | ir.Expr] = {}
        self.storages: dict[ir.Var, Storage] = {}
        self.lanes = Lanes()
        self.mask: Mask = None
        self.thread_vars: set[ir.Var] = set()
        self.absent: set[ir.Var] = set()
        self.vectors: dict[ir.Var, tuple[Value, ...]] = {}
        self.is_block_wide = False
        self.is_tile_op = False
        self._constants: dict[ir.Const, Value] = {}

    # ------------------------------------------------------------------ entry points
    def evaluate(self, node: ir.Expr) -> Value:
        """Return the value of `node`.

        Raises:
            InterpreterError: an active lane breaks a rule.
            UnsupportedIR: the node has no meaning here.
        """
        if node.dtype.lanes != 1:
            raise ir.UnsupportedIR(f"vector of {node.dtype}")
        handler = _HANDLERS.get(type(node))
        if handler is None:
            raise ir.UnsupportedIR(f"expression {type(node).__name__}")
        return handler(self, node)

    def tensor(self, node: ir.Expr) -> torch.Tensor:
        """Return the value of `node` as a carrier tensor."""
        return self.lanes.tensor(self.evaluate(node))

    def cast_to(self, node: ir.Expr, name: str) -> torch.Tensor:
        """Return the value of `node` converted to type `name`."""
        value = dtypes.cast(self.tensor(node), node.dtype.name, name)
        return dtypes.wrap(value, name) if name in arith.PROMOTED else value

    def integer(self, node: ir.Expr, what: str) -> int:
        """Return the value of `node`, an integer that is the same in every lane."""
        value = self.evaluate(node)
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = int(value)
        if not isinstance(value, int):
            raise ir.UnsupportedIR(f"{what} that differs between lanes")
        return int(value)

    def place(self, buffer: ir.Buffer, indices: tuple[Value, ...], component: int = 0) -> Place:
        """Return where `buffer[indices]` is; of a vector, its `component`."""
        storage = self.storages.get(buffer.data) or self._pointee(buffer)
        storage = storage.seen_as(buffer.dtype.name)
        shape = tuple(self.integer(s, "buffer shape") for s in buffer.shape)
        strides = tuple(self.integer(s, "buffer stride") for s in buffer.strides) or row_major(shape)
        if len(indices) != len(shape):
            raise ir.UnsupportedIR(f"{buffer.name}: {len(indices)} indices for {len(shape)} dimensions")
        offset = self.integer(buffer.offset, "buffer offset")
        if buffer.dtype.lanes != 1:  # `component` of each element, in scalars
            strides = tuple(s * buffer.dtype.lanes for s in strides)
            offset = offset * buffer.dtype.lanes + component
        return Place(buffer, storage, indices, shape, strides, offset)

    def _pointee(self, buffer: ir.Buffer) -> Storage:
        """Return what a buffer made from an address (T.make_tensor) stands on."""
        address = self.env.get(buffer.data)
        if buffer.data in self.absent:
            raise InterpreterError(f"{buffer.name} is None, and the kernel touches it")
        if address is None or buffer.scope != "global":
            raise InterpreterError(f"{buffer.name} has no storage here")
        if not isinstance(address, int):
            address = self.integer(buffer.data, "an address")
        return pointers.storage_at(address, buffer)

    # ------------------------------------------------------------------ nodes
    def _const(self, node: ir.Const) -> Value:
        value = self._constants.get(node)
        if value is None:
            value = self._constants[node] = dtypes.constant(node.value, node.dtype)
        return value

    def _var(self, node: ir.Var) -> Value:
        value = self.env.get(node)
        if value is None:
            raise UnboundError(_UNBOUND.format(node.name))
        if isinstance(value, ir.Expr):
            return self.evaluate(value)
        if self.is_block_wide and node in self.thread_vars and not isinstance(value, int):
            raise ir.UnsupportedIR(f"thread index {node.name} inside a block-wide operation")
        return value

    def _binop(self, node: ir.BinOp) -> Value:
        if node.op in ("and", "or"):
            return self._logical(node)
        a, b = self.evaluate(node.a), self.evaluate(node.b)
        return arith.binary(node.op, node.a.dtype, a, b, self.lanes, self.mask)

    def _logical(self, node: ir.BinOp) -> Value:
        a = self.evaluate(node.a)
        absorbing = node.op == "or"
        if not isinstance(a, torch.Tensor):
            return absorbing if bool(a) == absorbing else self._truth(node.b)
        with self.masked(~a if absorbing else a):
            b = self._truth(node.b)
        b = self.lanes.tensor(b)
        return a | b if absorbing else a & b

    def _truth(self, node: ir.Expr) -> Value:
        value = self.evaluate(node)
        if isinstance(value, Affine):
            return self.lanes.tensor(value) != 0
        if isinstance(value, torch.Tensor):
            return value if value.dtype == torch.bool else value != 0
        return bool(value)

    def _not(self, node: ir.Not) -> Value:
        value = self._truth(node.a)
        return ~value if isinstance(value, torch.Tensor) else not value

    def _cast(self, node: ir.Cast) -> Value:
        value = self.evaluate(node.a)
        source, target = node.a.dtype, node.dtype
        if target.lanes != 1:
            raise ir.UnsupportedIR(f"vector of {target}")
        if isinstance(value, int | Affine) and target.is_int and target.name != "uint64":
            if target.name == "bool":
                return value != 0 if isinstance(value, int) else self.lanes.tensor(value) != 0
            return self.lanes.normalize(value if isinstance(value, Affine) else int(value), target)
        return dtypes.cast(self.lanes.tensor(value), source.name, target.name)

    def _select(self, node: ir.Select) -> Value:
        cond = self._truth(node.cond)
        if not isinstance(cond, torch.Tensor):
            return self.evaluate(node.a if cond else node.b)
        with self.masked(cond):
            a = self.tensor(node.a)
        with self.masked(~cond):
            b = self.tensor(node.b)
        return torch.where(cond, a, b)

    def _load(self, node: ir.Load) -> Value:
        indices = tuple(self.evaluate(i) for i in node.indices)
        return memory.read(self, self.place(node.buffer, indices))

    def _let(self, node: ir.Let) -> Value:
        self.env[node.var] = self.bound(node.var, self.evaluate(node.value))
        return self.evaluate(node.body)

    def bound(self, var: ir.Var, value: Value) -> Value:
        """Return `value` as a variable of its type holds it."""
        if var.dtype.name not in arith.PROMOTED:
            return value  # wider integers never leave their type
        if isinstance(value, torch.Tensor):
            return dtypes.wrap(value, var.dtype.name)
        return self.lanes.normalize(value, var.dtype)

    def _call(self, node: ir.Call) -> Value:
        op, args = node.op, node.args
        if op in intrinsics.MATH:
            return self._math(node)
        if op in intrinsics.IEEE:
            *operands, mode = args
            if not isinstance(mode, ir.Str) or mode.value != "rn":
                raise ir.UnsupportedIR(f"{op} with another rounding mode than rn")
            return intrinsics.IEEE[op](*(self.tensor(a) for a in operands))
        if op in _REINTERPRETS:
            return self._reinterpret(node)
        if op == "abs":
            return self._abs(node)
        if op == "infinity":
            return dtypes.constant(float("inf"), node.dtype)
        if op in ("popcount", "__popc"):
            return intrinsics.popcount(dtypes.to_bits(self.tensor(args[0]), args[0].dtype.name))
        if op == "bitwise_not":
            return dtypes.wrap(~self.tensor(args[0]), node.dtype.name)
        if op in ("likely", "ignore_loop_partition"):
            return self.evaluate(args[0])
        if op in ("call_extern", "call_pure_extern"):
            return self._extern(node)
        if op == elements.ELEMENT:
            which, *words = (self.tensor(a).numpy() for a in args[3:])
            return dtypes.from_bits(torch.from_numpy(elements.element(node, which, *words)), node.dtype.name)
        if op in atomics.OPS:
            return atomics.apply(self, node)
        if op in atomics.PACKED_OPS:
            return atomics.apply_packed(self, node)[0]
        if op in atomics.TRUTH_OPS:
            return atomics.reduce_truth(self, node)
        if op == "__ldg":
            return self.evaluate(args[0])
        if op in warps.OPS:
            return warps.apply(self, node)
        if op == "shuffle":
            return vectors.shuffled(self, node)[0]
        if op == "pack_b16":
            return vectors.packed(self, node)
        raise ir.UnsupportedIR(f"op {op}")

    def _math(self, node: ir.Call) -> Value:
        kind = node.args[0].dtype
        if node.op == "fabs" and kind.is_int:
            return self._abs(node)
        if kind.name in dtypes.CODED:
            if node.op != "clamp":
                raise ir.UnsupportedIR(f"{node.op} of {kind}")
            wide = intrinsics.MATH["clamp"](*(self.cast_to(a, "float32") for a in node.args))
            return dtypes.cast(wide, "float32", kind.name)
        if kind.name == "uint64":
            raise ir.UnsupportedIR(f"{node.op} of {kind}")
        values = [self.tensor(a) for a in node.args]
        if node.op == "pow":
            values[1] = dtypes.cast(values[1], node.args[1].dtype.name, kind.name)
        return intrinsics.MATH[node.op](*values)

    def _abs(self, node: ir.Call) -> Value:
        value = self.tensor(node.args[0])
        if node.dtype.is_int:
            return intrinsics.abs_int(value, node.dtype.name)
        if node.dtype.name in dtypes.CODED:
            raise ir.UnsupportedIR(f"{node.op} of {node.dtype}")
        return value.abs()

    def _reinterpret(self, node: ir.Call) -> Value:
        operand = node.args[0]
        if node.dtype.name == "handle":
            return self.evaluate(operand)  # an address
        if operand.dtype.lanes != 1:
            return vectors.reinterpreted(self, operand, node.dtype)[0]
        if operand.dtype.bits != node.dtype.bits:
            raise ir.UnsupportedIR(f"reinterpret of {operand.dtype} as {node.dtype}")
        pattern = dtypes.to_bits(self.tensor(operand), operand.dtype.name)
        return dtypes.from_bits(pattern, node.dtype.name)

    def _extern(self, node: ir.Call) -> Value:
        name, *args = node.args
        if not isinstance(name, ir.Str):
            raise ir.UnsupportedIR("call_extern of a computed name")
        registered = externs.called(node)
        if registered is not None:
            words = externs.apply(registered.name, *(self.tensor(a).numpy() for a in args))[0]
            return dtypes.wrap(torch.from_numpy(words), node.dtype.name)
        if warps.extern_op(node) is not None:
            return warps.apply(self, node)
        function = intrinsics.extern(name.value)
        result = function(*(self.tensor(a) for a in args))
        want = dtypes.carrier_dtype(node.dtype.name)
        if result.dtype != want:
            raise InterpreterError(f"extern {name.value!r}: requires a result of {want}, got {result.dtype}")
        return result

    # ------------------------------------------------------------------ masks
    def masked(self, cond: torch.Tensor | None) -> "MaskScope":
        """Return a context in which only lanes where `cond` holds are active, of those now active."""
        return MaskScope(self, both(self.mask, cond))

    @property
    def is_active(self) -> bool:
        """Whether any lane is active."""
        return is_active(self.mask)


class MaskScope:
    """Sets the machine's mask, and restores it."""

    def __init__(self, machine: Expressions, mask: Mask) -> None:
        """Keep `mask` for the block."""
        self._machine, self._mask = machine, mask

    def __enter__(self) -> None:
        """Put the mask in force."""
        self._before, self._machine.mask = self._machine.mask, self._mask

    def __exit__(self, *exc: object) -> None:
        """Restore the mask that was in force."""
        self._machine.mask = self._before


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a row-major array of `shape`."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


_HANDLERS: dict[type, Callable[[Expressions, Any], Value]] = {
    ir.Const: Expressions._const,
    ir.Var: Expressions._var,
    ir.BinOp: Expressions._binop,
    ir.Not: Expressions._not,
    ir.Cast: Expressions._cast,
    ir.Select: Expressions._select,
    ir.Load: Expressions._load,
    ir.Let: Expressions._let,
    ir.Call: Expressions._call,
}
