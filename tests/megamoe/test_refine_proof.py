"""What the fused kernel's device IR computes is what its tile IR says: proved, and of no edit of either."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import z3

from megamoe import copied_proof, refine_proof
from megamoe.config import Config
from megamoe.instances import CONFIG, FLASH, FP8, LAYERS, OF_RANKS, PRO, SMALL
from megamoe.proofs import SUITES, extracted, refinement_claimed
from megamoe.refine_index import divided_once, number, one_vector, op, undivided
from megamoe.refine_words import matrices
from tests.megamoe.role_edits import ARRIVE, WAIT, in_call, next_place, only, plus
from tests.megamoe.test_protocol import Edit, edited, in_expr, mbarrier_calls
from tests.megamoe.test_roles_proof import open_claims
from verify import ir
from verify.externs.elements import as_stores
from verify.extract import Extracted
from verify.host import Host, read_host
from verify.properties import Claims, Issue
from verify.refine.run import readings, refine
from verify.refine.tile import read_tile
from verify.solve import Obligation

# Kernels that are edited here and in `test_refine_moves`; `dsv4-verify` proves those of all suites.
FORMS = {
    "fp4": CONFIG,
    "fp8": FP8,
    "flash-fp4-4096": FLASH["fp4-4096"],
    "flash-fp8-8": FLASH["fp8-8"],
    "pro-fp4-4096": PRO["fp4-4096"],
}
NOTHING = ir.Seq(None, ())


def in_words(kernel: Extracted) -> tuple[Extracted, Host]:
    """Return a kernel and its launch in words that refinement knows."""
    launch = read_host(kernel.host, kernel.device, kernel.tile)
    words, host, _ = refine_proof.rewritten(kernel, launch)
    return words, host


def steps(words: Extracted) -> dict[int, str]:
    """Return what the tile program says in each step."""
    return {step.number: str(step) for step in read_tile(as_stores(words.tile)).steps}


@cache
def known(config: Config) -> tuple[dict[int, str], dict[int, str]]:
    """Return what a kernel as it is says in each step, and what the device does there."""
    words, host = in_words(extracted(config))
    return steps(words), readings(words, host, ())


def of_changed_steps(changed: Extracted, config: Config, level: str) -> list[str]:
    """Return what is open of the steps that read otherwise than in the kernel: open if all are compared."""
    said, done = known(config)
    try:
        words, host = in_words(changed)
        if level == "tile":
            now = steps(words)
            done = {number: text for number, text in done.items() if now.get(number) == said[number]}
    except ir.UnsupportedIR as error:
        return [str(error)]
    found = refine(words, host, (), done)
    issues = [Issue(span, reason) for span, reason in found.unsupported]
    return open_claims({"refinement": Claims(unsupported=issues, obligations=found.obligations)})


def after(edit: Edit, config: Config = CONFIG, level: str = "device") -> list[str]:
    """Return what is open of a kernel of which one level's IR has been edited, or some of it."""
    kernel = extracted(config)
    changed = replace(kernel, **{level: edited(edit, getattr(kernel, level))})
    if found := of_changed_steps(changed, config, level):
        return found
    return open_claims({"refinement": refine_proof.claims(changed, ("refinement",))["refinement"]})


# --------------------------------------------------------------------------- edits
def in_while(change: Callable[[ir.While], ir.Stmt]) -> Edit:
    return lambda node: change(node) if isinstance(node, ir.While) else None


def longer(node: ir.Expr) -> ir.Expr:
    """A condition `a and b < n`: n is one more."""
    assert isinstance(node, ir.BinOp)
    assert isinstance(node.b, ir.BinOp)
    return replace(node, b=replace(node.b, b=plus(node.b.b, 1)))


def body_plus(node: ir.While) -> ir.Stmt:
    assert isinstance(node.body, ir.Store)
    return replace(node, body=replace(node.body, value=plus(node.body.value, 1)))


def stored(name: str, change: Callable[[ir.Store], ir.Stmt]) -> Edit:
    return lambda node: change(node) if isinstance(node, ir.Store) and node.buffer.data.name == name else None


def called(op: str, change: Callable[[ir.Call], ir.Call]) -> Edit:
    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Eval) and isinstance(node.value, ir.Call) and node.value.op == op:
            return replace(node, value=change(node.value))
        return None

    return edit


