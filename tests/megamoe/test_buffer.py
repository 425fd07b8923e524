"""The symmetric buffer: regions and slots, proved for all sizes and tried on some."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe import buffer, obligations
from megamoe.buffer import Sizes
from megamoe.instances import FLASH as FLASH_CONFIGS
from megamoe.obligations import RULES
from tests.megamoe.test_schedule import proved, refuted

FLASH = Sizes(8, 8192, 6, 4096, 2048, 32, 4, 64)
PRO = Sizes(8, 8192, 6, 7168, 3072, 48, 4, 64)


def test_regions_do_not_overlap():
    proved(obligations.regions())


def test_slots_are_one_to_one():
    proved(obligations.slots())


def test_mutant_alignment_downwards():
    refuted(obligations.regions(replace(RULES, align=lambda offset: offset / 128 * 128)))


def test_mutant_slots_of_the_next_rank():
    refuted(obligations.slots(replace(RULES, combine_row=lambda r, s, t, tokens, rows: r * rows + s + t)))


@pytest.mark.parametrize(
    "sizes",
    [
        FLASH,
        PRO,
        replace(PRO, tokens=512),
        replace(FLASH, num_ranks=1),
        replace(FLASH, num_ranks=1, block_m=128, widened=True),
    ],
)
def test_no_larger_than_the_published_buffer(sizes):
    assert buffer.buffer_bytes(sizes) <= buffer.published_bytes(sizes)


def test_ring_of_widened_weights():
    """It is as large as the kernel's: 201 MB for a Flash layer."""
    c = FLASH_CONFIGS["fp4-4096"]
    sizes = Sizes(1, c.tokens, c.topk, c.hidden, c.inter, c.num_experts, c.wave_experts, c.block_m, True)
    found = buffer.regions(sizes)
    assert found["wide_ring"].num_bytes == math.prod(c.wide_ring_shape) == 201_326_592
    assert found["widened"].shape == (c.widened_words,)


@pytest.mark.parametrize(("sizes", "gib"), [(PRO, 6.9), (FLASH, 4.1), (replace(PRO, tokens=512), 0.87)])
def test_published_formula(sizes, gib):
    """The formula gives the figures that the specification derives."""
    assert buffer.published_bytes(sizes) / 2**30 == pytest.approx(gib, rel=0.01)


@given(
    st.integers(1, 72),
    st.integers(1, 300),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 16),
    st.sampled_from([16, 64]),
)
@settings(max_examples=50, deadline=None)
def test_layout(ranks, tokens, topk, hidden, inter, experts, block_m):
    sizes = Sizes(ranks, tokens, topk, 128 * hidden, 128 * inter, experts, experts, block_m)
    end = 0
    for region in buffer.regions(sizes).values():
        assert region.offset_bytes >= end
        assert region.offset_bytes % buffer.ALIGNMENT_BYTES == 0
        end = region.offset_bytes + region.num_bytes
    assert end <= buffer.buffer_bytes(sizes) < 2**63


def test_views_share_the_storage():
    sizes = Sizes(2, 4, 2, 256, 128, 2, 1, 16)
    storage = torch.zeros(buffer.buffer_bytes(sizes), dtype=torch.uint8)
    found = buffer.regions(sizes)
    for number, region in enumerate(found.values(), start=1):
        buffer.view(storage, region).view(torch.uint8).fill_(number)
    for number, region in enumerate(found.values(), start=1):
        assert (buffer.view(storage, region).view(torch.uint8) == number).all(), region.name


def test_refuses_sizes_that_the_proofs_do_not_cover():
    with pytest.raises(ValueError, match="requires 0 < num_ranks <= 72, got num_ranks=73"):
        replace(FLASH, num_ranks=73)
    with pytest.raises(ValueError, match="hidden % 128 == 0"):
        replace(FLASH, hidden=100)
    with pytest.raises(ValueError, match=r"requires .* bytes for signals"):
        buffer.view(torch.zeros(1, dtype=torch.uint8), buffer.regions(FLASH)["signals"])
