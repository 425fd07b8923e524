"""Integer operations as Z3 terms over unbounded integers, for machine words that do not wrap."""

from collections.abc import Callable, Sequence

import z3

from verify.ir import DType, UnsupportedIR

MAX_SYMBOLIC_BITS = 32  # widest operand of a bit operation between two computed values
MAX_SHIFT = 63
WRAPPING = ("add", "sub", "mul", "shl", "floordiv", "truncdiv")  # may leave the type's range
BITWISE = ("bitand", "bitor", "bitxor")


def constant_of(term: z3.ExprRef) -> int | None:
    """Return the integer that `term` is, or None where it is not a constant."""
    if not isinstance(term, z3.IntNumRef):
        term = z3.simplify(term)
    return term.as_long() if isinstance(term, z3.IntNumRef) else None


def floordiv(a: z3.ArithRef, b: z3.ArithRef) -> z3.ArithRef:
    """Division that rounds down. SMT-LIB's `div` does for a positive divisor."""
    value = constant_of(b)
    if value is not None and value > 0:
        return a / b
    if value is not None and value < 0:
        return -a / z3.IntVal(-value)
    return z3.If(b > 0, a / b, -a / -b)


def floormod(a: z3.ArithRef, b: z3.ArithRef) -> z3.ArithRef:
    """Remainder with the sign of the divisor."""
    value = constant_of(b)
    return a % b if value is not None and value > 0 else a - b * floordiv(a, b)


def truncdiv(a: z3.ArithRef, b: z3.ArithRef) -> z3.ArithRef:
    """Division that rounds to zero, as C does."""
    return z3.If((a >= 0) == (b > 0), floordiv(a, b), -floordiv(-a, b))


def truncmod(a: z3.ArithRef, b: z3.ArithRef) -> z3.ArithRef:
    """Remainder with the sign of the dividend."""
    value = constant_of(b)
    if value is not None and value > 0:
        return z3.If(a >= 0, a % b, -(-a % b))
    return a - b * truncdiv(a, b)


def shift_left(a: z3.ArithRef, b: z3.ArithRef) -> z3.ArithRef:
    """`a << b` before wrapping; `b` in [0, 63]."""
    return _by_amount(b, lambda amount: a * (1 << amount))


def shift_right(a: z3.ArithRef, b: z3.ArithRef) -> z3.ArithRef:
    """Arithmetic `a >> b`; `b` in [0, 63]."""
    return _by_amount(b, lambda amount: a / (1 << amount))


def _by_amount(b: z3.ArithRef, shifted: Callable[[int], z3.ArithRef]) -> z3.ArithRef:
    value = constant_of(b)
    if value is not None:
        if not 0 <= value <= MAX_SHIFT:
            raise UnsupportedIR(f"shift by {value}")
        return shifted(value)
    term = shifted(MAX_SHIFT)
    for amount in reversed(range(MAX_SHIFT)):
        term = z3.If(b == amount, shifted(amount), term)
    return term


def bitwise(op: str, a: z3.ArithRef, b: z3.ArithRef, dtype: DType) -> z3.ArithRef:
    """and, or, xor of two's complement integers of `dtype`, as arithmetic.

    With a constant operand runs of its bits become div and mod by powers of two; between two
    symbolic operands each bit is taken apart.

    Raises:
        UnsupportedIR: two symbolic operands of more than 32 bits.
    """
    left, right = constant_of(a), constant_of(b)
    if left is not None and right is not None:
        return z3.IntVal({"bitand": left & right, "bitor": left | right, "bitxor": left ^ right}[op])
    if left is not None:
        a, right = b, left
    common = _and_constant(a, right, dtype) if right is not None else _and_symbolic(a, b, dtype)
    b = z3.IntVal(right) if right is not None else b
    if op == "bitand":
        return common
    return a + b - common if op == "bitor" else a + b - 2 * common


def _and_constant(a: z3.ArithRef, mask: int, dtype: DType) -> z3.ArithRef:
    if mask < 0:  # a & mask == a - (a & ~mask)
        return a - _and_constant(a, ~mask, dtype)
    total, low = z3.IntVal(0), 0
    while mask >> low:
        if not (mask >> low) & 1:
            low += 1
            continue
        high = low
        while (mask >> high) & 1:
            high += 1
        part = (a / (1 << low)) % (1 << (high - low)) if low else a % (1 << high)
        total = total + part * (1 << low)
        low = high
    return total


