"""The verifier's own properties of the fused kernel, as it is compiled; an edit of each is not proved."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from megamoe import contracts, machine_proof, proofs
from megamoe.config import Config
from megamoe.instances import AHEAD, CONFIG, WIDE, WIDENED
from megamoe.proofs import extracted
from tests.megamoe.role_edits import calls, only
from tests.megamoe.storage_edits import in_pointer, moved, on, stores, thread
from tests.megamoe.test_protocol import Edit, edited
from verify import engine, ir, suites
from verify.properties import Claims
from verify.solve import Obligation, Proved, by_z3_alone, remembering
from verify.verdict import VariantReport, Verdict

SUITE = "properties"  # of which other claims are taken as proved here, or as open
ROWS = CONFIG.num_ranks * CONFIG.tokens * CONFIG.hidden  # elements of `y`
Missing = Callable[[str, str], str]
# What z3 proved of a kernel: most of it is asked of an edit of that kernel too.
PROVED: Proved = {}


def proved(claim: str, text: str) -> str:
    return ""


def claimed(
    monkeypatch: pytest.MonkeyPatch,
    config: Config = CONFIG,
    edit: Edit | None = None,
    missing: Missing = proved,
    asked: tuple[str, ...] = machine_proof.CLAIMS,
) -> dict[str, Claims]:
    """Return what is claimed, by z3 alone, of a kernel or of an edit of it: all, or what is asked for."""
    monkeypatch.setattr(suites, "missing", missing)
    monkeypatch.setattr(machine_proof, "CLAIMS", asked)
    kernel = extracted(config)
    if edit is not None:
        kernel = replace(kernel, device=edited(edit, kernel.device))
    with remembering(PROVED), by_z3_alone():
        return machine_proof.claims(kernel, config, SUITE)


def claimed_by_both(
    monkeypatch: pytest.MonkeyPatch, config: Config, missing: Missing = proved
) -> dict[str, Claims]:
    """Return what is claimed by both solvers of a kernel as it is, whose `race` is proved: asked once."""
    monkeypatch.setattr(suites, "missing", missing)
    monkeypatch.setattr(engine, "check", partial(asked_once, config))
    with remembering(PROVED):
        return machine_proof.claims(extracted(config), config, SUITE)


CHECK = engine.check
ANSWERED: dict[Config, tuple[VariantReport, dict[str, list[Obligation]]]] = {}


def asked_once(config: Config, *what: Any, **how: Any) -> VariantReport:
    """`engine.check` of a kernel as it is."""
    race, *properties = how["properties"]
    assert race.name == "race"
    if config not in ANSWERED:
        report = CHECK(*what, **how)
        ANSWERED[config] = report, {p.name: p.asked for p in properties}
    report, asked = ANSWERED[config]
    for prop in properties:
        prop.asked = asked[prop.name]
    return report


def open_claims(claims: dict[str, Claims]) -> dict[str, list[str]]:
    """Return what is not proved, by claim."""
    found = {}
    for name, claim in claims.items():
        issues = [i.message for i in (*claim.unknown, *claim.unsupported)]
        issues += [a.obligation.what for a in claim.answers if a.verdict is not Verdict.PROVED]
        if issues or not claim.answers:
            found[name] = issues
    return found


# --------------------------------------------------------------------------- the kernels as they are
@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["fp4", "wide"])  # those that are edited below
def test_every_property_is_proved(monkeypatch, config):
    claims = claimed_by_both(monkeypatch, config)
    assert tuple(claims) == tuple(n for n in machine_proof.CLAIMS if n in machine_proof.names(config))
    assert open_claims(claims) == {}
    assert len(claims["overflow"].answers) > 500
    assert any(f"DISCHARGED by megamoe/{SUITE}:race" in a for a in claims["determinism"].assumptions)
    assert any(f"DISCHARGED by megamoe/{SUITE}:init" in a for a in claims["barrier"].assumptions)


def test_each_kernel_of_the_properties_has_a_suite():
    names = {name.removeprefix("properties") for name in proofs.SUITES if name.startswith("properties")}
    machines = {name.removeprefix("machine") for name in proofs.SUITES if name.startswith("machine")}
    assert machines == names


def test_bank_conflicts_are_claimed_where_all_accesses_are_decided():
    assert "banks" in machine_proof.names(AHEAD)
    assert "banks" not in machine_proof.names(WIDENED)


# --------------------------------------------------------------------------- what claims rest on
def test_race_is_another_suites(monkeypatch):
    def missing(claim: str, text: str) -> str:
        return "it is UNKNOWN" if claim.endswith(":race") else ""

    assert list(open_claims(claimed(monkeypatch, missing=missing))) == ["determinism"]


def test_without_init_nothing_of_a_kernel_with_zeros_is_proved(monkeypatch):
    def missing(claim: str, text: str) -> str:
        return "it is UNKNOWN" if claim.endswith(":init") else ""

    assert tuple(open_claims(claimed_by_both(monkeypatch, WIDE, missing))) == machine_proof.CLAIMS
    assert list(open_claims(claimed_by_both(monkeypatch, CONFIG, missing))) == ["barrier"]


def test_a_contract_that_nothing_satisfies_proves_nothing(monkeypatch):
    monkeypatch.setattr(contracts, "clauses", lambda config: ("0 < 0",))
    assert tuple(open_claims(claimed(monkeypatch))) == machine_proof.CLAIMS


# --------------------------------------------------------------------------- zeros
def test_variables_are_zeroed_where_something_is_kept():
    function = extracted(CONFIG).device
    assert machine_proof.with_zeros(function) == (function, ())
    device = extracted(WIDE).device
    found, names = machine_proof.with_zeros(device)
    assert {"held", "slot", "block"} <= set(names)
    before = {id(n) for n in ir.walk(device.body) if isinstance(n, ir.Store)}
    added = [n for n in ir.walk(found.body) if isinstance(n, ir.Store) and id(n) not in before]
    assert {n.buffer.name for n in added} == set(names)
    assert all(isinstance(n.value, ir.Const) and n.value.value == 0 for n in added)
    assert before <= {id(n) for n in ir.walk(found.body)}
    in_loops = (m for n in ir.walk(found.body) if isinstance(n, ir.For | ir.While) for m in ir.walk(n))
    assert not {id(n) for n in added} & {id(n) for n in in_loops}


def test_a_place_that_is_kept_beyond_its_ring_is_not_proved(monkeypatch):
    def far(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Store) and stores(node, "held") and isinstance(node.value, ir.Load):
            return replace(node, value=ir.Const(ir.INT32, 2**30))
        return None

    assert "overflow" in open_claims(claimed(monkeypatch, WIDE, far, asked=("overflow",)))


# --------------------------------------------------------------------------- edits
def by_lane(op: str) -> Edit:
    """One thread alone makes a call."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.Eval) or not calls(node, op):
            return None
        return ir.If(None, ir.BinOp(ir.BOOL, "eq", thread(), ir.Const(thread().dtype, 0)), node, None)

    return edit


