"""What the compiler moves: a condition that it keeps at the last store alone, and choices in coordinates.

A loop of one round at the most may become no loop: the compiler computes in storage of a thread's own, with 0
for what it does not read, and keeps the loop's condition at the last store alone. Where that storage is named
nowhere else, nothing is lost if all of it stands under the condition again.

In a copy's coordinates `a if x == c else b`, of numbers a, b, c, is `b + (a - b) * max(0, 1 - |x - c|)`:
index arithmetic that refinement knows. That both are one is claimed, for every x.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import z3

from megamoe.refine_index import number, one_round, op
from megamoe.refine_words import mapped
from verify import ir
from verify.refine.inline import same, written
from verify.solve import Obligation


# --------------------------------------------------------------------------- choices
def chosen_number(expr: ir.Expr) -> ir.Expr | None:
    """Return a choice between numbers on `x == number` as arithmetic without a choice; None for others."""
    match expr:
        case ir.Select(
            cond=ir.BinOp(op="eq", a=x, b=ir.Const(value=wanted)),
            a=ir.Const(value=yes),
            b=ir.Const(value=no),
        ) if expr.dtype == ir.INT32 and x.dtype == ir.INT32:
            c = number(int(wanted))
            apart = op("max", op("sub", x, c), op("sub", c, x))
            is_wanted = op("max", number(0), op("sub", number(1), apart))
            return op("add", number(int(no)), op("mul", number(int(yes) - int(no)), is_wanted))
    return None


def choice_is_kept(choice: ir.Expr, found: ir.Expr, span: ir.Span | None) -> Obligation:
    """Return the claim that `found` is the `choice` that it has been put for, whatever is compared."""
    assert isinstance(choice, ir.Select), "of chosen_number"
    assert isinstance(choice.cond, ir.BinOp), "of chosen_number"
    read = choice.cond.a
    goal = _meaning(choice, read) == _meaning(found, read)
    return Obligation("a choice between numbers as arithmetic", span, (), goal)


def _meaning(expr: ir.Expr, read: ir.Expr) -> z3.ArithRef:
    if expr is read:
        return z3.Int("compared")
    match expr:
        case ir.Const(value=value):
            return z3.IntVal(int(value))
        case ir.Select(cond=ir.BinOp(op="eq", a=x, b=y), a=a, b=b):
            return z3.If(_meaning(x, read) == _meaning(y, read), _meaning(a, read), _meaning(b, read))
        case ir.BinOp(op=name, a=a, b=b):
            x, y = _meaning(a, read), _meaning(b, read)
            match name:
                case "add":
                    return x + y
                case "sub":
                    return x - y
                case "mul":
                    return x * y
                case "max":
                    return z3.If(x > y, x, y)
    raise AssertionError("chosen_number makes no other arithmetic")


# --------------------------------------------------------------------------- a condition at the last store
def once(tile: ir.Function) -> set[int]:
    """Return the lines of stores in the tile program's loops of one round at the most."""
    launches = [n for n in ir.walk(tile.body) if isinstance(n, ir.Launch)]
    ranges = {n.var: (0, int(n.extent.value)) for n in launches if isinstance(n.extent, ir.Const)}
    found: set[int] = set()
    for loop in ir.walk(tile.body):
        if isinstance(loop, ir.For) and not isinstance(loop.extent, ir.Const) and one_round(loop, ranges):
            found |= {n.span.line for n in ir.walk(loop.body) if hasattr(n, "span") and n.span}
    return found


def under_condition(device: ir.Function, private: frozenset[str], lines: set[int]) -> ir.Function:
    """Return a device program whose stores on some lines stand under the condition of what uses them.

    Storage of a thread's own that is named nowhere else, and written by statements that do nothing else, is
    used for nothing where the condition fails; nor can the condition change, being one of launch variables.

    Args:
        device: the program.
        private: names of what each thread has of its own.
        lines: those of loops that have one round at the most.
    """
    if not lines:
        return device
    launched = {n.var for n in ir.walk(device.body) if isinstance(n, ir.Launch)}
    allocs = [n.buffer for n in ir.walk(device.body) if isinstance(n, ir.Alloc)]
    private |= {b.data.name for b in allocs if b.scope == "local"}  # the compiler's temporaries too
    return replace(device, body=_Held(device, private, lines, launched).visit(device.body))


