"""wgmma operands in shared memory: what a descriptor makes the tensor core read.

A descriptor holds a start address and two strides, in units of 16 bytes, and a swizzle mode. The
swizzle permutes 16-byte chunks inside atoms of 8 rows, aligned in absolute addresses; so reads are
bounded by whole atoms, which is what the extent below counts (PTX ISA, "Shared memory matrix
layout"; CuTe mma_sm90_desc.hpp).
"""

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import z3

from verify import ir
from verify.encode import Encoder, Hypothesis
from verify.text import show
from verify.walk import Site

if TYPE_CHECKING:
    from verify.access import Access

UNIT_BYTES = 16  # of addresses and strides in a descriptor
FIELD_BITS = 14  # of each of them
CORE_BYTES = 128  # 8 rows of 16 bytes: the atom without swizzle
ATOM_ROWS = 8
INSTRUCTION_K_BYTES = 32  # every wgmma takes 256 bits of K a row
WARPGROUP_THREADS = 128
_REGISTER_BITS = 32
_SWIZZLE_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}  # layout_type -> bytes of a swizzled row
_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")


def mma_shape(text: ir.Expr) -> tuple[int, int, int]:
    """Return m, n, k of an instruction shape such as m64n16k32."""
    found = _SHAPE.fullmatch(text.value) if isinstance(text, ir.Str) else None
    if found is None:
        raise ir.UnsupportedIR(f"wgmma shape {show(text)}")
    return int(found[1]), int(found[2]), int(found[3])


def accumulator_registers(dtype: ir.Expr, m: int, n: int) -> int:
    """Return 32-bit registers a thread holds of an m x n accumulator."""
    return m * n * _type_bits(dtype) // (_REGISTER_BITS * WARPGROUP_THREADS)


def _type_bits(dtype: ir.Expr) -> int:
    if not isinstance(dtype, ir.Str) or dtype.value not in ir.MATRIX_TYPES:
        raise ir.UnsupportedIR(f"wgmma operand type {show(dtype)}")
    return ir.DType(ir.MATRIX_TYPES[dtype.value]).bits


@dataclass(frozen=True)
class _State:
    base: "Access"
    start_bytes: z3.ArithRef  # from the storage's first byte
    swizzle: int
    leading_bytes: int
    stride_bytes: int
    around: tuple[Hypothesis, ...]  # branches and loops that the initialisation is in
    offsets: tuple[z3.ArithRef, ...] = ()  # byte offsets added so far


@dataclass(frozen=True)
class DescriptorUse:
    """One operand of one wgmma.

    Attributes:
        start_bytes: of the operand, from the first byte of its storage.
        extent_bytes: from the atom that holds the start, an upper bound of what is read.
        atom_bytes: 8 swizzled rows.
        row_bytes: of a swizzled row; 16 without swizzle.
        offsets: byte offsets that were added to the start address and must be multiples of 16.
        k_major: each row holds consecutive K.
        parts: (number, bytes from one to the next) of equal parts with gaps between them; (1, 0) without.
    """

    name: str
    site: Site
    base: "Access"
    start_bytes: z3.ArithRef
    extent_bytes: int
    atom_bytes: int
    row_bytes: int
    leading_bytes: int
    stride_bytes: int
    swizzle: int
    k_major: bool
    offsets: tuple[z3.ArithRef, ...]
    parts: tuple[int, int] = (1, 0)

    @property
    def part_bytes(self) -> int:
        """Return the extent of one part."""
        number, step = self.parts
        return self.extent_bytes - (number - 1) * step


