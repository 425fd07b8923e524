"""reduce steps: every element of a row is combined once, by the threads that hold it."""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
import z3

from verify import ir
from verify.encode import Hypothesis
from verify.ir import UnsupportedIR
from verify.refine.compare import same_number
from verify.refine.device import Site
from verify.refine.frame import Frame, SitePoints, expand_site
from verify.refine.inline import same
from verify.refine.keys import element_name
from verify.refine.model import Model, Outcome, Storage
from verify.refine.order import in_order, rounds, shared_loops
from verify.refine.tile import Reduce
from verify.solve import Obligation

_ALL_REDUCE = re.compile(r"tl::AllReduce<tl::(\w+), (\d+), (\d+), (\d+)(?:, tl::[\w<>, ]+)?>::run")
_COMBINE = {"sum": "add", "abssum": "add", "max": "max", "absmax": "max", "min": "min"}
_FUNCTOR = {"add": "SumOp", "max": "MaxOp", "min": "MinOp"}
_IDEMPOTENT = ("max", "min")


@dataclass
class _Part:
    """One site of a reduction: init, gather (adds source elements), across (threads) or merge."""

    kind: str
    site: Site
    points: SitePoints
    register: np.ndarray
    store: ir.Store


def check_reduce(model: Model, step: Reduce, sites: list[Site]) -> Outcome:
    """Compare a reduce step with the loop and the cross-thread exchange that implement it.

    Raises:
        UnsupportedIR: something in the step or its sites is not understood.
    """
    return _ReduceCheck(model, step, sites).run()


