"""Tile ops inside kernels, against plain PyTorch."""

# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false
# TileLang's language is typed for the tracer that runs it, not for the kernels written in it.

import functools
import operator

import pytest
import tilelang.language as T
import torch

from tests.verify.refinement_kernels import product_by_tma_store
from verify import interp
from verify.interp import tileops


def launch(kernel, *tensors):
    interp.run(kernel, *tensors)
    return tensors[-1]


# ------------------------------------------------------------------------------ copy, fill, transpose
def copy_through(scope, block_m, block_n, n=48):
    m = T.dynamic("m")
    alloc = {"shared": T.alloc_shared, "fragment": T.alloc_fragment}[scope]

    @T.prim_func
    def copy(x: T.Tensor[(m, n), T.float32], y: T.Tensor[(m, n), T.float32]):
        with T.Kernel(T.ceildiv(n, block_n), T.ceildiv(m, block_m), threads=128) as (bn, bm):
            tile = alloc((block_m, block_n), T.float32)
            T.copy(x[bm * block_m, bn * block_n], tile)
            T.copy(tile, y[bm * block_m, bn * block_n])

    return copy


@pytest.mark.parametrize("scope", ["shared", "fragment"])
@pytest.mark.parametrize("m", [0, 1, 31, 32, 70])
def test_copy_of_partial_tiles(scope, m):
    x = torch.randn(m, 48)
    y = torch.full((m, 48), float("nan"))
    assert torch.equal(launch(copy_through(scope, 32, 32), x, y), x)


def test_stores_by_tma_are_done_where_they_stand():
    x = torch.randint(-4, 5, (130, 128)).bfloat16()
    w = torch.randint(-4, 5, (64, 128)).bfloat16()
    got = launch(product_by_tma_store(), x, w, torch.full((130, 128), torch.nan, dtype=torch.bfloat16))
    want = (x.float() @ w.float().T).bfloat16()
    assert torch.equal(got, torch.cat([want, -want], dim=1))


def test_copy_reads_zero_beyond_a_global_buffer():
    m = T.dynamic("m")

    @T.prim_func
    def pad(x: T.Tensor[(m, 8), T.float32], y: T.Tensor[(16, 8), T.float32]):
        with T.Kernel(1, threads=32) as _:
            tile = T.alloc_shared((16, 8), T.float32)
            T.copy(x[0, 0], tile)
            T.copy(tile, y)

    x = torch.randn(5, 8)
    y = launch(pad, x, torch.full((16, 8), 7.0))
    assert torch.equal(y, torch.cat([x, torch.zeros(11, 8)]))


def test_copy_drops_writes_beyond_a_global_buffer():
    storage = torch.full((16, 8), 7.0)
    launch(copy_through("shared", 32, 8, n=8), torch.ones(5, 8), storage[:5])
    assert torch.equal(storage, torch.cat([torch.ones(5, 8), torch.full((11, 8), 7.0)]))


def test_copy_casts_and_slices():
    @T.prim_func
    def cast(x: T.Tensor[(4, 32), T.float32], y: T.Tensor[(32, 16), T.bfloat16]):
        with T.Kernel(1, threads=32) as _:
            s = T.alloc_shared((4, 32), T.float32)
            t = T.alloc_shared((2, 16), T.bfloat16)
            T.copy(x, s)
            T.copy(s[1:3, 8:24], t)
            T.copy(t, y[7:9, 0:16])

    x = torch.randn(4, 32)
    y = launch(cast, x, torch.zeros(32, 16, dtype=torch.bfloat16))
    want = torch.zeros(32, 16, dtype=torch.bfloat16)
    want[7:9] = x[1:3, 8:24].bfloat16()
    assert torch.equal(y, want)


def test_copy_of_a_slice_of_three_dimensions():
    @T.prim_func
    def pick(x: T.Tensor[(3, 5, 16), T.int32], y: T.Tensor[(5, 16), T.int32]):
        with T.Kernel(5, threads=32) as b:
            row = T.alloc_shared((16,), T.int32)
            T.copy(x[2, b, 0:16], row)
            T.copy(row, y[b, 0:16])

    x = torch.arange(240, dtype=torch.int32).view(3, 5, 16)
    assert torch.equal(launch(pick, x, torch.zeros(5, 16, dtype=torch.int32)), x[2])


