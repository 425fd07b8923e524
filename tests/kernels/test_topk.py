"""Top-k at the edges: equal scores, infinities, both zeros, short rows."""

import math

import pytest
import torch

from dsv4_kernels.attention import reference
from dsv4_kernels.attention.topk import topk
from dsv4_kernels.contract import ContractError

K = 512


@pytest.mark.interpret
def test_edges():
    n = 1028
    scores = torch.zeros(4, n)
    scores[0, 700:] = -0.0  # equal to the zeros before
    scores[1, ::2] = -math.inf  # 514 are left
    scores[2] = torch.arange(n).float() % 7
    scores[2, 5], scores[2, 6] = math.inf, -math.inf
    scores[3] = -torch.arange(n).float()
    lengths = torch.tensor([n, n + 9, n, 100], dtype=torch.int32)
    got = topk(scores, lengths, K)
    assert torch.equal(got, reference.index_topk(scores, lengths, K))
    assert torch.equal(got[0], torch.arange(K, dtype=torch.int32))
    assert torch.equal(got[1], torch.arange(1, 2 * K, 2, dtype=torch.int32))
    assert 5 in got[2]
    assert 6 not in got[2]
    assert (got[3, 100:] == -1).all()


def test_contract_names_the_clause():
    scores, lengths = torch.zeros(1, 64), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ContractError, match="k in"):
        topk(scores, lengths, 8)
    with pytest.raises(ContractError, match="n % VECTOR == 0"):
        topk(scores[:, :63].contiguous(), lengths, K)
