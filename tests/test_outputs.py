"""The interpreter against what kernels gave on a GPU: there, and by the recorded rows anywhere."""

from functools import cache

import pytest
import torch

from bench import outputs
from bench.status import OUTPUTS_PREFIX, TEST_RESULTS
from dsv4_kernels.registry import get_kernel
from dsv4_kernels.tile.wgmma import corrected
from verify import extract

ROWS = outputs.read(TEST_RESULTS)
CASES = [pytest.param(s, c, id=f"{s.name}-{c.id}") for s, c in outputs.cases()]


@cache
def _digest_today(kernel, case_id):
    """Return the digest of the text that the case runs, of a shape that need not be shipped."""
    spec = get_kernel(kernel)
    case = next(c for c in spec.cases if c.id == case_id)
    with corrected():
        return extract.extract(spec.make_kernel(**spec.select(case.dims).kwargs)).cuda_sha256


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_gpu_outputs_agree_with_the_interpreter(kernel, case):
    row = outputs.record(kernel, case)
    assert row.passed, row


@pytest.mark.interpret
@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.gpu}-{r.kernel}-{r.case}")
def test_interpreter_gives_what_was_recorded(row):
    spec = get_kernel(row.kernel)
    case = next((c for c in spec.cases if c.id == row.case), None)
    if case is None:
        pytest.skip("a case that is no more")
    assert row.passed
    inputs = outputs.make_inputs(spec, case)
    recorded, found = [row.inputs], [tuple(outputs.digest(i) for i in inputs if isinstance(i, torch.Tensor))]
    if row.deviation is None:
        recorded.append(row.outputs)
        found.append(tuple(outputs.digest(t) for t in outputs.interpreted(spec, inputs)))
    is_within = row.deviation is None or 0 <= row.deviation <= 1
    # Lowering would be most of a case's time: only a row that disagrees asks whether it is of today's text.
    if not (found == recorded and is_within) and _digest_today(row.kernel, row.case) != row.cuda_sha256:
        pytest.skip("recorded from another CUDA text: `make status` calls the variant stale")
    assert found == recorded
    assert is_within, row.deviation


@pytest.mark.skipif(not ROWS, reason="nothing is recorded yet")
def test_every_kernel_is_recorded():
    """On some GPU: a session may end before it has come to all kernels."""
    assert {spec.name for spec, _ in outputs.cases()} <= {row.kernel for row in ROWS}