def with_arg(at: int, change: Callable[[ir.Expr], ir.Expr]) -> Callable[[ir.Call], ir.Call]:
    return lambda call: replace(call, args=(*call.args[:at], change(call.args[at]), *call.args[at + 1 :]))


def moved_pointer(node: ir.Expr) -> ir.Expr:
    assert isinstance(node, ir.AccessPtr)
    return replace(node, offset=plus(node.offset, 8))


def negated(node: ir.Expr) -> ir.Expr:
    return ir.Const(node.dtype, 1 - int(node.value)) if isinstance(node, ir.Const) else node


def swapped_words(call: ir.Call) -> ir.Call:
    """`stmatrix` stores the halves of a word the other way round."""
    return replace(
        call,
        args=tuple(
            replace(a, args=a.args[::-1]) if isinstance(a, ir.Call) and a.op == "pack_b16" else a
            for a in call.args
        ),
    )


def turned_over(read: str) -> Edit:
    """The first condition on a variable is its opposite."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.If) and any(
            isinstance(n, ir.Load) and n.buffer.data.name == read for n in ir.walk(node.cond)
        ):
            return replace(node, cond=ir.Not(ir.BOOL, node.cond))
        return None

    return only(0, edit)


def guard_of(tensor: str) -> Edit:
    """What the device guards a read of a tensor in an index by is a row wider."""

    def wider(node: ir.Expr) -> ir.Expr | None:
        if isinstance(node, ir.Select) and isinstance(node.a, ir.Load) and node.a.buffer.data.name == tensor:
            return replace(node, cond=in_expr(node.cond, lambda e: more(e)))
        return None

    def more(node: ir.Expr) -> ir.Expr | None:
        if isinstance(node, ir.BinOp) and node.op == "lt":
            return replace(node, b=plus(node.b, 1))
        return None

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Bind):
            new = in_expr(node.value, wider)
            return replace(node, value=new) if new is not node.value and differs(new, node.value) else None
        return None

    def differs(a: ir.Expr, b: ir.Expr) -> bool:
        return len(list(ir.walk(a))) != len(list(ir.walk(b)))

    return edit


def without_store(name: str) -> Edit:
    return only(0, stored(name, lambda _: NOTHING))


def other_value(name: str) -> Edit:
    return only(0, stored(name, lambda s: replace(s, value=plus(s.value, 1))))


# Of one level alone, then the other: a wait, what it counts, a word, a place, a condition.
DEVICE: dict[str, Edit] = {
    **{
        f"while {n} goes on longer": only(n, in_while(lambda w: replace(w, cond=longer(w.cond))))
        for n in range(8)
    },
    **{f"while {n} counts by more": only(n, in_while(body_plus)) for n in range(8)},
    **{f"while {n} once": only(n, in_while(lambda w: ir.If(w.span, w.cond, w.body, None))) for n in range(8)},
    **{f"while {n} dropped": only(n, in_while(lambda _: NOTHING)) for n in range(8)},
    "rows of stmatrix elsewhere": called("ptx_stmatrix", with_arg(2, moved_pointer)),
    "stmatrix does not turn": called("ptx_stmatrix", with_arg(0, negated)),
    "halves of stmatrix change places": called("ptx_stmatrix", swapped_words),
    **{
        f"{op} of the next {name}": in_call(op, name, next_place)
        for op, name in ((WAIT, "full"), (ARRIVE, "empty"))
    },
    **{f"a condition on {name} turned over": turned_over(name) for name in ("kind", "block", "products")},
    **{
        f"{name} is read further than its tensor": guard_of(name)
        for name in ("firsts", "row_source", "row_target")
    },
    **{
        f"no store of {name}": without_store(name)
        for name in ("amax", "exponent", "acc_a", "factor_b", "offset_a", "total")
    },
    **{
        f"another value of {name}": other_value(name)
        for name in ("hidden", "rounded", "weight_tile", "piece", "acc_b", "y")
    },
    **{
        f"arrival {n} twice": only(n, lambda s: ir.Seq(None, (s, s)) if _calls(s, ARRIVE) else None)
        for n in range(3)
    },
    "the grid meets twice": lambda s: ir.Seq(None, (s, s)) if _calls(s, "sync_grid") else None,
    "partial sums are not cleared": called("ptx_wgmma_rs", with_arg(11, lambda e: ir.Const(e.dtype, 1))),
    "rows of x further on": called("ptx_wgmma_rs", with_arg(8, lambda e: plus(e, 1))),
    "weights further on": called("ptx_wgmma_rs", with_arg(6, lambda e: plus(e, 4))),
}
TILE: dict[str, Edit] = {
    **{
        f"while {n} goes on longer": only(n, in_while(lambda w: replace(w, cond=longer(w.cond))))
        for n in range(8)
    },
    **{f"while {n} counts by more": only(n, in_while(body_plus)) for n in range(8)},
    **{f"while {n} dropped": only(n, in_while(lambda _: NOTHING)) for n in range(8)},
    **{
        f"no {op} of {name}": lambda n, op=op, name=name: NOTHING if mbarrier_calls(n, op, name) else None
        for op, name in ((WAIT, "full"), (WAIT, "taken"), (ARRIVE, "handed"))
    },
    **{f"a condition on {name} turned over": turned_over(name) for name in ("kind", "block", "products")},
    **{
        f"another value of {name}": other_value(name)
        for name in ("hidden", "rounded", "low", "done", "later", "y")
    },
    "the grid does not meet": lambda n: NOTHING if _calls(n, "sync_grid") else None,
    "another product": called("wgmma_gemm", with_arg(9, negated)),
    "no word for peers": lambda n: NOTHING if _calls(n, "atomic_store_elem_op") else None,
    "the watchdog is silent": lambda n: NOTHING if _calls(n, "atomic_max_elem_op") else None,
}


def scale_plus(node: ir.Stmt) -> ir.Stmt | None:
    """A scale of e4m3 weights is not that of its word's bits."""

    def other(e: ir.Expr) -> ir.Expr | None:
        if isinstance(e, ir.Call) and e.op == "reinterpret" and isinstance(e.args[0], ir.Load):
            load = e.args[0]
            return replace(e, args=(plus(load, 1),)) if load.buffer.data.name == "o_tile" else None
        return None

    if not isinstance(node, ir.Store):
        return None
    new = in_expr(node.value, other)
    return replace(node, value=new) if len(list(ir.walk(new))) != len(list(ir.walk(node.value))) else None


