"""Follow one storage through the program: what is surely written, and which reads come too early.

What is written stays written, so the set of written units only grows, and iterations of a loop whose
accesses do not depend on its counter need the first iteration alone; where they repeat with a period,
the first period alone: later iterations touch the same units when more is written. Threads are
enumerated; of a private storage each thread has its own set, of a shared one the block has one.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import z3

from verify.encode import Index, constants_of
from verify.intarith import constant_of
from verify.ir import UnsupportedIR
from verify.ranges import range_of
from verify.sync.evaluate import NotEvaluatedError, evaluate
from verify.writes.tree import Fork, Leaf, Loop, Node, Use, all_uses, period_of, period_of_term

MAX_ITERATIONS = 4096  # of a loop, one by one
MAX_OPEN = 1 << 14  # (thread, unit) pairs of one access that are compared with conditional writes
MAX_POINTS = 1 << 24  # (thread, loops, unit) of one access, at once
THREAD = "threadIdx.x"
_Term = TypeVar("_Term", bound=z3.ExprRef)


@dataclass(frozen=True)
class Missing:
    """A read of units that nothing has surely written.

    Attributes:
        points: values of thread and loop counters by constant name, at one such read.
        unit: the unit read.
        writers: guards, of which one holds where the unit is written; none: nothing writes it.
    """

    use: Use
    points: dict[str, int]
    unit: int
    writers: tuple[z3.BoolRef, ...]
    when: z3.BoolRef


@dataclass
class _Maybe:
    """A write under a condition that is not settled by the thread."""

    use: Use
    guard: z3.BoolRef
    names: tuple[str, ...]
    columns: np.ndarray  # values of `names` at each write
    threads: np.ndarray
    units: np.ndarray


@dataclass
class Flow:
    """The state of one storage.

    Attributes:
        size: units that it has.
        private: each thread has its own.
        thread: constant of threadIdx.x, and how many there are.
        around: counters of loops around all that is followed: of any one round.
        reads, checked: accesses that read, and the (thread, unit) pairs among them that were looked up.
    """

    size: int
    private: bool
    thread: str
    threads: int
    around: frozenset[str] = frozenset()
    missing: list[Missing] = field(default_factory=list)
    reads: int = 0
    checked: int = 0
    _maybe: list[_Maybe] = field(default_factory=list)
    _free: set[str] = field(default_factory=set)  # counters that no condition of a read may settle

    def __post_init__(self) -> None:
        """Start with nothing written."""
        self.written = np.zeros((self.threads if self.private else 1, self.size), dtype=bool)

    def run(self, nodes: Sequence[Node], fixed: dict[str, int] | None = None) -> None:
        """Follow `nodes` in order.

        Raises:
            UnsupportedIR: a loop or address that is not followed.
        """
        fixed = fixed or {}
        for node in nodes:
            match node:
                case Leaf(uses=uses):
                    for use in uses:
                        if use.reads:
                            self._read(use, fixed)
                        if use.writes:
                            self._write(use, fixed)
                case Loop():
                    self._loop(node, fixed)
                case Fork():
                    self._fork(node, fixed)

    # ------------------------------------------------------------------ loops
    def _loop(self, loop: Loop, fixed: dict[str, int]) -> None:
        start, count = self._range(loop, fixed)
        if count == 0:
            return
        uses, name = loop.uses, loop.index.const.decl().name()
        one_way = not any(u.reads for u in uses) or not any(u.writes for u in uses)
        if one_way and count is not None and self._points(uses, fixed) <= MAX_POINTS:
            self.run(loop.body, fixed)  # the order of its iterations does not matter: all at once
            return
        before = self._state() if count is None else None
        bound = self._most(loop, fixed) if count is None else count
        values = self._values(uses, name, start, bound)
        freed = set() if values is not None else {name} - self._free
        self._free |= freed
        for value in self._repeated(uses, name, start) if values is None else values:
            self.run(loop.body, {**fixed, name: value})
        self._free -= freed
        self._restore(before)  # it may not have run at all

    def _state(self) -> tuple[np.ndarray, int]:
        return self.written.copy(), len(self._maybe)

    def _restore(self, state: tuple[np.ndarray, int] | None) -> None:
        if state is not None:
            self.written = state[0]
            del self._maybe[state[1] :]

    def _values(self, uses: Sequence[Use], name: str, start: int, count: int | None) -> range | None:
        """Return the iterations that stand for all; None if that is not clear from all accesses."""
        period = period_of(uses, name)
        if period is not None:
            count = period if count is None else min(count, period)
        if count is None:
            return None
        if count > MAX_ITERATIONS:
            raise UnsupportedIR(f"a loop of {count} iterations")
        return range(start, start + count)

    def _repeated(self, uses: Sequence[Use], name: str, start: int) -> range:
        """Return the iterations in which the reads of all lie, if each happens whatever the counter is.

        Writes may lie elsewhere in each iteration, or stop: those of the first iterations stay.
        """
        period = 1
        for term in (t for u in uses if u.reads for t in (u.start, *u.ends)):
            found = period_of_term(term, name)
            if found is None:
                raise UnsupportedIR(
                    f"accesses that move with the counter {name} of a loop of symbolic length"
                )
            period = int(np.lcm(period, found))
        return range(start, start + period)

    def _range(self, loop: Loop, fixed: dict[str, int]) -> tuple[int, int | None]:
        """Return the first value of the counter and the number of iterations, None if symbolic."""
        start, extent = self._constant(loop.index.start, fixed), self._extent(loop.index, fixed)
        if start is None:
            raise UnsupportedIR("a loop that starts at a symbol")
        return start, extent

    def _most(self, loop: Loop, fixed: dict[str, int]) -> int | None:
        """Return the most iterations of a loop of symbolic length; fewer are the first of these."""
        bound = range_of(_instance(loop.index.extent, fixed)).high
        return None if bound is None else max(bound, 0)

    def _extent(self, index: Index, fixed: dict[str, int]) -> int | None:
        extent = self._constant(index.extent, fixed)
        return None if extent is None else max(extent, 0)

    def _constant(self, term: z3.ArithRef, fixed: dict[str, int]) -> int | None:
        return constant_of(_instance(term, fixed))

    def _points(self, uses: Sequence[Use], fixed: dict[str, int]) -> int:
        most = 0
        for use in uses:
            total = self.threads * use.count
            for index in use.site.scope.indices:
                name = index.const.decl().name()
                if index.tag in ("loop", "lane") and name not in fixed and name not in self.around:
                    extent = self._extent(index, fixed)
                    if extent is None:
                        return MAX_POINTS + 1
                    if _appears(use, name):
                        total *= max(extent, 1)
            most = max(most, total)
        return most

    # ------------------------------------------------------------------ arms
    def _fork(self, fork: Fork, fixed: dict[str, int]) -> None:
        """Follow two arms. In a private storage they are of different threads, or of one that takes one.

        In a shared one the role that writes runs beside each that reads, iteration by iteration.
        """
        roles = list(fork.arms) if self.private else _roles(fork)
        writers = [r for r in roles if any(u.writes for u in all_uses(r))]
        if self.private or not writers or not any(u.reads for u in all_uses([fork])):
            for role in roles:
                self.run(role, fixed)
            return
        if len(writers) > 1:
            raise UnsupportedIR("two roles that both write a shared buffer")
        readers = [r for r in roles if r is not writers[0]]
        for number, reader in enumerate(readers):
            before = self._state()
            self._beside(writers[0], reader, fixed)
            if number < len(readers) - 1:
                self._restore(before)

    def _beside(self, writer: Sequence[Node], reader: Sequence[Node], fixed: dict[str, int]) -> None:
        """Follow two roles: their serial loops keep step, and what one iteration fills it fills first."""
        ahead = [n for n in writer if isinstance(n, Loop) and n.kind == "serial"]
        behind = [n for n in reader if isinstance(n, Loop) and n.kind == "serial"]
        if not ahead or not behind or not any(u.reads for u in all_uses(reader)):
            if any(u.reads for u in all_uses(reader)) and _has_rounds(writer) and _has_rounds(reader):
                raise UnsupportedIR("two roles whose loops do not match")
            self.run(writer, fixed)
            self.run(reader, fixed)
            return
        if len(ahead) != 1 or len(behind) != 1:
            raise UnsupportedIR("two roles whose loops do not match")
        first, second = writer.index(ahead[0]), reader.index(behind[0])
        self.run(writer[:first], fixed)
        self.run(reader[:second], fixed)
        self._together(ahead[0], behind[0], fixed)
        self.run(writer[first + 1 :], fixed)
        self.run(reader[second + 1 :], fixed)

    def _together(self, writer: Loop, reader: Loop, fixed: dict[str, int]) -> None:
        ranges = [
            [z3.simplify(_instance(t, fixed)) for t in ends]
            for ends in ((writer.index.start, writer.index.extent), (reader.index.start, reader.index.extent))
        ]
        if not all(z3.eq(a, b) for a, b in zip(*ranges, strict=True)):
            raise UnsupportedIR("two roles whose loops have different ranges")
        names = [loop.index.const.decl().name() for loop in (writer, reader)]
        start, count = self._range(writer, fixed)
        periods = [period_of(loop.uses, name) for loop, name in zip((writer, reader), names, strict=True)]
        steps = self._most(writer, fixed) if count is None else count
        if steps is None and None in periods:
            raise UnsupportedIR("roles that move with the counter of a loop of symbolic length")
        if None not in periods:
            joint = int(np.lcm.reduce([p for p in periods if p is not None]))
            steps = joint if steps is None else min(steps, joint)
        assert steps is not None, "one of the two is known"
        if steps > MAX_ITERATIONS:
            raise UnsupportedIR(f"a loop of {steps} iterations")
        before = self._state() if count is None else None
        for value in range(start, start + steps):
            both = {**fixed, names[0]: value, names[1]: value}
            self._beside(writer.body, reader.body, both)
        self._restore(before)

    # ------------------------------------------------------------------ accesses
    def _all_written(self, use: Use, fixed: dict[str, int]) -> bool:
        """Return whether every unit is written that the threads of an access could reach."""
        if not self.private:
            return bool(self.written.all())
        taken = np.ones(self.threads, dtype=bool)
        values = {self.thread: np.arange(self.threads), **{n: np.asarray(v) for n, v in fixed.items()}}
        for condition in self._settling(use.guards):
            with suppress(NotEvaluatedError):
                taken &= np.broadcast_to(evaluate(condition, values), taken.shape)
        return bool(self.written[taken].all())

    def _settling(self, conditions: Sequence[z3.BoolRef]) -> list[z3.BoolRef]:
        """Return the conditions under which a read is looked at: those without a free counter."""
        found = [c for top in conditions for c in _conjuncts(top)]
        return [c for c in found if not self._free & set(constants_of(c))]

    def _read(self, use: Use, fixed: dict[str, int]) -> None:
        self.reads += 1
        if self._all_written(use, fixed):
            return  # `bounds` shows that it reads nothing else
        conditions = self._settling([*use.guards, *([use.when] if use.when is not None else [])])
        names, columns, threads, units, guard = self._expand(use, fixed, conditions)
        rows = threads if self.private else np.zeros_like(threads)
        covered = self.written[rows, units]
        self.checked += int(covered.sum())
        open_at = np.flatnonzero(~covered)
        if len(open_at) and self._free:
            raise UnsupportedIR(f"{use.what}: written under a condition, in a loop of symbolic length")
        if len(open_at) > MAX_OPEN and (self._maybe or not z3.is_true(guard)):
            raise UnsupportedIR(f"{use.what}: {len(open_at)} units, written or read under a condition")
        seen: set[tuple[str, ...]] = set()
        for at in open_at.tolist():
            writers = self._writers(int(rows[at]), int(units[at]))
            point = {n: int(c) for n, c in zip(names, columns[:, at], strict=True)}
            own = _instance(guard, {**fixed, **point})
            key = (own.sexpr(), *sorted(w.sexpr() for w in writers))
            if key in seen:
                continue
            seen.add(key)
            self.missing.append(Missing(use, {**fixed, **point}, int(units[at]), tuple(writers), own))
            if not writers and z3.is_true(own):
                return  # one unit that nothing writes says it all, if its thread reads it in any case

    def _writers(self, row: int, unit: int) -> list[z3.BoolRef]:
        found: dict[str, z3.BoolRef] = {}
        for maybe in self._maybe:
            hits = maybe.units == unit
            if self.private:
                hits &= maybe.threads == row
            for at in np.flatnonzero(hits).tolist():
                point = {n: int(c) for n, c in zip(maybe.names, maybe.columns[:, at], strict=True)}
                guard = _instance(maybe.guard, point)
                found.setdefault(guard.sexpr(), guard)
        return list(found.values())

    def _write(self, use: Use, fixed: dict[str, int]) -> None:
        if use.reads and self._all_written(use, fixed):
            return  # an atomic update, perhaps at a place that data decides: it adds nothing
        conditions = [c for guard in use.guards for c in _conjuncts(guard)]
        names, columns, threads, units, guard = self._expand(use, fixed, conditions)
        if z3.is_true(guard):
            self.written[threads if self.private else np.zeros_like(threads), units] = True
            return
        values = np.stack([*columns, *(np.full(len(units), v) for v in fixed.values())])
        self._maybe.append(_Maybe(use, guard, (*names, *fixed), values, threads, units))

    def _expand(
        self, use: Use, fixed: dict[str, int], conditions: Sequence[z3.BoolRef]
    ) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray, z3.BoolRef]:
        """Return names and values of an access's axes, its threads and units, and what stays of its guard."""
        axes: list[tuple[str, np.ndarray]] = [(self.thread, np.arange(self.threads))]
        for index in use.site.scope.indices:
            name = index.const.decl().name()
            if index.tag not in ("loop", "lane") or name in fixed or name in self.around:
                continue
            if not _appears(use, name):
                continue
            start, extent = self._constant(index.start, fixed), self._extent(index, fixed)
            if start is None or extent is None:
                raise UnsupportedIR(f"{use.what}: an address that moves with a loop of symbolic length")
            axes.append((name, np.arange(start, start + extent)))
        shape = tuple(len(values) for _, values in axes)
        grids = {
            name: values.reshape([-1 if k == n else 1 for k in range(len(axes))])
            for n, (name, values) in enumerate(axes)
        }
        grids |= {name: np.asarray(value) for name, value in fixed.items()}
        taken, left = np.ones(shape, dtype=bool), []
        for condition in conditions:
            try:
                taken = taken & np.broadcast_to(evaluate(condition, grids), shape)
            except NotEvaluatedError:
                left.append(condition)
        try:
            start = np.broadcast_to(evaluate(use.start, grids), shape)
        except NotEvaluatedError as error:
            raise UnsupportedIR(f"{use.what}: its address depends on {error}") from error
        at = np.nonzero(taken)
        if not self.private and not left:  # which thread it is does not matter: each address once
            _, first = np.unique(start[at], return_index=True)
            at = tuple(axis[first] for axis in at)
        units = (start[at][:, None] + np.arange(use.count)).reshape(-1)
        columns = np.stack([np.repeat(values[at[n]], use.count) for n, (_, values) in enumerate(axes)])
        inside = (units >= 0) & (units < self.size)  # what lies outside is the business of `bounds`
        names = tuple(name for name, _ in axes)
        guard = z3.simplify(z3.And(*left)) if left else z3.BoolVal(True)
        return names, columns[:, inside], columns[0][inside], units[inside], guard


