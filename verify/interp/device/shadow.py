"""Shadow memory: for each byte, who wrote it last and who read it since.

A byte's last write is an epoch (agent, clock); its reads are one clock for each agent, since many may
read without order between them. An access conflicts with a recorded one that its actor does not know
of (see `clocks`). Blocks have no common clocks: between two blocks only a grid-wide synchronisation
orders accesses, and atomics do not conflict with each other.
"""

from dataclasses import dataclass

import numpy as np

from verify.interp.device.clocks import Clocks

_MANY = -2  # readers: of more than one block
_NOBODY = -1
_PAGE_BITS = 9  # of the bytes that a filter takes together


@dataclass
class Actor:
    """Who accesses: lanes of a warp, each for itself, or one asynchronous agent.

    Attributes:
        components, clocks: (n,) of each lane, or (1,).
        known: (n, components) what each knows.
        fenced: None for the generic proxy; else what the async proxy sees of generic writes.
        block: number of the block.
        epoch: count of grid-wide synchronisations passed.
        statement: number of the statement.
    """

    components: np.ndarray
    clocks: np.ndarray
    known: np.ndarray
    fenced: np.ndarray | None
    block: int
    epoch: int
    statement: int


@dataclass(frozen=True)
class Conflict:
    """A recorded access that the new one is not ordered after.

    Attributes:
        row, column: position in the new access: lane, byte.
        kind: "write", "read", "fence" (ordered, but not for the async proxy).
        statement: number of the other statement, -1 unknown.
        component: the other agent, -1 for another block.
    """

    row: int
    column: int
    kind: str
    statement: int
    component: int


