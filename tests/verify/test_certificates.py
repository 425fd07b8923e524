"""Certificates: written for what is proved, bound to text, contract and verifier."""

import json
from pathlib import Path
from typing import Any

import pytest
from tilelang import language as T

from dsv4_kernels.contract import Contract
from tests.verify import samples
from verify import certificates, extract
from verify.engine import check, check_kernel
from verify.environment import compiler_environment
from verify.extract import cuda_sha256
from verify.verdict import Finding, PropertyResult, VariantReport, Verdict


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(certificates, "FOLDER", tmp_path)
    return tmp_path


def report(*verdicts: Verdict, digest: str = "ab" * 32) -> VariantReport:
    properties = [PropertyResult(f"p{n}", v, depends=("p0",)) for n, v in enumerate(verdicts)]
    return VariantReport("kernel", "variant", digest, ("0 <= m",), {"n": 4}, {"m": 1}, properties)


def written(report: VariantReport) -> Path:
    path = certificates.write(report, CONTRACT)
    assert path is not None
    return path


CONTRACT = Contract(("0 <= m",))
PROVED, REFUTED = Verdict.PROVED, Verdict.REFUTED


def test_a_proved_text_is_found_by_its_digest(folder):
    path = certificates.write(report(PROVED, PROVED), CONTRACT)
    assert path == folder / "kernel" / "variant.json"
    assert certificates.is_proved("ab" * 32)
    assert not certificates.is_proved("cd" * 32)


@pytest.mark.parametrize("other", [v for v in Verdict if v is not PROVED])
def test_what_is_not_proved_gets_no_certificate_and_loses_its_old_one(folder, other):
    certificates.write(report(PROVED), CONTRACT)
    assert certificates.write(report(PROVED, other), CONTRACT) is None
    assert not certificates.is_proved("ab" * 32)
    assert certificates.load("kernel", "variant") is None


def test_a_certificate_with_another_verdict_inside_does_not_count(folder):
    path = written(report(PROVED))
    data = json.loads(path.read_text())
    data["properties"][0]["verdict"] = "UNKNOWN"
    path.write_text(json.dumps(data))
    certificates._proved.cache_clear()
    assert not certificates.is_proved("ab" * 32)


def test_writing_twice_gives_the_same_bytes(folder):
    first = written(report(PROVED)).read_bytes()
    again = report(PROVED)
    again.seconds = again.properties[0].seconds = 3.0
    assert written(again).read_bytes() == first


def test_a_certificate_matches_only_its_text_contract_dims_and_verifier(folder, monkeypatch):
    certificates.write(report(PROVED), CONTRACT)
    known = certificates.load("kernel", "variant")
    assert known is not None
    assert certificates.matches(known, "ab" * 32, CONTRACT, {"n": 4})
    assert not certificates.matches(known, "cd" * 32, CONTRACT, {"n": 4})
    assert not certificates.matches(known, "ab" * 32, Contract(("1 <= m",)), {"n": 4})
    assert not certificates.matches(known, "ab" * 32, CONTRACT, {"n": 8})
    monkeypatch.setattr(certificates, "verifier_sha256", lambda: "0" * 64)
    assert not certificates.matches(known, "ab" * 32, CONTRACT, {"n": 4})
    certificates._proved.cache_clear()
    assert certificates.is_proved("ab" * 32)  # the text is still the one that was proved


def test_a_matching_certificate_is_used_and_a_fresh_run_agrees(folder):
    prim_func = samples.exponentials()
    first = check_kernel("kernel", "variant", prim_func, samples.ROWS, {})
    assert first.verdict is PROVED, first.properties
    assert not first.reused
    certificates.write(first, samples.ROWS)
    second = check_kernel("kernel", "variant", prim_func, samples.ROWS, {})
    assert second.reused
    assert [(p.name, p.verdict, p.obligations, p.rlimit) for p in second.properties] == [
        (p.name, p.verdict, p.obligations, p.rlimit) for p in first.properties
    ]
    third = check_kernel("kernel", "variant", prim_func, samples.ROWS, {}, fresh=True)
    assert not third.reused
    assert [p.rlimit for p in third.properties] == [p.rlimit for p in first.properties]


def test_a_certificate_is_not_one_of_another_grid(folder):
    def copied(block_rows: int):
        m = T.dynamic("m")

        @T.prim_func
        def copied_kernel(x: T.Tensor[(m,), T.float32], out: T.Tensor[(m,), T.float32]):
            with T.Kernel(T.ceildiv(m, block_rows), threads=32) as bx:
                tx = T.get_thread_binding(0)
                if bx * 32 + tx < m:
                    out[bx * 32 + tx] = x[bx * 32 + tx]

        return copied_kernel

    whole, half = copied(32), copied(64)
    first = check_kernel("kernel", "variant", whole, samples.ROWS, {})
    assert first.verdict is PROVED, first.properties
    certificates.write(first, samples.ROWS)
    assert extract.extract(half).cuda_sha256 == first.cuda_sha256
    assert check_kernel("kernel", "variant", half, samples.ROWS, {}).verdict is REFUTED


