"""What earlier rounds of a loop around the output's own statement left.

The element says in which round of such a loop it is written: the counter is a number of its coordinates. What
that round reads and no statement of it wrote before, the round before left, or what is before the loop where
there is none. So a software pipeline is followed, which stores in one round the sums of the round before.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.evaluate import compare
from verify.refine.sym import Atom, Sym, const
from verify.signature.normal import Normal
from verify.signature.program import Frame, LoopBody, Place
from verify.signature.state import FirstRoundError, State
from verify.signature.terms import Term

MAX_BACK = 4  # rounds that a value may be carried; what runs on through all of them is a fold


@dataclass
class Rounds:
    """Finds what earlier rounds left.

    Attributes:
        folded: the value that a loop leaves after some of its rounds, None where they are not alike.
        element: the value of an element at a place.
    """

    state: State
    folded: Callable[[LoopBody, ir.Buffer, tuple[Sym, ...], Place, int, Sym], Term | None]
    element: Callable[[ir.Buffer, tuple[Sym, ...], Place], Term]
    _earlier: dict[int, tuple[Frame, Frame]] = field(default_factory=dict)
    _back: dict[int, int] = field(default_factory=dict)

    def left(self, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term:
        """Return the value of an element at the begin of the round that `place` is in.

        Loops around the output's statement start at 0 (`rows` asks for it).

        Raises:
            FirstRoundError: whether there is a round before depends on the element.
            UnsupportedIR: rounds long before left it, and rounds are not alike.
        """
        body, frame = place.body, place.value
        assert isinstance(body, LoopBody), "only loops have frames"
        assert isinstance(frame, Frame), "the caller has looked"
        assert place.outer is not None, "a loop is in a body"
        back = self._back.get(id(frame), 0)
        if back == MAX_BACK:
            raise UnsupportedIR(f"an element of {buffer.name} that an earlier iteration left")
        earlier = self._before(frame, back)
        is_later = compare("ge", earlier.counter, const(0))
        is_sure = self.state.holds(is_later)
        if is_sure is None:
            raise FirstRoundError(frame.counter, is_later)
        if not is_sure:
            return self.element(buffer, indices, place.outer)
        try:
            return self.element(buffer, indices, Place(body, len(body.items), place.outer, earlier))
        except UnsupportedIR:
            if back or self.state.settings.is_batch(frame.counter):
                raise
            found = self.folded(body, buffer, indices, place.outer, 0, frame.counter)
            if found is None:
                raise
            return found

    def _before(self, frame: Frame, back: int) -> Frame:
        if id(frame) not in self._earlier:  # both are kept, so that their identities stay their own
            earlier = Frame(frame.counter - const(1), frame.depth)
            self._earlier[id(frame)] = (frame, earlier)
            self._back[id(earlier)] = back + 1
        return self._earlier[id(frame)][1]

    def agree(self, counter: Sym, later: Term, first: Term) -> bool:
        """Return whether the value of later rounds, where their counter is 0, is that of the first round."""
        whole = counter.symbolic()
        if len(whole.terms) != 1:
            return False
        ((monomial, factor),) = whole.terms.items()
        if len(monomial) != 1 or factor != 1:
            return False
        there = _Placed(self.state.terms, self.state.algebra, part=monomial[0], value=whole - counter)
        memo: dict[int, Term] = {}
        return there.rewrite(later, {}, memo) is there.rewrite(first, {}, memo)


@dataclass
class _Placed(Normal):
    """Rewrites terms for one value of a part of their indices; loops stay loops.

    Attributes:
        part: atom of indices.
        value: in its place.
    """

    part: Atom = field(kw_only=True)
    value: Sym = field(kw_only=True)

    def _rewritten(self, term: Term, values: Mapping[str, Any], memo: dict[int, Term]) -> Term:
        if term.op == "carried":
            return term
        if term.op == "fold":
            depth, start, extent, which, inits, bodies = self._argument(term.args, values, memo)
            if extent.is_constant and int(extent.constant) == 0:
                return inits[which]
            return self.terms.make("fold", term.dtype, depth, start, extent, which, inits, bodies)
        return super()._rewritten(term, values, memo)

    def index(self, value: Sym, values: Mapping[str, Any]) -> Sym:
        """Return `value` where the part has its value."""
        return self._placed(value, values) if self.part in value.atoms() else value

    def _atom(self, atom: Atom, values: Mapping[str, Any]) -> Sym:
        return self.value if atom is self.part else super()._atom(atom, values)

    def _is_closed(self, term: Term) -> bool:
        return False  # any term may have the part
