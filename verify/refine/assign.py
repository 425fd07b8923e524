"""Element-wise steps: every device store of the step against the assignment that the author wrote."""

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import z3

from verify import ir
from verify.encode import Hypothesis
from verify.ir import UnsupportedIR
from verify.layouts import NO_ELEMENT, grid
from verify.refine.compare import Comparer, UndecidedError, limited, ways
from verify.refine.device import Site
from verify.refine.evaluate import Cond, Evaluator
from verify.refine.frame import LANE, Frame, SitePoints, expand_site, inner_columns, join, shift
from verify.refine.inline import loads
from verify.refine.keys import (
    NeedsValuesError,
    device_key,
    device_place,
    element_name,
    tile_key,
    tile_place,
)
from verify.refine.model import Model, Outcome, Place, Storage
from verify.refine.moves import operand_columns, ranks
from verify.refine.order import Turn
from verify.refine.sym import Sym, at, const, z3_term
from verify.refine.tile import Assign
from verify.solve import Obligation


def check_assign(model: Model, step: Assign, sites: list[Site]) -> Outcome:
    """Compare an element-wise step with its device stores.

    Raises:
        UnsupportedIR: something in the step or its sites is not understood.
    """
    return _checked(AssignCheck, model, step, sites)


def _checked(check: type["AssignCheck"], model: Model, step: Assign, sites: list[Site]) -> Outcome:
    """Run `check` with as few loops enumerated as it can do with."""
    names: frozenset[str] = frozenset()
    while True:
        try:
            return check(model, step, sites, Frame.of(model, step, names)).run()
        except NeedsValuesError as need:
            if need.names <= names:
                raise UnsupportedIR("register number over symbols") from need
            names |= frozenset(need.names)


def check_update(model: Model, step: Assign, sites: list[Site]) -> Outcome:
    """Compare atomic updates with those of the device: as many, of the same places by the same operands.

    Raises:
        UnsupportedIR: something in the step or its sites is not understood.
    """
    if len(sites) != 1:
        raise UnsupportedIR(f"{step.what}: atomic updates at several places")
    return _checked(_UpdateCheck, model, step, sites)


