"""What is recorded of the matrix products' text of today, a line a kernel: the table of docs/gemm/seen.md.

    python -m bench.seen

Today's text is that of the certificates, which `dsv4-verify` holds against the kernels. Takes no GPU and
lowers nothing.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import click

from bench import rows as bench_rows
from bench.rows import Row
from bench.status import Key, gpu_tested_digests, proved_digests

_FAMILY = "dsv4_kernels.gemm."
# Names of recorded tests: near the reference; a row has the bits of another batch; 20 calls of each size.
_REFERENCE, _BITS = ("reference ", "any rows "), ("rows ",)
_REPEATED = ("rows of 8192 ", "rows of experts ")
_GPUS = {"NVIDIA H200": "H200", "NVIDIA H100 80GB HBM3": "H100"}
HEAD = ("kernel", "proved", "near the reference", "a row's bits", "20 calls a batch", *_GPUS.values())

Tested = Sequence[Mapping[Key, set[str]]]  # by group of tests: digests whose recorded ones all passed


def tested_digests(prefixes: Iterable[str]) -> Mapping[Key, set[str]]:
    """Return the digests that passed recorded tests of one of these beginnings, by variant."""
    found: dict[Key, set[str]] = defaultdict(set)
    for prefix in prefixes:
        for key, digests in gpu_tested_digests(prefix=prefix).items():
            found[key] |= digests
    return found


def line(kernel: str, proved: Mapping[Key, set[str]], tested: Tested, rows: Iterable[Row]) -> list[str]:
    """Return a kernel's cells: of its proved variants how many passed, of its latest rows how many count."""
    mine = {key: digests for key, digests in proved.items() if key[0] == kernel}
    cells = [f"`{kernel}`", str(len(mine))]
    for passed in tested:
        cells.append(str(sum(bool(digests & passed.get(key, set())) for key, digests in mine.items())))
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
    proved, tested = proved_digests(), [tested_digests(names) for names in (_REFERENCE, _BITS, _REPEATED)]
    rows = bench_rows.latest(bench_rows.read_all())
    for cells in (HEAD, ["---"] * len(HEAD), *(line(name, proved, tested, rows) for name in kernels)):
        click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
