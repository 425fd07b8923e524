"""No integer that decides an address, a loop, a launch or a branch leaves its machine type.

All other properties reason over mathematical integers and depend on this one. Covered: every
addition, product, shift and narrowing cast below an index, pointer offset, loop bound, launch
extent, TMA coordinate, descriptor field or operand of a synchronisation; branches too, except for
arithmetic on data in them, which is encoded with its wrapping instead. Arithmetic on data outside
of these wraps by definition and is counted in a note. Buffer shapes are not computed at run time.
"""

from collections.abc import Iterator

import z3

from verify import ir, ops
from verify.encode import Hypothesis, Scope, depends_on_data
from verify.intarith import constant_of, in_range
from verify.properties import Claims, Context, Issue
from verify.solve import Obligation
from verify.text import show
from verify.walk import Site, has_access, holds_one

NAME = "overflow"
_MAY_LEAVE = ("add", "sub", "mul", "shl")
_DIVISIONS = ("floordiv", "floormod", "truncdiv", "truncmod")
_SHIFTS = ("shl", "shr")
_INT32 = ir.INT32


class Overflow:
    """Property `overflow`."""

    name = NAME
    depends: tuple[str, ...] = ()

    def claims(self, context: Context) -> Claims:
        """Return one obligation for each operation that could leave its type."""
        claims = Claims()
        covered = _Covered(context.extracted.device.body)
        uncovered = 0
        for site in context.device_sites:
            node = site.node
            try:
                if isinstance(node, (ir.BinOp, ir.Cast)) and _is_integer(node):
                    if id(node) in covered.addresses or id(node) in covered.guards:
                        guard = id(node) not in covered.addresses
                        claims.obligations += _operation(context, site, guard)
                    else:
                        uncovered += 1
                elif isinstance(node, ir.Ramp) and id(node) in covered.addresses:
                    claims.obligations.append(_last_lane(context, site, node))
                elif isinstance(node, ir.For):
                    claims.obligations.append(_loop(context, site, node))
            except ir.UnsupportedIR as error:
                claims.unsupported.append(Issue(site.span, str(error)))
        claims.obligations += _host(context)
        claims.notes.append(f"data arithmetic, wraps by definition: {uncovered} expressions")
        return claims


PROPERTY = Overflow()


def _operation(context: Context, site: Site, guard: bool) -> list[Obligation]:
    node, scope, encoder = site.node, site.scope, context.encoder
    goals: list[tuple[str, z3.BoolRef, z3.ExprRef]] = []
    if isinstance(node, ir.Cast):
        if not _narrows(node):
            return []
        value = encoder.unwrapped(node, scope)
        goals.append((f"cast to {node.dtype.name}", in_range(node.dtype, value), value))
    elif isinstance(node, ir.BinOp):
        if node.op in _MAY_LEAVE:
            value = encoder.unwrapped(node, scope)
            goals.append((f"{node.dtype.name} {node.op}", in_range(node.dtype, value), value))
        if node.op in _SHIFTS:
            amount = encoder.term(node.b, scope)
            if constant_of(amount) is None:
                goals.append(("shift amount", z3.And(amount >= 0, amount < node.dtype.bits), amount))
        if node.op in _DIVISIONS:
            divisor = encoder.term(node.b, scope)
            if not (constant_of(divisor) or 0) > 0:
                goals.append(("positive divisor", divisor > 0, divisor))
    if guard and any(depends_on_data(value) for _, _, value in goals):
        return []
    return [
        Obligation(f"{what}: {show(node)}", site.span, scope.hypotheses, goal, {"value": value}, site)
        for what, goal, value in goals
    ]


def _loop(context: Context, site: Site, loop: ir.For) -> Obligation:
    scope = site.scope
    end = context.encoder.term(loop.start, scope) + context.encoder.term(loop.extent, scope)
    what = f"{loop.var.dtype.name} loop counter {loop.var.name}"
    return Obligation(what, site.span, scope.hypotheses, in_range(loop.var.dtype, end), {"end": end}, site)


def _last_lane(context: Context, site: Site, ramp: ir.Ramp) -> Obligation:
    encoder, scope = context.encoder, site.scope
    last = encoder.term(ramp.base, scope) + encoder.term(ramp.stride, scope) * (ramp.dtype.lanes - 1)
    goal = in_range(ramp.dtype, last)
    return Obligation(f"last lane of {show(ramp)}", site.span, scope.hypotheses, goal, {"value": last}, site)


