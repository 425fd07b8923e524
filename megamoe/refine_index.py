"""Index arithmetic of both levels in one form: what the compiler writes in another way, and equal."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import z3

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.inline import same
from verify.solve import Obligation

MANY = 1 << 30  # rounds: more than any loop of computed length has
_TRUTHS = ("lt", "le", "gt", "ge", "eq", "ne", "and", "or")
_SEARCH_RLIMIT = 1_000_000


def number(value: int) -> ir.Const:
    """Return a constant."""
    return ir.Const(ir.INT32, value)


def op(name: str, a: ir.Expr, b: ir.Expr) -> ir.BinOp:
    """Return `a name b`."""
    return ir.BinOp(ir.BOOL if name in _TRUTHS else a.dtype, name, a, b)


def is_zero(expr: ir.Expr) -> bool:
    """Return whether an expression is the constant 0, of any type."""
    while isinstance(expr, (ir.Cast, ir.Broadcast)):
        expr = expr.a if isinstance(expr, ir.Cast) else expr.value
    return isinstance(expr, ir.Const) and expr.value == 0


def is_guarded_read(expr: ir.Expr) -> bool:
    """Return whether an expression is a read, or a read where conditions hold and else 0."""
    while isinstance(expr, ir.Select) and is_zero(expr.b):
        expr = expr.a
    return isinstance(expr, ir.Load)


def is_choice(expr: ir.Expr) -> bool:
    """Return whether an expression chooses between two values, neither of which is that of a skipped read."""
    return isinstance(expr, ir.Select) and not (is_zero(expr.b) and is_guarded_read(expr.a))


def undivided(expr: ir.Expr) -> ir.Expr | None:
    """Return `x + k * y < k * n` for `x // k + y < n`, likewise for `n <= x // k + y`; else None."""
    match expr:
        case (
            ir.BinOp(op="lt", a=total, b=ir.Const(value=bound))
            | ir.BinOp(op="le", a=ir.Const(value=bound), b=total)
        ):
            pass
        case _:
            return None
    found = _whole(total)
    if found is None:
        return None
    factor, whole = found
    limit = number(int(bound) * factor)
    return op("lt", whole, limit) if expr.op == "lt" else op("le", limit, whole)


def divided_once(expr: ir.Expr) -> ir.Expr | None:
    """Return `(a + k * y) // (k * m)` for `(a // k + y) // m`; else None."""
    match expr:
        case ir.BinOp(op="floordiv", a=total, b=ir.Const(value=by)) if by > 0:
            whole = _whole(total)
            if whole is not None:
                factor, scaled = whole
                return op("floordiv", scaled, number(int(by) * factor))
    return None


def divided_sum(expr: ir.Expr, span: ir.Span | None) -> tuple[ir.Expr, Obligation] | None:
    """Return a sum divided by a number in the one form of all that equal it in this way; None for others.

    The sum's own quotient is taken into the division (`divided_once`), and equal parts are added up, in the
    order of their text. With it the claim that the value is kept, whatever the parts are.
    """
    whole = divided_once(expr) or expr
    match whole:
        case ir.BinOp(op="floordiv", a=total, b=ir.Const(value=by)) if by > 0 and whole.dtype == ir.INT32:
            pass
        case _:
            return None
    parts = sorted(_linear(total), key=lambda part: _text(part[0]))
    rest = sum(int(e.value) * n for e, n in parts if isinstance(e, ir.Const))
    sums: list[tuple[ir.Expr, int]] = []
    for part, count in parts:
        if isinstance(part, ir.Const):
            continue
        if sums and same(sums[-1][0], part):
            sums[-1] = part, sums[-1][1] + count
        else:
            sums.append((part, count))
    found: ir.Expr = number(rest)
    for part, count in sums:
        found = op("add", found, op("mul", part, number(count)))
    found = op("floordiv", found, number(int(by)))
    known = [part for part, _ in sums]
    goal = _sum_term(expr, known) == _sum_term(found, known)
    return found, Obligation("a sum divided by a number", span, (), goal)


def _linear(expr: ir.Expr, by: int = 1) -> Iterator[tuple[ir.Expr, int]]:
    """Yield the parts of a sum, each with how often it is in it."""
    match expr:
        case ir.BinOp(op="add" | "sub" as name, a=a, b=b):
            yield from _linear(a, by)
            yield from _linear(b, by if name == "add" else -by)
        case ir.BinOp(op="mul", a=a, b=ir.Const(value=times)):
            yield from _linear(a, by * int(times))
        case _:
            yield expr, by


def _text(expr: ir.Expr) -> str:
    """Return a text of an expression, by names: an order that both levels have."""
    match expr:
        case ir.Var(name=name):
            return name
        case ir.Const(value=value):
            return str(value)
        case ir.Load(buffer=buffer):
            head = buffer.data.name
        case ir.BinOp(op=name) | ir.Call(op=name):
            head = name
        case _:
            head = type(expr).__name__
    return f"{head}({', '.join(_text(e) for e in ir.children(expr) if isinstance(e, ir.Expr))})"


def _sum_term(expr: ir.Expr, known: list[ir.Expr]) -> z3.ArithRef:
    for at, part in enumerate(known):
        if same(part, expr):
            return z3.Int(f"part{at}")
    match expr:
        case ir.Const(value=value):
            return z3.IntVal(int(value))
        case ir.BinOp(op="add" | "sub" | "mul" as name, a=a, b=b):
            x, y = _sum_term(a, known), _sum_term(b, known)
            return {"add": x + y, "sub": x - y, "mul": x * y}[name]
        case ir.BinOp(op="floordiv", a=a, b=ir.Const(value=value)) if value > 0:
            return _sum_term(a, known) / int(value)
    raise UnsupportedIR("a sum with other parts than its form")


def _whole(total: ir.Expr) -> tuple[int, ir.Expr] | None:
    """Return k and `a + k * y` of `a // k + y`, None where nothing or more is divided."""
    terms = list(_terms(total))
    divisions = [
        at
        for at, (sign, term) in enumerate(terms)
        if sign > 0 and isinstance(term, ir.BinOp) and term.op == "floordiv"
    ]
    if len(divisions) != 1 or total.dtype != ir.INT32:
        return None
    _, division = terms.pop(divisions[0])
    assert isinstance(division, ir.BinOp), "chosen above"
    if not isinstance(division.b, ir.Const) or division.b.value <= 0:
        return None
    whole = division.a
    for sign, term in terms:
        whole = op("add" if sign > 0 else "sub", whole, op("mul", term, division.b))
    return int(division.b.value), whole


def _terms(expr: ir.Expr, sign: int = 1) -> Iterator[tuple[int, ir.Expr]]:
    if isinstance(expr, ir.BinOp) and expr.op in ("add", "sub"):
        yield from _terms(expr.a, sign)
        yield from _terms(expr.b, sign if expr.op == "add" else -sign)
    else:
        yield sign, expr


def most(extent: ir.Expr) -> int:
    """Return as many rounds as a loop of this length has at the most, by its text, else MANY."""
    match extent:
        case ir.Const(value=value):
            return int(value)
        case ir.BinOp(op="min", a=a, b=b):
            return min(most(a), most(b))
    return MANY


def one_round(loop: ir.For, ranges: Mapping[ir.Var, tuple[int, int]]) -> Obligation | None:
    """Return the claim that a loop has one round at the most; None where z3 does not prove it.

    Args:
        loop: with a length that is computed from `ranges` alone.
        ranges: first value of launch variables, and one past the last.
    """
    try:
        extent = _term(loop.extent, ranges)
    except UnsupportedIR:
        return None
    bounds = [z3.And(z3.Int(v.name) >= low, z3.Int(v.name) < high) for v, (low, high) in ranges.items()]
    solver = z3.Solver()
    solver.set("rlimit", _SEARCH_RLIMIT)
    if solver.check(*bounds, extent > 1) != z3.unsat:
        return None
    goal = z3.Implies(z3.And(*bounds), extent <= 1)
    return Obligation(f"the loop over {loop.var.name} has one round at the most", loop.span, (), goal)


def _term(expr: ir.Expr, ranges: Mapping[ir.Var, tuple[int, int]]) -> z3.ArithRef:
    match expr:
        case ir.Const(value=value):
            return z3.IntVal(int(value))
        case ir.Var() if expr in ranges:
            return z3.Int(expr.name)
        case ir.BinOp(op="add" | "sub" | "mul" as name, a=a, b=b):
            x, y = _term(a, ranges), _term(b, ranges)
            return {"add": x + y, "sub": x - y, "mul": x * y}[name]
        case ir.BinOp(op="floordiv" | "floormod" as name, a=a, b=ir.Const(value=value)) if value > 0:
            x = _term(a, ranges)
            return x / int(value) if name == "floordiv" else x % int(value)
    raise UnsupportedIR("not arithmetic of launch variables")


def one_vector(loop: ir.For) -> ir.Store | None:
    """Return the one vector store that a loop of stores of consecutive vectors is; None for others.

    The counter may be in nothing but the places of consecutive vectors.
    """
    match loop:
        case ir.For(
            start=ir.Const(value=0),
            extent=ir.Const(value=rounds),
            body=ir.Store(indices=(ir.Ramp(dtype=ir.DType(lanes=lanes)),)) as store,
        ) if lanes > 1:
            pass
        case _:
            return None

    def wide(dtype: ir.DType) -> ir.DType:
        return replace(dtype, lanes=lanes * int(rounds)) if dtype.lanes == lanes else dtype

    def first(base: ir.Expr) -> ir.Expr | None:
        """Return where the first of the vectors begins, None where they do not follow each other."""
        rest, steps = number(0), 0
        for sign, term in _terms(base):
            match term:
                case ir.BinOp(op="mul", a=by, b=ir.Const(value=step)) if by is loop.var:
                    steps += sign * int(step)
                case _ if any(e is loop.var for e in ir.walk(term)):
                    return None
                case _:
                    rest = op("add" if sign > 0 else "sub", rest, term)
        return rest if steps == lanes else None

    def visit(expr: ir.Expr) -> ir.Expr:
        match expr:
            case ir.Ramp(base=base, stride=ir.Const(value=1)) if expr.dtype.lanes == lanes:
                start = first(base)
                if start is not None:
                    return replace(expr, dtype=wide(expr.dtype), base=start)
            case ir.Broadcast(value=value) if not any(e is loop.var for e in ir.walk(value)):
                return replace(expr, dtype=wide(expr.dtype))
            case ir.Cast(a=a):
                return replace(expr, dtype=wide(expr.dtype), a=visit(a))
            case ir.BinOp(a=a, b=b):
                return replace(expr, dtype=wide(expr.dtype), a=visit(a), b=visit(b))
            case ir.Load(indices=indices):
                return replace(expr, dtype=wide(expr.dtype), indices=tuple(map(visit, indices)))
        raise UnsupportedIR("vectors that do not follow each other")

    try:
        return replace(store, indices=tuple(map(visit, store.indices)), value=visit(store.value))
    except UnsupportedIR:
        return None
