"""What a statement writes to an element: assignments, atomic updates, products and reductions."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.evaluate import Cond, Evaluator
from verify.refine.model import PRIVATE
from verify.refine.moves import is_atomic
from verify.refine.sym import Sym, const
from verify.refine.tile import Assign, Gemm, Reduce, Step
from verify.signature.digits import IndexMap, index_map
from verify.signature.expressions import truth_of
from verify.signature.memo import Memo
from verify.signature.products import Products
from verify.signature.program import Place
from verify.signature.scatter import scattered
from verify.signature.state import PartlyWrittenError, State, integer_of, shape_of
from verify.signature.terms import Term


@dataclass
class Statements:
    """Evaluates statements.

    Attributes:
        element: the value of an element at a place.
        expression: the value of an expression at a place.
    """

    state: State
    element: Callable[[ir.Buffer, tuple[Sym, ...], Place], Term]
    expression: Callable[[ir.Expr, Evaluator, Place], Term]
    _products: Products = field(init=False)
    _maps: dict[tuple, IndexMap] = field(default_factory=dict)
    _moving: dict[int, tuple[ir.Var, ...]] = field(default_factory=dict)
    _solved: dict[tuple, tuple[dict[ir.Var, Sym], Cond]] = field(default_factory=dict)
    _known: Memo[Term | None] = field(init=False)

    def __post_init__(self) -> None:
        """Read operands of products where other statements' are read."""
        self._products = Products(self.state, self.element)
        self._known = Memo(self.state.supposed)

    def written(self, step: Step, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term | None:
        """Return the value that `step` leaves in an element, None where it does not write it.

        Raises:
            PartlyWrittenError: whether it does depends on the element.
            UnsupportedIR: the statement is not understood.
        """
        key = (step.number, id(buffer), tuple(i.key for i in indices), place.key, self.state.depth)
        return self._known.get(key, lambda: self._write(step, buffer, indices, place))

    def _write(self, step: Step, buffer: ir.Buffer, indices: tuple[Sym, ...], place: Place) -> Term | None:
        evaluator = self.state.evaluator(place)
        part = None
        if buffer is not step.dst and not _same_shape(buffer, step.dst):
            indices, part = self._through(buffer, step.dst, indices)
        match step:
            case Assign():
                value = self._assigned(step, indices, place, evaluator)
            case Gemm():
                self._unguarded(step, evaluator)
                value = self._products.product(step, indices, place, evaluator)
            case Reduce():
                self._unguarded(step, evaluator)
                value = self._reduced(step, indices, place)
            case _:
                raise UnsupportedIR(f"{step.what} is no known step")
        if value is None or (part is None and buffer.dtype == value.dtype):
            return value
        if part is None:
            return self.state.terms.make("reinterpret", buffer.dtype, value)
        return self.state.terms.make("bits", buffer.dtype, value, part)

    def _unguarded(self, step: Step, evaluator: Evaluator) -> None:
        for guard in step.guards:
            if not self.state.holds(evaluator.cond(guard)):
                raise UnsupportedIR(f"{step.what} under a condition")

    def _through(
        self, view: ir.Buffer, stored: ir.Buffer, indices: tuple[Sym, ...]
    ) -> tuple[tuple[Sym, ...], Sym | None]:
        """Return the element of `stored` that holds an element of another view, and which part of it."""
        flat = const(0)
        for index, extent in zip(indices, shape_of(view), strict=True):
            flat = flat.scaled(extent) + index
        wide, narrow = stored.dtype.bits, view.dtype.bits
        if wide % narrow:
            raise UnsupportedIR(f"{view.name} joins elements of {stored.name}")
        ratio = wide // narrow
        whole = self.state.algebra.floordiv(flat, ratio)
        part = flat - whole.scaled(ratio) if ratio > 1 else None
        found: list[Sym] = []
        for extent in reversed(shape_of(stored)[1:]):
            outer = self.state.algebra.floordiv(whole, extent)
            found.append(whole - outer.scaled(extent))
            whole = outer
        return (whole, *reversed(found)), part

    def _assigned(
        self, step: Assign, indices: tuple[Sym, ...], place: Place, evaluator: Evaluator
    ) -> Term | None:
        if is_atomic(step.value):
            return self._updated(step, indices, place)
        guards = self._of_others(step)
        env, cond = self._coordinates(step, indices, evaluator)
        around = self.state.evaluator(place)
        inner = replace(around, env={**around.env, **env})
        written = self.state.holds(cond)
        if written is False:
            return None
        for guard in guards:
            test = self.expression(guard, inner, place)
            value = truth_of(test)
            if value is False:
                return None
            if value is None:
                raise UnsupportedIR(f"{step.what} under a condition")
        if written is None:
            raise PartlyWrittenError(step.what, cond)
        return self.expression(step.value, inner, place)

    def _thread(self, step: Assign) -> ir.Var | None:
        """Return the thread's number where `step` names it and others read what that thread writes."""
        if "threadIdx.x" not in self.state.settings.launch or step.dst.scope in PRIVATE:
            return None
        thread = self.state.settings.launch["threadIdx.x"][0]
        exprs = (*step.indices, step.value, *step.guards)
        return thread if any(e is thread for root in exprs for e in ir.walk(root)) else None

    def _of_others(self, step: Assign) -> tuple[ir.Expr, ...]:
        """Return the guards that say whether `step` writes an element, and not which threads do that.

        Raises:
            UnsupportedIR: what threads write together depends on which of them writes it.
        """
        thread = self._thread(step)
        if thread is None or not step.together:  # else each thread's number is a coordinate
            return step.guards
        if any(e is thread for root in (*step.indices, step.value) for e in ir.walk(root)):
            raise UnsupportedIR(f"{step.what} by the number of whichever thread executes it")
        naming = [g for g in step.guards if any(e is thread for e in ir.walk(g))]
        count = integer_of(self.state.settings.launch["threadIdx.x"][1])
        threads = Evaluator(self.state.algebra, {thread: const(np.arange(count))})
        chosen = np.ones(count, dtype=bool)
        for guard in naming:
            cond = threads.cond(guard)
            if cond.literals:
                raise UnsupportedIR(f"{step.what} by threads that a symbol chooses")
            chosen = chosen & cond.active(count)
        if not chosen.any():
            raise UnsupportedIR(f"{step.what}, which no thread executes")
        return tuple(g for g in step.guards if not any(g is n for n in naming))

    def _updated(self, step: Assign, indices: tuple[Sym, ...], place: Place) -> Term:
        """Return an element after the atomic updates of a step, any one of which is named by counters.

        Raises:
            UnsupportedIR: each thread executes it, or which of them do is said.
        """
        if not step.together or self._thread(step) is not None:
            raise UnsupportedIR(f"{step.what}: atomic updates of each thread")
        old, depth, counters = self.element(step.dst, indices, place), self.state.depth, {}
        for var, extent in step.coordinates:
            self.state.depth += 1
            counters[var] = self.state.counter(f"k{self.state.depth}", 0, extent - 1)
        around = self.state.evaluator(place)
        inner = replace(around, env={**around.env, **counters})
        try:
            return scattered(self.state.terms, step, old, indices, lambda e: self.expression(e, inner, place))
        finally:
            self.state.depth = depth

    def _coordinates(
        self, step: Assign, indices: tuple[Sym, ...], evaluator: Evaluator
    ) -> tuple[dict[ir.Var, Sym], Cond]:
        loops = tuple(evaluator.env[var].key for var in self._counters(step))
        key = (step.number, loops)
        if key not in self._maps:
            coordinates: tuple[tuple[ir.Var, int], ...] = step.coordinates
            thread = None if step.together else self._thread(step)
            if thread is not None:  # any thread may have written the element
                coordinates += ((thread, integer_of(self.state.settings.launch["threadIdx.x"][1])),)
            self._maps[key] = index_map(self.state.algebra, coordinates, step.indices, evaluator, step.number)
        wanted = (key, tuple(i.key for i in indices))
        if wanted not in self._solved:
            self._solved[wanted] = self._maps[key].solve(self.state.algebra, indices)
        return self._solved[wanted]

    def _counters(self, step: Assign) -> tuple[ir.Var, ...]:
        """Return the counters of those loops around a step that say which elements it writes."""
        if step.number not in self._moving:
            used = {v for i in step.indices for v in ir.walk(i) if isinstance(v, ir.Var)}
            self._moving[step.number] = tuple(x.var for x in step.loops if x.var in used)
        return self._moving[step.number]

    def _reduced(self, step: Reduce, indices: tuple[Sym, ...], place: Place) -> Term:
        assert step.src is not None, "a reduction has a source"
        shape = shape_of(step.src.buffer)
        dim = step.dim % len(shape)
        self.state.depth += 1
        inner = self.state.counter(f"k{self.state.depth}", 0, shape[dim] - 1)
        kept = indices if len(indices) == len(shape) else (*indices[:dim], const(0), *indices[dim:])
        source = (*kept[:dim], inner, *kept[dim + 1 :])
        body = self.element(step.src.buffer, source, place)
        self.state.depth -= 1
        dtype = step.dst.dtype
        if body.dtype != dtype:
            body = self.state.terms.make("cast", dtype, body)
        ordered = not dtype.is_int and step.op in ("sum", "abssum")
        order = str(self.state.settings.order(step)) if ordered else "any"
        value = self.state.terms.make("reduce", dtype, step.op, shape[dim], order, body)
        if step.clear:
            return value
        op = {"sum": "add", "abssum": "add", "absmax": "max"}.get(step.op, step.op)
        return self.state.terms.binary(op, dtype, self.element(step.dst, indices, place), value)


def _same_shape(a: ir.Buffer, b: ir.Buffer) -> bool:
    return a.dtype == b.dtype and len(a.shape) == len(b.shape) and shape_of(a) == shape_of(b)
