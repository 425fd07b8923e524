"""TVM's IR -> our IR. Whatever is not known here raises UnsupportedIR, never a guess."""

from dataclasses import replace
from functools import cache
from typing import Any

import tvm_ffi
from tilelang import tvm
from tvm import tirx

from verify import ir
from verify.externs import signals

_BINARY = {
    "Add": "add",
    "Sub": "sub",
    "Mul": "mul",
    "Div": "truediv",
    "FloorDiv": "floordiv",
    "FloorMod": "floormod",
    "Mod": "truncmod",
    "Min": "min",
    "Max": "max",
    "EQ": "eq",
    "NE": "ne",
    "LT": "lt",
    "LE": "le",
    "GT": "gt",
    "GE": "ge",
    "And": "and",
    "Or": "or",
}
_BINARY_CALLS = {
    "bitwise_and": "bitand",
    "bitwise_or": "bitor",
    "bitwise_xor": "bitxor",
    "shift_left": "shl",
    "shift_right": "shr",
}
_LOOP_KINDS: dict[int, ir.LoopKind] = {0: "serial", 1: "parallel", 2: "vectorized", 3: "unrolled"}
_PARTLY_UNROLLED = "pragma_unroll_factor"  # around the loop
_MODES = {1: "r", 2: "w", 3: "rw"}
_PREFIXES = ("tl.tileop.", "tl.", "tirx.")
# Stmt.span has no Python attribute in this release; its reflected getter has to be asked for.
_STMT = tvm_ffi.core._lookup_or_register_type_info_from_type_key("tirx.Stmt")
_SPAN = next(f for f in _STMT.fields if f.name == "span")


def parse_function(func: Any, name: str) -> ir.Function:
    """Return `func`, a tirx.PrimFunc at any stage, as an ir.Function.

    Raises:
        UnsupportedIR: a node, type or statement we have no meaning for.
    """
    return _Parser().function(func, name)


def parse_layout_index(exprs: Any, inputs: Any, variables: tuple[ir.Var, ...]) -> tuple[ir.Expr, ...]:
    """Return a layout's index expressions over `variables`, which stand for its `inputs`."""
    parser = _Parser()
    for var, mine in zip(inputs, variables, strict=True):
        parser.vars[var] = mine
    return tuple(parser.expr(e) for e in exprs)


def dtype(text: Any) -> ir.DType:
    """Return TVM's dtype (`float32x4`) as ours."""
    return _dtype(str(text))


@cache
def _dtype(text: str) -> ir.DType:
    if text in ("", "void"):
        return ir.DType("void")
    kind = tvm.DataType(text)
    lanes = int(kind.lanes)
    name = text.rsplit("x", 1)[0] if lanes > 1 else text
    return ir.DType(name, lanes)


