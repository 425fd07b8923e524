"""What stands in the ring of widened weights, as terms of codes and offsets: what `widen_share` stores.

The rounds of the innermost loop that stores to the ring are followed for any piece, four times: for the
threads of each quarter of a row, of which LANE is any. A round reads codes and offsets of the place that it
has waited for, of one row, and stores that row of the piece, in the piece's step: 128 channels, of every row
by one function. Suite `roles`, claim `pieces`: at that place stand the codes and offsets of the weight rows
that the piece is, and the piece goes where products look for it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import z3

from megamoe.config import DISPATCH_FIRST, DISPATCHERS, PIECE_ROWS, Config
from megamoe.invariance_checks import Checks
from megamoe.invariance_expressions import State
from megamoe.invariance_leaves import BX, Element
from megamoe.invariance_terms import CHANNELS, Piece
from megamoe.invariance_values import Index, Term, const, is_zero
from megamoe.weights import TILE_N
from verify import ir
from verify.ir import UnsupportedIR

RING = "wide_ring"
LANE = z3.Int("LANE")
_QUARTERS = 4  # of a row's channels, one a thread
_LANES = DISPATCHERS // _QUARTERS  # rows at once
_A_STEP = TILE_N // PIECE_ROWS  # pieces
_HALVES = 2  # of a step's rows
_DEPTH = 3  # loops of the walk: waves, a wave's experts, an expert's pieces


def widened_bytes(
    function: ir.Function, config: Config, checks: Checks, cta: ir.Var
) -> tuple[tuple[Term, ...], ...]:
    """Return what stands in the ring of a weight row, by half of a step's rows and channel.

    Args:
        function: the kernel's tile IR; nothing else in it writes the ring.
        config: the kernel's.
        checks: gets what is asked of indices.
        cta: the launch's index.

    Raises:
        UnsupportedIR: what is stored is not shown to be a function of the row's codes and offsets, the same
            for all rows.
    """
    path = _path(function)
    loops = [n for n in path if isinstance(n, ir.For) and n.kind == "serial"]
    if len(loops) != _DEPTH or not all(is_zero(loop.start) for loop in loops):
        raise UnsupportedIR(f"{RING} is not written in {_DEPTH} loops")
    threads = [n.var for n in ir.walk(function.body) if isinstance(n, ir.Launch) and n.tag == "threadIdx.x"]
    ctas = [const(n.extent) for n in ir.walk(function.body) if isinstance(n, ir.Launch) and n.var is cta]
    if len(threads) != 1 or len(ctas) != 1:
        raise UnsupportedIR("a launch of another shape")
    halves = []
    for half in range(_HALVES):
        terms: dict[int, Term] = {}
        for quarter in range(_QUARTERS):
            leaves = _Share(config, checks, half, loops, ctas[0])
            leaves.thread = {threads[0]: DISPATCH_FIRST + _QUARTERS * LANE + quarter}
            for channel, term in leaves.follow(_statements(path, loops[-1]), cta).items():
                if channel in terms:
                    raise UnsupportedIR(f"channel {channel} is widened by two threads")
                terms[channel] = term
        if sorted(terms) != list(range(CHANNELS)):
            raise UnsupportedIR(f"{len(terms)} of {CHANNELS} channels are widened")
        halves.append(tuple(terms[channel] for channel in range(CHANNELS)))
    return tuple(halves)


class _Share(Element):
    """Leaves of the round of one piece: its codes and offsets."""

    awaited = "loaded"

    def __init__(self, config: Config, checks: Checks, half: int, loops: Sequence[ir.For], ctas: int) -> None:
        """Begin with a half of the step's rows, after which leaves are named, the loops and the launch."""
        super().__init__(config, checks)
        self.half, self.loops, self.ctas = half, loops, ctas
        self.thread: dict[ir.Var, Index] = {}
        numbers = [z3.Int(name) for name in ("WAVE", "EXPERT OF WAVE", "TURN")]
        self.walk = dict(zip((loop.var for loop in loops), numbers, strict=True))
        wave, of_wave, turn = numbers
        self.of_expert = wave * config.wave_experts + of_wave
        self.piece = BX % config.ctas + turn * config.ctas
        self.targets: list[tuple[int, int]] = []

    def follow(self, body: list[ir.Stmt], cta: ir.Var) -> dict[int, Term]:
        """Return the terms of the channels that threads of this quarter store, the same for all rows."""
        state = State(names={**self.walk, **self.thread})
        extents = [Piece(self, (), cta).value(loop.extent, state) for loop in self.loops]
        self.assumed = (BX >= 0, self.ctas > BX, LANE >= 0, LANE < _LANES)
        for number, extent in zip(self.walk.values(), extents, strict=True):
            self.assumed = (*self.assumed, number >= 0, number < extent)
        piece = Piece(self, (RING,), cta, self.assumed)
        self.waits, self.targets = piece.waits, []
        for statement in body:
            state = piece.follow(statement, state)
        rows = sorted({row for row, _ in self.targets})
        if [r + n for r in rows for n in range(_LANES)] != list(range(PIECE_ROWS)):
            raise UnsupportedIR("a piece's rows are not all widened")
        found: dict[tuple[int, int], Term] = {}
        for (row, channel), output in zip(self.targets, piece.outputs, strict=True):
            if (row, channel) in found:
                raise UnsupportedIR(f"channel {channel} is stored twice")
            if output.value.rows != {row}:
                raise UnsupportedIR(f"row {row} of a piece has what is of rows {sorted(output.value.rows)}")
            found[row, channel] = replace(output.value, rows=frozenset())
        channels = sorted({channel for _, channel in found})
        terms = {channel: found.get((rows[0], channel)) for channel in channels}
        for row in rows:
            if any(found.get((row, channel)) != terms[channel] for channel in channels):
                raise UnsupportedIR("rows of a piece are widened by different functions")
        return {channel: term for channel, term in terms.items() if term is not None}

    def read(self, name: str, at: tuple[Index, ...]) -> Term | Index | None:
        """Return a leaf, see `Leaves`; it is of the row that it is of."""
        if name not in ("codes_tile", "o_tile"):
            return None
        if len(self.waits) != 1:
            raise UnsupportedIR(f"{name} is read behind {len(self.waits)} waits")
        self.wants(f"the place of {name}", at[0], self.waits[0])
        row = self._row(at[1])
        if name == "o_tile":
            return _of_row(Term.of("offsets", self.half), row)
        word = self.checks.number("a word of a row", at[2], self.assumed)
        return _of_row(Term.of("codes", self.half, word), row)

    def begin(self, name: str, indices: tuple[Index, ...], conditions: tuple[Index, ...]) -> None:
        """Take note of the element that is stored: that row of the piece, in the piece's step."""
        if conditions:
            raise UnsupportedIR(f"{name} is written where {conditions}")
        c = self.config
        self.own_rank(name, indices[0])
        step = self.of_expert % c.ring_experts * c.expert_steps + self.piece / _A_STEP
        self.wants("the step that is written", indices[1], step)
        row = self._row(indices[2] - self.piece % _A_STEP * PIECE_ROWS)
        channel = self.checks.number("a channel that is written", indices[3], self.assumed)
        self.targets.append((row, channel))

    def _row(self, index: Index) -> int:
        """Return the row of a piece that an index is, less LANE."""
        return self.checks.number("a row of a piece", index - LANE, self.assumed)


def _of_row(term: Term, row: int) -> Term:
    return replace(term, rows=frozenset((row,)))


def _path(function: ir.Function) -> list[Any]:
    """Return the statements around the one store to the ring, from the outermost to the store."""
    stores = [n for n in ir.walk(function.body) if isinstance(n, ir.Store) and n.buffer.name == RING]
    if len(stores) != 1:
        raise UnsupportedIR(f"{len(stores)} stores to {RING}")
    path: list[Any] = [function.body]
    while path[-1] is not stores[0]:
        path.append(next(n for n in _inside(path[-1]) if any(m is stores[0] for m in ir.walk(n))))
    return path


def _inside(node: Any) -> list[ir.Stmt]:
    match node:
        case ir.Seq(stmts=stmts):
            return list(stmts)
        case ir.If(then=then, orelse=orelse):
            return [then] if orelse is None else [then, orelse]
    return [node.body]


def _statements(path: list[Any], loop: ir.For) -> list[ir.Stmt]:
    """Return what a round of a loop does up to the store."""
    body = path[path.index(loop) + 1]
    if not isinstance(body, ir.Seq):
        return [body]
    last = next(n for n, statement in enumerate(body.stmts) if statement is path[path.index(body) + 1])
    return list(body.stmts[: last + 1])
