"""What a run computed, against what the tile program means: for refutations that are no fault of a run."""

import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from verify import host, interp, ir
from verify.extract import Extracted
from verify.interp import dtypes
from verify.interp.arguments import Argument
from verify.interp.device.api import bind, view_sizes
from verify.interp.device.errors import DeviceError, StepLimitError
from verify.interp.device.run import DEFAULT_MAX_STEPS, Checks, Run
from verify.interp.device.schedule import POLICIES
from verify.interp.errors import InterpreterError, UnsupportedOpError

MAX_BYTES = 1 << 22  # of all tensors together
TOLERANCE = 2.0**-6  # of results whose order of summation is not the tile level's
_SEED = 7
_WARPGROUP = 128  # threads that start together: faster, with fewer schedules
_INDICES = ("int32", "int64")
_INT32 = 2**31
_WORDS = ("int32", "uint32")
_FAR = (-1, 0, *(2**k + d for k in range(1, 12) for d in (-1, 0, 1)))
_SHIFTS = 9  # of a dim that counts pages or tiles: their rows are at most 256
_SCALE_CODES = 118, 132  # bytes that as a UE8M0 scale are near 1


@dataclass
class Budget:
    """Instructions of groups that some runs may take.

    Attributes:
        each: in one run.
        left: in all that are still to be made.
    """

    each: int
    left: int = sys.maxsize

    @property
    def of_next(self) -> int:
        """How many the next run may take."""
        return min(self.left, self.each)

    def charge(self, run: Run) -> None:
        """Take off what a run took, whatever its end was."""
        self.left = max(self.left - run.steps, 0)


def unwritten(run: Run) -> str | None:
    """Return which tensor a finished run of all blocks left bytes of unwritten; of those it only writes."""
    for storage in {id(s): s for s in run.tensors.values()}.values():
        shadow = storage.space.shadow if storage.space is not None else None
        if shadow is None or storage.name in run.read:
            continue
        written = int((shadow.writer >= 0).sum())
        if written < storage.size_bytes:
            missing = storage.size_bytes - written
            return f"{missing} of {storage.size_bytes} bytes of {storage.name} are not written"
    return None


def difference(
    extracted: Extracted,
    dims: Mapping[str, int],
    max_steps: int | Budget = DEFAULT_MAX_STEPS,
    zeroed: Collection[str] | None = None,
    max_bytes: int = MAX_BYTES,
    held: Mapping[str, Mapping[int, int]] | None = None,
) -> str | None:
    """Run both levels on random inputs of a small shape; return how their results differ, if they do.

    Args:
        extracted: the kernel.
        dims: values by shape parameter.
        max_steps: instructions of groups that each run of the device level may take, or all together.
        zeroed: tensors that hold 0; None: none, or, where a level fails on random data, those of signed
            integers, which may be indices.
        max_bytes: of all tensors; larger shapes are not run.
        held: what a counterexample says of memory, by name and place: tried first.

    Raises:
        InterpreterError: a level fails, or cannot be run.
    """
    buffers = extracted.tile.buffers.values()
    if held and _indices(extracted.tile):
        found = _difference_among(extracted, dims, max_steps, max_bytes, _chosen(held), held)
        if found is not None:
            return found
    if zeroed is None:
        try:
            return difference(extracted, dims, max_steps, (), max_bytes)
        except UnsupportedOpError:
            raise
        except InterpreterError:
            zeroed = [b.name for b in buffers if b.dtype.name in _INDICES]
            if not zeroed:
                raise
    is_ambiguous = any(b.dtype.name in (*_INDICES, *_WORDS) for b in buffers)
    for other in (False, True) if is_ambiguous else (False,):
        found = _difference(
            extracted, dims, max_steps, inputs(extracted.tile, dims, zeroed, other, max_bytes)
        )
        if found is not None:
            return found
    if zeroed or not _indices(extracted.tile):
        return None
    return _difference_among(extracted, dims, max_steps, max_bytes, _far(dims))


def _far(dims: Mapping[str, int]) -> list[int]:
    """Return indices far apart: about powers of two and about dims times powers of two."""
    ends = {(value << k) + d for value in dims.values() for k in range(_SHIFTS) for d in (-1, 0)}
    return sorted({*_FAR, *ends})


def _chosen(held: Mapping[str, Mapping[int, int]]) -> list[int]:
    """Return 0 and what a counterexample says of any memory: copies of indices hold what the tensors do."""
    values = {value for places in held.values() for value in places.values()}
    return sorted({0} | {value for value in values if -_INT32 <= value < _INT32})


