"""A wgmma descriptor is the one that was made last only where a use comes to it in every thread and round."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.verify import access_kernels as kernels
from tests.verify.access_kernels import TX, Case, Operand, op, pointer
from tests.verify.claimed import Reader
from tests.verify.device import build as b
from verify import host, ir
from verify.access import Memory

RIGHT = Operand(1, 16, 1024, True, 16384 + 64)
Statements = list[ir.Stmt]
Arrange = Callable[[ir.Stmt, ir.Stmt, ir.Stmt, Statements], Statements]


def arranged(arrange: Arrange) -> Case:
    """Return a product whose descriptor is made, made elsewhere, advanced and used as `arrange` puts it."""
    case = kernels.product(None, RIGHT, 16)
    inner = case.kernel.function.body.body.body  # type: ignore[attr-defined]
    stmts = list(inner.stmts)
    at = next(n for n, s in enumerate(stmts) if b.is_call(s, "initialize_wgmma_descriptor"))
    made, advanced, use = stmts[at], stmts[at + 1], stmts[at + 2 :]
    target, _, *fields = made.value.args
    tile = next(n.buffer for n in ir.walk(inner) if isinstance(n, ir.Alloc) and n.buffer.name == "tile")
    other = replace(made.value, args=(target, pointer(tile, 0, 1), *fields))
    inner.stmts = (*stmts[:at], *arrange(made, ir.Eval(b.span(), other), advanced, use))
    return case


def memory(case: Case) -> Memory:
    return Reader(case.kernel.function, host.Host({}, {}, {}, {}, ())).memory()


def rounds(*body: ir.Stmt) -> ir.Stmt:
    return b.loop(ir.Var(b.I32, "round"), 2, *body)


LOST: dict[str, Arrange] = {
    "made in one branch or the other": lambda made, other, advanced, use: [
        b.when(op("lt", TX, 128), made, other=[other]),
        advanced,
        *use,
    ],
    "made in a branch": lambda made, other, advanced, use: [
        other,
        b.when(op("lt", TX, 64), made, advanced),
        *use,
    ],
    "advanced in a branch": lambda made, other, advanced, use: [
        made,
        b.when(op("lt", TX, 64), advanced),
        *use,
    ],
    "advanced in a loop": lambda made, other, advanced, use: [made, rounds(advanced, *use)],
    "made in one loop and advanced in another": lambda made, other, advanced, use: [
        rounds(made),
        rounds(advanced, *use),
    ],
    "made again behind a use in a loop": lambda made, other, advanced, use: [
        made,
        advanced,
        rounds(*use, other),
    ],
    "made for other threads": lambda made, other, advanced, use: [
        b.when(op("lt", TX, 64), made, advanced),
        b.when(op("lt", TX, 65), *use),
    ],
}
KEPT: dict[str, Arrange] = {
    "as it is": lambda made, other, advanced, use: [made, advanced, *use],
    "all in a loop": lambda made, other, advanced, use: [rounds(made, advanced, *use)],
    "used in a loop": lambda made, other, advanced, use: [made, advanced, rounds(*use)],
    "used twice": lambda made, other, advanced, use: [made, advanced, *use, made, advanced, rounds(*use)],
    "in branches on one condition": lambda made, other, advanced, use: [
        other,
        b.when(op("lt", TX, 128), made, advanced),
        b.when(op("lt", TX, 128), *use),
    ],
}


@pytest.mark.parametrize("name", LOST)
def test_a_use_that_may_see_another_is_unsupported(name):
    reasons = {reason for _, reason in memory(arranged(LOST[name])).unsupported}
    assert any(reason.startswith("wgmma descriptor") for reason in reasons)


@pytest.mark.parametrize("name", KEPT)
def test_a_use_that_sees_the_last_is_read(name):
    found = memory(arranged(KEPT[name]))
    assert found.unsupported == []
    starts = {str(use.start_bytes) for use in found.descriptors}
    assert len(found.descriptors) == (2 if name == "used twice" else 1)
    assert len(starts) == 1
