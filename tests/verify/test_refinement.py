"""The property `refinement`: proved for compiled kernels, refuted for miscompiled ones."""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dsv4_kernels.contract import Contract
from tests.verify import refinement_kernels as kernels
from verify import ir
from verify.confirm import confirm
from verify.engine import finding_of
from verify.extract import Extracted, extract
from verify.origin import Origins
from verify.properties import Context
from verify.properties.refinement import PROPERTY
from verify.solve import Answer, Prover
from verify.verdict import Verdict, worst

KERNELS = {
    "fp8_fp4_registers": lambda: kernels.fp8_fp4_gemm(registers=True),
    "fp8_fp4_shared": lambda: kernels.fp8_fp4_gemm(registers=False),
    "bf16_nt": lambda: kernels.bf16_gemm(transpose_b=True, threads=128, block_m=64, block_n=64),
    "bf16_nn_two_warpgroups": lambda: kernels.bf16_gemm(
        transpose_b=False, threads=256, block_m=128, block_n=128
    ),
    "act_quant": kernels.act_quant,
    "row_sum": kernels.row_sum,
    "fp4_dequant": kernels.fp4_dequant,
    "packed_view": kernels.packed_view,
    "row_stream": kernels.row_stream,
    "two_products": kernels.two_products,
    "products_in_flight": kernels.products_in_flight,
    "halves_of_k": kernels.halves_of_k,
    "product_by_tma_store": kernels.product_by_tma_store,
    "padded_rows": kernels.sum_of_padded_rows,
}
BROKEN = sorted((Path(__file__).parent / "broken_refinement").glob("*.py"))


@cache
def extracted(name: str) -> Extracted:
    return extract(KERNELS[name]())


def check(kernel: Extracted, recheck: bool = False) -> tuple[Verdict, list[str], list[Answer]]:
    """Return the verdict, the reasons, and the answers of the solvers."""
    try:
        claims = PROPERTY.claims(Context(kernel, Contract(()), {}))
    except ir.UnsupportedIR as reason:
        return Verdict.UNSUPPORTED, [str(reason)], []
    answers = Prover(recheck=recheck).prove(claims.obligations)
    issues = [i.message for i in claims.unsupported]
    verdict = worst([a.verdict for a in answers] + [Verdict.UNSUPPORTED] * len(issues))
    failed = [f"{a.obligation.what} {dict(a.shown)}" for a in answers if a.verdict is not Verdict.PROVED]
    return verdict, issues + failed, answers


@pytest.mark.parametrize("name", KERNELS)
def test_compiled_kernels_are_proved(name):
    verdict, reasons, _ = check(extracted(name), recheck=True)
    assert verdict is Verdict.PROVED, reasons


