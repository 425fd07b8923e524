"""A loop whose rounds hold two roles becomes a loop for each role, so that each has registers of its own.

    for c in range(n):                      if threadIdx.x >= first:
        if threadIdx.x < first:   A(c)          set_max_nreg(most); for c in range(n): B(c)
        if threadIdx.x >= first:  B(c)      else:
                                                set_max_nreg(least); for c in range(n): A(c)

A kernel is written with both roles in each round, in an order in which every wait is already over: what it
means can be read, run and proved line by line. Each thread keeps its statements and their order. What is
split is the text alone: nvcc hands out registers by role where the roles are apart.

    kernel = split_roles(make_kernel(...), first, least, most)

The request is an attribute of the PrimFunc, hence part of its text and of every cache's key. It is followed
wherever this module has been imported, and by `dsv4-verify`.
"""

from typing import Any

from tilelang import tvm
from tilelang.cuda import transform
from tvm import tirx

from dsv4_kernels.tile.trees import nodes, span_of

ATTRIBUTE = "dsv4_kernels.split_roles"  # of a PrimFunc: first thread of the second role, registers of both
SCOPE = "warp_specialize"  # beside the condition of a `T.ws`
_WAITS = frozenset({"tl.mbarrier_wait_parity", "tirx.ptx_wait_barrier"})
_WARP = 32
_LAUNCHED = (
    128  # registers of a thread that 512 threads are launched with: more is asked for, less handed back
)
_stock: Any = transform.AnnotateWarpGroupRegAlloc


def split_roles(prim_func: tirx.PrimFunc, first: int, least: int, most: int) -> tirx.PrimFunc:
    """Return the kernel with the request to split its rounds at thread `first`.

    Args:
        prim_func: the kernel, of 512 threads.
        first: first thread of the second role.
        least: registers of a thread below it.
        most: of a thread from it on.
    """
    return prim_func.with_attr(ATTRIBUTE, [first, least, most])


def split(prim_func: tirx.PrimFunc, first: int, least: int, most: int) -> tirx.PrimFunc:
    """Split the first loop that waits for mbarriers, with what has roles throughout before and behind it.

    Args:
        prim_func: the device function, after barriers have been inserted.
        first: as `split_roles`.
        least: likewise.
        most: likewise.

    Raises:
        ValueError: there is no such loop.
    """
    roles = _Roles(_thread(prim_func), first)
    done = False

    def rewrite(seq: tirx.SeqStmt) -> tirx.Stmt | None:
        nonlocal done
        stmts = _flat(seq)
        at = next((i for i, s in enumerate(stmts) if _is_rounds(s)), None)
        if done or at is None:
            return None
        done = True
        start, stop = at, at + 1
        while start > 0 and (roles.of(stmts[start - 1]) is not None or _is_name(stmts[start - 1])):
            start -= 1
        while stop < len(stmts) and (roles.of(stmts[stop]) is not None or _is_name(stmts[stop])):
            stop += 1
        arms = [
            tirx.SeqStmt([_registers(count), roles.only(stmts[start:stop], second)])
            for second, count in ((False, least), (True, most))
        ]
        return tirx.SeqStmt(
            [*stmts[:start], tirx.IfThenElse(roles.thread >= first, arms[1], arms[0]), *stmts[stop:]]
        )

    body = tirx.stmt_functor.ir_transform(prim_func.body, None, rewrite, ["tirx.SeqStmt"])
    if not done:
        raise ValueError("split_roles: requires a loop that waits for mbarriers")
    return prim_func.with_body(tirx.stmt_functor.ir_transform(body, None, _bare, ["tirx.AttrStmt"]))


