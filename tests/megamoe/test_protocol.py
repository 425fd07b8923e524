"""The signals of the compiled kernel: no schedule deadlocks or races, and each protocol mutant is refuted."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe import schedule
from megamoe.fused import make_kernel
from megamoe.instances import AHEAD, CONFIG, OPTIONS, WIDE
from megamoe.lowering import as_launched
from megamoe.proofs import (
    ROLES,
    SLOTS,
    ahead_routing,
    extracted,
    full_routing,
    plan,
    plan_extracted,
    problems,
    random_routing,
    shared_routing,
    signalled,
    traces,
    unmet,
)
from megamoe.protocol import boxes, trace
from megamoe.virtual import PASS_CONFIGS
from tests.megamoe import kernels
from tests.megamoe.patient import patient
from verify import ir
from verify.externs import signals
from verify.extract import extract
from verify.host import read_host
from verify.interp import device
from verify.interp.device.flags import RELAXED

Edit = Callable[[ir.Stmt], ir.Stmt | None]
C = CONFIG
G = C.geometry
ADD = "atomic_add_ret_elem_op"


# --------------------------------------------------------------------------- edits of the IR
def edited(edit: Edit, function: ir.Function | None = None) -> ir.Function:
    """Return device IR, the fused kernel's, with each statement replaced by `edit` of it; None keeps it."""
    changed = [0]

    def visit(node: ir.Stmt) -> ir.Stmt:
        new = edit(node)
        if new is not None:
            changed[0] += 1
            return new
        match node:
            case ir.Seq(stmts=stmts):
                return ir.Seq(node.span, tuple(visit(s) for s in stmts))
            case ir.If(then=then, orelse=orelse):
                return replace(node, then=visit(then), orelse=None if orelse is None else visit(orelse))
            case ir.For() | ir.While() | ir.Launch() | ir.Assume() | ir.Attr() | ir.Block():
                return replace(node, body=visit(node.body))
        return node

    function = function or extracted().device
    found = replace(function, body=visit(function.body))
    assert changed[0], "the edit changed nothing"
    return found


def atomics(node: ir.Stmt, op: str, tensor: str) -> Iterator[ir.Call]:
    for inner in ir.walk(node):
        if isinstance(inner, ir.Call) and inner.op == op and isinstance(inner.args[0], ir.AccessPtr):
            pointer = inner.args[0]
            assert isinstance(pointer, ir.AccessPtr)
            if pointer.data.name == tensor:
                yield inner


def in_expr(node: ir.Expr, change: Callable[[ir.Expr], ir.Expr | None]) -> ir.Expr:
    new = change(node)
    if new is not None:
        return new
    match node:
        case ir.BinOp(a=a, b=b):
            return replace(node, a=in_expr(a, change), b=in_expr(b, change))
        case ir.Select(cond=c, a=a, b=b):
            return replace(node, cond=in_expr(c, change), a=in_expr(a, change), b=in_expr(b, change))
        case ir.Cast(a=a) | ir.Not(a=a):
            return replace(node, a=in_expr(a, change))
        case ir.Call(args=args):
            return replace(node, args=tuple(in_expr(x, change) for x in args))
    return node


def without_signal(tensor: str) -> Edit:
    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Eval | ir.Store) and any(atomics(node, ADD, tensor)):
            return ir.Seq(None, ())
        return None

    return edit


def with_order(op: str, tensor: str, at: int, order: int = RELAXED) -> Edit:
    """Relax the atomics `op` on a tensor; argument `at` is their memory order, or their scope."""

    def relaxed(node: ir.Expr) -> ir.Expr | None:
        if isinstance(node, ir.Call) and node.op == op and any(atomics(ir.Eval(None, node), op, tensor)):
            args = list(node.args)
            old = args[at]
            assert isinstance(old, ir.Const)
            args[at] = replace(old, value=order)
            return replace(node, args=tuple(args))
        return None

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Eval | ir.Store) and any(atomics(node, op, tensor)):
            return replace(node, value=in_expr(node.value, relaxed))
        if isinstance(node, ir.While) and any(atomics(node, op, tensor)):
            return replace(node, cond=in_expr(node.cond, relaxed))
        return None

    return edit


