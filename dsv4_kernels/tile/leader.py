"""Operands of wgmma by a warp number that is known to be the same in all threads of a warp.

Where warpgroups share out the rows of A, TileLang 0.1.15 computes a warpgroup's first row from `threadIdx.x`.
For the compiler that is a number of each thread's own: descriptors are kept in ordinary registers, two for
each of a loop's products, and moved to uniform ones before every instruction (docs/megamoe.md). A shuffle has
the same value in all threads of a warp, and the compiler knows it:

    desc_a + (threadIdx.x >> 7) * 8192    leader = shfl_sync(threadIdx.x, 0)    # once, all threads
                                          desc_a + ((leader & 255) >> 7) * 8192

A kernel asks for it: `uniform(prim_func)`.
"""

from collections.abc import Callable
from typing import Any

from tilelang import language as T
from tilelang import tvm
from tilelang.cuda import transform
from tvm import tirx

from dsv4_kernels.tile.trees import nodes, span_of

ATTRIBUTE = "dsv4_kernels.uniform_warpgroups"  # of a PrimFunc that asks for the pass
_PRODUCTS = frozenset({"tl.ptx_wgmma_ss", "tl.ptx_wgmma_rs"})
_stock: Callable[[], Any] = transform.InjectTcgen05Fence


def uniform(prim_func: tirx.PrimFunc, threads: int) -> tirx.PrimFunc:
    """Return the kernel with the request that its products take a warp's number from a shuffle.

    `threads`: those that multiply, the block's first ones; a power of two.

    The request is an attribute of the PrimFunc, hence part of its text and of every cache's key. It is
    followed wherever this module has been imported, and by `dsv4-verify`.
    """
    return prim_func.with_attr(ATTRIBUTE, threads)


def by_leader(prim_func: tirx.PrimFunc, threads: int) -> tirx.PrimFunc:
    """Take the thread in operands of products from a shuffle at the beginning of the kernel.

    Args:
        prim_func: the device function, of a block of whole warps in one dimension.
        threads: its first ones, which multiply.
    """
    launches = [n for n in nodes(prim_func.body, tirx.AttrStmt) if _is_of_threads(n)]
    if not launches:  # the host's part
        return prim_func
    launch = launches[0]
    thread = launch.node.var
    leader = tirx.Var("leader", thread.dtype)
    asked = T.shfl_sync(thread, 0)

    def with_leader(call: tirx.Call) -> Any:
        if str(getattr(call.op, "name", "")) not in _PRODUCTS:
            return None
        return tirx.stmt_functor.substitute(call, {thread: leader & (threads - 1)})

    def bound(attr: tirx.AttrStmt) -> Any:
        if not attr.same_as(launch):
            return None
        body = tirx.stmt_functor.ir_transform(attr.body, with_leader, None, ["tirx.Call"])
        whole = tirx.SeqStmt([tirx.Bind(leader, asked), *_flat(body)])
        return tirx.AttrStmt(attr.node, attr.attr_key, attr.value, whole, span_of(attr))

    return prim_func.with_body(tirx.stmt_functor.ir_transform(prim_func.body, bound, None, ["tirx.AttrStmt"]))


def _is_of_threads(attr: tirx.AttrStmt) -> bool:
    return attr.attr_key == "thread_extent" and attr.node.thread_tag == "threadIdx.x"


def _flat(stmt: tirx.Stmt) -> list[tirx.Stmt]:
    return [part for s in stmt.seq for part in _flat(s)] if isinstance(stmt, tirx.SeqStmt) else [stmt]


def _inject() -> Any:
    stock = _stock()

    def run(module: Any) -> Any:
        module = stock(module)
        asked = [f.attrs[ATTRIBUTE] for f in module.functions.values() if f.attrs and ATTRIBUTE in f.attrs]
        if not asked:
            return module
        functions = {
            name: by_leader(f, int(asked[0])) if isinstance(f, tirx.PrimFunc) else f
            for name, f in module.functions.items()
        }
        return tvm.IRModule(functions, attrs=module.attrs)

    return run


transform.InjectTcgen05Fence = _inject
