"""One variant at both levels: storages, launch indices and the facts that hold between them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import z3

from verify import ir
from verify.encode import Hypothesis
from verify.extract import Extracted
from verify.host import Host
from verify.ir import UnsupportedIR
from verify.layouts import FragmentPlace, SharedPlace, extents
from verify.refine.arena import check_arena
from verify.refine.device import DeviceProgram, Guard, read_device
from verify.refine.evaluate import Cond, Evaluator, compare
from verify.refine.sym import Algebra, Sym, const, z3_term
from verify.refine.tile import Loop, TileProgram, read_tile
from verify.solve import Obligation

# (storage, buffer, indices) -> the coordinates of that place, the same for both levels.
Place = Callable[["Storage", ir.Buffer, tuple[Sym, ...]], tuple[Sym, ...]]

_BLOCK = ("blockIdx.x", "blockIdx.y", "blockIdx.z")
PRIVATE = ("local", "local.var")
_THREAD = ("threadIdx.x", "threadIdx.y", "threadIdx.z")


@dataclass
class Storage:
    """One tile-level allocation or tensor, and where it went.

    Attributes:
        buffer: the tile-level buffer.
        names: every name it goes by.
        is_global: a tensor argument.
        private: an array or variable of which each thread has its own.
        fragment, shared: its placement; both None for a tensor, for what is private, and for a buffer
            that nothing uses.
        device: its storage in the device IR, None where the device program has none.
    """

    buffer: ir.Buffer
    names: frozenset[str]
    is_global: bool
    private: bool = False
    fragment: FragmentPlace | None = None
    shared: SharedPlace | None = None
    device: ir.Var | None = None


@dataclass
class Model:
    """Both programs, their storages by tile and device variable, and the shared symbols.

    Attributes:
        in_turn: numbers of steps that use each other's elements in one loop of the device.
        turns: of those steps, by number, in which round each of their sites is at which element.
    """

    tile: TileProgram
    device: DeviceProgram
    algebra: Algebra
    tile_storage: dict[ir.Var, Storage]
    device_storage: dict[ir.Var, Storage]
    tile_env: dict[ir.Var, Sym]
    device_env: dict[ir.Var, Sym]
    threads: int
    hypotheses: tuple[Hypothesis, ...]
    host: Host
    written_tensors: set[ir.Var] = field(default_factory=set)
    uses: set[str] = field(default_factory=set)
    in_turn: frozenset[int] = frozenset()
    turns: dict[int, list[Any]] = field(default_factory=dict)

    def evaluator(
        self, level: str, env: dict[ir.Var, Sym], lane: Sym | None = None, place: Place | None = None
    ) -> Evaluator:
        """Return an evaluator for expressions of `level` (tile or device) with more variables.

        Contents of a buffer are a function of the place that is read. Both levels hold the same there at one
        statement: all that was written before it was compared, and `race` orders it.

        Args:
            level: tile or device.
            env: values of variables besides launch indices and shapes.
            lane: the lane coordinate, for vectors.
            place: where an access of a buffer that the kernel writes lands, in terms of both levels.
        """
        base = self.tile_env if level == "tile" else self.device_env
        storages = self.tile_storage if level == "tile" else self.device_storage

        def load(evaluator: Evaluator, expr: ir.Load) -> Sym:
            storage = storages.get(expr.buffer.data)
            if storage is None or not expr.dtype.is_int:
                raise UnsupportedIR(f"index read from {expr.buffer.name}")
            indices = tuple(evaluator.int(i) for i in expr.indices)
            low, high = expr.dtype.int_range
            if storage.is_global:
                flat = self.flat(level, expr.buffer, indices)
                return self.algebra.call("load", (storage.buffer.name, flat), low, high)
            if place is None:
                raise UnsupportedIR(f"index read from {expr.buffer.name}, which the kernel writes")
            return self.algebra.call(
                "load", (storage.buffer.name, *place(storage, expr.buffer, indices)), low, high
            )

        return Evaluator(self.algebra, {**base, **env}, lane=lane, load=load)

    def host_evaluator(self, *exprs: ir.Expr) -> Evaluator:
        """Return an evaluator of host expressions, whose shape variables have the tile program's names."""
        by_name = {var.name: sym for var, sym in self.tile_env.items()}
        used = {v for e in exprs for v in ir.walk(e) if isinstance(v, ir.Var)}
        return Evaluator(self.algebra, {v: by_name[v.name] for v in used if v.name in by_name})

    def check_launch(self) -> None:
        """Check that the host launches what the device IR is written for.

        Raises:
            UnsupportedIR: an extent differs.
        """
        device = Evaluator(self.algebra, self.device_env)
        for tag, (_, extent) in self.device.launch.items():
            given = self.host.extents.get(tag)
            if given is not None and self.host_evaluator(given).int(given).key != device.int(extent).key:
                raise UnsupportedIR(f"the host launches another extent of {tag}")

    def flat(self, level: str, buffer: ir.Buffer, indices: tuple[Sym, ...]) -> Sym:
        """Return the position of an element of a tensor from its start, in elements."""
        evaluate = Evaluator(self.algebra, self.tile_env if level == "tile" else self.device_env)
        offset = evaluate.int(buffer.offset)
        if buffer.strides:
            parts = [i * evaluate.int(s) for i, s in zip(indices, buffer.strides, strict=True)]
            return sum(parts, offset)
        flat = const(0)
        for index, extent in zip(indices, buffer.shape, strict=True):
            flat = flat * evaluate.int(extent) + index
        return flat + offset

    def inside(self, buffer: ir.Buffer, indices: tuple[Sym, ...]) -> Cond:
        """Return that `indices` are in bounds of a tile-level buffer."""
        evaluate = Evaluator(self.algebra, self.tile_env)
        result = Cond()
        for index, extent in zip(indices, buffer.shape, strict=True):
            result &= compare("ge", index, const(0)) & compare("lt", index, evaluate.int(extent))
        return result

    def guard(self, evaluator: Evaluator, guards: tuple[Guard, ...]) -> Cond:
        """Return the conjunction of device guards."""
        result = Cond()
        for guard in guards:
            cond = guard.cond if guard.holds else ir.Not(ir.BOOL, guard.cond)
            result &= evaluator.cond(cond)
        return result

    def together(self, evaluator: Evaluator, guards: tuple[ir.Expr, ...]) -> Cond:
        """Return when threads execute a tile operation together: what its guards say besides of the threads.

        Raises:
            UnsupportedIR: no thread passes, or which threads do depends on more than their numbers.
        """
        launched = self.tile.launch.get("threadIdx.x")
        result, chosen = Cond(), np.ones(1, dtype=bool)
        for guard in guards:
            if launched is None or not any(e is launched[0] for e in ir.walk(guard)):
                result &= evaluator.cond(guard)
                continue
            if not isinstance(launched[1], ir.Const):
                raise UnsupportedIR("symbolic number of threads")
            count = int(launched[1].value)
            threads = replace(evaluator, env={**evaluator.env, launched[0]: const(np.arange(count))})
            cond = threads.cond(guard)
            if any(isinstance(c, np.ndarray) for sym in cond.syms() for c in sym.terms.values()):
                raise UnsupportedIR("a tile operation by threads that a symbol chooses")
            chosen = chosen & cond.active(count)
            result &= Cond(True, cond.literals)
        if not chosen.any():
            raise UnsupportedIR("a tile operation that no thread executes")
        return result

    def loop_symbol(self, loop: Loop) -> tuple[Sym, tuple[Hypothesis, ...]]:
        """Return the symbol of a tile loop's counter and the facts about it."""
        evaluate = self.evaluator("tile", {})
        start, extent = evaluate.int(loop.start), evaluate.int(loop.extent)
        low, _ = start.bounds()
        _, high = (start + extent).bounds()
        taken = {var.name for var in (*self.tile_env, *self.device_env)}
        label = f"loop {loop.var.name}" if loop.var.name in taken else loop.var.name
        symbol = self.algebra.var(label, low, None if high is None else high - 1)
        name = z3.Int(label)
        start_term, extent_term = z3_term(start, 0), z3_term(extent, 0)
        fact = z3.And(name >= start_term, name < start_term + extent_term)
        return symbol, (Hypothesis(f"range of {loop.var.name}", "loop", fact),)