def _and_symbolic(a: z3.ArithRef, b: z3.ArithRef, dtype: DType) -> z3.ArithRef:
    if dtype.bits > MAX_SYMBOLIC_BITS:
        raise UnsupportedIR(f"bit operation between two computed {dtype} values")
    total: z3.ArithRef = z3.IntVal(0)
    for bit in range(dtype.bits):
        both = z3.And((a / (1 << bit)) % 2 == 1, (b / (1 << bit)) % 2 == 1)
        weight = -(1 << bit) if dtype.is_signed and bit == dtype.bits - 1 else 1 << bit
        total = total + z3.If(both, z3.IntVal(weight), z3.IntVal(0))
    return total


def in_range(dtype: DType, term: z3.ArithRef) -> z3.BoolRef:
    """Return that `term` fits `dtype`."""
    low, high = dtype.int_range
    return z3.And(term >= low, term <= high)


COMPARE: dict[str, Callable[[z3.ArithRef, z3.ArithRef], z3.BoolRef]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
ARITHMETIC: dict[str, Callable[[z3.ArithRef, z3.ArithRef], z3.ArithRef]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": floordiv,
    "floormod": floormod,
    "truncdiv": truncdiv,
    "truncmod": truncmod,
    "min": lambda a, b: z3.If(a <= b, a, b),
    "max": lambda a, b: z3.If(a >= b, a, b),
    "shl": shift_left,
    "shr": shift_right,
}


def conjunction(terms: Sequence[z3.BoolRef]) -> z3.BoolRef:
    """Return the conjunction; true for none."""
    return z3.And(*terms) if len(terms) > 1 else (terms[0] if terms else z3.BoolVal(True))


def total(terms: Sequence[z3.ArithRef]) -> z3.ArithRef:
    """Return the sum; 0 for none. In SMT-LIB there is no sum of one term."""
    return z3.Sum(*terms) if len(terms) > 1 else (terms[0] if terms else z3.IntVal(0))


def generalised(terms: Sequence[z3.ExprRef]) -> tuple[list[z3.ExprRef], list[z3.BoolRef]]:
    """Return `terms` with constants for quotients and remainders by computed divisors, and their ranges.

    What follows for all values of those constants within their ranges holds of `terms`; not the other way
    round. `x - y * (x / y)` is a remainder too. Products with such values are often linear in the constants.
    """
    known: dict[int, z3.ExprRef] = {}
    kept: list[z3.ExprRef] = []  # their identities stay theirs
    values: dict[tuple[int, int, int], z3.ArithRef] = {}
    ranges: list[z3.BoolRef] = []

    def of(term: z3.ExprRef) -> z3.ExprRef:
        if not z3.is_app(term) or term.num_args() == 0:
            return term
        found = known.get(term.get_id())
        if found is None:
            found = known[term.get_id()] = changed(term)
            kept.append(term)
        return found

    def changed(term: z3.ExprRef) -> z3.ExprRef:
        kind = term.decl().kind()
        if kind in (z3.Z3_OP_IDIV, z3.Z3_OP_MOD) and constant_of(term.arg(1)) is None:
            return value(kind, of(term.arg(0)), of(term.arg(1)))
        if kind == z3.Z3_OP_MUL:
            for quotient in term.children():
                if quotient.decl().kind() != z3.Z3_OP_IDIV or constant_of(quotient.arg(1)) is not None:
                    continue
                rest = [p for p in term.children() if not z3.eq(p, quotient)]
                if not any(z3.eq(p, quotient.arg(1)) for p in rest):
                    continue
                at = next(n for n, p in enumerate(rest) if z3.eq(p, quotient.arg(1)))
                del rest[at]
                dividend, divisor = of(quotient.arg(0)), of(quotient.arg(1))
                product = dividend - value(z3.Z3_OP_MOD, dividend, divisor)
                for part in rest:
                    product = of(part) * product
                return product
        return term.decl()(*(of(part) for part in term.children()))

    def value(kind: int, dividend: z3.ExprRef, divisor: z3.ExprRef) -> z3.ArithRef:
        key = kind, dividend.get_id(), divisor.get_id()
        if key not in values:
            kept.extend((dividend, divisor))
            found = values[key] = z3.FreshInt("value")
            if kind == z3.Z3_OP_MOD:
                ranges.append(z3.Implies(divisor > 0, z3.And(found >= 0, found < divisor)))
            else:
                ranges.append(z3.Implies(z3.And(divisor > 0, dividend >= 0), found >= 0))
        return values[key]

    return [of(term) for term in terms], ranges
