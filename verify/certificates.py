"""Certificates: what was proved of one compiled kernel, one JSON file a variant.

A certificate is bound to a kernel by the SHA-256 of the CUDA text that it compiles to, and to the
verifier by a hash over its sources; the first decides whether a launch is covered, the second
whether the command line has to prove again.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from verify.extract import cuda_sha256

__all__ = ["FOLDER", "PASSING", "cuda_sha256", "is_proved", "load", "save", "verifier_sha256"]

FOLDER = Path(__file__).parent / "certificates"
PASSING = "PROVED"
# What a verdict does not depend on: how it is printed, asked for or stored, and the interpreter.
_NOT_PROVING = {"certificates.py", "cli.py", "report.py"}


@cache
def verifier_sha256() -> str:
    """Return a hash over the sources that decide verdicts."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        name = path.relative_to(here)
        if name.parts[0] != "interp" and name.name not in _NOT_PROVING:
            digest.update(str(name).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def path_of(kernel: str, variant: str, folder: Path = FOLDER) -> Path:
    """Return where the certificate of a variant lies."""
    return folder / kernel / f"{variant}.json"


def save(report: Mapping[str, Any], folder: Path = FOLDER) -> Path:
    """Write a report (`VariantReport.to_json`) as the certificate of its variant; return its path."""
    path = path_of(report["kernel"], report["variant"], folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in report.items() if key not in ("reused", "seconds")}
    kept["verifier_sha256"] = verifier_sha256()
    for prop in kept["properties"]:
        prop.pop("seconds", None)  # machine-dependent: a certificate repeats byte for byte
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    _proved_digests.cache_clear()
    return path


def load(kernel: str, variant: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """Return the certificate of a variant, or None where there is none."""
    path = path_of(kernel, variant, folder)
    return json.loads(path.read_text()) if path.is_file() else None


def is_proved(digest: str) -> bool:
    """Return whether a certificate proves every property of the kernel with this CUDA digest."""
    return digest in _proved_digests()


@cache
def _proved_digests() -> frozenset[str]:
    found = set()
    for path in FOLDER.glob("*/*.json"):
        certificate = json.loads(path.read_text())
        properties = certificate["properties"]
        if properties and all(p["verdict"] == PASSING for p in properties):
            found.add(certificate["cuda_sha256"])
    return frozenset(found)
