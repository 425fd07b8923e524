"""Properties of the fused kernel, for every routing: proved as it is compiled, and no edit of it is."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import z3

from dsv4_kernels.contract import Contract
from megamoe import (
    filled_proof,
    output_proof,
    private_proof,
    proofs,
    properties_proof,
    roles_proof,
    signals_proof,
)
from megamoe.config import Config
from megamoe.instances import CONFIG, PLANS, WIDE, WIDENED
from megamoe.proofs import extracted
from megamoe.role_events import Box
from tests.megamoe.role_edits import is_kept, only, plan_written, strange, without
from tests.megamoe.storage_edits import (
    NOTHING,
    around,
    begun_late,
    behind_next,
    below,
    by_one_thread,
    chosen,
    dropped,
    in_pointer,
    longer,
    mask_of,
    moved,
    on,
    one_array,
    pending,
    shorter,
    stores,
    twice,
    unmasked,
    without_pointer,
)
from tests.megamoe.test_protocol import Edit, edited
from tests.megamoe.test_roles_proof import copies_of, open_claims, open_goals
from verify import ir, suites
from verify.ir import UnsupportedIR
from verify.properties import Claims, Context
from verify.verdict import Verdict

# Kernels that are edited here; `dsv4-verify` proves those of all suites.
FORMS = {"fp4": CONFIG, "wide": WIDE, "widened": WIDENED}
ROWS = 256  # channels of a row of CONFIG


def proved(claim: str) -> str:
    """Every claim of the suites is proved."""
    return ""


def claimed(edit: Edit, config: Config = CONFIG) -> dict[str, Claims]:
    function = edited(edit, extracted(config).device)
    return properties_proof.claims(function, copies_of(config), config, proved)


# --------------------------------------------------------------------------- the kernels as they are
@pytest.mark.parametrize("form", FORMS)
def test_every_property_is_proved(form):
    config = FORMS[form]
    claims = properties_proof.claims(extracted(config).device, copies_of(config), config, proved)
    assert tuple(claims) == properties_proof.CLAIMS
    assert all(claim.obligations for claim in claims.values())
    assert open_claims(claims) == []


# --------------------------------------------------------------------------- outputs
OUTPUTS: dict[str, Edit] = {
    "not written": dropped("y"),
    "written twice": twice("y"),
    "the next element": moved("y", 1),
    "the next token's": moved("y", ROWS),
    "another rank's": moved("y", ROWS * CONFIG.tokens),
    "all threads but one": on("y", below(255)),
    "only where data says so": on("y", chosen),
    "a round less": around("y", shorter),
    "a round more": around("y", longer),
    "from the second round on": around("y", begun_late),
    "copies of one thread": by_one_thread("y"),
}
CLEARED: dict[str, Edit] = {
    "the next word": moved("dispatched", 1),
    "one word by all threads": by_one_thread("l1_done"),
    "another rank's": moved("l2_done", CONFIG.pool_blocks),
}


def outputs_after(edit: Edit, config: Config = CONFIG) -> list[str]:
    function = edited(edit, extracted(config).device)
    try:
        found = signals_proof.read(function, copies_of(config), config).found
        return open_goals(output_proof.written_once(config, found))
    except UnsupportedIR as error:
        return [str(error)]


@pytest.mark.parametrize("name", CLEARED)
def test_words_that_are_cleared_twice_are_not_proved(name):
    function = edited(CLEARED[name], extracted(CONFIG).device)
    found = signals_proof.read(function, copies_of(CONFIG), CONFIG).found.values()
    tensors = signals_proof.counters(CONFIG)
    goals = []
    for tensor, words in tensors.items():
        puts = [(f, e) for f in found for e in f.events if e.kind == "put" and e.what == tensor]
        goals += output_proof.cleared_once(CONFIG, tensor, words, puts, 512)
    assert open_goals(goals)


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_are_written_otherwise_are_not_proved(name):
    assert outputs_after(OUTPUTS[name])


def test_outputs_of_vectors_are_followed():
    def narrower(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.Store) or not stores(node, "y"):
            return None
        (index,) = node.indices
        assert isinstance(index, ir.Ramp)
        return replace(node, indices=(index.base,), value=_one_lane(node.value))

    assert outputs_after(narrower, WIDE)
    assert outputs_after(moved("y", 1), WIDE)


def _one_lane(value: ir.Expr) -> ir.Expr:
    assert isinstance(value, ir.Load)
    (index,) = value.indices
    assert isinstance(index, ir.Ramp)
    return replace(value, indices=(index.base,), dtype=replace(value.dtype, lanes=1))


# --------------------------------------------------------------------------- a thread's own storage
def private_after(edit: Edit | None, config: Config = CONFIG) -> tuple[list[str], list[str]]:
    """Return what is open of private storage: of what is read, and of registers."""
    function = extracted(config).device
    if edit is not None:
        function = edited(edit, function)
    only_if = {output_proof.ADDED: partial(output_proof.has_row, config)}
    try:
        parts = roles_proof.roles_of(config).parts
        found = private_proof.follow(function, parts, copies_of(config), only_if)
    except UnsupportedIR as error:
        return [str(error)], [str(error)]
    return open_goals([*found.initialised, *found.used]), [i.message for i in found.issues]


def variables(config: Config) -> list[str]:
    """Return the names of private storage that is written by stores and read."""
    body = extracted(config).device.body
    names = {
        kind: {
            n.buffer.data.name
            for n in ir.walk(body)
            if isinstance(n, kind) and private_proof.is_private(n.buffer)
        }
        for kind in (ir.Load, ir.Store)
    }
    return sorted(names[ir.Load] & names[ir.Store])


def unnoticed(names: list[str]) -> list[str]:
    """Return variables whose stores can be dropped: many at once, then those that this says nothing of."""
    function = extracted(CONFIG).device
    for name in names:
        function = edited(dropped(name), function)
    try:
        found = private_proof.follow(function, roles_proof.roles_of(CONFIG).parts, copies_of(CONFIG), {})
    except UnsupportedIR:
        left = names if len(names) > 1 else []
    else:
        # Nothing is put there on any way: one such read will do.
        reads = {n: [o for o in found.initialised if f": {n} is written" in o.what] for n in names}
        false = {n: [o for o in of if z3.is_false(o.goal)] for n, of in reads.items()}
        left = [n for n, of in false.items() if not open_goals(of[:1])]
    if len(names) == 1:
        return left
    half = (len(left) + 1) // 2
    return [n for part in (left[:half], left[half:]) if part for n in unnoticed(part)]


def test_no_variable_is_read_that_is_not_written():
    """Without its stores each variable of the kernel is one that is read too soon."""
    names = variables(CONFIG)
    assert len(names) > 35
    assert unnoticed(names) == []


def kept(element: int) -> Edit:
    """The rows' warp does not keep something of a product."""
    return lambda node: NOTHING if is_kept(node, element) else None


