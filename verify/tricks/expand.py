"""Words of four E2M1 codes widened through a table of eight bytes by `dsv4_prmt`, and the tables themselves.

A table may depend on an offset that is known at run time: it is tabulated for every byte. What an
expression makes of table and codes is proved for all of them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import z3

from verify import externs, formats, ir
from verify.bitvectors import Question
from verify.externs import fp4
from verify.externs.words import BITS, MASK, Arrays, BitVectors
from verify.intarith import constant_of
from verify.ir import UnsupportedIR
from verify.refine.inline import rewrite
from verify.tricks.evaluate import AsTerms, Key, OnArrays, key_of, wrap
from verify.tricks.match import Part, parts_that_cut
from verify.walk import Site

PERMUTE = "dsv4_prmt"
_BYTES = 256  # offsets that a table is made for
_MAX_TRIPS = 256  # of the loops around a statement, together
_SAMPLES = 512
_OCTET = 8


@dataclass(frozen=True)
class Table:
    """Two words that hold what each E2M1 magnitude becomes.

    Attributes:
        part: what they depend on; None for constants.
        first, last: values of it for which they are e4m3 of the magnitudes times 2**(value + shift).
    """

    part: ir.Expr | None
    first: int
    last: int
    shift: int


def read_table(low: ir.Expr, high: ir.Expr) -> Table | None:
    """Return what a table is; None where it never holds the magnitudes exactly, or is not understood.

    Of the parts it can be taken to depend on, the one for which it is exact most often, and of those the
    largest: a byte of a word, not the word.
    """
    both = ir.BinOp(low.dtype, "bitor", low, high)
    parts = [p for p in parts_that_cut(both) if p.expr.dtype.is_int and p.expr not in (low, high)]
    found = [_tabulate(low, high, p) for p in parts] or [_tabulate(low, high, None)]
    exact = [t for t in found if t is not None]
    return max(reversed(exact), key=lambda t: t.last - t.first, default=None)


def _tabulate(low: ir.Expr, high: ir.Expr, part: Part | None) -> Table | None:
    known = _exact_tables()
    offsets = np.arange(_BYTES if part is not None else 1)
    ids = part.ids if part is not None else frozenset()
    try:
        words = [np.broadcast_to(OnArrays(ids, offsets)(e), offsets.shape) & MASK for e in (low, high)]
    except UnsupportedIR:
        return None
    found = [known.get((int(a), int(b))) for a, b in zip(*words, strict=True)]
    exact = [o for o, j in enumerate(found) if j is not None]
    if not exact or exact != list(range(exact[0], exact[-1] + 1)):
        return None
    shifts = {(found[o] or 0) - o for o in exact}
    if len(shifts) != 1:
        return None
    return Table(None if part is None else part.expr, exact[0], exact[-1], shifts.pop())


@cache
def _exact_tables() -> dict[tuple[int, int], int]:
    return {formats.e4m3_table(j): j for j in formats.lossless_offsets()}


@dataclass(frozen=True)
class Expansion:
    """A word of four table bytes with signs, proved for all tables and codes; `order` None if it is none."""

    expr: ir.Expr
    order: str | None
    table: Table | None = None
    codes: ir.Expr | None = None


_ORDERS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "codes 0 to 3": lambda words, low, high, codes: fp4.expanded(words, low, high, codes, 0),
    "codes 4 to 7": lambda words, low, high, codes: fp4.expanded(words, low, high, codes, 4),
    "crossed codes 0 to 3": lambda words, low, high, codes: fp4.uncrossed(words, low, high, codes, 0),
    "crossed codes 4 to 7": lambda words, low, high, codes: fp4.uncrossed(words, low, high, codes, 1),
}


def expansions(value: ir.Expr, site: Site) -> Iterator[Expansion]:
    """Yield the expansions in a value, for each trip of the loops around it that they depend on.

    Raises:
        UnsupportedIR: there are too many trips.
    """
    if not any(_is_permute(n) for n in ir.walk(value)):
        return
    used = {n for n in ir.walk(value) if isinstance(n, ir.Var)}
    ranges = []
    for loop in site.scope.loops:
        start, extent = constant_of(loop.start), constant_of(loop.extent)
        if loop.var in used and start is not None and extent is not None:
            ranges.append((loop.var, range(start, start + extent)))
    if np.prod([len(r) for _, r in ranges], dtype=np.int64) > _MAX_TRIPS:
        raise UnsupportedIR("too many trips around an expansion of codes")
    for values in product(*(r for _, r in ranges)):
        trip = {v: n for (v, _), n in zip(ranges, values, strict=True)}
        yield from _find(_folded(value, trip))


def inlined(expr: ir.Expr, names: Mapping[ir.Var, ir.Expr]) -> ir.Expr:
    """Return `expr` with names replaced by the values they stand for."""

    def visit(node: ir.Expr) -> ir.Expr | None:
        if isinstance(node, ir.Var) and node in names and node.dtype.is_int:
            return rewrite(names[node], visit)
        return None

    return rewrite(expr, visit)


def _find(expr: ir.Expr) -> Iterator[Expansion]:
    if not any(_is_permute(n) for n in ir.walk(expr)):
        return
    if expr.dtype.is_int and expr.dtype.bits == BITS:
        found = _identify(expr)
        if found is not None:
            yield found
            return
        if _is_permute(expr):
            assert isinstance(expr, ir.Call), "checked"
            if not isinstance(expr.args[-1], ir.Const):  # with a constant selector it only moves bytes
                yield Expansion(expr, None)
    for child in ir.children(expr):
        yield from _find(child)


def _is_permute(node: object) -> bool:
    return isinstance(node, ir.Call) and (e := externs.called(node)) is not None and e.name == PERMUTE


def _identify(expr: ir.Expr) -> Expansion | None:
    permutes = [n for n in ir.walk(expr) if _is_permute(n)]
    if len(permutes) != 1:
        return None
    _, low, high, _ = permutes[0].args
    table = {id(low): "low", id(high): "high"}
    for codes in parts_that_cut(expr, frozenset(table)):
        if codes.expr.dtype.is_int and codes.expr.dtype.bits == BITS and not codes.ids & table.keys():
            shape = _shape(expr, {**table, **dict.fromkeys(codes.ids, "codes")})
            if shape not in _KNOWN:
                fits = (n for n, m in _ORDERS.items() if _agrees(expr, low, high, codes, m))
                proved = (n for n in fits if _proved(expr, low, high, codes, _ORDERS[n]))
                _KNOWN[shape] = next(proved, None)
            if (order := _KNOWN[shape]) is not None:
                return Expansion(expr, order, read_table(low, high), codes.expr)
    return None


_KNOWN: dict[Key, str | None] = {}  # by shape: the trips of a loop repeat few


def _shape(expr: ir.Expr, labels: Mapping[int, str]) -> Key:
    """Return a key of `expr` with its inputs by their labels."""
    if id(expr) in labels:
        return (labels[id(expr)], str(expr.dtype))
    if isinstance(expr, (ir.BinOp, ir.Cast, ir.Select, ir.Not, ir.Call)):
        own = getattr(expr, "op", "")
        parts = (_shape(c, labels) for c in ir.children(expr))
        return (type(expr).__name__, str(expr.dtype), own, *parts)
    return key_of(expr)


def _agrees(expr: ir.Expr, low: ir.Expr, high: ir.Expr, codes: Part, meaning: Callable) -> bool:
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(0, 1 << BITS, _SAMPLES) for _ in range(3))
    shown = wrap(c, codes.expr.dtype)
    run = OnArrays(codes.ids, shown, {id(low): wrap(a, low.dtype), id(high): wrap(b, high.dtype)})
    try:
        return bool(np.array_equal(np.asarray(run(expr)) & MASK, meaning(Arrays(), a, b, c)))
    except UnsupportedIR:
        return False


def _proved(expr: ir.Expr, low: ir.Expr, high: ir.Expr, codes: Part, meaning: Callable) -> bool:
    words = BitVectors()
    a, b, c = (words.variable(n) for n in ("low", "high", "codes"))
    terms = AsTerms(codes.ids, c, codes.expr.dtype, {id(low): a, id(high): b})
    got, wanted = terms(expr), meaning(words, a, b, c)
    for first in range(0, BITS, _OCTET):
        goal = z3.Extract(first + _OCTET - 1, first, got) == z3.Extract(first + _OCTET - 1, first, wanted)
        if not Question("expansion of codes", [], goal).decide().is_valid:
            return False
    return True


# --------------------------------------------------------------------------- folding
def _folded(expr: ir.Expr, trip: Mapping[ir.Var, int]) -> ir.Expr:
    """Return `expr` with loop counters replaced and constants computed."""

    def visit(node: ir.Expr) -> ir.Expr | None:
        if isinstance(node, ir.Var) and node in trip:
            return ir.Const(node.dtype, trip[node])
        if isinstance(node, ir.BinOp):
            a, b = rewrite(node.a, visit), rewrite(node.b, visit)
            value = _computed(node, a, b)
            return replace(node, a=a, b=b) if value is None else ir.Const(node.dtype, value)
        return None

    return rewrite(expr, visit)


def _computed(node: ir.BinOp, a: ir.Expr, b: ir.Expr) -> int | None:
    if not (isinstance(a, ir.Const) and isinstance(b, ir.Const)):
        return None
    if not node.dtype.is_int or node.dtype.name == "bool":
        return None
    x, y = int(a.value), int(b.value)
    table: dict[str, Callable[[], int]] = {
        "add": lambda: x + y,
        "sub": lambda: x - y,
        "mul": lambda: x * y,
        "floordiv": lambda: x // y,
        "floormod": lambda: x % y,
    }
    low = node.dtype.int_range[0]
    return (table[node.op]() - low) % (1 << node.dtype.bits) + low if node.op in table else None
