"""dsv4-verify: exit status, selection, JSON, files."""

import json
import re
from pathlib import Path

import pytest
import z3
from click.testing import CliRunner

from verify import certificates, cli, corpus, ops
from verify.mutate import measure, store

BROKEN = Path(__file__).parent / "broken"
SOUND = """
from tests.verify.samples import exponentials
KERNELS = {"exponentials": exponentials()}
CONTRACTS = {"exponentials": ("0 <= m", "m <= 65536")}
"""


@pytest.fixture
def sound(tmp_path):
    path = tmp_path / "sound.py"
    path.write_text(SOUND)
    return path


def run(*args: object):
    return CliRunner().invoke(cli.command, [str(a) for a in args])


def test_a_proved_file_exits_with_0_and_one_line_a_property(sound):
    result = run(sound)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    for name in ("overflow", "alignment", "bounds", "coverage"):
        assert any(f": PROVED {name}: " in line and "samples.py:" in line for line in lines), result.output
    assert "contract: 0 <= m; m <= 65536" in result.output
    assert "satisfied by: m=1" in result.output
    assert "1 variants: 1 PROVED" in result.output


def test_processes_share_variants_and_report_them_in_order(tmp_path):
    path = tmp_path / "two.py"
    names = ("second", "first")
    path.write_text(
        "from tests.verify.samples import exponentials\n"
        f"KERNELS = {{name: exponentials() for name in {names}}}\n"
        f"CONTRACTS = dict.fromkeys({names}, ('0 <= m', 'm <= 65536'))\n"
    )
    alone, shared = (run(path, "--json", "--recheck", "none", "-j", jobs) for jobs in (1, 2))
    assert alone.exit_code == shared.exit_code == 0, shared.output
    for result in (alone, shared):
        found = json.loads(result.output)["variants"]
        assert tuple(v["variant"] for v in found) == names
        assert {p["verdict"] for v in found for p in v["properties"]} == {"PROVED"}


def test_a_refuted_file_exits_with_1_and_says_where(tmp_path):
    result = run(BROKEN / "fp4_quant_off_by_one.py")
    assert result.exit_code == 1
    assert "fp4_quant_off_by_one.py:25:1: REFUTED bounds: load from codes inside codes" in result.output
    assert re.search(r"replay: dsv4-verify \S+ --variant \S+ --replay DIR", result.output)
    for text in ("shape: num_blocks=1", "block: bx=0", "loops: j=15", "byte_address: 128", "| blockIdx.x"):
        assert text in result.output, result.output


def test_json_holds_the_same(sound):
    result = run(BROKEN / "fp4_quant_off_by_one.py", "--json")
    document = json.loads(result.output)
    assert document["exit_code"] == result.exit_code == 1
    (variant,) = document["variants"]
    bounds = next(p for p in variant["properties"] if p["name"] == "bounds")
    example = bounds["findings"][0]["counterexample"]
    assert example["shape"] == {"num_blocks": 1}
    assert example["values"]["element"] == 32


def test_unsupported_alone_exits_with_2(sound, monkeypatch):
    monkeypatch.setattr(ops, "PURE", ops.PURE - {"exp2"})
    result = run(sound)
    assert result.exit_code == 2
    assert "UNSUPPORTED bounds: operation exp2" in result.output


def test_queries_are_stored_as_smt_lib(sound, tmp_path):
    assert run(sound, "--smt2", tmp_path / "queries").exit_code == 0
    stored = sorted((tmp_path / "queries" / "sound" / "exponentials").glob("*/*.smt2"))
    assert {p.parent.name for p in stored} >= {"bounds", "overflow", "coverage"}
    for path in stored:
        context = z3.Context()  # a file is a script of several questions
        answers = z3.Z3_eval_smtlib2_string(context.ref(), path.read_text())
        assert set(answers.split()) == {"unsat"}, answers


def test_the_summary_says_what_was_rechecked_and_how_long_it_took(sound):
    output = run(sound).output
    assert re.search(r"queries proved by z3: (\d+); proved again by cvc5: \1 \(100.0 %\)", output), output
    lowering = r"\(of it lowering by the compiler: median [0-9.]+ s\)"
    assert re.search(rf"1 checked: median [0-9.]+ s {lowering}, worst .* s \(.*/exponentials\);", output), (
        output
    )
    assert re.search(r"; of CPU: median [0-9.]+ s .*, sum [0-9]+ s; .* s in all", output), output


def test_one_solver_alone_is_a_choice(sound):
    result = run(sound, "--recheck", "none", "--json")
    (variant,) = json.loads(result.output)["variants"]
    assert all(not any("cvc5" in s for s in p["solvers"]) for p in variant["properties"])


@pytest.mark.parametrize(
    "args",
    [
        ("--kernel", "no_such_kernel"),
        # In one process: workers make no difference to what is wrong with these.
        ("--variant", "no_such_variant", "-j", "1"),
        ("--write", "--recheck", "none"),
        ("--mutate", "--operator", "no_such_operator", "-j", "1"),
        ("--mutate", "--kernel", "no_such_kernel", "-j", "1"),
    ],
)
def test_what_selects_nothing_is_an_error(args, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dsv4-verify", *args])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 3


def test_a_file_without_kernels_is_an_error(tmp_path, monkeypatch, capsys):
    path = tmp_path / "empty.py"
    path.write_text("")
    monkeypatch.setattr("sys.argv", ["dsv4-verify", str(path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 3
    assert "KERNELS" in capsys.readouterr().err


def test_certificates_are_written_used_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(certificates, "FOLDER", tmp_path)
    which = ("--kernel", "fp4_dequant", "-j", 1)
    assert run(*which, "--check").exit_code == 2
    assert run(*which, "--write").exit_code == 0
    assert run(*which, "--check").exit_code == 0
    again = run(*which)
    assert again.exit_code == 0
    assert "(certificate)" in again.output
    assert "(certificate)" not in run(*which, "--fresh").output


def test_a_failure_of_the_tool_exits_with_3(sound, monkeypatch, capsys):
    sound.write_text("KERNELS = {'k': 1}")
    monkeypatch.setattr("sys.argv", ["dsv4-verify", str(sound)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 3


@pytest.mark.parametrize("status", [0, 1])
def test_mutate_and_corpus_exit_as_their_goals_say(status, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(measure, "measure", lambda pool, request: asked.append(request) or status)
    monkeypatch.setattr(corpus, "run", lambda pool, *how: asked.append(how) or status)
    options = ("--json", "--replay", tmp_path, "-j", 1)
    more = ("--kernel", "a", "--operator", "b", "--results", tmp_path / "r.jsonl", "--minutes", 2)
    assert run("--mutate", *options, *more).exit_code == status
    assert run("--corpus", *options, "--html", tmp_path / "p.html").exit_code == status
    wanted = measure.Request(
        kernels=("a",),
        operators=("b",),
        results=tmp_path / "r.jsonl",
        minutes=2,
        replay=True,
        recorded=store.RECORDED,
        as_json=True,
    )
    assert asked == [wanted, ("json", tmp_path / "p.html", tmp_path)]
