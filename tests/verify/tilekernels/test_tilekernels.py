"""TileKernels 1.0.0 in the interpreter: `python -m pytest tests/verify/tilekernels -q` ends with the count.

A kernel counts when every case that checks it agrees with the library's PyTorch reference.
"""

import pytest
import torch

from tests.verify.tilekernels import cases, harness

SEED = 11
# The least share of the library's kernels that cases must check; each case must agree.
MIN_SHARE = 0.9


@pytest.mark.filterwarnings("ignore:alloc_reducer:DeprecationWarning")
@pytest.mark.parametrize("case", cases.all_cases(), ids=lambda c: c.name)
def test_agrees_with_its_reference(case):
    torch.manual_seed(SEED)
    with harness.interpreted() as ran:
        case.run()
    assert set(case.kernels) <= ran


def test_cases_check_the_library():
    names = set(harness.kernel_names())
    checked = {kernel for case in cases.all_cases() for kernel in case.kernels}
    assert checked <= names
    assert len(checked) >= MIN_SHARE * len(names), names - checked
