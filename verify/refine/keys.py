"""Where an access of either level lands, in terms that the two levels share."""

from collections.abc import Callable

import numpy as np

from verify import ir
from verify.ir import UnsupportedIR
from verify.layouts import OUTSIDE
from verify.refine.model import Model, Place, Storage
from verify.refine.sym import Sym, const


def tile_key(
    model: Model, storage: Storage, buffer: ir.Buffer, indices: tuple[Sym, ...], stage: Callable[[int], Sym]
) -> Sym:
    """Return where a tile-level element is: fragments in element bits, others in bit addresses.

    Raises:
        NeedsValuesError: an element of a fragment that loop counters choose.
    """
    bits = buffer.dtype.bits
    if storage.is_global:
        return model.flat("tile", buffer, indices).scaled(bits)
    if storage.private and bits != storage.buffer.dtype.bits:
        raise UnsupportedIR(f"view {buffer.name} of a private array")
    flat = const(0)
    for index, extent in zip(indices, buffer.shape, strict=True):
        if not isinstance(extent, ir.Const):
            raise UnsupportedIR(f"{buffer.name} of symbolic shape")
        flat = flat.scaled(int(extent.value)) + index
    if storage.fragment is not None and not flat.is_constant:
        raise NeedsValuesError(flat)
    if storage.fragment is not None or storage.private:
        return flat.scaled(bits)
    if storage.shared is None or len(storage.shared.shape) != len(indices) or storage.shared.bits != bits:
        raise UnsupportedIR(f"view {buffer.name} of shared memory")
    return storage.shared.address(model.algebra, indices, stage(storage.shared.stages))


def device_key(
    model: Model, storage: Storage, buffer: ir.Buffer, indices: tuple[Sym, ...], thread: np.ndarray | Sym
) -> Sym:
    """Return which place a device access touches, in the terms of `tile_key`.

    A register that holds no element gives NO_ELEMENT or OUTSIDE.
    """
    bits = buffer.dtype.bits
    flat = model.flat("device", buffer, indices)
    if storage.is_global or storage.private:
        return flat.scaled(bits)
    if storage.shared is not None:
        return flat.scaled(bits) + const(storage.shared.start)
    if not flat.is_constant:
        raise NeedsValuesError(flat)
    place = storage.fragment
    if place is None or bits > place.bits:
        raise UnsupportedIR(f"{buffer.name} is read wider than its layout")
    position = np.asarray(flat.constant) * bits
    threads = thread if isinstance(thread, np.ndarray) else np.asarray(thread.constant)
    element = place.element_at(threads, position // place.bits)
    return const(np.where(element < 0, element, element * place.bits + position % place.bits))


def tile_place(model: Model, stage: Callable[[int], Sym], thread: Sym | None) -> Place:
    """Return where a read inside an index of the tile program lands; `thread` None: any of them."""

    def place(storage: Storage, buffer: ir.Buffer, indices: tuple[Sym, ...]) -> tuple[Sym, ...]:
        key = tile_key(model, storage, buffer, indices, stage)
        return (key, _owner(model, thread)) if storage.private else (key,)

    return place


def device_place(model: Model, threads: np.ndarray | Sym | None, thread: Sym | None) -> Place:
    """Return where a read inside an index of the device program lands, as `tile_place` does.

    Args:
        model: the kernel.
        threads: threadIdx.x at each point; None where one thread stands for all.
        thread: the tile program's thread at each point, None where it is any.
    """

    def place(storage: Storage, buffer: ir.Buffer, indices: tuple[Sym, ...]) -> tuple[Sym, ...]:
        if storage.fragment is not None and threads is None:
            raise UnsupportedIR(f"index read from {buffer.name} by whichever thread issues the operation")
        key = device_key(model, storage, buffer, indices, const(0) if threads is None else threads)
        if storage.fragment is not None and np.any(np.asarray(key.constant) < 0):
            raise UnsupportedIR(f"index read from a register that holds nothing of {buffer.name}")
        return (key, _owner(model, thread)) if storage.private else (key,)

    return place


def _owner(model: Model, thread: Sym | None) -> Sym:
    """Return whose private copy is meant: where the statement is not of one thread, all hold the same."""
    if thread is None:
        model.uses.add("uniform")
        return const(-1)
    return thread


class NeedsValuesError(Exception):
    """A register number depends on loop counters, which have to be enumerated."""

    def __init__(self, value: Sym) -> None:
        """Keep the symbols' names."""
        super().__init__("register number over symbols")
        self.names = {a.args[0] for a in value.atoms() if a.kind == "var"}


def element_name(storage: Storage, key: int) -> str:
    """Return the logical index that a fragment key stands for."""
    place = storage.fragment
    if place is None or key == OUTSIDE:
        return f"outside of the registers of {storage.buffer.name}"
    if key < 0:
        return f"no element of {storage.buffer.name}"
    index = np.unravel_index(key // place.bits, place.shape)
    return f"{storage.buffer.name}[{', '.join(str(int(i)) for i in index)}]"