SOON: dict[str, tuple[Edit, Config]] = {
    "sums begin at nothing": (only(0, dropped("total")), CONFIG),
    **{f"block {n}": (only(n, dropped("block")), CONFIG) for n in range(2)},
    **{f"tile {n}": (only(n, dropped("tile")), CONFIG) for n in range(2)},
    "some of the accumulators": (only(0, around("acc_a", shorter)), CONFIG),
    "some of the factors": (around("factor_a", shorter), CONFIG),
    "factors of some threads": (on("factor_a", below(255)), CONFIG),
    "factors where data says so": (on("factor_a", chosen), CONFIG),
    "rows behind their use": (behind_next("rows"), CONFIG),
    "a maximum that begins at nothing": (only(0, dropped("amax")), CONFIG),
    "some codes": (only(0, around("codes_a", shorter)), CONFIG),
    "no place is kept": (kept(0), WIDE),
    "no number is kept": (kept(3), WIDE),
    "slots without an expert are added": (unmasked, CONFIG),
    "the next slot's mask": (mask_of(1), CONFIG),
    "the next token's mask": (mask_of(CONFIG.topk), CONFIG),
}


@pytest.mark.parametrize("name", SOON)
def test_what_is_read_too_soon_is_not_proved(name):
    soon, registers = private_after(*SOON[name])
    assert soon
    assert registers == []


