"""Waits and arrivals that the author wrote: the device executes each of them where the tile program does.

The compiler adds synchronisation of its own, which is not compared: it only orders more. What an author
wrote out decides which iteration's contents a statement reads, so each such call has to be there between
the same statements, on the same barrier, with the same parity or count, under the same condition.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from verify import ir
from verify.ir import UnsupportedIR
from verify.refine.device import Site
from verify.refine.evaluate import Cond, Evaluator
from verify.refine.model import Model
from verify.refine.sym import Sym, const
from verify.refine.tile import Sync

_THREAD = "threadIdx.x"


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
        if not self.pending:
            return None
        sync = self.pending[0]
        call = site.stmt.value if isinstance(site.stmt, ir.Eval) else None
        if not isinstance(call, ir.Call) or call.op != sync.call.op or not self._agree(sync, call, site):
            return None
        self.pending.pop(0)
        return sync.before

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
        thread = self.model.algebra.var(_THREAD, 0, self.model.threads - 1)
        for launch, env in ((self.model.tile.launch, tile_env), (self.model.device.launch, device_env)):
            env[launch[_THREAD][0]] = thread
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
            return ours.key == theirs.key and _arguments(tile, sync.call.args) == _arguments(
                device, call.args
            )
        except UnsupportedIR:
            return False


def _arguments(evaluator: Evaluator, args: Sequence[ir.Expr]) -> list[object]:
    """Return normal forms of a call's arguments: a barrier by its name and number."""
    found: list[object] = []
    for arg in args:
        match arg:
            case ir.Load(buffer=buffer, indices=indices) if buffer.scope == "shared.barrier":
                found.append((buffer.data.name, *(_key(evaluator, i) for i in indices)))
            case ir.Str(value=value):
                found.append(value)
            case _:
                found.append(_key(evaluator, arg))
    return found


def _key(evaluator: Evaluator, expr: ir.Expr) -> object:
    return const(int(expr.value)).key if isinstance(expr, ir.Const) else evaluator.int(expr).key


def _all(evaluator: Evaluator, guards: Sequence[tuple[ir.Expr, bool]]) -> Cond:
    result = Cond()
    for expr, holds in guards:
        result &= evaluator.cond(expr if holds else ir.Not(ir.BOOL, expr))
    return result
