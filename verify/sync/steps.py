"""What agents have seen of each other's visits to mbarriers: steps between visits, as numbers.

A step leads from an agent at one of its visits to arrivals that its waits have seen, and says how many
visits later or earlier those are. Steps hold for all rounds; chains of them are paths in a graph.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import z3

from verify import ir, lemma
from verify.intarith import constant_of, total
from verify.ops import WARP_THREADS
from verify.sync.phases import Phases, Ring, Use, before, is_of_warps

Node = tuple[int, int]  # group, agent: the visits of one agent's arrivals to one group


@dataclass(frozen=True)
class Agent:
    """Threads that run the same uses; `mates` are in the warp of an elected lane of agent `leader`."""

    threads: frozenset[int]
    uses: tuple[Use, ...]
    leader: int | None = None

    @property
    def warps(self) -> frozenset[int]:
        """Return the warps that the threads are in."""
        return frozenset(t // WARP_THREADS for t in self.threads)

    @property
    def watches(self) -> bool:
        """Return whether the threads wait and arrive nowhere."""
        return all(u.kind == "wait" for u in self.uses)


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


class Steps:
    """The steps between the visits that agents make to groups."""

    def __init__(self, phases: Phases, agents: Sequence[Agent], groups: Sequence[Group]) -> None:
        """Keep what they are between."""
        self.phases = phases
        self.agents = agents
        self.groups = groups

    def of(self, use: Use, agent: int) -> list[tuple[Node, int | None, bool]]:
        """Return what `agent` has seen when it comes to `use`.

        Each is an agent's arrivals, up to how many visits later than that of `use` (None: some
        visits that the number does not tell), and whether it is sure that it has seen them.
        """
        steps: list[tuple[Node, int | None, bool]] = []
        for number, group in enumerate(self.groups):
            ring = group.waits.get(agent)
            if ring is None:
                continue
            done = visits_made(use, ring)
            if constant_of(done) == 0:
                continue
            target = z3.simplify(done - 1 - group.lags[agent] * group.period)
            weight = constant_of(target - self.rank(use))
            if weight is None and self._in_earlier_wave(use, group, ring, target):
                continue
            sure = all(same_guards(use, u, part=True) for u in ring.uses)
            steps += [((number, other), weight, sure) for other in group.arrivals]
        return steps

    def rank(self, use: Use) -> z3.ArithRef:
        """Return the number of the visit that `use` makes, or whose bytes it is about."""
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
        start = (wave.const - wave.start) * round_visits(ring)
        return bool(group.arrivals) and lemma.holds(self.phases.prover, use.given, target < start)

    @cached_property
    def _waves_agree(self) -> bool:
        """Return whether all agents make as many visits of a group in a round of one outermost loop."""
        for group in self.groups:
            rings = [*group.waits.values(), *group.arrivals.values()]
            uses = [u for r in rings for u in r.uses]
            first = uses[0].loops[:1]
            if any(u.loops[:1] != first for u in uses):
                return False
            if len({round_visits(r).get_id() for r in rings}) > 1:
                return False
        return True

    def edges(self, sure: bool, with_own: bool = True) -> dict[Node, dict[Node, int | None]]:
        """Return the steps between arrivals: least weights of the sure ones, or greatest of all.

        Of the sure ones are those to a thread's own arrivals, unless not `with_own`.
        """
        edges: dict[Node, dict[Node, int | None]] = {}
        for number, group in enumerate(self.groups):
            for agent, ring in group.arrivals.items():
                known = edges.setdefault((number, agent), {})
                per_use = [dict[Node, int | None]() for _ in ring.visits]
                for found, visit in zip(per_use, ring.visits, strict=True):
                    for node, weight, certain in self.of(visit[-1], agent):
                        if certain or not sure:
                            found[node] = weight
                    if sure:
                        found.update(self.own(visit[-1], agent) if with_own else {})
                        continue
                    for mate in self._mates(agent):
                        for node, weight, _ in self.of(visit[-1], mate):
                            known_weight = found.get(node, weight)
                            unknown = weight is None or known_weight is None
                            found[node] = None if unknown else max(weight, known_weight)
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

    def _mates(self, agent: int) -> list[int]:
        """Return the other agents in the warps of one: a shuffle or election may let it wait with them."""
        warps = self.agents[agent].warps
        return [n for n, other in enumerate(self.agents) if n != agent and warps & other.warps]

    def own(self, use: Use, agent: int) -> dict[Node, int | None]:
        """Return the arrivals that the thread itself has made before it comes to `use`."""
        own: dict[Node, int | None] = {}
        for number, group in enumerate(self.groups):
            ring = group.arrivals.get(agent)
            if ring is None or not all(same_guards(use, u, part=True) for u in ring.uses):
                continue
            weight = constant_of(visits_made(use, ring) - 1 - self.rank(use))
            if weight is not None:
                own[number, agent] = weight
        return own

    def seen(self, use: Use, agent: int) -> dict[Node, int]:
        """Return how far the arrivals of each agent are known to have come, relative to `use`."""
        seen: dict[Node, int] = {}
        steps = {n: w for n, w, sure in self.of(use, agent) if sure}
        if len(self.agents[agent].threads) == 1:
            steps |= self.own(use, agent)
        for node, weight in steps.items():
            if weight is not None:
                seen[node] = weight
        return self.closed(seen)

    def ended(self, use: Use, agent: int) -> dict[Node, int]:
        """Return as `seen` those arrivals whose phases have ended: a wait that has returned was for them."""
        found = {n: w for n, w, sure in self.of(use, agent) if sure and w is not None}
        for node, weight in self.seen(use, agent).items():
            for other, more in self._waited_edges[node].items():
                if more is not None:
                    found[other] = max(weight + more, found.get(other, weight + more))
        return found

    def closed(self, seen: dict[Node, int]) -> dict[Node, int]:
        """Return `seen` with what those arrivals had surely seen themselves."""
        edges = self._sure_edges
        for _ in edges:
            for node, weight in list(seen.items()):
                for other, more in edges[node].items():
                    if more is not None and weight + more > seen.get(other, weight + more - 1):
                        seen[other] = weight + more
        return seen

    @cached_property
    def _sure_edges(self) -> dict[Node, dict[Node, int | None]]:
        return self.edges(sure=True)

    @cached_property
    def _waited_edges(self) -> dict[Node, dict[Node, int | None]]:
        return self.edges(sure=True, with_own=False)

    def longest(self) -> dict[tuple[Node, Node], int]:
        """Return the greatest weight of the paths between arrivals.

        Raises:
            UnsupportedIR: a step of unknown length is in a cycle.
        """
        edges = self.edges(sure=False)
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
        for middle, first, last in product(edges, edges, edges):
            if (first, middle) in best and (middle, last) in best:
                weight = best[first, middle] + best[middle, last]
                best[first, last] = max(weight, best.get((first, last), weight))
        return best


# --------------------------------------------------------------------------- agents
def agents_of(uses: Sequence[Use]) -> list[Agent]:
    """Put threads together that run the same uses; lanes beside an elected one are apart.

    Raises:
        UnsupportedIR: a lane goes by its number in a warp that elects one, for which lane 0 only stands.
    """
    warps = {t // WARP_THREADS for u in uses if u.elected for t in u.threads}
    for use in (u for u in uses if not u.elected):
        if not is_of_warps(frozenset(t for t in use.threads if t // WARP_THREADS in warps)):
            raise ir.UnsupportedIR(f"lanes by number at {use.site.span}, in a warp that elects one")
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


def thread_range(threads: Iterable[int]) -> str:
    """Return `first..last`, for people."""
    found = sorted(threads)
    return str(found[0]) if len(found) == 1 else f"{found[0]}..{found[-1]}"


# --------------------------------------------------------------------------- visits
def visits_made(use: Use, ring: Ring) -> z3.ArithRef:
    """Return how many visits of `ring` the thread has made when it comes to `use`."""
    counts = [before(use, visit[-1], visit[-1].order < use.order) for visit in ring.visits]
    return z3.simplify(total(counts))


def inner_rounds(use: Use, first: int = 1) -> z3.ArithRef:
    """Return how often `use` runs within its loops from number `first` on."""
    times = z3.IntVal(1)
    for index in use.loops[first:]:
        times = times * z3.If(index.extent > 0, index.extent, z3.IntVal(0))
    return z3.simplify(times)


def round_visits(ring: Ring) -> z3.ArithRef:
    """Return how many visits one round of the outermost loop makes."""
    return z3.simplify(total([inner_rounds(v[0]) for v in ring.visits]))


def visits_before(barrier: Use, use: Use) -> z3.ArithRef:
    """Return how often the thread has met `barrier` when it comes to `use`."""
    return z3.simplify(before(use, barrier, barrier.order < use.order))


def same_guards(use: Use, other: Use, part: bool = False) -> bool:
    """Return whether both run under the same guards; with `part`, `other` under some of them."""
    own, theirs = ({g.get_id() for g in u.guards} for u in (use, other))
    return theirs <= own if part else theirs == own


def _reachable(edges: dict[Node, dict[Node, int | None]], start: Node) -> set[Node]:
    found, stack = {start}, [start]
    while stack:
        for node in edges[stack.pop()]:
            if node not in found:
                found.add(node)
                stack.append(node)
    return found
