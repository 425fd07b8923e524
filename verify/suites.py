"""Proofs that belong to no single kernel: suites of named obligations, kept beside the code they are about.

A module of MODULES defines SUITES (name -> Suite). A suite is reported, and certified, like a variant, and
each of its claims like a property. It has no CUDA text of its own, so its certificate admits no launch.
"""

import hashlib
import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from dsv4_kernels.contract import Contract
from verify import certificates
from verify.properties import Claims
from verify.solve import Obligation, Prover
from verify.verdict import Finding, PropertyResult, VariantReport, Verdict, worst

MODULES = ("megamoe.proofs",)
NO_CONTRACT = Contract(())  # a claim's premises are its own


@dataclass(frozen=True)
class Suite:
    """Claims that are proved together.

    Attributes:
        kernel: what the claims are about, as `--kernel` names it.
        claims: name -> what has to be proved.
        sources: files that the claims follow from, beside the verifier's own.
        compiled: digest of what the code is compiled from that claims are read off.
        text: SHA-256 of that code's CUDA text; None where claims are about no code.
    """

    kernel: str
    claims: Mapping[str, Callable[[], Claims]]
    sources: tuple[Path, ...]
    compiled: Callable[[], str] = field(default=lambda: "")
    text: Callable[[], str] | None = None

    def digest(self) -> str:
        """Return a hash over what decides the claims."""
        found = hashlib.sha256(self.compiled().encode())
        for path in sorted(self.sources):
            found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return found.hexdigest()


def suites() -> dict[tuple[str, str], Suite]:
    """Return every suite by (kernel, name)."""
    modules = (importlib.import_module(name) for name in MODULES)
    return {(suite.kernel, name): suite for m in modules for name, suite in m.SUITES.items()}


def is_current(kernel: str, name: str) -> bool:
    """Return whether the suite's certificate is of the sources of today."""
    known, digest = certificates.load(kernel, name), suites()[kernel, name].digest()
    return known is not None and certificates.matches(known, "", NO_CONTRACT, {}, source_digest=digest)


def check(
    kernel: str, name: str, *, recheck: bool = True, fresh: bool = False, smt2: Path | None = None
) -> VariantReport:
    """Prove a suite, or return its certificate where that still matches; arguments as of `check_kernel`."""
    started = time.monotonic()
    suite = suites()[kernel, name]
    digest = suite.digest()
    known = None if fresh else certificates.load(kernel, name)
    if known is not None and certificates.matches(known, "", NO_CONTRACT, {}, source_digest=digest):
        report = certificates.to_report(known)
    else:
        results = [
            _claim(what, claim, recheck, None if smt2 is None else smt2 / kernel / name / what)
            for what, claim in suite.claims.items()
        ]
        report = VariantReport(
            kernel,
            name,
            "",
            (),
            {},
            {},
            results,
            versions=certificates.versions(),
            source_sha256=digest,
        )
    report.seconds = time.monotonic() - started
    return report


@cache
def missing(claim: str, text: str) -> str:
    """Return why `claim`, written kernel/suite:claim, proves nothing of a CUDA text; empty if it does."""
    kernel, _, rest = claim.partition("/")
    name, _, what = rest.partition(":")
    suite = suites().get((kernel, name))
    if suite is None or suite.text is None or what not in suite.claims:
        return "there is no such claim about compiled code"
    if suite.text() != text:
        return "it is about other code"
    found = next(p for p in check(kernel, name).properties if p.name == what)
    return "" if found.verdict is Verdict.PROVED else f"it is {found.verdict}"


def _claim(what: str, claim: Callable[[], Claims], recheck: bool, smt2: Path | None) -> PropertyResult:
    started = time.monotonic()
    prover, claims = Prover(recheck=recheck, smt2=smt2, by_cases=True), claim()
    answers = [*claims.answers, *prover.prove(claims.obligations)]
    findings = [
        Finding(a.verdict, a.obligation.span, _reason(a.obligation, a.reason))
        for a in answers
        if a.verdict is not Verdict.PROVED
    ]
    for verdict, issues in ((Verdict.UNSUPPORTED, claims.unsupported), (Verdict.UNKNOWN, claims.unknown)):
        findings += [Finding(verdict, issue.span, issue.message) for issue in issues]
    if not answers and not findings:
        findings = [Finding(Verdict.UNKNOWN, None, "nothing was claimed")]
    result = PropertyResult(
        what,
        worst(f.verdict for f in findings),
        findings=findings,
        obligations=len(answers),
        queries=prover.queries,
        solvers=dict(sorted(prover.decided.items())),
        rlimit=prover.rlimit_used,
        assumptions=list(claims.assumptions),
        notes=list(claims.notes),
    )
    result.seconds = time.monotonic() - started
    return result


def _reason(obligation: Obligation, reason: str) -> str:
    return obligation.what + (f" ({reason})" if reason else "")