def _roles(fork: Fork) -> list[tuple[Node, ...]]:
    """Return the arms of a choice, of an arm that is nothing but a choice its arms."""
    found = []
    for arm in fork.arms:
        only = arm[0] if len(arm) == 1 else None
        found += _roles(only) if isinstance(only, Fork) else [arm]
    return found


def _has_rounds(nodes: Sequence[Node]) -> bool:
    """Return whether there is a loop of the tile program anywhere in `nodes`."""
    for node in nodes:
        inner = node.arms if isinstance(node, Fork) else (node.body,) if isinstance(node, Loop) else ()
        if (isinstance(node, Loop) and node.kind == "serial") or any(map(_has_rounds, inner)):
            return True
    return False


def _appears(use: Use, name: str) -> bool:
    return any(name in constants_of(term) for term in use.terms)


def _conjuncts(term: z3.BoolRef) -> list[z3.BoolRef]:
    if z3.is_and(term):
        return [c for part in term.children() for c in _conjuncts(part)]
    return [term]


def _instance(term: _Term, point: dict[str, int]) -> _Term:
    names = constants_of(term)
    pairs = [(z3.Int(n), z3.IntVal(v)) for n, v in point.items() if n in names]
    return z3.simplify(z3.substitute(term, *pairs)) if pairs else z3.simplify(term)
