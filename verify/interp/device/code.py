"""Structured statements -> a flat list of instructions, so that threads can part and meet again.

A group of threads that diverges at a condition becomes two groups, each with a program counter of its
own; they meet again at the instruction where the statement ends (`join`).
"""

from dataclasses import dataclass, field
from typing import Literal

from verify import externs, ir, ops
from verify.externs.registry import SOURCE_ATTRIBUTE

Kind = Literal["exec", "branch", "jump", "start", "test", "next", "break", "exit", "reduce"]
# Operations of a whole warp: its lanes must come together to execute them.
WARP_OPS = frozenset(
    {
        "tl_shuffle_elect", "any_sync", "all_sync", "ballot_sync", "shfl_sync", "shfl_xor_sync",
        "shfl_down_sync", "shfl_up_sync", "match_any_sync", "match_all_sync", "warp_reduce_sum",
        "warp_reduce_max", "warp_reduce_min", "warp_reduce_bitand", "warp_reduce_bitor", "sync_warp",
        "get_warp_idx_sync", "tvm_warp_shuffle", "tvm_warp_shuffle_up", "tvm_warp_shuffle_down",
        "ptx_wgmma_rs", "ptx_wgmma_ss", "warpgroup_arrive", "warpgroup_commit_batch", "warpgroup_wait",
        "wait_wgmma", "set_max_nreg", "ptx_ldmatrix", "ptx_stmatrix", "ptx_mma",
        "cluster_arrive", "cluster_arrive_relaxed", "cluster_wait", "cluster_sync",
    }
)  # fmt: skip


@dataclass(eq=False, slots=True)
class Instruction:
    """One step of a group.

    Attributes:
        kind: exec a statement; branch to `target` where `expr` is false; jump; start, test and next of
            the loop `stmt`; break out of it; exit the kernel; reduce: one level of an AllReduce.
        stmt: the statement it belongs to.
        number: of the statement, for the shadow memory.
        span: the kernel's Python line.
        target: where the lanes go for which the condition fails, or the jump's end.
        join: where diverged lanes meet.
        is_collective: needs all lanes of the warp together.
        level: of a reduction: (thread offset, phase).
    """

    kind: Kind
    stmt: ir.Stmt
    number: int
    span: ir.Span | None
    expr: ir.Expr | None = None
    target: int = -1
    join: int = -1
    is_collective: bool = False
    level: tuple[int, int] = (0, 0)
    call: ir.Call | None = None


@dataclass
class Program:
    """A kernel's instructions.

    Attributes:
        code: ends with an exit.
        statements: by number.
        launches: the launch statements, outermost first.
        allocs: all allocations, in program order.
        views: variable -> its definition as an offset into other storage.
        ops: names of all calls.
    """

    code: list[Instruction] = field(default_factory=list)
    statements: list[ir.Stmt] = field(default_factory=list)
    spans: list[ir.Span | None] = field(default_factory=list)
    launches: list[ir.Launch] = field(default_factory=list)
    allocs: list[ir.Buffer] = field(default_factory=list)
    views: dict[ir.Var, ir.Call] = field(default_factory=dict)
    ops: frozenset[str] = frozenset()


def flatten(function: ir.Function) -> Program:
    """Return the instructions of a device function.

    Raises:
        UnsupportedIR: a statement has no meaning here.
    """
    externs.check_calls(function)
    flattener = _Flattener()
    flattener.stmt(function.body, None)
    flattener.emit("exit", ir.Seq(None, ()), None)
    program = flattener.program
    program.ops = frozenset(n.op for n in ir.walk(function.body) if isinstance(n, ir.Call))
    return program


