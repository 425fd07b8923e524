"""Runs of the mbarriers of one block, thread by thread, in a few schedules: to find what goes wrong.

Nothing is proved here. Where the protocol could not be proved (`protocol.py`), a run that hangs, or
two runs in which a wait returns after different phases or an arrival lands in different ones, is a
concrete fault: shape, block, threads, rounds, slot and phase are known.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, permutations
from typing import TYPE_CHECKING

import z3

from verify import ir, lemma
from verify.encode import Index, constants_of, elected_lane
from verify.intarith import constant_of
from verify.ops import PURE, WARP_THREADS
from verify.storage import BYTE_BITS
from verify.sync.phases import WAITS, Phases, Use
from verify.sync.protocol import ADVICE, is_block_barrier
from verify.sync.steps import Agent, agents_of, thread_range
from verify.walk import Site

if TYPE_CHECKING:
    from verify.properties import Context

MAX_EVENTS = 20_000  # of one run
MAX_SCHEDULES = 12
ROUNDS_WANTED = 3  # of the outermost loop: enough to meet a phase that is not carried over
_ATTEMPTS = 4  # shapes tried
# Beside waits and values, what ties a thread to no other.
_LOOSE = frozenset({"fence_proxy_async", "set_max_nreg", "tvm_access_ptr", "address_of"})


@dataclass(frozen=True, eq=False)
class Event:
    """One use of an mbarrier, or a barrier of the block, by one thread.

    Attributes:
        use: None for a barrier of the block.
        rounds: counters of the loops around it, by their constants' names.
        number: of bytes, of the parity waited for.
    """

    use: Use | None
    site: Site
    rounds: Mapping[str, int]
    slot: int = 0
    number: int = 0


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a run.

    Attributes:
        values: shape, block and rounds by constant; shown: facts for the report.
    """

    what: str
    site: Site
    values: dict[str, int]
    shown: dict[str, int | str]


@dataclass
class _Cell:
    count: int
    pending: int = 0
    phase: int = 0
    bytes: int = 0

    def settle(self) -> None:
        if self.pending < 0:
            raise _TooManyError
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


@dataclass
class _Runner:
    """Threads that run together: `weight` of them, of agent `agent`; `watches`: they arrive nowhere."""

    agent: int
    threads: str
    weight: int
    events: list[Event]
    watches: bool
    at: int = 0
    landed: list[tuple[Event, int]] = field(default_factory=list)


class _TooManyError(Exception):
    """A thread arrives in a phase that has all its arrivals."""


class NotConcreteError(Exception):
    """A value is not known without the data of the call."""


def find_fault(context: "Context", phases: Phases) -> Fault | None:
    """Return a fault of some run, or None where none was found."""
    uses = [u for u in phases.uses if u.kind != "init"]
    for values in islice(_scenarios(context, uses), _ATTEMPTS):
        try:
            fault = _Rehearsal(context, phases, values).fault()
        except (NotConcreteError, ir.UnsupportedIR):
            continue
        if fault is not None:
            return fault
    return None


def _scenarios(context: "Context", uses: Sequence[Use]) -> Iterator[dict[str, int]]:
    """Yield shapes and blocks in which outer loops go round a few times."""
    seen: list[dict[str, int]] = []
    names = [p.name for p in context.extracted.device.params if p.dtype.is_int]
    for use in sorted(uses, key=lambda u: -len(u.loops)):
        given = [elected_lane(h.term, use.site.scope) for h in use.site.scope.hypotheses]
        loops = [i for i in use.loops if constant_of(i.extent) is None]
        deep = [i.const >= i.start + (ROUNDS_WANTED - 1) for i in loops]
        for wanted in (deep, []):
            solver = lemma.look([*given, *wanted])
            if solver.check() != z3.sat:
                continue
            small = _smallest(solver, [z3.Int(n) for n in names])
            launch = {i.const.decl().name(): i.const for i in use.site.scope.launch}
            values = {n: small.eval(z3.Int(n), model_completion=True).as_long() for n in names}
            for name, const in launch.items():
                values[name] = small.eval(const, model_completion=True).as_long()
            key = {n: v for n, v in values.items() if not n.startswith("t")}
            if key not in seen:
                seen.append(key)
                yield values
            break


