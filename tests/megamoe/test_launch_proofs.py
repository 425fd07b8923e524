"""Every property of the plan's kernel and of the inputs', as they are compiled; of edits none is proved."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import z3

from megamoe import (
    plan_machine,
    plan_properties,
    proofs,
    refine_plan,
    stage_proof,
)
from megamoe.instances import CONFIG, PLANS, STAGES
from megamoe.launch_proofs import plan_extracted, stage_extracted
from megamoe.plan_guide import PlanGuide
from tests.megamoe.role_edits import only, plus
from tests.megamoe.storage_edits import NOTHING, dropped, moved, on, stores
from tests.megamoe.test_machine_proof import open_claims as open_answers
from tests.megamoe.test_plan_proof import changed, number, open_claims, valued
from tests.megamoe.test_protocol import Edit, edited
from verify import ir, suites
from verify.properties import all_properties

# Those of models are proved by the suites.
KERNELS = [pytest.param(n, marks=[pytest.mark.slow] * (n in ("plan-flash", "plan-pro"))) for n in PLANS]
ALL = {p.name for p in all_properties()}
NAMES = [name.removeprefix("plan") for name in PLANS]


def level_of(kernel, edit: Edit, level: str = "device"):
    return replace(kernel, **{level: edited(edit, getattr(kernel, level))})


def one_more(name: str) -> Edit:
    """What is put in a buffer is one more."""
    return lambda node: (
        replace(node, value=plus(node.value, 1))
        if isinstance(node, ir.Store) and stores(node, name)
        else None
    )


def bounded_by(name: str, change: Callable[[ir.If], ir.Stmt]) -> Edit:
    """Change a condition whose first statement is a store to a buffer."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        then = node.then if isinstance(node, ir.If) else None
        if isinstance(node, ir.If) and isinstance(then, ir.Store) and stores(then, name):
            return change(node)
        return None

    return edit


def calls(op: str, change: Callable[[ir.Eval], ir.Stmt]) -> Edit:
    return lambda node: (
        change(node)
        if isinstance(node, ir.Eval) and isinstance(node.value, ir.Call) and node.value.op == op
        else None
    )


def call(node: ir.Eval) -> ir.Call:
    assert isinstance(node.value, ir.Call)
    return node.value


# --------------------------------------------------------------------------- which suites there are
@pytest.mark.parametrize("form", NAMES)
def test_suites_of_a_plan_have_every_property(form):
    names = (f"properties-plan{form}", f"machine-plan{form}", f"refinement-plan{form}")
    claims = [claim for name in names for claim in proofs.SUITES[name].claims]
    assert sorted(claims) == sorted(ALL)
    meets = PLANS[f"plan{form}"].num_ranks > 1
    assert ("meeting" in proofs.SUITES[f"plan{form}"].claims) == meets


def test_suites_of_the_inputs_have_every_property():
    assert set(STAGES) == {name for name in proofs.SUITES if name.startswith("stage")}
    assert all(set(proofs.SUITES[name].claims) == ALL for name in STAGES)


# --------------------------------------------------------------------------- refinement of a plan
def refined(edit: Edit, level: str = "device", name: str = "plan") -> list[str]:
    kernel = level_of(plan_extracted(PLANS[name]), edit, level)
    found = open_claims({"refinement": refine_plan.claims(kernel)["refinement"]})
    return found.get("refinement", [])


@pytest.mark.parametrize("name", KERNELS)
def test_the_device_computes_the_plan_of_the_tile_program(name):
    claims = refine_plan.claims(plan_extracted(PLANS[name]))
    assert tuple(claims) == refine_plan.CLAIMS
    assert open_claims(claims, recheck=True) == {}
    assert any("0 left to the solvers" in note for note in claims["refinement"].notes)


def shifted(by: int) -> Callable[[ir.Expr], ir.Expr | None]:
    """The number of the bit that is set is another."""

    def change(node: ir.Expr) -> ir.Expr | None:
        if isinstance(node, ir.BinOp) and node.op == "shl":
            return replace(node, b=plus(node.b, by))
        return None

    return change


