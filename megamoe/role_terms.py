"""Integers of the device IR as terms, with the plan's tensors as unknown functions; shared memory by name."""

from collections.abc import Iterator, Mapping
from typing import Any

import z3

from megamoe.memo import of_a_kernel
from megamoe.quotients import times
from megamoe.role_events import OPAQUE, Part
from verify import ir
from verify.intarith import ARITHMETIC, BITWISE, COMPARE, bitwise
from verify.ir import UnsupportedIR


@of_a_kernel
def shared_storages(function: ir.Function) -> Mapping[ir.Var, tuple[str, int]]:
    """Return, for each buffer in a CTA's shared memory, its name and first byte (of mbarriers 0).

    Raises:
        UnsupportedIR: its place is not constant.
    """
    found, arena = {}, set()
    for node in ir.walk(function.body):
        match node:
            case ir.Alloc(buffer=buffer) if buffer.scope.startswith("shared"):
                arena.add(buffer.data)
                found[buffer.data] = buffer.name, 0
            case ir.Bind(
                var=var, value=ir.Call(op="handle_add_byte_offset", args=(base, ir.Const(value=at)))
            ):
                if base in arena:
                    found[var] = var.name, int(at)
            case ir.Bind(var=var) if var.dtype.name == "handle":
                raise UnsupportedIR(f"computed pointer {var.name}")
    return found


class Terms:
    """Values of expressions, as the threads of a part have them."""

    def __init__(self, function: ir.Function, part: Part) -> None:
        """Begin with nothing known."""
        self.part = part
        self.kept, self.written = kept(function), written(function)
        self.env: dict[Any, Any] = {}
        self.local: dict[str, z3.ArithRef] = {}
        self.numbers: dict[str, int] = {}

    def symbol(self, name: str) -> z3.ArithRef:
        """Return a new symbol of this part; what stands before the first ! is the variable."""
        number = self.numbers[name] = self.numbers.get(name, 0) + 1
        return z3.Int(f"{name}!{self.part.name}!{number}")

    def opaque(self, kind: ir.DType) -> z3.ArithRef:
        """Return a new symbol for a value that is not followed."""
        return self.symbol(OPAQUE + kind.name)

    def integer(self, node: Any) -> z3.ArithRef:
        """Return an integer's term; a truth value is 0 or 1."""
        term = self.term(node)
        return z3.If(term, z3.IntVal(1), z3.IntVal(0)) if z3.is_bool(term) else term

    def first(self, index: Any) -> z3.ArithRef | None:
        """Return the element at which an access begins; None: its elements are not neighbours."""
        match index:
            case ir.Ramp(base=base, stride=ir.Const(value=1)):
                return self.integer(base)
            case _ if index.dtype.lanes == 1:
                return self.integer(index)
            case _:
                return None

    def boolean(self, node: Any) -> z3.BoolRef:
        """Return a truth value's term; an integer is true unless it is 0."""
        term = self.term(node)
        return term if z3.is_bool(term) else term != 0

    def term(self, node: Any) -> z3.ExprRef:
        """Return an integer's or a truth value's term; what is not followed is a new symbol."""
        match node:
            case ir.Const(value=value):
                if isinstance(value, float):
                    return self.opaque(node.dtype)
                return z3.BoolVal(bool(value)) if node.dtype.name == "bool" else z3.IntVal(int(value))
            case ir.Var():
                return self.env[node] if node in self.env else self.opaque(node.dtype)
            case ir.Cast(a=a) if node.dtype.is_int and a.dtype.is_int:
                return self.boolean(a) if node.dtype.name == "bool" else self.integer(a)
            case ir.Not(a=a):
                return z3.Not(self.boolean(a))
            case ir.Select(cond=c, a=a, b=b) if node.dtype.is_int and node.dtype.lanes == 1:
                return z3.If(self.boolean(c), self.integer(a), self.integer(b))
            case ir.BinOp(op=op, a=a, b=b) if op in ("and", "or"):
                return (z3.And if op == "and" else z3.Or)(self.boolean(a), self.boolean(b))
            case ir.BinOp(op=op, a=a, b=b) if a.dtype.is_int and b.dtype.is_int and a.dtype.lanes == 1:
                return self._arithmetic(op, node.dtype, self.integer(a), self.integer(b))
            case ir.Load(buffer=buffer, indices=(index,)) if node.dtype.is_int and node.dtype.lanes == 1:
                name = self.element(buffer, index)
                if name is not None:
                    return self.local[name] if name in self.local else self.symbol(name)
                if buffer.scope == "global" and buffer.data.name not in self.written:
                    return z3.Function(f"{buffer.data.name}[]", z3.IntSort(), z3.IntSort())(
                        self.integer(index)
                    )
        return self.opaque(node.dtype)

    def _arithmetic(self, op: str, kind: ir.DType, a: z3.ArithRef, b: z3.ArithRef) -> z3.ExprRef:
        if op in COMPARE:
            return COMPARE[op](a, b)
        if op in BITWISE:
            return bitwise(op, a, b, kind) if kind.name != "bool" else self.opaque(kind)
        if op == "mul":
            return times(a, b)
        return ARITHMETIC[op](a, b) if op in ARITHMETIC else self.opaque(kind)

    def element(self, buffer: ir.Buffer, index: Any) -> str | None:
        """Return the name under which an element of a private variable is kept, or None."""
        if buffer.data in self.kept and isinstance(index, ir.Const):
            return buffer.data.name if index.value == 0 else f"{buffer.data.name}.{index.value}"
        return None

    def changed(self, body: Any) -> set[str]:
        """Return the private variables that a statement may set."""
        found = set()
        for inner in ir.walk(body):
            if isinstance(inner, ir.Store) and inner.buffer.data in self.kept:
                found.add(self.element(inner.buffer, inner.indices[0]) or "")
        return found

    def steps(self, body: Any) -> dict[str, int]:
        """Return variables that each round adds a constant to, once and on no condition: how much."""
        stores: dict[str, int] = {}
        for inner in ir.walk(body):
            if isinstance(inner, ir.Store) and inner.buffer.data in self.kept:
                name = self.element(inner.buffer, inner.indices[0]) or ""
                stores[name] = stores.get(name, 0) + 1
        found, todo = {}, [body]
        while todo:
            match todo.pop():
                case ir.Seq(stmts=stmts):
                    todo += stmts
                case ir.Store(
                    buffer=b, indices=(i,), value=ir.BinOp(op="add", a=ir.Load() as old, b=ir.Const() as step)
                ):
                    name = self.element(b, i)
                    if name is None or self.element(old.buffer, old.indices[0]) != name:
                        continue
                    if stores[name] == 1 and not isinstance(step.value, float):
                        found[name] = int(step.value)
        return found