class Shadow:
    """The record of `size` bytes."""

    def __init__(self, size: int, clocks: Clocks | None, reads: bool = True) -> None:
        """Start without accesses; `reads` False where nothing is ever read or nothing written."""
        self.size = size
        self.writer = np.full(size, _NOBODY, np.int32)
        self.write_clock = np.zeros(size, np.int32)
        self.write_async = np.zeros(size, bool)
        self.write_atomic = np.zeros(size, bool)
        self.write_block = np.full(size, _NOBODY, np.int32)
        self.write_epoch = np.zeros(size, np.int32)
        self.write_statement = np.full(size, -1, np.int32)
        self.read_statement = np.full(size, -1, np.int32)
        self.read_block = np.full(size, _NOBODY, np.int32)
        self.read_epoch = np.zeros(size, np.int32)
        self.is_read = np.zeros(size, bool)
        self._keeps_reads = reads
        self._forget(clocks.capacity if clocks else 0)

    def new_block(self, clocks: Clocks) -> None:
        """Forget the readers' clocks: those of a block that has ended mean nothing to the next."""
        self._forget(clocks.capacity)

    def _forget(self, components: int) -> None:
        # (components, bytes): the clock of each agent's last read. Entries from before the last write may
        # stay: who knows of the write knows of them. Memory is only used by agents that do read.
        # `_latest`: the clock of each agent's last read in a page; who knows of it need not look at bytes.
        size = self.size if self._keeps_reads else 0
        self._reads = np.zeros((components, size), np.int32)
        self._latest = np.zeros((components, _pages(size)), np.int32)

    def grow(self, size: int) -> None:
        """Make room for `size` bytes."""
        more = size - self.size
        if more <= 0:
            return
        for name, empty in (
            ("writer", _NOBODY), ("write_clock", 0), ("write_async", False), ("write_atomic", False),
            ("write_block", _NOBODY), ("write_epoch", 0), ("write_statement", -1), ("read_statement", -1),
            ("read_block", _NOBODY), ("read_epoch", 0), ("is_read", False),
        ):  # fmt: skip
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.full(more, empty, old.dtype)]))
        if self._keeps_reads:
            self._reads = np.pad(self._reads, ((0, 0), (0, more)))
            new_pages = _pages(size) - self._latest.shape[1]
            self._latest = np.pad(self._latest, ((0, 0), (0, new_pages)))
        self.size = size

    # ------------------------------------------------------------------ accesses
    def read(self, at: np.ndarray, actor: Actor) -> Conflict | None:
        """Record reads of bytes `at` (lanes, bytes); return one that races."""
        found = self._after_writes(at, actor, is_atomic=False)
        if self._keeps_reads:
            self._note_readers(at, actor)
        return found

    def write(self, at: np.ndarray, actor: Actor, is_atomic: bool = False) -> Conflict | None:
        """Record writes of bytes `at` (lanes, bytes); return one that races."""
        found = self._after_writes(at, actor, is_atomic) or self._after_reads(at, actor)
        if found is None and not is_atomic:
            found = self._within(at, actor)
        shape = at.shape
        self.writer[at] = np.broadcast_to(actor.components[:, None], shape)
        self.write_clock[at] = np.broadcast_to(actor.clocks[:, None], shape)
        self.write_async[at] = actor.fenced is not None
        self.write_atomic[at] = is_atomic
        self.write_block[at] = actor.block
        self.write_epoch[at] = actor.epoch
        self.write_statement[at] = actor.statement
        if self._keeps_reads:
            touched = at[self.is_read[at]]
            if touched.size:
                self.is_read[touched] = False
                self.read_block[touched] = _NOBODY
        return found

    def _after_writes(self, at: np.ndarray, actor: Actor, is_atomic: bool) -> Conflict | None:
        writer = self.writer[at]
        has = writer != _NOBODY
        if is_atomic:
            has &= ~self.write_atomic[at]
        if not has.any():
            return None
        here = self.write_block[at] == actor.block
        foreign = has & ~here & (self.write_epoch[at] >= actor.epoch)
        if foreign.any():
            return self._conflict(at, foreign, "write", self.write_statement, None)
        has &= here
        rows = np.broadcast_to(np.arange(len(at))[:, None], at.shape) if len(actor.known) > 1 else 0
        column = np.where(has, writer, 0)
        clock = self.write_clock[at]
        unknown = has & (clock > _seen(actor.known, rows, column))
        if unknown.any():
            return self._conflict(at, unknown, "write", self.write_statement, self.writer)
        if actor.fenced is not None:
            unseen = has & ~self.write_async[at] & (clock > _seen(actor.fenced, rows, column))
            if unseen.any():
                return self._conflict(at, unseen, "fence", self.write_statement, self.writer)
        return None

    def _after_reads(self, at: np.ndarray, actor: Actor) -> Conflict | None:
        if not self._keeps_reads or not self.is_read[at].any():
            return None
        lanes, columns = np.nonzero(self.is_read[at])
        flat = at[lanes, columns]
        other = (self.read_block[flat] != actor.block) & (self.read_epoch[flat] >= actor.epoch)
        if other.any():
            first = int(np.argmax(other))
            return Conflict(
                int(lanes[first]), int(columns[first]), "read", int(self.read_statement[flat[first]]), -1
            )
        known = actor.known[:, : len(self._reads)]
        known = np.pad(known, ((0, 0), (0, len(self._reads) - known.shape[1])))  # agents made since
        pages = np.unique(flat >> _PAGE_BITS)
        suspects = np.flatnonzero(self._latest[:, pages].max(axis=1) > known.min(axis=0))
        if not suspects.size:
            return None
        mine = self.read_block[flat] == actor.block  # of an earlier grid-wide epoch otherwise
        lanes, columns, flat = lanes[mine], columns[mine], flat[mine]
        seen = known[lanes[:, None] if len(known) > 1 else 0, suspects]
        late = self._reads[suspects[None, :], flat[:, None]] > seen
        if not late.any():
            return None
        first, suspect = (int(x) for x in np.argwhere(late)[0])
        statement = int(self.read_statement[flat[first]])
        return Conflict(int(lanes[first]), int(columns[first]), "read", statement, int(suspects[suspect]))

    def _within(self, at: np.ndarray, actor: Actor) -> Conflict | None:
        """Return a byte that two lanes of this very write share."""
        if len(at) < 2:
            return None
        flat = at.ravel()
        order = np.argsort(flat, kind="stable")
        lane = order // at.shape[1]
        same = (flat[order][1:] == flat[order][:-1]) & (lane[1:] != lane[:-1])
        if not same.any():
            return None
        second = int(order[1:][np.argmax(same)])
        first = int(order[:-1][np.argmax(same)])
        other = int(actor.components[first // at.shape[1]])
        return Conflict(second // at.shape[1], second % at.shape[1], "write", actor.statement, other)

    def _note_readers(self, at: np.ndarray, actor: Actor) -> None:
        self._fit(actor)
        before = self.read_block[at]
        foreign = before != actor.block
        if foreign.any():
            changed = at[foreign & (before != _NOBODY)]
            if changed.size:
                self._reads[np.flatnonzero(self._latest.any(axis=1))[:, None], changed] = 0
            mixed = self.is_read[at] & foreign & (self.read_epoch[at] == actor.epoch)
            self.read_block[at] = np.where(mixed, _MANY, actor.block)
        self.read_epoch[at] = actor.epoch
        if len(actor.components) == 1:
            component, flat = int(actor.components[0]), at.ravel()
            self._reads[component][flat] = actor.clocks[0]
            self._latest[component][flat >> _PAGE_BITS] = actor.clocks[0]
        else:
            self._reads[actor.components[:, None], at] = actor.clocks[:, None]
            self._latest[actor.components[:, None], at >> _PAGE_BITS] = actor.clocks[:, None]
        self.is_read[at] = True
        self.read_statement[at] = actor.statement

    def _fit(self, actor: Actor) -> None:
        need = int(actor.components.max()) + 1
        if need > len(self._reads):
            used = np.flatnonzero(self._latest.any(axis=1))
            number = max(need, actor.known.shape[1])
            self._reads, self._latest = (_taller(r, used, number) for r in (self._reads, self._latest))

    def _conflict(
        self,
        at: np.ndarray,
        bad: np.ndarray,
        kind: str,
        statements: np.ndarray,
        components: np.ndarray | None,
    ) -> Conflict:
        row, column = (int(x) for x in np.argwhere(bad)[0])
        byte = at[row, column]
        component = -1 if components is None else int(components[byte])
        return Conflict(row, column, kind, int(statements[byte]), component)


def _pages(size: int) -> int:
    return -(-size >> _PAGE_BITS)


def _taller(rows: np.ndarray, used: np.ndarray, number: int) -> np.ndarray:
    """Return `rows` with zeros below, `number` in all; those that are not `used` take no memory."""
    made = np.zeros((number, rows.shape[1]), rows.dtype)
    made[used] = rows[used]
    return made


def _seen(rows: np.ndarray, lanes: np.ndarray | int, components: np.ndarray) -> np.ndarray:
    """Return the clock that each lane's row has of each component; 0 of those made after the row."""
    width = rows.shape[1]
    if components.size and int(components.max()) >= width:
        return np.where(components < width, rows[lanes, np.minimum(components, width - 1)], 0)
    return rows[lanes, components]