class _Held:
    def __init__(
        self, device: ir.Function, private: frozenset[str], lines: set[int], launched: set[ir.Var]
    ) -> None:
        self.private, self.lines, self.launched = private, lines, launched
        self.uses = _uses(device.body)

    def visit(self, stmt: ir.Stmt) -> ir.Stmt:
        match stmt:
            case ir.Seq():
                stmts = list(_flat(stmt))
                return ir.Seq(stmt.span, tuple(self.runs(list(map(self.visit, stmts)))))
            case ir.If(then=then, orelse=orelse):
                other = None if orelse is None else self.visit(orelse)
                return replace(stmt, then=self.visit(then), orelse=other)
            case ir.For() | ir.While() | ir.Launch() | ir.Assume() | ir.Attr() | ir.Block():
                return replace(stmt, body=self.visit(stmt.body))
        return stmt

    def runs(self, stmts: list[ir.Stmt]) -> Iterator[ir.Stmt]:
        for last in reversed(range(len(stmts))):
            for cond in self.conditions(stmts[last]):
                first = last + 1
                while first and self.is_quiet(stmts[first - 1], cond):
                    first -= 1
                run = ir.Seq(None, tuple(stmts[first : last + 1]))
                if len(run.stmts) > 1 and self.is_own(run):
                    yield from stmts[:first]
                    yield ir.If(None, cond, _given(run, cond), None)
                    yield from stmts[last + 1 :]
                    return
        yield from stmts

    def conditions(self, stmt: ir.Stmt) -> list[ir.Expr]:
        """Return conditions on launch variables alone, around stores to tensors."""
        found = [n for n in ir.walk(stmt) if isinstance(n, ir.If) and n.orelse is None]
        return [
            n.cond
            for n in found
            if not any(isinstance(e, (ir.Load, ir.Call)) for e in ir.walk(n.cond))
            and {e for e in ir.walk(n.cond) if isinstance(e, ir.Var)} <= self.launched
            and not {data.name for data in written(n.then)} <= self.private
        ]

    def is_quiet(self, stmt: ir.Stmt, cond: ir.Expr) -> bool:
        """Return whether a statement writes nothing but a thread's own where `cond` fails, on these lines."""
        match stmt:
            case ir.If(orelse=None) if same(stmt.cond, cond):
                return True
            case ir.Store(buffer=buffer, span=span):
                return buffer.data.name in self.private and span is not None and span.line in self.lines
            case ir.Seq(stmts=stmts):
                return all(self.is_quiet(s, cond) for s in stmts)
            case ir.For() | ir.Attr():
                return self.is_quiet(stmt.body, cond)
            case ir.Alloc() | ir.Decl():
                return True
        return False

    def is_own(self, run: ir.Stmt) -> bool:
        """Return whether what a run writes of a thread's own is named nowhere else."""
        here = _uses(run)
        own = {data for data in written(run) if data.name in self.private}
        return bool(own) and all(here[data] == self.uses[data] for data in own)


def _given(stmt: ir.Stmt, cond: ir.Expr) -> ir.Stmt:
    """Return a statement as it is where `cond` holds."""

    def chosen(e: ir.Expr) -> ir.Expr | None:
        return mapped(e.a, chosen) if isinstance(e, ir.Select) and same(e.cond, cond) else None

    match stmt:
        case ir.Seq(stmts=stmts):
            return replace(stmt, stmts=tuple(_given(s, cond) for s in stmts))
        case ir.If(then=then) if same(stmt.cond, cond):
            return _given(then, cond)
        case ir.For() | ir.Attr():
            return replace(stmt, body=_given(stmt.body, cond))
        case ir.Store(indices=indices, value=value):
            return replace(
                stmt, indices=tuple(mapped(i, chosen) for i in indices), value=mapped(value, chosen)
            )
    return stmt


def _flat(stmt: ir.Stmt) -> Iterator[ir.Stmt]:
    if isinstance(stmt, ir.Seq):
        for inner in stmt.stmts:
            yield from _flat(inner)
    else:
        yield stmt


def _uses(stmt: ir.Stmt) -> Mapping[ir.Var, int]:
    """Return how often each storage is read, written or pointed to."""
    found: dict[ir.Var, int] = {}
    for node in ir.walk(stmt):
        match node:
            case ir.Load(buffer=buffer) | ir.Store(buffer=buffer) | ir.Region(buffer=buffer):
                found[buffer.data] = found.get(buffer.data, 0) + 1
            case ir.AccessPtr(data=data):
                found[data] = found.get(data, 0) + 1
            case ir.Var(dtype=ir.DType(name="handle")):
                found[node] = found.get(node, 0) + 1
    return found
