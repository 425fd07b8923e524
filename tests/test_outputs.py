"""The interpreter against what kernels gave on a GPU: there, and by the recorded rows anywhere."""

from functools import cache

import pytest
import torch

from bench import megamoe_outputs, outputs
from bench.status import OUTPUTS_PREFIX, TEST_RESULTS
from dsv4_kernels.registry import get_kernel
from dsv4_kernels.tile.corrections import corrected
from verify import extract

ROWS = [row for row in outputs.read(TEST_RESULTS) if row.kernel != megamoe_outputs.KERNEL]
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
    """One GPU at least has a row of every kernel; another's session may have ended before it had them."""
    recorded = [{row.kernel for row in ROWS if row.gpu == gpu} for gpu in {row.gpu for row in ROWS}]
    assert any({spec.name for spec, _ in outputs.cases()} <= kernels for kernels in recorded)


def test_a_row_is_made_of_one_case(monkeypatch):
    """What the GPU does is stood in for by the references; the rest is what runs there."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "stand-in")
    source = type("Kernel", (), {"get_kernel_source": lambda self: "text"})()
    monkeypatch.setattr(outputs.runtime, "compiled", lambda *args: source)
    by_size = sorted(outputs.cases(), key=lambda pair: -pair[0].num_bytes(pair[1].dims))
    chosen = {spec.name: (spec, case) for spec, case in by_size}  # of each kernel the smallest
    for name, (spec, case) in chosen.items():
        row = outputs.record(spec, case)
        assert (row.kernel, row.gpu, row.passed) == (name, "stand-in", True)
        assert (row.deviation is None) == (spec.tolerance is None)


class _Doubled:
    """A kernel that is off by a known part of its bound."""

    name = "doubled"
    tolerance = staticmethod(lambda out, x: (torch.full_like(out, 0.5),))
    reference = staticmethod(lambda x: 2 * x)


@pytest.mark.parametrize(("error", "expected"), [(0.0, 0.0), (0.5, 0.5), (3.0, 3.0), (torch.nan, torch.inf)])
def test_deviation_is_in_units_of_the_bound(error, expected):
    x = torch.arange(4.0)
    assert outputs.deviation(_Doubled, (x,), (2 * x + error,), (2 * x,)) == expected  # type: ignore[arg-type]


def test_digest_tells_type_shape_and_bits_apart():
    x = torch.tensor([1.0, torch.nan])
    payload = (x.view(torch.int32) | torch.tensor([0, 1], dtype=torch.int32)).view(torch.float32)
    assert outputs.digest(x) == outputs.digest(payload)
    others = [x.view(1, 2), x.double(), -x, torch.tensor([1.0, 2.0])]
    assert len({outputs.digest(t) for t in [x, *others[:2], torch.tensor([-1.0, torch.nan]), others[3]]}) == 5


def test_rows_replace_those_of_the_same_case(tmp_path):
    def row(case, passed):
        test = f"{OUTPUTS_PREFIX}{case}"
        return outputs.Outputs("k", "v", "aa", test, case, ("i",), ("o",), None, passed, "g", "", "", "")

    path = tmp_path / "g.jsonl"
    path.write_text('{"kernel": "k", "test": "reference a", "passed": true}\n')
    outputs.write(path, [row("a", False), row("b", True)])
    outputs.write(path, [row("a", True)])
    assert len(path.read_text().splitlines()) == 3
    assert sorted((r.case, r.passed) for r in outputs.read(tmp_path)) == [("a", True), ("b", True)]
