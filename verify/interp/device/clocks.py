"""Vector clocks of a block: which accesses each thread knows to have happened.

A component counts the releases of one agent: a thread, the cp.async engine of a thread, the tensor
core of a warp, a TMA copy. Agent `a` did something at its clock c; thread t knows of it, so that t's
later accesses are ordered after it, if `known[t, a] >= c`.

Blocks that signal each other through memory share one set of components: each has a window of it.

Two rows a thread: what it knows for its own (generic) accesses, and what is visible to the async proxy,
which learns of generic writes only through a proxy fence somewhere on the way.
"""

from copy import copy

import numpy as np

_SPARE = 192  # components allocated at once


Rows = tuple[np.ndarray, np.ndarray]


class _Board:
    """What all windows share: rows of every thread, and the asynchronous agents."""

    def __init__(self, threads: int) -> None:
        self.known = np.zeros((threads, threads + _SPARE), np.int32)
        self.fenced = np.zeros_like(self.known)
        self.known[np.arange(threads), np.arange(threads)] = 1
        self.used = threads
        self.tick: dict[int, int] = {}  # last clock of each asynchronous agent
        self.named: dict[object, int] = {}
        self.pool: list[int] = []

    def new(self) -> int:
        """Return a component of its own for an agent."""
        if self.used == self.known.shape[1]:
            grow = ((0, 0), (0, self.known.shape[1]))
            self.known, self.fenced = np.pad(self.known, grow), np.pad(self.fenced, grow)
        self.used += 1
        return self.used - 1

    def next(self, component: int) -> int:
        """Return the next clock of an agent."""
        self.tick[component] = self.tick.get(component, 0) + 1
        return self.tick[component]


class Clocks:
    """The clocks of one block; threads are numbered within it.

    Attributes:
        threads: number of them.
        first: component of its thread 0.
    """

    def __init__(self, threads: int, blocks: int = 1) -> None:
        """Start all threads of `blocks` blocks at clock 1, knowing of nothing; this is the first block's."""
        self.threads, self.first = threads, 0
        self._board = _Board(threads * blocks)

    def window(self, number: int) -> "Clocks":
        """Return the clocks of another of the blocks."""
        made = copy(self)
        made.first = number * self.threads
        return made

    @property
    def known(self) -> np.ndarray:
        """(threads, components) what each thread knows."""
        return self._board.known[self.first : self.first + self.threads]

    @property
    def fenced(self) -> np.ndarray:
        """The same, of generic accesses made visible to the async proxy."""
        return self._board.fenced[self.first : self.first + self.threads]

    @property
    def capacity(self) -> int:
        """Components that rows have room for."""
        return self._board.known.shape[1]

    def own(self, threads: np.ndarray) -> np.ndarray:
        """Return the clocks of `threads`."""
        return self.known[threads, threads + self.first]

    # ------------------------------------------------------------------ threads
    def release(self, threads: np.ndarray) -> Rows:
        """Return what `threads` know together, and let what they do from now on be later than it."""
        rows = self.known[threads].max(axis=0), self.fenced[threads].max(axis=0)
        self.known[threads, threads + self.first] += 1
        return rows

    def acquire(self, threads: np.ndarray, rows: Rows) -> None:
        """Let `threads` know what `rows` know."""
        known, fenced = (self._padded(r) for r in rows)
        self.known[threads] = np.maximum(self.known[threads], known)
        self.fenced[threads] = np.maximum(self.fenced[threads], fenced)

    def fence(self, threads: np.ndarray) -> None:
        """A proxy fence: generic accesses that `threads` know of are visible to the async proxy."""
        self.fenced[threads] = np.maximum(self.fenced[threads], self.known[threads])

    def join(self, a: Rows | None, b: Rows) -> Rows:
        """Return what both know."""
        if a is None:
            return b
        return tuple(np.maximum(self._padded(x), self._padded(y)) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]

    def _padded(self, row: np.ndarray) -> np.ndarray:
        return row if len(row) == self.capacity else np.pad(row, (0, self.capacity - len(row)))

    # ------------------------------------------------------------------ asynchronous agents
    def agent(self, name: object) -> tuple[int, int]:
        """Return (component, new clock) of an agent whose operations complete in order."""
        named = self._board.named
        component = named.get((self.first, name))
        if component is None:
            component = named[self.first, name] = self._board.new()
        return component, self._board.next(component)

    def once(self, known: np.ndarray) -> tuple[int, int]:
        """Return (component, clock) of an agent for one operation, issued by a thread that knows `known`.

        A component is used again only by an issuer that knows of all that was done under it.
        """
        board = self._board
        for component in board.pool:
            if known[component] >= board.tick[component]:
                return component, board.next(component)
        component = board.new()
        board.pool.append(component)
        return component, board.next(component)

    def row_of(self, component: int, clock: int) -> Rows:
        """Return rows that know of one agent only."""
        row = np.zeros(self.capacity, np.int32)
        row[component] = clock
        return row, np.zeros_like(row)
