"""The small typed IR that the prover, the interpreter and the mutator share.

It mirrors what TileLang's compiler holds, in both stages we read (tile ops; device IR), with the
spelling of the many TVM node kinds reduced to few. Nodes compare by identity: two reads of one
buffer are two nodes. Variables and buffers are objects, never looked up by name.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

LoopKind = Literal["serial", "parallel", "vectorized", "unrolled"]
INT_BITS = {"int8": 8, "int16": 16, "int32": 32, "int64": 64}
UINT_BITS = {"bool": 1, "uint8": 8, "uint16": 16, "uint32": 32, "uint64": 64}
FLOAT_BITS = {
    "float64": 64,
    "float32": 32,
    "tfloat32": 32,
    "float16": 16,
    "bfloat16": 16,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
    "float8_e8m0fnu": 8,
    "float4_e2m1fn": 4,
}
MATRIX_TYPES = {  # of a matrix instruction's operands, as its call names them
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "bf16": "bfloat16",
    "fp16": "float16",
    "tf32": "float32",
    "fp32": "float32",
    "int8": "int8",
    "uint8": "uint8",
    "int32": "int32",
}


@dataclass(frozen=True, slots=True)
class DType:
    """A scalar type name and a number of vector lanes."""

    name: str
    lanes: int = 1

    @property
    def bits(self) -> int:
        """Bits of one lane; 64 for a handle."""
        for table in (INT_BITS, UINT_BITS, FLOAT_BITS):
            if self.name in table:
                return table[self.name]
        if self.name in ("handle", "void", "string"):
            return 64
        raise UnsupportedIR(f"dtype {self.name}")

    @property
    def is_int(self) -> bool:
        """Signed or unsigned integer, bool included."""
        return self.name in INT_BITS or self.name in UINT_BITS

    @property
    def is_signed(self) -> bool:
        """Signed integer."""
        return self.name in INT_BITS

    @property
    def int_range(self) -> tuple[int, int]:
        """Least and greatest value of an integer type."""
        if self.is_signed:
            return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        return 0, (1 << self.bits) - 1

    def __str__(self) -> str:
        """Return TVM's spelling."""
        return self.name if self.lanes == 1 else f"{self.name}x{self.lanes}"


BOOL = DType("bool")
INT32 = DType("int32")
HANDLE = DType("handle")


class UnsupportedIR(Exception):
    """The IR holds something this module has no meaning for; a verdict on it is UNSUPPORTED."""


@dataclass(frozen=True, slots=True)
class Span:
    """A place in the kernel's Python source."""

    path: str
    line: int
    column: int

    def __str__(self) -> str:
        """Return path:line:column."""
        return f"{self.path}:{self.line}:{self.column}"


# --------------------------------------------------------------------------- expressions
@dataclass(eq=False, slots=True)
class Expr:
    """An expression; every subclass has `dtype`."""

    dtype: DType


@dataclass(eq=False, slots=True)
class Const(Expr):
    """An integer, float or bool literal."""

    value: int | float | bool


@dataclass(eq=False, slots=True)
class Str(Expr):
    """A string literal (an argument of a call)."""

    value: str


@dataclass(eq=False, slots=True)
class Var(Expr):
    """A variable: launch index, loop counter, shape parameter, bound name or pointer."""

    name: str


@dataclass(eq=False, slots=True)
class BinOp(Expr):
    """`a op b`.

    op: add sub mul truediv floordiv floormod truncdiv truncmod min max,
    eq ne lt le gt ge, and or, bitand bitor bitxor shl shr.
    """

    op: str
    a: Expr
    b: Expr


@dataclass(eq=False, slots=True)
class Not(Expr):
    """Logical negation."""

    a: Expr


@dataclass(eq=False, slots=True)
class Cast(Expr):
    """Value conversion to `dtype`."""

    a: Expr


@dataclass(eq=False, slots=True)
class Select(Expr):
    """`a if cond else b`; `lazy` when the branch not taken is not evaluated (if_then_else)."""

    cond: Expr
    a: Expr
    b: Expr
    lazy: bool


@dataclass(eq=False, slots=True)
class Load(Expr):
    """Read of `buffer[indices]`; a Ramp index reads lanes."""

    buffer: "Buffer"
    indices: tuple[Expr, ...]


@dataclass(eq=False, slots=True)
class Ramp(Expr):
    """Lanes base, base + stride, ..."""

    base: Expr
    stride: Expr


@dataclass(eq=False, slots=True)
class Broadcast(Expr):
    """One value in every lane."""

    value: Expr


@dataclass(eq=False, slots=True)
class Let(Expr):
    """`body` with `var` standing for `value`."""

    var: Var
    value: Expr
    body: Expr


@dataclass(eq=False, slots=True)
class Call(Expr):
    """An intrinsic, named as the compiler names it, less its dialect prefix (`tl.`, `tirx.`)."""

    op: str
    args: tuple[Expr, ...]
    annotations: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Region(Expr):
    """A box of a buffer: the operand of a tile op. mode: r, w or rw."""

    buffer: "Buffer"
    mins: tuple[Expr, ...]
    extents: tuple[Expr, ...]
    mode: str


@dataclass(eq=False, slots=True)
class AccessPtr(Expr):
    """A pointer to `extent` elements of the storage `data` from element `offset`; mode as in Region.

    `element` is the type the offset counts in, which may differ from the type of the buffers on `data`.
    """

    data: Var
    element: DType
    offset: Expr
    extent: Expr
    mode: str


