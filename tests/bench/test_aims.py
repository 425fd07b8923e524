"""How rows stand against the aims: which rows count, and what a ratio is held against."""

from dataclasses import replace

import pytest
from click.testing import CliRunner

from bench import aims
from bench.rows import PeerResult, Row, write_rows

ROW = Row(
    kernel="fp8_gemm",
    variant="v",
    case="m1024-n1536-k4096",
    dims={"m": 1024, "n": 1536, "k": 4096},
    us=20.0,
    p20_us=19.0,
    p80_us=21.0,
    replays=50,
    method="graph",
    checked="tolerance",
    worst_error=0.1,
    num_bytes=40_000_000,
    num_flops=1,
    limit_us=10.0,
    limited_by="bytes",
    cuda_sha256="aa",
    ceilings={"copy_gbps": 2000.0},
    machine={"gpu": "g"},
    commit="c",
    date="d",
    peers={"deepgemm": PeerResult(us=19.0)},
)


def _aim(text):
    return next(a for a in aims.AIMS if a.text.startswith(text))


def test_a_row_reaches_misses_or_is_unknown():
    faster = replace(ROW, case="m4096-n1536-k4096", peers={"deepgemm": PeerResult(us=30.0)})
    silent = replace(ROW, case="other", peers={"deepgemm": PeerResult(error="timed out")})
    few = replace(ROW, dims={**ROW.dims, "m": 1})
    found = aims.standing(_aim("FP8, m >= 1024"), [ROW, faster, silent, few])
    assert found.reached == [(faster, 1.5)]
    assert found.missed == [(ROW, 0.95)]
    assert found.unknown == [silent]
    assert found.line() == "| FP8, m >= 1024: DeepGEMM | 1.00 | 1 of 2 (1 unknown) | 0.95, 1.23, 1.50 |"


def test_fp4_products_count_in_the_form_that_is_taken():
    peers = {"humming/gemm": PeerResult(us=18.0)}
    folded = replace(ROW, kernel="fp8_fp4_gemm_folded", dims={"m": 1024, "n": 4096, "k": 4096}, peers=peers)
    widened = replace(folded, kernel="fp8_fp4_gemm_widened")
    narrow = replace(folded, dims={"m": 1024, "n": 1536, "k": 4096})
    many = aims.standing(_aim("FP4, m >= 1024"), [folded, widened, narrow])
    assert [row for row, _ in many.missed] == [widened, narrow]
    few = [replace(row, dims={**row.dims, "m": 128}) for row in (folded, widened)]
    assert [row for row, _ in aims.standing(_aim("FP4, m <= 128"), few).missed] == few[:1]


def test_the_best_of_several_peers_counts():
    row = replace(ROW, peers={"a": PeerResult(us=40.0), "b": PeerResult(us=30.0), "c": PeerResult()})
    assert aims.against("a", "b", "c")(row, []) == 1.5
    assert aims.against("c")(row, []) is None


def test_bytes_count_against_the_copy_of_the_same_run():
    assert aims.of_copy(ROW, []) == 1.0


@pytest.mark.parametrize(("peer_us", "least"), [(20.0, 1.0), (26.0, 1.15), (None, 1.15)])
def test_a_peer_at_the_limit_of_bytes_asks_for_less(peer_us, least):
    row = replace(ROW, peers={"humming/gemm": PeerResult(us=peer_us)})
    assert aims._grouped_fp4_least(row) == least


def test_uneven_batches_are_held_against_the_even_one():
    even = replace(ROW, kernel="grouped_fp8_gemm", case="t512-n1-k1", dims={"spread": 1})
    uneven = replace(even, case="t512-n1-k1-uneven", dims={"spread": 2}, us=25.0)
    aim = _aim("uneven")
    assert aims.standing(aim, [even, uneven]).reached == [(uneven, 0.8)]
    assert aims.standing(aim, [even, replace(uneven, us=27.0)]).missed[0][1] == pytest.approx(20 / 27)
    assert aims.standing(aim, [uneven]).unknown == [uneven]


def test_the_program_prints_a_table_and_what_is_missed(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [ROW])
    done = CliRunner().invoke(aims.main, ["--from", str(tmp_path / "rows.jsonl"), "--rows"])
    assert done.exit_code == 0
    assert "| FP8, m >= 1024: DeepGEMM | 1.00 | 0 of 1 | 0.95, 0.95, 0.95 |" in done.output
    assert "fp8_gemm m1024-n1536-k4096 20.0 us, 0.95 of 1.00" in done.output
