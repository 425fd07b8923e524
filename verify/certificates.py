"""Certificates: one JSON file for each variant whose properties were all PROVED.

A certificate is named by the SHA-256 of the CUDA text that was proved, which is the text that is
compiled and run. It holds nothing that changes from run to run.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from dsv4_kernels.contract import Contract
from verify.extract import cuda_sha256
from verify.solve import CVC5_RLIMIT, Z3_RLIMIT
from verify.verdict import PropertyResult, VariantReport, Verdict

__all__ = [
    "cost",
    "cuda_sha256",
    "is_proved",
    "load",
    "matches",
    "own_folder",
    "to_report",
    "verifier_sha256",
    "versions",
    "write",
]

FOLDER = Path(__file__).parent / "certificates"
SCHEMA = 1
# What a verdict does not depend on.
_NOT_HASHED = (
    "annotations.py",
    "certificates",
    "certificates.py",
    "arith.py",
    "cli.py",
    "confirm.py",
    "corpus.py",
    "hints.py",
    "html.py",
    "interp",
    "mutate",
    "replay.py",
    "report.py",
    "shapes.py",
    "tasks.py",
)
_TOOLS = {"tilelang": "tilelang", "z3": "z3-solver", "cvc5": "cvc5"}


def own_folder() -> Path:
    """Return where certificates of dims are kept that the library does not ship.

    $DSV4_CERTIFICATES, or `dsv4_kernels/certificates` of the user's cache.
    """
    if named := os.environ.get("DSV4_CERTIFICATES"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv4_kernels" / "certificates"


def is_proved(digest: str) -> bool:
    """Return whether a certificate says that the CUDA text of this SHA-256 is PROVED in every property.

    One of the user's own counts if the verifier of today wrote it; the library's come with it.
    """
    own = own_folder()
    return digest in _proved(FOLDER) or (own.is_dir() and digest in _proved(own, verifier_sha256()))


@cache
def _proved(folder: Path, verifier: str | None = None) -> frozenset[str]:
    digests = set()
    for path in folder.glob("*/*.json"):
        certificate = json.loads(path.read_text())
        if verifier is not None and certificate["verifier_sha256"] != verifier:
            continue
        verdicts = [p["verdict"] for p in certificate["properties"]]
        # A suite of proofs has no text, and admits none.
        if certificate["cuda_sha256"] and verdicts and all(v == Verdict.PROVED for v in verdicts):
            digests.add(certificate["cuda_sha256"])
    return frozenset(digests)


@cache
def verifier_sha256() -> str:
    """Return a hash over the sources that decide verdicts."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    sources = [p for p in root.rglob("*.py") if p.relative_to(root).parts[0] not in _NOT_HASHED]
    for path in sorted(sources):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update((root.parent / "dsv4_kernels" / "contract.py").read_bytes())
    return digest.hexdigest()


@cache
def versions() -> dict[str, str]:
    """Return the versions of the compiler and the solvers."""
    return {name: metadata.version(package) for name, package in _TOOLS.items()}


def path_of(kernel: str, variant: str, folder: Path | None = None) -> Path:
    """Return where the certificate of a variant lies, in `folder` or in the library's."""
    return (FOLDER if folder is None else folder) / kernel / f"{variant}.json"


def load(kernel: str, variant: str) -> dict[str, Any] | None:
    """Return a variant's certificate, the library's or else the user's own, or None where there is none."""
    for folder in (FOLDER, own_folder()):
        path = path_of(kernel, variant, folder)
        if path.is_file():
            return json.loads(path.read_text())
    return None


def cost(kernel: str, variant: str) -> int:
    """Return what proving a variant took once, in resource units of z3; 0 where that is not known."""
    known = load(kernel, variant)
    return sum(p["rlimit"] for p in known["properties"]) if known is not None else 0


def matches(
    certificate: Mapping[str, Any],
    cuda_digest: str,
    contract: Contract,
    dims: Mapping[str, int],
    *,
    source_digest: str | None = None,
    host_digest: str | None = None,
) -> bool:
    """Return whether proving again would prove the same text, contract and dims in the same way.

    Args:
        certificate: as loaded.
        cuda_digest: of the text that was just lowered.
        contract: preconditions of today.
        dims: that the variant fixes today.
        source_digest: `extract.source_sha256`, in place of a text: then `cuda_digest` is not read.
        host_digest: of the host function lowered with the text, if it is asked for: kernels of one text may
            differ in their grids.
    """
    if source_digest is not None:
        same_text = certificate.get("source_sha256") == source_digest
    else:
        same_text = certificate["cuda_sha256"] == cuda_digest
    if host_digest is not None and certificate.get("host_sha256") != host_digest:
        return False
    return (
        same_text
        and certificate["schema"] == SCHEMA
        and certificate["verifier_sha256"] == verifier_sha256()
        and certificate["versions"] == versions()
        and certificate["contract"] == list(contract.clauses)
        and certificate["contract_consts"] == dict(contract.consts)
        and certificate["dims"] == dict(dims)
    )


def write(report: VariantReport, contract: Contract, folder: Path | None = None) -> Path | None:
    """Write the certificate of a report that is PROVED; else remove the one there is, and return None.

    Args:
        report: of the variant.
        contract: that it was proved under.
        folder: where to; None: the library's.
    """
    path = path_of(report.kernel, report.variant, folder)
    _proved.cache_clear()
    if report.verdict is not Verdict.PROVED:
        path.unlink(missing_ok=True)
        return None
    properties = []
    for result in report.properties:
        data = asdict(result)
        for volatile in ("span", "findings", "seconds"):
            del data[volatile]
        properties.append(data)
    certificate = {
        "schema": SCHEMA,
        "verdict": str(report.verdict),
        "kernel": report.kernel,
        "variant": report.variant,
        "cuda_sha256": report.cuda_sha256,
        "source_sha256": report.source_sha256,
        "host_sha256": report.host_sha256,
        "verifier_sha256": verifier_sha256(),
        "versions": versions(),
        "rlimit": {"z3": Z3_RLIMIT, "cvc5": CVC5_RLIMIT},
        "contract": list(contract.clauses),
        "contract_consts": dict(contract.consts),
        "dims": report.dims,
        "witness": report.witness,
        "unused_clauses": report.unused_clauses,
        "properties": properties,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(certificate, indent=1, sort_keys=True) + "\n")
    return path


def to_report(certificate: Mapping[str, Any]) -> VariantReport:
    """Return the report that a certificate stands for."""
    properties = []
    for data in certificate["properties"]:
        fields = {**data, "verdict": Verdict(data["verdict"]), "depends": tuple(data["depends"])}
        properties.append(PropertyResult(**fields))
    return VariantReport(
        certificate["kernel"],
        certificate["variant"],
        certificate["cuda_sha256"],
        tuple(certificate["contract"]),
        dict(certificate["dims"]),
        dict(certificate["witness"]),
        properties,
        unused_clauses=list(certificate["unused_clauses"]),
        versions=dict(certificate["versions"]),
        source_sha256=certificate.get("source_sha256", ""),
        host_sha256=certificate.get("host_sha256", ""),
        reused=True,
    )
