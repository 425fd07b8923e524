"""The signals between CTAs of the fused kernel, proved on the compiled IR for every routing.

What the roles of a CTA do with words and tensors that other CTAs see is read off the device IR
(`signal_follow`), with the plan's tensors as unknown functions. Proved of it: each round of a role's loops is
the task that `schedule` says (`signal_rounds`); it waits for the words and values that this task waits for,
before it touches anything, and signals the task once, behind all that it did (`signal_tasks`); what it writes
are all elements of the task's place, once each (`signal_places`); and outputs are added behind the meeting of
all ranks (`signal_end`). With what is proved of the schedule, here for the kernel's own sizes, all accesses
of a place by different CTAs are ordered, and no wait is for ever: docs/megamoe.md has the argument.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import z3

from megamoe import (
    obligations,
    role_rings,
    role_walk,
    roles_proof,
    schedule,
    signal_places,
    signal_tasks,
    signal_widen,
)
from megamoe.config import DISPATCH_FIRST, FINISH_FIRST, ROWS_WARP, THREADS, WEIGHTS_WARP, Config
from megamoe.quotients import parted
from megamoe.ring import every, given, how_many
from megamoe.role_events import Box, Event, Followed
from megamoe.role_walk import Roles, Walk
from megamoe.rows import held_rounds
from megamoe.schedule import Kind
from megamoe.signal_end import final
from megamoe.signal_follow import EPOCHS, STATUS, follow
from megamoe.signal_rounds import Nest, Plan
from megamoe.signal_tasks import COUNTED
from verify import ir
from verify.encode import Hypothesis
from verify.ir import UnsupportedIR
from verify.properties import Claims, Issue
from verify.solve import Obligation

WIDENED = "widened"  # the claim of kernels that widen weights
CLAIMS = ("order", "tasks", "dispatch", "rows", "finishers", "places", "counters", "end", "nothing-else")
ROLES_DO = "roles of a CTA do for each other what suite `roles` says"
ASSUMPTIONS = (
    "integers do not wrap (property `overflow`)",
    "different arguments do not overlap; nobody else writes the plan while the kernel runs",
    "plan: `firsts` ascends from 0 to at most the pool's blocks, its first two elements are 0, its last two "
    "are equal; a block's expert is of its wave; `block_expert` and `row_target` hold experts' and rows' "
    "numbers; targets differ",
    "plan: blocks of a wave, and of two that follow each other, are no more than the rings hold (suite "
    "`order`, `rings`; a token chooses an expert once)",
    "a wait that is given up says so in `status`, and the launch's outputs are void",
    ROLES_DO,
    "CTAs are resident together",
    "a release, and what is before it in its thread or before a barrier that this thread has passed, is seen "
    "by who has acquired what it wrote, and behind a barrier by who meets that thread; by bulk copies behind "
    "a proxy fence",
)
RINGS = ("x_ring", "x_ring_scale", "h_ring", "h_ring_scale", "wide_ring")
_HELD = ("held.1", "held.2", "held.3")  # of the product before: its kind, segment, number in the segment


def names(config: Config) -> tuple[str, ...]:
    """Return the names of what is claimed of a kernel."""
    return (*CLAIMS, WIDENED) if config.widened else CLAIMS


@dataclass
class Kernel:
    """What the parts of a kernel do with what other CTAs see."""

    plan: Plan
    found: dict[str, Followed]
    walks: dict[str, Walk]
    claimed: set[tuple[str, int]] = field(default_factory=set)

    @property
    def config(self) -> Config:
        """Of the kernel."""
        return self.plan.config

    def claim(self, part: str, *events: Event) -> None:
        """Note that something is proved of events of a part."""
        self.claimed |= {(part, e.at) for e in events}

    def nest(self, name: str, leader: int, extra: tuple[Hypothesis, ...] = ()) -> Nest:
        """Return the loops over a part's products; `leader` waits and signals for its threads."""
        walk = self.walks[name]
        return Nest(self.plan, walk.found, walk.segment, walk.turn, Kind.LINEAR1, leader, extra)

    def dispatches(self) -> list[Nest]:
        """Return where tasks of dispatch are done."""
        found = []
        for name, leader in (("consumers", 0), ("dispatchers", DISPATCH_FIRST)):
            if name not in self.found:
                continue
            loops = signal_tasks.dispatch_nest(self.found[name])
            if loops is not None:
                found.append(Nest(self.plan, self.found[name], *loops, kind=Kind.DISPATCH, leader=leader))
        return found


