"""What a Z3 term speaks of, found once for each term.

A proof asks for the symbols of the same hypotheses hundreds of times. Each term is walked once, by its
address in z3's memory: equal terms have one address there, and a summary keeps its term alive, so that an
address stays what it was. `forget` lets go of all terms; each kernel begins with that.
"""

from collections.abc import Iterable, Sequence
from ctypes import c_uint, c_void_p
from dataclasses import dataclass
from functools import cached_property

import z3
from z3 import z3core

from verify import terms
from verify.terms import expression, function

terms.use()


@dataclass(frozen=True, slots=True)
class Node:
    """One part of a term.

    Attributes:
        kind: of its operator, as z3 numbers them; `NUMERAL` of a number.
        operands: positions of its operands among the parts of the term.
        value: the number, or the name of an uninterpreted symbol.
    """

    kind: int
    operands: tuple[int, ...]
    value: int | str | None = None


@dataclass(eq=False)
class Summary:
    """One term.

    Attributes:
        term: the term.
        applications: its distinct applications of uninterpreted symbols, constants among them, with the
            symbol's name; in the order of a walk that takes the last operand first.
        linear: no product or quotient has two computed operands.
    """

    term: z3.ExprRef
    applications: tuple[tuple[str, z3.ExprRef], ...]
    linear: bool

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of the symbols."""
        return frozenset(name for name, _ in self.applications)

    @cached_property
    def text(self) -> str:
        """The term as SMT-LIB."""
        return self.term.sexpr()

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Its distinct parts, operands first, the term itself last."""
        return _parts(self.term)


# z3's Python interface makes an object of each operand and asks after each call whether it failed, which
# costs ten times the walk itself. None of these can fail on a term.
_ast_kind = function(z3core.Z3_get_ast_kind, c_uint, c_void_p, c_void_p)
_app_decl = function(z3core.Z3_get_app_decl, c_void_p, c_void_p, c_void_p)
_decl_kind = function(z3core.Z3_get_decl_kind, c_uint, c_void_p, c_void_p)
_num_args = function(z3core.Z3_get_app_num_args, c_uint, c_void_p, c_void_p)
_arg = function(z3core.Z3_get_app_arg, c_void_p, c_void_p, c_void_p, c_uint)

NUMERAL = z3.Z3_OP_ANUM
_PRODUCTS = (z3.Z3_OP_MUL, z3.Z3_OP_IDIV, z3.Z3_OP_MOD)

_summaries: dict[int, Summary] = {}
_simplified: dict[int, tuple[z3.ExprRef, z3.ExprRef]] = {}  # by the address of the first


def forget() -> None:
    """Let go of all terms."""
    _summaries.clear()
    _simplified.clear()


def simplified(term: z3.ExprRef) -> z3.ExprRef:
    """Return what `z3.simplify` makes of `term`, found once for each term."""
    address = term.as_ast().value
    found = _simplified.get(address)
    if found is None:
        found = _simplified[address] = (term, z3.simplify(term))
    return found[1]


def summary(term: z3.ExprRef) -> Summary:
    """Return what `term` speaks of."""
    address = term.as_ast().value
    found = _summaries.get(address)
    if found is None:
        found = _summaries[address] = _walk(term)
    return found


def names_of(terms: Iterable[z3.ExprRef]) -> frozenset[str]:
    """Return the names of the symbols in any of `terms`."""
    return frozenset[str]().union(*(summary(t).names for t in terms))


def put(term: z3.ExprRef, pairs: Sequence[tuple[z3.ExprRef, z3.ExprRef]]) -> z3.ExprRef:
    """Return `term` with constants replaced, all at once: those among `pairs` that it speaks of."""
    names = summary(term).names
    taken = [(old, new) for old, new in pairs if name_of(old) in names]
    return z3.substitute(term, *taken) if taken else term


def name_of(constant: z3.ExprRef) -> str:
    """Return the name of a constant."""
    return summary(constant).applications[0][0]


def text_of(term: z3.ExprRef) -> str:
    """Return `term` as SMT-LIB."""
    return summary(term).text


def _walk(term: z3.ExprRef) -> Summary:
    context, top = term.ctx_ref().value, term.as_ast().value
    applications: list[tuple[str, z3.ExprRef]] = []
    linear = True
    seen: set[int] = set()
    stack = [top]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        form = _ast_kind(context, node)
        if form == z3.Z3_NUMERAL_AST:
            continue
        if form != z3.Z3_APP_AST:
            raise TypeError(f"a term with bound variables: {term.sexpr()}")
        kind = _decl_kind(context, _app_decl(context, node))
        operands = [_arg(context, node, n) for n in range(_num_args(context, node))]
        if kind == z3.Z3_OP_UNINTERPRETED:
            application = _expression(node, term.ctx)
            applications.append((application.decl().name(), application))
        elif kind in _PRODUCTS and linear:
            free = operands if kind == z3.Z3_OP_MUL else operands[1:]
            computed = sum(not _is_literal(context, n) for n in free)
            linear = computed <= (1 if kind == z3.Z3_OP_MUL else 0)
        stack.extend(operands)
    return Summary(term, tuple(applications), linear)


def _parts(term: z3.ExprRef) -> tuple[Node, ...]:
    context, top = term.ctx_ref().value, term.as_ast().value
    places: dict[int, int] = {}
    nodes: list[Node] = []
    stack = [(top, False)]
    while stack:
        node, ready = stack.pop()
        if node in places:
            continue
        if _ast_kind(context, node) == z3.Z3_NUMERAL_AST:
            number = _expression(node, term.ctx)
            places[node] = len(nodes)
            nodes.append(Node(NUMERAL, (), number.as_long() if z3.is_int_value(number) else None))
            continue
        operands = [_arg(context, node, n) for n in range(_num_args(context, node))]
        if not ready:
            stack.append((node, True))
            stack.extend((operand, False) for operand in operands)
            continue
        kind = _decl_kind(context, _app_decl(context, node))
        name = _expression(node, term.ctx).decl().name() if kind == z3.Z3_OP_UNINTERPRETED else None
        places[node] = len(nodes)
        nodes.append(Node(kind, tuple(places[operand] for operand in operands), name))
    return tuple(nodes)


def _is_literal(context: int, node: int) -> bool:
    """Return whether a term is a number as it stands: of `1 + 2` the linear logics allow no product."""
    while _ast_kind(context, node) == z3.Z3_APP_AST:
        if _decl_kind(context, _app_decl(context, node)) != z3.Z3_OP_UMINUS:
            return False
        node = _arg(context, node, 0)
    return _ast_kind(context, node) == z3.Z3_NUMERAL_AST


def _expression(node: int, owner: z3.Context) -> z3.ExprRef:
    pointer = z3.Ast(node)
    pointer.value = node
    return expression(pointer, owner)
