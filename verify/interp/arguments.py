"""Binding of call arguments to a kernel's parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from verify import ir
from verify.interp import dtypes
from verify.interp.errors import InterpreterError
from verify.interp.exprs import row_major
from verify.interp.machine import Machine
from verify.interp.memory import Storage

Argument = torch.Tensor | int | float | bool | None


@dataclass
class _Packed:
    """An FP4 argument and its unpacked copy."""

    tensor: torch.Tensor
    storage: Storage


class Arguments:
    """The arguments of one call, bound to the machine's variables and storages."""

    def __init__(self, machine: Machine, function: ir.Function, values: Sequence[Argument]) -> None:
        """Bind `values` to the parameters of `function`, in order.

        Raises:
            InterpreterError: the number of arguments, or a device, dtype, shape or stride, is not what the
                kernel requires; the message names the buffer and the dimension.
        """
        self._packed: list[_Packed] = []
        self._machine = machine
        if len(values) != len(function.params):
            raise InterpreterError(
                f"{function.name}: requires {len(function.params)} arguments, got {len(values)}"
            )
        bound, absent = [], []
        for param, value in zip(function.params, values, strict=True):
            buffer = function.buffers.get(param)
            if buffer is None:
                self._bind_scalar(function.name, param, value)
            elif value is None:
                machine.absent.add(buffer.data)
                absent.append(buffer)
            else:
                bound.append((buffer, self._checked(function.name, buffer, value)))
        # Plain dimensions first: `2 * m` can be checked only once another buffer has given m.
        for buffer, tensor in bound:
            self._solve(buffer, tensor)
        for buffer, tensor in bound:
            self._check_shape(function.name, buffer, tensor)
            machine.storages[buffer.data] = self._storage(function.name, buffer, tensor)
        for buffer in absent:  # what only absent tensors have the size of is 0
            for symbol in (*buffer.shape, *buffer.strides):
                if isinstance(symbol, ir.Var):
                    machine.env.setdefault(symbol, 0)

    def write_back(self) -> None:
        """Pack FP4 arguments that the kernel wrote to."""
        for packed in self._packed:
            if packed.storage.writes:
                packed.tensor.view(-1).copy_(dtypes.retype(packed.storage.data, dtypes.FP4, "uint8"))

    def _bind_scalar(self, kernel: str, param: ir.Var, value: Argument) -> None:
        if (
            value is None
            or isinstance(value, torch.Tensor)
            or (param.dtype.is_int and isinstance(value, float))
        ):
            got = type(value).__name__
            raise InterpreterError(f"{kernel}: requires a scalar for {param.name}, got {got}")
        if param.dtype.is_int and param.dtype.name != "bool":
            low, high = param.dtype.int_range
            if not low <= value <= high:
                raise InterpreterError(f"{kernel}: requires {param.name} to fit {param.dtype}, got {value}")
        self._machine.env[param] = dtypes.constant(value, param.dtype)

    def _checked(self, kernel: str, buffer: ir.Buffer, value: Argument) -> torch.Tensor:
        name = buffer.name
        if not isinstance(value, torch.Tensor):
            raise InterpreterError(f"{kernel}: requires a tensor for {name}, got {type(value).__name__}")
        if value.device.type != "cpu":
            raise InterpreterError(f"{kernel}: requires {name}.device == cpu, got {value.device}")
        allowed = dtypes.argument_dtypes(buffer.dtype.name)
        if value.dtype not in allowed:
            raise InterpreterError(f"{kernel}: requires {name}.dtype == {allowed[0]}, got {value.dtype}")
        if value.dim() != len(buffer.shape):
            want = len(buffer.shape)
            raise InterpreterError(f"{kernel}: requires {name}.ndim == {want}, got {value.dim()}")
        return value.detach()

    def _shape(self, buffer: ir.Buffer, tensor: torch.Tensor) -> tuple[int, ...]:
        """Return the tensor's shape in elements of the buffer's type."""
        if buffer.dtype.name == dtypes.FP4:
            return (*tensor.shape[:-1], 2 * tensor.shape[-1])
        return tuple(tensor.shape)

    def _solve(self, buffer: ir.Buffer, tensor: torch.Tensor) -> None:
        sizes = self._shape(buffer, tensor)
        for symbol, extent in zip(buffer.shape, sizes, strict=True):
            if isinstance(symbol, ir.Var):
                self._machine.env.setdefault(symbol, extent)
        for symbol, stride in zip(buffer.strides, tensor.stride(), strict=False):
            if isinstance(symbol, ir.Var):
                self._machine.env.setdefault(symbol, stride)

    def _check_shape(self, kernel: str, buffer: ir.Buffer, tensor: torch.Tensor) -> None:
        for dim, (symbol, got) in enumerate(zip(buffer.shape, self._shape(buffer, tensor), strict=True)):
            want = self._machine.integer(symbol, "buffer shape")
            if want != got:
                label = f" ({symbol.name})" if isinstance(symbol, ir.Var) else ""
                clause = f"{buffer.name}.shape[{dim}]{label} == {want}"
                raise InterpreterError(f"{kernel}: requires {clause}, got {got}")

    def _storage(self, kernel: str, buffer: ir.Buffer, tensor: torch.Tensor) -> Storage:
        name = buffer.dtype.name
        if name == dtypes.FP4:
            return self._unpack(kernel, buffer, tensor)
        want = tuple(self._machine.integer(s, "buffer stride") for s in buffer.strides)
        want = want or row_major(tuple(tensor.shape))
        span = 1
        for dim, (extent, stride, got) in enumerate(zip(tensor.shape, want, tensor.stride(), strict=True)):
            span += (extent - 1) * stride
            if extent > 1 and tensor.numel() and got != stride:
                clause = f"{buffer.name}.stride[{dim}] == {stride}"
                raise InterpreterError(f"{kernel}: requires {clause}, got {got}")
        stored = tensor.view(dtypes.stored_dtype(name))
        flat = stored.as_strided((span if tensor.numel() else 0,), (1,), stored.storage_offset())
        return Storage(flat, name, "global", is_written=True)

    def _unpack(self, kernel: str, buffer: ir.Buffer, tensor: torch.Tensor) -> Storage:
        if not tensor.is_contiguous():
            clause = f"{buffer.name} contiguous"
            raise InterpreterError(f"{kernel}: requires {clause}, got stride {tensor.stride()}")
        octets = tensor.view(torch.uint8)
        codes = dtypes.retype(octets.view(-1), "uint8", dtypes.FP4)
        storage = Storage(codes, dtypes.FP4, "global", is_written=True)
        self._packed.append(_Packed(octets, storage))
        return storage
