"""The verifier's own properties of the fused kernel that need no lemma of ours, on the IR that is compiled.

`overflow`, `alignment`, `banks`, `barrier`, `bounds` and `determinism` are run as on any kernel, under the
contract of `contracts`, with what each depends on. `determinism` depends on `race`, which is the claim of the
suite `properties` of the same text; what CTAs read of each other is behind what was written by that claim.

What the rows' warp of a wide kernel keeps from one product to the next (`private_proof.KEPT`) is read on a
condition that the verifier does not follow, so that it has no range for it. There every integer variable of a
thread is zeroed first: the claim `init` of the suite `properties` says that no read finds that, so it is the
same program, in which the verifier sees that each variable holds what is stored to it, and nothing else.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import z3

from dsv4_kernels.contract import Contract
from megamoe import contracts
from megamoe.config import Config
from megamoe.private_proof import KEPT
from verify import engine, ir, suites
from verify.encode import is_exact
from verify.extract import Extracted
from verify.properties import Claims, Context, Issue, Property, all_properties, determinism
from verify.query import Script
from verify.signature.dispatch import Dispatch
from verify.solve import Answer, Obligation, Prover
from verify.tasks import limited
from verify.verdict import PropertyResult, Verdict

CLAIMS = ("overflow", "alignment", "banks", "barrier", "bounds", "determinism")
KERNEL = "megamoe"
_RACE, _INIT = "race", "init"  # claims of the suite `properties`
MAX_ELEMENTS = 8  # of a variable: what is larger is an array


def names(config: Config) -> tuple[str, ...]:
    """Return the claims about a kernel: `banks` only where every access is decided."""
    return tuple(name for name in CLAIMS if name != "banks" or contracts.bank_limit(config) is not None)


def claims(kernel: Extracted, config: Config, suite: str) -> dict[str, Claims]:
    """Return what the verifier answers of a kernel, by `names`.

    Args:
        kernel: its stages.
        config: of the kernel.
        suite: name of the suite with the claims `race` and `init` of the same text.
    """
    text = kernel.cuda_sha256
    device, zeroed = with_zeros(kernel.device)
    run = [Run(p) for p in all_properties() if p.name in CLAIMS]
    properties: list[Property] = [Elsewhere(_RACE, _claim(suite, _RACE), text), *run]
    with _searching():
        report = engine.check(
            KERNEL,
            suite,
            replace(kernel, device=device),
            limited(Contract(contracts.clauses(config)), contracts.bank_limit(config)),
            {},
            properties=properties,
            dispatch=Dispatch(
                variant=suite,
                in_place=contracts.IN_PLACE,
                exchanged=dict.fromkeys(contracts.EXCHANGED, _claim(suite, _RACE)),
            ),
        )
    results = {result.name: result for result in report.properties}
    found = {}
    for prop in run:
        if prop.name not in names(config):
            continue
        # Without a shape that satisfies the contract the engine asks for no property.
        result = results.get(prop.name) or results["contract"]
        found[prop.name] = reported(result, prop)
        _discharge(found[prop.name], prop.name, suite, text, zeroed)
    return found


def _claim(suite: str, name: str) -> str:
    return f"{KERNEL}/{suite}:{name}"


class _Search(Prover):
    """A prover that makes no counterexample of a goal which its script refutes."""

    def _together(self, groups: Sequence[list[Obligation]]) -> Iterator[Answer]:
        proved, refuted = self._z3_proves(Script.of([(g[0].hypotheses, [o.goal for o in g]) for g in groups]))
        for number, group in enumerate(groups):
            if number in proved:
                yield from (Answer(o, Verdict.PROVED) for o in group)
            elif number in refuted and len(group) == 1:
                yield _failing(group[0])
            else:
                yield from self._group(group)


def _failing(obligation: Obligation) -> Answer:
    if obligation.exact and is_exact([*(h.term for h in obligation.hypotheses), obligation.goal]):
        return Answer(obligation, Verdict.REFUTED)
    return Answer(obligation, Verdict.UNKNOWN, "fails for some value of data that is not tracked")


@contextmanager
def _searching() -> Iterator[None]:
    """Have `determinism` look for updates that may meet without a model of each pair that does.

    There are two hundred such pairs, signals of CTAs, and nothing is shown of one: verdicts are what is
    reported. What is to be proved is asked later, of both solvers.
    """
    stock = determinism.Prover
    determinism.Prover = _Search
    try:
        yield
    finally:
        determinism.Prover = stock


@dataclass
class Run:
    """A property of the verifier, and what it asked for."""

    own: Property
    asked: list[Obligation] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Take the property's name and what it depends on."""
        self.name, self.depends = self.own.name, self.own.depends

    def claims(self, context: Context) -> Claims:
        """Return the property's claims, and keep what is asked."""
        found = self.own.claims(context)
        self.asked = [*(a.obligation for a in found.answers), *found.obligations]
        return found


