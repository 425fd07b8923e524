"""How the compiler's simplifiers ask z3: at launches and in proofs alike, and nowhere else."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import tilelang
import z3

from dsv4_kernels import runtime
from dsv4_kernels.quant import act_quant
from dsv4_kernels.tile import corrections, simplifier, wgmma
from tests.verify import samples
from verify import extract


def settings() -> dict[str, str]:
    return {name: z3.get_param(name) for name in simplifier.SETTINGS}


@pytest.fixture
def inside(monkeypatch):
    """The settings of each pass that places barriers, and of the lowering around it, which ends there."""
    seen: dict[str, dict[str, str]] = {}

    def end(*args, **more):
        seen["lowering"] = settings()
        simplifier._thread_sync("shared")(None)

    def barriers(scope):
        def run(module):
            seen["barriers"] = settings()
            raise RuntimeError("of the compiler")

        return run

    monkeypatch.setattr(simplifier, "_stock", barriers)
    monkeypatch.setattr(tilelang, "lower", end)
    monkeypatch.setattr(tilelang, "compile", end)
    return seen


def test_a_proof_lowers_with_them_except_where_barriers_are_placed(inside):
    before = settings()
    with corrections.corrected(), pytest.raises(RuntimeError, match="of the compiler"):
        extract.extract(samples.exponentials())
    assert inside["lowering"] == simplifier.SETTINGS
    assert inside["barriers"] == before != simplifier.SETTINGS
    assert settings() == before


def test_a_launch_compiles_with_them(inside):
    before = settings()
    with pytest.raises(RuntimeError, match="of the compiler"):
        runtime._compile(act_quant.make_kernel, act_quant.SPEC.variants[0].kwargs)
    assert inside["lowering"] == simplifier.SETTINGS
    assert inside["barriers"] == before
    assert settings() == before


@pytest.mark.parametrize("compiler", [nullcontext, wgmma.corrected])
def test_others_lower_with_the_compilers_own(inside, compiler):
    before = settings()
    with pytest.raises(RuntimeError, match="of the compiler"), compiler():
        extract.extract(samples.exponentials())
    assert inside == {"lowering": before, "barriers": before}


def test_they_are_local_to_their_thread():
    with corrections.corrected(), ThreadPoolExecutor(1) as pool:
        assert simplifier.is_quick()
        assert not pool.submit(simplifier.is_quick).result()
    assert not simplifier.is_quick()


def test_they_are_part_of_the_source():
    prim_func = samples.exponentials()
    with wgmma.corrected():
        stock = extract.source_sha256(prim_func)
    with corrections.corrected():
        assert extract.source_sha256(prim_func) != stock


def test_a_launch_and_a_proof_have_one_text():
    """Of a kernel whose simplifications take many questions, compiled in the runtime's way but for nvcc."""
    variant = act_quant.SPEC.variants[0]
    prim_func = act_quant.make_kernel(**variant.kwargs)
    with corrections.corrected():
        proved = extract.extract(prim_func).cuda_text
    with corrections.corrected(), simplifier.lowering(), tilelang.tvm.target.Target(dict(extract.TARGET)):
        launched = tilelang.lower(prim_func, target=tilelang.tvm.target.Target(dict(extract.TARGET)))
    assert launched.kernel_source == proved
