"""Buffers that are filled some iterations before their contents are used."""

from collections.abc import Callable
from dataclasses import dataclass, field

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.sym import Sym, const
from verify.refine.tile import Assign, Step
from verify.signature.memo import Memo
from verify.signature.normal import OTHER_RANGE, Normal
from verify.signature.program import Body, Frame, LoopBody, Place
from verify.signature.ranges import Ranges
from verify.signature.state import State
from verify.signature.terms import Term

MAX_AHEAD = 3  # iterations before that a ring is filled


@dataclass
class Rings:
    """Finds what earlier iterations left for any one iteration.

    Attributes:
        normal: rewrites terms and indices of this evaluation.
        ranges: of loops.
        element: the value of an element at a place, its cases followed.
        found: likewise where one statement writes it.
    """

    state: State
    normal: Normal
    ranges: Ranges
    element: Callable[[ir.Buffer, tuple[Sym, ...], Place], Term]
    found: Callable[[ir.Buffer, tuple[Sym, ...], Place], Term]
    _frames: list[Frame] = field(default_factory=list)
    _earlier: dict[tuple[int, int], Frame] = field(default_factory=dict)
    _shifts: dict[int, tuple[int, int, Sym]] = field(default_factory=dict)  # start, iterations back, counter
    _fed: dict[tuple[int, ir.Var], bool] = field(default_factory=dict)
    _known: Memo[Term | None] = field(init=False)
    _rewritten: dict[tuple, dict[int, Term]] = field(default_factory=dict)  # by a counter and its value

    def __post_init__(self) -> None:
        """Keep what is found under what is supposed."""
        self._known = Memo(self.state.supposed)

    def filled_ahead(self, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term | None:
        """Return what earlier iterations, or what comes before the loop, wrote for any one iteration.

        A ring is filled some iterations before its contents are used, the first of them before the loop.
        Both must be one formula: that of an earlier iteration, with the counter at its first value, is what
        was written before the loop. None where the buffer is computed from its own old contents, or where the
        two differ.
        """
        at = Place(place.body, 0, place.outer, place.value).key
        key = (id(buffer), tuple(i.key for i in indices), at, self.state.depth)
        return self._known.get(key, lambda: self._filled(buffer, indices, place))

    def _filled(self, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term | None:
        body, frame = place.body, place.value
        assert isinstance(body, LoopBody), "only loops have frames"
        assert isinstance(frame, Frame), "the caller has looked"
        fed = (id(body), buffer.data)
        if fed not in self._fed:
            self._fed[fed] = _feeds_itself(body, buffer.data)
        if self._fed[fed]:
            return None
        first, ahead, counter = self._shifts.get(id(frame), (None, 0, frame.counter))
        if first is None:
            start, _ = self.ranges.start_extent(body, place.outer)
            if not start.is_constant:
                return None
            first = int(start.constant)
        if ahead == MAX_AHEAD:
            raise UnsupportedIR(f"an element of {buffer.name} that an iteration long before left")
        if (id(body), id(frame)) not in self._earlier:
            earlier = Frame(frame.counter - const(1), frame.depth)
            self._frames.append(earlier)
            self._shifts[id(earlier)] = (first, ahead + 1, counter)
            self._earlier[id(body), id(frame)] = earlier
        earlier = self._earlier[id(body), id(frame)]
        try:
            found = self.found(buffer, indices, Place(body, len(body.items), place.outer, earlier))
            name = next(iter(counter.atoms())).args[0]
            name = name.rstrip(OTHER_RANGE)
            at_first = tuple(self.normal.index(i, {name: first + ahead}) for i in indices)
            assert place.outer is not None, "a loop is in a body"
            init = self.element(buffer, at_first, place.outer)
            same = self._at(found, (name, first + ahead)) is self._at(init)
        except (UnsupportedIR, KeyError):  # a term that is carried, too
            if ahead:
                raise UnsupportedIR(f"an element of {buffer.name} that an earlier iteration left") from None
            return None
        return found if same else None

    def _at(self, term: Term, *counters: tuple[str, int]) -> Term:
        """Return `term` where counters have these values."""
        return self.normal.rewrite(term, dict(counters), self._rewritten.setdefault(counters, {}))


def _feeds_itself(body: Body, data: ir.Var) -> bool:
    """Return whether a statement in `body` computes contents of `data` from contents of it."""
    for item in body.items:
        if isinstance(item, LoopBody):
            if _feeds_itself(item, data):
                return True
        elif isinstance(item, Step) and item.dst.data is data:
            if not isinstance(item, Assign):
                return True
            if any(isinstance(e, ir.Load) and e.buffer.data is data for e in ir.walk(item.value)):
                return True
    return False
