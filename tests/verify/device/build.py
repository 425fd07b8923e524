"""Device functions of a few statements, built from IR nodes: kernels that TileLang would not emit."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from verify import host, ir
from verify.interp import device
from verify.interp.device.run import Tensor, flat_bytes

I32, U8, F32 = ir.DType("int32"), ir.DType("uint8"), ir.DType("float32")
TX, BX = ir.Var(I32, "tx"), ir.Var(I32, "bx")


def const(value, kind="int32"):
    """A literal."""
    return value if isinstance(value, ir.Expr) else ir.Const(ir.DType(kind), value)


def op(name, a, b):
    """`a op b`; comparisons are bool."""
    a, b = const(a), const(b)
    kind = ir.BOOL if name in ("eq", "ne", "lt", "le", "gt", "ge", "and", "or") else a.dtype
    return ir.BinOp(kind, name, a, b)


def add(a, b):
    """a + b."""
    return op("add", a, b)


def mul(a, b):
    """a * b."""
    return op("mul", a, b)


def buffer(name, kind, count, scope):
    """A flat buffer of its own storage."""
    data = ir.Var(ir.HANDLE, name)
    return ir.Buffer(name, ir.DType(kind), (const(count),), (), scope, data, const(0))


def load(buf, index, lanes=1):
    """`buf[index]`, or `lanes` elements from it on."""
    index = const(index)
    if lanes > 1:
        index = ir.Ramp(ir.DType("int32", lanes), index, const(1))
    return ir.Load(ir.DType(buf.dtype.name, lanes), buf, (index,))


_LINES = iter(range(1, 1 << 20))


def span():
    """A place in a made-up file, a new line for each statement."""
    return ir.Span("kernel.py", next(_LINES), 1)


def store(buf, index, value, lanes=1):
    """`buf[index] = value`, or `lanes` elements."""
    index = const(index)
    if lanes > 1:
        index = ir.Ramp(ir.DType("int32", lanes), index, const(1))
    return ir.Store(span(), buf, (index,), const(value, buf.dtype.name))


def call(name, *args):
    """A call for its effect; strings and numbers become literals."""
    given = tuple(ir.Str(ir.DType("string"), a) if isinstance(a, str) else const(a) for a in args)
    return ir.Eval(span(), ir.Call(ir.DType("void"), name, given))


def value_of(name, kind, *args):
    """A call for its value."""
    return ir.Call(ir.DType(kind), name, tuple(const(a) for a in args))


def sync():
    """__syncthreads()."""
    return call("tvm_storage_sync", "shared")


def pointer(buf, offset, extent, mode="r"):
    """The address of an element."""
    return ir.AccessPtr(ir.HANDLE, buf.data, buf.dtype, const(offset), const(extent), mode)


def when(cond, *then, other=()):
    """A conditional."""
    return ir.If(span(), cond, ir.Seq(None, then), ir.Seq(None, tuple(other)) if other else None)


def loop(var, extent, *body):
    """A serial loop from 0."""
    return ir.For(span(), var, const(0), const(extent), "serial", ir.Seq(None, body), {})


class Kernel:
    """A device function with its tensors, for `device.run_function`."""

    def __init__(self, *, threads=64, blocks=1, tensors=(), allocs=(), body=(), maps=None, cluster=None):
        self.buffers = list(tensors)
        self.maps = maps or {}
        inner = ir.Seq(None, (*(ir.Alloc(None, b) for b in allocs), *body))
        launched = ir.Launch(None, BX, "blockIdx.x", const(blocks), inner)
        launched = ir.Launch(None, TX, "threadIdx.x", const(threads), launched)
        params = (*(b.data for b in tensors), *self.maps)
        attrs = {"cluster_dims": cluster} if cluster else {}
        self.function = ir.Function("kernel", params, {}, launched, attrs)

    def run(self, *values, **options):
        """Run on torch tensors, one a buffer; options as in `device.run_function`."""
        launch = host.Host({b.data: b for b in self.buffers}, dict(self.maps), {}, {}, ())
        named = {
            b.name: Tensor(v.numel() * v.element_size() * 8, flat_bytes(v, v.numel()))
            for b, v in zip(self.buffers, values, strict=True)
        }
        return device.run_function(self.function, launch, named, {}, **options)


def rewrite(node: Any, change: Callable[[Any], Any]) -> Any:
    """Return `node` with every statement and expression below it replaced by `change` of it.

    `change` returns the node itself to keep it, None to drop a statement. Buffers and variables stay.
    """
    if isinstance(node, tuple):
        return tuple(n for n in (rewrite(child, change) for child in node) if n is not None)
    if not isinstance(node, (ir.Stmt, ir.Expr)) or isinstance(node, ir.Var):
        return node
    changed = change(node)
    if changed is None:
        return None if isinstance(node, ir.Expr) else ir.Seq(node.span, ())
    if changed is not node:
        return changed
    assert is_dataclass(node)
    parts = {
        f.name: new
        for f in fields(node)
        if f.name != "span" and (new := rewrite(getattr(node, f.name), change)) is not getattr(node, f.name)
    }
    same = all(_equal(new, getattr(node, name)) for name, new in parts.items())
    return node if same else replace(node, **parts)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    return a is b


def edit(extracted: Any, change: Callable[[Any], Any]) -> Any:
    """Return `extracted` with another device function."""
    function = extracted.device
    body = rewrite(function.body, change)
    assert body is not function.body, "the edit found nothing to change"
    return replace(extracted, device=replace(function, body=body))


def is_call(node: Any, *names: str) -> bool:
    """Whether `node` evaluates one of the calls `names`."""
    return isinstance(node, ir.Eval) and isinstance(node.value, ir.Call) and node.value.op in names


def ints(*shape):
    """An int32 tensor of zeros."""
    return torch.zeros(*shape, dtype=torch.int32)