def other_words(node: ir.Stmt) -> ir.Stmt | None:
    """A kernel writes a word where scales come."""
    if not (isinstance(node, ir.Store) and node.buffer.data.name == "weight_tile"):
        return None
    o_tile = next(
        n.buffer
        for n in ir.walk(extracted(FP8).device.body)
        if isinstance(n, ir.Load) and n.buffer.data.name == "o_tile"
    )
    written = ir.Store(node.span, o_tile, (ir.Const(ir.INT32, 0),), ir.Const(o_tile.dtype, 0))
    return ir.Seq(None, (node, written))


def _calls(node: ir.Stmt, op: str) -> bool:
    return isinstance(node, ir.Eval) and isinstance(node.value, ir.Call) and node.value.op == op


def value(node: ir.Expr, env: dict[ir.Var, int]) -> int:
    """Return an index for some numbers."""
    match node:
        case ir.Const(value=number):
            return int(number)
        case ir.Var():
            return env[node]
        case ir.BinOp(op=op, a=a, b=b):
            x, y = value(a, env), value(b, env)
            return {
                "add": x + y,
                "sub": x - y,
                "mul": x * y,
                "floordiv": x // (y or 1),
                "floormod": x % (y or 1),
                "lt": int(x < y),
                "le": int(x <= y),
            }[op]
    raise AssertionError(node)


