"""Waves, rings and task order of the fused kernel, as integer functions and nothing else.

Host, kernel and prover call the same functions: arguments are Python ints, TileLang expressions or Z3
terms, so no function here branches on its arguments but by `choose` (`locate` and `tasks`, for the host, do).

A *block* is `block_m` rows of one expert in the pool of received rows; blocks are numbered expert by expert.
A *wave* is `wave_experts` consecutive experts. `first(w)` is the first block of wave w, with first(-1) = 0
and first(w) = the number of blocks for w >= num_waves. *Segment* s of the task order holds the dispatch of
wave s and then the two products of wave s - 1:

    dispatch(0) | dispatch(1) L1(0) L2(0) | dispatch(2) L1(1) L2(1) | ... | L1(last) L2(last)

so that rows of a wave are on their way while the wave before is multiplied. Dispatch tasks and products are
dealt out to CTAs separately, each in turn, and a CTA runs its own in ascending order. So the product that a
CTA multiplies next is known long before it starts, and its weights are fetched ahead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Kind(IntEnum):
    """What a task does; the value is the phase that the watchdog reports."""

    DISPATCH = 1
    LINEAR1 = 2
    LINEAR2 = 3


@dataclass(frozen=True)
class Geometry:
    """Sizes that do not depend on the routing.

    Attributes:
        dispatch_parts: tasks that copy one block's rows.
        l1_tiles, l2_tiles: tiles over the output channels of the two products, a block.
        num_experts: of one rank.
        wave_experts: experts a wave.
        x_ring, h_ring: blocks that the rings of received rows and of SwiGLU outputs hold.
    """

    dispatch_parts: int
    l1_tiles: int
    l2_tiles: int
    num_experts: int
    wave_experts: int
    x_ring: int
    h_ring: int

    @property
    def num_waves(self) -> int:
        """Waves, the last one possibly with fewer experts."""
        return -(-self.num_experts // self.wave_experts)

    @property
    def tiles(self) -> int:
        """Tiles of both products, a block."""
        return self.l1_tiles + self.l2_tiles


@dataclass(frozen=True)
class Task:
    """One task: `part` of the dispatch of `block`, or output tile `part` of a product."""

    kind: Kind
    block: int
    part: int


# --------------------------------------------------------------------------- the order
def quotient(value: Any, divisor: Any) -> Any:
    """Return floor(value / divisor) for a positive divisor; Z3 writes that with one slash."""
    return value / divisor if hasattr(value, "as_ast") else value // divisor


def choose(condition: Any, yes: Any, no: Any) -> Any:
    """Return `yes` if the condition holds, else `no`."""
    if isinstance(condition, bool):
        return yes if condition else no
    if hasattr(condition, "as_ast"):
        import z3

        return z3.If(condition, yes, no)
    from tilelang import language as T

    return T.if_then_else(condition, yes, no)


def segment_start(geometry: Geometry, before: Any, first: Any) -> Any:
    """Return the number of the first task of segment s, from first(s - 1) and first(s)."""
    return first * geometry.dispatch_parts + before * geometry.tiles


def dispatch_tasks(geometry: Geometry, first: Any, after: Any) -> Any:
    """Return the number of dispatch tasks of segment s, from first(s) and first(s + 1)."""
    return (after - first) * geometry.dispatch_parts


def l1_tasks(geometry: Geometry, before: Any, first: Any) -> Any:
    """Return the number of linear-1 tasks of segment s, from first(s - 1) and first(s)."""
    return (first - before) * geometry.l1_tiles


def spread(start: Any, offset: Any, parts: int) -> tuple[Any, Any]:
    """Return (block, part) of task `offset` among `parts` tasks a block from block `start` on."""
    return start + quotient(offset, parts), offset % parts


def number(geometry: Geometry, kind: Kind, block: Any, part: Any, wave: tuple[Any, Any, Any, Any]) -> Any:
    """Return the number of a task; the inverse of the decoding in `locate`.

    Args:
        geometry: sizes.
        kind: of the task.
        block: in the wave w that `wave` describes.
        part: of the block's tasks of this kind.
        wave: first(w - 1), first(w), first(w + 1) and first(w + 2).
    """
    before, first, after, beyond = wave
    if kind is Kind.DISPATCH:
        return segment_start(geometry, before, first) + (block - first) * geometry.dispatch_parts + part
    # Products stand in the next segment, behind the dispatch of the next wave.
    products = segment_start(geometry, first, beyond)
    if kind is Kind.LINEAR1:
        return products + (block - first) * geometry.l1_tiles + part
    return products + l1_tasks(geometry, first, after) + (block - first) * geometry.l2_tiles + part


def gap(geometry: Geometry, before: Any, first: Any, ctas: int, is_last: Any) -> Any:
    """Return how many numbers are left out in the turn after the one in which linear 1 of a wave ends.

    A linear-1 task is about as long as two of linear 2. In the last wave, whose end all wait for, CTAs that
    begin a linear 1 in the turn in which the others begin a linear 2 leave the turn after it out.

    Args:
        geometry: sizes.
        before: first(w) of the wave.
        first: first(w + 1).
        ctas: of the rank.
        is_last: whether it is the last wave.
    """
    return choose(is_last, (before * geometry.tiles + l1_tasks(geometry, before, first)) % ctas, 0)


def l2_offset(offset: Any, gap: Any, ctas: int) -> Any:
    """Return which linear-2 task the number `offset` behind a wave's last linear 1 stands for; -1: none."""
    return choose(offset < ctas - gap, offset, choose(offset < ctas, -1, offset - gap))


