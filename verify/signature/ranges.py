"""Ranges of loops: numbers, or integers of the row's own, and nothing of the batch."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.evaluate import Evaluator, compare
from verify.refine.sym import Sym, const
from verify.signature.memo import Memo
from verify.signature.program import LoopBody, Place
from verify.signature.state import BatchDependentError, State
from verify.text import show

MAX_ITERATIONS = 4096  # of one loop that are followed one by one


@dataclass
class Ranges:
    """Evaluates the ranges of loops.

    Attributes:
        own_row: the row's number where an index of a tensor is that, or an entry that rows share with it.
    """

    state: State
    own_row: Callable[[str, Sym], Sym]
    _known: Memo[tuple[Sym, Sym]] = field(init=False)

    def __post_init__(self) -> None:
        """Keep ranges under what is supposed."""
        self._known = Memo(self.state.supposed)

    def start_extent(self, body: LoopBody, outer: Place | None) -> tuple[Sym, Sym]:
        """Return the first value of a loop's counter, and how many there are.

        Raises:
            BatchDependentError: they depend on the batch.
            UnsupportedIR: they are not understood.
        """
        key = (id(body), outer.key if outer is not None else ())
        return self._known.get(key, lambda: self._range_of(body, outer))

    def _range_of(self, body: LoopBody, outer: Place | None) -> tuple[Sym, Sym]:
        loop = body.loop
        assert loop is not None, "a loop has a range"
        evaluator = replace(self.state.evaluator(outer), load=self._own_entry)
        exprs = (loop.start, loop.extent)
        text = f"{loop.var.name} in [{show(loop.start)}, +{show(loop.extent)})"
        what = f"the range of the loop over {text} depends on the batch"
        named = (evaluator.env.get(n) for e in exprs for n in ir.walk(e) if isinstance(n, ir.Var))
        try:
            start, extent = (evaluator.int(e) for e in exprs)
        except UnsupportedIR:
            if any(v is not None and self.state.settings.is_batch(v) for v in named):
                raise BatchDependentError(what) from None
            raise
        if self.state.settings.is_batch(start) or self.state.settings.is_batch(extent):
            raise BatchDependentError(what)
        return start, extent

    def _own_entry(self, evaluator: Evaluator, load: ir.Load) -> Sym:
        """Return the symbol of an integer in a loop's range that is the row's own, by `shared_rows`.

        Raises:
            UnsupportedIR: it is read from another place.
        """
        tensor = self.state.settings.tensors.get(load.buffer.data)
        row = self.state.settings.row
        if (
            tensor is None
            or row is None
            or load.buffer.data in self.state.settings.written
            or len(load.indices) != 1
        ):
            raise UnsupportedIR(f"{load.buffer.name} in the range of a loop")
        (index,) = (evaluator.int(i) for i in load.indices)
        extent = self.state.evaluator(None).int(tensor.shape[0])
        inside = compare("ge", index, const(0)) & compare("lt", index, extent)
        is_own = (
            tensor.name in self.state.settings.shared_rows and self.own_row(tensor.name, index).key == row.key
        )
        if not is_own or not self.state.holds(inside):
            raise UnsupportedIR(f"{load.buffer.name} in the range of a loop")
        return self.state.algebra.call("load", (f"{tensor.name} of the row",), *load.dtype.int_range)

    def first_stop(self, body: LoopBody, outer: Place | None) -> tuple[int, int]:
        """Return likewise numbers: the first value, and the one after the last.

        Raises:
            UnsupportedIR: they are not constant, or too many to follow one by one.
        """
        start, extent = self.start_extent(body, outer)
        name = body.loop.var.name if body.loop else ""
        if not start.is_constant or not extent.is_constant:
            raise UnsupportedIR(f"the loop over {name} has a symbolic range")
        if int(extent.constant) > MAX_ITERATIONS:
            raise UnsupportedIR(f"the loop over {name} has {int(extent.constant)} iterations")
        return int(start.constant), int(start.constant) + max(int(extent.constant), 0)