class Descriptors:
    """The descriptors of a kernel while its statements are read in order.

    The last initialisation in that order is the one that a use sees, in every thread and round, only where
    both are in the same branches and loops, or the use is further in; anything else is UNSUPPORTED.
    """

    def __init__(self, encoder: Encoder) -> None:
        """Start with none initialised."""
        self._encoder = encoder
        self._states: dict[ir.Var, _State] = {}
        self._entered: dict[ir.Var, list[Hypothesis]] = {}  # loops around a use and not its initialisation

    def initialize(
        self, site: Site, target: ir.Var, base: "Access", shift_bytes: int, fields: list[ir.Expr]
    ) -> None:
        """Point `target` at `base` plus `shift_bytes`; fields: swizzle, leading and stride offset."""
        swizzle, leading, stride = (_integer(f) for f in fields)
        if swizzle not in _SWIZZLE_BYTES:
            raise ir.UnsupportedIR(f"wgmma swizzle mode {swizzle}")
        around = _around(site)
        if any(h is entered for h in around for entered in self._entered.get(target, ())):
            raise ir.UnsupportedIR("wgmma descriptor made again in a loop that used it as it was before")
        start = _bytes_of(base.start, base.unit_bits) + shift_bytes
        self._states[target] = _State(base, start, swizzle, leading * UNIT_BYTES, stride * UNIT_BYTES, around)

    def increase(self, site: Site, target: ir.Var, offset: z3.ArithRef) -> None:
        """Add `offset` bytes to the start address."""
        state, around = self._state(target), _around(site)
        if len(around) != len(state.around) or not _begins(around, state.around):
            raise ir.UnsupportedIR("wgmma descriptor advanced in another branch or loop than it is made in")
        start = state.start_bytes + offset
        self._states[target] = replace(state, start_bytes=start, offsets=(*state.offsets, offset))

    def read(
        self,
        site: Site,
        target: ir.Expr,
        offset: z3.ArithRef,
        dtype: ir.Expr,
        k_major: ir.Expr,
        rows: int,
        k: int,
        name: str,
    ) -> DescriptorUse:
        """Return what a wgmma reads through `target` plus `offset` units of 16 bytes."""
        if not isinstance(target, ir.Var) or not isinstance(k_major, ir.Const):
            raise ir.UnsupportedIR("wgmma descriptor operand")
        state, bits, around = self._state(target), _type_bits(dtype), _around(site)
        if not _begins(around, state.around):
            raise ir.UnsupportedIR("wgmma descriptor used outside of the branch or loop that it is made in")
        loops = [h for h in around[len(state.around) :] if h.kind == "loop"]
        self._entered.setdefault(target, []).extend(loops)
        if k * bits != INSTRUCTION_K_BYTES * 8:
            raise ir.UnsupportedIR(f"wgmma with {k} elements of {bits} bits in K")
        row = _SWIZZLE_BYTES[state.swizzle]
        atom = ATOM_ROWS * row
        major = bool(k_major.value)
        steps = _atom_steps(state, major, rows, k, bits, row)
        if state.swizzle and any(step % atom for count, step in steps if count > 1):
            raise ir.UnsupportedIR("wgmma descriptor strides that are no multiple of a swizzle atom")
        extent = sum((count - 1) * step for count, step in steps) + atom
        return DescriptorUse(
            name,
            site,
            state.base,
            state.start_bytes + UNIT_BYTES * offset,
            extent,
            atom,
            row,
            state.leading_bytes,
            state.stride_bytes,
            state.swizzle,
            major,
            state.offsets,
            _parts(steps, extent),
        )

    def _state(self, target: ir.Var) -> _State:
        if target not in self._states:
            raise ir.UnsupportedIR(f"wgmma descriptor {target.name} is used before it is made")
        return self._states[target]


def _around(site: Site) -> tuple[Hypothesis, ...]:
    return tuple(h for h in site.scope.hypotheses if h.kind in ("guard", "loop"))


def _begins(around: tuple[Hypothesis, ...], outer: tuple[Hypothesis, ...]) -> bool:
    """Return whether `around` begins with `outer`; one condition is met by the same threads twice."""
    return len(around) >= len(outer) and all(
        a is b or z3.eq(a.term, b.term) for a, b in zip(around, outer, strict=False)
    )


def _atom_steps(
    state: _State, k_major: bool, rows: int, k: int, bits: int, row: int
) -> list[tuple[int, int]]:
    """Return (number of atoms, bytes between them) along each direction of the operand."""
    if k_major:
        steps = [(rows // ATOM_ROWS, state.stride_bytes)]
        if not state.swizzle:  # without swizzle a row of K is split into cores of 16 bytes
            steps.append((INSTRUCTION_K_BYTES // row, state.leading_bytes))
        return steps
    across = -(-rows * bits // (8 * row))  # atoms along the contiguous direction
    deep = k // ATOM_ROWS
    if state.swizzle:
        return [(across, state.leading_bytes), (deep, state.stride_bytes)]
    return [(across, state.stride_bytes), (deep, state.leading_bytes)]


def _parts(steps: list[tuple[int, int]], extent: int) -> tuple[int, int]:
    number, step = max(steps, key=lambda s: s[1])
    gaps = number > 1 and extent - (number - 1) * step < step
    return (number, step) if gaps else (1, 0)


def _bytes_of(start: z3.ArithRef, unit_bits: int) -> z3.ArithRef:
    return start * (unit_bits // 8) if unit_bits >= 8 else start * unit_bits / 8


def _integer(node: ir.Expr) -> int:
    if not isinstance(node, ir.Const):
        raise ir.UnsupportedIR("wgmma descriptor field that is not a constant")
    return int(node.value)
