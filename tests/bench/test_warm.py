"""What peers compile ahead of a benchmark: which shapes, and that a failure names itself."""

import subprocess

import pytest

from bench import adapters, warm
from bench.adapters import Adapter, PeerCall
from bench.peers import compile_ahead

SHAPE = {"m": 1, "n": 2, "k": 3}


def test_each_shape_of_weights_is_compiled_once():
    found = list(warm.shapes((), warm.COMPILING))
    keys = [(name, str(warm.weights_of(cases[0]))) for name, _, cases in found]
    assert len(set(keys)) == len(keys)
    for name, _, cases in found:
        assert name in warm.COMPILING
        assert all(warm.weights_of(dims) == warm.weights_of(cases[0]) for dims in cases)
        batches = [tuple(dims.get(n) for n in ("m", "rows", "spread")) for dims in cases]
        assert len(set(batches)) == len(batches)
    grouped = [cases for name, _, cases in found if name == "humming" and "num_experts" in cases[0]]
    folded = {str(warm.weights_of(d)) for d in (c[0] for c in grouped)}
    assert len(folded) == 4  # gate and up, and down, of Flash and Pro


def test_compiling_ahead_calls_only_where_nothing_else_compiles(monkeypatch):
    done = []

    def fails():
        raise RuntimeError("no compiler\nat all")

    def calls(kernel, dims):
        silent = PeerCall(
            "a", lambda: lambda: done.append("called"), compile_ahead=lambda: done.append("ahead")
        )
        by_call = PeerCall("b", lambda: lambda: done.append("called"))
        return [silent, by_call, PeerCall("c", fails)]

    monkeypatch.setattr(adapters, "ADAPTERS", {"peer": Adapter(calls)})
    errors = compile_ahead("peer", "fp8_gemm", [SHAPE])
    assert done == ["ahead", "called"]
    assert errors == [f"peer fp8_gemm {SHAPE}: RuntimeError: no compiler"]


@pytest.mark.parametrize(("code", "said"), [(0, "peer: wrong"), (3, "last words")])
def test_what_went_wrong_in_the_process_is_said(monkeypatch, code, said):
    def run(*args, **options):
        return subprocess.CompletedProcess(args, code, "peer: wrong\n", "first\nlast words\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert warm.compile_shape("peer", "fp8_gemm", [SHAPE], 1.0) == said


def test_a_shape_that_takes_too_long_is_given_up(monkeypatch):
    def run(*args, timeout, **options):
        raise subprocess.TimeoutExpired(args, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert warm.compile_shape("peer", "fp8_gemm", [SHAPE], 2.0) == "timed out after 2 s"
