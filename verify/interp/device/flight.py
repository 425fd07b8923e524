"""Operations in flight: copies and matrix products that complete at a time the schedule chooses."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from verify.interp.device.clocks import Clocks


@dataclass(eq=False)
class Operation:
    """One asynchronous operation.

    Attributes:
        name: for reports.
        effect: moves the data and signals; run once, when the schedule completes it.
        needs: operations that have to complete first.
        is_done: whether `effect` has run.
    """

    name: str
    effect: Callable[[], None]
    needs: "tuple[Operation, ...]" = ()
    is_done: bool = False

    @property
    def can_complete(self) -> bool:
        """Whether what has to come first is complete."""
        return all(op.is_done for op in self.needs)

    def complete(self) -> None:
        """Let it happen."""
        self.is_done = True
        self.effect()


@dataclass(eq=False)
class Entry:
    """An operation in the commit groups of the threads that issued it.

    Attributes:
        read: done when its sources were read; `write`: done when its results are there.
        threads, groups: who issued it, and the number of the commit group of each.
        agents: per phase (read, write): component and clock for each of `threads`.
        settled: called with threads once they have waited for it.
    """

    read: Operation
    write: Operation
    threads: np.ndarray
    groups: np.ndarray
    agents: dict[str, tuple[np.ndarray, np.ndarray]]
    settled: Callable[[np.ndarray], None] = lambda threads: None
    waited: set[int] = field(default_factory=set)


class Queue:
    """Commit groups of all threads, for one kind of operation."""

    def __init__(self, threads: int) -> None:
        """Start without operations."""
        self.committed = np.zeros(threads, np.int64)
        self.entries: list[Entry] = []

    def add(self, entry: Entry) -> None:
        """Put an operation into the open group of each of its threads."""
        entry.groups = self.committed[entry.threads].copy()
        self.entries.append(entry)

    def commit(self, threads: np.ndarray) -> None:
        """Close the open group of `threads`."""
        self.committed[threads] += 1

    def _of(self, threads: np.ndarray, keep: int, with_open: bool) -> list[tuple[Entry, np.ndarray]]:
        """Return entries, and their lanes of `threads`, other than those of the last `keep` groups."""
        wanted = np.zeros(len(self.committed), bool)
        wanted[threads] = True
        found = []
        for entry in self.entries:
            limit = self.committed[entry.threads] - keep
            due = (entry.groups < limit) | (with_open and keep == 0)
            lanes = due & wanted[entry.threads]
            if lanes.any():
                found.append((entry, lanes))
        return found

    def outstanding(
        self, threads: np.ndarray, keep: int, *, phase: str = "write", with_open: bool = False
    ) -> list[Operation]:
        """Return operations that `threads` wait for until at most `keep` groups are left."""
        found = self._of(threads, keep, with_open)
        return [op for e, _ in found if not (op := e.read if phase == "read" else e.write).is_done]

    def settle(
        self, threads: np.ndarray, keep: int, clocks: Clocks, *, phase: str = "write", with_open: bool = False
    ) -> None:
        """Let `threads` know of the operations they have waited for."""
        for entry, lanes in self._of(threads, keep, with_open):
            who = entry.threads[lanes]
            for name in ("read",) if phase == "read" else ("read", "write"):
                if name in entry.agents:
                    components, ticks = (a[lanes] for a in entry.agents[name])
                    clocks.known[who, components] = np.maximum(clocks.known[who, components], ticks)
            if phase == "read":
                continue
            fresh = np.array([t for t in who.tolist() if t not in entry.waited], np.int64)
            entry.waited.update(fresh.tolist())
            if len(fresh):
                entry.settled(fresh)
        self.entries = [e for e in self.entries if not (e.write.is_done and len(e.waited) == len(e.threads))]