class _Parser:
    def __init__(self) -> None:
        self.vars: dict[Any, ir.Var] = {}
        self.buffers: dict[Any, ir.Buffer] = {}

    # ------------------------------------------------------------------ functions
    def function(self, func: Any, name: str) -> ir.Function:
        params = tuple(self.var(p) for p in func.params)
        buffers = {self.var(p): self.buffer(b) for p, b in func.buffer_map.items()}
        attrs = {str(k): self.attr_value(v) for k, v in func.attrs.items()} if func.attrs else {}
        return ir.Function(name, params, buffers, self.stmt(func.body), attrs)

    def attr_value(self, value: Any) -> Any:
        if isinstance(value, (int, float, str, bool)):
            return value
        if isinstance(value, tirx.PrimExpr):
            return self.expr(value)
        if isinstance(value, (tvm_ffi.Array, list, tuple)):
            return tuple(self.attr_value(v) for v in value)
        if isinstance(value, tvm_ffi.Map):
            return {str(k): self.attr_value(v) for k, v in value.items()}
        return value

    # ------------------------------------------------------------------ leaves
    def var(self, var: Any) -> ir.Var:
        mine = self.vars.get(var)
        if mine is None:
            mine = self.vars[var] = ir.Var(dtype(var.dtype), var.name)
        return mine

    def buffer(self, buf: Any) -> ir.Buffer:
        mine = self.buffers.get(buf)
        if mine is None:
            mine = ir.Buffer(
                buf.name,
                dtype(buf.dtype),
                tuple(self.expr(s) for s in buf.shape),
                tuple(self.expr(s) for s in buf.strides),
                buf.scope() or "global",
                self.var(buf.data),
                self.expr(buf.elem_offset) if buf.elem_offset is not None else ir.Const(ir.INT32, 0),
            )
            self.buffers[buf] = mine
        return mine

    def span(self, node: Any) -> ir.Span | None:
        span = _SPAN.getter(node) if isinstance(node, tirx.Stmt) else None
        while span is not None and hasattr(span, "spans"):  # several: the first is the author's
            span = span.spans[0] if len(span.spans) else None
        if span is None:
            return None
        return ir.Span(str(span.source_name.name), int(span.line), int(span.column))

    # ------------------------------------------------------------------ expressions
    def expr(self, node: Any) -> ir.Expr:
        if isinstance(node, bool):
            return ir.Const(ir.BOOL, node)
        if isinstance(node, int):
            return ir.Const(ir.INT32, node)
        kind = type(node).__name__
        if kind in _BINARY:
            a, b = self.expr(node.a), self.expr(node.b)
            op = _BINARY[kind]
            if op == "truediv" and a.dtype.is_int:
                op = "truncdiv"
            return ir.BinOp(dtype(node.dtype), op, a, b)
        handler = getattr(self, f"_expr_{kind}", None)
        if handler is None:
            raise ir.UnsupportedIR(f"expression {kind}")
        return handler(node)

    def _expr_IntImm(self, node: Any) -> ir.Expr:
        kind = dtype(node.dtype)
        return ir.Const(kind, bool(node.value) if kind.name == "bool" else int(node.value))

    def _expr_FloatImm(self, node: Any) -> ir.Expr:
        return ir.Const(dtype(node.dtype), float(node.value))

    def _expr_StringImm(self, node: Any) -> ir.Expr:
        return ir.Str(ir.DType("string"), str(node.value))

    def _expr_Var(self, node: Any) -> ir.Expr:
        return self.var(node)

    _expr_SizeVar = _expr_Var

    def _expr_Not(self, node: Any) -> ir.Expr:
        return ir.Not(dtype(node.dtype), self.expr(node.a))

    def _expr_Cast(self, node: Any) -> ir.Expr:
        return ir.Cast(dtype(node.dtype), self.expr(node.value))

    def _expr_Select(self, node: Any) -> ir.Expr:
        args = (self.expr(node.condition), self.expr(node.true_value), self.expr(node.false_value))
        return ir.Select(dtype(node.dtype), *args, lazy=False)

    def _expr_BufferLoad(self, node: Any) -> ir.Expr:
        if getattr(node, "predicate", None) is not None:
            raise ir.UnsupportedIR("predicated buffer load")
        return ir.Load(dtype(node.dtype), self.buffer(node.buffer), tuple(self.expr(i) for i in node.indices))

    def _expr_Ramp(self, node: Any) -> ir.Expr:
        return ir.Ramp(dtype(node.dtype), self.expr(node.base), self.expr(node.stride))

    def _expr_Broadcast(self, node: Any) -> ir.Expr:
        return ir.Broadcast(dtype(node.dtype), self.expr(node.value))

    def _expr_Shuffle(self, node: Any) -> ir.Expr:
        indices = tuple(int(i) for i in node.indices)
        vectors = tuple(self.expr(v) for v in node.vectors)
        return ir.Call(dtype(node.dtype), "shuffle", vectors, {"indices": indices})

    def _expr_Let(self, node: Any) -> ir.Expr:
        return ir.Let(dtype(node.dtype), self.var(node.var), self.expr(node.value), self.expr(node.body))

    def _expr_Call(self, node: Any) -> ir.Expr:
        op = node.op.name if isinstance(node.op, tvm.ir.Op) else str(node.op)
        for prefix in _PREFIXES:
            if op.startswith(prefix):
                op = op[len(prefix) :]
                break
        kind = dtype(node.dtype)
        if op in _BINARY_CALLS:
            return ir.BinOp(kind, _BINARY_CALLS[op], self.expr(node.args[0]), self.expr(node.args[1]))
        if op == "if_then_else":
            return ir.Select(kind, *(self.expr(a) for a in node.args), lazy=True)
        if op == "region":
            return self._region(node)
        if op == "tvm_access_ptr":
            return self._access_ptr(node)
        args = tuple(self.expr(a) for a in node.args)
        if op == "call_extern" and isinstance(args[0], ir.Str) and args[0].value in signals.SIGNALS:
            signal = signals.SIGNALS[args[0].value]
            order, scope = (ir.Const(ir.DType("int32"), v) for v in (signal.order, signal.scope))
            return ir.Call(kind, signal.op, (*args[1:], order, scope))
        notes = getattr(node, "annotations", None)
        annotations = {str(k): self.attr_value(v) for k, v in notes.items()} if notes else {}
        return ir.Call(kind, op, args, annotations)

    def _region(self, node: Any) -> ir.Expr:
        load, mask, *extents = node.args
        mins, sizes = [], []
        for index, extent in zip(load.indices, extents, strict=True):
            if isinstance(index, tirx.Ramp):  # a sliced index carries its extent in its lanes
                mins.append(self.expr(index.base))
                sizes.append(self.expr(index.lanes))
            else:
                mins.append(self.expr(index))
                sizes.append(self.expr(extent))
        buffer = self.buffer(load.buffer)
        return ir.Region(buffer.dtype, buffer, tuple(mins), tuple(sizes), _MODES[int(mask)])

    def _access_ptr(self, node: Any) -> ir.Expr:
        annotation, data, offset, extent, mask = node.args
        if not isinstance(data, tirx.Var):
            raise ir.UnsupportedIR("access_ptr of a computed pointer")
        element = dtype(annotation.dtype)
        return ir.AccessPtr(
            ir.HANDLE, self.var(data), element, self.expr(offset), self.expr(extent), _MODES[int(mask)]
        )

    # ------------------------------------------------------------------ statements
    def stmt(self, node: Any) -> ir.Stmt:
        kind = type(node).__name__
        handler = getattr(self, f"_stmt_{kind}", None)
        if handler is None:
            raise ir.UnsupportedIR(f"statement {kind}")
        return handler(node)

    def _stmt_SeqStmt(self, node: Any) -> ir.Stmt:
        return ir.Seq(self.span(node), tuple(self.stmt(s) for s in node.seq))

    def _stmt_For(self, node: Any) -> ir.Stmt:
        if node.thread_binding is not None:
            tag = str(node.thread_binding.thread_tag)
            return ir.Launch(
                self.span(node), self.var(node.loop_var), tag, self.expr(node.extent), self.stmt(node.body)
            )
        kind = _LOOP_KINDS.get(int(node.kind))
        if kind is None:
            raise ir.UnsupportedIR(f"loop kind {int(node.kind)}")
        if getattr(node, "step", None) is not None and int(node.step) != 1:
            raise ir.UnsupportedIR("loop step")
        notes = {str(k): self.attr_value(v) for k, v in (node.annotations or {}).items()}
        start, extent = self.expr(node.min), self.expr(node.extent)
        var, body = self.var(node.loop_var), self.stmt(node.body)
        return ir.For(self.span(node), var, start, extent, kind, body, notes)

    def _stmt_While(self, node: Any) -> ir.Stmt:
        return ir.While(self.span(node), self.expr(node.condition), self.stmt(node.body))

    def _stmt_IfThenElse(self, node: Any) -> ir.Stmt:
        orelse = self.stmt(node.else_case) if node.else_case is not None else None
        return ir.If(self.span(node), self.expr(node.condition), self.stmt(node.then_case), orelse)

    def _stmt_BufferStore(self, node: Any) -> ir.Stmt:
        if getattr(node, "predicate", None) is not None:
            raise ir.UnsupportedIR("predicated buffer store")
        indices = tuple(self.expr(i) for i in node.indices)
        return ir.Store(self.span(node), self.buffer(node.buffer), indices, self.expr(node.value))

    def _stmt_Bind(self, node: Any) -> ir.Stmt:
        return ir.Bind(self.span(node), self.var(node.var), self.expr(node.value))

    def _stmt_Evaluate(self, node: Any) -> ir.Stmt:
        return ir.Eval(self.span(node), self.expr(node.value))

    def _stmt_AllocBuffer(self, node: Any) -> ir.Stmt:
        return ir.Alloc(self.span(node), self.buffer(node.buffer))

    def _stmt_DeclBuffer(self, node: Any) -> ir.Stmt:
        return ir.Decl(self.span(node), self.buffer(node.buffer))

    def _stmt_AssertStmt(self, node: Any) -> ir.Stmt:
        return ir.Assert(self.span(node), self.expr(node.condition), str(node.message_parts))

    def _stmt_AttrStmt(self, node: Any) -> ir.Stmt:
        key = str(node.attr_key)
        if key == "thread_extent":
            var, tag = self.var(node.node.var), str(node.node.thread_tag)
            return ir.Launch(self.span(node), var, tag, self.expr(node.value), self.stmt(node.body))
        if key == "tl.assume":
            return ir.Assume(self.span(node), self.expr(node.node), self.stmt(node.body))
        body = self.stmt(node.body)
        if key == _PARTLY_UNROLLED and isinstance(body, ir.For) and body.kind == "unrolled":
            # `#pragma unroll N` of fewer rounds than the loop has: it stays a loop.
            return replace(body, kind="serial")
        value = self.expr(node.value) if isinstance(node.value, tirx.PrimExpr) else node.value
        return ir.Attr(self.span(node), key, node.node, value, body)

    def _stmt_SBlockRealize(self, node: Any) -> ir.Stmt:
        return self.stmt(node.block)

    def _stmt_SBlock(self, node: Any) -> ir.Stmt:
        if node.iter_vars or node.match_buffers or node.init is not None:
            raise ir.UnsupportedIR("block with iteration variables, matched buffers or init")
        notes = dict(node.annotations.items()) if node.annotations else {}
        reducers = {self.var(v): str(i["op"]) for v, i in (notes.pop("reducer_info_v2", None) or {}).items()}
        layouts = {self.var(v): layout for v, layout in (notes.pop("layout_map", None) or {}).items()}
        allocs = tuple(self.buffer(b) for b in node.alloc_buffers)
        kept = {str(k): self.attr_value(v) for k, v in notes.items()}
        if reducers:  # by variable: names need not be unique
            kept["reducer_info_v2"] = reducers
        return ir.Block(self.span(node), str(node.name_hint), allocs, layouts, kept, self.stmt(node.body))