def test_fill_and_clear_of_slices():
    @T.prim_func
    def fill(y: T.Tensor[(4, 8), T.float32]):
        with T.Kernel(1, threads=32) as _:
            s = T.alloc_shared((4, 8), T.float32)
            T.fill(s, 3)
            T.clear(s[1:3, 2:4])
            T.copy(s, y)

    want = torch.full((4, 8), 3.0)
    want[1:3, 2:4] = 0
    assert torch.equal(launch(fill, torch.empty(4, 8)), want)


def test_transpose():
    @T.prim_func
    def transpose(x: T.Tensor[(8, 16), T.float32], y: T.Tensor[(16, 8), T.float32]):
        with T.Kernel(1, threads=32) as _:
            s = T.alloc_shared((8, 16), T.float32)
            t = T.alloc_shared((16, 8), T.float32)
            T.copy(x, s)
            T.transpose(s, t)
            T.copy(t, y)

    x = torch.randn(8, 16)
    assert torch.equal(launch(transpose, x, torch.empty(16, 8)), x.T)


# ------------------------------------------------------------------------------ gemm
def gemm(m, n, k, a_dtype, b_dtype, c_dtype, *, ta=False, tb=False, clear=False, fragment=False):
    a_shape, b_shape = (k, m) if ta else (m, k), (n, k) if tb else (k, n)

    @T.prim_func
    def kernel(
        a: T.Tensor[a_shape, a_dtype],
        b: T.Tensor[b_shape, b_dtype],
        init: T.Tensor[(m, n), c_dtype],
        c: T.Tensor[(m, n), c_dtype],
    ):
        with T.Kernel(1, threads=128) as _:
            sa = T.alloc_fragment(a_shape, a_dtype) if fragment else T.alloc_shared(a_shape, a_dtype)
            sb = T.alloc_shared(b_shape, b_dtype)
            acc = T.alloc_fragment((m, n), c_dtype)
            T.copy(a, sa)
            T.copy(b, sb)
            T.copy(init, acc)
            T.gemm(sa, sb, acc, transpose_A=ta, transpose_B=tb, clear_accum=clear)
            T.copy(acc, c)

    return kernel


def run_gemm(a, b, c_dtype, names=None, **flags):
    """Operands in the orientation that the flags ask for."""
    m = a.shape[1] if flags.get("ta") else a.shape[0]
    k = a.shape[0] if flags.get("ta") else a.shape[1]
    n = b.shape[0] if flags.get("tb") else b.shape[1]
    names = names or [str(t.dtype).removeprefix("torch.") for t in (a, b)]
    init = torch.arange(m * n).view(m, n).to(c_dtype)
    c = torch.empty(m, n, dtype=c_dtype)
    launch(gemm(m, n, k, *names, str(c_dtype).removeprefix("torch."), **flags), a, b, init, c)
    left, right = a.double(), b.double()
    total = (left.T if flags.get("ta") else left) @ (right.T if flags.get("tb") else right)
    return c, total if flags.get("clear") else total + init.double()


@pytest.mark.parametrize("ta", [False, True])
@pytest.mark.parametrize("tb", [False, True])
@pytest.mark.parametrize("clear", [False, True])
def test_gemm_orientations(ta, tb, clear):
    torch.manual_seed(0)
    a, b = torch.randn(16, 32).bfloat16(), torch.randn(32, 24).bfloat16()
    got, want = run_gemm(
        a.T.contiguous() if ta else a, b.T.contiguous() if tb else b, torch.float32, ta=ta, tb=tb, clear=clear
    )
    assert torch.equal(got, want.float())


@pytest.mark.parametrize("fragment", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_gemm_operand_types(dtype, fragment):
    torch.manual_seed(0)
    a, b = torch.randn(16, 64).to(dtype), torch.randn(64, 32).to(dtype)
    got, want = run_gemm(a, b, torch.float32, fragment=fragment)
    assert torch.equal(got, want.float())


def test_gemm_of_float32_reads_tf32():
    torch.manual_seed(0)
    a, b = torch.randn(16, 32), torch.randn(32, 16)
    got, full = run_gemm(a, b, torch.float32)
    cut = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for t in (a, b)]
    init = torch.arange(256.0).view(16, 16).double()
    assert torch.equal(got, (cut[0] @ cut[1] + init).float())
    assert not torch.equal(got, full.float())


