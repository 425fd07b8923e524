"""Rooflines: what the chip reaches, where our kernels lie under it, and where peers lie."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is all that is made
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.rows import Row
from bench.table import peer_labels

_OURS = "#b00020"
_PEERS = ("#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
_MARKERS = "sD^vP*Xh"
_INTENSITIES = (1.0, 1e4)  # flops a byte, the axis where no row is wider


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw rows of one GPU into a PNG: matmuls under a roofline, the others under the copy bandwidth.

    Raises:
        ValueError: no rows, or rows of several GPUs, whose ceilings differ.
    """
    gpus = sorted({row.gpu for row in rows})
    if len(gpus) != 1:
        raise ValueError(f"draw: requires rows of one GPU, got {', '.join(gpus) or 'none'}")
    compute = [row for row in rows if row.num_flops]
    memory = [row for row in rows if not row.num_flops]
    panels: list[tuple[Callable[[Axes, Sequence[Row]], None], list[Row]]] = []
    if compute:
        panels.append((_draw_roofline, compute))
    if memory:
        panels.append((_draw_bandwidth, memory))
    figure = Figure(figsize=(8.5 * len(panels), 6.5), layout="constrained")
    for axes, (paint, part) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        paint(axes, part)
        axes.grid(True, which="both", color="0.9")
        axes.set_axisbelow(True)
        axes.legend(fontsize=8, loc="lower right")
    figure.suptitle(f"{gpus[0]}: medians of CUDA-graph replays, cold L2, ceilings measured in the same run")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw_roofline(axes: Axes, rows: Sequence[Row]) -> None:
    """TFLOP/s over flops a byte. A peer that moves more bytes is drawn at the intensity of the problem."""
    ceilings = rows[-1].ceilings
    intensity = [row.num_flops / row.num_bytes for row in rows]
    left, right = min(*intensity, _INTENSITIES[0]), max(*intensity, _INTENSITIES[1])
    slope = ceilings["copy_gbps"] / 1e3  # TFLOP/s at one flop a byte
    for name, shade in (("bf16", "0.55"), ("e4m3", "black")):
        rate = ceilings[f"{name}_tflops"]
        axes.plot(
            [left, rate / slope, right],
            [left * slope, rate, rate],
            color=shade,
            label=f"{name} {rate:.0f} TFLOP/s",
        )
    axes.annotate(
        f"copy {ceilings['copy_gbps'] / 1e3:.2f} TB/s",
        (left * 3, left * 3 * slope),
        rotation=40,
        ha="right",
        va="bottom",
        fontsize=8,
    )
    _scatter_peers(axes, intensity, [row.num_flops / 1e6 for row in rows], rows)
    _scatter_ours(axes, intensity, [row.tflops for row in rows], rows)
    axes.set(xscale="log", yscale="log", xlabel="necessary flops / necessary byte", ylabel="TFLOP/s")
    axes.set_title("matmuls")


def _draw_bandwidth(axes: Axes, rows: Sequence[Row]) -> None:
    """Necessary bytes a second over necessary bytes."""
    sizes = [row.num_bytes / 1e6 for row in rows]
    bandwidth = rows[-1].ceilings["copy_gbps"]
    axes.axhline(bandwidth, color="black", label=f"copy {bandwidth:.0f} GB/s")
    _scatter_peers(axes, sizes, [row.num_bytes / 1e3 for row in rows], rows)
    _scatter_ours(axes, sizes, [row.gbps for row in rows], rows)
    axes.set(xscale="log", xlabel="necessary MB", ylabel="GB/s")
    axes.set_ylim(bottom=0)
    axes.set_title("bound by bytes")


def _scatter_peers(axes: Axes, x: Sequence[float], work: Sequence[float], rows: Sequence[Row]) -> None:
    """Draw each peer's work a microsecond."""
    for label, color, marker in _peer_styles(rows):
        points = [
            (at, done / us)
            for at, done, row in zip(x, work, rows, strict=True)
            if (us := _peer_us(row, label))
        ]
        axes.scatter(
            *zip(*points, strict=True), s=26, marker=marker, facecolors="none", edgecolors=color, label=label
        )


def _scatter_ours(axes: Axes, x: Sequence[float], y: Sequence[float], rows: Sequence[Row]) -> None:
    for index, kernel in enumerate(dict.fromkeys(row.kernel for row in rows)):
        points = [(a, b) for a, b, row in zip(x, y, rows, strict=True) if row.kernel == kernel]
        marker = "o<>p"[index % 4]
        axes.scatter(
            *zip(*points, strict=True), s=42, marker=marker, color=_OURS, label=f"{kernel} (ours)", zorder=3
        )


def _peer_styles(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return (label, colour, marker) of each peer with a figure."""
    labels = [label for label in peer_labels(rows) if any(_peer_us(row, label) for row in rows)]
    return [(name, _PEERS[i % len(_PEERS)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(labels)]


def _peer_us(row: Row, label: str) -> float | None:
    peer = row.peers.get(label)
    return peer.us if peer else None
