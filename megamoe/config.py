"""Shape and tile of a fused kernel, and what follows from them."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from dsv4_kernels.gemm.folded_tile import BLOCK_K
from megamoe import schedule, weights
from megamoe.schedule import Geometry
from megamoe.weights import FP8_STAGES, GROUP_N, SCALE_WORDS, STEP_WORDS, TILE_N, Packed

CONSUMERS = 256  # threads that multiply: two warpgroups
PRODUCERS = 256  # two warpgroups: one whose first warp fetches weights and whose second rows, and finishers
WARP = 32
WEIGHTS_WARP, ROWS_WARP = CONSUMERS, CONSUMERS + WARP  # their first threads
DISPATCH_FIRST, DISPATCHERS = ROWS_WARP + WARP, 2 * WARP  # the other two warps of the fetching warpgroup
FINISH_FIRST, FINISHERS = CONSUMERS + 128, 128  # the warpgroup of what follows a product
THREADS = CONSUMERS + PRODUCERS
PIECE_ROWS, PIECES = 64, 3  # weight rows of a piece that is widened, 128 channels each; pieces under way
WIDE_M = 128  # rows of a block that are the instruction's rows: 64 a consuming warpgroup
TRACKS, EVENT_WORDS = 2, 3  # of a CTA that is traced: consumers, finishers; what, begin, end
_SM_REGISTERS, _REGISTER_STEP = 1 << 16, 8
_PRODUCER_REGISTERS, _WIDE_PRODUCER_REGISTERS = 32, 40  # wide products' consumers can spare some


@dataclass(frozen=True)
class Config:
    """Shape and tile of one kernel.

    Attributes:
        num_ranks: ranks that exchange tokens.
        launch_ranks: ranks, from `first_rank` on, that one launch covers: one for a process a GPU; all for
            virtual ranks, unless a peer is to be lost.
        ctas: of each rank; all CTAs of the launch have to be resident together.
        tokens: most tokens a rank.
        topk: experts a token.
        hidden, inter: channels; multiples of 256.
        num_experts: of one rank.
        wave_experts: experts a wave.
        block_m: rows a block; the instruction's N.
        dispatch_parts: tasks that copy one block.
        num_stages: depth of the products' pipeline, of 128 channels a stage; divides both hidden / 128 and
            inter / 128, so that every product begins at stage 0.
        clamp: bound of the SwiGLU's inputs.
        max_polls: of one wait, before the watchdog gives up; a poll takes 0.2 to 0.5 us.
        ctas_per_sm: CTAs that share a multiprocessor; registers are held down to it.
        first_rank: the first rank of the launch.
        share_bytes: a rank's part of what peers touch is a multiple of it: 1, or the size of the pages that
            another GPU's memory is mapped in.
        kept_bytes: at the end of each part, for those who allocate it.
        trace: events that each track of a CTA notes, see `trace`; 0: the kernel as it is used.
        copies_only: nothing is multiplied nor activated: rows travel both ways, with all signals. To measure.
        dispatchers: two more warps dispatch all waves but the first, beside the products; otherwise consumers
            do, between them.
        fp8: weights are e4m3 with a scale a 128 x 128, instead of e2m1.
        shared: each rank's first expert is the shared one: e4m3 weights, and all of the rank's own tokens, in
            their last slot. `num_experts` and `topk` count it.
        wide: rows of a block, 128 of them, are the instruction's rows, and e4m3 weights its columns, from
            shared memory: for many rows. A stage holds both halves of a tile's weight rows, and products
            begin at any stage.
        widened: e2m1 weights for wide products: two more warps, in the place of dispatchers, widen each
            expert once, to a ring in memory of two waves, from where products take it as e4m3 weights.
    """

    num_ranks: int
    launch_ranks: int
    ctas: int
    tokens: int
    topk: int
    hidden: int
    inter: int
    num_experts: int
    wave_experts: int
    block_m: int
    dispatch_parts: int
    num_stages: int = 3
    clamp: float = 10.0
    max_polls: int = 2_000_000
    ctas_per_sm: int = 1
    first_rank: int = 0
    share_bytes: int = 1
    kept_bytes: int = 0
    trace: int = 0
    copies_only: bool = False
    dispatchers: bool = False
    fp8: bool = False
    shared: bool = False
    wide: bool = False
    widened: bool = False

    def __post_init__(self) -> None:
        """Check what the pipeline relies on."""
        steps = min(self.l1_steps, self.l2_steps)
        if self.widened and (not self.wide or self.fp8 or self.shared or self.dispatchers):
            raise ValueError(
                "mega_moe: widened requires wide, and neither fp8, shared nor dispatchers, got "
                f"wide={self.wide}, fp8={self.fp8}, shared={self.shared}, dispatchers={self.dispatchers}"
            )
        if self.widened and self.expert_pieces < self.ctas:
            raise ValueError(
                "mega_moe: widened requires pieces of an expert >= ctas, got "
                f"{self.expert_pieces} and ctas={self.ctas}"
            )
        if self.wide and not (
            (self.fp8 or self.widened) and self.block_m == WIDE_M and 2 <= self.num_stages <= steps
        ):
            raise ValueError(
                f"mega_moe: wide requires fp8 or widened, block_m == {WIDE_M} and 2 <= num_stages <= "
                f"{steps}, got fp8={self.fp8}, block_m={self.block_m}, num_stages={self.num_stages}"
            )
        if self.wide:
            return
        if self.num_stages < 2 or math.gcd(self.l1_steps, self.l2_steps) % self.num_stages:
            got = f"{self.num_stages} for {self.l1_steps} and {self.l2_steps}"
            raise ValueError(
                f"mega_moe: requires num_stages >= 2 that divides both products' stages, got {got}"
            )
        if (self.fp8 or self.shared) and self.num_stages % FP8_STAGES:
            raise ValueError(
                f"mega_moe: requires num_stages % {FP8_STAGES} == 0 for e4m3 weights, got {self.num_stages}"
            )

    @property
    def geometry(self) -> Geometry:
        """What `schedule` needs."""
        sizes = {
            "num_ranks": self.num_ranks,
            "tokens": self.tokens,
            "topk": self.topk,
            "num_experts": self.num_experts,
            "block_m": self.block_m,
        }
        x_ring, h_ring = schedule.rings(wave_experts=self.wave_experts, **sizes)
        return Geometry(
            dispatch_parts=self.dispatch_parts,
            l1_tiles=self.inter // GROUP_N,
            l2_tiles=self.hidden // TILE_N,
            num_experts=self.num_experts,
            wave_experts=self.wave_experts,
            x_ring=x_ring,
            h_ring=h_ring,
        )

    def padded(self, rows: int, row_bytes: int) -> int:
        """Return the rows, at least `rows`, of a rank's part of a tensor over all ranks."""
        multiple = self.share_bytes // math.gcd(self.share_bytes, row_bytes)
        kept = -(-self.kept_bytes // row_bytes)
        return -(-(rows + kept) // multiple) * multiple

    @property
    def x_ring_shape(self) -> tuple[int, int]:
        """Shape of the ring of received rows, of one rank."""
        return self.geometry.x_ring * self.block_m, self.hidden

    @property
    def h_ring_shape(self) -> tuple[int, int]:
        """Shape of the ring of SwiGLU outputs, of one rank."""
        return self.geometry.h_ring * self.block_m, self.inter

    @property
    def x_rows(self) -> int:
        """Rows of a rank's part of x."""
        return self.padded(self.tokens, self.hidden)

    @property
    def scale_rows(self) -> int:
        """Rows of a rank's part of x_scale."""
        return self.padded(self.tokens, self.hidden // BLOCK_K)

    @property
    def combine_rows(self) -> int:
        """Rows of a rank's part of the combine buffers."""
        return self.padded(self.topk * self.tokens, 2 * self.hidden)

    @property
    def routing_words(self) -> int:
        """Words of a rank's part of the routings of all ranks."""
        return self.padded(self.num_ranks * self.tokens * self.topk, 4)

    @property
    def signal_words(self) -> int:
        """Words of a rank's part of the signals, the first `num_ranks` of them used."""
        return self.padded(self.num_ranks, 4)

    @property
    def status_words(self) -> int:
        """Words of a rank's status: the watchdog's, then what `trace` notes."""
        return 1 + self.ctas * (TRACKS * self.trace * EVENT_WORDS + 1) if self.trace else 1

    @property
    def l1_steps(self) -> int:
        """Stages of a linear-1 product."""
        return self.hidden // BLOCK_K

    @property
    def l2_steps(self) -> int:
        """Stages of a linear-2 product."""
        return self.inter // BLOCK_K

    @property
    def used_l1_steps(self) -> int:
        """Stages of a linear-1 product that are multiplied."""
        return 0 if self.copies_only else self.l1_steps

    @property
    def used_l2_steps(self) -> int:
        """Stages of a linear-2 product that are multiplied."""
        return 0 if self.copies_only else self.l2_steps

    @property
    def launch_registers(self) -> int:
        """Registers a thread that a CTA is launched with: as many as a multiprocessor has for it."""
        return _SM_REGISTERS // (self.ctas_per_sm * THREADS) // _REGISTER_STEP * _REGISTER_STEP

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a consumer and of a producer: together no more than the CTA has, or it hangs."""
        producer = _WIDE_PRODUCER_REGISTERS if self.wide else _PRODUCER_REGISTERS
        more = (self.launch_registers - producer) * PRODUCERS // CONSUMERS // _REGISTER_STEP * _REGISTER_STEP
        return self.launch_registers + more, producer

    @property
    def expert_steps(self) -> int:
        """Steps of one routed expert's weights, see `weights`."""
        g = self.geometry
        return (FP8_STAGES if self.fp8 and not self.wide else 1) * (
            g.l1_tiles * self.l1_steps + g.l2_tiles * self.l2_steps
        )

    def stage(self, done: Any, ko: Any) -> Any:
        """Return the stage of round `ko` of a product, behind `done` rounds of others."""
        return (done + ko) % self.num_stages if self.wide else ko % self.num_stages

    @property
    def ring_experts(self) -> int:
        """Experts whose widened weights the ring holds: two waves."""
        return 2 * self.wave_experts

    @property
    def expert_pieces(self) -> int:
        """Pieces that an expert is widened in."""
        return self.expert_steps * (TILE_N // PIECE_ROWS)

    @property
    def wide_ring_shape(self) -> tuple[int, int, int]:
        """Shape of one rank's ring of widened weights; one step that nobody touches, if there is none."""
        return self.ring_experts * self.expert_steps if self.widened else 1, TILE_N, BLOCK_K

    @property
    def widened_words(self) -> int:
        """Counters of the ring of one rank: an expert's CTAs that have widened, a wave's products."""
        return self.num_experts + self.geometry.num_waves

    @property
    def stage_shape(self) -> tuple[int, int]:
        """Shape of a stage's weights."""
        return (TILE_N, BLOCK_K) if self.widened else self.step_shape

    @property
    def step_shape(self) -> tuple[int, int]:
        """Shape of a step's weights: words, or rows and channels of e4m3."""
        if not self.fp8:
            return TILE_N, STEP_WORDS
        return (TILE_N if self.wide else GROUP_N), BLOCK_K

    @property
    def offset_words(self) -> int:
        """Words of a step's offsets or scales."""
        if not self.fp8:
            return TILE_N
        return FP8_STAGES * SCALE_WORDS if self.wide else SCALE_WORDS

    @property
    def all_steps(self) -> int:
        """Steps of all experts of one rank."""
        return self.first_step(self.num_experts)

    def arguments(self, weights: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return words, offsets and factors as the kernel takes them."""
        return weights.arguments(self.all_steps, self.step_shape, self.offset_words, fp8=self.fp8)

    @property
    def is_mixed(self) -> bool:
        """Whether one expert's weights are of another format than the others'."""
        return self.shared and not self.fp8

    def first_step(self, expert: Any) -> Any:
        """Return the number of an expert's first step."""
        return weights.first_step(expert, self.expert_steps, is_mixed=self.is_mixed)

    def stages(self, steps: int, expert: Any) -> Any:
        """Return the stages that `steps` blocks of 128 channels of one of an expert's tiles take."""
        return weights.stages(steps, expert, is_fp8=self.fp8 and not self.wide, is_mixed=self.is_mixed)

    @property
    def combine_parts(self) -> int:
        """Parts of a token's channels that CTAs add up separately: more where there are few tokens."""
        parts = 1
        while self.tokens * parts < self.ctas and self.hidden % (4 * parts * CONSUMERS) == 0:
            parts *= 2
        return parts

    @property
    def chunk(self) -> int:
        """Channels of such a part."""
        return self.hidden // self.combine_parts

    @property
    def part_rows(self) -> int:
        """Rows of a block that one dispatch task copies."""
        return self.block_m // self.dispatch_parts

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
