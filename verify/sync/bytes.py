"""Which bytes which threads touch, by going through all threads and rounds: exact for small domains.

Swizzled addresses are sums of digits of the thread index, which solvers over integers take seconds
to tell apart; a block has at most 1024 threads, so they can simply be listed.
"""

from dataclasses import dataclass
from math import lcm

import numpy as np
import z3

from verify.encode import Index, constants_of
from verify.intarith import constant_of
from verify.symbols import NUMERAL, summary
from verify.sync.evaluate import NotEvaluatedError, evaluate
from verify.sync.events import Agent, Event

MAX_BYTES = 1 << 22  # of all executions together: more are left to the solver
_OF_INTEGERS = (z3.Z3_OP_ADD, z3.Z3_OP_SUB, z3.Z3_OP_MUL, z3.Z3_OP_UMINUS)


def apart(a: Event, b: Event, shared: int, threads: int) -> bool:
    """Return whether two executions never touch one byte, unless one thread makes both.

    Conditions that depend on more than the thread and the rounds are left out, which only adds
    executions.

    Args:
        a: an access to shared memory.
        b: another, or the same one.
        shared: number of loops around both whose rounds are the same.
        threads: of the block.

    Returns:
        False also where it cannot be told this way.
    """
    if a.box or b.box:
        return False
    try:
        told = _told_apart(a, b, shared)
        if a.agent is Agent.THREAD and b.agent is Agent.THREAD:
            return _by_one_thread(_touched(a, shared, told, threads), _touched(b, shared, told, threads))
        if a is b:  # two executions of it, whoever starts them
            mine = _touched(a, shared, told, threads)
            if mine is None or not mine.lists_executions:
                return False
            places = np.sort(mine.places(_unit(mine)))
            return bool((places[1:] != places[:-1]).all())
        # An agent's access is not ordered by program order: nobody may touch what another does.
        mine, theirs = (_touched(e, shared, told, threads, distinct=True) for e in (a, b))
    except NotEvaluatedError:
        return False
    if mine is None or theirs is None:
        return False
    unit = _unit(mine, theirs)
    return not _have_one_in_common(mine.places(unit), np.sort(theirs.places(unit)))


