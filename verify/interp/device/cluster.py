"""Clusters: blocks that run together, meet at a barrier of their own and address each other's shared memory.

A block of a kernel without clusters is a cluster of one. The blocks of a cluster share one set of clocks
(`clocks.Clocks.window`), so that what orders their accesses is found as between threads of one block.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from verify import ir
from verify.interp.device import access, errors
from verify.interp.device.async_copy import pointer
from verify.interp.device.block import Block, Group, Wait
from verify.interp.device.clocks import Rows

if TYPE_CHECKING:
    from verify.interp.device.values import Values

_ELSEWHERE_ARGS = 4  # of an arrival with bytes at another block's mbarrier: mbarrier, bytes, rank, predicate


@dataclass(eq=False)
class Cluster:
    """The blocks of one cluster and their barrier.

    Attributes:
        blocks: by rank.
        generation: how often the barrier has completed.
        arrived: threads that have arrived since.
        rows: what those know who arrived with release; `done`: of the last generation that completed.
        span: of the first arrival.
    """

    blocks: list[Block] = field(default_factory=list)
    generation: int = 0
    arrived: int = 0
    rows: Rows | None = None
    done: Rows | None = None
    span: ir.Span | None = None

    @property
    def threads(self) -> int:
        """Threads of all its blocks."""
        return sum(b.threads for b in self.blocks)

    def add(self, block: Block) -> None:
        """Take a block in; its rank is the number of those before it."""
        block.cluster, block.rank = self, len(self.blocks)
        self.blocks.append(block)

    def member(self, caller: Block, rank: int, threads: np.ndarray) -> Block:
        """Return the block of a rank that `threads` of `caller` name.

        Raises:
            ClusterRankError: the cluster has no such block.
        """
        if not 0 <= rank < len(self.blocks):
            text = f"rank {rank} of a cluster of {len(self.blocks)} blocks"
            raise caller.fault(errors.ClusterRankError, text, threads)
        return self.blocks[rank]

    # ------------------------------------------------------------------ the barrier
    def arrive(self, block: Block, threads: np.ndarray, releases: bool) -> None:
        """Let `threads` arrive, once before each wait (PTX ISA, "barrier.cluster").

        Raises:
            BarrierDivergenceError: one of them has arrived and not waited.
        """
        early = block.cluster_arrivals[threads] > block.cluster_waits[threads]
        if early.any():
            text = "a second arrival at the cluster's barrier without a wait for the first"
            raise block.fault(errors.BarrierDivergenceError, text, threads[early], other=self.span)
        if not self.arrived:
            self.span = block.span
        block.cluster_arrivals[threads] += 1
        self.arrived += len(threads)
        if releases:
            self.rows = block.clocks.join(self.rows, block.clocks.release(threads))
        if self.arrived == self.threads:
            self.generation += 1
            self.done, self.rows, self.arrived = self.rows, None, 0

    def wait(self, block: Block, threads: np.ndarray) -> Wait:
        """Return what `threads` wait for after their arrival.

        Raises:
            BarrierDivergenceError: one of them has not arrived.
        """
        idle = block.cluster_arrivals[threads] == block.cluster_waits[threads]
        if idle.any():
            text = "a wait for the cluster's barrier without an arrival"
            raise block.fault(errors.BarrierDivergenceError, text, threads[idle], other=self.span)
        wanted = int(block.cluster_arrivals[threads].max())

        def finish() -> None:
            # The next generation needs these threads, so `done` is still that of the one they wait for.
            block.cluster_waits[threads] += 1
            if self.done is not None:
                block.clocks.acquire(threads, self.done)

        text = f"the cluster's barrier ({self.threads} threads)"
        return Wait("barrier", text, lambda: self.generation >= wanted, finish, target=self)

    # ------------------------------------------------------------------ lifetime of shared memory
    def visit(
        self, caller: Block, peer: Block, components: np.ndarray, clocks: np.ndarray, threads: np.ndarray
    ) -> None:
        """Note an access by `threads` of `caller` to shared memory of `peer`, by agents at their clocks.

        Raises:
            ClusterLifetimeError: nothing says that `peer` has started, or all its threads have exited.
        """
        if peer is caller:
            return
        of_peer = slice(peer.clocks.first, peer.clocks.first + peer.threads)
        early = ~(caller.clocks.known[threads, of_peer] > 0).any(axis=1)
        if early.any():
            text = f"shared memory of block {peer.number} is addressed, which may not have started"
            raise caller.fault(errors.ClusterLifetimeError, text, threads[early])
        if peer.exited.all():
            text = f"shared memory of block {peer.number} is addressed, whose threads have exited"
            raise caller.fault(errors.ClusterLifetimeError, text, threads)
        for component, clock in zip(components.tolist(), clocks.tolist(), strict=True):
            peer.visits[component] = clock, caller.statement

    def leave(self, block: Block) -> None:
        """Check that a block which ends knows of all that others did to its shared memory.

        Shared memory is a block's until its last thread exits, so an access from elsewhere has to be ordered
        before that; in this run it came first, in another it might not.

        Raises:
            ClusterLifetimeError: some access is not.
        """
        if not block.visits:
            return
        known = block.clocks.known.max(axis=0)
        for component, (clock, statement) in block.visits.items():
            if known[component] < clock:
                text = f"the block ends before it knows that {block.agent_name(component)} is done here"
                other = block.run.program.spans[statement]
                raise block.fault(errors.ClusterLifetimeError, text, other=other)


# --------------------------------------------------------------------------- effects
def sync(m: "Values") -> Wait:
    """Arrive at the cluster's barrier with release, and wait for it with acquire."""
    cluster, threads = m.block.cluster, m.active[1]
    cluster.arrive(m.block, threads, releases=True)
    return cluster.wait(m.block, threads)