# --------------------------------------------------------------------------- registers of the tensor core
REGISTERS: dict[str, tuple[Edit, Config]] = {
    "no wait": (without("wait_wgmma"), CONFIG),
    "the first wait dropped": (only(0, without("wait_wgmma")), CONFIG),
    "the last wait dropped": (only(1, without("wait_wgmma")), CONFIG),
    "a wait for one group less": (only(1, pending(1)), CONFIG),
    "the first wait for one group less": (only(0, pending(2)), CONFIG),
    "no group": (without("warpgroup_commit_batch"), CONFIG),
    "no arrival": (without("warpgroup_arrive"), CONFIG),
    "the second arrival dropped": (only(1, without("warpgroup_arrive")), CONFIG),
    "registers that are still read": (one_array, CONFIG),
    "wide: no first wait": (only(0, without("wait_wgmma")), WIDE),
    "wide: no second wait": (only(1, without("wait_wgmma")), WIDE),
    "wide: no arrival": (only(0, without("warpgroup_arrive")), WIDE),
}


@pytest.mark.parametrize("name", REGISTERS)
def test_registers_that_the_tensor_core_has_are_its_own(name):
    assert private_after(*REGISTERS[name])[1]


# --------------------------------------------------------------------------- how much is filled
def filled_after(
    edit: Edit | None, config: Config = CONFIG, copies: dict[str, Box] | None = None
) -> list[str]:
    function = extracted(config).device
    if edit is not None:
        function = edited(edit, function)
    try:
        kernel = roles_proof.read(function, copies or copies_of(config), roles_proof.roles_of(config))
        return open_goals(filled_proof.filled(kernel.rings, config.pool_blocks))
    except UnsupportedIR as error:
        return [str(error)]


FILLED: dict[str, tuple[Edit, Config]] = {
    **{
        f"{half} is not written": (without_pointer("ptx_stmatrix", half), CONFIG)
        for half in ("out_a", "out_b")
    },
    **{f"{half} further on": (in_pointer("ptx_stmatrix", half, 8), CONFIG) for half in ("out_a", "out_b")},
    "weights are not written": (dropped("weight_tile"), CONFIG),
    "weights of all rows but one": (on("weight_tile", below(384 + CONFIG.block_m - 1)), CONFIG),
    "the next row's place": (moved("weight_tile", 1), CONFIG),
    "weights where data says so": (on("weight_tile", chosen), CONFIG),
    "factors are not written": (dropped("factor_tile"), WIDENED),
    "factors of all threads but one": (on("factor_tile", below(255)), WIDENED),
    "factors further on": (moved("factor_tile", 1), WIDENED),
    **{
        f"a copy to {array} begins later": (in_pointer("tma_load", array, 16), CONFIG)
        for array in ("x_tile", "s_tile", "w_tile", "o_tile")
    },
    "a piece's copy begins later": (in_pointer("tma_load", "codes_tile", 16), WIDENED),
    "a piece's offsets begin later": (in_pointer("tma_load", "o_tile", 16), WIDENED),
}


@pytest.mark.parametrize("name", FILLED)
def test_what_is_not_filled_is_not_proved(name):
    assert filled_after(*FILLED[name])