def in_condition(op: str, change: Callable[[ir.BinOp], ir.Expr]) -> Edit:
    def of(node: ir.Expr) -> ir.Expr | None:
        return change(node) if isinstance(node, ir.BinOp) and node.op == op else None

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.If) and any(of(e) for e in ir.walk(node.cond) if isinstance(e, ir.Expr)):
            return replace(node, cond=changed(node.cond, of))
        return None

    return edit


def other_bit(node: ir.BinOp) -> ir.Expr:
    return replace(node, b=plus(node.b, 1))


def longer(name: str) -> Edit:
    """A loop whose body stores to a buffer has a round more."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.For) and any(
            isinstance(n, ir.Store) and stores(n, name) for n in ir.walk(node)
        ):
            return replace(node, extent=plus(node.extent, 1))
        return None

    return edit


REFINED: dict[str, tuple[Edit | Callable[[], Edit], str]] = {
    "another bit is set": (valued("found", shifted(1)), "device"),
    "another bit is looked at": (in_condition("shr", other_bit), "device"),
    "another bit of the tile program's": (in_condition("shr", other_bit), "tile"),
    "a bit is not set": (dropped("found"), "device"),
    "an entry's row": (moved("row_source", 1), "device"),
    "an entry": (one_more("row_source"), "device"),
    "a target": (one_more("row_target"), "device"),
    "a target of the tile program": (one_more("row_target"), "tile"),
    "rows that are no entries'": (valued("row_target", number(-1, -2)), "device"),
    "a block's expert": (one_more("block_expert"), "device"),
    "blocks further on": (moved("block_expert", 1), "device"),
    "a count": (one_more("counts"), "device"),
    "counts of a thread further on": (moved("seen", 1), "device"),
    "counts of lanes": (moved("partial", 1), "device"),
    "a warp's sum dropped": (dropped("of_warp"), "device"),
    "a bound of sums": (valued("total", number(40, 39)), "device"),
    "blocks rounded in another way": (valued("blocks_of", number(15, 14)), "device"),
    "the last bound of places": (valued("place", number(40, 41)), "device"),
    "the tile program's bound of places": (valued("place", number(40, 41)), "tile"),
    "a place that thread 0 has not": (one_more("place"), "device"),
    "an expert more before it": (longer("before"), "device"),
    "a row more": (longer("row_weight"), "device"),
    "a row more of the tile program": (longer("row_weight"), "tile"),
    "firsts on no condition": (bounded_by("counts", lambda node: node.then), "device"),
    "no counts": (dropped("counts"), "tile"),
    "another epoch": (
        calls("atomic_store_elem_op", lambda n: replace(n, value=with_arg(call(n), 1, plus))),
        "device",
    ),
    "relaxed": (
        calls("atomic_store_elem_op", lambda n: replace(n, value=with_arg(call(n), 2, plus))),
        "device",
    ),
    "no signal": (calls("atomic_store_elem_op", lambda n: NOTHING), "device"),
    "no word of a wait given up": (calls("atomic_max_elem_op", lambda n: NOTHING), "device"),
    "polls": (one_more("polls"), "device"),
}


def with_arg(node: ir.Call, at: int, change: Callable[[ir.Expr, int], ir.Expr]) -> ir.Call:
    arg = node.args[at]
    new = replace(arg, value=arg.value - 1) if isinstance(arg, ir.Const) else change(arg, 1)
    return replace(node, args=(*node.args[:at], new, *node.args[at + 1 :]))


@pytest.mark.parametrize("what", REFINED)
def test_edits_of_either_level_are_not_the_other(what):
    edit, level = REFINED[what]
    assert refined(edit, level)


def test_bits_of_an_odd_plan_are_compared():
    assert refined(valued("found", number(1, 2)), name="plan-odd")
    assert refined(dropped("found"), name="plan-odd")


# --------------------------------------------------------------------------- properties that follow data
def of_data(edit: Edit | None = None, name: str = "plan", left: str = "") -> dict[str, list[str]]:
    """Return what is open, by claims; `left` is a claim that is not proved."""
    device = plan_extracted(PLANS[name]).device
    device = device if edit is None else edited(edit, device)
    guide = PlanGuide(PLANS[name])
    return open_claims(plan_properties.claims(device, guide, lambda c: "it is UNKNOWN" if c == left else ""))


@pytest.mark.parametrize("name", KERNELS)
def test_properties_that_follow_data_are_proved(name):
    assert of_data(name=name) == {}


@pytest.mark.parametrize(
    ("claim", "wanted"),
    [
        ("order", {"coverage", "schedule", "init", "race"}),
        ("written", {"init"}),
        ("outputs", {"coverage", "schedule", "race", "batch_invariance"}),
        ("meeting", set(plan_properties.CLAIMS)),
        ("nothing-else", set(plan_properties.CLAIMS)),
    ],
)
def test_what_rests_on_a_claim_of_the_plan_is_open_without_it(claim, wanted):
    assert set(of_data(left=f"plan:{claim}")) == wanted


def plain_signal(node: ir.Eval) -> ir.Stmt:
    """What is said to a peer is stored as any word."""
    pointer, value, *_ = call(node).args
    assert isinstance(pointer, ir.AccessPtr)
    view = ir.Buffer(
        "signals", ir.INT32, (), (ir.Const(ir.INT32, 1),), "", pointer.data, ir.Const(ir.INT32, 0)
    )
    return ir.Store(node.span, view, (pointer.offset,), value)


DATA: dict[str, tuple[Callable[[], Edit], str]] = {
    "words for peers that are not atomic": (lambda: calls("atomic_store_elem_op", plain_signal), "race"),
    "polls that begin with anything": (lambda: only(0, dropped("polls")), "init"),
    "entries that begin with anything": (lambda: only(0, dropped("count_entries")), "init"),
    "places that begin with anything": (lambda: only(0, dropped("place")), "init"),
    "a store that nothing follows": (lambda: unfollowed(), "coverage"),
}


def unfollowed() -> Edit:
    """A store in a loop without rounds: nothing follows it."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not (isinstance(node, ir.Store) and stores(node, "counts")):
            return None
        zero, counter = ir.Const(ir.INT32, 0), ir.Var(ir.INT32, "never")
        return ir.Seq(None, (node, ir.For(node.span, counter, zero, zero, "unrolled", replace(node), {})))

    return edit


