"""Bank conflicts of shared memory: how many passes each access of a warp takes.

Shared memory has 32 banks of 4 bytes. A warp's access of 16 bytes a lane goes in four phases of 8 lanes,
of 8 bytes in two of 16, of 4 bytes and less in one of 32; ldmatrix and stmatrix take 8 rows of 16 bytes a
phase. Within a phase, lanes that touch the same word share it, and different words of one bank are taken
one after the other: that number, the worst over phases, is the degree.

Addresses are evaluated for every thread and every trip of unrolled loops. A part that all threads share
(block index, stage, outer loop counter) only rotates the banks, so it drops out wherever the address is a
sum of such a part and one that threads fix; other loop counters are enumerated.
"""

from dataclasses import dataclass, field

import numpy as np

from verify import ir
from verify.encode import Scope
from verify.intarith import constant_of
from verify.ir import UnsupportedIR
from verify.layouts import grid
from verify.properties import Context
from verify.refine.evaluate import Evaluator
from verify.refine.sym import Algebra, Sym, const
from verify.storage import BYTE_BITS
from verify.walk import Site

BANKS, WORD_BYTES, WARP = 32, 4, 32
CHUNK_BYTES = 16  # widest access of a lane; wider ones are several
MAX_POINTS = 1 << 18  # threads times trips of enumerated loops
MATRIX_ROWS = 8  # lanes whose addresses one matrix of ldmatrix or stmatrix takes


@dataclass(frozen=True)
class Conflict:
    """The bank conflicts of one access.

    Attributes:
        degree: passes of its worst phase; 1 is free of conflicts.
        where: a thread of that phase, and the enumerated loop counters.
        exact: whether every lane of the phase is sure to be active.
    """

    site: Site
    what: str
    degree: int
    where: dict[str, int] = field(default_factory=dict)
    exact: bool = True


@dataclass(frozen=True)
class _Access:
    site: Site
    what: str
    index: ir.Expr
    unit_bits: int
    count: int
    lanes: int = WARP  # of a warp that give an address


