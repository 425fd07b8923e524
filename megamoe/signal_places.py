"""Which elements of the rings and combine buffers a task writes: all of its own, once each, and no others.

An element is a task's base, which follows from the plan, and what the thread and the rounds of inner loops
add to it. The solvers prove that split; what is added is a function of numbers with known bounds, of which
all values are looked at.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import z3

from megamoe import schedule
from megamoe.config import Config
from megamoe.ring import every, given
from megamoe.role_events import BLOCK, THREAD, Event, Followed, names
from megamoe.schedule import Kind
from megamoe.signal_follow import Signal
from megamoe.signal_rounds import Nest, Plan, Task
from megamoe.weights import GROUP_N, TILE_N
from verify.ir import UnsupportedIR
from verify.solve import Obligation

_SCALED = 128  # channels of a scale
_TARGETS = "row_target[]"


@dataclass(frozen=True)
class Region:
    """What a task writes of a tensor.

    Attributes:
        kind: of the task.
        base: element that others are counted from.
        elements: all of them, from the base on.
    """

    kind: Kind
    base: z3.ArithRef
    elements: np.ndarray


def regions(plan: Plan, task: Task) -> Mapping[str, Region]:
    """Return what tasks write of each ring."""
    c, g = plan.config, plan.config.geometry
    rows, part = c.block_m, c.part_rows
    x = plan.rank * g.x_ring + schedule.x_slot(g, task.block)
    h = plan.rank * g.h_ring + schedule.h_slot(g, task.block)
    scales = c.hidden // _SCALED
    return {
        "x_ring": Region(Kind.DISPATCH, (x * rows + task.part * part) * c.hidden, np.arange(part * c.hidden)),
        "x_ring_scale": Region(
            Kind.DISPATCH,
            x * (scales * rows) + task.part * part,
            (np.arange(scales)[:, None] * rows + np.arange(part)).ravel(),
        ),
        "h_ring": Region(
            Kind.LINEAR1,
            h * (rows * c.inter) + task.part * GROUP_N,
            (np.arange(rows)[:, None] * c.inter + np.arange(GROUP_N)).ravel(),
        ),
        "h_ring_scale": Region(Kind.LINEAR1, (h * (c.inter // _SCALED) + task.part) * rows, np.arange(rows)),
    }


def ring_writes(nest: Nest, tensor: str, puts: Sequence[Event]) -> Iterator[Obligation]:
    """A task's writes of a ring are the elements of its place in it, each once."""
    region = regions(nest.plan, nest.task)[tensor]
    seen = []
    for put in puts:
        more = added(put, put.first, region.base)
        yield from _split(nest, put, region.kind, [(put.first, region.base + more)])
        (found,) = values(nest.found, put, [more])
        seen.append((found[:, None] + np.arange(put.value)).ravel())
    same = bool(seen) and np.array_equal(np.sort(np.concatenate(seen)), np.sort(region.elements))
    what = f"{nest.name}: all elements of its place in {tensor} are written, each once"
    yield Obligation(what, None, (), z3.BoolVal(same))


def row_writes(nest: Nest, tensor: str, puts: Sequence[Event]) -> Iterator[Obligation]:
    """A linear 2 writes its tile's channels of each of its rows' targets, each once."""
    c, task = nest.plan.config, nest.task
    own = (nest.plan.rank * c.pool_blocks + task.block) * c.block_m
    seen = []
    for put in puts:
        target = _target(put)
        first = z3.substitute(put.first, (target, z3.Int("target")))
        base = z3.Int("target") * c.hidden + task.part * TILE_N
        row, channel = added(put, target.arg(0), own), added(put, first, base)
        wanted = z3.substitute(base, (z3.Int("target"), target)) + channel
        yield from _split(
            nest, put, Kind.LINEAR2, [(target.arg(0), own + row), (put.first, wanted)], target >= 0
        )
        rows, channels = values(nest.found, put, [row, channel])
        seen.append((rows[:, None] * TILE_N + channels[:, None] + np.arange(put.value)).ravel())
    same = bool(seen) and np.array_equal(np.sort(np.concatenate(seen)), np.arange(c.block_m * TILE_N))
    what = f"{nest.name}: all channels of its tile in {tensor} are written of each row, once each"
    yield Obligation(what, None, (), z3.BoolVal(same))


