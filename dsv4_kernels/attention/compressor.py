"""Compressor: softmax over the rows of a block of tokens, channel by channel, and the KV path (report 2.3.1).

A block of threads makes one entry of eight rows (m = 4: four tokens' series b, four tokens' series a) or 128
(m' = 128), each from this call's tokens or from the request's state. Sums are in the order of rows, in fixed
groups, each step rounded as IEEE says: an entry has the same bits in prefill, in chunks and token by token.
Design and measurements: docs/attention.md.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tilelang import language as T

from dsv4_kernels import runtime
from dsv4_kernels.attention import compressor_reference, reference
from dsv4_kernels.attention.compressor_pool import (
    CLAUSES,
    CONSTS,
    Config,
    channels,
    make_rows,
    pooling,
    require_rows,
    rms_norm,
)
from dsv4_kernels.attention.compressor_state import OVERLAPPING, POSITION, state_rows
from dsv4_kernels.attention.decode_body import MULTIPROCESSORS
from dsv4_kernels.contract import Contract, require_shape, require_tensor
from dsv4_kernels.registry import Case, KernelSpec, Variant, operator
from dsv4_kernels.tile.pairs import (
    e4m3_pair,
    even_f32,
    larger_magnitude,
    odd_f32,
    rotated_pair,
)
from dsv4_kernels.tile.scale import ue8m0_scale

NAME = "compressor"
HEAD_DIM = 512
ROPE_DIM = 64
NOPE_DIM = HEAD_DIM - ROPE_DIM
PAIRS = HEAD_DIM // 2  # of neighbouring dims
BLOCK_PAIRS = 64 // 2  # of a scale block
BLOCKS = PAIRS // BLOCK_PAIRS  # the last is rotated and kept in bf16
NOPE_BLOCKS = BLOCKS - 1
E4M3_MAX = 448.0
AMAX_MIN = 1e-4  # keeps an all-zero block finite
RATIOS = (4, 128)  # tokens of a block
# Entries of m = 4 a multiprocessor: few have registers for all of their rows, many hide each other's latency.
FEW_BLOCKS, MANY_BLOCKS = 4, 5
FEW = 2 * FEW_BLOCKS * MULTIPROCESSORS  # entries: two rounds
CONTRACT = Contract((*CLAUSES, "0 < num_positions", "num_positions <= MAX_POSITIONS"), consts=CONSTS)


def make_kernel(ratio: int, config: Config) -> Any:
    """Return the PrimFunc for blocks of `ratio` tokens; entries, tokens, slots and table stay symbolic."""
    m, num_tokens, num_slots = T.dynamic("m"), T.dynamic("num_tokens"), T.dynamic("num_slots")
    num_positions = T.dynamic("num_positions")
    rows, width = state_rows(ratio), channels(ratio, HEAD_DIM)
    pool = pooling(ratio, HEAD_DIM, config)

    @T.prim_func
    def compressor_kernel(
        kv: T.Tensor[(num_tokens, width), T.float32],
        score: T.Tensor[(num_tokens, width), T.float32],
        kv_state: T.Tensor[(num_slots, rows, width), T.float32],
        score_state: T.Tensor[(num_slots, rows, width), T.float32],
        blocks: T.Tensor[(m, 4), T.int32],
        ape: T.Tensor[(ratio, width), T.float32],
        weight: T.Tensor[(PAIRS,), T.int32],
        cos_sin: T.Tensor[(num_positions, 2, BLOCK_PAIRS), T.float32],
        nope: T.Tensor[(m, NOPE_BLOCKS * BLOCK_PAIRS), T.uint16],
        scale: T.Tensor[(m, BLOCKS), T.uint8],
        rope: T.Tensor[(m, BLOCK_PAIRS), T.int32],
    ):
        with T.Kernel(m, threads=config.threads(HEAD_DIM)) as entry:
            T.annotate_min_blocks_per_sm(config.blocks)
            mean = T.alloc_shared((HEAD_DIM,), T.float32)
            words = T.alloc_fragment((PAIRS,), T.int32)
            norm_weight = T.alloc_fragment((PAIRS,), T.int32)
            magnitude = T.alloc_fragment((BLOCKS, BLOCK_PAIRS), T.int32)
            amax = T.alloc_fragment((BLOCKS,), T.int32)
            exponent = T.alloc_fragment((BLOCKS,), T.int32)
            place = T.alloc_local((1, 4), T.int32)
            cos = T.alloc_fragment((BLOCK_PAIRS,), T.float32)
            sin = T.alloc_fragment((BLOCK_PAIRS,), T.float32)
            # Read once, and into registers: a row's address would wait for each read of it.
            for c in T.unroll(4):
                place[0, c] = blocks[entry, c]
            for p in T.Parallel(PAIRS):
                norm_weight[p] = weight[p]
            for p in T.Parallel(BLOCK_PAIRS):
                first = place[0, POSITION] // ratio * ratio
                cos[p] = cos_sin[first, 0, p]
                sin[p] = cos_sin[first, 1, p]
            pool(mean, kv, score, kv_state, score_state, ape, place, 0)
            rms_norm(mean, norm_weight, words, HEAD_DIM)
            for b, p in T.Parallel(BLOCKS, BLOCK_PAIRS):
                magnitude[b, p] = larger_magnitude(words[b * BLOCK_PAIRS + p])
            T.reduce_max(magnitude, amax, dim=1)
            for b in T.Parallel(BLOCKS):
                exponent[b] = ue8m0_scale(amax[b], AMAX_MIN, 1.0 / E4M3_MAX)
            for b in T.Parallel(BLOCKS):
                scale[entry, b] = T.cast(T.if_then_else(b < NOPE_BLOCKS, exponent[b], 0), "uint8")
            for b, p in T.Parallel(NOPE_BLOCKS, BLOCK_PAIRS):
                nope[entry, b * BLOCK_PAIRS + p] = e4m3_pair(
                    words[b * BLOCK_PAIRS + p], exponent[b], E4M3_MAX
                )
            for p in T.Parallel(BLOCK_PAIRS):
                rope[entry, p] = rotated_pair(
                    even_f32(words[NOPE_BLOCKS * BLOCK_PAIRS + p]),
                    odd_f32(words[NOPE_BLOCKS * BLOCK_PAIRS + p]),
                    cos[p],
                    sin[p],
                )

    return compressor_kernel


def _empty_outputs(
    kv: torch.Tensor,
    score: torch.Tensor,
    kv_state: torch.Tensor,
    score_state: torch.Tensor,
    blocks: torch.Tensor,
    *_: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m = blocks.shape[0]
    nope = kv.new_empty((m, NOPE_DIM), dtype=torch.float8_e4m3fn)
    scale = kv.new_empty((m, BLOCKS), dtype=torch.uint8)
    return nope, scale, kv.new_empty((m, ROPE_DIM), dtype=torch.bfloat16)


@operator(NAME, _empty_outputs)
def compressor(
    kv: torch.Tensor,
    score: torch.Tensor,
    kv_state: torch.Tensor,
    score_state: torch.Tensor,
    blocks: torch.Tensor,
    ape: torch.Tensor,
    weight: torch.Tensor,
    cos_sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compress blocks of tokens into the parts of cache rows: m = 4 (overlapping) or m' = 128.

    Each channel of an entry is the mean of its block's rows, weighted by the softmax of score + ape.
    With m = 4 these are series b (channels 0..511) of the four tokens before and series a (512..1023) of
    the block's own; tokens before the first of a request do not count. The mean is rounded to bf16; norm,
    rotation (position of the block's first token) and cast are those of `kv_entry`. All steps of the softmax
    are fp32 in one order (`compressor_reference`), so an entry's bits depend on its rows alone.

    State is never cleared: a row of it counts only for positions that the request has written.

    Args:
        kv: [num_tokens, 1024] fp32 (m = 4) or [num_tokens, 512] (m' = 128): this call's tokens.
        score: as kv, before the bias; finite.
        kv_state: [num_slots, 8, 1024] or [num_slots, 128, 512] fp32: a request's last tokens before this
            call, a token at the row of its position modulo the rows: see `state_write`.
        score_state: as kv_state, before the bias.
        blocks: [m, 4] int32, see `plan`: last token of the block (its row in kv), how many tokens up to
            there are this call's, that token's position, the request's slot. (-1, 0, -1, -1): no block, its
            row is an entry of zeros. m = 0 is allowed.
        ape: [4, 1024] or [128, 512] fp32, added to the scores by place in the block.
        weight: [512] bf16, of the norm.
        cos_sin: [num_positions, 64] fp32: 32 cosines, then 32 sines.
        All contiguous and 16-byte aligned, on one device.

    Returns:
        nope: [m, 448] e4m3.
        scale: [m, 8] uint8: seven UE8M0 bytes and a zero.
        rope: [m, 64] bf16.

    Raises:
        ContractError: a clause above does not hold; nothing was launched.
    """
    require_rows(NAME, HEAD_DIM, RATIOS, kv, score, kv_state, score_state, blocks, ape, weight)
    require_tensor(NAME, "cos_sin", cos_sin, dtype=torch.float32, ndim=2, device=kv.device)
    m, num_tokens, num_slots = blocks.shape[0], kv.shape[0], kv_state.shape[0]
    num_positions, ratio = cos_sin.shape[0], ape.shape[0]
    CONTRACT.check(NAME, m=m, num_tokens=num_tokens, num_slots=num_slots, num_positions=num_positions)
    require_shape(NAME, "cos_sin", cos_sin, (num_positions, ROPE_DIM))
    args = (kv, score, kv_state, score_state, blocks, ape, weight, cos_sin)
    if runtime.uses_reference(kv):
        return compressor_reference.compressor(*args)
    nope, scale, rope = _empty_outputs(*args)
    if m:
        words = (weight.view(torch.int32), cos_sin.view(num_positions, 2, BLOCK_PAIRS))
        outputs = (nope.view(torch.uint16), scale, rope.view(torch.int32))
        kwargs = _select(ratio, m).kwargs
        runtime.launch(make_kernel, kwargs, (*args[:-2], *words, *outputs))
    return nope, scale, rope


