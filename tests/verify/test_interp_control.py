"""The tile interpreter: control flow, launch grids, threads, local variables and views."""

# pyright: reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false
# TileLang's language is typed for the tracer that runs it, not for the kernels written in it.

import pytest
import tilelang.language as T
import torch

from tests.verify.interp_programs import INT, grid_kernel, launch
from verify import interp
from verify.interp import machine


# ------------------------------------------------------------------------------ grids and loops
@pytest.mark.parametrize("chunk", [1, 64, 1 << 21])
def test_three_dimensional_grid_in_chunks_of_any_size(chunk, monkeypatch):
    monkeypatch.setattr(machine, "_CHUNK_ELEMENTS", chunk)
    x = torch.randint(-99, 99, (4, 21, 30), dtype=INT)
    y = launch(grid_kernel(), x, torch.empty_like(x))
    rows, columns = torch.arange(21)[:, None] // 8, torch.arange(30) // 8
    assert torch.equal(y, (x * 3 + rows * 100 + columns).to(INT))


@pytest.mark.parametrize("chunk", [1, 3, 1 << 21])
def test_every_block_runs_once(chunk, monkeypatch):
    @T.prim_func
    def count(blocks: T.Tensor[(1,), T.int32]):
        with T.Kernel(7, 5, threads=32) as (_x, _y):
            T.atomic_add(blocks[0], 1)

    monkeypatch.setattr(machine, "_CHUNK_ELEMENTS", chunk)
    assert launch(count, torch.zeros(1, dtype=INT)).item() == 35


@pytest.mark.parametrize("shape", [(4, 0, 30), (4, 21, 0)])
def test_an_empty_grid_does_nothing(shape):
    x = torch.empty(shape, dtype=INT)
    launch(grid_kernel(), x, torch.empty_like(x))


def test_serial_loop_with_a_bound_of_its_own_in_each_block():
    @T.prim_func
    def triangle(y: T.Tensor[(6,), T.int32]):
        with T.Kernel(6, threads=32) as b:
            total = T.alloc_var("int32", init=0)
            for i in T.serial(b + 1):
                total += i
            y[b] = total

    assert launch(triangle, torch.empty(6, dtype=INT)).tolist() == [0, 1, 3, 6, 10, 15]


def test_serial_loop_with_a_bound_read_from_memory():
    @T.prim_func
    def sums(count: T.Tensor[(5,), T.int32], x: T.Tensor[(5, 8), T.int32], y: T.Tensor[(5,), T.int32]):
        with T.Kernel(5, threads=32) as b:
            total = T.alloc_var("int32", init=0)
            for i in T.serial(count[b]):
                total += x[b, i]
            y[b] = total

    count, x = torch.tensor([0, 8, 3, 1, 5], dtype=INT), torch.randint(0, 99, (5, 8), dtype=INT)
    y = launch(sums, count, x, torch.empty(5, dtype=INT))
    assert y.tolist() == [int(x[i, :c].sum()) for i, c in enumerate(count.tolist())]


