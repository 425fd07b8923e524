"""What threads do together is decided by what is the same in them: proved, and of no edit of either level."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import z3

from megamoe import refine_proof, refine_uniform
from megamoe.config import Config
from megamoe.instances import CONFIG, WIDENED
from megamoe.proofs import extracted
from megamoe.refine_alike import Alike, Numbers
from megamoe.refine_index import number, op
from tests.megamoe.role_edits import ARRIVE, WAIT, assigned, calls, in_call, is_walk, only
from tests.megamoe.test_protocol import Edit, edited, in_expr
from tests.megamoe.test_roles_proof import open_claims
from verify import ir
from verify.refine import keys

ELECT = "tl_shuffle_elect"
Change = Callable[[ir.Expr], ir.Expr]


@cache
def thread(level: str, config: Config = CONFIG) -> ir.Var:
    function = getattr(extracted(config), level)
    return next(n.var for n in ir.walk(function.body) if isinstance(n, ir.Launch) and n.tag == "threadIdx.x")


@cache
def buffer(name: str, level: str = "device") -> ir.Buffer:
    nodes = ir.walk(getattr(extracted(CONFIG), level).body)
    return next(n.buffer for n in nodes if isinstance(n, (ir.Load, ir.Store)) and n.buffer.name == name)


def after(edit: Edit, level: str = "device", config: Config = CONFIG) -> list[str]:
    """Return what is open of a kernel of which one level's IR has been edited."""
    kernel = extracted(config)
    changed = {"tile": kernel.tile, "device": kernel.device}
    changed[level] = edited(edit, changed[level])
    return open_claims({"uniform": refine_uniform.claims(**changed)})


def by(what: str, size: int, level: str = "device", config: Config = CONFIG) -> Change:
    """A number of each thread's own is added: that of its group of `size` (`floordiv`), or in it."""

    def change(node: ir.Expr) -> ir.Expr:
        own = op(what, thread(level, config), number(size))
        return op("add", node, own if node.dtype == ir.INT32 else ir.Cast(node.dtype, own))

    return change


def by_lane(level: str = "device", config: Config = CONFIG) -> Change:
    return by("floormod", 2, level, config)


def odd(level: str = "device") -> ir.Expr:
    return op("eq", op("floormod", thread(level), number(2)), number(1))


def with_word(name: str) -> Change:
    """A word that somebody writes is added."""

    def change(node: ir.Expr) -> ir.Expr:
        read = buffer(name)
        return op("add", node, ir.Load(ir.INT32, read, tuple(number(0) for _ in read.shape)))

    return change


def argument(operation: str, at: int, change: Change) -> Edit:
    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not calls(node, operation):
            return None
        args = node.value.args  # type: ignore[attr-defined]
        new = replace(node.value, args=(*args[:at], change(args[at]), *args[at + 1 :]))  # type: ignore[attr-defined]
        return replace(node, value=new)  # type: ignore[type-var]

    return edit


def place(change: Change) -> Callable[[ir.Call], ir.Call]:
    def edit(call: ir.Call) -> ir.Call:
        load = call.args[0]
        assert isinstance(load, ir.Load)
        return replace(call, args=(replace(load, indices=(change(load.indices[0]),)), *call.args[1:]))

    return edit


def parity(change: Change) -> Callable[[ir.Call], ir.Call]:
    return lambda call: replace(call, args=(call.args[0], change(call.args[1])))


def moved(node: ir.Expr) -> ir.Expr:
    """A pointer, or a box of a tensor, elsewhere by lane."""
    if isinstance(node, ir.Region):
        return replace(node, mins=(*node.mins[:-1], by_lane("tile")(node.mins[-1])))
    assert isinstance(node, ir.AccessPtr)
    return replace(node, offset=by_lane()(node.offset))


