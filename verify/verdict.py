"""What a check can answer, and everything that goes with an answer.

Only PROVED passes. UNKNOWN (the solvers or the encoding could not decide) and UNSUPPORTED (the IR
holds an operation without a registered meaning) fail like REFUTED, with an exit code of their own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from verify.ir import Span

EXIT_PROVED, EXIT_REFUTED, EXIT_UNDECIDED, EXIT_TOOL_ERROR = 0, 1, 2, 3


class Verdict(StrEnum):
    """The answer to one property of one variant."""

    PROVED = "PROVED"
    REFUTED = "REFUTED"
    UNKNOWN = "UNKNOWN"
    UNSUPPORTED = "UNSUPPORTED"


_SEVERITY = (Verdict.REFUTED, Verdict.UNSUPPORTED, Verdict.UNKNOWN, Verdict.PROVED)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict that decides: any REFUTED, else UNSUPPORTED, else UNKNOWN, else PROVED."""
    present = set(verdicts)
    return next((v for v in _SEVERITY if v in present), Verdict.PROVED)


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """Return the process exit code for these verdicts."""
    decisive = worst(verdicts)
    if decisive is Verdict.PROVED:
        return EXIT_PROVED
    return EXIT_REFUTED if decisive is Verdict.REFUTED else EXIT_UNDECIDED


@dataclass(frozen=True)
class Counterexample:
    """A model of one violated obligation.

    Attributes:
        shape: value of each shape parameter.
        block, thread: launch indices by name (bx, by, ...; tx, ...).
        loops: loop counters by name, outermost first.
        values: what the property adds: buffer, element, byte address, extent, ...
        excerpt: the IR around the statement.
    """

    shape: Mapping[str, int]
    block: Mapping[str, int]
    thread: Mapping[str, int]
    loops: Mapping[str, int]
    values: Mapping[str, int | str]
    excerpt: str = ""


@dataclass(frozen=True)
class Finding:
    """One reason why a property is not PROVED."""

    verdict: Verdict
    span: Span | None
    message: str
    counterexample: Counterexample | None = None


@dataclass
class PropertyResult:
    """One property of one variant.

    Attributes:
        depends: properties that have to be PROVED too before this verdict means anything.
        span: the kernel's first line.
        obligations: how many were checked, trivial ones included.
        queries: solver queries made for them.
        solvers: answers by solver name and version: how many queries it decided.
        rlimit: resource units z3 spent.
        assumptions: what the proof takes for granted and the solver did not check.
        used, unused: labels of contract clauses that proofs needed, and that none did.
        notes: facts for the reader, e.g. what a property leaves out by definition.
        facts: values by name that proofs of other variants are compared with.
    """

    name: str
    verdict: Verdict
    depends: tuple[str, ...] = ()
    span: Span | None = None
    findings: list[Finding] = field(default_factory=list)
    obligations: int = 0
    queries: int = 0
    solvers: dict[str, int] = field(default_factory=dict)
    rlimit: int = 0
    seconds: float = 0.0
    assumptions: list[str] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)


@dataclass
class VariantReport:
    """Every property of one variant of one kernel.

    Attributes:
        contract: the clauses, as written.
        witness: dims that satisfy the contract; empty where it is contradictory.
        unused_clauses: clauses that no proof needed.
        source_sha256: of what the text was generated from; see `extract.source_sha256`.
        host_sha256: of the host function that launches it; see `extract.Extracted`.
        seconds, lowering_seconds: what the check took, and what of it the compiler did.
        cpu_seconds, lowering_cpu_seconds: likewise, of this process's processor time.
        recheck_cpu_seconds: what of it the second solver took.
        reused: the verdicts come from a certificate that matches, not from a new run.
    """

    kernel: str
    variant: str
    cuda_sha256: str
    contract: tuple[str, ...]
    dims: dict[str, int]
    witness: dict[str, int]
    properties: list[PropertyResult]
    unused_clauses: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    source_sha256: str = ""
    host_sha256: str = ""
    seconds: float = 0.0
    lowering_seconds: float = 0.0
    cpu_seconds: float = 0.0
    lowering_cpu_seconds: float = 0.0
    recheck_cpu_seconds: float = 0.0
    reused: bool = False

    @property
    def verdict(self) -> Verdict:
        """The decisive verdict over all properties."""
        return worst(p.verdict for p in self.properties)

    def to_json(self) -> dict[str, Any]:
        """Return plain data: strings, numbers, lists and dicts."""
        data = asdict(self)
        data["verdict"] = str(self.verdict)
        for prop in data["properties"]:
            prop["span"] = _span_json(prop["span"])
            for finding in prop["findings"]:
                finding["span"] = _span_json(finding["span"])
        return data


def _span_json(span: dict[str, Any] | None) -> str | None:
    return f"{span['path']}:{span['line']}:{span['column']}" if span else None
