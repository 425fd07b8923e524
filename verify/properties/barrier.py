"""Barriers and warp collectives are reached together by the threads that they are for.

For a barrier of the whole block, a warp or a warpgroup: whenever one thread executes it at some
values of the loops around, every thread of its group executes it at the same values. A named
barrier counts: the conditions on the thread index alone give its set of threads, whole warps and as
many as it waits for; the other conditions are the same for all of the set. Where conditions read variables
that every thread computes for itself, their values are compared first (`sync.uniform`).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import z3

from verify import ir, ops
from verify.encode import Hypothesis, Scope, constants_of
from verify.intarith import conjunction
from verify.properties import Claims, Context, Issue
from verify.solve import Obligation
from verify.sync.collectives import (
    BLOCK_BARRIER,
    GRID_OPS,
    MAX_BARRIER,
    WARP_THREADS,
    Barrier,
    Collective,
    collective,
    members,
    static_threads,
    sync_barriers,
)
from verify.sync.uniform import Uniform
from verify.walk import Site

NAME = "barrier"
_TOP = Scope()
_GIVEN = ("contract", "shape")


class BarrierProperty:
    """Property `barrier`."""

    name = NAME
    depends = ("overflow",)

    def claims(self, context: Context) -> Claims:
        """Return one obligation for each collective call and each barrier."""
        claims = Claims()
        extents = {tag: context.encoder.term(e, _TOP) for tag, e in context.host.extents.items()}
        threads = static_threads(extents)
        barriers: list[Barrier] = []
        alike = _Alike(context, threads)
        for index, site in enumerate(context.device_sites):
            if isinstance(site.node, ir.Call) and site.node.op in ops.EARLY_EXIT:
                claims.unsupported.append(Issue(site.span, f"{site.node.op}: what follows may not run"))
            try:
                barriers += sync_barriers(site, index, threads)
                together = collective(site, threads)
            except ir.UnsupportedIR as error:
                claims.unsupported.append(Issue(site.span, str(error)))
                continue
            if isinstance(site.node, ir.Call) and site.node.op in GRID_OPS:
                claims.obligations.append(_of_grid(context, site))
            if together is not None:
                claims.obligations.append(_together(context, together, threads, alike))
        seen: set[tuple[int, int]] = set()
        for barrier in barriers:
            key = (id(barrier.point.site), barrier.number)
            if key not in seen:
                seen.add(key)
                claims.obligations += _barrier(context, barrier, threads, alike)
        _numbers(barriers, threads, claims)
        claims.assumptions.append(
            "a warp runs converged where all its threads reach a call at the same loop counters"
        )
        if alike.used:
            claims.assumptions.append("barrier: private variables are written before they are read (`init`)")
        return claims


PROPERTY = BarrierProperty()


class _Alike:
    """What follows from all threads of a group having computed the same.

    Attributes:
        used: something did.
    """

    def __init__(self, context: Context, threads: int) -> None:
        self.context, self.threads, self.used = context, threads, False
        self._known: dict[bytes, Uniform] = {}
        # Leaving early would take a thread out of its group's step.
        nodes = ir.walk(context.extracted.device.body)
        self._leaves = any(isinstance(n, ir.Call) and n.op in ops.EARLY_EXIT for n in nodes)

    def reach(self, site: Site, groups: np.ndarray) -> bool:
        """Return whether groups reach `site` together, by the values of variables that decide it.

        Args:
            site: a call.
            groups: a number for each thread; one that does not come here is in a group of its own.
        """
        variables = any(_reads_variable(s) for s in site.path)
        if not variables or self._leaves:
            return False
        key = groups.tobytes()
        if key not in self._known:
            body = self.context.extracted.device.body
            self._known[key] = Uniform(body, groups, self.context.encoder.readonly)
        found = self._known[key].reaches(site)
        self.used |= found
        return found


def _reads_variable(node: ir.Stmt) -> bool:
    conditions = [c for c in ir.children(node) if isinstance(c, ir.Expr)]
    loads = (n for c in conditions for n in ir.walk(c) if isinstance(n, ir.Load))
    return any(n.buffer.scope.startswith("local") for n in loads)


def _together(context: Context, call: Collective, threads: int, alike: _Alike) -> Obligation:
    """Return that with one thread all of its group come here at the same loop counters."""
    group = min(call.group, threads)
    site = call.site
    groups = np.arange(threads) // group
    comes = np.isin(groups, groups[members(site.scope.hypotheses, _thread(site), threads)])
    if alike.reach(site, np.where(comes, groups, threads + np.arange(threads))):
        return _settled(site, f"{call.what} is executed by all {group} threads together, which compute alike")
    thread = _thread(site)
    other = context.encoder.constant("t2")
    near = z3.And(other / group == thread / group, other >= 0, other < threads)
    return _uniform(site, other, near, f"{call.what} is executed by all {group} threads together", {})


def _settled(site: Site, what: str) -> Obligation:
    return Obligation(what, site.span, (), z3.BoolVal(True), {}, site)


def _barrier(context: Context, barrier: Barrier, threads: int, alike: _Alike) -> list[Obligation]:
    site = barrier.point.site
    other = context.encoder.constant("t2")
    if not 0 <= barrier.number <= MAX_BARRIER:
        raise ir.UnsupportedIR(f"barrier {barrier.number}")
    if barrier.number == BLOCK_BARRIER and barrier.count == threads:
        what = "barrier of the block is reached by all of its threads together"
        if alike.reach(site, np.zeros(threads, dtype=np.int64)):
            return [_settled(site, f"{what}, which compute alike")]
        return [_uniform(site, other, z3.And(other >= 0, other < threads), what, {})]
    inside = members(site.scope.hypotheses, _thread(site), threads)
    show = {"barrier": barrier.number, "threads": int(inside.sum()), "count": barrier.count}
    counted = z3.BoolVal(int(inside.sum()) == barrier.count)
    whole = (
        z3.BoolVal(
            bool(np.all(inside.reshape(-1, WARP_THREADS).min(1) == inside.reshape(-1, WARP_THREADS).max(1)))
            and barrier.count % WARP_THREADS == 0
        )
        if threads % WARP_THREADS == 0
        else z3.BoolVal(False)
    )
    what = f"barrier {barrier.number} is reached by the {barrier.count} threads that it waits for"
    found = [Obligation(what, site.span, (), z3.And(counted, whole), show, site)]
    own = _threads_in(inside, other)
    what = f"barrier {barrier.number} is reached by its threads together"
    if alike.reach(site, np.where(inside, threads, np.arange(threads))):
        return [*found, _settled(site, f"{what}, which compute alike")]
    return [*found, _uniform(site, other, own, what, {"barrier": barrier.number})]


def _uniform(
    site: Site, other: z3.ArithRef, near: z3.BoolRef, what: str, show: dict[str, object]
) -> Obligation:
    """Return that if a thread executes `site` thread `other` does too, at the same loop counters."""
    thread = _thread(site)
    hypotheses, goal = _follows(site, [(thread, other)], near)
    return Obligation(what, site.span, hypotheses, goal, {"t1": thread, "t2": other, **show}, site)  # type: ignore[arg-type]


def _of_grid(context: Context, site: Site) -> Obligation:
    """Return that if a thread of a block executes `site` all threads of all blocks do."""
    others = [(i.const, context.encoder.constant(f"{i.var.name}'"), i.extent) for i in site.scope.launch]
    near = z3.And(*(z3.And(other >= 0, other < extent) for _, other, extent in others))
    hypotheses, goal = _follows(site, [(const, other) for const, other, _ in others], near)
    show = {other.decl().name(): other for _, other, _ in others}
    what = "barrier of the grid is reached by all blocks together"
    return Obligation(what, site.span, hypotheses, goal, show, site)


def _follows(
    site: Site, pairs: Sequence[tuple[z3.ArithRef, z3.ArithRef]], near: z3.BoolRef
) -> tuple[tuple[Hypothesis, ...], z3.BoolRef]:
    """Return what is given where `site` is executed, and that it is with indices replaced by others."""
    given = [h for h in site.scope.hypotheses if h.kind in _GIVEN]
    own = [h for h in site.scope.hypotheses if h.kind not in _GIVEN]
    names = {const.decl().name() for const, _ in pairs}
    its = [replace(h, term=z3.substitute(h.term, *pairs)) for h in own if names & constants_of(h.term)]
    # What holds by the meaning of the IR holds of the other thread too.
    defined = [h for h in its if h.kind == "definition"]
    goals = [h.term for h in its if h.kind != "definition"]
    others = Hypothesis("others of the group", "launch", near)
    return (*given, *own, *defined, others), conjunction(goals)


def _threads_in(inside: np.ndarray, thread: z3.ArithRef) -> z3.BoolRef:
    """Return that `thread` is one of the threads marked in `inside`."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], inside.astype(np.int8), [0]))))
    spans = [z3.And(thread >= int(a), thread < int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return z3.Or(*spans) if spans else z3.BoolVal(False)


def _numbers(barriers: Sequence[Barrier], threads: int, claims: Claims) -> None:
    """A number that different sets of threads use would mix their arrivals."""
    sets: dict[int, tuple[Barrier, bytes]] = {}
    for barrier in barriers:
        site = barrier.point.site
        inside = members(site.scope.hypotheses, _thread(site), threads).tobytes()
        first, known = sets.setdefault(barrier.number, (barrier, inside))
        if not barrier.waits or known != inside or first.count != barrier.count:
            message = (
                f"barrier {barrier.number} is shared by different threads, or arrived at without waiting"
            )
            claims.unknown.append(Issue(site.span, message))


def _thread(site: Site) -> z3.ArithRef:
    found = next((i.const for i in site.scope.launch if i.tag == "threadIdx.x"), None)
    if found is None:
        raise ir.UnsupportedIR("a collective call before threadIdx.x is bound")
    return found