def condition(name: str, change: Change) -> Edit:
    """Conditions on a variable are others."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.If):
            return None
        reads = (n for n in ir.walk(node.cond) if isinstance(n, ir.Load) and n.buffer.name == name)
        return replace(node, cond=change(node.cond)) if any(reads) else None

    return edit


def longer_for_some(node: ir.Stmt) -> ir.Stmt | None:
    return replace(node, extent=by_lane()(node.extent)) if is_walk(node) else None


def plan_by_lane(node: ir.Stmt) -> ir.Stmt | None:
    """Who looks up an expert looks at a place by lane."""

    def other(e: ir.Expr) -> ir.Expr | None:
        if isinstance(e, ir.Load) and e.buffer.name == "block_expert":
            return replace(e, indices=(*e.indices[:-1], by_lane()(e.indices[-1])))
        return None

    if not isinstance(node, (ir.Bind, ir.Store)):
        return None
    new = in_expr(node.value, other)
    same = [n for n in ir.walk(new) if isinstance(n, ir.Load)] == [
        n for n in ir.walk(node.value) if isinstance(n, ir.Load)
    ]
    return None if same else replace(node, value=new)


def by_some(operation: str) -> Edit:
    """Odd threads alone do it."""
    return lambda n: ir.If(n.span, odd(), n, None) if calls(n, operation) else None


def elected(change: Callable[[ir.If], ir.Stmt]) -> Edit:
    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.If) and isinstance(node.cond, ir.Call) and node.cond.op == ELECT:
            return change(node)
        return None

    return edit


def counts_too(node: ir.If) -> ir.Stmt:
    done = buffer("done")
    one = op("add", ir.Load(ir.INT32, done, (number(0),)), number(1))
    return replace(node, then=ir.Seq(None, (node.then, ir.Store(None, done, (number(0),), one))))


def in_shares(name: str) -> Edit:
    """A variable is set by those threads that have a part of a loop which they share."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Store) and node.buffer.name == name:
            return ir.For(node.span, ir.Var(ir.INT32, "shared"), number(0), number(8), "parallel", node, {})
        return None

    return edit


VARIABLES = ("ahead", "block", "count", "done", "kind", "number", "products", "slot", "tile")
DEVICE: dict[str, Edit] = {
    **{f"{name} by lane": assigned(name, by_lane()) for name in VARIABLES},
    "block by warp": assigned("block", by("floordiv", 32)),
    "a polled word in tile": assigned("tile", with_word("dispatched")),
    "shared memory in count": assigned("count", with_word("o_tile")),
    "an expert by lane": plan_by_lane,
    **{f"parity of {b} by lane": in_call(WAIT, b, parity(by_lane())) for b in ("full", "empty", "taken")},
    **{f"place in {b} by lane": in_call(WAIT, b, place(by_lane())) for b in ("full", "empty")},
    "place of an arrival by lane": in_call(ARRIVE, "empty", place(by_lane())),
    "rounds by lane": longer_for_some,
    "a condition by lane": condition("kind", lambda c: ir.BinOp(ir.BOOL, "or", c, odd())),
    "registers of wgmma by warp": argument("ptx_wgmma_rs", 6, by("floordiv", 32)),
    "a descriptor by lane": argument("initialize_wgmma_descriptor", 1, moved),
    "a descriptor's offset by lane": argument("increase_descriptor_offset", 1, by_lane()),
    "a descriptor is moved by some": by_some("increase_descriptor_offset"),
    "coordinates of a copy by lane": argument("tma_load", 5, by_lane()),
    "place of a copy by lane": argument("tma_load", 2, moved),
    "bytes by lane": argument("ptx_arrive_barrier_expect_tx", 1, by_lane()),
    "the elected one counts": elected(counts_too),
    "some ask for an election": elected(lambda n: ir.If(n.span, odd(), n, None)),
    "others than the elected one": elected(lambda n: replace(n, orelse=n.then)),
    "some multiply": by_some("ptx_wgmma_rs"),
    "some wait for the product": by_some("wait_wgmma"),
    "some come to a barrier": by_some("tvm_storage_sync"),
    "some meet the grid": by_some("sync_grid"),
    "some store matrices": by_some("ptx_stmatrix"),
}
TILE: dict[str, Edit] = {
    **{f"{name} by lane": assigned(name, by_lane("tile")) for name in VARIABLES},
    **{f"{name} in a loop that threads share": in_shares(name) for name in ("block", "products")},
    "a box by lane": only(1, argument("tma_copy", 0, moved)),
    "parity by lane": in_call(WAIT, "full", parity(by_lane("tile"))),
    "a condition by lane": condition("kind", lambda c: ir.BinOp(ir.BOOL, "or", c, odd("tile"))),
}
# The same in all that do it together: nothing is wrong with it here.
ALIKE: dict[str, Edit] = {
    "operand by warpgroup": argument("ptx_wgmma_rs", 8, by("floordiv", 128)),
    "done by role": assigned("done", by("floordiv", 384)),
    "lane in what each thread stores": lambda n: (
        replace(n, indices=(*n.indices[:-1], by_lane()(n.indices[-1])))
        if isinstance(n, ir.Store) and n.buffer.name == "combine"
        else None
    ),
}