def apart(node: ir.Stmt) -> ir.Stmt | None:
    """Threads that put results of a product down do it in one bank."""

    def far(index: ir.Expr) -> ir.Expr:
        if isinstance(index, ir.Ramp):
            return replace(index, base=far(index.base))
        return ir.BinOp(index.dtype, "mul", thread(), ir.Const(index.dtype, 64))

    if isinstance(node, ir.Store) and node.buffer.scope.startswith("shared"):
        return replace(node, indices=tuple(far(i) for i in node.indices))
    return None


def active(node: ir.Store) -> ir.Expr:
    """That some lanes happen to be active."""
    lanes = ir.Call(ir.INT32, "tvm_warp_activemask", ())
    return ir.BinOp(ir.BOOL, "ne", lanes, ir.Const(ir.INT32, 1))


EDITS: dict[str, Edit] = {
    "overflow": moved("y", 2**31 - 1),
    "alignment": in_pointer("tma_load", "x_tile", 16),
    "banks": apart,
    "barrier": only(0, by_lane("wait_wgmma")),
    "bounds": moved("y", ROWS),
    "determinism": on("y", active),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_not_proved(monkeypatch, name):
    found = open_claims(claimed(monkeypatch, edit=EDITS[name], asked=(name,)))
    assert name in found
    own = [message for message in found[name] if not message.startswith("rests on")]
    assert own, found[name]


def test_every_claim_has_an_edit():
    assert tuple(EDITS) == machine_proof.CLAIMS
