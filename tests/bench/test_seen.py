"""What the table of records counts: tests and rows of today's text alone."""

from bench import seen

KEY = ("fp8_gemm", "m64")


def test_only_texts_of_today_count(make_row):
    tested = [{KEY: {"old"}}, {KEY: {"old", "now"}}, {KEY: {"old", "now"}}]
    named = {"kernel": KEY[0], "variant": KEY[1], "machine": {**make_row().machine, "gpu": "NVIDIA H200"}}
    rows = [make_row(**named, cuda_sha256="now"), make_row(**named, cuda_sha256="old")]
    cells = seen.line(KEY[0], {KEY: {"now"}, ("bf16_gemm", "m64"): {"now"}}, tested, rows)
    assert cells[:5] == ["`fp8_gemm`", "1", "0", "1", "1"]
    assert [cell.split(", ")[1:] for cell in cells[5:]] == [["1", "2"], ["0", "0"]]
