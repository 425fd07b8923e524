"""Roles: in the tile program's order every wait is already over, so what waits order comes in that order.

The tile program has the statements of all roles in one loop. On the device each has its own threads, perhaps
a loop to itself, and only waits order one role's statements against another's. If no wait of the tile
program's order is for an arrival that comes later in it, whatever one thread does before it arrives and
another does behind its wait come in this order on both levels. That a wait is for one phase, whatever the
schedule, is shown by `mbarrier`; that no two accesses that meet are left unordered, by `race`.

The tile program's waits and arrivals are gone through in order, round for round, counting what arrives.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.model import Model, launched_threads
from verify.refine.sym import Sym, const
from verify.refine.tile import Sync

_WAIT, _ARRIVE = "mbarrier_wait_parity", "ptx_arrive_barrier"
_MOST = 100_000  # calls


@dataclass
class _Barrier:
    """An mbarrier: how many arrivals end a phase, those of this one, and how many have ended."""

    count: int
    arrived: int = 0
    ended: int = 0


@dataclass
class _Turns:
    model: Model
    barriers: dict[tuple[str, int], _Barrier] = field(default_factory=dict)
    calls: int = 0

    def __post_init__(self) -> None:
        thread = self.model.device.launch["threadIdx.x"][0]
        for init in self.model.device.inits:
            target, count = init.args
            evaluator = self.model.evaluator("device", {thread: const(0)})
            name, slot = _slot(target, evaluator.int)
            value = evaluator.int(count)
            if (name, slot) in self.barriers or not value.is_constant:
                raise UnsupportedIR(f"mbarrier {name}[{slot}] is set up twice, or with a computed count")
            self.barriers[name, slot] = _Barrier(int(value.constant))

    def run(self, syncs: Sequence[Sync], depth: int, env: dict[ir.Var, int]) -> None:
        """Go through `syncs`, whose outermost `depth` loops are in the round that `env` says."""
        for loop, inner in groupby(syncs, key=lambda s: s.loops[depth] if len(s.loops) > depth else None):
            own = list(inner)
            if loop is None:
                for sync in own:
                    self._call(sync, env)
                continue
            for value in self._rounds(loop.start, loop.extent, env):
                self.run(own, depth + 1, {**env, loop.var: value})

    def _rounds(self, start: ir.Expr, extent: ir.Expr, env: dict[ir.Var, int]) -> Iterator[int]:
        evaluator = self.model.evaluator("tile", {v: const(n) for v, n in env.items()})
        first, count = evaluator.int(start), evaluator.int(extent)
        if not first.is_constant or not count.is_constant:
            raise UnsupportedIR("roles whose number of rounds is symbolic")
        yield from range(int(first.constant), int(first.constant) + int(count.constant))

    def _call(self, sync: Sync, env: dict[ir.Var, int]) -> None:
        self.calls += 1
        if self.calls > _MOST:
            raise UnsupportedIR("roles of too many rounds")
        threads = launched_threads(self.model.tile)
        thread = self.model.tile.launch["threadIdx.x"][0]
        values = {v: const(n) for v, n in env.items()}
        evaluator = self.model.evaluator("tile", {**values, thread: const(np.arange(threads))})
        passing = np.ones(threads, dtype=bool)
        for guard in sync.guards:
            cond = evaluator.cond(guard)
            if cond.literals:
                raise UnsupportedIR(f"{sync.call.op} of a role under a symbolic condition")
            passing &= cond.active(threads)
        if not passing.any():
            return
        name, slot = _slot(sync.call.args[0], evaluator.int)
        barrier = self.barriers.get((name, slot))
        if barrier is None:
            raise UnsupportedIR(f"mbarrier {name}[{slot}] is not set up")
        if sync.call.op == _ARRIVE and len(sync.call.args) == 1:
            barrier.arrived += int(passing.sum())
            if barrier.arrived > barrier.count:
                raise UnsupportedIR(f"more than {barrier.count} threads arrive at {name}[{slot}] in a phase")
            if barrier.arrived == barrier.count:
                barrier.arrived, barrier.ended = 0, barrier.ended + 1
        elif sync.call.op == _WAIT:
            parity = evaluator.int(sync.call.args[1])
            if not parity.is_constant or isinstance(parity.constant, np.ndarray):
                raise UnsupportedIR("a wait of a role whose parity is computed")
            if barrier.ended % 2 == int(parity.constant) % 2:
                line = f"line {sync.span.line}" if sync.span else "no source line"
                raise UnsupportedIR(f"{name}[{slot}] is waited for ({line}) before what ends the wait")
        else:
            raise UnsupportedIR(f"{sync.call.op} in a role")


def _slot(target: ir.Expr, evaluate: Callable[[ir.Expr], Sym]) -> tuple[str, int]:
    if not isinstance(target, ir.Load) or target.buffer.scope != "shared.barrier" or len(target.indices) != 1:
        raise UnsupportedIR("a role waits for something that is no mbarrier")
    index = evaluate(target.indices[0])
    if not index.is_constant or isinstance(index.constant, np.ndarray):
        raise UnsupportedIR(f"a role waits for a computed element of {target.buffer.name}")
    return target.buffer.data.name, int(index.constant)


def check_turns(model: Model) -> None:
    """Check that the waits of a kernel with roles keep the tile program's order.

    Raises:
        UnsupportedIR: a wait that the tile program's order does not satisfy, or that is not understood.
    """
    if model.tile.has_roles:
        _Turns(model).run(model.tile.syncs, 0, {})
