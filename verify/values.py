"""Values of terms under many assignments at once, as arrays of 64-bit integers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import z3

from verify.ir import UnsupportedIR
from verify.symbols import NUMERAL, Node, summary

Values = Any  # an integer or boolean array, or one value


def evaluate(term: z3.ExprRef, values: Mapping[str, Values]) -> Values:
    """Return `term` with its constants as in `values`.

    Raises:
        UnsupportedIR: a constant without values, or an operation that has none here.
    """
    found: list[Values] = []
    for node in summary(term).nodes:
        found.append(_value(node, [found[place] for place in node.operands], values))
    return found[-1]


def _value(node: Node, parts: list[Values], values: Mapping[str, Values]) -> Values:
    kind = node.kind
    if kind == NUMERAL and isinstance(node.value, int):
        return np.int64(node.value)
    match kind:
        case z3.Z3_OP_TRUE | z3.Z3_OP_FALSE:
            return np.bool_(kind == z3.Z3_OP_TRUE)
        case z3.Z3_OP_UNINTERPRETED if not parts and node.value in values:
            return values[str(node.value)]
        case z3.Z3_OP_ADD:
            return sum(parts[1:], parts[0])
        case z3.Z3_OP_SUB:
            return parts[0] - sum(parts[2:], parts[1])
        case z3.Z3_OP_UMINUS:
            return -parts[0]
        case z3.Z3_OP_MUL:
            result = parts[0]
            for part in parts[1:]:
                result = result * part
            return result
        case z3.Z3_OP_IDIV | z3.Z3_OP_MOD:
            return _divided(kind, *parts)
        case z3.Z3_OP_ITE:
            return np.where(parts[0], parts[1], parts[2])
        case z3.Z3_OP_AND:
            return _all(np.logical_and, parts)
        case z3.Z3_OP_OR:
            return _all(np.logical_or, parts)
        case z3.Z3_OP_NOT:
            return np.logical_not(parts[0])
    compare = _COMPARE.get(kind)
    if compare is None or len(parts) != len(_PAIR):
        raise UnsupportedIR(f"value of {node.value or kind}")
    return compare(*parts)


_PAIR = ("left", "right")
_COMPARE: dict[int, Any] = {
    z3.Z3_OP_EQ: np.equal,
    z3.Z3_OP_DISTINCT: np.not_equal,
    z3.Z3_OP_LE: np.less_equal,
    z3.Z3_OP_LT: np.less,
    z3.Z3_OP_GE: np.greater_equal,
    z3.Z3_OP_GT: np.greater,
    z3.Z3_OP_XOR: np.logical_xor,
    z3.Z3_OP_IMPLIES: lambda a, b: np.logical_or(np.logical_not(a), b),
}


def _divided(kind: int, a: Values, b: Values) -> Values:
    if np.any(np.less_equal(b, 0)):  # where a guard keeps this from being used, as in a choice
        b = np.where(np.less_equal(b, 0), 1, b)
    return np.floor_divide(a, b) if kind == z3.Z3_OP_IDIV else np.mod(a, b)


def _all(join: Any, parts: list[Values]) -> Values:
    result = parts[0]
    for part in parts[1:]:
        result = join(result, part)
    return result
