"""Whether two runs of places meet, digit by digit where places are sums of digits.

Solvers take long over `9360 * page + 144 * row + word` against the same of another thread, and no time over
pages, rows and words that are each equal. By the ranges of the parts alone both say the same.
"""

from collections.abc import Callable

import z3

from verify.intarith import conjunction, constant_of, total
from verify.ranges import Range, range_of

Known = Callable[[z3.ArithRef], Range]


def meet(
    first: z3.ArithRef, count: z3.ArithRef | int, other: z3.ArithRef, other_count: z3.ArithRef | int
) -> z3.BoolRef:
    """Return that [first, first + count) and [other, other + other_count) have a place in common."""
    return z3.And(first < other + other_count, other < first + count)


def meet_by_digits(
    first: z3.ArithRef, count: int, other: z3.ArithRef, other_count: int, known: Known
) -> z3.BoolRef:
    """Return what is equal to `meet` wherever symbols have the ranges that `known` says.

    The difference of both places is a sum of weights times numbers. Where what is below a weight is too small
    to make up for any but one value of its number, the number has that value.
    """
    parts: dict[int, list[z3.ArithRef]] = {}
    rest = _collect(first, 1, parts) + _collect(other, -1, parts)
    low, high = 1 - count - rest, other_count - 1 - rest  # of the sum of all parts
    weights = sorted(parts, reverse=True)
    sums = {w: total(parts[w]) for w in weights}
    ranges = {w: range_of(sums[w], known) * w for w in weights}
    found: list[z3.BoolRef] = []
    for position, weight in enumerate(weights):
        below = sum((ranges[w] for w in weights[position + 1 :]), Range(0, 0))
        if below.low is None or below.high is None:
            break
        least, most = -((below.high - low) // weight), (high - below.low) // weight
        if least > most:
            return z3.BoolVal(False)
        if least < most:
            break
        found.append(sums[weight] == least)
        low, high = low - weight * least, high - weight * least
    else:
        return conjunction([*found, z3.BoolVal(low <= 0 <= high)])
    left = total([w * sums[w] for w in weights[position:]])
    return conjunction([*found, left >= low, left <= high])


def carried_out(term: z3.ArithRef) -> z3.ArithRef:
    """Return an equal term in which quotients and remainders by numbers have lost the multiples of these.

    `(c * x + y) / c` is `x + y / c`, and its remainder that of `y`; so the start of a descriptor, which is
    held in units of 16 bytes and rounded down to a swizzle atom, becomes a sum of digits again.
    """
    return _carried_out(term, {})


def _carried_out(term: z3.ArithRef, done: dict[int, z3.ArithRef]) -> z3.ArithRef:
    key = term.get_id()  # stays its own: the whole term keeps its parts alive
    if key not in done:
        operands = [_carried_out(part, done) for part in term.children()]
        divides = z3.is_idiv(term) or z3.is_mod(term)
        if divides and z3.is_int_value(operands[1]) and operands[1].as_long() > 0:
            done[key] = _divided(operands[0], operands[1].as_long(), remains=z3.is_mod(term))
        else:
            done[key] = term.decl()(*operands) if operands else term
    return done[key]


def _divided(dividend: z3.ArithRef, divisor: int, remains: bool) -> z3.ArithRef:
    parts: dict[int, list[z3.ArithRef]] = {}
    constant = _collect(dividend, 1, parts)
    quotient = [w // divisor * total(p) for w, p in parts.items() if w % divisor == 0]
    rest = [w * total(p) for w, p in parts.items() if w % divisor]
    if rest:
        left = total([*rest, z3.IntVal(constant)])
        return left % divisor if remains else total([*quotient, left / divisor])
    return z3.IntVal(constant % divisor) if remains else total([*quotient, z3.IntVal(constant // divisor)])


def _collect(term: z3.ArithRef, factor: int, into: dict[int, list[z3.ArithRef]]) -> int:
    """Add `factor` times the parts of a sum to those of their weights; return the constant of it."""
    value = constant_of(term) if z3.is_int_value(term) else None
    if value is not None:
        return factor * value
    if z3.is_add(term):
        return sum(_collect(part, factor, into) for part in term.children())
    if z3.is_sub(term):
        head, *others = term.children()
        return _collect(head, factor, into) + sum(_collect(part, -factor, into) for part in others)
    if z3.is_mul(term):
        numbers = [p.as_long() for p in term.children() if z3.is_int_value(p)]
        others = [p for p in term.children() if not z3.is_int_value(p)]
        if len(others) == 1:
            for number in numbers:
                factor *= number
            return _collect(others[0], factor, into) if factor else 0
    into.setdefault(abs(factor), []).append(term if factor > 0 else -1 * term)
    return 0
