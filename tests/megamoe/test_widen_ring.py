"""FP4 weights that are widened to a ring: the signals of the compiled kernel, their mutants, the bits."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from megamoe.instances import WIDENED
from megamoe.layer import config_for
from megamoe.proofs import ahead_routing, extracted, plan, problems
from tests.megamoe import kernels
from tests.megamoe.test_protocol import (
    ADD,
    STAGE_MUTANTS,
    Edit,
    always_ahead,
    atomics,
    edited,
    run_thread_by_thread,
    with_order,
    with_other_parity,
    with_shorter_wait,
    without_barrier,
    without_call,
    without_signal,
    without_waits,
)
from verify import ir

# One rank of two CTAs and two waves' places, so that the interpreter can watch every byte of the ring.
SMALL = replace(WIDENED, num_ranks=1, launch_ranks=1, ctas=2, num_experts=3, wave_experts=1, tokens=20)
LOAD = "atomic_load_elem_op"


def small_routing() -> torch.Tensor:
    """Return a routing of SMALL whose three experts all have rows."""
    pairs = [(0, 1)] * 9 + [(1, 2)] * 5 + [(2, -1)] * 3 + [(-1, -1)] * 3
    return torch.tensor(pairs, dtype=torch.int32)


def idle_routing() -> torch.Tensor:
    """Return a routing in which an expert of each rank has no rows: nobody waits for its weights."""
    idx = ahead_routing()
    return torch.where((idx == 0) | (idx == 7), -1, idx)


def without_room(node: ir.Stmt) -> ir.Stmt | None:
    """Drop the wait for a place of the ring, under a condition on the wave's number."""
    if isinstance(node, ir.If) and isinstance(node.cond, ir.BinOp):
        loops = [n for n in ir.walk(node) if isinstance(n, ir.While)]
        on_wave = isinstance(node.cond.a, ir.Var) and node.cond.a.name == "wave"
        if on_wave and len(loops) == 1 and any(atomics(loops[0], LOAD, "widened")):
            return ir.Seq(None, ())
    return None


def without_turns(node: ir.Stmt) -> ir.Stmt | None:
    """Drop the team's barrier between reading a piece and asking for the next in its place."""
    if not isinstance(node, ir.Seq):
        return None
    for barrier, behind in pairwise(node.stmts):
        call = barrier.value if isinstance(barrier, ir.Eval) else None
        is_of_team = isinstance(call, ir.Call) and call.op == "tvm_storage_sync" and len(call.args) > 1
        if is_of_team and _asks_for_codes(behind):
            return ir.Seq(node.span, tuple(s for s in node.stmts if s is not barrier))
    return None


def _asks_for_codes(node: ir.Stmt) -> bool:
    return isinstance(node, ir.If) and any(
        isinstance(n, ir.Call)
        and n.op == "ptx_arrive_barrier_expect_tx"
        and isinstance(n.args[0], ir.Load)
        and n.args[0].buffer.name == "loaded"
        for n in ir.walk(node)
    )


def waits_for_ring(node: ir.Stmt) -> bool:
    return (
        isinstance(node, ir.If)
        and any(atomics(node, LOAD, "widened"))
        and not any(
            isinstance(n, ir.Eval)
            and isinstance(n.value, ir.Call)
            and n.value.op in ("tvm_storage_sync", "sync_warp")
            for n in ir.walk(node)
        )
    )


RING_MUTANTS: list[tuple[Edit, str]] = [
    (without_signal("widened"), "waits for 4, and comes to 0"),
    (with_order(ADD, "widened", 2), "does not release"),
    (with_order(LOAD, "widened", 1), "does not acquire"),
    (with_shorter_wait("widened"), "waits for 3, and comes to 4"),
    (without_room, "wide_ring"),
    (without_barrier(waits_for_ring, before=False), "wide_ring"),
    (without_turns, "may end before the one before it"),
    (without_call("mbarrier_wait_parity", "loaded"), "nobody waits for what a copy brings"),
    (without_call("ptx_arrive_barrier_expect_tx", "loaded"), "0 arrivals for phases of 2"),
    (with_other_parity("loaded"), "waits for parity 1 in turn 0"),
]


FLASH: dict[str, Any] = {
    "topk": 6,
    "hidden": 4096,
    "inter": 2048,
    "num_experts": 32,
    "clamp": 10.0,
    "multiprocessors": 132,
}


PRO = FLASH | {"hidden": 7168, "inter": 3072, "num_experts": 48}


@pytest.mark.parametrize(("shape", "least"), [(FLASH, 3072), (PRO, 4096)], ids=["flash", "pro"])
@pytest.mark.parametrize("tokens", [8, 512, 2048, 3072, 4096, 8192])
def test_is_chosen_where_it_was_measured_faster(shape, least, tokens):
    c = config_for(tokens, **shape)
    widened = tokens >= least
    assert c.widened is widened
    if widened:
        assert (c.wide, c.block_m, c.num_stages, c.dispatch_parts) == (True, 128, 3, 16)
        assert (c.dispatchers, c.wave_experts) == (False, 4)


@pytest.mark.parametrize("tokens", [8, 512, 4096, 8192])
@pytest.mark.parametrize(
    "changes",
    [{"fp8": True}, {"shared": True}, {"ranks": 2}, {"num_experts": 256}, {"topk": 8}, {"inter": 3072}],
)
def test_is_not_chosen_elsewhere(tokens, changes):
    assert not config_for(tokens, **FLASH | changes).widened


@pytest.mark.parametrize("changes", [{"wide": False}, {"fp8": True}, {"shared": True}, {"dispatchers": True}])
def test_refuses_what_it_does_not_go_with(changes):
    with pytest.raises(ValueError, match="widened requires wide, and neither fp8, shared nor dispatchers"):
        replace(WIDENED, **changes)


def test_refuses_more_ctas_than_an_expert_has_pieces():
    with pytest.raises(ValueError, match="widened requires pieces of an expert >= ctas, got 96 and ctas=97"):
        replace(WIDENED, ctas=97)


@pytest.mark.slow
class TestWidened:
    @pytest.mark.parametrize("routing", [ahead_routing, idle_routing])
    def test_no_schedule_goes_wrong(self, routing):
        assert problems(extracted(WIDENED).device, routing(), WIDENED) == []

    def test_ring_comes_round(self):
        found = plan(ahead_routing(), torch.ones(ahead_routing().shape), WIDENED)
        assert len(set(found.block_expert[0, : int(found.firsts[0, -1])].tolist())) > WIDENED.ring_experts

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            *STAGE_MUTANTS[:3],
            *STAGE_MUTANTS[4:],
            (STAGE_MUTANTS[3][0], "0 arrivals for phases of 3"),
            *RING_MUTANTS,
            (without_waits("lt"), "_ring"),
            (always_ahead, "deadlock"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_mutants(self, edit, message):
        found = problems(edited(edit, extracted(WIDENED).device), ahead_routing(), WIDENED)
        assert any(message in what for what in found), found[:3]

    def test_runs_thread_by_thread(self):
        run_thread_by_thread(kernels.launch(1, SMALL, small_routing()), 1, SMALL)