def _target(put: Event) -> z3.ArithRef:
    """Return the row that a write's place hangs on."""
    found, todo = {}, [put.first]
    while todo:
        term = todo.pop()
        todo += term.children()
        if z3.is_app(term) and term.decl().name() == _TARGETS:
            found[term.get_id()] = term
    if len(found) != 1:
        raise UnsupportedIR(f"a write of {put.what} that hangs on {len(found)} rows")
    return next(iter(found.values()))


# --------------------------------------------------------------------------- what is added to a base
_NEST = 2  # loops over segments and turns, around what a task does


def _lanes(put: Event, outer: int) -> set[str]:
    return {str(THREAD), *(str(loop.var) for loop in put.loops[outer:])}


def _at_zero(put: Event, term: z3.ExprRef, outer: int) -> z3.ExprRef:
    """Return a term with all that follows from the plan, the CTA or the round put to zero."""
    keep, zero, found, todo = _lanes(put, outer), z3.IntVal(0), [], [term]
    while todo:
        inner = todo.pop()
        if z3.is_app(inner) and inner.decl().kind() == z3.Z3_OP_UNINTERPRETED:
            if inner.num_args() or str(inner) not in keep:
                found.append((inner, zero))
        else:
            todo += inner.children()
    return z3.simplify(z3.substitute(term, *found)) if found else z3.simplify(term)


def added(put: Event, term: z3.ArithRef, base: z3.ArithRef, outer: int = _NEST) -> z3.ArithRef:
    """Return what a write's thread and its rounds of loops inside the `outer` ones add to a base."""
    return z3.simplify(_at_zero(put, term, outer) - _at_zero(put, base, outer))


def of_lanes(put: Event, outer: int = _NEST) -> tuple[list[z3.BoolRef], list[z3.BoolRef]]:
    """Return a write's conditions: on the thread and on inner rounds alone, and others."""
    keep, lanes, others = _lanes(put, outer), [], []
    for term in put.path:
        plain = z3.eq(_at_zero(put, term, outer), z3.simplify(term)) and names(term) <= keep
        (lanes if plain else others).append(term)
    return lanes, others


def _split(
    nest: Nest,
    put: Event,
    kind: Kind,
    equal: Sequence[tuple[z3.ArithRef, z3.ArithRef]],
    unless: z3.BoolRef | None = None,
) -> Iterator[Obligation]:
    """A write happens for each of its lanes if the task is of the kind, and its place is the sum."""
    if put.elected:
        raise UnsupportedIR(f"{nest.name}: one lane writes {put.what} for others")
    task, (lanes, others) = nest.task, of_lanes(put)
    when = (task.of(kind),) if unless is None else (task.of(kind), unless)
    in_range = nest.plan.roles.in_range(*others, *(a for a, _ in equal), *when)
    known = (*nest.known(), *given(*put.ranges, *lanes), *in_range)
    what = f"{nest.name}: a write of {put.what}"
    happens = every(z3.BoolVal(True), *others) == every(*when)
    yield Obligation(f"{what} if and only if it is its task's", put.span, known, happens)
    for a, b in equal:
        yield Obligation(f"{what} is at its place", put.span, (*known, *given(*when)), a == b)


def values(found: Followed, put: Event, terms: Sequence[z3.ArithRef], outer: int = _NEST) -> list[np.ndarray]:
    """Return terms for every thread and inner round of a write for which its conditions hold.

    Raises:
        UnsupportedIR: an inner loop of unknown length.
    """
    axes = {str(THREAD): np.array(found.part.numbers)}
    for loop in put.loops[outer:]:
        start, extent = z3.simplify(loop.start), z3.simplify(loop.extent)
        if not isinstance(start, z3.IntNumRef) or not isinstance(extent, z3.IntNumRef):
            raise UnsupportedIR(f"{found.part.name}: a write of {put.what} in a loop of unknown length")
        axes[str(loop.var)] = np.arange(start.as_long(), start.as_long() + extent.as_long())
    grid = np.meshgrid(*axes.values(), indexing="ij")
    at = dict(zip(axes, (g.ravel() for g in grid), strict=True))
    size = len(grid[0].ravel())
    holds = np.ones(size, bool)
    for term in of_lanes(put, outer)[0]:
        holds &= np.broadcast_to(evaluate(term, at), (size,)).astype(bool)
    return [np.broadcast_to(evaluate(term, at), (size,))[holds] for term in terms]


