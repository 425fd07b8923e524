"""What the plan's kernel puts where, for every routing: proved of compiled kernels; no edit of them is."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
import z3

from megamoe import plan_proof
from megamoe.instances import CONFIG, PLANS
from megamoe.launch_proofs import plan_claimed, plan_extracted
from megamoe.plan_count import MINE, RANK
from megamoe.plan_guide import PlanGuide
from megamoe.proofs import full_routing, plan, random_routing
from tests.megamoe.role_edits import only, plus
from tests.megamoe.test_protocol import Edit, edited
from verify import ir
from verify.interp import device
from verify.properties import Claims
from verify.solve import Proved, Prover, remembering
from verify.verdict import Verdict

C = CONFIG
UNTOUCHED = -7
BARRIERS = 6  # of a CTA of CONFIG's kernel, behind the one where ranks have met
# What z3 proved of kernels and their edits: most of what is asked of an edit is asked of all.
PROVED: Proved = {}


def open_claims(claims: Mapping[str, Claims], *, recheck: bool = False) -> dict[str, list[str]]:
    """Return what is not proved, by claims: goals, and what has no meaning or is not covered."""
    found = {}
    for name, claim in claims.items():
        left = [issue.message for issue in (*claim.unsupported, *claim.unknown)]
        if not left:
            with remembering(PROVED):
                answers = Prover(recheck=recheck, minimise=False).prove(claim.obligations)
            left = [a.obligation.what for a in answers if a.verdict is not Verdict.PROVED]
        if left:
            found[name] = left
    return found


def claimed(edit: Edit) -> dict[str, Claims]:
    return plan_proof.claims(edited(edit, plan_extracted().device), PlanGuide(C))


# --------------------------------------------------------------------------- edits
def stored(buffer: str, change: Callable[[ir.Store], ir.Stmt]) -> Edit:
    return lambda node: change(node) if isinstance(node, ir.Store) and node.buffer.name == buffer else None


def elsewhere(node: ir.Store) -> ir.Store:
    (index,) = node.indices
    return replace(node, indices=(plus(index, 1),))


def other_value(node: ir.Store) -> ir.Store:
    return replace(node, value=plus(node.value, 1))


def dropped(node: ir.Stmt) -> ir.Stmt:
    return ir.Seq(node.span, ())


def changed(node: ir.Expr, change: Callable[[ir.Expr], ir.Expr | None]) -> ir.Expr:
    """Return an expression with the first parts changed of which `change` returns something."""
    new = change(node)
    if new is not None:
        return new
    match node:
        case ir.BinOp(a=a, b=b):
            return replace(node, a=changed(a, change), b=changed(b, change))
        case ir.Select(cond=c, a=a, b=b):
            return replace(node, cond=changed(c, change), a=changed(a, change), b=changed(b, change))
        case ir.Load(indices=indices):
            return replace(node, indices=tuple(changed(i, change) for i in indices))
        case ir.Cast(a=a):
            return replace(node, a=changed(a, change))
    return node


def number(old: int, new: int) -> Callable[[ir.Expr], ir.Expr | None]:
    def change(node: ir.Expr) -> ir.Expr | None:
        return replace(node, value=new) if isinstance(node, ir.Const) and node.value == old else None

    return change


def valued(buffer: str, change: Callable[[ir.Expr], ir.Expr | None]) -> Edit:
    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.Store) or node.buffer.name != buffer:
            return None
        new = changed(node.value, change)
        return None if new is node.value or texts(new) == texts(node.value) else replace(node, value=new)

    return edit


def texts(node: ir.Expr) -> list[str]:
    return [f"{type(n).__name__} {getattr(n, 'op', '')} {getattr(n, 'value', '')}" for n in ir.walk(node)]


def conditions(of: Callable[[ir.If], bool], change: Callable[[ir.Expr], ir.Expr]) -> Edit:
    return lambda node: (
        replace(node, cond=change(node.cond)) if isinstance(node, ir.If) and of(node) else None
    )


def stores(buffer: str) -> Callable[[ir.If], bool]:
    """Whether the first thing that happens on a condition is a store to a buffer."""

    def of(node: ir.If) -> bool:
        then = node.then
        return isinstance(then, ir.Store) and then.buffer.name == buffer

    return of


def at_most(node: ir.Expr) -> ir.Expr:
    """`<` becomes `<=`."""

    def change(inner: ir.Expr) -> ir.Expr | None:
        return replace(inner, op="le") if isinstance(inner, ir.BinOp) and inner.op == "lt" else None

    return changed(node, change)


def without_barrier(number: int) -> Edit:
    def edit(node: ir.Stmt) -> ir.Stmt | None:
        return dropped(node) if is_barrier(node) else None

    return only(number, edit)


def has_rows(node: ir.If) -> bool:
    return node.orelse is not None


def other_op(old: str, new: str) -> Callable[[ir.Expr], ir.Expr | None]:
    def change(node: ir.Expr) -> ir.Expr | None:
        return replace(node, op=new) if isinstance(node, ir.BinOp) and node.op == old else None

    return change


def longer(edit: Callable[[ir.For], bool], by: int) -> Edit:
    return lambda node: (
        replace(node, extent=plus(node.extent, by)) if isinstance(node, ir.For) and edit(node) else None
    )


def loads(buffer: str) -> Callable[[ir.For], bool]:
    return lambda node: any(isinstance(n, ir.Load) and n.buffer.name == buffer for n in ir.walk(node))


def clears(node: ir.For) -> bool:
    return isinstance(node.body, ir.Store) and node.body.buffer.name == "seen"


MUTANTS: dict[str, Callable[[], Edit]] = {
    "a row further": lambda: only(0, stored("row_source", elsewhere)),
    "another entry's row": lambda: only(0, stored("row_source", other_value)),
    "another's column of counts": lambda: only(1, stored("seen", elsewhere)),
    "another's partial sum": lambda: stored("partial", elsewhere),
    "counts of the next expert": lambda: stored("count", elsewhere),
    "the next block's expert": lambda: stored("block_expert", elsewhere),
    "the next expert's count": lambda: stored("counts", elsewhere),
    "another's firsts": lambda: stored("firsts", elsewhere),
    "the next row's target": lambda: only(0, stored("row_target", elsewhere)),
    "an entry not counted": lambda: only(1, stored("seen", dropped)),
    "an entry counted twice": lambda: only(1, stored("seen", other_value)),
    "counts not cleared": lambda: only(0, stored("seen", dropped)),
    "counts of an expert not cleared": lambda: longer(clears, -1),
    "an entry not found": lambda: only(1, stored("found", dropped)),
    "a place taken twice": lambda: only(3, stored("place", dropped)),
    "a warp's own rows before it": lambda: conditions(stores("place"), at_most),
    "an expert's own blocks before it": lambda: conditions(stores("before"), at_most),
    "a base further": lambda: only(0, stored("before", other_value)),
    "a row too many": lambda: conditions(has_rows, at_most),
    "sums cut off": lambda: valued("total", number(40, 39)),
    "a thread's counts cut off": lambda: only(0, valued("seen", number(3, 2))),
    "blocks rounded down": lambda: valued("blocks_of", number(15, 14)),
    "fewer blocks": lambda: valued("blocks", number(15, 0)),
    "lanes left out": lambda: only(0, longer(loads("partial"), -30)),
    "target of another token": lambda: only(0, stored("row_target", other_value)),
    "source of another entry": lambda: only(1, valued("row_source", lambda n: plus(n, 1))),
    "rows not ended": lambda: only(1, stored("row_target", dropped)),
    "routing of another rank": lambda: valued("chosen", number(3, 0)),
    "experts of another wave": lambda: only(0, longer(loads("blocks_of"), -2)),
    **{f"without barrier {i}": lambda i=i: without_barrier(i) for i in range(1, BARRIERS + 1)},
}
# What the proof does not read as a plan: it has to say so.
NOT_FOLLOWED: dict[str, Callable[[], Edit]] = {
    "a loop that runs on": lambda: (
        lambda node: ir.While(node.span, ir.Const(ir.BOOL, 1), node) if clears_stmt(node) else None
    ),
    "an atomic output": lambda: stored(
        "counts",
        lambda node: ir.Eval(
            node.span,
            ir.Call(
                ir.INT32,
                "atomic_max_elem_op",
                (
                    ir.AccessPtr(ir.HANDLE, node.buffer.data, ir.INT32, node.indices[0], node.value, "rw"),
                    node.value,
                    ir.Const(ir.INT32, 0),
                ),
            ),
        ),
    ),
    "a barrier of some threads": lambda: (
        lambda node: (
            ir.If(node.span, less_than_all(node), barrier_in(node), None) if is_barrier(node) else None
        )
    ),
    "a pointer into an output": lambda: only(
        0, stored("before", lambda node: ir.Seq(node.span, (node, ir.Bind(node.span, *pointer()))))
    ),
    "a wait for shared memory": lambda: only(0, stored("polls", waits_for_counts)),
    "weights compared": lambda: only(0, stored("total", weighed)),
    "words of another width": lambda: stored(
        "counts", lambda node: replace(node, buffer=replace(node.buffer, dtype=ir.DType("int64")))
    ),
    "another output": lambda: only(
        0,
        stored("firsts", lambda node: ir.Seq(node.span, (node, replace(node, buffer=other_buffer(node))))),
    ),
}


def pointer() -> tuple[ir.Var, ir.Expr]:
    (base,) = (p for p in plan_extracted().device.params if p.name == "row_source")
    offset = ir.Const(ir.INT32, 4)
    return ir.Var(ir.HANDLE, "other"), ir.Call(ir.HANDLE, "handle_add_byte_offset", (base, offset))


def waits_for_counts(node: ir.Store) -> ir.Stmt:
    """A wait until a word of shared memory is set."""
    word = next(
        n.buffer.data
        for n in ir.walk(plan_extracted().device.body)
        if isinstance(n, ir.Decl) and n.buffer.name == "seen"
    )
    zero, one = (ir.Const(ir.INT32, n) for n in (0, 1))
    at = ir.AccessPtr(ir.HANDLE, word, ir.INT32, zero, one, "r")
    value = ir.Call(ir.INT32, "atomic_load_elem_op", (at, zero))
    wait = ir.While(node.span, ir.BinOp(ir.BOOL, "lt", value, one), node)
    return ir.Seq(node.span, (node, wait))


def weighed(node: ir.Store) -> ir.Stmt:
    """A store on a condition of weights."""
    weight = next(
        n
        for n in ir.walk(plan_extracted().device.body)
        if isinstance(n, ir.Load) and n.buffer.name == "topk_weights"
    )
    load = replace(weight, indices=(ir.Const(ir.INT32, 0),))
    return ir.If(node.span, ir.BinOp(ir.BOOL, "lt", load, load), node, node)


def clears_stmt(node: ir.Stmt) -> bool:
    return isinstance(node, ir.For) and clears(node)


def is_barrier(node: ir.Stmt) -> bool:
    return isinstance(node, ir.Eval) and isinstance(node.value, ir.Call) and "sync" in node.value.op


def barrier_in(node: ir.Stmt) -> ir.Stmt:
    return ir.Eval(node.span, node.value)  # type: ignore[attr-defined]


def less_than_all(node: ir.Stmt) -> ir.Expr:
    zero = ir.Const(ir.INT32, 0)
    return ir.BinOp(ir.BOOL, "le", zero, zero)


def other_buffer(node: ir.Store) -> ir.Buffer:
    return replace(node.buffer, name="other", data=ir.Var(ir.HANDLE, "other"))


# --------------------------------------------------------------------------- on CPU tensors
def is_refuted(edit: Callable[[], Edit]) -> bool:
    """Return whether a run, thread by thread, of an edited kernel goes wrong: other places, or a race."""
    function = edited(edit(), plan_extracted().device)
    all_of_one = torch.zeros(C.num_ranks, C.tokens, C.topk, dtype=torch.int32)
    return any(goes_wrong(function, idx) for idx in (full_routing(), random_routing(1), all_of_one))


def goes_wrong(function: ir.Function, idx: torch.Tensor) -> bool:
    weights = torch.rand(C.num_ranks, C.tokens, C.topk)
    wanted = vars(plan(idx, weights))
    found = [torch.full_like(t, UNTOUCHED) for t in wanted.values()]
    words = [torch.zeros(C.num_ranks, n, dtype=torch.int32) for n in (C.signal_words, 1, 1)]
    edited_kernel = replace(plan_extracted(), device=function)
    try:
        device.run(edited_kernel, idx.flatten(), weights.flatten(), *found, *words, wave_threads=256)
    except Exception:  # whatever the run stops for
        return True
    blocks = wanted["firsts"][:, -1]
    for name, got in zip(wanted, found, strict=True):
        for rank in range(C.num_ranks):
            of_blocks = {"block_expert": 1}.get(name, C.block_m if name.startswith("row_") else 0)
            used = int(blocks[rank]) * of_blocks if of_blocks else got.shape[1]
            if not torch.equal(got[rank, :used], wanted[name][rank, :used]):
                return True
            if not (got[rank, used:] == UNTOUCHED).all():
                return True
    return False


class TestKernel:
    @pytest.mark.parametrize("name", ["plan", "plan-odd"])
    def test_is_proved_by_both_solvers(self, name):
        """Those of models are proved by `dsv4-verify`."""
        assert open_claims(plan_claimed(PLANS[name]), recheck=True) == {}

    @pytest.mark.parametrize("name", MUTANTS)
    def test_mutants_are_not_proved(self, name):
        assert open_claims(claimed(MUTANTS[name]()))

    @pytest.mark.slow
    @pytest.mark.parametrize("name", MUTANTS)
    def test_mutants_go_wrong(self, name):
        assert is_refuted(MUTANTS[name])

    @pytest.mark.slow
    def test_the_kernel_does_not_go_wrong(self):
        assert not is_refuted(lambda: lambda node: node if clears_stmt(node) else None)

    @pytest.mark.parametrize("name", NOT_FOLLOWED)
    def test_what_is_not_followed_is_said(self, name):
        claims = claimed(NOT_FOLLOWED[name]())
        assert any(claim.unsupported or claim.unknown for claim in claims.values())

    def test_a_kernel_of_other_sizes_is_not_proved(self):
        other = PlanGuide(replace(C, num_experts=4))
        assert open_claims(plan_proof.claims(plan_extracted().device, other))

    def test_of_others_in_a_launch_that_has_met(self):
        claims = plan_claimed(PLANS["plan"])
        assert plan_proof.NOT_ENDED in claims["walk"].assumptions
        alone = plan_claimed(PLANS["plan-flash"])
        assert plan_proof.NOT_ENDED not in alone["walk"].assumptions


# --------------------------------------------------------------------------- what it is held against
class Counted:
    """The functions of `plan_count`, counted on a routing for one rank and expert."""

    def __init__(self, guide: PlanGuide, idx: torch.Tensor, weights: list[int], rank: int, mine: int) -> None:
        self.guide, self.idx, self.weights = guide, idx.flatten().tolist(), weights
        self.symbols = {MINE: mine, RANK: rank}
        self.first = guide.counts.first_expert + rank * guide.counts.experts

    def is_of(self, e: int, n: int) -> bool:
        return 0 <= n < len(self.idx) and self.idx[n] == self.first + e

    def of_thread(self, e: int, t: int) -> int:
        share = self.guide.counts.share
        return sum(self.is_of(e, n) for n in range(t * share, (t + 1) * share))

    def call(self, name: str, args: list[int]) -> int:
        c = self.guide.counts
        match name, args:
            case "topk_idx[]", [n]:
                return self.idx[n] if 0 <= n < len(self.idx) else -1
            case "topk_weights[]", [n]:
                return self.weights[n] if 0 <= n < len(self.weights) else -1
            case "count", [e, n]:
                return sum(self.is_of(e, m) for m in range(n))
            case "blocks", [i]:
                return sum(-(-self.call("count", [e, len(self.idx)]) // c.block_m) for e in range(i))
            case "strided", [e, lane, w]:
                return sum(self.of_thread(e, v * 32 + lane) for v in range(w))
            case "lanes", [e, lanes]:
                return sum(self.call("strided", [e, lane, c.warps]) for lane in range(lanes))
            case "entry_of", [e, r, n]:
                own = [m for m in range(n) if self.is_of(e, m)]
                return own[r] if 0 <= r < len(own) else -1
        raise AssertionError(name)

    def value(self, term: z3.ExprRef, **symbols: int) -> int:
        """Return the value of a term; the names are those of its symbols."""
        known = {s.decl().name(): v for s, v in self.symbols.items()} | symbols
        kept: dict[int, int] = {}

        def of(t: z3.ExprRef) -> int:
            if t.get_id() not in kept:
                kept[t.get_id()] = compute(t)
            return kept[t.get_id()]

        def compute(t: z3.ExprRef) -> int:
            if z3.is_int_value(t):
                return t.as_long()
            kind, name = t.decl().kind(), t.decl().name()
            if kind == z3.Z3_OP_UNINTERPRETED:
                return self.call(name, [of(a) for a in t.children()]) if t.children() else known[name]
            if kind == z3.Z3_OP_ITE:
                cond, a, b = t.children()
                return of(a) if of(cond) else of(b)
            if kind == z3.Z3_OP_IMPLIES:
                cond, a = t.children()
                return int(not of(cond) or of(a))
            return int(PLAIN[kind](*(of(a) for a in t.children())))

        return of(term)


PLAIN: dict[int, Callable[..., int]] = {
    z3.Z3_OP_ADD: lambda *a: sum(a),
    z3.Z3_OP_SUB: lambda a, *b: a - sum(b),
    z3.Z3_OP_UMINUS: lambda a: -a,
    z3.Z3_OP_MUL: lambda a, b: a * b,
    z3.Z3_OP_IDIV: lambda a, b: a // b,
    z3.Z3_OP_MOD: lambda a, b: a % b,
    z3.Z3_OP_LE: lambda a, b: a <= b,
    z3.Z3_OP_LT: lambda a, b: a < b,
    z3.Z3_OP_GE: lambda a, b: a >= b,
    z3.Z3_OP_GT: lambda a, b: a > b,
    z3.Z3_OP_EQ: lambda a, b: a == b,
    z3.Z3_OP_NOT: lambda a: not a,
    z3.Z3_OP_AND: lambda *a: all(a),
    z3.Z3_OP_OR: lambda *a: any(a),
    z3.Z3_OP_TRUE: lambda: 1,
    z3.Z3_OP_FALSE: lambda: 0,
}


def shown(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Weights as their bits."""
    return tensor.view(torch.int32) if name == "row_weight" else tensor


