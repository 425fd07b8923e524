"""The variants of a kernel held against each other after all were checked.

A variant's proof of batch invariance names the variants that the dispatcher may choose beside it and the
signatures that they had. This compares those with what each variant recorded of itself, and with the
dispatcher of now, so that certificates of different times cannot add up to a claim that nobody proved.
"""

from collections.abc import Mapping, Sequence

from dsv4_kernels import registry
from verify import certificates
from verify.signature.choice import UndecidedError, batch_bounds, may_meet, ranges
from verify.signature.dispatch import dispatch_of
from verify.verdict import Finding, PropertyResult, VariantReport, Verdict, worst

NAME = "batch_invariance"
_AS = "as "  # fact of a variant about another: `as <id>` -> its signature


def check_library(reports: Sequence[VariantReport]) -> list[VariantReport]:
    """Return the reports whose verdict this changed: proofs that do not fit together."""
    specs = {spec.name: spec for spec in registry.all_kernels()}
    own = {(r.kernel, r.variant): found.facts for r in reports if (found := _result(r)) is not None}
    changed = []
    for report in reports:
        result, spec = _result(report), specs.get(report.kernel)
        if result is None or spec is None or result.verdict is not Verdict.PROVED:
            continue
        variant = next((v for v in spec.variants if v.id == report.variant), None)
        problems = [*_dispatcher(spec, variant, result.facts)] if variant is not None else []
        problems += _signatures(report.kernel, result.facts, own)
        if problems:
            result.findings += [Finding(Verdict.UNKNOWN, result.span, p) for p in problems]
            result.verdict = worst(f.verdict for f in result.findings)
            changed.append(report)
    return changed


def _result(report: VariantReport) -> PropertyResult | None:
    return next((p for p in report.properties if p.name == NAME), None)


def _dispatcher(spec: registry.KernelSpec, variant: registry.Variant, facts: Mapping[str, str]) -> list[str]:
    if not spec.batch_dims or "signature" not in facts:
        return []
    dispatch = dispatch_of(spec, variant)
    assert dispatch.select is not None, "a registered kernel has a dispatcher"
    try:
        bounds = batch_bounds(spec.contract, dispatch.fixed, spec.batch_dims)
        found = list(ranges(dispatch.select, dispatch.fixed, bounds))
    except UndecidedError as error:
        return [str(error)]
    mine = [p for p in found if p.variant == variant.id]
    chosen = {p.variant for p in found if any(may_meet(p, own, spec.batch_dims) for own in mine)}
    if chosen != set(facts.get("chosen", "").split()):
        return ["the dispatcher chooses other variants than when this was proved: prove again"]
    return []


def _signatures(
    kernel: str, facts: Mapping[str, str], own: Mapping[tuple[str, str], Mapping[str, str]]
) -> list[str]:
    problems = []
    for name in (n.removeprefix(_AS) for n in facts if n.startswith(_AS)):
        its = own.get((kernel, name))
        if its is None:  # not asked for in this run: what its certificate says, if there is one
            known = certificates.load(kernel, name) or {"properties": []}
            its = next((p.get("facts", {}) for p in known["properties"] if p["name"] == NAME), {})
            if not its:
                continue
        if its.get("signature") != facts[_AS + name]:
            problems.append(f"variant {name} has another signature than when this was proved: prove again")
    return problems
