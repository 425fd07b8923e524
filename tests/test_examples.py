"""The examples run as they are, without a GPU, and print small errors."""

import runpy
import sys
from pathlib import Path

from dsv4_kernels.registry import all_kernels

EXAMPLES = Path(__file__).parents[1] / "examples"
ROUNDED = 2.0**-8  # of bf16 outputs, and of quantised operands' sums


def _lines(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_quickstart(capsys, monkeypatch):
    first, ours, plain = _lines("quickstart.py", capsys, monkeypatch)
    assert first.endswith("on cpu (interpret)")
    assert float(ours.split()[-1]) < ROUNDED < float(plain.split()[-1])


def test_every_product_has_its_line(capsys, monkeypatch):
    lines = [line.split() for line in _lines("products.py", capsys, monkeypatch)]
    products = {k.name for k in all_kernels() if k.make_kernel.__module__.startswith("dsv4_kernels.gemm.")}
    assert products <= {words[0] for words in lines}
    assert all(float(words[-1]) < ROUNDED for words in lines)
