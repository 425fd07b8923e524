"""Waits and arrivals that the author wrote: the device executes each of them where the tile program does.

The compiler adds synchronisation of its own, which is not compared: it only orders more. What an author
wrote out decides which iteration's contents a statement reads, so each such call has to be there between
the same statements, on the same barrier, with the same parity or count, under the same condition.

A barrier of one slot that is used in a pipelined loop gets a slot for each stage. In the tile program its
phase number r is that of round r, of parity r mod 2; on the device that round has slot r mod S in its phase
r div S. Both are checked for every round, so either way a wait is for the arrivals of its own round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.device import Site
from verify.refine.evaluate import Cond, Evaluator
from verify.refine.model import Model, launched_threads
from verify.refine.sym import Sym, const
from verify.refine.tile import Sync

_THREAD = "threadIdx.x"
_WAIT = "mbarrier_wait_parity"


@dataclass
class Waits:
    """Matches the device's calls with the tile program's, both in program order."""

    model: Model
    pending: list[Sync] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start with all of them open."""
        self.pending = list(self.model.tile.syncs)

    def take(self, site: Site) -> int | None:
        """Return before which step the call of `site` comes in the tile program; None if it is not there."""
        sync = next((s for s in self.pending if self._may_be_of(s, site)), None)
        if sync is None:
            return None
        call = site.stmt.value if isinstance(site.stmt, ir.Eval) else None
        if not isinstance(call, ir.Call) or call.op != sync.call.op or not self._agree(sync, call, site):
            return None
        self.pending.remove(sync)
        return sync.before

    def _may_be_of(self, sync: Sync, site: Site) -> bool:
        """Return whether threads of the arm that `site` is in come to `sync`: each arm has its own."""
        arm = self.model.device.roles.get(site.role)
        if arm is None:
            return True
        own = chosen_threads(self.model, "device", [(arm.cond, arm.holds)])
        return bool((own & chosen_threads(self.model, "tile", [(g, True) for g in sync.guards])).any())

    def finish(self) -> None:
        """Check that none is left.

        Raises:
            UnsupportedIR: a call has no counterpart in its place.
        """
        if self.pending:
            sync = self.pending[0]
            line = f"line {sync.span.line}" if sync.span else "no source line"
            raise UnsupportedIR(f"{sync.call.op} ({line}) is not where the tile program has it")

    def _agree(self, sync: Sync, call: ir.Call, site: Site) -> bool:
        names = [loop.var.name for loop in sync.loops]
        loops = [loop for loop in site.loops if loop.var.name in names]
        if names != [loop.var.name for loop in loops]:
            return False
        tile_env: dict[ir.Var, Sym] = {}
        device_env: dict[ir.Var, Sym] = {}
        for own, other in zip(sync.loops, loops, strict=True):
            symbol, _ = self.model.loop_symbol(own)
            tile_env[own.var] = device_env[other.var] = symbol
        # The compiler's producer warpgroup comes before the threads of the tile program.
        threads = launched_threads(self.model.tile)
        thread = self.model.algebra.var(_THREAD, 0, threads - 1)
        added = self.model.threads - threads if site.role == "consumer" else 0
        tile_env[self.model.tile.launch[_THREAD][0]] = thread
        device_env[self.model.device.launch[_THREAD][0]] = thread + const(added)
        tile = self.model.evaluator("tile", tile_env)
        device = self.model.evaluator("device", device_env)
        try:
            for own, other in zip(sync.loops, loops, strict=True):
                if _key(tile, own.start) != _key(device, other.start):
                    return False
                if _key(tile, own.extent) != _key(device, other.extent):
                    return False
            ours = _all(tile, [(g, True) for g in sync.guards])
            theirs = _all(device, [(g.cond, g.holds) for g in site.guards])
            if ours.key != theirs.key:
                return False
            same = _arguments(tile, sync.call.args) == _arguments(device, call.args)
            return same or self._of_each_stage(sync, call, loops)
        except UnsupportedIR:
            return False

    def _of_each_stage(self, sync: Sync, call: ir.Call, loops: Sequence[ir.For]) -> bool:
        """Return whether `call` uses, in every round of a pipelined loop, the slot for that round."""
        if not loops or len(sync.call.args) != len(call.args):
            return False
        own, stages = sync.loops[-1], sync.loops[-1].stages
        ours, theirs = sync.call.args[0], call.args[0]
        if not isinstance(ours, ir.Load) or not isinstance(theirs, ir.Load):
            return False
        if ours.buffer.data.name != theirs.buffer.data.name or stages == 1:
            return False
        if _slots(ours.buffer) != 1 or _slots(theirs.buffer) != stages:
            return False
        if not isinstance(own.start, ir.Const) or not isinstance(own.extent, ir.Const) or own.start.value:
            return False
        rounds = np.arange(int(own.extent.value))
        tile = self.model.evaluator("tile", {own.var: const(rounds)})
        device = self.model.evaluator("device", {loops[-1].var: const(rounds)})
        pairs = [(tile, ours.indices[0], 0 * rounds), (device, theirs.indices[0], rounds % stages)]
        if call.op == _WAIT:
            pairs += [(tile, sync.call.args[1], rounds % 2), (device, call.args[1], rounds // stages % 2)]
        else:
            others = zip(sync.call.args[1:], call.args[1:], strict=True)
            if any(_key(tile, a) != _key(device, b) for a, b in others):
                return False
        return all(_is_everywhere(evaluator, expr, value) for evaluator, expr, value in pairs)


def chosen_threads(model: Model, level: str, guards: Sequence[tuple[ir.Expr, bool]]) -> np.ndarray:
    """Return which threads of the device pass those of `guards` that name nothing but the thread."""
    program = model.tile if level == "tile" else model.device
    thread, count = program.launch[_THREAD][0], launched_threads(model.device)
    evaluator = model.evaluator(level, {thread: const(np.arange(count))})
    passing = np.ones(count, dtype=bool)
    for cond, holds in guards:
        named = [e for e in ir.walk(cond) if isinstance(e, (ir.Var, ir.Load))]
        if named and all(e is thread for e in named):
            passing &= evaluator.cond(cond if holds else ir.Not(ir.BOOL, cond)).active(count)
    return passing


def _arguments(evaluator: Evaluator, args: Sequence[ir.Expr]) -> list[object]:
    """Return normal forms of a call's arguments: a barrier by its name and number."""
    found: list[object] = []
    for arg in args:
        match arg:
            case ir.Load(buffer=buffer, indices=indices) if buffer.scope == "shared.barrier":
                found.append((buffer.data.name, _slots(buffer), *(_key(evaluator, i) for i in indices)))
            case ir.Str(value=value):
                found.append(value)
            case _:
                found.append(_key(evaluator, arg))
    return found


def _slots(buffer: ir.Buffer) -> int | None:
    """Return how many mbarriers `buffer` holds, None where that is not constant."""
    sizes = [int(s.value) if isinstance(s, ir.Const) else None for s in buffer.shape]
    return sizes[0] if len(sizes) == 1 else None


def _is_everywhere(evaluator: Evaluator, expr: ir.Expr, value: np.ndarray) -> bool:
    """Return whether `expr`, taken in each round, is `value`."""
    found = const(int(expr.value)) if isinstance(expr, ir.Const) else evaluator.int(expr)
    return found.is_constant and bool(np.all(np.equal(found.constant, value)))


def _key(evaluator: Evaluator, expr: ir.Expr) -> object:
    return const(int(expr.value)).key if isinstance(expr, ir.Const) else evaluator.int(expr).key


def _all(evaluator: Evaluator, guards: Sequence[tuple[ir.Expr, bool]]) -> Cond:
    result = Cond()
    for expr, holds in guards:
        result &= evaluator.cond(expr if holds else ir.Not(ir.BOOL, expr))
    return result
