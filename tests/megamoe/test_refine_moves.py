"""What refinement's rules for layers' kernels put in the place of something: its value, and no edit's."""

from dataclasses import replace

import pytest

from megamoe.instances import FLASH, PRO
from megamoe.refine_index import divided_sum, number, op
from megamoe.refine_moves import choice_is_kept, chosen_number, under_condition
from megamoe.refine_words import SIGHT, parted
from tests.megamoe.role_edits import plus
from tests.megamoe.test_protocol import Edit, in_expr
from tests.megamoe.test_refine_proof import after, other_value, stored, value, without_store
from verify import ir
from verify.solve import Obligation, Prover
from verify.verdict import Verdict

X, Y, BX = (ir.Var(ir.INT32, name) for name in ("x", "y", "bx"))
SUM, OUT, OTHER = (
    ir.Buffer(name, ir.INT32, (number(8),), (), scope, ir.Var(ir.HANDLE, name), number(0))
    for name, scope in (("sum", "local"), ("out", "global"), ("other", "local"))
)
LINE = ir.Span("", 7, 0)


# --------------------------------------------------------------------------- edits of kernels
def changed(change) -> Edit:
    """A statement in whose expressions something is another."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        match node:
            case ir.If(cond=cond):
                new = in_expr(cond, change)
                return replace(node, cond=new) if differs(new, cond) else None
            case ir.Store(value=old) | ir.Bind(value=old) | ir.Eval(value=old):
                new = in_expr(old, change)
                return replace(node, value=new) if differs(new, old) else None
        return None

    return edit


def differs(a: ir.Expr, b: ir.Expr) -> bool:
    return str(list(ir.walk(a))) != str(list(ir.walk(b)))


def copies(change) -> Edit:
    """Copies in which something is another."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Eval) and isinstance(node.value, ir.Call):
            return changed(change)(node) if node.value.op in ("tma_load", "tma_copy") else None
        return None

    return edit


def chosen(yes: int = 0, compared: int = 0):
    """A choice between numbers is another, or made for another kind."""

    def change(node: ir.Expr) -> ir.Expr | None:
        if chosen_number(node) is None:
            return None
        assert isinstance(node, ir.Select)
        assert isinstance(node.cond, ir.BinOp)
        cond = replace(node.cond, b=number(int(node.cond.b.value) + compared))
        return replace(node, cond=cond, a=number(int(node.a.value) + yes))

    return change


def around(name: str, change) -> Edit:
    """The last condition around stores of a tensor is another."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.If) and isinstance(node.then, ir.Store):
            return replace(node, cond=change(node.cond)) if node.then.buffer.data.name == name else None
        return None

    return edit


def wider(node: ir.Expr) -> ir.Expr:
    assert isinstance(node, ir.BinOp)
    return replace(node, b=plus(node.b, 1))


def guarded_less(node: ir.Expr) -> ir.Expr | None:
    """What a read of `topk_idx` is guarded by is one less."""
    if isinstance(node, ir.Select) and isinstance(node.a, ir.Load) and node.a.buffer.data.name == "topk_idx":
        assert isinstance(node.cond, ir.BinOp)
        return replace(node, cond=replace(node.cond, b=plus(node.cond.b, -1)))
    return None


def in_scale_loop(node: ir.Stmt) -> ir.Stmt | None:
    """The condition around the copy of scales is another."""
    if isinstance(node, ir.If) and isinstance(node.then, ir.Seq):
        binds = [s for s in node.then.stmts if isinstance(s, ir.Bind) and s.var.name == "scale"]
        assert not binds or isinstance(node.cond, ir.BinOp)
        return replace(node, cond=replace(node.cond, b=plus(node.cond.b, -1))) if binds else None
    return None


def whole_again(store: ir.Store) -> ir.Stmt:
    """A quotient of a sum is another sum's."""
    divided = divided_sum(store.value, None)
    if divided is None:
        return store
    assert isinstance(store.value, ir.BinOp)
    return replace(store, value=replace(store.value, a=plus(store.value.a, 1)))


def dispatched(change) -> Edit:
    """A store of `block` whose value is a sum divided by a number."""
    of_block = stored("block", change)
    return lambda n: of_block(n) if isinstance(n, ir.Store) and divided_sum(n.value, None) else None


def other_divisor(store: ir.Store) -> ir.Stmt:
    assert isinstance(store.value, ir.BinOp)
    return replace(store, value=replace(store.value, b=plus_number(store.value.b)))


def plus_number(node: ir.Expr) -> ir.Const:
    assert isinstance(node, ir.Const)
    return number(int(node.value) + 1)


FLASH_8, FLASH_FP4, PRO_FP4 = FLASH["fp8-8"], FLASH["fp4-4096"], PRO["fp4-4096"]
EDITS = {
    "y is stored by one more": (FLASH_8, "device", around("y", wider)),
    "y is stored whatever holds": (FLASH_8, "device", around("y", lambda _: ir.Const(ir.BOOL, True))),
    "a slot is read by one less": (FLASH_8, "device", changed(guarded_less)),
    "another sum": (FLASH_8, "device", other_value("total")),
    "no sum": (FLASH_8, "device", without_store("total")),
    "the tile program sums another": (FLASH_8, "tile", other_value("total")),
    "late copies of another step": (FLASH_FP4, "device", copies(chosen(yes=1))),
    "late copies of another kind": (FLASH_FP4, "device", copies(chosen(compared=1))),
    "a block's quotient of one more": (FLASH_FP4, "device", dispatched(whole_again)),
    "a block by another divisor": (FLASH_FP4, "device", dispatched(other_divisor)),
    "the tile program's quotient of one more": (FLASH_FP4, "tile", dispatched(whole_again)),
    "fewer scales are copied": (PRO_FP4, "device", in_scale_loop),
    "no scales are copied": (PRO_FP4, "device", without_store("x_ring_scale")),
}


