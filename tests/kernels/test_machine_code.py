"""Kernels free no stage while a load of it is under way: machine code (docs/machine_code.md)."""

import pytest

from dsv4_kernels import runtime
from dsv4_kernels.registry import get_kernel

# One of each way in which a stage is handed back behind the product that takes what was read of it.
VARIANTS = [
    ("fp8_fp4_gemm", "n4096-k2048-m16"),
    ("grouped_fp8_fp4_gemm", "n4096-k2048-e32-a16"),
    ("index_logits_fp4", "h64-n2-p64"),
    ("mhc_gemm", "k16384"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "variant"), VARIANTS)
def test_no_load_is_under_way_at_an_arrival(audited, kernel, variant):
    spec = get_kernel(kernel)
    (found,) = [v for v in spec.variants if v.id == variant]
    report = audited(runtime.compiled(spec.make_kernel, found.kwargs))
    assert report.arrivals
    assert not report.found, "\n".join(map(str, report.found))