def without_barrier(next_to: Callable[[ir.Stmt], bool], *, before: bool) -> Edit:
    """Drop the CTA barrier before (or after) a statement of which `next_to` holds."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.Seq):
            return None
        stmts = list(node.stmts)
        for i, stmt in enumerate(stmts):
            other = i - 1 if before else i + 1
            if (
                isinstance(stmt, ir.If)
                and 0 <= other < len(stmts)
                and next_to(stmt)
                and _is_sync(stmts[other])
            ):
                return ir.Seq(node.span, tuple(s for k, s in enumerate(stmts) if k != other))
        return None

    return edit


def without_conditional_barriers(node: ir.Stmt) -> ir.Stmt | None:
    """Drop barriers under a condition: behind the wait for a place of the ring of rows."""
    if isinstance(node, ir.If) and node.orelse is None and _is_sync(node.then):
        return ir.Seq(None, ())
    return None


def _is_sync(node: ir.Stmt) -> bool:
    return (
        isinstance(node, ir.Eval)
        and isinstance(node.value, ir.Call)
        and node.value.op in ("tvm_storage_sync", "sync_warp")
    )


def _adds(tensor: str) -> Callable[[ir.Stmt], bool]:
    def holds(node: ir.Stmt) -> bool:
        return any(atomics(node, ADD, tensor)) and not any(map(_is_sync, _statements(node)))

    return holds


def _awaits(tensor: str) -> Callable[[ir.Stmt], bool]:
    def holds(node: ir.Stmt) -> bool:
        return any(atomics(node, "atomic_load_elem_op", tensor)) and not any(map(_is_sync, _statements(node)))

    return holds


def _statements(node: ir.Stmt) -> list[ir.Stmt]:
    return [n for n in ir.walk(node) if isinstance(n, ir.Stmt)]


def without_wait(tensor: str) -> Edit:
    """Drop waits for a tensor's words under a condition `ring <= block`: for a ring's slot."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.If) and isinstance(node.cond, ir.BinOp) and node.cond.op == "le":
            loops = [n for n in _statements(node) if isinstance(n, ir.While)]
            if len(loops) == 1 and any(atomics(loops[0], "atomic_load_elem_op", tensor)):
                return ir.Seq(None, ())
        return None

    return edit


