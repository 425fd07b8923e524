"""The verifier's own properties of the plan's kernel: suites `machine-plan*`.

`overflow`, `alignment`, `banks`, `barrier`, `bounds`, `mbarrier` and `determinism` are run as on any kernel.
`determinism` depends on `race`, which is the claim of the suite `properties-plan*` of the same text. A thread
counts in a row that it has loaded, an expert's, so that the verifier leaves the banks of two accesses open:
it is proved here that lanes of a warp have banks of their own, whatever their rows are.

Where ranks meet first, two things decide nothing, of which the verifier does not know that. Every CTA tells
the peers that its rank has come: the same word, the same value, which is proved. So `determinism` gets the
kernel in which the CTA of the first expert alone says it. And `status` is read behind the meeting: the
property is about launches that leave it at 0; atomic maxima never lower it, so every read there finds 0.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import z3

from dsv4_kernels.contract import Contract
from megamoe.config import Config
from megamoe.machine_proof import KERNEL, Elsewhere, Run, reported
from megamoe.plan_count import LANES
from megamoe.plan_proof import EXPERTS_END
from megamoe.plan_properties import LASTING
from megamoe.refine_index import op
from megamoe.stage_proof import decided
from verify import engine, ir, suites
from verify.encode import Hypothesis
from verify.extract import Extracted
from verify.ir import UnsupportedIR
from verify.properties import Claims, Context, Issue, Property, all_properties
from verify.properties.banks import PROPERTY as BANKS
from verify.properties.determinism import PROPERTY as DETERMINISM
from verify.signature.dispatch import Dispatch
from verify.solve import Obligation
from verify.tasks import limited

CLAIMS = ("overflow", "alignment", "banks", "barrier", "bounds", "mbarrier", "determinism")
BANK_LIMIT = 1
CLAUSES = (f"{-EXPERTS_END} <= topk_idx < {EXPERTS_END}",)
SIGNALS, STATUS = "signals", "status"
_BANKS, _BANK_BYTES = 32, 4  # of shared memory
_ROW_IS_LOADED = re.compile(r"bank conflicts: (?:store to|load from) (\w+): Load in an index")
_STORE, _LOAD = "atomic_store_elem_op", "atomic_load_elem_op"


def claims(kernel: Extracted, config: Config, plan: str, properties: str) -> dict[str, Claims]:
    """Return what the verifier answers of a kernel, by the names of CLAIMS.

    Args:
        kernel: its stages.
        config: of the kernel.
        plan: name of the suite with the claim `meeting` of the same text, where ranks meet.
        properties: name of the suite with the claims `race` and `init` of it.
    """
    text, meets = kernel.cuda_sha256, config.num_ranks > 1
    ours: dict[str, Property] = {DETERMINISM.name: _Settled(), BANKS.name: _Banks()}
    run = [Run(ours.get(p.name, p)) for p in all_properties() if p.name in CLAIMS]
    given: list[Property] = [Elsewhere("race", f"{KERNEL}/{properties}:race", text), *run]
    report = engine.check(
        KERNEL,
        f"machine-{plan}",
        kernel,
        limited(Contract(CLAUSES), BANK_LIMIT),
        {},
        properties=given,
        dispatch=Dispatch(
            variant=plan,
            in_place=LASTING,
            exchanged={SIGNALS: f"{KERNEL}/{plan}:meeting"} if meets else {},
        ),
    )
    results = {result.name: result for result in report.properties}
    # Without a shape that satisfies the contract the engine asks for no property.
    found = {p.name: decided(reported(results.get(p.name) or results["contract"], p)) for p in run}
    init = f"{KERNEL}/{properties}:init"
    found["barrier"].assumptions.append(
        f"DISCHARGED by {init}: private variables are written before they are read"
    )
    if reason := suites.missing(init, text):
        found["barrier"].unknown.append(Issue(None, f"rests on {init}: {reason}"))
    return found


# --------------------------------------------------------------------------- counts of a thread
class _Banks:
    """Property `banks`, and what it leaves open: rows that are loaded."""

    name, depends = BANKS.name, BANKS.depends

    def claims(self, context: Context) -> Claims:
        """Return what has to be proved."""
        found = BANKS.claims(context)
        opened = [_ROW_IS_LOADED.fullmatch(issue.message) for issue in found.unknown]
        names = Counter(match[1] for match in opened if match)
        for name, count in names.items():
            try:
                obligations = list(_in_own_banks(context.extracted.device, name))
            except UnsupportedIR:
                continue
            if len(obligations) == count:  # each access that is left open is one of these
                found.obligations += obligations
                left = zip(found.unknown, opened, strict=True)
                found.unknown = [issue for issue, match in left if not match or match[1] != name]
                opened = [_ROW_IS_LOADED.fullmatch(issue.message) for issue in found.unknown]
        return found


def _in_own_banks(device: ir.Function, name: str) -> Iterator[Obligation]:
    """Yield that two lanes of a warp are in different banks, where they load a row's number.

    Raises:
        UnsupportedIR: an access of another form.
    """
    (thread,) = (n.var for n in ir.walk(device.body) if isinstance(n, ir.Launch) and n.tag == "threadIdx.x")
    for node in ir.walk(device.body):
        if not isinstance(node, ir.Load | ir.Store) or node.buffer.data.name != name:
            continue
        (index,) = node.indices
        if not any(isinstance(e, ir.Load) for e in ir.walk(index)):
            continue  # which the verifier decides
        if node.buffer.dtype.bits != 8 * _BANK_BYTES:
            raise UnsupportedIR("elements that are no words")
        lanes = z3.Ints("lane lane'")
        at = [_word(index, {thread: lane}, mark) for lane, mark in zip(lanes, ("", "'"), strict=True)]
        known = [lane >= 0 for lane in lanes] + [lanes[0] / LANES == lanes[1] / LANES, lanes[0] != lanes[1]]
        given = tuple(Hypothesis("lanes", "launch", k) for k in known)
        goal = at[0] % _BANKS != at[1] % _BANKS
        yield Obligation(f"lanes have words of {name} in banks of their own", None, given, goal)


def _word(expr: ir.Expr, named: dict[ir.Var, z3.ArithRef], mark: str) -> z3.ArithRef:
    match expr:
        case ir.Const(value=int(value)):
            return z3.IntVal(value)
        case ir.Var() if expr in named:
            return named[expr]
        case ir.Load():
            return z3.Int(f"loaded{mark}")  # anything
        case ir.Cast(a=a) if expr.dtype.bits >= a.dtype.bits:
            return _word(a, named, mark)
        case ir.BinOp(op="add" | "mul" as name, a=a, b=b):
            x, y = _word(a, named, mark), _word(b, named, mark)
            return x + y if name == "add" else x * y
    raise UnsupportedIR("a place that is no sum of a row's and a thread's")


# --------------------------------------------------------------------------- where ranks meet
class _Settled:
    """Property `determinism` of the kernel without what decides nothing; see the module."""

    name, depends = DETERMINISM.name, DETERMINISM.depends

    def claims(self, context: Context) -> Claims:
        """Return what has to be proved.

        Raises:
            UnsupportedIR: ranks meet in another way.
        """
        device, obligations = settled(context.extracted.device)
        if not obligations:
            return DETERMINISM.claims(context)
        other = Context(
            replace(context.extracted, device=device),
            context.contract,
            context.dims,
            dispatch=context.dispatch,
        )
        found = DETERMINISM.claims(other)
        found.obligations += obligations
        return found


def settled(device: ir.Function) -> tuple[ir.Function, list[Obligation]]:
    """Return device IR in which one CTA of a rank signals, and reads of `status` find 0, and why that may be.

    Raises:
        UnsupportedIR: what is signalled is no sum of constants, launch variables and words of inputs.
    """
    rules = _Rules(device)
    return replace(device, body=rules.statement(device.body)), rules.obligations


class _Rules:
    def __init__(self, device: ir.Function) -> None:
        self.obligations: list[Obligation] = []
        self._limits = {
            n.var: int(n.extent.value)
            for n in ir.walk(device.body)
            if isinstance(n, ir.Launch) and isinstance(n.extent, ir.Const)
        }
        self._others = [
            n.var for n in ir.walk(device.body) if isinstance(n, ir.Launch) and n.tag == "blockIdx.x"
        ]
        self._written = {n.buffer.data for n in ir.walk(device.body) if isinstance(n, ir.Store)}
        self._written |= {n.data for n in ir.walk(device.body) if isinstance(n, ir.AccessPtr)}

    def statement(self, node: ir.Stmt) -> ir.Stmt:
        """Return a statement by both rules."""
        match node:
            case ir.Seq(stmts=stmts):
                return replace(node, stmts=tuple(map(self.statement, stmts)))
            case ir.Eval(value=ir.Call(op=name, args=(ir.AccessPtr() as word, value, *_))) if (
                name == _STORE and word.data.name == SIGNALS
            ):
                return self._signal(node, word, value)
            case ir.If(cond=cond, then=then, orelse=orelse):
                other = None if orelse is None else self.statement(orelse)
                return replace(node, cond=_without(cond), then=self.statement(then), orelse=other)
            case ir.Launch() | ir.Attr() | ir.Block() | ir.Assume() | ir.For():
                return replace(node, body=self.statement(node.body))
        return node  # waits as they are

    def _signal(self, node: ir.Eval, word: ir.AccessPtr, value: ir.Expr) -> ir.Stmt:
        (expert,) = self._others
        (first, second), known = self._two()
        meet = self._term(word.offset, first) == self._term(word.offset, second)
        goal = self._term(value, first) == self._term(value, second)
        given = tuple(Hypothesis("launch", "launch", k) for k in (*known, meet))
        self.obligations.append(
            Obligation("what CTAs put in one word of signals is the same", node.span, given, goal)
        )
        # The first expert's says all that others say.
        alone = {**first, expert: z3.IntVal(0)}
        same = z3.And(
            self._term(word.offset, first) == self._term(word.offset, alone),
            self._term(value, first) == self._term(value, alone),
        )
        given = tuple(Hypothesis("launch", "launch", k) for k in known)
        self.obligations.append(Obligation("one CTA of a rank puts all of it", node.span, given, same))
        return ir.If(node.span, op("eq", expert, ir.Const(expert.dtype, 0)), node, None)

    def _two(self) -> tuple[tuple[dict[ir.Var, z3.ArithRef], ...], list[z3.BoolRef]]:
        pair = tuple({v: z3.Int(f"{v.name}{mark}") for v in self._limits} for mark in ("", "'"))
        known = [z3.And(t >= 0, t < self._limits[v]) for named in pair for v, t in named.items()]
        return pair, known

    def _term(self, expr: ir.Expr, named: dict[ir.Var, z3.ArithRef]) -> z3.ArithRef:
        match expr:
            case ir.Const(value=int(value)):
                return z3.IntVal(value)
            case ir.Var() if expr in named:
                return named[expr]
            case ir.BinOp(op="add" | "sub" | "mul" as name, a=a, b=b):
                x, y = self._term(a, named), self._term(b, named)
                return {"add": x + y, "sub": x - y, "mul": x * y}[name]
            case ir.Load(buffer=buffer, indices=(index,)) if (
                buffer.scope == "global" and buffer.data not in self._written
            ):
                of_word = z3.Function(f"{buffer.data.name}[]", z3.IntSort(), z3.IntSort())
                return of_word(self._term(index, named))
        raise UnsupportedIR("what is signalled is computed")


def _without(cond: ir.Expr) -> ir.Expr:
    """Return a condition in which reads of `status` find 0."""
    match cond:
        case ir.Call(op=name, args=(ir.AccessPtr(data=data), *_)) if name == _LOAD and data.name == STATUS:
            return ir.Const(cond.dtype, 0)
        case ir.BinOp(a=a, b=b):
            return replace(cond, a=_without(a), b=_without(b))
        case ir.Not(a=a):
            return replace(cond, a=_without(a))
    return cond