class Elsewhere:
    """A property that is another suite's claim."""

    depends: tuple[str, ...] = ()

    def __init__(self, name: str, claim: str, text: str) -> None:
        """Take the property's name, the claim, as `kernel/suite:claim`, and the SHA-256 of the CUDA text."""
        self.name, self._claim, self._text = name, claim, text

    def claims(self, context: Context) -> Claims:
        """Return nothing but why the claim is not proved of the text, if it is not."""
        reason = suites.missing(self._claim, self._text)
        return Claims(unknown=[Issue(None, f"rests on {self._claim}: {reason}")] if reason else [])


def reported(result: PropertyResult, run: Run) -> Claims:
    """Return a verdict of the engine as a claim: each obligation that was proved, or what was found."""
    found = Claims(notes=list(result.notes))
    found.assumptions = [*result.assumptions, *(f"contract: {clause}" for clause in result.used)]
    if result.verdict is Verdict.PROVED:
        found.answers = [Answer(replace(o, hypotheses=(), site=None), Verdict.PROVED) for o in run.asked]
        found.notes += [f"depends on {', '.join(result.depends)}: proved, too"] if result.depends else []
    else:
        found.answers = [
            Answer(Obligation(f.message, f.span, (), z3.BoolVal(False)), f.verdict) for f in result.findings
        ]
    if result.solvers:
        found.notes.append("questions: " + ", ".join(f"{k} {n}" for k, n in result.solvers.items()))
    return found


def _discharge(claim: Claims, name: str, suite: str, text: str, zeroed: tuple[str, ...]) -> None:
    """Add that variables are written before they are read, where a claim takes it for granted."""
    if not zeroed and name != "barrier":
        return
    init = _claim(suite, _INIT)
    reason = suites.missing(init, text)
    if reason:
        claim.unknown.append(Issue(None, f"rests on {init}: {reason}"))
    if zeroed:
        claim.assumptions.append(
            f"DISCHARGED by {init}: {', '.join(zeroed)} are written before they are read, so that what they "
            "hold at first, 0 here, is never read"
        )
    else:
        claim.assumptions.append(f"DISCHARGED by {init}: private variables are written before they are read")


# --------------------------------------------------------------------------- variables that hold 0 at first
def with_zeros(function: ir.Function) -> tuple[ir.Function, tuple[str, ...]]:
    """Return device IR in which integer variables are 0 at first, and their names; as it is without KEPT."""
    kept = {name for name, *_ in KEPT}
    if not any(isinstance(n, ir.Alloc) and n.buffer.name in kept for n in ir.walk(function.body)):
        return function, ()
    zeroed: list[str] = []
    return replace(function, body=_zeroed(function.body, zeroed)), tuple(zeroed)


def _zeroed(node: ir.Stmt, names: list[str]) -> ir.Stmt:
    match node:
        case ir.Seq(stmts=stmts):
            found: list[ir.Stmt] = []
            for stmt in stmts:
                found.append(_zeroed(stmt, names))
                if isinstance(stmt, ir.Alloc) and (size := _size(stmt.buffer)):
                    names.append(stmt.buffer.name)
                    found += _zeros(stmt, size)
            return replace(node, stmts=tuple(found))
        case ir.If(then=then, orelse=orelse):
            other = None if orelse is None else _zeroed(orelse, names)
            return replace(node, then=_zeroed(then, names), orelse=other)
        case ir.Launch() | ir.Assume() | ir.Attr() | ir.Block():
            return replace(node, body=_zeroed(node.body, names))
    return node  # loops as they are: a zero there would come again in each round


def _size(buffer: ir.Buffer) -> int:
    """Return how many elements an integer variable has; 0: it is none."""
    is_variable = buffer.scope in ("local", "local.var") and buffer.dtype.is_int and buffer.dtype.lanes == 1
    match buffer.shape:
        case (ir.Const(value=int(size)),) if is_variable and size <= MAX_ELEMENTS:
            return size
    return 0


def _zeros(alloc: ir.Alloc, size: int) -> Iterator[ir.Store]:
    buffer = alloc.buffer
    for element in range(size):
        index = ir.Const(ir.INT32, element)
        yield ir.Store(alloc.span, buffer, (index,), ir.Const(buffer.dtype, 0))
