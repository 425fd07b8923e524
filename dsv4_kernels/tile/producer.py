"""One warp in the producer's loop, where TileLang lets in four and loads with one.

TileLang 0.1.15 specialises a pipelined kernel into a producer warpgroup and consumers. All 128 threads of
the producer wait for each free stage, and then the elected lane of its first warp starts the copies. Warps 1
to 3 arrive nowhere: nothing keeps them in step, so one of them may come to a wait when the phase after its
own has ended already. That phase has the other parity, and the warp waits until the one after it ends: at
the end of the loop, for ever. The block then never ends. Seen on an H100 (docs/gemm/fp4.md).

`narrow` lets only the loading warp enter:

    if threadIdx.x < 128:                 if threadIdx.x < 128:
        set_max_nreg(24, 0)                   set_max_nreg(24, 0)     # of a whole warpgroup
        for ko in range(n):                   if threadIdx.x < 32:
            wait(free[ko % S])                    for ko in range(n):
            if elect(128): load                       wait(free[ko % S])
                                                      if elect(128): load

It does so where the three warps have nothing to do: outside of elected lanes the loop only waits, fences
and computes what nobody else reads. A producer whose threads copy, store or arrive themselves stays as it
is, and so does one that memory accesses without a barrier of the block come after. Registers, barriers and
the order of memory accesses of the warps that stay do not change.

This library's kernels are all lowered with it (`wgmma.corrected`). Any other kernel asks for it:

    kernel = tilelang.compile(one_warp(make_kernel(...)), ...)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tilelang import tvm
from tilelang.cuda import transform
from tvm import tirx

from dsv4_kernels.tile.trees import nodes, span_of, with_body
from dsv4_kernels.tile.wgmma import is_corrected

ATTRIBUTE = "dsv4_kernels.one_producer_warp"  # of a PrimFunc that asks for the pass
_SCOPE = "kWarpSpecializationScope"  # the compiler's mark on `if producer: ... else: ...`
_WARP_THREADS = 32
_WAITS = frozenset({"tl.mbarrier_wait_parity", "tirx.ptx_wait_barrier"})
_OWN = _WAITS | {"tl.fence_proxy_async"}  # a thread's own affair: no other thread notices that it did it
_ELECT = "tl.tl_shuffle_elect"
_BLOCK_BARRIER = "tirx.tvm_storage_sync"
_SET_REGISTERS = "tl.set_max_nreg"
# Touch no memory and no other thread: a store's wait is for the thread's own stores.
_HARMLESS = frozenset({_SET_REGISTERS, "tl.fence_proxy_async", "tl.tma_store_wait"})
# Of more than the warp that runs them.
_COLLECTIVES = frozenset({_BLOCK_BARRIER, _SET_REGISTERS, "tl.named_barrier_arrive", "tl.sync_grid"})
_stock: Callable[[], Any] = transform.AnnotateWarpGroupRegAlloc


def one_warp(prim_func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return the kernel with the request that only the loading warp enter its producer's loop.

    The request is an attribute of the PrimFunc, hence part of its text and of every cache's key. It is
    followed wherever this module has been imported, and by `dsv4-verify`.
    """
    return prim_func.with_attr(ATTRIBUTE, True)


