"""TMA copies: the box that a descriptor, coordinates and a pointer describe, element by element."""

from dataclasses import dataclass

import numpy as np

from verify import host, ir
from verify.ir import UnsupportedIR
from verify.layouts import swizzle_address, swizzle_period
from verify.refine.assign import AssignCheck
from verify.refine.compare import Comparer
from verify.refine.device import Site
from verify.refine.evaluate import Cond, Evaluator, compare
from verify.refine.frame import Frame, SitePoints, expand_site
from verify.refine.model import Model, Outcome, Storage
from verify.refine.sym import Sym, const
from verify.refine.tile import Assign

# CUtensorMapDataType -> bits of one element in global memory and in the box.
_ELEMENT_BITS = dict(enumerate((8, 16, 32, 32, 64, 64, 16, 32, 64, 16, 32, 32, 32, 4)))
_SWIZZLE_BYTES = {0: 0, 1: 32, 2: 64, 3: 128}  # CUtensorMapSwizzle


@dataclass(frozen=True)
class Descriptor:
    """A tensor map: `tensor` seen as `dims` (innermost first), moved in boxes of `box` elements."""

    tensor: ir.Buffer
    bits: int
    dims: tuple[Sym, ...]
    strides_bytes: tuple[Sym, ...]
    box: tuple[int, ...]
    swizzle_bytes: int


def read_descriptors(model: Model) -> dict[ir.Var, Descriptor]:
    """Return the tensor map that each kernel parameter holds.

    Raises:
        UnsupportedIR: a feature of a map is not known here.
    """
    return {param: _decode(model, given) for param, given in model.host.descriptors.items()}


def _decode(model: Model, given: host.Descriptor) -> Descriptor:
    if given.interleave or given.oob_fill or any(s != 1 for s in given.element_strides):
        raise UnsupportedIR(f"{given.name} with interleaving, element strides or NaN fill")
    if given.dtype not in _ELEMENT_BITS or given.swizzle not in _SWIZZLE_BYTES:
        raise UnsupportedIR(f"{given.name} of type {given.dtype} with swizzle {given.swizzle}")
    evaluator = model.host_evaluator(*given.dims, *given.strides)
    return Descriptor(
        given.tensor,
        _ELEMENT_BITS[given.dtype],
        tuple(evaluator.int(d) for d in given.dims),
        tuple(evaluator.int(s) for s in given.strides),
        given.box,
        _SWIZZLE_BYTES[given.swizzle],
    )


def check_tma(model: Model, step: Assign, sites: list[Site], maps: dict[ir.Var, Descriptor]) -> Outcome:
    """Compare a copy between a tensor and shared memory with the TMA operations that implement it.

    Raises:
        UnsupportedIR: something in the step or its sites is not understood.
    """
    is_load = model.tile_storage[step.dst.data].shared is not None
    check = _LoadCheck if is_load else _StoreCheck
    return check(model, step, sites, Frame.of(model, step, frozenset()), maps).run()


