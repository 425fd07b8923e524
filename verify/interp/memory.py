"""Storage of buffers, and reads and writes of many lanes at once.

An access whose indices are all Affine and in bounds is a strided view of the storage; any other is a
gather or scatter with a bounds check per lane. Past the end of a global buffer a read gives 0 and a
write is dropped, as the guards that TileLang's lowering adds for global buffers make it; anywhere
else it is an error.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from verify import ir
from verify.interp import dtypes
from verify.interp.errors import InterpreterError
from verify.interp.lanes import FIXED_AXES, THREAD_AXIS, Affine, Lanes, Mask, Value, both, is_active

# `local` and `local.var` belong to a thread; a fragment is the thread block's, spread over its threads.
THREAD_SCOPES = frozenset({"local", "local.var"})
BLOCK_SCOPES = frozenset({"shared", "shared.dyn", "local.fragment", "local.reducer"})


@dataclass
class Storage:
    """The elements behind a pointer.

    Attributes:
        data: stored elements (*lanes, n): each lane axis of extent 1 (shared by all of it) or whole.
        element: scalar type name.
        scope: as in ir.Buffer.
        is_written: something was written, or the storage is an argument.
        is_stale: it held per-lane values of a T.Parallel loop that has ended.
        writes: number of writes since it was bound.
        origin: the storage that this is a view of, in another element type.
    """

    data: torch.Tensor
    element: str
    scope: str
    is_written: bool = False
    is_stale: bool = False
    writes: int = 0
    origin: "Storage | None" = None
    _views: dict[str, tuple[int, "Storage"]] = field(default_factory=dict)

    @property
    def is_global(self) -> bool:
        """An argument of the kernel."""
        return self.scope == "global"

    def axis_extent(self, axis: int) -> int:
        """Return the extent of a lane axis."""
        dim = self.data.dim() - 2 - axis
        return self.data.shape[dim] if dim >= 0 else 1

    def axis_stride(self, axis: int) -> int:
        """Return the stride of a lane axis, 0 where all its lanes share the elements."""
        return self.data.stride(self.data.dim() - 2 - axis) if self.axis_extent(axis) > 1 else 0

    def seen_as(self, element: str) -> "Storage":
        """Return the same bytes as elements of another type; a write to them is a write to this storage."""
        if element == self.element:
            return self
        writes, view = self._views.get(element, (-1, None))
        if view is None or writes != self.writes:
            data = dtypes.retype(self.data, self.element, element)
            view = Storage(data, element, self.scope, origin=self)
            self._views[element] = (self.writes, view)
        view.is_written, view.is_stale = self.is_written, self.is_stale
        return view

    def written(self) -> None:
        """Note a write, and pass it on to the storage that this is a view of."""
        self.is_written = True
        self.writes += 1
        if self.origin is None:
            return
        data = dtypes.retype(self.data, self.element, self.origin.element)
        if self.is_global and data.data_ptr() != self.origin.data.data_ptr():
            self.origin.data.copy_(data)
        elif not self.is_global:
            self.origin.data = data
        self.origin.is_stale = self.is_stale
        self.origin.written()


@dataclass(frozen=True)
class Place:
    """A buffer's elements at some indices, with shape and strides evaluated."""

    buffer: ir.Buffer
    storage: Storage
    indices: tuple[Value, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class Context(Protocol):
    """What memory needs of the machine."""

    lanes: Lanes
    mask: Mask
    is_tile_op: bool


def allocate(buffer: ir.Buffer, size: int, lanes: Lanes) -> Storage:
    """Return poisoned storage of `size` elements for a buffer inside the kernel."""
    name = buffer.dtype.name
    if buffer.scope in THREAD_SCOPES:
        outer = lanes.shape
    elif buffer.scope in BLOCK_SCOPES:
        outer = (1,) * (lanes.rank - THREAD_AXIS) + lanes.shape[-THREAD_AXIS:]
    else:
        raise ir.UnsupportedIR(f"{buffer.name}: storage scope {buffer.scope}")
    data = torch.full((*outer, size), dtypes.poison(name), dtype=dtypes.stored_dtype(name))
    return Storage(data, name, buffer.scope)


def read(ctx: Context, place: Place) -> torch.Tensor:
    """Return the values at `place`, for the active lanes."""
    storage = place.storage
    if not is_active(ctx.mask):
        return torch.zeros((), dtype=dtypes.carrier_dtype(storage.element))
    _require_readable(place)
    _share_thread_axis(ctx, place)
    view = _strided(ctx, place)
    if view is not None:
        return dtypes.to_carrier(view, storage.element)
    flat, valid = _flat_index(ctx, place)
    if storage.data.numel() == 0:
        return torch.zeros(flat.shape, dtype=dtypes.carrier_dtype(storage.element))
    stored = flat_data(storage).index_select(0, flat.reshape(-1)).view(flat.shape)
    value = dtypes.to_carrier(stored, storage.element)
    return value if valid is None else torch.where(valid, value, torch.zeros((), dtype=value.dtype))


def write(ctx: Context, place: Place, value: torch.Tensor) -> None:
    """Store the active lanes of `value` (a carrier) at `place`."""
    storage = place.storage
    if not is_active(ctx.mask):
        return
    stored = dtypes.to_stored(value, storage.element)
    _privatize(ctx, place, stored)
    view = _strided(ctx, place, writes=(stored, ctx.mask))
    if view is not None:
        view.copy_(stored if ctx.mask is None else torch.where(ctx.mask, stored, view))
    else:
        _scatter(ctx, place, stored)
    storage.written()


def _scatter(ctx: Context, place: Place, stored: torch.Tensor) -> None:
    flat, valid = _flat_index(ctx, place)
    keep = both(valid, ctx.mask)
    if keep is None:
        flat, stored = torch.broadcast_tensors(flat, stored)
    else:
        flat, stored, keep = torch.broadcast_tensors(flat, stored, keep)
        flat, stored = flat[keep], stored[keep]
    if flat.numel():
        flat_data(place.storage).scatter_(0, flat.reshape(-1), stored.reshape(-1))


def addresses(ctx: Context, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (flat element index, whether the lane is active and in bounds), over the lane shape.

    For atomics, each lane of which is an access of its own.
    """
    if place.storage.scope in THREAD_SCOPES:
        raise ir.UnsupportedIR(f"atomic on {place.buffer.name} in scope {place.storage.scope}")
    _require_readable(place)
    flat, valid = _flat_index(ctx, place)
    keep = both(valid, ctx.mask)
    keep = torch.ones((), dtype=torch.bool) if keep is None else keep
    return flat.broadcast_to(ctx.lanes.shape), keep.broadcast_to(ctx.lanes.shape)


def _require_readable(place: Place) -> None:
    name = place.buffer.name
    if place.storage.is_stale:
        raise InterpreterError(f"{name} holds what lanes of an ended T.Parallel loop wrote to it")
    if not place.storage.is_written:
        raise InterpreterError(f"{name} is read before anything is written to it")


def flat_data(storage: Storage) -> torch.Tensor:
    """Return the stored elements as one dimension (a view)."""
    return storage.data.view(-1)


def end_axis(storage: Storage, rank: int) -> None:
    """Note that the lane axes from `rank` on have ended."""
    if storage.data.dim() - 1 > rank:
        varied = any(extent > 1 for extent in storage.data.shape[: -rank - 1])
        storage.data = storage.data[(0,) * (storage.data.dim() - 1 - rank)].contiguous()
        if varied:
            storage.is_stale = True
            storage.data.fill_(dtypes.poison(storage.element))


# --------------------------------------------------------------------------- addresses
def _strided(
    ctx: Context, place: Place, writes: tuple[torch.Tensor, Mask] | None = None
) -> torch.Tensor | None:
    """Return the strided view of `place`, or None where it needs a gather (or, for `writes`, a scatter)."""
    lanes, storage = ctx.lanes, place.storage
    offset = place.offset
    steps: dict[int, int] = {}
    for value, extent, stride in zip(place.indices, place.shape, place.strides, strict=True):
        if isinstance(value, torch.Tensor):
            return None
        low, high = lanes.bounds(value)
        if low < 0 or high >= extent:
            return None
        if isinstance(value, Affine):
            offset += value.base * stride
            for axis, c in value.coeffs:
                steps[axis] = steps.get(axis, 0) + c * stride
        else:
            offset += value * stride
    sizes, strides = [], []
    for axis in reversed(range(lanes.rank)):
        step = steps.get(axis, 0) + storage.axis_stride(axis)
        if step < 0:
            return None
        sizes.append(max(lanes.extents[axis], storage.axis_extent(axis)) if step else 1)
        strides.append(step)
    if writes is not None and not _is_injective(sizes, strides, writes):
        return None
    return storage.data.as_strided(sizes, strides, storage.data.storage_offset() + offset)


def _is_injective(sizes: list[int], strides: list[int], writes: tuple[Mask, ...]) -> bool:
    for tensor in writes:
        if tensor is not None:
            for dim in range(1, tensor.dim() + 1):
                if tensor.shape[-dim] > 1 and sizes[-dim] == 1:
                    return False  # lanes with values of their own meet in one element
    reach = 0
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += stride * (size - 1)
    return True


def is_injective(ctx: Context, place: Place) -> bool:
    """Return whether the indices show at once that no two lanes meet in one element."""
    lanes, storage = ctx.lanes, place.storage
    steps: dict[int, int] = {}
    for value, stride in zip(place.indices, place.strides, strict=True):
        if isinstance(value, torch.Tensor):
            return False
        if isinstance(value, Affine):
            for axis, c in value.coeffs:
                steps[axis] = steps.get(axis, 0) + c * stride
    sizes = [lanes.extents[axis] for axis in range(lanes.rank)]
    strides = [steps.get(axis, 0) + storage.axis_stride(axis) for axis in range(lanes.rank)]
    return _is_injective(sizes, strides, ()) and all(
        step for step, size in zip(strides, sizes, strict=True) if size > 1
    )


def _flat_index(ctx: Context, place: Place) -> tuple[torch.Tensor, Mask]:
    """Return (flat index, clamped into the storage; validity, None where all lanes are in bounds)."""
    lanes, storage = ctx.lanes, place.storage
    flat, base = torch.zeros((), dtype=torch.int64), place.offset
    valid: Mask = None
    dims = zip(place.indices, place.shape, place.strides, strict=True)
    for dim, (value, extent, stride) in enumerate(dims):
        if isinstance(value, int) and 0 <= value < extent:
            base += value * stride
            continue
        index = lanes.tensor(value)
        if isinstance(value, torch.Tensor) or not _is_within(lanes.bounds(value), extent):
            inside = (index >= 0) & (index < extent)
            if not storage.is_global:
                _require_inside(ctx, place, dim, index, inside)
            elif not bool(inside.all()):
                valid = both(valid, inside)
            if not bool(inside.all()):
                index = torch.where(inside, index, 0)
        flat = flat + index * stride
    for axis in range(storage.data.dim() - 1):
        stride = storage.axis_stride(axis)
        if stride:
            flat = flat + torch.arange(storage.axis_extent(axis)).view(-1, *[1] * axis) * stride
    return flat + base if base else flat, valid


def _is_within(bounds: tuple[int, int], extent: int) -> bool:
    return bounds[0] >= 0 and bounds[1] < extent


def _require_inside(ctx: Context, place: Place, dim: int, index: torch.Tensor, inside: torch.Tensor) -> None:
    outside = ~inside if ctx.mask is None else ~inside & ctx.mask
    if bool(outside.any()):
        worst = int(index.broadcast_to(outside.shape)[outside][0])
        raise InterpreterError(
            f"{place.buffer.name}[{place.storage.scope}]: index {worst} is out of bounds "
            f"for dimension {dim} of extent {place.shape[dim]}"
        )


# --------------------------------------------------------------------------- per-thread storage
def _share_thread_axis(ctx: Context, place: Place) -> None:
    """Let a block-wide operation read per-thread storage if every thread holds the same."""
    storage = place.storage
    if storage.axis_extent(THREAD_AXIS) == 1 or ctx.lanes.extents[THREAD_AXIS] != 1:
        return
    dim = storage.data.dim() - 2 - THREAD_AXIS
    first = storage.data.narrow(dim, 0, 1)
    same = (storage.data == first) | (storage.data != storage.data)
    if not bool(same.all()):
        raise ir.UnsupportedIR(f"{place.buffer.name} differs between threads in a block-wide operation")
    storage.data = first.contiguous()


def _privatize(ctx: Context, place: Place, value: torch.Tensor) -> None:
    """Give each lane its own copy of per-thread storage that lanes write different values to."""
    storage, lanes = place.storage, ctx.lanes
    if storage.scope not in THREAD_SCOPES:
        if value.dim() > THREAD_AXIS and value.shape[-1 - THREAD_AXIS] > lanes.extents[THREAD_AXIS]:
            raise ir.UnsupportedIR("a value that differs between threads in a block-wide operation")
        return
    outer = [storage.axis_extent(axis) for axis in range(max(lanes.rank, storage.data.dim() - 1))]
    varying = {axis for v in place.indices if isinstance(v, Affine) for axis, _ in v.coeffs}
    tensors = [value, *([] if ctx.mask is None else [ctx.mask])]
    tensors += [v for v in place.indices if isinstance(v, torch.Tensor)]
    varying |= {axis for tensor in tensors for axis in range(tensor.dim()) if tensor.shape[-1 - axis] > 1}
    for axis in varying:
        if axis < FIXED_AXES or not ctx.is_tile_op:  # a tile op's own axes are elements of one thread
            outer[axis] = lanes.extents[axis]
    shape = (*reversed(outer), storage.data.shape[-1])
    storage.is_stale = False
    if tuple(storage.data.shape) != shape:
        lead = (1,) * (len(shape) - storage.data.dim())
        storage.data = storage.data.view(*lead, *storage.data.shape).expand(shape).contiguous()