class _ReduceCheck:
    def __init__(self, model: Model, step: Reduce, sites: list[Site]) -> None:
        assert step.src is not None, "a reduction has a source"
        assert step.to is not None, "a reduction has a target"
        self.model, self.step, self.sites = model, step, sites
        self.frame = Frame.of(model, step, frozenset())
        self.source = self._fragment(step.src)
        self.target = self._fragment(step.to)
        if step.op not in _COMBINE:
            raise UnsupportedIR(f"reduce_{step.op}")
        self.op = _COMBINE[step.op]
        self.outcome = Outcome()

    def _fragment(self, region: ir.Region) -> Storage:
        storage = self.model.tile_storage.get(region.buffer.data)
        whole = [getattr(e, "value", None) for e in region.extents] == [
            getattr(s, "value", None) for s in region.buffer.shape
        ]
        if storage is None or storage.fragment is None or not whole or region.buffer is not storage.buffer:
            raise UnsupportedIR(f"reduction over {region.buffer.name}, which is no whole fragment")
        return storage

    def run(self) -> Outcome:
        parts = [self._part(site) for site in self.sites]
        kinds = [p.kind for p in parts]
        expected = ["init", "gather", *(["across"] * kinds.count("across"))]
        expected += ["merge"] if kinds[-1] == "merge" else []
        if kinds != expected:
            raise UnsupportedIR(f"{self.step.what} as {', '.join(kinds)}")
        init, gather = parts[:2]
        across = [p for p in parts if p.kind == "across"]
        merge = parts[-1] if kinds[-1] == "merge" else None
        scratch = init.store.buffer.data
        inner = [p for p in parts if p is not merge]
        if any(p.store.buffer.data is not scratch for p in inner):
            raise UnsupportedIR("reduction through two temporaries")
        if (merge is None) == (self.model.device_storage.get(scratch) is not self.target):
            raise UnsupportedIR("reduction that leaves its result in a temporary")
        if merge is None and not self.step.clear:
            self._refute("old value", {}, "combined with the result", "overwritten")
            return self.outcome
        self._identity(init)
        size = int(max(p.register.max() for p in inner)) + 1
        element = self._elements(merge, init, size)
        for part in (init, *across, *([merge] if merge else [])):
            self._once(part, size, element)
        self._in_turn(parts, size)
        self._complete(gather, across, element, size)
        return self.outcome

    # ------------------------------------------------------------------ reading the sites
    def _part(self, site: Site) -> _Part:
        store = site.stmt
        if not isinstance(store, ir.Store) or len(store.indices) != 1 or store.value.dtype.lanes != 1:
            raise UnsupportedIR(f"{self.step.what} by vectors or calls")
        points = expand_site(self.model, self.frame, site, {})
        tile = self.model.evaluator("tile", {x.var: self.frame.symbols[x.var.name] for x in self.step.loops})
        guards = self.model.together(tile, self.step.guards)
        if points.guard.key != guards.key:
            raise UnsupportedIR(f"{self.step.what} under another condition")
        index = self.model.evaluator("device", points.env).int(store.indices[0])
        if not index.is_constant:
            raise UnsupportedIR("reduction into a register that depends on a symbol")
        register = np.broadcast_to(np.asarray(index.constant), (points.points.count,))
        extent = store.buffer.shape[0]
        if not isinstance(extent, ir.Const) or register.min() < 0 or register.max() >= extent.value:
            raise UnsupportedIR(f"{self.step.what}: a register outside of {store.buffer.name}")
        return _Part(self._kind(store), site, points, register, store)

    def _kind(self, store: ir.Store) -> str:
        value = store.value
        if isinstance(value, ir.Const):
            return "init"
        if isinstance(value, ir.Call) and value.op == "call_extern":
            return "across"
        if isinstance(value, ir.BinOp) and _reads_itself(value.a, store):
            return "gather" if self._source_read(value.b) is not None else "merge"
        if isinstance(value, ir.Load):
            return "merge"
        raise UnsupportedIR(f"{self.step.what}: a step of the reduction that is not known")

    def _source_read(self, value: ir.Expr) -> ir.Load | None:
        """Return the read of the source that `value` combines, through abs and the target's type."""
        if self.step.op.startswith("abs") and isinstance(value, ir.BinOp) and value.op == "max":
            negated = value.b
            if not (isinstance(negated, ir.BinOp) and negated.op == "sub" and same(negated.b, value.a)):
                return None
            zero = negated.a
            if not isinstance(zero, ir.Const) or zero.value != 0:
                return None
            value = value.a
        elif self.step.op.startswith("abs"):
            return None
        if isinstance(value, ir.Cast) and value.dtype.name == self.target.buffer.dtype.name:
            value = value.a
        is_source = (
            isinstance(value, ir.Load) and self.model.device_storage.get(value.buffer.data) is self.source
        )
        return value if is_source else None  # type: ignore[return-value]

    def _identity(self, init: _Part) -> None:
        value = init.store.value
        assert isinstance(value, ir.Const), "classified as init"
        kind = self.target.buffer.dtype
        if self.op == "add" or self.step.op == "absmax":
            neutral: float | int = 0
        elif kind.is_int:
            neutral = kind.int_range[0 if self.op == "max" else 1]
        else:
            neutral = -np.inf if self.op == "max" else np.inf
        self.outcome.compared += 1
        if not same_number(value.value, neutral):
            self._refute("start value", {}, neutral, value.value)

    # ------------------------------------------------------------------ checks
    def _elements(self, merge: _Part | None, init: _Part, size: int) -> np.ndarray:
        """Return the element of the target that each (thread, register) of the accumulator stands for."""
        place = self.target.fragment
        assert place is not None, "checked on construction"
        threads = np.arange(self.model.threads)[:, None]
        if merge is None:
            return place.element_at(
                np.broadcast_to(threads, (self.model.threads, size)), np.arange(size)[None, :]
            )
        table = np.full((self.model.threads, size), -1, dtype=np.int64)
        value = merge.store.value
        read = value if isinstance(value, ir.Load) else value.b  # type: ignore[attr-defined]
        plain = isinstance(value, ir.Load)
        if plain != self.step.clear or not isinstance(read, ir.Load):
            raise UnsupportedIR("reduction that merges in another way than the statement says")
        if not plain:
            self._combines(value)
        if read.buffer.data is not init.store.buffer.data:
            raise UnsupportedIR("reduction that merges another temporary")
        where = self._merged(merge, read)
        if where.min() < 0 or where.max() >= size:
            raise UnsupportedIR("reduction that merges another register than it computes")
        thread = merge.points.points.values["threadIdx.x"]
        table[thread, where] = place.element_at(thread, merge.register)
        return table

    def _merged(self, merge: _Part, read: ir.Load) -> np.ndarray:
        """Return the register of the temporary that each merge reads."""
        index = self.model.evaluator("device", merge.points.env).int(read.indices[0])
        if not index.is_constant:
            raise UnsupportedIR("reduction that merges a register which depends on a symbol")
        return np.broadcast_to(np.asarray(index.constant), merge.register.shape)

    def _combines(self, value: ir.Expr) -> None:
        assert isinstance(value, ir.BinOp), "classified as gather or merge"
        self.outcome.compared += 1
        if value.op != self.op:
            self._refute("operator", {}, self.op, value.op)

    def _in_turn(self, parts: list[_Part], size: int) -> None:
        """Check that in a loop around several sites each register takes them in program order.

        Raises:
            UnsupportedIR: one may not.
        """
        for one, other in combinations(parts, 2):
            loops = shared_loops(self.step, one.site, other.site)
            if not loops:
                continue
            keys, times = [], []
            for part in (one, other):
                register = part.register
                if part.kind == "merge":  # here its register is the one that it reads
                    value = part.store.value
                    register = self._merged(part, value if isinstance(value, ir.Load) else value.b)  # type: ignore[attr-defined]
                keys.append(part.points.points.values["threadIdx.x"] * size + register)
                times.append(rounds(part.points, loops))
            if not in_order(keys[0], times[0], keys[1], times[1]):
                raise UnsupportedIR(f"{self.step.what}: {other.kind} of a register before {one.kind}")

    def _once(self, part: _Part, size: int, element: np.ndarray) -> None:
        """Each register takes this step once; `_in_turn` has them in order."""
        thread = part.points.points.values["threadIdx.x"]
        place = int(max(part.register.max() + 1, size))
        times = np.bincount(thread * place + part.register)
        self.outcome.compared += len(thread)
        if times.max() > 1:
            bad = int(np.argmax(times))
            where = {"threadIdx.x": bad // place, "register": bad % place}
            self._refute(f"{part.kind} of a register", where, "once", f"{int(times[bad])} times")
        if part.kind == "merge":
            return
        table = np.zeros((self.model.threads, size), dtype=bool)
        table[thread, part.register] = True
        missing = np.argwhere(~table & (element >= 0))
        if len(missing):
            where = {"threadIdx.x": int(missing[0][0]), "register": int(missing[0][1])}
            self._refute(f"{part.kind} of a register", where, "once", "never")

    def _complete(self, gather: _Part, across: list[_Part], element: np.ndarray, size: int) -> None:
        value = gather.store.value
        self._combines(value)
        read = self._source_read(value.b)  # type: ignore[attr-defined]
        assert read is not None, "classified as gather"
        assert self.source.fragment is not None, "checked on construction"
        thread = gather.points.points.values["threadIdx.x"]
        index = self.model.evaluator("device", gather.points.env).int(read.indices[0])
        if not index.is_constant:
            raise UnsupportedIR("reduction over a register that depends on a symbol")
        local = np.broadcast_to(np.asarray(index.constant), thread.shape)
        taken = self.source.fragment.element_at(thread, local)
        shape = self.source.fragment.shape
        dim = self.step.dim % len(shape)
        inner = int(np.prod(shape[dim + 1 :], dtype=np.int64))
        position = taken // inner % shape[dim]
        row = np.where(taken < 0, -1, taken // (inner * shape[dim]) * inner + taken % inner)
        offset, masks = self._group(across)
        live = element[thread, gather.register] >= 0
        counts = np.zeros((self.model.threads * size, shape[dim]), dtype=np.int64)
        for mask in masks:  # thread t ^ mask takes part in the result of thread t
            other = _partner(thread, mask, offset)
            if other.min() < 0 or other.max() >= self.model.threads:
                self._refute(
                    "threads that exchange values", {}, f"below {self.model.threads}", int(other.max())
                )
                return
            target = element[other, gather.register]
            wrong = np.flatnonzero((target != row) & (target >= 0))
            self.outcome.compared += len(thread)
            if len(wrong):
                w = int(wrong[0])
                where = {"threadIdx.x": int(other[w]), "element comes from thread": int(thread[w])}
                expected = f"an element of the row of {self._name(self.target, int(target[w]))}"
                self._refute("operand", where, expected, self._name(self.source, int(taken[w])))
                return
            np.add.at(counts, ((other * size + gather.register)[live], position[live]), 1)
        counts = counts.reshape(self.model.threads, size, shape[dim])
        wrong_count = (counts < 1) if self.op in _IDEMPOTENT else (counts != 1)
        bad = np.argwhere(wrong_count & (element >= 0)[:, :, None])
        self.outcome.compared += counts.size - len(bad)
        if len(bad):
            t, r, j = (int(x) for x in bad[0])
            where = {"threadIdx.x": t, "result": self._name(self.target, int(element[t, r])), "position": j}
            self._refute("elements combined", where, "each once", f"{int(counts[t, r, j])} times")
        held = np.unique(element[element >= 0])
        holders = self.target.fragment
        assert holders is not None, "checked on construction"
        if len(held) < holders.thread.shape[1] or (element >= 0).sum() < holders.thread.size:
            self._refute("result", {}, "computed in every place that holds it", "missing in some")

        if self.op == "add" and not self.target.buffer.dtype.is_int and not self.outcome.obligations:
            self._trees(thread, gather.register, position, across, element)

    def _trees(
        self,
        thread: np.ndarray,
        register: np.ndarray,
        position: np.ndarray,
        across: list[_Part],
        element: np.ndarray,
    ) -> None:
        """Record in which order each result adds up its row.

        A thread adds its own elements one after the other; then partners exchange, the farthest first,
        and each adds what the other has.
        """
        local: dict[tuple[int, int], list[int]] = {}
        for t, r, j in zip(thread.tolist(), register.tolist(), position.tolist(), strict=True):
            local.setdefault((t, r), []).append(j)
        masks, offset = [], self._group(across)[0]
        for part in across:
            _, threads, scale, _ = self._exchange(part)
            while threads > scale:
                threads //= 2
                masks.append(threads)

        @cache
        def tree(t: int, r: int, level: int) -> str:
            if level == 0:
                text = str(local.get((t, r), []))
            else:
                other = int(_partner(np.asarray(t), masks[level - 1], offset))
                text = "+".join(sorted((tree(t, r, level - 1), tree(other, r, level - 1))))
            return hashlib.sha256(text.encode()).hexdigest()

        live = np.argwhere(element >= 0)
        self.outcome.orders |= {(tree(int(t), int(r), len(masks)),) for t, r in live}

    def _group(self, across: list[_Part]) -> tuple[int, list[int]]:
        """Return the first thread and the xor masks of the threads that exchange values.

        After each exchange a thread has what its partners had before it, so that the masks of several
        add up. One that brings a value back is counted as combined twice.
        """
        offsets, masks = [], [0]
        for part in across:
            name, threads, scale, offset = self._exchange(part)
            self.outcome.compared += 1
            if name != _FUNCTOR[self.op]:
                self._refute("operator between threads", {}, _FUNCTOR[self.op], name)
            offsets.append(offset)
            masks = [mask ^ (scale * k) for k in range(threads // scale) for mask in masks]
        if len(set(offsets)) > 1:
            raise UnsupportedIR(f"{self.step.what}: exchanges from different threads on")
        return (offsets or [0])[0], masks

    def _exchange(self, across: _Part) -> tuple[str, int, int, int]:
        call = across.store.value
        assert isinstance(call, ir.Call), "classified as across"
        callee, value = call.args[0], call.args[1]
        found = _ALL_REDUCE.fullmatch(callee.value) if isinstance(callee, ir.Str) else None
        if found is None or not _reads_itself(value, across.store):
            raise UnsupportedIR("cross-thread exchange that is not a known AllReduce")
        name, threads, scale, offset = found.groups()
        return name, int(threads), int(scale), int(offset)

    def _name(self, storage: Storage, element: int) -> str:
        assert storage.fragment is not None, "checked on construction"
        return element_name(storage, element * storage.fragment.bits if element >= 0 else -1)

    def _refute(self, what: str, where: dict, expected: object, actual: object) -> None:
        hypotheses: tuple[Hypothesis, ...] = (*self.model.hypotheses, *self.frame.facts)
        text = f"{self.step.what}: {what}"
        show = {**where, "expected": expected, "actual": actual}
        self.outcome.obligations.append(Obligation(text, self.step.span, hypotheses, z3.BoolVal(False), show))


def _reads_itself(value: ir.Expr, store: ir.Store) -> bool:
    """Return whether `value` is the read of the register that `store` writes."""
    if not isinstance(value, ir.Load) or value.buffer.data is not store.buffer.data:
        return False
    return all(same(a, b) for a, b in zip(value.indices, store.indices, strict=True))


def _partner(thread: np.ndarray, mask: int, offset: int) -> np.ndarray:
    return offset + ((thread - offset) ^ mask)
