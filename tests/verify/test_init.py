"""init: registers, shared memory, pipelines and outputs that are read before they are written."""

from dataclasses import replace
from typing import Any

import pytest
from tilelang import language as T

from dsv4_kernels.contract import Contract
from tests.verify.samples import SOUND, calls, context, nodes, verdict
from verify import ir
from verify.properties.init import PROPERTY
from verify.signature.dispatch import Dispatch
from verify.verdict import Verdict

WIDTH = 32


def cleared_sum(is_cleared: bool) -> Any:
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, WIDTH), T.float32], out: T.Tensor[(m,), T.float32]):
        with T.Kernel(T.ceildiv(m, WIDTH), threads=WIDTH) as bm:
            total = T.alloc_fragment((WIDTH,), T.float32)
            if is_cleared:
                T.clear(total)
            for k in T.serial(WIDTH):
                for i in T.Parallel(WIDTH):
                    total[i] += x[bm * WIDTH + i, k]
            for i in T.Parallel(WIDTH):
                out[bm * WIDTH + i] = total[i]

    return kernel


def half_filled_shared(rows: int) -> Any:
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m, WIDTH), T.float32], out: T.Tensor[(m, WIDTH), T.float32]):
        with T.Kernel(T.ceildiv(m, 8), threads=WIDTH) as bm:
            tile = T.alloc_shared((8, WIDTH), T.float32)
            for i, j in T.Parallel(rows, WIDTH):
                tile[i, j] = x[bm * 8 + i, j]
            for i, j in T.Parallel(8, WIDTH):
                out[bm * 8 + i, j] = tile[7 - i, j]

    return kernel


def ragged_tail(is_filled: bool) -> Any:
    """Rows beyond the tail are read by their neighbours; only a fill makes them defined."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m,), T.float32], out: T.Tensor[(m,), T.float32]):
        with T.Kernel(T.ceildiv(m, WIDTH), threads=WIDTH) as bm:
            tile = T.alloc_shared((WIDTH,), T.float32)
            for i in T.Parallel(WIDTH):
                if is_filled:
                    tile[i] = T.if_then_else(bm * WIDTH + i < m, x[bm * WIDTH + i], 0.0)
                else:
                    if bm * WIDTH + i < m:
                        tile[i] = x[bm * WIDTH + i]
            for i in T.Parallel(WIDTH):
                out[bm * WIDTH + i] = tile[i] + tile[WIDTH - 1 - i]

    return kernel


def guarded_alike() -> Any:
    """Written and read under one condition."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m,), T.float32], out: T.Tensor[(m,), T.float32]):
        with T.Kernel(T.ceildiv(m, WIDTH), threads=WIDTH) as bm:
            tile = T.alloc_shared((WIDTH,), T.float32)
            for i in T.Parallel(WIDTH):
                if bm * WIDTH + i < m:
                    tile[i] = x[bm * WIDTH + i]
            for i in T.Parallel(WIDTH):
                if bm * WIDTH + i < m:
                    out[bm * WIDTH + i] = tile[i]

    return kernel


def accumulated_output() -> Any:
    m = T.dynamic("m")

    @T.prim_func
    def kernel(x: T.Tensor[(m,), T.float32], out: T.Tensor[(m,), T.float32]):
        with T.Kernel(T.ceildiv(m, WIDTH), threads=WIDTH) as bm:
            for i in T.Parallel(WIDTH):
                out[bm * WIDTH + i] = out[bm * WIDTH + i] + x[bm * WIDTH + i]

    return kernel


def accumulating_product(is_cleared: bool) -> Any:
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, 256), T.bfloat16],
        w: T.Tensor[(64, 256), T.bfloat16],
        out: T.Tensor[(m, 64), T.bfloat16],
    ):
        with T.Kernel(T.ceildiv(m, 64), threads=128) as bm:
            x_tile = T.alloc_shared((64, 64), T.bfloat16)
            w_tile = T.alloc_shared((64, 64), T.bfloat16)
            acc = T.alloc_fragment((64, 64), T.float32)
            for ko in T.Pipelined(4, num_stages=2):
                T.copy(x[bm * 64, ko * 64], x_tile)
                T.copy(w[0, ko * 64], w_tile)
                T.gemm(x_tile, w_tile, acc, transpose_B=True, clear_accum=is_cleared)
            for i, j in T.Parallel(64, 64):
                out[bm * 64 + i, j] = T.cast(acc[i, j], "bfloat16")

    return kernel


