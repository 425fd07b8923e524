"""Every property of the verifier of the inputs' kernel, as it is compiled: suites `stage*`.

All but `batch_invariance` are run as on any kernel, under the contract of `clauses`. The kernel's outputs
have no axis of a call's tokens: rows of theirs are places of all tokens that there may be. So `by_rows` says
what each statement puts down as rows of the call: the element of row `token` at the counters of the loops
around it. That rows and counters correspond to places one to one is proved; what stands at the places behind
the call's tokens is a constant. Of these rows the verifier's `batch_invariance` is asked.
"""

from collections.abc import Mapping
from dataclasses import replace

import z3

from dsv4_kernels.contract import Contract
from megamoe.config import Config
from megamoe.machine_proof import KERNEL, Run, reported
from megamoe.plan_proof import EXPERTS_END
from verify import engine, ir
from verify.encode import Hypothesis
from verify.extract import Extracted
from verify.ir import UnsupportedIR
from verify.properties import Claims, Context, all_properties
from verify.properties.batch_invariance import PROPERTY as BATCH_INVARIANCE
from verify.signature.dispatch import Dispatch
from verify.solve import Answer, Obligation
from verify.tasks import limited
from verify.verdict import Verdict

CLAIMS = tuple(p.name for p in all_properties())
PARTS = ("x_parts", "scale_parts", "idx_parts", "weight_parts")  # places that the caller keeps
TOKENS = "count"  # of a call
BANK_LIMIT = 1
_SHIFTED = "topk_idx"


def clauses(config: Config) -> tuple[str, ...]:
    """Return the contract of a kernel; experts are renumbered beside a shared one, far from int32's ends."""
    near = (f"{-EXPERTS_END} <= {_SHIFTED} < {EXPERTS_END}",) if config.shared else ()
    return (f"0 <= {TOKENS} <= {config.tokens}", *near)


def claims(kernel: Extracted, config: Config, suite: str) -> dict[str, Claims]:
    """Return what the verifier answers of a kernel, by the names of CLAIMS.

    Args:
        kernel: its stages.
        config: of the kernel.
        suite: its name.
    """
    run = [Run(_Rows() if p is BATCH_INVARIANCE else p) for p in all_properties()]
    report = engine.check(
        KERNEL,
        suite,
        kernel,
        limited(Contract(clauses(config)), BANK_LIMIT),
        {},
        properties=run,
        dispatch=Dispatch(variant=suite, in_place=PARTS),
    )
    results = {result.name: result for result in report.properties}
    # Without a shape that satisfies the contract the engine asks for no property.
    return {p.name: decided(reported(results.get(p.name) or results["contract"], p)) for p in run}


def decided(claim: Claims) -> Claims:
    """Return what a property leaves no question to the solvers of as an answer of its own."""
    if not (claim.answers or claim.obligations or claim.unknown or claim.unsupported):
        what = "; ".join(claim.notes) or "there is nothing that it would ask about"
        claim.answers.append(Answer(Obligation(what, None, (), z3.BoolVal(True)), Verdict.PROVED))
    return claim


# --------------------------------------------------------------------------- rows of a call
class _Rows:
    """Property `batch_invariance` of rows of a call."""

    name, depends = BATCH_INVARIANCE.name, BATCH_INVARIANCE.depends

    def claims(self, context: Context) -> Claims:
        """Return what has to be proved.

        Raises:
            UnsupportedIR: the kernel is no such kernel.
        """
        tile, obligations = by_rows(context.extracted.tile)
        asked = replace(context.dispatch, batch_dims=(TOKENS,))
        rows = Context(replace(context.extracted, tile=tile), context.contract, context.dims, dispatch=asked)
        rows.__dict__["refinement"] = context.refinement  # of the kernel: it has the order of reductions
        found = BATCH_INVARIANCE.claims(rows)
        found.obligations += obligations
        return found


