import json

import pytest
from rich.console import Console

from bench import status
from bench.rows import write_rows
from bench.status import State

KEY = ("act_quant", "b128")


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [(["aa"], State.CURRENT), (["bb", "aa"], State.CURRENT), (["bb"], State.STALE), ([], State.MISSING)],
)
def test_state(recorded, expected):
    assert status.state("aa", recorded) is expected


def test_status_of_reads_each_kind_for_its_own_variant():
    found = status.status_of(KEY, "aa", {KEY: {"aa"}}, {KEY: {"bb"}}, {("act_quant", "b64"): {"aa"}}, {})
    assert (found.proved, found.gpu_tested, found.benchmarked) == (State.CURRENT, State.STALE, State.MISSING)


def test_only_proved_certificates_count(tmp_path):
    folder = tmp_path / "act_quant"
    folder.mkdir()
    for variant, verdict in (("b128", "PROVED"), ("b64", "UNKNOWN")):
        properties = [{"name": "overflow", "verdict": "PROVED"}, {"name": "bounds", "verdict": verdict}]
        names = {"kernel": "act_quant", "variant": variant, "cuda_sha256": "aa"}
        certificate = {**names, "properties": properties}
        (folder / f"{variant}.json").write_text(json.dumps(certificate))
    assert status.proved_digests(tmp_path) == {KEY: {"aa"}}


def test_one_failed_gpu_test_withdraws_a_digest(tmp_path):
    def line(digest, passed):
        return json.dumps({"kernel": "act_quant", "variant": "b128", "cuda_sha256": digest, "passed": passed})

    (tmp_path / "nvidia-h200.jsonl").write_text(
        "\n".join([line("aa", True), line("aa", False), line("bb", True)])
    )
    assert status.gpu_tested_digests(tmp_path) == {KEY: {"bb"}}
    assert status.gpu_tested_digests(tmp_path / "none") == {}


def test_benchmarked_digests(make_quant_row, tmp_path):
    write_rows(
        tmp_path / "nvidia-h200.jsonl", [make_quant_row(cuda_sha256="aa"), make_quant_row(cuda_sha256="bb")]
    )
    assert status.benchmarked_digests(tmp_path) == {KEY: {"aa", "bb"}}


def test_table_shows_every_state():
    statuses = [status.status_of(KEY, "aabbccddeeff0011", {KEY: {"aabbccddeeff0011"}}, {KEY: {"x"}}, {}, {})]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(status.status_table(statuses))
    line = next(line for line in capture.get().splitlines() if "act_quant" in line)
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells == ["act_quant", "b128", "aabbccddeeff", "yes", "stale", "no", "no"]
