"""A lowering with other settings of the compiler's solver counts only if a launch would compile the same."""

import json

import pytest
import z3

from tests.verify import samples
from verify import certificates, extract
from verify.engine import check_kernel
from verify.verdict import Verdict

SETTINGS = ("smt.arith.solver", "smt.relevancy", "smt.arith.propagate_eqs", "smt.bv.enable_int2bv")


@pytest.fixture
def lowerings(monkeypatch):
    """Whether each lowering was quick, in order."""
    seen: list[bool] = []
    stock = extract.extract

    def lower(*args, **more):
        seen.append(more.get("quick", False))
        return stock(*args, **more)

    monkeypatch.setattr(extract, "extract", lower)
    return seen


def test_the_same_stages_stand(lowerings):
    prim_func = samples.gemm()
    first = extract.extract(prim_func)
    again = extract.again(prim_func, None, first.cuda_sha256, first.ir_sha256)
    assert lowerings == [False, True]
    assert (again.cuda_text, again.ir_sha256) == (first.cuda_text, first.ir_sha256)


@pytest.mark.parametrize("other", ["text", "stages"])
def test_other_stages_are_lowered_as_at_a_launch(lowerings, other):
    prim_func = samples.exponentials()
    first = extract.extract(prim_func)
    text = "0" * 64 if other == "text" else first.cuda_sha256
    stages = "0" * 64 if other == "stages" else first.ir_sha256
    again = extract.again(prim_func, None, text, stages)
    assert lowerings == [False, True, False]
    assert (again.cuda_sha256, again.ir_sha256) == (first.cuda_sha256, first.ir_sha256)


def test_the_stages_of_another_kernel_have_another_hash():
    one, other = extract.extract(samples.exponentials()), extract.extract(samples.gemm())
    assert one.ir_sha256 != other.ir_sha256
    assert len(one.ir_sha256) == len("0" * 64)


def test_settings_end_with_the_lowering_also_where_it_fails(monkeypatch):
    import tilelang

    before = {name: z3.get_param(name) for name in SETTINGS}
    inside: dict[str, str] = {}

    def fail(*args, **more):
        inside.update({name: z3.get_param(name) for name in SETTINGS})
        raise RuntimeError("of the compiler")

    monkeypatch.setattr(tilelang, "lower", fail)
    with pytest.raises(RuntimeError, match="of the compiler"):
        extract.extract(samples.exponentials(), quick=True)
    assert all(inside[name] != before[name] for name in SETTINGS)
    assert {name: z3.get_param(name) for name in SETTINGS} == before
    with pytest.raises(RuntimeError, match="of the compiler"):
        extract.extract(samples.exponentials())
    assert inside == before


def test_only_a_certificate_of_the_same_source_says_what_to_expect(lowerings, tmp_path, monkeypatch):
    monkeypatch.setattr(certificates, "FOLDER", tmp_path)
    monkeypatch.setattr(extract, "_kept", {})
    prim_func = samples.exponentials()
    report = check_kernel("kernel", "variant", prim_func, samples.ROWS, {}, fresh=True)
    assert report.verdict is Verdict.PROVED
    path = certificates.write(report, samples.ROWS)
    assert path is not None
    assert lowerings == [False]
    check_kernel("kernel", "variant", prim_func, samples.ROWS, {}, fresh=True)
    assert lowerings == [False]  # this process has it
    monkeypatch.setattr(extract, "_kept", {})
    check_kernel("kernel", "variant", prim_func, samples.ROWS, {}, fresh=True)
    assert lowerings == [False, True]
    known = json.loads(path.read_text())
    path.write_text(json.dumps({**known, "source_sha256": "0" * 64}))
    monkeypatch.setattr(extract, "_kept", {})
    check_kernel("kernel", "variant", prim_func, samples.ROWS, {}, fresh=True)
    assert lowerings == [False, True, False]
