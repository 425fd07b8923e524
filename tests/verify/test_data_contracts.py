"""Clauses on the data of a tensor: assumed of each element that a proof reads, and of nothing else."""

import pytest
import z3
from tilelang import language as T

from dsv4_kernels.contract import Contract, ContractError
from verify import ir
from verify.encode import every_element, instances_of, of_every_pair
from verify.engine import check_kernel
from verify.signature.dispatch import Dispatch
from verify.verdict import VariantReport, Verdict

SIZE, THREADS = 256, 128
ROWS = ("0 <= m", "m <= 65536")


def lookup():
    m = T.dynamic("m")

    @T.prim_func
    def table_lookup(slot: T.Tensor[(m, THREADS), T.int32], out: T.Tensor[(m, THREADS), T.float32]):
        with T.Kernel(m, threads=THREADS) as b:
            table = T.alloc_shared((SIZE,), T.float32)
            for j in T.Parallel(SIZE):
                table[j] = T.cast(j, "float32")
            for j in T.Parallel(THREADS):
                out[b, j] = table[slot[b, j]]

    return table_lookup


def bounds(*clauses: str) -> VariantReport:
    return check_kernel("k", "v", lookup(), Contract((*ROWS, *clauses)), {}, fresh=True)


def verdict(report: VariantReport, name: str = "bounds") -> Verdict:
    return next(p for p in report.properties if p.name == name).verdict


@pytest.mark.parametrize("clauses", [("0 <= slot < 256",), ("0 <= slot", "slot < 256")])
def test_a_contract_on_data_is_used_and_listed(clauses):
    report = bounds(*clauses)
    assert verdict(report) is Verdict.PROVED, report.properties
    found = next(p for p in report.properties if p.name == "bounds").assumptions
    for clause in clauses:
        assert any(a.startswith(f"ASSUMED {clause} (every element of slot; ") for a in found)
        assert all("no launch checks it" in a for a in found if "slot" in a)
    assert set(report.witness) == {"m"}


@pytest.mark.parametrize("clause", ["0 <= slot < 257", "slot < 256", "0 <= slot"])
def test_one_that_is_too_weak_does_not_help(clause):
    assert verdict(bounds(clause)) is Verdict.REFUTED


def test_without_one_the_data_may_be_anything():
    report = bounds()
    assert verdict(report) is Verdict.REFUTED
    assert not any("slot" in a for p in report.properties for a in p.assumptions)


def test_no_element_need_exist():
    """A clause that nothing satisfies must not make the contract, or a proof, vacuous."""
    report = bounds("0 <= slot", "slot < m - m")
    assert report.witness
    assert verdict(report, "overflow") is Verdict.PROVED


@pytest.mark.parametrize(
    "clauses", [("10 <= slot", "slot < 5"), ("5000000000 <= slot",), ("m <= slot", "slot < m")]
)
def test_promises_that_no_element_can_keep_are_refuted(clauses):
    report = bounds(*clauses)
    assert verdict(report, "contract") is Verdict.REFUTED
    assert report.verdict is Verdict.REFUTED


def test_clauses_on_tensors_are_not_checked_of_dims():
    contract = Contract(("0 < m", "0 <= slot < 256"), tensors=frozenset({"slot"}))
    contract.check("k", m=1)
    with pytest.raises(ContractError, match="0 < m"):
        contract.check("k", m=0)


def scatter():
    m, n = T.dynamic("m"), T.dynamic("n")

    @T.prim_func
    def table_update(
        x: T.Tensor[(m,), T.float32], slots: T.Tensor[(m,), T.int32], table: T.Tensor[(n,), T.float32]
    ):
        with T.Kernel(T.ceildiv(m, THREADS), threads=THREADS) as b:
            for i in T.Parallel(THREADS):
                if b * THREADS + i < m:
                    table[slots[b * THREADS + i]] = x[b * THREADS + i]

    return table_update


@pytest.mark.parametrize(
    ("clauses", "verdict"), [(("distinct(slots)",), Verdict.PROVED), ((), Verdict.REFUTED)]
)
def test_no_element_is_written_twice_where_places_are_distinct(clauses, verdict):
    contract = Contract(("0 <= m", "m <= 65536", "0 < n", "n <= 65536", *clauses))
    dispatch = Dispatch((), "v", in_place=("table",))
    report = check_kernel("k", "v", scatter(), contract, {}, fresh=True, dispatch=dispatch)
    found = {p.name: p.verdict for p in report.properties}
    assert found["coverage"] is verdict
    if clauses:
        assert {found[name] for name in ("bounds", "race", "refinement")} == {Verdict.PROVED}
        assert any("distinct(slots)" in a for p in report.properties for a in p.assumptions)


def test_distinct_elements_may_share_a_negative_value():
    symbol = every_element(["slots"], ir.INT32)["slots"]
    given = of_every_pair("distinct(slots)", symbol)
    slots = z3.Function("param!int32~slots", z3.IntSort(), z3.IntSort())
    i, j = z3.Ints("i j")
    same = slots(i) == slots(j)
    for claim, follows in ((z3.Implies(slots(i) >= 0, i == j), True), (i == j, False)):
        solver = z3.Solver()
        solver.add(*(h.term for h in instances_of([given], [same])), same, z3.Not(claim))
        assert (solver.check() == z3.unsat) is follows
