"""Check every property of one kernel variant and gather the answers into a report."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsv4_kernels.contract import Contract
from verify import certificates, extract, ir
from verify.encode import Hypothesis, constants_of, some_element
from verify.intarith import constant_of
from verify.origin import Origins, is_authored
from verify.properties import Claims, Context, Issue, Property, all_properties
from verify.signature.dispatch import Dispatch
from verify.solve import Answer, Prover, remembering
from verify.stopwatch import SECOND
from verify.text import excerpt
from verify.verdict import Counterexample, Finding, PropertyResult, VariantReport, Verdict, worst

MAX_FINDINGS = 8  # of one property in a report; the verdict counts all


def check_kernel(
    kernel: str,
    variant: str,
    prim_func: Any,
    contract: Contract,
    dims: Mapping[str, int],
    *,
    recheck: bool = True,
    fresh: bool = False,
    properties: Sequence[Property] | None = None,
    smt2: Path | None = None,
    dispatch: Dispatch | None = None,
    pass_configs: Mapping[str, Any] | None = None,
) -> VariantReport:
    """Lower `prim_func` and check it, or return its certificate where that still matches.

    Args:
        kernel: name, for the report and the certificate.
        variant: its id, likewise.
        prim_func: the tirx.PrimFunc.
        contract: preconditions over the dims.
        dims: those that the variant fixes.
        recheck: prove again with cvc5 what z3 proved.
        fresh: check even where a certificate matches.
        properties: what to check; all there are by default.
        smt2: folder that gets the queries, one file each.
        dispatch: batch dims, and what else the dispatcher may choose.
        pass_configs: of the compiler.
    """
    started, busy = time.monotonic(), time.process_time()
    source, known, usable = "", None, None
    if properties is None:
        source = extract.source_sha256(prim_func, pass_configs=pass_configs)
        known = certificates.load(kernel, variant)
        usable = None if fresh else known
    if usable is not None and certificates.matches(usable, "", contract, dims, source_digest=source):
        return _reused(usable, started)
    lowering_started, lowering_busy = time.monotonic(), time.process_time()
    rechecked = SECOND.seconds
    try:
        extracted = extract.lowered(prim_func, pass_configs, source)
    except ir.UnsupportedIR as error:
        finding = Finding(Verdict.UNSUPPORTED, None, str(error))
        result = PropertyResult("extraction", Verdict.UNSUPPORTED, findings=[finding])
        return VariantReport(kernel, variant, "", contract.clauses, dict(dims), {}, [result])
    lowering_seconds = time.monotonic() - lowering_started
    lowering_cpu_seconds = time.process_time() - lowering_busy
    if usable is not None and certificates.matches(
        usable, extracted.cuda_sha256, contract, dims, host_digest=extracted.host_sha256
    ):
        return _reused(usable, started)
    report = check(kernel, variant, extracted, contract, dims, recheck, properties, smt2, dispatch)
    report.source_sha256 = source
    report.seconds, report.lowering_seconds = time.monotonic() - started, lowering_seconds
    report.cpu_seconds, report.lowering_cpu_seconds = time.process_time() - busy, lowering_cpu_seconds
    report.recheck_cpu_seconds = SECOND.seconds - rechecked
    return report


def _reused(certificate: Mapping[str, Any], started: float) -> VariantReport:
    report = certificates.to_report(certificate)
    report.seconds = time.monotonic() - started
    return report


def check(
    kernel: str,
    variant: str,
    extracted: extract.Extracted,
    contract: Contract,
    dims: Mapping[str, int],
    recheck: bool = True,
    properties: Sequence[Property] | None = None,
    smt2: Path | None = None,
    dispatch: Dispatch | None = None,
) -> VariantReport:
    """Check a kernel that is lowered already."""
    context = Context(extracted, contract, dims, dispatch=dispatch or Dispatch())
    witness = _witness(context)
    report = VariantReport(
        kernel,
        variant,
        extracted.cuda_sha256,
        contract.clauses,
        dict(dims),
        {name: value for name, value in (witness or {}).items() if "!" not in name},
        [],
        versions=certificates.versions(),
        host_sha256=extracted.host_sha256,
    )
    origins = Origins(extracted.tile)
    span = origins.first
    if witness is None:
        finding = Finding(Verdict.REFUTED, span, "no shape satisfies the contract: everything would hold")
        report.properties.append(PropertyResult("contract", Verdict.REFUTED, span=span, findings=[finding]))
        return report
    data = some_element(context.hypotheses)
    if data and Prover().satisfiable([*(h.term for h in context.hypotheses), *data]) is None:
        text = "no element keeps what the contract says of the data: all that reads one would hold"
        finding = Finding(Verdict.REFUTED, span, text)
        report.properties.append(PropertyResult("contract", Verdict.REFUTED, span=span, findings=[finding]))
    with remembering():
        for prop in all_properties() if properties is None else properties:
            folder = smt2 / kernel / variant / prop.name if smt2 is not None else None
            report.properties.append(_property(context, prop, origins, recheck, folder))
    _apply_dependencies(report.properties)
    if recheck:  # cores come from cvc5
        used = {label for p in report.properties for label in p.used}
        clauses = [h.label for h in context.hypotheses if h.kind == "contract"]
        report.unused_clauses = [c for c in dict.fromkeys(clauses) if c not in used]
    return report


def _witness(context: Context) -> Mapping[str, int] | None:
    """Return dims that satisfy the contract, none of them 0 where that can be; None if there are none."""
    clauses = [h.term for h in context.hypotheses]
    dims = set().union(*(constants_of(c) for c in clauses))
    # What the kernel assumes of its shapes must not contradict the contract, or all would hold.
    try:
        sites = context.device_sites
    except ir.UnsupportedIR:
        sites = []  # which each property says of the kernel
    assumed = (h for s in sites for h in s.scope.hypotheses if h.kind == "assume")
    clauses += dict.fromkeys(h.term for h in assumed if constants_of(h.term) <= dims)
    params = [p for p in context.extracted.device.params if p.dtype.is_int]
    busy = [context.encoder.dim(p.name) >= 1 for p in params]
    return Prover().satisfiable([*clauses, *busy]) or Prover().satisfiable(clauses)


def _property(
    context: Context, prop: Property, origins: Origins, recheck: bool, smt2: Path | None
) -> PropertyResult:
    started = time.monotonic()
    prover, span = Prover(recheck=recheck, smt2=smt2, by_cases=True), origins.first
    try:
        claims = prop.claims(context)
    except ir.UnsupportedIR as error:
        claims = Claims(unsupported=[Issue(span, str(error))])
    answers = [*claims.answers, *prover.prove(claims.obligations)]
    for other in claims.spent:
        prover.absorb(other)
    findings = [finding_of(context, origins, a) for a in answers if a.verdict is not Verdict.PROVED]
    for verdict, issues in ((Verdict.UNSUPPORTED, claims.unsupported), (Verdict.UNKNOWN, claims.unknown)):
        findings += [Finding(verdict, i.span if is_authored(i.span) else span, i.message) for i in issues]
    discharged, open_claims = _discharged(context, claims)
    findings = _without_repeats([*findings, *(replace(f, span=span) for f in open_claims)])
    core = set().union(*(a.core for a in answers)) if answers else set()
    hypotheses = {h.label: h for a in answers for h in a.obligation.hypotheses}
    result = PropertyResult(
        prop.name,
        worst(f.verdict for f in findings),
        tuple(prop.depends),
        span,
        findings,
        obligations=len(answers),
        queries=prover.queries,
        solvers=dict(sorted(prover.decided.items())),
        rlimit=prover.rlimit_used,
        assumptions=list(
            dict.fromkeys(
                [
                    *claims.assumptions,
                    *discharged,
                    *_assumed(hypotheses, core, recheck),
                    *_relied(context, answers),
                ]
            )
        ),
        used=sorted(label for label in core if label in hypotheses and hypotheses[label].kind == "contract"),
        notes=list(claims.notes),
        facts=dict(claims.facts),
    )
    result.seconds = time.monotonic() - started
    return result


def _assumed(hypotheses: Mapping[str, Hypothesis], core: set[str], recheck: bool) -> list[str]:
    """Return the hypotheses that come from nowhere; with cores, only those that proofs used."""
    assumed = [label for label, h in hypotheses.items() if h.kind == "assume"]
    return sorted(f"ASSUMED {label}" for label in assumed if label in core or not recheck)


def _discharged(context: Context, claims: Claims) -> tuple[list[str], list[Finding]]:
    """Return what claims of suites stand for, and those that are not proved or are about other code."""
    from verify import suites

    stated, missing = [], []
    for claim, tensors in sorted(claims.rests.items()):
        names = ", ".join(sorted(tensors))
        stated.append(
            f"DISCHARGED by {claim}: blocks read what others write in {names} behind it, and before the next"
        )
        reason = suites.missing(claim, context.extracted.cuda_sha256)
        if reason:
            missing.append(Finding(Verdict.UNKNOWN, None, f"rests on {claim}: {reason}"))
    return stated, missing


def _relied(context: Context, answers: Sequence[Answer]) -> list[str]:
    """Return the promises about data that the obligations rest on by the way in which they are written."""
    return sorted(f"ASSUMED {label}" for label in context.encoder.relied) if answers else []


def _apply_dependencies(results: Sequence[PropertyResult]) -> None:
    """A proof over unbounded integers counts only once the properties it rests on are proved."""
    verdicts: dict[str, Verdict] = {}
    for result in results:  # dependencies come first
        failed = [d for d in result.depends if verdicts.get(d) is not Verdict.PROVED]
        if failed and result.verdict is Verdict.PROVED:
            state = ", ".join(f"{d}, which is {verdicts.get(d, 'not checked')}" for d in failed)
            result.findings.append(Finding(Verdict.UNKNOWN, result.span, f"rests on {state}"))
            result.verdict = Verdict.UNKNOWN
        verdicts[result.name] = result.verdict


def finding_of(context: Context, origins: Origins, answer: Answer) -> Finding:
    """Return an answer as a finding, with its place and, where there is a model, its counterexample."""
    obligation, site = answer.obligation, answer.obligation.site
    message = obligation.what + (f" ({answer.reason})" if answer.reason else "")
    if site is not None:
        spans = (site.statement.span, *(s.span for s in reversed(site.path)))
        place = origins.of(site.statement, spans)
    else:
        place = obligation.span if is_authored(obligation.span) else origins.first
    if not answer.model:
        return Finding(answer.verdict, place, message)
    model = answer.model
    params = [p.name for p in context.extracted.device.params if p.dtype.is_int]
    shape = {**context.dims, **{name: model.get(name, 0) for name in params}}
    block, thread, loops, text = {}, {}, {}, ""
    if site is not None:
        for index in site.scope.indices:
            # A counter that the model leaves open may have any value of its range.
            value = model.get(index.const.decl().name(), constant_of(index.start) or 0)
            group = {"blockIdx": block, "threadIdx": thread}.get(index.tag.split(".")[0], loops)
            group[index.var.name] = value
        text = excerpt(site.path, site.statement)
    found = Counterexample(shape, block, thread, loops, dict(answer.shown), text)
    return Finding(answer.verdict, place, message, found)


def _without_repeats(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings that differ in place or message, worst first, at most MAX_FINDINGS."""
    unique: dict[tuple[Any, ...], Finding] = {}
    for finding in findings:
        unique.setdefault((finding.verdict, finding.span, finding.message), finding)
    order = [Verdict.REFUTED, Verdict.UNSUPPORTED, Verdict.UNKNOWN]
    return sorted(unique.values(), key=lambda f: order.index(f.verdict))[:MAX_FINDINGS]
