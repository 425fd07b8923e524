"""Values as canonical terms, and what may be said of them without losing a bit.

A term is the whole computation of one output element: reads of tensors, integer and floating-point
operations, and chains of matrix instructions, in the order in which they happen. Equal terms are one
object; `digest` names a term across variants. The only identities used hold for every bit pattern:

- operands of integer `+ * min max & | ^` and of floating-point `+ *` commute;
- integer constants are folded, and `x + 0`, `x * 1`, `x << 0`, `x >> 0`, `x | 0` are x for integers;
- iterations of a loop that are alike are one `fold`: values before it, and those of an iteration over the
  values that it takes over (`carried`);
- a sum of which one operand is never -0 does not show the sign of a zero in the other, so there
  `0 + x` counts as x. (Rounding to nearest, a sum is -0 only if both operands are.)
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from verify import ir
from verify.refine.sym import Atom, Sym

Arg = Any  # Term, Sym, int, float, str or a tuple of them
_COMMUTATIVE_INT = {"add", "mul", "min", "max", "bitand", "bitor", "bitxor", "eq", "ne", "and", "or"}
_COMMUTATIVE_FLOAT = {"add", "mul", "eq", "ne"}
_NEUTRAL = {"add": 0, "sub": 0, "shl": 0, "shr": 0, "bitor": 0, "bitxor": 0, "mul": 1}
_FOLD = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "min": np.minimum,
    "max": np.maximum,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "bitand": lambda a, b: a & b,
    "bitor": lambda a, b: a | b,
    "bitxor": lambda a, b: a ^ b,
    "floordiv": lambda a, b: a // b,
    "floormod": lambda a, b: a % b,
    "lt": lambda a, b: np.less(a, b).astype(np.int64),
    "le": lambda a, b: np.less_equal(a, b).astype(np.int64),
    "gt": lambda a, b: np.greater(a, b).astype(np.int64),
    "ge": lambda a, b: np.greater_equal(a, b).astype(np.int64),
    "eq": lambda a, b: np.equal(a, b).astype(np.int64),
    "ne": lambda a, b: np.not_equal(a, b).astype(np.int64),
}
_BYTE_CUT_BITS = 16  # a sub-term of at most this many bits is enumerated
_F32_MANTISSA_BITS = 23
_F32_EXPONENT_MAX = 255


@dataclass(eq=False, slots=True)
class Term:
    """One value.

    Attributes:
        op: `const`, `index`, `read`, `mma`, `reduce`, `fold`, `carried`, `bits`, `select`, `cast`, or the
            name of an operator or intrinsic.
        dtype: scalar type.
        args: operands in order.
        digest: SHA-256 over the term, the same in every process and variant.
        never_minus_zero: no run can make it a negative zero.
    """

    op: str
    dtype: ir.DType
    args: tuple[Arg, ...]
    digest: str
    never_minus_zero: bool

    def children(self) -> Iterator["Term"]:
        """Yield the terms among the operands."""
        stack: list[Arg] = list(reversed(self.args))
        while stack:
            arg = stack.pop()
            if isinstance(arg, Term):
                yield arg
            elif isinstance(arg, tuple):
                stack.extend(reversed(arg))

    def syms(self) -> Iterator[Sym]:
        """Yield the index expressions among the operands."""
        stack: list[Arg] = list(self.args)
        while stack:
            arg = stack.pop()
            if isinstance(arg, Sym):
                yield arg
            elif isinstance(arg, tuple):
                stack.extend(arg)


def walk(term: Term) -> Iterator[Term]:
    """Yield every term in `term` once."""
    seen: set[int] = set()
    stack = [term]
    while stack:
        top = stack.pop()
        if id(top) in seen:
            continue
        seen.add(id(top))
        yield top
        stack.extend(top.children())


def show_sym(value: Sym) -> str:
    """Return an index expression as text that does not depend on the order in which symbols were made."""
    parts = []
    for monomial, coefficient in value.terms.items():
        names = sorted(_show_atom(a) for a in monomial)
        factor = [] if coefficient == 1 and names else [str(coefficient)]
        parts.append("*".join([*factor, *names]))
    return " + ".join(sorted(parts)) or "0"


def _show_atom(atom: Atom) -> str:
    if atom.kind == "var":
        return str(atom.args[0])
    inner = ",".join(show_sym(a) if isinstance(a, Sym) else str(a) for a in atom.args)
    return f"{atom.kind}({inner})"


@dataclass
class Terms:
    """Makes terms, each once."""

    _known: dict[str, Term] = field(default_factory=dict)
    _made: dict[tuple, Term] = field(default_factory=dict)  # by operands as they are: no text has to be made
    _stripped: dict[int, Term] = field(default_factory=dict)

    def make(self, op: str, dtype: ir.DType, *args: Arg) -> Term:
        """Return the term as it stands."""
        key = (op, dtype.name, dtype.lanes, *map(_identity, args))
        term = self._made.get(key)
        if term is None:
            text = f"{op}:{dtype}({','.join(_text(a) for a in args)})"
            digest = hashlib.sha256(text.encode()).hexdigest()
            term = self._known.get(digest)
            if term is None:
                term = Term(op, dtype, args, digest, _is_never_minus_zero(op, dtype, args))
                self._known[digest] = term
            self._made[key] = term
        return term

    def const(self, value: float | int | bool, dtype: ir.DType) -> Term:
        """Return a literal; a float by its bits."""
        return self.make("const", dtype, float(value).hex() if not dtype.is_int else int(value))

    def index(self, value: Sym, dtype: ir.DType) -> Term:
        """Return an integer that no data takes part in."""
        if value.is_constant:
            return self.const(int(value.constant), dtype)
        return self.make("index", dtype, value)

    def binary(self, op: str, dtype: ir.DType, a: Term, b: Term) -> Term:
        """Return `a op b` in canonical form."""
        if a.dtype.is_int and b.dtype.is_int:
            return self._integer(op, dtype, a, b)
        if op == "add":
            if a.never_minus_zero:
                b = self.strip(b)
            if b.never_minus_zero:
                a = self.strip(a)
        if op in _COMMUTATIVE_FLOAT and a.digest > b.digest:
            a, b = b, a
        return self.make(op, dtype, a, b)

    def _integer(self, op: str, dtype: ir.DType, a: Term, b: Term) -> Term:
        x, y = integer(a), integer(b)
        if x is not None and y is not None and op in _FOLD and (y or op not in ("floordiv", "floormod")):
            return self.const(wrapped(int(_FOLD[op](x, y)), dtype), dtype)
        if op in _NEUTRAL and y == _NEUTRAL[op] and a.dtype == dtype:
            return a
        if op in ("add", "mul", "bitor", "bitxor") and x == _NEUTRAL[op] and b.dtype == dtype:
            return b
        if op in _COMMUTATIVE_INT and a.digest > b.digest:
            a, b = b, a
        return self.make(op, dtype, a, b)

    def strip(self, term: Term) -> Term:
        """Return a term that differs from `term` at most in the sign of a zero."""
        known = self._stripped.get(id(term))
        if known is None:
            known = self._stripped[id(term)] = self._strip(term)
        return known

    def _strip(self, term: Term) -> Term:
        if term.dtype.is_int:
            return term
        match term.op, term.args:
            case "add", (Term() as a, Term() as b):
                a, b = self.strip(a), self.strip(b)
                if _is_zero(a):
                    return b
                return a if _is_zero(b) else self.binary("add", term.dtype, a, b)
            case "mul", (Term() as a, Term() as b):
                return self.binary("mul", term.dtype, self.strip(a), self.strip(b))
            case "select", (Term() as cond, Term() as a, Term() as b):
                return self.make("select", term.dtype, cond, self.strip(a), self.strip(b))
        return term


def _identity(arg: Arg) -> object:
    """Return what tells an operand from all others, of other types too."""
    if isinstance(arg, Term):
        return arg
    if isinstance(arg, Sym):
        return Sym, arg.key
    if isinstance(arg, tuple):
        return tuple(map(_identity, arg))
    return repr(arg)


def _text(arg: Arg) -> str:
    if isinstance(arg, Term):
        return arg.digest
    if isinstance(arg, Sym):
        return f"[{show_sym(arg)}]"
    if isinstance(arg, tuple):
        return f"({','.join(_text(a) for a in arg)})"
    return repr(arg)


def integer(term: Term) -> int | None:
    """Return the value of an integer literal."""
    return term.args[0] if term.op == "const" and term.dtype.is_int else None


def _is_zero(term: Term) -> bool:
    return term.op == "const" and not term.dtype.is_int and float.fromhex(term.args[0]) == 0


def wrapped(value: int | np.ndarray, dtype: ir.DType) -> Any:
    """Return integers as a cast to `dtype` leaves them: cut to its bits, or compared with 0."""
    if dtype.name == "bool":
        return (np.asarray(value) != 0).astype(np.int64)
    low, _ = dtype.int_range
    return (value - low) % (1 << dtype.bits) + low


def _is_never_minus_zero(op: str, dtype: ir.DType, args: tuple[Arg, ...]) -> bool:
    if dtype.is_int:
        return False
    if op == "add":
        return any(a.never_minus_zero for a in args)
    if op == "carried":  # the flag holds for the value before the loop and is kept by its body
        return args[-1]
    if op == "fold":
        *_, which, inits, bodies = args
        return inits[which].never_minus_zero and bodies[which].never_minus_zero
    return op == "const" and not args[0].startswith("-")


def is_power_of_two(term: Term) -> bool:
    """Return whether `term` is a power of two, an infinity, a zero or a nan, whatever the data.

    The bits of a float32 that depend on one value of at most 16 bits are tried for all its values.
    """
    if term.op == "const" and not term.dtype.is_int:
        return _all_powers(
            np.float32(float.fromhex(term.args[0])).reshape(1).view(np.uint32).astype(np.int64)
        )
    if term.op == "cast" and term.dtype.name == "float32":
        return term.args[0].dtype.name == "float8_e8m0fnu"
    if term.op == "mul":
        return all(is_power_of_two(factor) for factor in term.args)
    if term.op != "reinterpret" or term.dtype.name != "float32" or not term.args[0].dtype.is_int:
        return False
    cut = _cut(term.args[0])
    if cut is None:
        return False
    values = np.arange(1 << cut[1], dtype=np.int64)
    bits = _tabulate(term.args[0], cut[0], values, {})
    return bits is not None and _all_powers(bits)


def _all_powers(bits: np.ndarray) -> bool:
    bits = bits & ((1 << 31) - 1)
    exponent, mantissa = bits >> _F32_MANTISSA_BITS, bits & ((1 << _F32_MANTISSA_BITS) - 1)
    single = (mantissa & (mantissa - 1)) == 0
    normal = (exponent > 0) & (exponent < _F32_EXPONENT_MAX) & (mantissa == 0)
    return bool(np.all(normal | (exponent == _F32_EXPONENT_MAX) | ((exponent == 0) & single)))


def _cut(term: Term) -> tuple[Term, int] | None:
    """Return the one narrow sub-term that `term` depends on, and its bits."""
    found: dict[int, tuple[Term, int]] = {}
    stack = [term]
    while stack:
        top = stack.pop()
        bits = _width(top)
        if bits is not None and bits <= _BYTE_CUT_BITS:
            found[id(top)] = (top, bits)
        elif top.op == "const":
            continue
        elif top.op in _FOLD or top.op in ("cast", "select"):
            stack.extend(top.children())
        else:
            return None
    return next(iter(found.values())) if len(found) == 1 else None


def _width(term: Term) -> int | None:
    """Return how many bits hold a value that data decides, none of them a sign."""
    if term.op == "const":
        return None
    if term.op == "bitand":
        masks = [m for a in term.args if (m := integer(a)) is not None and m >= 0]
        return masks[0].bit_length() if masks else None
    if term.op == "cast" and term.dtype.is_int and term.dtype.bits >= term.args[0].dtype.bits:
        return _width(term.args[0])
    name = term.dtype.name
    return term.dtype.bits if term.op == "read" and name in ir.UINT_BITS else None


def _tabulate(term: Term, cut: Term, values: np.ndarray, memo: dict[int, np.ndarray]) -> np.ndarray | None:
    if term is cut:
        return values
    value = integer(term)
    if value is not None:
        return np.full_like(values, value)
    if id(term) in memo:
        return memo[id(term)]
    parts = [p for a in term.children() if (p := _tabulate(a, cut, values, memo)) is not None]
    if len(parts) != len(list(term.children())):
        return None
    if term.op == "cast":
        result = parts[0]
    elif term.op == "select":
        result = np.where(parts[0] != 0, parts[1], parts[2])
    else:
        result = _FOLD[term.op](*parts)
    memo[id(term)] = wrapped(result, term.dtype)
    return memo[id(term)]
