"""The barriers: any size by invariants, small ones in every interleaving, mutants refuted."""

import pytest

from megamoe import barrier
from tests.megamoe.test_schedule import proved, refuted


def test_grid_barrier_of_any_size():
    proved(barrier.grid_barrier())


def test_grid_barrier_mutants():
    refuted(barrier.grid_barrier(master=barrier.FLIP - 1))
    refuted(barrier.grid_barrier(spread=0))


def test_rank_barrier_of_any_size():
    proved(barrier.rank_barrier())


def test_rank_barrier_that_waits_for_less():
    refuted(barrier.rank_barrier(ahead=0))


@pytest.mark.parametrize(("ranks", "barriers"), list(barrier.ranks_and_rounds()))
def test_ranks_in_every_interleaving(ranks, barriers):
    found = barrier.explore(ranks, barriers)
    assert not found.early
    assert not found.stuck


def test_rank_mutants_in_every_interleaving():
    assert barrier.explore(2, 3, phases=1).early  # a flag that is never reset
    assert barrier.explore(3, 2, skip=(2, 0)).stuck


@pytest.mark.parametrize("ctas", [1, 2, 3, 4])
def test_ctas_in_every_interleaving(ctas):
    found = barrier.grid_interleavings(ctas, 4)
    assert not found.early
    assert not found.stuck


def test_grid_mutant_in_every_interleaving():
    found = barrier.grid_interleavings(3, 2, master=barrier.FLIP + 1)
    assert found.early or found.stuck