@pytest.mark.slow
class TestCompiledKernel:
    @pytest.mark.parametrize("name", EDITS)
    def test_edits(self, name):
        config, level, edit = EDITS[name]
        assert after(edit, config, level)


# --------------------------------------------------------------------------- rules
def proved(obligation: Obligation) -> bool:
    return [a.verdict for a in Prover().prove([obligation])] == [Verdict.PROVED]


class TestChoice:
    CHOICE = ir.Select(ir.INT32, op("eq", X, number(2)), number(32), number(16), lazy=True)

    def test_value(self):
        found = chosen_number(self.CHOICE)
        assert found is not None
        assert proved(choice_is_kept(self.CHOICE, found, None))

    def test_another_is_not_kept(self):
        found = chosen_number(replace(self.CHOICE, a=number(31)))
        assert found is not None
        assert not proved(choice_is_kept(self.CHOICE, found, None))

    @pytest.mark.parametrize(
        "choice",
        [
            replace(CHOICE, cond=op("lt", X, number(2))),
            replace(CHOICE, cond=op("eq", X, Y)),
            replace(CHOICE, a=Y),
            replace(CHOICE, b=Y),
        ],
    )
    def test_others_stay(self, choice):
        assert chosen_number(choice) is None


class TestDivision:
    """`(33 x + y // 4) // 4` and `(132 x + y) // 16` are one."""

    TWICE = op("floordiv", op("add", op("mul", X, number(33)), op("floordiv", Y, number(4))), number(4))
    ONCE = op("floordiv", op("add", Y, op("mul", X, number(132))), number(16))

    def test_one_form(self):
        forms = [divided_sum(e, None) for e in (self.TWICE, self.ONCE)]
        assert all(form is not None and proved(form[1]) for form in forms)
        assert len({str(list(ir.walk(form[0]))) for form in forms if form}) == 1

    def test_value(self):
        for expr in (self.TWICE, self.ONCE):
            form = divided_sum(expr, None)
            assert form is not None
            for x in range(-9, 9):
                for y in range(-40, 40):
                    found, wanted = (e for e in (form[0], expr))
                    assert value(found, {X: x, Y: y}) == value(wanted, {X: x, Y: y})

    def test_others_stay(self):
        assert divided_sum(op("add", X, Y), None) is None
        assert divided_sum(op("floordiv", X, Y), None) is None


class TestParts:
    """A condition around a loop's body is put around both of its parts."""

    def test_parts(self):
        shared = replace(OUT, name=f"{SIGHT}x")
        sight = ir.Store(LINE, shared, (X,), X)
        cond = op("lt", X, number(7))
        store = ir.Store(LINE, OUT, (X,), Y)
        name = ir.Bind(LINE, Y, X)
        body = ir.Seq(None, (name, sight, store))
        first, second = parted([ir.If(LINE, cond, body, None)])
        (of_sight,), (of_rest,) = first, second
        assert str(of_sight) == str(ir.If(LINE, cond, ir.Seq(None, (name, sight)), None))
        assert str(of_rest) == str(ir.If(LINE, cond, ir.Seq(None, (name, store)), None))

    def test_one_part(self):
        whole = ir.If(LINE, op("lt", X, number(7)), ir.Store(LINE, OUT, (X,), Y), None)
        assert str(parted([whole])) == str([[whole]])


class TestCondition:
    """Stores of a thread's own stand under the condition of their only use."""

    COND = op("lt", BX, number(64))
    READ = ir.Load(ir.INT32, SUM, (number(0),))
    ADD = ir.Store(LINE, SUM, (number(0),), ir.Select(ir.INT32, COND, X, number(0), lazy=True))
    USE = ir.If(LINE, COND, ir.Store(LINE, OUT, (BX,), READ), None)

    def held(self, *stmts: ir.Stmt, lines: frozenset[int] = frozenset({7})) -> ir.Stmt:
        launch = ir.Launch(None, BX, "blockIdx.x", number(264), ir.Seq(None, stmts))
        device = ir.Function("f", (), {}, launch, {})
        found = under_condition(device, frozenset({"sum", "other"}), set(lines)).body
        assert isinstance(found, ir.Launch)
        return found.body

    def test_held(self):
        found = self.held(self.ADD, self.USE)
        assert isinstance(found, ir.Seq)
        (whole,) = found.stmts
        assert isinstance(whole, ir.If)
        assert whole.cond is self.COND
        assert isinstance(whole.then, ir.Seq)
        add, use = whole.then.stmts
        assert str(add) == str(replace(self.ADD, value=X))
        assert str(use) == str(self.USE.then)

    @pytest.mark.parametrize(
        "stmts",
        [
            (ADD, USE, ir.Store(LINE, OTHER, (number(0),), READ)),  # used elsewhere
            (ir.Store(LINE, SUM, (number(0),), X), ir.Store(LINE, OUT, (BX,), X), USE),  # another effect
            (ADD, replace(USE, cond=op("lt", READ, number(64)))),  # data decides
            (ADD, replace(USE, cond=op("lt", Y, number(64)))),  # no launch variable
            (ADD, ir.Eval(LINE, ir.Call(ir.HANDLE, "sync_warp", ())), USE),  # a meeting
            (replace(ADD, span=ir.Span("", 8, 0)), USE),  # no line of such a loop
        ],
    )
    def test_others_stay(self, stmts):
        assert str(self.held(*stmts)) == str(ir.Seq(None, stmts))

    def test_without_such_loops(self):
        found = self.held(self.ADD, self.USE, lines=frozenset())
        assert str(found) == str(ir.Seq(None, (self.ADD, self.USE)))