_OPERATIONS: dict[int, Callable[..., np.ndarray]] = {
    z3.Z3_OP_LE: np.less_equal,
    z3.Z3_OP_LT: np.less,
    z3.Z3_OP_GE: np.greater_equal,
    z3.Z3_OP_GT: np.greater,
    z3.Z3_OP_EQ: np.equal,
    z3.Z3_OP_NOT: np.logical_not,
    z3.Z3_OP_UMINUS: np.negative,
    z3.Z3_OP_ITE: np.where,
    z3.Z3_OP_TRUE: lambda: np.array(True),
    z3.Z3_OP_FALSE: lambda: np.array(False),
}
_FOLDED: dict[int, Callable[..., np.ndarray]] = {
    z3.Z3_OP_ADD: np.add,
    z3.Z3_OP_SUB: np.subtract,
    z3.Z3_OP_MUL: np.multiply,
    z3.Z3_OP_AND: np.logical_and,
    z3.Z3_OP_OR: np.logical_or,
}


def evaluate(term: z3.ExprRef, at: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return a term's values where its constants have those of `at`.

    Raises:
        UnsupportedIR: an operation without a meaning here, or a division by what is not a positive number.
    """
    if isinstance(term, z3.IntNumRef):
        return np.int64(term.as_long())  # pyright: ignore[reportReturnType]
    kind, parts = term.decl().kind(), term.children()
    if kind == z3.Z3_OP_UNINTERPRETED and not parts and str(term) in at:
        return at[str(term)]
    if kind in (z3.Z3_OP_IDIV, z3.Z3_OP_MOD) and isinstance(parts[1], z3.IntNumRef):
        divisor = parts[1].as_long()
        if divisor > 0:
            divide = np.floor_divide if kind == z3.Z3_OP_IDIV else np.mod
            return divide(evaluate(parts[0], at), divisor)
    values = [evaluate(part, at) for part in parts]
    if kind in _FOLDED:
        total = values[0]
        for value in values[1:]:
            total = _FOLDED[kind](total, value)
        return total
    if kind in _OPERATIONS:
        return _OPERATIONS[kind](*values)
    raise UnsupportedIR(f"{term.decl().name()} in a place of a write")


# --------------------------------------------------------------------------- counters
def zeroed(
    config: Config, tensor: str, words: int, parts: Sequence[tuple[range, list[Event]]], threads: int
) -> Iterator[Obligation]:
    """Every word of a counter of the CTA's rank is put to zero by some thread of the rank.

    Args:
        config: of the kernel.
        tensor: the counter.
        words: of a rank.
        parts: threads, and their plain writes of it.
        threads: of a CTA.
    """
    word = z3.Int("word")
    for numbers, puts in parts:
        if len(puts) != 1 or puts[0].elected or len(puts[0].loops) > 1:
            raise UnsupportedIR(f"{len(puts)} writes of {tensor} before the roles part")
        (put,) = puts
        if not isinstance(put, Signal) or put.stored is None:
            raise UnsupportedIR(f"what is put in {tensor} is not followed")
        cta, turn = word / threads % config.ctas, word / (threads * config.ctas)
        rank = z3.Int("of_rank")
        at = [(THREAD, word % threads), (BLOCK, rank * config.ctas + cta)]
        at += [(loop.var, turn) for loop in put.loops]
        happens = every(z3.BoolVal(True), *put.path, *(loop.range for loop in put.loops))
        known = given(
            rank >= 0,
            rank < config.launch_ranks,
            word >= 0,
            word < words,
            word % threads >= numbers[0],
            word % threads <= numbers[-1],
        )
        first = z3.substitute(put.first, *at)
        goal = z3.And(z3.substitute(happens, *at), first == rank * words + word)
        yield Obligation(f"{tensor} is put to zero by thread {numbers[0]} on", put.span, known, goal)
        yield Obligation(f"{tensor} is put to zero", put.span, (), put.stored == 0)
