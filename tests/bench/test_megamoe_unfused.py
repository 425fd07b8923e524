"""The unfused chain over two gloo processes: the bits of `distributed`, with FP4 and FP8 weights."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from bench import megamoe_unfused
from dsv4_kernels.quant.act_quant import act_quant
from megamoe import Experts, distributed
from megamoe.launches import fp8_experts
from tests.megamoe import layers

RANKS, TOKENS = 2, (40, 33)
CHANNELS = 512  # grouped products of FP8 weights take them four blocks at a time


def _experts(rank, is_fp8):
    if not is_fp8:
        return Experts(*layers.share_of(layers.both(), rank, RANKS))
    local = layers.EXPERTS // RANKS
    first, second = (2 * CHANNELS, CHANNELS), (CHANNELS, CHANNELS)
    return Experts(fp8_experts(*first, rank, local), fp8_experts(*second, RANKS + rank, local))


def _work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    _, idx, weights = layers.tokens(TOKENS[rank], rank)
    found = []
    for is_fp8 in (False, True):
        experts = _experts(rank, is_fp8)
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(TOKENS[rank], experts.hidden, generator=generator).bfloat16()
        inputs = *act_quant(x, 128), idx, weights
        wanted = distributed.mega_moe(*inputs, experts)
        call, sent = megamoe_unfused.chain(experts, *inputs, compiles=False)
        found.append((torch.equal(call().view(torch.int16), wanted.view(torch.int16)), sent))
    torch.save((found, idx), os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes():
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, (folder,), nprocs=RANKS)
        saved = [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(RANKS)]
    local = layers.EXPERTS // RANKS
    rows = [torch.bincount(idx[idx >= 0].long() // local, minlength=RANKS) for _, idx in saved]
    for found, _ in saved:
        for is_equal, sent in found:
            assert is_equal
            assert torch.equal(sent, torch.stack(rows))