@pytest.mark.parametrize("what", DATA)
def test_edits_of_what_is_accessed_are_not_covered(what):
    edit, claim = DATA[what]
    assert claim in of_data(edit())


@pytest.mark.parametrize(
    ("claim", "change"),
    [
        ("coverage", {"first_row": z3.IntVal(0)}),
        ("batch_invariance", {"target": lambda entry: entry}),
    ],
)
def test_another_guide_is_not_proved(claim, change):
    guide = PlanGuide(CONFIG)
    for name, value in change.items():
        setattr(guide, name, value)
    claims = plan_properties.claims(plan_extracted().device, guide, lambda c: "")
    assert claim in open_claims(claims)


def test_elements_that_no_cta_writes_are_open():
    guide = PlanGuide(CONFIG)
    guide.writes["row_target"] = guide.writes["block_expert"]
    guide.writes["counts"] = guide.writes["firsts"]
    claims = plan_properties.claims(plan_extracted().device, guide, lambda c: "")
    assert {"row_target has the rows of row_source", "each element of counts is some CTA's"} <= set(
        open_claims(claims)["coverage"]
    )


# --------------------------------------------------------------------------- as on any kernel
def machine(
    monkeypatch, edit: Edit | None = None, name: str = "plan", left: str = ""
) -> dict[str, list[str]]:
    monkeypatch.setattr(suites, "missing", lambda c, text: "it is UNKNOWN" if c.endswith(left or "?") else "")
    kernel = plan_extracted(PLANS[name])
    kernel = kernel if edit is None else level_of(kernel, edit)
    return open_answers(plan_machine.claims(kernel, PLANS[name], name, f"properties-{name}"))


