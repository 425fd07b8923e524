"""Exact integer index arithmetic over many points at once.

A kernel's index expressions range over finite coordinates (threads, unrolled loops, lanes, elements
of a tile) and over symbols (blocks, serial loops, shapes). A `Sym` is a polynomial in the symbols
whose coefficients are arrays over all points of the finite part, in mathematical integers. Two
expressions with equal normal forms are equal at every point and for every value of the symbols;
where normal forms differ, `z3_term` hands one point to a solver, which decides.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import gcd

import numpy as np
import z3

from verify.intarith import floordiv as z3_floordiv
from verify.intarith import floormod as z3_floormod
from verify.ir import UnsupportedIR

Coefficient = int | np.ndarray
Key = tuple
_LIMIT = 1 << 61  # coefficients stay below this, so that int64 arrays never wrap unseen


@dataclass(frozen=True, eq=False)
class Atom:
    """A symbol, or an integer operation that polynomials cannot express, as an indeterminate.

    Attributes:
        number: order of creation; orders the atoms of a monomial.
        kind: var, floordiv, min, max, wrap, or another operation left uninterpreted.
        args: operands; for var its name.
        low, high: inclusive bounds, None where unbounded.
    """

    number: int
    kind: str
    args: tuple
    low: int | None
    high: int | None


Monomial = tuple[Atom, ...]


class Sym:
    """A polynomial with a coefficient per point; immutable."""

    __slots__ = ("_key", "_range", "terms")

    def __init__(self, terms: Mapping[Monomial, Coefficient]) -> None:
        """Keep the non-zero terms; an array of one value becomes that value."""
        kept: dict[Monomial, Coefficient] = {}
        for monomial, value in terms.items():
            if type(value) is int:  # most of them
                if value:
                    kept[monomial] = value
                continue
            if isinstance(value, np.ndarray):
                first = value.flat[0] if value.size else 0
                if (value == first).all():
                    value = int(first)
                elif max(abs(int(value.max())), abs(int(value.min()))) > _LIMIT:
                    raise UnsupportedIR("index beyond 61 bits")
            if isinstance(value, np.ndarray) or value != 0:
                kept[monomial] = value
        self.terms = kept
        self._key: Key | None = None
        self._range: tuple[int | None, int | None] | None = None

    @property
    def key(self) -> Key:
        """A hashable normal form: equal keys mean equal at every point."""
        if self._key is None:
            items = list(self.terms.items())
            if len(items) > 1:
                items.sort(key=lambda item: tuple(a.number for a in item[0]))
            self._key = tuple((m, c.tobytes() if isinstance(c, np.ndarray) else c) for m, c in items)
        return self._key

    @property
    def constant(self) -> Coefficient:
        """The term without symbols."""
        return self.terms.get((), 0)

    @property
    def is_constant(self) -> bool:
        """No symbol occurs."""
        return not self.terms or (len(self.terms) == 1 and () in self.terms)

    def symbolic(self) -> "Sym":
        """Return this less its constant term."""
        return Sym({m: c for m, c in self.terms.items() if m})

    def __add__(self, other: "Sym") -> "Sym":
        """Return the sum."""
        if not other.terms:
            return self
        terms = dict(self.terms)
        for monomial, value in other.terms.items():
            own = terms.get(monomial)
            terms[monomial] = value if own is None else _checked_add(own, value)
        return Sym(terms)

    def __neg__(self) -> "Sym":
        """Return the negation."""
        return _normal({m: -c for m, c in self.terms.items()})

    def __sub__(self, other: "Sym") -> "Sym":
        """Return the difference."""
        if not other.terms:
            return self
        terms = dict(self.terms)
        for monomial, value in other.terms.items():
            own = terms.get(monomial)
            terms[monomial] = -value if own is None else _checked_add(own, -value)
        return Sym(terms)

    def __mul__(self, other: "Sym") -> "Sym":
        """Return the product."""
        terms: dict[Monomial, Coefficient] = {}
        for left, a in self.terms.items():
            for right, b in other.terms.items():
                monomial = tuple(sorted(left + right, key=lambda atom: atom.number))
                terms[monomial] = _checked_add(terms.get(monomial, 0), _checked_mul(a, b))
        return Sym(terms)

    def scaled(self, factor: int) -> "Sym":
        """Return this times an integer."""
        if factor == 1:
            return self
        return _normal({m: _checked_mul(c, factor) for m, c in self.terms.items()} if factor else {})

    def divisible_by(self, divisor: int) -> bool:
        """Return whether every coefficient is a multiple of `divisor`."""
        return not any(_leaves_rest(c, divisor) for c in self.terms.values())

    def divided(self, divisor: int) -> "Sym":
        """Return this over a divisor of every coefficient."""
        return Sym({m: c // divisor for m, c in self.terms.items()})

    def take(self, rows: np.ndarray) -> "Sym":
        """Return the values at the points in `rows`.

        Raises:
            UnsupportedIR: an operation over points takes part, which would have to be redone.
        """
        if any(isinstance(c, np.ndarray) for a in self.atoms() for c in _inner_coefficients(a)):
            raise UnsupportedIR("part of the points of an operation in an index")
        return Sym({m: (c[rows] if isinstance(c, np.ndarray) else c) for m, c in self.terms.items()})

    def bounds(self) -> tuple[int | None, int | None]:
        """Return inclusive bounds over all points and values of the symbols; None where unbounded."""
        if self._range is None:
            self._range = _bounds(self)
        return self._range

    def atoms(self) -> set[Atom]:
        """Return every atom, those inside operations included."""
        found: set[Atom] = set()
        stack = [a for m in self.terms for a in m]
        while stack:
            atom = stack.pop()
            if atom not in found:
                found.add(atom)
                stack.extend(a for arg in atom.args if isinstance(arg, Sym) for m in arg.terms for a in m)
        return found


def _normal(terms: dict[Monomial, Coefficient]) -> Sym:
    """Return the Sym of terms that are kept as they are: none is zero, no array is of one value."""
    made = Sym.__new__(Sym)
    made.terms, made._key, made._range = terms, None, None
    return made


def const(value: Coefficient | np.integer) -> Sym:
    """Return a Sym without symbols."""
    if type(value) is int:
        return _normal({(): value} if value else {})
    return Sym({(): value if isinstance(value, np.ndarray) else int(value)})


def _leaves_rest(value: Coefficient, divisor: int) -> bool:
    rest = value % divisor
    return bool(rest.any()) if isinstance(rest, np.ndarray) else rest != 0


def _size(value: Coefficient) -> int:
    return int(np.abs(value).max()) if isinstance(value, np.ndarray) else abs(value)


def _checked_add(a: Coefficient, b: Coefficient) -> Coefficient:
    if (isinstance(a, np.ndarray) or isinstance(b, np.ndarray)) and _size(a) + _size(b) > _LIMIT:
        raise UnsupportedIR("index beyond 61 bits")
    return a + b


def _checked_mul(a: Coefficient, b: Coefficient) -> Coefficient:
    if (isinstance(a, np.ndarray) or isinstance(b, np.ndarray)) and _size(a) * _size(b) > _LIMIT:
        raise UnsupportedIR("index beyond 61 bits")
    return a * b


# --------------------------------------------------------------------------- bounds
def _bounds(value: Sym) -> tuple[int | None, int | None]:
    low, high = 0, 0
    value, parts = _extract_remainders(value)
    for a, b in parts:
        low, high = low + a, high + b
    total: tuple[int | None, int | None] = (low, high)
    for monomial, coefficient in value.terms.items():
        box = (_extreme(coefficient, np.min), _extreme(coefficient, np.max))
        span: tuple[int | None, int | None] = box
        for atom in monomial:
            span = _interval_mul(span, (atom.low, atom.high))
        total = (_plus(total[0], span[0]), _plus(total[1], span[1]))
    return total


def _extract_remainders(value: Sym) -> tuple[Sym, list[tuple[int, int]]]:
    """Take k * (r - c * (r // c)) out of `value`: its range is k * [0, c - 1], far less than its terms'."""
    parts: list[tuple[int, int]] = []
    for monomial, coefficient in list(value.terms.items()):
        if len(monomial) != 1 or monomial[0].kind != "floordiv" or isinstance(coefficient, np.ndarray):
            continue
        inner, divisor = monomial[0].args
        if coefficient % divisor:
            continue
        factor = -coefficient // divisor
        rest = value + Sym({monomial: -coefficient}) - inner.symbolic().scaled(factor)
        if len(rest.terms) < len(value.terms) - 1:
            offset = inner.constant  # the remainder is of the whole dividend, constant included
            value = rest - const(offset).scaled(factor)
            ends = (0, factor * (divisor - 1))
            parts.append((min(ends), max(ends)))
    return value, parts


def _extreme(value: Coefficient, pick: Callable) -> int:
    return int(pick(value)) if isinstance(value, np.ndarray) else value


def _plus(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def _interval_mul(a: tuple, b: tuple) -> tuple[int | None, int | None]:
    if None not in a and None not in b:
        products = [x * y for x in a for y in b]
        return min(products), max(products)
    a, b = (a, b) if None in b else (b, a)
    if None in a:
        both = all(e[0] is not None and e[0] >= 0 for e in (a, b))
        return (a[0] * b[0], None) if both else (None, None)
    low, high = a
    if low >= 0:
        bottom = None if b[0] is None else min(low * b[0], high * b[0])
        top = None if b[1] is None else max(low * b[1], high * b[1])
        return (0 if high == 0 else bottom), (0 if high == 0 else top)
    if high <= 0:
        flipped = _interval_mul((-high, -low), b)
        return (None if flipped[1] is None else -flipped[1]), (None if flipped[0] is None else -flipped[0])
    return None, None


# --------------------------------------------------------------------------- algebra
@dataclass
class Algebra:
    """Makes atoms, each operation on equal operands once."""

    _atoms: dict[Key, Atom] = field(default_factory=dict)

    def var(self, name: str, low: int | None, high: int | None) -> Sym:
        """Return the symbol `name` with inclusive bounds; with others it is another symbol."""
        return Sym({(self._atom("var", (name, low, high), (name,), low, high),): 1})

    def call(self, kind: str, args: tuple, low: int | None = None, high: int | None = None) -> Sym:
        """Return an operation that stays uninterpreted beyond its bounds."""
        key = tuple(a.key if isinstance(a, Sym) else a for a in args)
        return Sym({(self._atom(kind, key, args, low, high),): 1})

    def _atom(self, kind: str, key: Key, args: tuple, low: int | None, high: int | None) -> Atom:
        atom = self._atoms.get((kind, key))
        if atom is None:
            atom = self._atoms[kind, key] = Atom(len(self._atoms), kind, args, low, high)
        return atom

    def floordiv(self, value: Sym, divisor: int) -> Sym:
        """Return value // divisor for a positive constant."""
        if divisor == 1:
            return value
        whole: dict[Monomial, Coefficient] = {}
        rest: dict[Monomial, Coefficient] = {}
        for monomial, c in value.terms.items():
            if monomial and _leaves_rest(c, divisor):
                rest[monomial] = c
            else:
                whole[monomial] = c // divisor
                if not monomial:
                    rest[monomial] = c % divisor
        quotient, remainder = Sym(whole), Sym(rest)
        low, high = remainder.bounds()
        if low is not None and high is not None and low // divisor == high // divisor:
            return quotient + const(low // divisor)
        common = divisor
        for monomial, c in remainder.terms.items():
            if monomial:
                common = gcd(common, *(np.unique(c).tolist() if isinstance(c, np.ndarray) else [c]))
        if common > 1:
            remainder = remainder.symbolic().divided(common) + const(remainder.constant // common)
            return quotient + self.floordiv(remainder, divisor // common)
        nested = _only_quotient(remainder)
        if nested is not None:  # ((x // a) + r) // b == (x + r * a) // (a * b)
            inner, first = nested.args
            return quotient + self.floordiv(inner + const(remainder.constant).scaled(first), first * divisor)
        low, high = remainder.bounds()
        ends = (None if low is None else low // divisor, None if high is None else high // divisor)
        return quotient + self.call("floordiv", (remainder, divisor), *ends)

    def floormod(self, value: Sym, divisor: int) -> Sym:
        """Return value % divisor for a positive constant, as value - divisor * (value // divisor)."""
        return value - self.floordiv(value, divisor).scaled(divisor)

    def extremum(self, kind: str, a: Sym, b: Sym) -> Sym:
        """Return min or max of two values."""
        low, high = (a - b).bounds()
        if low is not None and low >= 0:
            return a if kind == "max" else b
        if high is not None and high <= 0:
            return b if kind == "max" else a
        if a.is_constant and b.is_constant:
            return const((np.maximum if kind == "max" else np.minimum)(a.constant, b.constant))
        first, second = sorted((a, b), key=lambda s: repr(s.key))
        pick = max if kind == "max" else min
        (low_a, high_a), (low_b, high_b) = a.bounds(), b.bounds()
        low = None if low_a is None or low_b is None else pick(low_a, low_b)
        high = None if high_a is None or high_b is None else pick(high_a, high_b)
        return self.call(kind, (first, second), low, high)


def _only_quotient(value: Sym) -> Atom | None:
    """Return the atom of `value` if its symbolic part is one floordiv, once."""
    symbolic = [(m, c) for m, c in value.terms.items() if m]
    if len(symbolic) != 1:
        return None
    (monomial, coefficient), *_ = symbolic
    single = len(monomial) == 1 and monomial[0].kind == "floordiv" and not isinstance(coefficient, np.ndarray)
    return monomial[0] if single and coefficient == 1 else None


# --------------------------------------------------------------------------- to a solver
def at(value: Coefficient, point: int) -> int:
    """Return a coefficient's value at one point."""
    return int(value[point]) if isinstance(value, np.ndarray) else value


def z3_term(value: Sym, point: int) -> z3.ArithRef:
    """Return `value` at one point over Z3 integers named like the symbols.

    Raises:
        UnsupportedIR: an operation without integer meaning takes part.
    """
    parts: list[z3.ArithRef] = []
    for monomial, coefficient in value.terms.items():
        number = at(coefficient, point)
        factors = [_z3_atom(atom, point) for atom in monomial]
        if number != 1 or not factors:
            factors.insert(0, z3.IntVal(number))
        parts.append(factors[0] if len(factors) == 1 else z3.Product(*factors))
    if not parts:
        return z3.IntVal(0)
    return z3.simplify(parts[0] if len(parts) == 1 else z3.Sum(*parts))


def _z3_atom(atom: Atom, point: int) -> z3.ArithRef:
    args = [z3_term(a, point) if isinstance(a, Sym) else a for a in atom.args]
    match atom.kind:
        case "var":
            return z3.Int(args[0])
        case "floordiv":
            return z3_floordiv(args[0], z3.IntVal(args[1]))
        case "floormod":
            return z3_floormod(*args)
        case "quotient":
            return z3_floordiv(*args)
        case "min":
            return z3.If(args[0] <= args[1], args[0], args[1])
        case "max":
            return z3.If(args[0] >= args[1], args[0], args[1])
        case "load":
            name, *indices = args
            return z3.Function(f"content of {name}", *[z3.IntSort()] * (len(indices) + 1))(*indices)
    raise UnsupportedIR(f"{atom.kind} in an index")


def distinct_points(values: Iterable[Sym], n: int) -> np.ndarray:
    """Return one point of each class on which all of `values` take the same coefficients."""
    columns = [c for v in values for c in arrays(v)]
    if not columns:
        return np.zeros(1, dtype=np.int64) if n else np.zeros(0, dtype=np.int64)
    _, first = np.unique(np.stack(columns, axis=1), axis=0, return_index=True)
    return np.sort(first)


def arrays(value: Sym) -> list[np.ndarray]:
    """Return the coefficients, those inside of operations included, that differ between points."""
    coefficients = [*value.terms.values(), *(c for a in value.atoms() for c in _inner_coefficients(a))]
    return [c for c in coefficients if isinstance(c, np.ndarray)]


def _inner_coefficients(atom: Atom) -> list[Coefficient]:
    return [c for arg in atom.args if isinstance(arg, Sym) for c in arg.terms.values()]
