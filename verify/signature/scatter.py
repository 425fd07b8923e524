"""What a storage holds after atomic additions at places that data may decide, such as counts by digit."""

from collections.abc import Callable

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.sym import Sym
from verify.refine.tile import Assign
from verify.signature.terms import Term, Terms

_ADD = "atomic_add_elem_op"


def scattered(
    terms: Terms, step: Assign, old: Term, indices: tuple[Sym, ...], value: Callable[[ir.Expr], Term]
) -> Term:
    """Return the value of an element after the additions of `step`.

    It is what the element held, plus the sum of what is added by those executions whose place it is. Sums of
    integers wrap, so they have no order. As a term: the old value, the element, how many executions there
    are, and of any one of them the place, the conditions and the summand.

    Args:
        terms: makes terms.
        step: an atomic update; `determinism` shows that nothing else meets it.
        old: what the element held.
        indices: the element.
        value: of an expression in any one execution, over a counter for each coordinate of the step.

    Raises:
        UnsupportedIR: another update than an addition of integers, or an operand that is not understood.
    """
    call = step.value
    assert isinstance(call, ir.Call), "an update is a call"
    dtype = step.dst.dtype
    if call.op != _ADD or not dtype.is_int:
        raise UnsupportedIR(f"{step.what}: {call.op} of {dtype.name}")
    element = tuple(terms.index(i, ir.INT32) for i in indices)
    extents = tuple(extent for _, extent in step.coordinates)
    where, guards = (tuple(value(e) for e in exprs) for exprs in (step.indices, step.guards))
    return terms.make("scatter", dtype, old, element, extents, where, guards, value(call.args[0]))
