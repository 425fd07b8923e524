"""Warps that widen weights: proved of the compiled kernel for every routing, and no edit of it is."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from megamoe import ring, roles_proof
from megamoe.instances import WIDENED
from megamoe.proofs import SUITES, extracted
from tests.megamoe.role_edits import (
    ARRIVE,
    EXPECT,
    WAIT,
    assigned,
    calls,
    in_call,
    more_bytes,
    next_place,
    only,
    other_source,
    plus,
)
from tests.megamoe.test_protocol import Edit, edited, with_other_parity, without_call
from tests.megamoe.test_roles_proof import copies_of, open_claims, proved
from tests.megamoe.test_widen_ring import without_turns
from verify import ir

# Five CTAs, of which one widens a piece more of each expert than the others.
UNEVEN = replace(WIDENED, ctas=5)


def after(edit: Edit) -> list[str]:
    """Return what is open of the kernel whose IR has been edited."""
    roles = roles_proof.roles_of(UNEVEN)
    return open_claims(roles_proof.claims(edited(edit, extracted(UNEVEN).device), copies_of(UNEVEN), roles))


def stored(element: int, number: int, change: Callable[[ir.Expr], ir.Expr] | None) -> Edit:
    """Change, or drop, what is put in an element of the walk over pieces, at the place of this number."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.Store) or node.buffer.name != "pieces":
            return None
        (index,) = node.indices
        if not isinstance(index, ir.Const) or index.value != element:
            return None
        return ir.Seq(None, ()) if change is None else replace(node, value=change(node.value))

    return only(number, edit)


def over_pieces(node: ir.Stmt) -> bool:
    return any(isinstance(n, ir.Store | ir.Load) and n.buffer.name == "pieces" for n in ir.walk(node))


def rounds(name: str, number: int, *, start: int = 0, extent: int = 0) -> Edit:
    """Other rounds of a loop of the walk."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.For) or node.var.name != name or not over_pieces(node):
            return None
        return replace(node, start=plus(node.start, start), extent=plus(node.extent, extent))

    return only(number, edit)


def never(node: ir.Stmt) -> ir.Stmt | None:
    """No piece is asked for in the walk, or there is no expert behind the first."""
    if not isinstance(node, ir.If) or isinstance(node.cond, ir.Call) or node.orelse is not None:
        return None
    return ir.Seq(None, ()) if over_pieces(node) else None


def elsewhere(shift: int) -> Edit:
    """What is widened is written so many bytes further on."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.Store) or node.buffer.data.name != "wide_ring":
            return None
        (index,) = node.indices
        assert isinstance(index, ir.Ramp)
        return replace(node, indices=(replace(index, base=plus(index.base, shift)),))

    return edit


def fewer_rows(node: ir.Stmt) -> ir.Stmt | None:
    """Half of the rows are not written."""
    if not isinstance(node, ir.For) or node.var.name != "part":
        return None
    is_store = any(isinstance(n, ir.Store) and n.buffer.data.name == "wide_ring" for n in ir.walk(node))
    return replace(node, extent=plus(node.extent, -1)) if is_store else None


def read_of(buffer: str, shift: int) -> Edit:
    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.Store) or not isinstance(node.value, ir.Load):
            return None
        load = node.value
        if load.buffer.name != buffer:
            return None
        return replace(node, value=replace(load, indices=(plus(load.indices[0], shift),)))

    return edit


def team_barriers(number: int) -> Edit:
    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not calls(node, "tvm_storage_sync"):
            return None
        assert isinstance(node, ir.Eval)
        assert isinstance(node.value, ir.Call)
        args = node.value.args
        is_team = len(args) > 1 and isinstance(args[1], ir.Const) and args[1].value == number
        return ir.Seq(None, ()) if is_team else None

    return edit


