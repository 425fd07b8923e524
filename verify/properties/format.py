"""Every computation on the bits of floats is a conversion, exactly, for all its inputs.

Each `reinterpret` between integers and floats belongs to an expression that computes, as a function of
one of its parts, one of the conversions of `tricks.catalogue`: proved by bit-vectors and floating point
(z3, repeated by cvc5) for all 2**32 inputs, or over every input by two evaluators where there are at most
2**16. An expression that is none of them is UNKNOWN, with the first input on which the nearest differs.
Device functions that the kernel brings in compute their registered meaning, and the tables that they
expand FP4 codes through are exact.
"""

from collections.abc import Iterator

import z3

from verify import externs, formats, ir
from verify.externs import proof
from verify.intarith import constant_of
from verify.properties import Claims, Context, Issue
from verify.solve import Obligation
from verify.text import show
from verify.tricks.match import Trick, tricks
from verify.walk import Site

NAME = "format"
_SHOWN = 100  # characters of an expression in a message
_NARROW = frozenset(
    {"float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn", "bfloat16", "float16"}
)


class Formats:
    """Property `format`."""

    name = NAME
    depends: tuple[str, ...] = ()

    def claims(self, context: Context) -> Claims:
        """Return one obligation for each conversion on bits and each device function."""
        claims, casts = Claims(), {}
        inputs: dict[str, None] = {}
        for site in context.device_sites:
            for value in _values(site):
                for trick in tricks(value):
                    self._trick(claims, inputs, site, trick)
                for node in ir.walk(value):
                    if isinstance(node, ir.Cast) and {node.dtype.name, node.a.dtype.name} & _NARROW:
                        casts[f"{node.a.dtype.name} to {node.dtype.name}"] = None
        for name in externs.check_calls(context.extracted.device):
            claims.obligations.append(_function(name))
        claims.obligations += _tables(context, claims)
        if casts:
            claims.assumptions.append(f"the compiler's casts convert as PTX does: {', '.join(sorted(casts))}")
        if claims.obligations or casts:
            claims.assumptions.append("compiled without fast-math: denormals are kept, additions not fused")
        claims.assumptions += list(inputs)
        return claims

    def _trick(self, claims: Claims, inputs: dict[str, None], site: Site, trick: Trick) -> None:
        text = show(trick.expr)[:_SHOWN]
        if trick.meaning is None or trick.cut is None:
            nearest = f"; nearest is {trick.nearest[0]}: {trick.nearest[1]}" if trick.nearest else ""
            claims.unknown.append(Issue(site.span, f"{text} is no known conversion{nearest}"))
            return
        meaning = trick.meaning
        low, high = meaning.domain
        part = show(trick.cut)[:_SHOWN]
        if high - low < (1 << 32) - 1:
            inputs[f"{part} is in {low:#x} to {high:#x}, where it is taken for a {meaning.name}"] = None
        note = f" ({meaning.note})" if meaning.note else ""
        claims.notes.append(f"{meaning.name}{note} of {part}: {trick.how}")
        what = f"{text} is {meaning.name}"
        claims.obligations.append(Obligation(what, site.span, (), z3.BoolVal(True), {}, site))


PROPERTY = Formats()


def _values(site: Site) -> Iterator[ir.Expr]:
    """Yield the values that a statement computes, addresses left out."""
    match site.node:
        case ir.Store(value=value) | ir.Bind(value=value):
            yield value
        case ir.If(cond=cond) | ir.While(cond=cond):
            yield cond
        case ir.Eval(value=ir.Call(op="call_extern", args=args)):
            yield from (a for a in args[1:] if a.dtype.name != "handle")


def _function(name: str) -> Obligation:
    failed = proof.proved(name)
    what = f"the text of {name} computes its meaning"
    return Obligation(what, None, (), z3.BoolVal(not failed), dict(failed))


def _tables(context: Context, claims: Claims) -> Iterator[Obligation]:
    """Yield that constant tables of FP4 codes hold their exact values times a power of two."""
    known = {formats.e4m3_table(j): j for j in formats.lossless_offsets()}
    for site in context.device_sites:
        extern = externs.called(site.node) if isinstance(site.node, ir.Call) else None
        if extern is None or not {"low", "high"} <= set(extern.word_parameters):
            continue
        assert isinstance(site.node, ir.Call), "only calls are of a function"
        given = dict(zip((p.name for p in extern.function.parameters), site.node.args[1:], strict=True))
        words = [_constant(context, site, given[n]) for n in ("low", "high")]
        if None in words:
            claims.notes.append(f"{extern.name}: table chosen at run time")
            continue
        table = (words[0] or 0, words[1] or 0)
        shown = {"low": f"{table[0]:#x}", "high": f"{table[1]:#x}"}
        what = f"{extern.name}: the table is of E2M1 times a power of two as E4M3"
        yield Obligation(what, site.span, (), z3.BoolVal(table in known), shown, site)
        if table in known:
            claims.notes.append(f"{extern.name}: exact E4M3 of E2M1 times 2**{known[table]}, all 16 codes")


def _constant(context: Context, site: Site, expr: ir.Expr) -> int | None:
    value = constant_of(context.encoder.term(expr, site.scope))
    return None if value is None else value & 0xFFFFFFFF
