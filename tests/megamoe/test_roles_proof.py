"""The pipelines inside a CTA, for every routing: proved of the compiled kernels, and no edit of them is."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from megamoe import ring, roles_proof
from megamoe.config import Config
from megamoe.instances import CONFIG, FP8, OPTIONS, WIDE
from megamoe.proofs import extracted, roles_claimed
from megamoe.role_events import Box
from tests.megamoe.role_edits import (
    ARRIVE,
    EXPECT,
    WAIT,
    assigned,
    changed_length,
    early_arrival,
    far_read,
    fewer_rounds,
    forgotten,
    in_call,
    in_loop,
    kept,
    late_read,
    less_filled,
    longer_turns,
    more_bytes,
    more_filled,
    named_barriers,
    next_place,
    nothing_behind,
    often,
    only,
    other_source,
    other_tensor,
    plan_written,
    plus,
    skipped,
    strange,
    swapped,
    without,
)
from tests.megamoe.test_protocol import Edit, edited, with_other_parity, without_call
from verify import ir
from verify.host import read_host
from verify.properties import Claims
from verify.solve import Obligation, Proved, Prover, remembering
from verify.verdict import Verdict

FORMS = {"fp4": CONFIG, "fp8": FP8, "wide": WIDE, "options": OPTIONS}


# What z3 proved of kernels and their edits: most of what is asked of an edit is asked of all.
PROVED: Proved = {}


def open_goals(obligations: Iterable[Obligation]) -> list[str]:
    """Return what z3 does not prove."""
    with remembering(PROVED):
        answers = Prover(recheck=False, minimise=False).prove(obligations)
    return [a.obligation.what for a in answers if a.verdict is not Verdict.PROVED]


def open_claims(claims: dict[str, Claims]) -> list[str]:
    """Return what is not proved by z3: goals, and what has no meaning or is not covered."""
    found = [issue.message for c in claims.values() for issue in (*c.unsupported, *c.unknown)]
    for claim in claims.values():
        if found:
            break
        found += open_goals(claim.obligations)
    return found


def copies_of(config: Config) -> dict[str, Box]:
    kernel = extracted(config)
    return roles_proof.boxes(read_host(kernel.host, kernel.device, kernel.tile))


def after(edit: Edit, config: Config = CONFIG) -> list[str]:
    """Return what is open of a kernel whose IR has been edited."""
    function = edited(edit, extracted(config).device)
    return open_claims(roles_proof.claims(function, copies_of(config), roles_proof.roles_of(config)))


MUTANTS: dict[str, Edit] = {
    **{f"parity of {array}": with_other_parity(array) for array in ("full", "empty", "handed", "taken")},
    **{f"no wait for {array}": without_call(WAIT, array) for array in ("full", "empty", "handed", "taken")},
    "one role's wait dropped": only(0, without_call(WAIT, "empty")),
    "another's wait dropped": only(1, without_call(WAIT, "empty")),
    **{f"no arrival at {array}": without_call(ARRIVE, array) for array in ("empty", "handed", "taken")},
    "no arrivals at full": without_call(EXPECT, "full"),
    "an arrival of those before the walk dropped": only(0, without_call(EXPECT, "full")),
    "one role's arrival dropped": only(2, without_call(EXPECT, "full")),
    "taken dropped in one branch": only(1, without_call(ARRIVE, "taken")),
    **{f"wait for another {array}": in_call(WAIT, array, next_place) for array in ("full", "empty")},
    "arrival at another empty": in_call(ARRIVE, "empty", next_place),
    "arrival at another full": only(3, in_call(EXPECT, "full", next_place)),
    **{f"bytes {n}": only(n, in_call(EXPECT, "full", more_bytes)) for n in (0, 3, 5)},
    "handed and taken swapped": swapped,
    "early arrival": early_arrival,
    "no wait for the tensor core": without("wait_wgmma"),
    "one place more is filled": more_filled,
    "one place less is filled": less_filled,
    **{f"role {n} has longer turns": only(n, longer_turns) for n in range(4)},
    **{f"role {n} skips products": only(n, skipped) for n in range(4)},
    **{f"count {n}": only(n, assigned("count", lambda v: plus(v, 1))) for n in range(4)},
    **{f"done {n}": only(n, assigned("done", lambda v: plus(v, 1))) for n in range(3)},
    **{f"products {n}": only(n, assigned("products", lambda v: plus(v, 1))) for n in range(2)},
    **{f"kind {n}": only(n, assigned("kind", lambda v: ir.Const(v.dtype, 0))) for n in range(8)},
    **{f"block {n}": only(n, assigned("block", lambda v: plus(v, 1))) for n in (0, 3)},
    **{f"ahead {n}": only(n, assigned("ahead", lambda v: plus(v, 1))) for n in range(16)},
    **{f"length {n}": only(n, changed_length) for n in range(4)},
    "the search stops late": only(0, assigned("look", lambda v: plus(v, 1))),
    "another first product": only(1, assigned("upcoming", lambda v: plus(v, 1))),
    "the plan is written": plan_written,
    "an operation without a meaning": strange,
    "a read behind the arrival": late_read,
    "a read of the next stage": far_read,
    "finishers do not meet first": only(0, lambda n: ir.Seq(None, ()) if named_barriers(n) else None),
}


# What is copied: the weights' copies before the walk and in it, then the rows' of both linears.
SOURCES: dict[str, Edit] = {
    **{f"copy {n}, coordinate {at}": only(n, other_source(at)) for n in range(8) for at in range(3)},
    **{f"tensor {n}": only(n, other_tensor) for n in range(2)},
    **{f"number {n}": only(n, assigned("number", lambda v: plus(v, 1))) for n in range(3)},
    **{f"slot {n}": only(n, assigned("slot", lambda v: plus(v, 1))) for n in (1, 2)},
}
# Visits of rows that are left for later: of the product before, and behind the walk.
LATE: dict[str, Edit] = {
    "nothing behind the walk": nothing_behind,
    "what is left is forgotten": forgotten,
    "rows of another block": kept(0, lambda v: plus(v, 1)),
    "another product's kind": kept(1, lambda v: plus(v, 1)),
    "always of one kind": kept(1, lambda v: ir.Const(v.dtype, 2)),
    "no kind": kept(1, lambda v: ir.Const(v.dtype, 0)),
    "fewer late visits": fewer_rounds("k", 0),
    "fewer of a product": fewer_rounds("ko", 1),
    "fewer behind the walk": fewer_rounds("ko", 2),
    **{
        f"{what} in {name} {number}": in_loop(name, number, change)
        for name, number in (("k", 0), ("ko", 1), ("ko", 2))
        for what, change in {
            "parity": with_other_parity("empty"),
            "no wait": without_call(WAIT, "empty"),
            "an arrival dropped": only(0, without_call(EXPECT, "full")),
            "another arrival dropped": only(3, without_call(EXPECT, "full")),
            "wait for another": in_call(WAIT, "empty", next_place),
            "arrival at another": only(1, in_call(EXPECT, "full", next_place)),
            "more bytes": only(2, in_call(EXPECT, "full", more_bytes)),
            "rows of another rank": only(0, other_source(0)),
            "rows of another place": only(0, other_source(1)),
            "scales of another place": only(1, other_source(1)),
        }.items()
    },
    **{f"done {n}": only(n, assigned("done", lambda v: plus(v, 1))) for n in (0, 1, 2, 4)},
}


@pytest.mark.slow
class TestCompiledKernel:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_claim_is_proved(self, form):
        claims = dict(roles_claimed(FORMS[form]))
        assert claims.keys() == set(roles_proof.CLAIMS)
        assert open_claims(claims) == []

    @pytest.mark.parametrize("name", MUTANTS)
    def test_mutants(self, name):
        assert after(MUTANTS[name])

    @pytest.mark.parametrize("name", SOURCES)
    def test_other_sources(self, name):
        assert after(SOURCES[name])

    @pytest.mark.parametrize("name", LATE)
    def test_late_visits(self, name):
        assert after(LATE[name], WIDE)

    def test_how_often_a_thread_goes_round_is_noticed(self):
        """Threads that count rounds of their own are not alike."""
        kernel, roles = extracted(CONFIG), roles_proof.roles_of(CONFIG)
        for function, alike in ((kernel.device, True), (edited(only(0, often), kernel.device), False)):
            walk = roles_proof.read(function, copies_of(CONFIG), roles).walks["weights"]
            assert walk.found.is_uniform(walk.turn.leave["done"]) is alike

    def test_finishers_meet_behind_a_product(self):
        """Without any of their barriers routing weights are written while they are read."""
        found = after(lambda n: ir.Seq(None, ()) if named_barriers(n) else None)
        assert any("weight_tile" in what for what in found)

    @pytest.mark.parametrize(
        ("config", "edit"),
        [
            (FP8, only(0, without_call(ARRIVE, "full"))),
            (FP8, only(0, without_call(WAIT, "full"))),
            (FP8, only(1, without_call(ARRIVE, "empty"))),
            (OPTIONS, only(1, without_call(ARRIVE, "full"))),
            (OPTIONS, only(2, with_other_parity("full"))),
            (OPTIONS, only(1, assigned("number", lambda v: plus(v, 1)))),
            (FP8, only(2, other_source(1))),
            (OPTIONS, assigned("count", lambda v: plus(v, 2))),
            (WIDE, with_other_parity("empty")),
            (WIDE, with_other_parity("full")),
            (WIDE, early_arrival),
            (WIDE, in_call(ARRIVE, "empty", lambda c: next_place(next_place(c)))),
            (WIDE, more_filled),
        ],
    )
    def test_mutants_of_other_forms(self, config, edit):
        assert after(edit, config)

    def test_another_buffer_is_noticed(self):
        """A place of a ring that is not declared is not covered."""
        kernel, roles = extracted(CONFIG), roles_proof.roles_of(CONFIG)
        found = roles_proof.claims(kernel.device, copies_of(CONFIG), replace(roles, meetings={}))
        assert any("weight_tile" in issue.message for issue in found["nothing-else"].unknown)

    def test_all_threads_have_a_role(self):
        kernel, roles = extracted(CONFIG), roles_proof.roles_of(CONFIG)
        found = roles_proof.claims(kernel.device, {}, replace(roles, parts=roles.parts[1:]))
        assert found["walks"].unsupported


def proved(steps: ring.Steps) -> bool:
    return all(a.verdict is Verdict.PROVED for a in Prover().prove(list(ring.place(steps))))


def test_rings_in_a_circle_are_noticed():
    assert roles_proof.is_forest([("a", "b", "c"), ("c", "d"), ("e", "f"), ("f", "d")])
    assert not roles_proof.is_forest([("a", "b"), ("b", "a")])
    assert not roles_proof.is_forest([("a", "b"), ("b", "c"), ("c", "a")])


class TestRing:
    @pytest.mark.parametrize("bulk", [False, True])
    def test_any_number_of_turns(self, bulk):
        assert proved(ring.Steps(bulk=bulk))

    @pytest.mark.parametrize("bulk", [False, True])
    @pytest.mark.parametrize(
        "change",
        [{"writer_parity": 0}, {"reader_parity": 1}, {"first": 2}, {"early": True}, {"missing": 1}],
        ids=lambda change: next(iter(change)),
    )
    def test_mutants(self, bulk, change):
        assert not proved(replace(ring.Steps(bulk=bulk), **change))

    @pytest.mark.parametrize("slots", [1, 2, 3, 4, 8])
    def test_turns_of_places(self, slots):
        assert all(a.verdict is Verdict.PROVED for a in Prover().prove(list(ring.turns(slots))))
