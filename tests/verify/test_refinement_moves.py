"""`refinement` of barriers, private arrays, cp.async, TMA stores, atomics, gathers: proved, then broken."""

import re
from dataclasses import replace

import pytest

from dsv4_kernels.contract import Contract
from tests.verify import refinement_kernels as kernels
from tests.verify.test_refinement import (
    calls,
    change_constant,
    check,
    loads,
    shift_argument,
    shift_index,
    shift_source,
    stores,
    substitute,
)
from verify import ir
from verify.extract import extract
from verify.properties import Context
from verify.properties.refinement import PROPERTY
from verify.verdict import Verdict

NAMES = (
    "manual_ring",
    "turns",
    "local_sum",
    "private_row",
    "tma_store",
    "async_ring",
    "histogram",
    "digits",
    "gathered",
)
EXTRACTED = {}


def extracted(name):
    if name not in EXTRACTED:
        EXTRACTED[name] = extract(getattr(kernels, name)())
    return EXTRACTED[name]


@pytest.mark.parametrize("name", NAMES)
def test_each_is_proved(name):
    verdict, reasons, _ = check(extracted(name), recheck=True)
    assert verdict is Verdict.PROVED, reasons


def shift_pointer(position):
    def change(call):
        args = list(call.args)
        args[position] = replace(args[position], offset=ir.BinOp(ir.INT32, "add", args[position].offset, ONE))
        return replace(call, args=tuple(args))

    return change


ONE = ir.Const(ir.INT32, 1)
TURN_CALLS = ("mbarrier_wait_parity", "ptx_arrive_barrier")


def negated_last(node):
    return replace(node, cond=ir.Not(ir.BOOL, node.cond))


def dropped(node):
    del node
    return ir.Seq(None, ())


def is_call(expr, op):
    return isinstance(expr, ir.Call) and expr.op == op


def evals(op, at=0):
    def find(function):
        nodes = [n for n in ir.walk(function.body) if isinstance(n, ir.Eval) and is_call(n.value, op)]
        return nodes[at:]

    return find


def ifs_on(name):
    def mentions(node):
        return any(isinstance(e, ir.Load) and e.buffer.name == name for e in ir.walk(node.cond))

    return lambda f: [n for n in ir.walk(f.body) if isinstance(n, ir.If) and mentions(n)]


def is_on(node, barrier, op):
    return is_call(node, op) and isinstance(node.args[0], ir.Load) and node.args[0].buffer.name == barrier


def on_turn(op):
    return lambda f: [n for n in ir.walk(f.body) if is_on(n, "turn", op)]


def statements_on(barrier, op):
    return lambda f: [n for n in ir.walk(f.body) if isinstance(n, ir.Eval) and is_on(n.value, barrier, op)]


def roles_of_turn(function):
    arms = [s for op in TURN_CALLS for s in statements_on("turn", op)(function)]
    inner = [n for n in ir.walk(function.body) if isinstance(n, ir.If) and n.orelse is not None]
    return [n for n in inner if any(s is n.then or s in getattr(n.then, "stmts", ()) for s in arms)]


def next_slot(call):
    load = call.args[0]
    index = ir.BinOp(ir.INT32, "add", load.indices[0], ONE)
    return replace(call, args=(replace(load, indices=(index,)), *call.args[1:]))


