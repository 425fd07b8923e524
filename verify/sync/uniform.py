"""Which statements the threads of a group reach together, since what decides it is the same in all of them.

Threads of a group that start alike, compute alike and branch alike do the same all along: a variable is the
same in all of them if every store to it is reached by all and stores what is the same in all; so is an
element of a tensor that nobody writes, at an address that is. What a thread gets otherwise (its own number,
memory that is written, shuffles, atomics) is taken to differ.
"""

from collections.abc import Iterator

import numpy as np

from verify import ir
from verify.refine.inline import written
from verify.walk import Site

_WARP = 32
# Values in, the same value out: no lane, no other thread takes part.
_PURE = frozenset({"abs", "clz", "popcount", "bitwise_not", "likely", "large_uint_imm", "reinterpret"})
_SHUFFLE = "shfl_sync"  # mask, value, lane
_FULL_MASK = 0xFFFFFFFF
_DIVISIONS = frozenset({"floordiv", "floormod", "truncdiv", "truncmod"})
OPERATIONS = {  # on the values of all threads
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "floordiv": np.floor_divide,
    "truncdiv": np.floor_divide,  # of what is not negative
    "floormod": np.mod,
    "truncmod": np.mod,
    "min": np.minimum,
    "max": np.maximum,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.logical_and,
    "or": np.logical_or,
}


