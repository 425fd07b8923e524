"""What contracts say of elements: checked by who asks, on whatever runs the call, and by nobody else."""

import inspect
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv4_kernels import ContractError, backend, check_data, data_checks, runtime
from dsv4_kernels.contract import Contract
from dsv4_kernels.registry import all_kernels, get_kernel
from tests.compare import bits, call

PROMISING = [k for k in all_kernels() if k.contract.tensors or k.shared_rows]
CPU = torch.device("cpu")
PAGE = 64


def case_of(kernel):
    """Return the first test case with several rows."""
    for case in kernel.cases:
        rows = "test" in case.tags and case.dims.get("m", 0) > 1
        if rows and kernel.make_inputs(case.dims, CPU, 5)[0].numel():
            return case
    raise AssertionError(f"{kernel.name} has no test case with rows")


def inputs_of(kernel, device=CPU):
    """Return inputs of that case."""
    return list(kernel.make_inputs(case_of(kernel).dims, device, 5))


def counts(*values):
    return torch.tensor(values, dtype=torch.int32)


def grouped(expert, num_experts=3):
    """Return a call of a grouped product of rows with these experts."""
    kernel = get_kernel("grouped_fp8_gemm")
    m, n, k = len(expert), 128, 512
    x, w = (torch.zeros(*shape).to(torch.float8_e4m3fn) for shape in ((m, k), (num_experts, n, k)))
    scales = torch.ones(m, k // 128), torch.ones(num_experts, n // 128, k // 128)
    x_scale, w_scale = (s.to(torch.float8_e8m0fnu) for s in scales)
    return lambda: kernel.fn(x, x_scale, w, w_scale, expert, 16)


def test_these_kernels_promise_something_of_elements():
    assert {k.name for k in PROMISING} >= {
        "cache_write",
        "index_cache_write",
        "index_key_write",
        "state_write",
        "grouped_fp8_gemm",
    }
    assert len({k.make_kernel for k in PROMISING}) == len(PROMISING)


@pytest.mark.parametrize("name", ["reference", "interpret"])
@pytest.mark.parametrize("kernel", PROMISING, ids=lambda k: k.name)
def test_inputs_of_the_tests_keep_what_is_promised(kernel, name, monkeypatch):
    seen, broken = [], data_checks.broken
    monkeypatch.setattr(data_checks, "broken", lambda *args: seen.append(args) or broken(*args))
    inputs = inputs_of(kernel)
    with backend(name), check_data():
        call(kernel, inputs)
    assert [spec.name for spec, *_ in seen] == [kernel.name]
    for spec, tensors, _ in seen:
        assert spec.contract.tensors | set(spec.shared_rows) <= set(tensors)


@pytest.mark.parametrize("name", ["auto", "interpret"])
@pytest.mark.parametrize("kernel", [k for k in PROMISING if k.contract.distinct], ids=lambda k: k.name)
def test_two_rows_for_one_place(kernel, name):
    inputs = inputs_of(kernel)
    (argument,) = kernel.contract.distinct
    places = inputs[list(inspect.signature(kernel.fn).parameters).index(argument)]
    places[0], places[-1] = 1, 1
    before = [bits(x).clone() for x in inputs]
    want = rf"^{kernel.name}: requires distinct\({argument}\), got {argument}\[0\]=1, {argument}\[\d+\]=1$"
    with backend(name), check_data(), pytest.raises(ContractError, match=want):
        kernel.fn(*inputs)
    assert all(torch.equal(bits(x), b) for x, b in zip(inputs, before, strict=True))
    with backend(name):
        kernel.fn(*inputs)


@pytest.mark.parametrize("name", ["auto", "interpret"])
def test_an_expert_that_does_not_exist(name):
    bad = grouped(counts(*[0] * 16, *[1] * 3, *[3] * 13))
    with backend(name), check_data():
        grouped(counts(*[0] * 16, *[2] * 9, *[-1] * 7))()
        want = r"^grouped_fp8_gemm: requires expert < num_experts, got expert\[19\]=3, num_experts=3$"
        with pytest.raises(ContractError, match=want):
            bad()


def test_rows_of_one_block_with_two_experts():
    with check_data():
        want = r"requires one expert in each 16 consecutive rows, .*, got expert\[16\]=1, expert\[21\]=2$"
        with pytest.raises(ContractError, match=want):
            grouped(counts(*[0] * 16, *[1] * 5, *[2] * 11))()
        with pytest.raises(ContractError, match=r"got expert\[0\]=-1, expert\[1\]=0$"):
            grouped(counts(-1, *[0] * 15))()
        grouped(counts(*[1] * 3, *[-1] * 13))()


def test_only_who_asks_pays(monkeypatch):
    bad = grouped(counts(*[0] * 8, *[1] * 8))
    looked = []
    monkeypatch.setattr(data_checks, "before_launch", lambda *args: looked.append(args))
    bad()
    with backend("interpret"):
        bad()
    assert not looked
    assert runtime.replays()
    with check_data():
        assert not runtime.replays()
        found = []
        other = threading.Thread(target=lambda: found.append((data_checks.is_on(), runtime.replays(), bad())))
        other.start()
        other.join()
    assert found[0][:2] == (False, True)
    assert not looked
    assert runtime.replays()


def test_an_error_leaves_nothing_behind():
    bad = grouped(counts(*[0] * 8, *[1] * 8))
    for _ in range(2):
        with pytest.raises(ContractError), check_data():
            bad()
        assert not data_checks.is_on()
        bad()


@pytest.mark.parametrize(("value", "raises"), [("1", True), ("0", False), ("", False)])
def test_the_environment_asks_for_a_whole_process(value, raises):
    program = (
        "import torch; from tests.test_data_checks import counts, grouped; from dsv4_kernels import runtime\n"
        f"assert runtime.replays() is {not raises}\n"
        "try: grouped(counts(*[0] * 8, *[1] * 8))()\n"
        "except ValueError as error: print(error)\n"
    )
    environment = {**os.environ, data_checks.VARIABLE: value}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert ("requires one expert" in done.stdout) is raises


def test_nothing_is_read_back_while_a_stream_is_captured(monkeypatch):
    class OnGpu:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    maker = get_kernel("cache_write").make_kernel
    with pytest.raises(
        data_checks.CapturedCheckError, match="cache_write: requires a stream that is not captured"
    ):
        data_checks.before_launch(maker, {}, (OnGpu(),))
    assert data_checks.before_launch(get_kernel("act_quant").make_kernel, {}, (OnGpu(),))


def spec_of(clause, **consts):
    contract = Contract((clause,), consts=consts, tensors=frozenset({"idx"}))
    return replace(PROMISING[0], name="k", contract=contract, shared_rows={})


@given(
    values=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 9), min_size=6, max_size=6),
    n=st.integers(0, 2**31 - 1) | st.integers(0, 9),
)
def test_comparisons_are_those_of_unbounded_integers(values, n):
    idx = torch.tensor(values, dtype=torch.int32).view(2, 3)
    wrong = [i for i, v in enumerate(values) if not -1 <= v * PAGE + 1 < n]
    said = data_checks.broken(spec_of("-1 <= idx * PAGE + 1 < n", PAGE=PAGE), {"idx": idx}, {"n": n})
    if not wrong:
        assert said is None
        return
    # The first comparison that some element breaks names the first such element.
    low = [i for i in wrong if not values[i] * PAGE + 1 >= -1]
    place = (low or wrong)[0]
    assert said == (f"-1 <= idx * PAGE + 1 < n, got idx[{place // 3}, {place % 3}]={values[place]}, n={n}")


