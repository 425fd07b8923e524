"""Outcomes kept in a file, one JSON line each, as they are found; a later run takes up what still holds."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from verify.certificates import verifier_sha256
from verify.mutate.classes import Listed

_STAMP_CHARACTERS = 16
_LISTING = [
    *(
        f"mutate/{name}.py"
        for name in ("classes", "control", "memory", "mutant", "operators", "rewrite", "sync", "value")
    ),
    *("extract.py", "ir.py", "origin.py", "parse.py", "text.py"),
]
_OUTCOME = [
    "interp",
    *_LISTING,
    *(f"mutate/{name}.py" for name in ("equivalence", "instances", "kill")),
]
# What only a replay depends on: a fate stands without it, and a counterexample that was confirmed stays so.
_REPLAY = frozenset({"interp/device/outcome.py", "interp/device/replay.py"})


@cache
def stamp(kind: str) -> str:
    """Return a hash of what a line depends on besides the kernel.

    Of an outcome: the verifier, the operators, the interpreter and the solver. Of a listing: the operators
    and what reads and prints the IR.
    """
    root = Path(__file__).parent.parent
    parts = _OUTCOME if kind == "outcome" else _LISTING
    paths = [
        p for part in parts for p in ([root / part] if part.endswith(".py") else (root / part).rglob("*.py"))
    ]
    paths = [p for p in paths if str(p.relative_to(root)) not in _REPLAY]
    digest = hashlib.sha256(json.dumps(_versions(), sort_keys=True).encode())
    if kind == "outcome":
        digest.update(verifier_sha256().encode())
    for path in sorted(paths):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:_STAMP_CHARACTERS]


@cache
def _versions() -> dict[str, str]:
    """Return the versions of the compiler and of the solver that is asked: z3 alone."""
    return {package: metadata.version(package) for package in ("tilelang", "z3-solver")}


@dataclass(frozen=True)
class Store:
    """A file of outcomes and listings; without a path nothing is kept.

    A line counts for the source that its instance was lowered from and the verifier that wrote it.
    """

    path: Path | None = None

    def outcomes(self, sources: dict[str, str]) -> dict[str, dict[str, Any]]:
        """Return the fields of outcomes by class, of instances whose source is still the given one."""
        return {
            line["outcome"]["key"]: line["outcome"]
            for line in self._lines("outcome")
            if sources.get(line["outcome"]["instance"]) == line["source"]
        }

    def listings(self, sources: dict[str, str]) -> dict[str, list[Listed]]:
        """Return the mutants by instance, likewise."""
        return {
            line["instance"]: [Listed(line["instance"], *item) for item in line["listed"]]
            for line in self._lines("listed")
            if sources.get(line["instance"]) == line["source"]
        }

    def add_outcome(self, source: str, outcome: Any) -> None:
        """Append one outcome (a dataclass)."""
        self._append("outcome", {"source": source, "outcome": asdict(outcome)})

    def add_listing(self, source: str, instance: str, found: Sequence[Listed]) -> None:
        """Append the mutants of an instance."""
        listed = [(item.operator, item.number, item.key) for item in found]
        self._append("listed", {"source": source, "instance": instance, "listed": listed})

    def _append(self, kind: str, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:  # one write: lines of processes do not mix
            file.write(json.dumps({"stamp": stamp(kind), **line}) + "\n")

    def _lines(self, kind: str) -> Iterator[dict[str, Any]]:
        if self.path is None or not self.path.exists():
            return
        for text in self.path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if kind in line and line["stamp"] == stamp(kind):
                yield line
