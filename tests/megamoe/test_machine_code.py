"""Fused kernels free no stage while a load of it is under way: machine code (docs/machine_code.md)."""

import pytest

from megamoe import instances
from megamoe.virtual import compile_kernel


@pytest.mark.parametrize("config", [instances.FP8, instances.OPTIONS], ids=["fp8", "fp4 and a shared expert"])
def test_no_load_is_under_way_at_an_arrival(audited, config):
    """Of both formats' products; the other forms read scales of rows before their products in the text."""
    report = audited(compile_kernel(config))
    assert report.arrivals
    assert not report.found, "\n".join(map(str, report.found))