def test_gemm_of_int8_wraps_in_int32():
    a = torch.full((16, 64), -128, dtype=torch.int8)
    b = torch.randint(-128, 128, (64, 16), dtype=torch.int8)
    got, want = run_gemm(a, b, torch.int32)
    assert torch.equal(got, want.to(torch.int32))


def test_gemm_accumulates_over_a_loop_with_a_flag_that_depends_on_it():
    @T.prim_func
    def kernel(
        a: T.Tensor[(16, 64), T.bfloat16], b: T.Tensor[(16, 64), T.bfloat16], c: T.Tensor[(16, 16), T.float32]
    ):
        with T.Kernel(1, threads=128) as _:
            sa = T.alloc_shared((16, 16), T.bfloat16)
            sb = T.alloc_shared((16, 16), T.bfloat16)
            acc = T.alloc_fragment((16, 16), T.float32)
            T.fill(acc, 1000)
            for k in T.Pipelined(4, num_stages=2):
                T.copy(a[0, k * 16], sa)
                T.copy(b[0, k * 16], sb)
                T.gemm(sa, sb, acc, transpose_B=True, clear_accum=k == 0)
            T.copy(acc, c)

    a, b = (torch.randint(-4, 5, (16, 64)).bfloat16() for _ in range(2))
    assert torch.equal(launch(kernel, a, b, torch.empty(16, 16)), a.float() @ b.float().T)


def test_gemm_of_one_row_does_not_depend_on_the_number_of_rows():
    def project(rows):
        m, n, k = T.dynamic("m"), 32, 64

        @T.prim_func
        def kernel(
            a: T.Tensor[(m, k), T.bfloat16], b: T.Tensor[(n, k), T.bfloat16], c: T.Tensor[(m, n), T.float32]
        ):
            with T.Kernel(T.ceildiv(m, 16), threads=128) as bm:
                sa = T.alloc_shared((16, k), T.bfloat16)
                sb = T.alloc_shared((n, k), T.bfloat16)
                acc = T.alloc_fragment((16, n), T.float32)
                T.copy(a[bm * 16, 0], sa)
                T.copy(b, sb)
                T.gemm(sa, sb, acc, transpose_B=True, clear_accum=True)
                T.copy(acc, c[bm * 16, 0])

        return launch(kernel, rows, weight, torch.empty(len(rows), n))

    torch.manual_seed(0)
    a, weight = torch.randn(100, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    assert torch.equal(project(a)[37], project(a[37:38])[0])


# ------------------------------------------------------------------------------ reductions
def reduce_kernel(kind, dtype, dim, *, clear=True, shape=(8, 32)):
    out = [e for d, e in enumerate(shape) if d != dim]
    reduction = getattr(T, f"reduce_{kind}")
    flags = {} if kind == "abssum" else {"clear": clear}

    @T.prim_func
    def kernel(x: T.Tensor[shape, dtype], init: T.Tensor[out, dtype], y: T.Tensor[out, dtype]):
        with T.Kernel(1, threads=128) as _:
            tile = T.alloc_fragment(shape, dtype)
            total = T.alloc_fragment(out, dtype)
            T.copy(x, tile)
            T.copy(init, total)
            reduction(tile, total, dim=dim, **flags)
            T.copy(total, y)

    return kernel


@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kind", ["sum", "max", "min", "absmax"])
def test_reduce_float32(kind, dim, clear):
    torch.manual_seed(0)
    x = torch.randn(8, 32)
    init = torch.randn(32 if dim == 0 else 8)
    got = launch(reduce_kernel(kind, "float32", dim, clear=clear), x, init, torch.empty_like(init))
    part = {
        "sum": lambda: x.double().sum(dim).float(),
        "max": lambda: x.amax(dim),
        "min": lambda: x.amin(dim),
        "absmax": lambda: x.abs().amax(dim),
    }[kind]()
    join = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum, "absmax": torch.maximum}[kind]
    assert torch.equal(got, part if clear else join(part, init))


