"""Small kernels that every property proves; tests break their IR."""

import copy
import gc
from functools import cache, lru_cache
from typing import Any

from tilelang import language as T

from dsv4_kernels.contract import Contract
from verify import extract, ir
from verify.engine import check
from verify.properties import Context, all_properties
from verify.verdict import worst

ROWS = Contract(("0 <= m", "m <= 65536"))


@cache
def scale_rows():
    """Row maxima with replicated threads, an in-warp reduction and a guarded scalar store."""
    m = T.dynamic("m")

    @T.prim_func
    def scale_rows_kernel(
        x: T.Tensor[(m, 128), T.float32],
        out: T.Tensor[(m, 128), T.bfloat16],
        scale: T.Tensor[(m,), T.float32],
    ):
        with T.Kernel(T.ceildiv(m, 32), threads=128) as bm:
            frag = T.alloc_fragment((32, 128), T.float32)
            amax = T.alloc_fragment((32,), T.float32)
            T.copy(x[bm * 32, 0], frag)
            T.reduce_max(frag, amax, dim=1)
            for i in T.Parallel(32):
                scale[bm * 32 + i] = amax[i]
            for i, j in T.Parallel(32, 128):
                out[bm * 32 + i, j] = T.cast(frag[i, j] * amax[i], "bfloat16")

    return scale_rows_kernel


@cache
def exponentials():
    """One intrinsic and nothing else."""
    m = T.dynamic("m")

    @T.prim_func
    def exponentials_kernel(x: T.Tensor[(m, 128), T.float32], out: T.Tensor[(m, 128), T.float32]):
        with T.Kernel(T.ceildiv(m, 32), threads=128) as bm:
            for i, j in T.Parallel(32, 128):
                out[bm * 32 + i, j] = T.exp2(x[bm * 32 + i, j])

    return exponentials_kernel


@cache
def row_sums():
    """A reduction over eight warps, through a shared workspace."""
    m = T.dynamic("m")

    @T.prim_func
    def row_sums_kernel(x: T.Tensor[(m, 4096), T.float32], out: T.Tensor[(m,), T.float32]):
        with T.Kernel(m, threads=256) as bm:
            frag = T.alloc_fragment((1, 4096), T.float32)
            total = T.alloc_fragment((1,), T.float32)
            T.copy(x[bm, 0], frag)
            T.reduce_sum(frag, total, dim=1)
            for i in T.Parallel(1):
                out[bm + i] = total[i]

    return row_sums_kernel


@cache
def indexed_by_variable():
    """An address kept in a mutable scalar."""
    m = T.dynamic("m")

    @T.prim_func
    def indexed_kernel(x: T.Tensor[(m,), T.int32], out: T.Tensor[(m,), T.int32]):
        with T.Kernel(T.ceildiv(m, 128), threads=128) as bm:
            row = T.alloc_var(T.int32)
            row = bm * 128 + T.get_thread_binding()
            if row < m:
                out[row] = x[row]

    return indexed_kernel


@cache
def gemm(block_m: int = 64):
    """TMA, mbarriers, warp specialisation, wgmma from shared memory, a guarded store."""
    m = T.dynamic("m")

    @T.prim_func
    def gemm_kernel(
        x: T.Tensor[(m, 256), T.bfloat16],
        w: T.Tensor[(128, 256), T.bfloat16],
        out: T.Tensor[(m, 128), T.bfloat16],
    ):
        with T.Kernel(2, T.ceildiv(m, block_m), threads=128) as (bn, bm):
            x_tile = T.alloc_shared((block_m, 64), T.bfloat16)
            w_tile = T.alloc_shared((64, 64), T.bfloat16)
            acc = T.alloc_fragment((block_m, 64), T.float32)
            T.clear(acc)
            for ko in T.Pipelined(4, num_stages=2):
                T.copy(x[bm * block_m, ko * 64], x_tile)
                T.copy(w[bn * 64, ko * 64], w_tile)
                T.gemm(x_tile, w_tile, acc, transpose_B=True)
            for i, j in T.Parallel(block_m, 64):
                out[bm * block_m + i, bn * 64 + j] = T.cast(acc[i, j], "bfloat16")

    return gemm_kernel


@cache
def gemm_tma_store():
    """A product whose tile goes out through shared memory by TMA."""
    m = T.dynamic("m")

    @T.prim_func
    def gemm_store_kernel(
        x: T.Tensor[(m, 256), T.bfloat16],
        w: T.Tensor[(128, 256), T.bfloat16],
        out: T.Tensor[(m, 128), T.bfloat16],
    ):
        with T.Kernel(2, T.ceildiv(m, 64), threads=128) as (bn, bm):
            x_tile = T.alloc_shared((64, 64), T.bfloat16)
            w_tile = T.alloc_shared((64, 64), T.bfloat16)
            out_tile = T.alloc_shared((64, 64), T.bfloat16)
            acc = T.alloc_fragment((64, 64), T.float32)
            T.clear(acc)
            for ko in T.Pipelined(4, num_stages=2):
                T.copy(x[bm * 64, ko * 64], x_tile)
                T.copy(w[bn * 64, ko * 64], w_tile)
                T.gemm(x_tile, w_tile, acc, transpose_B=True)
            T.copy(acc, out_tile)
            T.copy(out_tile, out[bm * 64, bn * 64])

    return gemm_store_kernel


SOUND = (scale_rows, exponentials, row_sums, indexed_by_variable, gemm, gemm_tma_store)


@lru_cache(maxsize=512)
def _lowered(prim_func: Any) -> tuple[extract.Extracted, dict[int, Any]]:
    """Return a kernel's stages, and the objects in it that are the compiler's, by their identity."""
    found = extract.extract(prim_func)
    seen: dict[int, Any] = {}
    left: list[Any] = [found]
    while left:
        one = left.pop()
        if id(one) not in seen and not isinstance(one, type):
            seen[id(one)] = one
            if type(one).__module__.split(".")[0] in ("verify", "builtins"):
                left += gc.get_referents(one)
    return found, {n: o for n, o in seen.items() if type(o).__module__.startswith(("tvm", "tilelang"))}


def extracted(prim_func: Any) -> extract.Extracted:
    """Return a kernel's stages for the caller to edit: many ask for one kernel, which is lowered once."""
    found, kept = _lowered(prim_func)
    return copy.deepcopy(found, dict(kept))


def context(prim_func, contract=ROWS, dims=None) -> Context:
    return Context(extracted(prim_func), contract, dims or {})


def verdict(context: Context, name: str) -> Any:
    """Check one property of a context; return its result without regard to what it depends on."""
    prop = next(p for p in all_properties() if p.name == name)
    report = check("test", "test", context.extracted, context.contract, context.dims, properties=[prop])
    result = report.properties[0]
    result.findings = [f for f in result.findings if not f.message.startswith("rests on")]
    result.verdict = worst(f.verdict for f in result.findings)
    return result


def nodes(function: ir.Function, kind: type, keep=lambda node: True) -> list[Any]:
    return [n for n in ir.walk(function.body) if isinstance(n, kind) and keep(n)]


def calls(function: ir.Function, op: str) -> list[Any]:
    return nodes(function, ir.Call, lambda n: n.op == op)


def plus(expr: ir.Expr, number: int) -> ir.Expr:
    return ir.BinOp(expr.dtype, "add", expr, ir.Const(expr.dtype, number))
