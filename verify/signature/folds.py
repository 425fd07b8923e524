"""Loops whose iterations are alike: one term for all of them, over what each takes from the one before."""

from collections.abc import Callable
from dataclasses import dataclass, field

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.evaluate import compare
from verify.refine.sym import Sym, const
from verify.signature.normal import OTHER_RANGE, Normal
from verify.signature.program import Frame, LoopBody, Place
from verify.signature.ranges import Ranges
from verify.signature.state import State
from verify.signature.terms import Term, walk


@dataclass
class Folds:
    """Makes folds.

    Attributes:
        normal: rewrites terms and indices of this evaluation.
        ranges: of loops.
        element: the value of an element at a place.
        in_body: the value that the items of a body before a place leave, None where they write none.
    """

    state: State
    normal: Normal
    ranges: Ranges
    element: Callable[[ir.Buffer, tuple[Sym, ...], Place], Term]
    in_body: Callable[[ir.Buffer, tuple[Sym, ...], Place], Term | None]
    _signs: dict[int, bool] = field(default_factory=dict)
    _first: dict[int, Sym] = field(default_factory=dict)  # value of a frame's counter
    _holes: dict[tuple, Term] = field(default_factory=dict)  # by frame and element
    _frames: list[Frame] = field(default_factory=list)

    def folded(
        self,
        loop: LoopBody,
        buffer: ir.Buffer,
        indices: tuple[Sym, ...],
        at: Place,
        start: int,
        extent: Sym,
    ) -> Term | None:
        """Return the value after a loop as a fold over alike iterations; None where they are not."""
        _, high = extent.bounds()
        depth = at.depth + 1
        counter = self.state.counter(f"t{depth}", start, None if high is None else start + high - 1)
        within = compare("lt", counter, extent + const(start))
        saved = self.state.supposed.facts
        self.state.supposed.facts = saved & within
        try:
            for signs in (True, False):  # first as if no carried zero were negative
                found = self._fold(loop, Frame(counter, depth), buffer, indices, at, signs)
                if found is not None:
                    states, bodies = found
                    inits = tuple(init for _, _, init, _ in states)
                    return self.state.terms.make(
                        "fold", bodies[0].dtype, depth, start, extent, 0, inits, bodies
                    )
        except UnsupportedIR:
            pass  # not alike, e.g. a condition on the counter: followed one by one instead
        finally:
            self.state.supposed.facts = saved
        return None

    def _fold(
        self,
        loop: LoopBody,
        frame: Frame,
        buffer: ir.Buffer,
        indices: tuple[Sym, ...],
        at: Place,
        signs: bool,
    ) -> tuple[list, tuple[Term, ...]] | None:
        self._signs[id(frame)] = signs
        self._first[id(frame)] = const(int(self.ranges.start_extent(loop, at)[0].constant))
        self._frames.append(frame)  # kept, so that its identity stays its own
        self.carried(buffer, indices, frame, at)
        bodies: list[Term] = []
        while len(bodies) < len(frame.states):
            state, element, _, _ = frame.states[len(bodies)]
            end = Place(loop, len(loop.items), at, frame)
            found = self.in_body(state, self._moved(element, frame, frame.counter + const(1)), end)
            if found is None:
                raise UnsupportedIR("an element that no iteration writes")
            bodies.append(found)
        for (_, _, _, hole), body in zip(frame.states, bodies, strict=True):
            if hole.never_minus_zero and not body.never_minus_zero:
                return None
        holes = {id(hole) for *_, hole in frame.states}
        if not any(id(t) in holes for body in bodies for t in walk(body)):
            raise UnsupportedIR("a loop that carries nothing on")
        return frame.states, tuple(bodies)

    def carried(self, buffer: ir.Buffer, indices: tuple[Sym, ...], frame: Frame, outer: Place | None) -> Term:
        """Return the term for what the iteration before left in an element."""
        key = (id(frame), id(buffer), tuple(i.key for i in indices))
        if key in self._holes:
            return self._holes[key]
        assert outer is not None, "a loop is in a body"
        # An element that moves with the counter is a state too: what an iteration finds where its own counter
        # says, the one before left where that counter less one, plus one, says.
        init = self.element(buffer, self._moved(indices, frame, self._first[id(frame)]), outer)
        flag = self._signs[id(frame)] and init.never_minus_zero
        hole = self.state.terms.make("carried", init.dtype, frame.depth, len(frame.states), flag)
        frame.states.append((buffer, indices, init, hole))
        self._holes.setdefault(key, hole)
        return hole

    def _moved(self, indices: tuple[Sym, ...], frame: Frame, counter: Sym) -> tuple[Sym, ...]:
        """Return `indices` where the frame's counter is `counter`."""
        atom = next(iter(frame.counter.atoms()))
        if not any(a is atom for i in indices for a in i.atoms()):
            return indices
        name = str(atom.args[0]).rstrip(OTHER_RANGE)
        return tuple(self.normal.index(i, {name: counter}) for i in indices)
