"""Where the compiler puts the elements of tile buffers, tabulated point by point and nothing assumed.

Unlike `layouts`, which refuses what is not injective, this keeps whatever a layout says, so that the
property `layout` can say what is wrong with it.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from verify import ir, parse
from verify.extract import Extracted
from verify.ir import UnsupportedIR
from verify.layouts import grid
from verify.refine.evaluate import Evaluator
from verify.refine.sym import Algebra, const

_CACHED = 512  # layouts remembered by their text: buffers and variants repeat them


@dataclass(frozen=True)
class Placement:
    """A layout, tabulated.

    Attributes:
        shape: of its inputs; for a fragment without the replica.
        out_shape: of the memory, or of the thread's array.
        position: flat position of each element in `out_shape`, a row per replica.
        within: whether each coordinate of the position is inside `out_shape`.
        thread: threadIdx.x that holds each element, None for shared memory.
        threads: the threads (first, end) that the fragment is declared for.
    """

    shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    position: np.ndarray
    within: np.ndarray
    thread: np.ndarray | None = None
    threads: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        """Positions that the layout may use."""
        return prod(self.out_shape)

    @property
    def replicas(self) -> int:
        """Copies of each element."""
        return len(self.position)

    def index(self, element: int) -> tuple[int, ...]:
        """Return the index of a flat element."""
        return tuple(int(i) for i in np.unravel_index(element, self.shape))

    def slots(self) -> np.ndarray:
        """Return one number for the place of each element: position, and thread for a fragment."""
        if self.thread is None:
            return self.position
        return self.thread * self.size + self.position

    def collision(self) -> tuple[int, int] | None:
        """Return two different elements in one place."""
        slots = self.slots()
        elements = np.broadcast_to(np.arange(slots.shape[1]), slots.shape).ravel()
        order = np.argsort(slots.ravel(), kind="stable")
        slots, elements = slots.ravel()[order], elements[order]
        same = np.flatnonzero((slots[1:] == slots[:-1]) & (elements[1:] != elements[:-1]))
        return (int(elements[same[0]]), int(elements[same[0] + 1])) if len(same) else None

    def idle_replica(self) -> int | None:
        """Return an element two of whose replicas are one place."""
        slots = np.sort(self.slots(), axis=0)
        if len(slots) == 1:
            return None
        same = np.flatnonzero((slots[1:] == slots[:-1]).any(axis=0))
        return int(same[0]) if len(same) else None

    def element_at(self, position: np.ndarray) -> np.ndarray:
        """Return the flat element of a shared layout at each position, -1 where there is none."""
        good = (position >= 0) & (position < self.size)
        return np.where(good, self._elements[np.where(good, position, 0)], -1)

    @cached_property
    def _elements(self) -> np.ndarray:
        table = np.full(self.size, -1, dtype=np.int64)
        inside = self.within[0]
        table[self.position[0][inside]] = np.arange(self.position.shape[1])[inside]
        return table


_TABLES: dict[str, Placement] = {}


def tabulate(layout: Any) -> Placement:
    """Return a compiler's Layout or Fragment as a table.

    Raises:
        UnsupportedIR: its domain is too large to enumerate or its expressions have no meaning here.
    """
    fields = [layout, *map(str, (layout.get_input_shape(), layout.get_output_shape()))]
    fields += [layout.get_forward_vars(), layout.get_forward_index()]
    if hasattr(layout, "forward_thread"):
        fields += [layout.forward_thread, layout.replicate_size, layout.thread_range]
    text = " | ".join(map(str, fields))
    if text not in _TABLES:
        if len(_TABLES) >= _CACHED:
            _TABLES.clear()
        _TABLES[text] = _compute(layout)
    return _TABLES[text]


def _compute(layout: Any) -> Placement:
    shape = tuple(int(s) for s in layout.get_input_shape())
    out_shape = tuple(int(s) for s in layout.get_output_shape())
    inputs = tuple(layout.get_forward_vars())
    is_fragment = hasattr(layout, "forward_thread")
    replicas = int(layout.replicate_size) if is_fragment else 1
    has_replica = len(inputs) == len(shape) + 1
    if replicas > 1 and not has_replica:
        raise UnsupportedIR("replicated fragment without a replica coordinate")
    points = grid((replicas, *shape))
    exprs = [layout.forward_thread] if is_fragment else []
    exprs += layout.get_forward_index()
    values = evaluate(exprs, inputs, points if has_replica else points[1:])
    values = [_rows(v, replicas) for v in values]
    index = values[1:] if is_fragment else values
    position = np.zeros_like(index[0])
    within = np.ones(index[0].shape, dtype=bool)
    for value, extent in zip(index, out_shape, strict=True):
        position = position * extent + value
        within &= (value >= 0) & (value < extent)
    if not is_fragment:
        return Placement(shape, out_shape, position, within)
    given = layout.thread_range
    first = int(given.min) if given is not None else 0
    end = first + int(given.extent if given is not None else layout.get_thread_size())
    return Placement(shape, out_shape, position, within, values[0] + first, (first, end))


def _rows(values: np.ndarray, replicas: int) -> np.ndarray:
    return values.reshape(replicas, -1)


def evaluate(
    exprs: list[Any], inputs: tuple[Any, ...], coordinates: tuple[np.ndarray, ...]
) -> list[np.ndarray]:
    """Return the values of a compiler's index expressions at points of its inputs.

    Raises:
        UnsupportedIR: an expression has no meaning here.
    """
    names = tuple(ir.Var(ir.INT32, f"i{k}") for k in range(len(inputs)))
    env = {v: const(c) for v, c in zip(names, coordinates, strict=True)}
    evaluator = Evaluator(Algebra(), env)
    found = []
    for expr in parse.parse_layout_index(exprs, inputs, names):
        value = evaluator.int(expr)
        if not value.is_constant:
            raise UnsupportedIR("layout over more than its own index")
        found.append(np.broadcast_to(np.asarray(value.constant, dtype=np.int64), coordinates[0].shape))
    return found


def inverse_differs(layout: Any, placement: Placement) -> int | None:
    """Return a flat element that the compiler's inverse takes elsewhere; None where it agrees.

    Raises:
        ValueError: the compiler has no inverse of this layout (it inverts affine maps only).
    """
    try:
        inverse = layout.inverse()
    except Exception as error:
        raise ValueError("no inverse") from error
    places = [p.ravel() for p in np.unravel_index(placement.position.ravel(), placement.out_shape)]
    if placement.thread is not None:
        assert placement.threads is not None, "a fragment has threads"
        places.append(placement.thread.ravel() - placement.threads[0])
    inputs = tuple(inverse.get_forward_vars())
    if len(inputs) != len(places):
        raise ValueError("inverse of another form")
    back = evaluate(list(inverse.get_forward_index()), inputs, tuple(places))
    count = placement.position.shape[1]
    wanted = [np.tile(c, placement.replicas) for c in grid(placement.shape)]
    if placement.thread is not None:
        wanted.append(np.repeat(np.arange(placement.replicas), count))
    same = np.ones(placement.position.size, dtype=bool)
    for got, want in zip(back, wanted, strict=True):
        same &= got == want
    bad = np.flatnonzero(~same)
    return int(bad[0] % count) if len(bad) else None


@dataclass(frozen=True)
class Placed:
    """A buffer of the block and where it is.

    Attributes:
        tile: as the author declared it; None for what the compiler added.
        lowered: as it is allocated after tile operations were lowered.
    """

    name: str
    tile: ir.Buffer | None
    lowered: ir.Buffer | None
    placement: Placement
    layout: Any


def read_placements(extracted: Extracted) -> list[Placed]:
    """Return every layout that is in force after lowering, one for each storage variable.

    Raises:
        UnsupportedIR: as `tabulate`.
    """
    tile, lowered = _allocated(extracted.tile), _allocated(extracted.lowered)
    layouts: dict[ir.Var, Any] = {}
    for node in ir.walk(extracted.lowered.body):
        if isinstance(node, ir.Block):
            layouts |= node.layouts
    placed = []
    for var, layout in layouts.items():
        placement = tabulate(layout)
        own, after = tile.get(var.name, []), lowered.get(var.name, [])
        if len(own) > 1:
            pair = _meant(own, after, placement)
        else:
            pair = own[0] if own else None, after[-1] if after else None
        placed.append(Placed(var.name, *pair, placement, layout))
    return placed


def _allocated(function: ir.Function) -> dict[str, list[ir.Buffer]]:
    """Return the buffers of a stage by name, in the order of the text."""
    found: dict[str, list[ir.Buffer]] = {}
    for node in ir.walk(function.body):
        if isinstance(node, ir.Block):
            for buffer in node.allocs:
                found.setdefault(buffer.name, []).append(buffer)
    return found


def _meant(own: list[ir.Buffer], after: list[ir.Buffer], placement: Placement) -> tuple[ir.Buffer, ir.Buffer]:
    """Return which of the author's buffers of one name, in scopes of their own, a layout is of.

    Lowering keeps their order, so that each is known again behind it.

    Raises:
        UnsupportedIR: several could be meant.
    """
    if len(own) != len(after):
        raise UnsupportedIR(f"which of the buffers {own[0].name} a layout is of")
    fit = [(a, b) for a, b in zip(own, after, strict=True) if _extents(a) == placement.shape]
    if len({(a.dtype, a.scope, b.dtype, _extents(b)) for a, b in fit}) != 1:
        raise UnsupportedIR(f"which of the buffers {own[0].name} a layout is of")
    return fit[0]


def _extents(buffer: ir.Buffer) -> tuple[object, ...]:
    return tuple(e.value if isinstance(e, ir.Const) else e for e in buffer.shape)