def test_reduce_abssum():
    x = torch.randn(8, 32)
    got = launch(reduce_kernel("abssum", "float32", 1), x, torch.zeros(8), torch.empty(8))
    assert torch.equal(got, x.double().abs().sum(1).float())


@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize("kind", ["bitand", "bitor", "bitxor", "max", "min", "sum"])
def test_reduce_int32(kind, clear):
    torch.manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (8, 32), dtype=torch.int64).to(torch.int32)
    init = torch.randint(-(2**31), 2**31, (8,), dtype=torch.int64).to(torch.int32)
    got = launch(reduce_kernel(kind, "int32", 1, clear=clear), x, init, torch.empty_like(init))
    joins = {"bitand": operator.and_, "bitor": operator.or_, "bitxor": operator.xor, "max": max, "min": min}
    join = joins.get(kind, operator.add)
    rows = [functools.reduce(join, row) for row in x.tolist()]
    rows = rows if clear else [join(a, b) for a, b in zip(rows, init.tolist(), strict=True)]
    assert got.tolist() == [(r + 2**31) % 2**32 - 2**31 for r in rows]


def test_reduce_max_loses_nan_and_starts_at_minus_infinity():
    x = torch.full((8, 32), float("nan"))
    x[0, 3], x[1, 4], x[1, 5] = -7.0, -0.0, 0.0
    x[2, 6] = -0.0
    got = launch(reduce_kernel("max", "float32", 1), x, torch.zeros(8), torch.empty(8))
    assert got[0].item() == -7.0
    assert [torch.signbit(v).item() for v in got[1:3]] == [False, True]
    assert torch.all(got[3:] == -float("inf"))


def test_reduce_of_blocks_side_by_side():
    m = T.dynamic("m")

    @T.prim_func
    def rows(x: T.Tensor[(m, 32), T.float32], y: T.Tensor[(m,), T.float32]):
        with T.Kernel(T.ceildiv(m, 4), threads=128) as b:
            tile = T.alloc_fragment((4, 32), T.float32)
            top = T.alloc_fragment((4,), T.float32)
            T.copy(x[b * 4, 0], tile)
            T.reduce_max(tile, top, dim=1)
            T.copy(top, y[b * 4])

    x = torch.randn(37, 32)
    assert torch.equal(launch(rows, x, torch.empty(37)), x.amax(1))


@pytest.mark.parametrize("kind", ["sum", "max"])
def test_reduce_values_of_bfloat16_rounds_once(kind):
    x = torch.randn(5, 64).bfloat16()
    got = tileops.reduce_values(x, kind, 1, "bfloat16")
    want = x.double().sum(1) if kind == "sum" else x.double().amax(1)
    assert torch.equal(got, want.bfloat16())


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_cumsum(dtype, dim, reverse):
    name = str(dtype).removeprefix("torch.")

    @T.prim_func
    def scan(x: T.Tensor[(8, 16), name], y: T.Tensor[(8, 16), name]):
        with T.Kernel(1, threads=128) as _:
            s = T.alloc_shared((8, 16), name)
            T.copy(x, s)
            T.cumsum(s, dim=dim, reverse=reverse)
            T.copy(s, y)

    x = torch.randint(-(2**30), 2**30, (8, 16)).to(dtype)
    wide = x.double()
    want = wide.flip(dim).cumsum(dim).flip(dim) if reverse else wide.cumsum(dim)
    want = want.float() if dtype == torch.float32 else want.long().to(torch.int32)
    assert torch.equal(launch(scan, x, torch.empty(8, 16, dtype=dtype)), want)


# ------------------------------------------------------------------------------ atomics
def test_atomic_add_counts_every_lane():
    n = T.dynamic("n")

    @T.prim_func
    def histogram(x: T.Tensor[(n,), T.int32], counts: T.Tensor[(8,), T.int32]):
        with T.Kernel(T.ceildiv(n, 64), threads=64) as b:
            for i in T.Parallel(64):
                if b * 64 + i < n:
                    T.atomic_add(counts[x[b * 64 + i]], 1)

    x = torch.randint(0, 8, (1000,), dtype=torch.int32)
    got = launch(histogram, x, torch.full((8,), 5, dtype=torch.int32))
    assert torch.equal(got, (torch.bincount(x, minlength=8) + 5).to(torch.int32))


