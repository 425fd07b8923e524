"""Recorded results: one JSON object a line, one line a measured case.

A row joins a proof certificate and a GPU test through `cuda_sha256`, the identity of the CUDA text
that ran. Files only grow: the latest row of a (gpu, kernel, case) is the one that counts.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SUFFIX = ".jsonl"


class RowError(ValueError):
    """A line of a results file is not a row."""


@dataclass(frozen=True)
class PeerResult:
    """What a peer took for the same case, or why there is no figure.

    Attributes:
        us: median time; None where `error` says why.
        p20_us, p80_us: 20th and 80th percentile.
        method: how it was timed, `graph` or `eager`.
        note: what its call does that ours does not, or the other way round.
        casts_input: its call also does what ours leaves to another kernel, such as the cast of the input;
            held against our `chain_us`.
        error: first line of what went wrong; empty where nothing did.
    """

    us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    method: str = ""
    note: str = ""
    casts_input: bool = False
    error: str = ""


@dataclass(frozen=True)
class Row:
    """One case of one kernel on one GPU, checked against the reference before it was timed.

    Attributes:
        kernel, variant, case: names; the variant is the one that the dispatcher chose.
        dims: of the public function.
        us, p20_us, p80_us: median and 20th and 80th percentile of `replays` replays.
        method: `graph` (CUDA-graph replay) or `eager` (the call could not be captured).
        checked: `bitwise`, or `tolerance`: every output compared with the reference.
        worst_error: largest error as a fraction of its bound; 0 where equal bit for bit.
        num_bytes, num_flops: least that any implementation must move and compute.
        limit_us: the larger of num_bytes / copy bandwidth and num_flops / matmul rate, as measured.
        limited_by: which of the two: `bytes` or `flops`.
        chain_us: our time with the other kernel of the chain (the cast of the input; the fold of parts of
            attention), for peers whose call includes its work.
        peers: by label.
        ceilings: `copy_gbps`, `bf16_tflops`, `e4m3_tflops`, measured in the same run.
        cuda_sha256: of the CUDA text that ran.
        machine: GPU, driver and versions.
        commit, date: of the code, and when it ran (UTC).
    """

    kernel: str
    variant: str
    case: str
    dims: Mapping[str, int]
    us: float
    p20_us: float
    p80_us: float
    replays: int
    method: str
    checked: str
    worst_error: float
    num_bytes: int
    num_flops: int
    limit_us: float
    limited_by: str
    cuda_sha256: str
    ceilings: Mapping[str, float]
    machine: Mapping[str, str]
    commit: str
    date: str
    chain_us: float | None = None
    peers: Mapping[str, PeerResult] = field(default_factory=dict)

    @property
    def gpu(self) -> str:
        """Name of the GPU."""
        return self.machine["gpu"]

    @property
    def fraction_of_limit(self) -> float:
        """Speed as a fraction of what the measured ceilings allow."""
        return self.limit_us / self.us

    @property
    def gbps(self) -> float:
        """Necessary bytes over time, in 1e9 bytes a second."""
        return self.num_bytes / self.us / 1e3

    @property
    def tflops(self) -> float:
        """Necessary operations over time, in 1e12 a second."""
        return self.num_flops / self.us / 1e6

    def speedup(self, label: str) -> float | None:
        """Return a peer's time over ours for the same work: over 1, ours is faster; None without a figure."""
        peer = self.peers.get(label)
        ours = self.chain_us if peer and peer.casts_input else self.us
        return None if peer is None or peer.us is None or ours is None else peer.us / ours

    @property
    def key(self) -> tuple[str, str, str]:
        """What a later row of supersedes an earlier one."""
        return self.gpu, self.kernel, self.case

    def to_json(self) -> str:
        """Return the row as one line, without the line's end."""
        data = asdict(self)
        data["fraction_of_limit"] = round(self.fraction_of_limit, 4)  # for readers of the file
        return json.dumps(data, sort_keys=True)


def parse_row(line: str) -> Row:
    """Return the row of one line.

    Raises:
        RowError: it is not JSON, or a field is missing or unknown.
    """
    try:
        data: dict[str, Any] = json.loads(line)
        data.pop("fraction_of_limit", None)  # derived
        data["peers"] = {label: PeerResult(**peer) for label, peer in data.get("peers", {}).items()}
        unknown = data.keys() - {f.name for f in fields(Row)}
        if unknown:
            raise RowError(f"unknown fields: {', '.join(sorted(unknown))}")
        return Row(**data)
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise RowError(str(error)) from error


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, oldest first; none if there is no such file.

    Raises:
        RowError: naming the file and line.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.strip():
            try:
                rows.append(parse_row(line))
            except RowError as error:
                raise RowError(f"{path}:{number}: {error}") from error
    return rows


def read_all(folder: Path = RESULTS) -> list[Row]:
    """Return the rows of every results file of a folder."""
    return [row for path in sorted(folder.glob(f"*{SUFFIX}")) for row in read_rows(path)]


def latest(rows: Iterable[Row]) -> list[Row]:
    """Return the last row of each (gpu, kernel, case), in order of first appearance."""
    newest: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        newest[row.key] = row
    return list(newest.values())


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the file by these rows, so that a run that is cut short leaves whole lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(path.suffix + ".part")
    scratch.write_text("".join(row.to_json() + "\n" for row in rows))
    os.replace(scratch, path)
