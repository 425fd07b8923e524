"""Reports: hints, the page, annotations, and replay scripts that the interpreter confirms."""

import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from verify import annotations, certificates, hints, html, replay
from verify.ir import Span
from verify.properties import all_properties
from verify.report import progress
from verify.tasks import Task
from verify.verdict import Counterexample, Finding, PropertyResult, VariantReport, Verdict

BROKEN = Path(__file__).parent / "broken"
SPAN = Span(str(Path("kernels/a,b.py").resolve()), 7, 3)
FOUND = Counterexample({"m": 1}, {"bx": 0}, {"tx": 5}, {"k": 2}, {"byte_address": 64}, "for k:\n  x[k]")


def report(*findings: Finding, verdict: Verdict = Verdict.REFUTED) -> VariantReport:
    prop = PropertyResult("bounds", verdict, findings=list(findings), assumptions=["<tensors> & shapes"])
    return VariantReport("kernel", "</script>", "ab" * 32, ("0 <= m",), {}, {"m": 1}, [prop])


REFUTED = report(Finding(Verdict.REFUTED, SPAN, "store, 100% outside\nof out", FOUND))


@pytest.mark.parametrize(
    ("is_terminal", "total", "shows"), [(True, 3, True), (True, 1, False), (False, 3, False)]
)
def test_a_bar_counts_variants_on_a_terminal(is_terminal, total, shows):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=is_terminal, width=80)
    with progress(console, total, "proving") as advance:
        for _ in range(total):
            advance()
    assert ("proving" in shown.getvalue()) == shows
    assert ("3/3" in shown.getvalue()) == shows


def test_every_property_has_a_hint():
    assert all(hints.hint(p.name) for p in all_properties())


def test_annotations_name_file_line_and_property_with_special_characters_escaped():
    (line,) = annotations.lines([REFUTED, REFUTED])
    assert line.startswith("::error title=REFUTED bounds,file=kernels/a%2Cb.py,line=7,col=3::")
    assert line.endswith("kernel/</script>: store, 100%25 outside%0Aof out%0Ashape: m=1")
    (unknown,) = annotations.lines([report(Finding(Verdict.UNKNOWN, None, "x"), verdict=Verdict.UNKNOWN)])
    assert unknown.startswith("::warning title=UNKNOWN bounds::")


class Page(HTMLParser):
    """Collects tags, links and the embedded data."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.data = ""
        self.in_data = False

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        names = dict(attrs)
        self.links += [v for k, v in names.items() if k in ("src", "href") and v]
        self.in_data = names.get("id") == "data"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.in_data = False

    def handle_data(self, data):
        if self.in_data:
            self.data += data


def test_the_page_is_one_file_with_every_verdict_and_what_it_rests_on(tmp_path):
    html.write(tmp_path / "page.html", [REFUTED], "REFUTED", 1.5)
    page = Page()
    page.feed((tmp_path / "page.html").read_text())
    assert not page.open
    assert not page.links  # nothing is loaded from elsewhere
    assert "link" not in page.tags
    data = json.loads(page.data)
    assert data["properties"] == ["bounds"]
    (variant,) = data["variants"]
    assert variant["name"] == "kernel/</script>"
    (prop,) = variant["properties"]
    assert prop["assumptions"] == ["<tensors> & shapes"]
    (finding,) = prop["findings"]
    assert "shape: m=1" in finding["lines"]
    assert finding["hint"] == hints.hint("bounds")


# The least of a browser that the page's script needs; prints what is shown after each click.
DOM = """
const element = (tag) => ({
  tag, children: [], listeners: {}, textContent: "",
  append(child) { this.children.push(child); },
  replaceChildren() { this.children = []; },
  addEventListener(name, call) { this.listeners[name] = call; },
});
const text = (node) => [node.textContent, ...node.children.map(text)].join(" ");
const all = (node, tag) =>
  (node.tag === tag ? [node] : []).concat(node.children.flatMap((child) => all(child, tag)));
