"""What dispatch copies to a row's place is that row's token: proved of the tile program, of no edit of it."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from megamoe import copied_proof
from megamoe.config import Config
from megamoe.instances import CONFIG, OPTIONS, WIDE
from megamoe.proofs import extracted
from tests.megamoe.role_edits import assigned, at_another, plus, reads_at_another
from tests.megamoe.test_protocol import Edit, edited, in_expr
from tests.megamoe.test_roles_proof import open_claims
from verify import ir
from verify.refine.inline import rewrite

FORMS = {"wide": WIDE, "options": OPTIONS}
Change = Callable[[ir.Expr], ir.Expr | None]


def after(edit: Edit, config: Config = CONFIG) -> list[str]:
    return open_claims(copied_proof.claims(edited(edit, extracted(config).tile), config))


def valued(change: Change) -> Edit:
    """Values of stores, and what names stand for, in which something changes."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, (ir.Store, ir.Bind)):
            return None
        hit = []

        def noted(e: ir.Expr) -> ir.Expr | None:
            new = change(e)
            hit.extend([new] if new is not None else [])
            return new

        value = rewrite(node.value, noted)
        return replace(node, value=value) if hit else None

    return edit


def read(name: str, at: int, by: int = 1) -> Edit:
    """Reads of a buffer are at another index."""
    return valued(reads_at_another(name, at, by))


def put(name: str, at: int, by: int = 1) -> Edit:
    """Stores to a buffer are to another index."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Store) and node.buffer.name == name:
            return at_another(node, at, by)
        return None

    return edit


def chosen(tensor: str, change: Callable[[ir.Select], ir.Expr]) -> Edit:
    """A choice between a read of a tensor and what stands where there is no token is another."""

    def edit(node: ir.Expr) -> ir.Expr | None:
        if isinstance(node, ir.Select) and isinstance(node.a, ir.Load) and node.a.buffer.name == tensor:
            return change(node)
        return None

    return valued(edit)


def stored(name: str, change: Callable[[ir.Store], ir.Stmt]) -> Edit:
    return lambda n: change(n) if isinstance(n, ir.Store) and n.buffer.name == name else None


def clamped_lower(node: ir.Expr) -> ir.Expr | None:
    """The last entry is taken for the one before it."""
    match node:
        case ir.BinOp(op="min", b=ir.Const(value=value)) if value == CONFIG.num_ranks * CONFIG.tokens - 1:
            return replace(node, b=ir.Const(node.b.dtype, value - 1))
    return None


def with_row(store: ir.Store) -> ir.Stmt:
    """A scale that depends on the row."""
    row = ir.Cast(store.value.dtype, store.indices[-1])
    return replace(store, value=ir.BinOp(store.value.dtype, "mul", store.value, row))


def rounded(store: ir.Store) -> ir.Stmt:
    """What is stored is added and taken away again: integers would not change by that."""
    kind = store.value.dtype
    return replace(
        store, value=ir.BinOp(kind, "sub", ir.BinOp(kind, "add", store.value, store.value), store.value)
    )


def unsigned(node: ir.Expr) -> ir.Expr | None:
    """No entry, which is -1, is a large number."""
    if isinstance(node, ir.Load) and node.buffer.name == "row_source":
        return ir.Cast(ir.DType("int64"), ir.Cast(ir.DType("uint32"), node))
    return None


EDITS: dict[str, Edit] = {
    "values that are rounded": stored("x_ring", rounded),
    "no entry is taken for one": valued(unsigned),
    "the token of the next row": read("row_source", 1),
    "the token of another rank's plan": read("row_source", 0),
    "the row on the next rank": read("x", 0),
    "the row of the next token": read("x", 1),
    "the next channel": read("x", 2),
    "the scale on the next rank": read("x_scale", 0),
    "the scale of the next token": read("x_scale", 1),
    "the scale of the next channels": read("x_scale", 2),
    "elements of the next row that was read": read("rows", 0),
    "elements of the next channel that was read": read("rows", 1),
    "to the next row": put("x_ring", 1),
    "to the next channel": put("x_ring", 2),
    "to the next rank": put("x_ring", 0),
    "the scale to the next row": put("x_ring_scale", 3),
    "the scale to the next place": put("x_ring_scale", 1),
    "the scale of the next channels' place": put("x_ring_scale", 2),
    "rows that have a token are those that have none": chosen("x", lambda s: replace(s, a=s.b, b=s.a)),
    "whether there is a token is not asked": chosen("x", lambda s: s.a),
    "another number where there is no token": chosen("x", lambda s: replace(s, b=ir.Const(s.dtype, 1))),
    "another scale where there is no token": chosen("x_scale", lambda s: replace(s, b=plus(s.b, 1))),
    "the first token is none": chosen("x", lambda s: replace(s, cond=in_expr(s.cond, _later))),
    "the last entry is another": valued(clamped_lower),
    "the place of the next block": assigned("slot", lambda e: plus(e, 1)),
    "a block further on": stored("slot", lambda s: ir.Seq(None, (s, _next_block(s)))),
    "a scale that is of the row": stored("x_ring_scale", with_row),
    "half of a row is read": lambda n: (
        replace(n, extent=ir.Const(ir.INT32, 128))
        if isinstance(n, ir.For) and n.kind == "parallel" and _fills(n, "rows")
        else None
    ),
    "rows of the part before": lambda n: (
        ir.Seq(None, tuple(reversed(n.stmts)))
        if isinstance(n, ir.Seq)
        and len(n.stmts) == 2
        and _fills(n.stmts[0], "rows")
        and _fills(n.stmts[1], "x_ring")
        else None
    ),
}


def _later(node: ir.Expr) -> ir.Expr | None:
    return ir.Const(node.dtype, 1) if isinstance(node, ir.Const) and node.value == 0 else None


def _buffer(name: str) -> ir.Buffer:
    nodes = ir.walk(extracted(CONFIG).tile.body)
    return next(n.buffer for n in nodes if isinstance(n, ir.Store) and n.buffer.name == name)


def _next_block(store: ir.Store) -> ir.Store:
    block = _buffer("block")
    return replace(store, buffer=block, value=plus(ir.Load(ir.INT32, block, store.indices), 1))


def _fills(node: ir.Stmt, name: str) -> bool:
    return any(isinstance(n, ir.Store) and n.buffer.name == name for n in ir.walk(node))


class TestCompiledKernel:
    @pytest.mark.parametrize(
        "form", [pytest.param(f, marks=[pytest.mark.slow] * (f != "fp4")) for f in FORMS]
    )
    def test_it_is_proved(self, form):
        assert open_claims(copied_proof.claims(extracted(FORMS[form]).tile, FORMS[form])) == []

    @pytest.mark.parametrize("name", EDITS)
    def test_edits(self, name):
        assert after(EDITS[name])

    def test_unknown_writes(self):
        """An operation that writes the ring has no meaning here."""

        def filled(node: ir.Stmt) -> ir.Stmt | None:
            if not (isinstance(node, ir.Store) and node.buffer.name == "x_ring"):
                return None
            region = ir.Region(ir.HANDLE, node.buffer, node.indices, node.indices, "w")
            return ir.Seq(None, (node, ir.Eval(None, ir.Call(ir.HANDLE, "fill", (region,)))))

        assert "written by an operation" in " ".join(after(filled))
