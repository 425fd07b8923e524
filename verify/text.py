"""Short text of IR nodes, for labels, messages and excerpts."""

from verify import ir

_SYMBOLS = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "truediv": "/",
    "floordiv": "//",
    "floormod": "%",
    "truncdiv": "/",
    "truncmod": "%",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "and": "and",
    "or": "or",
    "bitand": "&",
    "bitor": "|",
    "bitxor": "^",
    "shl": "<<",
    "shr": ">>",
}
_INDENT = "  "


def show(node: object) -> str:
    """Return an expression as one line of text; integer casts are left out."""
    match node:
        case ir.Const(value=value):
            return str(value)
        case ir.Str(value=value):
            return repr(value)
        case ir.Var(name=name):
            return name
        case ir.BinOp(op=op, a=a, b=b) if op in _SYMBOLS:
            return f"{_atom(a)} {_SYMBOLS[op]} {_atom(b)}"
        case ir.BinOp(op=op, a=a, b=b):
            return f"{op}({show(a)}, {show(b)})"
        case ir.Not(a=a):
            return f"not {_atom(a)}"
        case ir.Cast(a=a, dtype=dtype):
            return show(a) if dtype.is_int and a.dtype.is_int else f"{dtype}({show(a)})"
        case ir.Select(cond=cond, a=a, b=b):
            return f"({show(a)} if {show(cond)} else {show(b)})"
        case ir.Load(buffer=buffer, indices=indices):
            return f"{buffer.name}[{_commas(indices)}]"
        case ir.Ramp(base=base, stride=stride, dtype=dtype):
            step = f" * {show(stride)}" if show(stride) != "1" else ""
            return f"{show(base)} + lane{step} (lane < {dtype.lanes})"
        case ir.Broadcast(value=value):
            return show(value)
        case ir.Let(var=var, value=value, body=body):
            return f"(let {var.name} = {show(value)} in {show(body)})"
        case ir.Call(op="call_extern", args=(name, *args)):
            return f"{show(name)}({_commas(args)})"
        case ir.Call(op=op, args=args):
            return f"{op}({_commas(args)})"
        case ir.Region(buffer=buffer, mins=mins, extents=extents):
            box = ", ".join(f"{show(m)} : +{show(e)}" for m, e in zip(mins, extents, strict=True))
            return f"{buffer.name}[{box}]"
        case ir.AccessPtr(data=data, offset=offset, extent=extent):
            return f"&{data.name}[{show(offset)} : +{show(extent)}]"
        case ir.Store(buffer=buffer, indices=indices, value=value):
            return f"{buffer.name}[{_commas(indices)}] = {show(value)}"
        case ir.Bind(var=var, value=value):
            return f"{var.name} = {show(value)}"
        case ir.Eval(value=value):
            return show(value)
        case ir.For(var=var, start=start, extent=extent, kind=kind):
            return f"for {var.name} in [{show(start)}, +{show(extent)}) {kind}:"
        case ir.While(cond=cond):
            return f"while {show(cond)}:"
        case ir.If(cond=cond):
            return f"if {show(cond)}:"
        case ir.Launch(var=var, tag=tag, extent=extent):
            return f"{tag} {var.name} < {show(extent)}:"
    return type(node).__name__


def _atom(node: ir.Expr) -> str:
    text = show(node)
    inner = node.a if isinstance(node, ir.Cast) else node
    return f"({text})" if isinstance(inner, ir.BinOp) and inner.op in _SYMBOLS else text


def _commas(nodes: object) -> str:
    return ", ".join(show(n) for n in nodes)  # type: ignore[attr-defined]


def excerpt(path: tuple[ir.Stmt, ...], statement: object) -> str:
    """Return the statement under the loops, launches and branches around it."""
    lines = [show(s) for s in path if isinstance(s, (ir.For, ir.While, ir.If, ir.Launch))]
    lines.append(show(statement))
    return "\n".join(_INDENT * depth + line for depth, line in enumerate(lines))
