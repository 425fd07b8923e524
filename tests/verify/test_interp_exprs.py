"""Operators and intrinsics inside kernels, against numpy in the scalar type or plain Python."""

# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false
# TileLang's language is typed for the tracer that runs it, not for the kernels written in it.

import math
from fractions import Fraction

import numpy as np
import pytest
import tilelang.language as T
import torch

from verify import interp, ir
from verify.interp import arith, intrinsics
from verify.interp.lanes import Affine, Lanes

NAN, INF = float("nan"), float("inf")
INT32 = [0, 1, -1, 2, -2, 7, -7, 12345, -99999, 2**31 - 1, -(2**31), -(2**31) + 1]


def elementwise(function, inputs, output, n):
    """Kernel y[i] = function(x0[i], ...)."""
    if len(inputs) == 1:

        @T.prim_func
        def unary(x: T.Tensor[(n,), inputs[0]], y: T.Tensor[(n,), output]):
            with T.Kernel(1, threads=128) as _:
                for i in T.Parallel(n):
                    y[i] = function(x[i])

        return unary

    if len(inputs) == 2:

        @T.prim_func
        def two(a: T.Tensor[(n,), inputs[0]], b: T.Tensor[(n,), inputs[1]], y: T.Tensor[(n,), output]):
            with T.Kernel(1, threads=128) as _:
                for i in T.Parallel(n):
                    y[i] = function(a[i], b[i])

        return two

    @T.prim_func
    def three(
        a: T.Tensor[(n,), inputs[0]],
        b: T.Tensor[(n,), inputs[1]],
        c: T.Tensor[(n,), inputs[2]],
        y: T.Tensor[(n,), output],
    ):
        with T.Kernel(1, threads=128) as _:
            for i in T.Parallel(n):
                y[i] = function(a[i], b[i], c[i])

    return three


def apply(function, *args, out):
    names = [str(a.dtype).removeprefix("torch.") for a in args]
    y = torch.empty(len(args[0]), dtype=out)
    interp.run(elementwise(function, names, str(out).removeprefix("torch."), len(y)), *args, y)
    return y


def pairs(values, dtype):
    grid = [(a, b) for a in values for b in values]
    return torch.tensor([a for a, _ in grid], dtype=dtype), torch.tensor([b for _, b in grid], dtype=dtype)


def wrapped(value, bits=32, signed=True):
    value %= 1 << bits
    return value - (1 << bits) if signed and value >> (bits - 1) else value


