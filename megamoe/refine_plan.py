"""Rules for the plan's kernel, in front of those of `refine_forms`: lines, loops of one round, bits of words.

A store that the tile program gives no line has that of the loop around it, as the compiler has it: lines say
which statements are compared, never that they are equal. A loop of one round, which the compiler may leave
out, is its body. Bits of a word, of which refinement knows nothing, become reads of tables that nobody
writes: `x | (1 << k)` is `with_bit[x, k]`, and `(x >> k) & 1` is `bit_of[x, k]`, for every x and 0 <= k < 31.
Equal words and numbers give equal reads, whatever a table holds; that is all that is compared.
"""

from dataclasses import replace

import z3

from dsv4_kernels.contract import Contract
from megamoe import refine_proof
from megamoe.refine_index import is_zero, number, op
from megamoe.refine_words import mapped
from megamoe.stage_proof import decided
from verify import ir
from verify.encode import Hypothesis
from verify.extract import Extracted
from verify.host import read_host
from verify.ir import UnsupportedIR
from verify.properties import Claims, Context, Issue
from verify.properties.format import PROPERTY as FORMAT
from verify.properties.refinement import PROPERTY as REFINEMENT
from verify.solve import Obligation

BITS = 31  # of a word without its sign
COLUMNS = 32  # numbers of bits have a column each
WITH_BIT, BIT_OF = "with_bit", "bit_of"


CLAIMS = ("refinement", "layout", "format")


def claims(extracted: Extracted) -> dict[str, Claims]:
    """Return what has to be proved of a plan's kernel, by the names of CLAIMS.

    Where there is no rule for something, it is UNSUPPORTED.
    """
    return {
        "refinement": _refinement(extracted),
        "layout": decided(refine_proof.layouts(extracted)),
        "format": decided(FORMAT.claims(Context(extracted, Contract(()), {}))),
    }


def _refinement(extracted: Extracted) -> Claims:
    try:
        host = read_host(extracted.host, extracted.device, extracted.tile)
        kernel, claimed = plain(extracted)
        kernel, launch, rules = refine_proof.rewritten(kernel, host)
    except UnsupportedIR as error:
        return Claims(unsupported=[Issue(None, str(error))])
    context = Context(kernel, Contract(()), {})
    context.__dict__["host"] = launch  # with the notes that threads share
    if context.refinement.unsupported:  # the property would run both levels, which takes minutes
        return Claims(unsupported=[Issue(span, reason) for span, reason in context.refinement.unsupported])
    found = REFINEMENT.claims(context)
    found.obligations += [*rules, *claimed]
    found.assumptions += [refine_proof.ROUNDS, refine_proof.INDICES]
    return found


def plain(extracted: Extracted) -> tuple[Extracted, list[Obligation]]:
    """Return a plan's kernel by these rules, and what they rest on.

    Raises:
        UnsupportedIR: a bit's number is computed, or bits are read at one level alone.
    """
    device, tile = extracted.device, extracted.tile
    of_device, of_tile = _Rules(), _Rules()
    device = replace(device, body=of_device.body(device.body))
    tile = replace(tile, body=of_tile.body(_with_lines(tile.body, None)))
    if of_device.tables.keys() != of_tile.tables.keys():
        raise UnsupportedIR("bits are read at one level alone")
    allocs = tuple(ir.Alloc(None, buffer) for buffer in of_device.tables.values())
    device = replace(device, body=ir.Seq(None, (*allocs, device.body)))
    tile = replace(tile, body=ir.Block(None, "tables", tuple(of_tile.tables.values()), {}, {}, tile.body))
    claimed = [*of_device.obligations, *of_tile.obligations]
    return replace(extracted, tile=tile, device=device), claimed


def _with_lines(stmt: ir.Stmt, span: ir.Span | None) -> ir.Stmt:
    match stmt:
        case ir.Seq(stmts=stmts):
            return replace(stmt, stmts=tuple(_with_lines(s, span) for s in stmts))
        case ir.For(body=body):
            return replace(stmt, body=_with_lines(body, stmt.span or span))
        case ir.If(then=then, orelse=orelse):
            other = None if orelse is None else _with_lines(orelse, span)
            return replace(stmt, then=_with_lines(then, span), orelse=other)
        case ir.While() | ir.Launch() | ir.Block() | ir.Attr() | ir.Assume():
            return replace(stmt, body=_with_lines(stmt.body, span))
        case ir.Store() if stmt.span is None:
            return replace(stmt, span=span)
    return stmt


