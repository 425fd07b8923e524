"""Results kept for all cases that decide alike what was asked to find them.

An element may be followed case by case (`Values`), within other cases too. Most of what it is computed from
has nothing to do with any of them: it is found once, not once for each. What an evaluation asked is noted. A
question that trying all values settled (`finite`) has read no other facts than those with a variable of its
own, or of none; any other question counts as one about everything that is supposed.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from verify.refine.evaluate import Cond, Literal
from verify.refine.sym import Atom
from verify.signature import finite

Value = TypeVar("Value")


@dataclass(slots=True)
class Asked:
    """What an evaluation asked of what is supposed.

    Attributes:
        variables: those of its questions that trying all values settled, a bit each.
        everything: another question was among them.
        whether: whether there are cases at all.
    """

    variables: int = 0
    everything: bool = False
    whether: bool = False

    def add(self, other: "Asked") -> None:
        """Note what a part of the evaluation asked."""
        self.variables |= other.variables
        self.everything |= other.everything
        self.whether |= other.whether


@dataclass
class Variables:
    """Numbers the variables of literals."""

    _bits: dict[Atom, int] = field(default_factory=dict)
    _known: dict[tuple, int | None] = field(default_factory=dict)
    _facts: dict[int, tuple[Cond, list[tuple[tuple, int | None]]]] = field(default_factory=dict)

    def of(self, literal: Literal, key: tuple) -> int | None:
        """Return the variables of a literal, a bit each; None where not all of it is computed."""
        if key not in self._known:
            found = finite.variables(Cond(True, {key: literal}))
            self._known[key] = None if found is None else self._mask(found)
        return self._known[key]

    def _mask(self, atoms: list[Atom]) -> int:
        mask = 0
        for atom in atoms:
            mask |= 1 << self._bits.setdefault(atom, len(self._bits))
        return mask

    def read(self, facts: Cond, variables: int) -> tuple[tuple, ...]:
        """Return the keys of those facts that questions with these variables may read."""
        known = self._facts.get(id(facts))
        if known is None:  # the condition is kept, so that its identity stays its own
            found = [(key, self.of(literal, key)) for key, literal in facts.literals.items()]
            known = self._facts[id(facts)] = (facts, found)
        return tuple(key for key, mask in known[1] if not mask or mask & variables)


@dataclass(slots=True)
class _Entry(Generic[Value]):
    value: Value
    asked: Asked
    read: tuple[tuple, ...]
    cases: tuple[tuple, ...]


@dataclass
class Supposed:
    """What is supposed, and what the evaluation under way has asked of it.

    Attributes:
        facts: what holds of the coordinates.
        cases: keys of what is supposed beyond that, where an element is followed case by case.
    """

    facts: Cond
    cases: tuple[tuple, ...] = ()
    asked: Asked = field(default_factory=Asked)
    variables: Variables = field(default_factory=Variables)

    def note(self, cond: Cond, alone: bool) -> None:
        """Note a question; `alone`: trying all values of its variables settled it."""
        for key, literal in cond.literals.items() if alone else ():
            mask = self.variables.of(literal, key)
            if mask is None:
                alone = False
                break
            self.asked.variables |= mask
        self.asked.everything |= not alone


@dataclass
class Memo(Generic[Value]):
    """Keeps results by key, and by those of the cases that they depend on."""

    supposed: Supposed
    _here: dict[tuple, _Entry[Value]] = field(default_factory=dict)
    _entries: dict[Hashable, list[_Entry[Value]]] = field(default_factory=dict)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return what `make` returns for `key` under what is supposed, computed once."""
        exact = (key, self.supposed.cases)
        entry = self._here.get(exact)
        if entry is None:
            entry = self._here[exact] = self._like(key) or self._made(key, make)
        self.supposed.asked.add(entry.asked)
        return entry.value

    def _like(self, key: Hashable) -> _Entry[Value] | None:
        supposed = self.supposed
        for entry in self._entries.get(key, ()):
            asked = entry.asked
            if asked.everything or (asked.whether and not (entry.cases and supposed.cases)):
                continue
            if supposed.variables.read(supposed.facts, asked.variables) == entry.read:
                return entry
        return None

    def _made(self, key: Hashable, make: Callable[[], Value]) -> _Entry[Value]:
        supposed = self.supposed
        outer, supposed.asked = supposed.asked, Asked()
        try:
            value = make()
        finally:
            asked, supposed.asked = supposed.asked, outer
            outer.add(asked)  # an error is an answer too
        read = supposed.variables.read(supposed.facts, asked.variables)
        entry = _Entry(value, asked, read, supposed.cases)
        self._entries.setdefault(key, []).append(entry)
        return entry