def by_rows(tile: ir.Function) -> tuple[ir.Function, list[Obligation]]:
    """Return a tile program that writes rows of the call, and what says that they are its places.

    Raises:
        UnsupportedIR: there is not one condition on the call's tokens around all, or data decides a place.
    """
    branches = [n for n in ir.walk(tile.body) if isinstance(n, ir.If)]
    launched = [n for n in ir.walk(tile.body) if isinstance(n, ir.Launch) and n.tag == "blockIdx.x"]
    if len(branches) != 1 or len(launched) != 1:
        raise UnsupportedIR("not one condition on the call's tokens")
    (branch,), (launch,) = branches, launched
    match branch.cond:
        case ir.BinOp(op="lt", a=token, b=ir.Var(name=name) as tokens) if token is launch.var:
            if name != TOKENS:
                raise UnsupportedIR(f"a condition on {name}")
        case _:
            raise UnsupportedIR("not one condition on the call's tokens")
    inside = {id(n) for n in ir.walk(branch)}
    if any(isinstance(n, ir.Store) and id(n) not in inside for n in ir.walk(tile.body)):
        raise UnsupportedIR("a store beside the condition on the call's tokens")
    obligations = [
        Obligation("a place behind the call's tokens is a constant", s.span, (), _is_constant(s.value))
        for s in ir.walk(branch.orelse or ())
        if isinstance(s, ir.Store)
    ]
    rows = _RowsOf(launch.var, launch.extent, tokens)
    then = rows.statement(branch.then, ())
    body = _with(tile.body, branch, replace(branch, then=then, orelse=None))
    buffers = {**tile.buffers, **{ir.Var(ir.HANDLE, b.name): b for b in rows.buffers}}
    return replace(tile, body=body, buffers=buffers), [*obligations, *rows.obligations]


def _is_constant(value: ir.Expr) -> z3.BoolRef:
    return z3.BoolVal(isinstance(value, ir.Const))


def _with(node: ir.Stmt, old: ir.Stmt, new: ir.Stmt) -> ir.Stmt:
    """Return a statement with one inside it replaced."""
    if node is old:
        return new
    match node:
        case ir.Seq(stmts=stmts):
            return replace(node, stmts=tuple(_with(s, old, new) for s in stmts))
        case ir.Launch() | ir.Assume() | ir.Attr() | ir.Block() | ir.For():
            return replace(node, body=_with(node.body, old, new))
    return node


class _RowsOf:
    """Puts rows of a call for the places that statements write.

    Attributes:
        buffers: a tensor of rows for each statement.
        obligations: that rows and counters of loops are places, one to one.
    """

    def __init__(self, token: ir.Var, most: ir.Expr, tokens: ir.Var) -> None:
        self.token, self.tokens = token, tokens
        self.buffers: list[ir.Buffer] = []
        self.obligations: list[Obligation] = []
        self._most = _constant(most)

    def statement(self, node: ir.Stmt, loops: tuple[ir.For, ...]) -> ir.Stmt:
        """Return a statement inside some loops with rows for places."""
        match node:
            case ir.Seq(stmts=stmts):
                return replace(node, stmts=tuple(self.statement(s, loops) for s in stmts))
            case ir.For(kind="parallel"):
                return replace(node, body=self.statement(node.body, (*loops, node)))
            case ir.Store():
                return self._store(node, loops)
        raise UnsupportedIR(f"{type(node).__name__} among the inputs")

    def _store(self, node: ir.Store, loops: tuple[ir.For, ...]) -> ir.Store:
        shape = (self.tokens, *(loop.extent for loop in loops))
        name = f"{node.buffer.name}_{len(self.buffers)}"
        zero = ir.Const(ir.INT32, 0)
        rows = ir.Buffer(name, node.buffer.dtype, shape, (), "global", ir.Var(ir.HANDLE, name), zero)
        self.buffers.append(rows)
        self.obligations.append(self._one_to_one(node, loops))
        return replace(node, buffer=rows, indices=(self.token, *(loop.var for loop in loops)))

    def _one_to_one(self, node: ir.Store, loops: tuple[ir.For, ...]) -> Obligation:
        limits = {self.token: self._most, **{loop.var: _constant(loop.extent) for loop in loops}}
        known, places = [], []
        numbers = [{v: z3.Int(f"{v.name}{mark}") for v in limits} for mark in ("", "'")]
        for named in numbers:
            known += [z3.And(term >= 0, term < limits[v]) for v, term in named.items()]
            places.append([_term(index, named) for index in node.indices])
        known += [a == b for a, b in zip(*places, strict=True)]
        given = tuple(Hypothesis("place", "place", term) for term in known)
        first, second = numbers
        goal = z3.And(*(first[v] == second[v] for v in limits))
        return Obligation(f"a place of {node.buffer.name} is of one row", node.span, given, goal)


def _constant(expr: ir.Expr) -> int:
    if not isinstance(expr, ir.Const):
        raise UnsupportedIR("an extent that is not constant")
    return int(expr.value)


def _term(expr: ir.Expr, names: Mapping[ir.Var, z3.ArithRef]) -> z3.ArithRef:
    match expr:
        case ir.Const(value=value):
            return z3.IntVal(int(value))
        case ir.Var() if expr in names:
            return names[expr]
        case ir.BinOp(op="add" | "mul" as name, a=a, b=b):
            x, y = _term(a, names), _term(b, names)
            return x + y if name == "add" else x * y
    raise UnsupportedIR("a place that is no sum of rows and counters")
