"""Mutants that are the same fault, told apart by their text: one of each class is checked.

Two mutants are of one class if one operator made them, for one kernel, at one line of the author's source,
and the node that it changed reads the same before and after; of numbers only which of them changed counts.
The Configs of a kernel, the stages of a ring and the rounds of an unrolled loop then share classes; what a
Config compiles differently is a class of its own.

Two Configs of one kernel are of one form if their device IR and their host's launch are the same tree of
statements: from the same lines of the author's source, of the same kind, operations and types. How often a
statement of one sequence is repeated does not count, by an unrolled loop or in the text. They differ then in
constants and in what the compiler folds an address to, and one of them is mutated: the one with the most
classes.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from verify import ir
from verify.extract import Extracted
from verify.mutate import rewrite
from verify.mutate.instances import Instance
from verify.mutate.mutant import Mutant, text
from verify.mutate.operators import OPERATORS
from verify.origin import Origins

_NUMBER = re.compile(r"\d+")
_KEY_CHARACTERS = 16


@dataclass(frozen=True)
class Listed:
    """Where a mutant is found again: the n-th of an operator and instance, and its class."""

    instance: str
    operator: str
    number: int
    key: str


@dataclass(frozen=True)
class Listing:
    """The mutants of one instance, and the form of its IR (`form_of`)."""

    form: str
    mutants: tuple[Listed, ...]


@dataclass(frozen=True)
class Class:
    """Mutants that count as one.

    Attributes:
        chosen: the one that is checked.
        members: how many there are over all instances.
    """

    chosen: Listed
    members: int


class Places:
    """The author's line of every statement of a kernel."""

    def __init__(self, extracted: Extracted) -> None:
        """Index both stages that are mutated."""
        origins = Origins(extracted.tile)
        self._spans: dict[int, ir.Span | None] = {}
        for function in (extracted.device, extracted.host):
            for statement, path in rewrite.statements(function.body):
                spans = (statement.span, *(s.span for s in reversed(path)))
                self._spans[id(statement)] = origins.of(statement, spans)

    def of(self, mutant: Mutant) -> ir.Span | None:
        """Return the line of the statement that a mutant changes."""
        return self.at(mutant.statement)

    def at(self, statement: ir.Stmt) -> ir.Span | None:
        """Return the line of a statement, if it has one."""
        return self._spans.get(id(statement))


def form_of(extracted: Extracted, places: Places) -> str:
    """Return the name of a kernel's form: the tree of its statements, by line, kind and operations.

    Statements of one sequence that are alike count once: rounds of an unrolled loop, stages of a ring.
    """

    def of(statement: ir.Stmt) -> str:
        parts = sorted({of(s) for s in _inside(statement)})
        found = f"{_line(places.at(statement))} {_kind(statement)} {_operations(statement)}: {parts}"
        return hashlib.sha256(found.encode()).hexdigest()[:_KEY_CHARACTERS]

    return of(ir.Seq(None, (extracted.device.body, extracted.host.body)))


def _inside(statement: ir.Stmt) -> Iterator[ir.Stmt]:
    """Yield the statements directly inside one; sequences and unrolled loops are what is inside of them."""
    for child in ir.children(statement):
        if isinstance(child, ir.Seq) or (isinstance(child, ir.For) and child.kind == "unrolled"):
            yield from _inside(child)
        elif isinstance(child, ir.Stmt):
            yield child


def _kind(statement: ir.Stmt) -> str:
    """Return what a statement does, without what to: an operation's name, a loop's kind, a scope."""
    match statement:
        case ir.Eval(value=ir.Call(op=op)):
            return op
        case ir.For(kind=kind):
            return f"for {kind}"
        case ir.Store(buffer=buffer) | ir.Alloc(buffer=buffer):
            return f"{type(statement).__name__} {buffer.scope}"
        case _:
            return type(statement).__name__


def _operations(statement: ir.Stmt) -> list[str]:
    """Return what a statement's expressions are made of, less the arithmetic of integers."""
    found = set()
    for node in rewrite.own_expressions(statement):
        match node:
            case ir.Call(op=op):
                found.add(op)
            case ir.Load(buffer=buffer):
                found.add(f"load {buffer.dtype.name} {buffer.scope}")
            case ir.Cast(dtype=dtype) if not dtype.is_int:
                found.add(dtype.name)
            case ir.BinOp(op=op, dtype=dtype) if not dtype.is_int:
                found.add(f"{op} {dtype.name}")
            case _:
                pass
    return sorted(found)


def by_form(listings: Mapping[str, Listing]) -> dict[str, str]:
    """Return, for each instance, the one of its kernel and form that has the most classes."""
    best: dict[tuple[str, str], str] = {}
    places = {name: (name.partition("/")[0], listing.form) for name, listing in listings.items()}
    for name in sorted(listings, key=lambda n: (-len({m.key for m in listings[n].mutants}), n)):
        best.setdefault(places[name], name)
    return {name: best[place] for name, place in places.items()}


def listing(instance: Instance, extracted: Extracted) -> Listing:
    """Return every mutant of an instance."""
    places = Places(extracted)
    every = tuple(o.name for o in OPERATORS)
    return Listing(form_of(extracted, places), tuple(_listed(instance, extracted, places, every)))


def _listed(
    instance: Instance, extracted: Extracted, places: Places, operators: Sequence[str]
) -> Iterator[Listed]:
    for operator in OPERATORS:
        if operator.name in operators:
            for number, mutant in enumerate(operator.mutants(extracted)):
                key = key_of(instance.spec.name, mutant, places.of(mutant))
                yield Listed(instance.id, operator.name, number, key)


def key_of(kernel: str, mutant: Mutant, place: ir.Span | None) -> str:
    """Return the name of a mutant's class."""
    # A literal says nothing by itself: the statement around it does.
    whole = isinstance(mutant.old, ir.Const)
    before, after = mutant.diff() if whole else (text(mutant.old), text(mutant.new))
    parts = (kernel, mutant.operator.name, _line(place), *_masked(before, after))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:_KEY_CHARACTERS]


def _line(place: ir.Span | None) -> str:
    return f"{place.path.rpartition('/')[2]}:{place.line}" if place is not None else ""


def _masked(before: str, after: str) -> tuple[str, str]:
    """Return both texts without their numbers, but for a mark at those that changed."""
    rests, numbers = zip(*((_NUMBER.split(t), _NUMBER.findall(t)) for t in (before, after)), strict=True)
    if rests[0] != rests[1]:
        return "#".join(rests[0]), "#".join(rests[1])
    marks = ["#" if a == b else "@" for a, b in zip(*numbers, strict=True)]
    return "".join(r + m for r, m in zip(rests[0], [*marks, ""], strict=True)), ""


def grouped(found: Sequence[Listed]) -> list[Class]:
    """Return the classes, those of one instance together.

    Instances are taken by how many classes they add to those taken before, so that few are lowered.
    """
    members: dict[str, int] = {}
    firsts: dict[str, dict[str, Listed]] = {}
    for item in found:
        members[item.key] = members.get(item.key, 0) + 1
        firsts.setdefault(item.instance, {}).setdefault(item.key, item)
    chosen: list[Class] = []
    open_keys = set(members)
    while open_keys:
        best = max(sorted(firsts), key=lambda name: len(open_keys & firsts[name].keys()))
        mine: Mapping[str, Listed] = firsts.pop(best)
        chosen += [Class(item, members[key]) for key, item in mine.items() if key in open_keys]
        open_keys -= mine.keys()
    return chosen
