"""Suites of proofs: MegaMoE's are found, what is false is refuted, and sources of old are noticed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import z3
from click.testing import CliRunner
from tilelang import language as T

from dsv4_kernels.contract import Contract
from megamoe import barrier
from verify import certificates, cli, engine, suites
from verify.extract import extract
from verify.properties import Claims, all_properties
from verify.signature.dispatch import Dispatch
from verify.solve import Obligation
from verify.suites import Suite
from verify.verdict import Verdict

BLOCKS, THREADS = 4, 128


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
        "barriers",
        "buffer",
        "invariance",
        "invariance-ahead",
        "invariance-flash-fp4",
        "invariance-flash-fp8",
        "invariance-flash-shared",
        "invariance-fp8",
        "invariance-options",
        "invariance-pro-fp4",
        "invariance-pro-fp8",
        "invariance-pro-shared",
        "invariance-wide",
        "invariance-widened",
        "machine",
        "machine-ahead",
        "machine-flash-fp4-2048",
        "machine-flash-fp4-4096",
        "machine-flash-fp4-64",
        "machine-flash-fp8-4096",
        "machine-flash-fp8-8",
        "machine-flash-shared-64",
        "machine-fp8",
        "machine-options",
        "machine-plan",
        "machine-plan-flash",
        "machine-plan-odd",
        "machine-plan-pro",
        "machine-pro-fp4-4096",
        "machine-wide",
        "machine-widened",
        "order",
        "plan",
        "plan-flash",
        "plan-odd",
        "plan-pro",
        "properties",
        "properties-ahead",
        "properties-flash-fp4-2048",
        "properties-flash-fp4-4096",
        "properties-flash-fp4-64",
        "properties-flash-fp8-4096",
        "properties-flash-fp8-8",
        "properties-flash-shared-64",
        "properties-fp8",
        "properties-options",
        "properties-plan",
        "properties-plan-flash",
        "properties-plan-odd",
        "properties-plan-pro",
        "properties-pro-fp4-4096",
        "properties-wide",
        "properties-widened",
        "protocol",
        "protocol-ahead",
        "protocol-fp8",
        "protocol-options",
        "protocol-wide",
        "protocol-widened",
        "refinement",
        "refinement-ahead",
        "refinement-flash-fp4-1024-of-8",
        "refinement-flash-fp4-2048",
        "refinement-flash-fp4-4096",
        "refinement-flash-fp4-64",
        "refinement-flash-fp4-64-of-8",
        "refinement-flash-fp8-4096",
        "refinement-flash-fp8-8",
        "refinement-flash-shared-64",
        "refinement-fp8",
        "refinement-options",
        "refinement-plan",
        "refinement-plan-flash",
        "refinement-plan-odd",
        "refinement-plan-pro",
        "refinement-pro-fp4-4096",
        "refinement-wide",
        "refinement-widened",
        "roles",
        "roles-ahead",
        "roles-flash-fp4-2048",
        "roles-flash-fp4-4096",
        "roles-flash-fp4-64",
        "roles-flash-fp8-4096",
        "roles-flash-fp8-8",
        "roles-flash-shared-64",
        "roles-fp8",
        "roles-options",
        "roles-pro-fp4-4096",
        "roles-wide",
        "roles-widened",
        "signals",
        "signals-ahead",
        "signals-flash-fp4-2048",
        "signals-flash-fp4-4096",
        "signals-flash-fp4-64",
        "signals-flash-fp8-4096",
        "signals-flash-fp8-8",
        "signals-flash-shared-64",
        "signals-fp8",
        "signals-options",
        "signals-pro-fp4-4096",
        "signals-wide",
        "signals-widened",
        "stage",
        "stage-flash-fp4-64",
        "stage-flash-shared-64",
        "stage-options",
        "stage-pro-fp4-4096",
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


# --------------------------------------------------------------------------- exchanged tensors
def exchange(together: bool):
    """Each block writes a row of a ring and reads the row of the next: what orders that is no property.

    Args:
        together: two threads of a block write one element as well.
    """

    @T.prim_func
    def kernel(
        x: T.Tensor[(BLOCKS, THREADS), T.float32],
        ring: T.Tensor[(BLOCKS, THREADS), T.float32],
        out: T.Tensor[(BLOCKS, THREADS), T.float32],
    ):
        with T.Kernel(BLOCKS, threads=THREADS) as b:
            tx = T.get_thread_binding()
            ring[b, tx // 2 if together else tx] = x[b, tx]
            T.sync_grid()
            out[b, tx] = ring[(b + 1) % BLOCKS, tx]  # pyright: ignore[reportOperatorIssue]

    return kernel


def race(kernel, exchanged: dict[str, str]):
    extracted = extract(kernel)
    prop = next(p for p in all_properties() if p.name == "race")
    dispatch = Dispatch(exchanged=exchanged)
    report = engine.check("k", "v", extracted, Contract(()), {}, properties=[prop], dispatch=dispatch)
    (result,) = report.properties
    texts = [f.message for f in result.findings if not f.message.startswith("rests on overflow")]
    return result, texts


class TestExchanged:
    @pytest.fixture(autouse=True)
    def claims(self, monkeypatch):
        """Suites of which one is about the sound kernel, and one about another."""
        suites.missing.cache_clear()
        text = extract(exchange(False)).cuda_sha256
        true, false = z3.BoolVal(True), z3.BoolVal(False)
        about = {
            "right": Suite(
                "k", {"holds": lambda: goal(true), "fails": lambda: goal(false)}, (), text=lambda: text
            ),
            "other": Suite("k", {"holds": lambda: goal(true)}, (), text=lambda: "of other code"),
            "none": Suite("k", {"holds": lambda: goal(true)}, ()),
        }
        monkeypatch.setattr(suites, "suites", lambda: {("k", name): s for name, s in about.items()})
        yield
        suites.missing.cache_clear()

    def test_blocks_that_nothing_is_said_of_race(self):
        result, _ = race(exchange(False), {})
        assert result.verdict is Verdict.REFUTED

    def test_a_claim_about_this_code_orders_them_and_is_listed(self):
        result, texts = race(exchange(False), {"ring": "k/right:holds"})
        assert texts == []
        assert any(a.startswith("DISCHARGED by k/right:holds: ") and "ring" in a for a in result.assumptions)

    @pytest.mark.parametrize(
        ("claim", "why"),
        [
            ("k/right:fails", "it is REFUTED"),
            ("k/right:absent", "there is no such claim"),
            ("k/other:holds", "it is about other code"),
            ("k/none:holds", "there is no such claim"),
        ],
    )
    def test_any_other_claim_does_not(self, claim, why):
        result, texts = race(exchange(False), {"ring": claim})
        assert result.verdict is Verdict.UNKNOWN
        assert len(texts) == 1
        assert why in texts[0]

    def test_threads_of_one_block_race_all_the_same(self):
        suites.missing.cache_clear()
        result, _ = race(exchange(True), {"ring": "k/right:holds"})
        assert result.verdict is Verdict.REFUTED