class TestRules:
    """What rules put in the place of something has its value."""

    @pytest.mark.parametrize("sign", ["add", "sub"])
    @pytest.mark.parametrize("rule", [undivided, divided_once])
    def test_division(self, rule, sign):
        x, y = (ir.Var(ir.INT32, name) for name in "xy")
        total = op(sign, op("floordiv", x, number(4)), y)
        before = [op("lt", total, number(3)), op("le", number(-2), total), op("floordiv", total, number(3))]
        changed = [(old, new) for old in before if (new := rule(old)) is not None]
        assert changed
        for old, new in changed:
            for a in range(-30, 30):
                for b in range(-9, 9):
                    assert value(old, {x: a, y: b}) == value(new, {x: a, y: b})

    @pytest.mark.parametrize("turned", [0, 1])
    def test_matrices(self, turned):
        """By PTX: lane 8 m + r names where row r of matrix m begins; lane l has two halves of row l div 4."""
        thread, data = ir.Var(ir.INT32, "tx"), ir.Var(ir.HANDLE, "out")
        kind, half = ir.DType("bfloat16"), ir.DType("uint16")
        pointer = ir.AccessPtr(ir.HANDLE, data, kind, op("mul", thread, number(8)), number(8), "w")
        held = ir.Buffer("held", half, (number(4),), (), "local", ir.Var(ir.HANDLE, "held"), number(0))
        halves = [ir.Load(half, held, (number(n),)) for n in range(4)]
        words = [ir.Call(half, "pack_b16", tuple(halves[2 * m : 2 * m + 2])) for m in range(2)]
        call = ir.Call(ir.HANDLE, "ptx_stmatrix", (number(turned), number(2), pointer, *words))
        stores = list(matrices(ir.Eval(None, call), call, thread))
        assert len(stores) == 4
        found = {}
        for lane in range(64):
            for store in stores:
                (index,) = store.indices
                found[value(index, {thread: lane})] = lane, int(store.value.indices[0].value)
        wanted = {}
        for warp in (0, 32):
            for m in range(2):
                for row in range(8):
                    for column in range(8):
                        i, j = (column, row) if turned else (row, column)
                        lane = warp + 4 * i + j // 2
                        wanted[(warp + 8 * m + row) * 8 + column] = lane, 2 * m + j % 2
        assert found == wanted

    def test_one_vector(self):
        counter, base = (ir.Var(ir.INT32, name) for name in ("v", "b"))
        four = ir.DType("int32", 4)
        local = ir.Buffer("t", ir.INT32, (number(8),), (), "local", ir.Var(ir.HANDLE, "t"), number(0))
        step = op("mul", counter, number(4))
        store = ir.Store(None, local, (ir.Ramp(four, step, number(1)),), ir.Const(four, 0))
        read = ir.Load(four, local, (ir.Ramp(four, op("add", base, step), number(1)),))
        loop = ir.For(None, counter, number(0), number(2), "serial", replace(store, value=read), {})
        whole = one_vector(loop)
        assert whole is not None
        assert isinstance(whole.value, ir.Load)
        (ramp,) = whole.value.indices
        assert isinstance(ramp, ir.Ramp)
        assert ramp.dtype.lanes == 8
        assert value(ramp.base, {base: 5}) == 5
        for other in (op("mul", counter, number(8)), counter, op("mul", step, base)):
            far = replace(read, indices=(ir.Ramp(four, other, number(1)),))
            assert one_vector(replace(loop, body=replace(store, value=far))) is None


@pytest.mark.parametrize(
    ("what", "times", "left"),
    [
        ("block[...] = ...: int32 mul of data", 2, 0),
        ("block[...] = ...: int32 mul of data", 1, 1),  # of one level alone
        ("total[...] = ...: int32 mul of data", 2, 2),  # decides no address
        ("block[...] = ...: index value", 2, 2),
    ],
)
def test_what_overflow_claims_of_indices_is_not_asked_as_if_of_data(what, times, left):
    claimed = [Obligation(what, None, (), z3.Int("turn") * 66 < 2**31)] * times
    assert len(list(refine_proof._not_of_indices(claimed, extracted(CONFIG).device))) == left


def test_each_kernel_has_a_suite_of_every_claim():
    for form in (*SMALL, *LAYERS, *OF_RANKS):
        assert set(SUITES[f"refinement{form}"].claims) == {*refine_proof.CLAIMS, *copied_proof.CLAIMS}


@pytest.mark.slow
class TestCompiledKernel:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_claim_is_proved(self, form):
        claims = dict(refinement_claimed(FORMS[form]))
        assert claims.keys() == {*refine_proof.CLAIMS, *copied_proof.CLAIMS}
        assert open_claims(claims) == []

    @pytest.mark.parametrize("edit", [scale_plus, other_words])
    def test_scales_of_weights(self, edit):
        kernel = extracted(FP8)
        changed = replace(kernel, device=edited(edit, kernel.device))
        assert open_claims({"format": refine_proof.claims(changed, ("format",))["format"]})

    @pytest.mark.parametrize("level", ["device", "tile"])
    def test_without_an_edit_no_step_reads_otherwise(self, level):
        kernel = extracted(CONFIG)
        assert of_changed_steps(replace(kernel, name=kernel.name), CONFIG, level) == []

    @pytest.mark.parametrize("name", DEVICE)
    def test_edits_of_the_device(self, name):
        assert after(DEVICE[name])

    @pytest.mark.parametrize("name", TILE)
    def test_edits_of_the_tile_program(self, name):
        assert after(TILE[name], level="tile")
