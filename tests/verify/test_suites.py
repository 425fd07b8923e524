"""Suites of proofs: MegaMoE's are found, what is false is refuted, and sources of old are noticed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import z3
from click.testing import CliRunner

from megamoe import barrier
from verify import certificates, cli, suites
from verify.properties import Claims
from verify.solve import Obligation
from verify.suites import Suite
from verify.verdict import Verdict


@pytest.fixture
def one(monkeypatch, tmp_path) -> Callable[[Claims], None]:
    """Return what makes given claims the only suite there is, with certificates of its own."""
    source = tmp_path / "source.py"
    source.write_text("x = 1\n")
    monkeypatch.setattr(certificates, "FOLDER", tmp_path / "certificates")

    def use(claims: Claims) -> None:
        suite = Suite("k", {"claim": lambda: claims}, (source,))
        monkeypatch.setattr(suites, "suites", lambda: {("k", "s"): suite})

    return use


def goal(term: z3.BoolRef) -> Claims:
    return Claims(obligations=[Obligation("goal", None, (), term)])


def test_those_of_megamoe_are_found():
    assert {name for kernel, name in suites.suites() if kernel == "megamoe"} == {
        "order",
        "buffer",
        "barriers",
        "protocol",
    }


def test_the_command_proves_one():
    result = CliRunner().invoke(cli.command, ["--kernel", "megamoe", "--variant", "buffer", "--fresh"])
    assert result.exit_code == 0, result.output
    for name in ("regions", "slots", "pool-16"):
        assert f"PROVED {name}: " in result.output
    assert "1 variants: 1 PROVED" in result.output


def test_a_false_claim_is_refuted(one):
    one(goal(z3.Int("x") > 0))
    (result,) = suites.check("k", "s").properties
    assert result.verdict is Verdict.REFUTED
    assert [f.message for f in result.findings] == ["goal"]


def test_a_barrier_that_turns_early_is_refuted(one):
    one(Claims(obligations=list(barrier.grid_barrier(spread=0))))
    assert suites.check("k", "s").verdict is Verdict.REFUTED


def test_claiming_nothing_proves_nothing(one):
    one(Claims())
    assert suites.check("k", "s").verdict is Verdict.UNKNOWN


def test_certificates_end_with_their_sources(one, tmp_path):
    x = z3.Int("x")
    one(goal(x + 1 > x))
    report = suites.check("k", "s")
    assert certificates.write(report, suites.NO_CONTRACT) is not None
    assert suites.check("k", "s").reused
    assert suites.is_current("k", "s")
    (tmp_path / "source.py").write_text("x = 2\n")
    assert not suites.is_current("k", "s")
    assert not suites.check("k", "s").reused


def test_code_that_was_compiled_otherwise_is_other_code():
    suite = suites.suites()["megamoe", "order"]
    assert replace(suite, compiled=lambda: "text").digest() != suite.digest()
    assert replace(suite, sources=(Path(__file__),)).digest() != suite.digest()