class _TmaCheck(AssignCheck):
    """What loads and stores have in common: the box in shared memory, the box in the tensor."""

    op = ""

    def __init__(self, model: Model, step: Assign, sites: list[Site], frame: Frame, maps: dict) -> None:
        super().__init__(model, step, sites, frame)
        self.maps = maps
        if not isinstance(step.value, ir.Load):
            raise UnsupportedIR(f"{step.what} by TMA with a conversion")

    def _operation(self, site: Site) -> ir.Call:
        call = site.stmt.value if isinstance(site.stmt, ir.Eval) else None
        if not isinstance(call, ir.Call) or call.op != self.op:
            raise UnsupportedIR(f"{self.step.what} is partly TMA")
        return call

    def _box(
        self, site: Site, handle: ir.Expr, pointer: ir.Expr, coordinates: tuple[ir.Expr, ...]
    ) -> tuple[Descriptor, ir.AccessPtr, SitePoints, list[Sym]]:
        """Return the map, the pointer into shared memory, the points of the box and their coordinates."""
        descriptor = self.maps.get(handle)  # type: ignore[call-overload]
        if descriptor is None or not isinstance(pointer, ir.AccessPtr):
            raise UnsupportedIR("TMA without a tensor map of this launch")
        extra = {f"box {d}": size for d, size in reversed(list(enumerate(descriptor.box)))}
        expanded = expand_site(self.model, self.frame, site, extra, threads=False)
        return descriptor, pointer, expanded, self._moved(expanded, coordinates[: len(descriptor.box)])

    def _moved(self, expanded: SitePoints, coordinates: tuple[ir.Expr, ...]) -> list[Sym]:
        """Return the coordinates in the tensor map of each point, innermost first."""
        device = expanded.evaluator(self.model)
        values = expanded.points.values
        return [device.int(c) + const(values[f"box {d}"]) for d, c in enumerate(coordinates)]

    def _address(
        self, descriptor: Descriptor, pointer: ir.AccessPtr, expanded: SitePoints, storage: Storage | None
    ) -> Sym:
        """Return the bit address in shared memory of each element of the box, in `storage`."""
        device = expanded.evaluator(self.model)
        start = self.model.device.arena_start.get(pointer.data)
        if start is None or self.model.device_storage.get(pointer.data) is not storage:
            raise UnsupportedIR("TMA between other buffers than the copy's")
        base = device.int(pointer.offset).scaled(pointer.element.bits) + const(start * 8)
        position: np.ndarray | int = 0
        scale = descriptor.bits
        for d, size in enumerate(descriptor.box):
            position = position + expanded.points.values[f"box {d}"] * scale
            scale *= size
        linear = base + const(position)
        period_bits = swizzle_period(descriptor.swizzle_bytes) * 8
        if not linear.symbolic().divisible_by(period_bits):
            raise UnsupportedIR("TMA whose stage offset is no multiple of the swizzle period")
        bits = np.asarray(linear.constant)
        swizzled = swizzle_address(bits >> 3, descriptor.swizzle_bytes) * 8 + (bits & 7)
        return linear.symbolic() + const(swizzled)

    def _same_tensor(self, descriptor: Descriptor, buffer: ir.Buffer) -> None:
        """The map has the tensor's extents and row-major strides, so that its zero fill is the tile's."""
        evaluator = Evaluator(self.model.algebra, self.model.tile_env)
        shape = [evaluator.int(s) for s in buffer.shape]
        strides = [evaluator.int(s) for s in buffer.strides] or _row_major_strides(shape)
        expected = [s.scaled(buffer.dtype.bits) for s in reversed(strides)]
        actual = [s.scaled(8) for s in descriptor.strides_bytes]
        same_dims = [s.key for s in reversed(shape)] == [s.key for s in descriptor.dims]
        # The innermost stride is not part of a tensor map: elements are contiguous there.
        if not same_dims or [s.key for s in expected[1:]] != [s.key for s in actual[1:]]:
            raise UnsupportedIR(f"tensor map with other extents or strides than {buffer.name}")
        if expected[0].key != const(buffer.dtype.bits).key:
            raise UnsupportedIR(f"tensor map of {buffer.name}, whose rows are not contiguous")


class _LoadCheck(_TmaCheck):
    op = "tma_load"

    def site(self, site: Site, own: list[Sym]) -> np.ndarray:
        call = self._operation(site)
        if isinstance(call.args[0], ir.AccessPtr):
            return self._bulk(site, own, call)
        handle, _, target, *coordinates = call.args
        descriptor, pointer, expanded, moved = self._box(site, handle, target, tuple(coordinates))
        key = self._address(descriptor, pointer, expanded, self.storage)
        return self.join_and_compare(
            site, own, expanded, key, lambda c, rows: self._source(c, descriptor, moved, rows)
        )

    def _bulk(self, site: Site, own: list[Sym], call: ir.Call) -> np.ndarray:
        """Compare a copy of consecutive bytes; it has no fill, so the tile program must stay in bounds."""
        target, source, _, size = call.args[:4]
        if not isinstance(target, ir.AccessPtr) or not isinstance(source, ir.AccessPtr):
            raise UnsupportedIR("bulk copy of a computed pointer")
        if not isinstance(size, ir.Const) or target.element.bits != source.element.bits:
            raise UnsupportedIR("bulk copy of a computed size or between two types")
        bits = target.element.bits
        count = int(size.value) * 8 // bits
        expanded = expand_site(self.model, self.frame, site, {"element": count}, threads=False)
        device = expanded.evaluator(self.model)
        element = const(expanded.points.values["element"])
        start = self.model.device.arena_start.get(target.data)
        if start is None or self.model.device_storage.get(target.data) is not self.storage:
            raise UnsupportedIR("bulk copy to another buffer")
        key = (device.int(target.offset) + element).scaled(bits) + const(start * 8)
        given = self.model.device_storage.get(source.data)
        flat = device.int(source.offset) + element

        def compare(comparer: Comparer, rows: np.ndarray) -> None:
            load = self.step.value
            assert isinstance(load, ir.Load), "checked on construction"
            wanted = self.model.tile_storage.get(load.buffer.data)
            if given is None or wanted is not given or not given.is_global or load.buffer.dtype.bits != bits:
                raise UnsupportedIR("bulk copy from another tensor or type")
            indices = tuple(comparer.tile.int(i) for i in load.indices)
            comparer.equivalent("bulk copy in bounds", self.model.inside(load.buffer, indices), Cond())
            tile = self.model.flat("tile", load.buffer, indices)
            comparer.equal(f"read of {load.buffer.name}", tile, flat.take(rows))

        return self.join_and_compare(site, own, expanded, key, compare)

    def _source(self, comparer: Comparer, descriptor: Descriptor, moved: list[Sym], rows: np.ndarray) -> None:
        """Claim that element `moved` of the tensor map is the element that the copy reads."""
        load = self.step.value
        assert isinstance(load, ir.Load), "checked on construction"
        source = self.model.tile_storage.get(load.buffer.data)
        if source is None or not source.is_global or descriptor.bits != load.buffer.dtype.bits:
            raise UnsupportedIR("TMA load of another type than the tensor's")
        if descriptor.tensor is not source.buffer:
            names = np.array(load.buffer.name), np.array(descriptor.tensor.name)
            comparer.holds("source tensor", np.array(False), *names)
            return
        self._same_tensor(descriptor, load.buffer)
        indices = tuple(comparer.tile.int(i) for i in load.indices)
        for d, (index, got) in enumerate(zip(reversed(indices), moved, strict=True)):
            comparer.equal(f"coordinate {len(indices) - 1 - d} of {load.buffer.name}", index, got.take(rows))


