"""Which bytes which threads touch, by going through all threads and rounds: exact for small domains.

Swizzled addresses are sums of digits of the thread index, which solvers over integers take seconds
to tell apart; a block has at most 1024 threads, so they can simply be listed.
"""

import numpy as np

from verify.encode import Index, constants_of
from verify.intarith import constant_of
from verify.sync.evaluate import NotEvaluatedError, evaluate
from verify.sync.events import Agent, Event

MAX_BYTES = 1 << 22  # of all executions together: more are left to the solver


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
        mine, theirs = _touched(a, shared, threads), _touched(b, shared, threads)
    except NotEvaluatedError:
        return False
    if mine is None or theirs is None:
        return False
    known, places = np.unique(np.concatenate([mine[0], theirs[0]]), return_inverse=True)
    first = _owners(places[: len(mine[0])], mine[1], len(known))
    second = first if a is b else _owners(places[len(mine[0]) :], theirs[1], len(known))
    both = (first[1] >= 0) & (second[1] >= 0)
    if a.agent is not Agent.THREAD or b.agent is not Agent.THREAD:
        return not both.any()
    low, high = np.minimum(first[0], second[0])[both], np.maximum(first[1], second[1])[both]
    return bool((low == high).all())


def _touched(event: Event, shared: int, threads: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the bytes that are touched, and by which thread each; None if there are too many.

    Bytes of different rounds of the shared loops get different numbers.
    """
    scope = event.point.site.scope
    indices = {i.const.decl().name(): i for i in scope.indices}
    thread = next(i.const.decl().name() for i in scope.launch if i.tag == "threadIdx.x")
    used = (constants_of(event.first) | constants_of(event.last)) - {thread}
    if not used <= indices.keys():
        raise NotEvaluatedError("an address that depends on data or on the block")
    width = constant_of(event.last - event.first)
    axes = [(thread, 0, threads), *(_axis(indices[n]) for n in sorted(used))]
    total = int(np.prod([count for _, _, count in axes]))
    if width is None or total * width > MAX_BYTES:
        return None
    grid = np.meshgrid(*(np.arange(low, low + count) for _, low, count in axes), indexing="ij")
    values = {name: part.ravel() for (name, _, _), part in zip(axes, grid, strict=True)}
    kept = np.ones(total, dtype=bool)
    for condition in event.point.conditions:
        if constants_of(condition) <= values.keys():
            kept &= np.broadcast_to(np.asarray(evaluate(condition, values), dtype=bool), kept.shape)
    start = np.broadcast_to(np.asarray(evaluate(event.first, values)), kept.shape)[kept]
    if start.size and start.min() < 0:
        return None
    rounds = np.zeros(total, dtype=np.int64)
    for _, index in event.point.loops[:shared]:
        name = index.const.decl().name()
        if name in values:
            _, low, count = _axis(index)
            rounds = rounds * count + (values[name] - low)
    if start.max(initial=0) >= MAX_BYTES:
        return None
    place = (rounds[kept] << MAX_BYTES.bit_length()) + start
    bytes_ = (place[:, None] + np.arange(width)).ravel()
    return bytes_, np.repeat(values[thread][kept], width)


def _axis(index: Index) -> tuple[str, int, int]:
    low, count = constant_of(index.start), constant_of(index.extent)
    if low is None or count is None or index.tag.startswith("blockIdx"):
        raise NotEvaluatedError("a range that is not constant")
    return index.const.decl().name(), low, count


def _owners(places: np.ndarray, threads: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the greatest thread that touches each byte; -1 as greatest for none."""
    low = np.full(size, np.iinfo(np.int64).max)
    high = np.full(size, -1)
    np.minimum.at(low, places, threads)
    np.maximum.at(high, places, threads)
    return low, high