def test_while_loops_end_in_each_block_on_their_own():
    @T.prim_func
    def collatz(x: T.Tensor[(20,), T.int32], y: T.Tensor[(20,), T.int32]):
        with T.Kernel(20, threads=32) as b:
            v = T.alloc_var("int32")
            steps = T.alloc_var("int32", init=0)
            v = x[b]
            while v != 1:
                v = T.if_then_else(v % 2 == 0, v // 2, 3 * v + 1)
                steps += 1
            y[b] = steps

    def steps(v):
        return 0 if v == 1 else 1 + steps(v // 2 if v % 2 == 0 else 3 * v + 1)

    y = launch(collatz, torch.arange(1, 21, dtype=INT), torch.empty(20, dtype=INT))
    assert y.tolist() == [steps(v) for v in range(1, 21)]


def test_break_leaves_the_loop_only_for_the_blocks_that_break():
    @T.prim_func
    def first(x: T.Tensor[(6, 8), T.int32], y: T.Tensor[(6,), T.int32], after: T.Tensor[(6,), T.int32]):
        with T.Kernel(6, threads=32) as b:
            y[b] = -1
            after[b] = 0
            for i in T.serial(8):
                if x[b, i] > 0:
                    y[b] = i
                    break
                after[b] += 1

    x = torch.zeros(6, 8, dtype=INT)
    for row, column in ((0, 0), (1, 3), (2, 7), (4, 3), (4, 5)):
        x[row, column] = 1
    y, after = torch.empty(6, dtype=INT), torch.empty(6, dtype=INT)
    interp.run(first, x, y, after)
    assert y.tolist() == [0, 3, 7, -1, 3, -1]
    assert after.tolist() == [0, 3, 7, 8, 3, 8]


def test_break_for_every_block_at_once():
    @T.prim_func
    def five(y: T.Tensor[(3,), T.int32]):
        with T.Kernel(3, threads=32) as b:
            y[b] = 0
            for i in T.serial(10):
                if i == 5:
                    break
                y[b] += 1

    assert launch(five, torch.empty(3, dtype=INT)).tolist() == [5, 5, 5]


def test_branches_that_differ_between_blocks_and_lanes():
    @T.prim_func
    def branch(x: T.Tensor[(4, 16), T.float32], y: T.Tensor[(4, 16), T.float32]):
        with T.Kernel(4, threads=32) as b:
            tile = T.alloc_fragment((16,), T.float32)
            if b % 2 == 0:
                T.copy(x[b, 0:16], tile)
            else:
                T.fill(tile, -1)
            for i in T.Parallel(16):
                if tile[i] > 0:
                    y[b, i] = tile[i]
                else:
                    y[b, i] = 100 + i

    x = torch.randn(4, 16)
    y = launch(branch, x, torch.empty(4, 16))
    filled = torch.where(torch.tensor([True, False, True, False])[:, None], x, -1.0)
    assert torch.equal(y, torch.where(filled > 0, filled, 100 + torch.arange(16.0)))


def test_tile_ops_run_only_in_the_active_blocks():
    @T.prim_func
    def kernel(x: T.Tensor[(3, 16, 16), T.bfloat16], y: T.Tensor[(3, 16, 16), T.float32]):
        with T.Kernel(3, threads=128) as b:
            s = T.alloc_shared((16, 16), T.bfloat16)
            acc = T.alloc_fragment((16, 16), T.float32)
            T.clear(acc)
            T.copy(x[b, 0:16, 0:16], s)
            if b == 1:
                T.gemm(s, s, acc)
            T.copy(acc, y[b, 0:16, 0:16])

    x = torch.randint(-3, 4, (3, 16, 16)).bfloat16()
    y = launch(kernel, x, torch.empty(3, 16, 16))
    assert torch.equal(y[1], x[1].float() @ x[1].float())
    assert not y[0].any()
    assert not y[2].any()


def test_persistent_loop_visits_every_tile_once():
    m = T.dynamic("m")

    @T.prim_func
    def persistent(y: T.Tensor[(m, 64), T.int32]):
        with T.Kernel(5, threads=64) as block:
            for bx, by in T.Persistent([T.ceildiv(m, 8), 4], 5, block):
                for i, j in T.Parallel(8, 16):
                    y[bx * 8 + i, by * 16 + j] += bx * 10 + by

    y = launch(persistent, torch.zeros(43, 64, dtype=INT))
    want = torch.arange(43)[:, None] // 8 * 10 + torch.arange(64) // 16
    assert torch.equal(y, want.to(INT))


def test_unrolled_vectorized_and_pipelined_loops_run_in_order():
    @T.prim_func
    def loops(y: T.Tensor[(3,), T.int32]):
        with T.Kernel(1, threads=32) as _:
            v = T.alloc_var("int32", init=1)
            for i in T.unroll(3):
                v = v * 2 + i
            y[0] = v
            for i in T.vectorized(4):
                v = v * 2 + i
            y[1] = v
            for i in T.Pipelined(3, num_stages=2):
                v = v * 2 + i
            y[2] = v

    v, want = 1, []
    for trips in (3, 4, 3):
        for i in range(trips):
            v = v * 2 + i
        want.append(v)
    assert launch(loops, torch.empty(3, dtype=INT)).tolist() == want


# ------------------------------------------------------------------------------ T.Parallel
def test_parallel_indices_with_strides_offsets_and_repeats():
    @T.prim_func
    def kernel(x: T.Tensor[(64,), T.int32], y: T.Tensor[(4, 8), T.int32], z: T.Tensor[(8,), T.int32]):
        with T.Kernel(1, threads=32) as _:
            s = T.alloc_shared((64,), T.int32)
            T.copy(x, s)
            for i, j in T.Parallel(4, 8):
                y[i, j] = s[i * 16 + j * 2 + 1] - s[63 - (i * 8 + j)] + s[(i * 8 + j) // 3]
            for _, j in T.Parallel(4, 8):
                z[j] = s[j * j]

    x = torch.randint(-999, 999, (64,), dtype=INT)
    y, z = torch.empty(4, 8, dtype=INT), torch.empty(8, dtype=INT)
    interp.run(kernel, x, y, z)
    for i in range(4):
        for j in range(8):
            assert y[i, j] == x[i * 16 + j * 2 + 1] - x[63 - (i * 8 + j)] + x[(i * 8 + j) // 3]
    assert z.tolist() == [int(x[j * j]) for j in range(8)]


def test_lanes_that_write_the_same_to_one_element():
    @T.prim_func
    def kernel(x: T.Tensor[(4, 8), T.int32], y: T.Tensor[(8,), T.int32], z: T.Tensor[(11,), T.int32]):
        with T.Kernel(1, threads=32) as _:
            for i, j in T.Parallel(4, 8):
                y[j] = x[i, j]
            for i, j in T.Parallel(4, 8):
                z[i + j] = i + j

    row = torch.randint(0, 99, (8,), dtype=INT)
    y, z = torch.empty(8, dtype=INT), torch.empty(11, dtype=INT)
    interp.run(kernel, row.expand(4, 8).contiguous(), y, z)
    assert torch.equal(y, row)
    assert z.tolist() == [*range(11)]


def test_gather_through_an_index_tensor():
    @T.prim_func
    def gather(
        x: T.Tensor[(10, 8), T.float32], index: T.Tensor[(6,), T.int32], y: T.Tensor[(6, 8), T.float32]
    ):
        with T.Kernel(2, threads=32) as b:
            s = T.alloc_shared((3, 8), T.float32)
            for i, j in T.Parallel(3, 8):
                s[i, j] = x[index[b * 3 + i], j]
            T.copy(s, y[b * 3, 0])

    x = torch.randn(10, 8)
    index = torch.tensor([9, 0, 3, -1, 10, 3], dtype=INT)
    y = launch(gather, x, index, torch.empty(6, 8))
    want = torch.where(((index >= 0) & (index < 10))[:, None], x[index.clamp(0, 9)], 0.0)
    assert torch.equal(y, want)


def test_a_variable_inside_parallel_is_each_lanes_own():
    @T.prim_func
    def sums(x: T.Tensor[(16, 4), T.int32], y: T.Tensor[(16,), T.int32]):
        with T.Kernel(1, threads=32) as _:
            total = T.alloc_var("int32")
            for i in T.Parallel(16):
                total = 0
                for k in T.serial(4):
                    if x[i, k] > 0:
                        total += x[i, k]
                y[i] = total

    x = torch.randint(-9, 9, (16, 4), dtype=INT)
    assert torch.equal(launch(sums, x, torch.empty(16, dtype=INT)), x.clamp(min=0).sum(1).to(INT))


def test_a_variable_left_by_a_parallel_loop_cannot_be_read():
    @T.prim_func
    def leak(x: T.Tensor[(16,), T.int32], y: T.Tensor[(1,), T.int32]):
        with T.Kernel(1, threads=32) as _:
            last = T.alloc_var("int32", init=0)
            for i in T.Parallel(16):
                last = x[i]
            y[0] = last

    with pytest.raises(interp.InterpreterError, match=r"last holds what lanes of an ended T\.Parallel"):
        launch(leak, torch.arange(16, dtype=INT), torch.empty(1, dtype=INT))


def test_parallel_loop_with_an_extent_of_its_own_in_each_block():
    @T.prim_func
    def fill(y: T.Tensor[(4, 4), T.int32]):
        with T.Kernel(4, threads=32) as b:
            for i in T.Parallel(b + 1):
                y[b, i] = 1

    assert torch.equal(launch(fill, torch.zeros(4, 4, dtype=INT)), torch.ones(4, 4, dtype=INT).tril())


# ------------------------------------------------------------------------------ threads
def test_threads_have_their_own_locals():
    @T.prim_func
    def rotate(x: T.Tensor[(2, 64), T.int32], y: T.Tensor[(2, 64), T.int32]):
        with T.Kernel(2, threads=64) as b:
            tx = T.get_thread_binding()
            s = T.alloc_shared((64,), T.int32)
            mine = T.alloc_local((2,), T.int32)
            mine[0] = x[b, tx]
            mine[1] = 0
            s[tx] = mine[0]
            T.sync_threads()
            for i in T.serial(3):
                mine[1] += s[(tx + i) % 64]
            if tx % 2 == 0:
                mine[1] = -mine[1]
            y[b, tx] = mine[1]

    x = torch.randint(-99, 99, (2, 64), dtype=INT)
    want = x + x.roll(-1, 1) + x.roll(-2, 1)
    want[:, ::2] *= -1
    assert torch.equal(launch(rotate, x, torch.empty_like(x)), want)


def test_tile_ops_beside_thread_code():
    @T.prim_func
    def kernel(x: T.Tensor[(64,), T.float32], y: T.Tensor[(64,), T.float32]):
        with T.Kernel(1, threads=64) as _:
            tx = T.get_thread_binding()
            s = T.alloc_shared((64,), T.float32)
            T.copy(x, s)
            if tx < 8:
                s[tx] = 0
            for i in T.Parallel(64):
                s[i] = s[i] + 1
            T.copy(s, y)

    x = torch.randn(64)
    want = x.clone()
    want[:8] = 0
    assert torch.equal(launch(kernel, x, torch.empty(64)), want + 1)


def test_block_wide_work_of_some_threads_is_done():
    @T.prim_func
    def kernel(x: T.Tensor[(2, 64), T.float32], y: T.Tensor[(2, 64), T.float32]):
        with T.Kernel(2, threads=64) as b:
            tx = T.get_thread_binding()
            s = T.alloc_shared((64,), T.float32)
            T.copy(x[b, 0:64], s)
            if tx < 32 and b == 1:
                for i in T.Parallel(64):
                    s[i] = s[i] * 2
            if tx >= 64:
                T.clear(s)
            T.copy(s, y[b, 0:64])

    x = torch.randn(2, 64)
    assert torch.equal(launch(kernel, x, torch.empty(2, 64)), x * torch.tensor([[1.0], [2.0]]))


def test_the_thread_index_inside_parallel_is_unsupported():
    @T.prim_func
    def kernel(y: T.Tensor[(64,), T.int32]):
        with T.Kernel(1, threads=64) as _:
            tx = T.get_thread_binding()
            for i in T.Parallel(64):
                y[i] = tx

    with pytest.raises(interp.UnsupportedOpError, match="block-wide"):
        launch(kernel, torch.empty(64, dtype=INT))


def test_two_dimensional_thread_index():
    @T.prim_func
    def kernel(y: T.Tensor[(4, 32), T.int32]):
        with T.Kernel(1, threads=(32, 4)) as _:
            tx = T.get_thread_binding(0)
            ty = T.get_thread_binding(1)
            y[ty, tx] = tx * 10 + ty

    want = torch.arange(32) * 10 + torch.arange(4)[:, None]
    assert torch.equal(launch(kernel, torch.zeros(4, 32, dtype=INT)), want.to(INT))


def test_tile_ops_on_a_threads_own_array_run_in_each_thread():
    @T.prim_func
    def kernel(x: T.Tensor[(32, 4), T.int32], y: T.Tensor[(32, 4), T.int32]):
        with T.Kernel(1, threads=32) as _:
            tx = T.get_thread_binding()
            mine = T.alloc_local((4,), T.int32)
            T.clear(mine)
            if tx % 2 == 0:
                T.copy(x[tx, 0:4], mine)
            for k in T.serial(4):
                y[tx, 3 - k] = mine[k] + 1

    x = torch.randint(0, 99, (32, 4), dtype=INT)
    want = x.flip(1) + 1
    want[1::2] = 1
    assert torch.equal(launch(kernel, x, torch.empty_like(x)), want)


def test_a_local_array_inside_parallel_is_each_lanes_own_and_gone_after_it():
    def make_kernel(reads_after):
        @T.prim_func
        def kernel(x: T.Tensor[(8,), T.int32], y: T.Tensor[(8,), T.int32]):
            with T.Kernel(1, threads=32) as _:
                mine = T.alloc_local((2,), T.int32)
                for i in T.Parallel(8):
                    mine[0] = x[i]
                    mine[1] = mine[0] + 1
                    y[i] = mine[0] + mine[1]
                if reads_after:
                    y[0] = mine[1]

        return kernel

    x = torch.randint(0, 99, (8,), dtype=INT)
    assert torch.equal(launch(make_kernel(False), x, torch.empty_like(x)), 2 * x + 1)
    with pytest.raises(interp.InterpreterError, match=r"mine holds what lanes of an ended T\.Parallel"):
        launch(make_kernel(True), x, torch.empty_like(x))


# ------------------------------------------------------------------------------ views
def test_bytes_seen_as_fp4_in_a_fragment():
    @T.prim_func
    def expand(x: T.Tensor[(4, 8), T.uint8], y: T.Tensor[(4, 16), T.float32]):
        with T.Kernel(1, threads=32) as _:
            packed = T.alloc_fragment((4, 8), T.uint8)
            T.copy(x, packed)
            T.copy(T.view(packed, (4, 16), T.float4_e2m1fn), y)

    x = torch.randint(0, 256, (4, 8), dtype=torch.uint8)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat([table, -table])
    want = torch.stack((table[(x & 15).long()], table[(x >> 4).long()]), -1).view(4, 16)
    assert torch.equal(launch(expand, x, torch.empty(4, 16)), want)


def test_a_write_through_a_view_is_a_write_to_the_buffer():
    @T.prim_func
    def kernel(x: T.Tensor[(16,), T.float32], bits: T.Tensor[(16,), T.int32], low: T.Tensor[(8,), T.uint8]):
        with T.Kernel(1, threads=32) as _:
            words = T.alloc_shared((16,), T.int32)
            T.copy(x, T.view(words, (16,), T.float32))
            T.copy(words, bits)
            octets = T.alloc_shared((8,), T.uint8)
            T.copy(x, T.view(octets, (16,), T.float4_e2m1fn))
            T.copy(octets, low)

    x = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6, -6, 0, 0, 0, 0, 0, 0, 0, -0.5])
    bits = torch.empty(16, dtype=INT)
    low = launch(kernel, x, bits, torch.empty(8, dtype=torch.uint8))
    assert torch.equal(bits, x.view(INT))
    assert low.tolist() == [0x21, 0x43, 0x65, 0xF7, 0, 0, 0, 0x90]


def test_a_view_of_an_argument():
    @T.prim_func
    def kernel(x: T.Tensor[(4, 2), T.int32], y: T.Tensor[(8,), T.uint8]):
        with T.Kernel(1, threads=32) as _:
            octets = T.view(x, (4, 8), T.uint8)
            words = T.view(y, (2,), T.int32)
            words[0] = x[1, 1]
            words[1] = T.cast(octets[3, 5], "int32")

    x = torch.tensor([[1, 2], [3, 0x11223344], [5, 6], [7, 0x55667788]], dtype=INT)
    y = launch(kernel, x, torch.zeros(8, dtype=torch.uint8))
    assert y.tolist() == [0x44, 0x33, 0x22, 0x11, 0x77, 0, 0, 0]


def test_another_shape_of_the_same_buffer():
    @T.prim_func
    def kernel(x: T.Tensor[(4, 8), T.int32], y: T.Tensor[(8, 4), T.int32]):
        with T.Kernel(1, threads=32) as _:
            tile = T.alloc_shared((4, 8), T.int32)
            T.copy(x, tile)
            T.copy(T.reshape(tile, (8, 4)), y)

    x = torch.arange(32, dtype=INT).view(4, 8)
    assert torch.equal(launch(kernel, x, torch.empty(8, 4, dtype=INT)), x.view(8, 4))
