"""The indexer's scores over pages: missing pages, lengths, other batches."""

import pytest
import torch

from dsv4_kernels.attention import index_reference
from dsv4_kernels.attention.index_logits import PAGE_ROWS, PART_PAGES, SPEC, index_logits_paged
from dsv4_kernels.contract import ContractError
from tests.compare import bits, call, mismatch

DIMS = {"m": 3, "num_heads": 8, "num_parts": 1, "num_pages": 20, "ragged": 1}


@pytest.mark.interpret
def test_interpreter_matches_reference_on_ragged_queries():
    case = next(c for c in SPEC.cases if c.id == "ragged")
    inputs = SPEC.make_inputs(case.dims, torch.device("cpu"), 1)
    assert mismatch(SPEC, inputs, call(SPEC, inputs)) is None


def test_scores_are_those_of_the_formula():
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(128, 128, generator=generator).to(torch.float8_e4m3fn)
    q = torch.randn(1, 16, 128, generator=generator).to(torch.float8_e4m3fn)
    scale, weights = torch.rand(128, generator=generator), torch.randn(1, 16, generator=generator)
    table = torch.full((1, PART_PAGES), -1, dtype=torch.int32)
    table[0, 0], table[0, 2] = 1, 0
    lengths = torch.tensor([190], dtype=torch.int32)
    cache = index_reference.cache_write(keys, scale)
    got = index_logits_paged(q, weights, cache, table, lengths)[0]
    want = (weights[0] @ (q[0].float() @ (keys.float() * scale[:, None]).T).relu()).view(2, PAGE_ROWS)
    assert torch.allclose(got[:64], want[1], atol=1e-4)
    assert not got[64:128].any()
    assert torch.allclose(got[128:190], want[0, :62], atol=1e-4)
    assert (got[190:] == -torch.inf).all()


def test_contract_names_the_clause():
    q, weights, cache, table, lengths = SPEC.make_inputs(DIMS, torch.device("cpu"), 1)
    with pytest.raises(ContractError, match=r"page_table\.shape"):
        index_logits_paged(q, weights, cache, table.repeat(1, 2)[:, :17].clone(), lengths)
    with pytest.raises(ContractError, match="num_heads in"):
        index_logits_paged(q[:, :3].clone(), weights[:, :3].clone(), cache, table, lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in SPEC.cases if "gpu" in c.tags], ids=lambda c: c.id)
def test_gpu_matches_reference(case):
    inputs = SPEC.make_inputs(case.dims, torch.device("cuda"), 1)
    assert mismatch(SPEC, inputs, SPEC.fn(*inputs)) is None


@pytest.mark.gpu
def test_gpu_rows_do_not_depend_on_the_batch():
    dims = {**DIMS, "m": 70, "num_heads": 64, "num_parts": 3, "num_pages": 900}
    inputs = SPEC.make_inputs(dims, torch.device("cuda"), 3)
    full = index_logits_paged(*inputs)
    for first, count in ((0, 1), (7, 20), (69, 1)):
        part = [x if i == 2 else x[first : first + count].clone() for i, x in enumerate(inputs)]
        assert torch.equal(bits(index_logits_paged(*part)), bits(full[first : first + count]))
