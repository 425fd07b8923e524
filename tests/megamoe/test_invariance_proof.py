"""A row's bits are a function of that row's data: proved of the fused kernel's tile IR, of no edit of it."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from megamoe import instances, invariance_proof
from megamoe.config import Config
from megamoe.instances import AHEAD, CONFIG, FP8, OPTIONS, WIDE, WIDENED
from megamoe.layer import config_for
from megamoe.proofs import extracted
from tests.megamoe.role_edits import only, plus
from tests.megamoe.test_protocol import Edit, edited, in_expr
from tests.megamoe.test_refine_proof import NOTHING, called, negated, stored, with_arg
from tests.megamoe.test_roles_proof import open_claims
from verify import ir
from verify.verdict import Verdict

FORMS = {"fp4": CONFIG, "fp8": FP8, "wide": WIDE, "ahead": AHEAD, "options": OPTIONS, "widened": WIDENED}


def after(edit: Edit, config: Config = CONFIG) -> list[str]:
    """Return what is open of a kernel whose tile IR has been edited."""
    return open_claims(invariance_proof.claims(edited(edit, extracted(config).tile), config))


def read(name: str, at: int, by: int = 1) -> Callable[[ir.Store], ir.Store]:
    """A store whose reads of a buffer are at another index."""

    def moved(node: ir.Expr) -> ir.Expr | None:
        if isinstance(node, ir.Load) and node.buffer.name == name:
            indices = list(node.indices)
            indices[at] = plus(indices[at], by)
            return replace(node, indices=tuple(indices))
        return None

    return lambda store: replace(store, value=in_expr(store.value, moved))


def to(at: int, by: int = 1) -> Callable[[ir.Store], ir.Store]:
    """A store to another index."""

    def moved(store: ir.Store) -> ir.Store:
        indices = list(store.indices)
        indices[at] = plus(indices[at], by)
        return replace(store, indices=tuple(indices))

    return moved


def region(at: int, by: int = 1) -> Callable[[ir.Expr], ir.Expr]:
    def moved(node: ir.Expr) -> ir.Expr:
        assert isinstance(node, ir.Region)
        return replace(node, mins=(*node.mins[:at], plus(node.mins[at], by), *node.mins[at + 1 :]))

    return moved


def bound(name: str, at: int) -> Edit:
    """The reads that a name stands for are at another index."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Bind) and node.var.name == name and isinstance(node.value, ir.Load):
            indices = list(node.value.indices)
            indices[at] = plus(indices[at], 1)
            return replace(node, value=replace(node.value, indices=tuple(indices)))
        return None

    return edit