def with_constant(op: str, tensor: str, change: Callable[[int], int]) -> Edit:
    """Change the value that the atomics `op` add to, or store in, a tensor."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if isinstance(node, ir.Eval | ir.Store) and any(atomics(node, op, tensor)):

            def changed(inner: ir.Expr) -> ir.Expr | None:
                if (
                    isinstance(inner, ir.Const)
                    and not isinstance(inner.value, float)
                    and inner.dtype.bits == 32
                ):
                    return replace(inner, value=change(int(inner.value)))
                return None

            call = node.value
            assert isinstance(call, ir.Call)
            args = (call.args[0], in_expr(call.args[1], changed), *call.args[2:])
            return replace(node, value=replace(call, args=args))
        return None

    return edit


def without_grid_barriers(node: ir.Stmt) -> ir.Stmt | None:
    if isinstance(node, ir.If) and any(atomics(node, "atomic_add_ret_elem_op", "grid_word")):
        return None if any(map(_is_sync, _statements(node))) else ir.Seq(None, ())
    return None


def mbarrier_calls(node: ir.Stmt, op: str, array: str) -> bool:
    """Whether a statement is a call of `op` on an mbarrier of an array."""
    return (
        isinstance(node, ir.Eval)
        and isinstance(node.value, ir.Call)
        and node.value.op == op
        and isinstance(node.value.args[0], ir.Load)
        and node.value.args[0].buffer.name == array
    )


def without_call(op: str, array: str) -> Edit:
    def edit(node: ir.Stmt) -> ir.Stmt | None:
        return ir.Seq(None, ()) if mbarrier_calls(node, op, array) else None

    return edit


def with_other_parity(array: str) -> Edit:
    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not mbarrier_calls(node, "mbarrier_wait_parity", array):
            return None
        assert isinstance(node, ir.Eval)
        assert isinstance(node.value, ir.Call)
        barrier, parity = node.value.args
        flipped = ir.BinOp(parity.dtype, "sub", ir.Const(parity.dtype, 1), parity)
        return replace(node, value=replace(node.value, args=(barrier, flipped)))

    return edit


def with_shorter_wait(tensor: str) -> Edit:
    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not isinstance(node, ir.While) or not any(atomics(node, "atomic_load_elem_op", tensor)):
            return None

        def changed(inner: ir.Expr) -> ir.Expr | None:
            if not (isinstance(inner, ir.BinOp) and inner.op == "lt" and isinstance(inner.b, ir.Const)):
                return None
            if not any(atomics(ir.Eval(None, inner.a), "atomic_load_elem_op", tensor)):
                return None
            return replace(inner, b=replace(inner.b, value=int(inner.b.value) - 1))

        return replace(node, cond=in_expr(node.cond, changed))

    return edit


def without_waits(op: str) -> Edit:
    """Drop waits between (`lt`: 0 < early[0]) or behind (`eq`) the last rounds of the product before."""

    def edit(node: ir.Stmt) -> ir.Stmt | None:
        if not (isinstance(node, ir.If) and isinstance(node.cond, ir.BinOp) and node.cond.op == op):
            return None
        asked = [n for n in ir.walk(node.cond) if isinstance(n, ir.Load) and n.buffer.name == "early"]
        waits = any(isinstance(n, ir.While) for n in _statements(node.then))
        return ir.Seq(None, ()) if asked and waits else None

    return edit


def always_ahead(node: ir.Stmt) -> ir.Stmt | None:
    """Wait for everything between the last rounds of the product before."""
    if isinstance(node, ir.Store) and node.buffer.name == "early":
        return replace(node, value=ir.Const(node.value.dtype, 1))
    return None


@st.composite
def few_routed(draw):
    """Routings [all ranks' tokens, topk] of a few slots or none, an expert at most once a token."""
    tokens, experts = C.num_ranks * C.tokens, C.num_ranks * C.num_experts
    slots = st.tuples(st.integers(0, tokens - 1), st.integers(0, experts - 1))
    idx = torch.full((tokens, C.topk), -1, dtype=torch.int32)
    for token, expert in sorted(draw(st.sets(slots, max_size=4))):
        free = (idx[token] < 0).nonzero()
        if len(free):
            idx[token, int(free[0])] = expert
    return idx


def run_thread_by_thread(run, seed, config=CONFIG):
    device.run(extracted(config), *run.arguments, seed=seed, policy=patient(), wave_threads=128)
    assert not run.status.any()
    assert torch.equal(run.y.view(torch.int16), run.wanted.view(torch.int16))


# Edits of the ring of stages, and what is said of each: of every form of the products.
STAGE_MUTANTS = [
    (without_call("mbarrier_wait_parity", "full"), "may end before the one before it"),
    (without_call("mbarrier_wait_parity", "empty"), "may end before the one before it"),
    (without_call("ptx_arrive_barrier", "empty"), "0 arrivals for phases of 256"),
    (without_call("ptx_arrive_barrier_expect_tx", "full"), "0 arrivals for phases of 4"),
    (with_other_parity("full"), "waits for parity 1 in turn 0"),
    (with_other_parity("empty"), "waits for parity 1 in turn 0"),
]


# --------------------------------------------------------------------------- tests
@pytest.mark.slow
class TestCompiledKernel:
    @pytest.mark.parametrize("seed", range(4))
    def test_no_schedule_goes_wrong(self, seed):
        assert problems(extracted().device, random_routing(seed)) == []

    def test_rings_that_come_round(self):
        idx = full_routing()
        events = traces(extracted().device, idx)
        adds = [e for roles in events.values() for e in roles[0][0] if e.kind == "add"]
        blocks = {e.word[1] for e in adds if e.word[0] == "dispatched"}
        assert max(blocks) == C.pool_blocks - 1 >= G.x_ring > G.h_ring
        assert problems(extracted().device, idx) == []

    def test_tasks_are_those_of_the_schedule(self):
        """Signals of every CTA come in the order, and on the words, that `schedule` says."""
        for blocks in ((0, 0, 0), (1, 0, 2), (2, 2, 1)):
            firsts = schedule.wave_firsts(G, blocks)
            flat = {
                "firsts": firsts * C.num_ranks,
                "block_expert": [0] * (C.num_ranks * C.pool_blocks),
                "epochs": [0] * C.num_ranks,
            }
            for block in range(C.num_ranks * C.ctas):
                rank, cta = divmod(block, C.ctas)
                wanted = [
                    (task.kind, rank * C.pool_blocks + task.block)
                    for task in schedule.tasks(G, firsts, cta, C.ctas)
                ]
                dispatched, by_dispatchers, multiplied = signalled(extracted().device, block, flat)
                assert by_dispatchers == []
                assert dispatched == [t for t in wanted if t[0] is schedule.Kind.DISPATCH]
                assert multiplied == [t for t in wanted if t[0] is not schedule.Kind.DISPATCH]

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (without_signal("dispatched"), "waits for 2, and comes to 0"),
            (without_signal("l1_done"), "waits for 2, and comes to 0"),
            (without_signal("l2_done"), "waits for 1, and comes to 0"),
            (with_order(ADD, "l1_done", 2), "does not release"),
            (with_order("atomic_store_elem_op", "signals", 2), "does not release"),
            (with_order("atomic_load_elem_op", "dispatched", 1), "does not acquire"),
            (with_order("atomic_load_elem_op", "grid_word", 1), "does not acquire"),
            (with_order("atomic_load_elem_op", "signals", 1), "does not acquire"),
            (with_order("atomic_store_elem_op", "signals", 3, signals.DEVICE), "below system scope"),
            (with_order("atomic_load_elem_op", "signals", 2, signals.DEVICE), "below system scope"),
            (with_shorter_wait("dispatched"), "waits for 1, and comes to 2"),
            (with_shorter_wait("signals"), "which is stored 0 times"),
            (without_barrier(_adds("dispatched"), before=True), "x_ring"),
            (without_barrier(_adds("l1_done"), before=True), "h_ring"),
            (without_barrier(_awaits("dispatched"), before=False), "x_ring"),
            (without_barrier(_awaits("signals"), before=False), "between its wait and the next barrier"),
            (without_wait("l1_done"), "x_ring"),
            (without_wait("l2_done"), "h_ring"),
            (with_constant("atomic_store_elem_op", "signals", lambda v: 0), "which is stored 0 times"),
            (
                with_constant("atomic_add_ret_elem_op", "grid_word", lambda v: v - (v > 1)),
                "do not turn bit 31",
            ),
            (without_grid_barriers, "not ordered"),
            *STAGE_MUTANTS,
            (without_call("mbarrier_wait_parity", "handed"), "may end before the one before it"),
            (without_call("mbarrier_wait_parity", "taken"), "may end before the one before it"),
            (without_call("ptx_arrive_barrier", "handed"), "0 arrivals for phases of 256"),
            (without_call("ptx_arrive_barrier", "taken"), "0 arrivals for phases of 128"),
            (with_other_parity("handed"), "waits for parity 1 in turn 0"),
            (with_other_parity("taken"), "waits for parity 1 in turn 0"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_mutants(self, edit, message):
        found = problems(edited(edit), full_routing())
        assert any(message in what for what in found), found[:3]

    def test_runs_thread_by_thread(self):
        """On CPU tensors, one schedule, with races, proxies and bounds watched: plain PyTorch's bits."""
        run_thread_by_thread(kernels.launch(1), seed=1)

    @settings(max_examples=2, deadline=None)
    @given(routed=few_routed(), values=st.integers(0, 1000), schedule=st.integers(0, 1000))
    def test_runs_thread_by_thread_with_any_routing_and_values(self, routed, values, schedule):
        run_thread_by_thread(kernels.launch(values, routed=routed), schedule)


def assert_rings_come_round(idx, config):
    found, g = plan(idx, torch.ones(idx.shape), config), config.geometry
    assert int(found.firsts[0, -1]) > g.x_ring > g.h_ring


@pytest.mark.slow
class TestOptions:
    """A shared expert, FP8 beside FP4 weights, warps that dispatch."""

    def test_rings_come_round(self):
        assert_rings_come_round(shared_routing(), OPTIONS)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (without_call("ptx_arrive_barrier", "full"), "arrivals for phases of 4"),
            (without_barrier(_adds("dispatched"), before=True), "x_ring"),
            (without_conditional_barriers, "x_ring"),
            (without_signal("dispatched"), "waits for 2, and comes to 0"),
            (with_order(ADD, "dispatched", 2), "does not release"),
        ],
        ids=["rows of the other half", "barrier before a signal", "barrier behind a wait", "signal", "order"],
    )
    def test_mutants(self, edit, message):
        found = problems(edited(edit, extracted(OPTIONS).device), shared_routing(), OPTIONS)
        assert any(message in what for what in found), found[:3]


