"""What is wrong at many points is asked of each way in which a block gets to one, not of the first alone."""

from dataclasses import replace

import numpy as np
import pytest
from tilelang import language as T

from tests.verify import refinement_kernels as kernels
from tests.verify.test_refinement import check, plus_one, substitute
from verify import ir
from verify.extract import extract
from verify.ir import INT32, BinOp, Var
from verify.refine.compare import MAX_OBLIGATIONS, SAMPLE, limited, ways
from verify.refine.evaluate import Cond, Evaluator
from verify.refine.sym import Algebra, const
from verify.verdict import Verdict

THREADS, BLOCKS = 16, 4
TX, BX = Var(INT32, "tx"), Var(INT32, "bx")


def chosen_value():
    """In the first block a product or a sum, by the thread."""

    @T.prim_func
    def chosen_value_kernel(x: T.Tensor[(128,), T.float32], out: T.Tensor[(128,), T.float32]):
        with T.Kernel(4, threads=128) as bx:
            tx = T.get_thread_binding(0)
            if bx == 0:
                out[tx] = T.if_then_else(tx < 64, x[tx] * 2.0, x[tx] + 3.0)

    return chosen_value_kernel


def rows_of_a_dim_called_bx():
    """As many rows as a dim says that has the name of the compiler's block index."""
    n = T.dynamic("bx")

    @T.prim_func
    def rows_of_a_dim_called_bx_kernel(x: T.Tensor[(n, 128), T.int32], out: T.Tensor[(n, 128), T.int32]):
        with T.Kernel(4, threads=128) as b:
            tx = T.get_thread_binding(0)
            if b < n:
                out[b, tx] = x[b, tx]

    return rows_of_a_dim_called_bx_kernel


def wide_products():
    """Numbers of 64 bits, of a product that does not fit 32."""

    @T.prim_func
    def wide_products_kernel(out: T.Tensor[(1 << 20,), T.int64]):
        with T.Kernel(1 << 13, threads=128) as b:
            tx = T.get_thread_binding(0)
            out[b * 128 + tx] = T.cast(b * 128 + tx, "int64") * T.int64(100000)

    return wide_products_kernel


@pytest.fixture(scope="module")
def kernel():
    return extract(kernels.rows_behind())


def compiled(kernel, change):
    """Return the verdict on a kernel of which the device's only store is changed."""
    (store,) = (n for n in ir.walk(kernel.device.body) if isinstance(n, ir.Store))
    body = substitute(kernel.device.body, store, change(store))
    return check(replace(kernel, device=replace(kernel.device, body=body)))


def other_constant(store):
    return replace(store, value=replace(store.value, b=ir.Const(INT32, 6)))


def other_operator(store):
    return replace(store, value=replace(store.value, op="min"))


def elsewhere(store):
    return replace(store, indices=(plus_one(store.indices[0]),))


def test_the_kernel_is_proved(kernel):
    verdict, reasons, _ = check(kernel, recheck=True)
    assert verdict is Verdict.PROVED, reasons


@pytest.mark.parametrize("change", [other_constant, other_operator, elsewhere])
def test_a_fault_that_the_first_thread_never_meets_is_refuted(kernel, change):
    verdict, reasons, _ = compiled(kernel, change)
    assert verdict is Verdict.REFUTED, reasons


def test_elements_that_the_first_thread_never_writes_have_to_be_written(kernel):
    def halved(store):
        (thread,) = (n for n in ir.walk(store.indices[0]) if isinstance(n, Var) and n.name == "tx")
        half = ir.BinOp(INT32, "floordiv", thread, ir.Const(INT32, 2))
        return ir.If(None, ir.BinOp(ir.DType("bool"), "eq", half, half), store, None)

    assert compiled(kernel, halved)[0] is Verdict.PROVED
    none = ir.BinOp(ir.DType("bool"), "lt", ir.Const(INT32, 1), ir.Const(INT32, 0))
    assert compiled(kernel, lambda s: ir.If(None, none, s, None))[0] is not Verdict.PROVED


def condition(text="lt"):
    algebra = Algebra()
    env = {TX: const(np.arange(THREADS)), BX: algebra.var("bx", 0, BLOCKS - 1)}
    return Evaluator(algebra, env).cond(BinOp(ir.DType("bool"), text, BX, TX))