class _Rules:
    """Rewrites one level.

    Attributes:
        tables: buffers that it reads bits from, by name.
        obligations: that numbers of bits are some.
    """

    def __init__(self) -> None:
        self.tables: dict[str, ir.Buffer] = {}
        self.obligations: list[Obligation] = []
        self._env: dict[ir.Var, ir.Expr] = {}
        self._ranges: dict[ir.Var, int] = {}
        self._span: ir.Span | None = None

    def body(self, stmt: ir.Stmt) -> ir.Stmt:
        """Return a statement by these rules."""
        self._span = stmt.span or self._span
        match stmt:
            case ir.Seq(stmts=stmts):
                return replace(stmt, stmts=tuple(map(self.body, stmts)))
            case ir.For(var=var, extent=ir.Const(value=1)) if is_zero(stmt.start):
                self._env[var] = ir.Const(var.dtype, 0)
                return self.body(stmt.body)
            case ir.For(var=var, extent=extent):
                if isinstance(extent, ir.Const) and is_zero(stmt.start):
                    self._ranges[var] = int(extent.value)
                extent = self._expr(extent)
                return replace(stmt, start=self._expr(stmt.start), extent=extent, body=self.body(stmt.body))
            case ir.If(cond=cond, then=then, orelse=orelse):
                other = None if orelse is None else self.body(orelse)
                return replace(stmt, cond=self._expr(cond), then=self.body(then), orelse=other)
            case ir.While(cond=cond, body=body):
                return replace(stmt, cond=self._expr(cond), body=self.body(body))
            case ir.Launch() | ir.Block() | ir.Attr() | ir.Assume():
                return replace(stmt, body=self.body(stmt.body))
            case ir.Store(indices=indices, value=value):
                return replace(stmt, indices=tuple(map(self._expr, indices)), value=self._expr(value))
            case ir.Bind(value=value) | ir.Eval(value=value):
                return replace(stmt, value=self._expr(value))
        return stmt

    def _expr(self, expr: ir.Expr) -> ir.Expr:
        return mapped(expr, self._visit)

    def _visit(self, e: ir.Expr) -> ir.Expr | None:
        match e:
            case ir.Var() if e in self._env:
                return self._env[e]
            case ir.BinOp(op="bitand", a=ir.BinOp(op="shr", a=word, b=bit), b=ir.Const(value=1)):
                return self._read(BIT_OF, word, bit)
            case ir.BinOp(op="bitand", a=ir.Load() as word, b=ir.Const(value=1)):
                return self._read(BIT_OF, word, number(0))
            case ir.BinOp(op="bitor", a=word, b=ir.BinOp(op="shl", a=ir.Const(value=1), b=bit)):
                return self._read(WITH_BIT, word, bit)
            case ir.BinOp(op="bitor", a=word, b=ir.Const(value=int(value))) if value.bit_count() == 1:
                return self._read(WITH_BIT, word, number(value.bit_length() - 1))
        return None

    def _read(self, name: str, word: ir.Expr, bit: ir.Expr) -> ir.Expr:
        if word.dtype != ir.INT32:
            raise UnsupportedIR(f"bits of {word.dtype}")
        word, bit = self._expr(word), self._expr(bit)
        term = self._number(bit)
        known = [z3.And(v >= 0, v < self._ranges[var]) for var, v in self._terms(bit)]
        given = tuple(Hypothesis("range", "range", k) for k in known)
        goal = z3.And(term >= 0, term < BITS)
        self.obligations.append(Obligation("the number of a word's bit", self._span, given, goal))
        if name not in self.tables:
            data, shape = ir.Var(ir.HANDLE, name), (ir.Const(ir.DType("int64"), COLUMNS << BITS),)
            self.tables[name] = ir.Buffer(name, ir.INT32, shape, (), "local", data, number(0))
        at = op("add", op("mul", word, number(COLUMNS)), bit)
        return ir.Load(ir.INT32, self.tables[name], (at,))

    def _terms(self, expr: ir.Expr) -> list[tuple[ir.Var, z3.ArithRef]]:
        found = {e for e in ir.walk(expr) if isinstance(e, ir.Var)}
        return [(v, z3.Int(v.name)) for v in sorted(found, key=lambda v: v.name)]

    def _number(self, expr: ir.Expr) -> z3.ArithRef:
        match expr:
            case ir.Const(value=int(value)):
                return z3.IntVal(value)
            case ir.Var(name=name) if expr in self._ranges:
                return z3.Int(name)
            case ir.BinOp(op="add" | "mul" as how, a=a, b=b):
                x, y = self._number(a), self._number(b)
                return x + y if how == "add" else x * y
        raise UnsupportedIR("the number of a bit is computed")
