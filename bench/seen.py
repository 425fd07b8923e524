"""What is recorded of the matrix products' text of today, a line a kernel: the table of docs/gemm/seen.md.

    python -m bench.seen

Today's text is that of the certificates, which `dsv4-verify` holds against the kernels. Takes no GPU and
lowers nothing.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import click

from bench import rows as bench_rows
from bench.rows import Row
from bench.status import TEST_RESULTS, Key, proved_digests

_FAMILY = "dsv4_kernels.gemm."
# Names of recorded tests: near the reference; a row has the bits of another batch; 20 calls of each size.
_REFERENCE, _BITS = ("reference ", "any rows "), ("rows ",)
_REPEATED = ("rows of 8192 ", "rows of experts ")
_GPUS = {"NVIDIA H200": "H200", "NVIDIA H100 80GB HBM3": "H100"}
HEAD = ("kernel", "proved", "near the reference", "a row's bits", "20 calls a batch", *_GPUS.values())

Recorded = Mapping[Key, Mapping[str, set[str]]]  # test -> digests of texts that passed it


def recorded_tests(folder: Path = TEST_RESULTS) -> Recorded:
    """Return the texts that passed each recorded test, by variant."""
    found: dict[Key, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in sorted(folder.glob("*.jsonl")):
        for line in filter(str.strip, path.read_text().splitlines()):
            result = json.loads(line)
            if result["passed"]:
                found[result["kernel"], result["variant"]][result["test"]].add(result["cuda_sha256"])
    return found


def passed(tests: Mapping[str, set[str]], names: tuple[str, ...], digests: set[str]) -> bool:
    """Return whether one of these texts passed a test whose name begins so."""
    return any(test.startswith(names) and digests & texts for test, texts in tests.items())


def line(kernel: str, proved: Mapping[Key, set[str]], recorded: Recorded, rows: Iterable[Row]) -> list[str]:
    """Return a kernel's cells: of its proved variants how many passed, of its latest rows how many count."""
    mine = {key: digests for key, digests in proved.items() if key[0] == kernel}
    cells = [f"`{kernel}`", str(len(mine))]
    for names in (_REFERENCE, _BITS, _REPEATED):
        cells.append(str(sum(passed(recorded.get(key, {}), names, digests) for key, digests in mine.items())))
    for gpu in _GPUS:
        own = [r for r in rows if (r.kernel, r.gpu) == (kernel, gpu) and (kernel, r.variant) in mine]
        now = [r for r in own if r.cuda_sha256 in mine[kernel, r.variant]]
        beside = [r for r in now if any(peer.us for peer in r.peers.values())]
        cells.append(f"{len(beside)}, {len(now)}, {len(own)}")
    return cells


@click.command()
def main() -> None:
    """Print the table; of rows: how many are of today's text and beside a peer, of today's text, and all."""
    from dsv4_kernels.registry import all_kernels

    kernels = [k.name for k in all_kernels() if k.make_kernel.__module__.startswith(_FAMILY)]
    proved, recorded = proved_digests(), recorded_tests()
    rows = bench_rows.latest(bench_rows.read_all())
    for cells in (HEAD, ["---"] * len(HEAD), *(line(name, proved, recorded, rows) for name in kernels)):
        click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
