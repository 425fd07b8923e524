"""Inverting the index maps of tile statements: which coordinates write a given element."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.evaluate import Cond, Evaluator, compare
from verify.refine.sym import Algebra, Sym, const

_DIVISIONS = ("floordiv", "floormod", "truncdiv", "truncmod")


@dataclass(frozen=True)
class Digit:
    """Part of a coordinate: `weight` times a number in [0, size); size None where unbounded."""

    var: ir.Var
    symbol: Sym
    weight: int
    size: int | None


@dataclass(frozen=True)
class IndexMap:
    """The element that a statement writes, over the digits of its coordinates."""

    digits: tuple[Digit, ...]
    axes: tuple[Sym, ...]

    def solve(self, algebra: Algebra, wanted: Sequence[Sym]) -> tuple[dict[ir.Var, Sym], Cond]:
        """Return the coordinates that write element `wanted`, and when there are such.

        Raises:
            UnsupportedIR: the map is not a sum of digits in each axis, or leaves a coordinate open.
        """
        found: dict[int, Sym] = {}
        cond = Cond()
        for (rest, parts), target in zip(self._parts, wanted, strict=True):
            cond &= self._axis(algebra, target - rest, parts, found)
        open_digits = [d for n, d in enumerate(self.digits) if n not in found]
        if any(d.size != 1 for d in open_digits):
            raise UnsupportedIR("a statement that writes one element from several coordinates")
        env: dict[ir.Var, Sym] = {}
        for number, digit in enumerate(self.digits):
            value = found.get(number, const(0)).scaled(digit.weight)
            env[digit.var] = env[digit.var] + value if digit.var in env else value
        return env, cond

    @cached_property
    def _parts(self) -> list[tuple[Sym, list[tuple[int, int]]]]:
        """Of each axis what no digit takes part in, and the strides of its digits, greatest first.

        Raises:
            UnsupportedIR: an axis is not a sum of digits, each above all that the later ones add up to.
        """
        owners = {next(iter(d.symbol.terms)): n for n, d in enumerate(self.digits)}
        inside = {a for m in owners for a in m}
        found, taken = [], set()
        for axis in self.axes:
            parts = [(int(c), owners[m]) for m, c in axis.terms.items() if m in owners]  # type: ignore[arg-type]
            rest = Sym({m: c for m, c in axis.terms.items() if m not in owners})
            if rest.atoms() & inside or any(number in taken for _, number in parts):
                raise UnsupportedIR("an index that is no sum of coordinates")
            taken |= {number for _, number in parts}
            parts.sort(reverse=True)
            for position, (stride, _) in enumerate(parts):
                self._check(stride, parts[position + 1 :])
            found.append((rest, parts))
        return found

    def _check(self, stride: int, later: list[tuple[int, int]]) -> None:
        if stride <= 0:
            raise UnsupportedIR("an index that falls with a coordinate")
        below = 0
        for other, number in later:
            size = self.digits[number].size
            if size is None:
                raise UnsupportedIR("an index whose coordinates overlap")
            below += other * (size - 1)
        if below >= stride:
            raise UnsupportedIR("an index whose coordinates overlap")

    def _axis(
        self, algebra: Algebra, remaining: Sym, parts: list[tuple[int, int]], found: dict[int, Sym]
    ) -> Cond:
        cond = Cond()
        for stride, number in parts:
            value = algebra.floordiv(remaining, stride)
            remaining = remaining - value.scaled(stride)
            found[number] = value
            cond &= compare("ge", value, const(0))
            size = self.digits[number].size
            if size is not None:
                cond &= compare("lt", value, const(size))
        return cond & compare("eq", remaining, const(0))


def index_map(
    algebra: Algebra,
    coordinates: Sequence[tuple[ir.Var, int | None]],
    indices: Sequence[ir.Expr],
    evaluator: Evaluator,
    number: int,
) -> IndexMap:
    """Return `indices` over the digits of `coordinates`; `number` keeps symbols of statements apart."""
    digits: list[Digit] = []
    env: dict[ir.Var, Sym] = {}
    for var, extent in coordinates:
        bounds = [1, *_divisors(var, indices), extent]
        value = const(0)
        for low, high in pairwise(bounds):
            if high is not None and high % low:  # type: ignore[operator]
                raise UnsupportedIR(f"coordinate {var.name} is divided unevenly")
            size = None if high is None else high // low  # type: ignore[operator]
            name = f"{var.name}@{number}/{len(digits)}"
            symbol = algebra.var(name, 0, None if size is None else size - 1)
            if size == 1:  # a symbol of one value: keep it a symbol, to be found again
                symbol = algebra.var(name, 0, 1)
            digits.append(Digit(var, symbol, low, size))  # type: ignore[arg-type]
            value = value + symbol.scaled(low)  # type: ignore[arg-type]
        env[var] = value
    inner = Evaluator(algebra, {**evaluator.env, **env}, load=evaluator.load)
    return IndexMap(tuple(digits), tuple(inner.int(i) for i in indices))


def _divisors(var: ir.Var, indices: Sequence[ir.Expr]) -> list[int]:
    """Return the constants that `var` is divided by, each dividing the next."""
    found = {
        int(node.b.value)
        for index in indices
        for node in ir.walk(index)
        if isinstance(node, ir.BinOp) and node.op in _DIVISIONS and isinstance(node.b, ir.Const)
        if any(inner is var for inner in ir.walk(node.a)) and node.b.value > 1
    }
    return sorted(found)
