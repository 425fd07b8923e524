"""What a run of the device IR can find wrong with a kernel.

Each class is one kind of fault; all carry where it happened. A run stops at its first fault.
"""

from dataclasses import dataclass
from typing import Any

from verify import ir
from verify.interp.errors import InterpreterError

_SHOWN_THREADS = 4


@dataclass(frozen=True)
class Where:
    """The place of a fault.

    Attributes:
        span: the kernel's Python line of the statement.
        other: that of the other access or wait, where there are two.
        block: launch indices of the thread block, x first.
        threads: linear thread ids within the block.
        storage: name of the buffer or barrier.
        address: first byte, from the start of `storage`.
        size: bytes.
    """

    span: ir.Span | None = None
    other: ir.Span | None = None
    block: tuple[int, ...] = ()
    threads: tuple[int, ...] = ()
    storage: str = ""
    address: int | None = None
    size: int | None = None

    def __str__(self) -> str:
        """Return the fields that are known, for a message."""
        parts = []
        if self.storage:
            size = "" if self.size is None else f", {self.size} byte{'' if self.size == 1 else 's'}"
            parts.append(self.storage + size + ("" if self.address is None else f" at byte {self.address}"))
        if self.block:
            parts.append(f"block {self.block}")
        if self.threads:
            shown = ", ".join(str(t) for t in self.threads[:_SHOWN_THREADS])
            more = len(self.threads) - _SHOWN_THREADS
            parts.append(f"thread {shown}" + (f" and {more} more" if more > 0 else ""))
        if self.other is not None:
            parts.append(f"against {self.other.path}:{self.other.line}")
        return "; ".join(parts)


class DeviceError(InterpreterError):
    """A fault of the kernel.

    Attributes:
        reason: what is wrong, without the place.
        where: the place.
    """

    def __init__(self, reason: str, where: Where) -> None:
        """Compose the message: line, reason, place."""
        place = str(where)
        super().__init__(f"{reason} ({place})" if place else reason, where.span)
        self.reason, self.where = reason, where

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by reason and place."""
        return type(self), (self.reason, self.where)


class OutOfBoundsError(DeviceError):
    """An access outside of a tensor, shared allocation, register array or barrier array."""


class BarrierIndexError(OutOfBoundsError):
    """A use of an mbarrier past the array of barriers: of none that was initialised."""


class UninitialisedReadError(DeviceError):
    """A read of bytes that nothing wrote since their allocation began."""


class DataRaceError(DeviceError):
    """Two accesses to one byte, one of them a write, that nothing orders."""


class ProxyFenceError(DataRaceError):
    """A generic write and an access of the async proxy, ordered but without a proxy fence between them."""


class AsyncRegisterError(DeviceError):
    """Registers of a wgmma in flight are touched, or its operands were written after the last wgmma fence."""


class BarrierDivergenceError(DeviceError):
    """Threads of one set do not meet at one barrier or warp-wide operation."""


class DeadlockError(DeviceError):
    """No thread can run and nothing is in flight."""


class TransactionError(DeviceError):
    """The bytes that an mbarrier expects are not the bytes that arrive."""


class ArrivalError(DeviceError):
    """More arrivals at a barrier than it was initialised for."""


class BarrierInitError(DeviceError):
    """An mbarrier is used before its initialisation is visible, or initialised twice."""


class MisalignedError(DeviceError):
    """An address is not aligned as the access needs."""


class AddressOverflowError(DeviceError):
    """Integer arithmetic on an address leaves its type's range."""


class LaunchError(DeviceError):
    """The launch is outside of the hardware's limits."""


class ClusterRankError(DeviceError):
    """A rank or a multicast mask names a block that the cluster does not have, or no block at all."""


class ClusterLifetimeError(DeviceError):
    """Another block addresses shared memory, unordered with the start or the end of the block that has it."""


class ScheduleDependentError(DeviceError):
    """Two schedules of one call wrote different results."""


class StepLimitError(DeviceError):
    """The run took more steps than it was given."""
