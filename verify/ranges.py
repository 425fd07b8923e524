"""Between which integers a term lies: by its form and what is known of its symbols, without a solver."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import z3


@dataclass(frozen=True)
class Range:
    """Both ends included; None where there is none."""

    low: int | None = None
    high: int | None = None

    def __add__(self, other: "Range") -> "Range":
        """Return the range of sums."""
        return Range(_sum(self.low, other.low), _sum(self.high, other.high))

    def __mul__(self, factor: int) -> "Range":
        """Return the range of multiples."""
        ends = [None if end is None else end * factor for end in (self.low, self.high)]
        return Range(*ends) if factor >= 0 else Range(*reversed(ends))

    def __and__(self, other: "Range") -> "Range":
        """Return what lies in both."""
        lows = [end for end in (self.low, other.low) if end is not None]
        highs = [end for end in (self.high, other.high) if end is not None]
        return Range(max(lows, default=None), min(highs, default=None))

    def __or__(self, other: "Range") -> "Range":
        """Return the least range that holds both."""
        low = None if self.low is None or other.low is None else min(self.low, other.low)
        return Range(low, None if self.high is None or other.high is None else max(self.high, other.high))

    def __floordiv__(self, divisor: int) -> "Range":
        """Return the range of quotients, rounded down."""
        low = None if self.low is None else self.low // divisor
        return Range(low, None if self.high is None else self.high // divisor)

    def __mod__(self, divisor: int) -> "Range":
        """Return the range of remainders: shifted where all have one quotient."""
        if self.low is None or self.high is None or self.low // divisor != self.high // divisor:
            return Range(0, divisor - 1)
        return self + Range(-(self.low // divisor * divisor), -(self.low // divisor * divisor))


def _unknown(symbol: z3.ArithRef) -> Range:
    return Range()


def range_of(term: z3.ArithRef, known: Callable[[z3.ArithRef], Range] = _unknown) -> Range:
    """Return a range that holds every value of an integer term.

    Args:
        term: of integer arithmetic.
        known: ranges of its symbols (constants, applications of functions); nothing by default.
    """
    return _Ranges(known).of(term)


class _Ranges:
    """Ranges of the parts of one term, each found once."""

    def __init__(self, known: Callable[[z3.ArithRef], Range]) -> None:
        self._known = known
        self._found: dict[int, Range] = {}

    def of(self, term: z3.ArithRef) -> Range:
        key = term.get_id()  # stays its own: the whole term keeps its parts alive
        if key not in self._found:
            self._found[key] = self._computed(term)
        return self._found[key]

    def _computed(self, term: z3.ArithRef) -> Range:
        if z3.is_int_value(term):
            return Range(term.as_long(), term.as_long())
        parts = term.children()
        if z3.is_add(term):
            result = self.of(parts[0])
            for part in parts[1:]:
                result += self.of(part)
            return result
        if z3.is_sub(term):
            result = self.of(parts[0])
            for part in parts[1:]:
                result += self.of(part) * -1
            return result
        if z3.is_mul(term):
            return self._product(parts)
        if z3.is_mod(term) and z3.is_int_value(parts[1]) and parts[1].as_long() > 0:
            return self.of(parts[0]) % parts[1].as_long()
        if z3.is_idiv(term) and z3.is_int_value(parts[1]) and parts[1].as_long() > 0:
            return self.of(parts[0]) // parts[1].as_long()
        if z3.is_app_of(term, z3.Z3_OP_ITE):
            condition, first, second = parts
            return self._where(condition, True, first) | self._where(condition, False, second)
        if z3.is_app_of(term, z3.Z3_OP_UNINTERPRETED):
            return self._known(term)
        return Range()

    def _product(self, parts: list[z3.ArithRef]) -> Range:
        factor, others = 1, []
        for part in parts:
            if z3.is_int_value(part):
                factor *= part.as_long()
            else:
                others.append(part)
        if not others:
            return Range(factor, factor)
        return self.of(others[0]) * factor if len(others) == 1 else Range()

    def _where(self, condition: z3.BoolRef, holds: bool, term: z3.ArithRef) -> Range:
        """Return the range of a term where a condition on it holds, or does not."""
        known = self.of(term)
        if z3.is_not(condition):
            return self._where(condition.arg(0), not holds, term)
        if z3.is_and(condition) is holds and (z3.is_and(condition) or z3.is_or(condition)):
            return reduce(Range.__and__, (self._where(c, holds, term) for c in condition.children()), known)
        if not (z3.is_le(condition) or z3.is_lt(condition) or z3.is_ge(condition) or z3.is_gt(condition)):
            return known
        small, large = condition.children()
        if (z3.is_ge(condition) or z3.is_gt(condition)) is holds:
            small, large = large, small
        # small < large or small <= large: taken as the latter, which holds in both cases.
        if z3.eq(term, small):
            known &= Range(None, self.of(large).high)
        if z3.eq(term, large):
            known &= Range(self.of(small).low, None)
        return known


def limits(clause: z3.BoolRef, symbol: z3.ArithRef) -> Range:
    """Return where a comparison of `symbol` with a number keeps it; everywhere for any other clause."""
    if z3.is_le(clause) or z3.is_lt(clause):
        small, large = clause.children()
    elif z3.is_ge(clause) or z3.is_gt(clause):
        large, small = clause.children()
    else:
        return Range()
    strict = int(z3.is_lt(clause) or z3.is_gt(clause))
    if z3.eq(small, symbol) and z3.is_int_value(large):
        return Range(None, large.as_long() - strict)
    if z3.eq(large, symbol) and z3.is_int_value(small):
        return Range(small.as_long() + strict, None)
    return Range()


def _sum(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b