# --------------------------------------------------------------------------- buffers
@dataclass(eq=False, slots=True)
class Buffer:
    """A typed view of storage.

    Attributes:
        data: the storage; buffers that share it alias.
        shape: extents in elements.
        strides: in elements, empty for row-major.
        scope: global, shared, shared.dyn, shared.barrier, local, local.fragment, local.var, ...
        offset: elements between the start of `data` and element 0.
    """

    name: str
    dtype: DType
    shape: tuple[Expr, ...]
    strides: tuple[Expr, ...]
    scope: str
    data: Var
    offset: Expr


# --------------------------------------------------------------------------- statements
@dataclass(eq=False, slots=True)
class Stmt:
    """A statement; `span` is where the kernel's author wrote it, where the compiler kept that."""

    span: Span | None


@dataclass(eq=False, slots=True)
class Seq(Stmt):
    """Statements in order; a Bind, Alloc or Decl is in scope for those after it."""

    stmts: tuple[Stmt, ...]


@dataclass(eq=False, slots=True)
class For(Stmt):
    """Loop; kind: serial, parallel, vectorized, unrolled."""

    var: Var
    start: Expr
    extent: Expr
    kind: LoopKind
    body: Stmt
    annotations: dict[str, Any]


@dataclass(eq=False, slots=True)
class While(Stmt):
    """Loop while `cond`."""

    cond: Expr
    body: Stmt


@dataclass(eq=False, slots=True)
class If(Stmt):
    """Conditional."""

    cond: Expr
    then: Stmt
    orelse: Stmt | None


@dataclass(eq=False, slots=True)
class Store(Stmt):
    """`buffer[indices] = value`; a Ramp index writes lanes."""

    buffer: Buffer
    indices: tuple[Expr, ...]
    value: Expr


@dataclass(eq=False, slots=True)
class Bind(Stmt):
    """`var` names `value` from here to the end of the enclosing Seq."""

    var: Var
    value: Expr


@dataclass(eq=False, slots=True)
class Eval(Stmt):
    """Evaluate a call for its effect."""

    value: Expr


@dataclass(eq=False, slots=True)
class Launch(Stmt):
    """`var` is a launch index in [0, extent); tag: blockIdx.x ... threadIdx.z."""

    var: Var
    tag: str
    extent: Expr
    body: Stmt


@dataclass(eq=False, slots=True)
class Assume(Stmt):
    """The kernel's author or the compiler assumes `cond` from here on."""

    cond: Expr
    body: Stmt


@dataclass(eq=False, slots=True)
class Attr(Stmt):
    """An annotation around `body`; `value` is an Expr where the compiler holds one."""

    key: str
    node: Any
    value: Any
    body: Stmt


@dataclass(eq=False, slots=True)
class Block(Stmt):
    """A scope: its allocations, its layouts (storage variable -> compiler's layout object)."""

    name: str
    allocs: tuple[Buffer, ...]
    layouts: dict[Var, Any]
    annotations: dict[str, Any]
    body: Stmt


@dataclass(eq=False, slots=True)
class Alloc(Stmt):
    """Storage for `buffer` (device IR)."""

    buffer: Buffer


@dataclass(eq=False, slots=True)
class Decl(Stmt):
    """Another view of storage that exists (device IR)."""

    buffer: Buffer


@dataclass(eq=False, slots=True)
class Assert(Stmt):
    """Host-side check; the launch does not happen unless `cond`."""

    cond: Expr
    message: str


@dataclass(eq=False, slots=True)
class Function:
    """One PrimFunc.

    Attributes:
        params: in call order.
        buffers: of those params that are tensors (tile IR); the device IR declares its own.
        attrs: the PrimFunc's attributes that we read, e.g. dyn_shared_memory_buf.
    """

    name: str
    params: tuple[Var, ...]
    buffers: dict[Var, Buffer]
    body: Stmt
    attrs: dict[str, Any]


# --------------------------------------------------------------------------- traversal
# Of a type of node: what lies directly inside, in evaluation order. A table, as a check asks this of every
# node dozens of times.
_INSIDE: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    BinOp: lambda n: (n.a, n.b),
    Not: lambda n: (n.a,),
    Cast: lambda n: (n.a,),
    Select: lambda n: (n.cond, n.a, n.b),
    Load: lambda n: tuple(n.indices),
    Ramp: lambda n: (n.base, n.stride),
    Broadcast: lambda n: (n.value,),
    Let: lambda n: (n.value, n.body),
    Call: lambda n: tuple(n.args),
    Region: lambda n: (*n.mins, *n.extents),
    AccessPtr: lambda n: (n.offset, n.extent),
    Seq: lambda n: tuple(n.stmts),
    For: lambda n: (n.start, n.extent, n.body),
    While: lambda n: (n.cond, n.body),
    If: lambda n: (n.cond, n.then) if n.orelse is None else (n.cond, n.then, n.orelse),
    Store: lambda n: (*n.indices, n.value),
    Bind: lambda n: (n.value,),
    Eval: lambda n: (n.value,),
    Launch: lambda n: (n.extent, n.body),
    Assume: lambda n: (n.cond, n.body),
    Attr: lambda n: (n.body,),
    Block: lambda n: (n.body,),
    Assert: lambda n: (n.cond,),
    **dict.fromkeys((Const, Str, Var, Alloc, Decl, type(None)), lambda n: ()),
}


def children(node: Any) -> tuple[Any, ...]:
    """Return the expressions and statements directly inside `node`, in evaluation order."""
    inside = _INSIDE.get(type(node))
    if inside is None:
        raise TypeError(f"not an IR node: {type(node).__name__}")
    return inside(node)


def walk(node: Any) -> Iterator[Any]:
    """Yield `node` and all below it, parents first."""
    stack = [node]
    while stack:
        top = stack.pop()
        yield top
        if inside := children(top):
            stack.extend(inside[::-1])
