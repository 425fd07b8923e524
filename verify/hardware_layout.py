"""What TMA, wgmma descriptors and wgmma fragments find at each position, against the compiler's layouts.

The tables of the PTX ISA ("Shared memory matrix layout", "Register fragments of wgmma.mma_async") and
the swizzle of cuTensorMapEncodeTiled; none of the compiler's own layout code takes part.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import z3

from verify import ir
from verify.access import TmaCopy
from verify.descriptors import DescriptorUse, mma_shape
from verify.encode import Hypothesis
from verify.intarith import constant_of
from verify.ir import UnsupportedIR
from verify.layouts import swizzle_address
from verify.placements import Placed, Placement
from verify.properties import Context
from verify.refine.instructions import k_major, mn_major
from verify.solve import Obligation
from verify.storage import ARENA_ALIGNMENT_BYTES, BYTE_BITS, Storage
from verify.walk import Site

_SPANS = {0: 0, 1: 32, 2: 64, 3: 128}  # CUtensorMapSwizzle -> bytes
_MAX_TRIPS = 64  # of unrolled loops, together
WARPGROUP, WARP, ROWS, REGISTER_BITS = 128, 32, 64, 32
MAX_THREADS = 1024  # of a block


@dataclass(frozen=True)
class Mismatch:
    """A comparison that is settled: `show` is empty where everything agrees."""

    what: str
    span: ir.Span | None
    hypotheses: tuple[Hypothesis, ...]
    show: dict[str, int | str]


class Hardware:
    """The hardware's accesses of one kernel.

    Attributes:
        compared: accesses that were tabulated.
        unknown: accesses that are not understood, with the reason.
        guessed: of the access at hand: it starts where data say, and some starts may be none of its own.
    """

    def __init__(self, context: Context, placed: list[Placed]) -> None:
        """Collect the layouts by the name of their storage."""
        self.context = context
        self.by_name: dict[str, Placed] = {}
        self.ambiguous: set[str] = set()
        for item in placed:
            known = self.by_name.setdefault(item.name, item)
            if not _is_alike(known, item):
                self.ambiguous.add(item.name)
        self.compared = 0
        self.guessed = False
        self.unknown: list[tuple[ir.Span | None, str]] = []

    def checks(self) -> Iterator[Mismatch | Obligation]:
        """Yield every comparison, and what has to hold of the start addresses for it to count."""
        for site, work in self._work():
            self.guessed = False
            try:
                for found in work:
                    if isinstance(found, Mismatch) and found.show and self.guessed:
                        raise UnsupportedIR(f"{found.what}: differ at a start that data may not lead to")
                    yield found
                self.compared += 1
            except UnsupportedIR as error:
                self.unknown.append((site.span, str(error)))

    def _work(self) -> Iterator[tuple[Site, Iterator[Mismatch | Obligation]]]:
        for copy in self.context.memory.tma:
            yield copy.site, self._tma(copy)
        for use in self.context.memory.descriptors:
            yield use.site, self._descriptor(use)
        for site in self.context.device_sites:
            node = site.node
            if isinstance(node, ir.Call) and node.op in ("ptx_wgmma_rs", "ptx_wgmma_ss"):
                yield site, self._registers(site, node)

    def _item(self, name: str) -> Placed | None:
        """Return the buffer of a name.

        Raises:
            UnsupportedIR: several of that name lie differently.
        """
        if name in self.ambiguous:
            raise UnsupportedIR(f"several buffers {name} that lie differently")
        return self.by_name.get(name)

    # ------------------------------------------------------------------ shared memory
    def _shared(self, storage: Storage, dims: int = 2) -> tuple[Placement, int, int]:
        """Return layout, bits of an element and number of stages of a shared buffer.

        Args:
            storage: the buffer.
            dims: its last dimensions, which one access covers.
        """
        item = self._item(storage.name)
        if item is None or item.tile is None or item.placement.thread is not None:
            raise UnsupportedIR(f"{storage.name} has no shared layout")
        return item.placement, item.tile.dtype.bits, _stages(item.placement, dims)

    def _starts(
        self, what: str, site: Site, storage: Storage, start_bytes: z3.ArithRef, dims: int = 2
    ) -> tuple[list[int], Obligation]:
        """Return every byte at which an access may start, and that it starts at one of them."""
        placement, bits, stages = self._shared(storage, dims)
        stage_bytes = placement.size * bits // BYTE_BITS // stages
        residues, goals = set(), []
        for values in _trips(site):
            fixed = z3.simplify(z3.substitute(start_bytes, *values)) if values else start_bytes
            # Warpgroups may start apart; all else that varies has to be whole stages.
            places = set()
            threads = {str(i.const) for i in site.scope.launch if i.tag == "threadIdx.x"}
            data = _data(fixed)  # a stage, or the number of a warpgroup: as good a guess as any
            self.guessed |= bool(data)
            for thread in range(0, MAX_THREADS, WARPGROUP):
                at = [(term, z3.IntVal(thread)) for term in data]
                at += [(z3.Int(name), z3.IntVal(thread if name in threads else 0)) for name in _names(fixed)]
                residue = constant_of(z3.simplify(z3.substitute(fixed, *at) if at else fixed))
                if residue is None:
                    raise UnsupportedIR(f"{what}: start address over data")
                places.add(residue % stage_bytes)
            residues |= places
            goals.append(z3.Or(*(fixed % stage_bytes == place for place in sorted(places))))
        goals += [start_bytes >= 0, start_bytes < stages * stage_bytes]
        claim = Obligation(
            f"{what} starts at the same places of every stage",
            site.span,
            site.scope.hypotheses,
            z3.And(*goals),
            {"start": start_bytes},
            site,
        )
        return [r + s * stage_bytes for r in sorted(residues) for s in range(stages)], claim

    def _elements(self, storage: Storage, bit: np.ndarray) -> np.ndarray:
        """Return the index, a row a dimension, of the element at each bit of a buffer; -1 if none."""
        placement, bits, _ = self._shared(storage)
        element = placement.element_at(bit // bits)
        index = np.stack(np.unravel_index(np.maximum(element, 0), placement.shape))
        return np.where(element >= 0, index, -1)

    def _tma(self, copy: TmaCopy) -> Iterator[Mismatch | Obligation]:
        storage, descriptor = copy.shared.storage, copy.descriptor
        what = copy.shared.what
        placement, bits, _ = self._shared(storage)
        unit = descriptor.tensor.dtype.bits
        if unit != bits:
            raise UnsupportedIR(f"{what}: box of {descriptor.tensor.dtype} into another type")
        base = _base_bytes(storage)
        start = copy.shared.start * copy.shared.unit_bits / BYTE_BITS
        sizes = descriptor.box
        moving = [d for d, size in enumerate(sizes) if size > 1]
        dims = max(2, len(moving))
        if len(moving) < 2 and _stages(placement, 1) > 1:
            dims = 1  # a row, and rows lie alike: any of them may be a stage
        starts, claim = self._starts(what, copy.site, storage, start, dims)
        yield claim
        box = [c.ravel() for c in np.meshgrid(*(np.arange(s) for s in sizes), indexing="ij")]
        linear, scale = np.zeros(len(box[0]), dtype=np.int64), unit
        for coordinate, size in zip(box, sizes, strict=True):
            linear = linear + coordinate * scale
            scale *= size
        wide = [d for d, extent in enumerate(placement.shape) if extent > 1]
        if len(moving) > len(wide):
            raise UnsupportedIR(f"{what}: box of more dimensions than the tile")
        span = _SPANS.get(descriptor.swizzle)
        if span is None:
            raise UnsupportedIR(f"TMA swizzle mode {descriptor.swizzle}")
        for first in starts:
            address = (base + first) * BYTE_BITS + linear
            swizzled = swizzle_address(address // BYTE_BITS, span) * BYTE_BITS + address % BYTE_BITS
            index = self._elements(storage, swizzled - base * BYTE_BITS)
            moved = np.zeros_like(index)
            for depth, d in enumerate(moving):
                moved[wide[-1 - depth]] = box[d]
            yield self._agree(f"{what}: box and layout", copy.site, index, moved, first, box)

    def _agree(
        self,
        what: str,
        site: Site,
        index: np.ndarray,
        moved: np.ndarray,
        first: int,
        labels: list[np.ndarray],
    ) -> Mismatch:
        wrong = np.flatnonzero((index != index[:, :1] + moved).any(axis=0) | (index < 0).any(axis=0))
        show: dict[str, int | str] = {}
        if len(wrong):
            at = int(wrong[0])
            show = {
                "start_byte": first,
                "position": str(tuple(int(x[at]) for x in labels)),
                "expected": str(tuple(int(x) for x in index[:, 0] + moved[:, at])),
                "actual": str(tuple(int(x) for x in index[:, at])),
            }
        return Mismatch(what, site.span, site.scope.hypotheses, show)

    def _descriptor(self, use: DescriptorUse) -> Iterator[Mismatch | Obligation]:
        storage = use.base.storage
        what = f"wgmma operand {use.name} in {storage.name}"
        call = use.site.node
        assert isinstance(call, ir.Call), "operands belong to instructions"
        m, n, k = mma_shape(call.args[0])
        rows = m if use.name == "A" else n
        placement, bits, _ = self._shared(storage)
        if k * bits != WARP * BYTE_BITS:
            raise UnsupportedIR(f"{what}: K of {k} elements of {bits} bits")
        starts, claim = self._starts(what, use.site, storage, use.start_bytes)
        yield claim
        row, depth = (x.ravel() for x in np.meshgrid(np.arange(rows), np.arange(k), indexing="ij"))
        span = use.row_bytes if use.swizzle else 0
        matrix = SimpleNamespace(span=span, leading=use.leading_bytes, stride=use.stride_bytes)
        offset = (k_major if use.k_major else mn_major)(matrix, row, depth, bits)  # type: ignore[arg-type]
        inner = row if not use.k_major else depth
        dimensions = len(placement.shape)
        base = _base_bytes(storage)
        for first in starts:
            address = swizzle_address(base + first + offset, span) - base
            bit = address * BYTE_BITS + inner * bits % BYTE_BITS
            index = self._elements(storage, bit)
            moved = np.zeros_like(index)
            # The tile is rows by K or K by rows; which of them is for refinement to say.
            moved[dimensions - 2], moved[dimensions - 1] = row, depth
            other = moved.copy()
            other[dimensions - 2], other[dimensions - 1] = depth, row
            text = f"{what}: descriptor and layout"
            found = self._agree(text, use.site, index, moved, first, [row, depth])
            if found.show:
                turned = self._agree(text, use.site, index, other, first, [row, depth])
                found = turned if not turned.show else found
            yield found

    # ------------------------------------------------------------------ registers
    def _registers(self, site: Site, call: ir.Call) -> Iterator[Mismatch]:
        _, n, k = mma_shape(call.args[0])
        from_registers = call.op == "ptx_wgmma_rs"
        rest = call.args[2:] if from_registers else call.args[3:]
        a, a_offset, _, _, c, c_offset = rest[3:9]
        thread, register = np.meshgrid(np.arange(WARPGROUP), np.arange(n // 2), indexing="ij")
        lane = thread % WARP
        row = thread // WARP * 16 + lane // 4 + register // 2 % 2 * 8
        column = register // 4 * 8 + lane % 4 * 2 + register % 2
        yield from self._fragment(
            site, "accumulator", c, c_offset, REGISTER_BITS, thread, register, row, column
        )
        if not from_registers:
            return
        bits = 256 // k
        per = REGISTER_BITS // bits
        thread, element = np.meshgrid(np.arange(WARPGROUP), np.arange(ROWS * k // WARPGROUP), indexing="ij")
        lane, register = thread % WARP, element // per
        row = thread // WARP * 16 + lane // 4 + register % 2 * 8
        depth = lane % 4 * per + element % per + register // 2 * per * 4
        yield from self._fragment(site, "operand A", a, a_offset, bits, thread, element, row, depth)

    def _fragment(
        self,
        site: Site,
        what: str,
        var: ir.Expr,
        offset: ir.Expr,
        bits: int,
        thread: np.ndarray,
        position: np.ndarray,
        row: np.ndarray,
        column: np.ndarray,
    ) -> Iterator[Mismatch]:
        """Yield that the element in each register depends in its row on the row alone, and likewise."""
        item = self._item(var.name) if isinstance(var, ir.Var) else None
        if item is None or item.tile is None or item.placement.thread is None or not isinstance(var, ir.Var):
            raise UnsupportedIR(f"wgmma {what} that is no fragment")
        placement, unit = item.placement, item.tile.dtype.bits
        declared = self.context.storages.of(var).element.bits  # what pointer arithmetic counts in
        held = placement.thread
        if unit != bits or len(placement.shape) != 2 or placement.threads is None or held is None:
            raise UnsupportedIR(f"wgmma {what} in a fragment of {item.tile.dtype}")
        term = self.context.encoder.term(offset, site.scope)
        first, end = placement.threads
        holder = np.full((end - first, placement.size), -1, dtype=np.int64)
        holder[held - first, placement.position] = np.arange(placement.position.shape[1])
        for values in _trips(site):
            start = constant_of(z3.simplify(z3.substitute(term, *values) if values else term))
            if start is None or start * declared % bits:
                raise UnsupportedIR(f"wgmma {what} at a computed register")
            at = position + start * declared // bits
            if at.max() >= placement.size:
                show: dict[str, int | str] = {"register": int(at.max()), "registers": placement.size}
                yield Mismatch(f"wgmma {what} in {item.name}: inside the array", site.span, (), show)
                return
            for group in range(0, end - first, WARPGROUP):
                element = holder[thread + group, at]
                i, j = element // placement.shape[1], element % placement.shape[1]
                rows, columns = np.full(row.max() + 1, -1), np.full(column.max() + 1, -1)
                rows[row], columns[column] = i, j
                bad = np.argwhere((element < 0) | (rows[row] != i) | (columns[column] != j))
                show = {}
                if len(bad):
                    t, r = (int(x) for x in bad[0])
                    show = {"threadIdx.x": first + group + t, "register": int(at[t, r])}
                    show |= {"row": int(row[t, r]), "column": int(column[t, r])}
                    show["element"] = str((int(i[t, r]), int(j[t, r]))) if element[t, r] >= 0 else "none"
                text = f"wgmma {what} in {item.name}: register fragment and layout"
                yield Mismatch(text, site.span, site.scope.hypotheses, show)


def _is_alike(a: Placed, b: Placed) -> bool:
    """Return whether a name may stand for either of two buffers."""
    types = [p.tile.dtype if p.tile is not None else None for p in (a, b)]
    return a.placement is b.placement and types[0] == types[1]


def _stages(placement: Placement, dims: int) -> int:
    """Return how many blocks of `dims` dimensions, laid out alike, follow each other: stages, or a ring."""
    count = int(np.prod(placement.shape[:-dims], dtype=np.int64))
    position = placement.position[0]
    if placement.size % count or len(position) % count:
        return 1
    rows = position.reshape(count, -1)
    apart = np.arange(count)[:, None] * (placement.size // count)
    return count if bool((rows == rows[:1] + apart).all()) else 1


def _base_bytes(storage: Storage) -> int:
    """Return where a buffer starts in dynamic shared memory; one that is not a part of it is all of it.

    Raises:
        UnsupportedIR: its alignment does not fix the phase of a swizzle.
    """
    if storage.arena_bytes is not None:
        return storage.arena_bytes
    if storage.alignment_bytes < ARENA_ALIGNMENT_BYTES:
        raise UnsupportedIR(f"{storage.name} starts at an unknown address of shared memory")
    return 0


def _names(term: z3.ExprRef) -> set[str]:
    found, stack, seen = set(), [term], set()
    while stack:
        node = stack.pop()
        if node.get_id() in seen:
            continue
        seen.add(node.get_id())
        if z3.is_const(node) and node.decl().kind() == z3.Z3_OP_UNINTERPRETED:
            found.add(node.decl().name())
        stack.extend(node.children())
    return found


def _data(term: z3.ExprRef) -> list[z3.ArithRef]:
    """Return the values of data in a term: integers that a function without a meaning gives."""
    found: list[z3.ArithRef] = []
    stack, seen = [term], set()
    while stack:
        node = stack.pop()
        if node.get_id() in seen:
            continue
        seen.add(node.get_id())
        if z3.is_int(node) and node.num_args() and node.decl().kind() == z3.Z3_OP_UNINTERPRETED:
            found.append(node)
        else:
            stack.extend(node.children())
    return found


def _trips(site: Site) -> list[list[tuple[z3.ArithRef, z3.ArithRef]]]:
    """Return the values of the unrolled loops around `site`, one assignment a trip."""
    unrolled = {s.var for s in site.path if isinstance(s, ir.For) and s.kind == "unrolled"}
    loops = [i for i in site.scope.loops if i.var in unrolled]
    ends = [(i.const, constant_of(i.start), constant_of(i.extent)) for i in loops]
    known = [(c, range(s, s + n)) for c, s, n in ends if s is not None and n is not None]
    total = int(np.prod([len(r) for _, r in known], dtype=np.int64)) if known else 1
    if total > _MAX_TRIPS:
        raise UnsupportedIR(f"{total} trips of unrolled loops")
    return [
        [(c, z3.IntVal(v)) for (c, _), v in zip(known, values, strict=True)]
        for values in itertools.product(*(r for _, r in known))
    ]
