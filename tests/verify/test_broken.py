"""Broken kernels: each is refuted by the property that its first line names, at the line that is wrong."""

from pathlib import Path
from typing import Any

import pytest

from dsv4_kernels.contract import Contract
from verify import replay
from verify.engine import check_kernel
from verify.tasks import Task, load_file
from verify.verdict import Verdict

FOLDER = Path(__file__).parent / "broken"
FILES = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_broken_kernel_is_refuted_where_it_is_broken(path):
    source = path.read_text().splitlines()
    verdict, name = source[0].removeprefix("# ").split(":")[0].split()
    marked = next(n for n, line in enumerate(source, 1) if "# broken here" in line)
    module = load_file(path)
    ((kernel, prim_func),) = module.KERNELS.items()
    contract = Contract(module.CONTRACTS[kernel])
    report = check_kernel(kernel, path.stem, prim_func, contract, {}, fresh=True)
    assert report.verdict is Verdict(verdict)
    result = next(p for p in report.properties if p.name == name)
    found: Any = next(f for f in result.findings if f.verdict is Verdict.REFUTED)
    assert (Path(found.span.path).name, found.span.line) == (path.name, marked)
    example = found.counterexample
    shown = replay.confirmed(Task(kernel, kernel, str(path)), example, name, found.message)
    assert shown.confirmed, shown.note
    assert example.shape
    contract.check(kernel, **example.shape)
    if name in ("bounds", "coverage"):
        assert {"buffer", "byte_address"} <= set(example.values)
        assert example.excerpt or "no thread writes it" in found.message
    if name == "bounds":
        assert example.block
        assert example.thread
        last = (example.values["element"] + example.values["elements"]) * example.values["element_bits"]
        assert (
            example.values["element"] < 0 or last > example.values["extent"] * example.values["element_bits"]
        )


def test_every_kernel_family_has_broken_kernels():
    for family in ("act_quant", "fp4_quant", "fp8_fp4_gemm"):
        assert len([p for p in FILES if p.stem.startswith(family)]) >= 2
