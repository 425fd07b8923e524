import pytest
from rich.console import Console

from bench import plots, table
from bench.readme import BEGIN, END, grouped, overview, page, replace_section
from bench.rows import PeerResult

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def text_of(rows):
    console = Console(width=240)
    with console.capture() as capture:
        table.print_rows(rows, console)
    return capture.get()


def line_of(text, word):
    return next(line for line in text.splitlines() if word in line)


def test_terminal_table(make_row, make_quant_row):
    text = text_of([make_row(), make_row(case="flash-64", peers={}), make_quant_row()])
    line = line_of(text, "flash-16")
    for cell in ("20.0", "19.0-22.0", "15% bytes", "25.0", "16.0 (0.80x)", "50.0 (2.00x)", "error"):
        assert cell in line
    assert "humming*" in text
    assert "deepgemm*" not in text
    assert "75% bytes" in line_of(text, "pro-4096")
    assert "act_quant on NVIDIA H200" in text


def test_a_peer_that_was_not_captured_is_marked(make_row):
    row = make_row(us=10.0, peers={"x": PeerResult(us=12.0, method="eager")})
    assert table.peer_cell(row, "x") == "12.0 eager (1.20x)"
    assert table.peer_cell(row, "y") == ""


def test_peer_errors_are_listed_once(make_row):
    assert table.peer_errors([make_row(), make_row(case="flash-64")]) == [
        "fp8_fp4_gemm: scaled_mm: RuntimeError: not supported"
    ]


def test_plot_of_both_panels(make_row, make_quant_row, tmp_path):
    rows = [make_row(), make_row(case="big", num_flops=10**12, us=900.0), make_quant_row()]
    plots.draw(rows, tmp_path / "new" / "both.png")
    plots.draw(rows[:1], tmp_path / "one.png")
    both, one = (tmp_path / "new" / "both.png").read_bytes(), (tmp_path / "one.png").read_bytes()
    assert both[:8] == one[:8] == PNG_SIGNATURE
    width = [int.from_bytes(png[16:20]) for png in (both, one)]
    assert width[0] == 2 * width[1]


def test_plot_of_rows_without_peers(make_quant_row, tmp_path):
    plots.draw([make_quant_row(peers={"x": PeerResult(error="gone")})], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_plot_refuses_several_gpus_and_none(make_row, tmp_path):
    other = make_row(machine={"gpu": "NVIDIA H100"})
    with pytest.raises(ValueError, match="rows of one GPU, got NVIDIA H100, NVIDIA H200"):
        plots.draw([make_row(), other], tmp_path / "x.png")
    with pytest.raises(ValueError, match="got none"):
        plots.draw([], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_page_says_which_rows_are_proved(make_row, make_quant_row):
    rows = [make_row(us=99.0), make_row(), make_row(case="flash-64", cuda_sha256="cd" * 32), make_quant_row()]
    section = page(grouped(rows), {("fp8_fp4_gemm", "n4096-k4096"): {"ab" * 32}})
    proved, changed = line_of(section, "| flash-16 |"), line_of(section, "| flash-64 |")
    assert proved.endswith("| yes |")
    assert changed.endswith("| later text |")
    assert "99.0" not in section  # superseded
    assert "| m 16 n 4096 k 4096 | 20.0 | 15% bytes | 25.0 | 16.0 (0.80x) |" in proved
    assert line_of(section, "| pro-4096 |").endswith("| 60.0 (1.50x) | no |")
    blocks = [block.splitlines() for block in section.split("\n\n") if block.startswith("|")]
    assert [len({line.count("|") for line in lines}) for lines in blocks] == [1] * 2  # two kernels
    assert "copy 3.00 TB/s, bf16 700 and e4m3 1300 TFLOP/s; 2026-01-02" in section


def test_readme_has_ranges_of_each_kernel_and_gpu_and_the_page_tables(make_row, make_quant_row):
    other = {"machine": {"gpu": "NVIDIA H100"}}
    groups = grouped([make_row(case="b", us=40.0), make_row(case="a"), make_row(**other), make_quant_row()])
    lines = overview(groups).splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| `act_quant`", "NVIDIA H200", "1"],
        ["| `fp8_fp4_gemm`", "NVIDIA H100", "1"],
        ["| `fp8_fp4_gemm`", "NVIDIA H200", "2"],
    ]
    assert "| 8% to 15% | deepgemm 0.40 to 0.80, humming 2.00 |" in lines[4]
    tables = page(groups, {})
    for kernel in ("act_quant", "fp8_fp4_gemm"):
        assert f"\n\n## {kernel}\n\n**{kernel}** on" in tables
    assert tables.count("**fp8_fp4_gemm** on") == 2


def test_readme_without_rows():
    assert overview(grouped([])) == "No results are recorded yet."
    assert page(grouped([]), {}).endswith("\n\nNo results are recorded yet.\n")


def test_section_between_markers_is_replaced():
    text = f"# title\n\n{BEGIN}\nold\n{END}\n\nrest\n"
    once = replace_section(text, "new")
    assert once == f"# title\n\n{BEGIN}\n\nnew\n\n{END}\n\nrest\n"
    assert replace_section(once, "new") == once


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_markers_must_be_there_once_in_order(text):
    with pytest.raises(ValueError, match="once each"):
        replace_section(text, "new")
