"""Runs that show a dependence on the batch: the interpreter on one row's data in two batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsv4_kernels.contract import Contract, ContractError
from verify import ir
from verify.interp import InterpreterError, run_function
from verify.interp.dtypes import FP4, argument_dtypes
from verify.ir import UnsupportedIR
from verify.refine.tile import read_tile

MAX_ELEMENTS = 1 << 22  # of all tensors of a run
_BATCHES = (1, 2, 3, 17, 64, 65, 130, 300, 1000)
_SEEDS = (1, 2)
_CODES = (112, 144)  # bytes of random integers: neither nan nor far from 1 as UE8M0


@dataclass(frozen=True)
class Difference:
    """Two runs whose outputs for one row differ."""

    first: Mapping[str, int]
    second: Mapping[str, int]
    values: Mapping[str, str | int]


@dataclass(frozen=True)
class Program:
    """A tile function and the batches that it is tried with."""

    function: ir.Function
    allowed: tuple[int, int] = (0, 1 << 62)


def difference(
    programs: Sequence[Program], batch_dims: Sequence[str], fixed: Mapping[str, int], contract: Contract
) -> Difference | None:
    """Return two runs that treat the same row differently, or None where none is found.

    Every program runs on the same row data at several positions of several batches, its neighbours at
    random; all outputs of that row must agree, bit for bit.
    """
    torch_state = torch.random.get_rng_state()
    try:
        for seed in _SEEDS:
            found = _compare(programs, batch_dims, fixed, contract, seed)
            if found is not None:
                return found
    except (UnsupportedIR, InterpreterError, RuntimeError, KeyError, IndexError, ValueError):
        return None
    finally:
        torch.random.set_rng_state(torch_state)
    return None


def _compare(
    programs: Sequence[Program],
    batch_dims: Sequence[str],
    fixed: Mapping[str, int],
    contract: Contract,
    seed: int,
) -> Difference | None:
    first: tuple[dict[str, int], dict[str, torch.Tensor]] | None = None
    for program in programs:
        for batch, row in _places(program, contract, fixed, batch_dims):
            dims = {**fixed, **dict.fromkeys(batch_dims, batch)}
            outputs = _Run(program.function, dims, frozenset(batch_dims), batch, row, seed).outputs()
            if outputs is None:
                continue
            where = dict.fromkeys(batch_dims, batch) | {"row": row}
            if first is None:
                first = (where, outputs)
                continue
            for name, bits in outputs.items():
                wrong = torch.nonzero(bits != first[1][name].reshape(bits.shape))
                if len(wrong):
                    at = int(wrong[0][0])
                    values: dict[str, str | int] = {
                        "output": name,
                        "byte of the row": at,
                        "first run": str(int(first[1][name].reshape(-1)[at])),
                        "second run": str(int(bits.reshape(-1)[at])),
                        "seed": seed,
                    }
                    return Difference(first[0], where, values)
    return None


def _places(
    program: Program, contract: Contract, fixed: Mapping[str, int], batch_dims: Sequence[str]
) -> Iterator[tuple[int, int]]:
    low, high = program.allowed
    for batch in sorted({*(b for b in _BATCHES if low <= b <= high), max(low, 1), max(low, 1) + 1}):
        if batch > high:
            continue
        dims = {**fixed, **dict.fromkeys(batch_dims, batch)}
        try:
            contract.check("batch", **{n: dims.get(n, 0) for n in contract.names()})
        except (ContractError, KeyError):
            continue
        yield from ((batch, row) for row in sorted({0, batch // 2, batch - 1}))


class _Run:
    """One run; the data of the row depends on the seed alone, its neighbours on the batch too."""

    def __init__(
        self,
        function: ir.Function,
        dims: Mapping[str, int],
        batch_dims: frozenset[str],
        batch: int,
        row: int,
        seed: int,
    ) -> None:
        self.function, self.dims, self.batch_dims = function, dims, batch_dims
        self.batch, self.row, self.seed = batch, row, seed
        self.written = {s.dst.data for s in read_tile(function).steps}

    def outputs(self) -> dict[str, torch.Tensor] | None:
        """Return the bytes of the row in every output; None where the run is too large."""
        tensors, rows = [], {}
        total = 0
        for number, param in enumerate(self.function.params):
            buffer = self.function.buffers.get(param)
            if buffer is None:
                return None
            shape = [self._integer(e) for e in buffer.shape]
            axes = [n for n, e in enumerate(buffer.shape) if self._counts(e)]
            total += max(1, torch.Size(shape).numel())
            if total > MAX_ELEMENTS or len(axes) > 1:
                return None
            packed = buffer.dtype.name == FP4
            if packed:
                shape[-1] //= 2
            tensor = self._filled(buffer, shape, axes, number)
            if buffer.data in self.written:
                rows[buffer.name] = (tensor, axes)
            tensors.append(tensor)
        run_function(self.function, tuple(tensors))
        found = {}
        for name, (tensor, axes) in rows.items():
            part = self._part(tensor, axes) if axes else tensor
            found[name] = part.contiguous().view(torch.uint8).reshape(-1).clone()
        return found

    def _filled(self, buffer: ir.Buffer, shape: list[int], axes: list[int], number: int) -> torch.Tensor:
        kind = argument_dtypes(buffer.dtype.name)[0]
        everywhere = self._random(kind, shape, 1000 * self.seed + number + (7919 * self.batch if axes else 0))
        if axes:
            part = self._part(everywhere, axes)
            own = self._random(kind, list(part.shape), 1000 * self.seed + number)
            part.view(torch.uint8).copy_(own.view(torch.uint8))
        return everywhere

    def _part(self, tensor: torch.Tensor, axes: list[int]) -> torch.Tensor:
        share = tensor.shape[axes[0]] // self.batch
        return tensor.narrow(axes[0], self.row * share, share)

    def _random(self, kind: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        if kind.is_floating_point and kind != torch.float8_e8m0fnu:
            values = torch.randn(shape, generator=generator)
            return values.to(kind)
        size = 1 if kind == torch.float8_e8m0fnu else torch.empty(0, dtype=kind).element_size()
        octets = torch.randint(
            *_CODES, (*shape[:-1], shape[-1] * size), generator=generator, dtype=torch.uint8
        )
        return octets.view(kind)

    def _counts(self, extent: ir.Expr) -> bool:
        return any(isinstance(n, ir.Var) and n.name in self.batch_dims for n in ir.walk(extent))

    def _integer(self, expr: Any) -> int:
        match expr:
            case ir.Const(value=value):
                return int(value)
            case ir.Var(name=name):
                return self.dims[name]
            case ir.Cast(a=a):
                return self._integer(a)
            case ir.BinOp(op=op, a=a, b=b):
                x, y = self._integer(a), self._integer(b)
                return {"add": x + y, "sub": x - y, "mul": x * y, "floordiv": x // y if y else 0}[op]
        raise UnsupportedIR("extent of a tensor")