def _smallest(solver: z3.Solver, dims: Sequence[z3.ArithRef]) -> z3.ModelRef:
    model = solver.model()
    for dim in dims:
        low, best = 0, model.eval(dim, model_completion=True).as_long()
        while low < best:
            middle = (low + best) // 2
            solver.push()
            solver.add(dim <= middle)
            if solver.check() == z3.sat:
                model = solver.model()
                best = model.eval(dim, model_completion=True).as_long()
            else:
                low = middle + 1
            solver.pop()
        solver.add(dim == best)
    if solver.check() == z3.sat:
        model = solver.model()
    return model


class _Rehearsal:
    def __init__(self, context: "Context", phases: Phases, values: dict[str, int]) -> None:
        self.context = context
        self.phases = phases
        self.values = values
        self.orders = {id(s.statement): o for o, s in reversed(list(enumerate(context.device_sites)))}
        self.cells: dict[tuple[ir.Var, int], int] = {}
        for use in phases.uses:
            if use.kind == "init":
                slot, count = constant_of(use.slot), constant_of(use.count) if use.count is not None else None
                if slot is None or count is None:
                    raise NotConcreteError
                self.cells[use.barrier, slot] = count

    # ------------------------------------------------------------------ events
    def programs(self) -> tuple[list[Agent], list[list[Event]]]:
        """Return the agents and what each does in order.

        Those that arrive nowhere are left out if something else may keep them in step with others.
        """
        uses = [u for u in self.phases.uses if u.kind != "init"]
        agents = [a for a in agents_of(uses) if not a.watches or self._is_loose(a)]
        first = min(u.order for u in uses)
        barriers = [
            (o, s)
            for o, s in enumerate(self.context.device_sites)
            if o > first and isinstance(s.node, ir.Call) and is_block_barrier(s.node)
        ]
        programs = []
        for agent in agents:
            keyed = [e for u in agent.uses for e in self._instances(u.site, u.order, u)]
            keyed += [e for order, site in barriers for e in self._instances(site, order, None)]
            if len(keyed) > MAX_EVENTS:
                raise NotConcreteError
            programs.append([event for _, event in sorted(keyed, key=lambda k: k[0])])
        return agents, programs

    def _is_loose(self, agent: Agent) -> bool:
        """Return whether `agent` is of whole warps that only its waits and the block's barriers hold."""
        warps = {t // WARP_THREADS for t in agent.threads}
        if len(agent.threads) != len(warps) * WARP_THREADS:
            return False
        start = min(u.order for u in self.phases.uses if u.kind != "init")
        return not any(
            _may_tie(site) and self.phases.threads(site)[0] & agent.threads
            for site in self.context.device_sites[start:]
        )

    def _instances(self, site: Site, order: int, use: Use | None) -> Iterator[tuple[list[int], Event]]:
        loops = [i for i in site.scope.loops if i.tag == "loop"]
        statements = [s for s in site.path if isinstance(s, (ir.For, ir.While))]
        if len(loops) != len(statements) or any(isinstance(s, ir.While) for s in statements):
            raise NotConcreteError
        places = [self.orders[id(s)] for s in statements]
        thread = next(i.const for i in site.scope.launch if i.tag == "threadIdx.x")
        guards = []
        for hypothesis in site.scope.hypotheses:
            term = elected_lane(hypothesis.term, site.scope)
            if hypothesis.kind == "guard" and thread.decl().name() not in constants_of(term):
                guards.append(term)

        def rounds(depth: int, known: dict[str, int]) -> Iterator[dict[str, int]]:
            if depth == len(loops):
                yield known
                return
            index: Index = loops[depth]
            start, extent = self._value(index.start, known), self._value(index.extent, known)
            for number in range(start, start + extent):
                yield from rounds(depth + 1, {**known, index.const.decl().name(): number})

        for known in rounds(0, {}):
            if not all(self._value(g, known) for g in guards):
                continue
            key = [n for p, i in zip(places, loops, strict=True) for n in (p, known[i.const.decl().name()])]
            yield [*key, order], self._event(site, use, known)

    def _event(self, site: Site, use: Use | None, known: dict[str, int]) -> Event:
        if use is None:
            return Event(None, site, known)
        number = 0
        if use.kind == "wait" and use.parity is not None:
            number = self._value(use.parity, known)
        elif use.kind == "copy":
            number = self._loaded(use)
        elif use.bytes is not None:
            number = self._value(use.bytes, known)
        slot = self._value(use.slot, known)
        if (use.barrier, slot) not in self.cells:
            raise NotConcreteError
        return Event(use, site, known, slot, number)

    def _loaded(self, use: Use) -> int:
        for copy in self.context.memory.tma:
            if copy.site.node is use.site.node:
                count = constant_of(copy.shared.count)
                if count is not None:
                    return count * copy.shared.unit_bits // BYTE_BITS
        raise NotConcreteError

    def _value(self, term: z3.ExprRef, known: Mapping[str, int]) -> int:
        pairs = [(z3.Int(n), z3.IntVal(v)) for n, v in {**self.values, **known}.items()]
        result = z3.simplify(z3.substitute(term, *pairs))
        if z3.is_int_value(result):
            return result.as_long()
        if z3.is_true(result) or z3.is_false(result):
            return int(z3.is_true(result))
        raise NotConcreteError

    # ------------------------------------------------------------------ runs
    def fault(self) -> Fault | None:
        """Return what goes wrong in one run, or between two."""
        agents, programs = self.programs()
        first: dict[tuple[int, int], tuple[Event, int, str]] = {}
        runners = _runners(agents, programs)
        own = [n for n, r in enumerate(runners) if not r.watches]
        watchers = [n for n, r in enumerate(runners) if r.watches]  # last, as nobody waits for them
        for order in islice(permutations(own), MAX_SCHEDULES):
            for late in (False, True):
                runners = _runners(agents, programs)
                hung = self._run([runners[n] for n in (*order, *watchers)], late)
                if hung is not None:
                    return hung
                for runner in runners:
                    for number, (event, phase) in enumerate(runner.landed):
                        known = first.setdefault((runner.agent, number), (event, phase, runner.threads))
                        if known[1] != phase:
                            return self._differs(event, known[1], phase, runner.threads)
        return None

    def _run(self, runners: list[_Runner], late: bool) -> Fault | None:
        """Run the first of `runners` that can; with `late` bytes come when nobody else can go on."""
        cells = {key: _Cell(count, count) for key, count in self.cells.items()}
        flying: list[tuple[tuple[ir.Var, int], int]] = []
        while True:
            moved = False
            for runner in runners:
                try:
                    moved = self._advance(runner, runners, cells, flying)
                except _TooManyError:
                    return self._too_many(runner, cells)
                if moved:
                    break
            if flying and (not late or not moved):
                for key, size in flying:
                    cells[key].bytes -= size
                    cells[key].settle()
                flying.clear()
                moved = True
            if not moved:
                stuck = [r for r in runners if r.at < len(r.events)]
                return self._hangs(stuck, cells) if stuck else None

    def _advance(
        self,
        runner: _Runner,
        runners: list[_Runner],
        cells: dict[tuple[ir.Var, int], _Cell],
        flying: list[tuple[tuple[ir.Var, int], int]],
    ) -> bool:
        """Run one event of `runner` if it can."""
        if runner.at == len(runner.events):
            return False
        event = runner.events[runner.at]
        if event.use is None:
            return self._meet(event, runners)
        key = (event.use.barrier, event.slot)
        cell = cells[key]
        match event.use.kind:
            case "wait":
                if (cell.phase - 1) % 2 != event.number % 2:
                    return False
                runner.landed.append((event, cell.phase - 1))
            case "copy":
                flying.append((key, event.number))
                runner.landed.append((event, cell.phase))
            case "expect":
                cell.bytes += event.number
                runner.landed.append((event, cell.phase))
            case _:
                cell.bytes += event.number
                last = cell.phase
                for _ in range(runner.weight):
                    last = cell.phase
                    cell.pending -= 1
                    cell.settle()
                runner.landed.append((event, last))
        runner.at += 1
        return True

    def _meet(self, event: Event, runners: list[_Runner]) -> bool:
        """Pass a barrier of the block once everybody stands at it."""
        waiting = [r for r in runners if r.at < len(r.events) and r.events[r.at].use is None]
        same = [r for r in waiting if r.events[r.at].site is event.site]
        if len(same) < len(runners):
            return False
        for runner in same:
            runner.at += 1
        return True

    # ------------------------------------------------------------------ reports
    def _hangs(self, stuck: list[_Runner], cells: dict[tuple[ir.Var, int], _Cell]) -> Fault:
        waits = [r for r in stuck if r.events[r.at].use is not None]
        runner = waits[0] if waits else stuck[0]
        event = runner.events[runner.at]
        shown: dict[str, int | str] = {"threads": runner.threads}
        name = "a barrier of the block"
        if event.use is not None:
            cell = cells[event.use.barrier, event.slot]
            name = f"{event.use.barrier.name}[{event.slot}]"
            shown |= {"slot": event.slot, "parity": event.number, "phase": cell.phase}
            shown |= {"arrivals_missing": cell.pending, "bytes_missing": cell.bytes}
        others = [r for r in stuck if r is not runner]
        for other in others[:1]:
            stands = other.events[other.at]
            at = "a barrier of the block"
            if stands.use is not None:
                at = f"{stands.use.barrier.name}[{stands.slot}] for parity {stands.number}"
            shown["others"] = f"threads {other.threads} wait at {at}"
        what = f"deadlock: a wait at {name} never returns"
        if runner.watches:
            shown["late"] = int(runner.threads.partition("..")[0])
            what += (
                f": threads {runner.threads} arrive nowhere, so nothing keeps them within a round of "
                f"their role; {ADVICE}"
            )
        return Fault(what, event.site, {**self.values, **event.rounds}, shown)

    def _too_many(self, runner: _Runner, cells: dict[tuple[ir.Var, int], _Cell]) -> Fault:
        event = runner.events[runner.at]
        assert event.use is not None, "events at an mbarrier are of a use"
        cell = cells[event.use.barrier, event.slot]
        what = f"{event.use.barrier.name}[{event.slot}] gets more arrivals in a phase than it counts"
        shown: dict[str, int | str] = {"threads": runner.threads, "slot": event.slot}
        shown |= {"phase": cell.phase, "count": cell.count, "bytes_missing": cell.bytes}
        return Fault(what, event.site, {**self.values, **event.rounds}, shown)

    def _differs(self, event: Event, first: int, second: int, threads: str) -> Fault:
        assert event.use is not None, "events at an mbarrier are of a use"
        name = f"{event.use.barrier.name}[{event.slot}]"
        deed = (
            "a wait at {} returns after" if event.use.kind == "wait" else "an arrival or bytes at {} land in"
        )
        what = f"{deed.format(name)} one phase or another: it depends on the schedule"
        shown: dict[str, int | str] = {"threads": threads, "slot": event.slot}
        shown |= {"phase": first, "phase'": second}
        return Fault(what, event.site, {**self.values, **event.rounds}, shown)


def _may_tie(site: Site) -> bool:
    """Return whether what runs there may keep a thread in step, beside waits and block barriers."""
    if any(isinstance(s, ir.While) for s in site.path):
        return True  # until another thread writes
    call = site.node
    if not isinstance(call, ir.Call) or is_block_barrier(call):
        return False
    return call.op not in WAITS | _LOOSE | PURE


def _runners(agents: Sequence[Agent], programs: Sequence[list[Event]]) -> list[_Runner]:
    """Return a runner for one thread of each agent and one for the others of it."""
    runners = []
    for number, (agent, events) in enumerate(zip(agents, programs, strict=True)):
        low, high, watches = min(agent.threads), max(agent.threads), agent.watches
        if watches:
            runners.append(_Runner(number, thread_range(agent.threads), len(agent.threads), events, watches))
            continue
        runners.append(_Runner(number, str(low), 1, events, watches))
        if len(agent.threads) > 1:
            runners.append(_Runner(number, f"{low + 1}..{high}", len(agent.threads) - 1, events, watches))
    return runners
