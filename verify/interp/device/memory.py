"""Memory of a launch: tensors, the shared memory of a block, the registers of its threads.

Bytes are what they are on the chip: FP4 packed, little endian. Memory that nothing wrote holds 0xff
(NaN in every float type that has one).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from verify import ir
from verify.interp.device.shadow import Shadow

POISON = 0xFF
_PAGE_BITS = 12  # of tensors that are only touched in places

Kind = Literal["global", "shared", "barrier", "local"]


class Space:
    """Addressed bytes with their shadow.

    Attributes:
        data: the bytes.
        written: whether anything wrote each byte since its allocation began.
        owner: number of the allocation through which it was written.
        shadow: None where accesses cannot race.
        changes: number of writes so far that changed a byte.
    """

    def __init__(self, data: np.ndarray, is_written: bool, shadow: Shadow | None) -> None:
        """Take `data` as it is; `is_written` False for memory that starts without contents."""
        self.data = data
        self.written = None if is_written else np.zeros(len(data), bool)
        self.owner = None if is_written else np.zeros(len(data), np.int16)
        self.shadow = shadow
        self.changes = 0

    def slots(self, at: np.ndarray) -> np.ndarray:
        """Return where the bytes at addresses `at` are in `data` and the shadow."""
        return at


class SparseSpace(Space):
    """A tensor of any size, of which only touched pages exist; `fill` gives their first contents."""

    def __init__(self, shadow: Shadow | None, fill: Callable[[int, int], np.ndarray]) -> None:
        """Start without pages; `fill` gets the first byte's address and a size."""
        super().__init__(np.zeros(0, np.uint8), True, shadow)
        self._pages: dict[int, int] = {}
        self._fill = fill

    def slots(self, at: np.ndarray) -> np.ndarray:
        """Return positions of addresses, making pages that do not exist yet."""
        size = 1 << _PAGE_BITS
        pages, inverse = np.unique(at >> _PAGE_BITS, return_inverse=True)
        starts = np.empty(len(pages), np.int64)
        for k, page in enumerate(pages.tolist()):
            found = self._pages.get(page)
            if found is None:
                found = self._pages[page] = len(self.data)
                self.data = np.concatenate([self.data, self._fill(page << _PAGE_BITS, size)])
                if self.shadow is not None:
                    self.shadow.grow(len(self.data))
            starts[k] = found
        return starts[inverse.reshape(at.shape)] + (at & (size - 1))


@dataclass(eq=False)
class Storage:
    """One allocation, or a view of part of the arena.

    Attributes:
        kind: global, shared, barrier or local.
        space: its bytes; None for registers.
        base: address of its first byte within the space.
        size_bits: of the allocation.
        number: tells allocations of one space apart.
        alignment: that the address of its first byte is sure to have, beyond `base`.
    """

    name: str
    kind: Kind
    element: ir.DType
    size_bits: int
    space: Space | None = None
    base: int = 0
    number: int = 0
    registers: "Registers | None" = None

    @property
    def size_bytes(self) -> int:
        """Bytes, the last one perhaps in part."""
        return -(-self.size_bits // 8)


@dataclass(eq=False)
class Registers:
    """A local array of every thread.

    Attributes:
        data, written: (threads, bytes).
        stamp: wgmma fences each thread had passed when it wrote the byte.
        reading, writing: wgmma operations in flight that read or write the byte.
    """

    data: np.ndarray
    written: np.ndarray
    stamp: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    reading: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    writing: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    flights: int = 0

    @classmethod
    def of(cls, threads: int, size: int, is_tracked: bool) -> "Registers":
        """Return an array without contents; `is_tracked` if a wgmma may use it."""
        shape = (threads, size)
        made = cls(np.full(shape, POISON, np.uint8), np.zeros(shape, bool))
        if is_tracked:
            made.stamp, made.reading, made.writing = (np.zeros(shape, np.int32) for _ in range(3))
        return made