class Banks:
    """Reads the accesses of one kernel."""

    def __init__(self, context: Context) -> None:
        """Collect names that stand for expressions, and the number of threads."""
        self.context = context
        self.bound = {
            n.var: n.value for n in ir.walk(context.extracted.device.body) if isinstance(n, ir.Bind)
        }
        extents = context.host.extents
        threads = constant_of(context.encoder.term(extents["threadIdx.x"], Scope()))
        if threads is None:
            raise UnsupportedIR("symbolic number of threads")
        self.threads = threads

    def conflicts(self) -> tuple[list[Conflict], list[tuple[ir.Span | None, str]]]:
        """Return the degree of every access, and the accesses that could not be followed."""
        found, unknown = [], []
        for site in self.context.device_sites:
            for access in self._accesses(site):
                try:
                    found.append(self._conflict(access))
                except UnsupportedIR as error:
                    unknown.append((site.span, f"{access.what}: {error}"))
        return found, unknown

    # ------------------------------------------------------------------ accesses
    def _accesses(self, site: Site) -> list[_Access]:
        match site.node:
            case ir.Store(buffer=buffer, indices=(index,)) if self._is_shared(buffer.data):
                return self._vector(site, f"store to {buffer.name}", buffer, index)
            case ir.Load(buffer=buffer, indices=(index,)) if self._is_shared(buffer.data):
                if not self._is_plain(site):
                    return []
                return self._vector(site, f"load from {buffer.name}", buffer, index)
            case ir.Call(op="ptx_cp_async", args=(ir.AccessPtr() as target, _, ir.Const(value=count), *_)):
                bits = target.element.bits
                return [self._pointer(site, f"cp.async to {target.data.name}", target, int(count) * bits)]
            case ir.Call(op="ptx_ldmatrix", args=(_, ir.Const(value=count), ir.AccessPtr() as source, _)):
                name = f"ldmatrix from {source.data.name}"
                return [self._pointer(site, name, source, CHUNK_BYTES * BYTE_BITS, int(count))]
            case ir.Call(op="ptx_stmatrix", args=(_, ir.Const(value=count), ir.AccessPtr() as target, *_)):
                name = f"stmatrix to {target.data.name}"
                return [self._pointer(site, name, target, CHUNK_BYTES * BYTE_BITS, int(count))]
        return []

    def _is_shared(self, data: ir.Var) -> bool:
        storage = self.context.storages.by_var.get(data)
        return storage is not None and storage.kind == "shared"

    def _is_plain(self, site: Site) -> bool:
        """Return whether a read is one, and not the operand of an address."""
        statement = site.statement
        inside = (n for n in ir.walk(statement) if isinstance(n, ir.Call) and n.op == "address_of")
        return not any(site.node is a for call in inside for a in call.args)

    def _vector(self, site: Site, what: str, buffer: ir.Buffer, index: ir.Expr) -> list[_Access]:
        bits = buffer.dtype.bits
        if isinstance(index, ir.Ramp):
            step = index.stride
            if isinstance(step, ir.Const) and step.value == 1:
                return [_Access(site, what, index.base, bits, index.dtype.lanes)]
            base, count = index.base, index.dtype.lanes
            lanes = (ir.BinOp(base.dtype, "add", base, _times(step, n)) for n in range(count))
            return [_Access(site, what, lane, bits, 1) for lane in lanes]
        return [_Access(site, what, index, bits, 1)]

    def _pointer(self, site: Site, what: str, pointer: ir.AccessPtr, bits: int, matrices: int = 4) -> _Access:
        unit = pointer.element.bits
        return _Access(site, what, pointer.offset, unit, bits // unit, min(WARP, MATRIX_ROWS * matrices))

    # ------------------------------------------------------------------ degree
    def _conflict(self, access: _Access) -> Conflict:
        names: set[ir.Var] = {
            s.var for s in access.site.path if isinstance(s, ir.For) and s.kind == "unrolled"
        }
        while True:
            try:
                return self._degree(access, names)
            except _NeedsLoopError as need:
                if need.var in names:
                    raise UnsupportedIR("address that threads and symbols do not fix separately") from need
                names = names | {need.var}

    def _degree(self, access: _Access, enumerated: set[ir.Var]) -> Conflict:
        site = access.site
        loops = [i for i in site.scope.loops if i.var in enumerated]
        ranges = [(constant_of(i.start), constant_of(i.extent)) for i in loops]
        if any(start is None or extent is None for start, extent in ranges):
            raise UnsupportedIR("address over a loop of symbolic range")
        sizes = (*(int(extent or 0) for _, extent in ranges), self.threads)
        if np.prod(sizes, dtype=np.int64) > MAX_POINTS:
            raise UnsupportedIR(f"{np.prod(sizes)} points are too many to enumerate")
        points = grid(sizes)
        trips = [p + (start or 0) for p, (start, _) in zip(points, ranges, strict=False)]
        algebra, env = Algebra(), {}
        for index in site.scope.indices:
            if index.tag == "lane":
                continue
            low, extent = constant_of(index.start), constant_of(index.extent)
            high = None if low is None or extent is None else low + extent - 1
            env[index.var] = algebra.var(f"{index.var.name} {len(env)}", low, high)
        symbols = {self._symbol_name(env[i.var]): i.var for i in site.scope.loops}
        env |= {i.var: const(v) for i, v in zip(loops, trips, strict=True)}
        for index in site.scope.indices:
            if index.tag == "threadIdx.x":
                env[index.var] = const(points[-1])
            elif index.tag in ("threadIdx.y", "threadIdx.z"):
                env[index.var] = const(0)
        for param in self.context.extracted.device.params:
            if param.dtype.is_int:
                env[param] = algebra.var(param.name, 0, None)
        evaluator = Evaluator(algebra, env, self.bound)
        offset = self._own_part(evaluator.int(access.index), symbols, len(points[-1]))
        active, exact = self._active(site, evaluator, len(points[-1]))
        active &= points[-1] % WARP < access.lanes
        return _worst(access, offset, active, exact, points, loops, trips)

    @staticmethod
    def _symbol_name(symbol: Sym) -> str:
        return next(str(a.args[0]) for a in symbol.atoms()) if not symbol.is_constant else ""

    def _own_part(self, value: Sym, symbols: dict[str, ir.Var], count: int) -> np.ndarray:
        """Return the part of an address that threads fix, where the rest is the same for all threads."""
        for monomial, coefficient in value.terms.items():
            varies = isinstance(coefficient, np.ndarray) or any(_varies(a) for a in monomial)
            if monomial and varies:
                names = {str(a.args[0]) for a in value.atoms() if a.kind == "var"}
                for name in sorted(names):
                    if name in symbols:
                        raise _NeedsLoopError(symbols[name])
                raise UnsupportedIR("address that threads and symbols do not fix separately")
        return np.broadcast_to(np.asarray(value.constant, dtype=np.int64), (count,))

    def _active(self, site: Site, evaluator: Evaluator, count: int) -> tuple[np.ndarray, bool]:
        """Return which threads may get to `site`, and whether they are sure to."""
        active, exact = np.ones(count, dtype=bool), True
        inside: ir.Stmt = site.statement
        for around in reversed(site.path):
            if isinstance(around, ir.If):
                try:
                    cond = evaluator.cond(around.cond if _holds(around.then, inside) else _negation(around))
                    active &= cond.active(count)
                    exact &= not cond.literals
                except UnsupportedIR:
                    exact = False
            inside = around
        return active, exact


class _NeedsLoopError(Exception):
    """An address is only known with this loop's counter enumerated."""

    def __init__(self, var: ir.Var) -> None:
        """Keep the counter."""
        super().__init__(var.name)
        self.var = var


def _varies(atom: object) -> bool:
    parts = [a for a in atom.args if isinstance(a, Sym)]  # type: ignore[attr-defined]
    return any(
        isinstance(c, np.ndarray) or any(_varies(x) for x in m) for s in parts for m, c in s.terms.items()
    )


def _holds(branch: ir.Stmt, inside: ir.Stmt) -> bool:
    return any(node is inside for node in ir.walk(branch))


def _negation(branch: ir.If) -> ir.Expr:
    return ir.Not(ir.BOOL, branch.cond)


def _times(step: ir.Expr, number: int) -> ir.Expr:
    return ir.BinOp(step.dtype, "mul", step, ir.Const(step.dtype, number))


def _worst(
    access: _Access,
    offset: np.ndarray,
    active: np.ndarray,
    exact: bool,
    points: tuple[np.ndarray, ...],
    loops: list,
    trips: list[np.ndarray],
) -> Conflict:
    thread = points[-1]
    size = max(1, access.count * access.unit_bits // BYTE_BITS)
    degree, at = 1, None
    for first in range(0, size, CHUNK_BYTES):
        width = min(CHUNK_BYTES, size - first)
        lanes = {16: 8, 8: 16}.get(width, WARP)
        words = max(1, width // WORD_BYTES)
        start = offset * access.unit_bits // BYTE_BITS + first
        phase = np.arange(len(thread)) // lanes  # threads are the innermost coordinate
        got, row = _degrees(start // WORD_BYTES, words, phase, active)
        if got > degree:
            degree, at = got, row
    where = {}
    if at is not None:
        where = {"threadIdx.x": int(thread[at])}
        where |= {i.var.name: int(t[at]) for i, t in zip(loops, trips, strict=True)}
    return Conflict(access.site, access.what, degree, where, exact)


def _degrees(word: np.ndarray, words: int, phase: np.ndarray, active: np.ndarray) -> tuple[int, int]:
    """Return the greatest number of different words in one bank of one phase, and a point of that phase."""
    rows = np.flatnonzero(active)
    if not len(rows):
        return 1, 0
    touched = (word[rows, None] + np.arange(words)).ravel()
    phases = np.repeat(phase[rows], words)
    pairs = np.unique(np.stack([phases, touched], axis=1), axis=0)
    banks = pairs[:, 0] * BANKS + pairs[:, 1] % BANKS
    values, counts = np.unique(banks, return_counts=True)
    worst = int(np.argmax(counts))
    return int(counts[worst]), int(rows[np.flatnonzero(phase[rows] == values[worst] // BANKS)[0]])
