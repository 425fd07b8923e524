"""The order of tasks and the rings: proved by both solvers, mutants refuted, and tried on data."""

from dataclasses import replace

import pytest
import torch
import z3
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe import obligations, schedule
from megamoe.obligations import RULES
from megamoe.routing import shared_number, shifted, with_shared
from megamoe.schedule import Geometry, Kind, Task
from verify.solve import Prover
from verify.verdict import Verdict

FLASH = Geometry(4, 16, 16, 32, 4, 1, 1)  # hidden 4096, inter 2048, tiles of 128 and 256 channels
PRO = Geometry(4, 24, 28, 48, 4, 1, 1)
SMALL = Geometry(1, 3, 5, 4, 1, 1, 1)
BLOCKS = (16, 32, 96, 112)


def verdicts(claims, prover):
    return {answer.obligation.what: answer.verdict for answer in prover.prove(list(claims))}


def proved(claims):
    found = verdicts(claims, Prover())
    assert found
    assert {what: v for what, v in found.items() if v is not Verdict.PROVED} == {}


def refuted(claims):
    assert Verdict.REFUTED in verdicts(claims, Prover(recheck=False, minimise=False)).values()


@pytest.mark.parametrize("geometry", [FLASH, PRO, SMALL], ids=["flash", "pro", "small"])
class TestOrder:
    def test_numbers_and_tasks_correspond(self, geometry):
        proved(obligations.order(geometry))

    def test_waits_are_for_earlier_tasks(self, geometry):
        proved(obligations.waits(geometry))

    def test_waits_ahead_are_for_tasks_before_the_last_product(self, geometry):
        proved(obligations.ahead(geometry))


@pytest.mark.parametrize("ctas", [1, 66, 132])
def test_ctas_share_tasks_out(ctas):
    proved(obligations.shares(ctas))


@pytest.mark.parametrize("block_m", BLOCKS)
def test_rings_hold_what_any_routing_sends(block_m):
    proved(obligations.ring_sizes(block_m))
    proved(obligations.pool(block_m))


class TestMutants:
    def test_tasks_of_a_segment_that_are_counted_short(self):
        short = replace(
            RULES, segment_start=lambda g, before, first: first * g.dispatch_parts + before * g.l1_tiles
        )
        refuted(obligations.order(SMALL, short))

    def test_products_numbered_before_the_next_dispatch(self):
        def number(geometry, kind, block, part, wave):
            before, first, after, _ = wave
            return schedule.number(geometry, kind, block, part, (before, first, after, after))

        refuted(obligations.order(SMALL, replace(RULES, number=number)))

    def test_gap_a_number_short(self):
        def number(task, gap, ctas):
            return schedule.choose(task <= ctas - gap, task, task + gap)

        refuted(obligations.shares(4, replace(RULES, l2_number=number)))

    def test_ring_of_received_rows_one_block_short(self):
        short = replace(RULES, x_freed_by=lambda g, block: block - g.x_ring + 1)
        refuted(obligations.waits(SMALL, short))

    def test_ring_of_outputs_one_block_short(self):
        short = replace(RULES, h_freed_by=lambda g, block: block - g.h_ring + 1)
        refuted(obligations.waits(SMALL, short))

    @pytest.mark.parametrize(
        "waits_ahead",
        [
            lambda g, kind, block, start, segment, last_segment, last: z3.IntVal(1),
            lambda g, kind, block, start, segment, last_segment, last: schedule.waits_ahead(
                g, kind, block - 1, start, segment, last_segment, last
            ),
        ],
        ids=["always", "a block early"],
    )
    def test_waits_ahead_for_what_comes_later(self, waits_ahead):
        refuted(obligations.ahead(SMALL, replace(RULES, waits_ahead=waits_ahead)))

    def test_partial_blocks_forgotten(self):
        short = replace(RULES, most_blocks=lambda rows, experts, block_m: (rows + block_m - 1) / block_m)
        refuted(obligations.ring_sizes(16, short))


class TestSharedExpert:
    @pytest.mark.parametrize("local", [32, 48])
    def test_numbers(self, local):
        proved(obligations.numbers(local))
        refuted(
            obligations.numbers(local, replace(RULES, shifted=lambda e, n: schedule.choose(e >= 0, e + 1, e)))
        )

    def test_steps(self):
        proved(obligations.steps())
        refuted(obligations.steps(replace(RULES, first_step=lambda e, steps, is_mixed: e * steps)))

    def test_routing(self):
        local, idx = 3, torch.tensor([[[0, 5, -1], [2, 3, 4]], [[1, -1, 2], [-1, -1, -1]]])
        found, weights = with_shared(idx, torch.rand(idx.shape), local)
        wanted = [[[1, 7, -1, 0], [3, 5, 6, 0]], [[2, -1, 3, 4], [-1, -1, -1, 4]]]
        assert found.tolist() == wanted
        assert [[[shifted(e, local) for e in row] for row in rank] for rank in idx.tolist()] == [
            [row[:-1] for row in rank] for rank in wanted
        ]
        assert [shared_number(rank, local) for rank in (0, 1)] == [0, 4]
        assert weights[..., -1].unique().tolist() == [1.0]


@st.composite
def routings(draw):
    experts = draw(st.integers(1, 9))
    geometry = Geometry(
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
        experts,
        draw(st.integers(1, experts)),
        0,
        0,
    )
    blocks = draw(st.lists(st.integers(0, 3), min_size=experts, max_size=experts))
    firsts = schedule.wave_firsts(geometry, blocks)
    spans = list(zip(firsts, firsts[1:], firsts[2:], strict=False))
    x_ring = max(1, *(after - before for before, _, after in spans))
    h_ring = max(1, *(after - first for _, first, after in spans))
    return replace(geometry, x_ring=x_ring, h_ring=h_ring), firsts, sum(blocks)


class TestOnData:
    @given(routings(), st.integers(1, 5))
    @settings(max_examples=60, deadline=None)
    def test_every_task_once(self, routing, ctas):
        geometry, firsts, blocks = routing
        found = [t for cta in range(ctas) for t in schedule.tasks(geometry, firsts, cta, ctas)]
        wanted = {
            Task(kind, block, part)
            for kind in Kind
            for block in range(blocks)
            for part in range(schedule.complete(geometry, kind))
        }
        assert len(found) == len(wanted)
        assert set(found) == wanted

    @given(routings(), st.integers(1, 5), st.randoms())
    @settings(max_examples=60, deadline=None)
    def test_ctas_never_stand_still(self, routing, ctas, random):
        """CTAs in any interleaving finish, with each wait as the kernel has it."""
        geometry, firsts, blocks = routing
        queues = [list(schedule.tasks(geometry, firsts, cta, ctas)) for cta in range(ctas)]
        done = {kind: [0] * blocks for kind in Kind}

        def ready(task):
            def complete(kind, block):
                return block < 0 or done[kind][block] == schedule.complete(geometry, kind)

            match task.kind:
                case Kind.DISPATCH:
                    return complete(Kind.LINEAR1, schedule.x_freed_by(geometry, task.block))
                case Kind.LINEAR1:
                    freed = schedule.h_freed_by(geometry, task.block)
                    return complete(Kind.LINEAR2, freed) and complete(Kind.DISPATCH, task.block)
            return complete(Kind.LINEAR1, task.block)

        while any(queues):
            movable = [q for q in queues if q and ready(q[0])]
            assert movable, "every CTA waits"
            task = random.choice(movable).pop(0)
            done[task.kind][task.block] += 1