def l2_number(task: Any, gap: Any, ctas: int) -> Any:
    """Return the number of linear-2 task `task` behind a wave's last linear 1; the inverse of `l2_offset`."""
    return choose(task < ctas - gap, task, task + gap)


def share_start(start: Any, cta: Any, ctas: int) -> Any:
    """Return the least number of CTA `cta`, which has those that are cta modulo ctas, from `start` on."""
    return cta + ctas * quotient(start + (ctas - 1) - cta, ctas)


def pieces(expert_pieces: int, cta: Any, ctas: int) -> Any:
    """Return how many of an expert's pieces of weights CTA `cta` widens: those that are cta modulo ctas."""
    return quotient(expert_pieces + (ctas - 1) - cta, ctas)


# --------------------------------------------------------------------------- signals
def x_slot(geometry: Geometry, block: Any) -> Any:
    """Return where in the ring of received rows a block stands."""
    return block % geometry.x_ring


def h_slot(geometry: Geometry, block: Any) -> Any:
    """Return where in the ring of SwiGLU outputs a block stands."""
    return block % geometry.h_ring


def x_freed_by(geometry: Geometry, block: Any) -> Any:
    """Return the block whose linear 1 must be done before `block` is dispatched (negative: none)."""
    return block - geometry.x_ring


def h_freed_by(geometry: Geometry, block: Any) -> Any:
    """Return the block whose linear 2 must be done before `block`'s linear 1 writes (negative: none)."""
    return block - geometry.h_ring


def waits_ahead(
    geometry: Geometry, kind: Kind, block: Any, start: Any, segment: Any, last_segment: Any, last: Any
) -> Any:
    """Return 1 if all that a product waits for comes before the product that its CTA has before it, else 0.

    Then a CTA may wait for it while that one is still under way.

    Args:
        geometry: sizes.
        kind: of the product.
        block: of the product.
        start: first block of its wave.
        segment: of the task order that the product is in.
        last_segment: that of the product before it.
        last: number of that product among those of its segment.
    """
    if kind is Kind.LINEAR1:  # rows of a wave are dispatched a segment before; outputs may come round later
        adjacent = choose(last_segment == segment - 1, choose(block < geometry.h_ring, 1, 0), 0)
        return choose(last_segment == segment, 1, adjacent)
    l1_before = choose((block + 1 - start) * geometry.l1_tiles <= last, 1, 0)
    return choose(last_segment == segment, l1_before, 0)


def complete(geometry: Geometry, kind: Kind) -> int:
    """Return what a block's counter of finished tasks of `kind` ends at."""
    return {
        Kind.DISPATCH: geometry.dispatch_parts,
        Kind.LINEAR1: geometry.l1_tiles,
        Kind.LINEAR2: geometry.l2_tiles,
    }[kind]


