"""Vector clocks of a block: which accesses each thread knows to have happened.

A component counts the releases of one agent: a thread, the cp.async engine of a thread, the tensor
core of a warp, a TMA copy. Agent `a` did something at its clock c; thread t knows of it, so that t's
later accesses are ordered after it, if `known[t, a] >= c`.

Two rows a thread: what it knows for its own (generic) accesses, and what is visible to the async proxy,
which learns of generic writes only through a proxy fence somewhere on the way.
"""

import numpy as np

_SPARE = 192  # components allocated at once


class Clocks:
    """The clocks of one block.

    Attributes:
        known: (threads, components) what each thread knows.
        fenced: the same, of generic accesses made visible to the async proxy.
        own: (threads,) each thread's own clock, `known[t, t]`.
    """

    def __init__(self, threads: int) -> None:
        """Start all threads at clock 1, knowing of nothing."""
        self.threads = threads
        self._used = threads
        self.known = np.zeros((threads, threads + _SPARE), np.int32)
        self.fenced = np.zeros_like(self.known)
        self._index = np.arange(threads)
        self.known[self._index, self._index] = 1
        self._tick: dict[int, int] = {}  # last clock of each asynchronous agent
        self._named: dict[object, int] = {}
        self._pool: list[int] = []

    @property
    def capacity(self) -> int:
        """Components that rows have room for."""
        return self.known.shape[1]

    def own(self, threads: np.ndarray) -> np.ndarray:
        """Return the clocks of `threads`."""
        return self.known[threads, threads]

    # ------------------------------------------------------------------ threads
    def release(self, threads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what `threads` know together, and let what they do from now on be later than it."""
        rows = self.known[threads].max(axis=0), self.fenced[threads].max(axis=0)
        self.known[threads, threads] += 1
        return rows

    def acquire(self, threads: np.ndarray, rows: tuple[np.ndarray, np.ndarray]) -> None:
        """Let `threads` know what `rows` know."""
        known, fenced = (self._padded(r) for r in rows)
        self.known[threads] = np.maximum(self.known[threads], known)
        self.fenced[threads] = np.maximum(self.fenced[threads], fenced)

    def fence(self, threads: np.ndarray) -> None:
        """A proxy fence: generic accesses that `threads` know of are visible to the async proxy."""
        self.fenced[threads] = np.maximum(self.fenced[threads], self.known[threads])

    def join(
        self, a: tuple[np.ndarray, np.ndarray] | None, b: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what both know."""
        if a is None:
            return b
        return tuple(np.maximum(self._padded(x), self._padded(y)) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]

    def _padded(self, row: np.ndarray) -> np.ndarray:
        return row if len(row) == self.capacity else np.pad(row, (0, self.capacity - len(row)))

    # ------------------------------------------------------------------ asynchronous agents
    def agent(self, name: object) -> tuple[int, int]:
        """Return (component, new clock) of an agent whose operations complete in order."""
        component = self._named.get(name)
        if component is None:
            component = self._named[name] = self._new()
        return component, self._next(component)

    def once(self, known: np.ndarray) -> tuple[int, int]:
        """Return (component, clock) of an agent for one operation, issued by a thread that knows `known`.

        A component is used again only by an issuer that knows of all that was done under it.
        """
        for component in self._pool:
            if known[component] >= self._tick[component]:
                return component, self._next(component)
        component = self._new()
        self._pool.append(component)
        return component, self._next(component)

    def row_of(self, component: int, clock: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows that know of one agent only."""
        row = np.zeros(self.capacity, np.int32)
        row[component] = clock
        return row, np.zeros_like(row)

    def _next(self, component: int) -> int:
        self._tick[component] = self._tick.get(component, 0) + 1
        return self._tick[component]

    def _new(self) -> int:
        if self._used == self.capacity:
            grow = ((0, 0), (0, self.capacity))
            self.known, self.fenced = np.pad(self.known, grow), np.pad(self.fenced, grow)
        self._used += 1
        return self._used - 1
