"""The pipelines inside a CTA of the fused kernel, proved on the compiled IR for every routing.

What the roles of a CTA do with shared memory and mbarriers is read off the device IR (`role_follow`), with
the plan's tensors as unknown functions. Proved of it: all roles walk through the same products (`role_walk`);
each visit of a ring waits, arrives and touches memory as the transition system of `ring` says (`role_rings`),
which is proved for any number of turns; and all that is left of the kernel's accesses of shared memory is
ordered by barriers (here). An access, an mbarrier or an operation that none of these covers is UNKNOWN or
UNSUPPORTED. docs/megamoe.md has the argument.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import z3

from megamoe import ring, role_pieces, role_rings, role_sources, role_walk
from megamoe.config import (
    CONSUMERS,
    DISPATCH_FIRST,
    DISPATCHERS,
    FINISH_FIRST,
    FINISHERS,
    PIECE_ROWS,
    ROWS_WARP,
    WARP,
    WEIGHTS_WARP,
    Config,
)
from megamoe.product import ALIGNED_M, ROW_COPIES
from megamoe.ring import given, some
from megamoe.role_events import BLOCK, THREAD, Box, Event, Followed, Part
from megamoe.role_events import names as names_in
from megamoe.role_follow import follow
from megamoe.role_late import Late
from megamoe.role_terms import shared_storages, touching
from megamoe.role_walk import Meeting, Pieces, Ring, Roles
from megamoe.rows import held_rounds
from megamoe.weights import FP8_STAGES, GROUP_N, STEP_WORDS, TILE_N
from verify import ir
from verify.host import Host
from verify.ir import UnsupportedIR
from verify.properties import Claims, Issue
from verify.solve import Obligation

CLAIMS = ("walks", "stages", "sums", "places", "meetings", "barriers", "sources", "nothing-else")
PIECES = "pieces"  # the claim of kernels that widen weights
SIGNALS_COME = "signals between CTAs come (suites `order`, `protocol` and `signals`); waits for them end"
ASSUMPTIONS = (
    "integers do not wrap (property `overflow`), but for the counters of visits, whose bound is proved",
    "different arguments do not overlap; nobody else writes the plan while the kernel runs",
    "plan: `firsts` ascends from 0 to at most the pool's blocks, and `block_expert` holds experts' numbers",
    SIGNALS_COME,
    "an mbarrier's wait for a parity returns once the phase of that parity has ended, before the next has",
    "a copy's bytes count for the phase under way where it arrives, and are seen by who has waited for it",
)
_WORD_BYTES, _BF16_BYTES, _BLOCK_K = 4, 2, 128
_BITS = 8


def roles_of(config: Config) -> Roles:
    """Return the roles and rings of a kernel: what the compiled text is held against."""
    c, g = config, config.geometry
    rows, columns = c.step_shape
    held = held_rounds(c) if c.wide else 0
    places = {
        "x_tile": c.block_m * _BLOCK_K,
        "s_tile": -(-c.block_m // ALIGNED_M) * ALIGNED_M * _WORD_BYTES,
    }
    if c.widened:
        places |= {"w_tile": TILE_N * _BLOCK_K}
    else:
        places |= {
            "w_tile": rows * columns * (1 if c.fp8 else _WORD_BYTES),
            "o_tile": c.offset_words * _WORD_BYTES,
        }
    stages = Ring(
        full="full",
        empty="empty",
        counter="done",
        writers={"weights": 1 if c.widened else 2, "rows": ROW_COPIES},
        reader="consumers",
        places=places,
        bulk=True,
        prefilled="" if c.widened else "weights",
        aligned=not c.wide,
        late={"rows": Late(held, "held.1", ("held", "held.1"))} if held else {},
    )
    half = c.block_m * GROUP_N * _BF16_BYTES
    sums = Ring(
        full="handed",
        empty="taken",
        counter="products",
        writers={"consumers": 1},
        reader="finishers",
        places={"out_a": half, "out_b": half},
        bulk=False,
    )
    return Roles(
        parts=(
            Part("consumers", 0, CONSUMERS),
            Part("weights", WEIGHTS_WARP, WARP),
            Part("rows", ROWS_WARP, WARP),
            Part("wideners" if c.widened else "dispatchers", DISPATCH_FIRST, DISPATCHERS),
            Part("finishers", FINISH_FIRST, FINISHERS),
        ),
        rings=(stages, sums),
        meetings={
            "weight_tile": Meeting("finishers", c.block_m * _WORD_BYTES),
            **({"factor_tile": Meeting("consumers", TILE_N * _WORD_BYTES, sums.full)} if c.widened else {}),
        },
        waves=g.num_waves,
        ctas=c.ctas,
        ranks=c.launch_ranks,
        sources=role_sources.wanted(c, _BLOCK_K),
        ranges={"firsts": (0, c.pool_blocks), "block_expert": (0, c.num_experts - 1)},
        most_rounds=c.pool_blocks * g.tiles + 2 * c.ctas,
        most_visits=FP8_STAGES * max(c.l1_steps, c.l2_steps),
        pieces=_pieces(c) if c.widened else None,
    )


def _pieces(config: Config) -> Pieces:
    c, a_step = config, TILE_N // PIECE_ROWS

    def at(expert: z3.ArithRef, piece: z3.ArithRef) -> tuple[z3.ArithRef, z3.ArithRef]:
        """Return the step of a piece and its first row there."""
        return c.first_step(expert) + piece / a_step, piece % a_step * PIECE_ROWS

    def source(
        expert: z3.ArithRef, piece: z3.ArithRef, rank: z3.ArithRef
    ) -> Mapping[str, tuple[str, tuple[z3.ArithRef | int, ...]]]:
        step, row = at(expert, piece)
        return {"codes_tile": ("words", (0, row, step, rank)), "o_tile": ("offsets", (row, step, rank))}

    def first_target(expert: z3.ArithRef, piece: z3.ArithRef, rank: z3.ArithRef) -> z3.ArithRef:
        return (rank * c.ring_experts + expert % c.ring_experts) * c.expert_pieces + piece

    return Pieces(
        part="wideners",
        loaded="loaded",
        count="pieces",
        ahead="pieces.1",
        end="pieces.2",
        places={
            "codes_tile": PIECE_ROWS * STEP_WORDS * _WORD_BYTES,
            "o_tile": PIECE_ROWS * _WORD_BYTES,
        },
        source=source,
        target="wide_ring",
        target_bytes=PIECE_ROWS * _BLOCK_K,
        first_target=first_target,
        experts=c.num_experts,
        waves=c.geometry.num_waves,
        wave_experts=c.wave_experts,
        expert_pieces=c.expert_pieces,
    )


def names(config: Config) -> tuple[str, ...]:
    """Return the names of what is claimed of a kernel."""
    return (*CLAIMS, PIECES) if config.widened else CLAIMS


def boxes(launch: Host) -> dict[str, Box]:
    """Return the boxes of a kernel's descriptors by the names of its parameters."""
    found = {}
    for parameter, descriptor in launch.descriptors.items():
        elements = 1
        for extent in descriptor.box:
            elements *= extent
        if any(step != 1 for step in descriptor.element_strides):
            raise UnsupportedIR("a descriptor that leaves elements out")
        tensor = descriptor.tensor
        found[parameter.name] = Box(elements * tensor.dtype.bits // _BITS, tensor.data.name)
    return found


@dataclass
class Kernel:
    """What the parts of a kernel do with shared memory and mbarriers."""

    function: ir.Function
    roles: Roles
    found: dict[str, Followed]
    rings: role_rings.Rings

    @property
    def walks(self) -> dict[str, role_walk.Walk]:
        """Walks of the parts that have products."""
        return self.rings.walks


def read(function: ir.Function, copies: Mapping[str, Box], roles: Roles) -> Kernel:
    """Return what the parts of a kernel do.

    Args:
        function: device IR.
        copies: see `boxes`.
        roles: of the kernel.

    Raises:
        UnsupportedIR: something without a meaning here.
    """
    numbers = sorted(n for part in roles.parts for n in part.numbers)
    launched = {n.tag: n.extent for n in ir.walk(function.body) if isinstance(n, ir.Launch)}
    threads = launched.get("threadIdx.x")
    if not isinstance(threads, ir.Const) or numbers != list(range(int(threads.value))):
        raise UnsupportedIR("the parts are not all threads of a CTA")
    pieces = roles.pieces
    targets = () if pieces is None else (pieces.target,)
    found = {part.name: follow(function, part, copies, targets) for part in roles.parts}
    counts = _counts(found[roles.parts[0].name])
    for followed in found.values():
        followed.counts = counts
    walks = {
        name: role_walk.walk_of(roles, followed)
        for name, followed in found.items()
        if pieces is None or name != pieces.part  # whose walk is another
    }
    rings = role_rings.Rings(roles, found, {name: walk for name, walk in walks.items() if walk})
    return Kernel(function, roles, found, rings)


def _counts(found: Followed) -> dict[tuple[str, int], int]:
    counts = {}
    for event in found.events:
        if event.kind == "init":
            number, count = z3.simplify(event.first), z3.simplify(event.value)
            if not (isinstance(number, z3.IntNumRef) and isinstance(count, z3.IntNumRef)):
                raise UnsupportedIR("an mbarrier that is not initialised with a constant")
            if (event.what, number.as_long()) in counts:
                raise UnsupportedIR(f"{event.what} is initialised twice")
            counts[event.what, number.as_long()] = count.as_long()
    return counts


def claims(function: ir.Function, copies: Mapping[str, Box], roles: Roles) -> dict[str, Claims]:
    """Return what has to be proved of a kernel, by the names of `names`; arguments as of `read`.

    Where something has no meaning, all of them are UNSUPPORTED.
    """
    try:
        kernel = read(function, copies, roles)
        found, _ = covering(kernel)
    except UnsupportedIR as error:
        claimed = CLAIMS if roles.pieces is None else (*CLAIMS, PIECES)
        return {name: Claims(unsupported=[Issue(None, str(error))]) for name in claimed}
    for claim in found.values():
        claim.assumptions.extend(ASSUMPTIONS)
    return found


def covering(kernel: Kernel) -> tuple[dict[str, Claims], dict[str, set[tuple[str, int]]]]:
    """Return what has to be proved of a kernel, and the events (part, number) that each claim covers first.

    Raises:
        UnsupportedIR: something without a meaning.
    """
    roles = kernel.roles
    blocks = roles.ranges[roles.firsts][1]
    made = {
        "walks": role_walk.same_walks(roles, kernel.walks),
        "stages": _ring(kernel, roles.rings[0]),
        "sums": _ring(kernel, roles.rings[1]),
        "places": _places(kernel),
        "meetings": _meetings(kernel),
        "barriers": _barriers(kernel),
        "sources": role_sources.fetched(kernel.rings, blocks),
    }
    if roles.pieces is not None:
        own = kernel.found[roles.pieces.part]
        widening = role_pieces.Widening(roles, roles.pieces, own, kernel.rings)
        made[PIECES] = widening.obligations()
    found, covered = {}, {}
    for name, obligations in made.items():
        before = set(kernel.rings.claimed)
        found[name] = Claims(obligations=list(obligations))
        covered[name] = kernel.rings.claimed - before
    found["nothing-else"] = _nothing_else(kernel)  # knows what the others have covered
    return found, covered


def _ring(kernel: Kernel, declared: Ring) -> Iterator[Obligation]:
    slots = kernel.walks[declared.reader].found.slots(declared.full)
    yield from ring.place(ring.Steps(bulk=declared.bulk))
    yield from ring.turns(slots)
    yield from kernel.rings.ring(declared)
    yield from kernel.rings.last_waits(declared)
    if declared.prefilled:
        for obligation, filled in kernel.rings.prefilled(declared):
            if obligation is not None:
                yield obligation
            elif filled is not None:
                yield from role_walk.first_product(kernel.roles, kernel.walks[declared.prefilled], *filled)


def _places(kernel: Kernel) -> Iterator[Obligation]:
    """No two buffers, and no two places of one, share bytes."""
    sizes = {name: meeting.size for name, meeting in kernel.roles.meetings.items()}
    if kernel.roles.pieces is not None:
        pieces = kernel.roles.pieces
        slots = kernel.found[pieces.part].slots(pieces.loaded)
        sizes |= {name: slots * size for name, size in pieces.places.items()}
    for declared in kernel.roles.rings:
        slots = kernel.walks[declared.reader].found.slots(declared.full)
        sizes |= {name: slots * size for name, size in declared.places.items()}
        filled = [
            {e.what for e in kernel.walks[name].events() if e.what in declared.places}
            for name in declared.writers
        ]
        apart = z3.BoolVal(sum(map(len, filled)) == len(set().union(*filled)))
        yield Obligation(f"writers of {declared.full} have buffers of their own", None, (), apart)
    total = next(
        n.buffer.shape[0]
        for n in ir.walk(kernel.function.body)
        if isinstance(n, ir.Alloc) and n.buffer.scope == "shared.dyn"
    )
    at = {name: first for data, (name, first) in shared_storages(kernel.function).items() if name in sizes}
    known = z3.BoolVal(at.keys() == sizes.keys() and isinstance(total, ir.Const))
    yield Obligation("every declared buffer is there", None, (), known)
    spans = sorted((first, first + sizes[name], name) for name, first in at.items())
    for (_, end, name), (first, _, other) in pairwise(spans):
        yield Obligation(f"{name} ends before {other}", None, (), z3.BoolVal(end <= first))
    inside = z3.BoolVal(bool(spans) and isinstance(total, ir.Const) and spans[-1][1] <= int(total.value))
    yield Obligation("all lie in the CTA's shared memory", None, (), inside)


# --------------------------------------------------------------------------- barriers
def _barriers(kernel: Kernel) -> Iterator[Obligation]:
    """Mbarriers are initialised before all else; each named barrier is of one part, and all of it comes."""
    users: dict[str, set[str]] = {}
    together = []
    for part in kernel.roles.parts:
        found = kernel.found[part.name]
        syncs = [e for e in found.events if e.kind == "sync"]
        whole = [e for e in syncs if e.what in ("0", "grid")]
        together.append([e.what for e in whole])
        begins = min(
            (e.at for e in found.events if e.loops and e.kind != "arrive" and e.kind != "copy"), default=0
        )
        plain = all(not e.path and not e.loops and not e.elected for e in whole)
        first = bool(whole) and whole[0].what == "0"
        yield Obligation(
            f"{part.name}: barriers of the CTA stand alone", None, (), z3.BoolVal(plain and first)
        )
        early = [e for e in found.events if whole and e.at < whole[0].at and e.kind not in ("init", "fence")]
        yield Obligation(f"{part.name}: nothing before mbarriers are there", None, (), z3.BoolVal(not early))
        late = all(e.at < begins for e in whole) if begins else True
        yield Obligation(f"{part.name}: none behind the parting of roles", None, (), z3.BoolVal(late))
        for event in syncs:
            if event in whole:
                continue
            users.setdefault(event.what, set()).add(part.name)
            terms = [*event.path, *(x for loop in event.loops for x in (loop.start, loop.extent))]
            comes = found.is_uniform(*terms) and not event.elected and event.value == part.threads
            what = f"{part.name}: all {part.threads} threads come to barrier {event.what}"
            yield Obligation(what, event.span, (), z3.BoolVal(comes))
    yield Obligation("all threads meet alike", None, (), z3.BoolVal(all(t == together[0] for t in together)))
    for number, parts in users.items():
        yield Obligation(f"barrier {number} is of one role", None, (), z3.BoolVal(len(parts) == 1))
    yield from _initialised(kernel)
    tree = z3.BoolVal(is_forest([declared.parts for declared in kernel.roles.rings]))
    yield Obligation("no two ways from one role to another by rings", None, (), tree)


def is_forest(groups: list[tuple[str, ...]]) -> bool:
    """Return whether the ways between names, through groups that they share, form no circle.

    A wait in a ring is for earlier visits of it. If rings are a forest, what a role waits for through others
    comes back to it by the ring that it left by, to an earlier visit: nobody waits in a circle.
    """
    sets: list[set[str]] = []
    for group in groups:
        touched = [s for s in sets if s & set(group)]
        if any(len(s & set(group)) > 1 for s in touched):
            return False
        sets = [s for s in sets if s not in touched] + [set(group).union(*touched)]
    return True


def _arrays(roles: Roles) -> set[str]:
    """Return the names of all arrays of mbarriers."""
    rings = {a for r in roles.rings for a in (r.full, r.empty)}
    return rings if roles.pieces is None else rings | {roles.pieces.loaded}


def _initialised(kernel: Kernel) -> Iterator[Obligation]:
    arrays = _arrays(kernel.roles)
    own = kernel.found[kernel.roles.parts[0].name]
    counts = own.counts
    for array in sorted({name for name, _ in counts} | arrays):
        numbers = sorted(number for name, number in counts if name == array)
        is_known = array in arrays and bool(numbers) and numbers == list(range(len(numbers)))
        yield Obligation(f"each {array} is initialised, and of a ring", None, (), z3.BoolVal(is_known))
    for declared in kernel.roles.rings:
        same = own.slots(declared.full) == own.slots(declared.empty)
        yield Obligation(f"as many {declared.full} as {declared.empty}", None, (), z3.BoolVal(same))
    inits = [e for e in own.events if e.kind == "init"]
    sync = next((e.at for e in own.events if e.kind == "sync"), -1)
    fence = [e.at for e in own.events if e.kind == "fence" and not e.path and not e.elected and not e.loops]
    one = all(e.elected and not e.path and not e.loops for e in inits)
    seen = bool(inits) and any(inits[-1].at < f < sync for f in fence)
    yield Obligation(
        "one thread initialises, a fence and a barrier behind", None, (), z3.BoolVal(one and seen)
    )
    others = [e for name, f in kernel.found.items() if f is not own for e in f.events if e.kind == "init"]
    yield Obligation("no other thread does", None, (), z3.BoolVal(not others))
    for found in kernel.found.values():
        kernel.rings.claim(found.part.name, *(e for e in found.events if e.kind in ("init", "sync", "fence")))


# --------------------------------------------------------------------------- other shared memory
def _meetings(kernel: Kernel) -> Iterator[Obligation]:
    """Accesses of a buffer that a part has to itself: its threads meet between two of which one writes."""
    for buffer, meeting in kernel.roles.meetings.items():
        name, size = meeting.part, meeting.size
        walk = kernel.walks[name]
        events = walk.events()
        touched = [e for e in events if e.what == buffer and e.kind in ("read", "write")]
        syncs = [e for e in events if e.kind == "sync" and e.loops == (walk.segment, walk.turn)]
        for a in touched:
            inside = z3.And(a.first >= 0, a.last < size)
            yield Obligation(f"{a.kind} of {buffer} inside it", a.span, given(*a.ranges, a.guard), inside)
            for b in touched:
                if "write" in (a.kind, b.kind):
                    yield from _ordered(walk, a, b, syncs, buffer, in_two=not meeting.ring)
        if meeting.ring:
            (declared,) = (r for r in kernel.roles.rings if r.full == meeting.ring)
            yield from kernel.rings.within(declared, walk, touched)
        kernel.rings.claim(name, *touched)


def _ordered(
    walk: role_walk.Walk, a: Event, b: Event, syncs: list[Event], buffer: str, *, in_two: bool
) -> Iterator[Obligation]:
    """One thread's `a` and another's `b`, in one product and, if asked for, in two."""
    what, known = f"{a.kind} and {b.kind} of {buffer}", (*a.ranges, a.guard)
    if a.at <= b.at:
        of_other = _Another(walk, b, is_later=False)
        both = given(*known, *map(of_other, (*b.ranges, b.guard)), of_other(THREAD) != THREAD)
        between = [s.guard for s in syncs if a.at < s.at < b.at]
        # In the same interval: no byte of two threads.
        apart = z3.Or(a.last < of_other(b.first), of_other(b.last) < a.first)
        yield Obligation(f"{what} in a product", a.span, both, some(*between) if between else apart)
    if not in_two:
        return
    later = _Another(walk, b, is_later=True)
    behind = [s.guard for s in syncs if s.at > a.at]
    before = [later(s.guard) for s in syncs if s.at < b.at]
    both = given(*known, *map(later, (*b.ranges, b.guard)))
    meets = some(*behind, *before) if behind or before else z3.BoolVal(False)
    yield Obligation(f"{what} in two products", a.span, both, meets)


class _Another:
    """Terms as another thread has them: in the same product, or in a later one.

    Of the same product threads have the same symbols for what is the same in all of them, but not what a
    round of an inner loop changes: they need not be in the same round.
    """

    def __init__(self, walk: role_walk.Walk, event: Event, *, is_later: bool) -> None:
        self.found, self.is_later = walk.found, is_later
        self.kept = {str(BLOCK)} if is_later else {str(BLOCK), str(walk.segment.var), str(walk.turn.var)}
        self.inner = {name for loop in event.loops[2:] for name in loop.entry}

    def __call__(self, term: Any) -> Any:
        """Return the term."""
        changed = [n for n in sorted(names_in(term)) if not self._is_same(n)]
        return z3.substitute(term, *((z3.Int(n), z3.Int(f"{n} of another")) for n in changed))

    def _is_same(self, name: str) -> bool:
        if self.is_later or name in self.kept:
            return name in self.kept
        variable, _, is_symbol = name.partition("!")
        is_counter = variable == "round" and bool(is_symbol)
        return not is_counter and variable not in self.inner and self.found.is_uniform(z3.Int(name))


def _nothing_else(kernel: Kernel) -> Claims:
    """Every operation on shared memory or an mbarrier is one of those that are proved."""
    left: list[Issue] = []
    places = {n for r in kernel.roles.rings for n in r.places} | set(kernel.roles.meetings)
    if kernel.roles.pieces is not None:
        places |= set(kernel.roles.pieces.places)
    seen: set[int] = set().union(*(f.seen for f in kernel.found.values()))
    for node, name in touching(kernel.function):
        if id(node) not in seen:
            left.append(Issue(None, f"an access of {name} that no role makes"))
    for name, found in kernel.found.items():
        for event in found.events:
            if (name, event.at) not in kernel.rings.claimed:
                left.append(Issue(event.span, f"{name}: {event.kind} of {event.what} is not covered"))
    for what in sorted({name for name, _ in shared_storages(kernel.function).values()}):
        if what not in places | _arrays(kernel.roles) and not what.startswith("buf_"):
            left.append(Issue(None, f"{what} is in shared memory, and not declared"))
    goal = Obligation("every access and mbarrier is covered", None, (), z3.BoolVal(not left))
    return Claims(obligations=[] if left else [goal], unknown=left)
