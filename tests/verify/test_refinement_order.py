"""What the device does in another order, in other contents or for some threads than the tile program."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tilelang import language as T

from tests.verify import refinement_kernels as kernels
from tests.verify.test_refinement import calls, check, stores, substitute
from verify import ir
from verify.extract import Extracted, extract
from verify.ir import BOOL, INT32, BinOp, Const, If, Load, Seq, Store
from verify.refine.inline import rewrite
from verify.refine.order import in_order
from verify.verdict import Verdict


def device(kernel: Extracted, target: Any, new: Any) -> Extracted:
    """Return the kernel with one node of its device program replaced."""
    body = substitute(kernel.device.body, target, new)
    assert body is not kernel.device.body
    return replace(kernel, device=replace(kernel.device, body=body))


def launched(kernel: Extracted, tag: str) -> ir.Var:
    (found,) = (n for n in ir.walk(kernel.device.body) if isinstance(n, ir.Launch) and n.tag == tag)
    return found.var


def backwards(kernel: Extracted, stmt: Store) -> Extracted:
    """Return the kernel of which `stmt` goes through the innermost loop around it from its end."""
    around = [n for n in ir.walk(kernel.device.body) if isinstance(n, ir.For)]
    loop = next(n for n in around if any(s is stmt for s in _stmts(n.body)))
    assert isinstance(loop.extent, Const)
    turned = BinOp(INT32, "sub", Const(INT32, loop.extent.value - 1), loop.var)

    def other(expr: ir.Expr) -> ir.Expr:
        return rewrite(expr, lambda e: turned if e is loop.var else None)

    new = replace(stmt, indices=tuple(map(other, stmt.indices)), value=other(stmt.value))
    return device(kernel, stmt, new)


def _stmts(body: ir.Stmt) -> list[ir.Stmt]:
    return list(body.stmts) if isinstance(body, Seq) else [body]


# --------------------------------------------------------------------------- loops of the device
def doubled() -> Any:
    @T.prim_func
    def doubled_kernel(x: T.Tensor[(16, 128), T.float32], out: T.Tensor[(16, 128), T.float32]):
        with T.Kernel(1, threads=128):
            twice = T.alloc_fragment((16, 128), T.float32)
            T.clear(twice)
            for i, j in T.Parallel(16, 128):
                twice[i, j] = x[i, j] * 2.0
                out[i, j] = twice[i, j]

    return doubled_kernel


def test_a_statement_that_runs_ahead_of_another_in_their_loop_is_not_proved():
    kernel = extract(doubled())
    (store,) = stores("out")(kernel.device)
    assert check(kernel)[0] is Verdict.PROVED
    verdict, reasons, _ = check(backwards(kernel, store))
    assert verdict is Verdict.UNSUPPORTED
    assert "comes to an element before" in reasons[0]


def test_a_register_that_is_added_to_before_it_is_cleared_is_not_proved():
    kernel = extract(kernels.row_sum())
    cleared = stores("total_clear")(kernel.device)[0]
    verdict, reasons, _ = check(backwards(kernel, cleared))
    assert verdict is Verdict.UNSUPPORTED
    assert "of a register before" in reasons[0]


def test_rounds_are_in_order_by_their_keys():
    import numpy as np

    first, second = np.array([0, 1]), np.array([1, 0])
    assert in_order(first, first, first, first)
    assert in_order(first, first, second, second)
    assert not in_order(first, first, first, second)
    assert in_order(first, first, first + 2, second)


def test_loops_of_one_name_are_not_gone_through_in_step():
    """Off the diagonal the store writes what belongs elsewhere."""
    kernel = extract(doubled())
    (store,) = stores("out")(kernel.device)
    inner = ir.Var(INT32, "again")
    (loop,) = (n for n in ir.walk(kernel.device.body) if isinstance(n, ir.For) and store in _stmts(n.body))
    named = ir.Var(INT32, loop.var.name)
    value = rewrite(store.value, lambda e: named if e is loop.var else None)
    for var in (named, inner):
        wrong = replace(store, value=rewrite(value, lambda e, v=var: v if e is named else None))
        nested = ir.For(None, var, Const(INT32, 0), loop.extent, "serial", wrong, {})
        assert check(device(kernel, store, nested))[0] is not Verdict.PROVED


# --------------------------------------------------------------------------- contents
def through_temporary(change: Callable[[ir.Buffer, Extracted], ir.Stmt]) -> Extracted:
    """Return `local_sum`, whose constant goes through a temporary that a statement changes before."""
    kernel = extract(kernels.local_sum())
    one = stores("acc")(kernel.device)[1]
    kind = one.value.dtype
    var = ir.Var(ir.HANDLE, "kept")
    kept = ir.Buffer("kept", kind, (Const(INT32, 1),), (), "local", var, Const(INT32, 0))
    filled = Store(None, kept, (Const(INT32, 0),), one.value)
    read = replace(one, value=Load(kind, kept, (Const(INT32, 0),)))
    return device(kernel, one, Seq(None, (ir.Alloc(None, kept), filled, change(kept, kernel), read)))


def other(kept: ir.Buffer) -> Store:
    return Store(None, kept, (Const(INT32, 0),), Const(kept.dtype, 7.0))


def test_a_temporary_is_not_what_it_was_before_a_branch_or_loop():
    def branch(kept, kernel):
        first = BinOp(BOOL, "lt", launched(kernel, "threadIdx.x"), Const(INT32, 5))
        return If(None, first, other(kept), None)

    def loop(kept, kernel):
        return ir.For(None, ir.Var(INT32, "n"), Const(INT32, 0), Const(INT32, 2), "serial", other(kept), {})

    assert check(through_temporary(lambda kept, _: Seq(None, ())))[0] is Verdict.PROVED
    for change in (branch, loop):
        verdict, reasons, _ = check(through_temporary(change))
        assert verdict is Verdict.UNSUPPORTED
        assert "contents of the temporary kept" in reasons[0]


def test_a_condition_that_is_asked_again_after_a_change_is_not_proved():
    @T.prim_func
    def asked_once(x: T.Tensor[(128,), T.int32], out: T.Tensor[(128,), T.int32]):
        with T.Kernel(1, threads=128):
            tx = T.get_thread_binding()
            state = T.alloc_local((1,), T.int32)
            total = T.alloc_local((1,), T.int32)
            state[0] = x[tx]
            total[0] = 1
            if state[0] == 0:
                total[0] = 7
                state[0] = 1
            out[tx] = state[0] + total[0]

    kernel = extract(asked_once)
    assert check(kernel)[0] is Verdict.PROVED
    (branch,) = (n for n in ir.walk(kernel.device.body) if isinstance(n, If))
    assert isinstance(branch.then, Seq)
    total, state = branch.then.stmts
    cond = next((e for e in ir.walk(kernel.device.body) if isinstance(e, ir.Bind)), None)
    asked = cond.value if cond is not None else branch.cond
    turned = replace(branch, cond=asked, then=Seq(None, (state, total)))
    assert check(device(kernel, branch, turned))[0] is not Verdict.PROVED


def test_a_register_that_a_loop_chooses_has_to_be_that_one():
    @T.prim_func
    def turned(x: T.Tensor[(512,), T.float32], out: T.Tensor[(512,), T.float32]):
        with T.Kernel(1, threads=128):
            rows = T.alloc_fragment((128, 4), T.float32)
            for i, j in T.Parallel(128, 4):
                rows[i, j] = x[i * 4 + j]
            for k in T.serial(4):
                for i in T.Parallel(128):
                    out[k * 128 + i] = rows[i, k]

    kernel = extract(turned)
    assert check(kernel)[0] is Verdict.PROVED
    (store,) = stores("out")(kernel.device)
    (read,) = (e for e in ir.walk(store.value) if isinstance(e, Load))
    verdict, reasons, _ = check(device(kernel, read, replace(read, indices=(Const(INT32, 0),))))
    assert verdict is Verdict.REFUTED
    assert "read of rows" in reasons[0]


# --------------------------------------------------------------------------- products
def cleared_once() -> Any:
    n, k, block_k = 64, 256, 64

    @T.prim_func
    def cleared_once_kernel(
        a: T.Tensor[(64, k), T.bfloat16], b: T.Tensor[(n, k), T.bfloat16], c: T.Tensor[(64, n), T.float32]
    ):
        with T.Kernel(1, threads=128):
            a_tile = T.alloc_shared((64, block_k), T.bfloat16)
            b_tile = T.alloc_shared((n, block_k), T.bfloat16)
            acc = T.alloc_fragment((64, n), T.float32)
            for ko in T.Pipelined(k // block_k, num_stages=2):
                T.copy(a[0, ko * block_k], a_tile)
                T.copy(b[0, ko * block_k], b_tile)
                T.gemm(a_tile, b_tile, acc, transpose_B=True, clear_accum=(ko == 0))
            T.copy(acc, c)

    return cleared_once_kernel


@pytest.fixture(scope="module")
def product() -> Extracted:
    return extract(cleared_once())


def clearing(kernel: Extracted) -> BinOp:
    """Return the device's condition of clearing the accumulator."""
    keeps = calls("ptx_wgmma_ss")(kernel.device)[-1].args[12]
    return next(e for e in ir.walk(keeps) if isinstance(e, BinOp) and e.op == "eq")


def test_an_accumulator_that_some_threads_clear_is_not_proved(product):
    assert check(product)[0] is Verdict.PROVED
    cond = clearing(product)
    thread = BinOp(INT32, "floormod", launched(product, "threadIdx.x"), Const(INT32, 128))
    fifth = BinOp(BOOL, "eq", thread, Const(INT32, 5))
    verdict, reasons, _ = check(device(product, cond, BinOp(BOOL, "or", cond, fifth)))
    assert verdict is Verdict.UNSUPPORTED
    assert "clears for some threads" in reasons[0]


def test_products_are_counted_where_the_solvers_are_asked_about_clearing(product):
    cond = clearing(product)
    other_form = device(product, cond, BinOp(BOOL, "le", cond.a, Const(INT32, 0)))
    assert check(other_form)[0] is Verdict.PROVED
    (inner,) = (
        n
        for n in ir.walk(other_form.device.body)
        if isinstance(n, ir.For) and n.var.name == "ki" and calls("ptx_wgmma_ss")(n)
    )
    verdict, reasons, _ = check(device(other_form, inner, replace(inner, extent=Const(INT32, 2))))
    assert verdict is Verdict.REFUTED
    assert "products are not added once" in reasons[0]