class Uniform:
    """What is the same in all threads of a group, for one division of a block's threads into groups.

    Attributes:
        differ: variables and names that may not be.
    """

    def __init__(self, body: ir.Stmt, groups: np.ndarray, readonly: set[ir.Var]) -> None:
        """Find the variables.

        Args:
            body: of the kernel, launches included.
            groups: the number of each thread's group; a thread alone in its group is like nobody else.
            readonly: tensors that nobody writes.
        """
        self.groups = groups
        self.readonly = readonly
        self.threads = {n.var for n in ir.walk(body) if isinstance(n, ir.Launch) and n.tag == "threadIdx.x"}
        warps = np.arange(len(groups)) // _WARP
        firsts = {int(g): int(warps[n]) for n, g in reversed(list(enumerate(groups)))}
        self.is_within_warps = all(firsts[int(g)] == w for g, w in zip(groups, warps, strict=True))
        self.differ: set[ir.Var] = set()
        count = -1
        while count != len(self.differ):
            count = len(self.differ)
            self._statement(body, True)

    def reaches(self, site: Site) -> bool:
        """Return whether a thread executes `site` with all of its group, at the same loop counters."""
        conditions = [c for s in site.path for c in _conditions(s)]
        if isinstance(site.statement, (ir.While, ir.For)):  # within its own condition
            conditions += _conditions(site.statement)
        for top in _expressions(site.statement):
            conditions += _around(top, site.node) or []
        return all(self.holds(c) for c in conditions)

    # ------------------------------------------------------------------ statements
    def _statement(self, node: ir.Stmt, together: bool) -> None:
        """Note what a statement makes differ; `together`: all threads of a group reach it, or none."""
        match node:
            case ir.Seq(stmts=stmts):
                for child in stmts:
                    self._statement(child, together)
            case ir.If(cond=cond, then=then, orelse=orelse):
                inner = together and self.holds(cond)
                self._statement(then, inner)
                if orelse is not None:
                    self._statement(orelse, inner)
            case ir.For(var=var, start=start, extent=extent, body=body):
                inner = together and self.holds(start) and self.holds(extent)
                if not inner:
                    self.differ.add(var)
                self._statement(body, inner)
            case ir.While(cond=cond, body=body):
                self._statement(body, together and self.holds(cond))
            case ir.Store(buffer=buffer, indices=indices, value=value):
                if not (together and self.holds(value) and all(self.holds(i) for i in indices)):
                    self.differ.add(buffer.data)
            case ir.Bind(var=var, value=value):
                if not (together and self.holds(value)):
                    self.differ.add(var)
            case ir.Launch(body=body) | ir.Attr(body=body) | ir.Assume(body=body) | ir.Block(body=body):
                self._statement(body, together)
        # What a call may write through a pointer is not followed.
        for top in _expressions(node):
            self.differ |= written(ir.Eval(None, top)) if any(_calls(top)) else set()

    # ------------------------------------------------------------------ expressions
    def holds(self, expr: ir.Expr) -> bool:
        """Return whether an expression has one value in all threads of a group that evaluate it together."""
        match expr:
            case ir.Const() | ir.Str():
                return True
            case ir.Var():
                return expr not in self.differ and expr not in self.threads
            case ir.Load(buffer=buffer, indices=indices):
                if not all(self.holds(i) for i in indices):
                    return False
                if buffer.scope.startswith("local"):
                    return buffer.data not in self.differ
                return buffer.data in self.readonly
            case ir.Let(var=var, value=value, body=body):
                if not self.holds(value):
                    self.differ.add(var)
                return self.holds(body)
            case ir.Call(op=op, args=args):
                if op == _SHUFFLE and self.is_within_warps and len(args) >= 3:
                    mask, _, lane = args[:3]
                    is_full = isinstance(mask, ir.Const) and int(mask.value) % 2**32 == _FULL_MASK
                    return is_full and self.holds(lane)
                return op in _PURE and all(self.holds(a) for a in args)
            case ir.BinOp() | ir.Not() | ir.Cast() | ir.Select() | ir.Ramp() | ir.Broadcast():
                if all(self.holds(c) for c in ir.children(expr)):
                    return True
                values = self._of_thread(expr)
                return values is not None and self._is_constant(values)
        return False

    def _is_constant(self, values: np.ndarray) -> bool:
        order = np.argsort(self.groups, kind="stable")
        groups, values = self.groups[order], values[order]
        return bool(((groups[1:] != groups[:-1]) | (values[1:] == values[:-1])).all())

    def _of_thread(self, expr: ir.Expr) -> np.ndarray | None:
        """Return the values of an integer expression over the thread's number alone; None for another."""
        count = len(self.groups)
        match expr:
            case ir.Const(value=value) if expr.dtype.is_int:
                return np.full(count, int(value))
            case ir.Var() if expr in self.threads:
                return np.arange(count)
            case ir.Not(a=a):
                found = self._of_thread(a)
                return None if found is None else (found == 0).astype(np.int64)
            case ir.BinOp(op=op, a=a, b=b):
                left, right = self._of_thread(a), self._of_thread(b)
                if left is None or right is None or op not in OPERATIONS:
                    return None
                if op in _DIVISIONS and ((left < 0).any() or (right <= 0).any()):
                    return None
                return np.asarray(OPERATIONS[op](left, right)).astype(np.int64)
        return None


def _conditions(node: ir.Stmt) -> list[ir.Expr]:
    """Return what decides whether, or how often, the body of a statement runs."""
    match node:
        case ir.If(cond=cond) | ir.While(cond=cond):
            return [cond]
        case ir.For(start=start, extent=extent):
            return [start, extent]
    return []


def _expressions(node: ir.Stmt) -> list[ir.Expr]:
    return [child for child in ir.children(node) if isinstance(child, ir.Expr)]


def _calls(expr: ir.Expr) -> Iterator[ir.Call]:
    return (n for n in ir.walk(expr) if isinstance(n, ir.Call))


def _around(expr: ir.Expr, node: object) -> list[ir.Expr] | None:
    """Return the conditions within an expression on which `node` is evaluated; None if it is not there."""
    if expr is node:
        return []
    for child in ir.children(expr):
        if isinstance(child, ir.Expr) and (found := _around(child, node)) is not None:
            if isinstance(expr, ir.Select) and child is not expr.cond:
                return [expr.cond, *found]
            if isinstance(expr, ir.BinOp) and expr.op in ("and", "or") and child is expr.b:
                return [expr.a, *found]
            return found
    return None
