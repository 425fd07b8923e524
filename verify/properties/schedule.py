"""Every tile of the outputs is computed by exactly one block in exactly one round.

A plain grid is its own schedule: each block is one tile. Where blocks go on to further tiles in a
loop, the device IR's stores say which: the address of an output element is a part that depends on
the block and the round alone (where the tile begins) plus a part that depends on the thread and the
inner loops (where in the tile). The second part is enumerated, which gives the tile's box and that
it is filled exactly once; the first part is shown to run through the beginnings of all tiles of the
symbolic tensor, each once, by an inverse: tile -> work item -> (block, round).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import z3

from verify import ir, lemma, rasterisation
from verify.encode import Hypothesis, Index, Scope, constants_of, elected_lane, local_assumptions
from verify.intarith import conjunction, constant_of, generalised, total
from verify.properties import Claims, Context, Issue
from verify.solve import Answer, Obligation, Prover
from verify.values import evaluate
from verify.verdict import Verdict
from verify.walk import Site

NAME = "schedule"
MAX_LOCAL_POINTS = 1 << 20  # threads times rounds of inner loops that are enumerated
MAX_WORK_POINTS = 1 << 20  # blocks times rounds of a concrete shape
SAMPLES = (1, 2, 3, 5, 9, 17, 40)  # multiples of a tile tried as extents of a symbolic dimension
GROUPS = (2, 4, 8, 16, 32)  # widths of grouped schedules tried
_PAIR = (0, 1)


@dataclass(frozen=True)
class Axis:
    """One dimension of an output.

    Attributes:
        extent: its elements.
        stride: elements between neighbours, in the flat index.
        box: elements of it in one tile.
    """

    extent: z3.ArithRef
    stride: int
    box: int

    @property
    def tiles(self) -> z3.ArithRef:
        """Number of tiles along it."""
        return z3.simplify((self.extent + (self.box - 1)) / self.box)


@dataclass(frozen=True)
class Work:
    """Where the tile begins that a block writes in a round.

    Attributes:
        base: flat index of its first element.
        given: what holds for every block and round that writes, less the range of the round.
        guard: whether the round takes place.
        block, wave: the launch index and the loop counter.
        within: what holds for every thread and inner round that the tile is made of.
        written: guards that say which elements of a tile are written.
        element: flat index of the first element that a thread writes.
    """

    site: Site
    tensor: str
    base: z3.ArithRef
    axes: tuple[Axis, ...]
    given: tuple[Hypothesis, ...]
    guard: z3.BoolRef
    block: Index
    wave: Index
    within: tuple[Hypothesis, ...]
    written: tuple[z3.BoolRef, ...]
    element: z3.ArithRef


@dataclass(frozen=True)
class Store:
    """One statement that writes a tensor.

    Attributes:
        start: flat index of the first element that it writes.
        places: of all the elements that it writes, relative to that.
    """

    site: Site
    what: str
    tensor: ir.Buffer
    start: z3.ArithRef
    places: tuple[int, ...]


@dataclass(frozen=True)
class Order:
    """The coordinates of the tile of each number, and back; for terms and for arrays alike."""

    text: str
    coordinates: Callable[[Any, Sequence[Any]], list[Any]]
    number: Callable[[Sequence[Any], Sequence[Any]], Any]


def _quotient(a: Any, b: Any) -> Any:
    return a / b if isinstance(a, z3.ExprRef) else a // b


_ALONE = Order("in their own order", lambda item, counts: [item][: len(counts)], lambda at, _: at[0])
_ROWS = Order(
    "row by row",
    lambda item, counts: [_quotient(item, counts[1]), item % counts[1]],
    lambda at, counts: at[0] * counts[1] + at[1],
)
_COLUMNS = Order(
    "column by column",
    lambda item, counts: [item % counts[0], _quotient(item, counts[0])],
    lambda at, counts: at[1] * counts[0] + at[0],
)


def _grouped(width: int, axis: int) -> Order:
    """Return the order in panels of `width` tiles along `axis`, over the whole other axis."""

    def coordinates(item: Any, counts: Sequence[Any]) -> list[Any]:
        along, rest = item % width, _quotient(item, width)
        other = counts[1 - axis]
        pair = [_quotient(rest, other) * width + along, rest % other]
        return pair if axis == 0 else pair[::-1]

    def number(at: Sequence[Any], counts: Sequence[Any]) -> Any:
        panel = _quotient(at[axis], width) * counts[1 - axis] + at[1 - axis]
        return panel * width + at[axis] % width

    return Order(f"in groups of {width} along axis {axis}", coordinates, number)


class Schedule:
    """Property `schedule`."""

    name = NAME
    depends = ("overflow", "bounds")

    def claims(self, context: Context) -> Claims:
        """Return what was shown of the kernel's schedule."""
        claims = Claims()
        body = context.extracted.device.body
        for node in ir.walk(body):
            if isinstance(node, ir.Attr) and node.key == rasterisation.KEY:
                in_clusters = context.extracted.device.attrs.get("cluster_dims") is not None
                if in_clusters or rasterisation.outside_uses(node, body):
                    claims.unsupported.append(
                        Issue(node.span, "blocks in panels, of clusters or in a part of the kernel")
                    )
                    continue
                claims.obligations += rasterisation.obligations(
                    node, context.host.extents, context.encoder, context.hypotheses
                )
                claims.notes.append("blocks go over the grid in panels, each to one place")
        looped = [(s, wave) for s in stores_of(context) if (wave := wave_of(s)) is not None]
        if not looped:
            claims.notes.append("each block of the launch is one tile; coverage shows what it writes")
            return claims
        prover = Prover()
        claims.spent.append(prover)
        for store, wave in looped:
            show_tiles(context, prover, store, wave, claims)
        return claims


