"""Reads of tensors, where entries that rows share count as the row's own, and of buffers of the kernel."""

from collections.abc import Callable
from dataclasses import dataclass

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.evaluate import Cond, Evaluator, compare
from verify.refine.sym import Atom, Sym, const
from verify.signature.program import Place
from verify.signature.state import BatchDependentError, State, shape_of
from verify.signature.terms import Term, show_sym
from verify.text import show


@dataclass
class Reads:
    """Evaluates reads.

    Attributes:
        element: the value of an element of a buffer of the kernel.
        expression: the value of an index that data decides.
    """

    state: State
    element: Callable[[ir.Buffer, tuple[Sym, ...], Place], Term]
    expression: Callable[[ir.Expr, Evaluator, Place], Term]

    def load(self, load: ir.Load, evaluator: Evaluator, place: Place) -> Term:
        """Return the value of a read; zero beyond a tensor.

        Raises:
            BatchDependentError: whether it is in bounds depends on the batch.
            UnsupportedIR: a tensor that the kernel writes too, or another view of it.
        """
        buffer = load.buffer
        tensor = self.state.settings.tensors.get(buffer.data)
        if tensor is None:
            return self._stored(load, evaluator, place)
        if buffer.data in self.state.settings.written:
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
            within = compare("ge", value, const(0)) & compare(
                "lt", value, self.state.evaluator(None).int(extent)
            )
            if not self.state.holds(within):  # what holds says nothing of the batch
                inside &= within
            indices.append(self.own_row(tensor.name, self._joined(value)))
        read = self.state.terms.make("read", load.dtype, tensor.name, *indices)
        written = self.state.holds(inside)
        zero = self.state.terms.const(0, load.dtype)
        if written is None:
            inside = Cond(
                True, {k: v for k, v in inside.literals.items() if not self.state.holds(Cond(True, {k: v}))}
            )
            syms = inside.syms()
            if any(self.state.settings.is_batch(s) for s in syms):
                shown = ", ".join(show_sym(i) if isinstance(i, Sym) else "..." for i in indices)
                raise BatchDependentError(
                    f"a row reads {tensor.name}[{shown}]: in bounds or not by the batch"
                )
            return self.state.terms.make("inside", load.dtype, read, tuple(syms))
        return read if written else zero

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
        depth, places = self.state.depth, []
        for index, extent in zip(indices, shape_of(load.buffer), strict=True):
            if index is None:
                self.state.depth += 1
                index = self.state.counter(f"k{self.state.depth}", 0, extent - 1)
            places.append(index)
        try:
            value = self.element(load.buffer, tuple(places), place)
        finally:
            self.state.depth = depth
        return self.state.terms.make("gather", load.dtype, value, *chosen) if chosen else value

    def own_row(self, tensor: str, value: Sym) -> Sym:
        """Return the row's number where `value` is that, or an entry that rows share with the row."""
        row = self.state.settings.row
        if row is None or not self.state.settings.is_batch(value) or value.key == row.key:
            return value
        share = self.state.settings.shared_rows.get(tensor)
        if share is not None:
            group = self.state.algebra.floordiv(row, share)
            if group.key in (value.key, self.state.algebra.floordiv(value, share).key):
                return row
        if _holds_choice(value) and self.state.holds(compare("eq", value, row)):  # clamped to the last row
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
            finer = self.state.algebra.floordiv(inner, divisor // factor)
            for part in dict.fromkeys((rest.constant % factor, 0)):  # 0: x starts at the part itself
                joined = rest - const(part) + finer
                if self.state.holds(compare("eq", value, joined)):
                    return joined
        return value

    def _is_split(self, part: Atom) -> bool:
        """Return whether what is known of the case or the statement says where within `part` it is."""
        self.state.supposed.asked.whether = True
        if self.state.supposed.cases:
            return True
        return any(part in s.atoms() for s in self.state.supposed.facts.syms())


def _holds_choice(value: Sym) -> bool:
    return any(a.kind in ("min", "max") for a in value.atoms())


def _same_text(a: ir.Buffer, b: ir.Buffer) -> bool:
    one, other = ((*buffer.shape, *buffer.strides, buffer.offset) for buffer in (a, b))
    return a.dtype == b.dtype and [show(e) for e in one] == [show(e) for e in other]
