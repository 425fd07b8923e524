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

from verify import externs, ir
from verify.externs import proof
from verify.properties import Claims, Context, Issue
from verify.solve import Obligation
from verify.text import show
from verify.tricks.expand import Expansion, Table, expansions, inlined, read_table
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
        body = context.extracted.device.body
        names = {n.var: n.value for n in ir.walk(body) if isinstance(n, ir.Bind)}
        for site in context.device_sites:
            for value in _values(site):
                for trick in tricks(value):
                    self._trick(claims, inputs, site, trick)
                if not isinstance(site.node, ir.Bind):  # a name is looked at where it is used
                    for found in expansions(inlined(value, names), site):
                        _expansion(claims, inputs, site, found)
                for node in ir.walk(value):
                    if isinstance(node, ir.Cast) and {node.dtype.name, node.a.dtype.name} & _NARROW:
                        casts[f"{node.a.dtype.name} to {node.dtype.name}"] = None
        for name in externs.check_calls(context.extracted.device):
            claims.obligations.append(_function(name))
        claims.obligations += _tables(context, claims, inputs)
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
        sign = f" and {show(trick.sign)[:_SHOWN]}" if trick.sign is not None else ""
        claims.notes.append(f"{meaning.name}{note} of {part}{sign}: {trick.how}")
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


def _expansion(claims: Claims, inputs: dict[str, None], site: Site, found: Expansion) -> None:
    text = show(found.expr)[:_SHOWN]
    if found.order is None or found.codes is None:
        claims.unknown.append(Issue(site.span, f"{text} is no known expansion of codes"))
    elif found.table is None:
        claims.unknown.append(Issue(site.span, f"{text} expands codes through no table of exact values"))
    else:
        what = f"word of {found.order} through a table"
        _table(claims, inputs, site, found.table, what)
        claims.obligations.append(
            Obligation(f"{text} is a {what}", site.span, (), z3.BoolVal(True), {}, site)
        )


def _table(claims: Claims, inputs: dict[str, None], site: Site, table: Table, what: str) -> None:
    if table.part is None:
        exact = f"2**{table.first + table.shift}"
    else:
        exact = f"2**(o {table.shift:+d}) for o in {table.first} to {table.last}"
        names = sorted({n.buffer.name for n in ir.walk(table.part) if isinstance(n, ir.Load)})
        holders = ", ".join(names) or show(table.part)[:_SHOWN]
        said = f"offsets that choose a table of codes ({holders}) are in {table.first} to {table.last}"
        inputs[said] = None
    note = f"{what}: exactly E4M3 of E2M1 times {exact}, all 16 codes"
    if note not in claims.notes:
        claims.notes.append(note)


def _tables(context: Context, claims: Claims, inputs: dict[str, None]) -> Iterator[Obligation]:
    """Yield that the tables of FP4 codes hold their exact values times a power of two."""
    names = {n.var: n.value for n in ir.walk(context.extracted.device.body) if isinstance(n, ir.Bind)}
    for site in context.device_sites:
        extern = externs.called(site.node) if isinstance(site.node, ir.Call) else None
        if extern is None or not {"low", "high"} <= set(extern.word_parameters):
            continue
        assert isinstance(site.node, ir.Call), "only calls are of a function"
        given = dict(zip((p.name for p in extern.function.parameters), site.node.args[1:], strict=True))
        table = read_table(*(inlined(given[n], names) for n in ("low", "high")))
        is_constant = all(isinstance(given[n], ir.Const) for n in ("low", "high"))
        if table is None and not is_constant:
            claims.unknown.append(Issue(site.span, f"{extern.name}: table that is not understood"))
            continue
        shown = {n: show(given[n]) for n in ("low", "high")}
        what = f"{extern.name}: the table is of E2M1 times a power of two as E4M3"
        yield Obligation(what, site.span, (), z3.BoolVal(table is not None), shown, site)
        if table is not None:
            _table(claims, inputs, site, table, extern.name)
