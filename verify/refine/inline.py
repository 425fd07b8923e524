"""Names and compiler temporaries replaced by the values they stand for, in program order."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.evaluate import Evaluator
from verify.refine.sym import Algebra


def rewrite(expr: ir.Expr, visit: Callable[[ir.Expr], ir.Expr | None]) -> ir.Expr:
    """Return `expr` with each node replaced by what `visit` returns, or kept where it returns None."""
    found = visit(expr)
    if found is not None:
        return found
    match expr:
        case ir.BinOp(a=a, b=b):
            return replace(expr, a=rewrite(a, visit), b=rewrite(b, visit))
        case ir.Not(a=a) | ir.Cast(a=a):
            return replace(expr, a=rewrite(a, visit))
        case ir.Select(cond=cond, a=a, b=b):
            return replace(expr, cond=rewrite(cond, visit), a=rewrite(a, visit), b=rewrite(b, visit))
        case ir.Load(indices=indices):
            return replace(expr, indices=tuple(rewrite(i, visit) for i in indices))
        case ir.Ramp(base=base, stride=stride):
            return replace(expr, base=rewrite(base, visit), stride=rewrite(stride, visit))
        case ir.Broadcast(value=value):
            return replace(expr, value=rewrite(value, visit))
        case ir.Call(args=args):
            return replace(expr, args=tuple(rewrite(a, visit) for a in args))
        case ir.AccessPtr(offset=offset, extent=extent):
            return replace(expr, offset=rewrite(offset, visit), extent=rewrite(extent, visit))
        case ir.Let(var=var, value=value, body=body):
            value = rewrite(value, visit)
            return rewrite(body, lambda e: value if e is var else visit(e))
        case ir.Const() | ir.Str() | ir.Var() | ir.Region():
            return expr
    raise UnsupportedIR(f"expression {type(expr).__name__}")


def same(a: Any, b: Any) -> bool:
    """Return whether two expressions are the same text over the same variables."""
    if type(a) is not type(b):
        return False
    if isinstance(a, ir.Var):
        return a is b
    if isinstance(a, (ir.Const, ir.Str)):
        return a.value == b.value and a.dtype == b.dtype
    if isinstance(a, (ir.BinOp, ir.Call)) and a.op != b.op:
        return False
    if isinstance(a, ir.Load) and a.buffer is not b.buffer:
        return False
    if isinstance(a, ir.Expr) and a.dtype != b.dtype:
        return False
    left, right = list(ir.children(a)), list(ir.children(b))
    return len(left) == len(right) and all(same(x, y) for x, y in zip(left, right, strict=True))


def loads(expr: ir.Expr) -> Iterator[ir.Load]:
    """Yield every read of a buffer in `expr`."""
    return (e for e in ir.walk(expr) if isinstance(e, ir.Load))


def written(stmt: ir.Stmt) -> set[ir.Var]:
    """Return the storages that `stmt` may write: by a store, or through a pointer given to a call."""
    found: set[ir.Var] = set()
    for node in ir.walk(stmt):
        if isinstance(node, ir.Store):
            found.add(node.buffer.data)
        elif isinstance(node, ir.Eval):
            for inner in ir.walk(node.value):
                if isinstance(inner, ir.AccessPtr) and inner.mode != "r":
                    found.add(inner.data)
                elif isinstance(inner, ir.Region) and inner.mode != "r":
                    found.add(inner.buffer.data)
                elif isinstance(inner, ir.Var) and inner.dtype.name == "handle":
                    found.add(inner)
                elif isinstance(inner, ir.Call) and inner.op == "address_of":
                    found |= {load.buffer.data for load in loads(inner)}
    return found


def check_condition(cond: ir.Expr, arms: Sequence[ir.Stmt | None]) -> None:
    """Check that `cond` still says what it said wherever something is done in one of its `arms`.

    It is compared as what it says there: by then it must not read other contents than when it was asked.

    Raises:
        UnsupportedIR: a statement under it changes what it reads, and others come after that.
    """
    read = {load.buffer.data for load in loads(cond)}
    if read and any(arm is not None and _goes_on_after(arm, read)[1] for arm in arms):
        raise UnsupportedIR("statements under a condition, of which one changes what it reads")


def _goes_on_after(stmt: ir.Stmt, read: set[ir.Var], changed: bool = False) -> tuple[bool, bool]:
    """Return whether `read` is changed once `stmt` is through, and whether anything is done after that."""
    match stmt:
        case ir.Store() | ir.Eval():
            return changed or bool(written(stmt) & read), changed
        case ir.For() | ir.While() if not changed and written(stmt) & read:
            return True, True  # the next round comes after it
    before, goes_on = changed, False
    for child in (c for c in ir.children(stmt) if isinstance(c, ir.Stmt)):
        # Of the arms of a condition only one is executed.
        found, more = _goes_on_after(child, read, before if isinstance(stmt, ir.If) else changed)
        changed, goes_on = changed or found, goes_on or more
    return changed, goes_on


@dataclass
class Inliner:
    """What each pure name and each element of a temporary stands for at this place of the program."""

    names: dict[ir.Var, ir.Expr] = field(default_factory=dict)
    temporaries: set[ir.Var] = field(default_factory=set)
    contents: dict[ir.Var, list[tuple[tuple[ir.Expr, ...], ir.Expr]]] = field(default_factory=dict)
    ranges: dict[ir.Var, tuple[int, int]] = field(default_factory=dict)

    def range(self, var: ir.Var, start: ir.Expr, extent: ir.Expr) -> None:
        """Note the values of a loop counter, if they are constant."""
        if isinstance(start, ir.Const) and isinstance(extent, ir.Const) and extent.value > 0:
            self.ranges[var] = (int(start.value), int(start.value + extent.value) - 1)

    def copy(self) -> "Inliner":
        """Return a copy for an inner scope."""
        contents = {data: list(entries) for data, entries in self.contents.items()}
        return Inliner(dict(self.names), set(self.temporaries), contents, dict(self.ranges))

    def __call__(self, expr: ir.Expr) -> ir.Expr:
        """Return `expr` without names and temporaries.

        Raises:
            UnsupportedIR: a temporary is read whose contents are not known at this place.
        """
        return rewrite(expr, self._visit)

    def _visit(self, expr: ir.Expr) -> ir.Expr | None:
        if isinstance(expr, ir.Var):
            return self.names.get(expr)
        if isinstance(expr, ir.Load) and expr.buffer.data in self.temporaries:
            indices = tuple(self(i) for i in expr.indices)
            for stored, value in self.contents.get(expr.buffer.data, []):
                if all(same(a, b) for a, b in zip(stored, indices, strict=True)):
                    return value
                if len(stored) == 1 and isinstance(stored[0], ir.Ramp):
                    lane = self._lane(stored[0], indices[0])
                    if lane is not None:
                        return at_lane(value, lane)
            raise UnsupportedIR(f"contents of the temporary {expr.buffer.name}")
        return None

    def _lane(self, stored: ir.Ramp, index: ir.Expr) -> ir.Expr | None:
        """Return which lane of a vector store a read wants, if the read is sure to be inside it."""
        if not isinstance(stored.stride, ir.Const) or stored.stride.value != 1:
            return None
        algebra = Algebra()
        env = {var: algebra.var(f"{var.name}{n}", *ends) for n, (var, ends) in enumerate(self.ranges.items())}
        lane = algebra.var("lane", 0, index.dtype.lanes - 1)
        try:
            evaluator = Evaluator(algebra, env, lane=lane)
            low, high = (evaluator.int(index) - evaluator.int(stored.base)).bounds()
        except UnsupportedIR:
            return None
        if low is None or high is None or low < 0 or high >= stored.dtype.lanes:
            return None
        return ir.BinOp(index.dtype, "sub", index, stored.base)

    def bind(self, var: ir.Var, value: ir.Expr) -> None:
        """Let `var` stand for `value`."""
        self.names[var] = self(value)

    def store(self, buffer: ir.Buffer, indices: tuple[ir.Expr, ...], value: ir.Expr) -> None:
        """Record a write to a temporary."""
        kept = [entry for entry in self.contents.get(buffer.data, []) if _apart(entry[0], indices)]
        self.forget({buffer.data})
        self.contents[buffer.data] = [*kept, (indices, value)]

    def forget(self, storages: set[ir.Var]) -> None:
        """Drop what storages held that are written now, and everything that was computed from them."""

        def stale(expr: ir.Expr) -> bool:
            return any(load.buffer.data in storages for load in loads(expr))

        self.names = {var: value for var, value in self.names.items() if not stale(value)}
        self.contents = {
            data: [] if data in storages else [e for e in entries if not any(map(stale, (*e[0], e[1])))]
            for data, entries in self.contents.items()
        }


def at_lane(value: ir.Expr, lane: ir.Expr) -> ir.Expr:
    """Return lane number `lane` (an expression, itself a vector where several are read) of a vector."""

    def visit(expr: ir.Expr) -> ir.Expr | None:
        match expr:
            case ir.Ramp(base=base, stride=stride):
                return ir.BinOp(lane.dtype, "add", base, ir.BinOp(lane.dtype, "mul", stride, lane))
            case ir.Broadcast(value=inner):
                return inner
        return None

    return rewrite(value, visit)


def _apart(a: tuple[ir.Expr, ...], b: tuple[ir.Expr, ...]) -> bool:
    """Return whether two index tuples are different constants."""
    return any(
        isinstance(x, ir.Const) and isinstance(y, ir.Const) and x.value != y.value
        for x, y in zip(a, b, strict=True)
    )
