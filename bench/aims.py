"""How the matrix products stand against their aims, from recorded rows.

    python -m bench.aims [--from FILE] [--rows]

An aim is a ratio that a row has to reach: a peer's time over ours, or bytes moved over what a copy moves in
the same run. Prints how many rows reach each, and with `--rows` every row that does not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click

from bench.rows import RESULTS, Row, latest, read_rows
from dsv4_kernels.gemm.fold import is_widened

FEW, MANY = 128, 1024  # tokens up to and from which the aims differ
_LARGE_BYTES = 32 << 20  # of weights
_COPY_SHARE = 0.8
_UNEVEN = 1.3  # times the even batch, at most
Ratio = Callable[[Row, Sequence[Row]], float | None]


@dataclass(frozen=True)
class Aim:
    """One line.

    Attributes:
        text: what is asked, for people.
        kernels: whose rows it concerns.
        applies: to which of those.
        ratio: of a row, given all rows; None where what it is held against has no figure.
        least: ratio to reach, of a row given all.
    """

    text: str
    kernels: tuple[str, ...]
    applies: Callable[[Row], bool]
    ratio: Ratio
    least: Callable[[Row], float]


def against(*labels: str) -> Ratio:
    """Return the time of the best of these peers over ours."""

    def ratio(row: Row, rows: Sequence[Row]) -> float | None:
        found = [r for label in labels if (r := row.speedup(label)) is not None]
        return min(found) if found else None

    return ratio


def of_copy(row: Row, rows: Sequence[Row]) -> float:
    """Return necessary bytes over time, as a share of the copy bandwidth of the same run."""
    return row.gbps / row.ceilings["copy_gbps"]


def of_even(row: Row, rows: Sequence[Row]) -> float | None:
    """Return the time of the even batch of the same work over that of a batch with empty experts."""
    even = row.case.replace("-uneven", "").replace("-one", "")
    same = [r for r in rows if (r.gpu, r.kernel, r.case) == (row.gpu, row.kernel, even)]
    return same[0].us / row.us if same else None


def _peer_of_copy(row: Row, label: str) -> float:
    """Return necessary bytes over a peer's time, as a share of the copy bandwidth."""
    peer = row.peers.get(label)
    return row.num_bytes / peer.us / 1e3 / row.ceilings["copy_gbps"] if peer and peer.us else 0.0


def _tokens(row: Row) -> int:
    """Return the tokens of a grouped batch, from its case's name; 0 of others."""
    head = row.case.split("-")[0]
    return int(head[1:]) if head.startswith("t") else 0


def _is_even(row: Row) -> bool:
    return row.dims.get("spread", 1) == 1


def _is_taken(row: Row) -> bool:
    """Return whether a row is of the form of the FP4 product that `fp4_linear` takes for its dims."""
    return is_widened(*(row.dims[name] for name in ("m", "n", "k"))) == (row.kernel == "fp8_fp4_gemm_widened")


def _fixed(least: float) -> Callable[[Row], float]:
    return lambda row: least


def _grouped_fp4_least(row: Row) -> float:
    return 1.0 if _peer_of_copy(row, "humming/gemm") >= _COPY_SHARE else 1.15


