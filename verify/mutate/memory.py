"""Operators on addresses: indices, strides, swizzles, stages, TMA and descriptor offsets."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from verify import ir
from verify.mutate.mutant import Operator, calls, with_arg
from verify.mutate.rewrite import NOTHING, add, own_expressions, rebuild

Path = tuple[ir.Stmt, ...]
Pairs = Iterator[tuple[Any, Any]]
_BARRIER = "shared.barrier"  # `which_barrier` moves these
_ARENA_STEP = 1024  # bytes: keeps every alignment
_DESCRIPTOR_STEP = 32  # bytes: one wgmma of K
_MODULUS_OF_A_STAGE = 16  # rings are shallower


def accesses(statement: ir.Stmt) -> Iterator[Any]:
    """Yield the statement and the expressions in it that address memory."""
    if isinstance(statement, ir.Store):
        yield statement
    for node in own_expressions(statement):
        if isinstance(node, ir.AccessPtr) or (isinstance(node, ir.Load) and node.buffer.scope != _BARRIER):
            yield node


def _shifted(amount: int) -> Callable[[ir.Stmt, Path], Pairs]:
    def make(statement: ir.Stmt, path: Path) -> Pairs:
        for node in accesses(statement):
            if isinstance(node, ir.AccessPtr):
                yield node, replace(node, offset=add(node.offset, amount))
            elif node.indices and not node.buffer.scope.startswith("local.descriptor"):
                yield node, replace(node, indices=(*node.indices[:-1], add(node.indices[-1], amount)))

    return make


def _in_addresses(change: Callable[[ir.Expr], ir.Expr | None]) -> Callable[[ir.Stmt, Path], Pairs]:
    """Change one sub-expression of an address at a time."""

    def make(statement: ir.Stmt, path: Path) -> Pairs:
        for node in accesses(statement):
            roots = (node.offset,) if isinstance(node, ir.AccessPtr) else node.indices
            for part in (p for root in roots for p in ir.walk(root)):
                new = change(part)
                if new is not None:
                    yield part, new
        for call in calls(statement, "increase_descriptor_offset", "tma_load", "tma_store"):
            for part in (p for arg in call.args if arg.dtype.is_int for p in ir.walk(arg)):
                new = change(part)
                if new is not None and not isinstance(call.args[0], ir.AccessPtr):
                    yield part, new

    return make


def _stride(node: ir.Expr) -> ir.Expr | None:
    match node:
        case ir.BinOp(op="mul", b=ir.Const(value=value) as factor) if value > 1:
            return replace(node, b=replace(factor, value=value + 1))
    return None


def _swizzle(node: ir.Expr) -> ir.Expr | None:
    """Drop one operand of an exclusive or; the compiler writes it as a sum modulo 2."""
    match node:
        case ir.BinOp(op="bitxor", a=a):
            return a
        case ir.BinOp(op="floormod", a=ir.BinOp(op="add", a=a), b=ir.Const(value=2)):
            return replace(node, a=a)
    return None


def _stages(statement: ir.Stmt, path: Path) -> Pairs:
    """Change the depth of a ring in one place: a loop counter modulo a small constant."""
    counters = {s.var for s in path if isinstance(s, ir.For) and s.kind == "serial"}
    for node in own_expressions(statement):
        match node:
            case ir.BinOp(op="floormod", a=ir.Var() as counter, b=ir.Const(value=depth) as modulus):
                if counter in counters and 1 < depth <= _MODULUS_OF_A_STAGE:
                    for step in (1, -1):
                        yield node, replace(node, b=replace(modulus, value=depth + step))


def _narrowed(statement: ir.Stmt, path: Path) -> Pairs:
    """Compute a 64-bit address in 32 bits."""
    for node in accesses(statement):
        roots = (node.offset,) if isinstance(node, ir.AccessPtr) else node.indices
        if any(part.dtype.name == "int64" for root in roots for part in ir.walk(root)):
            narrow = {id(root): _narrow(root) for root in roots}
            yield node, rebuild(node, lambda part, found=narrow: found.get(id(part)))


def _narrow(node: ir.Expr) -> ir.Expr:
    match node:
        case ir.Cast(dtype=ir.DType(name="int64"), a=a):
            return _narrow(a)
        case ir.Var():
            return node
        case ir.Load():
            return node
    parts = rebuild(node, lambda part: None if part is node else _narrow(part))
    if node.dtype.name != "int64":
        return parts
    return replace(parts, dtype=ir.DType("int32", node.dtype.lanes))


def _coordinates(statement: ir.Stmt, path: Path) -> Pairs:
    for call in calls(statement, "tma_load", "tma_store"):
        first = next((n for n, a in enumerate(call.args) if isinstance(a, ir.AccessPtr)), None)
        if first is None:
            continue
        for position in range(first + 1, len(call.args)):
            arg = call.args[position]
            is_policy = isinstance(arg, ir.Const) and position == len(call.args) - 1
            if arg.dtype.name == "int32" and not is_policy:
                for step in (1, -1):
                    yield call, with_arg(call, position, add(arg, step))


def _descriptor(statement: ir.Stmt, path: Path) -> Pairs:
    for call in calls(statement, "increase_descriptor_offset"):
        for step in (_DESCRIPTOR_STEP, -_DESCRIPTOR_STEP):
            yield call, with_arg(call, 1, add(call.args[1], step))
    for call in calls(statement, "initialize_wgmma_descriptor"):
        for position in range(2, len(call.args)):
            yield call, with_arg(call, position, add(call.args[position], 1))


def _tensormap(statement: ir.Stmt, path: Path) -> Pairs:
    """Change one number of a TMA descriptor as the host makes it."""
    for node in own_expressions(statement):
        match node:
            case ir.Call(op="tvm_call_packed", args=(ir.Str(value="__tvm_tensormap_create_tiled"), *_)):
                for position, arg in enumerate(node.args):
                    inner = arg.a if isinstance(arg, ir.Cast) else arg
                    if position > 3 and isinstance(inner, ir.Const):
                        yield node, with_arg(node, position, ir.Const(arg.dtype, int(inner.value) + 1))


def _views(statement: ir.Stmt, path: Path) -> Pairs:
    """Move one shared buffer in the arena, over its neighbour."""
    match statement:
        case ir.Bind(value=ir.Call(op="handle_add_byte_offset", args=(_, ir.Const() as offset)) as call):
            for step in (_ARENA_STEP, -_ARENA_STEP):
                if int(offset.value) + step >= 0:
                    yield call, with_arg(call, 1, replace(offset, value=int(offset.value) + step))


def _copies(statement: ir.Stmt, path: Path) -> Pairs:
    for _ in calls(statement, "tma_load", "tma_store", "ptx_cp_async", "ptx_wgmma_rs", "ptx_wgmma_ss"):
        yield statement, NOTHING


ADDRESS = ("refinement", "bounds", "race", "coverage", "alignment")

OPERATORS = (
    Operator("index_plus_1", ADDRESS, _shifted(1)),
    Operator("index_minus_1", ADDRESS, _shifted(-1)),
    Operator("stride_changed", ADDRESS, _in_addresses(_stride)),
    Operator("swizzle_dropped", ADDRESS, _in_addresses(_swizzle)),
    Operator("stage_count", ("mbarrier", "refinement", "race", "bounds"), _stages),
    Operator("int_narrowed", ("overflow",), _narrowed),
    Operator("tma_coordinate", ("refinement", "coverage"), _coordinates),
    Operator("wgmma_descriptor", ("refinement", "bounds", "alignment"), _descriptor),
    # `alignment` first: with a descriptor that the driver refuses nothing is launched, and no box is read.
    Operator("tma_descriptor", ("alignment", "bounds", "refinement"), _tensormap, stage="host"),
    Operator("arena_offset", ("race", "refinement", "bounds", "alignment"), _views),
    Operator("copy_dropped", ("mbarrier", "init", "refinement"), _copies),
)
