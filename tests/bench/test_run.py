from dataclasses import replace

import pytest
import torch

from bench import machine, peak, peers, run
from bench.check import WrongResultError, check_case
from bench.peak import Ceilings
from bench.rows import PeerResult, read_rows, write_rows
from bench.timer import MIN_REPLAYS
from dsv4_kernels.attention import decode_reference
from dsv4_kernels.attention.hca_decode import hca_decode
from dsv4_kernels.registry import get_kernel
from tests.bench.fakes import DIMS, SteadyDevice, make_inputs, make_spec
from tests.compare import mismatch

CEILINGS = Ceilings(copy_gbps=2000.0, bf16_tflops=500.0, e4m3_tflops=1000.0)


def bump(x, amount):
    out = x + x
    out[1, 3] += amount
    return out


def inputs():
    return make_inputs(DIMS, torch.device("cpu"), 0)


def test_bitwise_check_passes_and_fails():
    assert check_case(make_spec(), DIMS, inputs()).kind == "bitwise"
    broken = make_spec(fn=lambda x: bump(x, 1e-3))
    with pytest.raises(WrongResultError, match=r"double .*output 0 is not equal bit for bit: at \(1, 3\)"):
        check_case(broken, DIMS, inputs())


@pytest.mark.parametrize(("amount", "fraction"), [(0.5, 0.5), (-1.0, 1.0)])
def test_tolerance_check_reports_the_worst_fraction(amount, fraction):
    spec = make_spec(fn=lambda x: bump(x, amount), tolerance=lambda out, x: (torch.ones_like(out),))
    check = check_case(spec, DIMS, inputs())
    assert check.kind == "tolerance"
    assert check.worst_error == pytest.approx(fraction, rel=1e-5)


@pytest.mark.parametrize("amount", [1.5, float("nan"), float("inf")])
def test_tolerance_check_fails(amount):
    spec = make_spec(fn=lambda x: bump(x, amount), tolerance=lambda out, x: (torch.ones_like(out),))
    with pytest.raises(WrongResultError, match=r"off by more than its bound: at \(1, 3\)"):
        check_case(spec, DIMS, inputs())


def test_nan_and_infinity_of_the_reference_must_be_met():
    def reference(x):
        out = 2 * x
        out[0, 0], out[0, 1] = float("nan"), float("inf")
        return out

    spec = make_spec(fn=reference, reference=reference, tolerance=lambda out, x: (torch.ones_like(out),))
    assert check_case(spec, DIMS, inputs()).worst_error == 0
    with pytest.raises(WrongResultError, match=r"at \(0, 0\) got .*, want nan"):
        check_case(replace(spec, fn=lambda x: x + x), DIMS, inputs())


def test_wrong_dtype_and_count_of_outputs_fail():
    with pytest.raises(WrongResultError, match=r"torch\.float64"):
        check_case(make_spec(fn=lambda x: (x + x).double()), DIMS, inputs())
    with pytest.raises(WrongResultError, match="2 outputs"):
        check_case(make_spec(fn=lambda x: (x + x, x)), DIMS, inputs())


def test_limit_is_the_larger_of_bytes_and_flops():
    assert CEILINGS.limit_us(2_000_000, 0, 500.0) == (pytest.approx(1.0), "bytes")
    assert CEILINGS.limit_us(2_000_000, 10**9, 500.0) == (pytest.approx(2.0), "flops")
    fp8 = torch.zeros(1).to(torch.float8_e4m3fn)
    assert CEILINGS.matmul_tflops([torch.zeros(1), 3, fp8]) == 1000.0
    assert CEILINGS.matmul_tflops([torch.zeros(1)]) == 500.0
    codes = torch.zeros(1, dtype=torch.uint8)
    assert CEILINGS.matmul_tflops([codes, torch.zeros(1)]) == 1000.0  # packed FP4
    assert CEILINGS.matmul_tflops([torch.zeros(1), codes]) == 500.0  # a cache of bytes


def origin():
    return run.Origin(CEILINGS, {"gpu": "NVIDIA H200"}, "c0ffee", "2026-01-02T03:04:05+00:00")


def test_row_of_a_job(monkeypatch):
    monkeypatch.setattr(run, "_running_digest", lambda spec, variant: "ab" * 32)
    spec = make_spec()
    row = run.measure_job(run.Job(spec, spec.cases[0]), SteadyDevice(), origin(), torch.device("cpu"))
    assert (row.kernel, row.variant, row.case, row.dims) == ("double", "only", "small", DIMS)
    assert (row.us, row.checked, row.cuda_sha256, row.commit) == (5.0, "bitwise", "ab" * 32, "c0ffee")
    assert row.replays >= MIN_REPLAYS
    assert row.limit_us == pytest.approx(4 * 8 * 8 / 2000.0 / 1e3)
    assert row.chain_us is None