_BF16 = ("bf16_gemm", "narrow_gemm", "router_gemm", "wo_a_bf16")
_GROUPED = ("grouped_fp8_gemm", "grouped_fp8_fp4_gemm", "grouped_fp8_fp4_gemm_exact")
_FP8, _FP4 = ("fp8_gemm",), ("fp8_fp4_gemm_folded", "fp8_fp4_gemm_widened")
AIMS = (
    Aim("FP8, m >= 1024: DeepGEMM", _FP8, lambda r: r.dims["m"] >= MANY, against("deepgemm"), _fixed(1.0)),
    Aim("FP8, m <= 128: DeepGEMM", _FP8, lambda r: r.dims["m"] <= FEW, against("deepgemm"), _fixed(1.15)),
    Aim(
        "FP8, m <= 128, weights over 32 MiB: copy bandwidth",
        _FP8,
        lambda r: r.dims["m"] <= FEW and r.dims["n"] * r.dims["k"] > _LARGE_BYTES,
        of_copy,
        _fixed(_COPY_SHARE),
    ),
    Aim(
        "FP4, m <= 128: Humming",
        _FP4,
        lambda r: r.dims["m"] <= FEW and _is_taken(r),
        against("humming/gemm"),
        _fixed(1.25),
    ),
    Aim(
        "FP4, m >= 1024: Humming",
        _FP4,
        lambda r: r.dims["m"] >= MANY and _is_taken(r),
        against("humming/gemm"),
        _fixed(1.1),
    ),
    Aim(
        "grouped FP8: DeepGEMM contiguous",
        _GROUPED[:1],
        lambda r: _is_even(r),
        against("deepgemm/contiguous"),
        _fixed(1.0),
    ),
    Aim(
        "grouped FP8: DeepGEMM masked (4096 x 2048: 1.1)",
        _GROUPED[:1],
        lambda r: _is_even(r) and "deepgemm/masked" in r.peers,
        against("deepgemm/masked"),
        lambda r: 1.1 if (r.dims["n"], r.dims["k"]) == (4096, 2048) else 1.0,
    ),
    Aim(
        "grouped FP4: Humming (1.0 where it moves 80 % of copy)",
        _GROUPED[1:2],
        _is_even,
        against("humming/gemm"),
        _grouped_fp4_least,
    ),
    Aim(
        "grouped FP4, T <= 64: DeepGEMM masked FP8",
        _GROUPED[1:2],
        lambda r: _is_even(r) and 0 < _tokens(r) <= 64,
        against("deepgemm/masked"),
        _fixed(1.6),
    ),
    Aim(
        "grouped FP4, T = 8192: 1250 TFLOP/s",
        _GROUPED[1:2],
        lambda r: _tokens(r) == 8192,
        lambda r, rows: r.tflops / 1250,
        _fixed(1.0),
    ),
    Aim(
        "bf16, m >= 1024: cuBLAS", _BF16, lambda r: r.dims["m"] >= MANY, against("torch_matmul"), _fixed(0.95)
    ),
    Aim("bf16, m below: cuBLAS", _BF16, lambda r: r.dims["m"] < MANY, against("torch_matmul"), _fixed(0.9)),
    Aim(
        "wo_a FP8, m = 64 and 4096: DeepGEMM",
        ("wo_a_fp8",),
        lambda r: r.dims["m"] in (64, 4096),
        against("deepgemm"),
        _fixed(1.0),
    ),
    Aim(
        "mHC, m >= 4096: DeepGEMM's better form",
        ("mhc_gemm",),
        lambda r: r.dims["m"] >= 4096,
        against("deepgemm/split", "deepgemm/whole"),
        _fixed(1.1),
    ),
    Aim(
        "mHC, m <= 64: DeepGEMM in 16 parts",
        ("mhc_gemm",),
        lambda r: r.dims["m"] <= 64,
        against("deepgemm/split"),
        _fixed(1.0),
    ),
    Aim(
        "uneven or empty experts: the even batch, in 1.3x its time",
        _GROUPED,
        lambda r: not _is_even(r) and _tokens(r) > 0,
        of_even,
        _fixed(1 / _UNEVEN),
    ),
)


@dataclass(frozen=True)
class Standing:
    """What recorded rows say of an aim.

    Attributes:
        aim: which.
        reached, missed: (row, ratio) of each; rows without a figure are in neither.
        unknown: rows that have nothing to be held against.
    """

    aim: Aim
    reached: list[tuple[Row, float]]
    missed: list[tuple[Row, float]]
    unknown: list[Row]

    def line(self) -> str:
        """Return the line of the table."""
        ratios = [ratio for _, ratio in (*self.reached, *self.missed)]
        least = sorted({f"{self.aim.least(row):.2f}" for row, _ in (*self.reached, *self.missed)})
        spread = f"{min(ratios):.2f}, {median(ratios):.2f}, {max(ratios):.2f}" if ratios else "-"
        count = f"{len(self.reached)} of {len(ratios)}" + (
            f" ({len(self.unknown)} unknown)" if self.unknown else ""
        )
        return f"| {self.aim.text} | {' or '.join(least)} | {count} | {spread} |"


def standing(aim: Aim, rows: Sequence[Row]) -> Standing:
    """Return how `rows` stand against an aim."""
    found = Standing(aim, [], [], [])
    for row in rows:
        if row.kernel in aim.kernels and aim.applies(row):
            ratio = aim.ratio(row, rows)
            if ratio is None:
                found.unknown.append(row)
            else:
                (found.reached if ratio >= aim.least(row) else found.missed).append((row, ratio))
    return found


@click.command()
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=RESULTS / "nvidia-h100-80gb-hbm3.jsonl",
    show_default=True,
    help="Results file.",
)
@click.option("--rows", "with_rows", is_flag=True, help="Print each row that misses its aim, too.")
def main(source: Path, with_rows: bool) -> None:
    """Print how the matrix products stand against their aims."""
    rows = latest(read_rows(source))
    click.echo("| aim | least | reached | lowest, median, highest |\n|---|---|---|---|")
    found = [standing(aim, rows) for aim in AIMS]
    for one in found:
        click.echo(one.line())
    if with_rows:
        for one in found:
            for row, ratio in sorted(one.missed, key=lambda pair: pair[1]):
                click.echo(
                    f"{one.aim.text}: {row.kernel} {row.case} {row.us:.1f} us,"
                    f" {ratio:.2f} of {one.aim.least(row):.2f}"
                )


if __name__ == "__main__":
    main()