def read(function: ir.Function, copies: Mapping[str, Box], config: Config) -> Kernel:
    """Return what the parts of a kernel do; arguments and errors as of `claims`."""
    roles = _roles(config)
    numbers = sorted(n for part in roles.parts for n in part.numbers)
    launched = {n.tag: n.extent for n in ir.walk(function.body) if isinstance(n, ir.Launch)}
    threads = launched.get("threadIdx.x")
    if not isinstance(threads, ir.Const) or numbers != list(range(int(threads.value))):
        raise UnsupportedIR("the parts are not all threads of a CTA")
    found = {part.name: follow(function, part, copies) for part in roles.parts}
    walks = {
        name: role_walk.walk_of(roles, followed)
        for name, followed in found.items()
        if name != signal_widen.PART  # whose walk is another
    }
    return Kernel(Plan(config, roles), found, {name: walk for name, walk in walks.items() if walk})


def _roles(config: Config) -> Roles:
    roles = roles_proof.roles_of(config)
    targets = (-1, config.num_ranks * config.combine_rows - 1)
    return replace(roles, ranges={**roles.ranges, "row_target": targets})


def claims(function: ir.Function, copies: Mapping[str, Box], config: Config) -> dict[str, Claims]:
    """Return what has to be proved of a kernel, by the names of `names`.

    Args:
        function: device IR.
        copies: see `roles_proof.boxes`.
        config: of the kernel.

    Where something has no meaning, all of them are UNSUPPORTED.
    """
    try:
        found, _ = covering(read(function, copies, config))
    except UnsupportedIR as error:
        return {name: Claims(unsupported=[Issue(None, str(error))]) for name in names(config)}
    for claim in found.values():
        claim.assumptions.extend(ASSUMPTIONS)
    return found


def covering(kernel: Kernel) -> tuple[dict[str, Claims], dict[str, set[tuple[str, int]]]]:
    """Return what has to be proved of a kernel, and the events (part, number) that each claim covers first.

    Raises:
        UnsupportedIR: something without a meaning.
    """
    config = kernel.config
    made = {
        "order": _order(config),
        "tasks": _tasks(kernel),
        "dispatch": _dispatch(kernel),
        "rows": _rows(kernel),
        "finishers": _finishers(kernel),
        "places": _places(kernel),
        "counters": _counters(kernel),
        "end": _end(kernel),
    }
    if config.widened:
        made[WIDENED] = _widened(kernel)
    found, covered = {}, {}
    for name, each in made.items():
        before = set(kernel.claimed)
        found[name] = Claims(obligations=list(each))
        covered[name] = kernel.claimed - before
    found["nothing-else"] = _nothing_else(kernel)  # knows what the others have covered
    return found, covered


# --------------------------------------------------------------------------- the schedule, at these sizes
def _order(config: Config) -> Iterator[Obligation]:
    """What suite `order` says of the schedule, for the kernel's own numbers of tiles and CTAs; places."""
    g = config.geometry
    yield from obligations.order(g)
    yield from obligations.waits(g)
    yield from obligations.ahead(g)
    yield from obligations.shares(config.ctas)
    block, later, rank, other = z3.Ints("block later rank other")
    place, turn, next_turn = z3.Ints("place turn next_turn")
    pool = config.pool_blocks
    for name, slot, freed, places in (
        ("x_ring", schedule.x_slot, schedule.x_freed_by, g.x_ring),
        ("h_ring", schedule.h_slot, schedule.h_freed_by, g.h_ring),
    ):
        # Any two blocks in one place, written as whole turns of the ring and the place.
        one, another = places * turn + place, places * next_turn + place
        after = given(place >= 0, place < places, turn >= 0, another > one)
        last = freed(g, another)
        # By induction over such blocks all of `one` is done before `another` has its place.
        before = z3.And(slot(g, one) == place, last >= one, slot(g, last) == place)
        yield Obligation(f"{name}: who has a place waits for who had it", None, after, parted(before))
        none = given(block >= 0, freed(g, block) < 0)
        first = z3.And(slot(g, block) == block, block < places)
        yield Obligation(f"{name}: who waits for nobody is the first in its place", None, none, first)
    in_pool = given(block >= 0, block < pool, later >= 0, later < pool, rank >= 0, other >= 0)
    apart = given(rank * pool + block == other * pool + later)
    own = z3.And(rank == other, block == later)
    yield Obligation("blocks have words of their own", None, (*in_pool, *apart), own)
    waves = _waves(config)
    yield from waves


