"""A loop's length, where it is read from memory: the compiled loop reads it in every round."""

from typing import Any

import pytest
from tilelang import language as T

from tests.verify import samples
from tests.verify.device.build import (
    TX,
    Kernel,
    add,
    buffer,
    call,
    const,
    ints,
    load,
    loop,
    pointer,
    store,
    sync,
)
from verify import ir
from verify.encode import Encoder
from verify.extract import extract
from verify.verdict import Verdict
from verify.walk import walk


def shortened(writes: int) -> Any:
    """A loop over `bounds[1]` rounds that writes `bounds[writes]`."""
    m = T.dynamic("m")

    @T.prim_func
    def kernel(lengths: T.Tensor[(m,), T.int32], out: T.Tensor[(m, 8), T.int32]):
        with T.Kernel(m, threads=32) as row:
            bounds = T.alloc_local((2,), T.int32)
            bounds[0] = 0
            bounds[1] = T.max(0, T.min(8, lengths[row]))
            for k in T.serial(bounds[1]):
                out[row, k] = k
                bounds[writes] = T.max(0, bounds[writes] - 1)

    return kernel


def test_the_compiled_loop_reads_its_length_in_every_round():
    (line,) = [text for text in extract(shortened(1)).cuda_text.splitlines() if "for (" in text]
    assert "< bounds[1]" in line


def test_a_length_that_the_body_writes_is_unsupported():
    result = samples.verdict(samples.context(shortened(1)), "bounds")
    assert result.verdict is Verdict.UNSUPPORTED
    assert any("length may change while it runs, k: bounds[1]" in f.message for f in result.findings)


def test_a_length_beside_what_the_body_writes_is_followed():
    result = samples.verdict(samples.context(shortened(0)), "bounds")
    assert result.verdict is Verdict.PROVED, result.findings


# --------------------------------------------------------------------------- built IR
OUT = buffer("out", "int32", 64, "global")
LENGTH = buffer("length", "int32", 2, "local")
SHARED = buffer("ends", "int32", 64, "shared")
K = ir.Var(ir.INT32, "k")


def rounds(length: ir.Expr, *body: ir.Stmt) -> ir.For:
    made = loop(K, 0, *body)
    made.extent = length
    return made


def kernel(*body: ir.Stmt) -> Kernel:
    return Kernel(tensors=(OUT,), allocs=(LENGTH, SHARED), body=body)


def begun(value: int) -> tuple[ir.Stmt, ...]:
    return (store(OUT, TX, 0), store(LENGTH, 0, value), store(LENGTH, 1, value))


def counted() -> ir.Stmt:
    return store(OUT, TX, add(load(OUT, TX), 1))


def less(place: int) -> ir.Stmt:
    return store(LENGTH, place, add(load(LENGTH, place), -1))


@pytest.mark.parametrize(("place", "want"), [(0, 3), (1, 6)])
def test_the_interpreter_reads_it_in_every_round(place, want):
    """From six rounds of which each takes one off, three are left to run."""
    out = ints(64)
    kernel(*begun(6), rounds(load(LENGTH, 0), counted(), less(place))).run(out)
    assert out.tolist() == [want] * 64


def is_walked(*body: ir.Stmt) -> bool:
    try:
        walk(kernel(*body).function, Encoder(), ())
    except ir.UnsupportedIR as error:
        assert "length may change while it runs" in str(error)  # noqa: PT017
        return False
    return True


@pytest.mark.parametrize(
    ("body", "is_fixed"),
    [
        ((counted(),), True),
        ((less(1),), True),
        ((less(0),), False),
        ((store(LENGTH, add(K, 1), 3),), False),
        ((call("call_extern", "f", pointer(LENGTH, 1, 1, "rw")),), False),
    ],
    ids=["nothing", "another element", "the element", "some element", "through a pointer"],
)
def test_of_private_memory_only_other_elements_may_be_written(body, is_fixed):
    assert is_walked(*begun(6), rounds(load(LENGTH, 0), *body)) == is_fixed


def test_shared_memory_is_another_threads_to_write_behind_a_barrier():
    first = (store(SHARED, TX, 4), sync())
    assert is_walked(*first, rounds(load(SHARED, 0), counted_in_private()))
    assert not is_walked(*first, rounds(load(SHARED, 0), counted_in_private(), sync()))


def counted_in_private() -> ir.Stmt:
    return store(LENGTH, 0, const(0))


def test_a_start_counts_as_well():
    made = rounds(add(7, load(LENGTH, 1)), less(0))
    made.start = load(LENGTH, 0)
    assert not is_walked(*begun(2), made)