@dataclass(frozen=True)
class _Touched:
    """Executions of one access: where each begins, with the rounds of the shared loops in the number.

    Attributes:
        start: first byte, plus a multiple of a power of two for each combination of shared rounds.
        thread: that executes; meaningless where only distinct places are kept.
        width: bytes.
        lists_executions: each execution has an element of its own, but for those of the same shared rounds.
    """

    start: np.ndarray
    thread: np.ndarray
    width: int
    lists_executions: bool

    def places(self, unit: int) -> np.ndarray:
        """Return the number of every `unit` bytes touched, once for each execution."""
        return (self.start[:, None] // unit + np.arange(self.width // unit)).ravel()


def _unit(*touched: _Touched) -> int:
    """Return how many bytes, from multiples of that many on, are always touched together."""
    return int(np.gcd.reduce([number for t in touched for number in (t.width, np.gcd.reduce(t.start))]))


def _have_one_in_common(some: np.ndarray, ordered: np.ndarray) -> bool:
    if not len(some) or not len(ordered):
        return False
    nearest = np.minimum(np.searchsorted(ordered, some), len(ordered) - 1)
    return bool((ordered[nearest] == some).any())


def _by_one_thread(mine: _Touched | None, theirs: _Touched | None) -> bool:
    if mine is None or theirs is None:
        return False
    parts = [mine] if mine is theirs else [mine, theirs]
    unit = _unit(*parts)
    known, places = np.unique(np.concatenate([t.places(unit) for t in parts]), return_inverse=True)
    width, other = mine.width // unit, theirs.width // unit
    first = _owners(places[: len(mine.start) * width], np.repeat(mine.thread, width), len(known))
    second = _owners(
        places[len(places) - len(theirs.start) * other :], np.repeat(theirs.thread, other), len(known)
    )
    both = (first[1] >= 0) & (second[1] >= 0)
    low, high = np.minimum(first[0], second[0])[both], np.maximum(first[1], second[1])[both]
    return bool((low == high).all())


def _told_apart(a: Event, b: Event, shared: int) -> list[str]:
    """Return the counters of shared loops that number the rounds of both accesses alike.

    A counter that one address alone depends on tells nothing of the other access: that runs in all rounds.
    """
    told = []
    for _, index in a.point.loops[:shared]:
        name = index.const.decl().name()
        if all(name in _names(e) for e in (a, b)) and _axis(index, a.first) == _axis(index, b.first):
            told.append(name)
    return told


def _names(event: Event) -> frozenset[str]:
    return constants_of(event.first) | constants_of(event.last)


def _touched(
    event: Event, shared: int, told: list[str], threads: int, distinct: bool = False
) -> _Touched | None:
    """Return the executions of `event`; None if they touch too many bytes to list.

    Args:
        event: the access.
        shared: number of outer loops whose rounds are the same in both executions.
        told: counters of those whose rounds are told apart.
        threads: of the block.
        distinct: keep one execution of those that touch the same bytes in the same rounds.
    """
    scope = event.point.site.scope
    indices = {i.const.decl().name(): i for i in scope.indices}
    thread = next(i.const.decl().name() for i in scope.launch if i.tag == "threadIdx.x")
    used = _names(event) - {thread}
    if not used <= indices.keys():
        raise NotEvaluatedError("an address that depends on data or on the block")
    width = constant_of(event.last - event.first)
    ranges = {name: _axis(indices[name], event.first) for name in sorted(used)}
    repeated = {name for name, (_, _, repeats) in ranges.items() if repeats}
    axes = [(thread, 0, threads), *((name, low, count) for name, (low, count, _) in ranges.items())]
    total = int(np.prod([count for _, _, count in axes]))
    if width is None or total > MAX_BYTES:
        return None
    grid = np.meshgrid(*(np.arange(low, low + count) for _, low, count in axes), indexing="ij")
    values = {name: part.ravel() for (name, _, _), part in zip(axes, grid, strict=True)}
    kept = np.ones(total, dtype=bool)
    for condition in event.point.conditions:
        if constants_of(condition) <= values.keys() - repeated:
            kept &= np.broadcast_to(np.asarray(evaluate(condition, values), dtype=bool), kept.shape)
    start = np.broadcast_to(np.asarray(evaluate(event.first, values)), kept.shape)[kept]
    if start.size and (start.min() < 0 or start.max() >= MAX_BYTES):
        return None
    rounds = np.zeros(total, dtype=np.int64)
    for name in told:
        low, count, _ = ranges[name]
        rounds = rounds * count + (values[name] - low)
    place = (rounds[kept] << MAX_BYTES.bit_length()) + start
    owner = values[thread][kept]
    if distinct:
        place, first = np.unique(place, return_index=True)
        owner = owner[first]
    if len(place) * width > MAX_BYTES:
        return None
    own = {i.const.decl().name() for _, i in event.point.loops[shared:]}
    lanes = any(i.tag == "lane" for i in scope.indices)
    return _Touched(place, owner, width, own <= used - repeated and not lanes and not distinct)


def _axis(index: Index, address: z3.ArithRef) -> tuple[int, int, bool]:
    """Return the first value of a counter that matters, how many do, and whether they stand for others.

    Of a loop of unknown length one period of the address is enough, if it has one.
    """
    if index.tag.startswith("blockIdx"):
        raise NotEvaluatedError("an address that depends on the block")
    low, count = constant_of(index.start), constant_of(index.extent)
    if low is not None and count is not None:
        return low, count, False
    period = _period(address, index.const.decl().name())
    if period is None:
        raise NotEvaluatedError("a range that is not constant")
    return 0, period, True


def _period(term: z3.ArithRef, name: str) -> int | None:
    """Return a number that can be added to the constant `name` without changing `term`, or None.

    Sums and products of integers keep their remainder by c if c is added to one of them; so what is left
    of the constant below a remainder by c has the period c.
    """
    found: list[tuple[bool, int] | None] = []  # (whether it occurs outside of remainders, period of the rest)
    nodes = summary(term).nodes
    for node in nodes:
        known = [part for part in (found[place] for place in node.operands) if part is not None]
        outside, period = any(o for o, _ in known), lcm(*(p for _, p in known))
        by = nodes[node.operands[1]] if node.kind == z3.Z3_OP_MOD else None
        if len(known) < len(node.operands):
            found.append(None)
        elif node.kind == z3.Z3_OP_UNINTERPRETED and str(node.value) == name:
            found.append((True, 1))
        elif outside and by is not None and by.kind == NUMERAL and isinstance(by.value, int) and by.value > 0:
            found.append((False, lcm(period, by.value)))
        elif node.kind in _OF_INTEGERS or not outside:
            found.append((outside, period))
        else:
            found.append(None)
    last = found[-1]
    return last[1] if last is not None and not last[0] else None


def _owners(places: np.ndarray, threads: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the greatest thread that touches each byte; -1 as greatest for none."""
    low = np.full(size, np.iinfo(np.int64).max)
    high = np.full(size, -1)
    np.minimum.at(low, places, threads)
    np.maximum.at(high, places, threads)
    return low, high