EDITS: dict[str, Edit] = {
    "parity": with_other_parity("loaded"),
    "no wait": without_call(WAIT, "loaded"),
    "wait for another place": in_call(WAIT, "loaded", next_place),
    **{f"arrival {n} dropped": only(n, without_call(EXPECT, "loaded")) for n in range(4)},
    **{f"arrival {n} at another place": only(n, in_call(EXPECT, "loaded", next_place)) for n in range(4)},
    **{f"bytes of arrival {n}": only(n, in_call(EXPECT, "loaded", more_bytes)) for n in range(4)},
    "asked for before all have read": without_turns,
    # The first pieces' codes and offsets, then those of the stages' weights, then those of the walk.
    **{f"copy {n}, coordinate {at}": only(n, other_source(at)) for n in (0, 1, 2) for at in (0, 1, 2)},
    "count not advanced": stored(0, 1, None),
    "count from 1": stored(0, 0, lambda v: plus(v, 1)),
    "count by 2": stored(0, 1, lambda v: plus(v, 1)),
    **{f"next piece {n}": stored(1, n, lambda v: plus(v, 1)) for n in (0, 1, 3)},
    **{f"next piece {n} not set": stored(1, n, None) for n in (0, 1, 3)},
    **{f"end {n}": stored(2, n, lambda v: plus(v, 1)) for n in (0, 2)},
    **{f"end {n} not set": stored(2, n, None) for n in (0, 2)},
    **{f"one {name} more": rounds(name, 0, extent=1) for name in ("place", "wave", "i", "turn")},
    **{f"one {name} less": rounds(name, 0, extent=-1) for name in ("place", "wave", "i", "turn")},
    **{f"{name} from 1": rounds(name, 0, start=1) for name in ("place", "wave", "i", "turn")},
    "nothing is asked for": never,
    **{f"written {n} bytes on": elsewhere(n) for n in (16, 8192, -8192)},
    "a part is not written": fewer_rows,
    "codes of another place": read_of("codes_tile", 1024),
    "offsets of another place": read_of("o_tile", 64),
    "no barrier of the team": team_barriers(3),
    "no barrier of the consumers": team_barriers(1),
    "factors change while they are read": without_call(WAIT, "taken"),
    "no arrival at handed": without_call(ARRIVE, "handed"),
    "another step of the ring": only(0, assigned("number", lambda v: plus(v, 1))),
}


@pytest.mark.slow
class TestCompiledKernel:
    def test_every_claim_is_proved(self):
        """Of the kernel that is edited here; `roles-widened` is the suite of the other."""
        roles = roles_proof.roles_of(UNEVEN)
        claims = roles_proof.claims(extracted(UNEVEN).device, copies_of(UNEVEN), roles)
        assert claims.keys() == set(roles_proof.names(UNEVEN)) == set(SUITES["roles-widened"].claims)
        assert open_claims(claims) == []

    @pytest.mark.parametrize("name", EDITS)
    def test_edits(self, name):
        assert after(EDITS[name])

    @pytest.mark.parametrize("name", ["codes_tile", "o_tile", "loaded"])
    def test_what_is_not_declared_is_not_covered(self, name):
        roles = roles_proof.roles_of(UNEVEN)
        assert roles.pieces is not None
        places = {k: v for k, v in roles.pieces.places.items() if k != name}
        loaded = "full" if name == "loaded" else "loaded"
        other = replace(roles, pieces=replace(roles.pieces, places=places, loaded=loaded))
        assert open_claims(roles_proof.claims(extracted(UNEVEN).device, copies_of(UNEVEN), other))

    def test_factors_need_their_barrier_and_their_turn(self):
        """Declared as if a barrier in each product ordered them, they are not."""
        roles = roles_proof.roles_of(UNEVEN)
        meetings = {k: replace(m, ring="") for k, m in roles.meetings.items()}
        other = replace(roles, meetings=meetings)
        found = open_claims(roles_proof.claims(extracted(UNEVEN).device, copies_of(UNEVEN), other))
        assert any("factor_tile in two products" in what for what in found)


class TestPlace:
    """A place whose readers meet."""

    def test_any_number_of_turns(self):
        assert proved(ring.Steps(bulk=True, meets=True))

    @pytest.mark.parametrize("change", [{"reader_parity": 1}, {"first": 2}, {"early": True}, {"missing": 1}])
    def test_mutants(self, change):
        assert not proved(replace(ring.Steps(bulk=True, meets=True), **change))
