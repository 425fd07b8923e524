"""A schedule for the interpreter under which groups that poll seldom run: else most of a run goes into polls.

A loop that polls counts its polls, so no group is ever twice in one state, and the interpreter cannot tell
that it waits.
"""

from collections.abc import Sequence

import numpy as np

from verify.interp.device.block import Group
from verify.interp.device.flight import Operation
from verify.interp.device.schedule import Choice, Policy

_TURN = 96  # instructions, at most
_POLL = 3  # instructions of a loop that polls: its condition, its count, the way back
_OTHERS_FIRST = 16  # of so many choices one is among those who poll, if others can go on


def patient() -> Policy:
    """Return a policy for one run: random, but who stays at one place polls once, and in turn."""
    place: dict[int, int] = {}  # where each group was, by its identity; the last to be chosen comes last
    still: set[int] = set()

    def choose(rng: np.random.Generator, groups: Sequence[Group], pending: Sequence[Operation]) -> Choice:
        others = [g for g in groups if id(g) not in still]
        if len(others) < len(groups) and (not (others or pending) or not int(rng.integers(_OTHERS_FIRST))):
            by_turn = {number: k for k, number in enumerate(place)}
            group = min((g for g in groups if id(g) in still), key=lambda g: by_turn[id(g)])
        else:
            pick = int(rng.integers(len(others) + len(pending)))
            if pick >= len(others):
                return pending[pick - len(others)]
            group = others[pick]
        before = place.pop(id(group), None)
        place[id(group)] = group.pc
        if before is not None and abs(group.pc - before) <= _POLL:
            still.add(id(group))
            return group, _POLL
        still.discard(id(group))
        return group, int(rng.integers(1, _TURN))

    return Policy("patient", choose, elects_first=False, parts_at_copies=True)
