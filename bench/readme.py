"""`make readme`: write what is recorded: a line a kernel and GPU into README.md, every case into docs."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from bench import rows as bench_rows
from bench.rows import Row
from bench.status import ROOT, Digests, State, proved_digests, state
from bench.table import peer_cell, peer_labels

README = ROOT / "README.md"
RESULTS_PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- results: begin (make readme) -->", "<!-- results: end -->"
_NONE = "No results are recorded yet."
_PAGE_HEAD = """# Results

Every recorded case, latest rows only; made by `make readme` from `bench/results`. Ratios in brackets are a
peer's time over ours: over 1, ours is faster. *Of limit* is the larger of bytes over copy bandwidth and
operations over matmul rate, both measured in the same run, over our time. *proved* is about the text that was
timed; where that is "later text", the kernel was compiled otherwise since, and what is proved (and tested on
the GPU) is its text of today.
"""
# Whether the text that was timed is proved; STALE: only the text that the variant has now, which is another.
_PROVED = {State.CURRENT: "yes", State.STALE: "later text", State.MISSING: "no"}
# Proved by suites, which are of no text: what they prove, and what is open, the design note says.
_BY_SUITES = {"mega_moe": "[in part](megamoe.md#proof-map)"}


Groups = Mapping[str, Mapping[str, Sequence[Row]]]  # kernel, GPU


def grouped(rows: Sequence[Row]) -> Groups:
    """Return the latest row of each case by kernel and GPU, in their order."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(bench_rows.latest(rows), key=lambda row: (row.kernel, row.gpu)):
        groups.setdefault(row.kernel, {}).setdefault(row.gpu, []).append(row)
    return groups


def page(groups: Groups, proved: Digests) -> str:
    """Return a page of Markdown: a table of all cases for each kernel and GPU."""
    sections = [
        "\n\n".join([f"## {name}", *(_kernel_table(rows, proved) for rows in gpus.values())])
        for name, gpus in groups.items()
    ]
    return "\n\n".join([_PAGE_HEAD.rstrip(), *(sections or [_NONE])]) + "\n"


def overview(groups: Groups) -> str:
    """Return a table: a line for each kernel and GPU, with ranges over the cases of each kernel."""
    if not groups:
        return _NONE
    lines = [
        _line(["kernel", "GPU", "cases", "of limit", "peers"]),
        _line(["---", "---", "---:", "---:", "---"]),
    ]
    for name, gpus in groups.items():
        for gpu, rows in gpus.items():
            fractions = [row.fraction_of_limit for row in rows]
            limit = f"{min(fractions):.0%} to {max(fractions):.0%}"
            peers = ", ".join(text for label in peer_labels(rows) if (text := _range(rows, label)))
            lines.append(_line([f"`{name}`", gpu, str(len(rows)), limit, peers]))
    return "\n".join(lines)


def _range(rows: Sequence[Row], label: str) -> str:
    """Return the least and the largest ratio beside a peer; nothing where there is none."""
    ratios = [ratio for row in rows if (ratio := row.speedup(label)) is not None]
    if not ratios:
        return ""
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return f"{label} {low if low == high else f'{low} to {high}'}"


def _kernel_table(rows: Sequence[Row], proved: Digests) -> str:
    newest = rows[-1]
    labels = peer_labels(rows)
    chain = any(row.chain_us is not None for row in rows)
    heading = ["case", "dims", "µs", "of limit", *(["chain µs"] if chain else []), *labels, "proved"]
    lines = [
        f"**{newest.kernel}** on {newest.gpu} ({_ceilings(newest)}; {newest.date[:10]})",
        "",
        _line(heading),
        _line(["---", "---", *["---:"] * (len(heading) - 3), "---"]),
    ]
    for row in rows:
        cells = [
            row.case,
            " ".join(f"{name} {value}" for name, value in row.dims.items()),
            f"{row.us:.1f}",
            f"{row.fraction_of_limit:.0%} {row.limited_by}",
        ]
        if chain:
            cells.append("" if row.chain_us is None else f"{row.chain_us:.1f}")
        certified = _PROVED[state(row.cuda_sha256, proved.get((row.kernel, row.variant), ()))]
        peers = [peer_cell(row, label) for label in labels]
        lines.append(_line([*cells, *peers, _BY_SUITES.get(row.kernel, certified)]))
    return "\n".join(lines)


def _ceilings(row: Row) -> str:
    c = row.ceilings
    return (
        f"copy {c['copy_gbps'] / 1e3:.2f} TB/s, bf16 {c['bf16_tflops']:.0f} and "
        f"e4m3 {c['e4m3_tflops']:.0f} TFLOP/s"
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def replace_section(text: str, section: str) -> str:
    """Return `text` with what stands between the markers replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README: requires {BEGIN} and then {END}, once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{section}\n\n{END}{rest.split(END)[1]}"


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if a file is not what would be written.")
@click.option("--readme", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=README)
@click.option("--page", "page_path", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS_PAGE)
def main(check: bool, readme: Path, page_path: Path) -> None:
    """Write the overview into README.md and the tables of all cases into docs/results.md."""
    groups = grouped(bench_rows.read_all())
    wanted = {
        readme: replace_section(readme.read_text(), overview(groups)),
        page_path: page(groups, proved_digests()),
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if check and stale:
        click.echo(f"{', '.join(path.name for path in stale)}: not current: run make readme", err=True)
        sys.exit(1)
    for path in stale:
        path.write_text(wanted[path])
        click.echo(f"wrote {path.name}")


if __name__ == "__main__":
    main()
