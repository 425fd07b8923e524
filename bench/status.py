"""`make status`: what is recorded about every variant that ships, for the CUDA text it compiles to now.

A proof, a GPU test or a benchmark row counts for a variant only if it carries the digest of the
present text; one with another digest is stale.
"""

import json
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import rows as bench_rows
from bench.table import make_console

ROOT = Path(__file__).parents[1]
CERTIFICATES = ROOT / "verify" / "certificates"
TEST_RESULTS = ROOT / "tests" / "results"
_PROVED = "PROVED"
OUTPUTS_PREFIX = "outputs "  # of the name of a test that compared outputs with the interpreter's
_MAX_WORKERS = 8  # each holds a compiler, 500 MB

Key = tuple[str, str]  # kernel, variant
Digests = Mapping[Key, set[str]]


class State(StrEnum):
    """What a kind of record says of a variant."""

    CURRENT = "yes"
    STALE = "stale"
    MISSING = "no"


_STYLE = {State.CURRENT: "green", State.STALE: "yellow", State.MISSING: "dim"}


@dataclass(frozen=True)
class VariantStatus:
    """One variant and the state of each kind of record."""

    kernel: str
    variant: str
    cuda_sha256: str
    proved: State
    gpu_tested: State
    benchmarked: State
    outputs: State


def state(digest: str, recorded: Iterable[str]) -> State:
    """Return whether `digest` is among the recorded ones, others are, or none."""
    known = set(recorded)
    if digest in known:
        return State.CURRENT
    return State.STALE if known else State.MISSING


def status_of(
    key: Key, digest: str, proved: Digests, tested: Digests, benchmarked: Digests, outputs: Digests
) -> VariantStatus:
    """Return the status of one variant that compiles to `digest`."""
    kernel, variant = key
    kinds = (proved, tested, benchmarked, outputs)
    states = [state(digest, recorded.get(key, ())) for recorded in kinds]
    return VariantStatus(kernel, variant, digest, *states)


def proved_digests(folder: Path = CERTIFICATES) -> Digests:
    """Return the digests that certificates prove, by variant."""
    found: dict[Key, set[str]] = defaultdict(set)
    for path in sorted(folder.glob("*/*.json")):
        certificate = json.loads(path.read_text())
        verdicts = [p["verdict"] for p in certificate["properties"]]
        if verdicts and all(v == _PROVED for v in verdicts):
            found[certificate["kernel"], certificate["variant"]].add(certificate["cuda_sha256"])
    return found


def gpu_tested_digests(folder: Path = TEST_RESULTS, prefix: str = "") -> Digests:
    """Return the digests whose recorded GPU tests all passed, by variant.

    Args:
        folder: of the recorded results.
        prefix: only tests whose name starts with it.
    """
    passed: dict[Key, set[str]] = defaultdict(set)
    failed: set[tuple[Key, str]] = set()
    for path in sorted(folder.glob("*.jsonl")):
        for line in filter(str.strip, path.read_text().splitlines()):
            result: dict[str, Any] = json.loads(line)
            if not result.get("test", "").startswith(prefix):
                continue
            key = result["kernel"], result["variant"]
            if result["passed"]:
                passed[key].add(result["cuda_sha256"])
            else:
                failed.add((key, result["cuda_sha256"]))
    for key, digest in failed:
        passed[key].discard(digest)
    return passed


def benchmarked_digests(folder: Path = bench_rows.RESULTS) -> Digests:
    """Return the digests that rows were measured with, by variant."""
    found: dict[Key, set[str]] = defaultdict(set)
    for row in bench_rows.read_all(folder):
        found[row.kernel, row.variant].add(row.cuda_sha256)
    return found


def current_digest(kernel: str, variant_id: str) -> str:
    """Lower one variant and return the digest of its CUDA text; takes about a second, no GPU."""
    from dsv4_kernels.registry import get_kernel
    from dsv4_kernels.tile.corrections import corrected
    from verify.extract import extract

    spec = get_kernel(kernel)
    variant = next(v for v in spec.variants if v.id == variant_id)
    with corrected():
        return extract(spec.make_kernel(**variant.kwargs)).cuda_sha256


def all_statuses(console: Console) -> list[VariantStatus]:
    """Lower every variant, several at a time, and look its digest up."""
    from dsv4_kernels.registry import all_kernels

    recorded = gpu_tested_digests(prefix=OUTPUTS_PREFIX)
    records = proved_digests(), gpu_tested_digests(), benchmarked_digests(), recorded
    keys = [(spec.name, variant.id) for spec in all_kernels() for variant in spec.variants]
    # Spawned, not forked: the compiler runs threads of its own.
    context = multiprocessing.get_context("spawn")
    workers = min(os.cpu_count() or 1, _MAX_WORKERS, len(keys))
    with ProcessPoolExecutor(max(workers, 1), mp_context=context) as pool:
        lowered = pool.map(current_digest, *zip(*keys, strict=True)) if keys else iter(())
        digests = list(track(lowered, "lowering", total=len(keys), console=console, transient=True))
    return [status_of(key, digest, *records) for key, digest in zip(keys, digests, strict=True)]


def status_table(statuses: Iterable[VariantStatus]) -> Table:
    """Return one line a variant."""
    table = Table("kernel", "variant", "CUDA text", "proved", "GPU-tested", "benchmarked", "outputs recorded")
    for s in statuses:
        states = (f"[{_STYLE[x]}]{x}[/]" for x in (s.proved, s.gpu_tested, s.benchmarked, s.outputs))
        table.add_row(s.kernel, s.variant, s.cuda_sha256[:12], *states)
    return table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of a table.")
@click.option("--check", is_flag=True, help="Exit 1 unless every variant is proved as it is now.")
def main(as_json: bool, check: bool) -> None:
    """Show what is proved, GPU-tested and benchmarked, and whose outputs are recorded."""
    statuses = all_statuses(Console(stderr=True))
    if as_json:
        click.echo(json.dumps([asdict(s) for s in statuses], indent=2))
    else:
        console = make_console()
        console.print(status_table(statuses))
        counts = {
            name: sum(getattr(s, name) is State.CURRENT for s in statuses)
            for name in ("proved", "gpu_tested", "benchmarked", "outputs")
        }
        console.print(f"{len(statuses)} variants: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    if check and any(s.proved is not State.CURRENT for s in statuses):
        sys.exit(1)


if __name__ == "__main__":
    main()