def _sync(m: "Values", group: Group, call: ir.Call) -> Wait:
    return sync(m)


def _arrive(releases: bool) -> Callable[["Values", Group, ir.Call], None]:
    def arrive(m: "Values", group: Group, call: ir.Call) -> None:
        m.block.cluster.arrive(m.block, m.active[1], releases)

    return arrive


def _wait(m: "Values", group: Group, call: ir.Call) -> Wait:
    return m.block.cluster.wait(m.block, m.active[1])


def _arrive_elsewhere(m: "Values", group: Group, call: ir.Call) -> None:
    """Arrive at the mbarrier of the same place in another block; args: mbarrier, rank."""
    arrive_at(m, call.args[0], call.args[1], None)


def arrive_expecting(m: "Values", call: ir.Call) -> None:
    """The same with bytes; args: mbarrier, bytes, rank, predicate.

    Raises:
        UnsupportedIR: the predicate is no constant 1.
    """
    if len(call.args) != _ELSEWHERE_ARGS:
        raise ir.UnsupportedIR("arrival with bytes of unknown arguments")
    node, size, rank, predicate = call.args
    if not isinstance(predicate, ir.Const) or predicate.value != 1:
        raise ir.UnsupportedIR("arrival at another block's mbarrier under a predicate")
    arrive_at(m, node, rank, m.uniform(size, "transaction bytes"))


def arrive_at(m: "Values", node: ir.Expr, rank: ir.Expr, size: int | None) -> None:
    """Let each active lane arrive at an mbarrier of the block of its rank and expect `size` bytes."""
    block = m.block
    position = {int(t): k for k, t in enumerate(m.active[1])}
    ranks = m.lanes_of(m.evaluate(rank))
    for barrier, threads in block.barrier(node):
        mine = ranks[[position[int(t)] for t in threads]]
        for value in np.unique(mine).tolist():
            who = threads[mine == value]
            peer = block.cluster.member(block, value, who)
            target = peer.mbarrier(*barrier.key)
            target.check_visible(block, who, is_async=False)
            block.cluster.visit(block, peer, who + block.clocks.first, block.clocks.own(who), who)
            if size is not None:
                target.expect(block, size * len(who), who)
            block.note_landing(target, who, target.phase, block.statement)
            target.arrive(block, who, block.clocks.release(who))


def _store(m: "Values", group: Group, call: ir.Call) -> None:
    """Store an element into another block; args: pointer to an array, value, rank, index."""
    node, value, rank, index = call.args
    if not isinstance(node, ir.AccessPtr) or node.element.bits % access.BYTE_BITS:
        raise ir.UnsupportedIR("store to another block through a computed pointer or into part of a byte")
    block, size = m.block, node.element.bits // access.BYTE_BITS
    lanes, threads = m.active
    chosen = m.tensor(value).expand(1, m.width)[:, torch.from_numpy(lanes)]
    octets = access.octets_of(chosen.t(), node.element.name)
    with m.watching():
        place = ir.BinOp(node.offset.dtype, "add", node.offset, index)
    storage, first, _ = pointer(
        m, ir.AccessPtr(node.dtype, node.data, node.element, place, index, node.mode), size
    )
    ranks = m.lanes_of(m.evaluate(rank))
    for number in np.unique(ranks).tolist():
        mine = ranks == number
        who = threads[mine]
        peer = block.cluster.member(block, number, who)
        there = block.counterpart(storage, peer)
        at = there.base + first[mine][:, None] + np.arange(size)
        block.cluster.visit(block, peer, who + block.clocks.first, block.clocks.own(who), who)
        access.record(block, there, at, access.lanes_actor(block, who), is_write=True, threads=who)
        access.put(there, at, octets[mine])


EFFECTS = {
    "ptx_cluster_store": _store,
    "cluster_sync": _sync,
    "cluster_arrive": _arrive(releases=True),
    "cluster_arrive_relaxed": _arrive(releases=False),
    "cluster_wait": _wait,
    "ptx_arrive_cluster_barrier": _arrive_elsewhere,
}
