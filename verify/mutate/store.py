"""Outcomes kept in a file, one JSON line each, as they are found; a later run takes up what still holds.

The results of the last whole run lie beside this module (`RECORDED`), compressed, one line for each class and
each instance's listing, so that a clean clone reports them; lines that hold no longer are checked again.
"""

import hashlib
import json
import lzma
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from verify.certificates import verifier_sha256
from verify.mutate.classes import Listed, Listing

RECORDED = Path(__file__).parent / "recorded.jsonl.xz"
_STAMP_CHARACTERS = 16
_KEPT_CHARACTERS = 400  # of a text in recorded results
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

    Attributes:
        path: what is added to; None: nothing.
        recorded: compressed results that are read before it; None: none.
    """

    path: Path | None = None
    recorded: Path | None = None

    def outcomes(self, sources: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Return the fields of outcomes by class, of instances whose source is still the given one."""
        return {
            line["outcome"]["key"]: line["outcome"]
            for line in self._lines("outcome")
            if sources.get(line["outcome"]["instance"]) == line["source"]
        }

    def listings(self, sources: Mapping[str, str]) -> dict[str, Listing]:
        """Return the mutants by instance, likewise."""
        return {
            line["instance"]: Listing(
                line["form"], tuple(Listed(line["instance"], *item) for item in line["listed"])
            )
            for line in self._lines("listed")
            if sources.get(line["instance"]) == line["source"]
        }

    def seconds(self) -> dict[str, float]:
        """Return what a mutant of each kernel took in the mean, also of lines that hold no longer."""
        spent: dict[str, list[float]] = {}
        for line in map(json.loads, self._text().splitlines()):
            if "outcome" in line:
                kernel = line["outcome"]["instance"].partition("/")[0]
                spent.setdefault(kernel, []).append(line["outcome"]["seconds"])
        return {kernel: sum(found) / len(found) for kernel, found in spent.items()}

    def add_outcome(self, source: str, outcome: Any) -> None:
        """Append one outcome (a dataclass)."""
        self._append("outcome", {"source": source, "outcome": asdict(outcome)})

    def add_listing(self, source: str, instance: str, found: Listing) -> None:
        """Append the mutants of an instance."""
        listed = [(item.operator, item.number, item.key) for item in found.mutants]
        self._append("listed", {"source": source, "instance": instance, "form": found.form, "listed": listed})

    def record(self, path: Path, sources: Mapping[str, str], keys: frozenset[str]) -> None:
        """Write what holds of these instances and classes to a compressed file, one line for each."""
        listings, outcomes = self.listings(sources), self.outcomes(sources)
        lines = [
            {
                "stamp": stamp("listed"),
                "source": sources[name],
                "instance": name,
                "form": found.form,
                "listed": [(item.operator, item.number, item.key) for item in found.mutants],
            }
            for name, found in sorted(listings.items())
        ]
        for key in sorted(keys & outcomes.keys()):
            fields = {n: _shortened(v) for n, v in outcomes[key].items()}
            if fields["replayed"] is not None:
                fields["model"] = None  # it was for the replay
            lines.append(
                {"stamp": stamp("outcome"), "source": sources[fields["instance"]], "outcome": fields}
            )
        path.write_bytes(lzma.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))

    def _append(self, kind: str, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:  # one write: lines of processes do not mix
            file.write(json.dumps({"stamp": stamp(kind), **line}) + "\n")

    def _lines(self, kind: str) -> Iterator[dict[str, Any]]:
        for text in self._text().splitlines():
            line = json.loads(text)
            if kind in line and line["stamp"] == stamp(kind):
                yield line

    def _text(self) -> str:
        found = ""
        if self.recorded is not None and self.recorded.exists():
            found = lzma.decompress(self.recorded.read_bytes()).decode()
        if self.path is not None and self.path.exists():
            found += self.path.read_text(encoding="utf-8")
        return found


def _shortened(value: Any) -> Any:
    return value[:_KEPT_CHARACTERS] if isinstance(value, str) else value
