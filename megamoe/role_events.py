"""What the threads of one role of a CTA do with shared memory and mbarriers, read off the compiled IR.

`follow` walks the device IR once for a *part* of a CTA's threads that take the same branches, with all sizes
that follow from data as symbols: the plan's tensors are uninterpreted functions, so what is read off holds
    for every routing. Loops around events are kept as loops: of a variable that a round changes nothing is
    known at its beginning but what a proof supplies. Nothing is skipped: an operation without a meaning here
    is UNSUPPORTED.
"""

from dataclasses import dataclass, field
from typing import Any

import z3

from megamoe.ring import every
from verify import ir
from verify.symbols import summary

WARP = 32
THREAD, BLOCK = z3.Int("thread"), z3.Int("bx")
LINE = 128  # bytes of a line of a matrix in shared memory
OPAQUE = "unknown!"  # prefix of symbols for values that are not followed


@dataclass(frozen=True)
class Part:
    """Threads of a CTA that take the same branches, but for elections and places of data."""

    name: str
    first: int
    threads: int

    @property
    def numbers(self) -> range:
        """Numbers of its threads."""
        return range(self.first, self.first + self.threads)


@dataclass(frozen=True)
class Box:
    """What a bulk copy brings: how many bytes of which tensor."""

    bytes_: int
    tensor: str


@dataclass(eq=False)
class Loop:
    """A loop with events inside, in one of its rounds.

    Attributes:
        var: its counter, from `start` on, `extent` rounds.
        path: conditions around it.
        before: variables that its rounds change, as they were before it.
        entry: the same at the beginning of a round: symbols, but for what each round adds a constant to.
        leave: at the end of the round.
        after: behind the loop, likewise.
    """

    var: z3.ArithRef
    start: z3.ArithRef
    extent: z3.ArithRef
    path: tuple[z3.BoolRef, ...]
    before: dict[str, z3.ArithRef]
    entry: dict[str, z3.ArithRef]
    leave: dict[str, z3.ArithRef] = field(default_factory=dict)
    after: dict[str, z3.ArithRef] = field(default_factory=dict)

    @property
    def range(self) -> z3.BoolRef:
        """That the counter is one of its rounds."""
        return z3.And(self.var >= self.start, self.var < self.start + self.extent)


@dataclass(frozen=True)
class Event:
    """Something that a thread does with shared memory, an mbarrier or a barrier.

    Attributes:
        kind: wait, arrive (at an mbarrier); copy (bulk, to shared memory), read, write, tensor (a read by the
            tensor core), commit and drain (of its instructions), sync (a barrier), init (of an mbarrier),
            fence (behind that), store (to memory, of tensors that are followed).
        what: name of the mbarrier array, of the shared buffer or of the tensor; number of a barrier.
        path: conditions under which it happens.
        ranges: of counters of loops and lanes.
        loops: around it, outermost first, of those that hold mbarriers or shared memory.
        elected: whether one lane of each warp does it.
        first, last: place: number of the mbarrier; bytes of the buffer (of the tensor core's reads, but for
            where in a line of LINE bytes).
        value: parity; bytes that an arrival expects (0: none) or a copy brings; pending groups; threads.
        barrier: of a copy, (array, number).
        source: of a copy, its tensor.
        coordinates: of a copy, in its tensor.
        node: of the IR.
        at: order in the program.
    """

    kind: str
    what: str
    path: tuple[z3.BoolRef, ...]
    ranges: tuple[z3.BoolRef, ...]
    loops: tuple[Loop, ...]
    elected: bool
    node: Any
    span: ir.Span | None
    at: int
    first: Any = 0
    last: Any = 0
    value: Any = 0
    barrier: tuple[str, Any] = ("", 0)
    source: str = ""
    coordinates: tuple[Any, ...] = ()

    @property
    def guard(self) -> z3.BoolRef:
        """All of its conditions."""
        return every(*self.path)


@dataclass(frozen=True)
class Search:
    """A loop that looks for the first number, from `start` on, of which `goes_on` does not hold."""

    start: z3.ArithRef
    found: z3.ArithRef
    goes_on: Any  # of a number


@dataclass
class Followed:
    """What `follow` finds of a part.

    Attributes:
        events: in program order.
        loops: with events inside, in program order.
        searches: by the variable that searches.
        stored: private variables and the constants of what is put there, and of the conditions.
        seen: nodes of the IR, by id, whose meaning is among the events.
        counts: (array, number) of each mbarrier of the CTA -> arrivals that it counts; `initialised` sets it.
    """

    part: Part
    events: list[Event] = field(default_factory=list)
    loops: list[tuple[tuple[Loop, ...], Loop]] = field(default_factory=list)
    searches: dict[str, Search] = field(default_factory=dict)
    stored: list[tuple[str, frozenset[str]]] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    counts: dict[tuple[str, int], int] = field(default_factory=dict)

    def slots(self, array: str) -> int:
        """Return the number of mbarriers of an array."""
        return sum(name == array for name, _ in self.counts)

    def is_uniform(self, *terms: z3.ExprRef) -> bool:
        """Return whether terms are the same for all threads of the part."""
        varying = {str(THREAD)}
        while True:
            more = {var for var, used in self.stored if _varies(used, varying)}
            if more <= varying:
                break
            varying |= more
        return not any(_varies(names(t), varying) for t in terms)


def _varies(used: frozenset[str], varying: set[str]) -> bool:
    return any(n.startswith(OPAQUE) or n.split("!")[0] in varying for n in used)


def names(term: z3.ExprRef) -> frozenset[str]:
    """Return the names of the constants in a term."""
    return frozenset(
        str(n.value) for n in summary(term).nodes if n.kind == z3.Z3_OP_UNINTERPRETED and not n.operands
    )