def test_decode_of_few_queries_is_timed_with_its_fold(monkeypatch):
    timed = []

    class Device(SteadyDevice):
        def prepare(self, call):
            timed.append(call())
            return super().prepare(call)

    monkeypatch.setattr(run, "_running_digest", lambda spec, variant: "ab" * 32)
    spec = get_kernel("sparse_parts")
    case = next(case for case in spec.cases if case.id == "three-rows")
    row = run.measure_job(run.Job(spec, case), Device(), origin(), torch.device("cpu"))
    assert row.chain_us == 5.0
    (acc, top, total), decoded = timed
    decode = get_kernel("sparse_decode")
    whole = decode.make_inputs(case.dims, torch.device("cpu"), run.SEED)
    for outputs in (decode_reference.hca_fold(acc, top, total, whole[-1]), decoded):
        assert mismatch(decode, whole, outputs) is None


@pytest.mark.parametrize("name", ["hca_chunks", "hca_groups"])
def test_hca_decode_in_either_form_is_timed_with_its_fold(name, monkeypatch):
    timed = []

    class Device(SteadyDevice):
        def prepare(self, call):
            timed.append(call())
            return super().prepare(call)

    monkeypatch.setattr(run, "_running_digest", lambda spec, variant: "ab" * 32)
    spec = get_kernel(name)
    case = next(case for case in spec.cases if case.id == "three-rows")
    row = run.measure_job(run.Job(spec, case), Device(), origin(), torch.device("cpu"))
    assert row.chain_us == 5.0
    inputs = spec.make_inputs(case.dims, torch.device("cpu"), run.SEED)
    want = hca_decode(*inputs, torch.zeros(case.dims["num_heads"]))
    for got, expected in zip(timed[1], want, strict=True):
        assert torch.allclose(got.float(), expected.float(), rtol=2.0**-7, atol=2.0**-18)


def test_nothing_is_timed_where_the_result_is_wrong():
    class NeverDevice(SteadyDevice):
        def prepare(self, call):
            raise AssertionError("timed a wrong kernel")

    spec = make_spec(fn=lambda x: x)
    with pytest.raises(WrongResultError):
        run.measure_job(run.Job(spec, spec.cases[0]), NeverDevice(), origin(), torch.device("cpu"))


def test_jobs(monkeypatch):
    spec = make_spec()
    monkeypatch.setattr(run, "all_kernels", lambda: (spec,))
    assert [job.case.id for job in run.select_jobs()] == ["small"]
    assert [job.case.id for job in run.select_jobs(["double"], ["odd"])] == ["odd"]
    with pytest.raises(KeyError, match="no kernel triple"):
        run.select_jobs(["triple"])
    with pytest.raises(KeyError, match="no case huge of double"):
        run.select_jobs([], ["huge"])


def test_peers_of_a_kernel():
    spec = make_spec()
    assert run.peers_of(spec, None) == ["torch_eager", "deepgemm"]
    assert run.peers_of(spec, []) == []
    assert run.peers_of(spec, ["deepgemm", "torch_compile"]) == ["torch_compile"]


def test_a_run_keeps_earlier_rows_goes_past_a_broken_kernel_and_adds_peers(monkeypatch, make_row, tmp_path):
    out = tmp_path / "nvidia-h200.jsonl"
    earlier = make_row()
    write_rows(out, [earlier])
    asked, on_disk = [], []

    def run_peer(name, kernel, cases, timeout_s, progress):
        asked.append((name, kernel, cases, timeout_s))
        on_disk.append(len(read_rows(out)))  # ours are safe before a peer starts
        return {index: {name: PeerResult(us=10.0)} for index in range(len(cases))}

    monkeypatch.setattr(run, "CudaDevice", SteadyDevice)
    monkeypatch.setattr(peak, "measure", lambda device: CEILINGS)
    monkeypatch.setattr(machine, "describe", lambda: {"gpu": "NVIDIA H200"})
    monkeypatch.setattr(peers, "run_peer", run_peer)
    monkeypatch.setattr(run, "_running_digest", lambda spec, variant: "ab" * 32)
    on_cpu = {"make_inputs": lambda dims, device, seed: inputs()}
    good, broken = make_spec(**on_cpu), make_spec(name="broken", fn=lambda x: x, **on_cpu)
    jobs = [run.Job(spec, spec.cases[0]) for spec in (broken, good)]

    outcome = run.run(jobs, out, peer_timeout_s=9.0)

    assert [(job.spec.name, error.split(":")[0]) for job, error in outcome.errors] == [
        ("broken", "WrongResultError")
    ]
    assert asked == [(name, "double", [DIMS], 9.0) for name in ("torch_eager", "deepgemm")]
    assert on_disk == [2, 2]
    assert read_rows(out) == [earlier, *outcome.rows]
    assert outcome.rows[0].peers == {"torch_eager": PeerResult(us=10.0), "deepgemm": PeerResult(us=10.0)}
    assert outcome.rows[0].speedup("deepgemm") == pytest.approx(2.0)
