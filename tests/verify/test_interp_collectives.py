"""Operations of several lanes together, against plain statements of them: warps, reducers, scans, packs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tilelang import language as T

from verify import interp

WARP = 32
THREADS = 2 * WARP
EDGES = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 2.0**-140, -(2.0**-140), 1.0, -3.5)
FLOATS = st.lists(st.sampled_from(EDGES) | st.floats(width=32), min_size=THREADS, max_size=THREADS)
INTS = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=THREADS, max_size=THREADS)


def by_thread(operation, dtype, out_dtype=None):
    """Return a kernel: out[thread] = operation(x[thread])."""

    @T.prim_func
    def kernel(x: T.Tensor[(THREADS,), dtype], out: T.Tensor[(THREADS,), out_dtype or dtype]):
        with T.Kernel(1, threads=THREADS):
            tx = T.get_thread_binding()
            out[tx] = operation(x[tx])

    return kernel


def run_by_thread(operation, values, dtype=torch.float32, out_dtype=None):
    names = {torch.float32: T.float32, torch.int32: T.int32, torch.int64: T.uint64, None: None}
    x = torch.tensor(values, dtype=dtype)
    out = torch.empty(THREADS, dtype=torch.uint64 if out_dtype == torch.int64 else out_dtype or dtype)
    interp.run(by_thread(operation, names[dtype], names[out_dtype]), x, out)
    return x, out


def bits(tensor):
    return torch.where(tensor.isnan(), torch.nan, tensor).view(torch.int32)


def shuffled(x, source):
    """Return x as each thread of a warp reads it from lane source(lane)."""
    lanes = [w * WARP + source(lane) for w in range(THREADS // WARP) for lane in range(WARP)]
    return x[torch.tensor(lanes)]


@settings(max_examples=5)
@given(values=FLOATS)
@pytest.mark.parametrize("delta", [1, 4, 16])
def test_shuffles(values, delta):
    cases = (
        (lambda v: T.shfl_xor(v, delta), lambda lane: lane ^ delta),
        (lambda v: T.shfl_sync(v, delta), lambda lane: delta),
        (lambda v: T.shfl_up(v, delta), lambda lane: lane - delta if lane >= delta else lane),
        (lambda v: T.shfl_down(v, delta), lambda lane: lane + delta if lane + delta < WARP else lane),
    )
    for operation, source in cases:
        x, out = run_by_thread(operation, values)
        assert torch.equal(bits(out), bits(shuffled(x, source)))


@settings(max_examples=8)
@given(values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=THREADS, max_size=THREADS))
def test_warp_sums_add_in_the_order_of_the_butterfly(values):
    x, out = run_by_thread(T.warp_reduce_sum, values)
    for warp in range(THREADS // WARP):
        part = x[warp * WARP : (warp + 1) * WARP]
        for step in (16, 8, 4, 2, 1):
            part = part + part[torch.arange(WARP) ^ step]
        assert torch.equal(out[warp * WARP : (warp + 1) * WARP], part)


@settings(max_examples=6)
@given(values=INTS)
def test_warp_reductions_of_integers(values):
    x = torch.tensor(values, dtype=torch.int32).view(-1, WARP)
    for operation, want in (
        (T.warp_reduce_max, x.amax(1)),
        (T.warp_reduce_min, x.amin(1)),
        (T.warp_reduce_sum, x.sum(1).to(torch.int32)),
    ):
        got = run_by_thread(operation, values, torch.int32)[1]
        assert torch.equal(got.view(-1, WARP), want.unsqueeze(1).expand(-1, WARP))


@settings(max_examples=6)
@given(values=st.lists(st.integers(0, 3), min_size=THREADS, max_size=THREADS))
def test_votes(values):
    x = torch.tensor(values)
    lanes = 1 << torch.arange(WARP)
    positive = ((x.view(-1, WARP) > 0) * lanes).sum(1).repeat_interleave(WARP)
    ballot = run_by_thread(lambda v: T.ballot_sync(v > 0), values, torch.int32, torch.int64)[1]
    assert ballot.to(torch.int64).tolist() == positive.tolist()
    some = run_by_thread(lambda v: T.any_sync(v == 3), values, torch.int32)[1]
    assert [bool(s) for s in some] == [3 in values[i // WARP * WARP :][:WARP] for i in range(THREADS)]
    every = run_by_thread(lambda v: T.all_sync(v < 3), values, torch.int32)[1]
    assert [bool(e) for e in every] == [3 not in values[i // WARP * WARP :][:WARP] for i in range(THREADS)]


def test_a_shuffle_from_a_thread_that_does_not_take_part_is_an_error():
    @T.prim_func
    def kernel(x: T.Tensor[(THREADS,), T.float32], out: T.Tensor[(THREADS,), T.float32]):
        with T.Kernel(1, threads=THREADS):
            tx = T.get_thread_binding()
            if tx % WARP < 8:
                out[tx] = T.shfl_xor(x[tx], 16)

    with pytest.raises(interp.InterpreterError, match=r"test_interp_collectives.py:\d+: shfl_xor_sync"):
        interp.run(kernel, torch.ones(THREADS), torch.empty(THREADS))


# --------------------------------------------------------------------------- reducers and accumulation
ROWS, COLUMNS = 4, 16


def reducing(op, dtype):
    @T.prim_func
    def kernel(x: T.Tensor[(ROWS, COLUMNS), dtype], out: T.Tensor[(ROWS,), dtype]):
        with T.Kernel(1, threads=32):
            acc = T.alloc_reducer((ROWS,), dtype, op)
            result = T.alloc_fragment((ROWS,), dtype)
            T.reducer_init(acc)
            for i, j in T.Parallel(ROWS, COLUMNS):
                T.reducer_update(acc[i], x[i, j])
            T.finalize_reducer(acc, result)
            T.copy(result, out)

    return kernel


@settings(max_examples=6)
@given(values=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=64, max_size=64))
@pytest.mark.parametrize("op", ["sum", "max", "min", "bitand", "bitor", "bitxor"])
def test_reducers_of_integers(values, op):
    x = torch.tensor(values, dtype=torch.int32).view(ROWS, COLUMNS)
    out = torch.empty(ROWS, dtype=torch.int32)
    interp.run(reducing(op, T.int32), x, out)
    for row, got in zip(x.tolist(), out.tolist(), strict=True):
        want = row[0]
        for value in row[1:]:
            want = {
                "sum": lambda a, b: a + b,
                "max": max,
                "min": min,
                "bitand": lambda a, b: a & b,
                "bitor": lambda a, b: a | b,
                "bitxor": lambda a, b: a ^ b,
            }[op](want, value)
        assert got == (want + 2**31) % 2**32 - 2**31


@settings(max_examples=10)
@given(values=st.lists(st.sampled_from(EDGES) | st.floats(width=32), min_size=64, max_size=64))
@pytest.mark.parametrize("op", ["max", "min"])
def test_reducers_of_floats_lose_nan_and_order_zeros(values, op):
    x = torch.tensor(values).view(ROWS, COLUMNS)
    out = torch.empty(ROWS)
    interp.run(reducing(op, T.float32), x, out)
    start = float("-inf") if op == "max" else float("inf")
    for row, got in zip(x, out, strict=True):
        kept = [*row[~row.isnan()].tolist(), start]
        want = (max if op == "max" else min)(kept, key=lambda v: (v, torch.tensor(v).signbit().logical_not()))
        assert torch.equal(bits(got), bits(torch.tensor(want)))


def test_a_loop_accumulates_into_a_fragment():
    @T.prim_func
    def kernel(x: T.Tensor[(ROWS, COLUMNS), T.float32], out: T.Tensor[(ROWS, 2), T.float32]):
        with T.Kernel(1, threads=32):
            acc = T.alloc_fragment((ROWS, 2), T.float32)
            T.fill(acc, -T.infinity(T.float32))
            for i, j in T.Parallel(ROWS, COLUMNS):
                acc[i, j % 2] = T.max(acc[i, j % 2], x[i, j])
            T.copy(acc, out)

    x, out = torch.randn(ROWS, COLUMNS), torch.empty(ROWS, 2)
    interp.run(kernel, x, out)
    assert torch.equal(out, x.view(ROWS, COLUMNS // 2, 2).amax(1))


# --------------------------------------------------------------------------- scans and packs
@settings(max_examples=8)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=64, max_size=64),
    reverse=st.booleans(),
)
def test_cummax(values, reverse):
    @T.prim_func
    def kernel(x: T.Tensor[(ROWS, COLUMNS), T.float32], out: T.Tensor[(ROWS, COLUMNS), T.float32]):
        with T.Kernel(1, threads=32):
            s = T.alloc_shared((ROWS, COLUMNS), T.float32)
            T.copy(x, s)
            T.cummax(s, dim=1, reverse=reverse)
            T.copy(s, out)

    x = torch.tensor(values).view(ROWS, COLUMNS)
    out = torch.empty_like(x)
    interp.run(kernel, x, out)
    want = x.flip(1).cummax(1).values.flip(1) if reverse else x.cummax(1).values
    assert torch.equal(out, want)


def test_packed_atomics_and_truth_of_a_buffer():
    @T.prim_func
    def kernel(
        x: T.Tensor[(THREADS, 4), T.float32],
        total: T.Tensor[(4,), T.float32],
        pair: T.Tensor[(2,), T.float32],
        found: T.Tensor[(2,), T.int32],
    ):
        with T.Kernel(1, threads=THREADS):
            tx = T.get_thread_binding()
            T.atomic_addx4(total[0], x[tx, 0])
            T.atomic_addx2(pair[0], x[tx, 2])
            flags = T.alloc_shared((THREADS,), T.bool)
            flags[tx] = x[tx, 0] > 3
            if T.any_of(flags):
                found[0] = 1
            if T.all_of(flags):
                found[1] = 1

    x = torch.arange(4.0 * THREADS).view(THREADS, 4)
    total, pair, found = torch.zeros(4), torch.ones(2), torch.zeros(2, dtype=torch.int32)
    interp.run(kernel, x, total, pair, found)
    assert torch.equal(total, x.sum(0))
    assert torch.equal(pair, 1 + x[:, 2:].sum(0))
    assert found.tolist() == [1, 0]
