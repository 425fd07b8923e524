"""Calls that write through pointers, as the stores of elements that they are.

`f(&b[i, 4 * j], word)` that writes one word becomes `for e: b[i, 4 * j + e] = element e of what f writes`,
in any stage. What reads stores then needs to know nothing of device functions.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from verify import ir
from verify.externs.registry import Extern, called, find
from verify.externs.words import BITS, MASK, Arrays
from verify.ir import UnsupportedIR

ELEMENT = "extern_element"  # (function, pointer parameter, word, element of the word, word arguments...)


def as_stores(function: ir.Function) -> ir.Function:
    """Return `function` with every call of a registered function that writes replaced by its stores.

    Raises:
        UnsupportedIR: a call reads through a pointer, or its pointer is not the address of an element.
    """
    return replace(function, body=_statement(function.body))


def _statement(node: Any) -> Any:
    match node:
        case ir.Eval(value=value) if (extern := called(value)) is not None and not extern.is_pure:
            return stores(node, extern)
        case ir.Seq(stmts=stmts):
            return replace(node, stmts=tuple(_statement(s) for s in stmts))
        case ir.If(then=then, orelse=orelse):
            other = None if orelse is None else _statement(orelse)
            return replace(node, then=_statement(then), orelse=other)
        case ir.Attr() | ir.Block() | ir.Launch() | ir.Assume() | ir.For() | ir.While():
            return replace(node, body=_statement(node.body))
    return node


def stores(statement: ir.Eval, extern: Extern) -> ir.Stmt:
    """Return the stores of one call, in the order of its pointers.

    Raises:
        UnsupportedIR: as in `as_stores`.
    """
    call = statement.value
    assert isinstance(call, ir.Call), "checked by the caller"
    arguments = dict(zip((p.name for p in extern.function.parameters), call.args[1:], strict=True))
    values = tuple(arguments[n] for n in extern.word_parameters)
    if extern.function.reads:
        raise UnsupportedIR(f"{extern.name} reads memory")
    found = []
    for name, word in sorted(extern.function.writes, key=lambda p: (list(arguments).index(p[0]), p[1])):
        buffer, indices = _address(arguments[name], extern)
        if BITS % buffer.dtype.bits:
            raise UnsupportedIR(f"{extern.name} writes words into {buffer.dtype}")
        count = BITS // buffer.dtype.bits
        var = ir.Var(ir.INT32, f"{name} {word} element")
        last = ir.BinOp(ir.INT32, "add", indices[-1], _constant(word * count))
        last = ir.BinOp(ir.INT32, "add", last, var)
        which = (ir.Str(ir.DType("string"), extern.name), ir.Str(ir.DType("string"), name), _constant(word))
        value = ir.Call(buffer.dtype, ELEMENT, (*which, var, *values))
        store = ir.Store(statement.span, buffer, (*indices[:-1], last), value)
        found.append(ir.For(statement.span, var, _constant(0), _constant(count), "vectorized", store, {}))
    return found[0] if len(found) == 1 else ir.Seq(statement.span, tuple(found))


def element(call: ir.Call, which: np.ndarray | int, *values: np.ndarray) -> np.ndarray:
    """Return the bits of element `which` that an ELEMENT call stands for, of `values` as words."""
    name, pointer, word = (a.value for a in call.args[:3])  # type: ignore[attr-defined]
    extern = find(str(name))
    if extern is None:
        raise UnsupportedIR(f"external function {name}")
    given = {n: v.astype(np.int64) & MASK for n, v in zip(extern.word_parameters, values, strict=True)}
    written = extern.meaning(Arrays(), given, {})[pointer, word]
    bits = call.dtype.bits
    return written >> (np.asarray(which) * bits) & ((1 << bits) - 1)


def _address(pointer: ir.Expr, extern: Extern) -> tuple[ir.Buffer, tuple[ir.Expr, ...]]:
    match pointer:
        case ir.Call(op="address_of", args=(ir.Load(buffer=buffer, indices=indices),)):
            return buffer, indices
    raise UnsupportedIR(f"{extern.name} through a pointer that is not the address of an element")


def _constant(value: int) -> ir.Const:
    return ir.Const(ir.INT32, value)
