"""The layer over four gloo processes: the bits of one process with all experts."""

import os
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from megamoe import Experts, MegaMoE, mega_moe
from tests.megamoe import layers

RANKS = 4
# Tokens of each rank, share of masked slots, and how uneven the routing is.
CASES = (
    ((5, 5, 5, 5), 0.2, 1.0),
    ((7, 0, 1, 12), 0.0, 1.0),
    ((0, 0, 0, 0), 0.0, 1.0),
    ((6, 3, 9, 2), 1.0, 1.0),
    ((16, 8, 0, 4), 0.1, 12.0),
)
OPTION_CASE = 1


def _inputs(case):
    counts, masked, skew = CASES[case]
    return [layers.tokens(count, 10 * case + rank, masked, skew) for rank, count in enumerate(counts)]


def _options(l1, l2):
    sizes: dict[str, Any] = {"num_experts": layers.EXPERTS, "topk": layers.TOPK, "max_tokens": 64}
    return MegaMoE(l1, l2, **sizes, shared=layers.both_fp8(5, experts=1))


def _work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    l1, l2 = (layers.share(raw, rank, RANKS) for raw in layers.both())
    moe = MegaMoE(l1, l2, num_experts=layers.EXPERTS, topk=layers.TOPK, max_tokens=16, count_received=True)
    assert moe.backend == "distributed"
    outputs = [moe(*_inputs(case)[rank]) for case in range(len(CASES))]
    x, idx, weights = _inputs(OPTION_CASE)[rank]
    found = {
        "options": _options(*layers.share_of(layers.both_fp8(), rank, RANKS))(x, idx, weights),
        "function": mega_moe(x, idx, weights, Experts(l1, l2), group=dist.group.WORLD),
    }
    torch.save((outputs, found, moe.received), os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_four_processes():
    alone = MegaMoE(
        *layers.both(), num_experts=layers.EXPERTS, topk=layers.TOPK, max_tokens=64, count_received=True
    )
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, (folder,), nprocs=RANKS)
        saved = [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(RANKS)]

    def joined(parts):
        return torch.cat(list(parts)).view(torch.int16)

    wanted = []
    for case in range(len(CASES)):
        everything = [torch.cat(parts) for parts in zip(*_inputs(case), strict=True)]
        wanted.append(alone(*everything).view(torch.int16))
        assert torch.equal(joined(outputs[case] for outputs, _, _ in saved), wanted[-1]), CASES[case]
    everything = [torch.cat(parts) for parts in zip(*_inputs(OPTION_CASE), strict=True)]
    with_options = _options(*layers.both_fp8())(*everything).view(torch.int16)
    assert torch.equal(joined(found["options"] for _, found, _ in saved), with_options)
    assert torch.equal(joined(found["function"] for _, found, _ in saved), wanted[OPTION_CASE])
    assert alone.received is not None
    assert torch.cat([received for _, _, received in saved]).tolist() == alone.received.tolist()