def _waves(config: Config) -> Iterator[Obligation]:
    """A block is of one wave: the plan's waves begin at 0, and follow each other."""
    roles, block = _roles(config), z3.Int("block")
    count = config.geometry.num_waves
    firsts = [roles.first(z3.IntVal(n)) for n in range(count + 3)]
    rises = [a <= b for a, b in pairwise(firsts)]
    known = given(firsts[0] == 0, firsts[1] == 0, *rises, block >= 0, block < firsts[count + 1])
    of = [z3.And(firsts[w + 1] <= block, block < firsts[w + 2]) for w in range(count)]
    yield Obligation("each block is of one wave", None, known, how_many(of) == 1)


def _tasks(kernel: Kernel) -> Iterator[Obligation]:
    """Roles' rounds are the tasks of `schedule`, and every wave is dispatched once."""
    leaders = {"consumers": 0, "weights": WEIGHTS_WARP, "rows": ROWS_WARP, "finishers": FINISH_FIRST}
    for name in kernel.walks:
        if name not in leaders:
            raise UnsupportedIR(f"{name}: mbarriers in loops of a role that has no products")
        nest = kernel.nest(name, leaders[name])
        yield from nest.rounds()
        yield _segments(nest, 0, kernel.config.geometry.num_waves + 1)
    wave, nests = z3.Int("wave"), kernel.dispatches()
    done = []
    for nest in nests:
        yield from nest.rounds()
        path = every(z3.BoolVal(True), *nest.segment.path, *nest.turn.path)
        own = z3.substitute(z3.And(path, nest.segment.range), (nest.segment.var, wave))
        done.append(own)
        walk = kernel.walks.get(nest.name)
        if walk is not None:  # tasks of a role ascend
            first = max(e.at for e in nest.events("add")) < min(e.at for e in walk.events())
            ascends = z3.BoolVal(walk.segment is nest.segment and first)
            yield Obligation(f"{nest.name}: a wave is dispatched before the one before", None, (), ascends)
    waves = given(wave >= 0, wave < kernel.config.geometry.num_waves)
    yield Obligation("each wave is dispatched by one role", None, waves, how_many(done) == 1)


def _segments(nest: Nest, start: int, count: int) -> Obligation:
    plain = z3.BoolVal(not nest.segment.path and not nest.turn.path)
    same = z3.And(plain, nest.segment.start == start, nest.segment.extent == count)
    return Obligation(f"{nest.name}: all segments", None, (), same)


# --------------------------------------------------------------------------- roles
def _dispatch(kernel: Kernel) -> Iterator[Obligation]:
    for nest in kernel.dispatches():
        puts = nest.events("put")
        if nest.events("copy", "get"):
            raise UnsupportedIR(f"{nest.name}: it copies or reads what others write while it dispatches")
        yield from signal_tasks.waits(nest, puts)
        yield from signal_tasks.signals(nest, (Kind.DISPATCH,))
        for put in puts:
            yield signal_tasks.behind(nest, put, Kind.DISPATCH)
        kernel.claim(nest.name, *nest.events("poll", "add", "max"))


