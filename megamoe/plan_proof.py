"""The plan's kernel, proved on its compiled IR for every routing: rows are an expert's entries, in order.

`plan_follow` reads the device IR as what one thread does, `plan_guide` says what that should be, and
`plan_count` has the facts about counts. From these: the variables hold the counts that the guide says, in
every round of every loop (`walk`); between two barriers no word is touched by two threads, or written twice,
and no CTA touches another's part of the outputs (`order`, `apart`); what is read has been written, by whoever
it was (`written`, `contents`); and each output is written once, with what `plan.make_plan` puts there
(`outputs`). An access, a loop or an operation that none of these covers is UNSUPPORTED.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import z3

from megamoe.buffer import combine_row
from megamoe.plan_count import BLOCKS, EXPERT_OF, MINE, RANK, THREAD, given
from megamoe.plan_follow import Follower, accesses
from megamoe.plan_guide import PlanGuide, Written
from megamoe.plan_values import Event
from verify import ir
from verify.ir import UnsupportedIR
from verify.properties import Claims, Issue
from verify.solve import Obligation
from verify.symbols import summary

EXPERTS_END = 1 << 30  # numbers of experts are far from the ends of their type
CLAIMS = (
    "counting",
    "overflow",
    "walk",
    "order",
    "apart",
    "written",
    "contents",
    "outputs",
    "promises",
    "nothing-else",
)
ASSUMPTIONS = (
    "different arguments do not overlap; nobody else writes the plan while the kernel runs",
    "a routing does not change while the kernel reads it: ranks have met before (claim `meeting`)",
    f"{-EXPERTS_END} <= topk_idx < {EXPERTS_END}, no more: an expert of another rank, or none, is no entry",
)
NOT_ENDED = "no wait gives up: where one has, `status` says so, and the plan is not used"
OUTPUTS = ("row_source", "row_target", "row_weight", "block_expert", "counts", "firsts")
_BYTES = 4  # of every element
_SAME_CTA = {MINE.decl().name(), RANK.decl().name()}


def claims(function: ir.Function, guide: PlanGuide) -> dict[str, Claims]:
    """Return what has to be proved of a kernel, by the names of CLAIMS.

    Where something has no meaning, all of them are UNSUPPORTED.

    Args:
        function: device IR.
        guide: of the kernel's config.
    """
    try:
        kernel = _Kernel(function, guide)
        made = {
            "counting": guide.counts.facts(),
            "overflow": kernel.overflow(),
            "walk": kernel.goals("walk"),
            "order": kernel.order(),
            "apart": kernel.apart(),
            "written": kernel.goals("written"),
            "contents": kernel.contents(),
            "outputs": kernel.outputs(),
            "promises": kernel.promises(),
        }
        found = {name: Claims(obligations=list(obligations)) for name, obligations in made.items()}
        found["nothing-else"] = kernel.nothing_else()
    except UnsupportedIR as error:
        return {name: Claims(unsupported=[Issue(None, str(error))]) for name in CLAIMS}
    for claim in found.values():
        claim.assumptions.extend(ASSUMPTIONS)
        if kernel.thread.assumed:
            claim.assumptions.append(NOT_ENDED)
    return found


class _Kernel:
    def __init__(self, function: ir.Function, guide: PlanGuide) -> None:
        self.guide, self.counts = guide, guide.counts
        self.places = _places(function)
        self.thread = Follower(function, guide)
        self.touched = [accesses(step) for step in self.thread.steps]
        self.check_launch()

    def check_launch(self) -> None:
        """Check that the launch is what counts are about."""
        c = self.guide.config
        wanted = {
            "threadIdx.x": self.counts.threads,
            "blockIdx.x": c.num_experts,
            "blockIdx.y": c.launch_ranks,
        }
        if {tag: self.thread.extents.get(tag) for tag in wanted} != wanted:
            raise UnsupportedIR("a launch of other sizes")

    def obligation(
        self, what: str, span: ir.Span | None, known: Iterable[z3.BoolRef], goal: z3.BoolRef
    ) -> Obligation:
        """Return a goal with the facts about the counts that it speaks of."""
        known = list(known)
        facts = self.counts.about([*known, goal])
        # With instances alone a model need be no routing.
        return Obligation(what, span, given(*known, *facts), goal, exact=not facts)

    def goals(self, claim: str) -> Iterator[Obligation]:
        """Yield what has to hold where a thread comes by."""
        for goal in self.thread.goals:
            if goal.claim == claim:
                yield self.obligation(goal.what, goal.span, goal.path, goal.goal)

    def overflow(self) -> Iterator[Obligation]:
        """No integer wraps, where experts' numbers are far from the ends of their type."""
        for goal in self.thread.goals:
            if goal.claim == "overflow":
                terms = [*goal.path, goal.goal]
                numbers = {
                    of.get_id(): of
                    for term in terms
                    for name, of in summary(term).applications
                    if name == EXPERT_OF.name()
                }
                near = [z3.And(n >= -EXPERTS_END, n < EXPERTS_END) for n in numbers.values()]
                yield self.obligation(goal.what, goal.span, [*goal.path, *near], goal.goal)

    # ------------------------------------------------------------------ what is written
    def intervals(self, buffer: str) -> list[int]:
        """Return the intervals between barriers in which a buffer is written."""
        return [i for i, (stores, _) in enumerate(self.touched) if buffer in stores]

    def declared(self, event: Event) -> Written | None:
        """Return what a write is held against."""
        wanted, found = self.guide.writes.get(event.buffer, ()), self.intervals(event.buffer)
        return wanted[found.index(event.interval)] if len(wanted) == len(found) else None

    def all_written(self, names: Iterable[str]) -> Iterator[tuple[str, int, Written, list[Event]]]:
        """Yield what is declared of buffers, interval by interval, with the writes."""
        for name in names:
            for interval, written in zip(self.intervals(name), self.guide.writes[name], strict=False):
                events = [
                    e
                    for e in self.thread.events
                    if (e.buffer, e.interval, e.kind) == (name, interval, "write")
                ]
                yield name, interval, written, events

    def contents(self) -> Iterator[Obligation]:
        """What other threads read: shared memory, and the entries that rows are looked up for."""
        for name, interval, written, events in self.all_written(self.guide.writes):
            if name not in OUTPUTS or interval != self.intervals(name)[-1]:
                yield from self.filled(name, written, events)
        yield from self.lasting()

    def outputs(self) -> Iterator[Obligation]:
        """The outputs, as their last writes leave them."""
        for name, interval, written, events in self.all_written(OUTPUTS):
            if interval == self.intervals(name)[-1]:
                yield from self.filled(name, written, events)

    def filled(self, name: str, written: Written, events: list[Event]) -> Iterator[Obligation]:
        """Writes are of this value, and each element is written."""
        for event in events:
            assert event.value is not None, "a write has a value"
            goal = z3.And(written.is_in(event.at), event.value == written.value(event.at))
            yield self.obligation(f"what is written to {name}", event.span, _known(event), goal)
        at = z3.Int("at")
        known, ways = [*self.launched(), written.is_in(at)], []
        for event in events:
            rounds = [(counter, written.rounds(at)) for counter in event.loops]
            places = [(THREAD, written.thread(at)), *rounds]
            known += [z3.substitute(f, *places) for f in event.facts]
            ways.append(z3.substitute(z3.And(*event.path, event.at == at), *places))
        yield self.obligation(f"each place of {name} is written", None, known, z3.Or(*ways))

    def launched(self) -> list[z3.BoolRef]:
        """Return where the CTA's numbers lie; the row of an own word is any."""
        c, row = self.guide.config, z3.Int("of_word")
        return [MINE >= 0, c.num_experts > MINE, RANK >= 0, c.launch_ranks > RANK, row == 0]

    def lasting(self) -> Iterator[Obligation]:
        """What is read is what was written behind the first barrier, and nothing has been put over it."""
        own = self.guide.own[0]
        for event in self.thread.events:
            if event.kind == "read":
                before = [i for i in self.intervals(event.buffer) if i < event.interval]
                number = len(self.intervals(own)) if event.buffer == own else 1
                over = {
                    name
                    for stores, _ in self.touched[before[-1] + 1 if before else 0 : event.interval + 1]
                    for name in stores
                    if name != event.buffer and self.overlap(name, event.buffer)
                }
                goal = z3.BoolVal(len(before) == number and not over)
                yield Obligation(f"{event.buffer} lasts until it is read", event.span, (), goal)

    # ------------------------------------------------------------------ order
    def order(self) -> Iterator[Obligation]:
        """Between two barriers no two threads touch a word that one writes, and none is written twice."""
        yield from self.goals("order")
        for interval, (stores, loads) in enumerate(self.touched):
            for name in sorted(stores):
                for other in sorted((stores | loads) - {name}):
                    if self.overlap(name, other):
                        what = f"{name} is written where {other} lies, between the same barriers"
                        yield Obligation(what, None, (), z3.BoolVal(False))
            events = [e for e in self.thread.events if e.interval == interval]
            for write in events:
                if write.kind == "write":
                    for other in events:
                        if other.buffer == write.buffer and (
                            other.kind == "read" or other.number >= write.number
                        ):
                            yield self._apart_in_cta(write, other)

    def _apart_in_cta(self, write: Event, other: Event) -> Obligation:
        copied = _renamed(other)
        same = [z3.Int(f"{THREAD.decl().name()}'") == THREAD]
        if write.loops != other.loops:
            same.append(z3.BoolVal(False))
        same += [counter == z3.Int(f"{counter.decl().name()}'") for counter in write.loops]
        # A thread may read a word before it writes it, in the same round.
        in_order = other.number == write.number or (other.kind == "read" and other.number < write.number)
        goal = z3.And(*same) if in_order else z3.BoolVal(False)
        known = [*_known(write), *_known(copied), write.at == copied.at]
        if write.value is not None and copied.value is not None:
            known.append(write.value == copied.value)  # as `contents` and `outputs` have it of the same place
        what = f"{other.kind} of {other.buffer} beside its write"
        return Obligation(what, write.span, given(*known), goal, exact=not _speaks_of_counts(known))

    def overlap(self, name: str, other: str) -> bool:
        """Return whether two buffers share bytes; different tensors do not."""
        if name not in self.places or other not in self.places:
            return False
        (first, end), (start, stop) = self.places[name], self.places[other]
        return first < stop and start < end

    def apart(self) -> Iterator[Obligation]:
        """CTAs keep to their own rows, blocks and words of the outputs, which lie inside the tensors."""
        c = self.guide.config
        for event in self.thread.events:
            written = self.guide.writes.get(event.buffer, ())
            if event.buffer not in self.places and written:
                own = written[-1].is_in(event.at)
                yield self.obligation(
                    f"{event.kind} of the CTA's own {event.buffer}", event.span, _known(event), own
                )
        other, rank, at = z3.Ints("other other_rank at")
        inside = [*self.launched(), other >= 0, other < c.num_experts, rank >= 0, rank < c.launch_ranks]
        for name, size in (
            ("row_source", c.pool_blocks * c.block_m),
            ("block_expert", c.pool_blocks),
            ("counts", c.num_experts),
            ("firsts", self.guide.firsts_len),
        ):
            is_in = self.guide.writes[name][-1].is_in(at)
            whole = z3.And(at >= RANK * size, at < (RANK + 1) * size)
            yield self.obligation(f"{name} of a rank lie in its part", None, [*inside, is_in], whole)
            theirs = z3.substitute(is_in, (MINE, other))
            known = [*inside, is_in, theirs]
            yield self.obligation(f"no other expert's CTA has the same {name}", None, known, other == MINE)
        block, size = z3.Ints("block size")
        parts = [
            block >= RANK * size,
            block < (RANK + 1) * size,
            block >= rank * size,
            block < (rank + 1) * size,
        ]
        for less, more in ((RANK, rank), (rank, RANK)):
            # The product of two unknowns, once: more >= less + 1.
            known = given(*parts, size > 0, less < more, more * size >= (less + 1) * size)
            yield Obligation("parts of ranks are apart", None, known, z3.BoolVal(False))
        yield from self._all_blocks()

    def _all_blocks(self) -> Iterator[Obligation]:
        """Each block of the pool below the last is some expert's: by induction over experts."""
        owner = z3.Function(
            "owner", z3.IntSort(), z3.IntSort(), z3.IntSort()
        )  # of a block, of the first i experts
        block, i = z3.Ints("block i")
        n = self.counts

        def found(to: z3.ArithRef) -> z3.BoolRef:
            e = owner(block, to)
            held = z3.And(e >= 0, e < to, BLOCKS(e) <= block, block < BLOCKS(e) + n.blocks(e))
            return z3.Implies(block < BLOCKS(to), held)

        start = given(BLOCKS(z3.IntVal(0)) == 0, block >= 0)
        yield Obligation("blocks of no experts", None, start, found(z3.IntVal(0)))
        is_last = z3.And(BLOCKS(i) <= block, block < BLOCKS(i) + n.blocks(i))
        chosen = owner(block, i + 1) == z3.If(is_last, i, owner(block, i))
        known = given(block >= 0, i >= 0, found(i), chosen, BLOCKS(i + 1) == BLOCKS(i) + n.blocks(i))
        yield Obligation("each block is an expert's", None, known, found(i + 1))

    def promises(self) -> Iterator[Obligation]:
        """What the fused kernel's contract says of the plan follows: ranges, and distinct targets."""
        n, c, at = self.counts, self.guide.config, z3.Int("at")
        ranges = {
            "firsts": (0, c.pool_blocks + 1),
            "block_expert": (0, c.num_experts),
            "row_source": (-1, c.num_ranks * c.tokens),
            "row_target": (-1, c.num_ranks * c.combine_rows),
            "counts": (0, c.num_ranks * c.tokens * c.topk + 1),
        }
        for name, (low, high) in ranges.items():
            written = self.guide.writes[name][-1]
            value = written.value(at)
            known = [*self.launched(), written.is_in(at)]
            yield self.obligation(f"{name} in range", None, known, z3.And(value >= low, value < high))
        firsts = self.guide.writes["firsts"][-1]
        known = [*self.launched(), firsts.is_in(at), firsts.is_in(at + 1)]
        ascend = firsts.value(at) <= firsts.value(at + 1)
        yield self.obligation("firsts ascend", None, known, ascend)
        # Two rows of any experts and ranks: equal targets are of one entry, which is of one expert's.
        entry, source, slot, token = z3.Ints("entry source slot token")
        parts = entry / c.topk / c.tokens, entry % c.topk, entry / c.topk % c.tokens
        inside = [entry >= 0, entry < n.entries]
        limits = zip((source, slot, token), (c.num_ranks, c.topk, c.tokens), strict=True)
        ranges_of = z3.And(*(z3.And(part >= 0, part < limit) for part, limit in limits))
        known = given(*inside, *(a == b for a, b in zip((source, slot, token), parts, strict=True)))
        whole = entry == (source * c.tokens + token) * c.topk + slot
        yield Obligation(
            "an entry is told by its rank, slot and token", None, known, z3.And(ranges_of, whole)
        )
        row = combine_row(source, slot, token, c.tokens, c.combine_rows)
        told = (row / c.combine_rows, source), (row % c.combine_rows, slot * c.tokens + token)
        for value, part in told:
            yield Obligation("a target tells a rank and its row", None, given(ranges_of), value == part)
        at_slot = slot * c.tokens + token
        goal = z3.And(at_slot / c.tokens == slot, at_slot % c.tokens == token)
        yield Obligation("its row tells slot and token", None, given(ranges_of), goal)
        yield Obligation("that is an entry's target", None, known, self.guide.target(entry) == row)
        expert, peer, row = z3.Ints("expert peer row")
        numbers = [MINE >= 0, c.num_experts > MINE, expert >= 0, expert < c.num_experts]
        whose = z3.substitute(n.is_of(expert, entry), (RANK, peer))
        known = given(*numbers, n.is_of(MINE, entry), whose)
        goal = z3.And(expert == MINE, peer == RANK)
        yield Obligation("an entry is of one expert of one rank", None, known, goal)
        rows = [at >= 0, at < n.rows(MINE), row >= 0, row < n.rows(MINE)]
        known = [*self.launched(), *rows, n.entry(MINE, at) == n.entry(MINE, row)]
        yield self.obligation("an expert's rows are different entries", None, known, at == row)

    # ------------------------------------------------------------------ the rest
    def nothing_else(self) -> Claims:
        """Every write is declared, in as many intervals as it is, and every place is inside its buffer."""
        left = []
        own = self.guide.own[0]
        for event in self.thread.events:
            if event.kind == "write" and self.declared(event) is None:
                left.append(Issue(event.span, f"a write of {event.buffer} that is not declared"))
        for name, wanted in self.guide.writes.items():
            if len(self.intervals(name)) != len(wanted):
                left.append(Issue(None, f"{name} is not written in {len(wanted)} intervals between barriers"))
        if not self.intervals(own):
            left.append(Issue(None, f"{own} is not written"))
        at = z3.Int("at")
        obligations = []
        for name, (first, end) in sorted(self.places.items()):
            held = self.guide.contents(name, at)
            if held is None:
                left.append(Issue(None, f"{name} is in shared memory, and not declared"))
                continue
            inside = z3.And(at >= 0, at < (end - first) // _BYTES)
            obligations.append(
                self.obligation(f"{name} lies in its place", None, [*self.launched(), held[0]], inside)
            )
        return Claims(obligations=obligations, unknown=left)


def _known(event: Event) -> list[z3.BoolRef]:
    return [*event.path, *event.facts]


def _renamed(event: Event) -> Event:
    """Return the event of another thread of the CTA, in any round."""
    value = [] if event.value is None else [event.value]
    names = [
        (c, z3.Const(f"{c.decl().name()}'", c.sort()))
        for c in _constants([event.at, *event.path, *event.facts, *value])
    ]

    def renamed(term: z3.ExprRef) -> z3.ExprRef:
        return z3.substitute(term, *names)

    return replace(
        event,
        at=renamed(event.at),
        value=None if event.value is None else renamed(event.value),
        path=tuple(map(renamed, event.path)),
        facts=tuple(map(renamed, event.facts)),
    )


def _speaks_of_counts(terms: Iterable[z3.ExprRef]) -> bool:
    """Return whether a model of the terms need be no run: they have functions without their definitions."""
    return any(of.num_args() for term in terms for _, of in summary(term).applications)


def _constants(terms: Iterable[z3.ExprRef]) -> list[z3.ExprRef]:
    """Return the symbols of terms that are the thread's own."""
    found = {name: of for term in terms for name, of in summary(term).applications if of.num_args() == 0}
    return [of for name, of in found.items() if name not in _SAME_CTA]


def _places(function: ir.Function) -> dict[str, tuple[int, int]]:
    """Return first and last byte of each buffer in shared memory.

    Raises:
        UnsupportedIR: one has no known place, or two buffers have one name.
    """
    arena, starts, found, owners = set(), {}, {}, {}
    total = 0
    for node in ir.walk(function.body):
        match node:
            case ir.Alloc(buffer=buffer) if buffer.scope.startswith("shared"):
                arena.add(buffer.data)
                total = _size(buffer)
            case ir.Bind(
                var=var, value=ir.Call(op="handle_add_byte_offset", args=(base, ir.Const(value=at)))
            ) if base in arena:
                starts[var] = int(at)
            case ir.Bind(var=var) if var.dtype.name == "handle":
                raise UnsupportedIR(f"computed pointer {var.name}")
            case ir.Decl(buffer=buffer):
                _check(buffer, owners)
                if buffer.scope.startswith("shared"):
                    if buffer.data not in starts:
                        raise UnsupportedIR(f"{buffer.name} has no known place in shared memory")
                    first = starts[buffer.data]
                    found[buffer.data.name] = first, first + _size(buffer) * _BYTES
                    if found[buffer.data.name][1] > total:
                        raise UnsupportedIR(f"{buffer.name} leaves shared memory")
            case ir.Load(buffer=buffer) | ir.Store(buffer=buffer):
                _check(buffer, owners)
    return found


def _check(buffer: ir.Buffer, owners: dict[str, ir.Var]) -> None:
    if owners.setdefault(buffer.data.name, buffer.data) is not buffer.data:
        raise UnsupportedIR(f"two buffers named {buffer.data.name}")
    if not (isinstance(buffer.offset, ir.Const) and buffer.offset.value == 0):
        raise UnsupportedIR(f"{buffer.name} begins elsewhere")
    if buffer.dtype.bits != 8 * _BYTES or len(buffer.shape) != 1:
        raise UnsupportedIR(f"{buffer.name} is not flat, or of other words")


def _size(buffer: ir.Buffer) -> int:
    (size,) = buffer.shape
    if not isinstance(size, ir.Const):
        raise UnsupportedIR(f"the size of {buffer.name} is not constant")
    return int(size.value)
