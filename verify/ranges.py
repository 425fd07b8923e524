"""Between which integers a term lies whatever its symbols are: by its form alone, without a solver."""

from dataclasses import dataclass

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

    def __mod__(self, divisor: int) -> "Range":
        """Return the range of remainders: shifted where all have one quotient."""
        if self.low is None or self.high is None or self.low // divisor != self.high // divisor:
            return Range(0, divisor - 1)
        return self + Range(-(self.low // divisor * divisor), -(self.low // divisor * divisor))


def range_of(term: z3.ArithRef) -> Range:
    """Return a range that holds every value of an integer term."""
    if z3.is_int_value(term):
        return Range(term.as_long(), term.as_long())
    parts = term.children()
    if z3.is_add(term):
        result = range_of(parts[0])
        for part in parts[1:]:
            result += range_of(part)
        return result
    if z3.is_sub(term):
        result = range_of(parts[0])
        for part in parts[1:]:
            result += range_of(part) * -1
        return result
    if z3.is_mul(term):
        return _product(parts)
    if z3.is_mod(term) and z3.is_int_value(parts[1]) and parts[1].as_long() > 0:
        return range_of(parts[0]) % parts[1].as_long()
    if z3.is_app_of(term, z3.Z3_OP_ITE):
        condition, first, second = parts
        return _where(condition, True, first) | _where(condition, False, second)
    return Range()


def _product(parts: list[z3.ArithRef]) -> Range:
    factor, others = 1, []
    for part in parts:
        if z3.is_int_value(part):
            factor *= part.as_long()
        else:
            others.append(part)
    if not others:
        return Range(factor, factor)
    return range_of(others[0]) * factor if len(others) == 1 else Range()


def _where(condition: z3.BoolRef, holds: bool, term: z3.ArithRef) -> Range:
    """Return the range of a term where a condition on it holds, or does not."""
    known = range_of(term)
    if z3.is_not(condition):
        return _where(condition.arg(0), not holds, term)
    if not (z3.is_le(condition) or z3.is_lt(condition) or z3.is_ge(condition) or z3.is_gt(condition)):
        return known
    small, large = condition.children()
    if (z3.is_ge(condition) or z3.is_gt(condition)) is holds:
        small, large = large, small
    # small < large or small <= large: taken as the latter, which holds in both cases.
    if z3.eq(term, small):
        known &= Range(None, range_of(large).high)
    if z3.eq(term, large):
        known &= Range(range_of(small).low, None)
    return known


def _sum(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b