class TestCompiledKernel:
    @pytest.mark.parametrize("name", DEVICE)
    def test_edits_of_the_device(self, name):
        assert after(DEVICE[name])

    @pytest.mark.parametrize("name", TILE)
    def test_edits_of_the_tile_program(self, name):
        assert after(TILE[name], "tile")

    @pytest.mark.parametrize("name", ALIKE)
    def test_what_is_the_same_in_a_group(self, name):
        assert after(ALIKE[name]) == []

    def test_both_solvers_are_asked_of_threads(self, monkeypatch):
        """What is found out by values is no proof: where it finds too much, a solver does not agree."""
        monkeypatch.setattr(Alike, "_is_constant", lambda *_: True)
        kernel = extracted(CONFIG)
        assert open_claims({"uniform": refine_uniform.claims(kernel.tile, kernel.device)})

    def test_refinement_rests_on_it(self, monkeypatch):
        """All that refinement takes as one for all threads is claimed; it is proved with it."""
        used, last = set[str](), [""]
        for name in ("tile_key", "device_key"):
            own = getattr(keys, name)

            def noted(model, storage, read, *rest, own=own):
                last[0] = read.name
                return own(model, storage, read, *rest)

            monkeypatch.setattr(keys, name, noted)
        owner = keys._owner

        def asked(model, thread):
            used.update({last[0]} if thread is None else ())
            return owner(model, thread)

        monkeypatch.setattr(keys, "_owner", asked)
        found = refine_proof.claims(extracted(CONFIG), ("uniform", "refinement"))
        lengths = {name for name in used if name.startswith("rounds")}  # notes of lengths, which are claimed
        assert {"block", "done", "kind", "slot"} <= used - lengths
        claimed = [set(note.split("decided by ")[1].split(", ")) for note in found["uniform"].notes]
        assert all(used - lengths <= names for names in claimed)
        assumed = " ".join(found["refinement"].assumptions)
        assert assumed.count("DISCHARGED by claim `uniform`") == 2
        what = {o.what for o in found["refinement"].obligations}
        assert {o.what for o in found["uniform"].obligations} <= what

    def test_refinement_without_it_assumes_it(self):
        found = refine_proof.claims(extracted(CONFIG), ("refinement",))
        assert "DISCHARGED" not in " ".join(found["refinement"].assumptions)


class TestNumbers:
    def test_values_and_terms(self):
        """Both are what the machine computes."""
        own = ir.Var(ir.INT32, "tx")
        launch = ir.Launch(None, own, "threadIdx.x", number(128), ir.Seq(None, ()))
        warp = ir.Call(ir.INT32, "shfl_sync", (ir.Const(ir.INT32, -1), own, number(0), number(32)))
        exprs = {
            op("floordiv", own, number(32)): lambda t: t // 32,
            op("floormod", op("add", own, number(3)), number(8)): lambda t: (t + 3) % 8,
            op("shr", op("bitand", warp, number(63)), number(5)): lambda t: (t // 32 * 32 & 63) >> 5,
            op("and", op("lt", own, number(70)), op("ne", own, number(5))): lambda t: t < 70 and t != 5,
            op("or", op("eq", own, number(7)), op("le", number(64), own)): lambda t: t == 7 or t >= 64,
            op("sub", number(0), op("mul", own, own)): lambda t: -t * t,
        }
        numbers = Numbers([launch])
        for expr, wanted in exprs.items():
            values = numbers.values(expr)
            assert values is not None
            assert np.array_equal(values, [int(wanted(t)) for t in range(128)])
            for t in (0, 5, 7, 63, 64, 127):
                assert z3.simplify(numbers.term(expr, z3.IntVal(t))).as_long() == values[t]

    @pytest.mark.parametrize(
        "expr",
        [
            lambda t: op("floordiv", op("sub", t, number(1)), number(2)),  # of a number below 0
            lambda t: op("floordiv", t, op("add", t, number(1))),
            lambda t: op("bitand", t, number(5)),
            lambda t: op("shl", t, number(1)),
            lambda t: ir.Call(ir.INT32, "shfl_sync", (number(1), t, number(0), number(32))),
        ],
    )
    def test_others_have_none(self, expr):
        own = ir.Var(ir.INT32, "tx")
        launch = ir.Launch(None, own, "threadIdx.x", number(64), ir.Seq(None, ()))
        assert Numbers([launch]).values(expr(own)) is None


@pytest.mark.slow
class TestPieces:
    """Threads that widen: what one warp of two keeps for itself."""

    def test_count_by_lane(self):
        assert after(assigned("pieces", by_lane(config=WIDENED)), config=WIDENED)

    def test_what_one_warp_keeps(self):
        """Both warps may not decide by the piece that the first asks for next."""

        def other(e: ir.Expr) -> ir.Expr | None:
            if isinstance(e, ir.Load) and e.buffer.name == "pieces":
                return replace(e, indices=(number(1),))
            return None

        edit = in_call(
            WAIT, "loaded", lambda call: replace(call, args=(call.args[0], in_expr(call.args[1], other)))
        )
        assert after(edit, config=WIDENED)
