"""Rows of the fused expert layer: bytes, operations, limit; what is not right is not timed."""

from dataclasses import replace

import pytest

from bench import readme
from bench.megamoe import TOPK, UNFUSED, Form, row_of
from bench.peak import Ceilings
from bench.rows import parse_row
from bench.run import Origin
from bench.timer import Timing

COPY_GBPS, E4M3_TFLOPS = 2500.0, 1400.0
CEILINGS = Ceilings(COPY_GBPS, 700.0, E4M3_TFLOPS)
ORIGIN = Origin(CEILINGS, {"gpu": "some GPU"}, "abc", "2026-11-27T00:00:00+00:00")
FLASH = 3 * 4096 * 2048  # weights of an expert
FP4, FP8 = FLASH // 2 + FLASH // 32, FLASH + FLASH // 128**2  # with their scales


def row(form, tokens, touched, us=100.0):
    timing = Timing(us, us - 1, us + 1, 50, "graph")
    return row_of(form, tokens, touched, timing, replace(timing, us=3 * us), "0123", ORIGIN)


@pytest.mark.parametrize(
    ("form", "weights"),
    [
        (Form("flash"), 5 * FP4),
        (Form("flash", "fp8"), 5 * FP8),
        (Form("flash", "fp4", True), 5 * FP4 + FP8),
    ],
)
def test_bytes_are_weights_of_touched_experts_and_rows(form, weights):
    rows = 7 * (4096 + 4096 // 128 + 2 * 4096 + TOPK * (4 + 4))
    assert form.num_bytes(7, 5) == weights + rows


def test_a_shared_expert_is_one_more_of_a_token():
    flops = Form("pro").num_flops(10)
    assert flops == 10 * 6 * 3 * 2 * 7168 * 3072
    assert Form("pro", shared=True).num_flops(10) * 6 == flops * 7


def test_few_tokens_are_held_against_bytes_and_many_against_operations():
    few, many = row(Form("flash"), 8, 32), row(Form("flash"), 8192, 32)
    assert few.limited_by == "bytes"
    assert few.limit_us == pytest.approx(few.num_bytes / COPY_GBPS / 1e3)
    assert many.limited_by == "flops"
    assert many.limit_us == pytest.approx(many.num_flops / E4M3_TFLOPS / 1e6)


def test_a_row_is_one_of_a_results_file():
    found = parse_row(row(Form("pro", "fp8", True), 512, 48).to_json())
    assert (found.kernel, found.case, found.variant) == ("mega_moe", "pro-fp8-shared-t512", "pro-fp8-shared")
    assert found.speedup(UNFUSED) == pytest.approx(3.0)


def test_the_page_says_that_suites_prove_it():
    text = readme.page(readme.grouped([row(Form("flash"), 8, 32)]), {})
    (line,) = [part for part in text.splitlines() if "flash-fp4-t8" in part]
    assert "[in part](megamoe.md#proof-map)" in line
    assert "300.0 (3.00x)" in line
