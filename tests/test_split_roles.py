"""The split of rounds by role: each role's loop has its own statements, in their order, and its registers."""

import re

import pytest
from tilelang import language as T

from dsv4_kernels.tile.own_sync import own_sync
from dsv4_kernels.tile.roles import ATTRIBUTE, split_roles
from verify.extract import extract

ROUNDS, THREADS, ROLE = 4, 512, 256


def make_kernel(waits: bool = True):
    """Threads of the first role write squares, those of the second add them up."""

    @T.prim_func
    def kernel(x: T.Tensor[(ROUNDS, ROLE), T.float32], out: T.Tensor[(ROLE,), T.float32]):
        with T.Kernel(1, threads=THREADS):
            squares = T.alloc_shared((ROLE,), T.float32)
            total = T.alloc_fragment((ROLE,), T.float32)
            full, left = T.alloc_barrier([ROLE]), T.alloc_barrier([ROLE])
            with T.ws(2, 3):
                T.clear(total)
            for c in T.serial(ROUNDS):
                with T.ws(0, 1):
                    if waits:
                        T.mbarrier_wait_parity(left, (c + 1) % 2)
                    for i in T.Parallel(ROLE):
                        squares[i] = x[c, i] * x[c, i]
                    T.mbarrier_arrive(full)
                with T.ws(2, 3):
                    if waits:
                        T.mbarrier_wait_parity(full, c % 2)
                    for i in T.Parallel(ROLE):
                        total[i] = total[i] + squares[i]
                    T.mbarrier_arrive(left)
            with T.ws(2, 3):
                for i in T.Parallel(ROLE):
                    out[i] = total[i]

    return split_roles(own_sync(kernel), ROLE, 72, 184)


def loops(text):
    """Return the statements of each loop over rounds, as lines without indentation or conditions."""
    found = []
    for start in re.finditer(r"for \(int c\w* = 0; .*?\{\n", text):
        depth, at = 1, start.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        lines = [re.sub(r"\bc_\d\b", "c", line.strip()) for line in text[start.end() : at - 1].splitlines()]
        found.append([line for line in lines if line and not re.match(r"if \(|\}|.*\bfor \(", line)])
    return found


@pytest.fixture(scope="module")
def texts():
    kernel = make_kernel()
    return tuple(extract(k).cuda_text for k in (kernel, kernel.without_attr(ATTRIBUTE)))


def test_each_role_has_a_loop_with_its_statements_in_their_order(texts):
    split, (both,) = loops(texts[0]), loops(texts[1])
    second, first = split  # the arm of the second role comes first in the text
    assert first + second == both
    assert any("squares" in line and "x[" in line for line in first)
    assert any("total" in line for line in second)
    assert not any("x[" in line for line in second)


def test_each_role_says_its_registers_before_its_loop(texts):
    text = texts[0]
    at = [text.index(s) for s in ("warpgroup_reg_alloc<184>", "warpgroup_reg_dealloc<72>")]
    rounds = [m.start() for m in re.finditer(r"for \(int c", text)]
    assert at[0] < rounds[0] < at[1] < rounds[1]
    assert "warpgroup_reg" not in texts[1]


def test_a_kernel_without_rounds_that_wait_has_no_roles():
    with pytest.raises(ValueError, match="requires a loop that waits"):
        extract(make_kernel(waits=False))