@pytest.mark.parametrize("name", KERNELS)
def test_the_verifiers_own_properties_are_proved(monkeypatch, name):
    assert machine(monkeypatch, name=name) == {}


@pytest.mark.parametrize(
    ("claim", "wanted"), [(":race", ["determinism"]), (":init", ["barrier"]), (":meeting", ["determinism"])]
)
def test_what_rests_on_another_suite_is_open_without_it(monkeypatch, claim, wanted):
    assert list(machine(monkeypatch, left=claim)) == wanted


def in_one_bank(node: ir.Stmt) -> ir.Stmt | None:
    """A thread's counts are in the bank of its expert."""
    if not (isinstance(node, ir.Store) and stores(node, "seen")):
        return None
    (index,) = node.indices
    new = changed(
        index, lambda e: replace(e, value=255) if isinstance(e, ir.Const) and e.value == 256 else None
    )
    return None if new is index else replace(node, indices=(new,))


def by_expert(node: ir.Eval) -> ir.Stmt:
    """CTAs tell their peers different numbers."""
    expert = next(n.var for n in ir.walk(plan_extracted().device.body) if isinstance(n, ir.Launch))
    pointer, value, *how = call(node).args
    return replace(
        node, value=replace(call(node), args=(pointer, ir.BinOp(ir.INT32, "add", value, expert), *how))
    )


def some(node: ir.Store) -> ir.Expr:
    """That some lanes happen to be active."""
    lanes = ir.Call(ir.INT32, "tvm_warp_activemask", ())
    return ir.BinOp(ir.BOOL, "ne", lanes, ir.Const(ir.INT32, 1))


def barrier_of_some(node: ir.Eval) -> ir.Stmt:
    thread = next(
        n.var
        for n in ir.walk(plan_extracted().device.body)
        if isinstance(n, ir.Launch) and n.tag == "threadIdx.x"
    )
    return ir.If(None, ir.BinOp(ir.BOOL, "eq", thread, ir.Const(thread.dtype, 0)), node, None)


MACHINE: dict[str, Callable[[], Edit]] = {
    "overflow": lambda: moved("counts", 2**31 - 1),
    "alignment": lambda: valued("chosen", misaligned),
    "banks": lambda: in_one_bank,
    "barrier": lambda: only(2, calls("tvm_storage_sync", barrier_of_some)),
    "bounds": lambda: moved("counts", 6),
    "determinism": lambda: on("counts", some),
}


def misaligned(node: ir.Expr) -> ir.Expr | None:
    """Entries that are read together begin at one that is not the first of four."""
    if isinstance(node, ir.Load) and isinstance(node.indices[0], ir.Ramp):
        (ramp,) = node.indices
        return replace(node, indices=(replace(ramp, base=plus(ramp.base, 1)),))
    return None


@pytest.mark.parametrize("claim", MACHINE)
def test_an_edit_of_each_property_is_not_proved(monkeypatch, claim):
    found = machine(monkeypatch, MACHINE[claim]())
    assert [message for message in found[claim] if not message.startswith("rests on")]


def test_words_of_peers_that_differ_between_ctas_are_not_determined(monkeypatch):
    assert "determinism" in machine(monkeypatch, calls("atomic_store_elem_op", by_expert))


def test_waits_stay_as_they_are():
    device = plan_extracted().device
    found, obligations = plan_machine.settled(device)
    whiles = [n for n in ir.walk(found.body) if isinstance(n, ir.While)]
    assert [n for n in ir.walk(device.body) if isinstance(n, ir.While)] == whiles
    assert len(obligations) == 2
    assert plan_machine.settled(plan_extracted(PLANS["plan-flash"]).device)[1] == []


