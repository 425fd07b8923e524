"""What follows for the quotients of a launch index from where the index lies.

A grid of `m * g` blocks of which `g` neighbours share a row has the row `block // g`. That it is less than
`m` follows from `block < m * g`, but where the row is then multiplied by another unknown (its place in a
tensor) neither solver finds that step each time. So it is said: nothing that is not implied.
"""

import z3

from verify import ir
from verify.encode import Hypothesis
from verify.intarith import MAX_SHIFT, constant_of

_DIVISIONS = ("floordiv", "truncdiv")  # alike of an index, which is never negative


def bounds_of_quotients(launch: ir.Launch, index: z3.ArithRef, extent: z3.ArithRef) -> list[Hypothesis]:
    """Return that each quotient of a launch index that its body uses is less than the extent's.

    Only of divisors that divide the extent, whatever the shape: `index < rest * divisor` implies
    `index // divisor < rest`, in any integers.

    Args:
        launch: binds the index.
        index: its constant.
        extent: its extent's term.
    """
    factor, others = _factors(extent)
    if factor <= 1 or not others:
        return []  # a constant extent needs no such help
    found = []
    for divisor in sorted(d for d in _divisors(launch) if factor % d == 0):
        label = f"{launch.tag} {launch.var.name} // {divisor} < extent // {divisor}"
        parts = [*others] if factor == divisor else [z3.IntVal(factor // divisor), *others]
        rest = z3.Product(*parts) if len(parts) > 1 else parts[0]
        found.append(Hypothesis(label, "launch", index / divisor < rest))
    return found


def _divisors(launch: ir.Launch) -> set[int]:
    """Return the constants by which the body of a launch divides its index, but 1."""
    found = set[int]()
    for node in ir.walk(launch.body):
        if not (isinstance(node, ir.BinOp) and isinstance(node.b, ir.Const)) or not _is(node.a, launch.var):
            continue
        value = node.b.value
        if node.op in _DIVISIONS and value > 1:
            found.add(int(value))
        if node.op == "shr" and 0 < value <= MAX_SHIFT:
            found.add(1 << int(value))
    return found


def _is(expr: ir.Expr, var: ir.Var) -> bool:
    """Return whether an expression is a variable, of whatever width of integers."""
    while isinstance(expr, ir.Cast) and expr.dtype.is_int and expr.dtype.name != "bool":
        expr = expr.a
    return expr is var


def _factors(term: z3.ArithRef) -> tuple[int, list[z3.ArithRef]]:
    """Return the product of the constants among a product's factors, and the other factors."""
    if not z3.is_mul(term):
        value = constant_of(term)
        return (1, [term]) if value is None else (value, [])
    factor, others = 1, []
    for part in term.children():
        number, rest = _factors(part)
        factor *= number
        others += rest
    return factor, others
