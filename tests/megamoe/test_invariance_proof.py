"""A row's bits are a function of that row's data: proved of the fused kernel's tile IR, of no edit of it."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from megamoe import instances, invariance_proof
from megamoe.config import Config
from megamoe.instances import AHEAD, CONFIG, FP8, OPTIONS, WIDE, WIDENED
from megamoe.layer import config_for
from megamoe.proofs import extracted, tile_stage
from tests.megamoe.role_edits import at_another, only, plus, reads_at_another
from tests.megamoe.test_protocol import Edit, edited, in_expr
from tests.megamoe.test_refine_proof import NOTHING, called, negated, stored, with_arg
from tests.megamoe.test_roles_proof import open_claims
from verify import ir
from verify.properties import Claims
from verify.solve import Prover
from verify.verdict import Verdict

FORMS = {"fp4": CONFIG, "fp8": FP8, "wide": WIDE, "ahead": AHEAD, "options": OPTIONS, "widened": WIDENED}
# FP4 weights that are not widened, of WIDENED's shape.
NARROW = replace(CONFIG, hidden=WIDENED.hidden, inter=WIDENED.inter)
NUMBERS = 14  # in the expression of a word that is widened


def after(edit: Edit, config: Config = CONFIG) -> list[str]:
    """Return what is open of a kernel whose tile IR has been edited."""
    return open_claims(invariance_proof.claims(edited(edit, tile_stage(config)), config))


def read(name: str, at: int, by: int = 1) -> Callable[[ir.Store], ir.Store]:
    """A store whose reads of a buffer are at another index."""
    return lambda store: replace(store, value=in_expr(store.value, reads_at_another(name, at, by)))


def to(at: int, by: int = 1) -> Callable[[ir.Store], ir.Store]:
    """A store to another index."""
    return lambda store: at_another(store, at, by)


def region(at: int, by: int = 1) -> Callable[[ir.Expr], ir.Expr]:
    def moved(node: ir.Expr) -> ir.Expr:
        assert isinstance(node, ir.Region)
        return replace(node, mins=(*node.mins[:at], plus(node.mins[at], by), *node.mins[at + 1 :]))

    return moved


def bound(name: str, at: int) -> Edit:
    """The reads that a name stands for are at another index."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Bind) and node.var.name == name and isinstance(node.value, ir.Load):
            return replace(node, value=at_another(node.value, at))
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
    found = invariance_proof.claims(tile_stage(FORMS[name]), FORMS[name])
    assert not open_claims(found)
    assert all(is_proved_again(claims) for claims in found.values())


def is_proved_again(claims: Claims) -> bool:
    """Whether indices were asked for, and both solvers prove all that was found of them."""
    prover = Prover(by_cases=True)
    answers = prover.prove(claims.obligations)
    again = prover.decided.get("cvc5 unsat", 0)
    return all(a.verdict is Verdict.PROVED for a in answers) and again == prover.decided["z3 unsat"] > 0


def test_the_stage_is_that_of_the_compiled_kernel():
    assert repr(tile_stage(CONFIG)) == repr(extracted().tile)


EDITS: dict[str, Edit] = {
    "the scale of the next row": stored("scale", read("s_tile", 1)),
    "the scale of the next stage": stored("scale", read("s_tile", 0)),
    "the scale that the next row has": stored("acc_a", read("scale", 0)),
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
    "sums that are added in some tiles": lambda node: under(node, "acc_a", tile_is_zero),
    "sums that are read before their product is there": lambda node: _early_copy(node),
    "weights of rows, in some tiles": lambda node: under(node, "weight_tile", tile_is_zero),
    "h in some tiles": lambda node: under(node, "h_ring", tile_is_zero),
    "the next token's experts": stored("total", read("topk_idx", 1)),
    "the next slot's expert": stored("total", read("topk_idx", 2)),
    "the next token's rows": stored("piece", read("combine", 0)),
    "the next channel's": stored("piece", read("combine", 1)),
    "y of the next token": stored("y", to(1)),
    "y times its place": stored("y", of_place()),
}


def tile_is_zero() -> ir.Expr:
    tile = next(
        n for n in ir.walk(tile_stage(CONFIG).body) if isinstance(n, ir.Load) and n.buffer.name == "tile"
    )
    return ir.BinOp(ir.BOOL, "eq", tile, ir.Const(tile.dtype, 0))


def under(node: ir.Stmt, name: str, condition: Callable[[], ir.Expr]) -> ir.Stmt | None:
    """Parallel loops that store to a buffer, under a condition."""
    if not isinstance(node, ir.For) or node.kind != "parallel":
        return None
    stores = [n for n in ir.walk(node) if isinstance(n, ir.Store)]
    named = any(n.buffer.name == name for n in stores)
    return ir.If(None, condition(), node, None) if named else None