def _rows(kernel: Kernel) -> Iterator[Obligation]:
    walk = kernel.walks["rows"]
    late = bool(kernel.config.wide and held_rounds(kernel.config))
    nest = kernel.nest("rows", ROWS_WARP)
    copies = [e for e in walk.found.events if e.kind == "copy" and e.source in RINGS]
    own, before = [e for e in nest.events("copy") if e.source in RINGS], []
    if late:
        stages = kernel.plan.roles.rings[0]
        rings = role_rings.Rings(kernel.plan.roles, kernel.found, kernel.walks)
        pieces = rings.late_visits(stages, walk, stages.late["rows"])
        before = list(pieces[0].copies)
        own = [e for e in own if e.at not in {b.at for b in before}]
        if {e.at for e in (*pieces[0].copies, *pieces[1].copies, *pieces[2].copies)} != {
            e.at for e in copies
        }:
            raise UnsupportedIR("rows: copies that are no visit's")
        yield from signal_tasks.nothing_before(walk, _HELD)
        entry = walk.turn.entry
        invariant = given(z3.Or(entry[_HELD[0]] > 0, entry[_HELD[1]] == -2))
        nest = replace(nest, extra=invariant)
    elif any(not walk.holds(e) for e in copies):
        raise UnsupportedIR("rows: copies behind the walk")
    if not own:
        raise UnsupportedIR("rows: no copies of a product")
    yield from signal_tasks.waits(nest, own)
    if late:
        polls = [p for p in nest.events("poll") if p.at < max(e.at for e in before)]
        yield from signal_tasks.ahead(walk, nest, polls, _HELD)
    if nest.events("put", "get", "add", "store"):
        raise UnsupportedIR("rows: it touches what others see")
    kernel.claim("rows", *copies, *nest.events("poll", "max"))


def _finishers(kernel: Kernel) -> Iterator[Obligation]:
    nest, sums = kernel.nest("finishers", FINISH_FIRST), kernel.plan.roles.rings[1]
    if nest.events("poll", "get", "copy"):
        raise UnsupportedIR("finishers: they wait for other CTAs")
    others = 1 if kernel.config.widened else 0  # `_widened`
    yield from signal_tasks.signals(nest, (Kind.LINEAR1, Kind.LINEAR2), others=others)
    for add in nest.events("add"):  # by then the product's rows have been read
        yield signal_tasks.handed(nest, add, sums.full)
    yield _handed_over(kernel)
    for put in nest.events("put"):
        kind = Kind.LINEAR2 if put.what == "combine" else Kind.LINEAR1
        yield signal_tasks.handed(nest, put, sums.full)
        yield signal_tasks.behind(nest, put, kind)
        if put.what == "combine":
            yield signal_tasks.released(nest, put, sums.empty)
    kernel.claim("finishers", *(e for e in nest.events("add", "max") if e.what != signal_widen.WORDS))


def _widened(kernel: Kernel) -> Iterator[Obligation]:
    """Weights of the ring are there before they are copied, and read before they are widened over."""
    walk, sums = kernel.walks["weights"], kernel.plan.roles.rings[1]
    nest = signal_widen.with_experts(kernel.nest("weights", WEIGHTS_WARP))
    yield from signal_widen.fetched(walk, nest)
    kernel.claim("weights", *nest.events("poll", "max", "copy"))
    nest = signal_widen.with_experts(kernel.nest("finishers", FINISH_FIRST))
    yield from signal_widen.counted(nest, sums.full)
    kernel.claim("finishers", *(e for e in nest.events("add") if e.what == signal_widen.WORDS))
    obligations_, covered = signal_widen.widening(kernel.plan, kernel.found[signal_widen.PART])
    yield from obligations_
    kernel.claim(signal_widen.PART, *covered)


def _handed_over(kernel: Kernel) -> Obligation:
    """Consumers have read all stages of a product when they hand it over."""
    stages, sums = kernel.plan.roles.rings
    events = kernel.walks["consumers"].events()
    over = [e.at for e in events if e.kind == "arrive" and e.what == sums.full]
    of_stages = {stages.full, stages.empty, *stages.places}
    reads = [e.at for e in events if e.kind in ("wait", "arrive", "read", "tensor") and e.what in of_stages]
    behind = bool(over) and bool(reads) and max(reads) < min(over)
    return Obligation("consumers: a product is handed over behind its stages", None, (), z3.BoolVal(behind))