def build_model(extracted: Extracted, host: Host, clauses: tuple[Hypothesis, ...]) -> Model:
    """Match the storages and launch indices of both levels.

    Raises:
        UnsupportedIR: a buffer, layout or launch that is not understood.
    """
    tile_function, lowered, device_function = extracted.tile, extracted.lowered, extracted.device
    tile = read_tile(tile_function)
    tensors = list(tile_function.buffers.values())
    storages = list(_storages(tile_function, tile, tensors))
    known = frozenset().union(*(s.names for s in storages)) if storages else frozenset()
    device = read_device(device_function, set(known), tile.has_roles)
    algebra = Algebra()
    tile_env, device_env, facts = _symbols(algebra, tile_function, tile, device, host)
    layouts, shapes = _layouts(lowered)
    by_tile = {s.buffer.data: s for s in storages}
    by_device = _match_storages(storages, by_tile, device, host)
    for storage in storages:
        if not storage.is_global and storage.device is not None:
            _place(storage, storage.device, device, layouts, shapes)
    sizes = {s.device: s.shared.size_bits // 8 for s in storages if s.shared and s.device is not None}
    check_arena(device_function, device, sizes)
    model = Model(
        tile,
        device,
        algebra,
        by_tile,
        by_device,
        tile_env,
        device_env,
        launched_threads(device),
        (*clauses, *facts),
        host,
    )
    model.check_launch()
    stored = {s.stmt.buffer.data for s in device.sites if isinstance(s.stmt, ir.Store)}
    stored |= {step.dst.data for step in tile.steps}
    model.written_tensors = stored
    return model


def _storages(function: ir.Function, tile: TileProgram, tensors: list[ir.Buffer]) -> Iterator[Storage]:
    views: dict[ir.Var, set[str]] = {}
    for node in ir.walk(function.body):
        if isinstance(node, (ir.Load, ir.Store, ir.Region)):
            views.setdefault(node.buffer.data, set()).add(node.buffer.name)
    for buffer in (*tensors, *tile.allocs):
        names = frozenset({buffer.name, buffer.data.name, *views.get(buffer.data, ())} - {""})
        yield Storage(buffer, names, buffer in tensors)


def _layouts(lowered: ir.Function) -> tuple[dict[str, Any], dict[str, tuple[ir.Expr, ...]]]:
    """Return the layouts and the lowered shapes by name; views without a name have none of their own."""
    layouts: dict[str, Any] = {}
    shapes: dict[str, tuple[ir.Expr, ...]] = {}
    for node in ir.walk(lowered.body):
        if isinstance(node, ir.Block):
            layouts |= {var.name: layout for var, layout in node.layouts.items()}
            shapes |= {b.name: b.shape for b in node.allocs}
    return layouts, shapes


def _match_storages(
    storages: list[Storage], by_tile: dict[ir.Var, Storage], device: DeviceProgram, host: Host
) -> dict[ir.Var, Storage]:
    """Return the storage of each device variable: tensors by argument, the block's buffers by name.

    Raises:
        UnsupportedIR: two device storages go by the name of one buffer.
    """
    found = {param: by_tile[buffer.data] for param, buffer in host.tensors.items()}
    for var in dict.fromkeys((*device.allocs, *device.arena_start)):
        owners = [s for s in storages if var.name in s.names and s not in found.values()]
        if len(owners) > 1 or (not owners and any(var.name in s.names for s in storages)):
            raise UnsupportedIR(f"two storages called {var.name}")
        if owners:
            found[var] = owners[0]
    for var, storage in found.items():
        storage.device = var
    return found


def _place(
    storage: Storage,
    var: ir.Var,
    device: DeviceProgram,
    layouts: dict[str, Any],
    shapes: dict[str, tuple[ir.Expr, ...]],
) -> None:
    buffer = storage.buffer
    layout = layouts.get(buffer.name) or next(
        (layouts[n] for n in sorted(storage.names) if n in layouts), None
    )
    if buffer.scope == "local.fragment":
        if layout is None or not hasattr(layout, "forward_thread"):
            raise UnsupportedIR(f"fragment {buffer.name} without a layout")
        storage.fragment = FragmentPlace.of(layout, buffer.dtype.bits)
        if storage.fragment.shape != extents(buffer.shape, buffer.name):
            raise UnsupportedIR(f"layout of {buffer.name} is for another shape")
    elif buffer.scope in ("shared", "shared.dyn"):
        shape = shapes.get(buffer.name)
        if shape is None:
            raise UnsupportedIR(f"{buffer.name} is not allocated after lowering")
        start = device.arena_start.get(var, 0)  # a buffer apart from the arena counts from its own start
        storage.shared = SharedPlace.of(buffer, layout, extents(shape, buffer.name), start * 8)
    elif buffer.scope in PRIVATE:
        storage.private = True
    elif buffer.scope != "shared.barrier":  # holds no data
        raise UnsupportedIR(f"{buffer.name} in {buffer.scope}")


def launched_threads(program: DeviceProgram | TileProgram) -> int:
    """Return the number of threads of a block.

    Raises:
        UnsupportedIR: it is symbolic, or in more than one dimension.
    """
    for tag in _THREAD:
        if tag in program.launch and not isinstance(program.launch[tag][1], ir.Const):
            raise UnsupportedIR("symbolic number of threads")
    for tag in _THREAD[1:]:
        if tag in program.launch and program.launch[tag][1].value != 1:  # type: ignore[attr-defined]
            raise UnsupportedIR("threads in more than one dimension")
    return int(program.launch["threadIdx.x"][1].value)  # type: ignore[attr-defined]


def _symbols(
    algebra: Algebra,
    tile_function: ir.Function,
    tile: TileProgram,
    device: DeviceProgram,
    host: Host,
) -> tuple[dict[ir.Var, Sym], dict[ir.Var, Sym], list[Hypothesis]]:
    tile_env: dict[ir.Var, Sym] = {}
    device_env: dict[ir.Var, Sym] = {}
    facts = []
    dims = {n.name: n for b in tile_function.buffers.values() for n in _dims(b)}
    for name, var in dims.items():
        tile_env[var] = algebra.var(name, 0, var.dtype.int_range[1])
    device_env |= {param: tile_env[var] for param, var in host.dims.items()}
    for tag in _BLOCK:
        if tag not in device.launch:
            continue
        var, extent = device.launch[tag]
        if var.name in dims:  # the solvers know both by their names
            raise UnsupportedIR(f"{var.name} is a dim and a block's number")
        value = Evaluator(algebra, device_env).int(extent)
        _, high = value.bounds()
        symbol = algebra.var(var.name, 0, None if high is None else high - 1)
        device_env[var] = symbol
        term = z3.Int(var.name)
        facts.append(
            Hypothesis(f"range of {var.name}", "launch", z3.And(term >= 0, term < z3_term(value, 0)))
        )
        tile_var, tile_extent = tile.launch[tag]
        if Evaluator(algebra, tile_env).int(tile_extent).key != value.key:
            raise UnsupportedIR(f"the device launches another number of blocks along {tag}")
        tile_env[tile_var] = symbol
    for tag in _THREAD[1:]:
        for launch, env in ((device.launch, device_env), (tile.launch, tile_env)):
            if tag in launch:
                env[launch[tag][0]] = const(0)
    return tile_env, device_env, facts


def _dims(buffer: ir.Buffer) -> Iterator[ir.Var]:
    for extent in (*buffer.shape, *buffer.strides):
        yield from (v for v in ir.walk(extent) if isinstance(v, ir.Var))


@dataclass
class Points:
    """Points of a finite domain: values of named coordinates, all of one length."""

    count: int
    values: dict[str, np.ndarray]

    def take(self, rows: np.ndarray) -> "Points":
        """Return the points in `rows`."""
        return Points(len(rows), {name: v[rows] for name, v in self.values.items()})


@dataclass
class Outcome:
    """What comparing one step found.

    Attributes:
        obligations: for the solvers; each says what must hold at one point.
        undecided: comparisons that were only sampled.
        compared: (access, point) pairs that were compared by normal form and agree.
        orders: of the operands that an element of a product or reduction adds up, each one once.
    """

    obligations: list[Obligation] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    compared: int = 0
    orders: set[tuple] = field(default_factory=set)