def _early_copy(node: ir.Stmt) -> ir.Stmt | None:
    """What a product under way adds to is copied before it has been waited for."""
    if not isinstance(node, ir.Seq):
        return None
    stmts = list(node.stmts)
    products = [i for i, n in enumerate(stmts) if any(_is_product(m) for m in ir.walk(n))]
    products = [i for i in products if isinstance(stmts[i], ir.Eval)]
    if not products:
        return None
    calls = [n for n in ir.walk(stmts[products[0]]) if _is_product(n)]
    sums = calls[0].args[2]
    assert isinstance(sums, ir.Region)
    copy = ir.Call(ir.HANDLE, "copy", (replace(sums, mode="r"), replace(sums, mode="w")))
    return ir.Seq(None, (*stmts[: products[0] + 1], ir.Eval(None, copy), *stmts[products[0] + 1 :]))


def _is_product(node: object) -> bool:
    return isinstance(node, ir.Call) and node.op == "wgmma_gemm"


def _is_wait(node: ir.Stmt) -> bool:
    return isinstance(node, ir.Eval) and isinstance(node.value, ir.Call) and node.value.op == "wait_wgmma"


def _sent(node: ir.Stmt, change: Callable[[ir.Store], ir.Stmt]) -> ir.Stmt | None:
    return change(node) if isinstance(node, ir.Store) and node.buffer.name == "combine" else None


@pytest.mark.parametrize("name", EDITS)
def test_no_edit_is_proved(name):
    assert after(EDITS[name])


# --------------------------------------------------------------------------- weights that are widened
def in_widening(at: int, change: Callable[[ir.Expr], ir.Expr | None]) -> Edit:
    """Of the words that are widened: where they are put (1), or what they are (2)."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Eval) and isinstance(node.value, ir.Call) and node.value.op == "call_extern":
            args = node.value.args
            changed = (*args[:at], in_expr(args[at], change), *args[at + 1 :])
            return replace(node, value=replace(node.value, args=changed))
        return None

    return edit


def later(name: str, by: int) -> Callable[[ir.Expr], ir.Expr | None]:
    """The next element of an array of a thread's own."""

    def change(node: ir.Expr) -> ir.Expr | None:
        if isinstance(node, ir.Load) and node.buffer.name == name:
            return replace(node, indices=(plus(node.indices[0], by),))
        return None

    return change