PROPERTY = Schedule()


def show_tiles(context: Context, prover: Prover, store: Store, wave: Index, claims: Claims) -> None:
    """Claim that the rounds of `wave` write each element of a tensor exactly once by `store`."""
    try:
        work = _Reader(context, prover).read(store, wave)
        _Checker(context, prover, work, claims).check()
    except ir.UnsupportedIR as error:
        claims.unknown.append(Issue(store.site.span, f"{store.what}: {error}"))


def stores_of(context: Context) -> list[Store]:
    """Return every statement that writes global memory, of whatever kind."""
    found = []
    for access in context.memory.accesses:
        tensor = access.storage.tensor
        if access.storage.kind != "global" or access.mode == "r" or tensor is None:
            continue
        count = constant_of(access.count)
        whole = count is not None and access.unit_bits == access.storage.element.bits
        places = tuple(range(count)) if whole and count is not None else ()
        found.append(Store(access.site, access.what, tensor, access.start, places))
    for copy in context.memory.tma:
        if copy.store:  # the descriptor is row-major by property bounds; what lies outside is clipped
            stride, start, places = z3.IntVal(1), z3.IntVal(0), [0]
            descriptor = copy.descriptor
            for at, box, dim in zip(copy.coordinates, descriptor.box, descriptor.dims, strict=True):
                start = start + at * stride
                step = constant_of(stride)
                places = [p + i * step for i in range(box) for p in places] if step is not None else []
                stride = z3.simplify(stride * context.encoder.term(dim, Scope()))
            what = f"TMA store to {descriptor.tensor.name}"
            found.append(Store(copy.site, what, descriptor.tensor, start, tuple(places)))
    return found


def wave_of(store: Store) -> Index | None:
    """Return the loop over tiles around a store: its counter and a block index are used together."""
    scope = store.site.scope
    blocks = {i.const.decl().name() for i in scope.launch if i.tag.startswith("blockIdx")}
    for index in scope.loops:
        name = index.const.decl().name()
        parts = [index.extent, *_addends(z3.simplify(store.start))]
        if blocks & constants_of(index.extent):
            return index
        if any(name in constants_of(p) and blocks & constants_of(p) for p in parts):
            return index
    return None


def _addends(term: z3.ArithRef) -> list[z3.ArithRef]:
    """Return terms whose sum is `term`, constant factors multiplied out."""
    kind, parts = term.decl().kind(), term.children()
    if kind == z3.Z3_OP_ADD:
        return [a for part in parts for a in _addends(part)]
    if kind == z3.Z3_OP_SUB:
        rest = [a for part in parts[1:] for a in _addends(part)]
        return [*_addends(parts[0]), *(-a for a in rest)]
    if kind == z3.Z3_OP_UMINUS:
        return [-a for a in _addends(parts[0])]
    if kind == z3.Z3_OP_MUL and len(parts) == 2:
        factor = next((p for p in parts if constant_of(p) is not None), None)
        if factor is not None:
            other = parts[1] if factor is parts[0] else parts[0]
            return [factor * a for a in _addends(other)]
    return [term]


