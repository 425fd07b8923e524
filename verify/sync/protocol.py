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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING

import z3

from verify import ir, lemma
from verify.encode import Hypothesis, constants_of
from verify.intarith import conjunction, constant_of, total
from verify.ops import WARP_THREADS
from verify.storage import BYTE_BITS
from verify.sync.phases import Ring, Use, before, free
from verify.walk import Site

if TYPE_CHECKING:
    from verify.properties import Context

Node = tuple[int, int]  # group, agent: the visits of one agent's arrivals to one group


@dataclass(frozen=True)
class Agent:
    """Threads that run the same uses; `mates` are in the warp of an elected lane of agent `leader`."""

    threads: frozenset[int]
    uses: tuple[Use, ...]
    leader: int | None = None


@dataclass
class Group:
    """Slots that agents meet in turn.

    Attributes:
        waits, arrivals: the visits of each agent, by its number.
        lags: how many phases before its visit's own the agent waits for.
    """

    barrier: ir.Var
    slots: frozenset[int]
    waits: dict[int, Ring] = field(default_factory=dict)
    arrivals: dict[int, Ring] = field(default_factory=dict)
    lags: dict[int, int] = field(default_factory=dict)

    @property
    def period(self) -> int:
        """Number of slots."""
        return len(self.slots)

    def __str__(self) -> str:
        """Return `name[0..5]`."""
        low, high = min(self.slots), max(self.slots)
        return f"{self.barrier.name}[{low}]" if low == high else f"{self.barrier.name}[{low}..{high}]"


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
        self.assumptions: list[str] = []
        self.agents: list[Agent] = []
        self.groups: list[Group] = []

    def check(self) -> list[Fact]:
        """Show everything; what is not shown is in the list too.

        Raises:
            UnsupportedIR: a phase cannot be derived.
        """
        self._initialised()
        self.agents = agents_of([u for u in self.uses if u.kind != "init"])
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
                assert slot is not None
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
            ready = self._fenced(last, first.order)
            what = "initialisation is fenced and seen by the whole block before the first use"
            self._fact(what, first, ready, "no fence and barrier between", certain=True)

    def _fenced(self, last: int, first: int) -> bool:
        fenced = False
        for order, site in enumerate(self.context.device_sites[:first]):
            if order <= last or not isinstance(site.node, ir.Call):
                continue
            if site.node.op == "ptx_fence_barrier_init" and self._by_all(site):
                fenced = True
            if fenced and is_block_barrier(site.node) and self._by_all(site):
                return True
        return False

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
            for visit in ring.visits:
                taken |= self._visit_bytes(group, self.agents[number], visit)
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
            same = _same_guards(use, last) and not any(
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

    # ------------------------------------------------------------------ steps
    def _steps(self, use: Use, agent: int) -> list[tuple[Node, int | None, bool]]:
        """Return what `agent` has seen when it comes to `use`.

        Each is an agent's arrivals, up to how many visits later than that of `use` (None: some
        visits that the number does not tell), and whether it is sure that it has seen them.
        """
        steps: list[tuple[Node, int | None, bool]] = []
        for number, group in enumerate(self.groups):
            ring = group.waits.get(agent)
            if ring is None:
                continue
            done = _done(use, ring)
            if constant_of(done) == 0:
                continue
            target = z3.simplify(done - 1 - group.lags[agent] * group.period)
            weight = constant_of(target - self._rank(use))
            if weight is None and self._in_earlier_wave(use, group, ring, target):
                continue
            sure = all(_same_guards(use, u, part=True) for u in ring.uses)
            steps += [((number, other), weight, sure) for other in group.arrivals]
        return steps

    def _rank(self, use: Use) -> z3.ArithRef:
        if use.kind in ("wait", "arrive"):
            return self.phases.ring(use).ranks[id(use)]
        return self.phases.rank_of_bytes(use)

    def _in_earlier_wave(self, use: Use, group: Group, ring: Ring, target: z3.ArithRef) -> bool:
        """Return whether visit `target` of `ring` is of an earlier round of the outermost loop.

        That number never grows along steps, so a step that lowers it is in no cycle.
        """
        if not use.loops or not self._waves_agree:
            return False
        if any(not u.loops or u.loops[0] is not use.loops[0] for u in ring.uses):
            return False
        wave = use.loops[0]
        start = (wave.const - wave.start) * _round_visits(ring)
        return bool(group.arrivals) and self._holds(use.given, target < start)

    @cached_property
    def _waves_agree(self) -> bool:
        """Return whether all agents make as many visits of a group in a round of one outermost loop."""
        for group in self.groups:
            rings = [*group.waits.values(), *group.arrivals.values()]
            uses = [u for r in rings for u in r.uses]
            first = uses[0].loops[:1]
            if any(u.loops[:1] != first for u in uses):
                return False
            if len({_round_visits(r).get_id() for r in rings}) > 1:
                return False
        return True

    def _edges(self, sure: bool) -> dict[Node, dict[Node, int | None]]:
        """Return the steps between arrivals: least weights of the sure ones, or greatest of all."""
        edges: dict[Node, dict[Node, int | None]] = {}
        for number, group in enumerate(self.groups):
            for agent, ring in group.arrivals.items():
                known = edges.setdefault((number, agent), {})
                per_use = [dict[Node, int | None]() for _ in ring.visits]
                for found, visit in zip(per_use, ring.visits, strict=True):
                    for node, weight, certain in self._steps(visit[-1], agent):
                        if certain or not sure:
                            found[node] = weight
                    if sure:
                        found.update(self._own(visit[-1], agent))
                nodes = set().union(*per_use)
                for node in nodes:
                    weights = [found[node] for found in per_use if node in found]
                    if any(w is None for w in weights):
                        known[node] = None
                    elif sure:
                        if len(weights) == len(per_use):
                            known[node] = min(w for w in weights if w is not None)
                    else:
                        known[node] = max(w for w in weights if w is not None)
        return edges

    def _own(self, use: Use, agent: int) -> dict[Node, int | None]:
        """Return the arrivals that the thread itself has made before it comes to `use`."""
        own: dict[Node, int | None] = {}
        for number, group in enumerate(self.groups):
            ring = group.arrivals.get(agent)
            if ring is None or not all(_same_guards(use, u, part=True) for u in ring.uses):
                continue
            weight = constant_of(_done(use, ring) - 1 - self._rank(use))
            if weight is not None:
                own[number, agent] = weight
        return own

    def _no_cycle(self) -> None:
        edges = self._edges(sure=False)
        nodes = list(edges)
        best: dict[tuple[Node, Node], int] = {}
        for node, steps in edges.items():
            for other, weight in steps.items():
                if weight is None:  # a step of unknown length may be in no cycle at all
                    if node in _reachable(edges, other):
                        raise ir.UnsupportedIR(
                            f"{self.groups[node[0]]} and {self.groups[other[0]]} are met at different rates"
                        )
                else:
                    best[node, other] = max(weight, best.get((node, other), weight))
        for middle, first, last in product(nodes, nodes, nodes):
            if (first, middle) in best and (middle, last) in best:
                weight = best[first, middle] + best[middle, last]
                best[first, last] = max(weight, best.get((first, last), weight))
        for node in nodes:
            group = self.groups[node[0]]
            use = group.arrivals[node[1]].uses[0]
            weight = best.get((node, node))
            what = f"no arrival at {group} waits for itself or a later one"
            self._fact(what, use, weight is None or weight < 0, "roles wait for each other in a cycle")

    def _seen(self, use: Use, agent: int) -> dict[Node, int]:
        """Return how far the arrivals of each agent are known to have come, relative to `use`."""
        seen: dict[Node, int] = {}
        steps = {n: w for n, w, sure in self._steps(use, agent) if sure}
        if len(self.agents[agent].threads) == 1:
            steps |= self._own(use, agent)
        for node, weight in steps.items():
            if weight is not None:
                seen[node] = weight
        return self._closed(seen)

    def _closed(self, seen: dict[Node, int]) -> dict[Node, int]:
        edges = self._sure_edges
        for _ in edges:
            for node, weight in list(seen.items()):
                for other, more in edges[node].items():
                    if more is not None and weight + more > seen.get(other, weight + more - 1):
                        seen[other] = weight + more
        return seen

    @cached_property
    def _sure_edges(self) -> dict[Node, dict[Node, int | None]]:
        return self._edges(sure=True)

    # ------------------------------------------------------------------ phases stay apart
    def _no_overrun(self, number: int, group: Group) -> None:
        for agent, ring in group.arrivals.items():
            firsts = [visit[0] for visit in ring.visits]
            for use in [*firsts, *self._bytes_of(group, agent)]:
                seen = self._seen(use, agent)
                for other in group.arrivals:
                    alone = other == agent and len(self.agents[agent].threads) == 1
                    after = alone or seen.get((number, other), -group.period - 1) >= -group.period
                    if not after:  # or there is no second phase
                        after = self._holds(use.given, self._rank(use) < group.period)
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

    def _behind(self, agent: int) -> str:
        return f"threads {_range(self.agents[agent].threads)} may be a phase behind"

    def _unambiguous(self, number: int, group: Group) -> None:
        for agent, ring in group.waits.items():
            for use in ring.uses:
                what = f"a wait at {group} returns before its parity can come again"
                leader = self.agents[agent].leader
                shown = self._returns_in_time(number, group, use, agent)
                if not shown and leader is not None and leader in group.waits:
                    shown = self._returns_in_time(number, group, use, leader)
                if not shown and self._only_watches(agent) and self._others_in_time(number, group, use):
                    threads = _range(self.agents[agent].threads)
                    self.assumptions.append(
                        f"threads {threads} wait at {group} with their role and arrive nowhere: none of "
                        f"them falls a whole round of {group.period} stages behind, or it would wait for "
                        f"ever (not return early)"
                    )
                    shown = True
                self._fact(what, use, shown, self._behind(agent))

    def _returns_in_time(self, number: int, group: Group, use: Use, agent: int) -> bool:
        lag = group.lags[agent]
        for other, ring in group.arrivals.items():
            # Visit v + (1 - lag) S of its arrivals begins to end the phase after the one awaited.
            seen = self._closed({(number, other): 0})
            for (at, who), weight in seen.items():
                if who != agent:
                    continue
                arrivals = self.groups[at].arrivals[agent]
                waited = []
                for visit in arrivals.visits:
                    done = constant_of(_done(visit[-1], group.waits[agent]) - 1 - self._rank(visit[-1]))
                    sure = all(_same_guards(visit[-1], u, part=True) for u in group.waits[agent].uses)
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
        made = total([_inner_rounds(v[0], 0) for v in ring.visits])
        return self._holds(use.given, rank + (1 - lag) * group.period >= made)

    def _only_watches(self, agent: int) -> bool:
        return all(u.kind == "wait" for u in self.agents[agent].uses)

    def _others_in_time(self, number: int, group: Group, use: Use) -> bool:
        return any(
            self._returns_in_time(number, group, use, other)
            for other, agent in enumerate(self.agents)
            if other in group.waits and use in agent.uses and not self._only_watches(other)
        )

    # ------------------------------------------------------------------ what is awaited comes
    def _awaited(self, group: Group) -> None:
        for agent, waits in group.waits.items():
            for use in waits.uses:
                for other, ring in group.arrivals.items():
                    made = self._is_made(group, use, group.lags[agent], ring)
                    what = (
                        f"threads {_range(self.agents[other].threads)} make the arrivals awaited at {group}"
                    )
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
            made = total([_inner_rounds(v[0], 0) for v in ring.visits])
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
            first = z3.substitute(_visits_before(barrier, other), *pairs)
            second = _visits_before(barrier, use)
            if not self._holds(use.given, first <= second):
                return False
        return True

    def _barriers_between(self, use: Use, ring: Ring) -> bool:
        """Return whether an arrival of `ring` may be behind a barrier of the block that `use` is before."""
        for barrier in self._barriers:
            own = constant_of(_visits_before(barrier, use))
            others = [constant_of(_visits_before(barrier, u)) for u in ring.uses]
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
        for order, site in enumerate(self.context.device_sites):
            if not first < order < last or not isinstance(site.node, ir.Call):
                continue
            if is_block_barrier(site.node):
                loops, guards = free(site)
                threads, elected = self.phases.threads(site)
                zero = z3.IntVal(0)
                found.append(
                    Use("init", site, ir.Var(ir.HANDLE, ""), zero, threads, loops, guards, elected, order, ())
                )
            elif site.node.op in ("tvm_storage_sync", "named_barrier_arrive"):
                threads, _ = self.phases.threads(site)
                meeting = [a for a in self.agents if a.threads & threads]
                if len(meeting) > 1:
                    raise ir.UnsupportedIR("a named barrier between roles that use mbarriers")
        return found


# --------------------------------------------------------------------------- agents
def agents_of(uses: Sequence[Use]) -> list[Agent]:
    """Put threads together that run the same uses; lanes beside an elected one are apart."""
    warps = {t // WARP_THREADS for u in uses if u.elected for t in u.threads}
    sets: dict[tuple[tuple[int, ...], int | None], set[int]] = {}
    for thread in sorted(frozenset().union(*(u.threads for u in uses))):
        key = tuple(n for n, u in enumerate(uses) if thread in u.threads)
        warp = thread // WARP_THREADS
        sets.setdefault((key, warp if warp in warps else None), set()).add(thread)
    elected = {t: n for n, ts in enumerate(sets.values()) if len(ts) == 1 for t in ts}
    agents = []
    for number, ((key, warp), threads) in enumerate(sets.items()):
        leaders = [n for t, n in elected.items() if t // WARP_THREADS == warp and n != number]
        leader = leaders[0] if len(leaders) == 1 else None
        agents.append(Agent(frozenset(threads), tuple(uses[n] for n in key), leader))
    return agents


def _range(threads: Iterable[int]) -> str:
    found = sorted(threads)
    return str(found[0]) if len(found) == 1 else f"{found[0]}..{found[-1]}"


# --------------------------------------------------------------------------- visits
def _count(use: Use) -> z3.ArithRef:
    assert use.count is not None
    return use.count


def _done(use: Use, ring: Ring) -> z3.ArithRef:
    """Return how many visits of `ring` the thread has made when it comes to `use`."""
    counts = [before(use, visit[-1], visit[-1].order < use.order) for visit in ring.visits]
    return z3.simplify(total(counts))


def _inner_rounds(use: Use, first: int = 1) -> z3.ArithRef:
    """Return how often `use` runs within its loops from number `first` on."""
    times = z3.IntVal(1)
    for index in use.loops[first:]:
        times = times * z3.If(index.extent > 0, index.extent, z3.IntVal(0))
    return z3.simplify(times)


def _round_visits(ring: Ring) -> z3.ArithRef:
    """Return how many visits one round of the outermost loop makes."""
    return z3.simplify(total([_inner_rounds(v[0]) for v in ring.visits]))


def _visits_before(barrier: Use, use: Use) -> z3.ArithRef:
    return z3.simplify(before(use, barrier, barrier.order < use.order))


def _same_guards(use: Use, other: Use, part: bool = False) -> bool:
    """Return whether both run under the same guards; with `part`, `other` under some of them."""
    own, theirs = ({g.get_id() for g in u.guards} for u in (use, other))
    return theirs <= own if part else theirs == own


def is_block_barrier(call: ir.Call) -> bool:
    """Return whether `call` is a barrier of the whole block."""
    return (call.op == "tvm_storage_sync" and len(call.args) == 1) or call.op in (
        "sync_grid",
        "syncthreads_count",
        "syncthreads_and",
        "syncthreads_or",
    )


def _reachable(edges: dict[Node, dict[Node, int | None]], start: Node) -> set[Node]:
    found, stack = {start}, [start]
    while stack:
        for node in edges[stack.pop()]:
            if node not in found:
                found.add(node)
                stack.append(node)
    return found
