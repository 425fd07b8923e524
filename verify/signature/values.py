"""The value of an element of a tile program, as a term over the tensors.

Values are found on demand, from a read back to the statement that wrote the element, through loops
iteration by iteration. What a statement means is the tile program's meaning: a copy reads zero beyond
a tensor, a matrix product is a chain of instructions of 32 bytes of K in ascending order (that the
device issues them so is checked apart).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.evaluate import Cond, Evaluator, compare
from verify.refine.moves import is_atomic
from verify.refine.sym import Algebra, Atom, Sym, const
from verify.refine.tile import Assign, Gemm, Reduce, Step, thread_of_starts
from verify.signature.digits import IndexMap, index_map
from verify.signature.normal import OTHER_RANGE, Normal
from verify.signature.program import Body, Frame, LoopBody, Place
from verify.signature.scatter import scattered
from verify.signature.terms import Term, Terms, show_sym, walk
from verify.text import show

INSTRUCTION_K_BITS = 256  # of K that one wgmma takes from a row
INSTRUCTION_ROWS = 64
WARPGROUP = 128  # threads
MAX_ITERATIONS = 4096  # of one loop that are followed one by one
MAX_AHEAD = 3  # iterations before that a ring is filled
MIN_FOLDED = 9  # fewer iterations are always followed one by one, so that they compare with straight code
_NO_BITS = frozenset({"likely", "type_annotation", "ignore_loop_partition"})


class BatchDependentError(Exception):
    """A trip count or condition that depends on the batch or on where the row lies."""


class _PartlyWrittenError(UnsupportedIR):
    """Whether a statement writes an element depends on `cond`."""

    def __init__(self, what: str, cond: Cond) -> None:
        super().__init__(f"{what} writes a part that is not known")
        self.cond = cond


@dataclass
class Settings:
    """What holds during one evaluation.

    Attributes:
        env: shape parameters and launch indices.
        known: normal forms of conditions that hold.
        facts: those and the ranges of loop counters, for the solver.
        decide: asks a solver whether a condition always holds, or never does; None where neither.
        order: reduction order of a floating-point reduce step, for its term.
        launch: launch variables by tag, with their extents.
        row: number of the row in the batch, None where the output has no rows.
        shared_rows: tensor -> how many consecutive rows have one entry, or equal ones.
    """

    env: Mapping[ir.Var, Sym]
    known: set[tuple]
    facts: Cond
    decide: Callable[[Cond, Cond], bool | None]
    order: Callable[[Step], object]
    tensors: Mapping[ir.Var, ir.Buffer]
    written: set[ir.Var]
    is_batch: Callable[[Sym], bool]
    launch: Mapping[str, tuple[ir.Var, ir.Expr]]
    row: Sym | None = None
    shared_rows: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Values:
    """Evaluates reads and expressions of one tile program."""

    algebra: Algebra
    terms: Terms
    settings: Settings
    depth: int = 0
    _maps: dict[tuple, IndexMap] = field(default_factory=dict)
    _solved: dict[tuple, tuple[dict[ir.Var, Sym], Cond]] = field(default_factory=dict)
    _memo: dict[tuple, Term | None] = field(default_factory=dict)
    _signs: dict[int, bool] = field(default_factory=dict)
    _first: dict[int, Sym] = field(default_factory=dict)  # value of a frame's counter
    _frames: list[Frame] = field(default_factory=list)
    _earlier: dict[tuple[int, int], Frame] = field(default_factory=dict)
    _shifts: dict[int, tuple[int, int, Sym]] = field(default_factory=dict)  # start, iterations back, counter
    _cases: tuple[tuple, ...] = ()  # what is supposed, where an element is followed case by case
    _elements: dict[tuple, Term] = field(default_factory=dict)
    _plains: dict[int, tuple[ir.Expr, bool]] = field(default_factory=dict)
    _ranges: dict[tuple, tuple[Sym, Sym]] = field(default_factory=dict)
    _evaluators: dict[tuple, Evaluator] = field(default_factory=dict)
    _fed: dict[tuple[int, ir.Var], bool] = field(default_factory=dict)
    _ahead: dict[tuple, Term | None] = field(default_factory=dict)
    _normal: Normal = field(init=False)
    _rewritten: dict[tuple, dict[int, Term]] = field(default_factory=dict)  # by a counter and its value

    def __post_init__(self) -> None:
        """Rewrite terms of one evaluation together: what is known of a term is kept."""
        self._normal = Normal(self.terms, self.algebra)

    # ------------------------------------------------------------------ conditions
    def holds(self, cond: Cond) -> bool | None:
        """Return whether `cond` always holds (True), never does (False), or depends (None)."""
        if not cond.mask:
            return False
        left = Cond(True, {k: v for k, v in cond.literals.items() if k not in self.settings.known})
        return True if left.is_true else self._decided(left)

    def _decided(self, cond: Cond) -> bool | None:
        left = Cond(True, {k: v for k, v in cond.literals.items() if k not in self.settings.facts.literals})
        return True if left.is_true else self.settings.decide(left, self.settings.facts)

    # ------------------------------------------------------------------ reads
    def element(self, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term:
        """Return the value of `buffer[indices]` at `place`.

        Where one statement writes part of a buffer and another the rest, both cases are followed: one
        term if they agree, else the choice between them by the index.

        Raises:
            UnsupportedIR: the statement that wrote it is not found or not understood.
        """
        key = (id(buffer), tuple(i.key for i in indices), place.key, self.depth, self._cases)
        found = self._elements.get(key)
        if found is None:
            found = self._elements[key] = self._any_element(buffer, indices, place)
        return found

    def _any_element(self, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term:
        try:
            return self._element(buffer, indices, place)
        except _PartlyWrittenError as part:
            bound, *cases = self._split(part)
            first, second = (self._supposing(case, buffer, indices, place) for case in cases)
            if first is second:
                return first
            test = self.terms.binary(
                "ge", ir.BOOL, self.terms.index(bound, ir.INT32), self.terms.const(0, ir.INT32)
            )
            return self.terms.make("select", first.dtype, test, first, second)

    def _split(self, part: _PartlyWrittenError) -> tuple[Sym, Cond, Cond]:
        """Return what must not be negative, that as a condition, and its negation, less what holds anyway."""
        known = self.settings.known | self.settings.facts.literals.keys()
        open_literals = [
            literal
            for key, literal in part.cond.literals.items()
            if key not in known and not self.holds(Cond(True, {key: literal}))
        ]
        if len(open_literals) != 1 or open_literals[0].kind != "ge":
            raise UnsupportedIR(str(part)) from None
        (literal,) = open_literals
        assert isinstance(literal.value, Sym), "an order is between numbers"
        return literal.value, Cond(True, {literal.key: literal}), compare("lt", literal.value, const(0))

    def _supposing(self, case: Cond, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term:
        facts, cases = self.settings.facts, self._cases
        self.settings.facts, self._cases = facts & case, (*cases, *case.literals)
        try:
            return self.element(buffer, indices, place)
        finally:
            self.settings.facts, self._cases = facts, cases

    def _element(self, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term:
        # The last write may be in this body, in an earlier iteration, or before the loop.
        here: Place | None = place
        while here is not None:
            found = self._in_body(buffer, indices, here)
            if found is not None:
                return found
            if isinstance(here.value, Frame) and buffer.data in here.body.written:
                at = Place(here.body, 0, here.outer, here.value).key
                key = (id(buffer), tuple(i.key for i in indices), at, self.depth, self._cases)
                if key not in self._ahead:
                    self._ahead[key] = self._filled_ahead(buffer, indices, here)
                return self._ahead[key] or self._carried(buffer, indices, here.value, here.outer)
            here = self._before(buffer, here)
        raise UnsupportedIR(f"{buffer.name or buffer.data.name} is read before it is written")

    def _before(self, buffer: ir.Buffer, place: Place) -> Place | None:
        """Return where to go on looking: the iteration before, or what is before the loop."""
        body = place.body
        if isinstance(body, LoopBody) and buffer.data in body.written and isinstance(place.value, int):
            start, _ = self._constant_range(body, place.outer)
            if place.value > start:
                return Place(body, len(body.items), place.outer, place.value - 1)
        return place.outer

    def _in_body(self, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term | None:
        """Return the value from the last write in the items before `place`, None if there is none."""
        for index in range(place.index - 1, -1, -1):
            item = place.body.items[index]
            at = Place(place.body, index, place.outer, place.value)
            if isinstance(item, Step):
                if item.dst.data is buffer.data:
                    found = self._written(item, buffer, indices, at)
                    if found is not None:
                        return found
            elif buffer.data in item.written:
                found = self._after_loop(item, buffer, indices, at)
                if found is not None:
                    return found
        return None

    # ------------------------------------------------------------------ loops
    def _after_loop(
        self, loop: LoopBody, buffer: ir.Buffer, indices: tuple[Sym, ...], at: Place
    ) -> Term | None:
        """Return the value that a loop leaves, None where it does not write the element."""
        start, extent = self._range(loop, at)
        count = int(extent.constant) if extent.is_constant else None
        if start.is_constant and (count is None or count >= MIN_FOLDED):
            key = (id(loop), id(buffer), tuple(i.key for i in indices), at.key, self.depth, self._cases)
            if key not in self._memo:
                self._memo[key] = self._folded(loop, buffer, indices, at, int(start.constant), extent)
            if self._memo[key] is not None:
                return self._memo[key]
        first, stop = self._constant_range(loop, at)
        for value in range(stop - 1, first - 1, -1):
            found = self._in_body(buffer, indices, Place(loop, len(loop.items), at, value))
            if found is not None:
                return found
        return None

    def _folded(
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
        counter = self._counter(f"t{depth}", start, None if high is None else start + high - 1)
        within = compare("lt", counter, extent + const(start))
        saved = self.settings.facts
        self.settings.facts = saved & within
        try:
            for signs in (True, False):  # first as if no carried zero were negative
                found = self._fold(loop, Frame(counter, depth), buffer, indices, at, signs)
                if found is not None:
                    states, bodies = found
                    inits = tuple(init for _, _, init, _ in states)
                    return self.terms.make("fold", bodies[0].dtype, depth, start, extent, 0, inits, bodies)
        except UnsupportedIR:
            pass  # not alike, e.g. a condition on the counter: followed one by one instead
        finally:
            self.settings.facts = saved
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
        self._first[id(frame)] = const(int(self._range(loop, at)[0].constant))
        self._frames.append(frame)  # kept, so that its identity stays its own
        self._carried(buffer, indices, frame, at)
        bodies: list[Term] = []
        while len(bodies) < len(frame.states):
            state, element, _, _ = frame.states[len(bodies)]
            end = Place(loop, len(loop.items), at, frame)
            found = self._in_body(state, self._moved(element, frame, frame.counter + const(1)), end)
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

    def _filled_ahead(self, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term | None:
        """Return what earlier iterations, or what comes before the loop, wrote for any one iteration.

        A ring is filled some iterations before its contents are used, the first of them before the loop.
        Both must be one formula: that of an earlier iteration, with the counter at its first value, is what
        was written before the loop. None where the buffer is computed from its own old contents, or where the
        two differ.
        """
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
            start, _ = self._range(body, place.outer)
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
            found = self._element(buffer, indices, Place(body, len(body.items), place.outer, earlier))
            name = next(iter(counter.atoms())).args[0]
            name = name.rstrip(OTHER_RANGE)
            at_first = tuple(self._normal.index(i, {name: first + ahead}) for i in indices)
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
        return self._normal.rewrite(term, dict(counters), self._rewritten.setdefault(counters, {}))

    def _counter(self, name: str, low: int, high: int | None) -> Sym:
        """Return the symbol of a counter; the algebra knows symbols by name, so another range has another."""
        while True:
            symbol = self.algebra.var(name, low, high)
            if symbol.bounds() == (low, high):
                return symbol
            name += OTHER_RANGE

    def _carried(
        self, buffer: ir.Buffer, indices: tuple[Sym, ...], frame: Frame, outer: Place | None
    ) -> Term:
        """Return the term for what the iteration before left in an element."""
        if id(frame) not in self._signs:  # one iteration of a loop around the output's own statement
            raise UnsupportedIR(f"an element of {buffer.name} that an earlier iteration left")
        for known, element, _, hole in frame.states:
            if known is buffer and all(a.key == b.key for a, b in zip(element, indices, strict=True)):
                return hole
        assert outer is not None, "a loop is in a body"
        # An element that moves with the counter is a state too: what an iteration finds where its own counter
        # says, the one before left where that counter less one, plus one, says.
        init = self.element(buffer, self._moved(indices, frame, self._first[id(frame)]), outer)
        flag = self._signs[id(frame)] and init.never_minus_zero
        hole = self.terms.make("carried", init.dtype, frame.depth, len(frame.states), flag)
        frame.states.append((buffer, indices, init, hole))
        return hole

    def _moved(self, indices: tuple[Sym, ...], frame: Frame, counter: Sym) -> tuple[Sym, ...]:
        """Return `indices` where the frame's counter is `counter`."""
        atom = next(iter(frame.counter.atoms()))
        if not any(a is atom for i in indices for a in i.atoms()):
            return indices
        name = str(atom.args[0]).rstrip(OTHER_RANGE)
        return tuple(self._normal.index(i, {name: counter}) for i in indices)

    def _range(self, body: LoopBody, outer: Place | None) -> tuple[Sym, Sym]:
        key = (id(body), outer.key if outer is not None else (), self._cases)
        if key not in self._ranges:
            self._ranges[key] = self._range_of(body, outer)
        return self._ranges[key]

    def _range_of(self, body: LoopBody, outer: Place | None) -> tuple[Sym, Sym]:
        loop = body.loop
        assert loop is not None, "a loop has a range"
        evaluator = replace(self._evaluator(outer), load=self._own_entry)
        exprs = (loop.start, loop.extent)
        text = f"{loop.var.name} in [{show(loop.start)}, +{show(loop.extent)})"
        what = f"the range of the loop over {text} depends on the batch"
        named = (evaluator.env.get(n) for e in exprs for n in ir.walk(e) if isinstance(n, ir.Var))
        try:
            start, extent = (evaluator.int(e) for e in exprs)
        except UnsupportedIR:
            if any(v is not None and self.settings.is_batch(v) for v in named):
                raise BatchDependentError(what) from None
            raise
        if self.settings.is_batch(start) or self.settings.is_batch(extent):
            raise BatchDependentError(what)
        return start, extent

    def _own_entry(self, evaluator: Evaluator, load: ir.Load) -> Sym:
        """Return the symbol of an integer in a loop's range that is the row's own, by `shared_rows`.

        Raises:
            UnsupportedIR: it is read from another place.
        """
        tensor = self.settings.tensors.get(load.buffer.data)
        row = self.settings.row
        if (
            tensor is None
            or row is None
            or load.buffer.data in self.settings.written
            or len(load.indices) != 1
        ):
            raise UnsupportedIR(f"{load.buffer.name} in the range of a loop")
        (index,) = (evaluator.int(i) for i in load.indices)
        extent = self._evaluator(None).int(tensor.shape[0])
        inside = compare("ge", index, const(0)) & compare("lt", index, extent)
        is_own = tensor.name in self.settings.shared_rows and self._own_row(tensor.name, index).key == row.key
        if not is_own or not self.holds(inside):
            raise UnsupportedIR(f"{load.buffer.name} in the range of a loop")
        return self.algebra.call("load", (f"{tensor.name} of the row",), *load.dtype.int_range)

    def _constant_range(self, body: LoopBody, outer: Place | None) -> tuple[int, int]:
        start, extent = self._range(body, outer)
        name = body.loop.var.name if body.loop else ""
        if not start.is_constant or not extent.is_constant:
            raise UnsupportedIR(f"the loop over {name} has a symbolic range")
        if int(extent.constant) > MAX_ITERATIONS:
            raise UnsupportedIR(f"the loop over {name} has {int(extent.constant)} iterations")
        return int(start.constant), int(start.constant) + max(int(extent.constant), 0)

    def _evaluator(self, place: Place | None) -> Evaluator:
        key = place.key if place is not None else ()
        if key not in self._evaluators:
            self._evaluators[key] = self._evaluator_at(place)
        return self._evaluators[key]

    def _evaluator_at(self, place: Place | None) -> Evaluator:
        values = dict(self.settings.env)
        here = place
        while here is not None:
            if isinstance(here.body, LoopBody) and here.body.loop is not None:
                value = here.value
                values[here.body.loop.var] = value.counter if isinstance(value, Frame) else const(value)
            here = here.outer
        return Evaluator(self.algebra, values)

    # ------------------------------------------------------------------ statements
    def _written(self, step: Step, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term | None:
        key = (step.number, id(buffer), tuple(i.key for i in indices), place.key, self.depth, self._cases)
        if key not in self._memo:
            self._memo[key] = self._write(step, buffer, indices, place)
        return self._memo[key]

    def _write(self, step: Step, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term | None:
        evaluator = self._evaluator(place)
        part = None
        if buffer is not step.dst and not _same_shape(buffer, step.dst):
            indices, part = self._through(buffer, step.dst, indices)
        match step:
            case Assign():
                value = self._assigned(step, indices, place, evaluator)
            case Gemm():
                self._unguarded(step, evaluator)
                value = self._product(step, indices, place, evaluator)
            case Reduce():
                self._unguarded(step, evaluator)
                value = self._reduced(step, indices, place)
            case _:
                raise UnsupportedIR(f"{step.what} is no known step")
        if value is None or (part is None and buffer.dtype == value.dtype):
            return value
        if part is None:
            return self.terms.make("reinterpret", buffer.dtype, value)
        return self.terms.make("bits", buffer.dtype, value, part)

    def _unguarded(self, step: Step, evaluator: Evaluator) -> None:
        for guard in step.guards:
            if not self.holds(evaluator.cond(guard)):
                raise UnsupportedIR(f"{step.what} under a condition")

    def _through(
        self, view: ir.Buffer, stored: ir.Buffer, indices: tuple[Sym, ...]
    ) -> tuple[tuple[Sym, ...], Sym | None]:
        """Return the element of `stored` that holds an element of another view, and which part of it."""
        flat = const(0)
        for index, extent in zip(indices, _shape(view), strict=True):
            flat = flat.scaled(extent) + index
        wide, narrow = stored.dtype.bits, view.dtype.bits
        if wide % narrow:
            raise UnsupportedIR(f"{view.name} joins elements of {stored.name}")
        ratio = wide // narrow
        whole = self.algebra.floordiv(flat, ratio)
        part = flat - whole.scaled(ratio) if ratio > 1 else None
        found: list[Sym] = []
        for extent in reversed(_shape(stored)[1:]):
            outer = self.algebra.floordiv(whole, extent)
            found.append(whole - outer.scaled(extent))
            whole = outer
        return (whole, *reversed(found)), part

    def _assigned(
        self, step: Assign, indices: tuple[Sym, ...], place: Place, evaluator: Evaluator
    ) -> Term | None:
        if is_atomic(step.value):
            return self._updated(step, indices, place)
        env, cond = self._coordinates(step, indices, evaluator)
        around = self._evaluator(place)
        inner = replace(around, env={**around.env, **env})
        written = self.holds(cond)
        if written is False:
            return None
        for guard in step.guards:
            test = self.expression(guard, inner, place)
            value = self._truth(test)
            if value is False:
                return None
            if value is None:
                raise UnsupportedIR(f"{step.what} under a condition")
        if written is None:
            raise _PartlyWrittenError(step.what, cond)
        return self.expression(step.value, inner, place)

    def _updated(self, step: Assign, indices: tuple[Sym, ...], place: Place) -> Term:
        """Return an element after the atomic updates of a step, any one of which is named by counters."""
        old, depth, counters = self.element(step.dst, indices, place), self.depth, {}
        for var, extent in step.coordinates:
            self.depth += 1
            counters[var] = self._counter(f"k{self.depth}", 0, extent - 1)
        around = self._evaluator(place)
        inner = replace(around, env={**around.env, **counters})
        try:
            return scattered(self.terms, step, old, indices, lambda e: self.expression(e, inner, place))
        finally:
            self.depth = depth

    def _coordinates(
        self, step: Assign, indices: tuple[Sym, ...], evaluator: Evaluator
    ) -> tuple[dict[ir.Var, Sym], Cond]:
        loops = tuple(evaluator.env[x.var].key for x in step.loops)
        key = (step.number, loops)
        if key not in self._maps:
            self._maps[key] = index_map(self.algebra, step.coordinates, step.indices, evaluator, step.number)
        wanted = (key, tuple(i.key for i in indices))
        if wanted not in self._solved:
            self._solved[wanted] = self._maps[key].solve(self.algebra, indices)
        return self._solved[wanted]

    def _product(
        self, step: Gemm, indices: tuple[Sym, ...], place: Place, evaluator: Evaluator
    ) -> Term | None:
        assert step.a is not None, "a gemm has operands"
        assert step.b is not None, "a gemm has operands"
        assert step.c is not None, "a gemm has a product"
        lows = [evaluator.int(m) for m in step.c.mins]
        sizes = [_integer(e) for e in step.c.extents]
        inside, position = Cond(), []
        for index, low, size in zip(indices, lows, sizes, strict=True):
            offset = index - low
            inside &= compare("ge", offset, const(0)) & compare("lt", offset, const(size))
            position.append(offset)
        written = self.holds(inside)
        if written is False:
            return None
        if written is None:
            raise _PartlyWrittenError(step.what, inside)
        row, column = position[-2:]
        evaluator = self._of_row(step, row, sizes, evaluator)
        clear = self.holds(evaluator.cond(step.clear))
        if clear is None:
            raise UnsupportedIR(f"{step.what} clears on a condition that is not known")
        value = None if clear else self.element(step.c.buffer, indices, place)
        depth = _integer(step.a.extents[-2 if step.trans_a else -1])
        width = INSTRUCTION_K_BITS // step.a.buffer.dtype.bits
        if depth % width:
            raise UnsupportedIR(f"{step.what} over {depth} elements of K")
        self.depth += 1
        inner = self._counter(f"k{self.depth}", 0, width - 1)
        kinds = (step.a.buffer.dtype.name, step.b.buffer.dtype.name)
        for start in range(0, depth, width):
            at = inner + const(start)
            a = self._operand(step.a, step.trans_a, row, at, place, evaluator)
            b = self._operand(step.b, not step.trans_b, column, at, place, evaluator)
            previous = "cleared" if value is None else value
            value = self.terms.make("mma", step.c.buffer.dtype, previous, a, b, width, kinds)
        self.depth -= 1
        return value

    def _of_row(self, step: Gemm, row: Sym, sizes: list[int], evaluator: Evaluator) -> Evaluator:
        """Return the evaluator of a row's operands: B may start where the row's warpgroup says."""
        assert step.b is not None, "a gemm has operands"
        thread = thread_of_starts(step.b, self.settings.launch)
        if thread is None:
            return evaluator
        groups = _integer(self.settings.launch["threadIdx.x"][1]) // WARPGROUP
        if sizes[-2] != groups * INSTRUCTION_ROWS:
            raise UnsupportedIR(f"{step.what}: an operand by thread where warpgroups have other than 64 rows")
        first = self.algebra.floordiv(row, INSTRUCTION_ROWS).scaled(WARPGROUP)
        return replace(evaluator, env={**evaluator.env, thread: first})

    def _operand(
        self, region: ir.Region, swapped: bool, row: Sym, k: Sym, place: Place, evaluator: Evaluator
    ) -> Term:
        *outer, first, second = (evaluator.int(m) for m in region.mins)
        matrix = (first + k, second + row) if swapped else (first + row, second + k)
        return self.element(region.buffer, (*outer, *matrix), place)

    def _reduced(self, step: Reduce, indices: tuple[Sym, ...], place: Place) -> Term:
        assert step.src is not None, "a reduction has a source"
        shape = _shape(step.src.buffer)
        dim = step.dim % len(shape)
        self.depth += 1
        inner = self._counter(f"k{self.depth}", 0, shape[dim] - 1)
        kept = indices if len(indices) == len(shape) else (*indices[:dim], const(0), *indices[dim:])
        source = (*kept[:dim], inner, *kept[dim + 1 :])
        body = self.element(step.src.buffer, source, place)
        self.depth -= 1
        dtype = step.dst.dtype
        if body.dtype != dtype:
            body = self.terms.make("cast", dtype, body)
        ordered = not dtype.is_int and step.op in ("sum", "abssum")
        order = str(self.settings.order(step)) if ordered else "any"
        value = self.terms.make("reduce", dtype, step.op, shape[dim], order, body)
        if step.clear:
            return value
        op = {"sum": "add", "abssum": "add", "absmax": "max"}.get(step.op, step.op)
        return self.terms.binary(op, dtype, self.element(step.dst, indices, place), value)

    # ------------------------------------------------------------------ expressions
    def expression(self, expr: ir.Expr, evaluator: Evaluator, place: Place) -> Term:
        """Return the value of an expression at `place`.

        Raises:
            UnsupportedIR: an operation that is not understood.
        """
        if self._is_plain(expr):
            plain = self._plain(expr, evaluator)
            if plain is not None:
                return plain
        match expr:
            case ir.Const(value=value):
                return self.terms.const(value, expr.dtype)
            case ir.Broadcast(value=value):
                return self.expression(value, evaluator, place)
            case ir.Load():
                return self._load(expr, evaluator, place)
            case ir.Cast(a=a):
                return self._cast(expr.dtype, self.expression(a, evaluator, place))
            case ir.BinOp(op=op, a=a, b=b):
                left, right = self.expression(a, evaluator, place), self.expression(b, evaluator, place)
                return self.terms.binary(op, expr.dtype, left, right)
            case ir.Not(a=a):
                return self.terms.make("not", expr.dtype, self.expression(a, evaluator, place))
            case ir.Select(cond=cond, a=a, b=b):
                return self._select(expr, cond, a, b, evaluator, place)
            case ir.Call(op=op, args=(a,)) if op in _NO_BITS:
                return self.expression(a, evaluator, place)
            case ir.Call(op=op, args=args):
                if op.startswith("atomic") or any(isinstance(a, (ir.Region, ir.AccessPtr)) for a in args):
                    raise UnsupportedIR(f"{op} in a value")
                parts = tuple(
                    a.value if isinstance(a, ir.Str) else self.expression(a, evaluator, place) for a in args
                )
                return self.terms.make(op, expr.dtype, *parts)
        raise UnsupportedIR(f"{type(expr).__name__} in a value")

    def _is_plain(self, expr: ir.Expr) -> bool:
        """Return whether no data takes part in an integer."""
        known = self._plains.get(id(expr))
        if known is None:
            plain = expr.dtype.is_int and not any(isinstance(e, (ir.Load, ir.Call)) for e in ir.walk(expr))
            known = self._plains[id(expr)] = (expr, plain)
        return known[1]

    def _plain(self, expr: ir.Expr, evaluator: Evaluator) -> Term | None:
        """Return an integer without data; None where it is no index arithmetic."""
        try:
            if expr.dtype.name == "bool":
                value = self.holds(evaluator.cond(expr))
                return None if value is None else self.terms.const(value, expr.dtype)
            return self.terms.index(evaluator.int(expr), expr.dtype)
        except UnsupportedIR:
            return None

    def _cast(self, dtype: ir.DType, value: Term) -> Term:
        if value.dtype == dtype:
            return value
        if value.op == "const" and dtype.is_int and value.dtype.is_int:
            return self.terms.const(
                (value.args[0] - dtype.int_range[0]) % (1 << dtype.bits) + dtype.int_range[0], dtype
            )
        if value.op == "const" and dtype.name == "float32":
            number = float.fromhex(value.args[0]) if not value.dtype.is_int else float(value.args[0])
            if _is_float32(number):
                return self.terms.const(number, dtype)
        return self.terms.make("cast", dtype, value)

    def _truth(self, term: Term) -> bool | None:
        return bool(term.args[0]) if term.op == "const" else None

    def _select(
        self, expr: ir.Expr, cond: ir.Expr, a: ir.Expr, b: ir.Expr, evaluator: Evaluator, place: Place
    ) -> Term:
        test = self.expression(cond, evaluator, place)
        value = self._truth(test)
        if value is not None:
            return self.expression(a if value else b, evaluator, place)
        yes, no = self.expression(a, evaluator, place), self.expression(b, evaluator, place)
        return yes if yes is no else self.terms.make("select", expr.dtype, test, yes, no)

    def _own_row(self, tensor: str, value: Sym) -> Sym:
        """Return the row's number where `value` is that, or an entry that rows share with the row."""
        row = self.settings.row
        if row is None or not self.settings.is_batch(value) or value.key == row.key:
            return value
        share = self.settings.shared_rows.get(tensor)
        if share is not None:
            group = self.algebra.floordiv(row, share)
            if group.key in (value.key, self.algebra.floordiv(value, share).key):
                return row
        if _holds_choice(value) and self.holds(compare("eq", value, row)):  # clamped to the last row
            return row
        return value

    def _joined(self, value: Sym) -> Sym:
        """Return q * (x // (q * c)) + r as x // c where the case that is followed makes it that.

        So the two halves of a tile that statements of their own write, of a buffer or of the output, read one
        element by one name.
        """
        for monomial, factor in value.terms.items():
            if len(monomial) != 1 or monomial[0].kind != "floordiv" or not isinstance(factor, int):
                continue
            inner, divisor = monomial[0].args
            if factor < 2 or divisor % factor or not self._is_split(monomial[0]):
                continue
            rest = value - Sym({monomial: factor})
            finer = self.algebra.floordiv(inner, divisor // factor)
            for part in dict.fromkeys((rest.constant % factor, 0)):  # 0: x starts at the part itself
                joined = rest - const(part) + finer
                if self.holds(compare("eq", value, joined)):
                    return joined
        return value

    def _is_split(self, part: Atom) -> bool:
        """Return whether what is known of the case or the statement says where within `part` it is."""
        if self._cases:
            return True
        return any(part in s.atoms() for s in self.settings.facts.syms())

    def _stored(self, load: ir.Load, evaluator: Evaluator, place: Place) -> Term:
        """Return an element of a buffer of the kernel; where data chooses it, of all that it chooses from.

        `bounds` proves that the choice is inside the buffer.
        """
        indices: list[Sym | None] = []
        chosen: list[Term] = []
        for index in load.indices:
            try:
                indices.append(evaluator.int(index))
            except UnsupportedIR:
                indices.append(None)
                chosen.append(self.expression(index, evaluator, place))
        depth, places = self.depth, []
        for index, extent in zip(indices, _shape(load.buffer), strict=True):
            if index is None:
                self.depth += 1
                index = self._counter(f"k{self.depth}", 0, extent - 1)
            places.append(index)
        try:
            value = self.element(load.buffer, tuple(places), place)
        finally:
            self.depth = depth
        return self.terms.make("gather", load.dtype, value, *chosen) if chosen else value

    def _load(self, load: ir.Load, evaluator: Evaluator, place: Place) -> Term:
        buffer = load.buffer
        tensor = self.settings.tensors.get(buffer.data)
        if tensor is None:
            return self._stored(load, evaluator, place)
        if buffer.data in self.settings.written:
            raise UnsupportedIR(f"{tensor.name} is read and written by the kernel")
        if buffer is not tensor and not _same_text(buffer, tensor):
            raise UnsupportedIR(f"another view of {tensor.name}")
        indices: list[Sym | Term] = []
        inside = Cond()
        for index, extent in zip(load.indices, buffer.shape, strict=True):
            try:
                value = evaluator.int(index)
            except UnsupportedIR:
                indices.append(self.expression(index, evaluator, place))
                continue
            within = compare("ge", value, const(0)) & compare("lt", value, self._evaluator(None).int(extent))
            if not self.holds(within):  # what holds says nothing of the batch
                inside &= within
            indices.append(self._own_row(tensor.name, self._joined(value)))
        read = self.terms.make("read", load.dtype, tensor.name, *indices)
        written = self.holds(inside)
        zero = self.terms.const(0, load.dtype)
        if written is None:
            inside = Cond(
                True, {k: v for k, v in inside.literals.items() if not self.holds(Cond(True, {k: v}))}
            )
            syms = inside.syms()
            if any(self.settings.is_batch(s) for s in syms):
                shown = ", ".join(show_sym(i) if isinstance(i, Sym) else "..." for i in indices)
                raise BatchDependentError(
                    f"a row reads {tensor.name}[{shown}]: in bounds or not by the batch"
                )
            return self.terms.make("inside", load.dtype, read, tuple(syms))
        return read if written else zero


def _holds_choice(value: Sym) -> bool:
    return any(a.kind in ("min", "max") for a in value.atoms())


def _integer(expr: ir.Expr) -> int:
    if not isinstance(expr, ir.Const):
        raise UnsupportedIR("symbolic extent of a tile operation")
    return int(expr.value)


def _shape(buffer: ir.Buffer) -> tuple[int, ...]:
    return tuple(_integer(e) for e in buffer.shape)


def _same_shape(a: ir.Buffer, b: ir.Buffer) -> bool:
    return a.dtype == b.dtype and len(a.shape) == len(b.shape) and _shape(a) == _shape(b)


def _same_text(a: ir.Buffer, b: ir.Buffer) -> bool:
    return a.dtype == b.dtype and [show(e) for e in a.shape] == [show(e) for e in b.shape]


def _is_float32(value: float) -> bool:
    return float(np.float32(value)) == value or value != value


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
