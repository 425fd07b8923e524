"""Where routed rows go: every row once, in the order of source and token, experts in blocks of their own."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe import schedule
from megamoe.plan import make_plan
from megamoe.schedule import Geometry

BLOCK_M = 4


@st.composite
def routings(draw):
    ranks, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    local = draw(st.integers(1, 4))
    topk = draw(st.integers(1, ranks * local))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.rand(ranks, tokens, ranks * local, generator=generator)
    idx = scores.topk(topk, dim=-1).indices.int()
    idx[torch.rand(idx.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -1
    weights = torch.rand(idx.shape, generator=generator) + 0.5
    return idx, weights, Geometry(1, 1, 1, local, draw(st.integers(1, local)), 1, 1)


@given(routings())
@settings(max_examples=100, deadline=None)
def test_rows_of_every_rank(routing):
    idx, weights, geometry = routing
    (ranks, tokens, topk), local = idx.shape, geometry.num_experts
    sizes = {"num_ranks": ranks, "tokens": tokens, "topk": topk, "block_m": BLOCK_M}
    pool = schedule.pool_blocks(num_experts=local, **sizes)
    plan = make_plan(idx, weights, geometry=geometry, block_m=BLOCK_M, pool_blocks=pool)
    for rank in range(ranks):
        source, target, weight, expert_of, blocks = [], [], [], [], []
        for expert in range(local):
            rows = [
                (r, t, k)
                for r in range(ranks)
                for t in range(tokens)
                for k in range(topk)
                if idx[r, t, k] == rank * local + expert
            ]
            blocks.append(-(-len(rows) // BLOCK_M))
            padding = blocks[-1] * BLOCK_M - len(rows)
            source += [r * tokens + t for r, t, _ in rows] + [-1] * padding
            target += [(r * topk + k) * tokens + t for r, t, k in rows] + [-1] * padding
            weight += [float(weights[r, t, k]) for r, t, k in rows] + [0.0] * padding
            expert_of += [expert] * blocks[-1]
            assert plan.counts[rank, expert] == len(rows)
        rest = [-1] * (pool * BLOCK_M - len(source))
        assert plan.row_source[rank].tolist() == source + rest
        assert plan.row_target[rank].tolist() == target + rest
        assert plan.row_weight[rank].tolist() == weight + [0.0] * len(rest)
        assert plan.block_expert[rank].tolist() == expert_of + [0] * (pool - len(expert_of))
        firsts = schedule.wave_firsts(geometry, blocks)
        assert plan.firsts[rank].tolist() == firsts
        x_ring, h_ring = schedule.rings(num_experts=local, wave_experts=geometry.wave_experts, **sizes)
        spans = zip(firsts, firsts[1:], firsts[2:], strict=False)
        assert all(after - before <= x_ring and after - first <= h_ring for before, first, after in spans)
        full = replace(geometry, x_ring=x_ring, h_ring=h_ring)
        assert schedule.num_tasks(full, firsts) == 3 * sum(blocks)
