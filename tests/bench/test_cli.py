import sys

import pytest
from click.testing import CliRunner

from bench import cli, gpu_session, machine, precompile, readme, run
from bench.rows import write_rows
from tests.bench.fakes import make_spec


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setattr(run, "all_kernels", lambda: (make_spec(),))
    monkeypatch.setattr(machine, "has_gpu", lambda: False)

    def call(*arguments, command=cli.main):
        return CliRunner(env={"COLUMNS": "200"}).invoke(command, list(map(str, arguments)))

    return call


def test_list_needs_no_gpu(invoke):
    result = invoke("--list")
    assert result.exit_code == 0
    line = next(line for line in result.output.splitlines() if "double" in line)
    assert "small" in line
    assert "m=4 k=8" in line
    assert "torch_eager deepgemm" in line
    assert "odd" not in result.output


def test_without_a_gpu_it_says_so_and_exits_2(invoke, tmp_path):
    result = invoke("--out", tmp_path / "x.jsonl")
    assert result.exit_code == cli.EXIT_NO_GPU == 2
    assert "no NVIDIA GPU" in result.stderr
    assert not (tmp_path / "x.jsonl").exists()


def test_unknown_names_are_refused(invoke, monkeypatch):
    result = invoke("--list", "--kernel", "triple")
    assert result.exit_code == 2
    assert "there are: double" in result.output
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    assert "no peer nobody" in invoke("--peers", "deepgemm,nobody").output


def test_dims_are_a_case_of_their_own(invoke):
    result = invoke("--list", "--kernel", "double", "--dims", '{"m": 5, "k": 16}')
    assert result.exit_code == 0
    assert "m5-k16" in result.output
    assert "small" not in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--dims", '{"m": 5, "k": 16}'), "needs --kernel"),
        (("--kernel", "double", "--case", "small", "--dims", '{"m": 5, "k": 16}'), "without --case"),
        (("--kernel", "double", "--dims", '{"m": 5}'), "dims of double are k, m, got m"),
        (("--kernel", "double", "--dims", "m=5"), "--dims"),
    ],
)
def test_dims_that_name_no_case_are_refused(invoke, arguments, said):
    result = invoke("--list", *arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_only_what_cases_and_dims_take_is_compiled_ahead():
    kernels = ("fp8_gemm",)
    every = precompile.variants_of(kernels)
    cases = precompile.variants_of(kernels, ("m1-n1536-k4096", "m16-n1536-k4096"))
    assert [c.variant.id for c in cases] == ["n1536-k4096-e8m0-m16"]
    assert cases[0] in every
    other = precompile.variants_of(("fp8_fp4_gemm_widened",), dims=('{"m": 1024, "n": 4096, "k": 7168}',))
    assert [c.variant.id for c in other] == ["n4096-k7168"]


def test_table_and_plot_from_a_file(invoke, make_row, make_quant_row, tmp_path):
    write_rows(tmp_path / "in.jsonl", [make_row(us=77.0), make_row(), make_quant_row()])
    result = invoke(
        "--from", tmp_path / "in.jsonl", "--plot", tmp_path / "out.png", "--kernel", "fp8_fp4_gemm"
    )
    assert result.exit_code == 0
    assert "flash-16" in result.output
    assert "77.0" not in result.output
    assert "act_quant" not in result.output
    assert "RuntimeError: not supported" in result.output
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_broken_file_is_an_error_with_its_line(invoke, tmp_path):
    (tmp_path / "in.jsonl").write_text("{}\n")
    result = invoke("--from", tmp_path / "in.jsonl")
    assert result.exit_code == 1
    assert "in.jsonl:1" in result.output


def test_readme_check_fails_until_written(invoke, monkeypatch, make_row, tmp_path):
    monkeypatch.setattr(readme.bench_rows, "read_all", lambda: [make_row()])
    path, page = tmp_path / "README.md", tmp_path / "results.md"
    path.write_text(f"{readme.BEGIN}\n{readme.END}\n")
    files = "--readme", path, "--page", page
    assert invoke("--check", *files, command=readme.main).exit_code == 1
    assert make_row().kernel not in path.read_text()
    assert not page.exists()
    assert invoke(*files, command=readme.main).exit_code == 0
    assert f"`{make_row().kernel}`" in path.read_text()
    assert "flash-16" in page.read_text()
    assert invoke("--check", *files, command=readme.main).exit_code == 0
    page.write_text(page.read_text().replace("flash-16", "flash-17"))
    assert invoke("--check", *files, command=readme.main).exit_code == 1


@pytest.mark.parametrize(
    ("name", "slug"), [("NVIDIA H200", "nvidia-h200"), ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3")]
)
def test_slug(name, slug):
    assert machine.slug(name) == slug


def test_commit_variable_wins(monkeypatch):
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "abc")
    assert machine.commit() == "abc"


def test_session_stage_keeps_output_and_ends_in_time(tmp_path):
    words = gpu_session.Stage("words", [sys.executable, "-c", "print('here'); raise SystemExit(3)"], 20.0)
    assert gpu_session.run_stage(words, tmp_path / "words.log")[0] == 3
    assert (tmp_path / "words.log").read_text() == "here\n"
    endless = gpu_session.Stage(
        "endless", [sys.executable, "-c", "print('on'); import time; time.sleep(60)"], 1.0
    )
    status, seconds = gpu_session.run_stage(endless, tmp_path / "endless.log")
    assert status == 124
    assert seconds < 20
    assert (tmp_path / "endless.log").read_text() == "on\n"


def test_session_counts_tests(tmp_path):
    (tmp_path / "j.xml").write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure/></testcase>'
        '<testcase name="c"><skipped/></testcase></testsuite></testsuites>'
    )
    assert gpu_session.junit_counts(tmp_path / "j.xml") == "1 passed, 1 failed, 1 skipped\n  failed: b"
    assert gpu_session.junit_counts(tmp_path / "none.xml") == "no test report"
