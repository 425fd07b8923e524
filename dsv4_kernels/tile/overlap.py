"""Tiles of one block, one after the other, without a barrier of the block before each.

TileLang 0.1.15 puts a barrier of all threads at the head of a loop whose body holds a specialised pipeline:
the producer then waits for the consumers to store a tile before it loads the next. The ring of stages orders
both without it: its phases are counted over all tiles. `overlapped` asks that these barriers be left out;
whether every access is still ordered is what `race` and `mbarrier` prove of the text that is compiled.

    kernel = overlapped(make_kernel(...))
"""

from typing import Any

from tilelang import tvm
from tilelang.cuda import transform
from tvm import tirx

from dsv4_kernels.tile.trees import nodes, with_body

# Of a thread, of 128 producers and 256 consumers. Kernels ask for them: the compiler hands out none by itself
# where the producer counts rounds.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
ATTRIBUTE = "dsv4_kernels.tiles_overlap"  # of a PrimFunc
_BLOCK_BARRIER = "tirx.tvm_storage_sync"
_WAITS = frozenset({"tl.mbarrier_wait_parity", "tirx.ptx_wait_barrier"})
_stock: Any = transform.AnnotateWarpGroupRegAlloc


def overlapped(prim_func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return the kernel with the request that its tiles follow each other without a barrier of the block."""
    return prim_func.with_attr(ATTRIBUTE, True)


def without_barriers(prim_func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Drop the barrier at the head of each serial loop around a loop that waits for an mbarrier."""
    return prim_func.with_body(tirx.stmt_functor.ir_transform(prim_func.body, None, _drop, ["tirx.For"]))


def _drop(loop: tirx.For) -> tirx.Stmt | None:
    if loop.kind != tirx.ForKind.SERIAL or not _has_inner_wait(loop.body):
        return None
    headless = tirx.stmt_functor.ir_transform(loop.body, None, _without_head, ["tirx.SeqStmt"])
    return with_body(loop, _counted(headless, loop))


def _counted(body: tirx.Stmt, tiles: tirx.For) -> tirx.Stmt:
    """Say the rounds of a ring, which the compiler counts, by the counters of the two loops.

    A count of rounds is zero before the first tile, and goes up by one at the end of each round: in round ko
    of tile t it is t * rounds + ko. So said, the stage is a constant where the loop is unrolled.
    """

    def of_loop(loop: tirx.For) -> tirx.Stmt | None:
        counts = [
            node.buffer.data
            for node in nodes(loop.body, tirx.BufferStore)
            if "phase_cnt" in node.buffer.name and "phase_cnt" in str(node.value)
        ]
        if len(counts) != 1 or not isinstance(loop.extent, tirx.IntImm):
            return None
        said = tiles.loop_var * loop.extent + loop.loop_var

        def say(node: Any) -> Any:
            if isinstance(node, tirx.BufferLoad) and node.buffer.data.same_as(counts[0]):
                return said
            if isinstance(node, tirx.BufferStore) and node.buffer.data.same_as(counts[0]):
                return tirx.Evaluate(0)
            return None

        kinds = ["tirx.BufferLoad", "tirx.BufferStore"]
        return with_body(loop, tirx.stmt_functor.ir_transform(loop.body, None, say, kinds))

    return tirx.stmt_functor.ir_transform(body, None, of_loop, ["tirx.For"])


def _without_head(block: tirx.SeqStmt) -> tirx.Stmt | None:
    """Drop a barrier that comes before everything else of the tile."""
    head, *rest = block.seq
    if not _is_barrier(head) or not any(isinstance(stmt, tirx.IfThenElse) for stmt in rest):
        return None
    return tirx.SeqStmt(rest) if len(rest) > 1 else rest[0]


def _is_barrier(stmt: tirx.Stmt) -> bool:
    return (
        isinstance(stmt, tirx.Evaluate)
        and isinstance(stmt.value, tirx.Call)
        and str(getattr(stmt.value.op, "name", "")) == _BLOCK_BARRIER
    )


def _has_inner_wait(body: tirx.Stmt) -> bool:
    calls = [call for loop in nodes(body, tirx.For) for call in nodes(loop.body, tirx.Call)]
    return any(str(getattr(call.op, "name", "")) in _WAITS for call in calls)


def _annotate() -> Any:
    stock = _stock()

    def run(module: Any) -> Any:
        module = stock(module)
        if not any(f.attrs and ATTRIBUTE in f.attrs for f in module.functions.values()):
            return module
        functions = {
            name: without_barriers(f) if isinstance(f, tirx.PrimFunc) else f
            for name, f in module.functions.items()
        }
        return tvm.IRModule(functions, attrs=module.attrs)

    return run


transform.AnnotateWarpGroupRegAlloc = _annotate