# ------------------------------------------------------------------------------ integers
@pytest.mark.parametrize("op", ["+", "-", "*", "&", "|", "^"])
def test_int32_wraps_around(op):
    functions = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "&": lambda a, b: a & b,
        "|": lambda a, b: a | b,
        "^": lambda a, b: a ^ b,
    }
    a, b = pairs(INT32, torch.int32)
    got = apply(functions[op], a, b, out=torch.int32)
    want = [wrapped(functions[op](x, y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert got.tolist() == want


def test_int32_wraps_before_the_next_operation():
    a, b = pairs(INT32, torch.int32)
    rows = list(zip(a.tolist(), b.tolist(), strict=True))
    got = apply(lambda x, y: T.cast(x + y < x, "int32"), a, b, out=torch.int32)
    assert got.tolist() == [int(wrapped(x + y) < x) for x, y in rows]
    got = apply(lambda x, y: (x - y) >> 1, a, b, out=torch.int32)
    assert got.tolist() == [wrapped(x - y) >> 1 for x, y in rows]
    got = apply(lambda x, y: (x * y) // 16, a, b, out=torch.int32)
    assert got.tolist() == [wrapped(x * y) // 16 for x, y in rows]


@pytest.mark.parametrize("op", ["floordiv", "floormod", "truncdiv", "truncmod"])
@pytest.mark.parametrize("a", [-7, 7, -8, 0])
@pytest.mark.parametrize("b", [3, -3, 4])
def test_division_of_one_integer_for_all_lanes(op, a, b):
    want = {
        "floordiv": a // b,
        "floormod": a % b,
        "truncdiv": math.trunc(a / b),
        "truncmod": int(math.fmod(a, b)),
    }[op]
    assert arith.binary(op, ir.DType("int32"), a, b, Lanes(), None) == want


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int8, torch.int16, torch.uint32])
def test_narrow_integers_wrap_at_their_width(dtype):
    info = torch.iinfo(dtype)
    values = [info.min, 0, 1, 3, info.max - 1, info.max]
    a, b = pairs(values, dtype)
    kind = str(dtype).removeprefix("torch.")
    got = apply(lambda x, y: T.cast(x * y + x, kind), a, b, out=dtype)
    want = [wrapped(x * y + x, info.bits, info.min < 0) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert got.tolist() == want


@pytest.mark.parametrize("divisor", [3, -3, 8, 1])
def test_floor_and_truncated_division(divisor):
    a = torch.tensor(INT32, dtype=torch.int32)
    floor = apply(lambda x: x // divisor, a, out=torch.int32)
    mod = apply(lambda x: x % divisor, a, out=torch.int32)
    trunc = apply(lambda x: T.truncdiv(x, divisor), a, out=torch.int32)
    rest = apply(lambda x: T.truncmod(x, divisor), a, out=torch.int32)
    assert floor.tolist() == [x // divisor for x in INT32]
    assert mod.tolist() == [x % divisor for x in INT32]
    assert trunc.tolist() == [math.trunc(x / divisor) for x in INT32]
    assert rest.tolist() == [int(math.fmod(x, divisor)) for x in INT32]


def test_division_by_zero_is_an_error_only_in_a_lane_that_divides():
    a, b = torch.arange(4, dtype=torch.int32), torch.tensor([1, 0, 2, 0], dtype=torch.int32)
    guarded = apply(lambda x, y: T.if_then_else(y != 0, x // y, -1), a, b, out=torch.int32)
    assert guarded.tolist() == [0, -1, 1, -1]
    with pytest.raises(interp.InterpreterError, match="by zero"):
        apply(lambda x, y: x // y, a, b, out=torch.int32)


def test_shift_right_is_arithmetic_for_signed_and_logical_for_unsigned():
    x = torch.tensor([-(2**31), -1, 5, 2**31 - 1], dtype=torch.int32)
    assert apply(lambda v: v >> 4, x, out=torch.int32).tolist() == [v >> 4 for v in x.tolist()]
    bits = torch.tensor([2**31, 2**32 - 1, 5], dtype=torch.uint32)
    got = apply(lambda v: v >> T.uint32(4), bits, out=torch.uint32)
    assert got.tolist() == [v >> 4 for v in bits.tolist()]
    wide = torch.tensor([2**63, 2**64 - 1, 5, 0], dtype=torch.uint64)
    shift = torch.tensor([1, 63, 0, 7], dtype=torch.uint64)
    got = apply(lambda v, s: v >> s, wide, shift, out=torch.uint64)
    assert got.tolist() == [v >> s for v, s in zip(wide.tolist(), shift.tolist(), strict=True)]


def test_shift_left_drops_high_bits():
    x = torch.tensor([1, 3, -1, 2**30 + 1], dtype=torch.int32)
    s = torch.tensor([31, 30, 16, 1], dtype=torch.int32)
    got = apply(lambda v, n: v << n, x, s, out=torch.int32)
    assert got.tolist() == [wrapped(v << n) for v, n in zip(x.tolist(), s.tolist(), strict=True)]


def test_shift_by_the_width_or_more_is_an_error():
    x = torch.tensor([1, 1], dtype=torch.int32)
    with pytest.raises(interp.InterpreterError, match="shl of int32 by 32"):
        apply(lambda v, n: v << n, x, torch.tensor([0, 32], dtype=torch.int32), out=torch.int32)


def test_uint64_compares_as_unsigned():
    a, b = pairs([0, 1, 2**63 - 1, 2**63, 2**64 - 1], torch.uint64)
    got = apply(lambda x, y: T.cast(x < y, "int32"), a, b, out=torch.int32)
    assert got.tolist() == [int(x < y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    got = apply(T.max, a, b, out=torch.uint64)
    assert got.tolist() == [max(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]


# ------------------------------------------------------------------------------ floats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_float_operation_rounds_to_its_type(dtype):
    torch.manual_seed(0)
    a, b, c = (torch.randn(500).to(dtype) for _ in range(3))
    got = apply(lambda x, y, z: x * y + z, a, b, c, out=dtype)
    product = (a.double() * b.double()).to(dtype)  # exact in float64, then rounded
    want = (product.double() + c.double()).to(dtype)
    assert torch.equal(got, want)
    fused = (a.double() * b.double() + c.double()).to(dtype)
    assert not torch.equal(got, fused)


def test_division_is_correctly_rounded():
    torch.manual_seed(0)
    a, b = torch.randn(2000), torch.randn(2000)
    got = apply(lambda x, y: x / y, a, b, out=torch.float32)
    assert np.array_equal(got.numpy(), a.numpy() / b.numpy())
    by_scalar = apply(lambda x: x / T.float32(3), a, out=torch.float32)
    assert np.array_equal(by_scalar.numpy(), a.numpy() / np.float32(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_min_and_max_lose_a_nan_and_order_zeros(dtype):
    a, b = pairs([NAN, INF, -INF, 0.0, -0.0, 1.5, -2.0], dtype)
    for op, pick in ((T.max, max), (T.min, min)):
        got = apply(op, a, b, out=dtype).tolist()
        for x, y, z in zip(a.tolist(), b.tolist(), got, strict=True):
            if math.isnan(x) or math.isnan(y):
                want = y if math.isnan(x) else x
            else:
                want = pick((x, y), key=lambda v: (v, math.copysign(1, v)))
            assert repr(z) == repr(want), (op, x, y)


def test_clamp_keeps_a_nan():
    x = torch.tensor([NAN, -5.0, 0.5, INF])
    got = apply(lambda v: T.clamp(v, -1.0, 2.0), x, out=torch.float32)
    assert got[0].isnan()
    assert got[1:].tolist() == [-1.0, 0.5, 2.0]


@pytest.mark.parametrize("op", ["<", "<=", ">", ">=", "==", "!="])
def test_comparisons_with_nan(op):
    a, b = pairs([NAN, 0.0, -0.0, 1.0, -INF], torch.float32)
    functions = {
        "<": lambda x, y: x < y,
        "<=": lambda x, y: x <= y,
        ">": lambda x, y: x > y,
        ">=": lambda x, y: x >= y,
        "==": lambda x, y: x == y,
        "!=": lambda x, y: x != y,
    }
    got = apply(lambda x, y: T.cast(functions[op](x, y), "int32"), a, b, out=torch.int32)
    assert got.tolist() == [int(functions[op](x, y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("op", "reference"),
    [
        (T.exp, math.exp),
        (T.exp2, lambda x: 2.0**x),
        (T.log, math.log),
        (T.log2, math.log2),
        (T.sqrt, math.sqrt),
        (T.rsqrt, lambda x: 1 / math.sqrt(x)),
        (T.tanh, math.tanh),
        (T.erf, math.erf),
        (T.sigmoid, lambda x: 1 / (1 + math.exp(-x))),
        (T.floor, math.floor),
        (T.ceil, math.ceil),
        (T.abs, abs),
        (lambda x: T.abs(-x), abs),
        (lambda x: T.pow(x, T.float32(2.5)), lambda x: x**2.5),
    ],
)
def test_float_functions(op, reference):
    torch.manual_seed(1)
    x = torch.rand(300) * 8 + 0.01
    got = apply(op, x, out=torch.float32)
    want = torch.tensor([reference(v) for v in x.tolist()], dtype=torch.float64)
    assert torch.all((got.double() - want).abs() <= want.abs() * 2.0**-23)


def test_functions_at_the_ends_of_the_range():
    x = torch.tensor([-INF, INF, NAN, 0.0, -1.0])
    assert apply(T.exp, x, out=torch.float32)[:2].tolist() == [0.0, INF]
    assert apply(T.log2, x, out=torch.float32)[3].item() == -INF
    assert apply(T.rsqrt, x, out=torch.float32)[[1, 3]].tolist() == [0.0, INF]
    assert apply(T.sqrt, x, out=torch.float32)[4].isnan()
    assert apply(lambda v: T.cast(T.isnan(v), "int32"), x, out=torch.int32).tolist() == [0, 0, 1, 0, 0]
    assert apply(lambda v: T.cast(T.isinf(v), "int32"), x, out=torch.int32).tolist() == [1, 1, 0, 0, 0]


def test_round_ties_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 2.4999])
    assert apply(T.round, x, out=torch.float32).tolist() == [0.0, 2.0, 2.0, -0.0, -2.0, 2.0]


def nearest_float32(exact):
    """The float32 nearest to a Fraction, the even one of two as near."""
    guess = np.float32(float(exact))
    near = [np.nextafter(guess, np.float32(-INF)), guess, np.nextafter(guess, np.float32(INF))]
    return float(min(near, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.int32)) & 1)))


def test_fma_rounds_once():
    torch.manual_seed(0)
    a, b = torch.randn(400), torch.randn(400)
    c = torch.cat([torch.randn(200), -(a * b)[200:]])  # half of them cancel
    # (2**24 + 1) / 2**24 is halfway between two float32; what is added decides, and float64 loses it.
    a[:2], b[:2] = 24929 * 2.0**-12, 673 * 2.0**-12
    c[:2] = torch.tensor([2.0**-80, -(2.0**-80)])
    got = apply(lambda x, y, z: T.ieee_fmaf(x, y, z, "rn"), a, b, c, out=torch.float32)
    rows = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    want = [nearest_float32(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in rows]
    assert got.tolist() == want
    assert got[:2].tolist() == [1 + 2.0**-23, 1.0]


# ------------------------------------------------------------------------------ selection
def test_the_branch_not_taken_is_not_evaluated():
    @T.prim_func
    def shift(x: T.Tensor[(64,), T.float32], y: T.Tensor[(64,), T.float32]):
        with T.Kernel(1, threads=64) as _:
            s = T.alloc_shared((64,), T.float32)
            T.copy(x, s)
            for i in T.Parallel(64):
                y[i] = T.if_then_else(i > 0, s[i - 1], T.float32(0))

    x = torch.arange(64.0)
    y = torch.empty(64)
    interp.run(shift, x, y)
    assert torch.equal(y, torch.cat([torch.zeros(1), x[:-1]]))


def test_nor_is_the_other_branch():
    @T.prim_func
    def shift(x: T.Tensor[(64,), T.float32], y: T.Tensor[(64,), T.float32]):
        with T.Kernel(1, threads=64) as _:
            s = T.alloc_shared((64,), T.float32)
            T.copy(x, s)
            for i in T.Parallel(64):
                y[i] = T.if_then_else(i == 63, T.float32(0), s[i + 1])

    x = torch.arange(64.0)
    y = torch.empty(64)
    interp.run(shift, x, y)
    assert torch.equal(y, torch.cat([x[1:], torch.zeros(1)]))


def test_and_or_evaluate_the_second_operand_only_where_needed():
    @T.prim_func
    def pick(x: T.Tensor[(8,), T.int32], y: T.Tensor[(8,), T.int32]):
        with T.Kernel(1, threads=32) as _:
            s = T.alloc_shared((8,), T.int32)
            T.copy(x, s)
            for i in T.Parallel(8):
                y[i] = T.cast((i < 7 and s[i + 1] > 2) or i == 0, "int32")

    x = torch.tensor([0, 5, 1, 3, 0, 0, 9, 1], dtype=torch.int32)
    y = torch.empty(8, dtype=torch.int32)
    interp.run(pick, x, y)
    assert y.tolist() == [int((i < 7 and int(x[i + 1]) > 2) or i == 0) for i in range(8)]


# ------------------------------------------------------------------------------ extern, unknown
def test_extern_runs_only_with_a_registered_meaning():
    def kernel():
        return elementwise(lambda v: T.call_extern("int32", "double_it_for_test", v), ["int32"], "int32", 4)

    x, y = torch.arange(4, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    with pytest.raises(interp.UnsupportedOpError, match="double_it_for_test"):
        interp.run(kernel(), x, y)
    interp.register_extern("double_it_for_test", lambda v: 2 * v)
    try:
        interp.run(kernel(), x, y)
    finally:
        del intrinsics._EXTERNS["double_it_for_test"]
    assert y.tolist() == [0, 2, 4, 6]


def test_register_extern_refuses_a_second_meaning():
    interp.register_extern("taken_for_test", torch.abs)
    try:
        with pytest.raises(ValueError, match="requires a new name"):
            interp.register_extern("taken_for_test", torch.neg)
    finally:
        del intrinsics._EXTERNS["taken_for_test"]


def test_an_unknown_op_is_unsupported_and_names_the_line():
    x = torch.arange(4.0)
    with pytest.raises(interp.UnsupportedOpError, match=r"test_interp_exprs.py:\d+: op .*atan"):
        apply(T.atan, x, out=torch.float32)


def test_arithmetic_on_fp8_is_unsupported():
    x = torch.zeros(4, dtype=torch.float8_e4m3fn)
    with pytest.raises(interp.UnsupportedOpError, match="add of float8_e4m3fn"):
        apply(lambda v: v + v, x, out=torch.float8_e4m3fn)


# ------------------------------------------------------------------------------ affine values
@pytest.mark.parametrize("op", ["add", "sub", "mul", "floordiv", "floormod", "truncdiv", "truncmod", "shl"])
@pytest.mark.parametrize("other", [1, 4, 6])
def test_affine_arithmetic_agrees_with_plain_integers(op, other):
    lanes = Lanes([4, 3, 1, 1, 5])
    kind = ir.DType("int32")
    for base, coeffs in (
        (0, ((0, 1),)),
        (3, ((0, 4), (4, 16))),
        (-8, ((1, 8),)),
        (2, ((0, 6), (1, 24), (4, 1))),
    ):
        value = Affine(base, coeffs)
        fast = lanes.tensor(arith.binary(op, kind, value, other, lanes, None))
        slow = arith.binary(op, kind, lanes.tensor(value), torch.tensor(other), lanes, None)
        assert torch.equal(fast.broadcast_to(lanes.shape), slow.broadcast_to(lanes.shape))


@pytest.mark.parametrize("op", sorted(arith.COMPARISONS))
def test_affine_comparison_agrees_with_plain_integers(op):
    lanes = Lanes([4, 1, 1, 1, 5])
    kind = ir.DType("int32")
    value = Affine(2, ((0, 1), (4, 4)))  # 2 .. 21
    for other in (1, 2, 3, 21, 22):
        fast = lanes.tensor(arith.binary(op, kind, value, other, lanes, None))
        slow = arith.COMPARISONS[op](lanes.tensor(value), other)
        assert torch.equal(fast.broadcast_to(lanes.shape), slow.broadcast_to(lanes.shape))


def test_affine_that_would_overflow_wraps():
    lanes = Lanes([3])
    got = arith.binary("add", ir.DType("int32"), Affine(2**31 - 2, ((0, 1),)), 0, lanes, None)
    assert lanes.tensor(got).tolist() == [2**31 - 2, 2**31 - 1, -(2**31)]
