"""What has to hold of `schedule` and `buffer`, as proof obligations over the very functions that run.

Wave boundaries, blocks and tasks are free integers, so a proof is for every routing; tile counts are
constants of a shipped shape. `tests/megamoe` proves them with both solvers and refutes mutants.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import z3

from megamoe import buffer, routing, schedule, weights
from megamoe.memo import of_a_term
from megamoe.quotients import parted
from megamoe.schedule import Geometry, Kind
from verify.encode import Hypothesis
from verify.solve import Obligation


@dataclass(frozen=True)
class Rules:
    """The functions under proof; a mutant replaces one."""

    segment_start: Callable[..., Any] = schedule.segment_start
    number: Callable[..., Any] = schedule.number
    l2_number: Callable[..., Any] = schedule.l2_number
    shifted: Callable[..., Any] = routing.shifted
    waits_ahead: Callable[..., Any] = schedule.waits_ahead
    first_step: Callable[..., Any] = weights.first_step
    x_freed_by: Callable[..., Any] = schedule.x_freed_by
    h_freed_by: Callable[..., Any] = schedule.h_freed_by
    most_blocks: Callable[..., Any] = schedule.most_blocks
    combine_row: Callable[..., Any] = buffer.combine_row
    align: Callable[..., Any] = buffer.align


RULES = Rules()


def _given(*terms: z3.BoolRef) -> tuple[Hypothesis, ...]:
    return tuple(Hypothesis(_text(t), "definition", t) for t in terms)


@of_a_term
def _text(term: z3.BoolRef) -> str:
    return str(term)


def _firsts(count: int) -> tuple[list[z3.ArithRef], list[z3.BoolRef]]:
    """Return first(w - 1), first(w), ... and that they ascend from at least 0."""
    values = [z3.Int(f"first{i}") for i in range(count)]
    return values, [values[0] >= 0, *(a <= b for a, b in pairwise(values))]


def _part(geometry: Geometry, kind: Kind) -> tuple[z3.ArithRef, z3.BoolRef]:
    part = z3.Int("part")
    return part, z3.And(part >= 0, part < schedule.complete(geometry, kind))


# --------------------------------------------------------------------------- every task exactly once
def order(geometry: Geometry, rules: Rules = RULES) -> Iterator[Obligation]:
    """Numbering and decoding are inverse: tasks and numbers correspond one to one."""
    (before, first, after, beyond), ascending = _firsts(4)
    block = z3.Int("block")
    in_wave = z3.And(first <= block, block < after)
    for kind in Kind:
        part, in_range = _part(geometry, kind)
        task = rules.number(geometry, kind, block, part, (before, first, after, beyond))
        # Products of a wave stand in the segment after the one that dispatches it.
        own = (before, first, after) if kind is Kind.DISPATCH else (first, after, beyond)
        start = rules.segment_start(geometry, own[0], own[1])
        stop = rules.segment_start(geometry, own[1], own[2])
        given = _given(*ascending, in_wave, in_range)
        name = kind.name.lower()
        yield Obligation(
            f"{name}: its number lies in its segment", None, given, z3.And(start <= task, task < stop)
        )
        for other in Kind:
            holds, decoded, offset = _decode(geometry, other, own, task - start)
            same = z3.And(holds, decoded == block, offset == part)
            goal = same if other is kind else z3.Not(holds)
            yield Obligation(f"{name}: decoded as {other.name.lower()} or not", None, given, goal)
    task = z3.Int("task")
    start = rules.segment_start(geometry, before, first)
    stop = rules.segment_start(geometry, first, after)
    for kind in Kind:
        # The segment of wave w = [first, after) holds products of [before, first), whose own tuple starts
        # one wave earlier.
        earlier = z3.Int("earlier")
        holds, block, part = _decode(geometry, kind, (before, first, after), task - start)
        wave = (before, first, after, beyond) if kind is Kind.DISPATCH else (earlier, before, first, after)
        low, high = (first, after) if kind is Kind.DISPATCH else (before, first)
        given = _given(*ascending, earlier >= 0, earlier <= before, start <= task, task < stop, holds)
        name = kind.name.lower()
        in_range = z3.And(low <= block, block < high, part >= 0, part < schedule.complete(geometry, kind))
        yield Obligation(f"{name}: a number decodes to a task of the wave", None, given, in_range)
        again = rules.number(geometry, kind, block, part, wave)
        yield Obligation(f"{name}: the task has that number", None, given, again == task)


def _decode(geometry: Geometry, kind: Kind, segment: Sequence[Any], offset: Any) -> tuple[Any, Any, Any]:
    """Return (whether the kernel takes the branch of `kind`, block, part), as in `schedule.locate`."""
    before, first, after = segment
    dispatched = schedule.dispatch_tasks(geometry, first, after)
    multiplied = schedule.l1_tasks(geometry, before, first)
    if kind is Kind.DISPATCH:
        return offset < dispatched, *schedule.spread(first, offset, geometry.dispatch_parts)
    offset = offset - dispatched
    if kind is Kind.LINEAR1:
        return (
            z3.And(offset >= 0, offset < multiplied),
            *schedule.spread(before, offset, geometry.l1_tiles),
        )
    offset = offset - multiplied
    return offset >= 0, *schedule.spread(before, offset, geometry.l2_tiles)


def shares(ctas: int, rules: Rules = RULES) -> Iterator[Obligation]:
    """CTAs share tasks out: a number belongs to one CTA, which meets all of its own, in ascending order.

    In the last wave some numbers stand for no product (`schedule.gap`); the others and the products
    correspond one to one.
    """
    number, start, cta, other, turn = z3.Ints("number start cta other turn")
    in_range = z3.And(cta >= 0, cta < ctas, other >= 0, other < ctas, start >= 0, number >= start)
    mine = number % ctas == cta
    first = schedule.share_start(start, cta, ctas)
    goal = z3.And(first >= start, first < start + ctas, first % ctas == cta)
    yield Obligation("a CTA begins with its least number", None, _given(in_range), parted(goal))
    # Its numbers as whole turns and the CTA: all of those that are cta modulo ctas.
    own = ctas * turn + cta
    given = _given(z3.substitute(in_range, (number, own)))
    goal = z3.And(own % ctas == cta, own >= first, (own - first) % ctas == 0)
    yield Obligation("from there on it meets all of its own", None, given, parted(goal))
    both = _given(in_range, mine, number % ctas == other)
    yield Obligation("a number belongs to one CTA", None, both, cta == other)

    task, later, offset, gap = z3.Ints("task later offset gap")
    given = _given(gap >= 0, gap < ctas, task >= 0, later > task, offset >= 0)
    decoded = schedule.l2_offset(rules.l2_number(task, gap, ctas), gap, ctas)
    yield Obligation("a product's number decodes to it", None, given, decoded == task)
    found = schedule.l2_offset(offset, gap, ctas)
    goal = z3.Implies(found >= 0, rules.l2_number(found, gap, ctas) == offset)
    yield Obligation("what a number decodes to has that number", None, given, goal)
    goal = z3.And(
        rules.l2_number(task, gap, ctas) < rules.l2_number(later, gap, ctas),
        rules.l2_number(task, gap, ctas) <= task + gap,
    )
    yield Obligation("later products have later numbers, within the gap", None, given, goal)
    skipped = z3.Implies(found < 0, schedule.l2_offset(offset + ctas, gap, ctas) >= 0)
    yield Obligation("a CTA leaves out one turn at most", None, given, skipped)


# --------------------------------------------------------------------------- no wave waits for itself
def waits(geometry: Geometry, rules: Rules = RULES) -> Iterator[Obligation]:
    """Every wait is for tasks with smaller numbers, while the rings hold two waves and one wave.

    A block that frees a ring's slot lies in some earlier wave v, whose boundaries are free but for the order
    of waves.
    """
    (before, first, after, beyond), ascending = _firsts(4)
    wave = (before, first, after, beyond)
    block = z3.Int("block")
    part, other = z3.Ints("part other")
    g = _WithRings(geometry)
    earlier = [z3.Int(f"v{i}") for i in range(4)]
    order = [earlier[0] >= 0, *(a <= b for a, b in pairwise(earlier))]
    base = (*ascending, *order, first <= block, block < after, g.x_ring > 0, g.h_ring > 0)

    def task(kind: Kind, of: Any, which: Any, boundaries: Sequence[Any]) -> Any:
        return rules.number(geometry, kind, of, which, tuple(boundaries))

    def parts(kind: Kind, name: Any) -> z3.BoolRef:
        return z3.And(name >= 0, name < schedule.complete(geometry, kind))

    def before_wave(freed: Any, boundaries: Sequence[Any]) -> z3.BoolRef:
        """`freed` lies in wave v; v and w are waves of one sequence, v + 1 <= w or v = w or v > w."""
        v, w = earlier, boundaries
        in_v = z3.And(v[1] <= freed, freed < v[2])
        adjacent = z3.And(v[1] == w[0], v[2] == w[1], v[3] == w[2])
        same = z3.And(v[1] == w[1], v[2] == w[2], v[3] == w[3])
        return z3.And(
            in_v, z3.Or(v[3] <= w[0], z3.And(v[2] == w[0], v[3] == w[1]), adjacent, same, v[1] >= w[2])
        )

    said = {Kind.DISPATCH: "dispatch", Kind.LINEAR1: "linear 1", Kind.LINEAR2: "linear 2"}
    x_holds, h_holds = g.x_ring >= after - before, g.h_ring >= after - first
    for freed_by, holds, kind, awaited in (
        (rules.x_freed_by, x_holds, Kind.DISPATCH, Kind.LINEAR1),
        (rules.h_freed_by, h_holds, Kind.LINEAR1, Kind.LINEAR2),
    ):
        freed = freed_by(g, block)
        wanted = holds, freed >= 0, before_wave(freed, wave), parts(kind, part), parts(awaited, other)
        goal = task(awaited, freed, other, earlier) < task(kind, block, part, wave)
        text = f"{said[kind]} waits for a {said[awaited]} before it"
        yield Obligation(text, None, _given(*base, *wanted), goal)
    for kind, awaited in ((Kind.LINEAR1, Kind.DISPATCH), (Kind.LINEAR2, Kind.LINEAR1)):
        hypotheses = _given(*base, parts(kind, part), parts(awaited, other))
        goal = task(awaited, block, other, wave) < task(kind, block, part, wave)
        yield Obligation(
            f"{kind.name.lower()} waits for {awaited.name.lower()} before it", None, hypotheses, goal
        )


def ahead(geometry: Geometry, rules: Rules = RULES) -> Iterator[Obligation]:
    """What a product waits for ahead has smaller numbers than the product before it.

    That one is in the same segment, as a linear 1 or a linear 2, or in the segment before; a product in
    segment s is of wave s - 1.
    """
    g = _WithRings(geometry)
    (earliest, before, first, after, beyond), ascending = _firsts(5)
    wave, wave_before = (before, first, after, beyond), (earliest, before, first, after)
    block, other, last_block, last_part, segment, gap = z3.Ints(
        "block other last_block last_part segment gap"
    )
    freed = [z3.Int(f"v{i}") for i in range(4)]  # boundaries of the wave whose outputs make room
    base = (*ascending, first <= block, block < after, g.h_ring > 0, gap >= 0)
    h_holds = g.h_ring >= after - first

    def last(kind: Kind, of: Sequence[Any]) -> tuple[Any, Any, tuple[Any, ...]]:
        """Return the product before: its number, its number in the segment, what it is."""
        task = rules.number(geometry, kind, last_block, last_part, tuple(of))
        is_one = (
            of[1] <= last_block,
            last_block < of[2],
            last_part >= 0,
            last_part < schedule.complete(geometry, kind),
        )
        among = (last_block - of[1]) * schedule.complete(geometry, kind) + last_part
        if kind is Kind.LINEAR2:  # numbers may be left out before it
            among = among + schedule.l1_tasks(geometry, of[1], of[2]) + gap
        return task, among, is_one

    for name, of, behind in (("the same segment", wave, 0), ("the segment before", wave_before, 1)):
        for kind in (Kind.LINEAR1, Kind.LINEAR2):
            task, among, is_one = last(kind, of)
            for waiting, awaited in (
                (Kind.LINEAR1, Kind.DISPATCH),
                (Kind.LINEAR1, Kind.LINEAR2),
                (Kind.LINEAR2, Kind.LINEAR1),
            ):
                is_ahead = rules.waits_ahead(g, waiting, block, first, segment, segment - behind, among) == 1
                part = other >= 0, other < schedule.complete(geometry, awaited)
                if awaited is Kind.LINEAR2:
                    target = rules.h_freed_by(g, block)
                    # It lies in an earlier wave, or else the ring would not hold one.
                    where = freed[0] >= 0, freed[0] <= freed[1], freed[1] <= target, target < freed[2]
                    earlier = z3.Or(
                        z3.And(freed[2] <= before, freed[3] <= first, freed[2] <= freed[3]),
                        z3.And(freed[1] == before, freed[2] == first, freed[3] == after),
                    )
                    extra = h_holds, target >= 0, *where, earlier
                    needed = rules.number(geometry, awaited, target, other, tuple(freed))
                else:
                    extra = ()
                    needed = rules.number(geometry, awaited, block, other, wave)
                given = _given(*base, *is_one, *part, *extra, is_ahead)
                yield Obligation(
                    f"a {waiting.name.lower()} waits ahead for a {awaited.name.lower()} that comes before a "
                    f"{kind.name.lower()} of {name}",
                    None,
                    given,
                    needed < task,
                )


class _WithRings:
    """A geometry whose rings are free integers."""

    def __init__(self, geometry: Geometry) -> None:
        self.dispatch_parts, self.tiles = geometry.dispatch_parts, geometry.tiles
        self.l1_tiles, self.l2_tiles = geometry.l1_tiles, geometry.l2_tiles
        self.x_ring, self.h_ring = z3.Int("x_ring"), z3.Int("h_ring")


def ring_sizes(block_m: int, rules: Rules = RULES) -> Iterator[Obligation]:
    """`most_blocks` bounds the blocks of any experts with so many rows: by induction over the experts."""
    experts, rows, blocks, count = z3.Ints("experts rows blocks count")
    more = (count + (block_m - 1)) / block_m  # blocks of one more expert

    def bounded(b: Any, r: Any, e: Any) -> z3.BoolRef:
        return z3.And(b <= r, b * block_m <= r + e * (block_m - 1))

    given = _given(experts >= 0, rows >= 0, blocks >= 0, count >= 0, bounded(blocks, rows, experts))
    yield Obligation("one more expert", None, given, bounded(blocks + more, rows + count, experts + 1))
    yield Obligation("no expert", None, (), bounded(*(z3.IntVal(0) for _ in range(3))))
    given = _given(experts >= 0, rows >= 0, blocks >= 0, bounded(blocks, rows, experts))
    most = z3.Int("most")
    is_most = z3.Or(most == rows, most == (rows + experts * (block_m - 1)) / block_m)
    is_least = z3.And(most <= rows, most <= (rows + experts * (block_m - 1)) / block_m)
    if rules.most_blocks is schedule.most_blocks:  # min(...), which takes no Z3 terms
        given = (*given, *_given(is_most, is_least))
        yield Obligation("blocks <= most_blocks", None, given, blocks <= most)
    else:
        yield Obligation(
            "blocks <= most_blocks", None, given, blocks <= rules.most_blocks(rows, experts, block_m)
        )


# --------------------------------------------------------------------------- regions and slots
class _SymbolicSizes:
    """Sizes that are free integers within the limits; channels are whole activation blocks."""

    def __init__(self) -> None:
        self.num_ranks, self.tokens, self.topk = z3.Ints("num_ranks tokens topk")
        self.num_experts, self.block_m = z3.Ints("num_experts block_m")
        self.hidden = z3.Int("hidden_blocks") * buffer.ACTIVATION_BLOCK
        self.inter = z3.Int("inter_blocks") * buffer.ACTIVATION_BLOCK
        self.wave_experts, self.num_waves = z3.Ints("wave_experts num_waves")
        self.widened = True  # with all arrays there are


def regions(rules: Rules = RULES) -> Iterator[Obligation]:
    """Regions follow each other without overlap, aligned, for all sizes.

    Each step is proved for an arbitrary aligned start and an arbitrary array of the region's form, so the
    chain of all regions follows.
    """
    sizes = _SymbolicSizes()
    x_ring, h_ring, pool = z3.Ints("x_ring h_ring pool")
    free = [sizes.num_ranks, sizes.tokens, sizes.topk, sizes.num_experts, sizes.block_m]
    free += [sizes.wave_experts, sizes.num_waves]
    free += [z3.Int("hidden_blocks"), z3.Int("inter_blocks"), x_ring, h_ring, pool]
    start = z3.Int("start")
    given = _given(*(v > 0 for v in free), start >= 0, start % buffer.ALIGNMENT_BYTES == 0)
    for name, shape, dtype, _, _ in buffer.arrays(sizes, x_ring, h_ring, pool):
        count = z3.Int("count")
        product = buffer.region_bytes(shape, z3.IntVal(1))
        yield Obligation(f"{name}: it is not empty", None, given, product > 0)
        stop = start + count * buffer.ITEM_BYTES[dtype]
        after = rules.align(stop)
        more = (*given, *_given(count > 0))
        goal = z3.And(
            after >= stop, after % buffer.ALIGNMENT_BYTES == 0, start % buffer.ITEM_BYTES[dtype] == 0
        )
        yield Obligation(f"{name}: the next region starts behind it", None, more, goal)


def slots(rules: Rules = RULES) -> Iterator[Obligation]:
    """Rows of the combine buffers, of the inputs and of the pool are one to one, and within their arrays."""
    ranks, tokens, topk, rows = z3.Ints("ranks tokens topk rows")  # rows of a rank

    def triple(suffix: str) -> tuple[tuple[Any, ...], z3.BoolRef]:
        r, s, t = z3.Ints(f"rank{suffix} slot{suffix} token{suffix}")
        within = z3.And(r >= 0, r < ranks, s >= 0, s < topk, t >= 0, t < tokens)
        return (r, s, t), within

    a, in_a = triple("0")
    row = rules.combine_row(*a, tokens, rows)
    given = _given(ranks > 0, tokens > 0, topk > 0, in_a)
    inner = a[1] * tokens + a[2]
    yield Obligation(
        "the row is rank * rows + slot * tokens + token", None, given, row == a[0] * rows + inner
    )
    # Digits of a number: an outer one's unit is more than inner ones come to.
    u, v, low, other, unit = z3.Ints("u v low other unit")
    within = z3.And(u >= 0, v >= 0, low >= 0, low < unit, other >= 0, other < unit)
    digits = _given(within, u * unit + low == v * unit + other)
    yield Obligation("equal numbers have equal digits", None, digits, z3.And(u == v, low == other))
    yield Obligation("slot and token are below topk * tokens", None, given, inner + 1 <= topk * tokens)
    room = _given(ranks > 0, in_a, rows >= topk * tokens, low >= 0, low + 1 <= topk * tokens)
    end = a[0] * rows + low
    yield Obligation("so rows are within the buffers", None, room, z3.And(end >= 0, end < ranks * rows))


def pool(block_m: int) -> Iterator[Obligation]:
    """Rows of two experts never share a block of the pool, nor two rows of one expert a place."""
    start, blocks, count = z3.Ints("start blocks count")
    later, place, other = z3.Ints("later place other")
    given = _given(
        start >= 0,
        count >= 0,
        blocks == (count + (block_m - 1)) / block_m,
        later >= start + blocks,
        place >= 0,
        place < count,
        other >= 0,
    )
    row = buffer.pool_row(start, place, block_m)
    yield Obligation("experts do not meet", None, given, row < buffer.pool_row(later, other, block_m))
    inside = z3.And(row >= start * block_m, row < (start + blocks) * block_m)
    yield Obligation("rows stay in their expert's blocks", None, given, inside)


# --------------------------------------------------------------------------- a shared expert
def numbers(local: int, rules: Rules = RULES) -> Iterator[Obligation]:
    """Routed experts keep their ranks and have their own numbers where each rank's shared one comes first."""
    expert, other, rank = z3.Ints("expert other rank")
    given = _given(expert >= 0, other >= 0)
    moved, count = rules.shifted(expert, local), local + 1
    keeps = z3.And(moved / count == expert / local, moved % count == expert % local + 1)
    yield Obligation("an expert stays with its rank, behind the shared one", None, given, keeps)
    goal = z3.Implies(moved == rules.shifted(other, local), expert == other)
    yield Obligation("two experts have two numbers", None, given, goal)
    own = routing.shared_number(rank, local)
    goal = z3.And(own / count == rank, own % count == 0)
    yield Obligation("the shared one is its rank's first", None, _given(rank >= 0), goal)
    none = _given(expert < 0)
    yield Obligation("no expert stays none", None, none, rules.shifted(expert, local) == expert)


def steps(rules: Rules = RULES) -> Iterator[Obligation]:
    """Experts' weights follow each other without overlap, whatever their formats."""
    expert, unit = z3.Ints("expert unit")
    given = _given(expert >= 0, unit > 0)
    for name, is_mixed in (("one format", False), ("a shared expert with twice the steps", True)):
        first, after = (rules.first_step(e, unit, is_mixed=is_mixed) for e in (expert, expert + 1))
        size = weights.stages(unit, expert, is_fp8=False, is_mixed=is_mixed)
        yield Obligation(f"{name}: an expert ends where the next begins", None, given, first + size == after)
        begin = rules.first_step(z3.IntVal(0), unit, is_mixed=is_mixed)
        yield Obligation(f"{name}: the first begins at the start", None, given, begin == 0)