class TestDefinition:
    @pytest.mark.parametrize("seed", [0, 1, 4])
    def test_is_that_of_make_plan(self, seed):
        """Every place that a CTA is said to write, and what is said of it, on a routing."""
        idx = random_routing(seed)
        weights = torch.rand(idx.shape)
        guide, wanted = PlanGuide(C), vars(plan(idx, weights))
        bits = weights.view(torch.int32).flatten().tolist()
        at = z3.Int("at")
        for name in plan_proof.OUTPUTS:
            tensor = shown(name, wanted[name])
            written = torch.zeros(tensor.numel(), dtype=torch.int32)
            is_in, value = (f(at) for f in (guide.writes[name][-1].is_in, guide.writes[name][-1].value))
            for rank in range(C.num_ranks):
                for mine in range(C.num_experts):
                    counted = Counted(guide, idx, bits, rank, mine)
                    for place, found in enumerate(tensor.flatten().tolist()):
                        if counted.value(is_in, at=place):
                            assert counted.value(value, at=place) == found
                            written[place] += 1
            blocks = wanted["firsts"][:, -1].tolist()
            size = {"block_expert": 1}.get(name, C.block_m if name.startswith("row_") else 0)
            by_rank = written.view(C.num_ranks, -1)
            for rank, count in enumerate(blocks):
                used = count * size if size else by_rank.shape[1]
                assert by_rank[rank].tolist() == [1] * used + [0] * (by_rank.shape[1] - used)

    def test_facts_hold_of_counts(self):
        """Instances that a proof may use, for terms at many places of a routing."""
        guide = PlanGuide(C)
        counts, idx = guide.counts, random_routing(1)
        names = "e", "n", "m", "w", "lane", "r"
        e, n, m, w, lane, r = z3.Ints(" ".join(names))
        terms = [
            counts.before(e, n) + counts.before(e, n + 1) + counts.rows(e),
            z3.Function("count", *[z3.IntSort()] * 3)(e, m)
            + z3.Function("count", *[z3.IntSort()] * 3)(e, m + 1),
            z3.Function("blocks", *[z3.IntSort()] * 2)(e) + z3.Function("blocks", *[z3.IntSort()] * 2)(e + 1),
            z3.Function("strided", *[z3.IntSort()] * 4)(e, lane, w),
            z3.Function("strided", *[z3.IntSort()] * 4)(e, lane, w + 1),
            z3.Function("lanes", *[z3.IntSort()] * 3)(e, lane)
            + z3.Function("lanes", *[z3.IntSort()] * 3)(e, lane + 1),
            counts.entry(e, r),
        ]
        facts = counts.about(terms)
        assert len(facts) > 100
        generator = torch.Generator().manual_seed(0)
        for rank in range(C.num_ranks):
            counted = Counted(guide, idx, [], rank, 0)
            for _ in range(12):
                limits = (C.num_experts, 12, counts.entries, counts.warps, 33, 8)
                drawn = [int(torch.randint(limit, (1,), generator=generator)) for limit in limits]
                for fact in facts:
                    assert counted.value(fact, **dict(zip(names, drawn, strict=True))), fact

    def test_no_false_fact_is_proved(self):
        """Facts of a pool one block short, and of threads that leave entries out, are not proved."""
        counts = PlanGuide(C).counts
        for wrong in (replace(counts, pool=counts.pool - 1), replace(counts, share=0)):
            answers = Prover(recheck=False).prove(list(wrong.facts()))
            assert any(a.verdict is not Verdict.PROVED for a in answers)
