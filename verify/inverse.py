"""Candidate inverses of index maps: which block, thread and iteration writes a given element.

An index such as `by * 65536 + i // 4 * 32768 + tx % 4 * 8192 + ... - 64` is a sum of digits of the
indices, each times a stride. Taking remainders from the largest stride down gives the digits back,
and digits give the indices. Nothing here is trusted: `properties/coverage.py` proves what it uses.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import z3

from verify.encode import Hypothesis, Index, constants_of
from verify.intarith import constant_of
from verify.symbols import text_of

_INT32_VALUES = 2**32
_SEARCH_RLIMIT = 2_000_000  # z3 resource units for each small search over one index
# The least value of a digit, by the text of the digit and of what is known of its index: several properties
# ask for the same digits, and the variants of a kernel name and bound their indices alike.
_least_values: dict[tuple[str, ...], int] = {}


@dataclass(frozen=True)
class Digit:
    """`(index // low) % size`; size None means all above `low`."""

    name: str
    low: int
    size: int | None

    def term(self, index: z3.ArithRef) -> z3.ArithRef:
        """Return the digit of `index`."""
        value = index / self.low if self.low > 1 else index
        return value if self.size is None else value % self.size


@dataclass(frozen=True)
class Sum:
    """constant + sum of strides times digits."""

    constant: int
    digits: Mapping[Digit, int]


class NotDigitsError(Exception):
    """An index is not a sum of digits with constant strides."""


def decompose(term: z3.ArithRef, extents: Mapping[str, int | None]) -> Sum:
    """Return `term` as a sum of digits of the constants in `extents` (their number of values, or None).

    Raises:
        NotDigitsError: it is something else.
    """
    value = constant_of(term)
    if value is not None:
        return Sum(value, {})
    kind, parts = term.decl().kind(), term.children()
    if kind == z3.Z3_OP_UNINTERPRETED and not parts and term.decl().name() in extents:
        return Sum(0, {Digit(term.decl().name(), 1, None): 1})
    if kind in (z3.Z3_OP_ADD, z3.Z3_OP_SUB):
        total = decompose(parts[0], extents)
        for part in parts[1:]:
            other = decompose(part, extents)
            total = _add(total, other, 1 if kind == z3.Z3_OP_ADD else -1)
        return total
    if kind == z3.Z3_OP_UMINUS:
        return _add(Sum(0, {}), decompose(parts[0], extents), -1)
    if kind == z3.Z3_OP_MUL:
        return _product(parts, extents)
    if kind in (z3.Z3_OP_IDIV, z3.Z3_OP_MOD) and (divisor := constant_of(parts[1])):
        inner = decompose(parts[0], extents)
        return (_divide if kind == z3.Z3_OP_IDIV else _modulo)(inner, divisor, extents)
    raise NotDigitsError(str(term))


def _add(a: Sum, b: Sum, sign: int) -> Sum:
    digits = dict(a.digits)
    for digit, stride in b.digits.items():
        digits[digit] = digits.get(digit, 0) + sign * stride
    return Sum(a.constant + sign * b.constant, {d: s for d, s in digits.items() if s})


def _product(parts: Sequence[z3.ExprRef], extents: Mapping[str, int | None]) -> Sum:
    factor, rest = 1, []
    for part in parts:
        value = constant_of(part)
        if value is None:
            rest.append(part)
        else:
            factor *= value
    if len(rest) != 1:
        raise NotDigitsError("product of indices")
    inner = decompose(rest[0], extents)
    return Sum(inner.constant * factor, {d: s * factor for d, s in inner.digits.items()})


def _split(total: Sum, divisor: int, extents: Mapping[str, int | None]) -> tuple[Sum, Sum]:
    """Return (multiple of the divisor, rest in [0, divisor))."""
    whole = {d: s for d, s in total.digits.items() if s % divisor == 0}
    rest = {d: s for d, s in total.digits.items() if s % divisor}
    constant = total.constant // divisor * divisor
    top = total.constant - constant
    for digit, stride in rest.items():
        count = _values(digit, extents)
        if count is None or stride < 0:
            return Sum(0, {}), total
        top += stride * (count - 1)
    if top >= divisor:
        return Sum(0, {}), total
    return Sum(constant, whole), Sum(total.constant - constant, rest)


def _values(digit: Digit, extents: Mapping[str, int | None]) -> int | None:
    if digit.size is not None:
        return digit.size
    extent = extents[digit.name]
    return None if extent is None else -(-extent // digit.low)


def _divide(total: Sum, divisor: int, extents: Mapping[str, int | None]) -> Sum:
    whole, rest = _split(total, divisor, extents)
    if rest is not total:
        return Sum(whole.constant // divisor, {d: s // divisor for d, s in whole.digits.items()})
    reduced = _reduce(total, divisor, extents)
    if reduced is not None:  # (g x + low) // (g q) == x // q for low in [0, g)
        quotient, _, factor = reduced
        return _divide(quotient, divisor // factor, extents)
    digit = _single(total)
    if digit.size is not None and digit.size % divisor:
        raise NotDigitsError("division across digits")
    size = None if digit.size is None else digit.size // divisor
    return Sum(0, {Digit(digit.name, digit.low * divisor, size): 1})


def _modulo(total: Sum, divisor: int, extents: Mapping[str, int | None]) -> Sum:
    _, rest = _split(total, divisor, extents)
    if rest is not total:
        return rest
    kept = Sum(total.constant % divisor, {d: s for d, s in total.digits.items() if s % divisor})
    if kept.digits != total.digits:
        return _modulo(kept, divisor, extents)
    reduced = _reduce(total, divisor, extents)
    if reduced is not None:  # (g x + low) % (g q) == g (x % q) + low for low in [0, g)
        quotient, low, factor = reduced
        inner = _modulo(quotient, divisor // factor, extents)
        return _add(low, Sum(inner.constant * factor, {d: s * factor for d, s in inner.digits.items()}), 1)
    digit = _single(total)
    if digit.size is not None and digit.size % divisor:
        raise NotDigitsError("remainder across digits")
    return Sum(0, {Digit(digit.name, digit.low, divisor): 1})


def _reduce(total: Sum, divisor: int, extents: Mapping[str, int | None]) -> tuple[Sum, Sum, int] | None:
    """Return x, low and g > 1 with total == g x + low, low in [0, g) and g a divisor of `divisor`."""
    for factor in sorted({math.gcd(stride, divisor) for stride in total.digits.values()}, reverse=True):
        whole, low = _split(total, factor, extents)
        if 1 < factor < divisor and low is not total and whole.digits:
            quotient = Sum(whole.constant // factor, {d: s // factor for d, s in whole.digits.items()})
            return quotient, low, factor
    return None


def _single(total: Sum) -> Digit:
    if total.constant == 0 and list(total.digits.values()) == [1]:
        return next(iter(total.digits))
    raise NotDigitsError("division of a sum of digits")


@dataclass(frozen=True)
class Axis:
    """One direction of a written region: `count` consecutive positions from `index`."""

    index: z3.ArithRef
    count: int


@dataclass(frozen=True)
class Witness:
    """Values of the indices for given positions.

    Attributes:
        definitions: of the new constants; for any positions some values satisfy them (division by
            positive constants with remainder).
        indices: index name -> its constant.
        facts: that taking the indices apart gives the digits they were put together from; to be
            proved, then used.
    """

    definitions: tuple[z3.BoolRef, ...]
    indices: Mapping[str, z3.ArithRef]
    facts: tuple[z3.BoolRef, ...]


@dataclass(frozen=True)
class Inverse:
    """How positions give the indices back.

    Attributes:
        axes: for each axis its constant and its digits, largest stride first, with their strides.
        low: least value of each digit; what is taken off before dividing.
        parts: index name -> its digits and guessed constants, each with its weight.
    """

    axes: tuple[tuple[int, tuple[tuple[Digit, int], ...]], ...]
    low: Mapping[Digit, int]
    parts: Mapping[str, tuple[tuple[Digit | int, int], ...]]

    def witness(self, positions: Sequence[z3.ArithRef], constant: Callable[[str], z3.ArithRef]) -> "Witness":
        """Return who writes `positions`, with new constants for quotients, remainders and indices."""
        definitions, values = [], {}
        for (shift, digits), position in zip(self.axes, positions, strict=True):
            rest = position - shift - sum(self.low[d] * stride for d, stride in digits)
            for digit, stride in digits:
                quotient, remainder = constant(f"{digit.name}/{digit.low}"), constant("rest")
                definitions.append(
                    z3.And(rest == stride * quotient + remainder, remainder >= 0, remainder < stride)
                )
                values[digit] = quotient + self.low[digit]
                rest = remainder
        indices = {name: constant(f"{name}'") for name in self.parts}
        definitions += [indices[name] == _weighted(parts, values) for name, parts in self.parts.items()]
        facts = [digit.term(indices[digit.name]) == value for digit, value in values.items()]
        return Witness(tuple(definitions), indices, tuple(facts))

    def lemmas(self, axes: Sequence[Axis], consts: Mapping[str, z3.ArithRef]) -> list[z3.BoolRef]:
        """Return facts from which it follows that a position determines the indices.

        Each axis is its constant plus strides times digits; what is below a digit is less than its
        stride, so position and strides give the digits, largest first; digits give the indices.
        """
        values = {d: d.term(consts[d.name]) for _, digits in self.axes for d, _ in digits}
        facts = []
        for axis, (constant, digits) in zip(axes, self.axes, strict=True):
            total = z3.IntVal(constant)
            for digit, stride in digits:
                total = total + values[digit] * stride
            facts.append(axis.index == total)
            below = z3.IntVal(axis.count - 1)
            for digit, stride in reversed(digits):
                facts.append(z3.And(values[digit] >= self.low[digit], below < stride))
                below = below + (values[digit] - self.low[digit]) * stride
        facts += [consts[name] == _weighted(parts, values) for name, parts in self.parts.items()]
        return facts


def _weighted(parts: Sequence[tuple[Digit | int, int]], values: Mapping[Digit, z3.ArithRef]) -> z3.ArithRef:
    total = z3.IntVal(0)
    for part, weight in parts:
        total = total + (z3.IntVal(part) if isinstance(part, int) else values[part]) * weight
    return total


def candidate(axes: Sequence[Axis], indices: Sequence[Index], hypotheses: Sequence[Hypothesis]) -> Inverse:
    """Return a map that may invert `axes`.

    Args:
        axes: the region as a function of `indices`.
        indices: launch indices and loop counters of the statement.
        hypotheses: its path conditions.

    Raises:
        NotDigitsError: the region is not a sum of digits, or digits overlap.
    """
    extents = {i.const.decl().name(): constant_of(i.extent) for i in indices}
    found: list[tuple[int, tuple[tuple[Digit, int], ...]]] = []
    low: dict[Digit, int] = {}
    for axis in axes:
        total = decompose(axis.index, extents)
        ordered = sorted(total.digits.items(), key=lambda item: -item[1])
        if len({stride for _, stride in ordered}) < len(ordered):  # of the digits that have room to differ
            ordered = [(d, stride) for d, stride in ordered if not _is_zero(d, indices, hypotheses)]
        if any(stride <= 0 for _, stride in ordered) or any(digit in low for digit, _ in ordered):
            raise NotDigitsError("index that falls with a digit, or a digit on two axes")
        low |= {digit: _least(digit, indices, hypotheses) for digit, _ in ordered}
        found.append((total.constant, tuple(ordered)))
    parts = {i.const.decl().name(): _parts(i, low, hypotheses) for i in indices}
    return Inverse(tuple(found), low, parts)


def _parts(
    index: Index, digits: Mapping[Digit, int], hypotheses: Sequence[Hypothesis]
) -> tuple[tuple[Digit | int, int], ...]:
    """Return the digits of `index` with their weights; a stretch that no digit gives is guessed."""
    name = index.const.decl().name()
    parts: list[tuple[Digit | int, int]] = []
    reached = 1
    for digit in sorted((d for d in digits if d.name == name), key=lambda d: d.low):
        if digit.low % reached:
            raise NotDigitsError("digits overlap")
        if digit.low > reached:
            missing = Digit(name, reached, digit.low // reached)
            parts.append((_least(missing, [index], hypotheses), reached))
        parts.append((digit, digit.low))
        if digit.size is None:
            return tuple(parts)
        reached = digit.low * digit.size
    parts.append((_least(Digit(name, reached, None), [index], hypotheses), reached))
    return tuple(parts)


def _is_zero(digit: Digit, indices: Sequence[Index], hypotheses: Sequence[Hypothesis]) -> bool:
    """Return whether a digit is 0 under the hypotheses that speak of the indices alone."""
    names = {i.const.decl().name(): i.const for i in indices}
    solver = z3.Solver()
    solver.set("rlimit", _SEARCH_RLIMIT)
    solver.add(*(h.term for h in hypotheses if constants_of(h.term) <= names.keys()))
    solver.add(digit.term(names[digit.name]) != 0)
    return solver.check() == z3.unsat


def _least(digit: Digit, indices: Sequence[Index], hypotheses: Sequence[Hypothesis]) -> int:
    """Return the least value of a digit under the hypotheses that speak of its index alone."""
    const = next(i.const for i in indices if i.const.decl().name() == digit.name)
    value = digit.term(const)
    own = [h.term for h in hypotheses if constants_of(h.term) == {digit.name}]
    key = (text_of(value), *(text_of(term) for term in own))
    if key not in _least_values:
        _least_values[key] = _least_of(const, value, own)
    return _least_values[key]


def _least_of(const: z3.ArithRef, value: z3.ArithRef, own: Sequence[z3.BoolRef]) -> int:
    def reaches(limit: int) -> bool:
        solver = z3.Solver()
        solver.set("rlimit", _SEARCH_RLIMIT)
        solver.add(*own, const >= 0, value <= limit)
        return solver.check() == z3.sat

    low, high = 0, 1
    while not reaches(high - 1):
        low, high = high, 2 * high
        if high > _INT32_VALUES:
            return 0
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle - 1) else (middle, high)
    return low
