"""A part that leaves a product's last visits of a ring until its next product, or until all are done.

A *late* part's rounds lag behind those of the others: in a round with a product it first makes the visits
that it has left, then all but the last of this product's. How many it has left follows from a variable that
is positive as soon as there was a product. With these visits added its counter is that of the others at
every round's beginning, so each visit still has one wait, one place and one number; and what was left is of
the product before, as the copies say.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import z3

from megamoe.ring import every, given
from megamoe.role_events import BLOCK, THREAD, Event, Loop, names
from verify.ir import UnsupportedIR
from verify.solve import Obligation


@dataclass(frozen=True)
class Late:
    """What a part leaves of each product.

    Attributes:
        visits: how many.
        left: variable that is positive where there are some.
        kept: variables that say of which product they are; `left` is one.
    """

    visits: int
    left: str
    kept: tuple[str, ...]

    def lag(self, left: z3.ArithRef) -> z3.ArithRef:
        """Return how many visits are left."""
        return z3.If(left > 0, z3.IntVal(self.visits), z3.IntVal(0))


def carried(
    name: str, late: Late, segment: Loop, turn: Loop, has_product: z3.BoolRef
) -> Iterator[Obligation]:
    """What is left over is what the last round with a product left: it comes through all other rounds.

    Args:
        name: of the part.
        late: what it leaves.
        segment: outer loop of its walk.
        turn: inner one.
        has_product: that a round has a product.

    Raises:
        UnsupportedIR: it is changed between rounds.
    """
    nothing = segment.before.get(late.left)
    if nothing is None:
        raise UnsupportedIR(f"{name}: no {late.left}")
    yield Obligation(f"{name}: nothing is left at first", None, (), nothing <= 0)
    for variable in late.kept:
        passed = [
            (turn.before.get(variable), segment.entry.get(variable)),
            (segment.leave.get(variable), turn.after.get(variable)),
        ]
        if any(a is None or b is None or not z3.eq(a, b) for a, b in passed):
            raise UnsupportedIR(f"{name}: {variable} is changed between rounds")
        same = turn.leave[variable] == turn.entry[variable]
        what = f"{name}: {variable} stays without a product"
        yield Obligation(what, None, given(z3.Not(has_product)), same)
    yield Obligation(
        f"{name}: some are left of a product", None, given(has_product), turn.leave[late.left] > 0
    )


@dataclass(frozen=True)
class Copies:
    """Copies of a ring's visits in one loop, and what was kept when the loop began."""

    loop: Loop
    copies: tuple[Event, ...]
    kept: dict[str, z3.ArithRef]


def same_copies(
    name: str, late: Late, head: Copies, tail: Copies, turn: Loop, visits: z3.ArithRef, round_: tuple
) -> Iterator[Obligation]:
    """What a late visit fetches is what it would have fetched in its product's round.

    Args:
        name: of the part.
        late: what it leaves.
        head: what a product's round fetches of it.
        tail: what is fetched later, where variables of `late` have the values of `tail.kept`.
        turn: inner loop of the walk.
        visits: of the product.
        round_: what is known in its round.

    Raises:
        UnsupportedIR: late copies hang on more than what is kept.
    """
    number = z3.Int("number")
    # As if the next product, or the end, came at once: by `carried` nothing is changed in between.
    later = [(tail.kept[v], turn.leave[v]) for v in late.kept] + [(tail.loop.var, number)]
    then = [(head.loop.var, visits - late.visits + number)]
    known = given(*round_, number >= 0, number < late.visits)
    may_use = {str(t) for t in (*(a for a, _ in later), BLOCK, THREAD)}
    for copy in tail.copies:
        own = every(z3.BoolVal(True), *copy.path[len(tail.loop.path) :])
        used = names(own).union(*map(names, copy.coordinates))
        if not used <= may_use:
            raise UnsupportedIR(f"{name}: a late copy hangs on {', '.join(sorted(used - may_use))}")
        like = [h for h in head.copies if (h.what, h.source) == (copy.what, copy.source)]
        if len(like) != 1:
            raise UnsupportedIR(f"{name}: a late copy to {copy.what} is like {len(like)} others")
        (early,) = like
        asked = every(z3.BoolVal(True), *early.path[len(head.loop.path) :])
        goal = z3.And(
            z3.substitute(own, *later) == z3.substitute(asked, *then),
            *(
                z3.substitute(a, *later) == z3.substitute(b, *then)
                for a, b in zip(copy.coordinates, early.coordinates, strict=True)
            ),
        )
        yield Obligation(f"{name}: a late copy to {copy.what} is of its product", copy.span, known, goal)
    same = sorted(e.what for e in head.copies) == sorted(e.what for e in tail.copies)
    yield Obligation(f"{name}: as many late copies", None, (), z3.BoolVal(same))
