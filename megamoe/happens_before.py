"""What has to happen before what in a launch of the fused kernel, from the traces of its threads.

Waits are for the last value that a word takes, and the n-th wait for an mbarrier is for its n-th phase, so
the links between traces are the same in every interleaving: if they form no cycle, no schedule deadlocks,
and conflicting accesses that they order are ordered in every schedule.

A *team* is a role of one CTA: threads with the same barriers (`Role`). Its trace is cut where all of its
threads meet (*fences*: barriers of the team, of its warp or of the launch) and where they wait for a phase.
A fence orders everything of the team before with everything behind; the wait for a phase, which each thread
passes by itself, orders what the phase orders with what is behind, and nothing of the team's own.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megamoe.protocol import FLIP, Event
from verify.externs import signals
from verify.interp.device.flags import ACQ_REL, ACQUIRE, RELEASE, SEQ_CST

_RELEASES, _ACQUIRES = {RELEASE, ACQ_REL, SEQ_CST}, {ACQUIRE, ACQ_REL, SEQ_CST}
_ATOMICS = {"add", "store", "wait", "flip"}
_FENCES = {"sync", "warp", "grid"}
Node = tuple[Any, ...]
Team = tuple[int, int]  # (block, role)
Place = tuple[Team, int]  # (team, stretch): stretch k lies between the team's cuts k - 1 and k


@dataclass
class Problem:
    """Something that `analyse` found wrong."""

    what: str


@dataclass(frozen=True)
class Role:
    """Threads of a CTA that do the same.

    Attributes:
        threads: numbers of those that are traced.
        size: how many there are.
    """

    threads: tuple[int, ...]
    size: int


class _Graph:
    """Links between nodes: ("stretch", team, k), ("cut", team, k), and numbered ones of signals and phases.

    `after` are links of what is visible, `program` those that only say what a thread does later: both keep a
    schedule from going on.
    """

    def __init__(self) -> None:
        self.after: dict[Node, set[Node]] = defaultdict(set)
        self.program: dict[Node, set[Node]] = defaultdict(set)
        self.cuts: dict[Team, list[str]] = {}
        self._numbers = 0

    def team(self, team: Team, cuts: list[str]) -> None:
        """Enter a team with its cuts, each of them a fence or `phase`."""
        self.cuts[team] = cuts
        for k in range(len(cuts) + 1):
            stretch = "stretch", team, k
            self.after.setdefault(stretch, set())
            last, following = self.last_fence(team, k), self.next_fence(team, k)
            start = 0 if last is None else last + 1
            if last is not None:
                self.after["cut", team, last].add(stretch)
            if following is not None:
                self.after[stretch].add(("cut", team, following))
            for earlier in range(start, k):  # phases waited for since
                self.after["cut", team, earlier].add(stretch)
                if k < len(cuts):
                    self.after["cut", team, earlier].add(("cut", team, k))
            if last is not None and k < len(cuts):
                self.after["cut", team, last].add(("cut", team, k))

    def last_fence(self, team: Team, stretch: int) -> int | None:
        """Return the team's last fence before a stretch."""
        cuts = self.cuts[team]
        return next((k for k in range(stretch - 1, -1, -1) if cuts[k] in _FENCES), None)

    def next_fence(self, team: Team, stretch: int) -> int | None:
        """Return the team's first fence behind a stretch."""
        cuts = self.cuts[team]
        return next((k for k in range(stretch, len(cuts)) if cuts[k] in _FENCES), None)

    def number(self) -> int:
        """Return a number of its own for a node."""
        self._numbers += 1
        return self._numbers

    def signal(self, source: Place, target: Place) -> None:
        """A signal orders what is before its team's last fence with what is behind the waiter's next."""
        node = ("signal", self.number())
        last, following = self.last_fence(*source), self.next_fence(*target)
        if last is not None:
            self.after["cut", source[0], last].add(node)
        if following is not None:
            self.after[node].add(("cut", target[0], following))
        self._program(source, node)

    def phase(self, arrivals: Sequence[tuple[Place, bool]], waits: Sequence[Place]) -> Node:
        """A phase orders what each thread that arrives did before with what each that waits does behind.

        Args:
            arrivals: where a team arrives, and whether all of its threads that touch anything do; if not,
                only what they did before the team's last fence is ordered.
            waits: where teams wait.
        """
        node = ("phase", self.number())
        self.after.setdefault(node, set())
        for (team, k), is_whole in arrivals:
            arrival = ("arrival", self.number())
            self.after[arrival].add(node)
            last = self.last_fence(team, k)
            if is_whole:
                for stretch in range(0 if last is None else last + 1, k + 1):
                    self.after["stretch", team, stretch].add(arrival)
                for cut in range(0 if last is None else last, k):
                    self.after["cut", team, cut].add(arrival)
            elif last is not None:
                self.after["cut", team, last].add(arrival)
            self._program((team, k), arrival)
        for team, k in waits:
            self.after[node].add(("cut", team, k))
        return node

    def _program(self, source: Place, node: Node) -> None:
        """What a thread does comes after its cuts before and before its cuts behind."""
        team, k = source
        if k:
            self.program["cut", team, k - 1].add(node)
        if k < len(self.cuts[team]):
            self.program[node].add(("cut", team, k))

    def meeting(self, places: Sequence[Place]) -> None:
        """A barrier of the launch, which is a fence of each team too."""
        node = ("grid", self.number())
        for team, k in places:
            cut = "cut", team, k
            behind = self.after[cut]
            self.after[node] |= behind
            self.after[cut] = {node}

    def sorted(self) -> tuple[list[Node], set[Node]]:
        """Return nodes in an order that respects the links, and those on or behind a cycle."""
        links = {n: self.after.get(n, set()) | self.program.get(n, set()) for n in self.after | self.program}
        nodes = set(links) | {n for targets in links.values() for n in targets}
        before = dict.fromkeys(nodes, 0)
        for targets in links.values():
            for target in targets:
                before[target] += 1
        ready, order = [n for n in nodes if not before[n]], []
        while ready:
            order.append(node := ready.pop())
            for target in links.get(node, ()):
                before[target] -= 1
                if not before[target]:
                    ready.append(target)
        return order, nodes - set(order)


