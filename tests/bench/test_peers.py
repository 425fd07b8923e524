import sys

import pytest

from bench import adapters, peers, timer
from bench.adapters import ADAPTERS, Adapter, PeerCall
from bench.peers import run_peer
from bench.rows import PeerResult
from dsv4_kernels.registry import all_kernels
from tests.bench.fakes import SteadyDevice

CASES = [{"m": 1, "n": 2, "k": 3}, {"m": 4, "n": 5, "k": 6}]

EMIT = """
import json, os, sys, time
def emit(index, label, **result):
    print(json.dumps({"index": index, "label": label, "result": result}), flush=True)
"""


def run(script, timeout_s=20.0, **changes):
    return run_peer(
        "peer", "fp8_fp4_gemm", CASES, timeout_s, command=(sys.executable, "-c", EMIT + script), **changes
    )


def test_results_are_read_by_case_and_label():
    heard = []
    results = run("emit(1, 'peer/fast', us=2.0)\nemit(0, 'peer', us=1.0, note='n')", progress=heard.append)
    assert results == {0: {"peer": PeerResult(us=1.0, note="n")}, 1: {"peer/fast": PeerResult(us=2.0)}}
    assert heard == ["peer/fast {'m': 4, 'n': 5, 'k': 6}: 2.0 us", "peer {'m': 1, 'n': 2, 'k': 3}: 1.0 us"]


def test_arguments_reach_the_process():
    results = run("emit(0, ' '.join(sys.argv[1:]), us=1.0)")
    assert list(results[0]) == [
        'peer --kernel fp8_fp4_gemm --dims {"m": 1, "n": 2, "k": 3} --dims {"m": 4, "n": 5, "k": 6}'
    ]


def test_a_crash_becomes_an_error_and_keeps_what_was_measured():
    results = run("emit(0, 'peer', us=1.0)\nraise SystemExit('no such package')")
    assert results[0] == {"peer": PeerResult(us=1.0)}
    assert results[1] == {"peer": PeerResult(error="no such package")}


def test_a_silent_crash_names_the_exit_status():
    assert run("os._exit(7)")[0] == {"peer": PeerResult(error="exit 7")}


def test_out_of_time_becomes_an_error_and_keeps_what_was_measured():
    results = run("emit(0, 'peer', us=1.0)\ntime.sleep(60)", timeout_s=1.0)
    assert results[0] == {"peer": PeerResult(us=1.0)}
    assert results[1] == {"peer": PeerResult(error="timed out after 1 s")}


def test_a_peer_without_adapter_fails_in_its_own_process(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    results = run_peer("nobody", "fp8_fp4_gemm", CASES[:1], 60.0)
    assert "no adapter 'nobody' for fp8_fp4_gemm" in results[0]["nobody"].error


def test_calls_of_a_peer_fail_one_by_one(monkeypatch):
    def broken():
        raise RuntimeError("only m % 4\nmore")

    def adapter(kernel, dims):
        if dims["m"] == 4:
            raise ImportError("no module")
        return [
            PeerCall("p/bad", broken, "note"),
            PeerCall("p/good", lambda: lambda: None, "cast", casts_input=True),
        ]

    monkeypatch.setattr(timer, "CudaDevice", SteadyDevice)
    monkeypatch.setattr(adapters, "ADAPTERS", {"p": Adapter(adapter, ("fp8_fp4_gemm",))})
    emitted = []
    peers.measure("p", "fp8_fp4_gemm", CASES, lambda *result: emitted.append(result))
    assert emitted == [
        (0, "p/bad", PeerResult(note="note", error="RuntimeError: only m % 4")),
        (0, "p/good", PeerResult(5.0, 5.0, 5.0, "graph", "cast", casts_input=True)),
        (1, "p", PeerResult(error="ImportError: no module")),
    ]
    with pytest.raises(KeyError, match="no adapter 'p' for act_quant"):
        peers.measure("p", "act_quant", CASES, print)


def test_every_peer_that_a_kernel_names_can_be_timed_beside_it():
    named = [(spec.name, peer) for spec in all_kernels() for peer in spec.peers]
    assert named
    assert [(k, p) for k, p in named if p not in ADAPTERS or not ADAPTERS[p].supports(k)] == []


@pytest.mark.parametrize(
    ("name", "kernel", "expected"),
    [
        ("deepgemm", "fp8_fp4_gemm", True),
        ("deepgemm", "act_quant", False),
        ("humming", "fp8_fp4_gemm_widened", True),
        ("triton_quant", "fp4_quant", True),
        ("triton_quant", "fp4_dequant", False),
        ("torch_compile", "anything", True),
        ("torch_copy", "kv_entry", True),
        ("torch_copy", "sparse_decode", False),
        ("flashmla", "sparse_parts", True),
        ("flashmla", "hca_groups", True),
        ("flashmla", "hca_join", False),
    ],
)
def test_support(name, kernel, expected):
    assert ADAPTERS[name].supports(kernel) is expected