def awaited(change: Callable[[ir.Expr], ir.Expr | None] | None) -> Edit:
    """Waits for pieces, of other places, or none."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Eval) and isinstance(node.value, ir.Call):
            first = node.value.args[0] if node.value.args else None
            if isinstance(first, ir.Load) and first.buffer.name == "loaded":
                if change is None:
                    return NOTHING
                args = (in_expr(first, change), *node.value.args[1:])
                return replace(node, value=replace(node.value, args=args))
        return None

    return edit


WIDENING: dict[str, Edit] = {
    "codes of the next row": stored("codes", read("codes_tile", 1)),
    "codes of the next place": stored("codes", read("codes_tile", 0)),
    "offsets of the next row": stored("offset", read("o_tile", 1)),
    "offsets of the next place": stored("offset", read("o_tile", 0)),
    "codes of another row, kept beside": in_widening(2, later("codes", 4)),
    "the offset of another row, kept beside": in_widening(2, later("offset", 1)),
    "words put in the next place": in_widening(1, later("wide", 4)),
    "the next bytes": stored("wide_ring", read("wide", 0)),
    "bytes put in the next row": stored("wide_ring", to(2)),
    "bytes put in the next channel": stored("wide_ring", to(3)),
    "bytes put in the next step": stored("wide_ring", to(1)),
    "bytes put in the next rank's ring": stored("wide_ring", to(0)),
    "bytes put there in some tiles": stored("wide_ring", lambda s: ir.If(None, tile_is_zero(), s, None)),
    "bytes put there twice": stored("wide_ring", lambda s: ir.Seq(None, (s, replace(s)))),
    "a byte times a row's number": stored("wide_ring", of_place()),
    "a piece that is not waited for": awaited(None),
    "another piece that is waited for": awaited(later("loaded", 1)),
}


def of_widened(edit: Edit) -> list[str]:
    """Return in what, or why, a widening kernel with an edit is not one with NARROW."""
    changed = edited(edit, tile_stage(WIDENED))
    kernels = {"narrow": lambda: (tile_stage(NARROW), NARROW), "widened": lambda: (changed, WIDENED)}
    found = invariance_proof.one_signature(kernels)
    reasons = [a.reason for a in found.answers if a.verdict is not Verdict.PROVED]
    return [*reasons, *(i.message for i in found.unsupported)]


def test_what_is_widened_is_what_others_have_in_registers():
    assert not of_widened(lambda node: replace(node) if isinstance(node, ir.Bind) else None)


@pytest.mark.parametrize("name", WIDENING)
def test_no_edit_of_what_is_widened_is_proved(name):
    assert after(WIDENING[name], WIDENED)


# --------------------------------------------------------------------------- other functions
def moved_counter(node: ir.Stmt) -> ir.Stmt | None:
    """Stages that are done are counted in the rounds of a product, whose number they decide."""
    if not (isinstance(node, ir.If) and any(_is_product(n) for n in ir.walk(node)) and _is_round(node)):
        return None
    done = next(
        n for n in ir.walk(tile_stage(WIDE).body) if isinstance(n, ir.Store) and n.buffer.name == "done"
    )
    count = ir.Load(ir.INT32, done.buffer, done.indices)
    looked_up = in_expr(node.cond, lambda n: count if isinstance(n, ir.Var) and n.name == "done" else None)
    return replace(node, cond=looked_up, then=ir.Seq(None, (node.then, replace(done, value=plus(count, 1)))))


def _is_round(node: ir.If) -> bool:
    return not any(isinstance(n, ir.For) and n.kind == "serial" for n in ir.walk(node.then))


def test_rounds_that_move_what_their_number_is_of_are_not_proved():
    assert after(moved_counter, WIDE)


def halved(store: ir.Store) -> ir.Store:
    half = ir.Const(store.value.dtype, 0.5)
    return replace(store, value=ir.BinOp(store.value.dtype, "mul", store.value, half))


@pytest.mark.parametrize("number", range(NUMBERS))
def test_another_number_in_what_is_widened_is_another_signature(number):
    seen = [0]

    def change(node: ir.Expr) -> ir.Expr | None:
        if not isinstance(node, ir.Const):
            return None
        seen[0] += 1
        return replace(node, value=node.value + 1) if seen[0] == number + 1 else None

    assert of_widened(in_widening(2, change))
    assert seen[0] == NUMBERS


def test_the_next_words_of_a_row_are_another_signature():
    assert of_widened(stored("codes", read("codes_tile", 2)))


@pytest.mark.parametrize("layer", [name for name in instances.FORMS if "fp4" in name])
def test_a_layers_widened_kernel_has_the_signature_of_its_narrowest(layer):
    of_one = [c for c in instances.layer_kernels(layer) if c.num_ranks == 1]
    chosen = [c for c in of_one if c.widened or c.tokens == 1]
    assert [c.widened for c in chosen] == [True, False]
    found = invariance_proof.one_signature({str(c.tokens): lambda c=c: (tile_stage(c), c) for c in chosen})
    assert [a.verdict for a in found.answers] == [Verdict.PROVED]
    assert is_proved_again(found)


@pytest.mark.parametrize("name", ["acc_a", "acc_b", "hidden", "total", "h_ring_scale"])
def test_another_function_is_another_signature(name):
    tile = tile_stage(CONFIG)
    changed = edited(stored(name, halved), tile)
    kernels = {"one": lambda: (tile, CONFIG), "other": lambda: (changed, CONFIG)}
    assert open_claims(invariance_proof.claims(changed, CONFIG)) == []
    answers = invariance_proof.one_signature(kernels).answers
    assert [a.verdict for a in answers] == [Verdict.UNKNOWN]


def test_forms_with_one_shape_have_one_signature():
    narrow = replace(FP8, hidden=512, inter=512)
    kernels = {str(c.block_m): (lambda c=c: (tile_stage(c), c)) for c in (narrow, WIDE)}
    assert [a.verdict for a in invariance_proof.one_signature(kernels).answers] == [Verdict.PROVED]


@pytest.mark.parametrize("ranks", [1, instances.MOST_RANKS])
@pytest.mark.parametrize("layer", instances.FORMS)
def test_every_form_of_a_layer_is_followed(layer, ranks):
    arguments, _ = instances.FORMS[layer]
    chosen = [config_for(tokens, ranks=ranks, **arguments) for tokens in range(1, 8193)]
    followed = [c for c in instances.layer_kernels(layer) if c.num_ranks == ranks]
    assert {instances.form(c) for c in chosen} == {instances.form(c) for c in followed if c.launch_ranks == 1}


def test_several_ranks_are_of_one_form():
    for arguments, tokens in instances.FORMS.values():
        for number in tokens:
            assert len({config_for(number, ranks=ranks, **arguments) for ranks in instances.RANKS}) == 1


@pytest.mark.parametrize("ranks", instances.RANKS)
@pytest.mark.parametrize(("name", "change"), [("factor_b", read("factors", 0)), ("total", halved)])
def test_another_function_of_one_of_several_ranks_is_no_signature_of_theirs(ranks, name, change):
    kernels = instances.layer_kernels("flash-fp4")
    one, two = kernels[0], next(c for c in kernels if c.num_ranks == ranks)
    changed = edited(stored(name, change), tile_stage(two))
    of_both = {"one": lambda: (tile_stage(one), one), "of": lambda: (changed, two)}
    found = invariance_proof.one_signature(of_both)
    assert found.unsupported or [a.verdict for a in found.answers] == [Verdict.UNKNOWN]
