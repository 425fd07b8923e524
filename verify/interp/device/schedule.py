"""Schedules: which group of threads runs next, for how long, and when operations in flight complete.

A policy with a seed decides alone; the same seed gives the same run. Each policy is one kind of
adversary: copies that come as late as they may find missing waits, one warp far ahead of the others
finds missing barriers, copies that come at once find waits for the wrong thing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from verify.interp.device.block import Group
from verify.interp.device.flight import Operation

_FOREVER = 1 << 30  # instructions: until the group has to wait
_SHORT_TURN = 24
Choice = tuple[Group, int] | Operation


@dataclass(frozen=True)
class Policy:
    """How to choose.

    Attributes:
        name: for reports.
        choose: from a random generator, groups that can run (in order of wave) and operations that can
            complete, of which at least one exists.
        elects_first: whether an election takes lane 0; else the seed decides.
        parts_at_copies: whether a turn ends where something new is in flight.
    """

    name: str
    choose: Callable[[np.random.Generator, Sequence[Group], Sequence[Operation]], Choice]
    elects_first: bool = True
    parts_at_copies: bool = False


def _random(rng: np.random.Generator, groups: Sequence[Group], pending: Sequence[Operation]) -> Choice:
    pick = int(rng.integers(len(groups) + len(pending)))
    if pick >= len(groups):
        return pending[pick - len(groups)]
    return groups[pick], int(rng.integers(1, _SHORT_TURN))


def _late(rng: np.random.Generator, groups: Sequence[Group], pending: Sequence[Operation]) -> Choice:
    """Complete nothing while a group can run."""
    if groups:
        return groups[int(rng.integers(len(groups)))], _FOREVER
    return pending[int(rng.integers(len(pending)))]


def _eager(rng: np.random.Generator, groups: Sequence[Group], pending: Sequence[Operation]) -> Choice:
    """Complete everything at once."""
    if pending:
        return pending[0]
    return groups[int(rng.integers(len(groups)))], int(rng.integers(1, _SHORT_TURN))


def _ahead(rng: np.random.Generator, groups: Sequence[Group], pending: Sequence[Operation]) -> Choice:
    """Let the first warp run as far as it can, then the second; operations complete newest first."""
    if groups:
        return groups[0], _FOREVER
    return pending[-1]


def _behind(rng: np.random.Generator, groups: Sequence[Group], pending: Sequence[Operation]) -> Choice:
    """As `ahead`, last warp first."""
    if groups:
        return groups[-1], _FOREVER
    return pending[0]


POLICIES: dict[str, Policy] = {
    p.name: p
    for p in (
        Policy("random", _random, elects_first=False, parts_at_copies=True),
        Policy("late", _late),
        Policy("eager", _eager, parts_at_copies=True),
        Policy("ahead", _ahead),
        Policy("behind", _behind),
    )
}


def starving(thread: int, late: bool = True) -> Policy:
    """Return a policy under which the warp of `thread` runs only where nobody else can.

    With `late` operations complete where no other group can run, else at once.
    """

    def choose(rng: np.random.Generator, groups: Sequence[Group], pending: Sequence[Operation]) -> Choice:
        others = [g for g in groups if thread not in g.threads]
        if pending and not (late and others):
            return pending[0]
        return (others[0], _FOREVER) if others else (groups[0], 1)  # what it does may let another go on

    name = f"starving thread {thread}" + ("" if late else ", copies at once")
    return Policy(name, choose, parts_at_copies=not late)


def hurrying(thread: int, late: bool) -> Policy:
    """Return a policy under which the warp of `thread` runs wherever it can.

    With `late` operations complete where no group can run, else at once.
    """

    def choose(rng: np.random.Generator, groups: Sequence[Group], pending: Sequence[Operation]) -> Choice:
        if pending and not (late and groups):
            return pending[0]
        mine = next((g for g in groups if thread in g.threads), None)
        return (mine, _FOREVER) if mine is not None else (groups[0], 1)  # which may let it go on

    name = f"thread {thread} ahead, copies {'late' if late else 'at once'}"
    return Policy(name, choose, parts_at_copies=not late)


def policy(given: "str | Policy") -> Policy:
    """Return a policy by name.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(given, Policy):
        return given
    if given not in POLICIES:
        raise ValueError(f"policy: requires one of {sorted(POLICIES)}, got {given!r}")
    return POLICIES[given]
