"""The statements of the device IR that touch one storage, with their accesses."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import z3

from verify import ir
from verify.encode import Index, constants_of, elected_lane
from verify.intarith import constant_of
from verify.ir import UnsupportedIR
from verify.walk import Site

TRANSPARENT_KINDS = (ir.Attr, ir.Block, ir.Launch, ir.Assume)


@dataclass(frozen=True)
class Use:
    """One access of a storage.

    Attributes:
        start, count: in units of the storage; `count` units from `start`, read or written.
        unit_bits: size of a unit.
        reads, writes: what it does; both where old contents are combined.
        when: the read happens only where this holds (a product that clears reads nothing).
        is_bound: an upper bound of what is read: a byte outside may be one that is not read.
    """

    what: str
    site: Site
    start: z3.ArithRef
    count: int
    unit_bits: int
    reads: bool
    writes: bool
    when: z3.BoolRef | None = None
    is_bound: bool = False

    @cached_property
    def guards(self) -> list[z3.BoolRef]:
        """The conditions around it, with lane 0 of a warp as the elected one."""
        scope = self.site.scope
        return [elected_lane(h.term, scope) for h in scope.hypotheses if h.kind == "guard"]

    @cached_property
    def ends(self) -> list[z3.ExprRef]:
        """Start and extent of each loop around it."""
        return [end for index in self.site.scope.loops for end in (index.start, index.extent)]

    @cached_property
    def terms(self) -> list[z3.ExprRef]:
        """Everything that decides which units it touches, and whether it does."""
        return [self.start, *self.guards, *([self.when] if self.when is not None else []), *self.ends]


@dataclass(frozen=True)
class Leaf:
    """The accesses of one statement, reads first."""

    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Loop:
    """A loop around accesses; `index` is its counter. Only serial ones are loops of the tile program."""

    index: Index
    body: tuple["Node", ...]
    kind: str

    @property
    def uses(self) -> list[Use]:
        """All accesses in it."""
        return all_uses(self.body)


@dataclass(frozen=True)
class Fork:
    """Two arms of which a thread takes one; they run side by side."""

    arms: tuple[tuple["Node", ...], tuple["Node", ...]]


Node = Leaf | Loop | Fork


def all_uses(nodes: Sequence[Node]) -> list[Use]:
    """Return every access below `nodes`, in program order."""
    found: list[Use] = []
    for node in nodes:
        match node:
            case Leaf(uses=uses):
                found += uses
            case Loop(body=body):
                found += all_uses(body)
            case Fork(arms=arms):
                found += all_uses(arms[0]) + all_uses(arms[1])
    return found


def counters_of(nodes: Sequence[Node]) -> frozenset[str]:
    """Return the names of the counters of all loops in `nodes`."""
    found = frozenset[str]()
    for node in nodes:
        match node:
            case Loop(index=index, body=body):
                found |= {index.const.decl().name()} | counters_of(body)
            case Fork(arms=arms):
                found |= counters_of(arms[0]) | counters_of(arms[1])
    return found


def build(body: ir.Stmt, uses: Sequence[Use]) -> tuple[Node, ...]:
    """Return the part of `body` that touches a storage.

    Raises:
        UnsupportedIR: an access in a while loop, whose rounds are not followed.
    """
    by_statement: dict[int, list[Use]] = {}
    for use in uses:
        by_statement.setdefault(id(use.site.statement), []).append(use)
    return tuple(_nodes(body, by_statement))


def _nodes(stmt: ir.Stmt, uses: dict[int, list[Use]]) -> list[Node]:
    own = uses.get(id(stmt), [])
    head: list[Node] = []
    if own:
        # Of one statement all reads come before its writes.
        head.append(Leaf(tuple(sorted(own, key=lambda u: not u.reads))))
    match stmt:
        case ir.Seq(stmts=stmts):
            return head + [n for inner in stmts for n in _nodes(inner, uses)]
        case ir.Launch(body=body) | ir.Assume(body=body) | ir.Attr(body=body) | ir.Block(body=body):
            return head + _nodes(body, uses)
        case ir.For(var=var, body=body):
            inner = _nodes(body, uses)
            return head + ([Loop(_index(var, inner), tuple(inner), stmt.kind)] if inner else [])
        case ir.While(body=body):
            if _nodes(body, uses):
                raise UnsupportedIR("accesses in a while loop")
            return head
        case ir.If(then=then, orelse=orelse):
            first = _nodes(then, uses)
            second = _nodes(orelse, uses) if orelse is not None else []
            if first and second:
                return [*head, Fork((tuple(first), tuple(second)))]
            return head + first + second
    return head


def _index(var: ir.Var, inner: Sequence[Node]) -> Index:
    for use in all_uses(inner):
        for index in use.site.scope.loops:
            if index.var is var:
                return index
    raise UnsupportedIR(f"the loop over {var.name} is not in the scope of its accesses")


def period_of(uses: Sequence[Use], name: str) -> int | None:
    """Return after how many steps of counter `name` the accesses repeat; 1 where they do not use it.

    None where they do not repeat: the counter then stands outside of every remainder.
    """
    period = 1
    for term in (t for use in uses for t in use.terms):
        found = period_of_term(term, name)
        if found is None:
            return None
        period = period * found // _gcd(period, found)
    return period


def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


def period_of_term(term: z3.ExprRef, name: str) -> int | None:
    """Return a period of `term` in the constant `name`, None if none is seen."""
    if name not in constants_of(term):
        return 1
    if z3.is_app(term) and term.decl().kind() == z3.Z3_OP_MOD:
        value, modulus = term.children()
        size = constant_of(modulus)
        step = _slope(value, name)
        if size is not None and size > 0 and step is not None:
            return size // _gcd(size, step % size) if step % size else 1
    parts = term.children()
    if not parts:
        return None
    period = 1
    for part in parts:
        found = period_of_term(part, name)
        if found is None:
            return None
        period = period * found // _gcd(period, found)
    return period


def _slope(term: z3.ExprRef, name: str) -> int | None:
    """Return by how much `term` grows with each step of `name`, None if that is not constant."""
    if name not in constants_of(term):
        return 0
    parts = term.children()
    match term.decl().kind():
        case z3.Z3_OP_UNINTERPRETED if not parts:
            return 1
        case z3.Z3_OP_ADD:
            slopes = [_slope(p, name) for p in parts]
            return None if None in slopes else sum(s for s in slopes if s is not None)
        case z3.Z3_OP_SUB:
            slopes = [_slope(p, name) for p in parts]
            if None in slopes:
                return None
            first, *rest = (s for s in slopes if s is not None)
            return first - sum(rest)
        case z3.Z3_OP_MUL:
            factors = [constant_of(p) for p in parts]
            moving = [p for p, f in zip(parts, factors, strict=True) if f is None]
            if len(moving) != 1:
                return None
            slope = _slope(moving[0], name)
            for factor in (f for f in factors if f is not None):
                slope = None if slope is None else slope * factor
            return slope
    return None