def test_atomic_add_returns_a_different_slot_to_every_lane():
    @T.prim_func
    def slots(x: T.Tensor[(64,), T.int32], counts: T.Tensor[(4,), T.int32], y: T.Tensor[(64,), T.int32]):
        with T.Kernel(1, threads=64) as _:
            for i in T.Parallel(64):
                y[i] = T.atomic_add(counts[x[i]], 1, return_prev=True)

    x = torch.randint(0, 4, (64,), dtype=torch.int32)
    counts = torch.zeros(4, dtype=torch.int32)
    y = launch(slots, x, counts, torch.empty(64, dtype=torch.int32))
    for bucket in range(4):
        assert sorted(y[x == bucket].tolist()) == list(range(int(counts[bucket])))


@pytest.mark.parametrize(("op", "reference"), [(T.atomic_max, "amax"), (T.atomic_min, "amin")])
def test_atomic_extremes(op, reference):
    @T.prim_func
    def extremes(x: T.Tensor[(64,), T.float32], y: T.Tensor[(4,), T.float32]):
        with T.Kernel(1, threads=64) as _:
            for i in T.Parallel(64):
                op(y[i % 4], x[i])

    x = torch.randn(64)
    got = launch(extremes, x, torch.zeros(4))
    assert torch.equal(got, torch.zeros(4).scatter_reduce(0, torch.arange(64) % 4, x, reference))


def test_atomic_add_of_a_tile():
    @T.prim_func
    def add(x: T.Tensor[(4, 8, 8), T.float32], y: T.Tensor[(8, 8), T.float32]):
        with T.Kernel(4, threads=64) as b:
            tile = T.alloc_fragment((8, 8), T.float32)
            T.copy(x[b, 0:8, 0:8], tile)
            T.atomic_add(y, tile)

    x = torch.randint(-9, 9, (4, 8, 8)).float()
    assert torch.equal(launch(add, x, torch.ones(8, 8)), x.sum(0) + 1)


# ------------------------------------------------------------------------------ convolution
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding"), [(3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 2), (1, 1, 1, 0)]
)
def test_im2col_makes_a_convolution_a_product(kernel, stride, dilation, padding):
    batch, size, channels, filters = 2, 9, 32, 16
    block_m, block_k = 32, 32
    out_size = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    pixels, taps = batch * out_size * out_size, kernel * kernel * channels

    @T.prim_func
    def convolution(
        image: T.Tensor[(batch, size, size, channels), T.float16],
        weight: T.Tensor[(taps, filters), T.float16],
        out: T.Tensor[(pixels, filters), T.float32],
    ):
        with T.Kernel(T.ceildiv(pixels, block_m), threads=128) as bm:
            rows = T.alloc_shared((block_m, block_k), T.float16)
            columns = T.alloc_shared((block_k, filters), T.float16)
            acc = T.alloc_fragment((block_m, filters), T.float32)
            T.clear(acc)
            for ko in T.Pipelined(taps // block_k, num_stages=2):
                T.im2col(image, rows, bm, ko, kernel, stride, dilation, padding)
                T.copy(weight[ko * block_k, 0], columns)
                T.gemm(rows, columns, acc)
            T.copy(acc, out[bm * block_m, 0])

    # Small integers: every order of additions gives the same sum.
    image = torch.randint(-3, 4, (batch, size, size, channels)).half()
    weight = torch.randint(-3, 4, (filters, channels, kernel, kernel)).half()
    got = launch(
        convolution,
        image,
        weight.permute(2, 3, 1, 0).reshape(taps, filters).contiguous(),
        torch.empty(pixels, filters),
    )
    want = torch.nn.functional.conv2d(
        image.permute(0, 3, 1, 2).double(), weight.double(), None, stride, padding, dilation
    )
    assert torch.equal(got.double(), want.permute(0, 2, 3, 1).reshape(pixels, filters))
