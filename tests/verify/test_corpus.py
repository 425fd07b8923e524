"""The corpus: each bad kernel is refuted by the property that it names, and its good twin passes it."""

import json

import pytest

from verify import corpus, replay
from verify.engine import check_kernel
from verify.properties import all_properties
from verify.tasks import Task, TaskError, Workers
from verify.verdict import Finding, PropertyResult, VariantReport, Verdict

ENTRIES = corpus.entries()
PROPERTIES = {p.name: p for p in all_properties()}
# Large products: `dsv4-verify --corpus` checks them with all the others.
SLOW = ("fragment_view", "fence_registers", "float4_descriptor", "pipelined_view")


def task_of(entry: corpus.Entry) -> Task:
    return Task(entry.path.stem, "kernel", str(entry.path))


def answer(entry: corpus.Entry, name: str) -> PropertyResult:
    loaded = task_of(entry).load()
    report = check_kernel(
        entry.path.stem,
        "kernel",
        loaded.prim_func,
        loaded.contract,
        loaded.dims,
        recheck=False,
        properties=[PROPERTIES[name]],
        pass_configs=loaded.pass_configs,
    )
    return report.properties[0]


@pytest.mark.parametrize(
    "entry",
    [e for e in ENTRIES if e.prop in PROPERTIES and e.issue not in SLOW],
    ids=lambda e: e.path.stem,
)
def test_a_known_fault_is_refuted_and_its_repair_is_not(entry):
    refuted = answer(entry, entry.prop)
    assert refuted.verdict is Verdict.REFUTED, refuted.findings
    for finding in refuted.findings:
        shown = replay.confirmed(task_of(entry), finding.counterexample, entry.prop, finding.message)
        assert shown.confirmed, shown.note
    twin = corpus.Entry.read(entry.path.with_name(f"{entry.issue}_good.py"))
    good = answer(twin, entry.prop)
    # A property that rests on others is UNKNOWN when it is checked alone, without a finding of its own.
    assert all("rests on" in f.message for f in good.findings), good.findings


def test_every_bad_kernel_has_a_good_one_and_the_other_way_round():
    kinds = {}
    for entry in ENTRIES:
        kinds.setdefault(entry.issue, set()).add(entry.expected)
    assert all(k == {Verdict.REFUTED, Verdict.PROVED} for k in kinds.values()), kinds


def report(verdict: Verdict, name: str = "race") -> VariantReport:
    return VariantReport("k", "v", "", (), {}, {}, [PropertyResult(name, verdict)])


def test_the_figure_counts_the_named_property_alone(tmp_path):
    (tmp_path / "1_bad.py").write_text("# REFUTED race: no barrier\n")
    (tmp_path / "1_good.py").write_text("# PROVED: a barrier\n")
    bad, good = corpus.entries(tmp_path)
    proved, refuted = report(Verdict.PROVED), report(Verdict.REFUTED)
    assert corpus.rate([bad, good], [refuted, proved]) == 100
    assert corpus.rate([bad, good], [proved, proved]) == 50
    assert corpus.rate([bad, good], [report(Verdict.REFUTED, "bounds"), proved]) == 50
    assert corpus.rate([bad, good], [report(Verdict.UNKNOWN), report(Verdict.UNKNOWN)]) == 0


def test_a_first_line_that_does_not_fit_is_an_error(tmp_path):
    for name, line in (("1_bad", "# PROVED: x"), ("1_good", "# REFUTED race: x"), ("1_bad", "import os")):
        (tmp_path / f"{name}.py").write_text(line + "\n")
        with pytest.raises(TaskError, match="first line"):
            corpus.entries(tmp_path)
        (tmp_path / f"{name}.py").unlink()
    with pytest.raises(TaskError, match="no corpus"):
        corpus.entries(tmp_path)


@pytest.mark.parametrize(("verdict", "status"), [(Verdict.REFUTED, 0), (Verdict.PROVED, 1)])
def test_the_command_prints_the_figure(tmp_path, monkeypatch, capsys, verdict, status):
    one_bad_file(tmp_path, monkeypatch, verdict)
    assert corpus.run(Workers(1, None)) == status
    shown = capsys.readouterr().out
    assert f"{1 - status} of 1 bad ones are REFUTED" in shown
    assert ("NOT AS EXPECTED" in shown) == bool(status)


@pytest.mark.parametrize("confirmed", [True, False])
def test_the_command_fails_where_a_refutation_does_not_replay(tmp_path, monkeypatch, capsys, confirmed):
    one_bad_file(tmp_path, monkeypatch, Verdict.REFUTED)
    done = replay.Replayed("race", tmp_path / "script.py", confirmed, confirmed, "what it showed")
    monkeypatch.setattr(corpus, "replay_report", lambda *args: [done])
    status = corpus.run(Workers(1, None), folder=tmp_path)
    shown = capsys.readouterr().out
    assert status == 1 - confirmed
    assert f"replay: {int(confirmed)} of 1 REFUTED are confirmed" in shown
    assert ("what it showed" in shown) != confirmed


def test_the_command_writes_json_annotations_and_a_page(tmp_path, monkeypatch, capsys):
    one_bad_file(tmp_path, monkeypatch, Verdict.UNKNOWN)
    assert corpus.run(Workers(1, None), "json", tmp_path / "page.html") == 1
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == 1
    assert document["files"] == [{"file": "1_bad.py", "expected": "REFUTED race", "met": False}]
    assert "dsv4-verify: UNKNOWN" in (tmp_path / "page.html").read_text()
    assert corpus.run(Workers(1, None), "github") == 1
    assert "as expected: 0.0 %" in capsys.readouterr().out


def one_bad_file(folder, monkeypatch, verdict: Verdict) -> None:
    (folder / "1_bad.py").write_text("# REFUTED race: no barrier\n")
    monkeypatch.setattr(corpus, "entries", lambda: [corpus.Entry.read(folder / "1_bad.py")])
    monkeypatch.setattr(corpus, "run_entry", lambda entry, options: report(verdict))


def test_what_is_not_as_expected_is_listed_with_its_reason(tmp_path):
    (tmp_path / "1_good.py").write_text("# PROVED: a barrier\n")
    entries = corpus.entries(tmp_path)
    unknown = report(Verdict.UNKNOWN)
    unknown.properties[0].findings.append(Finding(Verdict.UNKNOWN, None, "cannot say"))
    assert corpus.reasons(entries, [unknown]) == ["1_good: UNKNOWN race: cannot say"]
    assert corpus.reasons(entries, [report(Verdict.PROVED)]) == []


def test_what_is_left_out_is_listed_with_its_reason():
    lines = corpus.left_out()
    assert any(line.startswith("not here: 2609, 2714: ") for line in lines)
    assert all(len(line) > len("not here: 1: ") for line in lines)
