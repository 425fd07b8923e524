"""The tile interpreter: its errors, its arguments and its entry points."""

# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false
# TileLang's language is typed for the tracer that runs it, not for the kernels written in it.

import pytest
import tilelang.language as T
import torch

import dsv4_kernels
from dsv4_kernels import runtime
from tests.verify.interp_programs import INT, grid_kernel, launch, line_of
from verify import extract, interp, ir
from verify.interp import statements


# ------------------------------------------------------------------------------ errors
def test_out_of_bounds_shared_read_names_the_line():
    @T.prim_func
    def kernel(x: T.Tensor[(32,), T.float32], y: T.Tensor[(32,), T.float32]):
        with T.Kernel(1, threads=32) as _:
            tile = T.alloc_shared((16,), T.float32)
            T.copy(x[0:16], tile)
            for i in T.Parallel(32):
                y[i] = tile[i]  # reads past the end

    with pytest.raises(interp.InterpreterError) as info:
        launch(kernel, torch.zeros(32), torch.zeros(32))
    line = line_of(test_out_of_bounds_shared_read_names_the_line, "reads past the end")
    assert info.value.span.line == line
    assert str(info.value).startswith(f"{__file__}:{line}: tile[shared.dyn]: index 16 is out of bounds")


@pytest.mark.parametrize("alloc", [T.alloc_shared, T.alloc_fragment])
def test_out_of_bounds_write_inside_the_block(alloc):
    @T.prim_func
    def kernel(x: T.Tensor[(4,), T.int32], y: T.Tensor[(4,), T.int32]):
        with T.Kernel(1, threads=32) as _:
            tile = alloc((8,), T.int32)
            for i in T.Parallel(4):
                tile[x[i]] = i  # writes where x says
            T.copy(tile[0:4], y)

    launch(kernel, torch.tensor([0, 1, 2, 7], dtype=INT), torch.zeros(4, dtype=INT))
    with pytest.raises(
        interp.InterpreterError, match="index -2 is out of bounds for dimension 0 of extent 8"
    ):
        launch(kernel, torch.tensor([0, 1, 2, -2], dtype=INT), torch.zeros(4, dtype=INT))


def test_out_of_bounds_in_a_masked_lane_is_no_error():
    @T.prim_func
    def kernel(y: T.Tensor[(32,), T.int32]):
        with T.Kernel(1, threads=32) as _:
            tile = T.alloc_shared((16,), T.int32)
            for i in T.Parallel(32):
                if i < 16:
                    tile[i] = i
            for i in T.Parallel(32):
                y[i] = T.if_then_else(i < 16, tile[i], -1)

    assert launch(kernel, torch.zeros(32, dtype=INT)).tolist() == [*range(16), *[-1] * 16]


def test_read_of_memory_that_nothing_wrote():
    @T.prim_func
    def kernel(y: T.Tensor[(8,), T.float32]):
        with T.Kernel(1, threads=32) as _:
            tile = T.alloc_shared((8,), T.float32)
            T.copy(tile, y)

    with pytest.raises(interp.InterpreterError, match="tile is read before anything is written"):
        launch(kernel, torch.zeros(8))


def test_part_of_a_tile_that_nothing_wrote_is_nan():
    @T.prim_func
    def kernel(y: T.Tensor[(8,), T.float32]):
        with T.Kernel(1, threads=32) as _:
            tile = T.alloc_shared((8,), T.float32)
            T.fill(tile[0:4], 1)
            T.copy(tile, y)

    assert launch(kernel, torch.zeros(8)).isnan().tolist() == [False] * 4 + [True] * 4


def test_an_atomic_on_memory_that_nothing_wrote():
    @T.prim_func
    def kernel(y: T.Tensor[(1,), T.int32]):
        with T.Kernel(1, threads=32) as _:
            count = T.alloc_shared((1,), T.int32)
            for _i in T.Parallel(32):
                T.atomic_add(count[0], 1)
            T.copy(count, y)

    with pytest.raises(interp.InterpreterError, match="count is read before anything is written"):
        launch(kernel, torch.zeros(1, dtype=INT))


def test_an_annotation_that_changes_meaning_is_unsupported():
    @T.prim_func
    def kernel(x: T.Tensor[(8,), T.float32], y: T.Tensor[(8,), T.float32]):
        with T.Kernel(1, threads=32) as _:
            T.annotate_safe_value({x: 1.0})
            T.copy(x, y)

    with pytest.raises(interp.UnsupportedOpError, match="safe_value"):
        launch(kernel, torch.zeros(8), torch.zeros(8))


def test_program_order_meets_every_barrier():
    """Here a block runs as one thread; whether a wait can be met is for `mbarrier` and the device level."""

    @T.prim_func
    def kernel(y: T.Tensor[(8,), T.float32]):
        with T.Kernel(1, threads=32) as _:
            barrier = T.alloc_barrier(1)
            T.barrier_arrive(barrier)
            T.barrier_wait(barrier, 0)
            T.fill(y, 3)

    assert launch(kernel, torch.zeros(8)).tolist() == [3.0] * 8