@pytest.mark.slow
class TestWide:
    """Rows are the instruction's; products begin at any stage of the ring.

    `TestAhead` runs the same code thread by thread, with more experts; `test_outputs` has this form's bits.
    """

    def test_products_begin_at_every_stage(self):
        g = WIDE.geometry
        rounds = [WIDE.l1_steps, WIDE.l2_steps]
        assert all(steps % WIDE.num_stages for steps in rounds)
        found = plan(full_routing(), torch.ones(full_routing().shape), WIDE)
        assert int(found.firsts[0, -1]) > g.x_ring > g.h_ring

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            *STAGE_MUTANTS,
            (without_signal("l1_done"), "waits for 4, and comes to 0"),
            (without_wait("l2_done"), "h_ring"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_mutants(self, edit, message):
        found = problems(edited(edit, extracted(WIDE).device), full_routing(), WIDE)
        assert any(message in what for what in found), found[:3]


@pytest.mark.slow
class TestAhead:
    """Wide products in waves of several blocks: some wait under the product before."""

    def test_rings_come_round(self):
        assert_rings_come_round(ahead_routing(), AHEAD)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (without_waits("lt"), "_ring"),
            (without_waits("eq"), "_ring"),
            (always_ahead, "deadlock"),
            (without_wait("l2_done"), "h_ring"),
        ],
        ids=["waits ahead", "waits behind", "all ahead", "room"],
    )
    def test_mutants(self, edit, message):
        found = problems(edited(edit, extracted(AHEAD).device), ahead_routing(), AHEAD)
        assert any(message in what for what in found), found[:3]

    def test_runs_thread_by_thread(self):
        run_thread_by_thread(kernels.launch(1, AHEAD), 1, AHEAD)