def narrow(prim_func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Let only the loading warp enter the producer's loop, where the others have nothing to do.

    Args:
        prim_func: the device function, after barriers have been inserted and registers shared out.
    """
    body = _narrowed(prim_func.body, _Rest(), prim_func.body)
    return prim_func if body is None else prim_func.with_body(body)


def _annotate() -> Any:
    stock = _stock()

    def run(module: Any) -> Any:
        module = stock(module)
        asked = any(f.attrs and f.attrs.get(ATTRIBUTE, False) for f in module.functions.values())
        if not asked and not is_corrected():
            return module
        functions = {
            name: narrow(f) if isinstance(f, tirx.PrimFunc) else f for name, f in module.functions.items()
        }
        return tvm.IRModule(functions, attrs=module.attrs)

    return run


transform.AnnotateWarpGroupRegAlloc = _annotate


# --------------------------------------------------------------------------- where
@dataclass(frozen=True)
class _Rest:
    """What a thread may run after a statement.

    Attributes:
        after: to the end of the kernel, or of the innermost loop around it.
        before: where there is such a loop, what its next round runs before the statement.
        outer: each way to go on after that loop.
    """

    after: tuple[tirx.Stmt, ...] = ()
    before: tuple[tirx.Stmt, ...] | None = None
    outer: tuple[tuple[tirx.Stmt, ...], ...] = ((),)

    @property
    def ways(self) -> tuple[tuple[tirx.Stmt, ...], ...]:
        """Each way to go on."""
        ways = tuple((*self.after, *o) for o in self.outer)
        return ways if self.before is None else (*ways, (*self.after, *self.before))

    def of_part(self, parts: Sequence[tirx.Stmt], number: int) -> "_Rest":
        """Return the rest after one statement of a sequence that `self` is the rest of."""
        before = None if self.before is None else (*self.before, *parts[:number])
        return _Rest((*parts[number + 1 :], *self.after), before, self.outer)


def _is_ordered(way: Sequence[tirx.Stmt]) -> bool:
    """Return whether `way` accesses no memory, or only after a barrier of the block."""
    for statement in way:
        if _is_block_barrier(statement):
            return True
        if _is_access(statement):
            return False
    return True


def _is_access(stmt: tirx.Stmt) -> bool:
    """Return whether `stmt` touches memory of other threads, or the threads themselves."""
    for node in nodes(stmt):
        if isinstance(node, (tirx.BufferLoad, tirx.BufferStore)) and not _is_local(node.buffer):
            return True
        if isinstance(node, tirx.Call) and not _is_pure(node) and _op(node) not in _HARMLESS:
            return True
    return False


def _narrowed(stmt: tirx.Stmt, rest: _Rest, whole: tirx.Stmt) -> tirx.Stmt | None:
    """Return `stmt` with its producer narrowed, or None where there is none to narrow."""
    if isinstance(stmt, tirx.AttrStmt):
        inside = _specialised if stmt.attr_key == _SCOPE else _narrowed
        body = inside(stmt.body, rest, whole)
        return (
            None if body is None else tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, body, span_of(stmt))
        )
    if isinstance(stmt, tirx.SeqStmt):
        for number, part in enumerate(stmt.seq):
            body = _narrowed(part, rest.of_part(stmt.seq, number), whole)
            if body is not None:
                return _with_part(stmt, number, body)
        return None
    if isinstance(stmt, tirx.For):
        body = _narrowed(stmt.body, _Rest((), (), rest.ways), whole)
        return None if body is None else with_body(stmt, body)
    if isinstance(stmt, tirx.IfThenElse) and stmt.else_case is None:
        body = _narrowed(stmt.then_case, rest, whole)
        return None if body is None else tirx.IfThenElse(stmt.condition, body, None, span_of(stmt))
    return None


def _specialised(stmt: tirx.Stmt, rest: _Rest, whole: tirx.Stmt) -> tirx.Stmt | None:
    """Return the branches with the producer's narrowed, or None where that is not possible."""
    if isinstance(stmt, tirx.SeqStmt):
        found = [n for n, p in enumerate(stmt.seq) if isinstance(p, tirx.IfThenElse)]
        if len(found) != 1:
            return None
        body = _specialised(stmt.seq[found[0]], rest.of_part(stmt.seq, found[0]), whole)
        return None if body is None else _with_part(stmt, found[0], body)
    if not isinstance(stmt, tirx.IfThenElse) or not all(_is_ordered(w) for w in rest.ways):
        return None
    threads = _first_threads(stmt.condition, whole)
    if threads is None:
        return None
    parts = _flat(stmt.then_case)
    first = next((n for n, p in enumerate(parts) if _waits(p)), len(parts))
    common, loop = parts[:first], parts[first:]
    if not loop or not all(_is_idle(p, threads) for p in loop) or not _is_private(loop, whole):
        return None
    if rest.before is not None and any(_is_access(p) for p in common):
        return None  # in the next round, by warps that nothing has held back
    loading = tirx.IfThenElse(stmt.condition.a < _WARP_THREADS, _sequence(loop), None)
    return tirx.IfThenElse(stmt.condition, _sequence([*common, loading]), stmt.else_case, span_of(stmt))


def _first_threads(condition: tirx.PrimExpr, whole: tirx.Stmt) -> int | None:
    """Return N of `threadIdx.x < N` in a block of one dimension, or None where it says anything else."""
    if not isinstance(condition, tirx.LT) or not isinstance(condition.b, tirx.IntImm):
        return None
    extents = {}
    for node in nodes(whole):
        if isinstance(node, tirx.AttrStmt) and node.attr_key == "thread_extent":
            extents[node.node.thread_tag] = (node.node.var, node.value)
    thread = extents.get("threadIdx.x")
    if thread is None or not condition.a.same_as(thread[0]):
        return None
    others = [extents[tag][1] for tag in ("threadIdx.y", "threadIdx.z") if tag in extents]
    if any(not isinstance(e, tirx.IntImm) or e.value != 1 for e in others):
        return None
    return int(condition.b.value)


# --------------------------------------------------------------------------- what
def _is_idle(stmt: tirx.Stmt, threads: int) -> bool:
    """Return whether warps without an elected lane do nothing in `stmt` that another thread notices."""
    if isinstance(stmt, tirx.SeqStmt):
        return all(_is_idle(s, threads) for s in stmt.seq)
    if isinstance(stmt, tirx.AttrStmt):
        return stmt.attr_key != "thread_extent" and _is_value(stmt.value) and _is_idle(stmt.body, threads)
    if isinstance(stmt, tirx.For):
        return _is_value(stmt.min) and _is_value(stmt.extent) and _is_idle(stmt.body, threads)
    if isinstance(stmt, tirx.IfThenElse):
        if _is_elected(stmt.condition, threads):
            return stmt.else_case is None and not any(_op(c) in _COLLECTIVES for c in _calls(stmt.then_case))
        cases = [c for c in (stmt.then_case, stmt.else_case) if c is not None]
        return _is_value(stmt.condition) and all(_is_idle(c, threads) for c in cases)
    if isinstance(stmt, tirx.Bind):
        return _is_value(stmt.value)
    if isinstance(stmt, tirx.BufferStore):  # that nobody else reads it: `_is_private`
        return _is_local(stmt.buffer) and _is_value(stmt.value) and all(_is_value(i) for i in stmt.indices)
    if isinstance(stmt, tirx.Evaluate):
        call = stmt.value
        if isinstance(call, tirx.Call) and _op(call) in _OWN:
            return all(_is_value(a) for a in call.args)
        return _is_value(call)
    return isinstance(stmt, (tirx.DeclBuffer, tirx.AllocBuffer))


def _is_elected(condition: tirx.PrimExpr, threads: int) -> bool:
    """Return whether `condition` elects one lane of the first warp of `threads` threads.

    `tl_shuffle_elect<N>` takes lanes of the warps whose number is a multiple of N / 32: within the first N
    threads of the block, of warp 0 alone.
    """
    if not isinstance(condition, tirx.Call) or _op(condition) != _ELECT:
        return False
    extent = condition.args[0]
    return isinstance(extent, tirx.IntImm) and int(extent.value) == threads


def _is_value(expr: tirx.PrimExpr) -> bool:
    """Return whether `expr` only reads."""
    return all(_is_pure(c) and _op(c) != _ELECT for c in _calls(expr))


def _is_private(loop: Sequence[tirx.Stmt], whole: tirx.Stmt) -> bool:
    """Return whether no other statement reads the registers that `loop` stores to."""
    stored = [n.buffer.data for s in loop for n in nodes(s, tirx.BufferStore)]
    if not stored:
        return True
    inside = _reads(loop)
    return all(_count(inside, d) == _count(_reads([whole]), d) for d in stored)


def _reads(statements: Sequence[tirx.Stmt]) -> list[tirx.Var]:
    """Return the storage that is read or whose address is taken, once for each time."""
    found = []
    for node in (n for s in statements for n in nodes(s)):
        if isinstance(node, tirx.BufferLoad):
            found.append(node.buffer.data)
        elif isinstance(node, tirx.Call):
            found += [a for a in node.args if isinstance(a, tirx.Var)]
    return found


def _count(found: Sequence[tirx.Var], data: tirx.Var) -> int:
    return sum(data.same_as(f) for f in found)


def _waits(stmt: tirx.Stmt) -> bool:
    return any(_op(c) in _WAITS for c in _calls(stmt))


def _is_block_barrier(stmt: tirx.Stmt) -> bool:
    if not isinstance(stmt, tirx.Evaluate) or not isinstance(stmt.value, tirx.Call):
        return False
    return _op(stmt.value) == _BLOCK_BARRIER and len(stmt.value.args) == 1


def _is_pure(call: tirx.Call) -> bool:
    effect = call.op.get_attr("TCallEffectKind") if isinstance(call.op, tvm.ir.Op) else None
    return effect is not None and int(effect) <= tirx.CallEffectKind.ReadState.value


def _is_local(buffer: tirx.Buffer) -> bool:
    return buffer.scope().startswith("local")


# --------------------------------------------------------------------------- trees
def _flat(stmt: tirx.Stmt) -> list[tirx.Stmt]:
    return [part for s in stmt.seq for part in _flat(s)] if isinstance(stmt, tirx.SeqStmt) else [stmt]


def _sequence(parts: Sequence[tirx.Stmt]) -> tirx.Stmt:
    return parts[0] if len(parts) == 1 else tirx.SeqStmt(list(parts))


def _with_part(stmt: tirx.SeqStmt, number: int, part: tirx.Stmt) -> tirx.Stmt:
    return tirx.SeqStmt([*stmt.seq[:number], part, *stmt.seq[number + 1 :]], span_of(stmt))


def _calls(tree: Any) -> list[tirx.Call]:
    return nodes(tree, tirx.Call)


def _op(call: tirx.Call) -> str:
    return str(getattr(call.op, "name", ""))
