"""Z3 integer terms over arrays of values: enumeration of small domains, exact and quick."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import z3

from verify.symbols import NUMERAL, Node, summary

Values = Mapping[str, np.ndarray]


class NotEvaluatedError(Exception):
    """The term holds a symbol without a value, or an operation of another theory."""


def evaluate(term: z3.ExprRef, values: Values) -> Any:
    """Return `term` for each element of `values`: an int64 or bool array, or a Python scalar.

    Args:
        term: over integers and Booleans.
        values: name of a constant -> its values, arrays that broadcast against each other.

    Raises:
        NotEvaluatedError: a constant has no values.
    """
    found: list[Any] = []
    for node in summary(term).nodes:
        found.append(_one(node, [found[place] for place in node.operands], values))
    return found[-1]


def _one(node: Node, parts: list[Any], values: Values) -> Any:
    if node.kind == NUMERAL and node.value is not None:
        return node.value
    if node.kind in (z3.Z3_OP_TRUE, z3.Z3_OP_FALSE):
        return node.kind == z3.Z3_OP_TRUE
    if node.kind == z3.Z3_OP_UNINTERPRETED:
        name = str(node.value)
        if parts or name not in values:
            raise NotEvaluatedError(name)
        return values[name]
    if node.kind == z3.Z3_OP_ITE:
        return np.where(*parts)
    handler = _HANDLERS.get(node.kind)
    if handler is None:
        raise NotEvaluatedError(f"operator {node.kind} of z3")
    return handler(parts)


def _fold(operation: Callable[[Any, Any], Any]) -> Callable[[list[Any]], Any]:
    def folded(parts: list[Any]) -> Any:
        total = parts[0]
        for part in parts[1:]:
            total = operation(total, part)
        return total

    return folded


def _divide(parts: list[Any]) -> Any:
    """SMT-LIB's div for a positive divisor; others do not come up as they cannot be enumerated."""
    if np.any(np.asarray(parts[1]) <= 0):
        raise NotEvaluatedError("division by a number that is not positive")
    return parts[0] // parts[1]


def _modulo(parts: list[Any]) -> Any:
    if np.any(np.asarray(parts[1]) <= 0):
        raise NotEvaluatedError("remainder by a number that is not positive")
    return parts[0] % parts[1]


_HANDLERS: dict[int, Callable[[list[Any]], Any]] = {
    z3.Z3_OP_ADD: _fold(lambda a, b: a + b),
    z3.Z3_OP_SUB: _fold(lambda a, b: a - b),
    z3.Z3_OP_MUL: _fold(lambda a, b: a * b),
    z3.Z3_OP_UMINUS: lambda parts: -parts[0],
    z3.Z3_OP_IDIV: _divide,
    z3.Z3_OP_MOD: _modulo,
    z3.Z3_OP_LE: lambda parts: parts[0] <= parts[1],
    z3.Z3_OP_LT: lambda parts: parts[0] < parts[1],
    z3.Z3_OP_GE: lambda parts: parts[0] >= parts[1],
    z3.Z3_OP_GT: lambda parts: parts[0] > parts[1],
    z3.Z3_OP_EQ: lambda parts: parts[0] == parts[1],
    z3.Z3_OP_DISTINCT: lambda parts: parts[0] != parts[1],
    z3.Z3_OP_AND: _fold(np.logical_and),
    z3.Z3_OP_OR: _fold(np.logical_or),
    z3.Z3_OP_XOR: _fold(np.logical_xor),
    z3.Z3_OP_NOT: lambda parts: np.logical_not(parts[0]),
    z3.Z3_OP_IMPLIES: lambda parts: np.logical_or(np.logical_not(parts[0]), parts[1]),
}
