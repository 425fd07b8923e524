"""The examples run as they are, without a GPU, and print small errors."""

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_attention(capsys, monkeypatch):
    first, error, alone = _lines("attention.py", capsys, monkeypatch)
    assert first.endswith("on cpu (interpret)")
    assert float(error.split()[-1]) < ROUNDED
    assert alone.endswith(": True")


def test_every_product_has_its_line(capsys, monkeypatch):
    lines = [line.split() for line in _lines("products.py", capsys, monkeypatch)]
    products = {k.name for k in all_kernels() if k.make_kernel.__module__.startswith("dsv4_kernels.gemm.")}
    assert products <= {words[0] for words in lines}
    assert all(float(words[-1]) < ROUNDED for words in lines)


def _layer(arguments, folder):
    """Run the expert layer's example in processes of its own; return its lines."""
    command = [sys.executable, *arguments]
    paths = [str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_expert_layer_over_four_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "4", "--master-port", str(port)]
    lines = _layer([*torchrun, str(EXAMPLES / "megamoe_torchrun.py")], tmp_path)
    said = sorted(line for line in lines if line.startswith("rank "))
    assert [line.split(":")[0] for line in said] == [f"rank {rank} of 4" for rank in range(4)]
    assert all(line.endswith("distributed, bits equal: True") for line in said)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_expert_layer_on_virtual_ranks(ranks, tmp_path):
    lines = _layer([str(EXAMPLES / "megamoe_torchrun.py"), "--virtual", str(ranks)], tmp_path)
    said = [line for line in lines if line.startswith("virtual rank ")]
    assert len(said) == ranks
    assert all(line.endswith("fused, bits equal: True") for line in said)
