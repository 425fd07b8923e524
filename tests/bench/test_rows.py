import json

import pytest

from bench.rows import PeerResult, RowError, latest, parse_row, read_all, read_rows, write_rows


def test_round_trip_keeps_every_field(make_row, make_quant_row, tmp_path):
    rows = [make_row(), make_quant_row()]
    write_rows(tmp_path / "deep" / "nvidia-h200.jsonl", rows)
    assert read_rows(tmp_path / "deep" / "nvidia-h200.jsonl") == rows
    assert read_all(tmp_path / "deep") == rows
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["nvidia-h200.jsonl"]


def test_missing_file_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "none.jsonl") == []


def test_fraction_of_limit_is_written_and_derived(make_row):
    row = make_row(us=20.0, limit_us=3.0)
    data = json.loads(row.to_json())
    assert data["fraction_of_limit"] == pytest.approx(0.15)
    data["fraction_of_limit"] = 0.9  # an edited file must not change the claim
    assert parse_row(json.dumps(data)).fraction_of_limit == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 1}, "unknown fields: speed"),
        ({"us": None}, ""),
        ({"peers": {"deepgemm": {"time": 1}}}, "time"),
    ],
)
def test_wrong_fields_are_refused(make_row, change, message):
    data = json.loads(make_row().to_json())
    data.update(change)
    if data["us"] is None:
        del data["us"]
        message = "us"
    with pytest.raises(RowError, match=message):
        parse_row(json.dumps(data))


def test_error_names_file_and_line(make_row, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(make_row().to_json() + "\n\nnot json\n")
    with pytest.raises(RowError, match=r"x\.jsonl:3: "):
        read_rows(path)


def test_latest_row_of_a_case_counts(make_row):
    old, other, new = make_row(us=30.0), make_row(case="flash-64"), make_row(us=20.0)
    elsewhere = make_row(machine={"gpu": "NVIDIA H100"})
    assert latest([old, other, elsewhere, new]) == [new, other, elsewhere]


def test_rates(make_quant_row, make_row):
    assert make_quant_row(num_bytes=80_000_000, us=40.0).gbps == pytest.approx(2000)
    assert make_row(num_flops=2_000_000_000, us=20.0).tflops == pytest.approx(100)


def test_speedup_holds_a_casting_peer_against_the_chain(make_row):
    row = make_row()
    assert row.speedup("deepgemm") == pytest.approx(16 / 20)
    assert row.speedup("humming") == pytest.approx(50 / 25)
    assert row.speedup("scaled_mm") is None
    assert row.speedup("absent") is None
    assert make_row(chain_us=None, peers={"x": PeerResult(us=1.0, casts_input=True)}).speedup("x") is None
