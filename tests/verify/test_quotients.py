"""Grids whose neighbours share a row: what is said of the row is implied, and no more than that."""

from dataclasses import replace

import pytest
import z3
from tilelang import language as T

from dsv4_kernels.contract import Contract
from tests.verify import samples
from verify import extract, ir
from verify.arith import evaluate
from verify.encode import Encoder, Hypothesis, Scope
from verify.properties import Context, all_properties
from verify.quotients import bounds_of_quotients
from verify.solve import Obligation, Prover
from verify.text import show
from verify.verdict import Verdict

LISTS = Contract(("0 <= m", "m <= 1048576", "0 < topk", "topk <= 1048576"))
THREADS = 128
# The compiler would guard what it does not see to be inside: of `block // 2 < m` it does.
UNGUARDED = {"tl.disable_safe_memory_legalize": True}

M, BLOCK, OTHER = (ir.Var(ir.INT32, name) for name in ("m", "block", "other"))
WIDE = ir.Cast(ir.DType("int64"), BLOCK)


def of(op, a, b):
    return ir.BinOp(a.dtype, op, a, ir.Const(a.dtype, b) if isinstance(b, int) else b)


def said(extent, *used):
    """Return the range of a launch index of that extent, and what is said where `used` are evaluated."""
    body = ir.Seq(None, tuple(ir.Eval(None, expr) for expr in used))
    launch = ir.Launch(None, BLOCK, "blockIdx.x", extent, body)
    index, term = z3.Int("block"), Encoder().term(extent, Scope())
    given = Hypothesis("range", "launch", z3.And(index >= 0, index < term))
    return given, bounds_of_quotients(launch, index, term)


TILES = of("floordiv", of("add", M, 63), 64)
QUOTIENTS = [
    pytest.param(of("mul", M, 2), of("floordiv", BLOCK, 2), "block/2 < m", id="heads of a query"),
    pytest.param(of("mul", M, 6), of("floordiv", BLOCK, 3), "block/3 < 2*m", id="some of them"),
    pytest.param(of("mul", M, 8), of("shr", BLOCK, 3), "block/8 < m", id="shift"),
    pytest.param(of("mul", M, 8), of("shr", WIDE, 1), "block/2 < 4*m", id="64 bits"),
    pytest.param(of("mul", M, 4), of("truncdiv", BLOCK, 4), "block/4 < m", id="C's division"),
    pytest.param(of("mul", TILES, 2), of("floordiv", BLOCK, 2), "block/2 < (m + 63)/64", id="tiles"),
    pytest.param(of("mul", of("mul", M, 2), 3), of("floordiv", BLOCK, 6), "block/6 < m", id="two factors"),
    pytest.param(
        of("mul", of("mul", M, OTHER), 2), of("floordiv", BLOCK, 2), "block/2 < m*other", id="square"
    ),
    pytest.param(of("shl", M, 1), of("floordiv", BLOCK, 2), "block/2 < m", id="shifted extent"),
]


@pytest.mark.parametrize(("extent", "used", "text"), QUOTIENTS)
def test_what_is_said_follows_from_the_range_alone(extent, used, text):
    given, [found] = said(extent, used, used)
    assert str(found.term) == text
    assert found.kind == "launch"
    answer = Prover().prove([Obligation("implied", None, (given,), found.term)])[0]
    assert answer.verdict is Verdict.PROVED, answer.reason
    values = range(-2, 14)
    points = [{"block": b, "m": m, "other": 3} for b in range(-1, 200) for m in values]
    inside = [p for p in points if evaluate(given.term, p)]
    assert inside
    assert all(evaluate(found.term, p) for p in inside)
    # The bound is met: one less would be false.
    quotient, rest = found.term.children()
    assert any(evaluate(quotient == rest - 1, p) for p in inside)


@pytest.mark.parametrize(
    ("extent", "used"),
    [
        pytest.param(M, of("floordiv", BLOCK, 2), id="no factor"),
        pytest.param(of("mul", M, 2), of("floordiv", BLOCK, 4), id="larger divisor"),
        pytest.param(of("mul", M, 3), of("floordiv", BLOCK, 2), id="divides no extent"),
        pytest.param(of("add", of("mul", M, 2), 1), of("floordiv", BLOCK, 2), id="one block more"),
        pytest.param(of("mul", M, 2), of("floordiv", OTHER, 2), id="of another variable"),
        pytest.param(of("mul", M, 2), of("floordiv", of("add", BLOCK, 1), 2), id="of a sum"),
        pytest.param(of("mul", M, 2), of("floormod", BLOCK, 2), id="remainder"),
        pytest.param(of("mul", M, 2), of("floordiv", BLOCK, M), id="computed divisor"),
        pytest.param(of("mul", M, 2), of("floordiv", BLOCK, -2), id="negative divisor"),
        pytest.param(of("mul", M, -2), of("floordiv", BLOCK, 2), id="negative factor"),
        pytest.param(ir.Const(ir.INT32, 8), of("floordiv", BLOCK, 2), id="constant extent"),
        pytest.param(of("mul", M, 0), of("floordiv", BLOCK, 2), id="no block"),
    ],
)
def test_nothing_else_is_said(extent, used):
    assert said(extent, used)[1] == []


