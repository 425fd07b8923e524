"""Every access lies inside its allocation, and every TMA descriptor describes its tensor.

Global memory is checked against the extents of the tile IR's parameter, shared memory against the
view's own allocation and the arena, registers against the declared array, wgmma operands by the
registers or the bytes that the instruction takes. TMA clips a box at the descriptor's extents, so
for the global side of a TMA copy those extents are compared with the tensor's.
"""

import z3

from verify import ir
from verify.access import Access, TmaCopy
from verify.descriptors import DescriptorUse
from verify.encode import Hypothesis, Scope
from verify.host import Descriptor
from verify.intarith import conjunction
from verify.properties import Claims, Context, Issue
from verify.solve import Obligation
from verify.storage import BYTE_BITS, Storage

NAME = "bounds"
# CUtensorMapDataType (cuda.h) -> bits of an element; 13 is 16 packed 4-bit elements in 8 bytes.
_TMA_BITS = {0: 8, 1: 16, 2: 32, 3: 32, 4: 64, 5: 64, 6: 16, 7: 32, 8: 64, 9: 16, 11: 32, 13: 4}


class Bounds:
    """Property `bounds`."""

    name = NAME
    # The extent of a wgmma operand is counted from the aligned swizzle atom that alignment proves.
    depends = ("overflow", "alignment")

    def claims(self, context: Context) -> Claims:
        """Return one obligation for each access and each descriptor."""
        memory, claims = context.memory, Claims()
        claims.unsupported += [Issue(site.span, what) for site, what in memory.unsupported]
        claims.obligations += [_inside(a) for a in memory.accesses]
        claims.obligations += [_operand_inside(u) for u in memory.descriptors]
        claims.obligations += _views(context)
        for descriptor in context.host.descriptors.values():
            claims.obligations.append(_describes(context, descriptor, memory.tma))
        if context.host.descriptors:
            claims.assumptions.append("TMA hardware clips a box at the extents of its descriptor")
        claims.assumptions.append(
            "each tensor has the shape and the strides of the kernel's parameter: the generated host code "
            "checks both before the first launch with them"
        )
        return claims


PROPERTY = Bounds()


def _inside(access: Access) -> Obligation:
    storage, unit = access.storage, access.unit_bits
    start, end, size = access.start, access.start + access.count, storage.elements
    if unit != storage.element.bits:
        start, end, size = start * unit, end * unit, size * storage.element.bits
    return Obligation(
        f"{access.what} inside {storage.name}",
        access.site.span,
        access.site.scope.hypotheses,
        z3.And(start >= 0, end <= size),
        show={
            "buffer": f"{storage.name} ({storage.kind} {storage.element})",
            "element": access.start,
            "elements": access.count,
            "element_bits": unit,
            "byte_address": access.start * unit / BYTE_BITS,
            "extent": storage.elements,
        },
        site=access.site,
    )


def _operand_inside(use: DescriptorUse) -> Obligation:
    storage = use.base.storage
    first = use.start_bytes
    if use.swizzle:  # chunks may come from anywhere in the aligned atom
        first = first - first % use.atom_bytes
    size = storage.elements * storage.element.bits / BYTE_BITS
    return Obligation(
        f"wgmma operand {use.name} inside {storage.name}",
        use.site.span,
        use.site.scope.hypotheses,
        z3.And(first >= 0, first + use.extent_bytes <= size),
        show={
            "buffer": f"{storage.name} ({storage.kind} {storage.element})",
            "byte_address": use.start_bytes,
            "bytes": use.extent_bytes,
            "extent_bytes": size,
        },
        site=use.site,
    )


def _views(context: Context) -> list[Obligation]:
    """Return that every view of the dynamic shared arena lies inside it."""
    arena = context.storages.arena
    views = [s for s in context.storages.by_var.values() if s.arena_bytes is not None]
    return [_view_inside(view, arena) for view in views if arena is not None]


def _view_inside(view: Storage, arena: Storage) -> Obligation:
    end = z3.IntVal(view.arena_bytes) + view.elements * view.element.bits / BYTE_BITS
    goal = z3.And((view.elements * view.element.bits) % BYTE_BITS == 0, end <= arena.elements)
    show = {"buffer": view.name, "byte_address": view.arena_bytes, "extent_bytes": arena.elements}
    return Obligation(f"shared allocation {view.name} inside the arena", None, (), goal, show=show)


def _describes(context: Context, descriptor: Descriptor, copies: list[TmaCopy]) -> Obligation:
    """Return that the descriptor's extents and strides are those of its row-major tensor."""
    tensor, term = descriptor.tensor, context.encoder.term
    shape = [term(e, Scope()) for e in reversed(tensor.shape)]
    dims = [term(e, Scope()) for e in descriptor.dims]
    strides = [term(e, Scope()) for e in descriptor.strides]
    if len(shape) != len(dims):
        raise ir.UnsupportedIR(f"descriptor {descriptor.name} of another rank than {tensor.name}")
    goals = [have == want for have, want in zip(dims, shape, strict=True)]
    pitch = z3.IntVal(tensor.dtype.bits)
    for axis in range(1, len(shape)):
        pitch = pitch * shape[axis - 1]
        goals.append(strides[axis] * BYTE_BITS == pitch)
    if _TMA_BITS.get(descriptor.dtype) != tensor.dtype.bits:
        raise ir.UnsupportedIR(f"descriptor {descriptor.name} of type {descriptor.dtype} for {tensor.dtype}")
    goals += [z3.BoolVal(step == 1) for step in descriptor.element_strides]
    spans = [c.site.span for c in copies if c.descriptor is descriptor]
    hypotheses: tuple[Hypothesis, ...] = context.hypotheses
    return Obligation(
        f"TMA descriptor {descriptor.name} describes {tensor.name}",
        spans[0] if spans else None,
        hypotheses,
        conjunction(goals),
        show={
            "buffer": tensor.name,
            "descriptor_dims": str([z3.simplify(d) for d in dims]),
            "tensor_dims": str([z3.simplify(s) for s in shape]),
        },
    )