def in_product(change: Callable[[ir.For], ir.For]) -> Edit:
    """Of the loop that multiplies."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.For) and node.kind == "serial" and node.var.name == "ko":
            products = [n for n in ir.walk(node) if isinstance(n, ir.Call) and n.op == "wgmma_gemm"]
            return change(node) if products else None
        return None

    return edit


def of_place() -> Callable[[ir.Store], ir.Store]:
    """A value times a place, a counter."""

    def times(store: ir.Store) -> ir.Store:
        place = ir.Cast(store.value.dtype, store.indices[0])
        return replace(store, value=ir.BinOp(store.value.dtype, "mul", store.value, place))

    return times


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_proved(name):
    assert not open_claims(invariance_proof.claims(extracted(FORMS[name]).tile, FORMS[name]))


EDITS: dict[str, Edit] = {
    "the scale of the next row": stored("acc_a", read("s_tile", 1)),
    "the scale of the next stage": stored("acc_a", read("s_tile", 0)),
    "the other half's partial sums": stored("acc_b", read("part_b", 0)),
    "sums of the next row": stored("acc_b", read("acc_b", 1)),
    "rows of x of the next stage": called("wgmma_gemm", with_arg(1, region(0))),
    "the next row of x": called("wgmma_gemm", with_arg(1, region(1))),
    "sums that do not begin at zero": called("wgmma_gemm", with_arg(9, negated)),
    "a product that is not waited for": called("wait_wgmma", with_arg(0, lambda a: plus(a, 1))),
    "no wait for a product": lambda node: NOTHING if _is_wait(node) else None,
    "a round less": in_product(lambda loop: replace(loop, extent=plus(loop.extent, -1))),
    "a round more": in_product(lambda loop: replace(loop, extent=plus(loop.extent, 1))),
    "codes of the next weight row": stored("codes_a", read("w_tile", 1)),
    "offsets of the next weight row": stored("offset_b", read("o_tile", 1)),
    "factors of the next tile": stored("factor_a", read("factors", 1)),
    "factors of the next weight row": stored("factor_b", read("factors", 2)),
    "factors of the next rank": stored("factor_b", read("factors", 0)),
    "sums of the next row, handed over": only(0, stored("rounded", read("acc_a", 1))),
    "sums times a row's number": only(0, stored("rounded", of_place())),
    "the product of the next row": only(0, called("copy", with_arg(0, region(0)))),
    "the weight of the next row": stored("hidden", read("weight_tile", 0)),
    "weights of the next block": stored("weight_tile", read("row_weight", 1, 16)),
    "weights of the next rank": stored("weight_tile", read("row_weight", 0)),
    "a scale put in the next row's place": stored("h_ring_scale", to(3)),
    "a scale put in the next place": stored("h_ring_scale", to(1)),
    "a scale by a row's number": stored("h_ring_scale", of_place()),
    "h put in the next row": stored("h_ring", to(1)),
    "h put in the next channel": stored("h_ring", to(2)),
    "h by the next row's scale": stored("h_ring", read("inverse", 0)),
    "sums of magnitudes": called("reduce", with_arg(2, lambda a: replace(a, value="sum"))),
    "rows sent to the next row's target": bound("target", 1),
    "rows sent to the next target": lambda node: _sent(node, to(0)),
    "the next row's output sent": lambda node: _sent(node, lambda s: read("out_a", 0)(read("out_b", 0)(s))),
    "the next channel sent": lambda node: _sent(node, to(1)),
    "the next token's experts": stored("total", read("topk_idx", 1)),
    "the next slot's expert": stored("total", read("topk_idx", 2)),
    "the next token's rows": stored("piece", read("combine", 0)),
    "the next channel's": stored("piece", read("combine", 1)),
    "y of the next token": stored("y", to(1)),
    "y times its place": stored("y", of_place()),
}


def _is_wait(node: ir.Stmt) -> bool:
    return isinstance(node, ir.Eval) and isinstance(node.value, ir.Call) and node.value.op == "wait_wgmma"


def _sent(node: ir.Stmt, change: Callable[[ir.Store], ir.Stmt]) -> ir.Stmt | None:
    return change(node) if isinstance(node, ir.Store) and node.buffer.name == "combine" else None


@pytest.mark.parametrize("name", EDITS)
def test_no_edit_is_proved(name):
    assert after(EDITS[name])


def halved(store: ir.Store) -> ir.Store:
    half = ir.Const(store.value.dtype, 0.5)
    return replace(store, value=ir.BinOp(store.value.dtype, "mul", store.value, half))


@pytest.mark.parametrize("name", ["acc_a", "acc_b", "hidden", "total", "h_ring_scale"])
def test_another_function_is_another_signature(name):
    tile = extracted().tile
    changed = edited(stored(name, halved), tile)
    kernels = {"one": lambda: (tile, CONFIG), "other": lambda: (changed, CONFIG)}
    assert open_claims(invariance_proof.claims(changed, CONFIG)) == []
    answers = invariance_proof.one_signature(kernels).answers
    assert [a.verdict for a in answers] == [Verdict.UNKNOWN]


def test_forms_with_one_shape_have_one_signature():
    narrow = replace(FP8, hidden=512, inter=512)
    kernels = {str(c.block_m): (lambda c=c: (extracted(c).tile, c)) for c in (narrow, WIDE)}
    assert [a.verdict for a in invariance_proof.one_signature(kernels).answers] == [Verdict.PROVED]


@pytest.mark.parametrize("name", instances.FORMATS)
def test_every_form_of_a_layer_is_followed(name):
    followed = {instances.form(c) for c in instances.layer_kernels(name)}
    chosen = [config_for(t, **instances.FLASH_LAYER, **instances.FORMATS[name]) for t in range(1, 8193)]
    assert {instances.form(c) for c in chosen if not c.widened} == followed