# --------------------------------------------------------------------------- the inputs
def staged(edit: Edit | None = None, level: str = "device", config=CONFIG) -> dict[str, list[str]]:
    kernel = stage_extracted(config)
    kernel = kernel if edit is None else level_of(kernel, edit, level)
    return open_answers(stage_proof.claims(kernel, config, "stage"))


@pytest.mark.parametrize("name", STAGES)
def test_every_property_of_the_inputs_is_proved(name):
    claims = stage_proof.claims(stage_extracted(STAGES[name]), STAGES[name], name)
    assert set(claims) == ALL
    assert open_answers(claims) == {}
    assert any(note.startswith("signature over rows (count)") for note in claims["batch_invariance"].notes)


def token_in(name: str) -> Edit:
    """The number of a token is added to what is put down of it."""
    block = next(n.var for n in ir.walk(stage_extracted().tile.body) if isinstance(n, ir.Launch))

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Store) and stores(node, name) and not isinstance(node.value, ir.Const):
            return replace(node, value=ir.BinOp(ir.INT32, "add", node.value, block))
        return None

    return edit


def neighbour(name: str) -> Edit:
    """What is put down of a token is that of the first."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Store) and stores(node, name) and isinstance(node.value, ir.Load):
            first = ir.Const(ir.INT32, 0)
            return replace(node, value=replace(node.value, indices=(first, *node.value.indices[1:])))
        return None

    return edit


STAGED: dict[str, tuple[Callable[[], Edit], str, str]] = {
    "a part too far": (lambda: moved("idx_parts", 60), "device", "bounds"),
    "a place that no int32 holds": (lambda: moved("idx_parts", 2**31 - 1), "device", "overflow"),
    "a channel further on": (lambda: moved("x_parts", 1), "device", "alignment"),
    "scales of another place": (lambda: moved("scale_parts", 1), "device", "refinement"),
    "no weights": (lambda: dropped("weight_parts"), "device", "refinement"),
    "another expert": (lambda: one_more("idx_parts"), "tile", "refinement"),
    "all of one place": (lambda: at_zero("weight_parts"), "device", "coverage"),
    "all of one place, at once": (lambda: at_zero("idx_parts"), "device", "race"),
    "on what lanes are active": (lambda: on("x_parts", some), "device", "determinism"),
    "a token's number": (lambda: token_in("idx_parts"), "tile", "batch_invariance"),
    "a neighbour's channels": (lambda: neighbour("x_parts"), "tile", "batch_invariance"),
    "a place of two rows": (lambda: at_zero("weight_parts"), "tile", "batch_invariance"),
}


def at_zero(name: str) -> Edit:
    return lambda node: (
        replace(node, indices=tuple(ir.Const(i.dtype, 0) for i in node.indices))
        if isinstance(node, ir.Store) and stores(node, name)
        else None
    )


@pytest.mark.parametrize("what", STAGED)
def test_edits_of_the_inputs_are_not_proved(what):
    edit, level, claim = STAGED[what]
    found = staged(edit(), level)
    assert [m for m in found.get(claim, []) if not m.startswith("rests on")], found


def test_rows_of_another_program_have_no_form():
    tile = stage_extracted().tile
    with pytest.raises(ir.UnsupportedIR, match="beside the condition"):
        stage_proof.by_rows(edited(lambda n: outside(n, tile), tile))
    with pytest.raises(ir.UnsupportedIR, match="not one condition"):
        stage_proof.by_rows(edited(lambda n: n.then if isinstance(n, ir.If) else None, tile))


def outside(node: ir.Stmt, tile: ir.Function) -> ir.Stmt | None:
    if not isinstance(node, ir.If):
        return None
    store = next(n for n in ir.walk(tile.body) if isinstance(n, ir.Store))
    return ir.Seq(None, (node, replace(store)))
