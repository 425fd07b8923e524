"""Which phase of which mbarrier a wait waits for, and an arrival belongs to.

A thread meets the slots of a barrier array in a fixed order. Its visits of one kind (waits;
arrivals) are numbered in program order over all loops; the numbers are terms over the loop
counters. If two visits meet the same slot just when their numbers are equal modulo S (proved here),
then visit v is the (v div S)-th of its slot: an arrival belongs to that phase, provided that every
thread arrives as often as the barrier's count says and that none runs a phase ahead, which is what
property `mbarrier` proves. A wait is for the phase of that number or for the one before it,
whichever has the parity it waits for.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import z3

from verify import induction, ir, lemma
from verify.encode import Hypothesis, Index, constants_of, elected_any, elected_lane, elected_none
from verify.intarith import conjunction, constant_of, total
from verify.ops import WARP_THREADS
from verify.ranges import range_of
from verify.sync.evaluate import NotEvaluatedError, evaluate
from verify.walk import Site

if TYPE_CHECKING:
    from verify.properties import Context

Kind = Literal["init", "wait", "arrive", "expect", "copy"]
WAITS = frozenset({"mbarrier_wait_parity", "ptx_wait_barrier"})
ARRIVALS = frozenset({"ptx_arrive_barrier", "ptx_arrive_barrier_expect_tx", "ptx_cp_async_barrier_noinc"})
# Operations on mbarriers without a meaning here.
UNKNOWN_OPS = frozenset({"ptx_cp_async_barrier", "ptx_arrive_cluster_barrier"})
_COPIES = frozenset({"tma_load", "tma_load_im2col", "tma_load_multicast"})
_MAX_SLOTS = 512  # that one array may have, to be taken one by one


@dataclass(frozen=True)
class Phase:
    """One phase of one mbarrier.

    Attributes:
        barrier: the storage of the array.
        slot: index in the array.
        number: 0-based; -1 for a wait that has nothing to wait for (a fresh barrier's parity 1).
    """

    barrier: ir.Var
    slot: z3.ArithRef
    number: z3.ArithRef


@dataclass(frozen=True, eq=False)
class Use:
    """One statement that uses an mbarrier.

    Attributes:
        threads: values of threadIdx.x that run it; one lane for an elected one.
        loops: the loops around it that go round more than once.
        given: what holds where it runs, lane 0 standing for an elected one.
        parity: of a wait. bytes: of an expectation. count: of an initialisation.
    """

    kind: Kind
    site: Site
    barrier: ir.Var
    slot: z3.ArithRef
    threads: frozenset[int]
    loops: tuple[Index, ...]
    guards: tuple[z3.BoolRef, ...]
    elected: bool
    order: int
    given: tuple[Hypothesis, ...]
    parity: z3.ArithRef | None = None
    bytes: z3.ArithRef | None = None
    count: z3.ArithRef | None = None


@dataclass
class Ring:
    """The uses of one kind that one set of slots sees from a set of threads.

    Attributes:
        uses: in program order.
        visits: the uses again, those together that meet one slot in one round.
        ranks: number of each use's visit in program order, by the use's identity.
        slots, shift: visit v meets slot `min(slots) + (v + shift) % len(slots)`.
    """

    uses: list[Use]
    visits: list[list[Use]]
    ranks: dict[int, z3.ArithRef] = field(default_factory=dict)
    slots: frozenset[int] = frozenset()
    shift: int = 0

    @property
    def period(self) -> int:
        """Number of slots S: visits v and v + S meet the same one."""
        return len(self.slots)


class Phases:
    """Phases of the device IR of one kernel."""

    def __init__(self, context: "Context") -> None:
        """Keep the kernel; nothing is derived before it is asked for."""
        self.context = context
        self._known: dict[int, Phase] = {}
        self._lags: dict[int, int] = {}
        self._arrivals: dict[int, Use] = {}
        self._rings: dict[int, Ring] = {}
        self._values: dict[int, frozenset[int]] = {}
        self._runners: dict[tuple[int, ...], tuple[frozenset[int], bool]] = {}
        self._sets: dict[int, tuple[z3.BoolRef, frozenset[int]]] = {}
        self.prover = lemma.small_prover()

    # ------------------------------------------------------------------ for others
    def of_wait(self, site: Site) -> Phase:
        """Return the phase after whose completion the wait returns.

        Raises:
            UnsupportedIR: it cannot be derived.
        """
        return self.of(self._use(site, ("wait",)))

    def of_arrival(self, site: Site) -> Phase:
        """Return the phase that this arrival, or the bytes of this TMA load, belong to.

        Raises:
            UnsupportedIR: it cannot be derived.
        """
        return self.of(self._use(site, ("arrive", "copy", "expect")))

    def of(self, use: Use) -> Phase:
        """Return the phase of a use of an mbarrier.

        Raises:
            UnsupportedIR: it cannot be derived.
        """
        known = self._known.get(id(use))
        if known is None:
            if use.kind == "wait":
                known = self._of_wait(use)
            elif use.kind == "arrive":
                known = self._of_arrival(use)
            else:
                known = self._with_arrival(use)
            self._known[id(use)] = known
        return known

    def lag(self, use: Use) -> int:
        """Return how many phases before its visit's own a wait waits for."""
        self.of(use)
        return self._lags[id(use)]

    def rank_of_bytes(self, use: Use) -> z3.ArithRef:
        """Return the number of the visit of the arrival that an expectation or a copy goes with."""
        self.of(use)
        arrival = self._arrivals[id(use)]
        return self.ring(arrival).ranks[id(arrival)]

    @cached_property
    def uses(self) -> list[Use]:
        """Every use of an mbarrier, in program order.

        Raises:
            UnsupportedIR: an operation, a slot or a set of threads is not understood.
        """
        found = []
        for order, site in enumerate(self.context.device_sites):
            if not isinstance(site.node, ir.Call):
                continue
            use = self._read(site, site.node, order)
            if use is not None:
                found.append(use)
        return found

    def _use(self, site: Site, kinds: tuple[Kind, ...]) -> Use:
        for use in self.uses:
            if use.site.node is site.node and use.kind in kinds:
                return use
        raise ir.UnsupportedIR("no use of an mbarrier")

    # ------------------------------------------------------------------ reading
    def _read(self, site: Site, call: ir.Call, order: int) -> Use | None:
        if call.op in UNKNOWN_OPS:
            raise ir.UnsupportedIR(f"{call.op} on an mbarrier")
        term = self.context.encoder.term
        kind: Kind
        parity = size = count = None
        if call.op in WAITS:
            kind, target, parity = "wait", call.args[0], term(call.args[1], site.scope)
        elif call.op in ARRIVALS:
            kind, target = "arrive", call.args[0]
            if call.op == "ptx_arrive_barrier_expect_tx":
                size = term(call.args[1], site.scope)
            if len(call.args) > 1 + (size is not None):
                raise ir.UnsupportedIR(f"{call.op} at another block of the cluster")
        elif call.op == "mbarrier_expect_tx":
            kind, target, size = "expect", call.args[0], term(call.args[1], site.scope)
        elif call.op == "ptx_init_barrier_thread_count":
            kind, target, count = "init", call.args[0], term(call.args[1], site.scope)
        elif call.op in _COPIES and len(call.args) > 1 and _is_barrier(call.args[1]):
            kind, target = "copy", call.args[1]
        else:
            return None
        if not _is_barrier(target):
            raise ir.UnsupportedIR(f"{call.op} of something that is no mbarrier")
        assert isinstance(target, ir.Load), "an mbarrier is an element of an array"
        if len(target.indices) != 1:
            raise ir.UnsupportedIR(f"{target.buffer.name} is not flat")
        slot, offset = term(target.indices[0], site.scope), term(target.buffer.offset, site.scope)
        slot = slot if constant_of(offset) == 0 else slot + offset
        threads, elected = self.threads(site)
        self._same_rounds_in_all(site)
        loops, guards = free(site)
        return Use(
            kind,
            site,
            target.buffer.data,
            slot,
            threads,
            loops,
            guards,
            elected,
            order,
            _given(site) if kind != "init" else (),
            None if parity is None else z3.simplify(parity),
            size,
            count,
        )

    def _same_rounds_in_all(self, site: Site) -> None:
        """Raise UnsupportedIR where loops around `site` may run more often in some threads than in others."""
        own = {i.const.decl().name() for i in site.scope.launch if i.tag == "threadIdx.x"}
        if any(own & (constants_of(i.start) | constants_of(i.extent)) for i in site.scope.loops):
            raise ir.UnsupportedIR(f"mbarrier at {site.span} in a loop whose length depends on the thread")

    def threads(self, site: Site) -> tuple[frozenset[int], bool]:
        """Return the values of threadIdx.x that run `site`, and whether a lane is elected for it.

        Raises:
            UnsupportedIR: which threads run it depends on more than their index.
        """
        key = tuple(g.get_id() for g in _guards(site))
        if key not in self._runners:
            self._runners[key] = self._threads(site)
        return self._runners[key]

    def _threads(self, site: Site) -> tuple[frozenset[int], bool]:
        launch = {i.tag: i for i in site.scope.launch}
        thread = launch.get("threadIdx.x")
        if thread is None or any(
            constant_of(launch[t].extent) != 1 for t in ("threadIdx.y", "threadIdx.z") if t in launch
        ):
            raise ir.UnsupportedIR("mbarrier outside of one-dimensional blocks")
        extent = constant_of(thread.extent)
        if extent is None:
            raise ir.UnsupportedIR("mbarrier in a block of computed size")
        chosen, elected = frozenset(range(extent)), False
        by_number = chosen  # whichever lane is elected
        for guard in _guards(site):
            lane = elected_lane(guard, site.scope)
            elected |= not z3.eq(lane, guard)
            if thread.const.decl().name() not in constants_of(lane):
                continue
            if len(constants_of(lane)) > 1:
                raise ir.UnsupportedIR("which threads use an mbarrier depends on more than their index")
            chosen &= self._threads_of(lane, thread.const, extent)
            ways = (elected_any(guard), elected_none(guard))
            by_number &= frozenset().union(*(self._threads_of(w, thread.const, extent) for w in ways))
        if elected and not is_of_warps(by_number):
            raise ir.UnsupportedIR("an elected lane that has to be one of some")
        return chosen, elected

    def _threads_of(self, guard: z3.BoolRef, thread: z3.ArithRef, extent: int) -> frozenset[int]:
        known = self._sets.get(guard.get_id())
        if known is None:
            try:
                taken = evaluate(guard, {thread.decl().name(): np.arange(extent)})
            except NotEvaluatedError as error:
                raise ir.UnsupportedIR("which threads use an mbarrier cannot be told") from error
            chosen = np.flatnonzero(np.broadcast_to(taken, extent)).tolist()
            known = self._sets[guard.get_id()] = (guard, frozenset(chosen))  # keeps the id its own
        return known[1]

    # ------------------------------------------------------------------ phases
    def _of_arrival(self, use: Use) -> Phase:
        ring = self.ring(use)
        return Phase(use.barrier, use.slot, _divided(ring.ranks[id(use)], ring.period))

    def _of_wait(self, use: Use) -> Phase:
        ring = self.ring(use)
        visit = _divided(ring.ranks[id(use)], ring.period)
        assert use.parity is not None, "a wait has a parity"
        given = use.given
        self._lags[id(use)] = 0
        if self._holds(given, use.parity == visit % 2):
            return Phase(use.barrier, use.slot, visit)
        self._lags[id(use)] = 1
        if self._holds(given, use.parity == (visit + 1) % 2):
            return Phase(use.barrier, use.slot, z3.simplify(visit - 1))
        raise ir.UnsupportedIR(
            f"parity of the wait at {use.site.span}: not that of its visits of the slot in turn"
        )

    def _with_arrival(self, use: Use) -> Phase:
        """Return the phase of bytes: that of the arrival of the same thread on the same round."""
        for other in self.uses:
            if other.kind != "arrive" or other.barrier is not use.barrier or not use.threads <= other.threads:
                continue
            if other.loops != use.loops[: len(other.loops)]:
                continue
            if self._holds(use.given, use.slot == other.slot):
                self._arrivals[id(use)] = other
                return Phase(use.barrier, use.slot, self.of(other).number)
        raise ir.UnsupportedIR(f"bytes at {use.site.span} without an arrival of the same thread")

    # ------------------------------------------------------------------ rings
    def ring(self, use: Use) -> Ring:
        """Return the visits of `use.kind` that the threads of `use` make to its slots.

        Raises:
            UnsupportedIR: they do not meet the slots in turn.
        """
        known = self._rings.get(id(use))
        if known is None:
            known = self._ring(use)
            for peer in known.uses:
                if peer.threads == use.threads:
                    self._rings[id(peer)] = known
        return known

    def _ring(self, use: Use) -> Ring:
        peers = [u for u in self.uses if self._is_peer(use, u)]
        if any(not use.threads <= u.threads for u in peers):
            raise ir.UnsupportedIR("a part of the threads meets more slots than the others")
        ring = Ring(peers, self._visits(peers))
        for number, visit in enumerate(ring.visits):
            for member in visit:
                counts = [before(member, other[0], at < number) for at, other in enumerate(ring.visits)]
                ring.ranks[id(member)] = z3.simplify(total(counts))
        for member in peers:
            self._check_guards(member)
            for other in peers:
                self._check_counted(member, other)
        self._take_turns(ring, use)
        return ring

    def _is_peer(self, use: Use, other: Use) -> bool:
        return (
            other.kind == use.kind
            and other.barrier is use.barrier
            and bool(use.threads & other.threads)
            and bool(self.slots(use) & self.slots(other))
        )

    def _visits(self, uses: list[Use]) -> list[list[Use]]:
        """Put uses of the same slot on the same round together: they make one visit."""
        visits: list[list[Use]] = []
        for use in uses:
            first = next((v[0] for v in visits if self._same_round(v[0], use)), None)
            if first is None:
                visits.append([use])
            else:
                next(v for v in visits if v[0] is first).append(use)
        return visits

    def _same_round(self, first: Use, second: Use) -> bool:
        if first.kind != "arrive" or first.loops != second.loops:
            return False
        return self._holds(second.given, first.slot == second.slot)

    def slots(self, use: Use) -> frozenset[int]:
        """Return the slots that `use` may meet.

        Raises:
            UnsupportedIR: there are too many, or the solver cannot tell.
        """
        known = self._values.get(id(use))
        if known is None:
            known = self._values[id(use)] = self._slots(use)
        return known

    def _slots(self, use: Use) -> frozenset[int]:
        if (value := constant_of(use.slot)) is not None:
            return frozenset({value})
        storage = self.context.storages.of(use.barrier)
        size = constant_of(storage.elements)
        if size is None or size > _MAX_SLOTS:
            raise ir.UnsupportedIR(f"mbarrier array {storage.name} of computed size")
        slot = self.context.encoder.constant("slot")
        found: set[int] = set()
        is_slot = slot == use.slot
        solver = lemma.look([*(h.term for h in lemma.near(use.given, is_slot)), is_slot])
        while (answer := solver.check()) == z3.sat:
            value = solver.model().eval(slot, model_completion=True).as_long()
            if value in found or len(found) > _MAX_SLOTS:
                raise ir.UnsupportedIR("slots of an mbarrier array")
            found.add(value)
            solver.add(slot != value)
        if answer == z3.unknown:  # any slot, then
            return frozenset(range(size))
        return frozenset(found)

    def _take_turns(self, ring: Ring, use: Use) -> None:
        """Prove in which turn the visits meet the slots.

        Raises:
            UnsupportedIR: they do not meet them in turn.
        """
        ring.slots = frozenset().union(*(self.slots(u) for u in ring.uses))
        first, period = min(ring.slots), ring.period
        for shift in range(period):
            in_turn = [(u, u.slot == first + _turn(ring.ranks[id(u)], shift, period)) for u in ring.uses]
            if all(self._holds(u.given, goal) for u, goal in in_turn):
                ring.shift = shift
                return
        raise ir.UnsupportedIR(f"slots at {use.site.span}: {period} of them, not met in turn")

    def _check_guards(self, use: Use) -> None:
        """Prove that the visits that the guards let through are the first ones by rank.

        Raises:
            UnsupportedIR: that cannot be proved: the rank is no number of visits then.
        """
        names = {i.const.decl().name() for i in use.loops}
        for guard in use.guards:
            loops = names & constants_of(guard)
            if not loops:
                continue
            outer = use.loops[0]
            # Ranks count rounds of the outermost loop first: no visit comes earlier in a later round.
            if loops == {outer.const.decl().name()} and induction.is_prefix(
                self.context.encoder, use.given, outer, guard
            ):
                continue
            raise ir.UnsupportedIR(f"guard of the mbarrier use at {use.site.span}: not of its first visits")

    def _check_counted(self, use: Use, other: Use) -> None:
        """Prove that the visits of `other` that the rank of `use` counts have been made.

        With `_check_guards`: where the guards let one round through they let the earlier ones through.

        Raises:
            UnsupportedIR: guards that `use` is not under may have left some out.
        """
        if {g.get_id() for g in other.guards} <= {g.get_id() for g in use.guards}:
            return
        if constant_of(z3.simplify(before(use, other, other.order < use.order))) == 0:
            return
        if not self._holds(use.given, conjunction(other.guards)):
            raise ir.UnsupportedIR(f"guard of the mbarrier use at {other.site.span}: not of {use.site.span}")

    # ------------------------------------------------------------------ proofs
    def _holds(self, given: tuple[Hypothesis, ...], goal: z3.BoolRef) -> bool:
        return lemma.holds(self.prover, given, goal)


def _given(site: Site) -> tuple[Hypothesis, ...]:
    scope = site.scope
    known = [Hypothesis(h.label, h.kind, elected_lane(h.term, scope)) for h in scope.hypotheses]
    for index in scope.loops:  # a length that data decides: the most it can be, without that data
        most = None if constant_of(index.extent) is not None else range_of(index.extent).high
        if most is not None:
            inside = z3.And(index.start <= index.const, index.const < index.start + most)
            known.append(Hypothesis(f"most of {index.var.name}", "loop", inside))
    return tuple(known)


def is_of_warps(threads: frozenset[int]) -> bool:
    """Return whether `threads` are whole warps."""
    warps = {t // WARP_THREADS for t in threads}
    return len(threads) == len(warps) * WARP_THREADS


def _is_barrier(expr: ir.Expr) -> bool:
    return isinstance(expr, ir.Load) and expr.buffer.scope == "shared.barrier"


def _guards(site: Site) -> list[z3.BoolRef]:
    return [h.term for h in site.scope.hypotheses if h.kind == "guard"]


def free(site: Site) -> tuple[tuple[Index, ...], tuple[z3.BoolRef, ...]]:
    """Return the loops around `site` with more than one round, and its guards less those on threads."""
    loops = tuple(i for i in site.scope.loops if constant_of(i.extent) != 1)
    thread = next((i.const.decl().name() for i in site.scope.launch if i.tag == "threadIdx.x"), "")
    guards = []
    for term in _guards(site):
        lane = elected_lane(term, site.scope)
        if thread not in constants_of(lane) and not z3.is_true(z3.simplify(lane)):
            guards.append(lane)
    return loops, tuple(guards)


def _rounds(index: Index) -> z3.ArithRef:
    return z3.simplify(z3.If(index.extent > 0, index.extent, z3.IntVal(0)))


def before(use: Use, other: Use, precedes: bool) -> z3.ArithRef:
    """Return how many visits of `other` come before this visit of `use` in program order."""
    shared = 0
    while shared < min(len(use.loops), len(other.loops)) and use.loops[shared] is other.loops[shared]:
        shared += 1
    inner = z3.IntVal(1)
    for index in other.loops[shared:]:
        inner = inner * _rounds(index)
    count = inner if precedes else z3.IntVal(0)
    for index in reversed(use.loops[:shared]):
        count = count + (index.const - index.start) * inner
        inner = inner * _rounds(index)
    names = {i.const.decl().name() for i in (*use.loops, *other.loops)}
    if any(names & constants_of(_rounds(i)) for i in (*use.loops, *other.loops)):
        raise ir.UnsupportedIR("mbarrier in a loop whose length depends on another loop")
    return count


def _turn(rank: z3.ArithRef, shift: int, period: int) -> z3.ArithRef:
    """Return the position in the ring, in a form that a computed index often has already."""
    if period == 1:
        return z3.IntVal(0)
    return (rank + shift) % period if shift else rank % period


def _divided(rank: z3.ArithRef, period: int) -> z3.ArithRef:
    return rank if period == 1 else z3.simplify(rank / period)
