"""Results as tables for a terminal."""

import os
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from bench.rows import Row
from bench.timer import EAGER

_LOG_WIDTH = 200  # columns where output is no terminal
_NOTE = (
    "us: median of CUDA-graph replays with a cold L2. limit: the larger of bytes / copy bandwidth and "
    "flops / matmul rate, measured in the same run. (x): the peer's time over ours; over 1, ours is faster. "
    "chain: ours with the kernel before or after it (cast and product, parts and fold); peers marked * do "
    "the work of both in their call and are held against it."
)


def make_console() -> Console:
    """Return a console as wide as the terminal, or wide enough for every table in a log."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=_LOG_WIDTH)


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print a table for each GPU and kernel, then what the columns mean."""
    for gpu, kernel in dict.fromkeys((row.gpu, row.kernel) for row in rows):
        console.print(kernel_table([r for r in rows if (r.gpu, r.kernel) == (gpu, kernel)]))
    if rows:
        console.print(_NOTE, style="dim")


def kernel_table(rows: Sequence[Row]) -> Table:
    """Return the table of rows of one kernel on one GPU."""
    labels = peer_labels(rows)
    chain = any(row.chain_us is not None for row in rows)
    computes = any(row.num_flops for row in rows)
    table = Table(title=f"{rows[0].kernel} on {rows[0].gpu}", title_justify="left")
    table.add_column("case", no_wrap=True)
    rate = "TFLOP/s" if computes else "GB/s"
    for heading in ("us", "p20-p80", rate, "of limit", *(["chain us"] if chain else [])):
        table.add_column(heading, justify="right")
    for label in labels:
        casts = any(row.peers[label].casts_input for row in rows if label in row.peers)
        # One word a line: a peer's column is as wide as its figures.
        table.add_column(
            label.replace("/", "\n").replace("-", "-\n") + ("*" if casts else ""), justify="right"
        )
    for row in rows:
        cells = [
            row.case,
            f"{row.us:.1f}",
            f"{row.p20_us:.1f}-{row.p80_us:.1f}",
            f"{row.tflops if computes else row.gbps:.0f}",
            f"{row.fraction_of_limit:.0%} {row.limited_by}",
        ]
        if chain:
            cells.append("" if row.chain_us is None else f"{row.chain_us:.1f}")
        table.add_row(*cells, *(peer_cell(row, label) for label in labels))
    return table


def peer_cell(row: Row, label: str) -> str:
    """Return a peer's time and speedup, `error`, or nothing; `eager` where its call could not be captured."""
    peer = row.peers.get(label)
    if peer is None:
        return ""
    ratio = row.speedup(label)
    if peer.us is None:
        return "error"
    time = f"{peer.us:.1f}" + (" eager" if peer.method == EAGER else "")
    return time if ratio is None else f"{time} ({ratio:.2f}x)"


def peer_errors(rows: Iterable[Row]) -> list[str]:
    """Return one line for each distinct error of a peer."""
    return list(
        dict.fromkeys(
            f"{row.kernel}: {label}: {peer.error}"
            for row in rows
            for label, peer in row.peers.items()
            if peer.error
        )
    )


def peer_labels(rows: Iterable[Row]) -> list[str]:
    """Return the labels of every peer in `rows`, in order of first appearance."""
    return list(dict.fromkeys(label for row in rows for label in row.peers))