@pytest.mark.parametrize("path", BROKEN, ids=lambda p: p.stem)
def test_miscompiled_kernels_are_not_proved(path):
    spec = importlib.util.spec_from_file_location(f"broken_refinement_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = re.search(r"^(REFUTED|UNSUPPORTED): (.*)$", module.__doc__ or "", re.MULTILINE)
    assert expected is not None
    kernel = extract(module.make())
    verdict, reasons, answers = check(kernel)
    assert str(verdict) == expected[1], reasons
    words = re.findall(r"\w+", expected[2])
    assert any(all(w in reason for w in words) for reason in reasons), reasons
    # What cannot be compared is REFUTED by runs of both levels; each refutation shows in a run.
    context = Context(kernel, Contract(()), {})
    refuted = [a for a in (*PROPERTY.claims(context).answers, *answers) if a.verdict is Verdict.REFUTED]
    assert refuted
    for finding in (finding_of(context, Origins(kernel.tile), a) for a in refuted):
        shown = confirm(context, finding.counterexample, PROPERTY.name, finding.message)
        assert shown.confirmed, shown.note


def test_an_operand_by_warpgroup_has_to_be_that_warpgroups():
    of_one = extracted("halves_of_k")
    verdict, reasons, _ = check(replace(of_one, tile=extract(kernels.halves_of_k(swapped=True)).tile))
    assert verdict is Verdict.REFUTED, reasons
    verdict, reasons, _ = check(extract(kernels.halves_of_k(together=64)))
    assert verdict is Verdict.UNSUPPORTED
    assert "differs between threads of a warpgroup" in reasons[0]


def test_counterexample_names_line_index_addresses_thread_and_block():
    spec = importlib.util.spec_from_file_location("wrapped", BROKEN[0].parent / "wrapped_index.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _, _, answers = check(extract(module.make()))
    (answer,) = (a for a in answers if a.verdict is Verdict.REFUTED)
    span = answer.obligation.span
    assert span is not None
    assert span.path.endswith("wrapped_index.py")
    text = Path(span.path).read_text().splitlines()[span.line - 1]
    assert "out[i] = big" in text
    assert answer.shown["expected address"] == module.SIDE**2 - 1
    assert answer.shown["actual address"] == (module.SIDE**2 - 1) % 2**32
    assert {"tile i", "threadIdx.x"} <= answer.shown.keys()
    assert "bx" in answer.model


# --------------------------------------------------------------------------- mutations
def substitute(root: Any, target: Any, new: Any) -> Any:
    """Return `root` with one node, known by identity, replaced."""
    if root is target:
        return new
    if isinstance(root, tuple):
        items = tuple(substitute(x, target, new) for x in root)
        return items if any(a is not b for a, b in zip(items, root, strict=True)) else root
    if is_dataclass(root) and not isinstance(root, (ir.Var, ir.Buffer, ir.Span, ir.DType)):
        changed = {}
        for f in fields(root):
            old = getattr(root, f.name)
            if isinstance(old, (ir.Stmt, ir.Expr, tuple)):
                value = substitute(old, target, new)
                if value is not old:
                    changed[f.name] = value
        return replace(root, **changed) if changed else root  # type: ignore[type-var]
    return root


def plus_one(expr: ir.Expr) -> ir.Expr:
    if isinstance(expr, ir.Ramp):
        return replace(expr, base=plus_one(expr.base))
    return ir.BinOp(expr.dtype, "add", expr, ir.Const(expr.dtype, 1))


def stores(name: str) -> Callable[[ir.Function], list[ir.Store]]:
    return lambda f: [s for s in ir.walk(f.body) if isinstance(s, ir.Store) and s.buffer.name == name]


def loads(name: str) -> Callable[[ir.Function], list[ir.Load]]:
    return lambda f: [s for s in ir.walk(f.body) if isinstance(s, ir.Load) and s.buffer.name == name]


def calls(op: str) -> Callable[[ir.Function], list[ir.Call]]:
    return lambda f: [s for s in ir.walk(f.body) if isinstance(s, ir.Call) and s.op == op]


def bulk_copies(f: ir.Function) -> list[ir.Call]:
    return [c for c in calls("tma_load")(f) if isinstance(c.args[1], ir.AccessPtr)]


def first(find: Callable[[ir.Function], list[Any]]) -> Callable[[ir.Function], list[Any]]:
    return lambda f: find(f)[:1]


def last(find: Callable[[ir.Function], list[Any]]) -> Callable[[ir.Function], list[Any]]:
    return lambda f: find(f)[-1:]


def consts(root: ir.Expr, value: int) -> list[ir.Const]:
    return [e for e in ir.walk(root) if isinstance(e, ir.Const) and e.value == value]


def shift_index(node: Any) -> Any:
    return replace(node, indices=(plus_one(node.indices[0]),))


def shift_argument(position: int) -> Callable[[Any], Any]:
    def change(call: Any) -> Any:
        args = list(call.args)
        args[position] = plus_one(args[position])
        return replace(call, args=tuple(args))

    return change


def shift_source(call: Any) -> Any:
    pointer = call.args[1]
    moved = replace(pointer, offset=plus_one(pointer.offset))
    return replace(call, args=(call.args[0], moved, *call.args[2:]))


def change_constant(position: int | None, old: int, new: int) -> Callable[[Any], Any]:
    def change(node: Any) -> Any:
        root = node if position is None else node.args[position]
        found = consts(root, old)
        assert found, f"no {old} in {root}"
        return substitute(node, found[0], replace(found[0], value=new))

    return change


def other_operator(old: str, new: str) -> Callable[[Any], Any]:
    def change(node: Any) -> Any:
        found = next(e for e in ir.walk(node.value) if isinstance(e, ir.BinOp) and e.op == old)
        return substitute(node, found, replace(found, op=new))

    return change


def swap_operands(op: str) -> Callable[[Any], Any]:
    def change(node: Any) -> Any:
        found = next(e for e in ir.walk(node.value) if isinstance(e, ir.BinOp) and e.op == op)
        return substitute(node, found, replace(found, a=found.b, b=found.a))

    return change


MUTATIONS = [
    ("fp4_dequant", "wrong element of a tensor", loads("x"), shift_index, "read of x"),
    ("fp4_dequant", "wrong element of a register array", loads("x_frag"), shift_index, "read of x_frag"),
    ("fp4_dequant", "wrong element stored", stores("out"), shift_index, "elsewhere|out"),
    ("row_sum", "merge becomes max", stores("total"), other_operator("add", "max"), "operator"),
    ("packed_view", "wrong half of a byte", loads("packed"), shift_index, "read of packed"),
    ("row_stream", "wrong bytes fetched", bulk_copies, shift_source, "read of x"),
    ("act_quant", "wrong scale element stored", stores("scale"), shift_index, "scale"),
    ("act_quant", "wrong stride", loads("x"), change_constant(None, 128 * 32, 128 * 31), "read of x"),
    (
        "act_quant",
        "other mask",
        stores("magnitude"),
        change_constant(None, 0x7FFF, 0x3FFF),
        "index value|constant",
    ),
    ("act_quant", "max becomes min", stores("exponent"), other_operator("min", "max"), "operator"),
    ("act_quant", "reduced register", loads("magnitude"), shift_index, "reduce_max|magnitude"),
    ("fp8_fp4_registers", "other operator", stores("acc"), other_operator("add", "sub"), "operator"),
    (
        "row_sum",
        "other start value",
        first(stores("total_clear")),
        change_constant(None, 0, 1),
        "start value",
    ),
    ("fp8_fp4_registers", "wrong box coordinate", calls("tma_load"), shift_argument(3), "coordinate 1 of x"),
    ("fp8_fp4_registers", "wrong row of the box", calls("tma_load"), shift_argument(4), "coordinate 0 of x"),
    ("fp8_fp4_registers", "other stage read", loads("w_tile"), change_constant(None, 3, 2), "read of w_tile"),
    ("fp8_fp4_registers", "other stage filled", calls("tma_load"), change_constant(2, 3, 2), "x_tile"),
    (
        "fp8_fp4_registers",
        "other stage multiplied",
        calls("increase_descriptor_offset"),
        change_constant(1, 3, 2),
        "column of B",
    ),
    (
        "fp8_fp4_registers",
        "other slice multiplied",
        calls("increase_descriptor_offset"),
        change_constant(1, 512, 1024),
        "B",
    ),
    (
        "fp8_fp4_registers",
        "accumulator not cleared",
        calls("ptx_wgmma_rs"),
        change_constant(11, 0, 1),
        "clearing",
    ),
    (
        "fp8_fp4_registers",
        "other accumulator",
        calls("ptx_wgmma_rs"),
        shift_argument(10),
        "accumulator register",
    ),
    ("fp8_fp4_registers", "operand swapped", stores("acc"), swap_operands("mul"), None),
    (
        "fp8_fp4_shared",
        "descriptor stride",
        calls("initialize_wgmma_descriptor"),
        change_constant(4, 64, 32),
        "A|B",
    ),
    (
        "two_products",
        "operand of the first twice",
        last(calls("increase_descriptor_offset")),
        change_constant(1, 4096, 0),
        "B",
    ),
    ("padded_rows", "a row too few", stores("part"), change_constant(None, 5, 4), "condition"),
    ("padded_rows", "a row too many", stores("part"), change_constant(None, 5, 6), "condition"),
    ("padded_rows", "another filling", stores("part"), change_constant(None, -1.0, -2.0), "constant|value"),
    ("padded_rows", "the next row", loads("x"), shift_index, "read of x"),
    ("bf16_nt", "k slice twice", calls("ptx_wgmma_ss"), change_constant(7, 32, 16), "A"),
    (
        "bf16_nn_two_warpgroups",
        "leading offset",
        calls("initialize_wgmma_descriptor"),
        shift_argument(3),
        None,
    ),
]


@pytest.mark.parametrize(
    ("name", "find", "change", "reason"),
    [(m[0], m[2], m[3], m[4]) for m in MUTATIONS],
    ids=[f"{m[0]}-{m[1]}" for m in MUTATIONS],
)
def test_a_mutated_device_program_is_refuted(name, find, change, reason):
    kernel = extracted(name)
    nodes = find(kernel.device)
    assert nodes
    node = nodes[-1] if isinstance(nodes[0], ir.Store) else nodes[0]
    body = substitute(kernel.device.body, node, change(node))
    assert body is not kernel.device.body
    verdict, reasons, _ = check(replace(kernel, device=replace(kernel.device, body=body)))
    if reason is None:  # equivalent: products commute, and this layout has one chunk of leading offset
        assert verdict is not Verdict.UNKNOWN, reasons
        return
    assert verdict is Verdict.REFUTED, reasons
    assert any(re.search(reason, r) for r in reasons), reasons


def test_a_dropped_guard_is_refuted():
    kernel = extracted("fp4_dequant")
    guard = next(s for s in ir.walk(kernel.device.body) if isinstance(s, ir.If))
    body = substitute(kernel.device.body, guard, guard.then)
    verdict, reasons, _ = check(replace(kernel, device=replace(kernel.device, body=body)))
    assert verdict is Verdict.REFUTED, reasons
    assert any("condition of the store" in r for r in reasons)


def test_a_dropped_store_is_refuted():
    kernel = extracted("fp4_dequant")
    (store,) = stores("out")(kernel.device)
    body = substitute(kernel.device.body, store, ir.Seq(None, ()))
    verdict, reasons, _ = check(replace(kernel, device=replace(kernel.device, body=body)))
    assert verdict is Verdict.REFUTED, reasons
    assert any("dropped" in r for r in reasons)


def test_an_unknown_call_is_unsupported():
    kernel = extracted("fp4_dequant")
    (store,) = stores("out")(kernel.device)
    call = ir.Eval(None, ir.Call(ir.HANDLE, "ptx_unheard_of", ()))
    body = substitute(kernel.device.body, store, ir.Seq(None, (store, call)))
    verdict, reasons, _ = check(replace(kernel, device=replace(kernel.device, body=body)))
    assert verdict is Verdict.UNSUPPORTED
    assert reasons == ["device call ptx_unheard_of"]


def test_overlapping_shared_buffers_are_not_proved():
    kernel = extracted("fp8_fp4_shared")
    bind = [
        s
        for s in ir.walk(kernel.device.body)
        if isinstance(s, ir.Bind) and isinstance(s.value, ir.Call) and s.value.op == "handle_add_byte_offset"
    ][1]
    assert isinstance(bind.value, ir.Call)
    pointer, offset = bind.value.args
    assert isinstance(offset, ir.Const)
    moved = replace(bind, value=replace(bind.value, args=(pointer, replace(offset, value=0))))
    body = substitute(kernel.device.body, bind, moved)
    verdict, reasons, _ = check(replace(kernel, device=replace(kernel.device, body=body)))
    assert verdict is Verdict.UNSUPPORTED
    assert "share bytes of shared memory" in reasons[0]