class AssignCheck:
    """Compares an element-wise step with its sites; one per step and choice of enumerated loops."""

    def __init__(self, model: Model, step: Assign, sites: list[Site], frame: Frame) -> None:
        """Set up the step's own coordinates.

        Raises:
            UnsupportedIR: the step writes something unknown, or uses threads that were renumbered.
        """
        self.model, self.step, self.sites, self.frame = model, step, sites, frame
        storage = model.tile_storage.get(step.dst.data)
        if storage is None:
            raise UnsupportedIR(f"{step.dst.name} is no storage of the program")
        self.storage: Storage = storage
        self.names = [*[v.name for v, _ in step.coordinates], *[x.var.name for x in frame.enumerated]]
        self.axes = [(v, 0, n) for v, n in step.coordinates]
        self.axes += [(x.var, int(x.start.value), int(x.extent.value)) for x in frame.enumerated]  # type: ignore[attr-defined]
        self.thread_axis: ir.Var | None = None
        thread = model.tile.launch.get("threadIdx.x")
        if thread is not None and (storage.private or self._mentions(thread[0])):
            if not isinstance(thread[1], ir.Const):
                raise UnsupportedIR("symbolic number of threads")
            self.thread_axis = thread[0]
            self.axes.append((thread[0], 0, int(thread[1].value)))
        self.outcome = Outcome()
        self.turns: list[Turn] = []

    def _mentions(self, var: ir.Var) -> bool:
        exprs = (*self.step.indices, self.step.value)
        if not self.step.together:
            exprs += self.step.guards
        return any(e is var for root in exprs for e in ir.walk(root))

    def run(self) -> Outcome:
        """Compare every site, then count that every element is written.

        Raises:
            UnsupportedIR: something in the step or its sites is not understood.
        """
        coordinates = grid(tuple(size for *_, size in self.axes)) if self.axes else ()
        count = len(coordinates[0]) if coordinates else 1
        self.values = [c + start for (_, start, _), c in zip(self.axes, coordinates, strict=True)]
        self.count = count
        evaluator, guard = self._tile_at(np.arange(count))
        self.active = guard.active(count)
        self._check_self_reads(evaluator)
        own = self._key_columns(evaluator, np.arange(count))
        covered: list[np.ndarray] = []
        for site in self.sites:
            covered.append(self.site(site, own))
        self._coverage(np.concatenate(covered) if covered else np.zeros((0, 2), dtype=np.int64))
        self.model.turns[self.step.number] = self.turns
        return self.outcome

    def _tile_at(self, rows: np.ndarray) -> tuple[Evaluator, Cond]:
        env = {self._loop_var(name): s for name, s in self.frame.symbols.items()}
        env |= {axis[0]: const(v[rows]) for axis, v in zip(self.axes, self.values, strict=True)}
        thread = env[self.thread_axis] if self.thread_axis is not None else None
        evaluator = self.model.evaluator("tile", env, place=tile_place(self.model, self._stage(rows), thread))
        if self.thread_axis is None:
            guard = self.model.together(evaluator, self.step.guards)
        else:
            guard = Cond()
            for cond in self.step.guards:
                guard &= evaluator.cond(cond)
        if self.storage.is_global:  # a store outside of a tensor is dropped
            guard &= self.model.inside(self.step.dst, tuple(evaluator.int(i) for i in self.step.indices))
        return evaluator, guard

    def _loop_var(self, name: str) -> ir.Var:
        return next(x.var for x in self.step.loops if x.var.name == name)

    def _stage(self, rows: np.ndarray) -> Callable[[int], Sym]:
        values = {axis[0].name: v[rows] for axis, v in zip(self.axes, self.values, strict=True)}
        return lambda stages: self.frame.stage(stages, values)

    def _key_columns(self, evaluator: Evaluator, rows: np.ndarray) -> list[Sym]:
        indices = tuple(evaluator.int(i) for i in self.step.indices)
        key = tile_key(self.model, self.storage, self.step.dst, indices, self._stage(rows))
        values = {a[0].name: v[rows] for a, v in zip(self.axes, self.values, strict=True)}
        thread = values[self.thread_axis.name] if self.thread_axis is not None else None
        return [key, *self._shared_columns(values, thread)]

    def _shared_columns(self, values: dict[str, np.ndarray], thread: np.ndarray | None) -> list[Sym]:
        """Return the coordinates that both levels have in common: enumerated loops, thread."""
        columns = [const(values[x.var.name]) for x in self.frame.enumerated]
        return columns if thread is None else [*columns, const(thread)]

    def _site_columns(self, site: Site, expanded: SitePoints) -> list[Sym]:
        """Return more of what a device store has in common with the element that it writes."""
        del site, expanded
        return []

    def _check_self_reads(self, evaluator: Evaluator) -> None:
        """Iterations may run in any order only if none reads what another writes."""
        if self.storage.private and not self.step.coordinates:  # a thread's iterations follow each other
            self.accumulates = any(x.buffer.data is self.step.dst.data for x in loads(self.step.value))
            return
        own = tuple(evaluator.int(i).key for i in self.step.indices)
        for load in (x for e in (self.step.value, *self.step.indices, *self.step.guards) for x in loads(e)):
            if load.buffer.data is self.step.dst.data:
                if (
                    load.buffer is not self.step.dst
                    or tuple(evaluator.int(i).key for i in load.indices) != own
                ):
                    raise UnsupportedIR(f"{self.step.what} reads elements that other iterations write")
                self.accumulates = True

    accumulates = False  # whether another store of the same would change the result

    # ------------------------------------------------------------------ one site
    def site(self, site: Site, own: list[Sym]) -> np.ndarray:
        """Compare one site; return (tile point, thread) for each of its stores.

        Raises:
            UnsupportedIR: the site is no store, or is not understood.
        """
        store = site.stmt
        if not isinstance(store, ir.Store):
            raise UnsupportedIR(f"{self.step.what} became a call")
        lanes = max([i.dtype.lanes for i in store.indices], default=1)
        owned = self.thread_axis is not None
        expanded = expand_site(self.model, self.frame, site, {LANE: lanes} if lanes > 1 else {}, owned=owned)
        device = expanded.evaluator(self.model)
        indices = tuple(device.int(i) for i in store.indices)
        threads = expanded.points.values["threadIdx.x"]
        key = device_key(self.model, self.storage, store.buffer, indices, threads)
        return self.join_and_compare(
            site, own, expanded, key, lambda comparer, _: comparer.value(self.step.value, store.value)
        )

    def join_and_compare(
        self,
        site: Site,
        own: list[Sym],
        expanded: SitePoints,
        key: Sym,
        compare: Callable[[Comparer, np.ndarray], None],
    ) -> np.ndarray:
        """Find the element that each device point writes, and compare what is written there."""
        if expanded.points.count == 0:
            return np.zeros((0, 2), dtype=np.int64)
        thread = None
        if self.thread_axis is not None:
            thread = expanded.points.values["threadIdx.x"] - shift(self.model, site)
        columns = [key, *self._shared_columns(expanded.points.values, thread)]
        columns += self._site_columns(site, expanded)
        rows = join(own, columns, self.count, expanded.points.count)
        known = np.flatnonzero(rows >= 0)
        if len(known) < len(rows):
            stray = rows < 0
            if self.storage.fragment is not None:  # a register that holds nothing may be overwritten
                stray &= np.broadcast_to(np.asarray(key.constant), rows.shape) != NO_ELEMENT
            if self.storage.private and thread is not None:  # a producer's copy, which nobody compares
                stray &= thread >= 0
            for point in self._each(expanded.guard, np.flatnonzero(stray), len(rows)):
                self._stray(site, expanded, key, int(point))
            expanded = expanded.take(self.model, known)
            rows = rows[known]
        if len(rows) == 0:
            return np.zeros((0, 2), dtype=np.int64)
        tile, wanted = self._tile_at(rows)
        labels: dict[str, np.ndarray | Sym] = {
            f"tile {a[0].name}": v[rows] for a, v in zip(self.axes, self.values, strict=True)
        }
        labels |= expanded.points.values
        comparer = Comparer(
            self.model,
            self.step,
            tile,
            expanded.evaluator(self.model),
            len(rows),
            expanded.guard,
            self.frame.facts,
            self._stage(rows),
            labels,
            site.span,
        )
        if self.step.number in self.model.in_turn:
            self.turns.append(self._turn(site, expanded, rows))
        comparer.claim_guard(wanted)
        with suppress(UndecidedError):  # a different operator was recorded; what is below it says no more
            compare(comparer, known)
        self.outcome.obligations += comparer.obligations
        self.outcome.undecided += comparer.undecided
        self.outcome.compared += comparer.compared
        threads = expanded.points.values.get("threadIdx.x")
        place = np.zeros_like(rows) if threads is None or self.storage.fragment is None else threads
        return np.stack([rows, place], axis=1)

    def _turn(self, site: Site, expanded: SitePoints, rows: np.ndarray) -> Turn:
        """Return at which element the site is in each round: coordinates of the statement alone."""
        element = np.zeros(len(rows), dtype=np.int64)
        for (_, size), values in zip(self.step.coordinates, self.values, strict=False):  # they come first
            element = element * size + values[rows]
        threads = expanded.points.values.get("threadIdx.x", np.zeros(len(rows), dtype=np.int64))
        return Turn(site, element, threads, expanded)

    def _each(self, guard: Cond, points: np.ndarray, count: int) -> np.ndarray:
        """Return the points to ask about where something is wrong at each of `points`."""
        if len(points) == 0:
            return points
        return limited(ways(guard, points, count), self.step.what, self.outcome.undecided)

    def _stray(self, site: Site, expanded: SitePoints, key: Sym, point: int) -> None:
        where: dict[str, object] = {name: int(v[point]) for name, v in expanded.points.values.items()}
        if self.storage.fragment is None:
            where["actual address"] = z3.simplify(z3_term(key, point) / self.step.dst.dtype.bits)
        else:
            where["actual"] = element_name(self.storage, at(key.constant, point))
        where["expected"] = f"an element of {self.step.dst.name} that this statement writes"
        if self.storage.is_global:
            tile, _ = self._tile_at(np.flatnonzero(self.active)[:1])
            indices = tuple(tile.int(i) for i in self.step.indices)
            where["address of its first element"] = z3_term(
                self.model.flat("tile", self.step.dst, indices), 0
            )
        guard = Hypothesis("guards of the site", "guard", expanded.guard.z3_at(point))
        hypotheses = (*self.model.hypotheses, *self.frame.facts, guard)
        text = f"{self.step.what}: the device stores elsewhere"
        span = self.step.span or site.span
        self.outcome.obligations.append(Obligation(text, span, hypotheses, z3.BoolVal(False), where))

    # ------------------------------------------------------------------ all sites
    def _coverage(self, hits: np.ndarray) -> None:
        """Every element that the step writes is written, in each place that holds it."""
        fragment = self.storage.fragment
        wanted_rows = np.flatnonzero(self.active)
        if fragment is None:
            times = np.bincount(hits[:, 0], minlength=self.count)[wanted_rows]
            self._count(times, wanted_rows, None)
            return
        evaluator, _ = self._tile_at(wanted_rows)
        key = tile_key(
            self.model,
            self.storage,
            self.step.dst,
            tuple(evaluator.int(i) for i in self.step.indices),
            self._stage(wanted_rows),
        )
        elements = np.broadcast_to(np.asarray(key.constant) // fragment.bits, wanted_rows.shape)
        holders = fragment.thread[:, elements]  # replica x element
        top = int(max(fragment.thread.max(), hits[:, 1].max() if len(hits) else 0)) + 1
        # Of all pairs of an element and a thread few are stores: those alone are counted.
        stores, numbers = np.unique(hits[:, 0] * top + hits[:, 1], return_counts=True)
        stores, numbers = np.append(stores, self.count * top), np.append(numbers, 0)
        for replica in holders:
            wanted = wanted_rows * top + replica
            place = np.searchsorted(stores, wanted)
            self._count(np.where(stores[place] == wanted, numbers[place], 0), wanted_rows, replica)

    def _count(self, times: np.ndarray, rows: np.ndarray, threads: np.ndarray | None) -> None:
        wrong = times != 1 if self.accumulates else times == 0
        bad = np.flatnonzero(wrong)
        self.outcome.compared += len(times) - len(bad)
        if len(bad) == 0:
            return
        _, guard = self._tile_at(rows[bad])
        for number in self._each(guard, np.arange(len(bad)), len(bad)):
            condition = guard.z3_at(int(number))
            self._miscounted(int(bad[number]), condition, len(bad), times, rows, threads)

    def _miscounted(
        self,
        k: int,
        condition: z3.BoolRef,
        count: int,
        times: np.ndarray,
        rows: np.ndarray,
        threads: np.ndarray | None,
    ) -> None:
        where: dict[str, object] = {
            f"tile {a[0].name}": int(v[rows[k]]) for a, v in zip(self.axes, self.values, strict=True)
        }
        if threads is not None:
            where["threadIdx.x"] = int(threads[k])
        where["expected"] = "written once" if self.accumulates else "written"
        where["actual"] = f"{int(times[k])} device stores"
        text = f"{self.step.what}: {count} elements are not written as the statement says"
        facts = (*self.model.hypotheses, *self.frame.facts)
        facts += (Hypothesis("the statement is executed", "guard", condition),)
        self.outcome.obligations.append(Obligation(text, self.step.span, facts, z3.BoolVal(False), where))


class _UpdateCheck(AssignCheck):
    """Several updates may be of one place: equal ones are paired in any order, each once."""

    accumulates = True

    def _key_columns(self, evaluator: Evaluator, rows: np.ndarray) -> list[Sym]:
        columns = super()._key_columns(evaluator, rows)
        place = tile_place(self.model, self._stage(rows), None)
        columns += self._operand(self.step.value, evaluator, self.model.tile_storage, place)
        # An update that is not executed takes no number from those that are.
        number = -1 - np.arange(self.count)
        active = np.flatnonzero(self.active)
        number[active] = _numbers(columns, self.count, active)
        return [*columns, const(number)]

    def _site_columns(self, site: Site, expanded: SitePoints) -> list[Sym]:
        store = site.stmt
        assert isinstance(store, ir.Store), "an update is a store"
        device = expanded.evaluator(self.model)
        threads = expanded.points.values["threadIdx.x"]
        found = self._operand(
            store.value, device, self.model.device_storage, device_place(self.model, threads, None)
        )
        key = device_key(
            self.model, self.storage, store.buffer, tuple(device.int(i) for i in store.indices), threads
        )
        count = expanded.points.count
        thread = threads - shift(self.model, site) if self.thread_axis is not None else None
        columns = [key, *self._shared_columns(expanded.points.values, thread), *found]
        return [*found, const(_numbers(columns, count, np.arange(count)))]

    def _operand(
        self, value: ir.Expr, evaluator: Evaluator, storages: dict[ir.Var, Storage], place: Place
    ) -> list[Sym]:
        places = []
        for load in loads(value):
            storage = storages.get(load.buffer.data)
            if storage is None:
                raise UnsupportedIR(f"{load.buffer.name} is no storage of the program")
            indices = tuple(evaluator.int(i) for i in load.indices)
            level = "tile" if storages is self.model.tile_storage else "device"
            flat = (self.model.flat(level, load.buffer, indices),) if storage.is_global else ()
            places += flat or place(storage, load.buffer, indices)
        return operand_columns(value, evaluator, places)


def _numbers(columns: list[Sym], count: int, points: np.ndarray) -> np.ndarray:
    """Return how many of `points`, some of `count`, with equal columns come before each of them."""
    arrays = []
    for column in columns:
        inner = inner_columns(column)  # of an address that data decides
        coefficients = [c for found in inner.values() for c in found] if inner else column.terms.values()
        arrays += [np.broadcast_to(c, (count,))[points] for c in coefficients]
    return ranks(*arrays) if arrays else np.arange(len(points))
