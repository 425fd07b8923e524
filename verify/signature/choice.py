"""Which variant the dispatcher runs for which batch: `select` run on ranges instead of numbers.

A batch dim is an interval. A comparison that the interval decides has its answer; one that it does not
splits the interval, and `select` runs again on both parts. So every branch that some batch takes is
taken once, and the ranges together are the whole contract.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import z3

from dsv4_kernels.contract import Contract

UNBOUNDED = 1 << 62  # a dim that no clause bounds
MAX_RANGES = 4096  # of one dispatcher


@dataclass(frozen=True)
class Range:
    """Batches for which the dispatcher answers alike: inclusive bounds by dim; variant None: none."""

    bounds: Mapping[str, tuple[int, int]]
    variant: str | None
    error: str = ""


class UndecidedError(Exception):
    """`select` does something with a dim that intervals do not follow."""


class _SplitError(Exception):
    def __init__(self, name: str, last: int) -> None:
        super().__init__(name)
        self.name, self.last = name, last


class _Interval:
    """A dim of which only a range is known; `shape` is a rising function of it."""

    def __init__(self, name: str, low: int, high: int, shape: Callable[[int], int] = lambda x: x) -> None:
        self._name, self._low, self._high, self._shape = name, low, high, shape

    def _below(self, limit: int) -> bool:
        """Return whether the value is at most `limit`, or split."""
        if self._shape(self._high) <= limit:
            return True
        if self._shape(self._low) > limit:
            return False
        low, high = self._low, self._high  # the last that is at most the limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._shape(middle) <= limit else (low, middle - 1)
        raise _SplitError(self._name, low)

    def __le__(self, other: Any) -> bool:
        return self._below(_number(other))

    def __lt__(self, other: Any) -> bool:
        return self._below(_number(other) - 1)

    def __gt__(self, other: Any) -> bool:
        return not self._below(_number(other))

    def __ge__(self, other: Any) -> bool:
        return not self._below(_number(other) - 1)

    def __eq__(self, other: object) -> bool:
        return self is other or (self._below(_number(other)) and not self._below(_number(other) - 1))

    def __hash__(self) -> int:
        raise UndecidedError(f"the dispatcher looks {self._name} up in a table")

    def __bool__(self) -> bool:
        return self != 0

    def __add__(self, other: Any) -> "_Interval":
        number = _number(other)
        return _Interval(self._name, self._low, self._high, lambda x: self._shape(x) + number)

    __radd__ = __add__

    def __sub__(self, other: Any) -> "_Interval":
        return self + -_number(other)

    def __mul__(self, other: Any) -> "_Interval":
        number = _positive(other)
        return _Interval(self._name, self._low, self._high, lambda x: self._shape(x) * number)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> "_Interval":
        number = _positive(other)
        return _Interval(self._name, self._low, self._high, lambda x: self._shape(x) // number)

    def __getattr__(self, name: str) -> Any:
        raise UndecidedError(f"the dispatcher uses {name} of {self._name}")

    def __index__(self) -> int:
        raise UndecidedError(f"the dispatcher computes with {self._name} in a way that is not followed")


def _number(value: Any) -> int:
    if not isinstance(value, int):
        raise UndecidedError("the dispatcher compares a batch dim with something that is no integer")
    return value


def _positive(value: Any) -> int:
    number = _number(value)
    if number <= 0:
        raise UndecidedError("the dispatcher scales a batch dim by a number below 1")
    return number


class _Dims(dict):
    """Dims of a call; one that nothing is known of may be any."""

    def __missing__(self, name: str) -> _Interval:
        return _Interval(name, 0, UNBOUNDED)


def batch_bounds(
    contract: Contract, fixed: Mapping[str, int], batch_dims: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Return the least and greatest value of each batch dim that the contract admits."""
    names = contract.names() | set(batch_dims)
    env = {n: fixed[n] if n in fixed and n not in batch_dims else z3.Int(n) for n in names}
    terms = [term for _, term in contract.terms(env) if term is not True]
    found = {}
    for dim in batch_dims:
        ends = []
        for pick in (z3.Optimize.minimize, z3.Optimize.maximize):
            solver = z3.Optimize()
            solver.add(*terms, env[dim] >= 0, env[dim] <= UNBOUNDED)
            handle = pick(solver, env[dim])
            if solver.check() != z3.sat:
                raise UndecidedError(f"no batch satisfies the contract: {dim}")
            ends.append(handle.value().as_long())
        found[dim] = (ends[0], ends[1])
    return found


def may_meet(first: Range, second: Range, batch_dims: Sequence[str]) -> bool:
    """Return whether calls of both ranges may differ in batch dims alone: their other dims overlap."""
    for name in (first.bounds.keys() & second.bounds.keys()) - set(batch_dims):
        (low, high), (other_low, other_high) = first.bounds[name], second.bounds[name]
        if high < other_low or other_high < low:
            return False
    return True


def show_ranges(parts: Sequence[Range]) -> str:
    """Return batches as text."""

    def one(name: str, low: int, high: int) -> str:
        return f"{low} <= {name}" if high >= UNBOUNDED else f"{low} <= {name} <= {high}"

    texts = []
    for part in sorted(parts, key=lambda p: sorted(p.bounds.items())):
        texts.append(" and ".join(one(name, low, high) for name, (low, high) in part.bounds.items()))
    return " or ".join(texts)


def ranges(
    select: Callable[[Mapping[str, Any]], str],
    fixed: Mapping[str, int],
    batch: Mapping[str, tuple[int, int]],
) -> Iterator[Range]:
    """Yield what `select` answers for every batch, as ranges.

    Args:
        select: dims -> id of the variant.
        fixed: dims that the variant fixes.
        batch: inclusive bounds of the batch dims.

    Raises:
        UndecidedError: `select` cannot be followed.
    """
    pending = [dict(batch)]
    count = 0
    while pending:
        count += 1
        if count > MAX_RANGES:
            raise UndecidedError(f"the dispatcher has more than {MAX_RANGES} ranges")
        bounds = pending.pop()
        dims = _Dims(fixed)
        dims |= {name: _Interval(name, low, high) for name, (low, high) in bounds.items()}
        try:
            yield Range(bounds, select(dims))
        except _SplitError as split:
            low, high = bounds.get(split.name, (0, UNBOUNDED))
            pending += [
                {**bounds, split.name: (split.last + 1, high)},
                {**bounds, split.name: (low, split.last)},
            ]
        except (StopIteration, LookupError, ValueError, RuntimeError) as error:
            yield Range(bounds, None, f"{type(error).__name__} {error}".strip())
