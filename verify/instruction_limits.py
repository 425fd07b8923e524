"""Limits of single instructions: wgmma shapes and majors, cp.async sizes, descriptors, launch bounds.

Those of the PTX ISA for sm_90a ("wgmma.mma_async", "cp.async") and of cuTensorMapEncodeTiled.
"""

import re
from collections.abc import Iterator

import z3

from verify import ir
from verify.descriptors import mma_shape
from verify.encode import Scope
from verify.host import Descriptor
from verify.intarith import constant_of
from verify.properties import Context
from verify.solve import Obligation
from verify.storage import BYTE_BITS
from verify.text import show
from verify.walk import Site

WGMMA_ROWS = 64
WGMMA_MAX_COLUMNS = 256
WGMMA_COLUMN_STEP = 8
WGMMA_K_BITS = 256
# Integer products take fewer column counts: 8, 16, 24 and multiples of 16.
_INT8_COLUMNS = frozenset({8, 24, *range(16, WGMMA_MAX_COLUMNS + 1, 16)})
_OPERAND_BITS = {"fp16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "int8": 8, "uint8": 8}
_INTEGERS = frozenset({"int8", "uint8"})
CP_ASYNC_BYTES = frozenset({4, 8, 16})
MAX_ELEMENT_STRIDE = 8
_LAUNCH_BOUNDS = re.compile(r"__launch_bounds__\((\d+)(?:, (\d+))?\)")


def instruction_limits(context: Context) -> Iterator[Obligation]:
    """Yield the obligations of every instruction that has limits beyond its addresses."""
    for site in context.device_sites:
        match site.node:
            case ir.Call(op="ptx_wgmma_ss" | "ptx_wgmma_rs") as call:
                yield _wgmma(site, call)
            case ir.Call(op="ptx_cp_async", args=(ir.AccessPtr(element=element), _, count, *_)):
                yield _cp_async(context, site, element, count)
    for descriptor in context.host.descriptors.values():
        yield _strides(descriptor)
    bounds = _launch_bounds(context)
    if bounds is not None:
        yield bounds


def _wgmma(site: Site, call: ir.Call) -> Obligation:
    m, n, k = mma_shape(call.args[0])
    from_registers = call.op == "ptx_wgmma_rs"
    majors, rest = (call.args[1:2], call.args[2:]) if from_registers else (call.args[1:3], call.args[3:])
    kinds = [a.value for a in rest[:2] if isinstance(a, ir.Str)]
    bits = [_OPERAND_BITS.get(kind, 0) for kind in kinds]
    if len(kinds) != 2 or 0 in bits:
        raise ir.UnsupportedIR(f"wgmma of {[show(a) for a in rest[:2]]}")
    columns = n in _INT8_COLUMNS if _INTEGERS & set(kinds) else n % WGMMA_COLUMN_STEP == 0
    k_major = all(isinstance(a, ir.Const) and bool(a.value) for a in majors)
    legal = {
        "64 rows": m == WGMMA_ROWS,
        "columns": columns and WGMMA_COLUMN_STEP <= n <= WGMMA_MAX_COLUMNS,
        "256 bits of K": bits[0] == bits[1] and k * bits[0] == WGMMA_K_BITS,
        "K-major operands unless of 16 bits": k_major or bits[0] == 16,
    }
    broken = [name for name, holds in legal.items() if not holds]
    what = f"wgmma m{m}n{n}k{k} of {kinds[0]} and {kinds[1]} is one of the instruction's shapes"
    shown = {"shape": f"m{m}n{n}k{k}", "broken": ", ".join(broken)} if broken else {}
    return Obligation(what, site.span, site.scope.hypotheses, z3.BoolVal(not broken), shown, site)


def _cp_async(context: Context, site: Site, element: ir.DType, count: ir.Expr) -> Obligation:
    number = constant_of(context.encoder.term(count, site.scope))
    size = None if number is None else number * element.bits / BYTE_BITS
    what = f"cp.async of {'a computed size' if size is None else size} bytes is of 4, 8 or 16"
    goal = z3.BoolVal(size in CP_ASYNC_BYTES)
    return Obligation(what, site.span, site.scope.hypotheses, goal, {"bytes": str(size)}, site)


def _strides(descriptor: Descriptor) -> Obligation:
    good = all(1 <= s <= MAX_ELEMENT_STRIDE for s in descriptor.element_strides)
    what = f"TMA descriptor {descriptor.name}: element strides of 1 to {MAX_ELEMENT_STRIDE}"
    return Obligation(what, None, (), z3.BoolVal(good), {"strides": str(descriptor.element_strides)})


def _launch_bounds(context: Context) -> Obligation | None:
    """Return that the block which is launched is within the bounds that registers were allotted for."""
    found = _LAUNCH_BOUNDS.search(context.extracted.cuda_text)
    if found is None:
        return None
    threads = z3.IntVal(1)
    for tag in ("threadIdx.x", "threadIdx.y", "threadIdx.z"):
        if tag in context.host.extents:
            threads = threads * context.encoder.term(context.host.extents[tag], Scope())
    limit = int(found[1])
    what = f"at most {limit} threads, for which the kernel is compiled (__launch_bounds__)"
    return Obligation(what, None, (), threads <= limit, {"threads": threads})