class _Flattener:
    def __init__(self) -> None:
        self.program = Program()
        self.loops: list[list[Instruction]] = []  # breaks of the loops around

    def emit(
        self, kind: Kind, stmt: ir.Stmt, span: ir.Span | None, expr: ir.Expr | None = None
    ) -> Instruction:
        p = self.program
        if not p.statements or p.statements[-1] is not stmt:
            p.statements.append(stmt)
            p.spans.append(span)
        made = Instruction(kind, stmt, len(p.statements) - 1, span, expr)
        made.is_collective = _is_collective(expr if expr is not None else stmt) if kind != "jump" else False
        p.code.append(made)
        return made

    @property
    def here(self) -> int:
        return len(self.program.code)

    def stmt(self, node: ir.Stmt, span: ir.Span | None) -> None:
        span = node.span or span
        match node:
            case ir.Seq(stmts=stmts):
                for child in stmts:
                    self.stmt(child, span)
            case ir.Launch(body=body):
                self.program.launches.append(node)
                self.stmt(body, span)
            case ir.Assume(body=body):
                self.stmt(body, span)
            case ir.Attr(key=key, body=body):
                if key.startswith(("pragma", "async")) and key != SOURCE_ATTRIBUTE:
                    raise ir.UnsupportedIR(f"attribute {key}")
                self.stmt(body, span)
            case ir.Block(allocs=allocs, body=body):
                self.program.allocs += allocs
                self.stmt(body, span)
            case ir.If():
                self._if(node, span)
            case ir.For() | ir.While():
                self._loop(node, span)
            case ir.Alloc(buffer=buffer):
                self.program.allocs.append(buffer)
                self.emit("exec", node, span)
            case ir.Decl():
                return
            case ir.Bind(var=var, value=ir.Call(op="handle_add_byte_offset") as value):
                self.program.views[var] = value
            case ir.Eval(value=ir.Call(op="loop_break")):
                if not self.loops:
                    raise ir.UnsupportedIR("break outside of a loop")
                self.loops[-1].append(self.emit("break", node, span))
            case ir.Eval(value=ir.Call(op="thread_return")):
                self.emit("exit", node, span)
            case ir.Store() | ir.Bind() | ir.Eval():
                self._reductions(node, span)
                self.emit("exec", node, span)
            case _:
                raise ir.UnsupportedIR(f"statement {type(node).__name__} in device code")

    def _if(self, node: ir.If, span: ir.Span | None) -> None:
        branch = self.emit("branch", node, span, node.cond)
        self.stmt(node.then, span)
        if node.orelse is None:
            branch.target = branch.join = self.here
            return
        jump = self.emit("jump", node, span)
        branch.target = self.here
        self.stmt(node.orelse, span)
        jump.target = branch.join = self.here

    def _loop(self, node: ir.For | ir.While, span: ir.Span | None) -> None:
        start = self.emit("start", node, span, ir.Const(ir.BOOL, True))
        test = self.emit("test", node, span, _condition(node))
        top = self.here - 1
        self.loops.append([])
        self.stmt(node.body, span)
        advance = self.emit("next", node, span, ir.Const(ir.BOOL, True))
        advance.target = top
        breaks = self.loops.pop()
        start.join = test.target = test.join = self.here
        start.target = self.here if breaks else -1
        for leave in breaks:
            leave.target = self.here

    def _reductions(self, node: ir.Stmt, span: ir.Span | None) -> None:
        """Before a statement with an AllReduce: its levels, one instruction for each synchronisation."""
        for call in [n for n in ir.walk(node) if isinstance(n, ir.Call) and ops.all_reduce(n) is not None]:
            found = ops.ALL_REDUCE.fullmatch(call.args[0].value)  # type: ignore[attr-defined]
            assert found is not None, "all_reduce matched it"
            offset = int(found["threads"]) // 2
            self._level(node, span, call, offset, 0)
            while offset >= int(found["scale"]):
                for phase in range(1, 5) if offset >= ops.WARP_THREADS else (5,):
                    self._level(node, span, call, offset, phase)
                offset //= 2

    def _level(self, node: ir.Stmt, span: ir.Span | None, call: ir.Call, offset: int, phase: int) -> None:
        made = self.emit("reduce", node, span, ir.Const(ir.BOOL, True))
        made.call, made.level, made.is_collective = call, (offset, phase), phase == 5


def _condition(node: ir.For | ir.While) -> ir.Expr:
    """Return what a loop reads from memory before each round: its condition, or a length that lies there."""
    if isinstance(node, ir.While):
        return node.cond
    ends = node.start, node.extent
    is_read = any(isinstance(n, ir.Load) for end in ends for n in ir.walk(end))
    return ir.BinOp(node.extent.dtype, "add", *ends) if is_read else ir.Const(ir.BOOL, True)


def _is_collective(node: ir.Expr | ir.Stmt) -> bool:
    return any(isinstance(n, ir.Call) and n.op in WARP_OPS for n in ir.walk(node))
