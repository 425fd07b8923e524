"""Conditions on coordinates of few values, decided by all of them: no solver is as quick, or as sure."""

import numpy as np

from verify.refine.evaluate import Cond, Literal
from verify.refine.sym import Atom, Sym

MAX_POINTS = 1 << 16  # combinations of values
_KINDS = frozenset({"var", "floordiv", "min", "max"})


def decided(cond: Cond, facts: Cond) -> tuple[bool, bool | None]:
    """Return whether trying all values settles `cond`, and how: always true, never, or None.

    It says nothing where a symbol has too many values, or where what is known ties one of them to others.
    """
    own = variables(cond)
    if own is None or cond.mask is not True or facts.mask is not True:
        return False, None
    points = _points(own)
    if points is None:
        return False, None
    held, is_tied = np.True_, False
    for literal in facts.literals.values():
        alone = Cond(True, {literal.key: literal})
        others = variables(alone)
        if others is not None and set(others) <= set(own):
            held = held & truth(alone, points)
        else:
            is_tied |= others is None or not set(others).isdisjoint(own)
    wanted = truth(cond, points)
    if not np.any(held):
        return False, None
    if np.all(wanted | ~held):
        return True, True
    if not np.any(wanted & held):
        return True, False
    return not is_tied, None


def variables(cond: Cond) -> list[Atom] | None:
    """Return the variables of a condition in order; None where operations take part that are not computed."""
    atoms = {a for s in cond.syms() for a in s.atoms()}
    if any(a.kind not in _KINDS for a in atoms):
        return None
    if any(isinstance(c, np.ndarray) for s in cond.syms() for c in s.terms.values()):
        return None
    return sorted((a for a in atoms if a.kind == "var"), key=lambda a: a.number)


def _points(variables: list[Atom]) -> dict[Atom, np.ndarray] | None:
    """Return the values of each symbol over all combinations; None where there are too many."""
    count = 1
    for atom in variables:
        if atom.low is None or atom.high is None:
            return None
        count *= max(atom.high - atom.low + 1, 0)
        if not 0 < count <= MAX_POINTS:
            return None
    ranges = [np.arange(a.low, a.high + 1, dtype=np.int64) for a in variables]  # type: ignore[operator]
    return dict(zip(variables, (g.ravel() for g in np.meshgrid(*ranges, indexing="ij")), strict=True))


def truth(cond: Cond, points: dict[Atom, np.ndarray]) -> np.ndarray:
    """Return whether a condition holds at each point, given the values of its variables there."""
    held = np.asarray(bool(np.all(cond.mask)))
    for literal in cond.literals.values():
        held = held & _literal(literal, points)
    return held


def _literal(literal: Literal, points: dict[Atom, np.ndarray]) -> np.ndarray:
    if not isinstance(literal.value, Sym):
        return np.any([truth(c, points) for c in literal.value], axis=0)
    value = _value(literal.value, points)
    return {"ge": value >= 0, "eq": value == 0, "ne": value != 0}[literal.kind]


def _value(value: Sym, points: dict[Atom, np.ndarray]) -> np.ndarray:
    total = np.asarray(0, dtype=np.int64)
    for monomial, coefficient in value.terms.items():
        product = np.asarray(coefficient, dtype=np.int64)
        for atom in monomial:
            product = product * _atom(atom, points)
        total = total + product
    return total


def _atom(atom: Atom, points: dict[Atom, np.ndarray]) -> np.ndarray:
    if atom.kind == "var":
        return points[atom]
    first, second = (_value(a, points) if isinstance(a, Sym) else a for a in atom.args)
    return {"floordiv": np.floor_divide, "min": np.minimum, "max": np.maximum}[atom.kind](first, second)
