"""What a product's visits of the ring of stages fetch: the rows and the weights that it multiplies.

Copies before the walk fetch what the first product's rounds would (`role_walk.first_product`), and late ones
what their product's round would (`role_late`); here is what rounds fetch for their own product.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import z3

from megamoe import schedule
from megamoe.config import Config
from megamoe.quotients import times
from megamoe.ring import every, given, some
from megamoe.role_rings import Rings, Visits
from megamoe.role_walk import Roles, Walk
from megamoe.schedule import Kind
from verify.ir import UnsupportedIR
from verify.solve import Obligation


@dataclass(frozen=True)
class Product:
    """A product, as terms: its kind, its block, which of the block's tiles, its expert, the rank."""

    kind: z3.ArithRef
    block: z3.ArithRef
    tile: z3.ArithRef
    expert: z3.ArithRef
    rank: z3.ArithRef


@dataclass(frozen=True)
class Wanted:
    """When a product wants some of a tensor for a place, and which: coordinates of the copy's box."""

    when: z3.BoolRef
    coordinates: tuple[z3.ArithRef | int, ...]


Source = Callable[[Product, z3.ArithRef], Mapping[str, Wanted]]


def wanted(config: Config, block_k: int) -> dict[str, Source]:
    """Return for each shared buffer of a stage which tensors a product's visit of a number takes from where.

    Args:
        config: of the kernel.
        block_k: channels of a stage.
    """
    c, g = config, config.geometry

    def rows(product: Product, number: z3.ArithRef, *, scales: bool) -> Mapping[str, Wanted]:
        pairs = c.stages(1, product.expert)  # stages that share rows
        step = z3.If(pairs == 1, number, number / 2)
        found = {}
        for kind, ring, slot in (
            (Kind.LINEAR1, "x_ring", schedule.x_slot(g, product.block)),
            (Kind.LINEAR2, "h_ring", schedule.h_slot(g, product.block)),
        ):
            at = (0, step, slot) if scales else (step * block_k, slot * c.block_m)
            when = z3.And(product.kind == kind.value, number % pairs == 0)
            found[f"{ring}_scale" if scales else ring] = Wanted(when, (*at, product.rank))
        return found

    def weights(product: Product, number: z3.ArithRef, *, offsets: bool) -> Mapping[str, Wanted]:
        expert, tile = product.expert, product.tile
        before = c.stages(g.l1_tiles * c.l1_steps, expert)  # linear 2's stand behind those of linear 1
        l1 = times(tile, c.stages(c.l1_steps, expert))
        l2 = before + times(tile, c.stages(c.l2_steps, expert))
        step = c.first_step(expert) + z3.If(product.kind == Kind.LINEAR1.value, l1, l2) + number
        if c.widened:
            first = expert % c.ring_experts * c.expert_steps - c.first_step(expert)
            return {"wide_ring": Wanted(z3.BoolVal(True), (0, 0, first + step, product.rank))}
        name, at = ("offsets", (0, step)) if offsets else ("words", (0, 0, step))
        return {name: Wanted(z3.BoolVal(True), (*at, product.rank))}

    return {
        "x_tile": lambda product, number: rows(product, number, scales=False),
        "s_tile": lambda product, number: rows(product, number, scales=True),
        "w_tile": lambda product, number: weights(product, number, offsets=False),
        "o_tile": lambda product, number: weights(product, number, offsets=True),
    }


def fetched(rings: Rings, blocks: int) -> Iterator[Obligation]:
    """Every copy of a round is what its product wants for its visit, and all that it wants is copied.

    Args:
        rings: of the kernel.
        blocks: of a rank's pool.

    Raises:
        UnsupportedIR: a visit of copies is not one pass of a loop.
    """
    for ring in rings.roles.rings:
        if not ring.bulk:
            continue
        copied: set[str] = set()
        for name in ring.writers:
            walk = rings.walks[name]
            late = walk.late(ring)
            pieces = rings.visits(ring, walk) if late is None else rings.late_visits(ring, walk, late)[1:2]
            product = product_of(rings.roles, walk, blocks)
            for piece in pieces:
                yield from _piece(rings.roles, piece, product)
                copied |= {copy.what for copy in piece.copies}
        every_one = z3.BoolVal(copied == set(ring.places))
        yield Obligation(f"something is copied to each buffer of {ring.full}", None, (), every_one)


def product_of(roles: Roles, walk: Walk, blocks: int) -> Product:
    """Return the product of a round of a walk; arguments as of `fetched`."""
    leave, rank = walk.turn.leave, roles.rank
    experts = z3.Function(f"{roles.experts}[]", z3.IntSort(), z3.IntSort())
    block, tile = (leave[name] for name in roles.steers)
    # Blocks of products are in the pool (suite `order`); the compiler guards what it reads.
    expert = z3.If(z3.And(block >= 0, block < blocks), experts(rank * blocks + block), z3.IntVal(0))
    return Product(leave[roles.kind], block, tile, expert, rank)


def _piece(roles: Roles, piece: Visits, product: Product) -> Iterator[Obligation]:
    name = piece.walk.name
    if piece.loop is None or piece.passes != 1:
        raise UnsupportedIR(f"{name}: visits of copies that are not passes of a loop")
    (visit,) = piece.each()
    number = visit.number - piece.count
    # All visits of the product, those among them that are left for later: their copies are like these.
    all_of_it = number >= 0, number < piece.walk.visits(piece.ring)
    known = [k for k in piece.known() if not z3.eq(k, piece.loop.range)]
    known = (*given(*known, *all_of_it), *roles.in_range(product.expert))
    guards: dict[tuple[str, str], list[z3.BoolRef]] = {}
    for copy in piece.copies:
        want = roles.sources[copy.what](product, number).get(copy.source)
        if want is None:
            raise UnsupportedIR(f"{name}: {copy.source} is copied to {copy.what}")
        same = every(*(a == b for a, b in zip(copy.coordinates, want.coordinates, strict=True)))
        what = f"{name}: {copy.source} to {copy.what} is what the product wants"
        yield Obligation(what, copy.span, (*known, *given(copy.guard)), z3.And(want.when, same))
        guards.setdefault((copy.what, copy.source), []).append(copy.guard)
    late = visit.number >= piece.slots if piece.ring.prefilled == name else z3.BoolVal(True)
    for buffer in sorted({what for what, _ in guards}):
        for source, want in roles.sources[buffer](product, number).items():
            copied = guards.get((buffer, source), [z3.BoolVal(False)])
            what = f"{name}: {source} comes to {buffer} where the product wants it"
            yield Obligation(what, None, (*known, *given(want.when, late)), some(*copied))