@given(values=st.lists(st.integers(-3, 5), min_size=1, max_size=9))
def test_the_first_that_equals_an_earlier_one_is_named(values):
    idx = torch.tensor(values, dtype=torch.int32)
    said = data_checks.broken(spec_of("distinct(idx)"), {"idx": idx}, {})
    again = [i for i, v in enumerate(values) if v >= 0 and v in values[:i]]
    if not again:
        assert said is None
        return
    value = values[again[0]]
    assert said == f"distinct(idx), got idx[{values.index(value)}]={value}, idx[{again[0]}]={value}"


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [k for k in PROMISING if k.contract.distinct], ids=lambda k: k.name)
def test_gpu_calls_that_were_noted_are_checked_too(kernel, gpu_record):
    inputs = inputs_of(kernel, torch.device("cuda"))
    (argument,) = kernel.contract.distinct
    places = inputs[list(inspect.signature(kernel.fn).parameters).index(argument)]
    for _ in range(40):  # noted, then launched as a graph
        kernel.fn(*inputs)
    with check_data():
        kernel.fn(*inputs)
        places[0], places[-1] = 1, 1
        before = [bits(x).clone() for x in inputs]
        with pytest.raises(ContractError, match=rf"requires distinct\({argument}\)"):
            kernel.fn(*inputs)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(data_checks.CapturedCheckError), torch.cuda.graph(graph):
            kernel.fn(*inputs)
    torch.cuda.synchronize()
    same = all(torch.equal(bits(x), b) for x, b in zip(inputs, before, strict=True))
    gpu_record(kernel, kernel.select(case_of(kernel).dims), "two rows for one place are found", same)
    assert same
    kernel.fn(*inputs)
    torch.cuda.synchronize()