class _Roles:
    """Whose a statement is."""

    def __init__(self, thread: tirx.Var, first: int) -> None:
        self.thread, self.first = thread, first
        self.analyzer = tvm.arith.Analyzer()

    def of(self, stmt: tirx.Stmt) -> bool | None:
        """Return whether only threads of the second role execute it, False: of the first, None: of both."""
        if not isinstance(stmt, tirx.IfThenElse) or stmt.else_case is not None:
            return None
        found: set[bool] = set()
        for number in range(0, 2 * self.first, _WARP):
            runs = self._runs(stmt.condition, number)
            if runs is None:
                return None
            if runs:
                found.add(number >= self.first)
        return found.pop() if len(found) == 1 else None

    def _runs(self, cond: tirx.PrimExpr, number: int) -> bool | None:
        named = tirx.stmt_functor.substitute(cond, {self.thread: tirx.IntImm("int32", number)})
        value = self.analyzer.simplify(named)
        return bool(value.value) if isinstance(value, tirx.IntImm) else None

    def only(self, stmts: list[tirx.Stmt], second: bool) -> tirx.Stmt:
        """Return what threads of one role execute of `stmts`, with counters of their own."""
        kept: list[tirx.Stmt] = []
        counters: dict[tirx.Var, tirx.Var] = {}
        for stmt in stmts:
            if _is_rounds(stmt):
                counters[stmt.loop_var] = own = tirx.Var(stmt.loop_var.name, stmt.loop_var.dtype)
                body, span = self.only(_flat(stmt.body), second), span_of(stmt)
                kept.append(
                    tirx.For(
                        own,
                        stmt.min,
                        stmt.extent,
                        stmt.kind,
                        body,
                        stmt.thread_binding,
                        stmt.annotations,
                        stmt.step,
                        span,
                    )
                )
            elif self.of(stmt) in (None, second):
                kept.append(stmt)
        body = tirx.SeqStmt(kept) if len(kept) > 1 else kept[0]
        return tirx.stmt_functor.substitute(body, counters) if counters else body


def _thread(prim_func: tirx.PrimFunc) -> tirx.Var:
    return next(a.node.var for a in nodes(prim_func.body, tirx.AttrStmt) if _is_thread(a))


def _is_thread(attr: tirx.AttrStmt) -> bool:
    return attr.attr_key == "thread_extent" and str(attr.node.thread_tag) == "threadIdx.x"


def _flat(stmt: tirx.Stmt) -> list[tirx.Stmt]:
    return [s for part in stmt.seq for s in _flat(part)] if isinstance(stmt, tirx.SeqStmt) else [stmt]


def _is_name(stmt: tirx.Stmt) -> bool:
    return isinstance(stmt, (tirx.DeclBuffer, tirx.Bind))


def _is_rounds(stmt: tirx.Stmt) -> bool:
    if not isinstance(stmt, tirx.For) or stmt.kind != tirx.ForKind.SERIAL:
        return False
    return any(str(getattr(n.op, "name", "")) in _WAITS for n in nodes(stmt.body, tirx.Call))


def _registers(count: int) -> tirx.Stmt:
    op = tirx.op.Op.get("tl.set_max_nreg")
    return tirx.Evaluate(tirx.call_intrin("handle", op, count, int(count > _LAUNCHED)))


def _bare(attr: tirx.AttrStmt) -> tirx.Stmt | None:
    return attr.body if attr.attr_key == SCOPE else None


def _annotate() -> Any:
    stock = _stock()

    def run(module: Any) -> Any:
        module = stock(module)
        # Host and device are two functions by now, and the host's keeps the attributes.
        asked = [f.attrs[ATTRIBUTE] for f in module.functions.values() if f.attrs and ATTRIBUTE in f.attrs]
        if not asked:
            return module
        given = [int(v) for v in asked[0]]
        functions = {
            name: split(f, *given)
            if isinstance(f, tirx.PrimFunc) and any(map(_is_thread, nodes(f.body, tirx.AttrStmt)))
            else f
            for name, f in module.functions.items()
        }
        return tirx.transform.ConvertSSA()(tvm.IRModule(functions, attrs=module.attrs))

    return run


transform.AnnotateWarpGroupRegAlloc = _annotate