@of_a_kernel
def kept(function: ir.Function) -> frozenset[ir.Var]:
    """Return the private integer variables of which every access names a constant element."""
    found, lost = set(), set()
    for node in ir.walk(function.body):
        match node:
            case ir.Alloc(buffer=buffer) if buffer.scope.startswith("local") and buffer.dtype.is_int:
                found.add(buffer.data)
            case ir.Load(buffer=buffer, indices=indices) | ir.Store(buffer=buffer, indices=indices):
                if not all(isinstance(i, ir.Const) for i in indices):
                    lost.add(buffer.data)
            case ir.Call(op="address_of", args=(ir.Load(buffer=buffer),)):
                lost.add(buffer.data)
            case ir.AccessPtr(data=data):
                lost.add(data)
            case ir.Call(args=args):
                lost |= {a for a in args if isinstance(a, ir.Var)}
    return frozenset(found - lost)


@of_a_kernel
def written(function: ir.Function) -> frozenset[str]:
    """Return the names of the tensors in memory that a kernel may write."""
    found = set()
    for node in ir.walk(function.body):
        match node:
            case ir.Store(buffer=buffer) if buffer.scope == "global":
                found.add(buffer.data.name)
            case ir.AccessPtr(data=data):
                found.add(data.name)
            case ir.Call(op="address_of", args=(ir.Load(buffer=buffer),)):
                found.add(buffer.data.name)
    return frozenset(found)


def touching(function: ir.Function) -> Iterator[tuple[Any, str]]:
    """Yield every statement's operation on shared memory or an mbarrier, with the name of what it touches."""
    shared = shared_storages(function)
    for node in ir.walk(function.body):
        match node:
            case ir.Load(buffer=buffer) | ir.Store(buffer=buffer) if buffer.data in shared:
                yield node, shared[buffer.data][0]
            case ir.AccessPtr(data=data) if data in shared:
                yield node, shared[data][0]
