"""Barriers: of the block and named ones (bar.sync), and mbarriers with phases and transactions."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from verify import ir
from verify.interp.device import errors

if TYPE_CHECKING:
    from verify.interp.device.block import Block
    from verify.interp.device.flight import Operation

Rows = tuple[np.ndarray, np.ndarray]
NAMED_BARRIERS = 16
WARP_THREADS = 32
MAX_ARRIVALS = 2**20 - 1  # of an mbarrier
MAX_TRANSACTION = 2**20 - 1


@dataclass(eq=False)
class NamedBarrier:
    """One of the block's 16 hardware barriers.

    Attributes:
        count: threads that complete it, 0 while nobody has arrived.
        generation: how often it completed.
        arrived: threads that have arrived since, those that wait for it and those that do not.
        statement: of the first arrival.
    """

    number: int
    count: int = 0
    generation: int = 0
    arrived: int = 0
    rows: Rows | None = None
    waiting: list[np.ndarray] = field(default_factory=list)
    statement: int = -1
    span: ir.Span | None = None

    def arrive(self, block: "Block", threads: np.ndarray, count: int | None, waits: bool) -> None:
        """Let `threads` arrive; `count` None: all threads of the block.

        Raises:
            BarrierDivergenceError: others arrived for another count, or (whole block) elsewhere.
            ArrivalError: more arrive than complete it.
        """
        needed = block.threads if count is None else count
        if needed % WARP_THREADS and count is not None:
            raise block.fault(
                errors.BarrierDivergenceError,
                f"barrier {self.number} for {needed} threads: no whole warps",
                threads,
            )
        if self.arrived == 0:
            self.count, self.statement, self.span = needed, block.statement, block.span
        elif self.count != needed:
            text = f"barrier {self.number} for {needed} threads, others came for {self.count}"
            raise block.fault(errors.BarrierDivergenceError, text, threads, other=self.span)
        elif count is None and self.statement != block.statement:
            text = "threads of the block wait at different barriers"
            raise block.fault(errors.BarrierDivergenceError, text, threads, other=self.span)
        if self.arrived + len(threads) > self.count:
            text = f"{self.arrived + len(threads)} threads arrive at barrier {self.number} for {self.count}"
            raise block.fault(errors.ArrivalError, text, threads, other=self.span)
        self.arrived += len(threads)
        self.rows = block.clocks.join(self.rows, block.clocks.release(threads))
        if waits:
            self.waiting.append(threads)
        if self.arrived == self.count:
            for waiters in self.waiting:
                block.clocks.acquire(waiters, self.rows)
            self.generation += 1
            self.arrived, self.rows, self.waiting = 0, None, []


@dataclass(eq=False)
class Mbarrier:
    """An mbarrier object.

    Attributes:
        key: the array and the index.
        count: arrivals that complete a phase; 0 before the initialisation.
        pending: those still missing in the current phase.
        bytes: expected less arrived, of the current phase.
        phase: number of the current phase.
        rows: what those know who arrived so far; `done`: up to the last completed phase.
        initialiser: (thread, clock) of the initialisation; `home`: component of thread 0 of its block.
        is_fenced: whether a fence made it visible to the async proxy.
        inflight: TMA copies that will report here, with the phase they were issued in.
    """

    name: str
    key: tuple[ir.Var, int]
    count: int = 0
    pending: int = 0
    bytes: int = 0
    phase: int = 0
    rows: Rows | None = None
    done: Rows | None = None
    initialiser: tuple[int, int] | None = None
    home: int = 0
    is_fenced: bool = False
    inflight: list[tuple["Operation", int]] = field(default_factory=list)

    def init(self, block: "Block", threads: np.ndarray, count: int) -> None:
        """Initialise for `count` arrivals a phase.

        Raises:
            BarrierInitError: it is initialised already, by several threads, or for an impossible count.
        """
        if self.count or len(threads) != 1:
            raise block.fault(errors.BarrierInitError, f"{self.name} is initialised more than once", threads)
        if not 0 < count <= MAX_ARRIVALS:
            raise block.fault(
                errors.BarrierInitError, f"{self.name} is initialised for {count} arrivals", threads
            )
        self.count = self.pending = count
        thread = int(threads[0])
        self.home = block.clocks.first
        self.initialiser = thread, int(block.clocks.own(threads)[0])

    def check_visible(self, block: "Block", threads: np.ndarray, is_async: bool) -> None:
        """Raise unless the initialisation is ordered before use by `threads`."""
        if self.initialiser is None:
            raise block.fault(errors.BarrierInitError, f"{self.name} is used and not initialised", threads)
        who, clock = self.initialiser
        component = self.home + who
        unseen = block.clocks.known[threads, component] < clock
        if unseen.any():
            text = f"{self.name} is used before its initialisation by thread {who} is visible"
            raise block.fault(errors.BarrierInitError, text, threads[unseen])
        if is_async and not self.is_fenced and (block.clocks.fenced[threads, component] < clock).any():
            text = f"{self.name} is used by the async proxy without a fence after its initialisation"
            raise block.fault(errors.BarrierInitError, text, threads)

    def expect(self, block: "Block", size: int, threads: np.ndarray) -> None:
        """Expect `size` bytes more in the current phase."""
        self.bytes += size
        if abs(self.bytes) > MAX_TRANSACTION:
            text = f"{self.name} expects {self.bytes} bytes, more than an mbarrier counts"
            raise block.fault(errors.TransactionError, text, threads)

    def arrive(self, block: "Block", threads: np.ndarray, rows: Rows, number: int | None = None) -> None:
        """Count `number` arrivals (one a thread).

        Raises:
            ArrivalError: more than the phase has left.
        """
        number = len(threads) if number is None else number
        if number > self.pending:
            text = f"{number} arrivals at {self.name}, which waits for {self.pending} of {self.count}"
            raise block.fault(errors.ArrivalError, text, threads)
        self.pending -= number
        self.rows = block.clocks.join(self.rows, rows)
        self.settle(block, threads)

    def complete(self, block: "Block", size: int, rows: Rows) -> None:
        """Count `size` bytes that have arrived."""
        self.bytes -= size
        self.rows = block.clocks.join(self.rows, rows)
        if self.pending == 0 and self.bytes < 0:
            text = f"{-self.bytes} bytes more than {self.name} expects arrive"
            raise block.fault(errors.TransactionError, text)
        self.settle(block, np.zeros(0, np.int64))

    def settle(self, block: "Block", threads: np.ndarray) -> None:
        """End the phase if nothing is missing.

        Raises:
            TransactionError: a copy that was issued in this phase is still in flight.
        """
        if self.pending or self.bytes:
            return
        self.inflight = [(op, phase) for op, phase in self.inflight if not op.is_done]
        late = [op for op, phase in self.inflight if phase <= self.phase]
        if late:
            text = f"phase {self.phase} of {self.name} ends while {late[0].name} is in flight"
            raise block.fault(errors.TransactionError, text, threads)
        self.phase += 1
        self.pending = self.count
        self.done = self.rows

    def has_passed(self, parity: int) -> bool:
        """Whether the phase of that parity has completed (the one before the first counts as odd)."""
        return self.phase % 2 != parity

    def __str__(self) -> str:
        """Return the state, for a report."""
        return (
            f"{self.name} (phase {self.phase}, {self.pending} of {self.count} arrivals and "
            f"{self.bytes} bytes missing)"
        )