def test_ways_are_the_different_conditions():
    points = np.arange(THREADS)
    guard = condition()
    assert ways(guard, points, THREADS).tolist() == points.tolist()
    assert ways(guard, np.array([2, 3]), THREADS).tolist() == [2, 3]
    assert ways(Cond(), points, THREADS).tolist() == [0]
    assert ways(Cond(points > 4), points, THREADS).tolist() == [5]


def test_a_condition_inside_another_tells_points_apart_by_its_mask():
    algebra = Algebra()
    env = {TX: const(np.arange(THREADS)), BX: algebra.var("bx", 0, BLOCKS - 1)}
    bool_ = ir.DType("bool")
    early = BinOp(bool_, "lt", TX, ir.Const(INT32, 8))
    first = BinOp(bool_, "lt", BX, ir.Const(INT32, 2))
    either = Evaluator(algebra, env).cond(BinOp(bool_, "or", early, first))
    seen = {str(either.z3_at(p)) for p in range(THREADS)}
    assert len(seen) == 2
    assert {str(either.z3_at(int(p))) for p in ways(either, np.arange(THREADS), THREADS)} == seen


def test_of_too_many_points_some_are_asked_and_the_rest_is_said():
    left: list[str] = []
    assert limited(np.arange(MAX_OBLIGATIONS), "step", left).size == MAX_OBLIGATIONS
    assert left == []
    assert limited(np.arange(MAX_OBLIGATIONS + 1), "step", left).size == SAMPLE
    assert left == [f"step: {MAX_OBLIGATIONS + 1} different index forms to compare"]


def chosen(wrong: bool):
    """Return a kernel that chooses between two values by what never holds, at both levels."""
    kernel = extract(chosen_value())
    for level in ("tile", "device"):
        function = getattr(kernel, level)
        (block,) = (
            n.var for n in ir.walk(function.body) if isinstance(n, ir.Launch) and n.tag == "blockIdx.x"
        )
        (choice,) = (n for n in ir.walk(function.body) if isinstance(n, ir.Select))
        new = replace(choice, cond=BinOp(ir.BOOL, "gt", block, ir.Const(INT32, 2)), lazy=True)
        if wrong and level == "device":
            assert isinstance(new.a, BinOp)
            assert isinstance(new.b, BinOp)
            new = replace(new, a=replace(new.a, op="add"), b=replace(new.b, op="sub"))
        kernel = replace(kernel, **{level: replace(function, body=substitute(function.body, choice, new))})
    return kernel


def test_what_is_wrong_with_a_value_that_is_never_chosen_hides_nothing_of_the_other():
    assert check(chosen(wrong=False))[0] is Verdict.PROVED
    verdict, reasons, _ = check(chosen(wrong=True))
    assert verdict is Verdict.REFUTED, reasons


def test_a_zero_of_the_other_sign_is_another_constant():
    kernel = extract(kernels.local_sum())
    zero = next(s for s in ir.walk(kernel.device.body) if isinstance(s, ir.Store) and s.buffer.name == "acc")
    body = substitute(kernel.device.body, zero, replace(zero, value=ir.Const(zero.value.dtype, -0.0)))
    verdict, reasons, _ = check(replace(kernel, device=replace(kernel.device, body=body)))
    assert verdict is Verdict.REFUTED, reasons


def test_a_dim_by_the_name_of_a_block_is_not_taken_for_it():
    verdict, reasons, _ = check(extract(rows_of_a_dim_called_bx()))
    assert verdict is Verdict.UNSUPPORTED
    assert reasons == ["bx is a dim and a block's number"]


def test_integer_data_that_wraps_on_the_device_alone_is_refuted():
    kernel = extract(wide_products())
    assert check(kernel)[0] is Verdict.PROVED
    (store,) = (s for s in ir.walk(kernel.device.body) if isinstance(s, ir.Store))
    launches = {n.tag: n.var for n in ir.walk(kernel.device.body) if isinstance(n, ir.Launch)}
    row = BinOp(INT32, "mul", launches["blockIdx.x"], ir.Const(INT32, 128))
    place = BinOp(INT32, "add", row, launches["threadIdx.x"])
    narrow = ir.Cast(store.value.dtype, BinOp(INT32, "mul", place, ir.Const(INT32, 100000)))
    body = substitute(kernel.device.body, store, replace(store, value=narrow))
    verdict, reasons, _ = check(replace(kernel, device=replace(kernel.device, body=body)))
    assert verdict is Verdict.REFUTED, reasons
    assert any("int32 mul of data" in r for r in reasons)
