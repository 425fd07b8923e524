"""Whether the mbarriers of a kernel do what each wait relies on, for every trip count.

Threads that run the same uses of mbarriers make one agent. The slots that agents meet in turn make
one group; visit v of a group meets its phase v div S (`phases.py`). What an agent has seen when it
comes to a statement is a number of visits: its waits up to visit b - 1 have returned, so every
agent that arrives there has made the arrivals that those waits were for. Such steps between visits
are differences of visit numbers, proved once for all rounds; chains of them are paths in a graph:

- an arrival of visit v may be made only after all arrivals of visit v - S (no arrival lands in the
  phase before its own): the greatest path weight from it to each arriving agent is at least -S;
- phase n + 1 cannot end before a wait for phase n has returned (the parity is unambiguous): an
  arrival of phase n + 1 comes after that wait by such a path;
- no cycle of steps leads from a visit to itself or a later one (no deadlock), and each awaited
  arrival is made.

By induction over the steps, whose number is finite for every visit, each wait returns just after
the phase that it is for, in every schedule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import z3

from verify import ir, lemma
from verify.encode import Hypothesis, constants_of
from verify.intarith import conjunction, constant_of, total
from verify.storage import BYTE_BITS
from verify.sync.collectives import BLOCK_BARRIER, static_threads, sync_barriers
from verify.sync.phases import Ring, Use, free
from verify.sync.steps import (
    Agent,
    Group,
    Steps,
    agents_of,
    inner_rounds,
    same_guards,
    thread_range,
    visits_before,
    visits_made,
)
from verify.walk import Site

if TYPE_CHECKING:
    from verify.properties import Context

# What to do about threads that wait with their role and arrive nowhere.
ADVICE = (
    "let only the warp that loads into the producer's loop: "
    "dsv4_kernels.tile.producer.one_warp(kernel) asks the compiler for it"
)


@dataclass(frozen=True)
class Fact:
    """One thing that was to be shown, and whether it was; `certain` where it is known to be false."""

    what: str
    site: Site
    shown: bool
    why: str = ""
    certain: bool = False


class Protocol:
    """The mbarriers of the device IR of one kernel."""

    def __init__(self, context: "Context") -> None:
        """Read the uses; raises UnsupportedIR where one is not understood."""
        self.context = context
        self.phases = context.phases
        self.uses = self.phases.uses
        self.facts: list[Fact] = []
        self.agents: list[Agent] = []
        self.groups: list[Group] = []
        self.steps = Steps(self.phases, self.agents, self.groups)

    def check(self) -> list[Fact]:
        """Show everything; what is not shown is in the list too.

        Raises:
            UnsupportedIR: a phase cannot be derived.
        """
        self._initialised()
        self.agents += agents_of([u for u in self.uses if u.kind != "init"])
        self._grouped()
        for group in self.groups:
            self._counted(group)
            self._bytes(group)
        self._no_cycle()
        for number, group in enumerate(self.groups):
            self._no_overrun(number, group)
            self._unambiguous(number, group)
            self._awaited(group)
        return self.facts

    def _fact(self, what: str, use: Use, shown: bool, why: str = "", certain: bool = False) -> bool:
        self.facts.append(Fact(what, use.site, shown, "" if shown else why, certain and not shown))
        return shown

    def _holds(self, given: Sequence[Hypothesis], goal: z3.BoolRef) -> bool:
        return lemma.holds(self.phases.prover, given, goal)

    # ------------------------------------------------------------------ initialisation
    def _initialised(self) -> None:
        inits: dict[tuple[ir.Var, int], Use] = {}
        for use in (u for u in self.uses if u.kind == "init"):
            slot = constant_of(use.slot)
            once = slot is not None and not use.loops and not use.guards and len(use.threads) == 1
            once = once and (use.barrier, slot) not in inits and constant_of(_count(use)) is not None
            why = "twice, by several threads, or in a loop"
            if self._fact("an mbarrier is initialised once, with a constant count", use, once, why):
                assert slot is not None, "once: at a constant slot"
                inits[use.barrier, slot] = use
        self.inits = inits
        others = [u for u in self.uses if u.kind != "init"]
        last = max((u.order for u in inits.values()), default=-1)
        for use in others:
            slots = self.phases.slots(use)
            known = all((use.barrier, s) in inits for s in slots)
            self._fact("every slot in use is initialised", use, known, f"slots {sorted(slots)}", certain=True)
        if others:
            first = min(others, key=lambda u: u.order)
            # For the async proxy there is a fence too, which `race` asks for.
            seen = any(
                isinstance(site.node, ir.Call) and is_block_barrier(site.node) and self._by_all(site)
                for site in self.context.device_sites[last + 1 : first.order]
            )
            what = "initialisation is seen by the whole block before the first use"
            self._fact(what, first, seen, "no barrier between", certain=True)

    def _by_all(self, site: Site) -> bool:
        guards = [h for h in site.scope.hypotheses if h.kind == "guard"]
        return not guards and not any(constant_of(i.extent) != 1 for i in site.scope.loops)

    # ------------------------------------------------------------------ groups
    def _grouped(self) -> None:
        for number, agent in enumerate(self.agents):
            for use in agent.uses:
                if use.kind not in ("wait", "arrive"):
                    continue
                ring = self.phases.ring(use)
                group = self._group(use, ring)
                (group.waits if use.kind == "wait" else group.arrivals)[number] = ring
                if use.kind == "wait":
                    lag = self.phases.lag(use)
                    if group.lags.setdefault(number, lag) != lag:
                        raise ir.UnsupportedIR(f"{group}: one agent waits in two ways")

    def _group(self, use: Use, ring: Ring) -> Group:
        for group in self.groups:
            if group.barrier is use.barrier and group.slots & ring.slots:
                shifts = {r.shift for r in (*group.waits.values(), *group.arrivals.values(), ring)}
                if group.slots != ring.slots or len(shifts) > 1:
                    raise ir.UnsupportedIR(f"{group} and the slots at {use.site.span} are met out of step")
                return group
        self.groups.append(Group(use.barrier, ring.slots))
        return self.groups[-1]

    def _counted(self, group: Group) -> None:
        counts = {
            constant_of(_count(self.inits[group.barrier, s])) for s in group.slots if self._known(group)
        }
        arrivals = 0
        for number, ring in group.arrivals.items():
            each = {len(visit) for visit in ring.visits}
            if len(each) > 1:
                raise ir.UnsupportedIR(f"{group}: arrivals of one thread differ from visit to visit")
            if any(not same_guards(use, visit[-1]) for visit in ring.visits for use in visit):
                raise ir.UnsupportedIR(f"{group}: arrivals of one visit are under different guards")
            arrivals += len(self.agents[number].threads) * each.pop()
        rings = [*group.arrivals.values(), *group.waits.values()]
        what = f"the arrivals of each phase of {group} are as many as its count"
        self._fact(what, rings[0].uses[0], counts == {arrivals}, f"{arrivals} arrivals, count {counts}")

    def _known(self, group: Group) -> bool:
        return all((group.barrier, s) in self.inits for s in group.slots)

    # ------------------------------------------------------------------ bytes
    def _bytes(self, group: Group) -> None:
        taken: set[int] = set()
        for number, ring in group.arrivals.items():
            own: set[int] = set()
            for visit in ring.visits:
                found = self._visit_bytes(group, self.agents[number], visit)
                alone = not own & found
                self._fact(f"the bytes of {group} belong to one arrival", visit[-1], alone, "to two")
                own |= found
            taken |= own
        for use in self.uses:
            stray = use.kind in ("expect", "copy") and use.barrier is group.barrier and id(use) not in taken
            if stray and self.phases.slots(use) & group.slots:
                self._fact(f"bytes of {group} belong to an arrival", use, False, "of no arriving thread")

    def _visit_bytes(self, group: Group, agent: Agent, visit: list[Use]) -> set[int]:
        last = visit[-1]
        expected, loaded = [u.bytes for u in visit if u.bytes is not None], []
        taken: set[int] = set()
        for use in agent.uses:
            if use.kind not in ("expect", "copy") or use.barrier is not group.barrier:
                continue
            if use.loops[: len(last.loops)] != last.loops or not agent.threads <= use.threads:
                continue
            if not self._holds(use.given, use.slot == last.slot):
                continue
            taken.add(id(use))
            inner = use.loops[len(last.loops) :]
            same = same_guards(use, last) and not any(
                {i.const.decl().name() for i in use.loops} & constants_of(i.extent) for i in inner
            )
            self._fact(f"the bytes of {group} come whenever its arrival does", use, same, "guards differ")
            times = z3.IntVal(1)
            for index in inner:
                times = times * index.extent
            if use.kind == "copy":
                loaded.append(self._loaded(use) * times)
            else:
                early = use.order < last.order and not inner
                self._fact(f"bytes are expected of {group} before its arrival", use, early, "after it")
                expected.append(use.bytes)
        goal = total(expected) == total(loaded)
        equal = self._holds(last.given, goal)
        why = f"expected {z3.simplify(total(expected))}, "
        why += f"loaded {z3.simplify(total(loaded))}"
        self._fact(f"the bytes loaded in each phase of {group} are those expected", last, equal, why)
        return taken

    def _loaded(self, use: Use) -> z3.ArithRef:
        for copy in self.context.memory.tma:
            if copy.site.node is use.site.node:
                return copy.shared.count * copy.shared.unit_bits / BYTE_BITS
        raise ir.UnsupportedIR(f"size of the copy at {use.site.span}")

    def _no_cycle(self) -> None:
        best = self.steps.longest()
        for number, group in enumerate(self.groups):
            for agent, ring in group.arrivals.items():
                weight = best.get(((number, agent), (number, agent)))
                what = f"no arrival at {group} waits for itself or a later one"
                shown = weight is None or weight < 0
                self._fact(what, ring.uses[0], shown, "roles wait for each other in a cycle")

    # ------------------------------------------------------------------ phases stay apart
    def _no_overrun(self, number: int, group: Group) -> None:
        # Where bytes come, too, a phase does not end with its last arrival.
        uses = [u for a in group.arrivals for u in (*group.arrivals[a].uses, *self._bytes_of(group, a))]
        loads = any(u.kind != "arrive" or u.bytes is not None for u in uses)
        for agent, ring in group.arrivals.items():
            firsts = [visit[0] for visit in ring.visits]
            for use in [*firsts, *self._bytes_of(group, agent)]:
                seen = self.steps.ended(use, agent) if loads else self.steps.seen(use, agent)
                for other in group.arrivals:
                    alone = other == agent and len(self.agents[agent].threads) == 1 and not loads
                    after = alone or seen.get((number, other), -group.period - 1) >= -group.period
                    if not after:  # or there is no second phase
                        after = self._holds(use.given, self.steps.rank(use) < group.period)
                    kind = "an arrival" if use.kind == "arrive" else "a byte"
                    what = f"{kind} at {group} comes after the phase before its own has ended"
                    self._fact(what, use, after, self._behind(other))

    def _bytes_of(self, group: Group, agent: int) -> list[Use]:
        return [
            u
            for u in self.agents[agent].uses
            if u.kind in ("expect", "copy")
            and u.barrier is group.barrier
            and self.phases.slots(u) & group.slots
        ]

    def _behind(self, agent: int, group: Group | None = None) -> str:
        threads = thread_range(self.agents[agent].threads)
        if group is None or not self.agents[agent].watches:
            return f"threads {threads} may be a phase behind"
        return (
            f"threads {threads} wait with their role and arrive nowhere: one that is a round of "
            f"{group.period} stages late misses a phase and waits for ever; {ADVICE}"
        )

    def _unambiguous(self, number: int, group: Group) -> None:
        for agent, ring in group.waits.items():
            for use in ring.uses:
                what = f"a wait at {group} returns before its parity can come again"
                leader = self.agents[agent].leader
                shown = self._returns_in_time(number, group, use, agent)
                if not shown and leader is not None and leader in group.waits:
                    shown = self._returns_in_time(number, group, use, leader)
                self._fact(what, use, shown, self._behind(agent, group))

    def _returns_in_time(self, number: int, group: Group, use: Use, agent: int) -> bool:
        lag = group.lags[agent]
        for other, ring in group.arrivals.items():
            # Visit v + (1 - lag) S of its arrivals begins to end the phase after the one awaited.
            seen = self.steps.closed({(number, other): 0})
            for (at, who), weight in seen.items():
                if who != agent:
                    continue
                arrivals = self.groups[at].arrivals[agent]
                waited = []
                for visit in arrivals.visits:
                    made = visits_made(visit[-1], group.waits[agent])
                    done = constant_of(made - 1 - self.steps.rank(visit[-1]))
                    sure = all(same_guards(visit[-1], u, part=True) for u in group.waits[agent].uses)
                    waited.append(done if sure else None)
                least = [w for w in waited if w is not None]
                if len(least) == len(waited) and (1 - lag) * group.period + weight + min(least) >= 0:
                    return True
            if self._never_again(group, use, ring, lag):
                return True
        return False

    def _never_again(self, group: Group, use: Use, ring: Ring, lag: int) -> bool:
        """Return whether nobody arrives in the phase after the one that `use` waits for."""
        rank = self.phases.ring(use).ranks[id(use)]
        made = total([inner_rounds(v[0], 0) for v in ring.visits])
        return self._holds(use.given, rank + (1 - lag) * group.period >= made)

    # ------------------------------------------------------------------ what is awaited comes
    def _awaited(self, group: Group) -> None:
        for agent, waits in group.waits.items():
            for use in waits.uses:
                for other, ring in group.arrivals.items():
                    made = self._is_made(group, use, group.lags[agent], ring)
                    threads = thread_range(self.agents[other].threads)
                    what = f"threads {threads} make the arrivals awaited at {group}"
                    self._fact(what, use, made, "guards or trip counts differ")
                if not group.arrivals:
                    vacuous = self._holds(use.given, self.phases.of(use).number < 0)
                    self._fact(f"somebody arrives at {group}", use, vacuous, "nobody does")

    def _is_made(self, group: Group, use: Use, lag: int, ring: Ring) -> bool:
        rank = self.phases.ring(use).ranks[id(use)]
        for visit in ring.visits:
            if self._same_round_made(use, visit[-1], ring):
                return True
        if all(not u.guards for v in ring.visits for u in v):
            made = total([inner_rounds(v[0], 0) for v in ring.visits])
            target = rank - lag * group.period
            goal = z3.Or(target < 0, target < made)
            return self._holds(use.given, goal) and not self._barriers_between(use, ring)
        return False

    def _same_round_made(self, use: Use, other: Use, ring: Ring) -> bool:
        """Return whether `other` runs in the round of the same counters, as the same visit."""
        if len(use.loops) != len(other.loops):
            return False
        pairs = [(o.const, u.const) for u, o in zip(use.loops, other.loops, strict=True)]
        ranges = [z3.And(i.const >= i.start, i.const < i.start + i.extent) for i in other.loops]
        goal = conjunction([*ranges, *other.guards])
        rank = self.phases.ring(use).ranks[id(use)]
        same = z3.And(goal, ring.ranks[id(other)] == rank)
        if not self._holds(use.given, z3.substitute(same, *pairs)):
            return False
        for barrier in self._barriers:
            first = z3.substitute(visits_before(barrier, other), *pairs)
            second = visits_before(barrier, use)
            if not self._holds(use.given, first <= second):
                return False
        return True

    def _barriers_between(self, use: Use, ring: Ring) -> bool:
        """Return whether an arrival of `ring` may be behind a barrier of the block that `use` is before."""
        for barrier in self._barriers:
            own = constant_of(visits_before(barrier, use))
            others = [constant_of(visits_before(barrier, u)) for u in ring.uses]
            if own is None or any(other is None or other > own for other in others):
                return True
        return False

    @cached_property
    def _barriers(self) -> list[Use]:
        """The barriers of the block after the first use of an mbarrier.

        Raises:
            UnsupportedIR: a barrier between some of the threads, of more than one agent.
        """
        orders = [u.order for u in self.uses if u.kind != "init"]
        first, last, found = min(orders), max(orders), []
        size = _block_threads(self.uses[0].site)
        for order, site in enumerate(self.context.device_sites):
            if not first < order < last or not isinstance(site.node, ir.Call):
                continue
            for barrier in sync_barriers(site, order, size)[:1]:  # levels of a reduction are alike
                threads, elected = self.phases.threads(site)
                if barrier.number == BLOCK_BARRIER and barrier.count == size:
                    loops, guards = free(site)
                    nothing = (ir.Var(ir.HANDLE, ""), z3.IntVal(0))
                    found.append(Use("init", site, *nothing, threads, loops, guards, elected, order, ()))
                elif len([a for a in self.agents if a.threads & threads]) > 1:
                    raise ir.UnsupportedIR("a named barrier between roles that use mbarriers")
        return found


def _count(use: Use) -> z3.ArithRef:
    assert use.count is not None, "an initialisation has a count"
    return use.count


def _block_threads(site: Site) -> int:
    extents = {i.tag: i.extent for i in site.scope.launch}
    return static_threads(extents)


def is_block_barrier(call: ir.Call) -> bool:
    """Return whether `call` is a barrier of the whole block."""
    return (call.op == "tvm_storage_sync" and len(call.args) == 1) or call.op in (
        "sync_grid",
        "syncthreads_count",
        "syncthreads_and",
        "syncthreads_or",
    )
