"""What is read of a CTA's shared memory in the fused kernel has been filled: every byte of it, once.

The suites `roles` prove that whoever reads a place of a ring is in its turn, behind all that fill it. Here
is how much of a place that is: a copy fills it from its first byte on, a read of a stage lies in what is
copied for its product's visit, and threads that fill a place, or a buffer that their role has to itself,
write each byte of it once in every product. Where a byte is one thread's alone, no two of them race for it.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import z3

from megamoe import role_sources
from megamoe.ring import every, given, some
from megamoe.role_events import Event, Followed, names
from megamoe.role_rings import Rings
from megamoe.role_walk import Pieces, Ring, Roles, Walk
from megamoe.signal_places import of_lanes, values
from verify.ir import UnsupportedIR
from verify.solve import Obligation

_ACCESSES = ("read", "tensor")
_TRUE = z3.BoolVal(True)


def filled(rings: Rings, blocks: int) -> Iterator[Obligation]:
    """Yield what has to be proved of every read of shared memory.

    Args:
        rings: what the parts of a kernel do.
        blocks: of a rank's pool.

    Raises:
        UnsupportedIR: a place that is filled in a way without a meaning here.
    """
    roles = rings.roles
    for ring in roles.rings:
        if ring.bulk:
            yield from _copied(rings, ring, blocks)
            continue
        for name in ring.writers:
            for buffer, size in ring.places.items():
                yield from _written(roles, rings.walks[name], buffer, size)
    for buffer, meeting in roles.meetings.items():
        walk = rings.walks[meeting.part]
        yield from _written(roles, walk, buffer, meeting.size)
        reads = [e.at for e in walk.found.events if e.what == buffer and e.kind == "read"]
        writes = [e.at for e in walk.events() if e.what == buffer and e.kind == "write"]
        behind = z3.BoolVal(bool(reads) and bool(writes) and max(writes) < min(reads))
        yield Obligation(f"{buffer} is read behind all that is written of it", None, (), behind)
    if roles.pieces is not None:
        yield from _pieces(roles.pieces, rings.found[roles.pieces.part])


def _at_begin(copy: Event, size: int, slots: int, known: Sequence[z3.BoolRef]) -> Obligation:
    """A copy begins at the first byte of the place whose mbarrier it arrives at.

    That mbarrier is one of the ring's (`roles`: the wait's place), which is all that has to be known of its
    number where the copy's first byte follows from that alone.
    """
    what = f"a copy to {copy.what} begins where its place does"
    place, number = z3.Int("place"), copy.barrier[1]
    # The follower simplifies where a copy goes, but not its mbarrier's number.
    first = z3.substitute(z3.simplify(copy.first), (z3.simplify(number), place))
    if not z3.is_int_value(z3.simplify(number)) and names(first) <= {str(place)}:
        in_ring = given(place >= 0, place < slots)
        return Obligation(what, copy.span, in_ring, first == place * size)
    hold = given(*known, *copy.ranges, copy.guard)
    return Obligation(what, copy.span, hold, copy.first == number * size)


# --------------------------------------------------------------------------- rings of copies
def _copied(rings: Rings, ring: Ring, blocks: int) -> Iterator[Obligation]:
    sizes: dict[str, int] = {}
    for found in rings.found.values():
        for copy in found.events:
            if copy.kind == "copy" and copy.what in ring.places and copy.barrier[0] == ring.full:
                sizes[copy.what] = min(copy.value, sizes.get(copy.what, copy.value))
                slots = rings.walks[ring.reader].found.slots(ring.full)
                yield _at_begin(copy, ring.places[copy.what], slots, (rings.roles.launched,))
    walk = rings.walks[ring.reader]
    pieces, product = rings.visits(ring, walk), role_sources.product_of(rings.roles, walk, blocks)
    for event in walk.events():
        if event.what not in ring.places or event.kind not in _ACCESSES:
            continue
        around = [p for p in pieces if event.loops[: len(p.around)] == p.around]
        inside = []
        for piece in around:
            for visit in piece.each():
                wants = rings.roles.sources[event.what](product, visit.number - piece.count).values()
                place = visit.wait.first * ring.places[event.what]
                inside.append(
                    z3.And(
                        rings.inside(ring, piece, visit, event),
                        event.last < place + sizes.get(event.what, 0),
                        some(*(want.when for want in wants)),
                    )
                )
        known = {k for p in around for k in p.known() if not z3.eq(k, p.base)}
        what = f"{walk.name}: {event.kind} of {event.what} of what is copied for its visit"
        hold = given(*sorted(known, key=z3.AstRef.get_id), *event.ranges, event.guard)
        goal = some(*inside) if inside else z3.BoolVal(False)
        yield Obligation(what, event.span, (*hold, *rings.roles.in_range(product.expert)), goal)


# --------------------------------------------------------------------------- places that threads fill
def _written(roles: Roles, walk: Walk, buffer: str, size: int) -> Iterator[Obligation]:
    """Threads of a part write each byte of a buffer once in a product."""
    writes = [e for e in walk.found.events if e.what == buffer and e.kind == "write"]
    yield Obligation(f"{walk.name}: {buffer} is written", None, (), z3.BoolVal(bool(writes)))
    seen = []
    for write in writes:
        if not walk.holds(write) or write.elected:
            raise UnsupportedIR(f"{walk.name}: {buffer} is not written by all in a product")
        lanes, others = of_lanes(write)
        product = (*walk.round(), walk.has_product)
        what = f"{walk.name}: {buffer} is written in every product"
        yield Obligation(what, write.span, given(*product, *write.ranges, *lanes), every(_TRUE, *others))
        length = z3.simplify(write.last - write.first + 1)
        if not isinstance(length, z3.IntNumRef):
            raise UnsupportedIR(f"{walk.name}: a write of {buffer} of unknown size")
        (first,) = values(walk.found, write, [cast(z3.ArithRef, z3.simplify(write.first))])
        seen.append((first[:, None] + np.arange(length.as_long())).ravel())
    whole = bool(seen) and np.array_equal(np.sort(np.concatenate(seen)), np.arange(size))
    yield Obligation(f"{walk.name}: every byte of {buffer} is written, once", None, (), z3.BoolVal(whole))


# --------------------------------------------------------------------------- pieces of weights
def _pieces(pieces: Pieces, found: Followed) -> Iterator[Obligation]:
    """Copies of pieces fill their places; that what is read lies there is `role_pieces`'."""
    copies = [e for e in found.events if e.kind == "copy" and e.barrier[0] == pieces.loaded]
    for copy in copies:
        whole = z3.BoolVal(copy.value == pieces.places.get(copy.what))
        yield Obligation(f"a copy to {copy.what} is a whole place", copy.span, (), whole)
        yield _at_begin(copy, pieces.places.get(copy.what, 0), found.slots(pieces.loaded), ())
    known = z3.BoolVal({e.what for e in copies} == set(pieces.places))
    yield Obligation("pieces have copies", None, (), known)
