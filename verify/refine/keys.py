"""Where an access of either level lands, in terms that the two levels share."""

from collections.abc import Callable

import numpy as np

from verify import ir
from verify.ir import UnsupportedIR
from verify.layouts import OUTSIDE
from verify.refine.model import Model, Storage
from verify.refine.sym import Sym, const


def tile_key(
    model: Model, storage: Storage, buffer: ir.Buffer, indices: tuple[Sym, ...], stage: Callable[[int], Sym]
) -> Sym:
    """Return where a tile-level element is: fragments in element bits, others in bit addresses."""
    bits = buffer.dtype.bits
    if storage.is_global:
        return model.flat("tile", buffer, indices).scaled(bits)
    flat = const(0)
    for index, extent in zip(indices, buffer.shape, strict=True):
        if not isinstance(extent, ir.Const):
            raise UnsupportedIR(f"{buffer.name} of symbolic shape")
        flat = flat.scaled(int(extent.value)) + index
    if storage.fragment is not None:
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
    if storage.is_global:
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
