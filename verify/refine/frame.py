"""The loops around a step, and the finite points of a device site."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from verify import ir
from verify.encode import Hypothesis
from verify.ir import UnsupportedIR
from verify.layouts import grid
from verify.ops import WARP_THREADS
from verify.refine.device import Guard, Site
from verify.refine.evaluate import Cond, Evaluator
from verify.refine.keys import device_place
from verify.refine.model import Model, Place, Points
from verify.refine.sym import Atom, Sym, const
from verify.refine.tile import Loop, Step

LANE = "lane"  # name of the coordinate within a vector


@dataclass
class Frame:
    """The loops around a step: which counters are symbols and which are enumerated.

    Attributes:
        symbols: counter -> symbol, for those that stay symbolic.
        enumerated: loops whose counters become coordinates.
    """

    symbols: dict[str, Sym]
    enumerated: tuple[Loop, ...]
    facts: tuple[Hypothesis, ...]
    step: Step
    model: Model

    @classmethod
    def of(cls, model: Model, step: Step, names: frozenset[str]) -> "Frame":
        """Set up the loops of `step`, enumerating the counters in `names`.

        Raises:
            UnsupportedIR: a counter to enumerate has a symbolic range.
        """
        symbols: dict[str, Sym] = {}
        facts: tuple[Hypothesis, ...] = ()
        enumerated = []
        for loop in step.loops:
            if loop.var.name in symbols or loop.var.name in {e.var.name for e in enumerated}:
                raise UnsupportedIR(f"nested loops over {loop.var.name}")
            if loop.var.name in names:
                if not isinstance(loop.start, ir.Const) or not isinstance(loop.extent, ir.Const):
                    raise UnsupportedIR(f"loop {loop.var.name} of symbolic range")
                enumerated.append(loop)
                continue
            symbols[loop.var.name], fact = model.loop_symbol(loop)
            facts += fact
        if not names <= {e.var.name for e in enumerated}:
            raise UnsupportedIR("register number depends on a block index or shape")
        return cls(symbols, tuple(enumerated), facts, step, model)

    def stage(self, stages: int, values: dict[str, np.ndarray]) -> Sym:
        """Return the pipeline stage in use at this step, for a buffer with `stages` of them."""
        if stages == 1:
            return const(0)
        loop = next((x for x in reversed(self.step.loops) if x.stages > 1), None)
        if loop is None:
            raise UnsupportedIR(f"{self.step.what}: several stages outside a pipelined loop")
        name = loop.var.name
        counter = self.symbols[name] if name in self.symbols else const(values[name])
        start = Evaluator(self.model.algebra, self.model.tile_env).int(loop.start)
        return self.model.algebra.floormod(counter - start, stages)


@dataclass
class SitePoints:
    """A site with the coordinates at which it is active.

    Attributes:
        guard: what else has to hold at each point.
        place: where reads inside indices land, at given points.
        more: conditions besides the site's guards.
    """

    site: Site
    points: Points
    env: dict[ir.Var, Sym]
    guard: Cond
    place: Callable[[Points], Place]
    more: Callable[["SitePoints"], Cond] | None = None

    @property
    def lane(self) -> Sym | None:
        """The lane coordinate, if there is one."""
        return const(self.points.values[LANE]) if LANE in self.points.values else None

    def take(self, model: Model, rows: np.ndarray) -> "SitePoints":
        """Return the points in `rows`."""
        points = self.points.take(rows)
        env = {v: s.take(rows) for v, s in self.env.items()}
        guard = self.guard
        if guard.literals:
            kept = tuple(g for g in self.site.guards if not _elects(g))
            guard = model.guard(self._evaluator(model, points, env), kept)
        taken = replace(self, points=points, env=env, guard=guard.without_mask())
        if self.more is not None and guard.literals:
            taken.guard = (taken.guard & self.more(taken)).without_mask()
        return taken

    def evaluator(self, model: Model) -> Evaluator:
        """Return an evaluator of device expressions at the points."""
        return self._evaluator(model, self.points, self.env)

    def _evaluator(self, model: Model, points: Points, env: dict[ir.Var, Sym]) -> Evaluator:
        lane = const(points.values[LANE]) if LANE in points.values else None
        return model.evaluator("device", env, lane, self.place(points))

    def restricted(self, model: Model, more: Callable[["SitePoints"], Cond]) -> "SitePoints":
        """Return the points at which `more` holds besides; what it says of symbols joins the guard."""
        held = more(self)
        kept = replace(self, guard=self.guard & held.without_mask(), more=more)
        active = held.active(self.points.count)
        return kept if active.all() else kept.take(model, np.flatnonzero(active))


def _elects(guard: Guard) -> bool:
    return isinstance(guard.cond, ir.Call) and guard.cond.op == "tl_shuffle_elect"


def expand_site(
    model: Model,
    frame: Frame,
    site: Site,
    extra: dict[str, int],
    *,
    threads: bool = True,
    owned: bool = False,
) -> SitePoints:
    """Enumerate threads, local loops and `extra` coordinates of a site where its guards can hold.

    Args:
        model: the kernel.
        frame: loops around the step.
        site: statement of the device.
        extra: more coordinates, with their sizes.
        threads: one thread for each; else one is elected for all.
        owned: the step is of the thread, which reads its own copy of what is private.

    Raises:
        UnsupportedIR: a local loop has a symbolic range.
    """
    axes: list[tuple[str, ir.Var | None, int, int]] = []
    if threads:
        axes.append(("threadIdx.x", model.device.launch["threadIdx.x"][0], 0, model.threads))
    env: dict[ir.Var, Sym] = {}
    wanted = {loop.var.name: loop for loop in frame.step.loops}
    for loop in site.loops:
        own = wanted.pop(loop.var.name, None)
        if own is not None:
            _same_range(model, own, loop)
            if own.var.name in frame.symbols:
                env[loop.var] = frame.symbols[own.var.name]
                continue
        if not isinstance(loop.start, ir.Const) or not isinstance(loop.extent, ir.Const):
            raise UnsupportedIR(f"device loop {loop.var.name} of symbolic range")
        name = loop.var.name if own is not None else f"device {loop.var.name}"
        if any(name == other for other, *_ in axes):
            raise UnsupportedIR(f"nested device loops over {loop.var.name}")
        axes.append((name, loop.var, int(loop.start.value), int(loop.extent.value)))
    if missing := [name for name, loop in wanted.items() if not loop.is_one_round]:
        raise UnsupportedIR(f"{frame.step.what}: loop over {', '.join(missing)} has no device loop")
    axes += [(name, None, 0, size) for name, size in extra.items()]
    coordinates = grid(tuple(size for *_, size in axes))
    count = len(coordinates[0]) if coordinates else 1
    columns = {name: c + start for (name, _, start, _), c in zip(axes, coordinates, strict=True)}
    points = Points(count, columns)
    guards = site.guards if threads else _issued(model, site.guards)

    def place(points: Points) -> Place:
        ids = points.values["threadIdx.x"] if threads else None
        return device_place(
            model, ids, const(ids - shift(model, site)) if owned and ids is not None else None
        )

    evaluator = model.evaluator("device", env | _columns(axes, points), place=place(points))
    guard = model.guard(evaluator, guards)
    rows = np.flatnonzero(guard.active(points.count))
    points = points.take(rows)
    env |= _columns(axes, points)
    if len(rows) < count and guard.literals:
        guard = model.guard(model.evaluator("device", env, place=place(points)), guards)
    return SitePoints(site, points, env, guard.without_mask(), place)


def shift(model: Model, site: Site) -> int:
    """Return the device's number of the tile program's thread 0 where `site` runs.

    A specialised producer comes first and the threads of the tile program follow.
    """
    own = model.tile.launch.get("threadIdx.x")
    count = int(own[1].value) if own is not None and isinstance(own[1], ir.Const) else model.threads
    return 0 if site.role == "producer" else model.threads - count


def _issued(model: Model, guards: tuple[Guard, ...]) -> tuple[Guard, ...]:
    """Return the guards that do not choose a thread, after checking that some thread is chosen.

    Raises:
        UnsupportedIR: the guards may leave no thread to issue the operation.
    """
    var, _ = model.device.launch["threadIdx.x"]
    rest, groups = [], []
    chosen = np.ones(model.threads, dtype=bool)
    env = {var: const(np.arange(model.threads))}
    for guard in guards:
        if isinstance(guard.cond, ir.Call) and guard.cond.op == "tl_shuffle_elect" and guard.holds:
            size = int(guard.cond.args[0].value) or model.threads  # type: ignore[attr-defined]
            groups.append(-(-size // WARP_THREADS) * WARP_THREADS)
        elif any(e is var for e in ir.walk(guard.cond)):
            cond = model.guard(model.evaluator("device", env), (guard,))
            if cond.literals:
                raise UnsupportedIR("a thread is chosen by a symbolic condition")
            chosen &= cond.active(model.threads)
        else:
            rest.append(guard)
    # A lane of the first warp of each group is elected, once all of that warp have come there. The last
    # group may be cut short: 256 of the consumers' threads end in the middle of one.
    size = max(groups, default=1)
    warps = [chosen[first : first + min(size, WARP_THREADS)] for first in range(0, len(chosen), size)]
    if len(groups) > 1 or not any(len(w) == min(size, WARP_THREADS) and w.all() for w in warps):
        raise UnsupportedIR("no thread is sure to issue the operation")
    return tuple(rest)


def _columns(axes: list[tuple[str, ir.Var | None, int, int]], points: Points) -> dict[ir.Var, Sym]:
    return {var: const(points.values[name]) for name, var, _, _ in axes if var is not None}


def _same_range(model: Model, own: Loop, loop: ir.For) -> None:
    tile, device = model.evaluator("tile", {}), model.evaluator("device", {})
    pairs = ((own.start, loop.start), (own.extent, loop.extent))
    if any(tile.int(a).key != device.int(b).key for a, b in pairs):
        raise UnsupportedIR(f"loop over {own.var.name} has another range on the device")


Orders = dict[int, tuple[np.ndarray, np.ndarray]]  # address of an array -> itself, and what sorts it


def join(own: list[Sym], other: list[Sym], n: int, m: int, orders: Orders | None = None) -> np.ndarray:
    """Return for each of m device points the tile point with equal columns, -1 where there is none.

    Args:
        own: columns of the tile points.
        other: those of the device points.
        n: how many tile points.
        m: how many device points.
        orders: kept by a caller that joins the same tile points again.

    Raises:
        UnsupportedIR: two tile points have equal columns: the statement writes an element twice.
    """
    left, right, kept = [], [], None
    for a, b in zip(own, other, strict=True):
        inner = inner_columns(a), inner_columns(b)
        if inner[0] and inner[1] and inner[0].keys() == inner[1].keys():  # an address that data decides
            for name in inner[0]:
                left += [np.broadcast_to(x, (n,)) for x in inner[0][name]]
                right += [np.broadcast_to(y, (m,)) for y in inner[1][name]]
            continue
        for monomial in _monomials((a, b)):
            x, y = a.terms.get(monomial, 0), b.terms.get(monomial, 0)
            if not isinstance(x, np.ndarray) and not isinstance(y, np.ndarray) and x == y:
                continue
            kept = x if isinstance(x, np.ndarray) else None
            left.append(np.broadcast_to(x, (n,)))
            right.append(np.broadcast_to(y, (m,)))
    if not left:
        left, right = [np.zeros(n, dtype=np.int64)], [np.zeros(m, dtype=np.int64)]
    if len(left) == 1:
        a, b = left[0], right[0]
    else:
        both = np.concatenate([np.stack(left, axis=1), np.stack(right, axis=1)])
        _, inverse = np.unique(both, axis=0, return_inverse=True)
        inverse = inverse.reshape(-1)
        a, b = inverse[:n], inverse[n:]
    if len(left) == 1 and kept is not None and orders is not None:
        if id(kept) not in orders:
            orders[id(kept)] = (kept, np.argsort(a, kind="stable"))
        order = orders[id(kept)][1]
    else:
        order = np.argsort(a, kind="stable")
    ordered = a[order]
    if (ordered[1:] == ordered[:-1]).any():
        raise UnsupportedIR("a statement writes one element more than once")
    position = np.minimum(np.searchsorted(ordered, b), n - 1)
    return np.where(ordered[position] == b, order[position], -1)


def _monomials(values: Iterable[Sym]) -> list:
    return list(dict.fromkeys(m for v in values for m in v.terms))


def inner_columns(value: Sym) -> dict[str, list]:
    """Return every coefficient in `value` and inside its atoms, by monomial; nothing if none varies inside.

    Two values with the same monomials and coefficients are one expression at those points.
    """
    columns: dict[str, list] = {}
    varies = False
    for monomial, coefficient in value.terms.items():
        texts, found = [], [coefficient]
        for atom in monomial:
            text, inner = _shape_of(atom)
            varies |= any(isinstance(c, np.ndarray) for c in inner)
            texts.append(text)
            found += inner
        name = "*".join(texts)
        if name in columns:  # two reads of one shape: which is which is not told apart
            return {}
        columns[name] = found
    return columns if varies else {}


def _shape_of(atom: Atom) -> tuple[str, list]:
    if not any(isinstance(arg, Sym) for arg in atom.args):
        return f"{atom.kind}#{atom.number}", []
    texts, found = [], []
    for arg in atom.args:
        if not isinstance(arg, Sym):
            texts.append(repr(arg))
            continue
        parts = []
        for monomial, coefficient in arg.terms.items():
            shapes = [_shape_of(a) for a in monomial]
            parts.append(
                ("*".join(t for t, _ in shapes), [coefficient, *(c for _, cs in shapes for c in cs)])
            )
        parts.sort(key=lambda part: part[0])
        texts.append("+".join(t for t, _ in parts))
        found += [c for _, cs in parts for c in cs]
    return f"{atom.kind}({','.join(texts)})", found