@dataclass
class _Found:
    """The events of a launch by what they are."""

    adds: dict[Any, list[tuple[Place, Event]]] = field(default_factory=lambda: defaultdict(list))
    stores: dict[Any, list[tuple[Place, Event]]] = field(default_factory=lambda: defaultdict(list))
    waits: list[tuple[Place, Event]] = field(default_factory=list)
    flips: dict[Any, list[tuple[Place, Event, int]]] = field(default_factory=lambda: defaultdict(list))
    grids: dict[int, list[Place]] = field(default_factory=lambda: defaultdict(list))
    accesses: dict[Any, set[tuple[Place, str]]] = field(default_factory=lambda: defaultdict(set))
    # By (block, mbarrier): of each team, where its threads arrive; where it waits.
    arrivals: dict[Any, dict[Team, dict[int, list[Place]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    )
    phases: dict[Any, dict[Team, list[Place]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    filled: set[Any] = field(default_factory=set)  # (block, mbarrier) whose phases copies end
    touching: dict[Team, set[int]] = field(default_factory=dict)  # threads of a team that read or write
    later: list[tuple[Any, Node, Node]] = field(
        default_factory=list
    )  # (word, wait, phase that ends behind it)
    problems: list[Problem] = field(default_factory=list)


def analyse(
    traces: Mapping[int, Sequence[Sequence[Sequence[Event]]]],
    ctas: int,
    roles: Sequence[Role],
    mbarriers: Mapping[tuple[str, int], int],
) -> list[Problem]:
    """Return what is wrong with the signals of a launch; nothing means that no schedule goes wrong.

    Args:
        traces: for each block, for each role, the traces of its threads.
        ctas: blocks of one rank; one rank's blocks are consecutive.
        roles: those of a block.
        mbarriers: for how many arrivals each mbarrier of a block is initialised.
    """
    found, graph = _Found(), _Graph()
    for block, of_roles in traces.items():
        for number, threads in enumerate(of_roles):
            team = block, number
            cuts = [_collect(found, team, n, events) for n, events in enumerate(threads)]
            if any(c != cuts[0] for c in cuts):
                found.problems.append(Problem(f"block {block}: threads of a role meet different barriers"))
            graph.team(team, [kind for kind, _, _ in max(cuts, key=len)])
            found.touching[team] = {
                n for n, events in enumerate(threads) if any(e.kind in ("read", "write") for e in events)
            }
    for places in found.grids.values():
        if len(places) != sum(map(len, traces.values())):
            found.problems.append(Problem("not every block meets the barrier of the launch"))
        graph.meeting(places)
    if found.problems:
        return found.problems
    for key in found.arrivals.keys() | found.phases.keys():
        _link_phases(found, graph, key, roles, mbarriers)
    _link_waits(found, graph, ctas)
    _link_flips(found, graph, traces, ctas)
    return [*found.problems, *_order(graph, found)]


def _collect(
    found: _Found, team: Team, number: int, events: Sequence[Event]
) -> list[tuple[str, tuple[str, int], int]]:
    """Enter a thread's events; return its cuts."""
    cuts: list[tuple[str, tuple[str, int], int]] = []
    grids, has_waited = 0, False
    turns: dict[Any, int] = defaultdict(int)
    for event in events:
        place = (team, len(cuts))
        if event.kind in _ATOMICS:
            found.accesses[event.word].add((place, "atomic"))
        match event.kind:
            case "sync" | "warp" | "grid" | "phase":
                if event.kind == "grid" and number == 0:
                    found.grids[grids].append(place)
                if event.kind == "phase" and number == 0:
                    found.phases[team[0], event.word][team].append(place)
                    _check_parity(found, team, event)
                grids += event.kind == "grid"
                has_waited = has_waited and event.kind == "phase"
                cuts.append((event.kind, event.word, event.value))
            case "arrive":
                if event.value:
                    found.filled.add((team[0], event.word))
                found.arrivals[team[0], event.word][team][number].append(place)
            case "add" | "store":
                (found.adds if event.kind == "add" else found.stores)[event.word].append((place, event))
                if has_waited:
                    what = "a thread signals between its wait and the next barrier of the block"
                    found.problems.append(Problem(f"{event.word}: {what}"))
            case "wait":
                found.waits.append((place, event))
                has_waited = True
            case "flip":
                found.flips[event.word].append((place, event, turns[event.word]))
                turns[event.word] += 1
                has_waited = True
            case "read" | "write":
                found.accesses[event.word].add((place, event.kind))
    return cuts


def _check_parity(found: _Found, team: Team, event: Event) -> None:
    turn = len(found.phases[team[0], event.word][team]) - 1
    if event.value != turn % 2:
        found.problems.append(Problem(f"{event.word}: waits for parity {event.value} in turn {turn}"))


def _link_phases(
    found: _Found,
    graph: _Graph,
    key: tuple[int, tuple[str, int]],
    roles: Sequence[Role],
    mbarriers: Mapping[tuple[str, int], int],
) -> None:
    """Link the n-th phase of an mbarrier: who arrives in it, who waits for it."""
    block, word = key
    waits, count = found.phases[key], mbarriers.get(word, 0)
    # Places of a team, threads that arrive at each, and whether they are all that touch anything.
    shares: list[tuple[list[Place], int, bool]] = []
    for team, by_thread in found.arrivals[key].items():
        role, places = roles[team[1]], next(iter(by_thread.values()))
        everyone = len(by_thread) == len(role.threads) and all(p == places for p in by_thread.values())
        if len(by_thread) > 1 and not everyone:
            found.problems.append(Problem(f"{word} of block {block}: threads of a role arrive differently"))
        is_whole = found.touching[team] <= by_thread.keys()
        shares.append((places, role.size if everyone else 1, is_whole))
    total = sum(len(places) * size for places, size, _ in shares)
    turns = total // count if count else 0
    if not turns or total != turns * count or any(len(places) % turns for places, *_ in shares):
        found.problems.append(Problem(f"{word} of block {block}: {total} arrivals for phases of {count}"))
        return
    if any(len(places) > turns for places in waits.values()):
        found.problems.append(Problem(f"{word} of block {block}: a wait for more than {turns} phases"))
    if key in found.filled and all(len(places) < turns for places in waits.values()):
        found.problems.append(Problem(f"{word} of block {block}: nobody waits for what a copy brings"))
    previous: list[Node] = []
    for n in range(turns):
        arrivals = [
            (place, is_whole)
            for own, _, is_whole in shares
            for place in own[n * len(own) // turns : (n + 1) * len(own) // turns]
        ]
        waiting = [places[n] for places in waits.values() if n < len(places)]
        node = graph.phase(arrivals, waiting)
        # A wait for one parity must not see the phase after: this ends only behind the wait.
        found.later += [(word, cut, node) for cut in previous]
        previous = [("cut", *place) for place in waiting]


def _link(
    found: _Found, graph: _Graph, source: tuple[Place, Event], target: tuple[Place, Event], ctas: int
) -> None:
    if source[1].order not in _RELEASES:
        found.problems.append(Problem(f"{source[1].word}: a signal that does not release"))
    elif target[1].order not in _ACQUIRES:
        found.problems.append(Problem(f"{target[1].word}: a wait that does not acquire"))
    elif source[0][0][0] // ctas != target[0][0][0] // ctas and (
        source[1].scope != signals.SYSTEM or target[1].scope != signals.SYSTEM
    ):
        found.problems.append(Problem(f"{source[1].word}: a signal between ranks below system scope"))
    else:
        graph.signal(source[0], target[0])


def _link_waits(found: _Found, graph: _Graph, ctas: int) -> None:
    for place, wait in found.waits:
        word = wait.word
        if found.stores[word]:
            sources = [s for s in found.stores[word] if s[1].value == wait.value]
            if len(sources) != 1:
                what = f"waits for {wait.value}, which is stored {len(sources)} times"
                found.problems.append(Problem(f"{word}: {what}"))
        else:
            sources = found.adds[word]
            total = sum(event.value for _, event in sources)
            if total != wait.value:
                found.problems.append(Problem(f"{word}: waits for {wait.value}, and comes to {total}"))
        for source in sources:
            _link(found, graph, source, (place, wait), ctas)


def _link_flips(found: _Found, graph: _Graph, blocks: Mapping[int, Any], ctas: int) -> None:
    for word, passing in found.flips.items():
        by_block: dict[int, list[tuple[Place, Event]]] = defaultdict(list)
        for place, event in found.adds[word]:
            by_block[place[0][0]].append((place, event))
        rank = [b for b in blocks if b // ctas == word[1]]
        for turn in sorted({t for _, _, t in passing}):
            arrivals = [by_block[b][turn] for b in rank if turn < len(by_block[b])]
            values = sorted(event.value for _, event in arrivals)
            if values != sorted([FLIP - (ctas - 1), *[1] * (ctas - 1)]):
                found.problems.append(Problem(f"{word}: {values} do not turn bit 31 over"))
            for place, event, its_turn in passing:
                for source in arrivals if its_turn == turn else ():
                    _link(found, graph, source, (place, event), ctas)


def _order(graph: _Graph, found: _Found) -> list[Problem]:
    order, stuck = graph.sorted()
    if stuck:
        blocks = sorted({n[1][0] for n in stuck if n[0] == "cut"})
        return [Problem(f"deadlock: blocks {blocks} wait for each other")]
    bit = {node: 1 << i for i, node in enumerate(order)}
    behind = dict.fromkeys(order, 0)
    for node in reversed(order):
        for target in graph.after.get(node, ()):
            behind[node] |= behind[target] | bit[target]

    def is_ordered(first: Place, second: Place) -> bool:
        return bool(behind.get(("stretch", *first), 0) & bit["stretch", *second])

    problems = [
        Problem(f"{word}: a phase may end before the one before it has been waited for")
        for word, wait, phase in found.later
        if not behind[wait] & bit[phase]
    ]
    for word, touched in found.accesses.items():
        listed = sorted(touched)
        for i, (first, kind) in enumerate(listed):
            for second, other in listed[i + 1 :]:
                pair = {kind, other}
                if first[0] == second[0] or pair == {"atomic"} or not pair & {"write", "atomic"}:
                    continue
                if not is_ordered(first, second) and not is_ordered(second, first):
                    what = f"{kind} in stretch {first} and {other} in {second} are not ordered"
                    problems.append(Problem(f"{word}: {what}"))
    return problems
