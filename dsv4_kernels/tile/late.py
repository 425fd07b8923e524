"""Stages handed back behind the last wait for products, not behind the last statement that names their tiles.

TileLang 0.1.15 hands a stage of a pipeline back behind the last statement that reads its tiles. A product
that is not waited for there (`T.wgmma_gemm`) still reads them, so all products of a stage would have to be
waited for at once: no sums could be added under a product.

    kernel = released_late(make_kernel(...))

moves what hands a stage back behind the last `T.wait_wgmma` of the same round. So it does with tiles that are
read to registers: a load that is still under way when its stage is handed back may give what the refill
brought (docs/machine_code.md), and the end of a product whose operand is made of it comes behind it.

Later is never a race; that it is late enough, and that no warp waits for ever, properties `race` and
`mbarrier` prove of the result. The request is an attribute of the PrimFunc, hence part of its text and of
every cache's key. It is followed wherever this module has been imported, and by `dsv4-verify`.
"""

from typing import Any

from tilelang import tvm
from tilelang.cuda import transform
from tvm import tirx

from dsv4_kernels.tile.trees import nodes, span_of

ATTRIBUTE = "dsv4_kernels.released_late"  # of a PrimFunc that asks for it
_WAIT, _ARRIVE = "tl.wait_wgmma", "tirx.ptx_arrive_barrier"
_stock: Any = transform.AnnotateWarpGroupRegAlloc


def released_late(prim_func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return the kernel with the request that its stages be handed back behind the last wait for products."""
    return prim_func.with_attr(ATTRIBUTE, True)


def release_late(prim_func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Move arrivals at mbarriers behind the last `T.wait_wgmma` of their sequence of statements.

    Args:
        prim_func: the device function, after barriers have been inserted.

    Raises:
        ValueError: no arrival comes before a wait, so that nothing would change.
    """
    moved = 0

    def move(sequence: tirx.SeqStmt) -> tirx.Stmt | None:
        nonlocal moved
        if not isinstance(sequence, tirx.SeqStmt):
            return None
        statements = list(sequence.seq)
        last = max((i for i, s in enumerate(statements) if _calls(s, _WAIT)), default=0)
        early = [s for s in statements[:last] if _arrives(s)]
        if not early:
            return None
        moved += len(early)
        kept = [s for s in statements[: last + 1] if not _arrives(s)]
        return tirx.SeqStmt([*kept, *early, *statements[last + 1 :]], span_of(sequence))

    body = tirx.stmt_functor.ir_transform(prim_func.body, None, move, ["tirx.SeqStmt"])
    if not moved:
        raise ValueError("no stage is handed back before a wait for products")
    return prim_func.with_body(body)


def _calls(stmt: tirx.Stmt, name: str) -> bool:
    return (
        isinstance(stmt, tirx.Evaluate) and str(getattr(getattr(stmt.value, "op", None), "name", "")) == name
    )


def _arrives(stmt: tirx.Stmt) -> bool:
    """Return whether `stmt` is an arrival at an mbarrier, or that of one thread of several."""
    if isinstance(stmt, tirx.IfThenElse) and stmt.else_case is None:
        return _arrives(stmt.then_case)
    return _calls(stmt, _ARRIVE)


def _annotate() -> Any:
    stock = _stock()

    def run(module: Any) -> Any:
        module = stock(module)
        # Host and device are two functions by now, and the host's keeps the attributes.
        if not any(f.attrs and ATTRIBUTE in f.attrs for f in module.functions.values()):
            return module
        functions = {name: _of_device(f) for name, f in module.functions.items()}
        return tvm.IRModule(functions, attrs=module.attrs)

    return run


def _of_device(function: Any) -> Any:
    """Return the function changed, or as it is where it is the host's: that waits for no product."""
    waits = isinstance(function, tirx.PrimFunc) and any(
        _calls(s, _WAIT) for s in nodes(function.body, tirx.Evaluate)
    )
    return release_late(function) if waits else function


transform.AnnotateWarpGroupRegAlloc = _annotate