class _Reader:
    """Takes a store apart into where its tile begins and where in the tile it writes."""

    def __init__(self, context: Context, prover: Prover) -> None:
        self.context = context
        self.prover = prover

    def read(self, store: Store, wave: Index) -> Work:
        site = store.site
        scope = site.scope
        blocks = [i for i in scope.launch if i.tag.startswith("blockIdx") and constant_of(i.extent) != 1]
        if len(blocks) != 1 or scope.loops[0] is not wave:
            raise ir.UnsupportedIR("tiles by more than one launch index and one outermost loop")
        block = blocks[0]
        work = {block.const.decl().name(), wave.const.decl().name()}
        local = {i.const.decl().name() for i in scope.indices} - work
        hypotheses = [Hypothesis(h.label, h.kind, elected_lane(h.term, scope)) for h in scope.hypotheses]
        outer = [h for h in hypotheses if not constants_of(h.term) & local]
        start = z3.simplify(lemma.decided(self.prover, outer, store.start))
        begin, within = [], []
        for addend in _addends(start):
            names = constants_of(addend)
            if names & work and names & local:
                raise ir.UnsupportedIR("where the tile begins and where in it cannot be told apart")
            (begin if names & work else within).append(addend)
        offsets = self._offsets(store, within, hypotheses, local)
        axes, low = self._axes(store.tensor, offsets)
        # Also those that speak of shapes or of data alone: where they fail, tiles are left out.
        guards = [h.term for h in outer if h.kind in ("guard", "loop")]
        assumed = local_assumptions(hypotheses)
        given = tuple(h for h in outer if h.kind not in ("guard", "loop") and h.term.get_id() not in assumed)
        given += (Hypothesis("round", "loop", wave.const >= wave.start),)
        guard = lemma.decided(self.prover, given, conjunction(guards))  # claimed, so not supposed
        inner = tuple(h for h in hypotheses if constants_of(h.term) <= local)
        known = {id(h) for h in (*outer, *inner)}
        written = tuple(lemma.decided(self.prover, outer, h.term) for h in hypotheses if id(h) not in known)
        base = total(begin) + low
        return Work(site, store.tensor.name, base, axes, given, guard, block, wave, inner, written, start)

    def _offsets(
        self, store: Store, within: Sequence[z3.ArithRef], hypotheses: Sequence[Hypothesis], local: set[str]
    ) -> np.ndarray:
        """Return the places in the tile that the store writes, one for each thread and round."""
        indices = [i for i in store.site.scope.indices if i.const.decl().name() in local]
        sizes = [constant_of(i.extent) for i in indices]
        starts = [constant_of(i.start) for i in indices]
        points = 1
        for size in sizes:
            points *= size or MAX_LOCAL_POINTS + 1
        if not store.places or None in starts or points * len(store.places) > MAX_LOCAL_POINTS:
            raise ir.UnsupportedIR("threads and inner loops are too many to go through")
        grids = np.indices([s or 0 for s in sizes]).reshape(len(sizes), -1)
        values = {
            i.const.decl().name(): grid + (start or 0)
            for i, grid, start in zip(indices, grids, starts, strict=True)
        }
        mask = np.ones(points, dtype=bool)
        for hypothesis in hypotheses:
            if hypothesis.kind in ("guard", "loop") and constants_of(hypothesis.term) <= local:
                mask &= evaluate(hypothesis.term, values)
        offsets = np.broadcast_to(evaluate(total(within), values), (points,))[mask]
        return (offsets[:, None] + np.array(store.places)[None, :]).ravel()

    def _axes(self, tensor: ir.Buffer, offsets: np.ndarray) -> tuple[tuple[Axis, ...], int]:
        """Return the box that the offsets fill, and the offset of its first element.

        Raises:
            UnsupportedIR: they fill no box, or write an element twice.
        """
        low = int(offsets.min())
        places, box = offsets - low, []
        stride = 1
        extents = [self.context.encoder.term(e, Scope()) for e in tensor.shape]
        for extent in reversed(extents[1:]):
            size = constant_of(extent)
            if size is None:
                raise ir.UnsupportedIR(f"{tensor.name} has two symbolic dimensions")
            digits = places // stride % size
            box.append(Axis(extent, stride, int(digits.max()) + 1))
            stride *= size
        box.append(Axis(extents[0], stride, int((places // stride).max()) + 1))
        elements = 1
        for axis in box:
            elements *= axis.box
        if len(np.unique(places)) != len(places) or len(places) != elements:
            raise ir.UnsupportedIR("a tile is no box of which each element is written once")
        return tuple(reversed(box)), low


class _Checker:
    """Shows that the work items run through the tiles, each once."""

    def __init__(self, context: Context, prover: Prover, work: Work, claims: Claims) -> None:
        self.context = context
        self.prover = prover
        self.work = work
        self.claims = claims
        self.axes = [a for a in work.axes if constant_of(a.tiles) != 1]
        self.counts = [a.tiles for a in self.axes]

    def check(self) -> None:
        work = self.work
        blocks = constant_of(work.block.extent)
        if blocks is None or constant_of(work.wave.start) != 0:
            self._unknown("a grid of computed size, or rounds that do not begin at 0")
            return
        fits = []
        for sample in self._samples():
            fault, runs = self._concrete(sample, blocks)
            if fault is not None:
                self.claims.answers.append(fault)
                return
            fits.append(runs)
        for order in self._orders():
            if all(self._agrees(order, *runs) for runs in fits):
                self.claims.obligations += self._obligations(order, blocks)
                self.claims.notes.append(f"tiles of {work.tensor}: {order.text}")
                return
        self._unknown("the order of its tiles is none of those known")

    def _unknown(self, why: str) -> None:
        self.claims.unknown.append(Issue(self.work.site.span, f"tiles of {self.work.tensor}: {why}"))

    # ------------------------------------------------------------------ concrete shapes
    def _samples(self) -> list[dict[str, int]]:
        names = sorted(set().union(*(constants_of(a.extent) for a in self.work.axes)))
        box = self.work.axes[0].box
        found = []
        for factor in SAMPLES:
            values = dict.fromkeys(names, factor * box - factor % 2)
            given = [h.term for h in self.context.hypotheses if constants_of(h.term) <= set(names)]
            if all(bool(evaluate(t, values)) for t in given):
                found.append(values)
            if not names:
                break
        return found

    def _concrete(self, shape: dict[str, int], blocks: int) -> tuple[Answer | None, tuple]:
        """Return a tile that is not computed once at `shape`, if any, and who computes which."""
        work = self.work
        counts = [int(evaluate(c, shape)) for c in self.counts]
        tiles = int(np.prod(counts)) if counts else 1
        rounds = min(MAX_WORK_POINTS // blocks, -(-tiles // blocks) + 2)
        block, wave = np.indices((blocks, rounds)).reshape(2, -1)
        values = {**shape, work.block.const.decl().name(): block, work.wave.const.decl().name(): wave}
        runs = np.broadcast_to(evaluate(work.guard, values), block.shape)
        block, wave = block[runs], wave[runs]
        base = np.broadcast_to(evaluate(work.base, values), runs.shape)[runs]
        index, rest = np.zeros_like(base), base
        coordinates = []
        for axis, count in zip(self.axes, counts, strict=True):
            step = axis.stride * axis.box
            coordinates.append(rest // step)
            index = index * count + rest // step
            rest = rest % step
        inside = (rest == 0) & (index >= 0) & (index < tiles)
        for coordinate, count in zip(coordinates, counts, strict=True):
            inside &= (coordinate >= 0) & (coordinate < count)
        if not inside.all():
            at = int(np.argmin(inside))
            return self._fault("a block works on what is no tile", shape, block[at], wave[at], base[at]), ()
        times = np.bincount(index, minlength=tiles)
        if (times > 1).any():
            at = int(np.flatnonzero(times[index] > 1)[-1])
            return self._fault("a tile is computed twice", shape, block[at], wave[at], base[at]), ()
        if (times < 1).any():
            missing = int(np.argmin(times))
            return self._fault("a tile is computed by no block", shape, None, None, missing), ()
        return None, (block + wave * blocks, coordinates, counts)

    def _fault(
        self, what: str, shape: dict[str, int], block: int | None, wave: int | None, at: int
    ) -> Answer:
        work = self.work
        values = dict(shape)
        shown: dict[str, int | str] = {"buffer": work.tensor}
        if block is not None and wave is not None:
            values |= {work.block.const.decl().name(): int(block), work.wave.const.decl().name(): int(wave)}
            shown["element"] = int(at)
        else:
            shown["tile"] = int(at)
        obligation = Obligation(what, work.site.span, (), z3.BoolVal(False), shown, work.site)
        return Answer(obligation, Verdict.REFUTED, model=values, shown=shown)

    # ------------------------------------------------------------------ orders
    def _orders(self) -> list[Order]:
        if len(self.counts) < len(_PAIR):
            return [_ALONE]
        if len(self.counts) > len(_PAIR):
            return []
        orders = [_ROWS, _COLUMNS]
        for width, axis in product(GROUPS, range(len(_PAIR))):
            if (size := constant_of(self.counts[axis])) is not None and size % width == 0:
                orders.append(_grouped(width, axis))
        return orders

    def _agrees(self, order: Order, items: np.ndarray, coordinates: list, counts: list[int]) -> bool:
        expected = order.coordinates(items, counts)
        return all(np.array_equal(e, c) for e, c in zip(expected, coordinates, strict=True))

    def _obligations(self, order: Order, blocks: int) -> list[Obligation]:
        work, site = self.work, self.work.site
        item = work.wave.const * blocks + work.block.const
        tiles = self.counts[0] if self.counts else z3.IntVal(1)
        for count in self.counts[1:]:
            tiles = tiles * count
        runs = Hypothesis("the round takes place", "guard", work.guard)
        begins = z3.IntVal(0)
        for coordinate, axis in zip(order.coordinates(item, self.counts), self.axes, strict=True):
            begins = begins + coordinate * (axis.stride * axis.box)
        numbered = self.context.encoder.constant("item")
        within = Hypothesis("an item", "loop", z3.And(numbered >= 0, numbered < tiles))
        outer = [h for h in work.given if work.wave.const.decl().name() not in constants_of(h.term)]
        outer = [h for h in outer if work.block.const.decl().name() not in constants_of(h.term)]
        chosen = [(work.block.const, numbered % blocks), (work.wave.const, numbered / blocks)]
        taken = z3.substitute(work.guard, *chosen)
        show = {"buffer": work.tensor, "block": work.block.const, "round": work.wave.const}
        return [
            Obligation(
                "every round that takes place has a tile",
                site.span,
                (*work.given, runs),
                z3.And(item >= 0, item < tiles),
                show,
                site,
            ),
            Obligation(
                "every tile has a round that takes place",
                site.span,
                (*outer, within),
                taken,
                {"buffer": work.tensor, "item": numbered},
            ),
            Obligation(
                "a round works on the tile of its number",
                site.span,
                (*work.given, runs),
                work.base == begins,
                show,
                site,
            ),
            *self._edge(runs),
            *self._bijective(order, numbered, (*outer, within)),
        ]

    def _edge(self, runs: Hypothesis) -> list[Obligation]:
        """Return that of a tile just those elements are written that the tensor has."""
        work = self.work
        first, rest = work.axes[0], work.axes[1:]
        for axis in rest:
            size = constant_of(axis.extent)
            if size is None or size % axis.box:
                raise ir.UnsupportedIR("tiles that end beyond the tensor in a dimension but the first")
        if not work.written:
            return []  # all of them; that they lie inside is property bounds
        inside = work.element < first.extent * first.stride
        what = "of a tile just those elements are written that lie in the tensor"
        given = (*work.given, runs, *work.within)
        goal = conjunction(list(work.written)) == inside
        # Linear once the tile's coordinates are values of their own, whatever they are computed from.
        terms, ranges = generalised([z3.simplify(t) for t in (*(h.term for h in given), goal)])
        wider = tuple(Hypothesis(h.label, h.kind, t) for h, t in zip(given, terms, strict=False))
        wider += tuple(Hypothesis("a coordinate", "loop", r) for r in ranges)
        if ranges and lemma.holds(self.prover, wider, terms[-1]):
            given, goal = wider, terms[-1]
        return [Obligation(what, work.site.span, given, goal, {"buffer": work.tensor}, work.site)]

    def _bijective(self, order: Order, item: z3.ArithRef, given: tuple[Hypothesis, ...]) -> list[Obligation]:
        """Return that the order runs through all tiles: there are as many, and each tells its number."""
        if len(self.counts) < len(_PAIR):
            return []
        at = order.coordinates(item, self.counts)
        inside = [z3.And(c >= 0, c < n) for c, n in zip(at, self.counts, strict=True)]
        what, span = "the order of tiles is one to one", self.work.site.span
        return [
            Obligation(what, span, given, conjunction(inside)),
            Obligation(what, span, given, order.number(at, self.counts) == item),
        ]
