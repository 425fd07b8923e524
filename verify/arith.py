"""Terms of integer arithmetic, evaluated at given values without a solver."""

from collections.abc import Callable, Mapping
from functools import reduce
from itertools import pairwise

import z3

Value = int | bool | None  # None: not known
Table = Mapping[tuple[str, tuple[Value, ...]], int]  # of functions, by name and operands


def evaluate(term: z3.ExprRef, values: Mapping[str, int], table: Table | None = None) -> Value:
    """Return the value of a term, None where it rests on something that nothing says.

    Constants without a value are 0. Integers are of any size; division is SMT-LIB's (the remainder is never
    negative; by zero, nothing is known).

    Args:
        term: of integers and truth values.
        values: of constants, by name.
        table: of functions, at the operands where they are known.
    """
    return _evaluate(term, values, table or {}, {})


def _evaluate(term: z3.ExprRef, values: Mapping[str, int], table: Table, seen: dict[int, Value]) -> Value:
    key = term.get_id()
    if key not in seen:
        seen[key] = _computed(term, values, table, seen)
    return seen[key]


def _computed(term: z3.ExprRef, values: Mapping[str, int], table: Table, seen: dict[int, Value]) -> Value:
    if z3.is_int_value(term):
        return term.as_long()
    if not z3.is_app(term):
        return None
    kind = term.decl().kind()
    args = [_evaluate(a, values, table, seen) for a in term.children()]
    if kind == z3.Z3_OP_UNINTERPRETED:
        name = term.decl().name()
        value = table.get((name, tuple(args))) if args else values.get(name, 0)
        return bool(value) if z3.is_bool(term) and value is not None else value
    match kind:
        case z3.Z3_OP_ITE:
            return None if args[0] is None else args[1] if args[0] else args[2]
        case z3.Z3_OP_AND:
            return False if False in args else None if None in args else True
        case z3.Z3_OP_OR:
            return True if any(a is True for a in args) else None if None in args else False
        case z3.Z3_OP_IMPLIES:
            if args[0] is False or args[1] is True:
                return True
    if any(a is None for a in args):
        return None
    known = [a for a in args if a is not None]
    operation = _OPERATIONS.get(kind)
    return operation(known) if operation is not None else None


def _divided(args: list[int]) -> int | None:
    a, b = args
    return None if b == 0 else (a // b if b > 0 else -(a // -b))


def _remainder(args: list[int]) -> int | None:
    a, b = args
    return None if b == 0 else a % abs(b)


_OPERATIONS: dict[int, Callable[[list[int]], Value]] = {
    z3.Z3_OP_TRUE: lambda a: True,
    z3.Z3_OP_FALSE: lambda a: False,
    z3.Z3_OP_NOT: lambda a: not a[0],
    z3.Z3_OP_IMPLIES: lambda a: (not a[0]) or bool(a[1]),
    z3.Z3_OP_XOR: lambda a: a[0] != a[1],
    z3.Z3_OP_EQ: lambda a: a[0] == a[1],
    z3.Z3_OP_DISTINCT: lambda a: len(set(a)) == len(a),
    z3.Z3_OP_LE: lambda a: all(x <= y for x, y in pairwise(a)),
    z3.Z3_OP_LT: lambda a: all(x < y for x, y in pairwise(a)),
    z3.Z3_OP_GE: lambda a: all(x >= y for x, y in pairwise(a)),
    z3.Z3_OP_GT: lambda a: all(x > y for x, y in pairwise(a)),
    z3.Z3_OP_ADD: sum,
    z3.Z3_OP_SUB: lambda a: reduce(lambda x, y: x - y, a),
    z3.Z3_OP_UMINUS: lambda a: -a[0],
    z3.Z3_OP_MUL: lambda a: reduce(lambda x, y: x * y, a),
    z3.Z3_OP_IDIV: _divided,
    z3.Z3_OP_MOD: _remainder,
}