# --------------------------------------------------------------------------- ring sizes
def most_blocks(rows: int, experts: int, block_m: int) -> int:
    """Return the most blocks that `rows` rows of `experts` experts can fill, each expert rounded up.

    An expert with c > 0 rows fills (c - 1) // block_m + 1 blocks, at most (c + block_m - 1) / block_m.
    """
    return min(rows, (rows + experts * (block_m - 1)) // block_m)


def most_rows(num_ranks: int, tokens: int, topk: int, experts: int) -> int:
    """Return the most rows that `experts` experts of one rank can receive: a token chooses an expert once."""
    return num_ranks * tokens * min(topk, experts)


def rings(
    *, num_ranks: int, tokens: int, topk: int, num_experts: int, wave_experts: int, block_m: int
) -> tuple[int, int]:
    """Return the least (x_ring, h_ring), in blocks, so that no wave waits for itself, whatever the routing.

    While wave w is dispatched, wave w - 1 may still be read: the ring of received rows holds two waves.
    Linear 2 of a wave comes before linear 1 of the next: the other ring holds one.
    """
    two = min(2 * wave_experts, num_experts)
    one = min(wave_experts, num_experts)

    def blocks(experts: int) -> int:
        return max(1, most_blocks(most_rows(num_ranks, tokens, topk, experts), experts, block_m))

    return blocks(two), blocks(one)


def pool_blocks(*, num_ranks: int, tokens: int, topk: int, num_experts: int, block_m: int) -> int:
    """Return the most blocks that one rank can receive."""
    return max(1, most_blocks(most_rows(num_ranks, tokens, topk, num_experts), num_experts, block_m))


# --------------------------------------------------------------------------- host
def wave_firsts(geometry: Geometry, expert_blocks: Sequence[int]) -> list[int]:
    """Return [first(-1), first(0), ..., first(num_waves + 1)] from each expert's number of blocks."""
    starts = [0]
    for blocks in expert_blocks:
        starts.append(starts[-1] + blocks)
    waves = [
        starts[min(w * geometry.wave_experts, len(expert_blocks))] for w in range(geometry.num_waves + 2)
    ]
    return [0, *waves]


def locate(geometry: Geometry, firsts: Sequence[int], task: int) -> Task:
    """Return task number `task`, as the kernel decodes it; `firsts` from `wave_firsts`."""
    s = 0
    while task >= segment_start(geometry, firsts[s + 1], firsts[s + 2]):
        s += 1
    before, first, after = firsts[s], firsts[s + 1], firsts[s + 2]
    offset = task - segment_start(geometry, before, first)
    dispatched, multiplied = dispatch_tasks(geometry, first, after), l1_tasks(geometry, before, first)
    if offset < dispatched:
        return Task(Kind.DISPATCH, *spread(first, offset, geometry.dispatch_parts))
    if offset < dispatched + multiplied:
        return Task(Kind.LINEAR1, *spread(before, offset - dispatched, geometry.l1_tiles))
    return Task(Kind.LINEAR2, *spread(before, offset - dispatched - multiplied, geometry.l2_tiles))


def num_tasks(geometry: Geometry, firsts: Sequence[int]) -> int:
    """Return how many tasks there are."""
    return segment_start(geometry, firsts[-1], firsts[-1])


def tasks(geometry: Geometry, firsts: Sequence[int], cta: int, ctas: int) -> Iterator[Task]:
    """Yield the tasks of one CTA in its order."""
    segments = zip(firsts, firsts[1:], firsts[2:], strict=False)
    for segment, (before, first, after) in enumerate(segments):
        parts, tiles = geometry.dispatch_parts, geometry.tiles
        for number in range(share_start(first * parts, cta, ctas), after * parts, ctas):
            yield Task(Kind.DISPATCH, *divmod(number, parts))
        l1, l2 = (first - before) * geometry.l1_tiles, (first - before) * geometry.l2_tiles
        left_out = gap(geometry, before, first, ctas, segment == geometry.num_waves)
        for number in range(share_start(before * tiles, cta, ctas), first * tiles + left_out, ctas):
            offset = number - before * tiles
            if offset < l1:
                yield Task(Kind.LINEAR1, *spread(before, offset, geometry.l1_tiles))
            elif 0 <= (task := l2_offset(offset - l1, left_out, ctas)) < l2:
                yield Task(Kind.LINEAR2, *spread(before, task, geometry.l2_tiles))