def test_a_broken_assumption_is_an_error():
    n = T.dynamic("n")

    @T.prim_func
    def kernel(y: T.Tensor[(n,), T.int32]):
        with T.Kernel(1, threads=32) as _:
            T.assume(n % 8 == 0)
            for i in T.Parallel(n):
                y[i] = i

    assert launch(kernel, torch.zeros(16, dtype=INT)).tolist() == [*range(16)]
    with pytest.raises(interp.InterpreterError, match="assumption"):
        launch(kernel, torch.zeros(12, dtype=INT))


def test_an_endless_while_loop_is_an_error(monkeypatch):
    @T.prim_func
    def kernel(flag: T.Tensor[(1,), T.int32]):
        with T.Kernel(1, threads=32) as _:
            while flag[0] == 0:
                T.sync_threads()

    monkeypatch.setattr(statements, "_MAX_WHILE_TRIPS", 100)
    with pytest.raises(interp.InterpreterError, match="more than 100 times"):
        launch(kernel, torch.zeros(1, dtype=INT))


# ------------------------------------------------------------------------------ arguments
def dims_kernel():
    m, n = T.dynamic("m"), T.dynamic("n")

    @T.prim_func
    def kernel(x: T.Tensor[(m, n), T.float32], y: T.Tensor[(n, m * 2), T.float32]):
        with T.Kernel(1, threads=32) as _:
            for i, j in T.Parallel(n, m * 2):
                y[i, j] = x[j // 2, i]

    return kernel


def test_dynamic_shapes_come_from_the_arguments():
    x = torch.randn(3, 5)
    y = launch(dims_kernel(), x, torch.empty(5, 6))
    assert torch.equal(y, x.T.repeat_interleave(2, 1))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(4, 6), r"requires y.shape\[0\] \(n\) == 5, got 4"),
        (torch.zeros(3, 5), torch.zeros(5, 7), r"requires y.shape\[1\] == 6, got 7"),
        (torch.zeros(3, 5), torch.zeros(5), r"requires y.ndim == 2, got 1"),
        (
            torch.zeros(3, 5).double(),
            torch.zeros(5, 6),
            r"requires x.dtype == torch.float32, got torch.float64",
        ),
        (torch.zeros(5, 3).T, torch.zeros(5, 6), r"requires x.stride\[0\] == 5, got 1"),
        (3, torch.zeros(5, 6), r"requires a tensor for x, got int"),
        (torch.zeros(3, 5, device="meta"), torch.zeros(5, 6), r"requires x.device == cpu, got meta"),
    ],
)
def test_arguments_that_do_not_fit(x, y, message):
    with pytest.raises(interp.InterpreterError, match=message):
        launch(dims_kernel(), x, y)


def test_number_of_arguments():
    with pytest.raises(interp.InterpreterError, match="requires 2 arguments, got 1"):
        interp.run(dims_kernel(), torch.zeros(3, 5))


def test_scalar_parameters():
    @T.prim_func
    def scale(x: T.Tensor[(8,), T.float32], a: T.float32, n: T.int32, y: T.Tensor[(8,), T.float32]):
        with T.Kernel(1, threads=32) as _:
            for i in T.Parallel(8):
                y[i] = T.if_then_else(i < n, x[i] * a, T.float32(0))

    x = torch.randn(8)
    y = launch(scale, x, 2.5, 5, torch.empty(8))
    assert torch.equal(y, torch.cat([x[:5] * 2.5, torch.zeros(3)]))
    with pytest.raises(interp.InterpreterError, match="requires n to fit int32"):
        interp.run(scale, x, 2.5, 2**31, torch.empty(8))
    with pytest.raises(interp.InterpreterError, match="requires a scalar for n, got float"):
        interp.run(scale, x, 2.5, 1.5, torch.empty(8))


def test_packed_fp4_argument_must_be_contiguous():
    @T.prim_func
    def kernel(x: T.Tensor[(4, 8), T.float4_e2m1fn], y: T.Tensor[(4, 8), T.float32]):
        with T.Kernel(1, threads=32) as _:
            for i, j in T.Parallel(4, 8):
                y[i, j] = T.cast(x[i, j], "float32")

    x = torch.zeros(4, 4, dtype=torch.uint8)
    launch(kernel, x, torch.empty(4, 8))
    with pytest.raises(interp.InterpreterError, match="requires x contiguous"):
        launch(kernel, x.T, torch.empty(4, 8))


# ------------------------------------------------------------------------------ entry points
def test_run_function_takes_the_parsed_tile_stage():
    function = extract.tile_function(grid_kernel())
    assert isinstance(function, ir.Function)
    x = torch.ones(4, 8, 8, dtype=INT)
    y = torch.empty_like(x)
    interp.run_function(function, (x, y))
    assert torch.equal(y, x * 3)


def test_tile_function_is_the_tile_stage_of_extract():
    def shape(function):
        return [(type(node).__name__, getattr(node, "op", None)) for node in ir.walk(function.body)]

    kernel = dims_kernel()
    assert shape(extract.tile_function(kernel)) == shape(extract.extract(kernel).tile)
    assert extract.tile_function(kernel) is extract.tile_function(kernel)


def test_the_interpret_backend_runs_the_interpreter():
    def make_kernel(block):
        return grid_kernel(block)

    x = torch.ones(4, 8, 8, dtype=INT)
    y = torch.empty_like(x)
    with dsv4_kernels.backend("interpret"):
        runtime.launch(make_kernel, {"block": 4}, (x, y))
    assert y[0, 7, 7] == 3 + 100 + 1
