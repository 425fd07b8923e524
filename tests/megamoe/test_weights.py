"""Weights as the fused kernel streams them: every value once, where its thread looks for it."""

import torch

from megamoe.experts import Experts
from megamoe.instances import CONFIG, OPTIONS
from megamoe.virtual import packed_experts
from megamoe.weights import GROUP_N, fp8_words
from tests.megamoe import layers


def test_fp8_words_stand_where_threads_read_them():
    codes = torch.randint(0, 256, (3, GROUP_N, 128), dtype=torch.uint8)
    words = fp8_words(codes).view(torch.uint8).view(3, 256, 16, 4)
    row, q, half, t = torch.meshgrid(*(torch.arange(n) for n in (GROUP_N, 4, 2, 4)), indexing="ij")
    found = words[:, row // 2 * 4 + q // 2 * 2 + row % 2, t * 4 + q % 2 * 2 + half]
    assert torch.equal(found, codes.view(3, GROUP_N, 4, 2, 4, 4))
    places = (row // 2 * 4 + q // 2 * 2 + row % 2) * 16 + t * 4 + q % 2 * 2 + half
    assert sorted(places.flatten().tolist()) == list(range(256 * 16))


def test_steps_of_all_experts():
    """Tile by tile, 128 channels of gate rows and then of up rows; the scale of each beside it."""
    local, tiles, blocks = 2, 2, 2  # tiles of linear 1, blocks of 128 channels
    both = layers.both_fp8()
    experts = Experts(*layers.share_of(both, 0, layers.EXPERTS // local))
    packed = packed_experts([experts, experts])
    steps = 2 * (tiles * blocks + 1 * 2)
    assert packed.words.shape == (2, local * steps, GROUP_N, 128)
    codes, byte = both[0].w.view(torch.uint8), both[0].w_scale.view(torch.uint8).int()
    for expert, tile, block, group in ((0, 0, 0, 0), (1, 1, 0, 1), (1, 0, 1, 1)):
        step = expert * steps + (tile * blocks + block) * 2 + group
        first, channel = (group * tiles + tile) * GROUP_N, block * 128
        wanted = codes[expert, first : first + GROUP_N, channel : channel + 128]
        assert torch.equal(packed.words[1, step], wanted)
        scale = 2.0 ** (int(byte[expert, group * tiles + tile, block]) - 127)
        assert packed.offsets[1, step].view(torch.float32).unique().tolist() == [scale]
    assert packed.factors.unique().tolist() == [1.0]


def test_a_shared_expert_comes_first():
    local = OPTIONS.num_experts - 1
    experts = Experts(*layers.share_of(layers.both(), 0, layers.EXPERTS // local))
    shared = Experts(*layers.both_fp8(5, experts=1))
    alone, packed = packed_experts([experts]), packed_experts([experts], shared)
    begin = OPTIONS.first_step(1)
    assert CONFIG.first_step(local) == alone.words.shape[1]
    assert OPTIONS.all_steps == packed.words.shape[1] == begin + alone.words.shape[1]
    assert torch.equal(packed.words[:, begin:].view(torch.int32), alone.words.view(torch.int32))
