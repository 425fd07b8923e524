"""Fused kernels free no stage while a load of it is under way: machine code (docs/machine_code.md)."""

import shutil

import pytest

from bench import machine_code, sass
from bench.sass import MachineCodeError
from megamoe import instances
from megamoe.virtual import compile_kernel


@pytest.mark.parametrize("config", [instances.FP8, instances.OPTIONS], ids=["fp8", "fp4 and a shared expert"])
def test_no_load_is_under_way_at_an_arrival(config):
    """Of both formats' products; the other forms read scales of rows before their products in the text."""
    try:
        sass.find_nvdisasm()
    except MachineCodeError as error:
        pytest.skip(str(error))
    if shutil.which("nvcc") is None:
        pytest.skip("requires nvcc on PATH, got none")
    (report,) = machine_code.audit_cubin(machine_code.cubin_of(compile_kernel(config)))
    assert report.copies
    assert report.arrivals
    assert not report.found, "\n".join(map(str, report.found))
