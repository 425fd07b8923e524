"""Certificates of variants that do not fit together prove nothing about the dispatcher."""

from dataclasses import replace

import pytest

from dsv4_kernels import registry
from verify.signature import library
from verify.signature.choice import batch_bounds, ranges
from verify.signature.dispatch import dispatch_of
from verify.verdict import PropertyResult, VariantReport, Verdict


def reports(spec, shape):
    """Return what proofs of the variants for one shape report, all with one signature."""
    variants = [v for v in spec.variants if {**v.dims(), **shape} == v.dims()]
    found = []
    for variant in variants:
        dispatch = dispatch_of(spec, variant)
        assert dispatch.select is not None
        bounds = batch_bounds(spec.contract, dispatch.fixed, spec.batch_dims)
        chosen = " ".join(
            dict.fromkeys(str(r.variant) for r in ranges(dispatch.select, dispatch.fixed, bounds))
        )
        others = {f"as {v.id}": "s" for v in variants if v is not variant}
        facts = {"signature": "s", "chosen": chosen, **others}
        result = PropertyResult(library.NAME, Verdict.PROVED, facts=facts)
        found.append(VariantReport(spec.name, variant.id, "", (), {}, {}, [result]))
    return found


@pytest.fixture
def spec(monkeypatch):
    found = registry.get_kernel("fp8_fp4_gemm")
    monkeypatch.setattr(registry, "all_kernels", lambda: (found,))
    monkeypatch.setattr(library.certificates, "load", lambda kernel, variant: None)
    return found


SHAPE = {"n": 4096, "k": 4096}


def test_proofs_that_fit_stay_proved(spec):
    found = reports(spec, SHAPE)
    assert len(found) > 1
    assert library.check_library(found) == []


def test_another_signature_is_found(spec):
    found = reports(spec, SHAPE)
    found[0].properties[0].facts["signature"] = "t"
    changed = library.check_library(found)
    assert {r.variant for r in changed} == {r.variant for r in found[1:]}
    assert all(r.verdict is Verdict.UNKNOWN for r in changed)
    assert "another signature" in changed[0].properties[0].findings[0].message


def test_a_dispatcher_that_chooses_otherwise_is_found(spec, monkeypatch):
    found = reports(spec, SHAPE)
    first = next(v for v in spec.variants if v.id == found[0].variant)
    always = replace(spec, select=lambda dims: first)
    monkeypatch.setattr(registry, "all_kernels", lambda: (always,))
    changed = library.check_library(found)
    assert any("chooses other variants" in f.message for r in changed for f in r.properties[0].findings)