const page = { matrix: element("table"), details: element("div"), data: element("script") };
page.data.textContent = DATA;
const document = { getElementById: (id) => page[id], createElement: element };
"""
CLICKS = """
const shown = all(page.matrix, "button").map((button) => {
  button.listeners.click();
  return [button.title, button.textContent, text(page.details)];
});
const heads = all(page.matrix, "th").map(text);
console.log(JSON.stringify({ shown, rows: all(page.matrix, "tr").length, heads }));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's script")
def test_every_verdict_of_the_library_can_be_clicked(tmp_path):
    reports = library()
    html.write(tmp_path / "page.html", reports, "PROVED", 1.0)
    text = (tmp_path / "page.html").read_text()
    page = Page()
    page.feed(text)
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    (tmp_path / "page.js").write_text(f"const DATA = {json.dumps(page.data)};" + DOM + script + CLICKS)
    done = subprocess.run(["node", tmp_path / "page.js"], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    names = list(dict.fromkeys(p.name for r in reports for p in r.properties))
    assert seen["rows"] == len(reports) + 1
    assert [h.strip() for h in seen["heads"][: len(names) + 2]] == ["variant", *names, "seconds"]
    clicked = {title: (verdict, details) for title, verdict, details in seen["shown"]}
    assert len(clicked) == sum(len(r.properties) for r in reports)
    for report in reports:
        for prop in report.properties:
            verdict, details = clicked[f"{report.kernel}/{report.variant} {prop.name}"]
            assert verdict == prop.verdict
            assert f"{prop.obligations} obligations" in details
            assert re.search(r"\d s\b", details)
            assert all(a in details for a in (*prop.assumptions, *report.contract))


def library() -> list[VariantReport]:
    """Return what the certificates say of one variant of each kernel."""
    found = []
    for folder in sorted(p for p in certificates.FOLDER.iterdir() if p.is_dir()):
        certificate = json.loads(min(folder.glob("*.json")).read_text())
        found.append(certificates.to_report(certificate))
    assert found
    return found


@pytest.fixture(scope="module")
def off_by_one(tmp_path_factory):
    from verify.cli import Options, run_task

    folder = tmp_path_factory.mktemp("replay")
    task = Task("fp4_quant_off_by_one", "fp4_quant", str(BROKEN / "fp4_quant_off_by_one.py"))
    return replay.write(run_task(task, Options(recheck=False, fresh=True, write=False)), task, folder)


def test_a_counterexample_replays_in_the_interpreter(off_by_one):
    assert [r.prop for r in off_by_one] == ["bounds"]
    assert off_by_one[0].confirmed
    assert off_by_one[0].by_run
    assert re.search(r"confirmed under .*off_by_one\.py:25: .*codes", off_by_one[0].note)


def test_the_script_runs_alone_and_says_so_by_its_exit_status(off_by_one):
    script = off_by_one[0].script
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=_environment())
    assert (run.returncode, "confirmed under" in run.stdout) == (0, True), run.stderr


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(BROKEN.parents[2])}


def test_a_sound_kernel_replays_nothing(tmp_path):
    path = tmp_path / "sound.py"
    path.write_text(
        'from tests.verify.samples import exponentials\nKERNELS = {"k": exponentials()}\nCONTRACTS = {}\n'
    )
    confirmed, note = again("sound", "k", path, "bounds")
    assert not confirmed
    assert "not confirmed" in note


def test_what_nobody_writes_and_what_the_tile_program_does_not_mean_is_shown():
    corpus = BROKEN.parent / "corpus"
    confirmed, note = again("lost_tail_bad", "kernel", corpus / "lost_tail_bad.py", "coverage")
    assert confirmed
    assert "256 of 1280 bytes of out are not written" in note


def again(kernel: str, variant: str, path: Path, prop: str) -> tuple[bool, str]:
    empty: dict[str, int] = {}
    return replay.replay(
        kernel=kernel,
        variant=variant,
        file=str(path),
        prop=prop,
        shape={"m": 1},
        block=empty,
        thread=empty,
        loops=empty,
        values=empty,
    )
