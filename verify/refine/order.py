"""Statements in one loop of the device: each takes its turn in every round.

Step by step all points of a statement are compared as if those of the statement before it were through.
Where one loop of the device holds several, that is so only of points that no later round is needed for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.device import Site
from verify.refine.frame import SitePoints
from verify.refine.handover import reads
from verify.refine.model import Model
from verify.refine.tile import Assign, Step


@dataclass(frozen=True)
class Turn:
    """When a site is at an element: of each of its points the element, the thread and the round."""

    site: Site
    element: np.ndarray
    thread: np.ndarray
    points: SitePoints


def shared_loops(step: Step, one: Site, other: Site) -> list[ir.For]:
    """Return the loops around both sites that play no loop of the tile program, outermost first."""
    own = {loop.var.name for loop in step.loops}
    bodies = {id(loop.body) for loop in other.loops}
    return [loop for loop in one.loops if id(loop.body) in bodies and loop.var.name not in own]


def rounds(points: SitePoints, loops: Sequence[ir.For]) -> np.ndarray:
    """Return, for each point, the number of the round of nested `loops` that it is in."""
    found = np.zeros(points.points.count, dtype=np.int64)
    for loop in loops:
        if not isinstance(loop.extent, ir.Const) or loop.var not in points.env:
            raise UnsupportedIR(f"device loop {loop.var.name} of symbolic range")
        # Where a loop starts is the same for all, and only what comes before what matters.
        found = found * int(loop.extent.value) + np.asarray(points.env[loop.var].constant)
    return found


def in_order(before: np.ndarray, early: np.ndarray, after: np.ndarray, late: np.ndarray) -> bool:
    """Return whether of each key the last round in `early` is no later than the first in `late`.

    Args:
        before: keys of what comes first in a round.
        early: rounds of those.
        after: keys of what comes behind it.
        late: rounds of those.
    """
    keys, inverse = np.unique(np.concatenate([before, after]), return_inverse=True)
    inverse = inverse.reshape(-1)
    last = np.full(len(keys), np.iinfo(np.int64).min)
    first = np.full(len(keys), np.iinfo(np.int64).max)
    np.maximum.at(last, inverse[: len(before)], early)
    np.minimum.at(first, inverse[len(before) :], late)
    return bool((last <= first).all())


def taking_turns(model: Model, sites: dict[int, list[Site]]) -> frozenset[int]:
    """Return the numbers of the steps that use each other's elements in a loop of the device."""
    return frozenset(n for pair in _pairs(model, sites) for n in pair)


def _pairs(model: Model, sites: dict[int, list[Site]]) -> Iterator[tuple[int, int]]:
    groups: dict[tuple[int, ...], list[Assign]] = {}
    for step in model.tile.steps:
        if isinstance(step, Assign) and step.coordinates:
            groups.setdefault(tuple(id(v) for v, _ in step.coordinates), []).append(step)
    for steps in groups.values():
        for a, b in combinations(steps, 2):
            loops = any(shared_loops(a, x, y) for x in sites[a.number] for y in sites[b.number])
            if loops and _common(a, b):
                yield a.number, b.number


def _common(a: Step, b: Step) -> set[ir.Var]:
    """Return the storages that one of two steps writes and the other uses."""
    return ({a.dst.data} & (reads(b) | {b.dst.data})) | ({b.dst.data} & reads(a))


def check_order(model: Model, sites: dict[int, list[Site]], turns: dict[int, list[Turn]]) -> None:
    """Check that steps in one loop of the device come to each element in the order of the tile program.

    Raises:
        UnsupportedIR: an earlier step may come to an element in a later round.
    """
    steps = {step.number: step for step in model.tile.steps}
    for a, b in _pairs(model, sites):
        # A thread has registers of its own, but others see what it writes elsewhere.
        storages = [model.tile_storage[data] for data in _common(steps[a], steps[b])]
        is_own = all(s.fragment is not None or s.private for s in storages)
        for one in turns.get(a, ()):
            for other in turns.get(b, ()):
                loops = shared_loops(steps[a], one.site, other.site)
                top = int(max(one.thread.max(initial=0), other.thread.max(initial=0))) + 1
                keys = [t.element * top + t.thread if is_own else t.element for t in (one, other)]
                times = [rounds(t.points, loops) for t in (one, other)]
                if loops and not in_order(keys[0], times[0], keys[1], times[1]):
                    raise UnsupportedIR(f"{steps[b].what} comes to an element before {steps[a].what} does")