def _difference_among(
    extracted: Extracted,
    dims: Mapping[str, int],
    max_steps: int | Budget,
    max_bytes: int,
    indices: Sequence[int],
    held: Mapping[str, Mapping[int, int]] | None = None,
) -> str | None:
    """Compare as `difference` at these indices, where the tile program runs with them.

    There a fault of the device level alone is a difference, too.
    """
    far = inputs(extracted.tile, dims, (), False, max_bytes, indices=indices)
    if far is None:
        return None
    for param, tensor in zip(extracted.tile.params, far, strict=True):
        buffer = extracted.tile.buffers.get(param)
        if isinstance(tensor, torch.Tensor) and buffer is not None and buffer.dtype.name in _INDICES:
            for place, value in (held or {}).get(buffer.name, {}).items():
                if place < tensor.numel():
                    tensor.view(-1)[place] = value
    try:
        _meant(extracted.tile, far)
    except UnsupportedOpError:
        raise
    except InterpreterError:  # the kernel relies on indices that are in range
        return None
    try:
        return _difference(extracted, dims, max_steps, far)
    except DeviceError as error:
        return None if isinstance(error, StepLimitError) else f"the tile program has no such fault: {error}"


def _difference(
    extracted: Extracted, dims: Mapping[str, int], max_steps: int | Budget, tensors: list[Argument] | None
) -> str | None:
    try:
        return None if tensors is None else _compared(extracted, tensors, max_steps)
    except ir.UnsupportedIR as error:
        raise UnsupportedOpError(str(error)) from error


def _compared(extracted: Extracted, tensors: list[Argument], max_steps: int | Budget) -> str | None:
    """Run the blocks one after the other, and compare after each what it wrote."""
    budget = max_steps if isinstance(max_steps, Budget) else Budget(max_steps)
    mine = [_copy(t) for t in tensors]
    named, values = bind(extracted.tile, mine)
    made = Run(
        extracted.device,
        host.read_host(extracted.host, extracted.device, extracted.tile),
        named,
        values,
        view_sizes=view_sizes(extracted.device, extracted.lowered),
        checks=Checks(races=False, uninitialised=False, alignment=False, overflow=False),
        policy=POLICIES["late"],
        seed=0,
        max_steps=budget.of_next,
        wave_threads=_WARPGROUP,
    )
    try:
        return _first_difference(extracted, made, mine, tensors)
    finally:
        budget.charge(made)


def _first_difference(
    extracted: Extracted, made: Run, mine: list[Argument], tensors: list[Argument]
) -> str | None:
    wanted = _meant(extracted.tile, tensors)
    blocks = math.prod(made.grid)
    is_one = made.runs_together or made.cluster_size > 1 or not blocks
    pieces = [None] if is_one else [[n] for n in range(blocks)]
    for number, piece in enumerate(pieces, 1):
        made.execute(piece)
        before = (
            tensors if number < len(pieces) else [None] * len(tensors)
        )  # what is written so far, then all
        for param, a, b, old in zip(extracted.tile.params, mine, wanted, before, strict=True):
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
                count = _differing(a, b, old if isinstance(old, torch.Tensor) else None)
                if count:
                    return f"{count} elements of {param.name} are not what the tile program computes"
    return None


def _copy(value: Argument) -> Argument:
    return value.clone() if isinstance(value, torch.Tensor) else value


_RESULTS: list[tuple[ir.Function, list[Argument], list[Argument]]] = []
_MOST_RESULTS = 8  # that are kept: mutants of one kernel have one tile program


def _meant(tile: ir.Function, tensors: list[Argument]) -> list[Argument]:
    """Return the arguments after a run of the tile program."""
    for function, given, found in _RESULTS:
        if function is tile and _are_same(given, tensors):
            return found
    wanted = [_copy(t) for t in tensors]
    interp.run_function(tile, tuple(wanted))
    _RESULTS.insert(0, (tile, tensors, wanted))
    del _RESULTS[_MOST_RESULTS:]
    return wanted


def _are_same(given: list[Argument], tensors: list[Argument]) -> bool:
    def octets(value: torch.Tensor) -> torch.Tensor:
        return value.contiguous().view(torch.uint8)

    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(octets(a), octets(b))
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        else a == b
        for a, b in zip(given, tensors, strict=True)
    )


def _differing(a: torch.Tensor, b: torch.Tensor, before: torch.Tensor | None = None) -> int:
    """Return how many elements of `a` are not those of `b`; with `before`, of those that are not as then."""
    if not a.dtype.is_floating_point or a.dtype.itemsize == 1:
        bad = a.view(torch.uint8) != b.view(torch.uint8)
        return int((bad if before is None else bad & (a.view(torch.uint8) != before.view(torch.uint8))).sum())
    x, y = a.to(torch.float64), b.to(torch.float64)
    bad = ~torch.isclose(
        x, y, rtol=TOLERANCE, atol=TOLERANCE * float(y.nan_to_num(0, 0, 0).abs().max()), equal_nan=True
    )
    if before is not None:
        bad &= ~torch.isclose(x, before.to(torch.float64), rtol=0, atol=0, equal_nan=True)
    return int(bad.sum())