class _StoreCheck(_TmaCheck):
    """A copy out of shared memory; elements of the box outside of the tensor are dropped."""

    op = "tma_store"

    def site(self, site: Site, own: list[Sym]) -> np.ndarray:
        call = self._operation(site)
        if isinstance(call.args[0], ir.AccessPtr):
            return self._bulk(site, own, call)
        reduces = call.args[-2]
        if not isinstance(reduces, ir.Const) or reduces.value:
            raise UnsupportedIR(f"{self.step.what} as a TMA reduction")
        handle, source, *coordinates = call.args[:-2]
        descriptor, pointer, expanded, _ = self._box(site, handle, source, tuple(coordinates))
        if descriptor.tensor is not self.storage.buffer or descriptor.bits != self.step.dst.dtype.bits:
            raise UnsupportedIR(f"{self.step.what}: TMA store to another tensor or type")
        self._same_tensor(descriptor, self.step.dst)

        def inside(points: SitePoints) -> Cond:
            found = Cond()
            for value, extent in zip(self._moved(points, tuple(coordinates)), descriptor.dims, strict=True):
                found &= compare("ge", value, const(0)) & compare("lt", value, extent)
            return found

        expanded = expanded.restricted(self.model, inside)
        moved = self._moved(expanded, tuple(coordinates))
        key = self.model.flat("tile", self.step.dst, tuple(reversed(moved))).scaled(descriptor.bits)
        read = self._source_storage()
        address = self._address(descriptor, pointer, expanded, read)
        return self.join_and_compare(
            site, own, expanded, key, lambda c, rows: self._read(c, read, address.take(rows))
        )

    def _bulk(self, site: Site, own: list[Sym], call: ir.Call) -> np.ndarray:
        """Compare a copy of consecutive bytes, which drops nothing."""
        target, source, size, reduces = call.args[:4]
        if not isinstance(target, ir.AccessPtr) or not isinstance(source, ir.AccessPtr):
            raise UnsupportedIR("bulk copy of a computed pointer")
        if not isinstance(size, ir.Const) or not isinstance(reduces, ir.Const) or reduces.value:
            raise UnsupportedIR("bulk copy of a computed size, or a reduction")
        bits = self.step.dst.dtype.bits
        if {target.element.bits, source.element.bits} != {bits}:
            raise UnsupportedIR("bulk copy between two types")
        extra = {"element": int(size.value) * 8 // bits}
        expanded = expand_site(self.model, self.frame, site, extra, threads=False)
        device = expanded.evaluator(self.model)
        element = const(expanded.points.values["element"])
        read = self._source_storage()
        start = self.model.device.arena_start.get(source.data)
        if start is None or self.model.device_storage.get(source.data) is not read:
            raise UnsupportedIR("bulk copy from another buffer")
        if self.model.device_storage.get(target.data) is not self.storage:
            raise UnsupportedIR("bulk copy to another tensor")
        key = (device.int(target.offset) + element).scaled(bits)
        address = (device.int(source.offset) + element).scaled(bits) + const(start * 8)
        return self.join_and_compare(
            site, own, expanded, key, lambda c, rows: self._read(c, read, address.take(rows))
        )

    def _source_storage(self) -> Storage:
        load = self.step.value
        assert isinstance(load, ir.Load), "checked on construction"
        read = self.model.tile_storage.get(load.buffer.data)
        if read is None or read.shared is None or load.buffer.dtype.name != self.step.dst.dtype.name:
            raise UnsupportedIR(f"{self.step.what} by TMA from another memory or type")
        return read

    def _read(self, comparer: Comparer, read: Storage, address: Sym) -> None:
        """Claim that the element of shared memory is the one that the copy reads."""
        load = self.step.value
        assert isinstance(load, ir.Load), "checked on construction"
        indices = tuple(comparer.tile.int(i) for i in load.indices)
        expected = comparer.tile_key(read, load.buffer, indices)
        comparer.equal(f"read of {load.buffer.name}", expected, address, unit=load.buffer.dtype.bits)


def _row_major_strides(shape: list[Sym]) -> list[Sym]:
    strides = [const(1)]
    for extent in reversed(shape[1:]):
        strides.insert(0, strides[0] * extent)
    return strides
