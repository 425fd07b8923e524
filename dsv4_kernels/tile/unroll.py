"""Rings of a constant depth, unrolled by nvcc: `#pragma unroll` on the loops that wait for stages.

TileLang 0.1.15 computes the stage of a ring and its parity from the loop's counter, in every round: for a
ring of four stages, masks and shifts, and from them the addresses of tiles, descriptors and mbarriers.
Unrolled as many times as the ring has stages, all of that is constant but the parity, which changes once a
turn of the ring.

    kernel = ring_unrolled(make_kernel(...), num_stages)

It stays a loop of the same statements in the same order: what nvcc makes of it is as much its own affair as
anything else that it does to a loop. The request is an attribute of the PrimFunc, hence part of its text and
of every cache's key. It is followed wherever this module has been imported, and by `dsv4-verify`.
"""

from typing import Any

from tilelang import tvm
from tilelang.cuda import transform
from tvm import tirx

ATTRIBUTE = "dsv4_kernels.ring_unrolled"  # of a PrimFunc: rounds of a turn
PRAGMA = "pragma_unroll_factor"  # by which the compiler prints `#pragma unroll N`
_WAITS = frozenset({"tl.mbarrier_wait_parity", "tirx.ptx_wait_barrier"})
_stock: Any = transform.AnnotateWarpGroupRegAlloc


def ring_unrolled(prim_func: tirx.PrimFunc, num_stages: int) -> tirx.PrimFunc:
    """Return the kernel with the request that loops which wait for stages be unrolled num_stages times."""
    return prim_func.with_attr(ATTRIBUTE, num_stages)


def unroll(prim_func: tirx.PrimFunc, factor: int) -> tirx.PrimFunc:
    """Mark the innermost serial loops that wait for an mbarrier.

    Args:
        prim_func: the device function, after barriers have been inserted.
        factor: rounds that become one.
    """
    return prim_func.with_body(
        tirx.stmt_functor.ir_transform(prim_func.body, None, _marked(factor), ["tirx.For"])
    )


def _marked(factor: int) -> Any:
    def mark(loop: tirx.For) -> tirx.Stmt | None:
        if loop.kind != tirx.ForKind.SERIAL or not _waits_itself(loop.body):
            return None
        span = getattr(loop, "span", None)
        unrolled = tirx.For(
            loop.loop_var,
            loop.min,
            loop.extent,
            tirx.ForKind.UNROLLED,
            loop.body,
            loop.thread_binding,
            loop.annotations,
            loop.step,
            span,
        )
        return tirx.AttrStmt(loop.loop_var, PRAGMA, tirx.IntImm("int32", factor), unrolled, span)

    return mark


def _waits_itself(body: tirx.Stmt) -> bool:
    """Return whether `body` waits for an mbarrier outside of marked loops."""
    waits, marked = 0, 0

    def count(node: Any) -> None:
        nonlocal waits, marked
        if isinstance(node, tirx.Call) and str(getattr(node.op, "name", "")) in _WAITS:
            waits += 1
        marked += isinstance(node, tirx.AttrStmt) and node.attr_key == PRAGMA

    tirx.stmt_functor.post_order_visit(body, count)
    return waits > 0 and not marked


def _annotate() -> Any:
    stock = _stock()

    def run(module: Any) -> Any:
        module = stock(module)
        # Host and device are two functions by now, and the host's keeps the attributes.
        asked = [
            int(f.attrs[ATTRIBUTE]) for f in module.functions.values() if f.attrs and ATTRIBUTE in f.attrs
        ]
        if not asked:
            return module
        functions = {
            name: unroll(f, asked[0]) if isinstance(f, tirx.PrimFunc) else f
            for name, f in module.functions.items()
        }
        return tvm.IRModule(functions, attrs=module.attrs)

    return run


transform.AnnotateWarpGroupRegAlloc = _annotate
