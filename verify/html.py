"""One self-contained page: kernels x properties; a click shows assumptions, obligations, times, findings."""

import json
from collections.abc import Sequence
from pathlib import Path
from string import Template

from verify.hints import hint
from verify.report import describe, relative, summary_lines
from verify.verdict import PropertyResult, VariantReport

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>dsv4-verify: $verdict</title>
<style>
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 110rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } p { margin: .3rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .5rem; text-align: left; white-space: nowrap; border-bottom: 1px solid #8884; }
th.turned { font-weight: 600; font-size: .85rem; }
td button { font: inherit; font-size: .8rem; width: 100%; min-width: 6.2rem; cursor: pointer;
  border: 1px solid #0003; border-radius: .25rem; padding: .1rem .3rem; color: #000; }
.PROVED { background: #9fd8a8; } .REFUTED { background: #f2938c; font-weight: 700; }
.UNKNOWN { background: #f3d27a; } .UNSUPPORTED { background: #d5b3ea; }
#details { border-top: 2px solid #8888; padding-top: .5rem; }
pre { overflow-x: auto; background: #8881; padding: .5rem; }
button:focus-visible { outline: 2px solid #36c; }
</style>
</head>
<body>
<h1>dsv4-verify: <span class="$verdict">&nbsp;$verdict&nbsp;</span></h1>
$summary
<div class="scroll"><table id="matrix"></table></div>
<div id="details" aria-live="polite"><p>Choose a verdict to see what it rests on.</p></div>
<script type="application/json" id="data">$data</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const make = (tag, text, parent, name) => {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  if (name) node.className = name;
  if (parent) parent.append(node);
  return node;
};
const list = (title, items, parent) => {
  if (!items.length) return;
  make("h3", title, parent);
  const ul = make("ul", null, parent);
  for (const item of items) make("li", item, ul);
};
const show = (variant, prop) => {
  const box = document.getElementById("details");
  box.replaceChildren();
  make("h2", variant.name + ": " + prop.name + " " + prop.verdict, box);
  make("p", prop.cost, box);
  make("p", "CUDA text " + (variant.cuda || "(not lowered)") + "; " + variant.origin, box);
  for (const f of prop.findings) {
    make("h3", f.verdict + " " + f.place + " " + f.message, box);
    if (f.lines.length) make("pre", f.lines.join("\\n"), box);
    if (f.hint) make("p", "hint: " + f.hint, box);
  }
  list("assumptions", prop.assumptions, box);
  list("clauses that the proofs used", prop.used, box);
  list("notes", prop.notes, box);
  list("contract", variant.contract, box);
  if (variant.witness) make("p", "satisfied by " + variant.witness, box);
  list("clauses that no proof needed", variant.unused, box);
};
const table = document.getElementById("matrix");
const head = make("tr", null, make("thead", null, table));
make("th", "variant", head).scope = "col";
for (const name of data.properties) make("th", name, head, "turned").scope = "col";
make("th", "seconds", head).scope = "col";
const body = make("tbody", null, table);
for (const variant of data.variants) {
  const row = make("tr", null, body);
  make("th", variant.name, row).scope = "row";
  for (const name of data.properties) {
    const prop = variant.properties.find((p) => p.name === name);
    const cell = make("td", prop ? null : "", row);
    if (!prop) continue;
    const button = make("button", prop.verdict, cell, prop.verdict);
    button.type = "button";
    button.title = variant.name + " " + name;
    button.addEventListener("click", () => show(variant, prop));
  }
  make("td", variant.seconds, row);
}
</script>
</body>
</html>
""")


def write(path: Path, reports: Sequence[VariantReport], verdict: str, seconds: float) -> None:
    """Write the page of `reports`."""
    names = dict.fromkeys(p.name for r in reports for p in r.properties)
    data = {"properties": list(names), "variants": [_variant(r) for r in reports]}
    # Inside a script element only the end of one may not appear; `<!--` would open a comment.
    text = json.dumps(data).replace("<", "\\u003c")
    summary = "\n".join(f"<p>{_escaped(line)}</p>" for line in summary_lines(reports, seconds))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_PAGE.substitute(verdict=verdict, summary=summary, data=text), encoding="utf-8")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _variant(report: VariantReport) -> dict[str, object]:
    return {
        "name": f"{report.kernel}/{report.variant}",
        "cuda": report.cuda_sha256[:16],
        "origin": "from its certificate" if report.reused else f"checked in {report.seconds:.1f} s",
        "seconds": "certificate" if report.reused else f"{report.seconds:.1f}",
        "contract": list(report.contract),
        "witness": ", ".join(f"{k}={v}" for k, v in report.witness.items()),
        "unused": report.unused_clauses,
        "properties": [_property(p) for p in report.properties],
    }


def _property(result: PropertyResult) -> dict[str, object]:
    solved = ", ".join(f"{name}: {count}" for name, count in result.solvers.items())
    cost = f"{result.obligations} obligations, {result.queries} queries, {result.rlimit} resource units"
    return {
        "name": result.name,
        "verdict": str(result.verdict),
        "cost": cost + (f" ({solved})" if solved else "") + f", {result.seconds:.2f} s",
        "assumptions": result.assumptions,
        "used": result.used,
        "notes": result.notes,
        "findings": [
            {
                "verdict": str(f.verdict),
                "place": f"{relative(f.span.path)}:{f.span.line}" if f.span else "",
                "message": f.message,
                "lines": describe(f.counterexample) if f.counterexample else [],
                "hint": hint(result.name),
            }
            for f in result.findings
        ],
    }