MUTATIONS = [
    (
        "manual_ring",
        "wait dropped",
        evals("mbarrier_wait_parity"),
        dropped,
        "UNSUPPORTED",
        "mbarrier_wait_parity",
    ),
    (
        "manual_ring",
        "parity of another step",
        calls("mbarrier_wait_parity"),
        change_constant(1, 1, 0),
        "UNSUPPORTED",
        "mbarrier_wait_parity",
    ),
    (
        "manual_ring",
        "arrival dropped",
        evals("ptx_arrive_barrier", 1),
        dropped,
        "UNSUPPORTED",
        "ptx_arrive_barrier",
    ),
    ("manual_ring", "other stage filled", calls("tma_load"), change_constant(2, 2, 1), "REFUTED", "ring"),
    (
        "manual_ring",
        "other stage read",
        loads("ring"),
        change_constant(None, 2, 1),
        "REFUTED",
        "read of ring",
    ),
    (
        "turns",
        "wait dropped",
        statements_on("turn", TURN_CALLS[0]),
        dropped,
        "UNSUPPORTED",
        "mbarrier_wait_parity",
    ),
    (
        "turns",
        "parity of another round",
        on_turn(TURN_CALLS[0]),
        shift_argument(1),
        "UNSUPPORTED",
        "mbarrier_wait_parity",
    ),
    (
        "turns",
        "slot of another round",
        on_turn(TURN_CALLS[1]),
        next_slot,
        "UNSUPPORTED",
        "ptx_arrive_barrier",
    ),
    ("turns", "other warpgroup", roles_of_turn, negated_last, "UNSUPPORTED", "barrier"),
    ("local_sum", "other element of the array", loads("acc"), shift_index, "REFUTED", "read of acc"),
    ("local_sum", "other condition", ifs_on("step"), negated_last, "REFUTED", "condition of the store"),
    ("local_sum", "other element of x", loads("x"), shift_index, "REFUTED", "read of x"),
    ("tma_store", "other column", calls("tma_store"), shift_argument(2), "REFUTED", "elsewhere|out"),
    ("tma_store", "other row", calls("tma_store"), shift_argument(3), "REFUTED", "elsewhere|out|condition"),
    ("tma_store", "other half of the tile", calls("tma_store"), shift_pointer(1), "REFUTED", "read of tile"),
    ("async_ring", "other source", calls("ptx_cp_async"), shift_source, "REFUTED", "read of x"),
    ("async_ring", "other target", calls("ptx_cp_async"), shift_pointer(0), "REFUTED", "ring|elsewhere"),
    (
        "async_ring",
        "wait for fewer",
        calls("ptx_wait_group"),
        change_constant(0, 0, 1),
        "UNSUPPORTED",
        "ptx_wait_group",
    ),
    ("histogram", "other element", loads("x"), shift_index, "REFUTED", "x|counts"),
    ("histogram", "other bin", calls("atomic_add_elem_op"), shift_pointer(0), "REFUTED", "counts"),
    ("digits", "other bin", calls("atomic_add_elem_op"), shift_pointer(0), "UNSUPPORTED", "."),
    ("digits", "other digit", calls("atomic_add_elem_op"), change_constant(None, 3, 4), "UNSUPPORTED", "."),
    ("gathered", "other row", loads("rows"), shift_index, "REFUTED", "rows|kv|condition"),
    ("gathered", "other column", loads("kv"), shift_index, "REFUTED", "read of kv"),
]


@pytest.mark.parametrize("case", MUTATIONS, ids=[f"{m[0]}-{m[1]}" for m in MUTATIONS])
def test_a_fault_is_noticed(case):
    name, _, find, change, expected, reason = case
    kernel = extracted(name)
    nodes = find(kernel.device)
    assert nodes
    body = substitute(kernel.device.body, nodes[0], change(nodes[0]))
    assert body is not kernel.device.body
    verdict, reasons, _ = check(replace(kernel, device=replace(kernel.device, body=body)))
    assert str(verdict) == expected, reasons
    assert any(re.search(reason, r) for r in reasons), reasons


def test_updates_are_counted():
    """Fewer threads than the program says, and a plain store where it says an atomic one."""
    kernel = extracted("histogram")
    guard = next(n for n in ir.walk(kernel.device.body) if isinstance(n, ir.If) and "total" in str(n.then))
    (five,) = (e for e in ir.walk(guard.cond) if isinstance(e, ir.Const) and e.value == 5)
    body = substitute(kernel.device.body, five, replace(five, value=4))
    verdict, reasons, _ = check(replace(kernel, device=replace(kernel.device, body=body)))
    assert verdict is Verdict.REFUTED, reasons


def test_a_plain_store_is_no_update():
    kernel = extracted("gathered")
    (store,) = stores("out")(kernel.device)
    call = ir.Call(store.value.dtype, "atomic_add_elem_op", (store.value,))
    body = substitute(kernel.device.body, store, replace(store, value=call))
    verdict, reasons, _ = check(replace(kernel, device=replace(kernel.device, body=body)))
    assert verdict is Verdict.UNSUPPORTED, reasons


def test_what_is_taken_for_uniform_is_listed():
    kernel = extracted("private_row")
    claims = PROPERTY.claims(Context(kernel, Contract(()), {}))
    assert any("holds the same in all of them" in a for a in claims.assumptions)
    claims = PROPERTY.claims(Context(extracted("async_ring"), Contract(()), {}))
    assert not any("holds the same in all of them" in a for a in claims.assumptions)


def test_an_output_in_the_bytes_of_stages_that_may_still_come_is_not_proved():
    """An arrival after the output was begun could let the producer fill those bytes again."""
    kernel = extracted("turns")
    store = stores("out_tile")(kernel.device)[-1]
    arrival = next(n for n in statements_on("mbarrier", "ptx_arrive_barrier")(kernel.device))
    body = substitute(kernel.device.body, store, ir.Seq(None, (store, arrival)))
    verdict, reasons, _ = check(replace(kernel, device=replace(kernel.device, body=body)))
    assert verdict is Verdict.UNSUPPORTED
    assert "share bytes of shared memory" in reasons[0]