# --------------------------------------------------------------------------- what tasks write
def _places(kernel: Kernel) -> Iterator[Obligation]:
    nests = [*kernel.dispatches(), kernel.nest("finishers", FINISH_FIRST)]
    for nest in nests:
        puts: dict[str, list[Event]] = {}
        for put in nest.events("put"):
            puts.setdefault(put.what, []).append(put)
        is_dispatch = nest.kind is Kind.DISPATCH
        wanted = ("x_ring", "x_ring_scale") if is_dispatch else ("h_ring", "h_ring_scale", "combine")
        if set(puts) != set(wanted):
            raise UnsupportedIR(f"{nest.name}: it writes {', '.join(sorted(puts))}")
        for tensor in wanted:
            writes = signal_places.row_writes if tensor == "combine" else signal_places.ring_writes
            yield from writes(nest, tensor, puts[tensor])
            kernel.claim(nest.name, *puts[tensor])


def counters(config: Config) -> dict[str, int]:
    """Return how many words of a rank each counter has that a launch begins with at zero."""
    sizes = dict.fromkeys(COUNTED.values(), config.pool_blocks)
    return {**sizes, signal_widen.WORDS: config.widened_words} if config.widened else sizes


def _counters(kernel: Kernel) -> Iterator[Obligation]:
    """Counters are put to zero before all CTAs meet; whatever else others see comes behind that."""
    seen = ("poll", "add", "store", "max", "put", "get")
    early: dict[str, list[Event]] = {}
    sizes = counters(kernel.config)
    for name, found in kernel.found.items():
        meets = [e.at for e in found.events if e.kind == "sync" and e.what == "grid"]
        plain = [
            e for e in found.events if e.kind == "sync" and e.what == "grid" and not e.path and not e.loops
        ]
        once = z3.BoolVal(len(meets) == len(plain) == 1)
        yield Obligation(f"{name}: all CTAs meet once before the roles part", None, (), once)
        end = meets[0] if meets else -1
        early[name] = [e for e in found.events if e.kind in seen and e.at < end]
        wrong = [e for e in early[name] if e.kind != "put" or e.what not in sizes]
        nothing = z3.BoolVal(not wrong)
        yield Obligation(f"{name}: nothing else that others see before", None, (), nothing)
        copied = [e for e in found.events if e.kind == "copy" and e.source in RINGS and e.at < end]
        yield Obligation(f"{name}: no rows are copied before", None, (), z3.BoolVal(not copied))
        kernel.claim(name, *early[name])
    for tensor, words in sizes.items():
        parts = [
            (part.numbers, [e for e in early[part.name] if e.what == tensor])
            for part in kernel.plan.roles.parts
        ]
        yield from signal_places.zeroed(kernel.config, tensor, words, parts, THREADS)


def _end(kernel: Kernel) -> Iterator[Obligation]:
    walk, found = kernel.walks["consumers"], kernel.found["consumers"]
    begins = max(e.at for e in walk.events())
    obligations_, covered = final(kernel.plan, found, begins)
    yield from obligations_
    # Before they meet the others, what finishers wrote of the last product has been written.
    sums = kernel.plan.roles.rings[1]
    syncs = [e.at for e in found.events if e.at > begins and e.kind == "sync"]
    last = [
        e
        for e in found.events
        if begins < e.at < min(syncs) and e.kind == "wait" and e.what == sums.empty and not e.loops
    ]
    total = walk.segment.after[sums.counter]
    waits = z3.Or(*(every(z3.BoolVal(True), *e.path) for e in last)) if last else z3.BoolVal(False)
    what = "consumers wait until their last product's outputs are written"
    yield Obligation(what, None, given(total >= 1), waits)
    for event in last:
        turn = z3.And(event.first == 0, event.value == (total + 1) % 2)
        yield Obligation(f"{what}: of that product", event.span, given(total >= 1), turn)
    kernel.claim("consumers", *covered)


def _nothing_else(kernel: Kernel) -> Claims:
    """All that a role does with words and tensors that others see is what is proved."""
    left: list[Issue] = []
    for name, found in kernel.found.items():
        for event in found.events:
            seen = event.kind in ("poll", "add", "store", "max", "put", "get")
            copied = event.kind == "copy" and event.source in (*RINGS, "combine", EPOCHS, STATUS)
            if (seen or copied) and (name, event.at) not in kernel.claimed:
                left.append(Issue(event.span, f"{name}: {event.kind} of {event.what} is not covered"))
    goal = Obligation("every access that others see is covered", None, (), z3.BoolVal(not left))
    return Claims(obligations=[] if left else [goal], unknown=left)