def lists(groups, extra=0, divisor=None):
    """Return a kernel where `groups` blocks read one row's list; with the other arguments, a wrong one."""
    m, topk = T.dynamic("m"), T.dynamic("topk")
    divisor = divisor or groups

    @T.prim_func
    def lists_kernel(idx: T.Tensor[(m, topk), T.int32], out: T.Tensor[(m, groups, THREADS), T.int32]):
        with T.Kernel(m * groups + extra, threads=THREADS) as block:
            row, group = block // divisor, block % divisor
            tx = T.get_thread_binding()
            for chunk in T.serial(T.ceildiv(topk, 128)):
                for i in T.serial(4):
                    place = chunk * 128 + 320 + i * 16 + tx % 128 // 8
                    if place < topk:
                        out[row, group, tx] = idx[row, place]

    return Context(extract.extract(lists_kernel, pass_configs=UNGUARDED), LISTS, {})


def loads(context, keep=lambda hypothesis: True):
    """Return what `bounds` asks of loads from `idx`, with those hypotheses that are to be kept."""
    prop = next(p for p in all_properties() if p.name == "bounds")
    asked = [o for o in prop.claims(context).obligations if "idx" in o.what]
    return [replace(o, hypotheses=tuple(h for h in o.hypotheses if keep(h))) for o in asked]


def test_neighbours_that_share_a_row_are_proved_by_both_solvers():
    result = samples.verdict(lists(2), "bounds")
    assert result.verdict is Verdict.PROVED, result.findings
    assert result.solvers["z3 unsat"] == result.solvers["cvc5 unsat"] > 0


def test_they_were_not_while_the_row_was_left_to_the_solvers():
    """Nor with the whole of cvc5's budget, as was measured once: too long for a test."""
    context = lists(2)
    prove = lambda obligations: {a.verdict for a in Prover(cvc5_rlimit=50_000).prove(obligations)}  # noqa: E731
    assert prove(loads(context)) == {Verdict.PROVED}
    assert Verdict.UNKNOWN in prove(loads(context, lambda h: "//" not in h.label or h.kind != "launch"))


def test_quotients_are_spoken_of_in_the_kernels_own_hypotheses():
    [load] = loads(lists(4))
    assert "bx/4 < m" in [str(h.term) for h in load.hypotheses if h.kind == "launch"]


@pytest.mark.parametrize("wrong", [{"extra": 1}, {"divisor": 1}, {"extra": -1, "divisor": 1}])
def test_rows_that_do_not_exist_are_refuted(wrong):
    found = refuted(lists(2, **wrong))
    assert found.values["element"] >= found.values["extent"]


def test_fewer_blocks_a_row_than_the_grid_has_are_refuted():
    """Something is said of the smaller divisor too, and it is no more than true."""
    context = lists(4, divisor=2)
    assert "bx/2 < 2*m" in [str(h.term) for h in loads(context)[0].hypotheses]
    refuted(context)


def test_a_sound_kernel_whose_grid_or_divisor_is_changed_is_refuted():
    context = lists(2)
    launch = next(s for s in samples.nodes(context.extracted.device, ir.Launch) if s.tag == "blockIdx.x")
    launch.extent = samples.plus(launch.extent, 1)
    refuted(context)
    context = lists(4)
    for node in samples.nodes(context.extracted.device, ir.BinOp):
        if node.op in ("floordiv", "shr") and "bx" in show(node.a):
            assert node.b.value in (2, 4)  # by 4, as a division or as a shift
            node.b = ir.Const(node.b.dtype, node.b.value // 2)
    refuted(context)


def refuted(context):
    """Return a counterexample of `bounds` for a load."""
    result = samples.verdict(context, "bounds")
    assert result.verdict is Verdict.REFUTED, result.findings
    return next(f.counterexample for f in result.findings if "load from idx" in f.message)
