"""The correction of the compiler's register count: in the block and thread that ask for it, nowhere else."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from dsv4_kernels.tile.wgmma import corrected, is_corrected
from verify import corpus, extract
from verify.tasks import Task, load_file

BAD = corpus.FOLDER / "fence_registers_bad.py"


def text() -> str:
    (prim_func,) = load_file(BAD).KERNELS.values()
    return extract.extract(prim_func).cuda_text


def fences(cuda: str) -> set[str]:
    return {
        line.strip() for line in cuda.splitlines() if "warpgroup_fence_operand" in line and "float*" in line
    }


def test_it_is_local_to_its_block():
    stock = fences(text())
    with corrected():
        own = fences(text())
    assert stock
    assert own
    assert stock.isdisjoint(own)
    assert fences(text()) == stock


def test_it_is_local_to_its_thread():
    with corrected(), ThreadPoolExecutor(1) as pool:
        assert is_corrected()
        assert not pool.submit(is_corrected).result()


def test_it_ends_with_an_error():
    with pytest.raises(ValueError, match="lowering"), corrected():
        raise ValueError("lowering")
    assert not is_corrected()


def test_files_of_others_get_the_compiler_as_it_ships():
    with Task("any", "kernel", str(BAD)).compiler():
        assert not is_corrected()
    with Task("act_quant", "any").compiler():
        assert is_corrected()


def test_it_decides_the_text_so_it_is_part_of_the_source():
    (prim_func,) = load_file(BAD).KERNELS.values()
    stock = extract.source_sha256(prim_func)
    with corrected():
        assert extract.source_sha256(prim_func) != stock
