"""Quotients, remainders and products, written so that no integers have to be searched for.

Of questions that are asked one after the other cvc5 looks for no integer solutions of equations, which
x % n == y % n takes and (x - y) % n == 0 does not: it spends its whole budget on such a question, which is
then asked again by itself. Products of two numbers take longer than sums. What is written here says the same.
"""

from collections.abc import Iterator

import z3

_DIVISIONS = (z3.Z3_OP_IDIV, z3.Z3_OP_MOD)


def is_odd(term: z3.ArithRef) -> z3.BoolRef:
    """Return that a number is odd; of a difference: that the parities of both differ."""
    return term % 2 == 1


def same(a: z3.ArithRef, b: z3.ArithRef, of: z3.ArithRef, by: int) -> z3.BoolRef:
    """Return a == b, where b is made of the quotient or the remainder of a number.

    If a is made of those of another number in the same way, that both numbers are equal says it too: f(x)
    == f(y) or x == y is f(x) == f(y).

    Args:
        a: any term.
        b: what it shall equal.
        of: the number, a part of b.
        by: divisor.
    """
    for number in _divided(a, by):
        if z3.simplify(z3.substitute(a, (number, of))).eq(z3.simplify(b)):
            return z3.Or(number == of, a == b)
    return a == b


def _divided(term: z3.ExprRef, by: int) -> Iterator[z3.ArithRef]:
    """Yield what is divided by `by` in a term."""
    if _divisor(term) == by:
        yield term.arg(0)
        return
    for part in term.children():
        yield from _divided(part, by)


def _divisor(term: z3.ExprRef) -> int:
    """Return the constant that a term is a quotient or a remainder by; 0 for any other term."""
    if z3.is_app(term) and term.decl().kind() in _DIVISIONS and isinstance(term.arg(1), z3.IntNumRef):
        return max(term.arg(1).as_long(), 0)
    return 0


def times(a: z3.ArithRef, b: z3.ArithRef | int) -> z3.ArithRef:
    """Return a product; of a number and one of several constants as one of linear products."""
    for factor, other in ((a, b), (b, a)):
        if isinstance(factor, z3.ExprRef) and z3.is_app_of(factor, z3.Z3_OP_ITE) and _is_constant(factor):
            condition, yes, no = factor.children()
            return z3.If(condition, times(yes, other), times(no, other))
    return a * b


def _is_constant(term: z3.ExprRef) -> bool:
    """Return whether a term is a constant, or one of several."""
    if z3.is_app_of(term, z3.Z3_OP_ITE):
        return all(_is_constant(part) for part in term.children()[1:])
    return isinstance(term, z3.IntNumRef)


def parted(term: z3.ExprRef) -> z3.ExprRef:
    """Return a term with multiples taken out of what is divided: (n * x + y) / n is x + y / n."""
    return _parted(term, {})


def _parted(term: z3.ExprRef, known: dict[int, z3.ExprRef]) -> z3.ExprRef:
    if not z3.is_app(term) or not term.num_args():
        return term
    if term.get_id() not in known:
        parts = [_parted(part, known) for part in term.children()]
        by = _divisor(term)
        known[term.get_id()] = _division(term, parts[0], by) if by else term.decl()(*parts)
    return known[term.get_id()]


def _division(term: z3.ExprRef, number: z3.ArithRef, by: int) -> z3.ArithRef:
    """Return `term`, a quotient or a remainder, of `number` by a constant."""
    whole, rest = z3.IntVal(0), z3.IntVal(0)
    number = z3.simplify(number)
    for summand in number.children() if z3.is_add(number) else [number]:
        factor, of = _product(summand)
        if factor % by == 0:
            whole += factor // by * of
        else:
            rest += summand
    return z3.simplify(rest % by if z3.is_mod(term) else whole + rest / by)


def _product(term: z3.ArithRef) -> tuple[int, z3.ArithRef]:
    """Return a constant and a term whose product a simplified summand is."""
    if z3.is_mul(term) and term.num_args() == 2 and isinstance(term.arg(0), z3.IntNumRef):
        return term.arg(0).as_long(), term.arg(1)
    return (term.as_long(), z3.IntVal(1)) if isinstance(term, z3.IntNumRef) else (1, term)