def _host(context: Context) -> list[Obligation]:
    """Return that shapes fit the parameters that carry them, and that launch arithmetic fits."""
    host, encoder = context.host, context.encoder
    clauses = tuple(h for h in context.hypotheses if h.kind == "contract")
    found = []
    for param, dim in host.dims.items():
        term = encoder.dim(dim.name)
        size = Hypothesis(f"{dim.name} is a tensor's extent", "shape", term >= 0)
        what = f"the contract keeps {dim.name} within {param.dtype.name}, to which the host casts it"
        goal = in_range(param.dtype, term)
        found.append(Obligation(what, None, (*clauses, size), goal, {"value": term}))
    expressions = [*host.extents.values()]
    for descriptor in host.descriptors.values():
        expressions += [*descriptor.dims, *descriptor.strides]
    scope = Scope().assuming(*context.hypotheses)
    for expression in expressions:
        for node in ir.walk(expression):
            if isinstance(node, (ir.BinOp, ir.Cast)) and _is_integer(node):
                found += _operation(context, Site(node, scope, None, ir.Eval(None, node), ()), False)
    for tag, extent in host.extents.items():
        value = encoder.term(extent, scope)
        what = f"launch extent {tag} in int32"
        found.append(Obligation(what, None, scope.hypotheses, in_range(_INT32, value), {"value": value}))
    return found


def _is_integer(node: ir.BinOp | ir.Cast) -> bool:
    operand = node.a
    return node.dtype.is_int and operand.dtype.is_int and node.dtype.name != "bool"


def _narrows(cast: ir.Cast) -> bool:
    (low, high), (source_low, source_high) = cast.dtype.int_range, cast.a.dtype.int_range
    return source_low < low or source_high > high


class _Covered:
    """The expression nodes, by identity, that decide addresses (`addresses`) or branches (`guards`)."""

    def __init__(self, body: ir.Stmt) -> None:
        self.addresses: set[int] = set()
        self.guards: set[int] = set()
        definitions: dict[ir.Var, list[ir.Expr]] = {}
        roots, conditions = [], []
        for node in ir.walk(body):
            if isinstance(node, (ir.Bind, ir.Let)):
                definitions.setdefault(node.var, []).append(node.value)
            elif isinstance(node, ir.Store) and holds_one(node.buffer):
                definitions.setdefault(node.buffer.data, []).append(node.value)
            roots += _address_roots(node)
            conditions += _guard_roots(node)
        self._close(roots, self.addresses, definitions)
        self._close(conditions, self.guards, definitions)

    def _close(self, roots: list[ir.Expr], into: set[int], definitions: dict[ir.Var, list[ir.Expr]]) -> None:
        stack, seen = list(roots), set()
        while stack:
            for node in ir.walk(stack.pop()):
                into.add(id(node))
                name = node.buffer.data if isinstance(node, ir.Load) else node
                if name in definitions and name not in seen:
                    seen.add(name)
                    stack += definitions[name]


def _address_roots(node: ir.Stmt | ir.Expr) -> Iterator[ir.Expr]:
    match node:
        case ir.For(start=start, extent=extent):
            yield from (start, extent)
        case ir.Launch(extent=extent):
            yield extent
        case ir.Load(indices=indices) | ir.Store(indices=indices):
            yield from indices
        case ir.AccessPtr(offset=offset, extent=extent):
            yield from (offset, extent)
        case ir.Call(op=op, args=args) if op.startswith("atomic"):  # what is added or stored is data
            yield from (a for a in args if isinstance(a, ir.AccessPtr) or a.dtype.name == "handle")
        case ir.Call(op=op, args=args) if op not in ops.PURE and op != "call_extern":
            yield from args


def _guard_roots(node: ir.Stmt | ir.Expr) -> Iterator[ir.Expr]:
    match node:
        case ir.If(cond=cond) | ir.While(cond=cond) | ir.Assume(cond=cond):
            yield cond
        case ir.Select(cond=cond, a=a, b=b, lazy=True) if has_access(a) or has_access(b):
            yield cond
        case ir.BinOp(op="and" | "or", a=a, b=b) if has_access(b):
            yield a
