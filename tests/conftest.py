"""Options and fixtures: GPU tests, poisoned outputs, records of what ran on a GPU."""

import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "dsv4",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("dsv4")


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="A missing GPU is a failure, not a skip.")
    parser.addoption(
        "--record",
        default=os.environ.get("DSV4_TEST_RESULTS"),
        help="Folder that gets <gpu>.jsonl with one line for each kernel case that ran on the GPU.",
    )


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available() or config.getoption("--require-gpu"):
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish():
    """Look for garbage seldom, as the verifier's processes do: a twentieth of the time went there."""
    from verify.tasks import collect_seldom

    collect_seldom()


def pytest_generate_tests(metafunc):
    """Give a test marked `interpret` that asks for (kernel, case) the registry's test cases."""
    marker = metafunc.definition.get_closest_marker("interpret")
    parametrized = metafunc.definition.get_closest_marker("parametrize")
    if marker is None or parametrized is not None or not {"kernel", "case"} <= set(metafunc.fixturenames):
        return
    from dsv4_kernels.registry import all_kernels

    pairs = [(k, c) for k in all_kernels() for c in k.cases if "test" in c.tags]
    metafunc.parametrize(("kernel", "case"), pairs, ids=[f"{k.name}-{c.id}" for k, c in pairs])


@pytest.fixture(autouse=True)
def _interpreted(request):
    """Run the kernels of a test marked `interpret` in the interpreter."""
    if request.node.get_closest_marker("interpret") is None:
        yield
        return
    from dsv4_kernels import backend

    with backend("interpret"):
        yield


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Fill torch.empty with nan, so that an element that no kernel writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _given_back(request):
    """Hand a GPU test's memory back to the card, which other processes may share."""
    yield
    if request.node.get_closest_marker("gpu") is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _record(request, kernel, variant, text, test, passed):
    """Add a line to the folder of records, if one is asked for: a test of the kernel with this CUDA text."""
    from verify.extract import cuda_sha256

    folder = request.config.getoption("--record")
    if folder is None:
        return
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    row = {
        "kernel": kernel,
        "variant": variant,
        "cuda_sha256": cuda_sha256(text),
        "test": test,
        "passed": bool(passed),
        "gpu": name,
        "torch": torch.__version__,
        "commit": os.environ.get("DSV4_COMMIT", ""),
        "date": datetime.now(UTC).date().isoformat(),
    }
    path = Path(folder) / f"{name.lower().replace(' ', '-')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row, sort_keys=True) + "\n")


@pytest.fixture
def gpu_record(request):
    """Return a function that records a GPU test of one variant: (spec, variant, test, passed)."""
    from dsv4_kernels import runtime

    def record(spec, variant, test, passed):
        if request.config.getoption("--record") is not None:
            text = runtime.compiled(spec.make_kernel, variant.kwargs).get_kernel_source()
            _record(request, spec.name, variant.id, text, test, passed)

    return record


@pytest.fixture
def audited():
    """Return what looks through the machine code of the one kernel that `tilelang.compile` returned."""
    from bench import machine_code, sass

    try:
        sass.find_nvdisasm()
    except sass.MachineCodeError as error:
        pytest.skip(str(error))
    if shutil.which("nvcc") is None:
        pytest.skip("requires nvcc on PATH, got none")

    def audit(kernel):
        (report,) = machine_code.audit_cubin(machine_code.cubin_of(kernel))
        assert report.copies
        return report

    return audit


@pytest.fixture
def layer_record(request):
    """Return a function that records a test of a fused kernel of MegaMoE: (config, variant, test, passed)."""
    from megamoe.virtual import compile_kernel

    def record(config, variant, test, passed):
        if request.config.getoption("--record") is not None:
            text = compile_kernel(config).get_kernel_source()
            _record(request, "mega_moe", variant, text, test, passed)

    return record
