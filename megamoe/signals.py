"""How CTAs and ranks wait for each other: counters of finished tasks, barriers, the watchdog. Macros."""

from typing import Any, NamedTuple

from tilelang import language as T

from megamoe.config import CONSUMERS, DISPATCH_FIRST, DISPATCHERS, FINISH_FIRST, FINISHERS, Config
from verify.externs.signals import load_acquire, store_release

FLIP = 0x80000000  # the bit of a grid barrier's word that turns over when all have come
# What a rank was waiting for when the watchdog stopped it. A wait that is given up makes later ones fail
# too, so the largest code of all is kept, and earlier phases have larger ones.
PHASE_GRID, PHASE_COMBINE, PHASE_LINEAR2, PHASE_LINEAR1, PHASE_DISPATCH, PHASE_START = range(1, 7)
PHASE_SHIFT = 20  # status word: phase, and below it the peer or block waited for
_CONSUMERS_BARRIER, _FINISHERS_BARRIER, _DISPATCHERS_BARRIER = 1, 2, 3  # numbers of hardware barriers
_GRID_PATIENCE = 4  # waits of one CTA that a grid barrier outlasts: the cause is reported, not this


class Team(NamedTuple):
    """Threads of a CTA that do a task together.

    Attributes:
        first: the thread that waits and signals for them.
        threads: how many they are.
        barrier: number of their hardware barrier.
    """

    first: int
    threads: int
    barrier: int


CONSUMER_TEAM = Team(0, CONSUMERS, _CONSUMERS_BARRIER)
DISPATCHER_TEAM = Team(DISPATCH_FIRST, DISPATCHERS, _DISPATCHERS_BARRIER)


@T.macro
def poll(
    c: Config,
    counter: Any,
    rank: Any,
    index: Any,
    least: Any,
    code: Any,
    status: Any,
    polls: Any,
    thread: int,
):
    """One thread waits until word [rank, index] of a counter is at least `least`."""
    if T.get_thread_binding() == thread:
        polls[0] = 0
        while (T.atomic_load(counter[rank, index], memory_order="acquire") < least) and (
            polls[0] < c.max_polls
        ):
            polls[0] = T.if_then_else(
                T.atomic_load(status[rank, 0], memory_order="relaxed") == 0, polls[0] + 1, c.max_polls
            )
        if polls[0] >= c.max_polls:
            T.atomic_max(status[rank, 0], code)


@T.macro
def meet(team: Team = CONSUMER_TEAM):
    """Barrier of a team, the consumers."""
    T.sync_threads(team.barrier, team.threads)


@T.macro
def finishers_meet():
    """Barrier of the finishers."""
    T.sync_threads(_FINISHERS_BARRIER, FINISHERS)


@T.macro
def finished(counter: Any, rank: Any, index: Any, previous: Any):
    """Add 1 to word [rank, index] of a counter, behind what all finishers did; also for bulk copies."""
    T.fence_proxy_async()
    finishers_meet()
    if T.get_thread_binding() == FINISH_FIRST:
        previous[0] = T.atomic_add(counter[rank, index], 1, return_prev=True, memory_order="release")


@T.macro
def counted(counter: Any, rank: Any, index: Any, previous: Any):
    """Behind `finished`: add 1 to a word of another counter too."""
    if T.get_thread_binding() == FINISH_FIRST:
        previous[0] = T.atomic_add(counter[rank, index], 1, return_prev=True, memory_order="release")


@T.macro
def signal(counter: Any, rank: Any, index: Any, previous: Any, team: Team):
    """Add 1 to word [rank, index] of a counter, behind what all of a team did; also for bulk copies."""
    T.fence_proxy_async()
    meet(team)
    if T.get_thread_binding() == team.first:
        # With the old value asked for: an integer add that returns nothing is compiled as relaxed.
        previous[0] = T.atomic_add(counter[rank, index], 1, return_prev=True, memory_order="release")


@T.macro
def grid_barrier(c: Config, grid_word: Any, rank: Any, cta: Any, status: Any, polls: Any, old: Any):
    """Wait for all CTAs of the rank."""
    meet()
    if T.get_thread_binding() == 0:
        old[0] = T.atomic_add(
            grid_word[rank, 0],
            T.if_then_else(cta == 0, T.uint32(FLIP - (c.ctas - 1)), T.uint32(1)),  # pyright: ignore[reportCallIssue]
            return_prev=True,
            memory_order="acq_rel",
        )
        polls[0] = 0
        while (
            ((old[0] ^ T.atomic_load(grid_word[rank, 0], memory_order="acquire")) & T.uint32(FLIP))  # pyright: ignore[reportCallIssue]
            == T.uint32(0)  # pyright: ignore[reportCallIssue]
        ) and (polls[0] < _GRID_PATIENCE * c.max_polls):
            polls[0] = polls[0] + 1
        if polls[0] >= _GRID_PATIENCE * c.max_polls:
            T.atomic_max(status[rank, 0], PHASE_GRID << PHASE_SHIFT)
    meet()


@T.macro
def rank_barrier(
    c: Config, signals: Any, epochs: Any, step: Any, phase: Any, rank: Any, status: Any, polls: Any
):
    """Say to every rank that this one has come, and wait for all of them: a thread a peer of one CTA.

    The words lie on the GPU of the rank that waits and are written by the others: system scope.
    """
    peer = T.get_thread_binding()
    if peer < c.num_ranks:
        store_release(signals[peer, c.first_rank + rank], epochs[rank, 0] + step)
        polls[0] = 0
        while (load_acquire(signals[c.first_rank + rank, peer]) - (epochs[rank, 0] + step) < 0) and (
            polls[0] < c.max_polls
        ):
            polls[0] = T.if_then_else(
                T.atomic_load(status[rank, 0], memory_order="relaxed") == 0, polls[0] + 1, c.max_polls
            )
        if polls[0] >= c.max_polls:
            T.atomic_max(status[rank, 0], (phase << PHASE_SHIFT) + peer)