def read_by_the_last(is_filled: bool) -> Any:
    """Thread t reads in the last t blocks: thread 0, the first that reads nothing written, never does."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(out: T.Tensor[(m, WIDTH), T.float32]):
        with T.Kernel(m, threads=WIDTH) as bx:
            tx = T.get_thread_binding(0)
            tile = T.alloc_shared((WIDTH,), T.float32)
            if is_filled:
                tile[tx] = 1.0
            if bx + tx >= m:
                out[bx, tx] = tile[tx]

    return kernel


def read_by_turns(is_filled: bool) -> Any:
    """Round k of a loop reads k elements, so that its first round reads none."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(out: T.Tensor[(m, WIDTH), T.float32]):
        with T.Kernel(m, threads=WIDTH) as bx:
            tx = T.get_thread_binding(0)
            tile = T.alloc_shared((WIDTH,), T.float32)
            total = T.alloc_local((1,), T.float32)
            total[0] = 0.0
            if is_filled:
                tile[tx] = 1.0
            for k in T.serial(4):
                for j in T.serial(k):
                    total[0] = total[0] + tile[(tx + j) % WIDTH]
            out[bx, tx] = total[0]

    return kernel


def counted_from_below(first: int) -> Any:
    """Rows `first` and three more are filled by a loop from -2 on; rows 2 to 5 are read."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(out: T.Tensor[(m, WIDTH), T.float32]):
        with T.Kernel(m, threads=WIDTH) as bx:
            tx = T.get_thread_binding(0)
            tile = T.alloc_shared((8 * WIDTH,), T.float32)
            total = T.alloc_local((1,), T.float32)
            total[0] = 0.0
            for k in T.serial(-2, 2):
                tile[(k + 2 + first) * WIDTH + tx] = 1.0
            for k in T.serial(2, 6):
                total[0] = total[0] + tile[k * WIDTH + tx]
            out[bx, tx] = total[0]

    return kernel


TAIL = ragged_tail(False)


@pytest.mark.parametrize(
    ("prim_func", "what"),
    [
        (cleared_sum(False), "load from total"),
        (half_filled_shared(4), "load from tile"),
        (TAIL, "load from tile"),
        (accumulated_output(), "load from out"),
        (accumulating_product(False), "wgmma accumulators acc"),
        (read_by_the_last(False), "load from tile"),
        (read_by_turns(False), "load from tile"),
        (counted_from_below(0), "load from tile"),
    ],
    ids=[
        *("accumulator", "shared", "ragged tail", "output", "product", "some blocks"),
        *("later rounds", "negative counter"),
    ],
)
def test_reads_before_writes_are_refuted(prim_func, what):
    result = verdict(context(prim_func), "init")
    assert result.verdict is Verdict.REFUTED, result.findings
    found: Any = next(f for f in result.findings if f.verdict is Verdict.REFUTED)
    assert what in found.message
    assert found.counterexample.shape["m"] >= 1
    if prim_func is TAIL:  # the element that nothing wrote belongs to a row beyond the last
        row = found.counterexample.block["bx"] * WIDTH + found.counterexample.values["element"]
        assert row >= found.counterexample.shape["m"]


@pytest.mark.parametrize(
    "prim_func",
    [
        cleared_sum(True),
        half_filled_shared(8),
        ragged_tail(True),
        guarded_alike(),
        accumulating_product(True),
        read_by_the_last(True),
        read_by_turns(True),
        counted_from_below(2),
        *(make() for make in SOUND),
    ],
)
def test_written_before_read_is_proved(prim_func):
    result = verdict(context(prim_func), "init")
    assert result.verdict is Verdict.PROVED, result.findings


def test_a_tensor_may_be_declared_to_be_updated_in_place():
    given = context(accumulated_output())
    given.dispatch = Dispatch(in_place=("out",))
    claims = PROPERTY.claims(given)
    assert not claims.obligations
    assert any("updated in place" in a for a in claims.assumptions)


def exchanged_by_copies() -> Any:
    """Rows that another block has written come by TMA."""
    blocks, rows, width = 8, 4, 64

    @T.prim_func
    def kernel(
        x: T.Tensor[(blocks, width), T.float32],
        ring: T.Tensor[(blocks, rows, 2 * width), T.float32],
        out: T.Tensor[(blocks, width), T.float32],
    ):
        with T.Kernel(blocks, threads=width) as b:
            tile = T.alloc_shared((rows, width), T.float32)
            full = T.alloc_barrier([1])
            tx = T.get_thread_binding()
            for i in T.serial(rows):
                ring[b, i, tx] = x[b, tx]
            T.sync_grid()
            T.tma_copy(ring[(b + 1) % blocks, 0:rows, 0:width], tile, barrier=full[0])  # pyright: ignore[reportOperatorIssue]
            T.barrier_arrive(full[0])
            T.barrier_wait(full[0], 0)
            out[b, tx] = tile[0, tx]

    return kernel


def test_what_comes_by_tma_may_rest_on_a_claim():
    given = context(exchanged_by_copies(), Contract(()))
    text = "TMA reads ring, which the kernel writes"
    assert [i.message for i in PROPERTY.claims(given).unknown] == [text]
    given.dispatch = Dispatch(exchanged={"ring": "k/right:holds"})
    claims = PROPERTY.claims(given)
    assert not claims.unknown
    assert claims.rests == {"k/right:holds": {"ring"}}
    (copy,) = given.memory.tma
    given.memory.tma[0] = replace(copy, reduce=True)
    assert [i.message for i in PROPERTY.claims(given).unknown] == [text]


def test_a_stage_that_the_producer_does_not_fill_is_refuted():
    given = context(SOUND[4]())
    (load, *_) = calls(given.extracted.device, "tma_load")
    pointer = next(a for a in load.args if isinstance(a, ir.AccessPtr))
    zero = ir.Const(pointer.offset.dtype, 0)
    pointer.offset = ir.BinOp(pointer.offset.dtype, "mul", pointer.offset, zero)
    result = verdict(given, "init")
    assert result.verdict is not Verdict.PROVED
    assert any("wgmma A from x_tile" in f.message for f in result.findings)


def test_a_dropped_clear_is_refuted():
    given = context(SOUND[4]())
    clears = nodes(given.extracted.device, ir.Store, lambda s: s.buffer.data.name == "acc")
    assert clears
    for clear in clears:
        clear.buffer = next(
            n.buffer for n in nodes(given.extracted.device, ir.Alloc) if n.buffer.name != "acc"
        )
    result = verdict(given, "init")
    assert result.verdict is not Verdict.PROVED


def test_a_variable_of_a_loop_starts_anew_in_each_iteration():
    given = context(cleared_sum(True))
    body = given.extracted.device.body
    alloc = next(n for n in nodes(given.extracted.device, ir.Alloc) if n.buffer.name == "total")
    for seq in (n for n in ir.walk(body) if isinstance(n, ir.Seq)):
        seq.stmts = tuple(s for s in seq.stmts if s is not alloc)
    loop = next(n for n in ir.walk(body) if isinstance(n, ir.For) and n.kind == "serial")
    loop.body = ir.Seq(None, (alloc, loop.body))
    result = verdict(given, "init")
    assert result.verdict is Verdict.REFUTED
    assert "load from total" in result.findings[0].message


def one_element_each_round() -> Any:
    m = T.dynamic("m")

    @T.prim_func
    def kernel(out: T.Tensor[(m, WIDTH), T.float32]):
        with T.Kernel(m, threads=WIDTH) as bx:
            tx = T.get_thread_binding(0)
            total = T.alloc_local((1,), T.float32)
            own = T.alloc_local((8,), T.float32)
            total[0] = 0.0
            for k in T.serial(8):
                own[k] = 1.0
                for j in T.serial(8):
                    total[0] = total[0] + own[j]
            out[bx, tx] = total[0]

    return kernel


def test_what_other_rounds_wrote_is_not_in_a_variable_of_a_loop():
    given = context(one_element_each_round())
    body = given.extracted.device.body
    alloc = next(n for n in nodes(given.extracted.device, ir.Alloc) if n.buffer.name == "own")
    for seq in (n for n in ir.walk(body) if isinstance(n, ir.Seq)):
        seq.stmts = tuple(s for s in seq.stmts if s is not alloc)
    loop = next(n for n in ir.walk(body) if isinstance(n, ir.For) and n.kind == "serial")
    loop.body = ir.Seq(None, (alloc, loop.body))
    result = verdict(given, "init")
    assert result.verdict is Verdict.UNKNOWN
    assert "store to own: its address depends on k" in result.findings[0].message


def filled_by_turns(most: int, room: int) -> Any:
    """A loop as long as data says, at most `most`, reads element by element what was filled before."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(
        x: T.Tensor[(m, WIDTH), T.float32], counts: T.Tensor[(m,), T.int32], out: T.Tensor[(m,), T.float32]
    ):
        with T.Kernel(m, threads=WIDTH) as bm:
            tile = T.alloc_shared((WIDTH,), T.float32)
            total = T.alloc_fragment((1,), T.float32)
            for i in T.Parallel(room):
                tile[i] = x[bm, i]
            T.clear(total)
            for k in T.serial(T.min(T.max(counts[bm], 0), 1) * most):
                for i in T.Parallel(1):
                    total[i] += tile[k]
            for i in T.Parallel(1):
                out[bm + i] = total[i]

    return kernel


@pytest.mark.parametrize(("most", "expected"), [(WIDTH // 2, Verdict.PROVED), (WIDTH, Verdict.REFUTED)])
def test_a_loop_of_symbolic_length_is_followed_as_far_as_it_can_go(most, expected):
    result = verdict(context(filled_by_turns(most, WIDTH // 2)), "init")
    assert result.verdict is expected
