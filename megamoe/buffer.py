"""The symmetric buffer: named regions, the same on every rank, and where a row's bytes lie in them.

Offsets are plain integer arithmetic over `Sizes`, so the prover reads the same functions (tests/megamoe).
A peer's region is its base address plus the same offset: no offset depends on the rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megamoe import schedule

ALIGNMENT_BYTES = 128  # of every region: a line of the L2, and more than a bulk copy asks for
MAX_RANKS = 72  # of one NVLink domain
MAX_TOPK = 32
MAX_TOKENS = 1 << 17  # a rank
MAX_EXPERTS = 1 << 12  # a rank
MAX_CHANNELS = 1 << 16
_BF16_BYTES, _WORD_BYTES = 2, 4
ACTIVATION_BLOCK = 128  # channels an activation scale


@dataclass(frozen=True)
class Sizes:
    """What the regions' sizes follow from.

    Attributes:
        num_ranks: ranks that exchange tokens, at most MAX_RANKS.
        tokens: most tokens a rank brings.
        topk: experts a token.
        hidden, inter: channels, multiples of 128.
        num_experts: of one rank.
        wave_experts: experts a wave.
        block_m: rows a block.
        widened: FP4 weights are widened to a ring: `Config.widened`.
    """

    num_ranks: int
    tokens: int
    topk: int
    hidden: int
    inter: int
    num_experts: int
    wave_experts: int
    block_m: int
    widened: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes outside the limits that the proofs are for."""
        limits = {
            "num_ranks": MAX_RANKS,
            "tokens": MAX_TOKENS,
            "topk": MAX_TOPK,
            "hidden": MAX_CHANNELS,
            "inter": MAX_CHANNELS,
            "num_experts": MAX_EXPERTS,
            "wave_experts": self.num_experts,
            "block_m": 256,
        }
        for name, limit in limits.items():
            value = getattr(self, name)
            if not 0 < value <= limit:
                raise ValueError(f"mega_moe: requires 0 < {name} <= {limit}, got {name}={value}")
        for name in ("hidden", "inter"):
            if getattr(self, name) % ACTIVATION_BLOCK:
                raise ValueError(f"mega_moe: requires {name} % 128 == 0, got {name}={getattr(self, name)}")

    @property
    def rings(self) -> tuple[int, int]:
        """Blocks of the ring of received rows and of the ring of SwiGLU outputs."""
        return schedule.rings(
            num_ranks=self.num_ranks,
            tokens=self.tokens,
            topk=self.topk,
            num_experts=self.num_experts,
            wave_experts=self.wave_experts,
            block_m=self.block_m,
        )

    @property
    def num_waves(self) -> int:
        """Waves of experts."""
        return -(-self.num_experts // self.wave_experts)

    @property
    def pool_blocks(self) -> int:
        """Blocks that one rank may receive."""
        return schedule.pool_blocks(
            num_ranks=self.num_ranks,
            tokens=self.tokens,
            topk=self.topk,
            num_experts=self.num_experts,
            block_m=self.block_m,
        )


@dataclass(frozen=True)
class Region:
    """A part of the buffer that holds one array.

    Attributes:
        name: of the array.
        offset_bytes: from the buffer's base.
        shape: of the array, row-major.
        dtype: of its elements.
        written_by: who writes it during a call: `own` CTAs, or `peers` too.
        read_by: likewise.
    """

    name: str
    offset_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    written_by: str
    read_by: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the array."""
        return region_bytes(self.shape, self.dtype.itemsize)


def region_bytes(shape: tuple[Any, ...], item_bytes: int) -> Any:
    """Return the bytes of an array."""
    total: Any = item_bytes
    for extent in shape:
        total = total * extent
    return total


def align(offset: Any) -> Any:
    """Return the least multiple of ALIGNMENT_BYTES that is not below `offset`."""
    return schedule.quotient(offset + (ALIGNMENT_BYTES - 1), ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def arrays(
    s: Any, x_ring: Any, h_ring: Any, pool: Any
) -> Iterator[tuple[str, tuple[Any, ...], str, str, str]]:
    """Yield (name, shape, dtype, written by, read by) of every array, in the order of the buffer.

    Signals come first: a peer that only signals touches the first lines of the buffer.

    Args:
        s: `Sizes`, or anything with its attributes.
        x_ring: blocks of the ring of received rows.
        h_ring: blocks of the ring of SwiGLU outputs.
        pool: blocks that a rank may receive.
    """
    scales = schedule.quotient(s.hidden, ACTIVATION_BLOCK)
    h_scales = schedule.quotient(s.inter, ACTIVATION_BLOCK)
    yield "signals", (s.num_ranks,), "int32", "peers", "own"
    yield "grid_word", (1,), "uint32", "own", "own"
    yield "epoch", (1,), "int32", "own", "own"
    yield "status", (1,), "int32", "own", "own"
    yield "counts", (s.num_ranks, s.num_experts), "int32", "peers", "own"
    for kind in ("dispatched", "l1_done", "l2_done"):
        yield kind, (pool,), "int32", "own", "own"
    if s.widened:
        yield "widened", (s.num_experts + s.num_waves,), "int32", "own", "own"
    yield "x", (s.tokens, s.hidden), "float8_e4m3fn", "own", "peers"
    yield "x_scale", (s.tokens, scales), "uint8", "own", "peers"
    yield "topk_idx", (s.tokens, s.topk), "int32", "own", "peers"
    yield "topk_weights", (s.tokens, s.topk), "float32", "own", "peers"
    yield "x_ring", (x_ring * s.block_m, s.hidden), "float8_e4m3fn", "own", "own"
    yield "x_ring_scale", (x_ring, scales, s.block_m), "float32", "own", "own"
    yield "h_ring", (h_ring * s.block_m, s.inter), "float8_e4m3fn", "own", "own"
    yield "h_ring_scale", (h_ring, h_scales, s.block_m), "float32", "own", "own"
    if s.widened:
        # Gate, up and down of the experts of two waves.
        yield "wide_ring", (2 * s.wave_experts, 3 * s.hidden, s.inter), "float8_e4m3fn", "own", "own"
    yield "block_expert", (pool,), "int32", "own", "own"
    yield "row_source", (pool * s.block_m,), "int32", "own", "own"
    yield "row_target", (pool * s.block_m,), "int32", "own", "own"
    yield "row_weight", (pool * s.block_m,), "float32", "own", "own"
    yield "combine", (s.topk, s.tokens, s.hidden), "bfloat16", "peers", "own"


ITEM_BYTES = {"int32": 4, "uint32": 4, "float32": 4, "uint8": 1, "float8_e4m3fn": 1, "bfloat16": 2}


def regions(sizes: Sizes) -> dict[str, Region]:
    """Return the regions of one rank's buffer by name, in ascending order of their offsets."""
    x_ring, h_ring = sizes.rings
    found, offset = {}, 0
    for name, shape, dtype, writers, readers in arrays(sizes, x_ring, h_ring, sizes.pool_blocks):
        found[name] = Region(name, offset, shape, getattr(torch, dtype), writers, readers)
        offset = align(offset + region_bytes(shape, ITEM_BYTES[dtype]))
    return found


def buffer_bytes(sizes: Sizes) -> int:
    """Return the bytes of one rank's buffer, a multiple of ALIGNMENT_BYTES."""
    last = list(regions(sizes).values())[-1]
    return align(last.offset_bytes + last.num_bytes)


def view(storage: torch.Tensor, region: Region) -> torch.Tensor:
    """Return a region of `storage` (uint8, 1-d, one rank's buffer) as its array, without a copy.

    Raises:
        ValueError: the storage is too short.
    """
    stop = region.offset_bytes + region.num_bytes
    if stop > storage.numel():
        raise ValueError(f"mega_moe: requires {stop} bytes for {region.name}, got {storage.numel()}")
    return storage[region.offset_bytes : stop].view(region.dtype).view(region.shape)


# --------------------------------------------------------------------------- slots
def pool_row(block: Any, row: Any, block_m: Any) -> Any:
    """Return the number of a row of a block in the pool."""
    return block * block_m + row


def combine_row(rank: Any, slot: Any, token: Any, tokens: Any, rank_rows: Any) -> Any:
    """Return the row of the combine buffers for expert `slot` of a rank's token.

    Each rank has `rank_rows` rows there, at least topk * tokens.
    """
    return rank * rank_rows + slot * tokens + token


def source_row(rank: Any, token: Any, tokens: Any) -> Any:
    """Return the row of the inputs, rank by rank."""
    return rank * tokens + token


# --------------------------------------------------------------------------- against DeepGEMM's layout
def published_bytes(sizes: Sizes) -> int:
    """Return the bytes of the published kernel's buffer for the same shape (spec 7.3), its ring the largest.

    Barriers, send and receive counts, four counters an eight rows of ring, the table of source rows, 12 bytes
    a pool row, inputs, both rings with a scale a 1 x 32 and room for every block size, the combine buffer.
    """
    s = sizes
    granule = 384  # tokens: the least common multiple of its block sizes
    largest_block, smallest_block = 192, 8
    scale_rows_a_row, scale_block = 16, 32
    tokens = -(-s.tokens // granule) * granule
    rows, experts = s.num_ranks * tokens, s.num_experts

    def aligned(count: int) -> int:
        return -(-count // granule) * granule

    pool = aligned(rows * min(s.topk, experts) + experts * (largest_block - 1))
    ring = min(rows * experts, aligned(rows * s.topk + experts * (granule - 1)))
    counts = 2 * 8 * s.num_ranks * experts + 8 * experts
    counters = 4 * _WORD_BYTES * (ring // smallest_block)
    table = _WORD_BYTES * experts * s.num_ranks * rows
    inputs = tokens * (s.hidden + s.hidden // scale_block + 12 * s.topk)
    widths = s.hidden + s.inter
    rings = ring * (widths + scale_rows_a_row * (widths // scale_block) + _WORD_BYTES)
    combine = _BF16_BYTES * s.topk * tokens * s.hidden
    return 32 + counts + counters + table + 12 * pool + inputs + rings + combine