@pytest.mark.slow
def test_a_rank_alone_does_what_it_does_in_a_launch_of_all():
    """The kernel of a process a GPU: the same events on the same words and slots, CTA by CTA."""
    rank, idx = 1, random_routing(1)
    with as_launched():
        kernel = make_kernel(replace(C, launch_ranks=1, first_rank=rank))
        alone = extract(kernel, pass_configs=PASS_CONFIGS)
    descriptors = boxes(read_host(alone.host, alone.device, alone.tile))
    found = plan(idx, torch.ones(idx.shape))
    names = ("firsts", "block_expert", "row_source", "row_target")
    flat = {name: getattr(found, name)[rank].flatten().tolist() for name in names}
    flat |= {"topk_idx": idx[rank].flatten().tolist(), "epochs": [0]}
    rows = {"x_ring": G.x_ring * C.block_m, "h_ring": G.h_ring * C.block_m}
    sizes = {  # elements of one rank, of tensors that hold the launch's ranks
        "x_ring": rows["x_ring"] * C.hidden,
        "x_ring_scale": rows["x_ring"] * (C.hidden // 128),
        "h_ring": rows["h_ring"] * C.inter,
        "h_ring_scale": rows["h_ring"] * (C.inter // 128),
        **dict.fromkeys(("dispatched", "l1_done", "l2_done"), C.pool_blocks),
        "grid_word": 1,
        "combine": 0,
        "signals": 0,
    }

    def moved(name: str) -> Callable[[int], int]:
        return lambda at: SLOTS[name](at + rank * sizes[name])

    slots = {name: moved(name) for name in SLOTS}
    together = traces(extracted().device, idx)
    for cta in range(C.ctas):
        threads = [thread for role in ROLES for thread in role.threads]
        for thread, wanted in zip(threads, chain(*together[rank * C.ctas + cta]), strict=True):
            events = trace(alone.device, cta, thread, flat, slots, descriptors)
            for i, event in enumerate(events):
                if event.kind in ("add", "store", "wait", "flip"):
                    name, at = event.word
                    events[i] = replace(event, word=(name, at + rank * sizes[name]))
            assert events == wanted
            assert len(events) > 3


class TestPlanKernel:
    def test_ranks_meet_before_routings_are_read(self):
        assert unmet(plan_extracted().device) == []

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (with_order("atomic_store_elem_op", "signals", 3, signals.DEVICE), "meet the peer"),
            (with_order("atomic_load_elem_op", "signals", 1), "meet the peer"),
            (without_barrier(_awaits("signals"), before=False), "before its CTA has met"),
        ],
        ids=["scope", "order", "barrier"],
    )
    def test_mutants(self, edit, message):
        found = unmet(edited(edit, plan_extracted().device))
        assert any(message in what for what in found)

    @pytest.mark.slow
    @settings(max_examples=4, deadline=None)
    @given(routed=few_routed())
    def test_fills_the_plan_of_any_routing(self, routed):
        self.check_plan(routed.view(C.num_ranks, C.tokens, C.topk))

    @pytest.mark.slow
    def test_fills_the_plan(self):
        self.check_plan(full_routing())

    def check_plan(self, idx):
        """On CPU tensors, thread by thread: both ranks meet, and find the plan of `make_plan`."""
        weights = torch.rand(C.num_ranks, C.tokens, C.topk)
        wanted = plan(idx, weights)
        found = [torch.full_like(t, -7) for t in vars(wanted).values()]
        status = torch.zeros(C.num_ranks, 1, dtype=torch.int32)
        words = [torch.zeros(C.num_ranks, n, dtype=torch.int32) for n in (C.signal_words, 1)]
        device.run(
            plan_extracted(),
            idx.flatten(),
            weights.flatten(),
            *found,
            *words,
            status,
            wave_threads=256,
        )
        assert not status.any()
        for got, want in zip(found, vars(wanted).values(), strict=True):
            is_set = got != -7
            assert torch.equal(got[is_set], want[is_set])
        rows = wanted.firsts[:, -1] * C.block_m
        assert [(t != -7).sum(1).tolist() for t in found[2:5]] == [rows.tolist()] * 3
