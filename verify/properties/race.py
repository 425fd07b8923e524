"""No two conflicting accesses without an order between them.

Two accesses conflict if they may touch the same byte, at least one writes and not both are atomic.
Two executions of a pair of accesses, by any two threads of a block or by an agent that one of them
starts, in any rounds of the loops around them, either touch different bytes or one happens before
the other. Order that the text shows is found first (`verify/sync/structure.py`); the rest becomes
obligations (`verify/sync/happens.py`). Accesses to global memory are compared over blocks too,
where nothing orders them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import z3

from verify import ir
from verify.encode import Hypothesis, depends_on_data, range_of_data
from verify.intarith import conjunction, constant_of
from verify.inverse import Axis, NotDigitsError, candidate
from verify.overlap import carried_out, meet, meet_by_digits
from verify.properties import Claims, Context, Issue
from verify.ranges import Range
from verify.solve import Obligation, Prover
from verify.sync.bytes import apart
from verify.sync.collectives import elections
from verify.sync.events import ASYNC_PROXY, Agent, Event, Events, read_events
from verify.sync.happens import HappensBefore
from verify.sync.order import Instance, in_step
from verify.sync.structure import Relation, Structure, relations
from verify.verdict import Verdict

NAME = "race"
_GIVEN = ("contract", "shape")
SEARCH_RLIMIT = 3_000_000  # z3 resource units to see whether a formulation is worth an obligation
WARP_THREADS = 32
AT_ONCE = 16  # pairs that are looked at together, before one by one
MAX_FAILED = 3  # pairs found unordered after which the rest is left undecided
ANY_ROUNDS = Relation(-1)  # executions in different blocks: their rounds do not compare


class Race:
    """Property `race`."""

    name = NAME
    depends = ("overflow", "bounds", "barrier", "mbarrier")

    def claims(self, context: Context) -> Claims:
        """Return one obligation for each pair of accesses that the text does not order."""
        claims = Claims()
        events = read_events(context)
        claims.unsupported += [Issue(site.span, what) for site, what in context.memory.unsupported]
        claims.unsupported += [Issue(site.span, what) for site, what in events.unsupported]
        pairs = _Pairs(context, events)
        pairs.decide(conflicts(events), claims)
        claims.rests |= pairs.rests
        visible, unseen = _visible_barriers(events)
        claims.obligations += visible
        claims.unknown += unseen
        claims.obligations += _first_fences(events, pairs.structure, pairs.happens)
        claims.unknown += _left_open(events, pairs.structure)
        claims.notes.append(
            f"pairs ordered by the text: {pairs.by_text}; apart byte by byte: {pairs.by_bytes}"
        )
        claims.assumptions += _ledger(events)
        return claims


PROPERTY = Race()


def _visible_barriers(events: Events) -> tuple[list[Obligation], list[Issue]]:
    """Return that TMA sees the initialisation of mbarriers; where that is open, as an issue.

    It is an ordinary write, and TMA completes bytes in the async proxy: a fence has to lie on the way from
    the one to the other (PTX ISA, causality order): by the thread that initialises, before a barrier, or
    behind one by each thread that issues a copy. Threads need the barrier alone, which `mbarrier` shows.
    """
    loads = [e for e in events.accesses if e.agent is Agent.TMA_LOAD and e.space.kind == "shared"]
    fences = [*events.init_fences, *events.fences]
    structure = Structure(events, early=events.init_fences)
    what = "mbarrier initialisation is fenced before TMA uses the mbarrier"
    found, left_open = [], []
    for point in events.inits if loads else []:
        uses = [(replace(load, point=point, agent=Agent.THREAD), load) for load in loads]
        unseen = [b for a, b in uses if not structure.ordered(a, b, Relation())]
        if any(point.position < f.position < b.point.position for b in unseen for f in fences):
            left_open.append(Issue(point.site.span, f"{what}: a fence is between, of other threads"))
        else:
            found.append(Obligation(what, point.site.span, (), z3.BoolVal(not unseen), {}, point.site))
    return found, left_open


def _first_fences(events: Events, structure: Structure, happens: HappensBefore) -> list[Obligation]:
    """Return that the first wgmma of a thread comes after a wgmma fence, where the text does not show it.

    PTX asks for one before the first wgmma of a kernel, whatever its registers held before.
    """
    points = {id(e.point.site.node): e.point for e in events.accesses if e.agent is Agent.WGMMA}
    found = []
    for point in points.values():
        if not structure.preceded(point, events.register_fences):
            end = Instance(point, (), tuple(i.const for _, i in point.loops))
            goal = happens.preceded(end, events.register_fences)
            what = "the first wgmma comes after a warpgroup_arrive"
            found.append(Obligation(what, point.site.span, point.site.scope.hypotheses, goal, {}, point.site))
    return found


def _left_open(events: Events, structure: Structure) -> list[Issue]:
    """Return the TMA stores that may still read shared memory when the block has ended."""
    stores = [e for e in events.accesses if e.agent is Agent.TMA_STORE and e.space.kind == "shared"]
    message = "may still be read by TMA when the block ends"
    return [
        Issue(e.point.site.span, f"{e.storage.name if e.storage else e.space.name} {message}")
        for e in stores
        if not structure.ends(e)
    ]


def conflicts(events: Events) -> Iterator[tuple[Event, Event]]:
    """Yield every pair of accesses, an access and itself included, that may conflict."""
    known = events.accesses
    awaited = {e.space.key for e in known if e.space.kind == "local" and e.agent is Agent.WGMMA}
    for number, a in enumerate(known):
        for b in known[number:]:
            if a.space.key != b.space.key or a.space.kind != b.space.kind:
                continue
            if not (a.writes or b.writes) or (a.atomic and b.atomic):
                continue
            if a.space.kind == "local" and a.space.key not in awaited:
                continue
            agents = {a.agent, b.agent}
            if a.space.kind == "local" and Agent.WGMMA not in agents:
                continue
            if _apart(a, b):
                continue
            yield a, b


def _apart(a: Event, b: Event) -> bool:
    """Return whether the two are at constant addresses, or in parts of the arena, that do not overlap.

    That accesses stay in their part is what `bounds` proves.
    """
    ends = [_value(t) for t in (a.first, a.last, b.first, b.last)]
    if not a.box and None not in ends and (ends[1] <= ends[2] or ends[3] <= ends[0]):
        return True
    if a.storage is None or b.storage is None or a.space.kind != "shared" or a.storage is b.storage:
        return False
    spans = []
    for storage in (a.storage, b.storage):
        elements = constant_of(storage.elements)
        if storage.arena_bytes is None or elements is None:
            return False
        spans.append((storage.arena_bytes, storage.arena_bytes + elements * storage.element.bits // 8))
    (low, end), (other, other_end) = spans
    return end <= other or other_end <= low


def _value(term: z3.ArithRef) -> Any:
    return term.as_long() if z3.is_int_value(term) else None


@dataclass(frozen=True)
class _Case:
    a: Event
    b: Event
    relation: Relation
    within: bool = True  # one block alone


class _Pairs:
    """Obligations of the pairs of one kernel."""

    def __init__(self, context: Context, events: Events) -> None:
        self.context = context
        self.structure = Structure(events)
        phases = context.phases if events.waits else None
        self.happens = HappensBefore(events, self.structure, phases, context.encoder)
        self.hops = 1 if events.waits else 0
        self.by_text = self.by_bytes = 0
        self.rests: dict[str, set[str]] = {}
        self._fresh: dict[int, z3.ArithRef] = {}
        self._hypotheses: dict[object, tuple[Hypothesis, ...]] = {}
        self._orders: dict[object, z3.BoolRef] = {}

    def decide(self, pairs: Iterable[tuple[Event, Event]], claims: Claims) -> None:
        """Add what makes all executions of all pairs free of races to the claims."""
        left: list[_Case] = []
        for a, b in pairs:
            cases = self._open(a, b)
            moves = a.box or _value(a.first) is None
            lemmas = _determined(a) if cases and a is b and a.agent is Agent.THREAD and moves else []
            claims.obligations += lemmas
            left += [] if lemmas else cases
        search = Prover(SEARCH_RLIMIT, recheck=False, minimise=False)
        # Where no wait in the rounds of the two could order them, the bytes would have to: `_open` has seen.
        near = [c for c in left if c.a.space.kind != "shared" or not z3.is_false(self._order(c, None))]
        made = [(case, self.obligation(case, None)) for case in near]
        proved = search.holding(o for _, o in made)
        claims.obligations += [o for _, o in made if id(o) in proved]
        done = {id(c) for c, o in made if id(o) in proved}
        # Behind a barrier of some of the threads: digit by digit it is clear which threads the bytes are of.
        digits = [(c, o) for c in left if id(c) not in done and (o := self.by_digits(c)) is not None]
        told = search.holding(o for _, o in digits)
        claims.obligations += [o for _, o in digits if id(o) in told]
        done |= {id(c) for c, o in digits if id(o) in told}
        self._in_any_order([c for c in left if id(c) not in done], search, claims)

    def _in_any_order(self, cases: list[_Case], search: Prover, claims: Claims) -> None:
        """Add what orders cases through rounds of other threads; those left when some fail are undecided."""
        prover, failed = Prover(SEARCH_RLIMIT, recheck=False), 0
        for start in range(0, len(cases), AT_ONCE):
            some = cases[start : start + AT_ONCE]
            made = [self.obligation(c, self.hops) for c in some] if failed < MAX_FAILED else []
            proved = search.holding(made)
            for number, case in enumerate(some):
                if failed == MAX_FAILED:
                    message = f"{_what(case)}: not decided, {failed} others come first"
                    claims.unknown.append(Issue(case.a.point.site.span, message))
                    continue
                obligation = made[number]
                if id(obligation) in proved:
                    claims.obligations.append(obligation)
                    continue
                (answer,) = prover.prove([obligation])
                if answer.verdict is Verdict.PROVED:
                    claims.obligations.append(obligation)
                else:
                    claims.answers.append(answer)
                    failed += 1

    def _open(self, a: Event, b: Event) -> list[_Case]:
        """Return the relations of the rounds in which the text does not order a pair."""
        if a.space.kind == "global":
            claim = self.context.dispatch.exchanged.get(a.space.name)
            if claim is None:
                return [_Case(a, b, ANY_ROUNDS, within=False)]
            self.rests.setdefault(claim, set()).add(a.space.name)
        every = list(relations(a, b))
        left = [r for r in every if not self.structure.ordered(a, b, r)]
        self.by_text += len(every) - len(left)
        compared = [r for r in left if a.space.kind == "shared" and self._listed(a, b, r)]
        self.by_bytes += len(compared)
        return [_Case(a, b, r) for r in left if r not in compared]

    def _listed(self, a: Event, b: Event, relation: Relation) -> bool:
        equal = a.point.shared_loops(b.point) if relation.depth is None else relation.depth
        return apart(a, b, equal, self.happens.events.threads)

    def by_digits(self, case: _Case) -> Obligation | None:
        """Return the obligation without other threads, with bytes compared digit by digit if digits tell.

        Warpgroups that own panels between each other's are told apart by the digit which says whose it is.
        """
        second, blocks = self._second(case)
        if case.a.space.kind != "shared":
            return None
        overlap = _overlap_by_digits(case.a, case.b, second, self.context.encoder.ranges)
        return None if overlap is None else self._stated(case, 0, second, blocks, overlap)

    def obligation(self, case: _Case, hops: int | None) -> Obligation:
        """Return that executions of a pair are ordered or touch different bytes.

        Args:
            case: the pair, and how the rounds of the two executions compare.
            hops: other threads that the order may pass through; None to look for it only in the
                rounds of the two accesses.
        """
        second, blocks = self._second(case)
        return self._stated(case, hops, second, blocks, _overlap(case.a, case.b, second))

    def _stated(
        self, case: _Case, hops: int | None, second: Instance, blocks: "Renames", overlap: z3.BoolRef
    ) -> Obligation:
        a, b = case.a, case.b
        first = Instance(a.point, (), tuple(i.const for _, i in a.point.loops))
        hypotheses = self._given(case, first, second, blocks)
        order = self._order(case, hops)
        if blocks:
            order = z3.And(*(p == q for p, q in blocks), order)
        goal = z3.Or(z3.Not(overlap), order)
        if hops is not None:
            hypotheses = (*hypotheses, *_one_elected([*(h.term for h in hypotheses), goal], _position(a)))
        show: dict[str, z3.ExprRef | int | str] = {
            "buffer": a.space.name,
            "access": a.what,
            "other access": b.what,
            "other place": str(b.point.site.span),
            "t1": _thread(a),
            "t2": second.of(_thread(b)),
        }
        if not a.box:
            show |= {"byte_address": a.first, "bytes": z3.simplify(a.last - a.first)}
            show |= {
                "other byte_address": second.of(b.first),
                "other bytes": second.of(z3.simplify(b.last - b.first)),
            }
        show |= {f"other {i.var.name}": c for (_, i), c in zip(b.point.loops, second.counters, strict=True)}
        show |= {f"other {p.decl().name()}": q for p, q in blocks}
        return Obligation(
            f"{_what(case)}: ordered or apart", a.point.site.span, hypotheses, goal, show, a.point.site
        )

    def _order(self, case: _Case, hops: int | None) -> z3.BoolRef:
        """Return that one of the executions ends before the other begins; alike for parts of an operand."""
        a, b = case.a, case.b
        key = (id(a.point.site), id(b.point.site), a.point.position, b.point.position, case.relation, hops)
        fills = a.storage is b.storage and a.reads != b.reads and a.space.kind == "shared"
        key = (*key, a.agent, b.agent, a.writes, b.writes, a.space.kind, a is b, case.within, fills)
        known = self._orders.get(key) if a.space.kind == "shared" else None
        if known is None:
            first = Instance(a.point, (), tuple(i.const for _, i in a.point.loops))
            second, blocks = self._second(case)
            thread = tuple(p for p in second.thread if p not in blocks)
            inner = Instance(b.point, thread, second.counters, second.lanes)
            there, back = (first, a, inner, b), (inner, b, first, a)
            depth, forward = case.relation.depth, case.relation.forward
            # An access of an earlier round of a loop around both is never the later one.
            sides = [there, back] if depth is None or depth < 0 else [there if forward else back]
            if hops is None:
                ways = [self.happens.in_round(*side, number) for number, side in enumerate(sides)]
            else:
                ways = [self.happens.ordered(*side, hops) for side in sides]
            if fills and depth is None:  # what `init` takes for filled by then is not read before
                write, read = (first, inner) if b.reads else (inner, first)
                at = int(b.reads)  # of the way on which the read comes first
                ways[at] = z3.And(z3.Not(in_step(write, read)), ways[at])
            ways = [w for w in ways if not z3.is_false(z3.simplify(w))]
            known = self._orders[key] = z3.Or(*ways) if ways else z3.BoolVal(False)
        return known

    def _given(
        self, case: _Case, first: Instance, second: Instance, blocks: "Renames"
    ) -> tuple[Hypothesis, ...]:
        a, b, relation = case.a, case.b, case.relation
        mine = a.point.site.scope.hypotheses
        theirs = b.point.site.scope.hypotheses
        threads = a.agent is Agent.THREAD and b.agent is Agent.THREAD
        key = (
            tuple(h.term.get_id() for h in mine),
            tuple(h.term.get_id() for h in theirs),
            tuple(c.get_id() for c in second.counters),
            relation,
            a is b,
            threads,
            (a.space.kind, case.within),
        )
        if key not in self._hypotheses:
            renamed = [Hypothesis(h.label, h.kind, second.of(h.term)) for h in theirs if h.kind not in _GIVEN]
            found = [*mine, *renamed]
            if relation.depth is not None and relation.depth >= 0:
                p, q = first.counters[relation.depth], second.counters[relation.depth]
                found.append(Hypothesis("rounds of the two", "loop", p < q if relation.forward else q < p))
            if a.space.kind != "local" or a is b:  # an instruction does not conflict with itself
                distinct = _distinct(case, first, second, blocks, threads)
                found.append(Hypothesis("two accesses", "launch", distinct))
            self._hypotheses[key] = (*found, *_one_elected([h.term for h in found], _position(a)))
        return self._hypotheses[key]

    def _second(self, case: _Case) -> tuple[Instance, "Renames"]:
        """Return the execution of the second access, and its renamed block indices."""
        a, b, relation = case.a, case.b, case.relation
        scope = b.point.site.scope
        blocks, thread = [], []
        for index in scope.launch:
            if index.tag == "threadIdx.x" and a.space.kind != "local":
                thread.append((index.const, self._other(index.const, "t2")))
            elif index.tag.startswith("blockIdx") and a.space.kind == "global" and not case.within:
                blocks.append((index.const, self._other(index.const, f"{index.var.name}'")))
        equal = a.point.shared_loops(b.point) if relation.depth is None else max(relation.depth, 0)
        counters = [
            i.const if depth < equal else self._other(i.const, f"{i.var.name}'")
            for depth, (_, i) in enumerate(b.point.loops)
        ]
        lanes = tuple((i.const, self._other(i.const, "lane'")) for i in scope.indices if i.tag == "lane")
        return Instance(b.point, (*blocks, *thread), tuple(counters), lanes), tuple(blocks)

    def _other(self, const: z3.ArithRef, name: str) -> z3.ArithRef:
        key = const.get_id()
        if key not in self._fresh:
            self._fresh[key] = self.context.encoder.constant(name)
        return self._fresh[key]


Renames = tuple[tuple[z3.ArithRef, z3.ArithRef], ...]


def _what(case: _Case) -> str:
    return f"{case.a.what} and {case.b.what}"


def _distinct(case: _Case, first: Instance, second: Instance, blocks: Renames, threads: bool) -> z3.BoolRef:
    """Return that the two executions are two: by two threads, unless an agent makes one of them."""
    others = [_thread(case.a) != second.of(_thread(case.b)), *(p != q for p, q in blocks)]
    if threads:
        return z3.Or(*others)
    if case.a is not case.b:
        return z3.BoolVal(True)
    others += [p != q for p, q in zip(first.counters, second.counters, strict=True)]
    return z3.Or(*others)


def _thread(event: Event) -> z3.ArithRef:
    return next(i.const for i in event.point.site.scope.launch if i.tag == "threadIdx.x")


def _position(event: Event) -> int:
    return next(n for n, i in enumerate(event.point.site.scope.launch) if i.tag == "threadIdx.x")


def _overlap(a: Event, b: Event, second: Instance) -> z3.BoolRef:
    if a.box and b.box:
        if a.frame != b.frame:
            raise ir.UnsupportedIR(f"TMA copies of {a.space.name} in different shapes")
        pairs = zip(a.box, b.box, strict=True)
        return conjunction([meet(p, m, second.of(q), n) for (p, m), (q, n) in pairs])
    if a.box or b.box:
        raise ir.UnsupportedIR(f"{a.space.name} is accessed by TMA and otherwise")
    if depends_on_data(a.first, b.first):
        count, other_count = (constant_of(e.last - e.first) for e in (a, b))
        if count is not None and other_count is not None:
            return meet_by_digits(a.first, count, second.of(b.first), other_count, range_of_data)
    return z3.And(a.first < second.of(b.last), second.of(b.first) < a.last)


def _overlap_by_digits(
    a: Event, b: Event, second: Instance, limits: Mapping[str, Range]
) -> z3.BoolRef | None:
    """Return the overlap with digits equated by the ranges of threads and rounds; None without any.

    Args:
        a: one access.
        b: the other.
        second: the execution of the other.
        limits: where indices of the launch and counters lie, by name.
    """
    count, other_count = (constant_of(e.last - e.first) for e in (a, b))
    if a.box or b.box or count is None or other_count is None:
        return None
    ranges: dict[int, Range] = {}
    for event, of in ((a, lambda const: const), (b, second.of)):
        for index in event.point.site.scope.indices:
            ranges[of(index.const).get_id()] = limits.get(index.const.decl().name(), Range())
    first, other = (z3.simplify(carried_out(t)) for t in (a.first, second.of(b.first)))
    found = meet_by_digits(
        first, count, other, other_count, lambda symbol: ranges.get(symbol.get_id(), range_of_data(symbol))
    )
    return found if z3.is_false(found) or any(z3.is_eq(p) for p in found.children()) else None


def _one_elected(terms: list[z3.ExprRef], thread: int) -> list[Hypothesis]:
    """Return that no two lanes of a warp of one block are elected.

    Args:
        terms: that hold the elections.
        thread: which argument of an election is threadIdx.x.
    """
    found, facts = elections(terms), []
    for number, one in enumerate(found):
        for other in found[number + 1 :]:
            if one.decl().name() != other.decl().name() or one.num_args() != other.num_args():
                continue
            pairs = list(zip(one.children(), other.children(), strict=True))
            p, q = pairs.pop(thread)
            same = [x == y for x, y in pairs if not z3.eq(x, y)]
            near = z3.And(one, other, p / WARP_THREADS == q / WARP_THREADS, *same)
            facts.append(
                Hypothesis("elect.sync picks one lane of a warp", "definition", z3.Implies(near, p == q))
            )
    return facts


def _determined(event: Event) -> list[Obligation]:
    """Return lemmas by which the bytes written determine who writes them; none if they do not hold.

    In global memory that is block, thread and rounds, in shared memory thread and rounds.
    """
    site = event.point.site
    axes = tuple(Axis(c, n) for c, n in event.box)
    if not axes:
        count = constant_of(event.last - event.first)
        if count is None:
            return []
        axes = (Axis(event.first, count),)
    indices = site.scope.indices
    if event.space.kind != "global":
        indices = tuple(i for i in indices if not i.tag.startswith("blockIdx"))
    try:
        inverse = candidate(axes, indices, site.scope.hypotheses)
    except NotDigitsError:
        return []
    consts = {i.const.decl().name(): i.const for i in indices}
    what = f"the bytes of {event.space.name} that are written determine who writes them"
    obligations = [
        Obligation(what, site.span, site.scope.hypotheses, lemma, {}, site)
        for lemma in inverse.lemmas(axes, consts)
    ]
    answers = Prover(SEARCH_RLIMIT, recheck=False).prove(obligations)
    return obligations if all(a.verdict is Verdict.PROVED for a in answers) else []


def _ledger(events: Events) -> list[str]:
    """Return what is taken for granted of the hardware and of the caller."""
    ledger = []
    if any(e.space.kind == "global" for e in events.accesses):
        ledger.append("tensors that are passed as different arguments do not overlap")
    if any(e.agent in ASYNC_PROXY for e in events.accesses):
        ledger.append(
            "fence.proxy.async orders generic writes before it and accesses of the async proxy after it, "
            "by whichever thread on the way it is executed (PTX, proxy-preserved causality order)"
        )
        ledger.append("a generic read that precedes an access of the async proxy needs no proxy fence")
    if any(e.agent is Agent.TMA_LOAD for e in events.accesses):
        ledger.append("bytes of a TMA load are visible to whoever waited for their mbarrier phase")
    return ledger