def test_the_digest_is_of_the_text_that_is_compiled():
    extracted = samples.context(samples.scale_rows()).extracted
    assert (
        extracted.cuda_sha256
        == cuda_sha256(extracted.cuda_text)
        == certificates.cuda_sha256(extracted.cuda_text)
    )


def test_a_property_counts_only_with_what_it_rests_on(monkeypatch):
    context = samples.context(samples.scale_rows(), Contract(("0 <= m", "m <= 2147483647")))
    result = check("k", "v", context.extracted, context.contract, {})
    verdicts = {p.name: p.verdict for p in result.properties}
    assert verdicts["overflow"] is REFUTED
    assert verdicts["bounds"] is Verdict.UNKNOWN
    bounds = next(p for p in result.properties if p.name == "bounds")
    assert isinstance(bounds.findings[-1], Finding)
    assert "rests on overflow" in bounds.findings[-1].message


def test_clauses_that_no_proof_needs_are_named():
    clauses = ("0 <= m", "m <= 65536", "m % 2 != 3")
    context = samples.context(samples.gemm(), Contract(clauses))
    result = check("k", "v", context.extracted, context.contract, {})
    assert "m % 2 != 3" in result.unused_clauses
    assert "m <= 65536" not in result.unused_clauses


def test_an_unchanged_source_is_not_lowered_again(folder, monkeypatch):
    prim_func = samples.exponentials()
    certificates.write(check_kernel("kernel", "variant", prim_func, samples.ROWS, {}), samples.ROWS)
    lowered: list[object] = []
    lower = extract.extract
    monkeypatch.setattr(
        extract, "extract", lambda *args, **more: lowered.append(args) or lower(*args, **more)
    )
    assert check_kernel("kernel", "variant", samples.exponentials(), samples.ROWS, {}).reused
    assert not lowered
    monkeypatch.setenv("TILELANG_LAYOUT_COST_MODEL", "other")
    assert check_kernel("kernel", "variant", prim_func, samples.ROWS, {}).reused  # by its text
    assert lowered
    assert not check_kernel("kernel", "variant", prim_func, Contract(("0 <= m", "m <= 7")), {}).reused


@pytest.mark.parametrize(("width", "name"), [(64, "scale_rows"), (128, "other_name")])
def test_the_source_hash_sees_constants_and_names(width, name):
    def kernel(columns: int, symbol: str):
        m = T.dynamic("m")

        @T.prim_func
        def rows(x: T.Tensor[(m, columns), T.float32]):
            with T.Kernel(m, threads=columns) as b:
                for j in T.Parallel(columns):
                    x[b, j] = x[b, j] * 2

        prim_func: Any = rows
        return prim_func.with_attr("global_symbol", symbol)

    base = extract.source_sha256(kernel(128, "scale_rows"))
    assert extract.source_sha256(kernel(128, "scale_rows")) == base
    assert extract.source_sha256(kernel(width, name)) != base
    assert extract.source_sha256(kernel(128, "scale_rows"), pass_configs={"tl.x": True}) != base
    assert extract.source_sha256(kernel(128, "scale_rows"), {"kind": "cuda", "arch": "sm_90"}) != base


@pytest.fixture
def installations(tmp_path):
    """Return the folders of the same compiler in two checkouts."""
    for checkout in ("one", "two"):
        templates = tmp_path / checkout / "tilelang" / "src"
        templates.mkdir(parents=True)
        (templates / "gemm.h").write_text("template")
    return [tmp_path / checkout / "tilelang" for checkout in ("one", "two")]


def test_the_same_compiler_elsewhere_is_the_same_environment(installations):
    one, two = (
        compiler_environment(
            {
                "TL_TEMPLATE_PATH": f"{package}/3rdparty/../src",
                "TVM_LIBRARY_PATH": f"{package}/lib:{package}/src",
                "TILELANG_CACHE_DIR": f"{package.parent}/cache",
                "TILELANG_LAYOUT_COST_MODEL": "weighted",
                "HOME": str(package.parent),
            },
            package,
        )
        for package in installations
    )
    assert one == two
    assert set(one) == {"TL_TEMPLATE_PATH", "TVM_LIBRARY_PATH", "TILELANG_LAYOUT_COST_MODEL"}


def test_folders_outside_the_package_count_by_their_files(installations, tmp_path):
    def environment(templates: Path) -> dict[str, str]:
        return compiler_environment({"TL_TEMPLATE_PATH": str(templates)}, installations[0])

    own, foreign = environment(installations[0] / "src"), environment(installations[1] / "src")
    assert own != foreign
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "gemm.h").write_text("template")
    assert environment(copy) == foreign
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "gemm.h").write_text("another template")
    assert environment(changed) != foreign
    assert environment(tmp_path / "none") not in (own, foreign)


def test_the_source_hash_sees_the_compiler_s_templates(installations, monkeypatch):
    prim_func = samples.exponentials()
    base = extract.source_sha256(prim_func)
    monkeypatch.setenv("TL_TEMPLATE_PATH", str(installations[0] / "src"))
    elsewhere = extract.source_sha256(prim_func)
    assert elsewhere != base
    monkeypatch.setenv("TL_TEMPLATE_PATH", str(installations[1] / "src"))
    assert extract.source_sha256(prim_func) == elsewhere