@cache
def _variant(ratio: int, is_few: bool = False) -> Variant:
    if ratio != OVERLAPPING:
        return Variant(f"r{ratio}", {"ratio": ratio, "config": Config(2, 4, 2)})
    config = Config(1, 8, FEW_BLOCKS if is_few else MANY_BLOCKS)
    return Variant(f"r{ratio}-few" if is_few else f"r{ratio}", {"ratio": ratio, "config": config})


def _select(ratio: int, m: int) -> Variant:
    return _variant(ratio, ratio == OVERLAPPING and m <= FEW)


def make_inputs(dims: Mapping[str, int], device: torch.device, seed: int) -> tuple[torch.Tensor, ...]:
    """Return `make_rows` and the table of angles."""
    table = reference.rope_table(dims["num_positions"], 160000.0, True, device)
    return *make_rows(dims, HEAD_DIM, device, seed), table


def _case(case_id: str, ratio: int, m: int, num_slots: int, decode: int, *tags: str) -> Case:
    num_tokens = max(m, 1) if decode else m * ratio
    dims = {"m": m, "num_tokens": num_tokens, "num_slots": num_slots, "num_positions": 8192}
    return Case(case_id, {**dims, "ratio": ratio, "decode": decode}, tags or ("test",))


SPEC = KernelSpec(
    name=NAME,
    fn=compressor,
    reference=compressor_reference.compressor,
    make_inputs=make_inputs,
    make_kernel=make_kernel,
    variants=(_variant(OVERLAPPING, True), *(_variant(ratio) for ratio in RATIOS)),
    select=lambda d: _select(d["ratio"], d["m"]),
    contract=CONTRACT,
    cases=(
        _case("empty", 4, 0, 1, 1),
        _case("one-row", 4, 1, 1, 1),
        _case("m3-decode", 4, 3, 4, 1),
        _case("one-row-r128", 128, 1, 1, 1, "gpu"),
        *(
            _case(f"r{r}-{tokens}", r, tokens // r, 1, 0, "gpu", "bench")
            for r in RATIOS
            for tokens in (4096, 65536)
        ),
        *(_case(f"r{r}-decode64", r, 64, 64, 1, "gpu", "bench") for r in RATIOS),
    ),
    num_bytes=lambda d: (
        d["m"]
        * (
            (1 if d["ratio"] == OVERLAPPING and not d["decode"] else 2 if d["ratio"] == OVERLAPPING else 1)
            * d["ratio"]
            * channels(d["ratio"], HEAD_DIM)
            * 8
            + NOPE_DIM
            + BLOCKS
            + 2 * ROPE_DIM
        )
    ),
    row_invariant=False,  # rows of the first tensor are tokens: tests/kernels/test_compressor.py
    source="DeepSeek-V4 report 2.3.1, 2.3.2 and 3.5.1; reference model's compressor",
    small={"m": 1, "num_tokens": 4, "num_slots": 1, "num_positions": 2, "ratio": 4},
)
