"""Matrix products: chains of instructions of 32 bytes of K, in ascending order."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.evaluate import Cond, Evaluator, compare
from verify.refine.sym import Sym, const
from verify.refine.tile import Gemm, thread_of_starts
from verify.signature.program import Place
from verify.signature.state import PartlyWrittenError, State, integer_of
from verify.signature.terms import Term

INSTRUCTION_K_BITS = 256  # of K that one wgmma takes from a row
INSTRUCTION_ROWS = 64
WARPGROUP = 128  # threads


@dataclass
class Products:
    """Evaluates products.

    Attributes:
        element: the value of an element at a place.
    """

    state: State
    element: Callable[[ir.Buffer, tuple[Sym, ...], Place], Term]

    def product(
        self, step: Gemm, indices: tuple[Sym, ...], place: Place, evaluator: Evaluator
    ) -> Term | None:
        """Return an element of what `step` computes, None where the element is no part of its product.

        Raises:
            PartlyWrittenError: whether it is depends on the element.
            UnsupportedIR: extents, or what clears the accumulator, are not known.
        """
        assert step.a is not None, "a gemm has operands"
        assert step.b is not None, "a gemm has operands"
        assert step.c is not None, "a gemm has a product"
        lows = [evaluator.int(m) for m in step.c.mins]
        sizes = [integer_of(e) for e in step.c.extents]
        inside, position = Cond(), []
        for index, low, size in zip(indices, lows, sizes, strict=True):
            offset = index - low
            inside &= compare("ge", offset, const(0)) & compare("lt", offset, const(size))
            position.append(offset)
        written = self.state.holds(inside)
        if written is False:
            return None
        if written is None:
            raise PartlyWrittenError(step.what, inside)
        row, column = position[-2:]
        evaluator = self._of_row(step, row, sizes, evaluator)
        clear = self.state.holds(evaluator.cond(step.clear))
        if clear is None:
            raise UnsupportedIR(f"{step.what} clears on a condition that is not known")
        value = None if clear else self.element(step.c.buffer, indices, place)
        depth = integer_of(step.a.extents[-2 if step.trans_a else -1])
        width = INSTRUCTION_K_BITS // step.a.buffer.dtype.bits
        if depth % width:
            raise UnsupportedIR(f"{step.what} over {depth} elements of K")
        self.state.depth += 1
        inner = self.state.counter(f"k{self.state.depth}", 0, width - 1)
        kinds = (step.a.buffer.dtype.name, step.b.buffer.dtype.name)
        for start in range(0, depth, width):
            at = inner + const(start)
            a = self._operand(step.a, step.trans_a, row, at, place, evaluator)
            b = self._operand(step.b, not step.trans_b, column, at, place, evaluator)
            previous = "cleared" if value is None else value
            value = self.state.terms.make("mma", step.c.buffer.dtype, previous, a, b, width, kinds)
        self.state.depth -= 1
        return value

    def _of_row(self, step: Gemm, row: Sym, sizes: list[int], evaluator: Evaluator) -> Evaluator:
        """Return the evaluator of a row's operands: B may start where the row's warpgroup says."""
        assert step.b is not None, "a gemm has operands"
        thread = thread_of_starts(step.b, self.state.settings.launch)
        if thread is None:
            return evaluator
        groups = integer_of(self.state.settings.launch["threadIdx.x"][1]) // WARPGROUP
        if sizes[-2] != groups * INSTRUCTION_ROWS:
            raise UnsupportedIR(f"{step.what}: an operand by thread where warpgroups have other than 64 rows")
        first = self.state.algebra.floordiv(row, INSTRUCTION_ROWS).scaled(WARPGROUP)
        return replace(evaluator, env={**evaluator.env, thread: first})

    def _operand(
        self, region: ir.Region, swapped: bool, row: Sym, k: Sym, place: Place, evaluator: Evaluator
    ) -> Term:
        *outer, first, second = (evaluator.int(m) for m in region.mins)
        matrix = (first + k, second + row) if swapped else (first + row, second + k)
        return self.element(region.buffer, (*outer, *matrix), place)
