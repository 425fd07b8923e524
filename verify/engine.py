"""Run the properties over one variant and gather what the solvers said."""

import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import z3

from dsv4_kernels.contract import Contract
from verify import ir, text
from verify.encode import Index
from verify.extract import Extracted
from verify.properties import Claims, Context, Property, alignment, bounds, coverage, overflow, refinement
from verify.solve import Answer, Prover
from verify.verdict import Counterexample, Finding, PropertyResult, VariantReport, Verdict, worst

PROPERTIES: tuple[Property, ...] = tuple(
    module.PROPERTY for module in (overflow, bounds, alignment, coverage, refinement)
)
_TOOLS = ("tilelang", "z3-solver", "cvc5")


def verify(
    kernel: str,
    variant: str,
    extracted: Extracted,
    contract: Contract,
    dims: Mapping[str, int],
    *,
    recheck: bool = True,
    properties: Iterable[Property] = PROPERTIES,
) -> VariantReport:
    """Prove every property of one variant.

    Args:
        kernel: for the report.
        variant: likewise.
        extracted: the kernel at every stage.
        contract: preconditions on the dims.
        dims: those that the variant fixes.
        recheck: require cvc5 to prove again what z3 proved.
        properties: what to prove.

    Returns:
        The verdicts, with counterexamples, assumptions and costs.
    """
    start = time.perf_counter()
    context = Context(extracted, contract, dims)
    report = VariantReport(
        kernel, variant, extracted.cuda_sha256, contract.clauses, dict(dims), {}, [], versions=_versions()
    )
    vacuous = _witness(context, report)
    for prop in properties:
        report.properties.append(_run(prop, context, recheck, vacuous))
    _apply_dependencies(report.properties)
    used = {label for p in report.properties for label in p.used}
    symbolic = {h.label for h in context.hypotheses if h.kind == "contract"}
    report.unused_clauses = [c for c in contract.clauses if c in symbolic and c not in used]
    report.seconds = time.perf_counter() - start
    return report


def _versions() -> dict[str, str]:
    return {tool: metadata.version(tool) for tool in _TOOLS}


def _witness(context: Context, report: VariantReport) -> str:
    """Fill in dims that satisfy the contract; return why there are none, else an empty string."""
    try:
        model = Prover().satisfiable([h.term for h in context.hypotheses])
    except ir.UnsupportedIR as error:
        return str(error)
    if model is None:
        return "no shape satisfies the contract, so anything could be proved from it"
    report.witness = {**dict(context.dims), **model}
    return ""


def _run(prop: Property, context: Context, recheck: bool, vacuous: str) -> PropertyResult:
    start = time.perf_counter()
    result = PropertyResult(prop.name, Verdict.PROVED, prop.depends)
    prover = Prover(recheck=recheck)
    try:
        claims = prop.claims(context)
        answers = [*claims.answers, *prover.prove(claims.obligations)]
    except ir.UnsupportedIR as error:
        claims, answers = Claims(), []
        result.findings.append(Finding(Verdict.UNSUPPORTED, None, str(error)))
    result.findings += [Finding(Verdict.UNSUPPORTED, i.span, i.message) for i in claims.unsupported]
    result.findings += [Finding(Verdict.UNKNOWN, i.span, i.message) for i in claims.unknown]
    result.findings += [_finding(a, context) for a in answers if a.verdict is not Verdict.PROVED]
    if vacuous:
        result.findings.append(Finding(Verdict.UNKNOWN, None, vacuous))
    result.verdict = worst(f.verdict for f in result.findings)
    result.obligations = len(answers)
    result.queries = sum(prover.decided.values())
    result.solvers = dict(prover.decided)
    result.rlimit = prover.rlimit_used
    result.assumptions = sorted(set(claims.assumptions) | _assumed(answers))
    result.used = sorted({label for a in answers for label in a.core} & _contract_labels(context))
    result.notes = list(claims.notes)
    result.seconds = time.perf_counter() - start
    return result


def _contract_labels(context: Context) -> set[str]:
    return {h.label for h in context.hypotheses if h.kind == "contract"}


def _assumed(answers: Iterable[Answer]) -> set[str]:
    return {
        f"assumed by the kernel: {h.label}"
        for a in answers
        for h in a.obligation.hypotheses
        if h.kind == "assume" and h.label in a.core
    }


def _apply_dependencies(results: list[PropertyResult]) -> None:
    """Withhold PROVED from a property whose premise is not proved."""
    verdicts = {r.name: r.verdict for r in results}
    for result in results:
        missing = [d for d in result.depends if verdicts.get(d, Verdict.PROVED) is not Verdict.PROVED]
        if missing and result.verdict is Verdict.PROVED:
            result.verdict = Verdict.UNKNOWN
            message = f"rests on {', '.join(missing)}, which is not proved"
            result.findings.append(Finding(Verdict.UNKNOWN, None, message))


def _finding(answer: Answer, context: Context) -> Finding:
    obligation = answer.obligation
    message = obligation.what + (f": {answer.reason}" if answer.reason else "")
    if not answer.model and not answer.shown:
        return Finding(answer.verdict, obligation.span, message)
    params = [p.name for p in context.extracted.device.params if p.dtype.is_int]
    shape = {**dict(context.dims), **{p: answer.model.get(str(context.encoder.dim(p)), 0) for p in params}}
    site = obligation.site
    launch = site.scope.launch if site else ()
    loops = site.scope.loops if site else ()
    example = Counterexample(
        shape,
        _values((i for i in launch if i.tag.startswith("blockIdx")), answer),
        _values((i for i in launch if i.tag.startswith("threadIdx")), answer),
        _values(loops, answer),
        dict(answer.shown),
        text.excerpt(site.path, site.statement) if site else "",
    )
    return Finding(answer.verdict, obligation.span, message, example)


def _values(indices: Iterable[Index], answer: Answer) -> dict[str, int]:
    return {i.var.name: _value(i, answer.model) for i in indices}


def _value(index: Index, model: Mapping[str, Any]) -> int:
    name = str(index.const)
    if name in model:
        return int(model[name])
    start = z3.simplify(index.start)  # a counter that the model leaves open may have any value in range
    return start.as_long() if z3.is_int_value(start) else 0
