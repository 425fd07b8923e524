"""The value of an element of a tile program, as a term over the tensors.

Values are found on demand, from a read back to the statement that wrote the element, through loops
iteration by iteration. What a statement means is the tile program's meaning: a copy reads zero beyond
a tensor, a matrix product is a chain of instructions of 32 bytes of K in ascending order (that the
device issues them so is checked apart).
"""

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.evaluate import Cond, Evaluator, compare
from verify.refine.sym import Algebra, Sym, const
from verify.refine.tile import Step
from verify.signature.expressions import Expressions
from verify.signature.folds import Folds
from verify.signature.memo import Memo
from verify.signature.normal import Normal
from verify.signature.program import Frame, LoopBody, Place
from verify.signature.ranges import Ranges
from verify.signature.reads import Reads
from verify.signature.rings import Rings
from verify.signature.rounds import Rounds
from verify.signature.state import FirstRoundError, PartlyWrittenError, Settings, State
from verify.signature.statements import Statements
from verify.signature.terms import Term, Terms

MIN_FOLDED = 9  # fewer iterations are always followed one by one, so that they compare with straight code


class Values:
    """Evaluates reads and expressions of one tile program."""

    def __init__(self, algebra: Algebra, terms: Terms, settings: Settings) -> None:
        """Start an evaluation: what is found of its terms is kept for all of it."""
        self.state = State(algebra, terms, settings)
        normal = Normal(terms, algebra)
        reads = Reads(self.state, self.element, self.expression)
        self._expressions = Expressions(self.state, reads.load)
        self._statements = Statements(self.state, self.element, self.expression)
        self._ranges = Ranges(self.state, reads.own_row)
        self._folds = Folds(self.state, normal, self._ranges, self.element, self._in_body)
        self._rings = Rings(self.state, normal, self._ranges, self.element, self._element)
        self._rounds = Rounds(self.state, self._folds.folded, self.element)
        self._elements: Memo[Term] = Memo(self.state.supposed)
        self._looped: Memo[Term | None] = Memo(self.state.supposed)

    def expression(self, expr: ir.Expr, evaluator: Evaluator, place: Place) -> Term:
        """Return the value of an expression at `place`.

        Raises:
            UnsupportedIR: an operation that is not understood.
        """
        return self._expressions.value(expr, evaluator, place)

    # ------------------------------------------------------------------ elements
    def element(self, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term:
        """Return the value of `buffer[indices]` at `place`.

        Where one statement writes part of a buffer and another the rest, both cases are followed: one
        term if they agree, else the choice between them by the index.

        Raises:
            UnsupportedIR: the statement that wrote it is not found or not understood.
        """
        key = (id(buffer), tuple(i.key for i in indices), place.key, self.state.depth)
        return self._elements.get(key, lambda: self._any_element(buffer, indices, place))

    def _any_element(self, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term:
        try:
            return self._element(buffer, indices, place)
        except PartlyWrittenError as part:
            bound, *cases = self._split(part)
            first, second = (self._supposing(case, buffer, indices, place) for case in cases)
            is_one = isinstance(part, FirstRoundError) and self._rounds.agree(part.counter, first, second)
            if first is second or is_one:
                return first
            test = self.state.terms.binary(
                "ge", ir.BOOL, self.state.terms.index(bound, ir.INT32), self.state.terms.const(0, ir.INT32)
            )
            return self.state.terms.make("select", first.dtype, test, first, second)

    def _split(self, part: PartlyWrittenError) -> tuple[Sym, Cond, Cond]:
        """Return what must not be negative, that as a condition, and its negation, less what holds anyway."""
        known = self.state.settings.known | self.state.supposed.facts.literals.keys()
        open_literals = [
            literal
            for key, literal in part.cond.literals.items()
            if key not in known and not self.state.holds(Cond(True, {key: literal}))
        ]
        if len(open_literals) != 1 or open_literals[0].kind != "ge":
            raise UnsupportedIR(str(part)) from None
        (literal,) = open_literals
        assert isinstance(literal.value, Sym), "an order is between numbers"
        return literal.value, Cond(True, {literal.key: literal}), compare("lt", literal.value, const(0))

    def _supposing(self, case: Cond, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term:
        supposed = self.state.supposed
        facts, cases = supposed.facts, supposed.cases
        supposed.facts, supposed.cases = facts & case, (*cases, *case.literals)
        try:
            return self.element(buffer, indices, place)
        finally:
            supposed.facts, supposed.cases = facts, cases

    def _element(self, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term:
        # The last write may be in this body, in an earlier iteration, or before the loop.
        here: Place | None = place
        while here is not None:
            found = self._in_body(buffer, indices, here)
            if found is not None:
                return found
            if isinstance(here.value, Frame) and buffer.data in here.body.written:
                if here.value.is_own:
                    return self._rounds.left(buffer, indices, here)
                ahead = self._rings.filled_ahead(buffer, indices, here)
                return ahead or self._folds.carried(buffer, indices, here.value, here.outer)
            here = self._before(buffer, here)
        raise UnsupportedIR(f"{buffer.name or buffer.data.name} is read before it is written")

    def _before(self, buffer: ir.Buffer, place: Place) -> Place | None:
        """Return where to go on looking: the iteration before, or what is before the loop."""
        body = place.body
        if isinstance(body, LoopBody) and buffer.data in body.written and isinstance(place.value, int):
            start, _ = self._ranges.first_stop(body, place.outer)
            if place.value > start:
                return Place(body, len(body.items), place.outer, place.value - 1)
        return place.outer

    def _in_body(self, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term | None:
        """Return the value from the last write in the items before `place`, None if there is none."""
        for index in range(place.index - 1, -1, -1):
            item = place.body.items[index]
            found = None
            if isinstance(item, Step):
                if item.dst.data is buffer.data:
                    at = Place(place.body, index, place.outer, place.value)
                    found = self._statements.written(item, buffer, indices, at)
            elif buffer.data in item.written:
                at = Place(place.body, index, place.outer, place.value)
                found = self._after_loop(item, buffer, indices, at)
            if found is not None:
                return found
        return None

    # ------------------------------------------------------------------ loops
    def _after_loop(
        self, loop: LoopBody, buffer: ir.Buffer, indices: tuple[Sym, ...], at: Place
    ) -> Term | None:
        """Return the value that a loop leaves, None where it does not write the element."""
        start, extent = self._ranges.start_extent(loop, at)
        count = int(extent.constant) if extent.is_constant else None
        if start.is_constant and (count is None or count >= MIN_FOLDED):
            key = (id(loop), id(buffer), tuple(i.key for i in indices), at.key, self.state.depth)
            first = int(start.constant)
            found = self._looped.get(
                key, lambda: self._folds.folded(loop, buffer, indices, at, first, extent)
            )
            if found is not None:
                return found
        first, stop = self._ranges.first_stop(loop, at)
        for value in range(stop - 1, first - 1, -1):
            found = self._in_body(buffer, indices, Place(loop, len(loop.items), at, value))
            if found is not None:
                return found
        return None