def inputs(
    tile: ir.Function,
    dims: Mapping[str, int],
    zeros: bool | Collection[str] = False,
    other: bool = False,
    max_bytes: int = MAX_BYTES,
    indices: Sequence[int] | None = None,
) -> list[Argument] | None:
    """Return random arguments for a shape; None if they would be large.

    Args:
        tile: the tile stage.
        dims: values by shape parameter.
        zeros: all tensors hold 0, or those of these names.
        other: 32-bit words hold two bfloat16 near 1, and not four codes; some indices are -1.
        max_bytes: of all tensors, elements taken as eight.
        indices: that integers which become part of addresses are drawn from, not 0 and 1.
    """
    from verify.interp.device.replay import integer

    generator = torch.Generator().manual_seed(_SEED)
    rows = _indices(tile)
    found: list[Argument] = []
    total = 0
    for param in tile.params:
        buffer = tile.buffers.get(param)
        if buffer is None:
            found.append(dims[param.name])
            continue
        shape = [integer(s, dims) for s in buffer.shape]
        total += math.prod(shape) * 8
        strides = [integer(s, dims) for s in buffer.strides]
        packed = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        if total > max_bytes or (strides and strides != packed):
            return None
        if buffer.data in rows:
            kind = dtypes.argument_dtypes(buffer.dtype.name)[0]
            tensor = torch.randint(-1 if other else 0, 2, shape, generator=generator, dtype=kind)
            if indices is not None:
                choice = torch.tensor(indices, dtype=kind)
                tensor = choice[torch.randint(0, len(choice), shape, generator=generator)]
        else:
            tensor = _random(shape, buffer.dtype.name, generator, other)
        is_zero = zeros if isinstance(zeros, bool) else buffer.name in zeros
        found.append(torch.zeros_like(tensor) if is_zero else tensor)
    return found


def _indices(tile: ir.Function) -> set[ir.Var]:
    """Return the arrays of signed integers whose elements are part of addresses, themselves or copied."""
    used, values = set(), {}
    copied: list[tuple[ir.Var, ir.Var]] = []  # what a buffer's elements are made of
    for node in ir.walk(tile.body):
        match node:
            case ir.Bind(var=var, value=value):
                values[var] = value
            case ir.Load(indices=indices) | ir.Store(indices=indices):
                used |= {n for i in indices for n in ir.walk(i) if isinstance(n, (ir.Load, ir.Var))}
        match node:
            case ir.Store(buffer=buffer, value=value) if buffer.dtype.name in _INDICES:
                copied += [(buffer.data, b.data) for b in _elements(value)]
            case ir.Call(args=args):
                regions = [a for a in args if isinstance(a, ir.Region)]
                ins = [r.buffer.data for r in regions if "r" in r.mode and r.buffer.dtype.name in _INDICES]
                copied += [(r.buffer.data, data) for r in regions if "w" in r.mode for data in ins]
    used |= {n for v, value in values.items() if v in used for n in ir.walk(value) if isinstance(n, ir.Load)}
    found = {n.buffer.data for n in used if isinstance(n, ir.Load) and n.buffer.dtype.name in _INDICES}
    while more := {source for target, source in copied if target in found} - found:
        found |= more
    return found


def _elements(value: ir.Expr) -> Iterator[ir.Buffer]:
    """Yield the buffers of signed integers that a value is computed from, and not what chooses it."""
    match value:
        case ir.Select(a=a, b=b):
            yield from _elements(a)
            yield from _elements(b)
        case ir.Load(buffer=buffer) if buffer.dtype.name in _INDICES:
            yield buffer
        case _:
            for part in ir.children(value):
                if isinstance(part, ir.Expr):
                    yield from _elements(part)


def _random(shape: list[int], name: str, generator: torch.Generator, other: bool) -> torch.Tensor:
    kind = dtypes.argument_dtypes(name)[0]
    if name == dtypes.FP4:
        shape = [*shape[:-1], shape[-1] // 2]
    if kind.is_floating_point and kind.itemsize > 1:
        return torch.randn(shape, generator=generator).to(kind)
    if name in _WORDS and other:
        return torch.randn((*shape, 2), generator=generator).to(torch.bfloat16).view(kind).reshape(shape)
    if name in ("float8_e4m3fn", "float8_e5m2"):
        return torch.randn(shape, generator=generator).to(kind)
    low, high = _SCALE_CODES if name in (dtypes.UE8M0, "uint8") else (0, 2 if name == "bool" else 128)
    octets = torch.randint(low, high, (*shape, kind.itemsize), generator=generator, dtype=torch.uint8)
    return octets.view(kind).reshape(shape)