@pytest.mark.parametrize("tensor", ["x_ring", "x_ring_scale", "words", "offsets"])
def test_copies_that_bring_less_are_not_proved(tensor):
    less = {
        name: replace(box, bytes_=box.bytes_ // 2) if box.tensor == tensor else box
        for name, box in copies_of(CONFIG).items()
    }
    assert filled_after(None, copies=less)


# --------------------------------------------------------------------------- what nothing covers
def also(tensor: str, change: Callable[[ir.Store], ir.Stmt]) -> Edit:
    """Behind the last store to a tensor there is something more."""
    return lambda node: (
        ir.Seq(None, (node, change(node))) if isinstance(node, ir.Store) and stores(node, tensor) else None
    )


def read_again(node: ir.Store) -> ir.Stmt:
    value = ir.Load(node.buffer.dtype, node.buffer, (ir.Const(ir.INT32, 0),))
    return ir.Bind(None, ir.Var(node.buffer.dtype, "again"), value)


def written_elsewhere(name: str) -> Callable[[ir.Store], ir.Stmt]:
    body = extracted(CONFIG).device.body
    buffer = next(n.buffer for n in ir.walk(body) if isinstance(n, ir.Decl) and n.buffer.data.name == name)
    return lambda node: replace(node, buffer=buffer)


UNCOVERED: dict[str, tuple[Edit, set[str]]] = {
    "the plan is written": (plan_written, {"coverage", "schedule", "init", "race"}),
    "weights are written": (
        also("y", written_elsewhere("row_weight")),
        {"coverage", "schedule", "init", "race"},
    ),
    "combine rows are written behind": (
        also("y", written_elsewhere("combine")),
        {"coverage", "init", "race"},
    ),
    "outputs are read": (also("y", read_again), {"coverage", "init", "race"}),
    "an operation without a meaning": (strange, set(properties_proof.CLAIMS)),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_no_claim_covers_is_not_proved(name):
    edit, wanted = UNCOVERED[name]
    claims = claimed(edit)
    assert {what for what, claim in claims.items() if open_claims({what: claim})} >= wanted


AS_THE_VERIFIER_SAYS = {
    "load from": "load",
    "store to": "store",
    "atomic_load_elem_op": "load",
    "atomic_": "atomic",
    "stmatrix": "atomic",
    "TMA load": "copy",
    "mbarrier": "load",
    "dsv4_store_b32": "load",
    "wgmma descriptor": "operand",
    "wgmma": "call",
}


@pytest.mark.parametrize("form", ["fp4", "widened"])
def test_accesses_are_those_that_the_verifier_knows(form):
    kernel = extracted(FORMS[form])
    memory = Context(kernel, Contract(()), {}).memory
    assert not memory.unsupported
    theirs = Counter(
        (a.storage.name, next(how for what, how in AS_THE_VERIFIER_SAYS.items() if a.what.startswith(what)))
        for a in memory.accesses
    )
    found = properties_proof.uses(kernel.device, copies_of(FORMS[form]))
    tensors = {name for name, _ in theirs}
    ours = Counter((u.storage, u.how) for u in found if u.storage in tensors)
    ours -= Counter((u.storage, u.how) for u in found if u.kind == "global" and u.how == "call")
    assert ours == theirs


@pytest.mark.parametrize("name", properties_proof.CLAIMS)
def test_what_rests_on_an_open_claim_is_unknown(name):
    kernel, rests = extracted(CONFIG), set()

    def missing(claim: str) -> str:
        rests.add(claim)
        return "open" if claim == "roles:walks" else ""

    claims = properties_proof.claims(kernel.device, copies_of(CONFIG), CONFIG, missing)
    assert [issue.message for issue in claims[name].unknown] == ["rests on roles:walks: open"]
    assert {"roles:stages", "signals:places", "signals:order"} <= rests


def test_claims_that_are_open_or_of_other_code_are_missing(monkeypatch):
    of = {"roles": "roles", "signals": "signals"}
    verdicts = {"walks": Verdict.PROVED, "stages": Verdict.UNKNOWN}
    monkeypatch.setattr(properties_proof, "_proved", lambda name: verdicts)
    missing = properties_proof.missing_of(extracted(CONFIG).cuda_sha256, of)
    assert missing("roles:walks") == ""
    assert missing("roles:stages") == "in roles it is UNKNOWN"
    assert missing("roles:unheard") == "roles has no such claim"
    assert properties_proof.missing_of("other", of)("roles:walks") == "roles is about other code"
    assert missing_of_no_suite("roles:walks")


def missing_of_no_suite(claim: str) -> str:
    return properties_proof.missing_of("text", {"roles": "unheard", "signals": "signals"})(claim)


def test_each_kernel_with_roles_and_signals_has_properties():
    found = {name for kernel, name in suites.suites() if kernel == "megamoe"}
    forms = {name.removeprefix("roles") for name in found if name.startswith("roles")}
    assert forms == {name.removeprefix("signals") for name in found if name.startswith("signals")}
    of_plans = {f"properties-{name}" for name in PLANS}
    assert of_plans <= found
    of_fused = {name for name in found if name.startswith("properties")} - of_plans
    assert forms == {name.removeprefix("properties") for name in of_fused}
    assert "-flash-fp4-64" in forms
    assert set(proofs.SUITES["properties"].claims) == set(properties_proof.CLAIMS)
